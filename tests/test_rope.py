"`nanowhale.model.rope` against loops, complex numbers and transformers; gradients; YaRN; and each planted bug caught"
import math

import pytest
import torch
from torch.testing import assert_close
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding, apply_rotary_pos_emb
from nanowhale.model.config import WhaleConfig
from nanowhale.model.plain import upcast
from nanowhale.model.rope import rope_angles, rope_cos_sin, rotate, unrounded, yarn

SIZES = [(1,1,1,2,2), (2,5,3,8,4), (2,7,1,10,10), (1,4,6,47,6), (3,2,5,96,64)]   # B, T, H, K, R

def oracle(x, pos, R, theta=10000.0):
    "Pairs as complex numbers, in float64; the channels before the last R stay"
    x = x.double()
    angles = torch.tensor([[p*theta**(-2*i/R) for i in range(R//2)] for p in pos.tolist()], dtype=torch.double)
    turn = torch.view_as_complex(x[...,-R:].contiguous().unflatten(-1, (-1,2)))*torch.polar(torch.ones_like(angles), angles)[:,None]
    return torch.cat([x[...,:-R], torch.view_as_real(turn).flatten(-2)], -1)

@pytest.mark.parametrize('B,T,H,K,R', SIZES)
@pytest.mark.parametrize('start,theta', [(0,10000.0), (1000,10000.0), (3,160000.0)])
def test_equals_complex_oracle(B, T, H, K, R, start, theta):
    torch.manual_seed(0)
    pos = torch.arange(start, start+T)
    for dtype,atol in ((torch.float64,1e-12), (torch.float32,1e-3 if start>99 else 1e-5), (torch.bfloat16,4e-2)):
        x = torch.randn(B,T,H,K).to(dtype)
        y = rotate(x, *rope_cos_sin(pos.double() if dtype==torch.float64 else pos, R, theta))
        assert y.dtype==dtype and y.shape==x.shape
        assert_close(y.double(), oracle(x, pos, R, theta), atol=atol, rtol=0)

@pytest.mark.parametrize('K,R', [(2,2), (8,4), (10,10), (44,30), (47,6), (96,64), (512,64)])
@pytest.mark.parametrize('theta', [10000.0, 500.5])
def test_equals_transformers(K, R, theta):
    cfg = WhaleConfig(num_hidden_layers=1, head_dim=K, qk_rope_head_dim=R, rope_theta=theta)
    pos = torch.tensor([0,1,5,127,1000,2047])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2,6,3,K, dtype=dtype)
        cos,sin = DeepseekV4RotaryEmbedding(cfg.to_hf())(x.float(), pos[None], layer_type='main')
        ours = rope_cos_sin(pos, R, theta)
        assert_close(ours[0], cos[0], atol=0, rtol=0); assert_close(ours[1], sin[0], atol=0, rtol=0)
        for sign in (1,-1):
            want = apply_rotary_pos_emb(x.transpose(1,2), cos, sign*sin).transpose(1,2)
            assert_close(rotate(x, ours[0], sign*ours[1]), want, atol=1e-6, rtol=1e-6 if dtype==torch.float32 else 1e-2)

@pytest.mark.parametrize('B,T,H,K,R', SIZES)
def test_gradients(B, T, H, K, R):
    torch.manual_seed(0)
    x = torch.randn(B,T,H,K, dtype=torch.double, requires_grad=True)[:,:,:2]
    cos,sin = rope_cos_sin(torch.arange(T).double(), R)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
    g = torch.randn_like(x)                                          # the gradient of a rotation is the way back
    assert_close(torch.autograd.grad(rotate(x, cos, sin), x, g)[0], rotate(g, cos, -sin))

@pytest.mark.parametrize('B,T,H,K,R', SIZES)
def test_properties(B, T, H, K, R):
    torch.manual_seed(1)
    x,pos = torch.randn(B,T,H,K),torch.arange(T)
    cos,sin = rope_cos_sin(pos, R)
    y = rotate(x, cos, sin)
    assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert_close(rotate(y, cos, -sin), x)
    assert_close(y[...,:K-R], x[...,:K-R], atol=0, rtol=0)
    assert_close(rotate(y, *rope_cos_sin(7+0*pos, R)), rotate(x, *rope_cos_sin(pos+7, R)))        # rotations add up
    parts = [rotate(x[:,t:t+1], *rope_cos_sin(pos[t:t+1], R)) for t in range(T)]                  # one token at a time
    assert_close(torch.cat(parts, 1), y, atol=0, rtol=0)
    each = rope_cos_sin(pos.expand(B,T)+torch.arange(B)[:,None], R)                               # positions per row
    for b in range(B): assert_close(rotate(x, *each)[b], rotate(x[b:b+1], *rope_cos_sin(pos+b, R))[0])

def test_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q,k = torch.randn(2,1,1,1,96)
    at = lambda x,p: rotate(x, *rope_cos_sin(torch.tensor([p]), 64))
    for d in (0,1,17,300):
        s = torch.stack([(at(q,t+d)*at(k,t)).sum() for t in (0,1,99,1700)])
        assert_close(s, s[:1].expand(4), atol=5e-3, rtol=0)
    assert abs((at(q,5)*at(k,4)).sum()-(at(q,5)*at(k,2)).sum())>0.1   # and they do depend on it

def test_upcast():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool): assert upcast(torch.ones(2).to(dtype)).dtype==torch.float32
    x = torch.ones(2, dtype=torch.double)
    assert upcast(x) is x

def test_angles_keep_precision():
    pos = torch.tensor([0,1,255,1000,2047,65535])
    for R in (2,16,64):
        want = torch.tensor([[p*10000**(-2*i/R) for i in range(R//2)] for p in pos.tolist()], dtype=torch.double)
        assert_close(rope_angles(pos, R).double(), want, atol=0, rtol=1e-6)
        assert_close(rope_angles(pos.double(), R), want, atol=0, rtol=1e-12)
    with torch.autocast('cpu', torch.bfloat16): assert_close(rope_angles(pos, 64), rope_angles(pos, 64)); assert rope_angles(pos, 64).dtype==torch.float32

# ---------------------------------------------------------------- layouts, precision, YaRN

@pytest.mark.parametrize('K,R', [(4,4), (10,6), (96,32)])
def test_a_permutation_of_channels_leads_to_halves(K, R):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, K)
    cos,sin = rope_cos_sin(torch.arange(5), R)
    order = [*range(K-R), *range(K-R, K, 2), *range(K-R+1, K, 2)]
    assert_close(halves(x[...,order], cos, sin), rotate(x, cos, sin)[...,order])
    with pytest.raises(AssertionError): assert_close(halves(x, cos, sin), rotate(x, cos, sin))

def test_bf16_channels_are_rounded_once():
    torch.manual_seed(0)
    x = torch.randn(1, 256, 4, 96).bfloat16()
    cos,sin = rope_cos_sin(torch.arange(256), 64)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())

def test_products_are_not_rounded_where_it_says_so():
    a = torch.randn(3, 3)
    want = a@a
    with torch.autocast('cpu', torch.bfloat16):
        assert (a@a).dtype==torch.bfloat16
        with unrounded(a): assert torch.equal(a@a, want)
        assert (a@a).dtype==torch.bfloat16

def counted(R, theta, factor, context):
    "YaRN's speeds by counting turns, without a logarithm: bounds are the last fast and first slow pair"
    speeds = [theta**(-2*i/R) for i in range(R//2)]
    turns = [context*s/(2*math.pi) for s in speeds]
    low = max([i for i,n in enumerate(turns) if n>=32], default=0)
    high = min([i for i,n in enumerate(turns) if n<=1], default=R-1)
    slow = [min(max((i-low)/(high-low), 0), 1) for i in range(R//2)]
    return torch.tensor([s*(1-a)+s/factor*a for s,a in zip(speeds, slow)], dtype=torch.double)

@pytest.mark.parametrize('R,theta,factor,context', [
    (64,160000.,16.,65536), (64,160000.,4.,4096), (32,10000.,8.,2048), (16,500.,2.,1024)])
def test_yarn_counts_turns(R, theta, factor, context):
    one = torch.ones(1, dtype=torch.double)
    plain,slowed = (rope_angles(one, R, theta, f, context)[0] for f in (1., factor))
    assert_close(slowed, counted(R, theta, factor, context))
    assert torch.equal(yarn(plain, theta, factor, context), slowed)
    turns = plain*context/(2*math.pi)
    assert torch.equal(slowed[turns>33], plain[turns>33])               # fast pairs keep every bit
    assert ((slowed*factor*context/(2*math.pi))[turns<1]<1).all()       # slow ones, within a turn
    assert (yarn(plain, theta**2, factor, context)-slowed).abs().max()>0   # the base enters the bounds

# ---------------------------------------------------------------- planted bugs (bugs-that-train 2 and 3, and bf16 angles)

def halves(x, cos, sin):
    R = 2*cos.shape[-1]
    still,a,b = x.split([x.shape[-1]-R, R//2, R//2], -1)
    return torch.cat([still, a*cos[:,None]-b*sin[:,None], a*sin[:,None]+b*cos[:,None]], -1)

def leading(x, cos, sin):
    R = 2*cos.shape[-1]
    return torch.cat([rotate(x[...,:R], cos, sin), x[...,R:]], -1)

BUGS = dict(halves=halves, leading=leading,
    flipped=lambda x,cos,sin: rotate(x, cos, -sin),
    twice=lambda x,cos,sin: rotate(x, *rope_cos_sin(torch.arange(400,400+x.shape[1]), 8)),             # 12*(12/18)
    base=lambda x,cos,sin: rotate(x, *rope_cos_sin(torch.arange(400,400+x.shape[1]), 12, 160000.0)),
    bf16=lambda x,cos,sin: rotate(x, *rope_cos_sin(torch.arange(400,400+x.shape[1]).bfloat16(), 12)))

@pytest.mark.parametrize('name', BUGS)
def test_oracle_rejects(name):
    torch.manual_seed(0)
    x,pos = torch.randn(2,6,3,18),torch.arange(400,406)
    cos,sin = rope_cos_sin(pos, 12)
    check = lambda f: assert_close(f(x, cos, sin).double(), oracle(x, pos, 12), atol=1e-3, rtol=0)
    check(rotate)
    assert_close(BUGS[name](x, cos, sin).norm(dim=-1), x.norm(dim=-1))                                # a property sees nothing
    with pytest.raises(AssertionError): check(BUGS[name])

def read(q, kv, pos, R, way):
    cos,sin = rope_cos_sin(pos, R)
    q,kv = rotate(q, cos, sin),rotate(kv[:,:,None], cos, sin)[:,:,0]
    ban = torch.ones(len(pos),len(pos)).triu(1).bool()
    p = (torch.einsum('bthk,bsk->bhts', q, kv)/math.sqrt(q.shape[-1])).masked_fill(ban, -math.inf).softmax(-1)
    o = torch.einsum('bhts,bsk->bthk', p, kv)
    return rotate(o, cos, way*sin) if way else o

@pytest.mark.parametrize('K,R', [(8,8), (10,4), (96,64)])
def test_way_back_makes_outputs_relative(K, R):
    torch.manual_seed(0)
    q,kv,pos = torch.randn(2,9,3,K),torch.randn(2,9,K),torch.arange(9)
    for n in (1,50,777):
        assert_close(read(q, kv, pos+n, R, -1), read(q, kv, pos, R, -1), atol=1e-3, rtol=0)
        for bug in (0,1):                                                                             # left out, wrong way
            with pytest.raises(AssertionError): assert_close(read(q, kv, pos+n, R, bug), read(q, kv, pos, R, bug), atol=0.05, rtol=0)

def test_more_angles_than_channels_fails():
    with pytest.raises(RuntimeError): rotate(torch.randn(1,3,2,8), *rope_cos_sin(torch.arange(3), 10))
