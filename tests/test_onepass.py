"""Single-pass hyper-connections: V4's to the bit where coefficients are constant, loops where they are not, pieces, kernels, planted bugs"""
import copy
from dataclasses import replace
import pytest, torch
from torch import nn
from torch.testing import assert_close
from nanowhale.beyond import onepass
from nanowhale.beyond.onepass import OnePassBlock, first_read, one_pass, sublayer, vectors_moved
from nanowhale.course.exercise_model import rough, small
from nanowhale.fast.kernels import use
from nanowhale.generate.cache import Cache
from nanowhale.model.block import Block
from nanowhale.model.hyper import HyperConnection, collapse
from nanowhale.model.rope import rope_cos_sin
from nanowhale.model.visibility import window_mask
from nanowhale.model.whale import Whale
from nanowhale.presets import count_params, tiny_v4
from nanowhale.train.recipe import Recipe
from nanowhale.train.optim import make_optimizers
from nanowhale.train.step import train_step

def view(cfg, T):
    pos = torch.arange(T)
    return rope_cos_sin(pos, cfg.qk_rope_head_dim), window_mask(pos, pos, cfg.sliding_window)

def blocks(n, N=3):
    torch.manual_seed(0)
    cfg = small(hc_mult=N)
    plain = [rough(Block(cfg)).double() for _ in range(n)]
    late = [OnePassBlock(cfg).double().requires_grad_(False) for _ in range(n)]
    for a,b in zip(plain, late): b.load_state_dict(a.state_dict())
    return cfg, plain, late

def constant(parts, pre):
    for block in parts:
        for hc in (block.attn_hc, block.ffn_hc):
            nn.init.zeros_(hc.fn)
            hc.base.data[:len(pre)] = pre.logit()
    return parts

@pytest.mark.parametrize('N', [1, 2, 3, 4])
def test_constant_coefficients_give_v4_to_the_bit(N):
    cfg,plain,late = blocks(3, N)
    constant(plain+late, torch.rand(N).double()*.8+.1)
    X,seen = torch.randn(2,7,N,cfg.hidden_size).double(), view(cfg, 7)
    pre,Y = plain[0].attn_hc(X)[0], X
    for a,b in zip(plain, late):
        X,_ = a(X, *seen)
        Y,pre,_ = b(Y, pre, *seen)
        assert torch.equal(X, Y)

def by_hand(parts, X, seen, turned=False, back=1):
    "Read with the `pre` of `back` sublayers before; sums written out"
    N,pres = X.shape[2], [first_read(X)]*back
    for block in parts:
        for hc,norm,f in ((block.attn_hc, block.input_layernorm, lambda u: block.self_attn(u, *seen)),
                          (block.ffn_hc, block.post_attention_layernorm, lambda u: block.mlp(u)[0])):
            pre,post,comb = hc(X)
            y = f(norm(sum(pres[-back][...,i,None]*X[:,:,i] for i in range(N))))
            pres.append(pre)
            def c(i, j): return comb[...,j,i] if turned else comb[...,i,j]
            X = torch.stack([post[...,j,None]*y+sum(c(i, j)[...,None]*X[:,:,i] for i in range(N)) for j in range(N)], 2)
    return X, pres[-back]

def run(parts, X, seen):
    pre = first_read(X)
    for block in parts: X,pre,_ = block(X, pre, *seen)
    return X, pre

@pytest.mark.parametrize('bug', [dict(), dict(turned=True), dict(back=2)], ids=str)
def test_the_order_is_the_papers_and_a_bug_is_seen(bug):
    cfg,_,late = blocks(2)
    X,seen = torch.randn(2,7,3,cfg.hidden_size).double(), view(cfg, 7)
    got,want = run(late, X, seen), by_hand(late, X, seen, **bug)
    if not bug: return assert_close(got, want)
    with pytest.raises(AssertionError): assert_close(got[0], want[0], rtol=1e-3, atol=1e-3)

def test_gradients_reach_every_pre_and_agree_with_the_loops():
    cfg,_,late = blocks(2)
    for b in late: b.requires_grad_()
    X,seen = torch.randn(1,5,3,cfg.hidden_size).double().requires_grad_(), view(cfg, 5)
    learned = [p for b in late for n,p in b.named_parameters() if 'hc' in n]
    grads = [torch.autograd.grad(collapse(*reversed(f(late, X, seen))).square().sum(), [X, *learned]) for f in (run, by_hand)]
    for a,b in zip(*grads): assert_close(a, b)
    assert all(g.any() for g in grads[0])

QUICK = dict(hidden_size=16, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_lora_rank=8, moe_intermediate_size=8, index_head_dim=8, hc_sinkhorn_iters=3)

def whales(**changes):
    torch.manual_seed(0)
    plain = Whale(replace(tiny_v4(64), **QUICK | changes))
    return plain, one_pass(copy.deepcopy(plain))

def test_only_the_learned_collapse_is_gone():
    plain,late = whales()
    a,b = plain.state_dict(), late.state_dict()
    assert set(a)-set(b)=={'model.hc_head.hc_fn', 'model.hc_head.hc_base', 'model.hc_head.hc_scale'} and set(b)<set(a)
    assert all(torch.equal(a[k], b[k]) for k in b)
    cfg = plain.cfg
    assert sum(a[k].numel() for k in set(a)-set(b))==cfg.hc_mult**2*cfg.hidden_size+cfg.hc_mult+1

@pytest.mark.parametrize('kernels', ['plain', 'fast'])
def test_pieces_are_the_whole(kernels):
    _,late = whales(num_nextn_predict_layers=0)
    use(late, kernels)
    ids = torch.randint(0, 64, (2,30))
    cache,pieces = Cache(late.cfg, spare=2), []
    with torch.no_grad():
        full = late(ids).logits
        for a,b in ((0,1), (1,2), (2,9), (9,26), (26,30)):
            pieces.append(late(ids[:,a:b], cache=cache).logits)
            late(ids[:,:2], cache=cache)
            cache.rewind(2)
    assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=2e-4)

def test_it_trains_and_keeps_nothing_of_a_pass():
    _,late = whales()
    recipe = Recipe(steps=8, context=16, batch_size=4)
    opts = make_optimizers(late, recipe.lr, recipe.muon_lr)
    ids = torch.randint(0, 64, (4,17))
    losses = [train_step(late, late, opts, dict(input_ids=ids, docs=torch.zeros_like(ids)), recipe, i)['loss'] for i in range(8)]
    assert losses[-1]<losses[0]-.1 and late.model.hc_head.pre is None

def test_a_whale_of_one_stream_reads_all_of_it_at_first():
    assert first_read(torch.randn(2,3,1,5)).eq(1).all()
    assert first_read(torch.randn(2,3,4,5)).tolist()==[[[1,0,0,0]]*3]*2

@pytest.mark.parametrize('N', range(1, 9))
def test_one_pass_moves_half(N): assert 2*vectors_moved(N, 1)==vectors_moved(N) and vectors_moved(N, 2)-vectors_moved(N, 1)==N

def test_a_fresh_symmetric_comb_hides_the_wrong_index(monkeypatch):
    "Why the proofs draw `base` by lot: where all of comb is one number, the bug changes nothing"
    from nanowhale.model.hyper import mix
    cfg = small()
    hc = HyperConnection(cfg).double()
    nn.init.zeros_(hc.fn)
    X = torch.randn(2,5,3,cfg.hidden_size).double()
    def go(): return sublayer(hc, lambda u: (u.tanh(), None), X, first_read(X))[0]
    right = go()
    monkeypatch.setattr(onepass, 'mix', lambda post, comb, X, y: mix(post, comb.mT, X, y))
    assert_close(go(), right)
    nn.init.normal_(hc.base)
    wrong = go()
    monkeypatch.undo()
    assert (go()-wrong).abs().max()>.05

def test_parameters_are_counted():
    plain,late = whales()
    assert sum(count_params(plain.cfg).values())-late.n_params()==plain.cfg.hc_mult**2*plain.cfg.hidden_size+plain.cfg.hc_mult+1
