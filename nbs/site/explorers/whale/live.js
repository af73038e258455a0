// The small trained whale reads a beginning, goes on with it, and shows what it does
import {draw as sample, probabilities, softmax} from '../whale.js'
import {$, COLORS, EXPERTS, bar, controls, el, number, percent, show, tokenRow, visible} from '../ui.js'
import {load} from '../load.js'

const FOLDER = 'model', TOP_K = 40, AT_ONCE = 60, SHOWN = 8
let whale, tokenizer, memory, ids = [], steps = [], prompt = 0, chosen = 0, head = {l: 0, h: 0}, running = false, times = []
const rules = controls($('settings'), () => {})

const piece = id => id===whale.config.bos_token_id ? '‹begin›' : id===whale.config.eos_token_id ? '‹end›' : tokenizer.decode([id])
const quote = id => `“${visible(piece(id)).trim()}”`, quoted = i => quote(ids[i])
const full = () => ids.length>=whale.config.max_position_embeddings || ids.at(-1)===whale.config.eos_token_id

const best = z => z.reduce((at, v, i) => v>z[at] ? i : at, 0)

// The MTP block at the last token, told the next one: for good where that is known, on trial where it is not written yet
function second(told) {
  const step = steps.at(-1), mtp = [...memory.mtp]
  if (step.second?.told!==told) { const logits = whale.second(step, told, {...memory, mtp}); step.second = {told, logits, mtp, best: best(logits)} }
  return step.second
}

function take(id) {                                 // read one more token
  const start = performance.now()
  if (whale.guessesTwice && steps.length) memory.mtp = second(id).mtp
  const step = whale.step(id, memory)
  steps.push({...step, best: best(step.logits)})
  ids.push(id)
  times.push(performance.now()-start)
  chosen = id===whale.config.eos_token_id ? ids.length-2 : ids.length-1
}

function begin(list) { memory = whale.memory(); ids = []; steps = []; list.slice(0, whale.config.max_position_embeddings).forEach(take) }

function restart() {
  running = false
  begin([whale.config.bos_token_id, ...tokenizer.encode($('text').value)])
  prompt = ids.length
  draw()
}

function next() {
  const {temperature} = rules()
  take(sample(probabilities(steps.at(-1).logits, temperature, TOP_K)))
}

async function go() {
  if (running) { running = false; return }
  running = true
  for (let i=0; i<AT_ONCE && running && !full(); i++) { next(); draw(); await new Promise(done => setTimeout(done)) }
  running = false
  draw()
}

function attention(i) {                             // what token i's chosen head looks at: index of a token -> share
  const {weights} = steps[i].layers[head.l].heads[head.h], first = i+1-weights.length
  return j => j<first || j>i ? 0 : weights[j-first]
}

const deep = (color, share) => `background: color-mix(in srgb, ${color} ${(85*Math.sqrt(share)).toFixed(0)}%, transparent)`

function drawTokens() {
  const look = attention(chosen), shares = ids.map((_, j) => look(j)), most = Math.max(...shares), {sink} = steps[chosen].layers[head.l].heads[head.h]
  const best = [...shares.keys()].sort((a, b) => shares[b]-shares[a]).slice(0, 3).filter(j => shares[j]>0)
  $('looks').textContent = `Layer ${head.l+1}, head ${head.h+1} of ${quoted(chosen)}: ${best.map(j => `${percent(shares[j])} ${j===chosen ? 'on itself' : `on ${quoted(j)}`}`).join(', ')}; ${percent(sink)} into the sink.`
  tokenRow($('tokens'), ids.map(piece), chosen, i => { chosen = i; draw() }, (button, j) => {
    if (j>=prompt) button.classList.add('new')
    if (shares[j]) button.style = `background: color-mix(in srgb, ${COLORS.query} ${(75*shares[j]/most).toFixed(0)}%, transparent)`
    button.title = `${percent(shares[j])} of the attention${foreseen(j) ? '; the second guess named it' : ''}`
    if (foreseen(j)) button.append(el('i', {style: `left: 0; right: 0; background: ${COLORS.mtp}`}))
  })
}

// The likeliest tokens of one head; touched, one of them is taken, after those of `between`
function drawGuesses(root, logits, color, between, came) {
  const p = softmax(Array.from(logits)), likeliest = [...p.keys()].sort((a, b) => p[b]-p[a]).slice(0, SHOWN), from = chosen
  const go = id => { begin([...ids.slice(0, from+1), ...between, id]); prompt = Math.min(prompt, from+1); draw() }
  show(root, ...likeliest.flatMap(id => [
    el('button', {type: 'button', disabled: running, 'data-id': id, 'aria-pressed': `${came===id}`, onclick: () => go(id)}, visible(piece(id))),
    bar(p[id], color), el('span', {class: 'number'}, percent(p[id]))]))
}

const foreseen = j => j>1 && steps[j-2].second?.best===ids[j]

function drawSecond() {
  if (!whale.guessesTwice) return
  const [told=steps[chosen].best, came] = ids.slice(chosen+1), {logits, best} = steps[chosen].second ?? second(told), over = told===whale.config.eos_token_id
  $('told').textContent = quote(told)
  if (over) show('second'); else drawGuesses('second', logits, COLORS.mtp, [told], came)
  $('came').textContent = over ? 'Nothing comes after the end.' : came===best ? `${quote(came)} came: the second guess was right.` :
    came!=null ? `${quote(came)} came, not ${quote(best)}.` : chosen+1<ids.length ? 'What comes there is not written yet.' :
    `${quote(told)} is only the likeliest so far: the block is told whatever is taken.`
  const past = ids.map((_, j) => j).slice(2), count = f => past.filter(f).length
  $('tally').textContent = past.length ? `Of ${past.length} tokens the second guess named ${count(foreseen)}; the first one, a token later, ${count(j => steps[j-1].best===ids[j])}.` : ''
}

function drawLayers() {
  const {layers} = steps[chosen]
  const names = (name, list) => [el('span'), ...Array.from(list, (_, n) => el('small', {}, `${name} ${n+1}`))]
  show('heads', ...names('head', layers[0].heads), ...layers.flatMap(({heads}, l) => [el('span', {}, `layer ${l+1}`), ...heads.map(({sink}, h) =>
    el('button', {type: 'button', 'aria-pressed': `${l===head.l && h===head.h}`, 'aria-label': `layer ${l+1}, head ${h+1}: ${percent(sink)} into the sink`,
      'data-head': `${l}.${h}`, style: deep(COLORS.sink, sink),
      onclick: () => { head = {l, h}; draw(); $('heads').querySelector(`[data-head="${l}.${h}"]`).focus() }},
      percent(sink)))]))
  show('experts', ...names('expert', layers[0].moe.scores), ...layers.flatMap(({moe}, l) => [el('span', {}, `layer ${l+1}`), ...Array.from(moe.scores, (_, e) => {
    const at = moe.experts.indexOf(e), w = at<0 ? 0 : moe.weights[at]
    return el('span', {class: 'of', style: w ? null : 'opacity: .45'}, w ? number(w, 2) : `${e+1}`, el('i', {style: `width: ${100*w/whale.config.routed_scaling_factor}%; background: ${EXPERTS[e]}`}))
  })]))
}

// Each sublayer reads a weighted sum of the streams, mixes them, and writes into each: sources are rows, targets are columns
function drawMixes() {
  const all = [...Array(whale.config.hc_mult).keys()], head = (scope, name) => el('th', {scope}, name)
  const cell = (v, color, most=1) => el('td', {style: `background: color-mix(in srgb, ${color} ${(75*v/most).toFixed(0)}%, transparent)`}, number(v, 2))
  show('mixes', ...steps[chosen].layers.flatMap(({mixes}, l) => mixes.map(({pre, post, comb}, s) => el('table', {},
    el('caption', {}, `layer ${l+1}, ${s ? 'experts' : 'attention'}`),
    el('tr', {}, el('td'), ...all.map(k => head('col', `to ${k+1}`)), head('col', 'read')),
    ...all.map(j => el('tr', {}, head('row', `${j+1}`), ...all.map(k => cell(comb[j*all.length+k], COLORS.mhc)), cell(pre[j], COLORS.query))),
    el('tr', {}, head('row', 'written'), ...all.map(k => cell(post[k], COLORS.key, 2)), el('td'))))))
}

function draw() {
  for (const e of document.querySelectorAll('.which')) e.textContent = quoted(chosen)
  drawTokens(); drawLayers(); drawMixes()
  drawGuesses('next', steps[chosen].logits, COLORS.main, [], ids[chosen+1]); drawSecond()
  $('go').textContent = running ? 'Stop' : 'Continue'
  $('go').disabled = $('one').disabled = full()
  $('again').disabled = ids.length===prompt
  const mean = times.slice(-50).reduce((a, b) => a+b, 0)/Math.min(times.length, 50)
  $('pace').textContent = `${ids.length} tokens, ${mean.toFixed(1)} ms each`
}

async function compare() {                          // the kept logits of PyTorch's beside ours
  const check = await (await fetch(`${FOLDER}/check.json`)).json(), memory = whale.memory()
  const got = {}
  let step
  for (const id of check.ids) {
    if (step && check.second) got.second = whale.second(step, id, memory)
    step = whale.step(id, memory)
    got.logits = step.logits
  }
  const worst = Math.max(...Object.keys(got).flatMap(head => check[head].map((z, i) => Math.abs(z-got[head][i])))), encoded = [whale.config.bos_token_id, ...tokenizer.encode(check.text)].join()===check.ids.join()
  $('difference').value = `largest difference ${worst.toFixed(6)} · token ids ${encoded ? 'the same' : 'differ'}`
  $('difference').dataset.worst = worst
}

function describe(about) {
  const say = (name, f) => about[name]==null ? '' : f(about[name])
  $('about').textContent = `${about.parameters.toLocaleString('en')} weights, the large matrices in half precision.`+
    say('targets seen in training', n => ` It was trained on ${n.toLocaleString('en')} tokens of the English that ships with Python`)+
    say('held-out bits per byte', n => ` and needs ${n.toFixed(2)} bits per byte of text it has not seen: it has the sound of documentation, not its sense.`)
}

let timer
try {
  const {about, size, ...rest} = await load(FOLDER, s => $('status').textContent = s);
  ({whale, tokenizer} = rest)
  $('many').textContent = `${whale.config.vocab_size.toLocaleString('en')} numbers`
  describe(about)
  $('twice').hidden = !whale.guessesTwice
  restart()
  const seconds = performance.now()/1000
  $('status').textContent = `${(size/1e6).toFixed(1)} MB of whale; the first prediction stood here ${seconds.toFixed(1)} s after the page was asked for.`
  document.body.dataset.ready = seconds
  $('go').onclick = go
  $('one').onclick = () => { next(); draw() }
  $('again').onclick = restart
  $('text').oninput = () => { running = false; clearTimeout(timer); timer = setTimeout(restart, 200) }
  $('compare').onclick = compare
  $('compare').disabled = false
} catch (error) { $('status').textContent = error.message; $('status').classList.add('fail') }
