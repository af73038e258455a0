"""Attention against plain loops and against transformers, over random sizes; and every bug that the loops must see.

Legend: B rows, T tokens, S keys, D width, H heads, K channels of a head, R rotating ones, Q query rank, G groups,
O outputs of a group, W window.
"""
import json, math, random, shutil, sys
from pathlib import Path
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from nanowhale.model.config import HCA, WhaleConfig
from nanowhale.presets import count_flops, nanowhale_100m
from nanowhale.model.rope import rope_cos_sin
from nanowhale.model.visibility import NEVER, Rows, block_ends, document_starts, make_blocks, whole_rows, window_mask
from nanowhale.model import attention as mla
from nanowhale.model.plain import RMSNorm, rms_norm
from nanowhale.model.attention import Attention, GroupedLinear, attend as attend_dense
from nanowhale.generate.cache import KVCache
from nanowhale.fast import attention as fast_attention
from nanowhale.fast.attention import (attend, attend_fused, chunk_scores, fused_here, fused_mask,
    row_mask)
from nanowhale.fast.kernels import use
from test_parity import exact_angles, exactly

# ---------------------------------------------------------------- the setting: sizes, modules, the loops

def random_config(seed):
    "Small sizes, many of them odd; K may be odd, R is even; Q is at least 2, for at 1 the norms leave only rounding as a gradient"
    r = random.Random(seed)
    G,K = r.randint(1, 4),r.randint(2, 13)
    return WhaleConfig(
        vocab_size=17, hidden_size=r.randint(3, 14), num_hidden_layers=1, num_attention_heads=G*r.randint(1, 3), head_dim=K,
        qk_rope_head_dim=2*r.randint(1, K//2), q_lora_rank=r.randint(2, 9), o_groups=G, o_lora_rank=r.randint(1, 7),
        sliding_window=r.choice([1, 2, 3, 5, 8, 30]), rope_theta=r.choice([100., 10000., 160000.]), moe_intermediate_size=4,
        n_routed_experts=2, num_experts_per_tok=1, rms_norm_eps=r.choice([1e-6, 1e-5]))

def noisy(cfg, seed, dtype=torch.float32):
    "An attention with no parameter left at a value that would hide a bug (sinks 0, norm weights 1)"
    torch.manual_seed(seed)
    attn = Attention(cfg)
    for n,p in attn.named_parameters():
        if p.ndim>1: torch.nn.init.normal_(p, std=p.shape[1]**-0.5)
        else: torch.nn.init.normal_(p, mean=0. if n=='sinks' else 1., std=1. if n=='sinks' else 0.4)
    return attn.to(dtype)

def case(seed, dtype=torch.float32):
    "A random config, attention, input and documents: some rows packed, some padded on the left"
    cfg,r = random_config(seed),random.Random(1000+seed)
    attn = noisy(cfg, seed, dtype)
    B,T = r.randint(1, 3),r.randint(1, 12)
    docs = torch.tensor([sorted(r.choices([-1, 0, 1, 2], k=T)) for _ in range(B)])
    return cfg,attn,torch.randn(B, T, cfg.hidden_size, dtype=dtype),docs

def run(attn, cfg, x, docs=None, start=0, window=None, see=None):
    see = see or window_mask
    pos = torch.arange(start, start+x.shape[1], dtype=torch.float64 if x.dtype==torch.float64 else None)
    rope = rope_cos_sin(pos, cfg.qk_rope_head_dim, cfg.rope_theta)
    return attn(x, rope, see(pos, pos, window or cfg.sliding_window, docs, docs))

def loops(attn, cfg, x, docs=None, start=0):
    "The whole attention over b, t, h and s in float64 numpy; shares no line with the package"
    w = {k: v.detach().double().numpy() for k,v in attn.state_dict().items()}
    x = x.detach().double().numpy()
    (B,T,D),H,K,R,G = x.shape,cfg.num_attention_heads,cfg.head_dim,cfg.qk_rope_head_dim,cfg.o_groups
    def norm(v): return v/math.sqrt(sum(a*a for a in v)/len(v)+cfg.rms_norm_eps)
    def turn(v, t):
        v = v.astype(complex)
        for i in range(R//2):
            j = K-R+2*i
            z = (v[j].real+1j*v[j+1].real)*np.exp(1j*t*cfg.rope_theta**(-2*i/R))
            v[j],v[j+1] = z.real,z.imag
        return v.real
    out = np.zeros((B,T,D))
    for b in range(B):
        for t in range(T):
            q = w['q_b_proj.weight'] @ (w['q_a_norm.weight']*norm(w['q_a_proj.weight']@x[b,t]))
            heads = []
            for h in range(H):
                qh,top,total = turn(norm(q[h*K:(h+1)*K]), start+t),np.zeros(K),math.exp(w['sinks'][h])
                for s in range(T):
                    if s>t or t-s>=cfg.sliding_window: continue
                    if docs is not None and docs[b,s]!=docs[b,t]: continue
                    k = turn(w['kv_norm.weight']*norm(w['kv_proj.weight']@x[b,s]), start+s)
                    e = math.exp(sum(qh[i]*k[i] for i in range(K))/math.sqrt(K))
                    top,total = top+e*k,total+e
                heads.append(turn(top/total, -(start+t)))
            n,O = H//G,cfg.o_lora_rank
            mixed = [w['o_a_proj.weight'][g*O:(g+1)*O] @ np.concatenate(heads[g*n:(g+1)*n]) for g in range(G)]
            out[b,t] = w['o_b_proj.weight'] @ np.concatenate(mixed)
    return torch.from_numpy(out)

def relative(a, b): return ((a-b).norm()/b.norm().clamp(min=1e-12)).item()

# ---------------------------------------------------------------- against the loops

@pytest.mark.parametrize('seed', range(40))
def test_equals_loops(seed):
    cfg,attn,x,docs = case(seed)
    for d in (None, docs):
        assert_close(run(attn, cfg, x, d).double(), loops(attn, cfg, x, d), atol=1e-5, rtol=1e-5)

def test_equals_loops_far_from_the_start():
    cfg,attn,x,docs = case(3)
    assert_close(run(attn, cfg, x, docs, start=300).double(), loops(attn, cfg, x, docs, start=300), atol=1e-4, rtol=1e-4)

def test_float64_stays_float64():
    cfg,attn,x,docs = case(5, torch.float64)
    out = run(attn, cfg, x, docs)
    assert out.dtype==torch.float64
    assert_close(out, loops(attn, cfg, x, docs), atol=1e-12, rtol=1e-12)

# ---------------------------------------------------------------- against transformers

def theirs(cfg, attn):
    "transformers' attention and rotary embedding with the weights of `attn`"
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding
    hf_cfg = cfg.to_hf()
    hf_cfg._attn_implementation = 'eager'
    hf = DeepseekV4Attention(hf_cfg, 0)
    hf.load_state_dict(attn.state_dict())   # strict: the same names and shapes
    return hf,DeepseekV4RotaryEmbedding(hf_cfg)

def run_theirs(hf, rotary, cfg, x, docs=None):
    pos = torch.arange(x.shape[1])[None]
    mask = window_mask(pos[0], pos[0], cfg.sliding_window, docs, docs)[:,None]
    mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, float('-inf'))
    return hf(x, dict(main=rotary(x, pos, layer_type='main')), pos, mask)[0]

@pytest.mark.parametrize('seed', range(60))
def test_equals_transformers(seed):
    cfg,attn,x,docs = case(100+seed, torch.float64)
    hf,rotary = theirs(cfg, attn)
    docs = docs if seed%2 else None
    x1,x2 = x.clone().requires_grad_(),x.clone().requires_grad_()
    with exactly(): a,b = run(attn, cfg, x1, docs),run_theirs(hf.double(), rotary, cfg, x2, docs)
    assert_close(a, b, atol=1e-11, rtol=1e-9)
    probe = torch.randn_like(a)
    (a*probe).sum().backward(); (b*probe).sum().backward()
    assert_close(x1.grad, x2.grad, atol=1e-11, rtol=1e-9)
    grads = {n: q.grad for n,q in hf.named_parameters()}
    for n,p in attn.named_parameters(): assert relative(p.grad, grads[n])<1e-9, n

@pytest.mark.parametrize('window', [16, 2048])
def test_equals_transformers_at_the_real_width(window):
    from dataclasses import replace
    cfg = replace(nanowhale_100m(), sliding_window=window)
    attn = noisy(cfg, 0)
    x = torch.randn(2, 40, cfg.hidden_size)
    assert_close(run(attn, cfg, x), run_theirs(*theirs(cfg, attn), cfg, x), atol=1e-5, rtol=1e-5)

def whole_row_mask(pos, _, *rest):
    "`row_mask` of whole numbers, of which `run` makes float64 for the angles"
    pos = pos.long()
    return row_mask(pos, pos, *rest)

@pytest.mark.parametrize('seed', range(10))
def test_the_fast_set_computes_what_the_plain_one_does(seed):
    "A whole layer over rows of several chunks: output, and the gradients of input and weights"
    cfg,attn,_,_ = case(500+seed, torch.float64)
    torch.manual_seed(seed)
    x = torch.randn(2, 300, cfg.hidden_size, dtype=torch.float64, requires_grad=True)
    docs = torch.arange(300).expand(2, -1)//70 if seed%2 else None
    found = []
    for kernels,see in (('plain', window_mask), ('fast', whole_row_mask)):
        use(attn, kernels)
        y = run(attn, cfg, x, docs, see=see)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, *attn.parameters()])))
    for a,b in zip(*found): assert_close(a, b, atol=1e-10, rtol=1e-8)

# ---------------------------------------------------------------- planted bugs

ok_attend,ok_mask,ok_rotate = attend_dense,window_mask,mla.rotate
def no_sink(sinks): return torch.full_like(sinks, float('-inf'))
def sink_token(q, kv, sinks, mask):
    token = sinks.mean()*torch.ones_like(kv[:,:1])
    return ok_attend(q, torch.cat([kv, token], 1), no_sink(sinks), F.pad(mask, (0,1), value=True))
def half_split(x, cos, sin):
    still,turn = x.split([x.shape[-1]-2*cos.shape[-1], 2*cos.shape[-1]], -1)
    (a,b),c,s = turn.chunk(2, -1),cos[...,None,:],sin[...,None,:]
    return torch.cat([still, a*c-b*s, a*s+b*c], -1)
def leading(x, cos, sin):
    return ok_rotate(x.roll(x.shape[-1]-2*cos.shape[-1], -1), cos, sin).roll(2*cos.shape[-1]-x.shape[-1], -1)
def query(self, x): return self.q_b_proj(self.q_a_norm(self.q_a_proj(x))).unflatten(-1, (-1, self.head_dim))

THIS = sys.modules[__name__]
BUGS = {   # name -> (where, attribute, the wrong thing)
    'sink declared, never used': (Attention, 'attend', staticmethod(lambda q,kv,s,m: ok_attend(q, kv, no_sink(s), m))),
    'sink as a token':           (Attention, 'attend', staticmethod(sink_token)),
    'sink divided by sqrt(K)':   (Attention, 'attend', staticmethod(lambda q,kv,s,m: ok_attend(q, kv, s*q.shape[-1]**-0.5, m))),
    'no scale':                  (Attention, 'attend', staticmethod(lambda q,kv,s,m: ok_attend(q*q.shape[-1]**0.5, kv, s, m))),
    'window one too long':       (THIS, 'window_mask', lambda q,k,W,*d: ok_mask(q, k, W+1, *d)),
    'window one too short':      (THIS, 'window_mask', lambda q,k,W,*d: ok_mask(q, k, W-1, *d)),
    'documents ignored':         (THIS, 'window_mask', lambda q,k,W,*d: ok_mask(q, k, W)),
    'RoPE half-split':           (Attention, 'rotate', staticmethod(half_split)),
    'RoPE on the leading slice': (Attention, 'rotate', staticmethod(leading)),
    'RoPE sign flipped':         (Attention, 'rotate', staticmethod(lambda x,c,s: ok_rotate(x, c, -s))),
    'output not turned back':    (Attention, 'output', lambda self,o,c,s: self.o_b_proj(self.o_a_proj(o.flatten(-2)))),
    'output turned on':          (Attention, 'output', lambda self,o,c,s: self.o_b_proj(self.o_a_proj(ok_rotate(o, c, s).flatten(-2)))),
    'key normed after rotation': (Attention, 'latent', lambda self,x,c,s: self.kv_norm(ok_rotate(self.kv_proj(x)[:,:,None], c, s))[:,:,0]),
    'query not normed':          (Attention, 'query', lambda self,x,c,s: ok_rotate(query(self, x), c, s)),
    'query normed over heads':   (Attention, 'query', lambda self,x,c,s:
        ok_rotate(rms_norm(query(self, x).flatten(-2), self.eps).unflatten(-1, (-1, self.head_dim)), c, s)),
    'heads grouped in stripes':  (GroupedLinear, 'forward', lambda self,x:
        torch.einsum('...ig,goi->...go', x.unflatten(-1, (-1, self.groups)), self.weight.unflatten(0, (self.groups, -1))).flatten(-2)),
}

def bug_case():
    cfg = WhaleConfig(hidden_size=10, num_hidden_layers=1, num_attention_heads=6, head_dim=8, qk_rope_head_dim=4, q_lora_rank=7,
                      o_groups=3, o_lora_rank=5, sliding_window=4)
    attn = noisy(cfg, 1)
    return cfg,attn,torch.randn(2, 11, 10),torch.tensor([[0]*5+[1]*6, [-1]*3+[7]*8])

@pytest.mark.parametrize('name', BUGS)
def test_planted_bug_is_seen(name, monkeypatch):
    cfg,attn,x,docs = bug_case()
    truth = loops(attn, cfg, x, docs)
    assert (run(attn, cfg, x, docs)-truth).abs().max()<1e-5
    monkeypatch.setattr(*BUGS[name])
    assert (run(attn, cfg, x, docs)-truth).abs().max()>0.02

def test_unweighted_norm_commutes_with_the_rotation():
    "Only for the query may the order of norm and rotation be exchanged; it is not a bug there"
    q,rope = torch.randn(2,5,3,8),rope_cos_sin(torch.arange(5), 4)
    assert_close(mla.rotate(rms_norm(q, 1e-6), *rope), rms_norm(mla.rotate(q, *rope), 1e-6))

# ---------------------------------------------------------------- properties

@pytest.mark.parametrize('seed', range(10))
def test_causal(seed):
    cfg,attn,x,docs = case(200+seed)
    for t in range(x.shape[1]):
        later = x.clone(); later[:,t:] += torch.randn_like(later[:,t:])
        assert_close(run(attn, cfg, later, docs)[:,:t], run(attn, cfg, x, docs)[:,:t])
        early = x.clone(); early[:,:max(0, t+1-cfg.sliding_window)] += 1
        assert_close(run(attn, cfg, early, docs)[:,t], run(attn, cfg, x, docs)[:,t])

@pytest.mark.parametrize('seed', range(10))
def test_relative(seed):
    cfg,attn,x,docs = case(300+seed)
    assert_close(run(attn, cfg, x, docs, start=777), run(attn, cfg, x, docs), atol=2e-4, rtol=2e-4)

def test_absolute_without_the_inverse_rotation(monkeypatch):
    cfg,attn,x,docs = bug_case()
    monkeypatch.setattr(*BUGS['output not turned back'])
    assert (run(attn, cfg, x, docs, start=777)-run(attn, cfg, x, docs)).abs().max()>0.02

def test_long_window_is_full_causal():
    cfg,attn,x,_ = bug_case()
    assert_close(run(attn, cfg, x, window=11), run(attn, cfg, x, window=10**6))
    assert not torch.allclose(run(attn, cfg, x, window=10), run(attn, cfg, x, window=11))

@pytest.mark.parametrize('pad', [1, 3, 10])
def test_padding_and_packing(pad):
    "A padded row, and each document of a packed row, give what they give alone"
    cfg,attn,x,_ = bug_case()
    for split in (torch.tensor([[-1]*pad+[0]*(11-pad)]*2), torch.tensor([[5]*pad+[2]*(11-pad)]*2)):
        assert_close(run(attn, cfg, x, split)[:,pad:], run(attn, cfg, x[:,pad:]))
    assert_close(run(attn, cfg, x, split)[:,:pad], run(attn, cfg, x[:,:pad]))

def test_one_token():
    cfg,attn,x,_ = bug_case()
    assert_close(run(attn, cfg, x[:,:1]).double(), loops(attn, cfg, x[:,:1]), atol=1e-5, rtol=1e-5)
    assert_close(run(attn, cfg, x, window=1)[:,3], run(attn, cfg, x[:,3:4])[:,0])

@pytest.mark.parametrize('attend', [attend_dense, attend], ids=['plain', 'fast'])
def test_row_that_sees_nothing_is_zero_and_finite(attend):
    q,kv,s = (torch.randn(*n, requires_grad=True) for n in ((2,3,4,6), (2,5,6), (4,)))
    mask = torch.ones(2,3,5, dtype=torch.bool); mask[1,2] = False
    out,_ = attend(q, kv, s, mask)
    out.square().sum().backward()
    assert (out[1,2]==0).all() and all(t.grad.isfinite().all() for t in (q,kv,s))

@pytest.mark.parametrize('sink', [-1e4, -50., 50., 1e4])
@pytest.mark.parametrize('attend', [attend_dense, attend], ids=['plain', 'fast'])
def test_extreme_sinks(sink, attend):
    q,kv = torch.randn(1,3,2,6),torch.randn(1,3,6)
    mask = torch.ones(1,3,3, dtype=torch.bool)
    out,_ = attend(q, kv, torch.full((2,), sink), mask)
    bare,_ = attend(q, kv, torch.full((2,), float('-inf')), mask)
    assert_close(out, bare*float(sink<0))

def test_scores_are_bounded_whatever_the_query_weights():
    cfg,attn,x,_ = bug_case()
    for growth in (1, 1e3, 1e6):
        with torch.no_grad(): attn.q_b_proj.weight.mul_(growth)
        rope = rope_cos_sin(torch.arange(11), 4)
        z = torch.einsum('bthk,bsk->bths', attn.query(x, *rope), attn.latent(x, *rope))/8**0.5
        assert z.abs().max() <= 8**0.5*attn.kv_norm.weight.abs().max()*1.001

@pytest.mark.parametrize('far', [False, True])
def test_a_sink_is_a_gate_and_lse_the_logarithm_of_the_denominator(far):
    "By hand, key by key; compressed entries stand under the same softmax"
    torch.manual_seed(0)
    q,kv,entries,sinks = (torch.randn(*n, dtype=torch.float64) for n in ((2,5,3,4), (2,5,4), (2,2,4), (3,)))
    mask,far_mask = window_mask(torch.arange(5), torch.arange(5), 3),torch.rand(1,5,2)>0.5
    more = (entries, far_mask) if far else ()
    o,lse = attend_dense(q, kv, sinks, mask, *more)
    bare,open_lse = attend_dense(q, kv, torch.full((3,), float('-inf')), mask, *more)
    assert_close(bare*torch.sigmoid(open_lse-sinks)[...,None], o)
    for b,t,h in np.ndindex(2, 5, 3):
        keys = [kv[b,s] for s in range(5) if mask[0,t,s]]+[entries[b,c] for c in range(2) if far and far_mask[0,t,c]]
        e = [(q[b,t,h]@k/2).exp() for k in keys]
        assert_close(lse[b,t,h], (sum(e)+sinks[h].exp()).log())
        assert_close(o[b,t,h], sum(w*k for w,k in zip(e, keys))/(sum(e)+sinks[h].exp()))
    assert attend_dense(q, kv, torch.full((3,), float('-inf')), mask & False)[0].isnan().all()   # the sink is what keeps this finite

def test_a_sink_that_nobody_reads_has_no_gradient(monkeypatch):
    cfg,attn,x,docs = bug_case()
    run(attn, cfg, x, docs).sum().backward()
    assert attn.sinks.grad.abs().min()>0
    attn.zero_grad(set_to_none=True)
    monkeypatch.setattr(*BUGS['sink declared, never used'])
    run(attn, cfg, x, docs).sum().backward()
    assert attn.sinks.grad is None or not attn.sinks.grad.any()

@pytest.mark.parametrize('window', [256, 128])
def test_a_real_pass_takes_the_operations_that_presets_count(window):
    "Matrices as counted; of scores the whole square, hidden ones included, four per channel, head and key"
    cfg = nanowhale_100m()
    attn,pos = Attention(cfg),torch.arange(256)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attn(torch.randn(1, 256, cfg.hidden_size), rope_cos_sin(pos, cfg.qk_rope_head_dim), window_mask(pos, pos, window))
    counted = {k: f//cfg.num_hidden_layers for k,f in count_flops(cfg, 256).items()}
    assert counter.get_total_flops()==256*(counted['attention']+4*8*96*256)
    assert counted['scores']<4*8*96*256

# ---------------------------------------------------------------- who sees whom

@pytest.mark.parametrize('seed', range(20))
def test_a_text_in_pieces_has_the_blocks_of_the_whole(seed):
    "Starts of documents, ends and owners of entries, and who sees them, of rows that are cut at any place"
    r = random.Random(seed)
    T,rate,cut = r.randint(2, 15),r.randint(1, 5),0
    cfg = WhaleConfig(num_hidden_layers=1, layer_types=[HCA], head_dim=8, qk_rope_head_dim=4, sliding_window=4, compress_rate_hca=rate)
    docs = torch.tensor([sorted(r.choices([-1, 0, 1, 2], k=T)) for _ in range(2)])
    pos,starts = torch.arange(T),document_starts(docs)
    whole = make_blocks(cfg, HCA, whole_rows(cfg, docs, docs), None)
    for b,t in np.ndindex(2, T): assert starts[b,t]==docs[b].tolist().index(docs[b,t])
    made,before,finished = (torch.zeros(1, 0).long().expand(2, 0),)*2,None,[set(), set()]
    while cut<T:
        n = r.randint(1, T-cut)
        new = slice(cut, cut+n)
        part = document_starts(docs[:,new], first=cut, before=before)
        assert part.equal(starts[:,new])
        blocks = make_blocks(cfg, HCA, Rows(pos[new], pos[new], docs[:,new], docs[:,new], part, {HCA: made}), None)
        for b in range(2):
            ends = blocks.entries[0][b]
            finished[b] |= {e for e in ends.tolist() if e<NEVER}
            for t in range(n):
                seen = {e for e,s in zip(ends.tolist(), blocks.seen[b,t]) if s}
                at_once = {e for e,s in zip(whole.entries[0][b].tolist(), whole.seen[b,cut+t]) if s}
                assert seen==at_once
        made,before,cut = blocks.entries,(docs[:,cut+n-1], part[:,-1]),cut+n
    for b in range(2): assert finished[b]=={e for e in whole.entries[0][b].tolist() if e<NEVER}

def test_blocks_of_a_piece_and_of_a_given_number():
    starts = document_starts(torch.tensor([[0,0,0,1,1,1,1,1], [4,4,4,4,4,4,4,-1]]))
    assert block_ends(torch.arange(6, 10), 4).tolist()==[[7]]
    assert block_ends(torch.arange(10), 4, count=2).tolist()==[[3, 7]]
    assert block_ends(torch.arange(8), 4, starts, count=2).tolist()==[[6, NEVER], [3, NEVER]]

# ---------------------------------------------------------------- the cache

def decode(attn, cfg, x, sizes, docs=None, cache=None, restart=False):
    W,outs,start = cfg.sliding_window,[],0
    cache = cache or KVCache(W)
    for n in sizes:
        new,old = slice(start, start+n),cache.positions(n)
        pos,d = torch.arange(x.shape[1]),(None,None) if docs is None else (docs[:,new], docs[:,old])
        rope = rope_cos_sin(pos[new]-start*restart, cfg.qk_rope_head_dim, cfg.rope_theta)
        outs.append(attn(x[:,new], rope, window_mask(pos[new], pos[old], W, *d), cache))
        start += n
    return torch.cat(outs, 1)

def pieces(T, n): return [min(n, T-i) for i in range(0, T, n)]

@pytest.mark.parametrize('window', [1, 2, 3, 5, 12, 13, 14, 40])
@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 12, 13])
def test_cached_equals_full(window, size):
    from dataclasses import replace
    cfg,attn,_,_ = bug_case()
    cfg = replace(cfg, sliding_window=window)
    torch.manual_seed(window*100+size)
    attn = attn.double()
    x,docs = torch.randn(3, 13, 10).double(),torch.tensor([[0]*13, [0]*6+[1]*7, [-1]*4+[3]*9])
    with exact_angles():
        assert_close(decode(attn, cfg, x, pieces(13, size)), run(attn, cfg, x), atol=1e-12, rtol=1e-10)
        assert_close(decode(attn, cfg, x, pieces(13, size), docs), run(attn, cfg, x, docs), atol=1e-12, rtol=1e-10)
        assert_close(decode(attn, cfg, x, [size]+[1]*(13-size)), run(attn, cfg, x), atol=1e-12, rtol=1e-10)   # a prompt, then tokens

def test_cache_bugs_are_seen():
    cfg,attn,x,_ = bug_case()
    full = run(attn, cfg, x)
    def gap(**kw): return (decode(attn, cfg, x, pieces(11, 2), **kw)-full).abs().max()
    assert gap()<1e-5
    assert gap(restart=True)>0.02                                      # positions counted from zero in every piece
    assert gap(cache=KVCache(cfg.sliding_window-1))>0.02               # one slot too few
    class First(KVCache):                                              # never overwrites
        def extend(self, kv):
            kept = None if self.kv is None else self.kv.clone()
            out = super().extend(kv)
            if kept is not None: self.kv.copy_(kept)
            return out
    assert not gap(cache=First(cfg.sliding_window, 1))<0.02            # slots that nobody wrote hold anything, NaN too
    class Turned(KVCache):                                             # says one slot beside
        def positions(self, T, device=None): return super().positions(T, device).roll(1)
    assert gap(cache=Turned(cfg.sliding_window, 1))>0.02

def test_cache_of_one_too_many_only_wastes():
    "The mask decides who is seen; an entry too many costs memory and nothing else"
    cfg,attn,x,_ = bug_case()
    for more in (dict(window=cfg.sliding_window+1), dict(window=cfg.sliding_window, spare=3)):
        assert_close(decode(attn, cfg, x, pieces(11, 2), cache=KVCache(**more)), run(attn, cfg, x))

def test_cache_keeps_no_more_than_the_window_and_never_moves():
    cache = KVCache(5)
    cache.extend(torch.randn(2, 100, 3))
    home = cache.kv.data_ptr()
    assert cache.kv.shape==(2,5,3) and cache.kv.untyped_storage().nbytes()==2*5*3*4
    for _ in range(12):
        out = cache.extend(torch.randn(2, 1, 3))
        assert out.shape==(2,5,3) and out.data_ptr()==home==cache.kv.data_ptr()   # a view of the ring, not a copy
    one = KVCache(1)
    assert one.extend(torch.randn(2,3,4)).shape==(2,3,4) and one.extend(torch.randn(2,1,4)).shape==(2,1,4) and one.kv.numel()==8

@pytest.mark.parametrize('window', range(1, 10))
@pytest.mark.parametrize('spare', [0, 1, 4])
def test_ring_holds_what_it_says_after_any_steps(window, spare):
    "Against a list of all that was read: entries at `positions`, all that the window needs among them, steps taken back included"
    r = random.Random(window*10+spare)
    for _ in range(30):
        ring,text = KVCache(window, spare),[]
        for step in range(25):
            n = r.choice([1, 1, 1, 2, spare+1, spare+2, window, r.randint(1, 3*window+3)])
            new = [r.random() for _ in range(n)]
            where = ring.positions(n)
            out = ring.extend(torch.tensor(new).view(1, n, 1))[0,:,0]
            text += new
            true = torch.tensor(text)
            assert len(out)==len(where)==len(set(where.tolist()))
            first = len(text)-n                                                  # the first new token sees back to first-W+1
            needed = set(range(max(0, first-window+1), len(text)))
            assert needed<=set(where.tolist()) and (where>=0).all()
            for p,v in zip(where.tolist(), out): assert p not in needed or v==true[p]
            back = r.randint(0, min(spare+1, ring.length-ring.floor))
            ring.rewind(back)
            text = text[:len(text)-back]
            assert ring.length==len(text)
        with pytest.raises(ValueError, match='cannot take back'): ring.rewind(ring.length-ring.floor+1)
        with pytest.raises(ValueError, match='cannot take back'): ring.rewind(-1)

# ---------------------------------------------------------------- dtypes, gradients, other kernels, parts

@pytest.mark.parametrize('attend', [attend_dense, attend], ids=['plain', 'fast'])
def test_gradcheck(attend):
    torch.manual_seed(0)
    q,kv,s = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((2,3,2,4), (2,5,4), (2,)))
    mask = window_mask(torch.arange(2,5), torch.arange(5), 3)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, mask)[0], (q,kv,s))
    cfg,attn,x,docs = case(7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: run(attn, cfg, x, docs), x.requires_grad_())

def rows(seed, T, dtype, C=0):
    torch.manual_seed(seed)
    B,H,K = 2,3,8
    q,kv,sinks,far = torch.randn(B,T,H,K),torch.randn(B,T,K),torch.randn(H),torch.randn(B,C,K)
    docs = torch.arange(T).expand(B,T)//7
    docs = torch.where(torch.arange(T)<torch.tensor([[0], [3]]), -1, docs)
    return [x.to(dtype) for x in (q, kv, sinks, far)],docs,torch.rand(1,T,C)>0.5

def both_ways(f, leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    o,_ = f(*leaves)
    return [o.detach().double(), *(g.double() for g in torch.autograd.grad(o.float().square().sum() if o.dtype!=torch.float64 else o.square().sum(), leaves))]

def fast_and_dense(T, W, docs, far_mask, pos, least):
    wide = lambda m: torch.cat([m.expand(2, -1, -1), far_mask.expand(2, -1, -1)], -1)
    mask = row_mask(pos, pos, W, docs, least=least)
    return (lambda q,kv,s,far: attend(q, kv, s, mask, far, far_mask),
        lambda q,kv,s,far: attend_dense(q, torch.cat([kv, far], 1), s, wide(window_mask(pos, pos, W, docs))))

@pytest.mark.parametrize('T,W,least', [(1,1,1), (1,5,1), (12,12,1), (12,40,1), (9,4,1), (11,4,1), (12,4,1), (13,1,1), (13,1,2), (29,3,4), (30,2,8),
    (8,4,1), (200,30,64)])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('C', [0, 5])
def test_every_form_of_the_mask_is_dense_attention(T, W, least, packed, C):
    leaves,docs,far_mask = rows(T*W, T, torch.float64, C)
    fast,dense = fast_and_dense(T, W, docs if packed else None, far_mask, torch.arange(T)+3, least)
    for a,b in zip(both_ways(fast, leaves), both_ways(dense, leaves)): assert_close(a, b, atol=1e-11, rtol=1e-9)
    for a,b in zip(both_ways(fast, [x.float() for x in leaves]), both_ways(dense, leaves)): assert_close(a, b, atol=2e-5, rtol=1e-5)

def test_a_causal_row_needs_no_mask():
    leaves,_,_ = rows(0, 33, torch.float64)
    leaves = leaves[:3]
    for a,b in zip(both_ways(attend, leaves), both_ways(lambda *x: attend_dense(*x, torch.ones(1,33,33).tril().bool()), leaves)): assert_close(a, b)

def test_no_query_gets_no_answer():
    leaves,_,_ = rows(0, 5, torch.float32)
    for mask in (None, torch.ones(1,0,5).bool()): assert attend(leaves[0][:,:0], leaves[1], leaves[2], mask)[0].numel()==0

def test_the_mask_of_a_long_row_is_linear_in_it():
    assert [row_mask(pos, pos, 128).numel() for pos in map(torch.arange, (1024, 2048))]==[2*128*1024, 2*128*2048]
    pos = torch.arange(2048)
    assert row_mask(pos, pos, 2048) is None

@pytest.mark.parametrize('T,W', [(64,64), (200,30), (1200,30)])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('C', [0, 5])
def test_attention_in_bf16_is_no_worse_than_dense_attention(T, W, packed, C):
    leaves,docs,far_mask = rows(T, T, torch.float64, C)
    leaves = [x.bfloat16().double() for x in leaves]
    fast,dense = fast_and_dense(T, W, docs if packed else None, far_mask, torch.arange(T), 64)
    exact,half = both_ways(dense, leaves),[x.bfloat16() for x in leaves]
    for f,d,e in list(zip(both_ways(fast, half), both_ways(dense, half), exact)):
        assert (f-e).norm()<=4*(d-e).norm()+1e-3*e.norm()   # two ways to round; sums in bfloat16 would cost many times as much

def test_gradients_of_blocks_are_added_in_float32_and_rounded_once():
    "What bfloat16 entries get is, to the bit, what the same numbers get in float32, rounded at the end"
    leaves,_,far_mask = rows(3, 1200, torch.bfloat16, 5)
    fast,_ = fast_and_dense(1200, 30, None, far_mask, torch.arange(1200), 64)
    exact = both_ways(fast, [leaves[0], *(x.float() for x in leaves[1:])])
    for a,b in zip(both_ways(fast, leaves), exact): assert torch.equal(a, b.bfloat16().double())

@pytest.mark.parametrize('seed', range(5))
def test_bfloat16(seed):
    cfg,attn,x,docs = case(400+seed)
    half = noisy(cfg, 400+seed).bfloat16()
    out,truth = run(half, cfg, x.bfloat16(), docs),loops(attn, cfg, x, docs)
    assert out.dtype==torch.bfloat16 and relative(out.double(), truth)<0.03
    with torch.autocast('cpu', torch.bfloat16): auto = run(attn, cfg, x, docs)
    assert relative(auto.double(), truth)<0.03

@pytest.mark.parametrize('attend', [attend_dense, attend], ids=['plain', 'fast'])
def test_bfloat16_softmax_sums_in_float32(attend):
    one,_ = attend(torch.zeros(1,1,1,8).bfloat16(), torch.ones(1,4096,8).bfloat16(), torch.zeros(1).bfloat16(), torch.ones(1,1,4096).bool())
    assert (one-1).abs().max()<0.01

def test_grouped_linear():
    lin = GroupedLinear(3, 4, 5)
    x = torch.randn(2,7,12)
    assert lin.weight.shape==(15,4) and lin.weight.isfinite().all() and lin.weight.std()>0   # never left empty
    assert_close(lin(x), x @ torch.block_diag(*lin.weight.chunk(3)).T)

def test_norm_matches_transformers():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm, DeepseekV4UnweightedRMSNorm
    ours,hf,x = RMSNorm(9, 1e-6),DeepseekV4RMSNorm(9, 1e-6),torch.randn(3,9)
    ours.weight.data = hf.weight.data = torch.randn(9)
    assert_close(ours(x), hf(x)); assert_close(rms_norm(x, 1e-6), DeepseekV4UnweightedRMSNorm(1e-6)(x))
    assert rms_norm(torch.zeros(2,9), 1e-6).isfinite().all()
    assert_close(ours(x.bfloat16()), hf(x.bfloat16()))

def test_nothing_hides_from_the_state_dict():
    attn = Attention(random_config(0))
    assert not list(attn.buffers()) and len(attn.state_dict())==8

@pytest.mark.parametrize('T', [1, 127, 128, 129, 300])
@pytest.mark.parametrize('masked', [False, True])
def test_chunks_of_queries_are_dense_attention(T, masked):
    g = torch.Generator().manual_seed(T)
    leaves = [torch.randn(2, T, 3, 16, generator=g), torch.randn(2, T, 16, generator=g), torch.randn(3, generator=g)]
    pos,docs = torch.arange(T),(torch.arange(T)>T//3).long().expand(2, -1)
    whole = window_mask(pos, pos, T, docs if masked else None)
    fast = both_ways(lambda *x: attend(*x, whole if masked else None), leaves)
    for a,b in zip(fast, both_ways(lambda *x: attend_dense(*x, whole), leaves)): assert_close(a, b, atol=2e-5, rtol=1e-4)

def test_a_chunk_reaches_as_far_as_its_mask():
    q,kv = torch.randn(1, 300, 2, 8),torch.randn(1, 300, 8)
    pos = torch.arange(300)
    assert [s for _,s,_ in chunk_scores(q, kv, window_mask(pos, pos, 300))]==[128, 256, 300]==[s for _,s,_ in chunk_scores(q, kv, None)]
    blind = torch.zeros(1, 300, 300).bool()
    assert all((z<-1e29).all() for _,_,z in chunk_scores(q, kv, blind))

# ---------------------------------------------------------------- one kernel, as far as a processor can tell

@pytest.fixture
def backward(monkeypatch):
    "PyTorch's uncompiled form of the kernel has gradients on a processor, too, but forbids them there"
    monkeypatch.setattr(flex, '_validate_device', lambda *args: None)
    torch._dynamo.reset()

torch_version = tuple(map(int, torch.__version__.split('.')[:2]))

def fits(K, device):
    "In place of `fused_here`, where the kernel is wanted whatever the device"
    return K>0
def one_kernel(W, docs=None):
    return lambda q,kv,s: attend_fused(q, kv, s, fused_mask(q.shape[1], W, docs))
def literal(W, docs=None):
    def f(q, kv, s):
        pos = torch.arange(q.shape[1], device=q.device)
        return attend_dense(q, kv, s, window_mask(pos, pos, W, docs))
    return f

@pytest.mark.filterwarnings('ignore:flex_attention called')
@pytest.mark.parametrize('T,W', [(150,37), (256,1), (300,300), (129,1000), (5,3)])
@pytest.mark.parametrize('packed', [False, True])
def test_one_kernel_is_dense_attention(T, W, packed, backward):
    leaves,docs,_ = rows(T, T, torch.float64)
    *leaves,_ = leaves
    docs = docs if packed else None
    for a,b in zip(both_ways(one_kernel(W, docs), leaves), both_ways(literal(W, docs), leaves)): assert_close(a, b, atol=1e-11, rtol=1e-9)
    single = [x.float() for x in leaves]
    for a,b in zip(both_ways(one_kernel(W, docs), single), both_ways(literal(W, docs), leaves)): assert_close(a, b, atol=2e-5, rtol=1e-5)
    (o,lse),(o2,lse2) = (f(W, docs)(*(x.requires_grad_() for x in leaves)) for f in (one_kernel, literal))
    assert_close(lse, lse2); assert_close(o, o2); assert not lse.requires_grad and o.requires_grad

@pytest.mark.filterwarnings('ignore:flex_attention called')
@pytest.mark.parametrize('packed', [False, True])
def test_one_kernel_in_bf16_is_no_worse_than_dense_attention(packed, backward):
    leaves,docs,_ = rows(1, 200, torch.float64)
    leaves,docs = [x.bfloat16().double() for x in leaves[:3]],docs if packed else None
    exact,half = both_ways(literal(30, docs), leaves),[x.bfloat16() for x in leaves]
    for f,d,e in zip(both_ways(one_kernel(30, docs), half), both_ways(literal(30, docs), half), exact):
        assert (f-e).norm()<=(4 if torch_version>=(2,13) else 9)*(d-e).norm()+1e-3*e.norm()     # before, PyTorch's uncompiled form rounded more
    q,kv,s = half
    assert one_kernel(30)(q, kv.float(), s.float())[0].dtype==torch.bfloat16       # as under autocast, where keys may come in float32

@pytest.mark.filterwarnings('ignore:flex_attention called')
def test_one_kernel_is_silent_where_nothing_is_seen(backward):
    (q,kv,s,_),_,_ = rows(2, 140, torch.float32)
    hole = flex.create_block_mask(lambda b,h,t,s: (t>=s) & (t!=5), None, None, 140, 140, device='cpu')
    o,*grads = both_ways(lambda *x: attend_fused(*x, hole), [q, kv, s])
    assert (o[:,5]==0).all() and (o[:,4]!=0).all() and all(g.isfinite().all() for g in grads) and (grads[0][:,5]==0).all()

def halved(lse): return lambda *a, **kw: (lambda o, aux: (o, aux._replace(lse=lse(aux.lse))))(*flex.flex_attention(*a, **kw))

@pytest.mark.filterwarnings('ignore:flex_attention called')
@pytest.mark.parametrize('bug', ['none', 'sink of the other sign', 'sink forgotten', 'window one too long', 'window one too short', 'documents forgotten',
    'no scale', 'lse to the base of 2', 'keys of the next row'])
def test_bugs_in_one_kernel_are_seen(bug, monkeypatch):
    torch._dynamo.reset()
    (q,kv,s,_),docs,_ = rows(3, 150, torch.float32)
    (truth,_),W,fused = literal(6, docs)(q, kv, s),6,(q, kv, s)
    if bug=='sink of the other sign': fused = q, kv, -s
    if bug=='sink forgotten': fused = q, kv, s-100
    if bug=='no scale': fused = q*8**0.5, kv, s
    if bug=='keys of the next row': fused = q, kv.roll(1, 0), s
    if bug.startswith('window'): W += 1 if bug.endswith('long') else -1
    if bug.startswith('lse'): monkeypatch.setattr(fast_attention, 'flex_attention', halved(lambda lse: lse/math.log(2)))
    off = (one_kernel(W, None if bug.startswith('documents') else docs)(*fused)[0]-truth).abs().max()
    assert off<1e-5 if bug=='none' else off>0.02

@pytest.mark.parametrize('packed', [False, True])
def test_one_kernel_is_one_graph(packed, backward, monkeypatch):
    "Mask, kernel and gate, with gradients, as the compiler takes them apart; for what it writes for a GPU see tests/tools/kernel.py"
    (q,kv,s,_),docs,_ = rows(4, 150, torch.float32)
    docs = docs if packed else None
    pos = torch.arange(150)
    def whole(q, kv, s): return attend(q, kv, s, row_mask(pos, pos, 37, docs, K=8))
    monkeypatch.setattr(fast_attention, 'fused_here', fits)
    compiled = torch.compile(whole, backend='aot_eager', fullgraph=True, dynamic=False)
    for a,b in zip(both_ways(compiled, [q, kv, s]), both_ways(literal(37, docs), [q, kv, s])): assert_close(a, b, atol=2e-5, rtol=1e-5)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype,K', [(torch.float32, 32), (torch.float32, 64), (torch.bfloat16, 96), (torch.bfloat16, 128)])
def test_one_kernel_on_a_gpu(dtype, K, monkeypatch, device='cuda', backend='inductor'):
    "The kernel itself; written without a GPU"
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*n, generator=g).to(device, dtype) for n in ((2,300,8,K), (2,300,K), (8,))]
    docs = (torch.arange(300, device=device)//100).expand(2, -1).contiguous()
    monkeypatch.setattr(fast_attention, 'fused_here', fits)
    pos = torch.arange(300, device=device)
    def whole(q, kv, s): return attend(q, kv, s, row_mask(pos, pos, 128, docs, K=K))
    fast = both_ways(torch.compile(whole, backend=backend, fullgraph=True, dynamic=False), leaves)
    for a,b in zip(fast, both_ways(literal(128, docs), [x.double() for x in leaves])): assert (a-b).norm()<=(2e-3 if dtype==torch.float32 else 2e-2)*b.norm()

def tables(mask):
    "Blocks that the kernel visits, and those where it asks no rule, [B,n,n] each; by keys, and by queries as backward reads them"
    def dense(num, at):
        n = at.shape[-1]
        return torch.zeros(*at.shape[:-1], n+1).scatter_(-1, at.long().masked_fill(torch.arange(n)>=num[...,None], n), 1)[:,0,:,:n]>0
    part,full,part_q,full_q = (dense(getattr(mask, f'{f}_num_blocks'), getattr(mask, f'{f}_indices')) for f in ('kv', 'full_kv', 'q', 'full_q'))
    assert part.mT.equal(part_q) and full.mT.equal(full_q) and not (part & full).any()
    return part | full, full

@pytest.mark.parametrize('seed', range(40))
def test_the_table_of_one_kernel(seed):
    "Where numbers of documents rise, PyTorch's own table; where they do not, none too few blocks visited and none too many unasked"
    r = random.Random(seed)
    T,W = r.choice([1, 100, 128, 129, 256, 300, 511, 640, 700]),r.choice([1, 2, 100, 127, 128, 129, 130, 255, 256, 257, 300, 500, 10**6])
    docs = [None, *(torch.tensor([sorted(r.choices(range(-1, r.choice([1, 3, 9])), k=T)) for _ in range(2)]) for _ in range(2))][seed%3]
    if docs is not None and seed%2: docs = docs[:,torch.arange(T)//50*50%T]                # back and forth
    def sees(b, h, t, s): return (t>=s) & (t-s<W) if docs is None else (t>=s) & (t-s<W) & (docs[b,t]==docs[b,s])
    ours,theirs = tables(fused_mask(T, W, docs)),tables(flex.create_block_mask(sees, None if docs is None else 2, None, T, T, device='cpu'))
    rising = docs is None or (docs.diff(dim=1)>=0).all()
    if rising and T%128==0: assert ours[1].equal(theirs[1])
    if rising: assert ours[0].equal(theirs[0])
    assert not (theirs[0] & ~ours[0]).any()
    full = window_mask(*(torch.arange(T),)*2, W, docs).expand(len(ours[1]), -1, -1)
    for b,i,j in ours[1].nonzero(): assert full[b,128*i:128*(i+1),128*j:128*(j+1)].all() and 128*(j+1)<=T

@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
def test_the_table_of_one_kernel_compiled():
    torch._dynamo.reset()
    docs = (torch.arange(500)//200).expand(2, -1).contiguous()
    mask = torch.compile(lambda docs: fused_mask(500, 100, docs), fullgraph=True, dynamic=False)(docs)
    for a,b in zip(tables(mask), tables(fused_mask(500, 100, docs))): assert a.equal(b)

@pytest.fixture
def here(monkeypatch):
    "Would one kernel be chosen in a compiled step of this precision, which autocast sets?"
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    def chosen(K, dtype=torch.bfloat16, kind='cuda'):
        monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: dtype!=torch.float32)
        monkeypatch.setattr(torch, 'get_autocast_dtype', lambda kind: dtype)
        return fused_here(K, torch.device(kind))
    return chosen

def test_where_one_kernel_is_chosen(here, monkeypatch):
    sizes = (0, 8, 16, 64, 65, 128, 129, 512)
    assert here(96) and not here(96, kind='cpu') and not here(96, kind='meta')
    assert [K for K in sizes if here(K)]==[16, 64, 65, 128]
    assert [K for K in sizes if here(K, torch.float32)]==[16, 64] and not here(32, torch.float16)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: False)
    assert not here(96)

def test_one_kernel_is_chosen_where_it_fits(here):
    "What tests/tools/kernel.py found: sizes that are chosen fit on every card, those beyond do not on some; and the kernels compute attention"
    found,room = json.loads((Path(__file__).parents[1]/'results/kernel.json').read_text()),{}
    for r in found['room']:
        room[r['dtype'],r['K']] = room.get((r['dtype'], r['K']), True) and r['fits']
        assert r['largest']<2*2048**2                                    # two rows of 2,048 tokens: no square of scores, nor of what may be seen
    for (dtype,K),all_fit in room.items(): assert here(K, getattr(torch, dtype))==all_fit
    assert len(set(room.values()))==2
    # relative; in steps of the type, of which rows of sums over up to thousands of keys and queries may cost a few
    for r in found['runs']: assert max(r['errors'].values())<=(16*2**-23 if r['dtype']=='float32' else 2*2**-10)

def test_which_mask_one_kernel_gets(monkeypatch):
    monkeypatch.setattr(fast_attention, 'fused_here', fits)
    pos,docs = torch.arange(300),torch.arange(300).expand(2, -1)//100
    for W,d in ((40, None), (300, None), (40, docs)):
        mask = row_mask(pos, pos, W, d, K=8)
        assert isinstance(mask, flex.BlockMask) and mask.shape==(1 if d is None else 2, 1, 300, 300)
    short = pos[:128]
    assert row_mask(short, short, 300, K=8) is None                  # a row of one chunk
    assert row_mask(pos, pos, 40).ndim==4
    with pytest.raises(AttributeError): attend(torch.zeros(2,300,3,8), torch.zeros(2,300,8), torch.zeros(3), mask, torch.zeros(2,4,8), torch.ones(2,300,4)>0)
