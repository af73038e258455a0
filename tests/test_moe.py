"""The mixture of experts beside transformers', over many sizes and dtypes, and with bugs planted in it."""
import random
import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
from nanowhale.model import moe as M
from nanowhale.model.config import WhaleConfig
from nanowhale.presets import nanowhale_100m, count_params, count_flops
from nanowhale.model.moe import (MoE, SCORES, Experts, HashRouter, balance_loss, bias_step, expert_load, gate_weights,
    hash_table, route, run_experts, sqrt_softplus, swiglu)
from nanowhale.fast.kernels import KERNELS, use
from nanowhale.train.step import max_vio
from nanowhale.validate import SCORING
from test_parity import no_downcast

BIAS = 'gate.e_score_correction_bias'

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(params=KERNELS)
def each_set(request, monkeypatch):
    "Every `MoE` made inside computes with the plain set, then with the fast one"
    make = MoE.__init__
    def init(self, *args, **kw):
        make(self, *args, **kw)
        use(self, request.param)
    monkeypatch.setattr(MoE, '__init__', init)

WITH_BOTH = pytest.mark.usefixtures('each_set')

def config(D=8, I=4, E=7, k=3, **kw):
    return WhaleConfig(hidden_size=D, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=k, **kw)

def random_config(seed):
    r = random.Random(seed)
    E = r.randint(1, 9)
    return config(r.randint(1, 17), r.randint(1, 13), E, r.randint(1, E), scoring_func=r.choice(['sqrtsoftplus']*3+['sigmoid']),
        routed_scaling_factor=r.choice([1., 1.5, 2.5]), swiglu_limit=r.choice([.3, 1., 10.]))

def fill(m, std=.7):
    "Random weights, and a bias that changes choices"
    with torch.no_grad():
        for p in m.parameters(): p.normal_(std=std)
        m.gate.e_score_correction_bias.normal_(std=.3)
    return m

def pair(cfg):
    "Our MoE and transformers', with the same random weights"
    modeling = pytest.importorskip('transformers.models.deepseek_v4.modeling_deepseek_v4')
    hf_cfg = cfg.to_hf()
    hf_cfg._experts_implementation = 'eager'
    ours,theirs = fill(MoE(cfg)),modeling.DeepseekV4SparseMoeBlock(hf_cfg, 0)
    theirs.load_state_dict(ours.state_dict())   # strict: the same names and shapes
    return ours,theirs

def load_of(routing): return expert_load(routing.idx, routing.scores.shape[-1])

def forward_and_gradients(m, x, dy):
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = m(x)
    y = y[0] if isinstance(y, tuple) else y
    (y*dy).sum().backward()
    return y.detach(), dict(x=x.grad, **{n:p.grad for n,p in m.named_parameters()})

def compare(seed, kernels='plain'):
    "Worst difference of the output and of a gradient, relative to its largest entry, in float64"
    torch.manual_seed(seed)
    cfg = random_config(seed)
    ours,theirs = (m.double() for m in pair(cfg))
    use(ours, kernels)
    x = torch.randn(random.Random(-seed).randint(1, 4), random.Random(seed+7).randint(1, 9), cfg.hidden_size).double()
    dy = torch.randn_like(x)
    with no_downcast(): (y,g),(y_hf,g_hf) = (forward_and_gradients(m, x, dy) for m in (ours,theirs))
    assert g.keys()==g_hf.keys()
    g_hf = {n: torch.zeros_like(g[n]) if v is None else v for n,v in g_hf.items()}
    floor = 1e-2*max(v.abs().max() for v in g_hf.values())   # with k=1 the router's true gradient is 0 (a weight of s/s)
    back = max(((g[n]-g_hf[n]).abs().max()/g_hf[n].abs().max().clamp(min=floor)).item() for n in g)
    return ((y-y_hf).abs().max()/y_hf.abs().max().clamp(min=1)).item(), back

@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('seed', range(60))
def test_agrees_with_transformers(seed, kernels):
    forward,back = compare(seed, kernels)
    assert forward<1e-9 and back<1e-9, (forward, back, random_config(seed))

# ---------------------------------------------------------------- planted bugs: the comparison must go red

def weights_from_biased_scores(scores, bias, k, scale):
    w,idx = (scores+bias).topk(k, -1)
    return idx, scale*w/w.sum(-1, keepdim=True)

def bias_ignored(scores, bias, k, scale): return route(scores, 0*bias, k, scale)
def not_normalised(scores, bias, k, scale):
    idx,_ = route(scores, bias, k, scale)
    return idx, scale*scores.gather(-1, idx)
def normalised_over_all(scores, bias, k, scale):
    idx,_ = route(scores, bias, k, scale)
    return idx, scale*(scores/scores.sum(-1, keepdim=True)).gather(-1, idx)
def duplicates(scores, bias, k, scale):
    idx,w = route(scores, bias, k, scale)
    return idx[...,:1].expand_as(idx), w

def up_and_gate_swapped(gate, up, limit): return swiglu(up, gate, limit)
def no_clamp(gate, up, limit): return F.silu(gate)*up
def gate_clamped_below(gate, up, limit): return F.silu(gate.clamp(-limit, limit))*up.clamp(-limit, limit)
def weights_in_token_order(x, idx, w, gate_up, down, limit):
    order = idx.flatten().argsort(stable=True).argsort()
    return run_experts(x, idx, w.flatten()[order].view_as(w), gate_up, down, limit)

PLANTED = [('route', f) for f in (weights_from_biased_scores, bias_ignored, not_normalised, normalised_over_all, duplicates)]
PLANTED += [('swiglu', f) for f in (up_and_gate_swapped, no_clamp, gate_clamped_below)] + [('Experts.run', weights_in_token_order)]

@pytest.mark.parametrize('name,bug', PLANTED, ids=[f.__name__ for _,f in PLANTED])
def test_planted_bug_is_seen(name, bug, monkeypatch):
    if name=='Experts.run': monkeypatch.setattr(Experts, 'run', staticmethod(bug))
    else: monkeypatch.setattr(M, name, bug)
    seeds = [s for s in range(60) if 1<random_config(s).num_experts_per_tok<random_config(s).n_routed_experts and random_config(s).swiglu_limit<1][:4]
    assert len(seeds)==4 and all(compare(s)[0]>1e-3 for s in seeds)

@WITH_BOTH
def test_shared_expert_is_clamped_and_unscaled():
    torch.manual_seed(0)
    m = fill(MoE(config(swiglu_limit=.5)))
    m.experts.down_proj.data.zero_()
    x = 3*torch.randn(2,5,8)
    s = m.shared_experts
    gate,up = x@s.gate_proj.weight.T,x@s.up_proj.weight.T
    assert_close(m(x)[0], (F.silu(gate.clamp(max=.5))*up.clamp(-.5,.5))@s.down_proj.weight.T)

# ---------------------------------------------------------------- the oracle, one token and one expert at a time

def naive(m, x, cfg):
    ys,b = [],m.gate.e_score_correction_bias
    gate_up,down,limit,I = m.experts.gate_up_proj,m.experts.down_proj,cfg.swiglu_limit,cfg.moe_intermediate_size
    for xt in x.flatten(0,1):
        s = (1+(m.gate.weight@xt).exp()).log().sqrt()
        chosen = sorted(range(len(s)), key=lambda i: -(s[i]+b[i]).item())[:cfg.num_experts_per_tok]
        total = sum(s[i] for i in chosen)
        y = m.shared_experts(xt)
        for i in chosen:
            gate,up = gate_up[i,:I]@xt, gate_up[i,I:]@xt
            y = y + cfg.routed_scaling_factor*s[i]/total*(down[i]@(F.silu(gate.clamp(max=limit))*up.clamp(-limit, limit)))
        ys.append(y)
    return torch.stack(ys).view_as(x)

@WITH_BOTH
@pytest.mark.parametrize('D,I,E,k,B,T', [(8,4,7,3,2,5), (5,3,1,1,2,3), (3,6,4,4,1,7), (6,2,9,1,3,1), (4,5,2,2,1,1)])
def test_agrees_with_loops(D, I, E, k, B, T):
    torch.manual_seed(D)
    cfg = config(D, I, E, k, swiglu_limit=1.)
    m = fill(MoE(cfg).double())
    x,dy = torch.randn(2,B,T,D).double()
    (y,g),(want,g_want) = (forward_and_gradients(f, x, dy) for f in (m, Oracle(m, cfg)))
    assert_close(y, want)
    for n in g: assert_close(g[n], torch.zeros_like(g[n]) if g_want[n] is None else g_want[n])

class Oracle:
    "`naive` in the clothes of a module"
    def __init__(self, m, cfg): self.m,self.cfg = m,cfg
    def __call__(self, x): return naive(self.m, x, self.cfg)
    def zero_grad(self): self.m.zero_grad()
    def named_parameters(self): return self.m.named_parameters()

@WITH_BOTH
def test_gradcheck():
    torch.manual_seed(0)
    m = fill(MoE(config(5, 3, 4, 2, swiglu_limit=2.)).double())
    names,params = zip(*m.named_parameters())
    def f(x, *p):
        y,r = torch.func.functional_call(m, dict(zip(names, p)), (x,))
        return y, balance_loss(*r)
    assert torch.autograd.gradcheck(f, (torch.randn(2,3,5).double().requires_grad_(), *params))

# ---------------------------------------------------------------- properties

@WITH_BOTH
def test_order_of_experts_does_not_matter():
    torch.manual_seed(0)
    m,p,x = fill(MoE(config())),torch.randperm(7),torch.randn(2,5,8)
    y,r = m(x)
    with torch.no_grad():
        for v in (m.gate.weight, m.gate.e_score_correction_bias, m.experts.gate_up_proj, m.experts.down_proj): v.copy_(v[p].clone())
    y2,r2 = m(x)
    assert_close(y2, y)
    assert_close(load_of(r2), load_of(r)[p])
    assert_close(balance_loss(*r2), balance_loss(*r))

@WITH_BOTH
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_tokens_do_not_see_their_batch_mates(dtype):
    torch.manual_seed(0)
    m,x = fill(MoE(config())).to(dtype),torch.randn(3,5,8).to(dtype)
    y = m(x)[0]
    for b in range(3): assert_close(m(x[b:b+1])[0], y[b:b+1])
    assert_close(m(x[1:2,3:4])[0], y[1:2,3:4])
    other = x.clone()
    other[0,0] = 100.
    assert_close(m(other)[0][1:], y[1:])

@WITH_BOTH
def test_only_the_chosen_experts_act():
    torch.manual_seed(0)
    m,x = fill(MoE(config())),torch.randn(1,1,8)
    y,idx = m(x)[0],m.gate(x)[1].flatten().tolist()
    with torch.no_grad():
        for e in set(range(7))-set(idx): m.experts.gate_up_proj[e] = m.experts.down_proj[e] = float('nan')
    assert_close(m(x)[0], y)

def test_every_score_is_positive_and_rises_with_its_logit():
    "So without a bias all three choose the same experts"
    torch.manual_seed(0)
    z = torch.randn(20, 9)
    assert set(SCORES)==set(SCORING)
    for score in SCORES.values(): assert (score(z)>0).all() and torch.equal(score(z).argsort(-1), z.argsort(-1))

def test_beyond_the_clamp_nothing_pushes_further():
    big = torch.linspace(-100, 100, 101, requires_grad=True)
    assert swiglu(big, big, 10.).abs().max()<=100
    slope, = torch.autograd.grad(swiglu(big, torch.ones(101), 10.).sum(), big)
    assert (slope[big>10]==0).all() and slope[big==10]>.99 and (slope[big<-10]!=0).any()   # no lower clamp
    slope, = torch.autograd.grad(swiglu(torch.ones(101), big, 10.).sum(), big)
    assert (slope[big.abs()>10]==0).all() and (slope[big.abs()<10]>0).all()

def test_a_moe_reports_what_its_router_chose():
    torch.manual_seed(0)
    m,x = fill(MoE(config())), torch.randn(2,5,8)
    scores,idx,_ = m.gate(x)
    assert torch.equal(m(x)[1].scores, scores) and torch.equal(m(x)[1].idx, idx)

# ---------------------------------------------------------------- tables

def distinct(idx): return bool((idx.sort(-1).values.diff()>0).all())

@pytest.mark.parametrize('V,E,k', [(4096,4,2), (50,5,3), (1000,7,7), (7,3,1), (10007,256,6), (4096,7,2)])
def test_tables_are_fair_and_name_nobody_twice(V, E, k):
    table = hash_table(V, E, k)
    load = expert_load(table, E)
    assert table.shape==(V,k) and distinct(table)
    assert load.max()-load.min()<=max(6, .6*load.float().mean())

def test_hashes_that_know_nothing_of_each_other_are_seen():
    ids = torch.arange(50)
    assert not distinct(torch.stack([3*ids%7, (5*ids+1)%7, (ids+2)%7], -1))

def test_a_table_chooses_and_the_scores_weigh():
    torch.manual_seed(0)
    m,x,ids = HashRouter(config(vocab_size=50)), torch.randn(10,8), torch.randint(50, (10,))
    scores,idx,w = m(x, ids)
    assert torch.equal(idx, hash_table(50, 7, 3)[ids]) and torch.equal(idx, m(2*x, ids)[1])
    assert_close(w, gate_weights(scores, idx, 1.5))
    assert list(m.state_dict())==['weight', 'tid2eid']

# ---------------------------------------------------------------- corners

def test_with_one_expert_per_token_the_output_tells_the_router_nothing():
    "Its weight is s/s, a constant; with two it is none"
    for k in (1, 2):
        torch.manual_seed(0)
        z = torch.randn(4,5).double().requires_grad_()
        w = route(sqrt_softplus(z), torch.zeros(5), k, 1.5)[1]
        g, = torch.autograd.grad((w*torch.randn(4,k)).sum(), z)
        assert (g.abs().max()<1e-12)==(k==1)

def test_weights_of_vanishing_scores_are_zero():
    assert_close(gate_weights(torch.zeros(4), torch.tensor([3,1]), 1.5), torch.zeros(2))

def test_more_experts_than_there_are():
    with pytest.raises(RuntimeError, match='out of range'): route(torch.rand(3,7), torch.zeros(7), 8, 1.5)

@WITH_BOTH
@pytest.mark.parametrize('score', list(SCORES))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('size', [.0, 1., 1e4])
def test_always_finite(score, dtype, size):
    torch.manual_seed(0)
    for E,k,B,T in ((1,1,2,3), (5,5,2,3), (5,2,1,1), (5,2,3,4)):
        m,x = fill(MoE(config(6, 4, E, k, scoring_func=score))).to(dtype),size*torch.randn(B,T,6)
        y,r = m(x.to(dtype))
        assert y.dtype==dtype and y.isfinite().all() and load_of(r).sum()==B*T*k
        (upcast_mean(y)+balance_loss(*r)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())

def upcast_mean(y): return y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()

@WITH_BOTH
def test_expert_without_tokens_gets_a_gradient_of_zeros():
    torch.manual_seed(0)
    m = fill(MoE(config()))
    m.gate.e_score_correction_bias[2] = -1e9
    y,r = m(torch.randn(2,5,8))
    assert load_of(r)[2]==0
    y.square().sum().backward()
    for p in (m.experts.gate_up_proj, m.experts.down_proj): assert (p.grad[2]==0).all() and p.grad.isfinite().all() and p.grad.abs().sum()>0

def test_ties_are_broken_alike_alone_and_in_company():
    for E,k in ((5,2), (7,3), (64,6), (3,3)):
        alone = route(torch.ones(1,E), torch.zeros(E), k, 1.)[0]
        assert (alone.sort(-1).values.diff()>0).all()
        for n in (2,9,300): assert torch.equal(route(torch.ones(n,E), torch.zeros(E), k, 1.)[0], alone.expand(n,k))

def test_all_equal_logits():
    cfg = config()
    m = MoE(cfg)
    with torch.no_grad(): m.gate.weight.zero_()
    scores,idx,w = m.gate(torch.randn(2,5,8))
    assert_close(w, torch.full((2,5,3), .5)); assert (idx.sort(-1).values.diff()>0).all()
    for _ in range(3): m.gate.e_score_correction_bias.copy_(bias_step(m.gate.e_score_correction_bias, expert_load(m.gate(torch.randn(2,5,8))[1], 7), .1))
    assert m.gate.e_score_correction_bias.abs().sum()>0   # the bias rule breaks the tie

@WITH_BOTH
def test_no_tokens():
    m = MoE(config())
    assert m.experts(torch.zeros(0,8), torch.zeros(0,3, dtype=torch.long), torch.zeros(0,3)).shape==(0,8)

# ---------------------------------------------------------------- precision

def test_score_has_the_exact_gradient_for_every_logit():
    z = torch.cat([torch.linspace(-170, 170, 6801), torch.tensor([-40., torch.nextafter(torch.tensor(-40.), torch.tensor(-41.)).item()])]).requires_grad_()
    s = sqrt_softplus(z)
    g, = torch.autograd.grad(s.sum(), z)
    zd = z.detach().double()
    exact = torch.where(zd<-40, (zd/2).exp(), F.softplus(zd).sqrt())
    assert_close(s.detach().double(), exact, rtol=3e-6, atol=0)
    assert_close(g.double(), zd.sigmoid()/(2*exact), rtol=3e-6, atol=0)
    normal = z.detach()>=-40
    assert_close(s[normal], F.softplus(z[normal]).sqrt(), rtol=1e-6, atol=0)
    plain, = torch.autograd.grad(F.softplus(z).sqrt().sum(), z)
    assert plain.isnan().any()                                            # what the plain formula does
    assert_close(g[normal], plain[normal], rtol=3e-6, atol=0)

@WITH_BOTH
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('logit', [-1e30, -1000., -120., -95., -41., 50., 1e5])
def test_extreme_logits_leave_finite_gradients(dtype, logit):
    m = MoE(config(1, 2, 3, 2)).to(dtype)
    with torch.no_grad(): m.gate.weight.copy_(torch.tensor([[logit],[logit],[0.]]))
    y,r = m(torch.ones(1,2,1, dtype=dtype))
    (y.float().sum()+balance_loss(*r)).backward()
    assert m.gate.weight.grad.isfinite().all() and balance_loss(*r).isfinite()

def test_plain_formula_would_lose_the_router(monkeypatch):
    monkeypatch.setitem(M.SCORES, 'sqrtsoftplus', lambda z: F.softplus(z).sqrt())
    with pytest.raises(AssertionError): test_extreme_logits_leave_finite_gradients(torch.float32, -120.)

@WITH_BOTH
def test_router_is_float32_in_bf16_and_under_autocast():
    torch.manual_seed(0)
    m,x = fill(MoE(config())),torch.randn(2,5,8)
    scores,idx,w = m.gate(x)
    with torch.autocast('cpu', torch.bfloat16):
        s,i,v = m.gate(x)
        y,_ = m(x)
    assert torch.equal(s, scores) and torch.equal(i, idx) and torch.equal(v, w)
    assert ((y-m(x)[0]).norm()/y.norm()).item()<8*2**-8   # in steps of bfloat16: a few roundings one after the other
    m,x = m.bfloat16(),x.bfloat16()
    s,_,v = m.gate(x)
    assert s.dtype==v.dtype==torch.float32
    assert_close(s, sqrt_softplus(x.float()@m.gate.weight.float().T))

@WITH_BOTH
def test_bf16_is_near_float32():
    torch.manual_seed(1)
    cfg = config(16, 8, 6, 4)
    m = fill(MoE(cfg), .2).bfloat16()
    x = torch.randn(3,7,16).bfloat16()
    exact = fill(MoE(cfg))
    exact.load_state_dict({n:v.float() for n,v in m.state_dict().items()})
    want = exact(x.float())[0]
    assert ((m(x)[0].float()-want).norm()/want.norm()).item()<4*2**-8

# ---------------------------------------------------------------- balance

def test_bias_rule_on_one_layer_and_on_many():
    load = torch.tensor([[9,0,3,4], [7,7,7,7], [0,0,0,20]])   # layers with different means, as an MTP block has
    want = torch.tensor([[-1.,1,1,0], [0,0,0,0], [1,1,1,-1]])*.001
    assert_close(bias_step(torch.zeros(3,4), load), want)
    for row,l in zip(want, load):
        for kind in (torch.long, torch.float32, torch.float64): assert_close(bias_step(torch.zeros(4), l.to(kind)).float(), row)
    b = torch.zeros(4)
    bias_step(b, load[0])
    assert (b==0).all()   # the old bias is left alone

def test_a_bias_in_bf16_still_moves():
    "Near one half bf16 numbers are 0.004 apart: a step of 0.001 needs float32"
    half = torch.full((2,), .5, dtype=torch.bfloat16)
    assert torch.equal(half+.001, half)
    assert_close(bias_step(half, torch.tensor([1,3])), torch.tensor([.501, .499]))

def test_a_bias_that_is_a_parameter_decays():
    "Why it is a buffer: it gets no gradient, and a gradient of zeros lets weight decay take back what the rule built"
    torch.manual_seed(0)
    b = .3*torch.randn(7)
    wrong = torch.nn.Parameter(b.clone())
    w = route(torch.rand(10,7).requires_grad_(), wrong, 3, 1.5)[1]
    assert torch.autograd.grad(w.square().sum(), wrong, allow_unused=True)[0] is None
    wrong.grad = torch.zeros_like(wrong)
    opt = torch.optim.AdamW([wrong], lr=.01, weight_decay=.1)
    for _ in range(1000): opt.step()
    assert_close(wrong.detach(), b*(1-.01*.1)**1000)

def test_bias_is_saved_but_no_parameter():
    m = MoE(config())
    assert BIAS in m.state_dict() and BIAS in dict(m.named_buffers()) and BIAS not in dict(m.named_parameters())
    assert list(m.state_dict())==['gate.weight', BIAS, 'experts.gate_up_proj', 'experts.down_proj',
        'shared_experts.gate_proj.weight', 'shared_experts.up_proj.weight', 'shared_experts.down_proj.weight']

def test_bias_selects_only():
    torch.manual_seed(0)
    scores,bias = torch.rand(50,7)+.1,torch.randn(7).requires_grad_()
    idx,w = route(scores.requires_grad_(), bias, 3, 1.5)
    assert_close(idx.sort(-1).values, (scores+bias).topk(3, -1).indices.sort(-1).values)
    assert_close(w, 1.5*scores.gather(-1, idx)/scores.gather(-1, idx).sum(-1, keepdim=True))
    assert torch.autograd.grad(w.square().sum(), bias, allow_unused=True)[0] is None
    dense = [torch.zeros(50,7).scatter(-1, *route(scores, v, 7, 1.5)) for v in (torch.zeros(7), bias)]
    assert_close(*dense)   # with k = E there is nothing to choose

def counts_only(scores, idx): return (expert_load(idx, 5).float()/idx.numel()*5).square().mean()
def shares_detached(scores, idx): return M.balance_loss(scores.detach(), idx)

@pytest.mark.parametrize('bug', [counts_only, shares_detached], ids=lambda f: f.__name__)
def test_a_balance_loss_of_counts_is_seen(bug, monkeypatch):
    monkeypatch.setitem(globals(), 'balance_loss', bug)
    with pytest.raises((AssertionError, RuntimeError)): test_balance_loss_is_a_mean_over_sequences_and_teaches()

def test_balance_loss_is_a_mean_over_sequences_and_teaches():
    torch.manual_seed(0)
    z = (torch.randn(3,20,5)+torch.arange(5)*.5).requires_grad_()
    s = sqrt_softplus(z)
    idx = route(s, torch.zeros(5), 2, 1.)[0]
    L = balance_loss(s, idx)
    assert_close(L, torch.stack([balance_loss(s[b:b+1], idx[b:b+1]) for b in range(3)]).mean())
    want = 0.
    for b in range(3):
        for i in range(5): want = want + 5/(2*20)*(idx[b]==i).sum()*(s[b,:,i]/s[b].sum(-1)).mean()/3
    assert_close(L, want)
    g, = torch.autograd.grad(L, z)
    assert g[...,-1].mean()>0>g[...,0].mean()

@pytest.mark.parametrize('seed', range(5))
def test_tokens_that_do_not_count(seed):
    "Load and balance loss are those of the counted tokens alone, wherever they stand; the others get no gradient"
    torch.manual_seed(seed)
    s,counted = torch.rand(3, 11, 5).double().requires_grad_(),torch.rand(3, 11)<0.6
    counted[:,3] = True
    idx = s.topk(2, -1).indices
    alone = [(s[b][counted[b]][None], idx[b][counted[b]][None]) for b in range(3)]
    L = balance_loss(s, idx, counted)
    assert_close(L, torch.stack([balance_loss(*row) for row in alone]).mean())
    assert torch.equal(expert_load(idx, 5, counted), sum(expert_load(i, 5) for _,i in alone))
    g, = torch.autograd.grad(L, s)
    assert (g[~counted]==0).all() and (g[counted]!=0).any()
    assert balance_loss(s, idx, torch.zeros_like(counted))==0

def test_max_vio():
    "0 where all do as much, E/k-1 where k do everything, of each block"
    load = torch.tensor([[6, 6, 6, 6], [12, 12, 0, 0], [24, 0, 0, 0], [0, 0, 0, 0], [9, 5, 5, 5]])
    assert_close(max_vio(load), torch.tensor([0, 1, 3, 0, 0.5]))

def test_balance_loss_alone_evens_the_load():
    torch.manual_seed(0)
    z = (torch.randn(2,64,5)*.3+torch.tensor([2.,1,0,0,0])).requires_grad_()
    opt = torch.optim.Adam([z], lr=.05)
    for step in range(150):
        s = sqrt_softplus(z)
        idx = route(s, torch.zeros(5), 2, 1.)[0]
        if step==0: before = expert_load(idx, 5).max()
        opt.zero_grad(); balance_loss(s, idx).backward(); opt.step()
    assert before>100 and expert_load(idx, 5).max()<80   # of 128 tokens; 51 is even

@pytest.mark.parametrize('seed', [0, 2])
def test_bias_rule_cures_the_collapse(seed):
    torch.manual_seed(seed)
    centers,maps = 3*torch.randn(8)+torch.randn(7,8),torch.randn(7,8,8)/8**.5
    def train(speed):
        torch.manual_seed(1)
        m = MoE(config(k=2, initializer_range=.1))
        opt,load,losses,bias = torch.optim.Adam(m.parameters(), lr=.01),0,0.,m.gate.e_score_correction_bias
        for step in range(200):
            c = torch.randint(7, (128,))
            x = centers[c]+.3*torch.randn(128,8)
            y,r = m(x[None])
            loss = (y[0]-torch.einsum('nij,nj->ni', maps[c], x)).square().mean()
            opt.zero_grad(); loss.backward(); opt.step()
            bias.copy_(bias_step(bias, load_of(r), speed))
            if step>=150: load,losses = load+load_of(r),losses+loss.item()
        return load/load.sum(),losses
    (off,loss_off),(on,loss_on) = train(0.),train(.02)
    assert off.min()<.05 and off.max()>.25 and on.min()>.1 and on.max()<.2 and loss_on<.9*loss_off   # even is a seventh

# ---------------------------------------------------------------- cost

def test_counts_of_the_110m_model():
    cfg = nanowhale_100m()
    with torch.device('meta'): m = MoE(cfg)
    n = sum(v.numel() for v in m.state_dict().values())
    assert n==3_073_284 and 8*n==count_params(cfg)['moe'] and count_flops(cfg)['moe']==8*3_688_960
