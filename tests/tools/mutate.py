"""Small mistakes, planted one at a time: does a test notice?

    python tests/tools/mutate.py                                    the table, and the mistakes that nothing notices
    python tests/tools/mutate.py --out results/mutation.json        the same, kept
    python tests/tools/mutate.py --only model.moe train.optim       those of some modules; with --out the others' rows stay
    python tests/tools/mutate.py --dry                              only whether each can be planted
    python tests/tools/mutate.py --out results/mutation.json --again    after a new test: those that nothing noticed, or that are new

A mistake is a line of `MUTANTS`: module, old text, new text. It is made in a copy of the package in a temporary folder, never in
the checkout. Then the tests of that module run until one fails; if none does, all others of `REST`. `tests/test_project.py` is left
out: it would see every change of a generated file. At the end the tests that noticed something run on the healthy copy, where they
must pass. Each row names the commit at which its mistake was planted. A mistake whose old text is not in its module exactly once ends
the command: the code has changed, plant it differently.
"""
import argparse, json, os, shutil, signal, sys, tempfile, time
from pathlib import Path
from runs import ROOT, preload, provenance

TESTS = {   # module -> its tests, the quickest first
    'model.plain': 'plain ladder', 'model.config': 'config compress properties', 'validate': 'config whale',
    'processor': 'processor', 'presets': 'config compress properties', 'model.rope': 'rope properties compress',
    'model.visibility': 'attention compress block properties', 'model.attention': 'attention block properties',
    'model.compress': 'compress properties', 'model.moe': 'moe properties', 'model.hyper': 'hyper properties bugs', 'model.block': 'block',
    'model.mtp': 'mtp bugs', 'model.whale': 'whale bugs compress weights', 'train.data': 'data stream marks', 'train.stream': 'stream',
    'train.optim': 'optim', 'train.parallel': 'parallel', 'train.step': 'step run bugs',
    'train.checkpoint': 'marks checkpoint run step', 'train.evaluate': 'evaluate', 'train.files': 'checkpoint weights',
    'train.loop': 'run checkpoint', 'generate.cache': 'sample attention compress block properties', 'generate.sample': 'sample',
    'generate.speculate': 'speculate', 'generate.chat': 'chat marks', 'generate.hf_config': 'config compress weights',
    'generate.weights': 'weights checkpoint', 'generate.legacy': 'legacy', 'generate.hub': 'hub', 'fast.products': 'fast products',
    'fast.attention': 'fast attention compress', 'fast.experts': 'fast moe graph', 'fast.loss': 'fast mtp', 'fast.sinkhorn': 'fast hyper',
    'fast.kernels': 'fast', 'fast.graph': 'graph',
    'beyond.engram': 'engram', 'beyond.onepass': 'onepass', 'beyond.csa2': 'csa2', 'beyond.halves': 'halves', 'beyond.small': 'small',
    'beyond.dspark': 'dspark', 'beyond.lowbit': 'lowbit', 'beyond.indexer': 'indexer', 'beyond.exchange': 'exchange',
    'lab.compare': 'compare', 'lab.scaling': 'arms', 'lab.ladder': 'ladder', 'lab.ablate': 'ablate', 'run': 'run chat cli marks',
    'train.recipe': 'step cli run', 'generate.folder': 'weights hub legacy compress',
    'cli': 'cli abuse'}
REST = 'bugs properties whale fast compress block mtp weights parity sample step evaluate run speculate chat checkpoint'

MUTANTS = [   # module, old text, new text
    ('validate', '2<=R<=K', 'R<=K'),
    ('validate', '0<=i<c.vocab_size', '0<=i<=c.vocab_size'),
    ('presets', '(w*(w+1)/2 + (T-w)*w)/T', '(w*(w-1)/2 + (T-w)*w)/T'),
    ('presets', 'coeffs = N*N + 2*N', 'coeffs = N*N + N'),
    ('presets', 'q*(few-q*rate+1)', 'q*(few-q*rate)'),
    ('presets', '*(attention==CSA)', ''),
    ('model.rope', 'a*cos-b*sin, a*sin+b*cos', 'a*cos+b*sin, b*cos-a*sin'),
    ('model.rope', 'device=pos.device)/R)', 'device=pos.device)/(R+2))'),
    ('model.rope', 'pair(32)', 'pair(16)'),
    ('model.rope', 'speeds*(1-slow) + speeds/factor*slow', 'speeds*slow + speeds/factor*(1-slow)'),
    ('model.plain', 'else x.float()', 'else x'),
    ('model.rope', 'still,turn = x.split([x.shape[-1]-R, R], -1)', 'turn,still = x.split([R, x.shape[-1]-R], -1)'),
    ('model.visibility', '(ago>=0) & (ago<window)', '(ago>=0) & (ago<=window)'),
    ('model.visibility', '(ago>=0) & (ago<window)', '(ago>0) & (ago<window)'),
    ('model.visibility', '+1)%rate==0', ')%rate==0'),
    ('model.visibility', 'len(pos)//rate if before is None else None', 'len(pos)//rate'),
    ('model.visibility', '<=pos[:,None]', '<pos[:,None]'),
    ('model.visibility', 'torch.where(ends==NEVER, 0, ends-rate+1)', 'torch.where(ends==NEVER, 0, ends)'),
    ('model.visibility', '<2*rate-1', '<=2*rate-1'),
    ('model.attention', '*q.shape[-1]**-0.5', '*q.shape[-1]**-1'),
    ('model.attention', '.softmax(-1)[...,:-1]', '.softmax(-1)[...,1:]'),
    ('model.attention', 'rotate(rms_norm(q, self.eps), cos, sin)', 'rotate(q, cos, sin)'),
    ('model.attention', 'rotate(o, cos, -sin)', 'rotate(o, cos, sin)'),
    ('model.compress', 'equal.cumsum(-1)<=room', 'equal.cumsum(-1)<room'),
    ('model.compress', '.masked_fill(~seen[:,:,None], 0).sum(2)', '.sum(2)'),
    ('model.compress', '(per_query*some).sum()/some.sum().clamp(min=1)', '(per_query*some).mean()'),
    ('model.compress', 'x.detach(), low', 'x, low'),
    ('model.compress', 'low.detach()', 'low'),
    ('model.compress', "torch.einsum('btjw,bcw->btjc', q, keys)).relu()", "torch.einsum('btjw,bcw->btjc', q, keys))"),
    ('model.compress', 'before[...,:self.width], itself[...,self.width:]', 'before[...,self.width:], itself[...,:self.width]'),
    ('model.compress', '(self.width*q.shape[2])**-0.5', 'self.width**-0.5'),
    ('model.moe', 'scale*w/(w.sum(', 'w/(w.sum('),
    ('model.moe', '(scores+bias).topk', '(scores-bias).topk'),
    ('model.moe', 'gate.clamp(max=limit)', 'gate.clamp(-limit, limit)'),
    ('model.moe', 'up.clamp(-limit, limit)', 'up.clamp(max=limit)'),
    ('model.moe', 'torch.sign(load.mean(-1, keepdim=True)-load)', 'torch.sign(load-load.mean(-1, keepdim=True))'),
    ('model.moe', '*E/k', '*E'),
    ('model.moe', '(f*P).sum(-1).mean()', '(f.mean(0)*P.mean(0)).sum()'),
    ('model.moe', 'self.product(upcast(x), upcast(self.weight))', 'self.product(x, self.weight.to(x.dtype))'),
    ('model.moe', 'new = new+(new>=taken)', 'new = new+(new>taken)'),
    ('model.moe', 'return y+self.shared_experts(x)', 'return y+2*self.shared_experts(x)'),
    ('model.moe', '(z.clamp(max=far)/2).exp()', 'z.clamp(max=far).exp()'),
    ('model.hyper', 'torch.cat([post[...,None,:], comb], -2)', 'torch.cat([post[...,None,:], comb.mT], -2)'),
    ('model.hyper', '2*post.sigmoid()', 'post.sigmoid()'),
    ('model.hyper', 'pre.sigmoid()+self.eps', 'pre.sigmoid()'),
    ('model.hyper', 'torch.linalg.vecdot(x, x)/x.shape[-1]', 'torch.linalg.vecdot(x, x)/X.shape[-1]'),
    ('model.hyper', 'project(X, self.fn, self.norm_eps', 'project(X, self.fn, self.eps'),
    ('model.hyper', '(upcast(self.hc_scale)*m+upcast(self.hc_base)).sigmoid()', '(upcast(self.hc_scale)*m+upcast(self.hc_base)).softmax(-1)'),
    ('model.block', 'self.mlp(self.post_attention_layernorm(', 'self.mlp(self.input_layernorm('),
    ('model.block', 'pre,post,comb = self.ffn_hc(X)', 'pre,post,comb = self.attn_hc(X)'),
    ('model.mtp', '(later!=docs) | (docs<0)', '(later!=docs)'),
    ('model.mtp', '(0,1), value=-1)!=docs', '(0,1), value=-1)==docs'),
    ('model.mtp', 'self.e_proj(self.enorm(e))', 'self.e_proj(self.hnorm(e))'),
    ('model.mtp', 'n = (labels!=-100).sum().clamp(min=1)', 'n = labels.numel()'),
    ('model.mtp', 'return self.norm(self.hc_head(X)), routing', 'return self.hc_head(X), routing'),
    ('model.whale', 'hc_head|sinks|', 'hc_head|'),
    ('model.whale', "'hc_scale'): p.fill_(1)", "'hc_scale'): p.fill_(0)"),
    ('model.whale', 'targets = shift_labels(labels, 2, docs)', 'targets = shift_labels(labels, 1, docs)'),
    ('model.whale', 'next_embeddings(e, docs), *seen', 'next_embeddings(e), *seen'),
    ('model.whale', 'torch.stack(learn).mean()', 'torch.stack(learn).sum()'),
    ('model.whale', ').sum(),', ').mean(),'),
    ('model.whale', 't.dtype.itemsize<min(4, kept', 't.dtype.itemsize>min(4, kept'),
    ('validate', '(x<0) | (x>=V)', '(x<0) | (x>V)'),
    ('train.data', 'rows(doc, -1)', 'rows(doc, 0)'),
    ('train.data', '[tok.bos_token_id, *i, tok.eos_token_id]', '[tok.eos_token_id, *i, tok.bos_token_id]'),
    ('train.data', 'if m), least)', 'if m), most)'),
    ('train.data', 'if not taken.isdisjoint(i)', 'if False'),
    ('train.data', '(i!=tok.unk_token_id or word==tok.unk_token)', 'True'),
    ('train.data', 'n*context+1-len(ids)', 'n*context+1-len(ids)+context'),
    ('train.data', 'text.encode(errors=', 'text[:40].encode(errors='),
    ('train.stream', 'if not is_held_out(t, self.one_in)', 'if not is_held_out(t)'),
    ('train.stream', 'default_rng([self.seed, number])', 'default_rng([self.seed])'),
    ('train.stream', 'self.go_to(self.at)', 'pass'),
    ('train.stream', "at=self.block['at'], used=self.used)", "at=self.block['at'], used=0)"),
    ('train.optim', 'b*S+c*S@S', 'b*S-c*S@S'),
    ('train.optim', "p.mul_(1-group['lr']*group['weight_decay'])", "p.mul_(1-group['weight_decay'])"),
    ('train.optim', 'max(self.size(p, group))**0.5', 'min(self.size(p, group))**0.5'),
    ('train.optim', '.add_(p.grad).mul(momentum).add_(p.grad)', '.add_(p.grad)'),
    ('train.optim', '(step+1)/max(1, warmup)', 'step/max(1, warmup)'),
    ('train.optim', "'gate_up_proj'", "'gate_up'"),
    ('train.optim', 'params=list(vectors.values()), weight_decay=0.', 'params=list(vectors.values()), weight_decay=weight_decay'),
    ('train.parallel', 'v[rank()::n_ranks()]', 'v[::n_ranks()]'),
    ('train.step', 'falling = step>=max(', 'falling = step>max('),
    ('train.step', 'norm = math.hypot(*norms.values())', 'norm = sum(norms.values())'),
    ('train.step', 'docs.new_tensor(len(docs))', 'docs.new_tensor(1)'),
    ('train.step', 'step>=recipe.dense*recipe.steps', 'step<recipe.dense*recipe.steps'),
    ('train.step', 'zip(opts, (recipe.lr, recipe.muon_lr))', 'zip(opts, (recipe.muon_lr, recipe.lr))'),
    ('train.files', 'os.fsync(f.fileno())', 'f.fileno()'),
    ('train.files', 'if MAX_HEADER<n<', 'if MAX_HEADER**2<n<'),
    ('train.files', "for f in (*tmp.rglob('*'), tmp): sync(f)", "for f in (*tmp.rglob('*'), tmp): f.stat()"),
    ('train.checkpoint', ' | dict(rng=torch.get_rng_state().int())', ''),
    ('train.checkpoint', "if m['step']<step]", "if m['step']<=step]"),
    ('train.checkpoint', 'checkpoints(out)[:-keep]', 'checkpoints(out)[:-keep-1]'),
    ('train.checkpoint', "while (line := f.readline(MAX_LINE)).endswith('\\n'):", 'while line := f.readline(MAX_LINE):'),
    ('train.checkpoint', 'fcntl.LOCK_EX|fcntl.LOCK_NB', 'fcntl.LOCK_SH|fcntl.LOCK_NB'),
    ('train.checkpoint', 'v.ndim and v.shape!=p.shape', 'False'),
    ('train.checkpoint', '128+signum', '127+signum'),
    ('train.checkpoint', ' and tok.eos_token_id in ends', ''),
    ('train.evaluate', 'nats += n*out.loss', 'nats += out.loss'),
    ('train.evaluate', 'mtp_nats += n_mtp*', 'mtp_nats += n*'),
    ('train.evaluate', 'nats/math.log(2)/n_bytes', 'nats*math.log(2)/n_bytes'),
    ('train.loop', 'claim.take(self.out)\n            free_folder(self.out)', 'claim.take(self.out)'),
    ('train.loop', 'range(1, recipe.evals+1)}', 'range(1, recipe.evals)}'),
    ('train.loop', "not best[1]<=scores['loss']", "not best[1]>=scores['loss']"),
    ('train.loop', "skipped=s['skipped']+m['skipped']", "skipped=m['skipped']"),
    ('train.loop', 'min(16, max(1, 2**28//(vocab_size*context)))', 'min(16, 2**28//(vocab_size*context))'),
    ('generate.cache', 'self.length-self.window+1)', 'self.length-self.window+2)'),
    ('generate.cache', 'most = self.length-self.floor', 'most = self.length'),
    ('generate.cache', 'self.keep = slots+spare', 'self.keep = slots'),
    ('generate.cache', 'ends>=self.length-n', 'ends>self.length-n'),
    ('generate.sample', 'drop[:,-1] = False', 'drop[:,0] = False'),
    ('generate.sample', 'torch.where(logits>0, logits/penalty, logits*penalty)', 'torch.where(logits>0, logits*penalty, logits/penalty)'),
    ('generate.sample', 'logits.masked_fill(logits<kth', 'logits.masked_fill(logits<=kth'),
    ('generate.sample', 'return attention_mask.long()-1', 'return attention_mask.long()'),
    ('generate.sample', 'text = self._decode()\n        whole = text.removesuffix', 'text = self._decode()\n        whole = text.removeprefix'),
    ('generate.speculate', '(p-q).clamp(min=0)', '(q-p).clamp(min=0)'),
    ('generate.speculate', 'u*q_d<p_d', 'u*p_d<q_d'),
    ('generate.speculate', 'seen.scatter(1, drafts[:,i-1:i], True)', 'seen.scatter(1, drafts[:,:1], True)'),
    ('generate.speculate', 'self.cache.rewind(max(0, n-1))', 'self.cache.rewind(0)'),
    ('generate.chat', 'labels.append(i if a>=start and', 'labels.append(i if a>start and'),
    ('generate.chat', 'head+messages[at:]', 'messages[at:]'),
    ('generate.chat', 'at += len(part)+len(stop)', 'at += len(part)'),
    ('generate.chat', 'stop.join(apart(tok, s))', 's'),
    ('generate.chat', 'content=SIGN)]).split(SIGN)[0]', 'content=SIGN)]).split(SIGN)[1]'),
    ('generate.chat', 'self.messages = self.first+self.messages[later[0]:]', 'self.messages = self.messages[later[0]:]'),
    ('generate.hf_config', '([HCA]*2+[HCA,CSA]*n)[:n]', '([HCA]*2+[CSA,HCA]*n)[:n]'),
    ('generate.hf_config', "far['rope_theta']", "main['rope_theta']"),
    ('generate.weights', 'torch.cat([parts[e,1], parts[e,3]])', 'torch.cat([parts[e,3], parts[e,1]])'),
    ('generate.weights', "re.fullmatch(r'[\\w.-]+\\.safetensors', str(shard))", "re.fullmatch(r'.+\\.safetensors', str(shard))"),
    ('generate.weights', 'store[key] = t', 'store[key] = t.float()'),
    ('generate.legacy', 'torch.stack([i+R//2, i], 1)', 'torch.stack([i, i+R//2], 1)'),
    ('generate.hub', 'open_to_all = private and not', 'open_to_all = private and'),
    ('generate.hub', ').name if p', ') if p'),
    ('fast.products', 'onednn(d, W.mT) if for_x', 'onednn(d, -W.mT) if for_x'),
    ('fast.products', 'x = x.contiguous()   #', '#'),
    ('fast.attention', '.mul_(K**-0.5)', '.mul_(K**-1)'),
    ('fast.attention', 'dsink -= ((sink', 'dsink += ((sink'),
    ('fast.attention', 'if T<=window and q_docs is None', 'if T<=2*window and q_docs is None'),
    ('fast.attention', 'torch.sigmoid(aux.lse-sinks)', 'torch.sigmoid(aux.lse+sinks)'),
    ('fast.attention', '(t>=s) & (t-s<window)', '(t>=s) & (t-s<=window)'),
    ('fast.attention', 'near & (docs[b,t]==docs[b,s])', 'near'),
    ('fast.attention', 'torch.logaddexp(aux.lse, sinks)', 'aux.lse'),
    ('fast.attention', 'if T>CHUNK and fused_here(', 'if fused_here('),
    ('fast.attention', '(ago-w+1<window)', '(ago<window)'),
    ('fast.attention', '(ago+w-1<window)', '(ago<window)'),
    ('fast.attention', 'z.softmax(-1).mul_(gate[:,at])', 'z.softmax(-1)'),
    ('fast.attention', 'int(seen[-1])+1 if', 'int(seen[-1]) if'),
    ('fast.attention', 'max(0, a-w)', 'max(0, a-w+2)'),
    ('fast.attention', 'sinks = upcast(sinks)             # many', '# many'),
    ('fast.attention', 'if far is not None: far = upcast(far)', 'pass'),
    ('fast.attention', 'F.pad(z, (0,C-c))', 'F.pad(z, (C-c,0))'),
    ('fast.attention', 'far_sums(q[:,at], far[:,:C], lse[:,at], seen', 'far_sums(q[:,at], far[:,:C], lse[:,:len(q[0,at])], seen'),
    ('fast.experts', 'token = order//k', 'token = order%len(x)'),
    ('fast.experts', 'w.flatten()[order,None]', 'w.flatten()[:,None]'),
    ('fast.loss', 'dh -= W[y[:,0]]*on', 'dh += W[y[:,0]]*on'),
    ('fast.loss', 'scales = scales*on', 'scales = scales'),
    ('fast.products', 'beta=b, alpha=c', 'beta=c, alpha=b'),
    ('processor', 'known is not None: return known', 'known is not None: return True'),
    ('fast.loss', 'labels = labels[there]', 'labels = labels[:len(h)]'),
    ('fast.sinkhorn', '([0,1]*iters)[:-1]', '([0,1]*iters)'),
    ('fast.sinkhorn', '(d - (d*y).sum(', '(d + (d*y).sum('),
    ('fast.kernels', 'all(kind==SWA for kind,_ in whole.cfg.kinds)', 'True'),
    ('fast.kernels', 'vars(part).pop(name, None)', 'pass'),
    ('fast.graph', 'k_pos>=first[:,None]', 'k_pos>first[:,None]'),
    ('fast.graph', 'pos-(pos-torch.arange(S', 'pos-(pos+torch.arange(S'),
    ('fast.graph', 'torch.cat([self.tail[:,1:], x], 1)', 'torch.cat([self.tail[:,:-1], x], 1)'),
    ('fast.graph', 'return self.tail, self.pos+1-self.tail.shape[1]', 'return self.tail, self.pos-self.tail.shape[1]'),
    ('fast.graph', '(docs==0) & (ends<NEVER)', 'ends<NEVER'),
    ('fast.graph', 'finished = (length-first)//rate', 'finished = torch.full_like(first, length//rate)'),
    ('fast.graph', 'first[:,None]+blocks*rate-1', 'first[:,None]+blocks*rate-2'),
    ('fast.graph', '(pos-rate+1).clamp(min=0)', 'pos'),
    ('fast.graph', 'pos-first<2*rate-1', 'pos-first<rate-1'),
    ('fast.graph', '(ends>=0) & (ends<=pos)', '(ends>=0) & (ends<pos)'),
    ('fast.graph', '(e<pos).sum(1)', '(e<=pos).sum(1)'),
    ('fast.graph', 'roomy(m.tail.flip(1), m.keep).flip(1)', 'roomy(m.tail, m.keep)'),
    ('beyond.engram', 'over = over | (before==first)', 'over = before==first'),
    ('beyond.engram', '2*lot+1', '2*lot'),
    ('beyond.engram', 'mixed = mixed^products[...,n]', 'mixed = mixed+products[...,n]'),
    ('beyond.engram', 'sizes.cumsum(0)-sizes', 'sizes.cumsum(0)-sizes[0]'),
    ('beyond.engram', 'hashes, -1).repeat_interleave(each, -1)', 'hashes, -1).repeat(1, 1, each)'),
    ('beyond.engram', 'torch.copysign(a.abs().clamp(min=1e-6).sqrt(), a).sigmoid()', 'a.sigmoid()'),
    ('beyond.engram', "getattr(cache, 'ids', ids)[:,:cache.length]", "getattr(cache, 'ids', ids)"),
    ('beyond.engram', 'for layer in e.layers}', 'for layer in range(max(e.layers)+1)}'),
    ('beyond.engram', 'D*wide+2*N*D)', 'D*wide+N*D)'),
    ('beyond.onepass', 'y,report = f(collapse(pre, X))', 'y,report = f(collapse(following, X))'),
    ('beyond.onepass', 'X,pre,_ = sublayer(self.attn_hc', 'X,_,_ = sublayer(self.attn_hc'),
    ('beyond.onepass', 'pre[...,0] = 1', 'pre[...,0] = 2'),
    ('beyond.onepass', '1: 2*N+2', '1: 2*N+1'),
    ('beyond.csa2', 'torch.arange(1-self.rate, 1', 'torch.arange(2-self.rate, 2'),
    ('beyond.csa2', 'upcast(gate).softmax(2)', 'upcast(gate).softmax(-1)'),
    ('beyond.csa2', 'self.k_proj(entries.detach())', 'self.k_proj(entries)'),
    ('beyond.csa2', 'some & (some.flip(-1).cumsum(-1).flip(-1)==1)', 'some & (some.cumsum(-1)==1)'),
    ('beyond.csa2', 'masked_fill(newest, -low)', 'masked_fill(newest, 0.)'),
    ('beyond.csa2', 'if self.obeys: seen = seen & shared.candidates', 'pass'),
    ('beyond.csa2', 'if j<=i]', 'if j<i]'),
    ('beyond.csa2', 'far_weights(q, far, lse, seen), seen))', 'far_weights(q, far, lse, blocks.seen), seen))'),
    ('beyond.csa2', 'sum(one/cfg.compress_ratios[i]', 'sum(one*cfg.compress_ratios[i]'),
    ('beyond.halves', 'exact*(n-1-k)*(W-1)', 'exact*(n-1-k)*W'),
    ('beyond.halves', 'ring.floor = ring.length', 'pass'),
    ('beyond.halves', '(k_pos>=pos[0])', '(k_pos>pos[0])'),
    ('beyond.halves', 'layer(T)-layer(T-n)', 'layer(n)'),
    ('beyond.halves', 'shared.picks = shared.picks[:,-n:]', 'shared.picks = shared.picks[:,:n]'),
    ('beyond.halves', '2*K*W/r', '2*K*W'),
    ('beyond.halves', 'hook.remove()', 'pass'),
    ('beyond.small', 'if any(i>last for', 'if any(i>=last for'),
    ('beyond.small', '(r>1)*min(T, r)*2*c.head_dim', '(r>1)*min(T, r)*c.head_dim'),
    ('beyond.small', "'engram': 'tables', ", ''),
    ('beyond.small', 'class WholeBlock(EngramBlock, OnePassBlock)', 'class WholeBlock(EngramBlock)'),
    ('beyond.dspark', 'F.pad(seen, (0,n), value=True)', 'F.pad(seen, (0,n), value=False)'),
    ('beyond.dspark', 'taps[i].mean(2)', 'taps[i][:,:,0]'),
    ('beyond.dspark', '(p-q).abs().sum(-1)/2', '(p-q).abs().sum(-1)'),
    ('beyond.dspark', '(-k/gamma).exp()', '(k/gamma).exp()'),
    ('beyond.dspark', 'chance = kept.detach().clamp(0, 1)', 'chance = kept.clamp(0, 1)'),
    ('beyond.dspark', 'shift_labels(ids, 1, docs)', 'shift_labels(ids, 2, docs)'),
    ('beyond.dspark', 'cut(F.pad(kv, (0,0,W,0)), at, W)', 'cut(F.pad(kv, (0,0,W,0)), at+1, W)'),
    ('beyond.dspark', 'X[:,:T] for i', 'X[:,-T:] for i'),
    ('beyond.dspark', '.prod(-1).max()<least', '.prod(-1).min()<least'),
    ('beyond.dspark', 'q.append(logits.softmax(-1)[:,None])', 'q.append((2*logits).softmax(-1)[:,None])'),
    ('beyond.lowbit', 'torch.frexp(x).exponent-1', 'torch.frexp(x).exponent'),
    ('beyond.lowbit', 'exponent-(fraction==0.5).int()', 'exponent'),
    ('beyond.lowbit', 'x+(y.to(x.dtype)-x).detach()', 'y.to(x.dtype)+(x-x.detach()).detach()'),
    ('beyond.lowbit', '(0, -x.shape[-1]%c, 0, -x.shape[-2]%r)', '(-x.shape[-1]%c, 0, 0, -x.shape[-2]%r)'),
    ('beyond.lowbit', 'torch.cat([H, -H], 1)', 'torch.cat([-H, H], 1)'),
    ('beyond.lowbit', 'far = entries(far)', 'far = window(far)'),
    ('beyond.lowbit', 'index(keys), seen)', 'keys, seen)'),
    ('beyond.lowbit', 'numbers.bits/8 + tiles', 'numbers.bits/8'),
    ('beyond.indexer', "language=False, indexer=True, sparse=False)", "language=True, indexer=True, sparse=False)"),
    ('beyond.indexer', 'clock += stage.steps*stage.language', 'clock += stage.steps'),
    ('beyond.indexer', 'for params in branches(whale).values(): nn.utils.clip_grad_norm_(params, recipe.clip)',
        'nn.utils.clip_grad_norm_(whale.parameters(), recipe.clip)'),
    ('beyond.indexer', 'many = seen.sum(-1)>k', 'many = seen.sum(-1)>=0'),
    ('beyond.indexer', 'p.nan_to_num().mean(2)', 'p.nan_to_num().sum(2)'),
    ('beyond.indexer', 'far_sums(q, far, lse, seen)/q.shape[2]', 'far_sums(q, far, lse, seen)/q.shape[3]'),
    ('beyond.exchange', 'ctx.ways = gets, sends', 'ctx.ways = sends, gets'),
    ('beyond.exchange', 'token = trip.order//idx.shape[1]', 'token = trip.order%len(x)'),
    ('beyond.exchange', 'rows[trip.order.argsort()]', 'rows[trip.order]'),
    ('beyond.exchange', 'k*D*each*(R-1)/R', 'k*D*each'),
    ('beyond.exchange', 'math.comb(E-E//groups, k)', 'math.comb(E//groups, k)'),
    ('beyond.exchange', 'if id(p) not in once]', ']'),
    ('lab.compare', "f'{seed} {name}'", "f'{seed}'"),
    ('lab.compare', 'error = stdev(d)/math.sqrt(n)', 'error = stdev(d)/math.sqrt(n-1)'),
    ('lab.compare', 'half = t_quantile(n-1, level)*error', 'half = 1.96*error'),
    ('lab.compare', '(len(ps)-i)', 'len(ps)'),
    ('lab.compare', 'largest = max(largest, min(', 'largest = max(0., min('),
    ('lab.compare', 'math.hypot(d.high-d.mean, shared)', 'd.high-d.mean+shared'),
    ('lab.scaling', '-D.log()*early]', 'D.log()*early]'),
    ('lab.scaling', 'y = loss[...,None,:].log()', 'y = loss[...,None,:]'),
    ('lab.scaling', '.argmin(-1)', '.argmax(-1)'),
    ('lab.ladder', 'rope(turning, self.theta)], -1)', 'turning], -1)'),
    ('lab.ladder', '2*BOTTOM.num_attention_heads*BOTTOM.head_dim*2', '2*BOTTOM.num_attention_heads*BOTTOM.head_dim'),
    ('lab.ladder', 'is_held_out(t, 20)==held', 'is_held_out(t, 20)!=held'),
    ('lab.ladder', 'one, one, one[...,None]', 'one, one, 0*one[...,None]'),
    ('lab.ablate', 'seconds(other, i)/seconds(base, i)', 'seconds(base, i)/seconds(other, i)'),
    ('lab.ablate', 'ratios[2:]', 'ratios[:-2]'),
    ('lab.ablate', 'round(steps/math.exp(cost.mean))', 'round(steps*math.exp(cost.mean))'),
    ('lab.ablate', 'cost.low<=0<=cost.high', 'cost.low<=0'),
    ('lab.ablate', 'gained_by_steps(runs)*(cost.high-cost.mean)', '0.'),
    ('run', "state.get('targets') or state['step']*run.recipe.targets", "state['step']*run.recipe.targets"),
    ('run', "step!=run.state['step']", 'False'),
    ('run', 'recipe.get(other) and k in recipe', 'k in recipe'),
    ('train.recipe', 'if f.name in SHARES and v>1', 'if f.name in SHARES and v>2'),
    ('train.recipe', 'for k,other in INSTEAD.items() if changes.get(other)}', 'for k,other in INSTEAD.items()}'),
    ('train.recipe', 'int(f.name in COUNTS)', '0'),
    ('generate.folder', 'num_nextn_predict_layers=mtp)', 'num_nextn_predict_layers=0)'),
    ('generate.folder', '0<=t.min()<=t.max()<=last', '0<=t.min()<=t.max()<=last+1'),
    ('generate.folder', "if whale.cfg.hc_transposed: kind", "if False: kind"),
    ('generate.folder', 'v.detach().clone() for k,v in hf_model', 'v.detach() for k,v in hf_model'),
    ('cli', "getattr(e, 'code', 130)", "getattr(e, 'code', 131)"),
]

WHY = {   # (module, new text) -> why no test notices
}

def source(module, package=ROOT/'nanowhale'): return package/f'{module.replace(".", "/")}.py'

def misplaced():
    "A line for each mistake that cannot be planted"
    for module,old,new in MUTANTS:
        path = source(module)
        n = path.read_text(encoding='utf-8').count(old) if path.exists() else 0
        if n!=1: yield f'{path.relative_to(ROOT)} holds {old!r} {n} times, not once: the code has changed, plant this mistake differently'
        if module not in TESTS: yield f'{module}: which tests are its own? Name them in TESTS'

def unknown():
    "A line for each file of tests that is named here and not there: its mistakes would seem to go unnoticed"
    for name in sorted({n for names in (*TESTS.values(), REST) for n in names.split()}):
        if not (ROOT/f'tests/test_{name}.py').exists(): yield f'tests/test_{name}.py is named in TESTS or REST and does not exist'

def plant(package, module, old, new):
    "Make the mistake in the copy; returns the healthy text"
    path = source(module, package)
    text = path.read_text(encoding='utf-8')
    path.write_text(text.replace(old, new), encoding='utf-8')
    return text

class First:
    "A pytest plugin that remembers the first failure"
    failed = None
    def pytest_runtest_logreport(self, report): self.note(report)
    def pytest_collectreport(self, report): self.note(report)
    def note(self, report):
        if report.failed and not self.failed: self.failed = report.nodeid

def pytest_in_child(copy, words, answer, limit):
    "In a forked process: run pytest in the copy, write the first failure into `answer`"
    import pytest, resource   # the second one is not everywhere
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    os.chdir(copy)
    os.environ['PYTHONPATH'] = str(copy)
    sys.path[:] = [str(copy)]+[p for p in sys.path if Path(p or '.').resolve() not in (ROOT, ROOT/'tests', ROOT/'tests/tools')]
    sys.modules.pop('runs', None)
    first = First()
    code = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *words], plugins=[first])
    answer.write_text(first.failed or (f'pytest ended with {int(code)}' if code else ''))

def run(copy, words, limit):
    "The test that fails, '' if none does; a run that computes for more than `limit` seconds fails too, or one that waits for an hour"
    answer,end = copy/'answer.txt',time.monotonic()+3600
    answer.unlink(missing_ok=True)
    if not (pid := os.fork()):
        os.setsid()
        try: pytest_in_child(copy, words, answer, limit)
        finally: os._exit(0)
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic()>end:
            os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
            return 'no end within an hour'
        time.sleep(0.05)
    return answer.read_text() if answer.exists() else 'the process died, or found no end'

def files(names): return [f'tests/test_{n}.py' for n in names if (ROOT/f'tests/test_{n}.py').exists()]

def noticed(copy, module, limit, alone):
    "The first failing test of the module's own tests, then of the rest"
    own = TESTS[module].split()
    return run(copy, files(own), limit) or ('' if alone else run(copy, files(n for n in REST.split() if n not in own), 3*limit))

def load():
    "The same for tests, on one thread"
    preload()
    import hypothesis, pytest, torch.distributed.fsdp   # noqa: F401
    torch.set_num_threads(1)

def noticed_in(path): return {(r['module'], r['old'], r['new']) for r in json.loads(path.read_text())['mutants'] if r['by']} if path.exists() else set()

def keep(path, rows):
    "Write the table; rows of other mistakes that are still in the list stay"
    known = {m: dict() for m in MUTANTS}
    for r in (json.loads(path.read_text())['mutants'] if path.exists() else [])+rows:
        if (m := (r['module'], r['old'], r['new'])) in known: known[m] = r
    rows = [r for r in known.values() if r]
    about = provenance('python tests/tools/mutate.py') | dict(commit=', '.join(sorted({r['commit'] for r in rows})))
    path.write_text(json.dumps(dict(**about, planted=len(rows), noticed=sum(bool(r['by']) for r in rows),
        minutes=round(sum(r['seconds'] for r in rows)/60, 1), mutants=rows), indent=1)+'\n')

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='*', default=list(TESTS), help='modules whose mistakes to plant')
    p.add_argument('--out', help='a JSON file for the table')
    p.add_argument('--again', action='store_true', help='only those that have no row in the table yet, or that nothing noticed')
    p.add_argument('--own', action='store_true', help="only the module's own tests, not the rest of the suite: a first look")
    p.add_argument('--limit', type=int, default=300, help='seconds that the tests of a module may compute')
    p.add_argument('--dry', action='store_true', help='plant nothing, only look whether each mistake can be')
    a = p.parse_args()
    if wrong := [*misplaced(), *unknown()]: sys.exit('\n'.join(wrong))
    if a.dry: return print(f'{len(MUTANTS)} mistakes, each at one place')
    load()
    done,commit = noticed_in(Path(a.out)) if a.again else set(),provenance('')['commit']
    chosen,rows = [m for m in MUTANTS if m[0] in a.only and m not in done],[]
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d)
        for part in ('nanowhale', 'nbs', 'tests', 'results'): shutil.copytree(ROOT/part, copy/part, ignore=shutil.ignore_patterns('__pycache__'))
        for name in ('settings.ini', 'README.md'): shutil.copy(ROOT/name, copy)
        for module,old,new in chosen:
            began,healthy = time.monotonic(),plant(copy/'nanowhale', module, old, new)
            by = noticed(copy, module, a.limit, a.own)
            source(module, copy/'nanowhale').write_text(healthy, encoding='utf-8')
            rows.append(dict(module=module, old=old, new=new, by=by, seconds=round(time.monotonic()-began, 1), commit=commit))
            if not by: rows[-1]['why'] = WHY.get((module, new), 'not explained')
            if a.out: keep(Path(a.out), rows)
            print(f'{rows[-1]["seconds"]:6} s  {module:18} {new.strip()[:60]:62} {by or "SURVIVED"}', flush=True)
        tests = sorted({r['by'] for r in rows if r['by'].startswith('tests/')})
        sick = run(copy, tests, 3*a.limit) if tests else ''
        if sick: sys.exit(f'fails without any mistake: {sick}')
    caught = sum(bool(r['by']) for r in rows)
    print(f'{caught} of {len(rows)} noticed ({caught/len(rows):.1%}), all by tests that pass without the mistake')

if __name__=='__main__': main()
