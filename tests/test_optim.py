"""Muon against an exact decomposition and against torch's own; groups and schedules"""
import copy
from dataclasses import replace
from functools import partial
import pytest, torch
from torch import nn
from torch.testing import assert_close
from nanowhale.presets import tiny
from nanowhale.model.whale import Whale
from nanowhale.train.optim import LIFT, Muon, make_optimizers, schedule, split_params, spread_as, whole
from nanowhale.fast.kernels import KERNELS, use

both = pytest.mark.parametrize('kernels', KERNELS)

@pytest.mark.parametrize('shape', [(4, 4), (3, 9), (9, 3), (2, 5, 7), (2, 3, 7, 4), (1, 6), (6, 1)])
@both
def test_newton_schulz_is_the_orthogonal_factor(shape, kernels):
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64)
    newton_schulz = use(Muon([nn.Parameter(G)]), kernels).orthogonalize
    U,_,Vt = torch.linalg.svd(G, full_matrices=False)
    assert_close(newton_schulz(G), U@Vt, atol=0.02, rtol=0)
    assert_close(newton_schulz(1e-4*G), newton_schulz(G), atol=1e-3, rtol=0)   # the gradient's scale does not matter

@both
def test_against_torch_muon(kernels, monkeypatch):
    "torch's Muon takes one coefficient triple and 2-D tensors; with the same triple both must walk together"
    torch.manual_seed(0)
    w = torch.randn(6, 10)
    ours,theirs = nn.Parameter(w.clone()),nn.Parameter(w.clone())
    a = use(Muon([ours], lr=0.05, momentum=0.9, weight_decay=0.3, scale=0.2), kernels)
    b = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, weight_decay=0.3, nesterov=True, adjust_lr_fn='match_rms_adamw', ns_steps=5)
    monkeypatch.setattr(a, 'orthogonalize', partial(a.orthogonalize, coefs=(LIFT,)*5))
    for _ in range(5):
        g = torch.randn(6, 10)
        ours.grad,theirs.grad = g.clone(),g.clone()
        a.step()
        b.step()
    # torch averages the momentum (lerp) and rounds to bf16; directions agree, so the walks stay close
    assert (ours-theirs).norm()/(theirs-w).norm()<0.03

@both
def test_stacked_experts_move_like_single_matrices(kernels):
    torch.manual_seed(0)
    w,grads = torch.randn(3, 4, 6),torch.randn(4, 3, 4, 6)
    stack,single = nn.Parameter(w.clone()),[nn.Parameter(x.clone()) for x in w]
    a,b = use(Muon([stack]), kernels),use(Muon(single), kernels)
    for g in grads:
        stack.grad = g.clone()
        for p,x in zip(single, g): p.grad = x.clone()
        a.step(); b.step()
    assert_close(stack.detach(), torch.stack([p.detach() for p in single]))

def test_matrices_in_one_weight_move_like_single_ones():
    "Gate and up of an expert, and the groups of the output: no direction is shared between them"
    whale = Whale(replace(tiny(), o_groups=4))
    muon,names = make_optimizers(whale, 1e-3, 0.02)[1],{id(p): n for n,p in whale.named_parameters()}
    blocks = {names[id(p)]: g['blocks'] for g in muon.param_groups for p in g['params']}
    for n,b in blocks.items(): assert b==(2 if 'gate_up' in n else whale.cfg.o_groups if 'o_a_proj' in n else 1), n
    assert len({*blocks.values()})==3
    torch.manual_seed(0)
    w,g = torch.randn(3, 8, 6),torch.randn(3, 8, 6)
    stack,single = nn.Parameter(w.clone()),[nn.Parameter(x.clone()) for x in w.reshape(6, 4, 6)]
    stack.grad = g
    for p,x in zip(single, g.reshape(6, 4, 6)): p.grad = x.clone()
    Muon([dict(params=[stack], blocks=2)]).step(); Muon(single).step()
    assert_close(stack.detach().reshape(6, 4, 6), torch.stack([p.detach() for p in single]))

def exact(G):
    U,_,Vt = torch.linalg.svd(G, full_matrices=False)
    return U@Vt

def slowly(W, grads, orthogonal, lr=0.1, mu=0.95, decay=0.1):
    "The rule for one matrix (V4 section 2.4), with any way to orthogonalise"
    M = torch.zeros_like(W)
    for G in grads:
        M = mu*M+G
        W = (1-lr*decay)*W-lr*0.18*max(W.shape)**0.5*orthogonal(mu*M+G)
    return W

@pytest.mark.parametrize('shapes,blocks', [([(6,4), (4,6), (3,4,6), (5,5)], 1), ([(10,3), (6,8)], 2)], ids=['tall, wide, stacked', 'two blocks'])
@both
def test_matrices_of_many_shapes_move_as_each_alone(shapes, blocks, kernels):
    "In one step together, those of one shape and its transpose in one batch"
    torch.manual_seed(0)
    ps,grads = [nn.Parameter(torch.randn(s)) for s in shapes],[torch.randn(3, *s) for s in shapes]
    was = [p.detach().clone() for p in ps]
    opt = use(Muon([dict(params=ps, blocks=blocks)], lr=0.1), kernels)
    for i in range(3):
        for p,g in zip(ps, grads): p.grad = g[i].clone()
        opt.step()
    for p,w,g in zip(ps, was, grads):
        size = p.shape[-2]//blocks, p.shape[-1]
        for orthogonal,tol in ((opt.orthogonalize, 1e-5), (exact, 0.01)):
            each = zip(w.reshape(-1, *size), g.reshape(3, -1, *size).unbind(1))
            assert_close(p.detach(), torch.stack([slowly(x, y, orthogonal) for x,y in each]).reshape(p.shape), atol=tol, rtol=1e-4)
    assert whole(was[0]) is was[0] and spread_as(was[0], ps[0]) is was[0]     # in one process there is nothing to gather

def test_the_routers_bias_has_a_rule_of_its_own():
    whale = Whale(tiny())
    ids = {id(p) for o in make_optimizers(whale, 1e-3, 0.02) for g in o.param_groups for p in g['params']}
    biases = {id(b) for n,b in whale.named_buffers() if n.endswith('bias')}
    assert biases and not biases & ids

def test_parameters_without_gradient_stay():
    p,q = nn.Parameter(torch.ones(2, 3)),nn.Parameter(torch.ones(2, 3))
    opt = Muon([p, q]); p.grad = torch.randn(2, 3); opt.step()
    assert (q==1).all() and not (p==1).all() and q not in opt.state

def test_state_dict_round_trip():
    torch.manual_seed(0)
    p,q = nn.Parameter(torch.ones(2, 3)),nn.Parameter(torch.ones(2, 3))
    a = Muon([p]); p.grad = torch.randn(2, 3); a.step()
    q.data.copy_(p); b = Muon([q]); b.load_state_dict(copy.deepcopy(a.state_dict()))
    p.grad = torch.randn(2, 3); q.grad = p.grad.clone(); a.step(); b.step()
    assert torch.equal(p, q)

@pytest.mark.parametrize('muon_lr', [None, 0.02])
def test_every_parameter_has_one_optimizer_and_vectors_no_decay(muon_lr):
    whale = Whale(tiny())
    groups = [g for o in make_optimizers(whale, 1e-3, muon_lr) for g in o.param_groups]
    ids = [id(p) for g in groups for p in g['params']]
    assert sorted(ids)==sorted(id(p) for p in whale.parameters())
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    for n,p in whale.named_parameters(): assert (decay[id(p)]>0)==(p.ndim>1), n

def test_split_follows_the_paper():
    whale = Whale(tiny())
    kinds = {k: set(ps) for k,ps in split_params(whale).items()}
    assert kinds['tables']=={'model.embed_tokens.weight', 'lm_head.weight'}
    assert {'model.layers.0.attn_hc.fn', 'model.layers.0.mlp.experts.down_proj', 'mtp.0.e_proj.weight'}<=kinds['matrices']
    assert {'model.layers.0.self_attn.sinks', 'model.layers.0.attn_hc.base', 'model.norm.weight'}<=kinds['vectors']

@pytest.mark.parametrize('steps,warmup,decay', [(1, 0, 1.), (10, 3, 1.), (100, 10, .3), (5, 20, .5), (7, 2, 0.)])
def test_schedule(steps, warmup, decay):
    f = [schedule(i, steps, warmup, decay, final=0.1) for i in range(steps+1)]
    assert all(0<x<=1 for x in f)
    peak = f.index(max(f))
    assert f[:peak+1]==sorted(f[:peak+1]) and f[peak:]==sorted(f[peak:], reverse=True)
    if warmup<steps and decay: assert abs(f[steps]-0.1)<1e-9
