"""CSA2: far attention whose entries and picks are shared between layers."""
from dataclasses import replace
from unittest.mock import patch
import pytest, torch
from torch.testing import assert_close
from nanowhale.beyond.csa2 import (Shared, SharedAttention, SharedCache, SharedTrunk, SharedWhale, V41Config, candidates,
    far_bytes, far_kind, small_v41)
from nanowhale.fast.kernels import use
from nanowhale.generate import generate
from nanowhale.generate.cache import Cache
from nanowhale.model.compress import far_weights
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import init_weights

torch.set_num_threads(1)
SMALL = dict(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=6, o_lora_rank=4,
    sliding_window=4, index_n_heads=2, index_head_dim=6, index_topk=3, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
    hc_mult=2, hc_sinkhorn_iters=2, compress_ratios=(0, 2, 2, 1, 1), kv_source_layer_ids=(1, 3), index_source_layer_ids=(1, 3, 4),
    candidate_source_layer_id=3, candidate_block_size=2, candidate_topk_blocks=3)

def whale(**kw):
    torch.manual_seed(0)
    w = SharedWhale(small_v41(40, **SMALL | kw))
    init_weights(w, .4)
    for p in w.parameters():
        if p.ndim==1: p.data += .3*torch.randn_like(p)
    return w.double().requires_grad_(False)

W = whale()
IDS = torch.randint(40, (2, 22), generator=torch.Generator().manual_seed(1))
FULL = W(IDS).logits

def in_pieces(sizes, wrong=0, docs=None, cache=None):
    cache,out,at = cache or SharedCache(W.cfg, spare=2),[],0
    for n in sizes:
        if wrong and at: W((IDS[:,at:at+1]+torch.arange(1, wrong+1))%40, cache=cache); cache.rewind(wrong)
        out.append(W(IDS[:,at:at+n], docs=None if docs is None else docs[:,at:at+n], cache=cache).logits)
        at += n
    return torch.cat(out, 1)

@pytest.mark.parametrize('n', range(1, 12))
def test_cached_is_full_for_every_prompt_around_a_half_pair(n):
    assert_close(in_pieces([n, 1, 1, 1, 22-n-3], wrong=n%3), FULL, atol=1e-9, rtol=1e-9)

def test_pieces_of_any_size():
    draw = torch.Generator().manual_seed(3)
    for _ in range(4):
        sizes = []
        while sum(sizes)<22: sizes.append(min(22-sum(sizes), torch.randint(1, 7, (), generator=draw).item()))
        assert_close(in_pieces(sizes, 2), FULL, atol=1e-9, rtol=1e-9)

def test_a_cache_may_not_be_rewound_further_than_it_has_room():
    cache = SharedCache(W.cfg, spare=1)
    W(IDS[:,:7], cache=cache)
    with pytest.raises(ValueError, match='cannot take back 3'): cache.rewind(3)

def test_the_stale_keys_of_the_released_code_are_noticed():
    def late(attn, x, blocks, shared, memory):
        before = shared.keys
        shared.entries,shared.keys = attn.source(x, blocks, memory)
        if not blocks.ends.shape[1] and before is not None: shared.keys = before[:,:shared.entries.shape[1]]
    kept,full = Shared(),FULL
    with patch.object(SharedTrunk, 'begin', staticmethod(lambda: kept)):
        assert_close(in_pieces([6]+[1]*16), full, atol=1e-9, rtol=1e-9)      # kept slots alone do no harm
        with patch.object(SharedAttention, 'publish', late): off = (in_pieces([6]+[1]*16)-full).abs().amax((0,2))
    assert off[:8].max()<1e-9 and (off[8::2]>1e-6).all()      # four entries behind a query that picks three

def test_documents_do_not_see_each_other():
    "Packed into one row, each reads as if it stood alone (blocks of candidates are counted from the beginning of the row: 8 is one)"
    full = W(IDS, docs=(torch.arange(22)>=8).long().expand(2, -1)).logits
    for part in (slice(0, 8), slice(8, 22)):
        assert_close(full[:,part], W(IDS[:,part]).logits, atol=1e-4, rtol=1e-4)      # angles are in float32

def test_nothing_is_told_of_later_tokens():
    later = IDS.clone()
    later[:,13:] = (later[:,13:]+1)%40
    assert_close(W(later).logits[:,:13], FULL[:,:13], atol=1e-12, rtol=0)

def test_the_fast_functions_compute_the_same():
    w = SharedWhale(W.cfg)
    w.load_state_dict(W.float().state_dict()); W.double()
    plain = w(IDS, labels=IDS)
    fast = use(w)(IDS, labels=IDS)
    assert_close(fast.logits, plain.logits, atol=1e-3, rtol=1e-3)
    assert_close(fast.indexer_loss, plain.indexer_loss, atol=1e-4, rtol=1e-3)

def test_who_learns_from_what():
    w = SharedWhale(W.cfg)
    out = w(IDS, labels=IDS)
    own = {n for n,_ in w.named_parameters() if 'indexer' in n or '.k_' in n}
    def moved(loss):
        grads = torch.autograd.grad(loss, list(w.parameters()), allow_unused=True, retain_graph=True)
        return {n for (n,_),g in zip(w.named_parameters(), grads) if g is not None}
    assert moved(out.indexer_loss)==own and len(own)==10
    assert not moved(out.loss) & own and moved(out.loss) | own=={n for n,_ in w.named_parameters()}

def test_generation_goes_through_the_plain_cache_too():
    w = SharedWhale(W.cfg)
    a,b = (generate(w, IDS[:,:5], max_new_tokens=8, temperature=0, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)
    assert_close(in_pieces([5, 1, 16], cache=Cache(W.cfg)), FULL, atol=1e-9, rtol=1e-9)

def test_without_candidates_all_entries_may_be_picked():
    a,b = whale(candidate_source_layer_id=None),whale(candidate_topk_blocks=99)
    assert_close(a(IDS).logits, b(IDS).logits, atol=1e-12, rtol=0)
    assert (a(IDS).logits-FULL).abs().max()>1e-3

def test_candidates_beside_a_loop():
    torch.manual_seed(2)
    for C,size,most in ((11, 3, 2), (8, 2, 9), (1, 4, 1), (16, 4, 1)):
        scores = torch.randn(2, 9, C)
        behind = (torch.arange(9)+torch.tensor([[0], [3]])).clamp(max=C)
        seen = torch.arange(C)<behind[...,None]
        got = candidates(scores, seen, size, most)
        for b in range(2):
            for t in range(9):
                n = behind[b,t].item()
                blocks = [list(range(a, min(a+size, n))) for a in range(0, n, size)]
                kept = blocks[-1:]+sorted(blocks[:-1], key=lambda x: -max(scores[b,t,j] for j in x))[:most-1]
                assert {j for j in range(n) if got[b,t,j]}=={j for x in kept for j in x}

@pytest.mark.parametrize('wrong,says', [
    (dict(compress_ratios=(0, 2, 1)), 'must have 5 entries'), (dict(kv_source_layer_ids=(1,)), 'must name layer 3, the first of ratio 1'),
    (dict(kv_source_layer_ids=(0, 1, 3)), 'layer 0 compresses nothing'), (dict(index_source_layer_ids=(1, 3, 9)), 'layer 9 compresses nothing'),
    (dict(candidate_source_layer_id=2), 'one of index_source_layer_ids'), (dict(candidate_source_layer_id=1), 'later layers have another ratio'),
    (dict(compress_ratios=(0, 2, 2, 1, 2)), 'layer 4 reads entries of ratio 1'), (dict(candidate_topk_blocks=1), 'too few for index_topk=3')])
def test_roles_that_do_not_fit_are_refused_in_a_line(wrong, says):
    with pytest.raises(ValueError, match=says) as e: small_v41(40, **SMALL | wrong)
    assert '\n' not in str(e.value)

def test_sizes():
    big = V41Config()
    assert far_bytes(big)==890 and len(big.kinds)==40 and big.kinds[20][0]==far_kind(1)
    assert far_bytes(replace(big, compress_ratios=(0, 0)+(2,)*38))==2*356
    cache = SharedCache(W.cfg)
    W(IDS, cache=cache)
    kept = sum(m.entries.numel() for ring in cache.layers for m in getattr(ring, 'far', ()))
    assert kept==2*(8+6)*(11+22)      # rows x numbers of entry and key x entries of both sources

def test_entries_are_pairs_weighted_channel_by_channel():
    source,T = W.model.layers[1].self_attn.source,7
    x = torch.randn(2, T, 16, dtype=torch.float64)
    blocks = views(W.cfg, whole_rows(W.cfg, IDS[:,:T]))[far_kind(2)][1]
    kv,gate = source.kv_proj(x),source.gate_proj(x)
    for b in range(2):
        for j in range(T//2):
            entry = torch.zeros(8, dtype=torch.float64)
            for k in range(8):
                a,c = gate[b,2*j,k].exp(),gate[b,2*j+1,k].exp()
                entry[k] = (a*kv[b,2*j,k]+c*kv[b,2*j+1,k])/(a+c)
            assert_close(source.pool(x, blocks)[b,j], source.kv_norm(entry))

def test_indexers_learn_from_weights_of_what_was_picked():
    "Not from those of all entries behind a query, which the attention did not read"
    asked = []
    def noted(q, far, lse, seen):
        asked.append(seen)
        return far_weights(q, far, lse, seen)
    with patch.object(SharedAttention, 'far_weights', staticmethod(noted)): W(IDS, labels=IDS)
    assert len(asked)==3 and all(seen.sum(-1).max()==W.cfg.index_topk for seen in asked)
