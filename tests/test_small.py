"""The whole small V4.1: one loop written from the formulas (the chapter's), pieces, documents, replays, parts taken out, seams with bugs."""
import copy, json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
from nanowhale.beyond import onepass
from nanowhale.beyond.csa2 import Shared, SharedAttention, SharedCache, SharedTrunk, View
from nanowhale.beyond.engram import EngramBlock, engram_params
from nanowhale.beyond.halves import reading_flops, replayed_rows, replaying
from nanowhale.beyond.onepass import OnePassBlock, first_read, sublayer
from nanowhale.beyond.small import (WholeBlock, WholeConfig, WholeTrunk, WholeWhale, equal_v4, params_by_role, whole_bytes, whole_flops,
    whole_v41)
from nanowhale.fast.kernels import use
from nanowhale.generate.cache import Cache
from nanowhale.generate.sample import generate
from nanowhale.model.config import CSA, HCA, SWA, WhaleConfig
from nanowhale.model.hyper import collapse
from nanowhale.model.rope import rotate, rope_cos_sin
from nanowhale.model.visibility import far_rope
from nanowhale.model.whale import Whale
from nanowhale.presets import cache_bytes, count_flops, n_params, tiny
from nanowhale.train.optim import make_optimizers, split_params
from nanowhale.train.recipe import Recipe
from nanowhale.train.step import train_step

torch.set_num_threads(1)

def of_chapter(*starts):
    "The chapter's cells with these words: its loop and its planted bugs"
    names = dict(torch=torch, F=F, rotate=rotate, rope_cos_sin=rope_cos_sin, far_rope=far_rope, collapse=collapse, sublayer=sublayer,
        first_read=first_read, OnePassBlock=OnePassBlock, WholeBlock=WholeBlock, SharedAttention=SharedAttention, patch=patch)
    path = Path(__file__).parents[1]/'nbs/6_beyond/54_small.ipynb'
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    for start in starts: exec(next(c for c in cells if start in c), names)
    return names

CHAPTER = of_chapter('def naive_table', 'def naive_make', 'def swiglu', 'def naive_whale', 'def late_table')
naive_whale,BUGS = CHAPTER['naive_whale'],CHAPTER['bugs']

SMALL = dict(hidden_size=12, num_hidden_layers=5, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=6, o_lora_rank=4,
    sliding_window=4, index_n_heads=2, index_head_dim=6, index_topk=3, moe_intermediate_size=8, n_routed_experts=3, num_experts_per_tok=2,
    hc_mult=3, hc_sinkhorn_iters=2, compress_ratios=(0, 2, 2, 1, 1), kv_source_layer_ids=(1, 3), index_source_layer_ids=(1, 3, 4),
    candidate_source_layer_id=3, candidate_block_size=2, candidate_topk_blocks=3, engram_layers=(1, 3), engram_rows=30, engram_width=4)

def uneven(whale, seed=0):
    lot = torch.Generator().manual_seed(seed)
    for p in whale.parameters(): p.data = (p.ndim==1)*p.data+.4*torch.randn(p.shape, generator=lot)
    return whale.double()

def whale(kind=WholeWhale, **kw): return uneven(kind(whole_v41(40, **SMALL | kw))).requires_grad_(False)

W = whale()
IDS = torch.randint(1, 40, (2, 22), generator=torch.Generator().manual_seed(1))
FULL = W(IDS).logits

# ---------------------------------------------------------------- the loop

@pytest.mark.parametrize('change', [dict(), dict(engram_layers=(), candidate_source_layer_id=None),
    dict(engram_layers=(0,), engram_longest=4, engram_hashes=1, hc_mult=1), dict(yarn_factor=4.0, yarn_context=64, hc_mult=4, hc_sinkhorn_iters=20),
    dict(kv_source_layer_ids=(1, 2, 3, 4), index_source_layer_ids=(1, 2, 3, 4), index_topk=2)], ids=str)
def test_the_whole_is_the_loop(change):
    w = whale(**change)
    ids = IDS[:1,:10].clone()
    ids[0,6] = 0                                    # a document's mark, for the tables
    assert_close(w(ids).logits[0], naive_whale(w, ids[0].tolist()), atol=1e-9, rtol=1e-9)

def test_gradients_are_the_loops():
    w = copy.deepcopy(W).requires_grad_()
    names,ps = zip(*w.named_parameters())
    probe = torch.randn(9, 40, generator=torch.Generator().manual_seed(2)).double()
    mine,loops = (torch.autograd.grad((z*probe).sum(), ps, allow_unused=True) for z in (w(IDS[:1,:9]).logits[0], naive_whale(w, IDS[0,:9].tolist())))
    silent = {n for n,a in zip(names, mine) if a is None}
    assert silent=={n for n,b in zip(names, loops) if b is None}=={n for n in names if 'indexer' in n or '.k_' in n}
    for a,b in zip(mine, loops):
        if a is not None: assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert all(a.any() for n,a in zip(names, mine) if 'engram' in n)

# ---------------------------------------------------------------- pieces, documents, replays

def in_pieces(sizes, cache=None, docs=None, ids=IDS, w=W):
    cache,out,at = cache or SharedCache(w.cfg, spare=2),[],0
    for n in sizes:
        if cache.spare and at and docs is None:
            w((ids[:,at:at+1]+torch.tensor([1, 2]))%39+1, cache=cache)
            cache.rewind(2)
        out.append(w(ids[:,at:at+n], docs=None if docs is None else docs[:,at:at+n], cache=cache).logits)
        at += n
    return torch.cat(out, 1)

@pytest.mark.parametrize('n', range(1, 12))
def test_cached_is_full_for_every_prompt_around_a_half_pair(n):
    assert_close(in_pieces([n, 1, 1, 1, 22-n-3]), FULL, atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('kind,spare', [(SharedCache, 2), (Cache, 0)])
def test_pieces_of_any_size(kind, spare):
    lot = torch.Generator().manual_seed(3)
    for _ in range(2):
        sizes = []
        while sum(sizes)<22: sizes.append(min(22-sum(sizes), torch.randint(1, 7, (), generator=lot).item()))
        assert_close(in_pieces(sizes, kind(W.cfg, spare)), FULL, atol=1e-9, rtol=1e-9)

def test_nothing_is_told_of_later_tokens():
    for t in (1, 8, 13):
        later = IDS.clone()
        later[:,t:] = later[:,t:]%39+1
        assert_close(W(later).logits[:,:t], FULL[:,:t], atol=1e-12, rtol=0)
        assert (W(later).logits[:,t]-FULL[:,t]).abs().max()>1e-3

def test_documents_do_not_see_each_other():
    "In the tables it is the mark that divides them (chapter 50): without one, n-grams reach across"
    docs = (torch.arange(22)>=8).long().expand(2, -1)
    ids = IDS.clone()
    ids[:,[0, 8]] = 0
    both = W(ids, docs=docs).logits
    for part in (slice(0, 8), slice(8, 22)): assert_close(both[:,part], W(ids[:,part]).logits, atol=1e-4, rtol=1e-4)     # angles are float32
    assert_close(in_pieces([5, 1, 1, 4, 11], SharedCache(W.cfg), docs, ids), both, atol=1e-9, rtol=1e-9)
    assert (W(IDS, docs=docs).logits[:,8:]-W(IDS[:,8:]).logits).abs().max()>1e-2

@pytest.mark.parametrize('n', [1, 4, 7, 8, 15])
def test_exact_replay_is_the_full_pass(n):
    cache = SharedCache(W.cfg)
    with replaying(W, replayed_rows(W.cfg, True)): first = W(IDS[:,:n], cache=cache).logits[:,-1:]
    assert_close(first, FULL[:,n-1:n], atol=1e-9, rtol=1e-9)
    assert_close(W(IDS[:,n:n+2], cache=cache).logits, FULL[:,n:n+2], atol=1e-9, rtol=1e-9)

def test_a_bounded_replay_hands_on_the_last_rows():
    deep = whale(num_hidden_layers=6, compress_ratios=(0, 2, 2, 1, 1, 1))
    rows = replayed_rows(deep.cfg)
    assert rows==[4, 4] and replayed_rows(deep.cfg, True)==[7, 4]
    full = deep(IDS).logits
    with replaying(deep, rows): bounded = deep(IDS).logits
    assert bounded.shape[1]==4 and (bounded[:,-1]-full[:,-1]).abs().max()>1e-6
    with replaying(deep, replayed_rows(deep.cfg, True)): assert_close(deep(IDS).logits[:,-1], full[:,-1], atol=1e-9, rtol=1e-9)

def test_greedy_text_is_the_same_with_a_cache():
    w = copy.deepcopy(W).float()
    assert torch.equal(*(generate(w, IDS[:,:5], max_new_tokens=8, temperature=0, use_cache=c) for c in (True, False)))

# ---------------------------------------------------------------- parts taken out, to the bit

class TwoPass(WholeWhale): trunk,block = SharedTrunk,EngramBlock

def test_fresh_tables_add_nothing_and_can_learn():
    w,without = WholeWhale(W.cfg),WholeWhale(replace(W.cfg, engram_layers=()))
    without.load_state_dict({k: v for k,v in w.state_dict().items() if 'engram' not in k})
    a,b = w(IDS, labels=IDS),without(IDS, labels=IDS)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    a.loss.backward()
    assert all(block.engram.embed_tokens.weight.grad.any() for block in w.model.layers if hasattr(block, 'engram'))
    assert n_params(w)-n_params(without)==sum(engram_params(w.cfg, w.cfg.engram).values())

def test_constant_coefficients_are_v4s_hyper_connections():
    two,one = whale(TwoPass),whale()
    missing = one.load_state_dict(two.state_dict(), strict=False)
    assert not missing.missing_keys and {k.split('.')[-1] for k in missing.unexpected_keys}=={'hc_fn', 'hc_base', 'hc_scale'}
    assert not torch.equal(one(IDS).logits, two(IDS).logits)
    for name,p in (*two.named_parameters(), *one.named_parameters()):
        if name.endswith(('hc.fn', 'hc_fn')): p.zero_()
        if name.endswith(('hc.base', 'hc_base')): p.copy_(torch.arange(len(p)).double()/9)
    def constant(X): return (torch.arange(3).double()/9).sigmoid().expand(X.shape[:-1])+W.cfg.hc_eps
    with patch.object(onepass, 'first_read', constant): assert torch.equal(one(IDS).logits, two(IDS).logits)

def test_where_all_make_and_pick_nothing_is_shared():
    far = (1, 2, 3, 4)
    w = whale(kv_source_layer_ids=far, index_source_layer_ids=far, candidate_source_layer_id=None)
    full = w(IDS).logits
    def alone(attn, args): return (*args[:2], View(args[2].blocks, Shared()), *args[3:])
    hooks = [w.model.layers[i].self_attn.register_forward_pre_hook(alone) for i in far]
    assert torch.equal(w(IDS).logits, full)
    for h in hooks: h.remove()

# ---------------------------------------------------------------- the seams

@contextmanager
def slots_kept():
    slots = Shared()
    with patch.object(SharedTrunk, 'begin', staticmethod(lambda: slots)): yield

def singly(w):
    with slots_kept(): return in_pieces([8]+[1]*14, SharedCache(w.cfg), w=w)

def test_slots_that_are_kept_do_no_harm(): assert_close(singly(W), FULL, atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('bug,fresh,whole', [('the table after the read', False, True), ('`pre` not handed over', True, True),
    ("a later source's entries", False, False)])
def test_a_planted_bug_is_seen(bug, fresh, whole):
    "And by which test: a fresh whale, an uneven one, an uneven one token by token"
    young = WholeWhale(W.cfg).double()
    before = young(IDS).logits
    with BUGS[bug]:
        assert ((young(IDS).logits-before).abs().max()>1e-9)==fresh
        assert ((W(IDS).logits-FULL).abs().max()>1e-3)==whole
        off = (singly(W)-FULL).abs().amax((0, 2))
    assert off.max()>1e-3
    if not whole: assert off[:8].max()<1e-9 and (off[8::2]>1e-6).all()       # the prompt is right

def test_a_collapse_with_the_first_pre_is_seen():
    "The head reads with the last `pre`, and with no other"
    run = WholeTrunk.forward
    def wrong(trunk, *args):
        out = run(trunk, *args)
        trunk.hc_head.pre = first_read(out[0])
        return out
    with patch.object(WholeTrunk, 'forward', wrong): assert (W(IDS).logits-FULL).abs().max()>1e-3
    assert W.model.hc_head.pre is None

# ---------------------------------------------------------------- training, sizes

def test_it_trains_with_the_fast_functions():
    w = use(WholeWhale(W.cfg))
    kinds = split_params(w)
    assert {n for n in kinds['tables'] if 'engram' in n}=={f'model.layers.{i}.engram.embed_tokens.weight' for i in (1, 3)}
    recipe = Recipe(steps=8, context=21, batch_size=2)
    opts = [use(opt) for opt in make_optimizers(w, .01, .02)]
    losses = [train_step(w, w, opts, dict(input_ids=IDS, docs=torch.zeros_like(IDS)), recipe, i)['loss'] for i in range(8)]
    assert losses[-1]<losses[0]-.2 and w.model.layers[1].engram.embed_tokens.weight.any()
    plain = copy.deepcopy(w)
    use(plain, 'plain')
    assert_close(w(IDS).logits, plain(IDS).logits, atol=1e-3, rtol=1e-3)

def test_the_two_sizes_are_equal():
    v41,v4 = whole_v41(),equal_v4()
    sizes = [n_params(w) for w in (WholeWhale(v41), Whale(v4))]
    assert abs(sizes[0]/sizes[1]-1)<.01
    for T in (64, 128, 512): assert abs(sum(whole_flops(v41, T).values())/sum(count_flops(v4, T).values())-1)<.04
    assert (v41.num_hidden_layers, v41.hidden_size, v41.hc_mult)==(v4.num_hidden_layers, v4.hidden_size, v4.hc_mult)
    assert v41.kinds[0]==(SWA, 'moe') and v4.kinds[0]==(SWA, 'hash_moe') and v4.num_nextn_predict_layers==v41.num_nextn_predict_layers==0
    for cfg,kind in ((v41, WholeWhale), (v4, Whale)):
        found = params_by_role(kind(cfg))
        assert sum(found.values())==n_params(kind(cfg)) and ('tables' in found)==(kind is WholeWhale)
    assert params_by_role(Whale(tiny(64)))['mtp']>0      # a V4 with its second prediction
    assert whole_v41(50, hidden_size=32).vocab_size==50 and equal_v4(50).vocab_size==50

def test_counts():
    bare = replace(W.cfg, engram_layers=())
    for T in (1, 9, 100):
        head = 2*bare.hidden_size*(bare.vocab_size+bare.hc_mult)
        assert sum(whole_flops(bare, T).values())==pytest.approx(reading_flops(bare, T)+head)
    assert whole_flops(W.cfg, 9)['engram']>0==whole_flops(bare, 9)['engram']
    for T in (1, 3, 4, 21):
        cache = SharedCache(W.cfg)
        W(IDS[:1,:T], cache=cache)
        kept = sum(min(T, ring.size)*ring.kv.shape[2] for ring in cache.layers)
        for ring in cache.layers:
            for memory in getattr(ring, 'far', ()):
                kept += (0 if memory.entries is None else memory.entries.numel())+memory.tail.numel()*(memory.keep>1)
        assert whole_bytes(W.cfg, T, 1)==kept, T

def test_the_large_one_has_the_stated_sizes():
    big = WholeConfig()
    tables = engram_params(big, big.engram)
    assert round(tables['table']/1e9, 1)==196.6 and big.engram.columns==24
    with torch.device('meta'): layer = OnePassBlock(big, SWA)
    n = 40*sum(t.numel() for t in layer.state_dict().values())+2*big.vocab_size*big.hidden_size
    assert round(n/1e9)==552
    v4 = WhaleConfig(num_nextn_predict_layers=0, layer_types=[SWA]*2+[CSA,HCA]*20+[CSA])
    assert .4<whole_bytes(big, 2**20)/cache_bytes(v4, 2**20)<.5

@pytest.mark.parametrize('wrong,says', [(dict(engram_layers=(1, 4)), 'none may lie after layer 3, the last source'), (dict(engram_rows=0), 'at least 1')])
def test_tables_that_do_not_fit_are_refused_in_a_line(wrong, says):
    with pytest.raises(ValueError, match=says) as e: whole_v41(40, **SMALL | wrong)
    assert '\n' not in str(e.value)

def test_no_tables_are_none():
    assert whole_v41(engram_layers=()).engram is None and whole_v41().engram.layers==(1, 4)
    assert [hasattr(b, 'engram') for b in W.model.layers]==[False, True, False, True, False]
