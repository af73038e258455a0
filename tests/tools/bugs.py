"""Bugs that still train: each is planted into nanowhale, and a named check must turn red.

    python tests/tools/bugs.py             the table: bug, the check that goes red, whether parity with transformers sees it too
    python tests/tools/bugs.py --all       the table with every check that goes red

`tests/tools/bug_runs.py` trains with each.

A loss that falls proves little. Each bug here was found in a public port of DeepSeek-V4 and trained happily (numbers as in the
project's list of bugs that train). A check is a function without arguments that asserts one property of the code as it is at
that moment; `plant` swaps a function or method of nanowhale for a wrong one and takes it back afterwards.
tests/test_bugs.py proves that every check is green on the healthy code, and red on the bug it is there for.
"""
import argparse, math, sys, tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from nanowhale.model import attention, block, compress, hyper, moe, mtp, rope, visibility, whale as model
from nanowhale.model.whale import Whale
from nanowhale.train import data, evaluate, optim, step
from nanowhale.generate import cache, sample, weights
from nanowhale.generate.cache import Cache
import runs   # noqa: F401, for the checks of compressed layers, which stand in tests/
import test_compress
from test_compress import (no_query_is_told_the_future, only_distances_count, packed_documents_are_alone,
    padding_is_never_seen, tables_are_fair)
from test_parity import LIMITS, errors, no_downcast, pair, randomise, run, small

# ---------------------------------------------------------------- checks

def whale_and_ids(seed=0, B=2, T=9, **sizes):
    torch.manual_seed(seed)
    cfg = small(**sizes)
    return randomise(Whale(cfg)),torch.randint(0, cfg.vocab_size, (B, T))

def close(a, b, tol=1e-4): assert (a-b).abs().max()<=tol*max(1, b.abs().max()), f'differs by {(a-b).abs().max():.2g}'

def same_as_transformers():
    "Logits, loss and gradients are those of `DeepseekV4ForCausalLM`, in float64 (tests/test_parity.py does this 160 times)"
    for sizes in (dict(rope_theta=50.0, hc_sinkhorn_iters=2), dict(swiglu_limit=0.05, sliding_window=3, scoring_func='sigmoid')):
        torch.manual_seed(0)
        whale,hf = (model.double() for model in pair(small(**sizes)))
        ids = torch.randint(0, 31, (2, 9))
        ours = run(whale, ids, ids)
        with no_downcast(): logits,loss,grads = errors(ours, run(hf, ids, ids))
        assert logits<=LIMITS['logits64'] and loss<=LIMITS['loss64'] and max(grads.values())<=LIMITS['grads64']

def equal_streams_stay_equal():
    "What each stream receives is a weighted mean: streams that are all the same stay as they are"
    torch.manual_seed(0)
    comb = hyper.sinkhorn(2*torch.randn(2, 5, 4, 4), 2)
    X = torch.randn(2, 5, 1, 6).expand(2, 5, 4, 6)
    close(hyper.mix(torch.zeros(2, 5, 4), comb, X, torch.zeros(2, 5, 6)), X)

def only_distance_counts():
    "300 invisible tokens in front move every position by 300 and change no logit"
    whale,ids = whale_and_ids()
    far = F.pad(ids, (300, 0))
    docs = F.pad(torch.zeros_like(ids), (300, 0), value=-1)
    close(whale(far, docs=docs).logits[:,300:], whale(ids).logits)

def the_last_R_channels_turn():
    "One token repeated: its first-layer keys differ from place to place in the last R channels, and in those only"
    whale,_ = whale_and_ids(sliding_window=20)
    past = Cache(whale.cfg)
    whale(torch.full((1, 9), 3), cache=past)
    kv = past.layers[0].kv[0,:9]
    turns = (kv-kv[:1]).abs().max(0).values>1e-4
    assert turns.tolist()==[False]*(whale.cfg.head_dim-whale.cfg.qk_rope_head_dim)+[True]*whale.cfg.qk_rope_head_dim

def attention_is_the_equation():
    "`attend` against loops: softmax over what the mask shows, one more term exp(sink) below, no value for it"
    torch.manual_seed(0)
    B,T,S,H,K = 2,3,4,3,5
    q,kv,sinks,mask = torch.randn(B,T,H,K),torch.randn(B,S,K),torch.randn(H),torch.rand(B,T,S)<0.6
    want = torch.zeros(B,T,H,K)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                e = [math.exp(q[b,t,h]@kv[b,s]/K**0.5) if mask[b,t,s] else 0.0 for s in range(S)]
                for s in range(S): want[b,t,h] += e[s]/(sum(e)+math.exp(sinks[h]))*kv[b,s]
    close(attention.attend(q, kv, sinks, mask)[0], want, 1e-5)

def a_strong_sink_takes_all_attention():
    "With every sink at 50, attention gives nothing"
    whale,ids = whale_and_ids()
    outputs = []
    for layer in whale.model.layers:
        with torch.no_grad(): layer.self_attn.sinks.fill_(50)
        layer.self_attn.register_forward_hook(lambda module, args, out: outputs.append(out))
    whale(ids)
    assert len(outputs)==2 and all(o.abs().max()<1e-6 for o in outputs)

def the_window_is_W_wide():
    "In one layer, token t feels a change at s exactly when 0 <= t-s < W"
    whale,ids = whale_and_ids(B=1, T=9, num_hidden_layers=1, sliding_window=4)
    rows = ids.expand(9, 9).clone()
    for s in range(9): rows[s,s] = (rows[s,s]+1)%31
    felt = (whale(rows).logits-whale(ids).logits).abs().max(-1).values>1e-4   # [s,t]
    ago = torch.arange(9)-torch.arange(9)[:,None]
    assert torch.equal(felt, (ago>=0) & (ago<4))

def the_bias_only_selects():
    "When all experts are chosen there is nothing to select, and the router's bias changes nothing"
    whale,ids = whale_and_ids(num_experts_per_tok=5)
    before = whale(ids).logits
    with torch.no_grad():
        for layer in whale.model.layers: layer.mlp.gate.e_score_correction_bias.normal_()
    close(whale(ids).logits, before, 1e-6)

def the_bias_balances():
    "A lopsided router becomes even under `update_router_bias`"
    whale,ids = whale_and_ids(B=4, T=30, num_hidden_layers=1, num_nextn_predict_layers=0)
    def load():
        with torch.no_grad(): load = whale(ids).expert_load
        whale.update_router_bias(load, 0.02)
        return load
    loads = torch.cat([load() for _ in range(80)]).float()
    before,after = ((l/l.sum()).max()*5 for l in (loads[0], loads[-20:].sum(0)))   # the busiest expert's share, 1 when even
    assert before>1.4 and after<1.1, (before, after)

def the_bias_is_not_trained():
    "No optimizer can reach it, and it is saved"
    whale,_ = whale_and_ids()
    assert not any('correction_bias' in n for n,_ in whale.named_parameters())
    assert sum('correction_bias' in n for n in whale.state_dict())==3

def the_balance_loss_teaches():
    "Its gradient reaches every router, and a step against it lowers the loss"
    whale,ids = whale_and_ids()
    before = whale(ids, labels=ids).balance_loss
    routers = [b.mlp.gate.weight for b in [*whale.model.layers, *whale.mtp]]
    grads = torch.autograd.grad(before, routers, allow_unused=True) if before.requires_grad else [None]
    assert all(g is not None and g.abs().max()>0 for g in grads)
    with torch.no_grad():
        for w,g in zip(routers, grads): w -= 1e-4*g/g.norm()   # small, so that no token changes its experts
        assert whale(ids, labels=ids).balance_loss<before

def the_mtp_loss_is_the_equation():
    "From the streams at i and the embedding of token i+1, one more block predicts token i+2: written out with loops"
    whale,ids = whale_and_ids()
    out,m = whale(ids, labels=ids),whale.mtp[0]
    T,c = ids.shape[1]-2,whale.cfg
    pos = torch.arange(T)
    cos_sin,mask = rope.rope_cos_sin(pos, c.qk_rope_head_dim, c.rope_theta),visibility.window_mask(pos, pos, c.sliding_window)
    told = torch.stack([whale.model.embed_tokens(ids[:,i+1]) for i in range(T)], 1)
    X = torch.stack([m.e_proj(m.enorm(told))+m.h_proj(m.hnorm(out.streams[:,:T,n])) for n in range(c.hc_mult)], 2)
    logits = whale.lm_head(m.norm(m.hc_head(block.Block.forward(m, X, cos_sin, mask)[0])))
    loss = torch.stack([F.cross_entropy(logits[:,i], ids[:,i+2]) for i in range(T)]).mean()
    assert_close(out.mtp_loss, loss)

def hangs_on(loss_of, ids, j):
    "Which input tokens the loss of the one label at `j` depends on"
    labels = torch.full_like(ids, -100)
    labels[:,j] = ids[:,j]
    def loss(s):
        x = ids.clone()
        if s is not None: x[:,s] = (x[:,s]+1)%31
        return loss_of(x, labels).item()
    before = loss(None)
    return {s for s in range(ids.shape[1]) if abs(loss(s)-before)>1e-5}

def no_loss_is_told_the_answer():
    "Token 4 is predicted from tokens 0 to 3, by both heads, and never from itself or later ones (the window is long enough)"
    whale,ids = whale_and_ids(B=1, T=6, sliding_window=20)
    assert hangs_on(lambda x,l: whale(x, labels=l).loss, ids, 4)==set(range(4))
    assert hangs_on(lambda x,l: whale(x, labels=l).mtp_loss, ids, 4)==set(range(4))

def the_loss_is_the_mean_over_targets():
    "-100 is no target: neither summed nor counted; without any target the loss is 0 and finite"
    whale,ids = whale_and_ids()
    labels = ids.masked_fill(torch.rand(ids.shape)<0.5, -100)
    logp = whale(ids).logits.log_softmax(-1)
    terms = [-logp[b,t-1,labels[b,t]] for b in range(2) for t in range(1, 9) if labels[b,t]>=0]
    assert_close(whale(ids, labels=labels).loss, torch.stack(terms).mean())
    nothing = whale(ids, labels=torch.full_like(ids, -100))
    assert nothing.loss==0 and nothing.mtp_loss==0

LENGTHS = 4,1,7
def packed():
    "A whale, one row of three documents, and their numbers"
    whale,ids = whale_and_ids(B=1, T=sum(LENGTHS), sliding_window=20)
    return whale,ids,torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]

def packed_documents_do_not_see_each_other():
    "The logits of a packed row are those of its documents alone"
    whale,ids,docs = packed()
    close(whale(ids, docs=docs).logits, torch.cat([whale(d).logits for d in ids.split(LENGTHS, 1)], 1))

def packed_losses_stay_within_documents():
    "Both losses of a packed row are the means over its documents' targets; no document predicts the next one's beginning"
    whale,ids,docs = packed()
    out = whale(ids, labels=ids, docs=docs)
    for loss,ahead in (('loss', 1), ('mtp_loss', 2)):
        n = [max(0, L-ahead) for L in LENGTHS]
        alone = [getattr(whale(d, labels=d), loss) for d in ids.split(LENGTHS, 1)]
        assert_close(getattr(out, loss), sum(k*a for k,a in zip(n, alone))/sum(n))

def padding_is_invisible():
    "A left-padded row has the logits of the same row alone, whatever token fills it"
    whale,ids = whale_and_ids(sliding_window=6)
    docs = F.pad(torch.zeros_like(ids), (5, 0), value=-1)
    for fill in (0, 17): close(whale(F.pad(ids, (5, 0), value=fill), docs=docs).logits[:,5:], whale(ids).logits)

def decoding_equals_the_full_forward():
    "Token by token and in pieces, with a cache, past several windows; with padding and without"
    whale,ids = whale_and_ids(T=11, sliding_window=4)
    for docs in (None, torch.where(torch.arange(11)<3, -1, 0).expand(2, 11)):
        full = whale(ids, docs=docs).logits
        for sizes in ([1]*11, [4, 1, 1, 3, 2]):
            past,parts,start = Cache(whale.cfg),[],0
            for n in sizes:
                now = slice(start, start+n)
                parts.append(whale(ids[:,now], docs=None if docs is None else docs[:,now], cache=past).logits)
                start += n
            real = slice(None) if docs is None else slice(3, None)
            close(torch.cat(parts, 1)[:,real], full[:,real])

def generation_reads_the_whole_prompt():
    "Greedy generation is the argmax of the full forward over all tokens so far, step by step"
    whale,ids = whale_and_ids(sliding_window=6, eos_token_id=None)
    want = ids
    for _ in range(6): want = torch.cat([want, whale(want).logits[:,-1:].argmax(-1)], 1)
    for use_cache in (True, False): assert torch.equal(sample.generate(whale, ids, 6, temperature=0, use_cache=use_cache), want)

def sinkhorn_survives_large_numbers():
    "Logits of 200 (exp overflows float32 at 89) give a finite mix and finite gradients"
    torch.manual_seed(0)
    z = (torch.randn(3, 4, 4)*200).requires_grad_()
    m = hyper.sinkhorn(z, 20)
    (m*torch.randn_like(m)).sum().backward()
    assert m.isfinite().all() and z.grad.isfinite().all()

def sinkhorns_gradient_is_right():
    "Against finite differences, in float64"
    torch.manual_seed(0)
    z = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    for iters in (1, 4): assert torch.autograd.gradcheck(lambda z: hyper.sinkhorn(z, iters), z, raise_exception=False)

def every_weight_is_initialised():
    "Fresh memory is filled with NaN here; none may be left, matrices spread as configured, nothing is constant but 0 and 1"
    torch.use_deterministic_algorithms(True)
    try: whale = Whale(small(initializer_range=0.3))
    finally: torch.use_deterministic_algorithms(False)
    for name,p in whale.state_dict().items():
        assert p.isfinite().all(), name
        if p.ndim>1: assert 0.15<p.std()<0.45 and p.mean().abs()<0.15, name
        else: assert (p==('norm' in name or name.endswith('scale'))).all(), name

def every_buffer_is_saved():
    whale,_ = whale_and_ids()
    assert {n for n,_ in whale.named_buffers()}<=set(whale.state_dict())

def loading_gives_what_was_saved():
    "Every tensor equals the file's, and the logits are the same"
    whale,ids = whale_and_ids()
    with tempfile.TemporaryDirectory() as folder:
        whale.save_pretrained(folder)
        loaded = Whale.from_pretrained(folder)
        for name,t in weights.read_weights(folder).items(): assert torch.equal(t, loaded.state_dict()[name]), name
    close(loaded(ids).logits, whale(ids).logits)

def a_compiled_whales_checkpoint_loads():
    "What `torch.compile` wraps is saved under names that every loader knows, and foreign prefixes are understood"
    whale,_ = whale_and_ids()
    state = torch.compile(whale).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        weights.write_weights(state, folder)
        assert set(weights.read_weights(folder))==set(whale.state_dict())
    assert set(weights.translate(state))==set(whale.state_dict())

# of the training step and of evaluation (nanowhale.train.data, step, evaluate)

def documents(n=9, T=7):
    "Documents of uneven lengths, and the same packed into rows of `T` targets"
    torch.manual_seed(0)
    docs = [torch.randint(2, 31, (L,)).tolist() for L in torch.randint(2, 12, (n,))]
    return docs,data.pack(docs, T)

def every_token_is_a_target_once():
    "Rows overlap by a token: over all rows, each document's tokens but its first are targets, each once"
    docs,rows = documents()
    targets = mtp.shift_labels(rows['input_ids'], 1, rows['docs'])
    assert sorted(targets[targets!=-100].tolist())==sorted(t for d in docs for t in d[1:])

def accumulation_changes_nothing():
    "One step's gradient is that of the mean over all its targets, however unevenly these are spread over small batches"
    whale,_ = whale_and_ids()
    rows = documents()[1]
    def gradient(size):
        whale.zero_grad()
        step.add_gradients(whale, rows, size, 0.3, 0.0)
        return torch.cat([p.grad.flatten() for p in whale.parameters() if p.grad is not None])
    n = len(rows['docs'])
    whole = gradient(n)
    for size in (1, 2, n-1): close(gradient(size), whole, 1e-4*whole.abs().max().item())
    out = whale(rows['input_ids'], labels=rows['input_ids'], docs=rows['docs'])
    whale.zero_grad()
    (out.loss+0.3*out.mtp_loss).backward()
    close(whole, torch.cat([p.grad.flatten() for p in whale.parameters() if p.grad is not None]), 1e-4*whole.abs().max().item())

def a_training_step_moves_the_bias():
    "By its rule, from the loads of that step, and by nothing else, weight decay included"
    whale,_ = whale_and_ids()
    routers = [b.mlp.gate for b in [*whale.model.layers, *whale.mtp]]
    before = torch.stack([r.e_score_correction_bias.clone() for r in routers])
    recipe = step.Recipe(bias_speed=0.01, weight_decay=0.5)
    done = step.train_step(whale, whale, optim.make_optimizers(whale, 1e-3, weight_decay=0.5), documents()[1], recipe, 0)
    load = torch.tensor(done['expert_load']).float()
    moved = torch.stack([r.e_score_correction_bias for r in routers])-before
    close(moved, 0.01*torch.sign(load.mean(-1, keepdim=True)-load), 1e-6)

def held_out_loss_is_the_mean_over_targets():
    "Over all targets, in batches of any size; and they are as many as there are"
    whale,_ = whale_and_ids()
    docs,rows = documents()
    n = sum(len(d)-1 for d in docs)
    with torch.no_grad(): whole = whale(rows['input_ids'], labels=rows['input_ids'], docs=rows['docs']).loss.item()
    for size in (1, 3, 100):
        got = evaluate.evaluate(whale, rows, n_bytes=500, batch_size=size)
        assert got['tokens']==n and abs(got['loss']-whole)<1e-5 and abs(got['bits_per_byte']-whole*n/math.log(2)/500)<1e-5

# of compressed attention and hash layers; the others are proven, with their bugs, in tests/test_compress.py

def compressed_layers_are_transformers():
    "Two random mixes of compressed and plain layers: logits, gradients and cached decoding"
    for seed in (0, 1):
        for what,e in test_compress.errors(seed).items(): assert e<=test_compress.LIMITS[what], (seed, what, e)

def the_indexer_is_taught():
    "The indexers' loss has a gradient for every weight of every indexer, and for nothing else"
    whale = test_compress.whale_of(index_topk=2)
    ids = torch.randint(30, (2, 27), generator=torch.Generator().manual_seed(9))
    loss = whale(ids, labels=ids).indexer_loss
    assert loss.requires_grad
    loss.backward()
    grads = {n: p.grad is not None and p.grad.abs().max()>0 for n,p in whale.named_parameters()}
    assert all(moved==('indexer' in n) for n,moved in grads.items()), [n for n,moved in grads.items() if moved!=('indexer' in n)]

CHECKS = [same_as_transformers, equal_streams_stay_equal, only_distance_counts, the_last_R_channels_turn, attention_is_the_equation,
    a_strong_sink_takes_all_attention, the_window_is_W_wide, the_bias_only_selects, the_bias_balances, the_bias_is_not_trained,
    the_balance_loss_teaches, the_mtp_loss_is_the_equation, no_loss_is_told_the_answer, the_loss_is_the_mean_over_targets,
    packed_documents_do_not_see_each_other, packed_losses_stay_within_documents, padding_is_invisible, decoding_equals_the_full_forward,
    generation_reads_the_whole_prompt, sinkhorn_survives_large_numbers, sinkhorns_gradient_is_right, every_weight_is_initialised,
    every_buffer_is_saved, loading_gives_what_was_saved, a_compiled_whales_checkpoint_loads, every_token_is_a_target_once,
    accumulation_changes_nothing, a_training_step_moves_the_bias, held_out_loss_is_the_mean_over_targets,
    compressed_layers_are_transformers, only_distances_count, no_query_is_told_the_future, packed_documents_are_alone, padding_is_never_seen,
    tables_are_fair, the_indexer_is_taught]

# ---------------------------------------------------------------- planting

def everywhere(m, old, new):
    "Put `new` in the place of the function `old` in every module and class of nanowhale that holds it, and where checks use it"
    mods = [mod for name,mod in list(sys.modules.items()) if name.split('.')[0] in ('nanowhale', 'test_compress')]
    places = [(mod, k) for mod in mods for k,v in list(vars(mod).items()) if v is old]
    classes = {c for mod in mods for c in vars(mod).values() if isinstance(c, type) and c.__module__.startswith('nanowhale')}
    parts = [(c, k) for c in classes for k,v in vars(c).items() if isinstance(v, staticmethod) and v.__func__ is old]
    assert places, f'{old} is nowhere: the code has changed, plant this bug differently'
    for mod,k in places: m.setattr(mod, k, new)
    for c,k in parts: m.setattr(c, k, staticmethod(new))

def wrap(m, cls, name, f):
    "Let `f(the method as it is, *args)` stand in for a method of `cls`"
    real = getattr(cls, name)
    m.setattr(cls, name, lambda *a,**kw: f(real, *a, **kw))

@dataclass
class Bug:
    number: int       # in the project's list
    name: str         # what is wrong
    check: Callable   # what goes red
    plant: Callable   # plants it, given a `MonkeyPatch`
    far: bool         # is it about compressed attention or hash layers?

BUGS = []
def bug(number, name, check, far=False):
    def add(f): BUGS.append(Bug(number, name, check, f, far))
    return add

def red(check):
    "Does the check fail? Only an AssertionError counts: a bug that crashes is none that trains"
    try: check()
    except AssertionError: return True
    return False

def stops(check):
    "Does the check fail in any way?"
    try: return red(check)
    except Exception: return True

@contextmanager
def planted(b):
    with pytest.MonkeyPatch.context() as m:
        b.plant(m)
        yield

# ---------------------------------------------------------------- the bugs: hyper-connections

@bug(1, 'comb contracted over the wrong index', equal_streams_stay_equal)
def _(m, real=hyper.mix): everywhere(m, real, lambda post, comb, X, y: real(post, comb.mT, X, y))

@bug(1, 'Sinkhorn ends on the wrong axis', equal_streams_stay_equal)
def _(m, real=hyper.sinkhorn): everywhere(m, real, lambda z, *a, **kw: real(z.mT, *a, **kw).mT)

@bug(16, 'Sinkhorn from bare exp: overflows where softmax does not', sinkhorn_survives_large_numbers)
def _(m):
    def bare(z, iters, eps=1e-6):
        c = z.exp()/z.exp().sum(-1, keepdim=True)+eps
        for axis in ([-2,-1]*iters)[:-1]: c = c/(c.sum(axis, keepdim=True)+eps)
        return c
    everywhere(m, hyper.sinkhorn, bare)

@bug(16, 'a hand-written Sinkhorn backward that forgets the sum', sinkhorns_gradient_is_right)
def _(m):
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, iters, eps):
            c = real(z, iters, eps)
            ctx.save_for_backward(c)
            return c
        @staticmethod
        def backward(ctx, g): return g*ctx.saved_tensors[0], None, None
    real = hyper.sinkhorn
    everywhere(m, real, lambda z, iters, eps=1e-6: Forgetful.apply(z, iters, eps))

@bug(26, 'post is a sigmoid, without its factor of two', same_as_transformers)
def _(m):
    def halved(real, self, X):
        pre,post,comb = real(self, X)
        return pre, post/2+self.eps, comb
    wrap(m, hyper.HyperConnection, 'forward', halved)

@bug(17, 'hyper-connections allocated empty and never initialised', every_weight_is_initialised)
def _(m):
    real = model.init_weights
    class WithoutHC:
        def __init__(self, module): self.module = module
        def named_parameters(self): return [(n, p) for n,p in self.module.named_parameters() if '_hc.' not in n]
        def named_buffers(self): return self.module.named_buffers()
    everywhere(m, real, lambda module, std: real(WithoutHC(module), std))

@bug(17, 'head collapse is stream 0 instead of learned', same_as_transformers)
def _(m): m.setattr(hyper.HyperHead, 'forward', lambda self, X: X[:,:,0])

# ---------------------------------------------------------------- rotary embedding

def halves(x, cos, sin):
    R = 2*cos.shape[-1]
    still,turn = x.split([x.shape[-1]-R, R], -1)
    a,b = turn.chunk(2, -1)
    cos,sin = cos.unsqueeze(-2),sin.unsqueeze(-2)
    return torch.cat([still, a*cos-b*sin, a*sin+b*cos], -1)

@bug(2, 'RoPE pairs channel i with i+R/2', same_as_transformers)
def _(m): everywhere(m, rope.rotate, halves)

@bug(2, 'rotation sign flipped', same_as_transformers)
def _(m, real=rope.rotate): everywhere(m, real, lambda x, cos, sin: real(x, cos, -sin))

@bug(2, 'the leading channels turn instead of the trailing ones', the_last_R_channels_turn)
def _(m, real=rope.rotate): everywhere(m, real, lambda x, cos, sin: real(x.flip(-1), cos, sin).flip(-1))

@bug(3, 'partial-RoPE factor applied twice', the_last_R_channels_turn)
def _(m, real=rope.rope_cos_sin): everywhere(m, real, lambda pos, R, *a, **kw: real(pos, 2*(R*R//10//2), *a, **kw))   # K = 10

@bug(3, 'wrong RoPE base', same_as_transformers)
def _(m, real=rope.rope_cos_sin): everywhere(m, real, lambda pos, R, *a, **kw: real(pos, R, 160000.0))

@bug(18, 'the output is not turned back', only_distance_counts)
def _(m):
    real = rope.rotate
    def forget(self, x, rope, mask, cache=None):
        with pytest.MonkeyPatch.context() as inner:
            calls = []
            def turn(x, cos, sin): calls.append(1); return x if len(calls)==3 else real(x, cos, sin)   # queries, keys, output
            inner.setattr(attention.Attention, 'rotate', staticmethod(turn))
            return forward(self, x, rope, mask, cache)
    forward = attention.Attention.forward
    m.setattr(attention.Attention, 'forward', forget)

# ---------------------------------------------------------------- attention

def without_sink(q, kv, sinks, mask):
    scores = torch.einsum('bthk,bsk->bths', q, kv)*q.shape[-1]**-0.5
    scores = scores.masked_fill(~mask[:,:,None], -1e30)
    return torch.einsum('bths,bsk->bthk', scores.softmax(-1), kv), scores.logsumexp(-1)

@bug(4, 'sink declared but never used', a_strong_sink_takes_all_attention)
def _(m): everywhere(m, attention.attend, without_sink)

@bug(4, 'sink multiplied by the score scale', attention_is_the_equation)
def _(m, real=attention.attend): everywhere(m, real, lambda q, kv, sinks, mask: real(q, kv, sinks*q.shape[-1]**-0.5, mask))

@bug(4, 'sink made a token with a value', attention_is_the_equation)
def _(m):
    def with_value(q, kv, sinks, mask):   # what the sink takes comes back as the mean of the values
        o,lse = real(q, kv, sinks, mask)
        return o+(sinks-lse).exp()[...,None]*kv.mean(1)[:,None,None], lse
    real = attention.attend
    everywhere(m, real, with_value)

@bug(18, 'window one token too wide', the_window_is_W_wide)
def _(m, real=visibility.window_mask): everywhere(m, real, lambda q, k, W, *a: real(q, k, W+1, *a))

@bug(18, 'window one token too narrow', the_window_is_W_wide)
def _(m, real=visibility.window_mask): everywhere(m, real, lambda q, k, W, *a: real(q, k, W-1, *a))

@bug(18, 'window ignored: full causal attention', the_window_is_W_wide)
def _(m, real=visibility.window_mask): everywhere(m, real, lambda q, k, W, *a: real(q, k, 10**9, *a))

# ---------------------------------------------------------------- mixture of experts

@bug(5, 'gate weights gathered from the biased scores', the_bias_only_selects)
def _(m, real=moe.route): everywhere(m, real, lambda s, bias, k, scale: real(s+bias, torch.zeros_like(bias), k, scale))

@bug(6, 'balancing bias never updated', the_bias_balances)
def _(m): everywhere(m, moe.bias_step, lambda bias, load, speed=0.001: bias)

@bug(6, 'balancing bias moves the wrong way', the_bias_balances)
def _(m, real=moe.bias_step): everywhere(m, real, lambda bias, load, speed=0.001: real(bias, load, -speed))

@bug(6, 'balancing bias is a parameter: the optimizer decays it', the_bias_is_not_trained)
def _(m):
    def init(real, self, cfg):
        real(self, cfg)
        bias = self._buffers.pop('e_score_correction_bias')
        self.e_score_correction_bias = nn.Parameter(bias)
    wrap(m, moe.Router, '__init__', init)

@bug(7, 'balance loss from counts alone: no gradient', the_balance_loss_teaches)
def _(m):
    def counts(scores, idx, *_):
        E,k = scores.shape[-1],idx.shape[-1]
        f = F.one_hot(idx, E).sum(2).float().mean(1)*E/k
        return (f*f/E).sum(-1).mean()
    everywhere(m, moe.balance_loss, counts)

@bug(7, 'SwiGLU clamp forgotten', same_as_transformers)
def _(m, real=moe.swiglu): everywhere(m, real, lambda gate, up, limit: real(gate, up, 1e9))

# ---------------------------------------------------------------- compressed attention, and experts by a table

def made(make): return lambda m, real=visibility.make_blocks: everywhere(m, real, make(real))

@bug(3, 'compressed layers rotate with the base of the others', compressed_layers_are_transformers, far=True)
def _(m, real=visibility.far_rope): everywhere(m, real, lambda cfg, pos: rope.rope_cos_sin(pos, cfg.qk_rope_head_dim, cfg.rope_theta))

bug(3, 'compressed entries left unrotated', only_distances_count, far=True)(made(test_compress.at_end))
bug(14, 'a query sees the block that ends after it', no_query_is_told_the_future, far=True)(made(test_compress.early))

@bug(14, 'blocks counted from the row: padding enters the compressor', padding_is_never_seen, far=True)
def _(m, real=visibility.make_blocks):
    def counted(cfg, kind, rows, *a, **kw):
        if rows.starts is not None: rows = rows._replace(starts=torch.zeros_like(rows.starts))
        return real(cfg, kind, rows, *a, **kw)
    everywhere(m, real, counted)

bug(15, 'compressed entries of other documents are seen', packed_documents_are_alone, far=True)(made(test_compress.mixed))

@bug(14, 'every query sees every entry', no_query_is_told_the_future, far=True)
def _(m, real=visibility.make_blocks):
    def all_of_them(cfg, kind, rows, *a, **kw):
        blocks = real(cfg, kind, rows, *a, **kw)
        docs = torch.zeros_like(rows.pos[None]) if rows.docs is None else rows.docs
        return blocks._replace(seen=(blocks.entries[1][:,None]==docs[...,None]) & (blocks.entries[0]<visibility.NEVER)[:,None])
    everywhere(m, real, all_of_them)

@bug(3, 'entries rotated at their number, not at their position', only_distances_count, far=True)
def _(m, real=visibility.make_blocks):
    def by_number(cfg, kind, rows, *a, **kw):
        blocks = real(cfg, kind, rows, *a, **kw)
        return blocks._replace(rope=visibility.far_rope(cfg, torch.arange(blocks.ends.shape[1]).expand_as(blocks.ends)))
    everywhere(m, real, by_number)

@bug(23, 'nothing trains the indexer', the_indexer_is_taught, far=True)
def _(m, real=compress.index_loss): everywhere(m, real, lambda scores, target, seen: real(scores.detach(), target, seen))

@bug(24, 'indexer heads through a sigmoid, and their mean', compressed_layers_are_transformers, far=True)
def _(m):
    def squashed(q, w, keys, seen=None): return (torch.einsum('btjw,bcw->btjc', q, keys).sigmoid()*w[...,None]).mean(2)
    everywhere(m, compress.index_scores, squashed)

@bug(25, "YaRN's factor in the scale of the scores", compressed_layers_are_transformers, far=True)
def _(m):
    def sharper(real, self, q, *a): return real(1.277*q, *a)     # 0.1 ln 16 + 1, on every logit
    wrap(m, compress.CompressedAttention, 'attend', sharper)

@bug(8, 'a routing table of zeros: every token to expert 0', tables_are_fair, far=True)
def _(m, real=moe.hash_table): everywhere(m, real, lambda V, E, k: torch.zeros(V, k, dtype=torch.long))

@bug(8, 'a routing table that names an expert twice', tables_are_fair, far=True)
def _(m, real=moe.hash_table): everywhere(m, real, lambda V, E, k: torch.arange(V)[:,None].expand(-1, k)%E)

# ---------------------------------------------------------------- losses and multi-token prediction

def shifted(f): return lambda m, real=mtp.shift_labels: everywhere(m, real, lambda labels, by, docs=None: real(labels, f(by), docs))

bug(9, 'MTP trained on the same target as the main head', the_mtp_loss_is_the_equation)(shifted(lambda by: 1))
bug(9, 'labels not shifted: both heads are told the answer', no_loss_is_told_the_answer)(shifted(lambda by: by-1))

@bug(9, 'MTP with an unshifted embedding', the_mtp_loss_is_the_equation)
def _(m): everywhere(m, mtp.next_embeddings, lambda e, docs=None: e)

@bug(9, 'MTP told the embedding of the token it must predict', no_loss_is_told_the_answer)
def _(m, real=mtp.next_embeddings): everywhere(m, real, lambda e, docs=None: real(real(e, docs), docs))

@bug(9, 'a parallel head: MTP without the next embedding', the_mtp_loss_is_the_equation)
def _(m): everywhere(m, mtp.next_embeddings, lambda e, docs=None: torch.zeros_like(e))

@bug(10, 'MTP fed from the collapsed state instead of the streams', the_mtp_loss_is_the_equation)
def _(m): wrap(m, mtp.MTPBlock, 'forward', lambda real, self, X, *a, **kw: real(self, X.mean(2, keepdim=True).expand_as(X), *a, **kw))

@bug(12, 'loss divided by all positions, not by the targets', the_loss_is_the_mean_over_targets)
def _(m): everywhere(m, mtp.head_loss, lambda h, W, y: F.cross_entropy((h@W.T).flatten(0,1), y.flatten(), reduction='sum')/y.numel())

@bug(12, 'no target at all: 0/0', the_loss_is_the_mean_over_targets)
def _(m): everywhere(m, mtp.head_loss, lambda h, W, y: F.cross_entropy((h@W.T).flatten(0,1), y.flatten()))

# ---------------------------------------------------------------- documents and padding

@bug(15, 'packed documents see each other', packed_documents_do_not_see_each_other)
def _(m, real=visibility.window_mask): everywhere(m, real, lambda q, k, W, *docs: real(q, k, W))

@bug(15, "a document's last token predicts the next one's first", packed_losses_stay_within_documents)
def _(m, real=mtp.shift_labels): everywhere(m, real, lambda labels, by, docs=None: real(labels, by))

@bug(21, 'padding is seen', padding_is_invisible)
def _(m, real=visibility.window_mask):
    def blind(d): return None if d is None else d.clamp(min=0)
    everywhere(m, real, lambda q, k, W, q_doc=None, k_doc=None: real(q, k, W, blind(q_doc), blind(k_doc)))

# ---------------------------------------------------------------- decoding

@bug(18, 'stale position: cached tokens all decode at the first place', decoding_equals_the_full_forward)
def _(m, real=rope.rope_cos_sin): everywhere(m, real, lambda pos, *a, **kw: real(pos-pos[0], *a, **kw))

@bug(18, 'cache keeps one token too few', decoding_equals_the_full_forward)
def _(m):
    def short(real, self, kv):
        out = real(self, kv)
        if self.length>=self.window: self.kv[:,(self.length+1)%self.size] = 0   # of the W-1 that the next token needs, the oldest
        return out
    wrap(m, cache.KVCache, 'extend', short)

@bug(18, 'cache gives old entries in the wrong order', decoding_equals_the_full_forward)
def _(m):
    def roll(real, self, kv):
        out = real(self, kv)
        self.kv.copy_(self.kv.roll(1, 1))
        return out
    wrap(m, cache.KVCache, 'extend', roll)

@bug(21, 'generation sees only the last token', generation_reads_the_whole_prompt)
def _(m):
    def last(real, self, input_ids, **kw): return real(self, input_ids[:,-1:], **(kw|dict(docs=None, cache=None)))
    def only(real, whale, *a, **kw):
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, Whale, 'forward', last)
            return real(whale, *a, **kw)
    real = sample.generate
    everywhere(m, real, lambda whale, *a, **kw: only(real, whale, *a, **kw))

# ---------------------------------------------------------------- checkpoints

def register(real, self, cfg):
    "`init_weights` refuses names it has no rule for; a bug finds one that it has"
    real(self, cfg)
    self.register_buffer('base', torch.zeros(7), persistent=False)

@bug(11, 'a table in a non-persistent buffer', every_buffer_is_saved)
def _(m): wrap(m, model.Trunk, '__init__', register)

@bug(11, 'the same, where it hurts: the table after loading', loading_gives_what_was_saved)
def _(m):
    def load(real, self, *a, **kw):
        out = real(self, *a, **kw)
        self.model.base = torch.full((7,), 0.01)   # built on the meta device, never filled: whatever the memory held
        return out
    wrap(m, model.Trunk, '__init__', register)
    wrap(m, model.Trunk, 'forward', lambda real, self, e, *a: real(self, e+self.base.sum(), *a))
    wrap(m, Whale, 'load_state_dict', load)

@bug(19, 'weights saved under the compiler prefix', a_compiled_whales_checkpoint_loads)
def _(m):
    from safetensors.torch import save_file
    everywhere(m, weights.write_weights, lambda state, folder: save_file(state, Path(folder)/weights.WEIGHTS))

@bug(19, 'a loader that does not know the compiler prefix', a_compiled_whales_checkpoint_loads)
def _(m): m.setattr(weights, 'RENAMES', weights.RENAMES[1:])

@bug(20, 'weights re-initialised after loading', loading_gives_what_was_saved)
def _(m):
    def load(real, self, *a, **kw):
        out = real(self, *a, **kw)
        for p in self.model.layers[0].parameters():
            if p.ndim>1: p.data.normal_(std=0.02)
        return out
    wrap(m, Whale, 'load_state_dict', load)

# ---------------------------------------------------------------- the training step and evaluation

@bug(6, 'the rule for the bias exists, but the loop never calls it', a_training_step_moves_the_bias)
def _(m): m.setattr(Whale, 'update_router_bias', lambda self, load, speed=0.001: None)

@bug(6, 'weight decay reaches the bias', a_training_step_moves_the_bias)
def _(m):
    def decay(real, self, load, speed=0.001):
        for b in [*self.model.layers, *self.mtp]: b.mlp.gate.e_score_correction_bias.mul_(1-0.5*1e-3)
        real(self, load, speed)
    wrap(m, Whale, 'update_router_bias', decay)

@bug(12, 'gradients of small batches summed, not averaged', accumulation_changes_nothing)
def _(m):
    real = step.add_gradients
    def summed(whale, rows, size, *weights, **kw):
        parts = [real(whale, {k: v[i:i+size] for k,v in rows.items()}, size, *weights, **kw) for i in range(0, len(rows['docs']), size)]
        losses = {name: sum(p[0][name] for p in parts) for name in parts[0][0]}     # reported as they are trained
        return losses, sum(p[1] for p in parts), parts[0][2]
    everywhere(m, real, summed)

@bug(12, 'mean of means: every small batch counts alike', accumulation_changes_nothing)
def _(m): everywhere(m, step.n_targets, lambda batch: torch.ones(2))

@bug(13, 'tokens counted that are no targets', held_out_loss_is_the_mean_over_targets)
def _(m): m.setattr(evaluate, 'shift_labels', lambda labels, by, docs=None: labels)

@bug(13, 'held-out loss is a mean of means', held_out_loss_is_the_mean_over_targets)
def _(m):
    real = evaluate.evaluate
    def mean_of_means(whale, rows, n_bytes=None, batch_size=16):
        got = real(whale, rows, n_bytes, batch_size)
        parts = [real(whale, {k: v[i:i+batch_size] for k,v in rows.items()})['loss'] for i in range(0, len(rows['docs']), batch_size)]
        return got|dict(loss=sum(parts)/len(parts))
    everywhere(m, real, mean_of_means)

@bug(13, 'rows without overlap: their first tokens are never predicted', every_token_is_a_target_once)
def _(m, real=data.pack): everywhere(m, real, lambda *a, **kw: {k: v[:,1:] for k,v in real(*a, **kw).items()})

def main():
    p = argparse.ArgumentParser(description='Plant each bug and show which check goes red')
    p.add_argument('--all', action='store_true', help='run every check on every bug')
    a = p.parse_args()
    sick = [c.__name__ for c in CHECKS if red(c)]
    if sick: raise SystemExit(f'red without any bug planted: {", ".join(sick)}')
    print(f'{len(CHECKS)} checks, all green on the healthy code; {len(BUGS)} bugs\n')
    print(f'{"bug":>3}  {"planted":61}{"red check":41}parity sees it')
    missed = []
    for b in sorted(BUGS, key=lambda b: b.number):
        with planted(b):
            hit,parity = red(b.check),red(same_as_transformers)
            others = [c.__name__ for c in CHECKS if c not in (b.check, same_as_transformers) and stops(c)] if a.all else []
        print(f'{b.number:3}  {b.name:61}{b.check.__name__ if hit else "NONE":41}{"yes" if parity else "no"}')
        for o in others: print(f'{"":66}+ {o}')
        if not hit: missed.append(b.name)
    if missed: raise SystemExit(f'MISSED: {", ".join(missed)}')

if __name__=='__main__': main()
