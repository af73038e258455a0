"""A whole block beside transformers' DeepseekV4DecoderLayer: values, gradients, causality, cache, planted bugs"""
import random
import pytest, torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer

from nanowhale.fast.kernels import KERNELS, use
from nanowhale.model import block as block_module
from nanowhale.model.block import Block
from nanowhale.model.config import WhaleConfig
from nanowhale.presets import layer_flops, layer_params, nanowhale_100m, tiny
from nanowhale.model.hyper import collapse, mix
from nanowhale.generate.cache import KVCache
from nanowhale.model.visibility import window_mask
from nanowhale.model.rope import rope_cos_sin

def random_config(seed):
    r = random.Random(seed)
    G,E,K = r.randint(1, 3),r.randint(2, 7),r.randint(4, 13)
    return WhaleConfig(
        vocab_size=31, hidden_size=r.randint(5, 21), num_hidden_layers=1, num_attention_heads=G*r.randint(1, 3), head_dim=K,
        qk_rope_head_dim=2*r.randint(1, K//2), q_lora_rank=r.randint(3, 11), o_groups=G, o_lora_rank=r.randint(2, 9),
        sliding_window=r.choice([1,2,3,5,50]), moe_intermediate_size=r.randint(3, 13), n_routed_experts=E,
        num_experts_per_tok=r.randint(1, E), scoring_func=r.choice(['sqrtsoftplus','sqrtsoftplus','sigmoid']),
        routed_scaling_factor=r.choice([1.,1.5,2.5]), swiglu_limit=r.choice([0.3,1.,10.]), hc_mult=r.randint(1, 5),
        hc_sinkhorn_iters=r.choice([1,2,3,20]))

def case(seed, dtype=torch.float32):
    "A random block with no weight at a value that hides something, its streams, and documents (some rows packed)"
    cfg,r = random_config(seed),random.Random(seed+1)
    torch.manual_seed(seed)
    b = Block(cfg)
    for p in b.parameters(): torch.nn.init.normal_(p, std=0.4)
    b.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    B,T = r.randint(1, 3),r.randint(2, 12)
    docs = torch.tensor([sorted(r.choices([-1,0,1,2], k=T)) if r.random()<.5 else [0]*T for _ in range(B)])
    return cfg, b.to(dtype), torch.randn(B, T, cfg.hc_mult, cfg.hidden_size, dtype=dtype), docs

def surroundings(cfg, T, docs=None, start=0, keys=None):
    pos = torch.arange(start, start+T)
    return rope_cos_sin(pos, cfg.qk_rope_head_dim, cfg.rope_theta), window_mask(pos, pos if keys is None else keys, cfg.sliding_window, docs, docs)

# ---------------------------------------------------------------- transformers

def theirs(cfg, ours):
    hc = cfg.to_hf()
    hc._attn_implementation = hc._experts_implementation = 'eager'
    layer = DeepseekV4DecoderLayer(hc, 0)
    layer.load_state_dict(ours.state_dict())
    return layer

def run_theirs(layer, X, rope, mask):
    B,T = X.shape[:2]
    both = tuple(t[None].expand(B,-1,-1) for t in rope)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:,None].expand(B,1,T,-1)
    return layer(X, position_embeddings=dict(main=both, compress=both), position_ids=torch.arange(T)[None].expand(B,-1), attention_mask=additive)

def check_block(seed, gradients=True, kernels='plain'):
    "Worst difference of one random block from transformers': values, and gradients relative to their norm"
    cfg,b,X,docs = case(seed)
    rope,mask = surroundings(cfg, X.shape[1], docs)
    hf = theirs(cfg, b)
    use(b, kernels)
    X.requires_grad_()
    ours,other = b(X, rope, mask)[0],run_theirs(hf, X, rope, mask)
    assert_close(ours, other, rtol=1e-5, atol=1e-5)
    if not gradients: return
    dy = torch.randn_like(ours)
    names = [n for n,_ in b.named_parameters()]
    ps,qs = dict(b.named_parameters()),dict(hf.named_parameters())
    ga = torch.autograd.grad(ours, [X]+[ps[n] for n in names], dy)
    gb = torch.autograd.grad(other, [X]+[qs[n] for n in names], dy)
    largest = max(h.norm() for h in gb)
    for n,g,h in zip(['X']+names, ga, gb): assert (g-h).norm() <= 1e-4*h.norm()+1e-6*largest, f'{n}: {(g-h).norm()/h.norm()}'

def test_same_keys_and_shapes():
    for cfg in (random_config(3), tiny()):
        ours,other = Block(cfg),theirs(cfg, Block(cfg))
        assert {k: v.shape for k,v in ours.state_dict().items()}=={k: v.shape for k,v in other.state_dict().items()}

@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('seed', range(16))
def test_block_is_transformers(seed, kernels): check_block(seed, kernels=kernels)

# ---------------------------------------------------------------- bugs that still train, planted

def norm_after(self, X, rope, mask, cache=None):
    pre,post,comb = self.attn_hc(X)
    X = mix(post, comb, X, self.input_layernorm(self.self_attn(collapse(pre, X), rope, mask, cache)))
    pre,post,comb = self.ffn_hc(X)
    y,routing = self.mlp(collapse(pre, X))
    return mix(post, comb, X, self.post_attention_layernorm(y)), routing

def variant(weights_from, read_from, mix_into, swap=False):
    def forward(self, X, rope, mask, cache=None):
        first,second = (self.ffn_hc,self.attn_hc) if swap else (self.attn_hc,self.ffn_hc)
        pre,post,comb = first(X)
        s = dict(old=X, new=mix(post, comb, X, self.self_attn(self.input_layernorm(collapse(pre, X)), rope, mask, cache)))
        pre,post,comb = second(s[weights_from])
        y,routing = self.mlp(self.post_attention_layernorm(collapse(pre, s[read_from])))
        return mix(post, comb, s[mix_into], y), routing
    return forward

PLANTED = {'norm after': norm_after, 'stale weights': variant('old', 'new', 'new'), 'stale read': variant('new', 'old', 'new'),
           'stale streams': variant('new', 'new', 'old'), 'hyper-connections swapped': variant('new', 'new', 'new', swap=True)}

def test_the_variants_without_a_bug_are_the_block(monkeypatch):
    monkeypatch.setattr(Block, 'forward', variant('new', 'new', 'new'))
    check_block(0)

@pytest.mark.parametrize('bug', PLANTED)
def test_planted_wiring_is_seen(bug, monkeypatch):
    monkeypatch.setattr(Block, 'forward', PLANTED[bug])
    for seed in range(3):
        with pytest.raises(AssertionError): check_block(seed, gradients=False)

def test_transposed_mix_is_seen(monkeypatch):
    monkeypatch.setattr(block_module, 'mix', lambda post,comb,X,y: mix(post, comb.mT, X, y))
    with pytest.raises(AssertionError):
        for seed in range(4): check_block(seed, gradients=False)

# ---------------------------------------------------------------- promises

@pytest.mark.parametrize('seed', range(8))
def test_no_token_sees_the_future_another_document_or_past_the_window(seed):
    cfg,b,X,docs = case(seed, torch.float64)
    T = X.shape[1]
    rope,mask = surroundings(cfg, T, docs)
    out = b(X, rope, mask)[0]
    for s in range(T):
        Y = X.clone()
        Y[:,s] += torch.randn_like(Y[:,s])
        changed = (b(Y, rope, mask)[0]-out).flatten(2).abs().amax(-1) > 1e-12      # [B,T]
        assert torch.equal(changed, mask[:,:,s].expand(len(X),T))

@pytest.mark.parametrize('seed', range(8))
def test_cached_steps_are_the_full_pass(seed):
    cfg,b,X,_ = case(seed, torch.float64)
    T,W = X.shape[1],cfg.sliding_window
    want = b(X, *surroundings(cfg, T))[0]
    r,cache,outs,a = random.Random(seed),KVCache(W),[],0
    while a<T:
        n = min(T-a, r.choice([1,1,2,5]))
        keys = torch.arange(max(0, a-W+1), a+n)
        outs.append(b(X[:,a:a+n], *surroundings(cfg, n, start=a, keys=keys), cache)[0])
        a += n
    assert_close(torch.cat(outs, 1), want, rtol=1e-9, atol=1e-9)

def test_gradients_by_moving_numbers():
    cfg,b,X,docs = case(5, torch.float64)
    rope,mask = surroundings(cfg, X.shape[1], docs)
    assert torch.autograd.gradcheck(lambda X,*_: b(X, rope, mask)[0], (X.requires_grad_(), *b.parameters()), fast_mode=True)

def test_bf16_runs_and_stays_close():
    cfg,b,X,docs = case(2)
    rope,mask = surroundings(cfg, X.shape[1], docs)
    for p in b.parameters(): p.data.mul_(0.3)
    want = b(X, rope, mask)[0]
    got,routing = b.bfloat16()(X.bfloat16(), rope, mask)
    assert got.dtype==torch.bfloat16 and got.isfinite().all()
    assert (got.float()-want).norm() < 0.03*want.norm()

def test_a_block_costs_what_the_config_says():
    with torch.device('meta'): whole = Block(nanowhale_100m())
    n = sum(v.numel() for v in whole.state_dict().values())
    assert n==3_453_122==sum(layer_params(nanowhale_100m()).values())
    assert not [k for k,_ in whole.named_buffers() if k not in whole.state_dict()]      # nothing a loader could lose
    for seed in range(4):
        cfg = random_config(seed)
        assert sum(v.numel() for v in Block(cfg).state_dict().values())==sum(layer_params(cfg).values())

def gradient_norms(forward, depth=24):
    "Size of the gradient below each of `depth` fresh blocks, relative to the top"
    torch.manual_seed(1)
    cfg = WhaleConfig(vocab_size=50, hidden_size=32, moe_intermediate_size=7, num_attention_heads=4, head_dim=10, qk_rope_head_dim=6,
        q_lora_rank=5, o_groups=2, o_lora_rank=8, n_routed_experts=5, num_experts_per_tok=2, sliding_window=4, hc_mult=4, hc_sinkhorn_iters=2)
    rope,mask = surroundings(cfg, 11)
    states = [torch.randn(1,11,1,32).repeat(1,1,4,1).requires_grad_()]
    for _ in range(depth): states.append(forward(Block(cfg), states[-1], rope, mask)[0])
    grads = torch.autograd.grad((states[-1]*torch.randn_like(states[-1])).sum(), states)
    return [(g.norm()/grads[-1].norm()).item() for g in grads]

def test_the_gradient_reaches_the_first_block_with_the_norm_before():
    before,after = gradient_norms(Block.forward),gradient_norms(norm_after)
    assert 0.3<min(before) and max(before)<3 and after[0]>30

def test_the_norm_after_a_sublayer_hides_how_much_it_says():
    "Doubling a sublayer's last matrix doubles what it writes; with the norm after it, nothing changes"
    cfg,b,X,_ = case(4, torch.float64)
    rope,mask = surroundings(cfg, X.shape[1])
    N = cfg.hc_mult
    for hc in (b.attn_hc, b.ffn_hc):
        hc.fn.data.zero_(); hc.scale.data.fill_(1); hc.base.data[2*N:] = 60*torch.eye(N, dtype=torch.float64).flatten()
    for p in (b.mlp.experts.down_proj, b.mlp.shared_experts.down_proj.weight): p.data.zero_()
    for forward,factor in ((Block.forward, 2), (norm_after, 1)):
        once = forward(b, X, rope, mask)[0]-X
        b.self_attn.o_b_proj.weight.data.mul_(2)
        twice = forward(b, X, rope, mask)[0]-X
        b.self_attn.o_b_proj.weight.data.div_(2)
        assert once.abs().max()>0.01
        assert_close(twice, factor*once, rtol=0, atol=1e-3)

def test_a_block_computes_what_the_config_says():
    "The formula counts matrix products, and so does torch; in a context as short as this, masked keys are multiplied too"
    big,T = nanowhale_100m(),8
    rope,mask = surroundings(big, T)
    with FlopCounterMode(display=False) as counter: Block(big)(torch.randn(1,T,4,320), rope, mask)
    assert counter.get_total_flops()==T*sum((layer_flops(big, T) | dict(scores=4*8*96*T)).values())
