"""Hyper-connections against a plain formula, against transformers, at hard numbers, and with every known bug planted"""
import pytest, torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from nanowhale.fast import sinkhorn as fast
from nanowhale.fast.kernels import KERNELS, use
from nanowhale.model import hyper
from nanowhale.model.config import WhaleConfig
from nanowhale.model.hyper import HyperConnection, HyperHead, collapse, mix, project, sinkhorn
from test_parity import no_downcast

SINKHORN = dict(plain=sinkhorn, fast=fast.sinkhorn)

def formula(logits, iters, eps=1e-6):
    "The V4 formula as transformers writes it, differentiated by autograd"
    m = logits.softmax(-1)+eps
    m = m/(m.sum(-2, keepdim=True)+eps)
    for _ in range(iters-1):
        m = m/(m.sum(-1, keepdim=True)+eps)
        m = m/(m.sum(-2, keepdim=True)+eps)
    return m

def value_and_grad(f, x, dy):
    x = x.detach().clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]

# ---------------------------------------------------------------- Sinkhorn

@pytest.mark.parametrize('shape', [(1,1), (4,4), (7,2,2), (2,5,3,3), (2,3,1,6,6)])
@pytest.mark.parametrize('iters', [1, 2, 5, 20])
@pytest.mark.parametrize('kernels', KERNELS)
def test_sinkhorn_is_the_formula(shape, iters, kernels):
    sinkhorn = SINKHORN[kernels]
    torch.manual_seed(sum(shape)+iters)
    x,dy = 3*torch.randn(shape).double(),torch.randn(shape).double()
    for a,b in zip(value_and_grad(lambda l: sinkhorn(l, iters), x, dy), value_and_grad(lambda l: formula(l, iters), x, dy)):
        assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda l: sinkhorn(l, iters), x.flatten(0,-3)[:3].requires_grad_() if len(shape)>2 else x.requires_grad_())

@pytest.mark.parametrize('kernels', KERNELS)
def test_sinkhorn_takes_any_layout(kernels):
    sinkhorn = SINKHORN[kernels]
    torch.manual_seed(0)
    x = torch.randn(3,4,5,4).double().permute(2,0,1,3)    # [5,3,4,4], not contiguous
    dy = torch.randn(4,4,5,3).double().permute(2,3,0,1)
    for a,b in zip(value_and_grad(lambda l: sinkhorn(l, 3), x, dy), value_and_grad(lambda l: formula(l, 3), x, dy)): assert_close(a, b)

HARD = dict(signs=lambda *s: 50*torch.randn(*s).sign(), wide=lambda *s: 50*torch.randn(*s), equal=lambda *s: torch.full(s, -50.),
            triangle=lambda *s: 100*torch.ones(*s).tril()-50, one_target=lambda *s: 50*torch.eye(s[-1])[0].expand(*s).contiguous())

@pytest.mark.parametrize('name', HARD)
@pytest.mark.parametrize('N', [1, 2, 4])
@pytest.mark.parametrize('iters', [2, 20])
@pytest.mark.parametrize('kernels', KERNELS)
def test_hard_logits_stay_finite_and_right(name, N, iters, kernels):
    sinkhorn = SINKHORN[kernels]
    torch.manual_seed(1)
    x = HARD[name](500,N,N).float()
    dy = torch.randn(500,N,N)
    y,g = value_and_grad(lambda l: sinkhorn(l, iters), x, dy)
    y64,g64 = value_and_grad(lambda l: formula(l, iters), x.double(), dy.double())
    assert y.isfinite().all() and g.isfinite().all() and (y>=0).all()
    assert_close(y.sum(-2), torch.ones(500,N), rtol=0, atol=1e-5)
    assert_close(y.double(), y64, rtol=0, atol=1e-4)
    assert_close(g.double(), g64, rtol=1e-3, atol=1e-4)

def test_the_fast_sinkhorn_refuses_a_second_derivative():
    "It has only the first; a wrong second one would go unnoticed"
    x = torch.randn(3,3, requires_grad=True)
    g, = torch.autograd.grad(fast.sinkhorn(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

# ---------------------------------------------------------------- transformers

def config(N, D, iters): return WhaleConfig(hc_mult=N, hidden_size=D, hc_sinkhorn_iters=iters)

def pair(ours, theirs, N, D, iters, std=0.5):
    "One of our modules and transformers', with the same random weights, in float64: what is compared is mathematics"
    cfg = config(N, D, iters)
    a = ours(cfg)
    for p in a.parameters(): torch.nn.init.normal_(p, std=std)
    b = theirs(DeepseekV4Config(hc_mult=N, hidden_size=D, hc_sinkhorn_iters=iters))
    b.load_state_dict(a.state_dict())
    return a.double(), b.double()

def connected(a, X, y):
    pre,post,comb = a(X)
    return post, comb, collapse(pre, X), hyper.mix(post, comb, X, y)

def connected_hf(b, X, y):
    post,comb,u = b(X)
    return post, comb, u, post.unsqueeze(-1)*y.unsqueeze(-2) + comb.transpose(-1,-2)@X      # as DeepseekV4DecoderLayer does

def check_connection(seed, kernels='plain'):
    "Values and gradients of one random hyper-connection beside transformers'"
    torch.manual_seed(seed)
    N,D,iters,B,T = (int(torch.randint(a, b, ())) for a,b in ((1,6), (1,19), (1,21), (1,4), (1,8)))
    a,b = pair(HyperConnection, DeepseekV4HyperConnection, N, D, iters)
    use(a, kernels)
    X,y = (3*torch.randn(B,T,N,D).double()).requires_grad_(),torch.randn(B,T,D).double().requires_grad_()
    with no_downcast(): ours,theirs = connected(a, X, y),connected_hf(b, X, y)
    for o,t in zip(ours, theirs): assert_close(o, t, rtol=1e-9, atol=1e-9)
    dys = [torch.randn_like(o) for o in ours]
    ga = torch.autograd.grad(ours, [X,y,*a.parameters()], dys)
    gb = torch.autograd.grad(theirs, [X,y,*b.parameters()], dys)
    for o,t in zip(ga, gb): assert (o-t).norm() <= 1e-9*t.norm()+1e-9

@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('seed', range(12))
def test_connection_is_transformers(seed, kernels): check_connection(seed, kernels)

@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('seed', range(6))
def test_head_is_transformers(seed, kernels):
    torch.manual_seed(seed)
    N,D = int(torch.randint(1, 6, ())),int(torch.randint(1, 19, ()))
    a,b = pair(HyperHead, DeepseekV4HyperHead, N, D, 2)
    use(a, kernels)
    X = torch.randn(2,5,N,D).double().requires_grad_()
    with no_downcast(): u,v = a(X),b(X)
    assert_close(u, v, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(u)
    for g,h in zip(torch.autograd.grad(u, [X,*a.parameters()], dy), torch.autograd.grad(v, [X,*b.parameters()], dy)):
        assert (g-h).norm() <= 1e-9*h.norm()+1e-9

# ---------------------------------------------------------------- bugs that still train, planted

def rows_last(l, iters, eps=1e-6):
    m = l.softmax(-2)+eps
    for _ in range(iters): m = m/(m.sum(-2, keepdim=True)+eps); m = m/(m.sum(-1, keepdim=True)+eps)
    return m

def bare_exp(l, iters, eps=1e-6):
    m = l.exp()+eps
    for i in range(2*iters-1): m = m/(m.sum(-2+i%2, keepdim=True)+eps)
    return m

def wrong_order(self, X):
    post,pre,comb = self.right_forward(X)
    return pre, post, comb

def wrong_post(self, X):
    pre,post,comb = self.right_forward(X)
    return pre, post/2, comb

PLANTED = {
    'mix contracts the target':       ('mix', lambda post,comb,X,y: mix(post, comb.mT, X, y)),
    'comb comes out transposed':      ('sinkhorn', lambda l,i,e: sinkhorn(l, i, e).mT),
    'last division over the targets': ('sinkhorn', lambda l,i,e: rows_last(l, i, e)),
    'exp in place of softmax':        ('sinkhorn', lambda l,i,e: bare_exp(l, i, e)),
    'sigmoid in place of softmax':    ('sinkhorn', lambda l,i,e: sinkhorn(torch.sigmoid(l), i, e)),
    'one iteration too few':          ('sinkhorn', lambda l,i,e: sinkhorn(l, max(1, i-1), e)),
    'streams not normalised':         ('project', lambda X,fn,eps,product: product(X.flatten(-2), fn)),
    'normalised stream by stream':    ('project', lambda X,fn,eps,product: project(X*(X.square().mean(-1, keepdim=True)+eps).rsqrt(), fn, eps)),
    'post and pre swapped':           ('HyperConnection.forward', wrong_order),
    'post without its factor 2':      ('HyperConnection.forward', wrong_post)}

@pytest.mark.parametrize('bug', PLANTED)
def test_planted_bugs_are_seen(bug, monkeypatch):
    where,what = PLANTED[bug]
    monkeypatch.setattr(HyperConnection, 'right_forward', HyperConnection.forward, raising=False)
    if '.' in where: monkeypatch.setattr(HyperConnection, 'forward', what)
    elif where=='sinkhorn': monkeypatch.setattr(HyperConnection, 'sinkhorn', staticmethod(what))
    else: monkeypatch.setattr(hyper, where, what)
    with pytest.raises(AssertionError):
        for seed in range(4): check_connection(seed)

def test_equal_streams_stay_equal_only_with_the_right_index():
    torch.manual_seed(0)
    right,wrong = torch.ones(1,2048,4,1),torch.ones(1,2048,4,1)
    none,y = torch.zeros(1,2048,4),torch.zeros(1,2048,1)
    for _ in range(16):
        comb = sinkhorn(3*torch.randn(1,2048,4,4), 2)
        right,wrong = mix(none, comb, right, y),mix(none, comb.mT, wrong, y)
    assert (right-1).abs().max() < 1e-4
    assert 0.1 < (wrong-1).abs().mean() < 0.3

# ---------------------------------------------------------------- precision, modes

def modules(kernels='plain'):
    torch.manual_seed(0)
    cfg = config(4, 24, 5)
    a,h = HyperConnection(cfg),HyperHead(cfg)
    for p in [*a.parameters(), *h.parameters()]: torch.nn.init.normal_(p, std=0.3)
    return use(a, kernels), use(h, kernels), torch.randn(2,3,4,24), torch.randn(2,3,24)

@pytest.mark.parametrize('kernels', KERNELS)
def test_gradcheck_of_both_modules(kernels):
    a,h,X,y = modules(kernels)
    a,h,X,y = a.double(),h.double(),X[:1,:2].double().requires_grad_(),y[:1,:2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda X,y,*_: connected(a, X, y), (X, y, *a.parameters()), fast_mode=True)
    assert torch.autograd.gradcheck(lambda X,*_: h(X), (X, *h.parameters()), fast_mode=True)

@pytest.mark.parametrize('kernels', KERNELS)
def test_autocast_changes_nothing(kernels):
    a,h,X,y = modules(kernels)
    want = [*connected(a, X, y), h(X)]
    with torch.autocast('cpu', dtype=torch.bfloat16): got = [*connected(a, X, y), h(X)]
    for g,w in zip(got, want): assert_close(g, w, rtol=0, atol=0)

@pytest.mark.parametrize('kernels', KERNELS)
def test_bf16_streams_are_rounded_once(kernels):
    a,h,X,y = modules(kernels)
    Xh,yh = X.bfloat16(),y.bfloat16()
    want = connected(a, Xh.float(), yh.float())
    for g,w,dtype in zip(connected(a, Xh, yh), want, [torch.float32]*2+[torch.bfloat16]*2):
        assert g.dtype==dtype
        assert_close(g, w.to(dtype), rtol=0, atol=0)
    assert h(Xh).dtype==torch.bfloat16
    assert_close(h(Xh), h(Xh.float()).bfloat16(), rtol=0, atol=0)
    a.bfloat16()(Xh)      # weights in bf16 too

def test_fresh_modules_hold_numbers():
    "Allocated and never initialised is a known bug of ports"
    cfg = WhaleConfig(hc_mult=4, hidden_size=64, initializer_range=0.02)
    for _ in range(20):
        a,h = HyperConnection(cfg),HyperHead(cfg)
        assert 0.015 < a.fn.std() < 0.025 and 0.012 < h.hc_fn.std() < 0.028
        assert (a.base==0).all() and (a.scale==1).all() and (h.hc_base==0).all() and (h.hc_scale==1).all()
        del a, h

@pytest.mark.parametrize('kernels', KERNELS)
def test_checkpointed_gradients_are_the_same(kernels):
    a,_,X,y = modules(kernels)
    X.requires_grad_()
    f = lambda X: connected(a, X, y)[3].square().sum()
    want = torch.autograd.grad(f(X), [X,*a.parameters()])
    got = torch.autograd.grad(checkpoint(f, X, use_reentrant=False), [X,*a.parameters()])
    for g,w in zip(got, want): assert_close(g, w, rtol=0, atol=0)

def check_compiled(backend, kernels):
    torch._dynamo.reset()
    a,_,X,y = modules(kernels)
    a.scale.data.fill_(40.)                      # logits of +-50 and more
    X.requires_grad_()
    f = lambda X: connected(a, X, y)[3]
    want = f(X)
    gw = torch.autograd.grad(want.square().sum(), [X,*a.parameters()])
    got = torch.compile(f, backend=backend, fullgraph=True)(X)
    gg = torch.autograd.grad(got.square().sum(), [X,*a.parameters()])
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    for g,w in zip(gg, gw): assert g.isfinite().all() and (g-w).norm() <= 1e-3*w.norm()

@pytest.mark.parametrize('kernels', KERNELS)
def test_traces_as_one_graph(kernels): check_compiled('aot_eager', kernels)

@pytest.mark.slow
@pytest.mark.parametrize('kernels', KERNELS)
def test_compiled_backward_is_finite(kernels): check_compiled('inductor', kernels)

# ---------------------------------------------------------------- what the chapter says

def test_the_sum_that_is_finished_last_is_exact_and_no_logits_turn_it_round():
    "So weights trained with the transposed mix need the switch"
    torch.manual_seed(0)
    m = sinkhorn(3*torch.randn(1000,4,4).double(), 2, 0)
    assert (m.sum(-2)-1).abs().max()<1e-12 and (m.sum(-1)-1).abs().max()>0.1

def test_two_streams_end_where_their_ratio_says():
    "Divisions keep m11*m22/(m12*m21), and on the polytope that fixes the matrix"
    torch.manual_seed(5)
    l = 2*torch.randn(12,2,2).double()
    end = torch.sigmoid((l[:,0,0]+l[:,1,1]-l[:,0,1]-l[:,1,0])/2)
    m = sinkhorn(l, 60, eps=0)
    for i in range(2): assert_close(m[:,i,i], end, rtol=0, atol=1e-3)

@pytest.mark.parametrize('sigma,iters,mean,p99,norm',
    [(0.5,2,.003,.017,1.01), (1.28,2,.039,.195,1.3), (3,2,.145,.61,1.8), (3,5,.037,.19,1.5), (3,20,.002,.024,1.1)])
def test_few_rounds_leave_errors_of_known_size(sigma, iters, mean, p99, norm):
    torch.manual_seed(7)
    m = sinkhorn(sigma*torch.randn(8192,4,4), iters)
    off = (m.sum(-1)-1).abs().flatten()
    assert abs(off.mean()-mean)<0.1*mean+6e-4 and abs(off.quantile(0.99)-p99)<0.1*p99+2e-3
    assert torch.linalg.matrix_norm(m, 2).max()<norm

def test_no_depth_gains_more_than_the_root_of_the_streams():
    "Each target receives 1, so all sources together give N through any number of layers"
    torch.manual_seed(8)
    total = torch.eye(4)
    for comb in sinkhorn(10*torch.randn(64,50,4,4), 2): total = total@comb
    assert_close(total.sum((-2,-1)), torch.full((50,), 4.), rtol=0, atol=1e-3)
    assert 1 < torch.linalg.matrix_norm(total, 2).max() < 2

@pytest.mark.parametrize('connect,N,low,high', [('residual',1,.3,4), ('free',4,100,1e6), ('sinkhorn',4,.3,4)])
def test_activations_and_gradients_through_48_sublayers(connect, N, low, high):
    mixes = dict(residual=torch.ones_like, free=lambda z: torch.eye(4)+z/4, sinkhorn=lambda z: sinkhorn(2*torch.eye(4)+z, 20))
    torch.manual_seed(13)
    start = torch.randn(1,32,1,16).repeat(1,1,N,1).requires_grad_()
    X = start
    for _ in range(48):
        pre,post = torch.randn(2,1,32,N).mul(N>1).sigmoid()*2
        y = torch.nn.functional.rms_norm(collapse(pre, X), (16,))@torch.randn(16,16)*0.05
        X = mix(post, mixes[connect](torch.randn(1,32,N,N)), X, y)
    dy = torch.randn_like(X)
    g, = torch.autograd.grad(X, start, dy)
    assert low < X.norm()/start.norm() < high and low < g.norm()/dy.norm() < high

def test_only_the_direction_of_the_streams_counts():
    X,fn = torch.randn(2,5,3,8).double(),torch.randn(7,24).double()
    assert_close(project(100*X, fn, 0), project(X, fn, 0))

def test_the_switch_transposes_the_mix():
    a,_,X,_ = modules()
    comb = a(X)[2]
    a.transposed = True
    assert_close(a(X)[2], comb.mT, rtol=0, atol=0)

def from_residual(scale, L=16, D=64, N=4):
    "How far the mean of fresh streams is from a pre-norm residual network"
    torch.manual_seed(1)
    X = x = torch.randn(1,32,D)
    X = X[:,:,None].expand(-1,-1,N,-1)
    for _ in range(L):
        W = torch.randn(D,D)/D**.5
        def f(u): return torch.tanh(torch.nn.functional.rms_norm(u, (D,))@W)
        a = HyperConnection(WhaleConfig(hidden_size=D, hc_mult=N, initializer_range=0.02*(320/D)**.5))
        torch.nn.init.constant_(a.scale, scale)
        pre,post,comb = a(X)
        X,x = mix(post, comb, X, f(collapse(pre, X))),x+f(x)
    return ((X.mean(2)-x).norm()/x.norm()).item()

def test_step_zero_is_a_residual_network_only_without_scale():
    assert from_residual(0)<1e-4 < from_residual(0.01)<0.01 < 0.1<from_residual(1)<0.4

def test_copies_are_told_apart_by_post_alone_and_give_the_mix_no_gradient():
    torch.manual_seed(10)
    a = HyperConnection(WhaleConfig(hidden_size=320, hc_mult=4, hc_sinkhorn_iters=2))
    X,y = torch.randn(1,50,1,320).expand(-1,-1,4,-1),torch.randn(1,50,320)
    assert abs(project(X, a.fn, 1e-6).std()-0.02*1280**0.5) < 0.1
    spread = lambda X: (X-X.mean(2, keepdim=True)).abs().max()
    pre,post,comb = a(X)
    assert spread(mix(torch.ones_like(post), comb, X, y)) < 1e-4 < 0.1 < spread(mix(post, comb, X, y))
    g, = torch.autograd.grad((mix(post, comb, X, y)*torch.randn(1,50,4,320)).sum(), a.fn)
    assert g[8:].norm() < 1e-4*g[4:8].norm()

def test_what_a_connection_costs():
    cfg = WhaleConfig(hidden_size=320, hc_mult=4)
    assert sum(p.numel() for p in HyperConnection(cfg).parameters())==24*1280+24+3
    assert sum(p.numel() for p in HyperHead(cfg).parameters())==5125

@pytest.mark.parametrize('iters', [2, 5, 20])
def test_what_the_plain_sinkhorn_keeps_for_its_backward(iters):
    "The softmax's N*N numbers, and N*N+N for each division"
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sinkhorn(torch.rand(10,4,4, requires_grad=True), iters)
    assert sum(saved)==10*(16+(2*iters-1)*20)
