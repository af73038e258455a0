"""Small mistakes, planted one at a time: does a test notice?

    python tests/tools/mutate.py                                    the table, and the mistakes that nothing notices
    python tests/tools/mutate.py --out results/mutation.json        the same, kept
    python tests/tools/mutate.py --only moe optim                   those of some modules; with --out the others' rows stay
    python tests/tools/mutate.py --out results/mutation.json --again    after a new test: those that nothing noticed, or that are new

A mistake is a line of `MUTANTS`: module, old text, new text. It is made in a copy of the package in a temporary folder, never in
the checkout. Then the tests of that module run until one fails; if none does, all others of `REST`. `tests/test_project.py` is left
out: it would see every change of a generated file. At the end the tests that noticed something run on the healthy copy, where they
must pass. Each row names the commit at which its mistake was planted. A mistake whose old text is not in its module exactly once ends
the command: the code has changed, plant it differently.
"""
import argparse, json, os, resource, shutil, signal, sys, tempfile, time
from pathlib import Path
from runs import ROOT, provenance

TESTS = dict(   # module -> its tests, the quickest first
    config='config compress properties', linear='linear mla', rope='rope properties compress', mla='mla block properties', compress='compress properties',
    moe='moe properties', hyper='hyper properties bugs', block='block',
    mtp='mtp bugs', weights='weights checkpoint', legacy='legacy', model='model bugs compress', data='data stream marks', stream='stream', optim='optim',
    parallel='parallel', generate='generate', graph='graph',
    speculate='speculative', evaluate='evaluate', checkpoint='checkpoint train step marks', step='step train bugs',
    train='train checkpoint', chat='chat marks', hub='hub', cli='cli abuse')
REST = 'bugs properties model compress block mtp weights parity generate step evaluate train speculative chat checkpoint'

MUTANTS = [   # module, old text, new text
    ('config', 'if R%2 or not 2<=R<=K', 'if not 2<=R<=K'),
    ('config', '(w*(w+1)/2 + (T-w)*w)/T', '(w*(w-1)/2 + (T-w)*w)/T'),
    ('config', 'coeffs = N*N + 2*N', 'coeffs = N*N + N'),
    ('config', 'q*(few-q*rate+1)', 'q*(few-q*rate)'),
    ('config', '(c.index_head_dim,)*(attention==CSA),1+(attention==CSA)', '(c.index_head_dim,)*(attention==CSA),1'),
    ('config', '([HCA]*2+[HCA,CSA]*n)[:n]', '([HCA]*2+[CSA,HCA]*n)[:n]'),
    ('config', "dict(compress_rope_theta=far['rope_theta'])", "dict(compress_rope_theta=main['rope_theta'])"),
    ('config', 'not 0<=i<c.vocab_size', 'not 0<=i<=c.vocab_size'),
    ('rope', 'a*cos-b*sin, a*sin+b*cos', 'a*cos+b*sin, b*cos-a*sin'),
    ('rope', 'device=pos.device)/R)', 'device=pos.device)/(R+2))'),
    ('rope', 'for turns in (32, 1)', 'for turns in (16, 1)'),
    ('rope', 'speeds*(1-slow) + speeds/factor*slow', 'speeds*slow + speeds/factor*(1-slow)'),
    ('rope', 'torch.promote_types(x.dtype, torch.float32)', 'torch.promote_types(x.dtype, torch.bfloat16)'),
    ('rope', 'still,turn = x.split([x.shape[-1]-R, R], -1)', 'turn,still = x.split([R, x.shape[-1]-R], -1)'),
    ('mla', '(ago>=0) & (ago<window)', '(ago>=0) & (ago<=window)'),
    ('mla', '(ago>=0) & (ago<window)', '(ago>0) & (ago<window)'),
    ('mla', '*q.shape[-1]**-0.5', '*q.shape[-1]**-1'),
    ('mla', '.softmax(-1)[...,:-1]', '.softmax(-1)[...,1:]'),
    ('mla', 'dsink -= ((sink', 'dsink += ((sink'),
    ('mla', 'rms_norm(self.q_b_proj(low).unflatten(-1, (-1,self.head_dim)), self.eps)', 'self.q_b_proj(low).unflatten(-1, (-1,self.head_dim))'),
    ('mla', 'rotate(o, cos, -sin)', 'rotate(o, cos, sin)'),
    ('mla', 'self.length-self.window+1)', 'self.length-self.window+2)'),
    ('mla', 'if not 0<=n<=self.length-self.floor', 'if not 0<=n<=self.length'),
    ('mla', 'if T<=window and docs is None', 'if T<=2*window and docs is None'),
    ('mla', 'torch.sigmoid(aux.lse-sinks)', 'torch.sigmoid(aux.lse+sinks)'), ('mla', '(t>=s) & (t-s<window)', '(t>=s) & (t-s<=window)'),
    ('mla', 'near & (docs[b,t]==docs[b,s])', 'near'), ('mla', 'torch.logaddexp(aux.lse, sinks)', 'aux.lse'),
    ('mla', 'if fused and T>CHUNK', 'if fused'), ('mla', '(ago-w+1<window)', '(ago<window)'), ('mla', '(ago+w-1<window)', '(ago<window)'),
    ('model', 'fused and not (kinds or cache)', 'fused and not cache'),
    ('mla', 'z.softmax(-1).mul_(gate[:,at]),d', 'z.softmax(-1),d'),
    ('mla', 'int(seen[-1])+1 if', 'int(seen[-1]) if'),
    ('mla', 'max(0, a-w)', 'max(0, a-w+2)'),
    ('mla', 'kv,sinks,far = upcast(kv),upcast(sinks),None if far is None else upcast(far)', 'pass'),
    ('compress', '(pos-starts+1)%rate==0', '(pos-starts)%rate==0'),
    ('compress', 'pos[rate-1-int(pos[0])%rate::rate]', 'pos[rate-int(pos[0])%rate::rate]'),
    ('compress', 'seen = all_ends[:,None]<=pos[:,None]', 'seen = all_ends[:,None]<pos[:,None]'),
    ('compress', 'torch.where(ends==NEVER, 0, ends-rate+1)', 'torch.where(ends==NEVER, 0, ends)'),
    ('compress', 'ends-begin<2*rate-1', 'ends-begin<=2*rate-1'),
    ('compress', '<=k-better.sum', '<k-better.sum'),
    ('compress', '.masked_fill(~seen[:,at,None,:C], 0).sum(2)', '.sum(2)'),
    ('compress', '(per_query*some).sum()/some.sum().clamp(min=1)', '(per_query*some).mean()'),
    ('compress', 'x,low = x.detach(),low.detach()', 'x,low = x,low.detach()'),
    ('compress', 'x,low = x.detach(),low.detach()', 'x,low = x.detach(),low'),
    ('compress', "torch.einsum('btjw,bcw->btjc', q, keys)).relu()", "torch.einsum('btjw,bcw->btjc', q, keys))"),
    ('compress', 'y[:,:,:self.rate,:self.width], y[:,:,self.rate:,self.width:]', 'y[:,:,:self.rate,self.width:], y[:,:,self.rate:,:self.width]'),
    ('compress', 'self.keep,self.length,self.tail,self.entries = slots+spare', 'self.keep,self.length,self.tail,self.entries = slots'),
    ('compress', "keys[:,:C]), (0,keys.shape[1]-C)", "keys[:,:C]), (keys.shape[1]-C,0)"),
    ('compress', '(self.width*q.shape[2])**-0.5', 'self.width**-0.5'),
    ('compress', 'p[:,at,:C] = (z-lse[:,at,:,None])', 'p[:,at,:C] = (z-lse[:,:len(z[0]),:,None])'),
    ('moe', 'scale*w/(w.sum(', 'w/(w.sum('),
    ('moe', '(scores+bias).topk', '(scores-bias).topk'),
    ('moe', 'gate.clamp(max=limit)', 'gate.clamp(-limit, limit)'),
    ('moe', 'up.clamp(-limit, limit)', 'up.clamp(max=limit)'),
    ('moe', 'torch.sign(load.mean(-1, keepdim=True)-load)', 'torch.sign(load-load.mean(-1, keepdim=True))'),
    ('moe', '1.).mean(1)*E/k', '1.).mean(1)*E'),
    ('moe', '(f*P).sum(-1).mean()', '(f.mean(0)*P.mean(0)).sum()'),
    ('moe', 'scores = self.score(linear(upcast(x), upcast(self.weight)))', 'scores = self.score(linear(x, self.weight.to(x.dtype)))'),
    ('moe', 'new = new+(new>=taken)', 'new = new+(new>taken)'),
    ('moe', 'return y+self.shared_experts(x)', 'return y+2*self.shared_experts(x)'),
    ('moe', '(z.clamp(max=far)/2).exp()', 'z.clamp(max=far).exp()'),
    ('hyper', 'torch.cat([post[...,None,:], comb], -2)', 'torch.cat([post[...,None,:], comb.mT], -2)'),
    ('linear', 'onednn(d, W.mT) if for_x', 'onednn(d, -W.mT) if for_x'), ('linear', 'x = x.contiguous()         #', '#'),
    ('hyper', '([0,1]*iters)[:-1]', '([0,1]*iters)'),
    ('hyper', '2*post.sigmoid()', 'post.sigmoid()'),
    ('hyper', 'pre.sigmoid()+self.eps', 'pre.sigmoid()'),
    ('hyper', 'torch.linalg.vecdot(x, x)/x.shape[-1]', 'torch.linalg.vecdot(x, x)/X.shape[-1]'),
    ('hyper', 'project(X, self.fn, self.norm_eps)', 'project(X, self.fn, self.eps)'),
    ('hyper', '(upcast(self.hc_scale)*m+upcast(self.hc_base)).sigmoid()', '(upcast(self.hc_scale)*m+upcast(self.hc_base)).softmax(-1)'),
    ('block', 'self.mlp(self.post_attention_layernorm(', 'self.mlp(self.input_layernorm('),
    ('block', 'pre,post,comb = self.ffn_hc(X)', 'pre,post,comb = self.attn_hc(X)'),
    ('mtp', '(later!=docs) | (docs<0)', '(later!=docs)'),
    ('mtp', '(0,1), value=-1)!=docs', '(0,1), value=-1)==docs'),
    ('mtp', 'self.e_proj(self.enorm(e))', 'self.e_proj(self.hnorm(e))'),
    ('mtp', 'n = (labels!=-100).sum().clamp(min=1)', 'n = labels.numel()'),
    ('mtp', 'return self.norm(self.hc_head(X)), routing', 'return self.hc_head(X), routing'),
    ('weights', 'torch.cat([parts[e,1], parts[e,3]])', 'torch.cat([parts[e,3], parts[e,1]])'),
    ('weights', 'os.fsync(f.fileno())', 'f.fileno()'),
    ('weights', r"re.fullmatch(r'[\w.-]+\.safetensors', str(shard))", r"re.fullmatch(r'.+\.safetensors', str(shard))"),
    ('weights', 'hc_head|sinks|', 'hc_head|'),
    ('weights', 'if MAX_HEADER<n<', 'if MAX_HEADER**2<n<'),
    ('weights', 'store[key] = t', 'store[key] = t.float()'),
    ('legacy', 'torch.stack([i+R//2, i], 1)', 'torch.stack([i, i+R//2], 1)'),
    ('model', "leaf in ('scale','hc_scale'): p.fill_(1)", "leaf in ('scale','hc_scale'): p.fill_(0)"),
    ('model', 'head_loss(h, self.lm_head.weight, shift_labels(labels, 2, docs))', 'head_loss(h, self.lm_head.weight, shift_labels(labels, 1, docs))'),
    ('model', 'block(X, next_embeddings(e, docs), *seen[SWA])', 'block(X, next_embeddings(e), *seen[SWA])'),
    ('model', 'torch.stack(losses).mean()', 'torch.stack(losses).sum()'),
    ('model', 'for r in routings]).sum()', 'for r in routings]).mean()'),
    ('model', 't.dtype.itemsize<min(4, kept', 't.dtype.itemsize>min(4, kept'),
    ('model', '(x<0) | (x>=V)', '(x<0) | (x>V)'),
    ('model', 'ends>=self.length-n', 'ends>self.length-n'),
    ('data', 'rows(doc, -1)', 'rows(doc, 0)'),
    ('data', '[tok.bos_token_id, *i, tok.eos_token_id]', '[tok.eos_token_id, *i, tok.bos_token_id]'),
    ('data', 'm.end() for m in found', 'm.start() for m in found'), ('data', 'if not taken.isdisjoint(i)', 'if False'),
    ('data', '(i!=tok.unk_token_id or word==tok.unk_token)', 'True'),
    ('data', 'n*context+1-len(ids)', 'n*context+1-len(ids)+context'),
    ('data', 'text.encode(errors=', 'text[:40].encode(errors='),
    ('stream', 'if not is_held_out(t, self.one_in)', 'if not is_held_out(t)'),
    ('stream', 'default_rng([self.seed, number])', 'default_rng([self.seed])'),
    ('stream', 'self.go_to(self.at)\n                time', 'time'),
    ('stream', "at=self.block['at'], used=self.used)", "at=self.block['at'], used=0)"),
    ('optim', 'b*S+c*products(S, S)', 'b*S-c*products(S, S)'),
    ('optim', "p.mul_(1-group['lr']*group['weight_decay'])", "p.mul_(1-group['weight_decay'])"),
    ('optim', 'max(self.size(p, group))**0.5', 'min(self.size(p, group))**0.5'),
    ('optim', '.add_(p.grad).mul(momentum).add_(p.grad)', '.add_(p.grad)'),
    ('optim', '(step+1)/max(1, warmup)', 'step/max(1, warmup)'),
    ('optim', "if name.endswith('gate_up_proj'): return 2", "if name.endswith('gate_up_proj'): return 1"),
    ('optim', 'params=list(vectors.values()), weight_decay=0.', 'params=list(vectors.values()), weight_decay=weight_decay'),
    ('parallel', 'v[rank()::n_ranks()]', 'v[::n_ranks()]'),
    ('generate', 'drop[:,-1] = False', 'drop[:,0] = False'),
    ('generate', 'torch.where(logits>0, logits/penalty, logits*penalty)', 'torch.where(logits>0, logits*penalty, logits/penalty)'),
    ('generate', 'logits.masked_fill(logits<kth', 'logits.masked_fill(logits<=kth'),
    ('generate', 'return attention_mask.long()-1', 'return attention_mask.long()'),
    ('generate', 'text = self._decode()\n        whole = text.removesuffix', 'text = self._decode()\n        whole = text.removeprefix'),
    ('graph', 'k_pos>=first[:,None]', 'k_pos>first[:,None]'),
    ('graph', 'pos-(pos-torch.arange(S', 'pos-(pos+torch.arange(S'),
    ('graph', 'torch.cat([self.tail[:,1:], x], 1)', 'torch.cat([self.tail[:,:-1], x], 1)'),
    ('graph', 'return self.tail, self.pos+1-self.tail.shape[1]', 'return self.tail, self.pos-self.tail.shape[1]'),
    ('graph', '(docs==0) & (ends<NEVER)', 'ends<NEVER'),
    ('graph', 'blocks = (length-first)//rate', 'blocks = torch.full_like(first, length//rate)'),
    ('graph', 'torch.arange(1, C+1, device=first.device))*rate-1', 'torch.arange(1, C+1, device=first.device))*rate-2'),
    ('graph', '(pos-cfg.rates[kind]+1).clamp(min=0)', 'pos'),
    ('graph', 'pos-first<2*cfg.rates[kind]-1', 'pos-first<cfg.rates[kind]-1'),
    ('graph', '(ends>=0) & (ends<=pos)', '(ends>=0) & (ends<pos)'),
    ('graph', '(e<pos).sum(1)', '(e<=pos).sum(1)'),
    ('graph', 'roomy(m.tail.flip(1), m.keep).flip(1)', 'roomy(m.tail, m.keep)'),
    ('speculate', '(p-q).clamp(min=0)', '(q-p).clamp(min=0)'),
    ('speculate', 'u*q_d<p_d', 'u*p_d<q_d'),
    ('speculate', 'seen.scatter(1, drafts[:,i-1:i], True)', 'seen.scatter(1, drafts[:,:1], True)'),
    ('speculate', 'self.cache.rewind(max(0, n-1))', 'self.cache.rewind(0)'),
    ('evaluate', 'nats+n*out.loss.item()', 'nats+out.loss.item()'),
    ('evaluate', 'mtp_nats+n_mtp*', 'mtp_nats+n*'),
    ('evaluate', 'nats/math.log(2)/n_bytes', 'nats*math.log(2)/n_bytes'),
    ('checkpoint', ' | dict(rng=torch.get_rng_state().int())', ''),
    ('checkpoint', "for f in (*tmp.rglob('*'), tmp): sync(f)", "for f in (*tmp.rglob('*'), tmp): f.stat()"),
    ('checkpoint', "if m['step']<step]", "if m['step']<=step]"),
    ('checkpoint', 'checkpoints(out)[:-keep]', 'checkpoints(out)[:-keep-1]'),
    ('checkpoint', "while (line := f.readline(MAX_LINE)).endswith('\\n'):", 'while line := f.readline(MAX_LINE):'),
    ('checkpoint', 'fcntl.LOCK_EX|fcntl.LOCK_NB', 'fcntl.LOCK_SH|fcntl.LOCK_NB'),
    ('checkpoint', 'v.ndim and v.shape!=p.shape', 'False'),
    ('train', 'claim.take(self.out); free_folder(self.out)', 'claim.take(self.out)'),
    ('checkpoint', '128+signum', '127+signum'), ('checkpoint', ' and tok.eos_token_id in ends', ''),
    ('step', 'falling = step>=max(', 'falling = step>max('),
    ('step', 'norm = math.hypot(*norms.values())', 'norm = sum(norms.values())'),
    ('step', "len(batch['docs'])/n)", "len(rows['docs'])/n)"),
    ('step', 'step>=recipe.dense*recipe.steps', 'step<recipe.dense*recipe.steps'),
    ('step', 'zip(opts, (recipe.lr, recipe.muon_lr))', 'zip(opts, (recipe.muon_lr, recipe.lr))'),
    ('train', 'range(1, recipe.evals+1)}', 'range(1, recipe.evals)}'),
    ('train', "scores['loss']<self.state['best'][1]", "scores['loss']>self.state['best'][1]"),
    ('train', "skipped=s['skipped']+m['skipped']", "skipped=m['skipped']"),
    ('train', 'min(16, max(1, 2**28//(vocab_size*context)))', 'min(16, 2**28//(vocab_size*context))'),
    ('chat', 'labels.append(i if a>=start and', 'labels.append(i if a>start and'),
    ('chat', 'head+messages[at:]', 'messages[at:]'), ('chat', 'at += len(part)+len(stop)', 'at += len(part)'),
    ('chat', 'stop.join(apart(tok, s))', 's'), ('chat', 'content=SIGN)]).split(SIGN)[0]', 'content=SIGN)]).split(SIGN)[1]'),
    ('chat', 'self.messages = self.first+self.messages[later[0]:]', 'self.messages = self.messages[later[0]:]'),
    ('hub', 'open_to_all = private and not', 'open_to_all = private and'),
    ('hub', 'Path(p).name if p', 'str(Path(p)) if p'),
    ('cli', 'return complain(str(e) or type(e).__name__, 1)', 'return complain(str(e) or type(e).__name__, 0)'),
]

WHY = {   # (module, new text) -> why no test notices
}

def plant(package, module, old, new):
    "Make the mistake in the copy; returns the healthy text"
    path = package/f'{module}.py'
    text = path.read_text(encoding='utf-8')
    if (n := text.count(old))!=1: sys.exit(f'nanowhale/{module}.py holds {old!r} {n} times, not once: the code has changed, plant this mistake differently')
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
    import pytest
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
    "What takes seconds to import, once, before the forks; nanowhale itself is not among it"
    import datasets, hypothesis, matplotlib.pyplot, pytest, torch, torch.testing, torch.distributed.fsdp, torch.utils.data   # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV4ForCausalLM, PreTrainedTokenizerFast   # noqa: F401
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
    a = p.parse_args()
    load()
    done,commit = noticed_in(Path(a.out)) if a.again else set(),provenance('')['commit']
    chosen,rows = [m for m in MUTANTS if m[0] in a.only and m not in done],[]
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d)
        for part in ('nanowhale', 'tests', 'results'): shutil.copytree(ROOT/part, copy/part, ignore=shutil.ignore_patterns('__pycache__'))
        for name in ('settings.ini', 'README.md'): shutil.copy(ROOT/name, copy)
        for m in MUTANTS: (copy/'nanowhale'/f'{m[0]}.py').write_text(plant(copy/'nanowhale', *m))   # all must be plantable
        for module,old,new in chosen:
            began,healthy = time.monotonic(),plant(copy/'nanowhale', module, old, new)
            by = noticed(copy, module, a.limit, a.own)
            (copy/'nanowhale'/f'{module}.py').write_text(healthy)
            rows.append(dict(module=module, old=old, new=new, by=by, seconds=round(time.monotonic()-began, 1), commit=commit))
            if not by: rows[-1]['why'] = WHY.get((module, new), 'not explained')
            if a.out: keep(Path(a.out), rows)
            print(f'{rows[-1]["seconds"]:6} s  {module:10} {new.strip()[:60]:62} {by or "SURVIVED"}', flush=True)
        tests = sorted({r['by'] for r in rows if '::' in r['by']})
        sick = run(copy, tests, 3*a.limit) if tests else ''
        if sick: sys.exit(f'fails without any mistake: {sick}')
    caught = sum(bool(r['by']) for r in rows)
    print(f'{caught} of {len(rows)} noticed ({caught/len(rows):.1%}), all by tests that pass without the mistake')

if __name__=='__main__': main()
