"""The plain transformer against transformers' Llama, float64 and the rules that every language model must keep."""
import pytest, torch
from dataclasses import replace
from nanowhale.model.plain import (MultiHeadAttention, PlainConfig, PlainTransformer, RMSNorm, fit, next_token_loss, rms_norm, rope,
    upcast)
from nanowhale.model.rope import rope_cos_sin, rotate

CFG = PlainConfig(vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, head_dim=8, intermediate_size=20)

def rough(model):
    "Weights so large, and norms so uneven, that every wire matters"
    torch.manual_seed(0)
    for p in model.parameters(): p.data = torch.randn_like(p)*0.4+(p.ndim==1)
    return model

def llama(model, cfg):
    "transformers' Llama with the same weights; it pairs channels by halves, so those of queries and keys change places"
    from transformers import LlamaConfig, LlamaForCausalLM
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads, head_dim=cfg.head_dim, intermediate_size=cfg.intermediate_size,
        rms_norm_eps=cfg.rms_norm_eps, rope_theta=cfg.rope_theta, tie_word_embeddings=False, attn_implementation='eager'))
    K = cfg.head_dim
    halves = torch.cat([torch.arange(0, K, 2), torch.arange(1, K, 2)])
    rows = (torch.arange(cfg.num_attention_heads)[:,None]*K+halves).flatten()
    ours = {k if k.startswith('lm_head') else 'model.'+k: v[rows] if 'q_proj' in k or 'k_proj' in k else v for k,v in model.state_dict().items()}
    theirs.load_state_dict(ours)
    return theirs, rows

@pytest.mark.parametrize('cfg', [CFG, replace(CFG, num_hidden_layers=1, num_attention_heads=1, head_dim=2, rope_theta=100.)])
def test_logits_and_gradients_are_llamas(cfg):
    model = rough(PlainTransformer(cfg)).double()
    theirs,rows = llama(model, cfg)
    theirs = theirs.double()
    ids = torch.randint(50, (2, 11))
    a,b = model(ids), theirs(ids).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)   # Llama computes its angles in float32
    weight = torch.randn_like(a)
    (a*weight).sum().backward(); (b*weight).sum().backward()
    for name,p in model.named_parameters():
        theirs_grad = theirs.get_parameter(name if name.startswith('lm_head') else 'model.'+name).grad
        mine = p.grad[rows] if 'q_proj' in name or 'k_proj' in name else p.grad
        assert (mine-theirs_grad).norm()<1e-4*theirs_grad.norm(), name

@pytest.mark.parametrize('T', [1, 2, 7])
def test_rope_is_rotate_on_all_channels(T):
    x = torch.randn(2, T, 3, 8)
    torch.testing.assert_close(rope(x, 500.), rotate(x, *rope_cos_sin(torch.arange(T), 8, 500.)), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('at', [0, 4, 9])
def test_a_token_changes_only_what_comes_from_it_on(at):
    model = rough(PlainTransformer(CFG)).double()
    ids = torch.randint(50, (1, 10))
    other = ids.clone(); other[0,at] = (ids[0,at]+1)%50
    changed = (model(ids)-model(other)).abs().amax((0,2))>1e-9
    assert changed.tolist()==[t>=at for t in range(10)]

def test_rows_of_a_batch_do_not_meet():
    model = rough(PlainTransformer(CFG))
    ids = torch.randint(50, (3, 6))
    torch.testing.assert_close(model(ids)[1], model(ids[1:2])[0])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_keep_a_type_and_compute_in_at_least_float32(dtype):
    x = (torch.randn(4, 64)*100).to(dtype)
    want = x.double()/(x.double().square().mean(-1, keepdim=True)+1e-6).sqrt()
    y = rms_norm(x, 1e-6)
    assert y.dtype==dtype and upcast(x).dtype==(torch.float64 if dtype==torch.float64 else torch.float32)
    torch.testing.assert_close(y.double(), want, atol=0, rtol=2*torch.finfo(dtype).eps)
    assert torch.isfinite(rms_norm(torch.zeros(2, 64, dtype=dtype), 1e-6)).all()

def test_a_norms_gradient_is_right():
    norm = RMSNorm(5, 1e-6).double()
    norm.weight.data = torch.rand(5).double()
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, 1e-6, w), (x, norm.weight))

def test_the_loss_is_that_of_the_next_token():
    model = rough(PlainTransformer(CFG))
    ids = torch.randint(50, (2, 6))
    log_p = model(ids).log_softmax(-1)
    by_hand = -sum(log_p[b,t,ids[b,t+1]] for b in range(2) for t in range(5))/10
    torch.testing.assert_close(next_token_loss(model, ids), by_hand)

def test_fit_takes_the_steps_of_adamw_and_leaves_no_gradients():
    model,twin = (rough(PlainTransformer(CFG)) for _ in range(2))
    rows = [torch.randint(50, (2, 6)) for _ in range(3)]
    losses = fit(model, rows, lr=0.01)
    opt = torch.optim.AdamW(twin.parameters(), 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for r,want in zip(rows, losses):
        opt.zero_grad()
        loss = next_token_loss(twin, r)
        loss.backward(); opt.step()
        assert loss.item()==want
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), twin.parameters()))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())

def test_it_learns_a_rule_that_needs_attention():
    "The second half of each row repeats the first: only a look back by half a row predicts it"
    torch.manual_seed(0)
    cfg = replace(CFG, vocab_size=8, hidden_size=32, head_dim=16, intermediate_size=64)
    def rows(n):
        for _ in range(n):
            half = torch.randint(8, (32, 8))
            yield torch.cat([half, half], 1)
    model = PlainTransformer(cfg)
    fit(model, rows(400), lr=3e-3)
    ids = next(rows(1))
    with torch.no_grad(): right = (model(ids[:,:-1]).argmax(-1)==ids[:,1:])[:,8:].float().mean()
    assert right>0.9

def test_attention_has_no_parameters_but_its_four_matrices():
    assert {n: tuple(p.shape) for n,p in MultiHeadAttention(CFG).named_parameters()}=={
        'q_proj.weight': (24, 12), 'k_proj.weight': (24, 12), 'v_proj.weight': (24, 12), 'o_proj.weight': (12, 24)}
