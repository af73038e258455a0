// DeepSeek-V4 for one token at a time, in plain JavaScript: the formulas of nanowhale.model's rope, attention, moe, hyper, block, mtp and whale.
// D hidden, N streams, H heads, K head dim, R rope dim, E experts, V vocabulary. Vectors and matrices are flat arrays, rows first;
// sums run in double precision, what is kept is float32.

// ---------------------------------------------------------------- small parts

export const sum = x => x.reduce((a, b) => a+b, 0)
export const sigmoid = z => 1/(1+Math.exp(-z))
const clamp = (x, low, high) => Math.min(Math.max(x, low), high)
const add = (x, y) => x.map((v, i) => v+y[i])

export function softmax(z) {
  const top = z.reduce((a, b) => Math.max(a, b)), e = Float64Array.from(z, v => Math.exp(v-top)), total = sum(e)
  return e.map(v => v/total)
}

export function linear(W, x) {                      // W [n,d], x [d] -> [n]
  const d = x.length, y = new Float32Array(W.length/d)
  for (let i=0, k=0; i<y.length; i++) {
    let total = 0
    for (let j=0; j<d; j++) total += W[k++]*x[j]
    y[i] = total
  }
  return y
}

export function rmsNorm(x, eps, weight) {           // x [d], weight [d] or none
  const scale = 1/Math.sqrt(sum(x.map(v => v*v))/x.length+eps)
  return x.map((v, i) => v*scale*(weight ? weight[i] : 1))
}

// ---------------------------------------------------------------- rotary positions

export const ropeAngles = (pos, R, theta) => Array.from({length: R/2}, (_, i) => pos/theta**(2*i/R))

export function rotate(x, angles, sign=1) {         // turns the last channels of x [K], partners side by side; sign -1: the way back
  const y = x.slice(), first = x.length-2*angles.length
  angles.forEach((angle, i) => {
    const c = Math.cos(angle), s = sign*Math.sin(angle), at = first+2*i, a = x[at], b = x[at+1]
    y[at] = a*c-b*s
    y[at+1] = a*s+b*c
  })
  return y
}

// ---------------------------------------------------------------- attention

// One query [K] over keys = values [K] each, with the head's sink in the denominator: weights, the sink's share, and the average
export function attend(q, kv, sink) {
  const scores = kv.map(k => { let z = 0; for (let i=0; i<q.length; i++) z += q[i]*k[i]; return z/Math.sqrt(q.length) })
  const p = softmax([...scores, sink]), out = new Float32Array(q.length)
  kv.forEach((v, s) => { for (let i=0; i<v.length; i++) out[i] += p[s]*v[i] })
  return {weights: p.slice(0, -1), sink: p[kv.length], out}
}

// ---------------------------------------------------------------- experts

const softplus = z => Math.max(z, 0)+Math.log1p(Math.exp(-Math.abs(z)))
export const SCORES = {sqrtsoftplus: z => z.map(v => v<-40 ? Math.exp(v/2) : Math.sqrt(softplus(v))), sigmoid: z => z.map(sigmoid), softmax}

// The k experts with the best biased scores, best first, and their weights from the plain ones
export function route(scores, bias, k, scale) {
  const biased = Array.from(scores, (s, e) => s+bias[e])
  const experts = [...biased.keys()].sort((a, b) => biased[b]-biased[a]).slice(0, k)
  const total = sum(experts.map(e => scores[e]))+1e-20
  return {experts, weights: experts.map(e => scale*scores[e]/total)}
}

export function swiglu(gate, up, limit) {
  return gate.map((g, i) => { g = Math.min(g, limit); return g*sigmoid(g)*clamp(up[i], -limit, limit) })
}

// ---------------------------------------------------------------- streams

// Free numbers [N*N], source first and target last, to a nearly doubly stochastic mix: softmax over targets, then divide by what
// targets receive, and iters-1 times by what sources give and what targets receive
export function sinkhorn(logits, iters, eps=1e-6) {
  const N = Math.sqrt(logits.length), m = new Float64Array(N*N)
  for (let j=0; j<N; j++) m.set(softmax(logits.slice(j*N, j*N+N)).map(v => v+eps), j*N)
  const divide = at => {                            // at(a, b): a's b-th number; every a is divided by its sum
    for (let a=0; a<N; a++) {
      let total = eps
      for (let b=0; b<N; b++) total += m[at(a, b)]
      for (let b=0; b<N; b++) m[at(a, b)] /= total
    }
  }
  const sources = (j, k) => j*N+k, targets = (k, j) => j*N+k
  divide(targets)
  for (let i=1; i<iters; i++) { divide(sources); divide(targets) }
  return m
}

export function collapse(pre, X) {                  // pre [N], X [N,D] -> [D], what a sublayer reads
  const D = X.length/pre.length, x = new Float32Array(D)
  pre.forEach((p, n) => { for (let d=0; d<D; d++) x[d] += p*X[n*D+d] })
  return x
}

export function mix(post, comb, X, y) {             // streams [N,D] after a sublayer: post[k]*y + sum over j of comb[j,k]*X[j]
  const N = post.length, D = y.length, out = new Float32Array(N*D)
  for (let k=0; k<N; k++) for (let d=0; d<D; d++) {
    let total = post[k]*y[d]
    for (let j=0; j<N; j++) total += comb[j*N+k]*X[j*D+d]
    out[k*D+d] = total
  }
  return out
}

// ---------------------------------------------------------------- the whale

const PLAIN = {layer_types: 'sliding_attention', mlp_layer_types: 'moe'}

export class Whale {
  constructor(config, buffer) {                     // config.json and the bytes of model.safetensors
    for (const [field, only] of Object.entries(PLAIN))
      if ((config[field] ?? []).some(kind => kind!==only)) throw Error(`${field}: this page runs ${only} layers only`)
    if (config.hc_transposed || config.model_type==='nanowhale') throw Error('hc_transposed: this page runs V4\'s orientation only')
    const rotating = Math.floor(config.head_dim*config.partial_rotary_factor)
    Object.assign(this, {config, tensors: readSafetensors(buffer), R: config.qk_rope_head_dim ?? rotating, eps: config.rms_norm_eps})
  }
  // tokens read, and keys = values of each layer and of the MTP block
  memory() { return {length: 0, layers: Array.from({length: this.config.num_hidden_layers}, () => []), mtp: []} }

  get(name) { return this.tensors[name] ?? this.tensors[name+'.weight'] }
  norm(name, x) { return rmsNorm(x, this.eps, this.get(name)) }
  embedding(id) { const {hidden_size: D} = this.config; return this.get('model.embed_tokens').subarray(id*D, id*D+D) }
  get guessesTwice() { return 'mtp.0.h_proj.weight' in this.tensors }   // is there an MTP block?

  project(name, X) {                                // numbers out of all streams of a token, as if these had root mean square 1
    const scale = 1/Math.sqrt(sum(X.map(v => v*v))/X.length+this.eps)
    return linear(this.get(name), X).map(v => v*scale)
  }

  connection(name, X) {                             // how a sublayer reads, writes and mixes the streams
    const N = this.config.hc_mult, {hc_eps, hc_sinkhorn_iters} = this.config
    const m = this.project(`${name}.fn`, X), base = this.get(`${name}.base`), scale = this.get(`${name}.scale`)
    const part = (a, from, to) => Array.from(m.slice(from, to), (v, i) => scale[a]*v+base[from+i])
    return {pre: part(0, 0, N).map(z => sigmoid(z)+hc_eps), post: part(1, N, 2*N).map(z => 2*sigmoid(z)),
      comb: sinkhorn(part(2, 2*N, 2*N+N*N), hc_sinkhorn_iters, hc_eps)}
  }

  attention(name, x, pos, kept) {
    const {num_attention_heads: H, head_dim: K, o_groups: G, sliding_window: W, rope_theta} = this.config
    const angles = ropeAngles(pos, this.R, rope_theta), w = part => this.get(`${name}.${part}`)
    const q = linear(w('q_b_proj'), this.norm(`${name}.q_a_norm`, linear(w('q_a_proj'), x)))
    kept.push(rotate(this.norm(`${name}.kv_norm`, linear(w('kv_proj'), x)), angles))
    if (kept.length>W) kept.shift()                 // a query sees W tokens, itself among them
    const heads = Array.from({length: H}, (_, h) =>
      attend(rotate(rmsNorm(q.slice(h*K, h*K+K), this.eps), angles), kept, w('sinks')[h]))
    const o = new Float32Array(H*K), width = H*K/G, a = w('o_a_proj'), rows = a.length/G, low = []
    heads.forEach(({out}, h) => o.set(rotate(out, angles, -1), h*K))
    for (let g=0; g<G; g++) low.push(...linear(a.subarray(g*rows, g*rows+rows), o.subarray(g*width, g*width+width)))
    return {y: linear(w('o_b_proj'), low), heads}
  }

  experts(name, x, bias) {
    const {num_experts_per_tok: k, n_routed_experts: E, routed_scaling_factor, swiglu_limit, scoring_func} = this.config
    const w = part => this.get(`${name}.${part}`)
    const scores = SCORES[scoring_func](linear(w('gate'), x))
    const chosen = route(scores, bias ? w('gate.e_score_correction_bias') : new Float32Array(E), k, routed_scaling_factor)
    let y = linear(w('shared_experts.down_proj'),
      swiglu(linear(w('shared_experts.gate_proj'), x), linear(w('shared_experts.up_proj'), x), swiglu_limit))
    chosen.experts.forEach((e, i) => {
      const own = W => W.subarray(e*W.length/E, (e+1)*W.length/E), both = linear(own(w('experts.gate_up_proj')), x), I = both.length/2
      const out = linear(own(w('experts.down_proj')), swiglu(both.subarray(0, I), both.subarray(I), swiglu_limit))
      y = add(y, out.map(v => v*chosen.weights[i]))
    })
    return {y, scores, ...chosen}
  }

  block(name, X, pos, kept, bias) {                 // streams [N,D] after one block, and what it did
    const first = this.connection(`${name}.attn_hc`, X)
    const attention = this.attention(`${name}.self_attn`, this.norm(`${name}.input_layernorm`, collapse(first.pre, X)), pos, kept)
    X = mix(first.post, first.comb, X, attention.y)
    const second = this.connection(`${name}.ffn_hc`, X)
    const moe = this.experts(`${name}.mlp`, this.norm(`${name}.post_attention_layernorm`, collapse(second.pre, X)), bias)
    return {streams: mix(second.post, second.comb, X, moe.y), heads: attention.heads, moe, mixes: [first, second]}
  }

  read(head, norm, X) {                             // streams to logits [V], by a learned collapse and a norm; the last matrix is shared
    const base = this.get(`${head}.hc_base`), [scale] = this.get(`${head}.hc_scale`)
    const pre = this.project(`${head}.hc_fn`, X).map((z, n) => sigmoid(scale*z+base[n])+this.config.hc_eps)
    return linear(this.get('lm_head'), this.norm(norm, collapse(pre, X)))
  }

  // Read one token: the logits of the next [V], the streams [N,D], and what each layer did on the way
  step(id, memory, {bias=true}={}) {
    const {hidden_size: D, hc_mult: N} = this.config, layers = []
    let streams = new Float32Array(N*D)
    for (let n=0; n<N; n++) streams.set(this.embedding(id), n*D)
    memory.layers.forEach((kept, l) => {
      layers.push(this.block(`model.layers.${l}`, streams, memory.length, kept, bias))
      streams = layers[l].streams
    })
    memory.length++
    return {logits: this.read('model.hc_head', 'model.norm', streams), streams, layers}
  }

  // The MTP block, between one step and the next: from the streams of the token just read and the one after it, the logits [V] of the
  // token after that. It keeps a key for each token, so it wants to be asked once after every step
  second({streams}, told, memory) {
    const {hidden_size: D, hc_mult: N} = this.config, w = part => this.get(`mtp.0.${part}`), X = new Float32Array(N*D)
    const e = linear(w('e_proj'), this.norm('mtp.0.enorm', this.embedding(told)))
    for (let n=0; n<N; n++) X.set(add(e, linear(w('h_proj'), this.norm('mtp.0.hnorm', streams.subarray(n*D, n*D+D)))), n*D)
    return this.read('mtp.0.hc_head', 'mtp.0.norm', this.block('mtp.0', X, memory.length-1, memory.mtp, true).streams)
  }
}

// ---------------------------------------------------------------- choosing a token

// Probabilities [V] after temperature (0: the likeliest alone) and a cut to the k likeliest
export function probabilities(logits, temperature=1, k=logits.length) {
  if (temperature===0) { const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b))); return Float64Array.from(logits, (_, i) => +(i===best)) }
  const least = logits.slice().sort()[Math.max(0, logits.length-k)]
  return softmax(Array.from(logits, z => z<least ? -Infinity : z/temperature))
}

export function draw(p, random=Math.random()) {     // the id at which the cumulated probability passes `random`
  let last = 0
  for (let i=0; i<p.length; i++) if (p[i]>0) { last = i; random -= p[i]; if (random<0) break }
  return last
}

// A text goes on: up to n tokens, a piece at a time, until the whale says that it ends or has no more positions
export function* goOn(whale, tokenizer, text, n, temperature=.7, k=40) {
  const memory = whale.memory(), {bos_token_id, eos_token_id, max_position_embeddings: most} = whale.config
  let logits
  for (const id of [bos_token_id, ...tokenizer.encode(text)].slice(0, most)) ({logits} = whale.step(id, memory))
  while (n-- && memory.length<most) {
    const id = draw(probabilities(logits, temperature, k))
    if (id===eos_token_id) return
    yield tokenizer.decode([id]);
    ({logits} = whale.step(id, memory))
  }
}

// ---------------------------------------------------------------- a checkpoint folder

const HALF = new Float32Array(2**16).map((_, u) => {
  const sign = u>>15 ? -1 : 1, power = u>>10 & 31, part = u & 1023
  return power===31 ? (part ? NaN : sign*Infinity) : sign*(power ? 2**(power-15)*(1+part/1024) : 2**-24*part)
})
const READ = {F32: b => new Float32Array(b), BF16: b => new Float32Array(Uint32Array.from(new Uint16Array(b), u => u<<16).buffer),
  F16: b => {                                       // a loop, ten times as fast as `from` with a function
    const u = new Uint16Array(b), x = new Float32Array(u.length)
    for (let i=0; i<u.length; i++) x[i] = HALF[u[i]]
    return x
  }}

export function readSafetensors(buffer) {           // name -> flat float32 array; length of the header, header, numbers
  const size = Number(new DataView(buffer).getBigUint64(0, true))
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size))), tensors = {}
  delete header.__metadata__
  for (const [name, {dtype, data_offsets: [from, to]}] of Object.entries(header)) {
    if (!READ[dtype]) throw Error(`${name}: stored as ${dtype}, which this page does not read`)
    tensors[name] = READ[dtype](buffer.slice(8+size+from, 8+size+to))
  }
  return tensors
}
