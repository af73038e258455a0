"""Reading with half of the layers: what is counted, and replays beside the full pass."""
from dataclasses import replace
from unittest.mock import patch
import pytest, torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from nanowhale.beyond.csa2 import SharedCache, SharedWhale, V41Config, far_kind, small_v41
from nanowhale.beyond.halves import LastRows, far_flops, reading_flops, replayed_rows, replaying, writing_flops
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import init_weights

torch.set_num_threads(1)
torch.manual_seed(0)
W = SharedWhale(small_v41(40, hidden_size=16, num_hidden_layers=5, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=6,
    o_lora_rank=4, sliding_window=4, index_n_heads=2, index_head_dim=6, index_topk=3, moe_intermediate_size=8, n_routed_experts=2,
    num_experts_per_tok=1, hc_mult=2, hc_sinkhorn_iters=2, compress_ratios=(0, 2, 1, 1, 1), kv_source_layer_ids=(1, 2),
    index_source_layer_ids=(1, 2, 3), candidate_source_layer_id=2, candidate_block_size=2, candidate_topk_blocks=3))
init_weights(W, .6)
W = W.double().requires_grad_(False)
IDS = torch.randint(40, (2, 24))
FULL = W(IDS).logits
EXACT,BOUNDED = (replayed_rows(W.cfg, e) for e in (True, False))

def read(rows, n, cache, since=0):
    with replaying(W, rows): return W(IDS[:,since:n], cache=cache).logits[:,-1:]

@pytest.mark.parametrize('n', [1, 3, 4, 6, 7, 8, 9, 15, 20])
@pytest.mark.parametrize('spare', [0, 5])
def test_exact_replay_is_the_full_pass(n, spare):
    cache = SharedCache(W.cfg, spare)
    first = read(EXACT, n, cache)
    assert_close(first, FULL[:,n-1:n], atol=1e-9, rtol=1e-9)
    assert_close(W(IDS[:,n:n+2], cache=cache).logits, FULL[:,n:n+2], atol=1e-9, rtol=1e-9)

def test_the_staircase_is_what_the_next_token_depends_on():
    "By gradient: rows of each layer's input that reach the window of the last layer"
    assert EXACT==[7, 4] and BOUNDED==[4, 4]
    streams = {}
    def keep(i):
        def hook(block, args):
            streams[i] = args[0].detach().requires_grad_()
            return streams[i], *args[1:]
        return hook
    hooks = [W.model.layers[i].register_forward_pre_hook(keep(i)) for i in (3, 4)]
    latent = {}
    last = W.model.layers[4].self_attn
    def noted(module, args, out): latent['kv'] = out
    hooks.append(last.kv_norm.register_forward_hook(noted))
    try:
        W(IDS)
        for i,rows in ((4, 4), (3, 7)):
            hooks[1].remove() if i==3 else None      # let the gradient pass through layer 4's input
            W(IDS)
            g = torch.autograd.grad(latent['kv'][:,-4:].sum(), streams[i])[0].abs().sum((0,2,3))
            assert (g>0).sum()==rows and (g[-rows:]>0).all()
    finally:
        for h in hooks: h.remove()

def test_one_row_less_is_noticed():
    for k in range(2):
        less = [r-(j==k) for j,r in enumerate(EXACT)]
        assert (read(less, 20, None)-FULL[:,19:20]).abs().max()>1e-9

def test_a_replay_depends_on_nothing_that_was_in_the_ring():
    alone = read(BOUNDED, 20, SharedCache(W.cfg))
    for before in (3, 9):
        cache = SharedCache(W.cfg)
        W(IDS[:,:before], cache=cache)
        assert_close(read(BOUNDED, 20, cache, before), alone, atol=1e-9, rtol=1e-9)
    def looks_below(part, pos, k_pos): return LastRows.__init__.__globals__['window_mask'](pos, k_pos, part.window)
    with patch.object(LastRows, 'sees', looks_below): assert (read(BOUNDED, 20, SharedCache(W.cfg))-alone).abs().max()>1e-6

def test_later_turns_and_chunks_end_where_the_full_pass_does():
    cache = SharedCache(W.cfg)
    read(EXACT, 9, cache)
    got = read(EXACT, 20, cache, 9)          # eleven tokens, of which layers 3 and 4 read seven and four
    assert_close(got, FULL[:,19:20], atol=1e-9, rtol=1e-9)
    assert cache.length==20 and {ring.length for ring in cache.layers}=={20}

def test_rows_of_several_documents_are_refused_in_a_line():
    docs = torch.zeros_like(IDS)
    docs[0,:5] = -1
    with replaying(W, BOUNDED), pytest.raises(ValueError, match='one document a row'): W(IDS, docs=docs)
    with replaying(W, BOUNDED), pytest.raises(ValueError, match='one document a row'): W(IDS, None, docs)

def test_blocks_are_put_back_whatever_happens():
    before = list(W.model.layers)
    with pytest.raises(RuntimeError):
        with replaying(W, BOUNDED): raise RuntimeError
    assert all(a is b for a,b in zip(before, W.model.layers))

def test_counts():
    big = V41Config()
    assert replayed_rows(big, True)[0]==2414 and sum(replayed_rows(big, True))==24149
    T = 5000
    full,exact,bound = (reading_flops(big, T, rows) for rows in (None, replayed_rows(big, True), replayed_rows(big)))
    assert bound<exact<full and reading_flops(big, T, [T]*19)==full
    assert writing_flops(big, 1)>2*big.hidden_size*big.vocab_size
    read = [T*reading_flops(big, T, None) for T in (1, 2, 3)]
    written = [writing_flops(big, T)-2*big.hidden_size*big.vocab_size for T in (2, 3)]
    assert written==pytest.approx([read[1]-read[0], read[2]-read[1]])

def test_tokens_that_a_layer_has_not_read_cannot_be_taken_back():
    cache = SharedCache(W.cfg, spare=5)
    read(BOUNDED, 20, cache)                     # layers 3 and 4 have read four tokens
    with pytest.raises(ValueError, match='cannot take back 5 tokens, at most 4'): cache.rewind(5)

def test_documents_are_welcome_again_afterwards():
    with replaying(W, BOUNDED): pass
    assert_close(W(IDS, docs=torch.zeros_like(IDS)).logits, FULL, atol=1e-9, rtol=1e-9)

def test_rows_that_run_are_the_last_ones_of_the_text():
    "What is saved is the work of the upper layers on the tokens before"
    def total(T, rows=None): return T*reading_flops(W.cfg, T, rows)
    for T,n in ((9, 2), (40, 7)):
        saved = total(T-n)-total(T-n, [0]*2)
        assert total(T, [n]*2)==pytest.approx(total(T)-saved)

def test_a_source_costs_what_pytorch_counts():
    "Beside a layer that picks for itself and makes nothing"
    T = 24
    c = replace(W.cfg, num_hidden_layers=6, compress_ratios=(0, 2, 2, 1, 1, 1), kv_source_layer_ids=(1, 2, 3), index_source_layer_ids=(1, 2, 3),
        candidate_source_layer_id=None)
    x = torch.randn(1, T, c.hidden_size, dtype=torch.float64)
    made = far_flops(c, 2, T)['compress']-far_flops(replace(c, kv_source_layer_ids=(1, 3)), 2, T)['compress']
    blocks = views(W.cfg, whole_rows(W.cfg, IDS[:1]))[far_kind(2)][1]
    with FlopCounterMode(display=False) as counted: W.model.layers[1].self_attn.source(x, blocks)
    assert T*made==counted.get_total_flops()
