"""Generation: every rule against transformers' own, cached against uncached decoding, padded rows against rows alone, whole
texts against transformers' `generate`, and streaming against decoding at once. Bugs of this chapter are planted and must show.

    pytest tests/test_sample.py                   all of it, with 8 configurations for cached = full = transformers, 80 tokens each
    python tests/test_sample.py --n 100           that comparison over 100 configurations, 300 tokens each: a table of worst errors
    python tests/test_sample.py --n 1 --seed 7    one configuration alone

Each configuration reads a left-padded batch three times: a prompt and then one by one, in pieces of random sizes with wrong
tokens read and taken back in between, and at once, by our full forward and by transformers'. Errors are relative to the largest logit
(or 1), at every position that is no padding. In float64 too, where a difference cannot be
rounding. `rounding` is how far our full forward in float32 lies from that in float64: some random weights amplify it beyond 1e-5, and
then two float32 computations that add in another order may differ by as much. 1e-5 or eight times it, if that is more, is allowed.
"""
import argparse, copy, random, re
from contextlib import nullcontext
from dataclasses import replace
import numpy as np, pytest, torch
from torch.testing import assert_close
from transformers.generation import logits_process as hf_rules
import nanowhale.generate.sample as gen
from nanowhale.model.config import WhaleConfig
from nanowhale.model.visibility import window_mask
from nanowhale.train.data import train_tokenizer
from nanowhale.generate.sample import (Rows, TextStream, docs_of, draw, generate, keep_min_p,
    keep_top_k, keep_top_p, left_pad, next_logits, penalize_repeats, scale_temperature, warp)
from nanowhale.fast.kernels import use
from nanowhale.train.evaluate import evaluating
from nanowhale.generate.cache import Cache
from nanowhale.model.whale import Whale
from test_parity import exact_angles, exactly, pair, randomise, random_config

def a_whale(seed=0, **changes):
    "A small random whale whose logits are far from each other, so that rounding never decides"
    sizes = dict(vocab_size=50, hidden_size=18, num_hidden_layers=2, num_attention_heads=4, head_dim=10, qk_rope_head_dim=6,
        q_lora_rank=7, o_groups=2, o_lora_rank=5, sliding_window=6, moe_intermediate_size=12, n_routed_experts=5,
        num_experts_per_tok=2, hc_mult=3, hc_sinkhorn_iters=3, initializer_range=0.4, swiglu_limit=2.0)
    torch.manual_seed(seed)
    return randomise(Whale(WhaleConfig(**{**sizes, **changes})))

def prompts(n, seed=0, longest=14, V=50):
    r = random.Random(seed)
    return [[r.randrange(2, V) for _ in range(r.randint(1, longest))] for _ in range(n)]

# ---------------------------------------------------------------- rules

LOGITS = torch.randn(8, 97, generator=torch.Generator().manual_seed(1))*torch.tensor([.1, .5, 1, 2, 3, 5, 10, 30])[:,None]
IDS = torch.randint(0, 97, (8, 20), generator=torch.Generator().manual_seed(2))
SEEN = torch.zeros(8, 97, dtype=torch.bool).scatter(1, IDS, True)

def same(ours, theirs): assert_close(ours.softmax(-1), theirs.softmax(-1), atol=2e-7, rtol=2e-5)

@pytest.mark.parametrize('t', [.05, .3, 1., 1.7, 8.])
def test_temperature_is_transformers(t): same(scale_temperature(LOGITS, t), hf_rules.TemperatureLogitsWarper(t)(IDS, LOGITS))

@pytest.mark.parametrize('k', [1, 2, 13, 96, 97, 500])
def test_top_k_is_transformers(k): same(keep_top_k(LOGITS, k), hf_rules.TopKLogitsWarper(k)(IDS, LOGITS))

@pytest.mark.parametrize('p', [1e-9, .01, .3, .77, .999, 1.])
def test_top_p_is_transformers(p): same(keep_top_p(LOGITS, p), hf_rules.TopPLogitsWarper(p)(IDS, LOGITS))

@pytest.mark.parametrize('p', [0., 1e-4, .05, .5, 1.])
def test_min_p_is_transformers(p): same(keep_min_p(LOGITS, p), hf_rules.MinPLogitsWarper(p)(IDS, LOGITS))

@pytest.mark.parametrize('penalty', [.7, 1., 1.3, 4.])
def test_penalty_is_transformers(penalty):
    same(penalize_repeats(LOGITS, SEEN, penalty), hf_rules.RepetitionPenaltyLogitsProcessor(penalty)(IDS, LOGITS))

def test_all_rules_in_transformers_order():
    theirs = LOGITS
    for rule in (hf_rules.RepetitionPenaltyLogitsProcessor(1.4), hf_rules.TemperatureLogitsWarper(.8), hf_rules.TopKLogitsWarper(30),
                 hf_rules.TopPLogitsWarper(.9), hf_rules.MinPLogitsWarper(.02)): theirs = rule(IDS, theirs)
    same(warp(LOGITS, SEEN, .8, 30, .9, .02, 1.4), theirs)

def test_rules_against_loops():
    for row in LOGITS.double():
        p = row.softmax(-1).tolist()
        order = sorted(range(97), key=lambda i: -p[i])
        for top_p in (.123, .567, .89):
            want,total = [],0.
            for i in order:
                if total>=top_p: break
                want.append(i); total += p[i]
            assert set(keep_top_p(row[None], top_p)[0].isfinite().nonzero()[:,0].tolist())==set(want)
            assert set(keep_min_p(row[None], top_p)[0].isfinite().nonzero()[:,0].tolist())=={i for i in order if p[i]>=top_p*p[order[0]]}
        assert set(keep_top_k(row[None], 9)[0].isfinite().nonzero()[:,0].tolist())==set(order[:9])

def test_no_setting_makes_nan_or_forbids_all():
    extreme = torch.tensor([[0., 0, 0], [1e30, -1e30, 0], [-1e38, -1e38, 1e38], [1e-30, 0, -1e-30]])
    for z in (extreme, extreme.double(), extreme.clamp(-1e4, 1e4).bfloat16(), extreme.clamp(-6e4, 6e4).half()):
        for t in (0, 1e-40, 1e-3, 1, 1e30, float('inf')):
            for cut in (dict(), dict(top_k=1), dict(top_p=1e-12), dict(top_p=1.), dict(min_p=1.), dict(min_p=0.)):
                p = warp(z, temperature=t, **cut).softmax(-1)
                assert p.isfinite().all() and (p.sum(-1)-1).abs().max()<1e-5, (z, t, cut)

def test_top_p_one_keeps_the_tail():
    z = torch.cat([torch.zeros(1, 100_000), torch.full((1, 29_280), -12.)], -1)   # sums rounded from the top pass 1 too early
    assert keep_top_p(z, 1.).isfinite().all()

def test_draws_follow_the_distribution():
    p = warp(LOGITS[:3], temperature=.8, top_p=.9).softmax(-1).double()
    g,n = torch.Generator().manual_seed(0),40_000
    for row in p:
        count = draw(row.log()[None].expand(n, -1), g).bincount(minlength=97).double()
        some = n*row>5
        assert count[row==0].sum()==0
        chi2,df = ((count-n*row)**2/(n*row))[some].sum().item(),max(1, int(some.sum())-1)
        assert chi2 < df+4*(2*df)**.5

# ---------------------------------------------------------------- the cache

both_kernels = pytest.mark.parametrize('kernels', ['plain', 'fast'])

@torch.inference_mode()
def one_by_one(whale, ids, docs=None, prefill=1):
    cache,out = Cache(whale.cfg),[]
    for t in range(prefill, ids.shape[1]+1):
        out.append(next_logits(whale, ids[:,:t], None if docs is None else docs[:,:t], cache))
    assert cache.length==ids.shape[1]
    assert all(c.kv.shape[1]==whale.cfg.sliding_window and c.length==ids.shape[1] for c in cache.layers)
    return torch.stack(out, 1)

@torch.inference_mode()
def error(whale, ids, docs=None, prefill=1):
    full = whale(ids, docs=docs).logits[:,prefill-1:]
    real = torch.ones_like(full[...,0]).bool() if docs is None else docs[:,prefill-1:]>=0
    return ((one_by_one(whale, ids, docs, prefill)-full)[real].abs().max()/full[real].abs().max().clamp(min=1)).item()

@both_kernels
@pytest.mark.parametrize('window,prefill', [(1, 1), (7, 3), (64, 100)])
def test_cached_is_full_at_300_positions(window, prefill, kernels):
    whale = use(a_whale(window, sliding_window=window), kernels)
    ids,docs = torch.randint(0, 50, (2,300)),torch.zeros(2, 300).long()
    docs[1,:9] = -1
    assert error(whale, ids, docs, prefill)<1e-5

@both_kernels
@pytest.mark.parametrize('seed', range(24))
def test_cached_is_full_over_configurations(seed, kernels):
    r = random.Random(seed)
    torch.manual_seed(seed)
    cfg,B,T = random_config(r)
    whale = use(randomise(Whale(cfg)).double(), kernels)
    with exact_angles(): assert error(whale, torch.randint(0, cfg.vocab_size, (B,T+5)), prefill=r.randint(1, T))<1e-10

LIMITS = dict(steps=1e-5, pieces=1e-5, full_hf=1e-5, steps_hf=1e-5, steps64=1e-10, pieces64=1e-10, full_hf64=1e-10)

@torch.inference_mode()
def by_pieces(whale, ids, docs, sizes, spare):
    "Cached logits, each piece followed by as many wrong tokens as can be taken back"
    cache,out = Cache(whale.cfg, spare),[]
    for at in torch.arange(ids.shape[1]).split(sizes):
        wrong = torch.randint(0, whale.cfg.vocab_size, (len(ids), max(0, spare+1-len(at)) if cache.length else 0))
        d = torch.cat([docs[:,at], docs[:,-1:].expand_as(wrong)], 1)
        out.append(whale(torch.cat([ids[:,at], wrong], 1), docs=d, cache=cache).logits[:,:len(at)])
        cache.rewind(wrong.shape[1])
    assert cache.length==ids.shape[1] and all(c.kv.shape[1]==whale.cfg.sliding_window+spare for c in cache.layers)
    return torch.cat(out, 1)

def random_sizes(r, W, T):
    sizes = []
    while sum(sizes)<T: sizes.append(min(T-sum(sizes), r.choice([1, 2, 3, r.randint(1, 9), max(1, W-1), W, W+1, 2*W+1])))
    return sizes

def compare(seed, draw=0, T=300, floats=('', '64'), kernels='fast'):
    "Worst errors of the configuration drawn from `seed`; another `draw` gives the same one other weights and tokens"
    r = random.Random(seed)
    cfg,B,_ = random_config(r)
    windows = [1, 2, 3, r.randint(4, 40), r.randint(41, T-1), T, T+1, T+100]
    cfg = replace(cfg, sliding_window=r.choice(windows), num_hidden_layers=min(3, cfg.num_hidden_layers))
    W,spare = cfg.sliding_window,r.randint(0, 5)
    sizes,prefill,pads = random_sizes(r, W, T),r.randint(1, 2*W),[0]+[r.choice([1, W, r.randint(0, 250)]) for _ in range(B-1)]
    torch.manual_seed(seed+1_000_003*draw)
    whale,hf = pair(cfg)
    use(whale, kernels)
    ids,real = torch.randint(0, cfg.vocab_size, (B, T)),torch.arange(T)>=torch.tensor([min(p, T-10) for p in pads])[:,None]
    docs,got = real.long()-1,dict(seed=seed, cfg=cfg, B=B, again=bool(draw))
    full = None
    def apart(a, b): return ((a-b)[real].abs().max()/b[real].abs().max().clamp(min=1)).item()
    for bits in floats:
        if bits: whale,hf = copy.deepcopy(whale).double(),copy.deepcopy(hf).double()
        start = min(prefill, T)
        with torch.inference_mode(), exactly() if bits else nullcontext():
            before,full = full,whale(ids, docs=docs).logits
            theirs = hf(ids, attention_mask=real.long(), use_cache=False).logits
            steps = torch.cat([by_pieces(whale, ids[:,:start], docs[:,:start], [start], 0), one_by_one(whale, ids, docs, start)[:,1:]], 1)
            pieces = by_pieces(whale, ids, docs, sizes, spare)
        got |= {'steps'+bits: apart(steps, full), 'pieces'+bits: apart(pieces, full), 'full_hf'+bits: apart(full, theirs)}
        if not bits: got['steps_hf'] = apart(steps, theirs)
        elif before is not None: got['rounding'] = apart(before, full)
    return got

def allowed(got, what): return LIMITS[what] if what.endswith('64') else max(LIMITS[what], 8*got.get('rounding', 0))
def beyond(got): return [k for k in LIMITS if k in got and not got[k]<=allowed(got, k)]

def compare_twice(seed, **kw):
    "As in test_parity.py: once more with other weights if float32 alone is beyond its limit, since rounding does not return and a bug does"
    got = compare(seed, **kw)
    return compare(seed, 1, **kw) if beyond(got) and not any(k.endswith('64') for k in beyond(got)) else got

@both_kernels
@pytest.mark.parametrize('seed', range(8))
def test_cached_is_full_is_transformers(seed, kernels):
    got = compare_twice(seed, T=80, floats=['', '64'], kernels=kernels)   # float32 is measured by what it costs
    for k in LIMITS: assert got[k]/allowed(got, k)<=1., (k, got)

def test_float64_cache_is_exact():
    whale = a_whale().double()
    with exact_angles(): assert error(whale, torch.randint(0, 50, (2,40)), prefill=4)<1e-10

def test_bug_wrong_position_shows(monkeypatch):
    import nanowhale.model.visibility as visibility
    whale,ids,real = a_whale(),torch.randint(0, 50, (2,30)),visibility.rope_cos_sin
    assert error(whale, ids)<1e-5
    monkeypatch.setattr(visibility, 'rope_cos_sin', lambda pos, *a: real(pos-pos[0], *a))   # each pass counts from 0
    assert error(whale, ids)>1e-2

def test_bug_window_off_by_one_shows():
    whale,ids = a_whale(),torch.randint(0, 50, (2,30))
    def narrow(q_pos, k_pos, W, *docs): return window_mask(q_pos, k_pos, W-(len(q_pos)==1), *docs)
    whale.see = narrow   # a step sees one key less than the full pass
    assert error(whale, ids)>1e-2

def test_bug_last_token_only_shows():
    whale,ids = a_whale(),torch.randint(0, 50, (2,12))
    with torch.inference_mode(): assert (whale(ids[:,-1:]).logits[:,-1]-whale(ids).logits[:,-1]).abs().max()>1e-2

# ---------------------------------------------------------------- whole texts

@torch.inference_mode()
def slow_greedy(whale, ids, n):
    for _ in range(n): ids = torch.cat([ids, whale(ids).logits[:,-1].argmax(-1)[:,None]], 1)
    return ids

def test_greedy_is_the_slow_loop_cached_or_not():
    whale,ids = a_whale(),torch.randint(2, 50, (3,5))
    want = slow_greedy(whale, ids, 40)
    for use_cache in (True, False): assert generate(whale, ids, 40, temperature=0, eos_token_id=None, use_cache=use_cache).equal(want)

@pytest.mark.parametrize('seed', range(5))
def test_greedy_ids_are_transformers(seed):
    "50 prompts of unequal lengths, padded, ended by EOS, over the window's edge: ten for each of five configurations"
    r = random.Random(seed+100)
    torch.manual_seed(seed)
    cfg = WhaleConfig(**{**random_config(r)[0].to_dict(), 'vocab_size':60, 'bos_token_id':0, 'eos_token_id':1, 'pad_token_id':1,
                         'initializer_range':.4, 'sliding_window':(1, 3, 5, 8, 100)[seed]})
    whale,hf = pair(cfg)
    ids,mask = left_pad(prompts(10, seed, V=60), 1)
    end = generate(whale, ids, 12, temperature=0, eos_token_id=None, attention_mask=mask)[seed,-1].item()   # some row will meet it
    cached = cfg.sliding_window>1   # transformers 5.23 slices its cache by [-W+1:], which keeps everything at W=1
    theirs = hf.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40, eos_token_id=end, use_cache=cached)
    ours = generate(whale, ids, 40, temperature=0, eos_token_id=end, attention_mask=mask)
    assert ours.equal(theirs)
    assert (ours[:,ids.shape[1]:]==end).any()

def test_repetition_penalty_is_transformers():
    torch.manual_seed(2)
    whale,hf = pair(a_whale(2).cfg)
    ids = torch.randint(2, 50, (4,6))
    kw = dict(max_new_tokens=30, repetition_penalty=1.7, eos_token_id=None)
    ours = generate(whale, ids, temperature=0, **kw)
    assert ours.equal(hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **kw))
    assert not ours.equal(generate(whale, ids, temperature=0, **{**kw, 'repetition_penalty':1.}))

@pytest.mark.parametrize('penalty', [1., 1.6])
@pytest.mark.parametrize('use_cache', [True, False])
def test_padded_rows_are_rows_alone(penalty, use_cache):
    whale,ps = a_whale(3),prompts(9, 3)
    ids,mask = left_pad(ps, 7)   # 7 is also a real token: padding must not count as a repetition
    kw = dict(temperature=0, eos_token_id=None, repetition_penalty=penalty, use_cache=use_cache)
    out = generate(whale, ids, 25, attention_mask=mask, **kw)
    for row,p in zip(out, ps):
        assert row[ids.shape[1]-len(p):].tolist()==generate(whale, torch.tensor([p]), 25, **kw)[0].tolist()

def test_bug_padding_seen_shows(monkeypatch):
    whale,ps = a_whale(3),prompts(9, 3)
    ids,mask = left_pad(ps, 7)
    want = generate(whale, ids, 25, temperature=0, eos_token_id=None, attention_mask=mask)
    monkeypatch.setattr(gen, 'docs_of', torch.zeros_like)
    assert not generate(whale, ids, 25, temperature=0, eos_token_id=None, attention_mask=mask).equal(want)

def test_mask_of_ones_is_no_mask():
    whale,ids = a_whale(),torch.randint(2, 50, (2,5))
    a,b = (generate(whale, ids, 9, temperature=0, attention_mask=m) for m in (None, torch.ones_like(ids)))
    assert a.equal(b)

def test_each_row_stops_at_its_eos():
    whale,ids = a_whale(1),torch.randint(2, 50, (4,5))
    free = generate(whale, ids, 30, temperature=0, eos_token_id=None)[:,5:]
    ends = [free[0,3].item(), free[1,7].item()]
    out = generate(whale, ids, 30, temperature=0, eos_token_id=ends)[:,5:]
    stops = [next((i for i,t in enumerate(row.tolist()) if t in ends), 29) for row in free]
    assert out.shape[1]==max(stops)+1 and len(set(stops))>1
    for row,want,stop in zip(out, free, stops):
        assert row[:stop+1].equal(want[:stop+1]) and (row[stop+1:]==ends[0]).all()
    padded = a_whale(1, pad_token_id=2)
    out = generate(padded, ids, 30, temperature=0, eos_token_id=ends)[:,5:]
    assert all((row[stop+1:]==2).all() for row,stop in zip(out, stops))

def test_default_eos_is_the_configs():
    whale,ids = a_whale(1),torch.randint(2, 50, (1,5))
    end = generate(whale, ids, 30, temperature=0, eos_token_id=None)[0,9].item()
    out = generate(a_whale(1, eos_token_id=end), ids, 30, temperature=0)
    assert out[0,-1]==end and out.shape[1]<35
    assert generate(a_whale(1, eos_token_id=None), ids, 30, temperature=0).shape==(1,35)

def test_seeds():
    whale,ids = a_whale(),torch.randint(2, 50, (2,5))
    run = lambda **kw: generate(whale, ids, 20, eos_token_id=None, **kw)
    state = torch.get_rng_state()
    a,b,c = run(seed=1),run(seed=1, use_cache=False),run(seed=2)
    run(temperature=0)
    assert a.equal(b) and not a.equal(c)
    assert torch.get_rng_state().equal(state)   # a seed of its own, and greedy choice, leave torch's randomness alone
    torch.manual_seed(5); d = run()
    torch.manual_seed(5); e = run()
    assert d.equal(e)
    assert run(seed=3, top_k=1).equal(run(temperature=0))

def test_no_new_tokens_is_the_prompt():
    ids = torch.randint(2, 50, (2,5))
    out = generate(a_whale(), ids, 0)
    assert out.equal(ids) and out.data_ptr()!=ids.data_ptr()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    whale = a_whale(eos_token_id=None).to(dtype)
    ids,mask = left_pad(prompts(3))
    out = generate(whale, ids, 12, top_p=.9, seed=0, attention_mask=mask)
    assert out.dtype==torch.long and out.shape==(3,ids.shape[1]+12)

def test_int32_and_bool_are_fine():
    ids,mask = left_pad(prompts(3))
    want = generate(a_whale(), ids, 6, temperature=0, attention_mask=mask)
    assert generate(a_whale(), ids.int(), 6, temperature=0, attention_mask=mask.bool()).equal(want)

def test_modes_are_restored_even_after_an_error():
    whale,ids = a_whale(),torch.randint(2, 50, (1,3))
    whale.train(); whale.model.layers[0].eval()
    modes = [m.training for m in whale.modules()]
    during = []
    generate(whale, ids, 2, on_token=lambda t: during.append(any(m.training for m in whale.modules())))
    def stop(t): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): generate(whale, ids, 2, on_token=stop)
    assert modes==[m.training for m in whale.modules()] and during==[False, False]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

def test_generated_ids_can_be_trained_on():
    whale = a_whale()
    out = generate(whale, torch.randint(2, 50, (2,4)), 6, seed=0, eos_token_id=None)
    whale(out, labels=out).loss.backward()
    assert whale.lm_head.weight.grad.abs().sum()>0

def test_on_token_gets_every_column():
    whale,ids,columns = a_whale(),torch.randint(2, 50, (3,4)),[]
    out = generate(whale, ids, 7, seed=0, eos_token_id=None, on_token=columns.append)
    assert torch.stack(columns, 1).equal(out[:,4:])

IDS3 = torch.tensor([[5,6,7]])
@pytest.mark.parametrize('ids,kw,message', [
    ([[5,6]], {}, 'torch.tensor'), (torch.tensor([5,6]), {}, 'batch, time'), (torch.tensor([[5.,6.]]), {}, 'whole numbers'),
    (torch.zeros(1,0).long(), {}, 'at least one token'), (torch.zeros(0,3).long(), {}, 'at least one token'),
    (torch.tensor([[5,50]]), {}, 'outside the vocabulary'), (torch.tensor([[-1,5]]), {}, 'outside the vocabulary'),
    (torch.tensor([[-100,5]]), {}, 'outside the vocabulary'),
    (IDS3, dict(max_new_tokens=-1), 'max_new_tokens=-1'), (IDS3, dict(temperature=-.1), 'temperature=-0.1'),
    (IDS3, dict(temperature=float('nan')), 'temperature=nan'), (IDS3, dict(top_k=-1), 'top_k=-1'), (IDS3, dict(top_p=0.), 'top_p=0.0'),
    (IDS3, dict(top_p=1.1), 'top_p=1.1'), (IDS3, dict(min_p=-.1), 'min_p=-0.1'), (IDS3, dict(min_p=1.5), 'min_p=1.5'),
    (IDS3, dict(repetition_penalty=0.), 'repetition_penalty=0.0'), (IDS3, dict(repetition_penalty=1e-300), 'repetition_penalty=1e-300'),
    (IDS3, dict(top_k=4.), 'top_k=4.0: need a whole number'), (IDS3, dict(top_k='4'), "top_k='4'"), (IDS3, dict(top_k=True), 'top_k=True'),
    (IDS3, dict(top_k=torch.tensor([4,5])), 'top_k=tensor'), (IDS3, dict(max_new_tokens=2.5), 'max_new_tokens=2.5'),
    (IDS3, dict(temperature='hot'), "temperature='hot'"), (IDS3, dict(temperature=None), 'temperature=None'),
    (IDS3, dict(temperature=float('inf')), 'temperature=inf'), (IDS3, dict(top_p=[.5]), r'top_p=\[0.5\]'), (IDS3, dict(min_p='x'), "min_p='x'"),
    (IDS3, dict(top_p=2), 'above 0 and at most 1'), (IDS3, dict(repetition_penalty=None), 'repetition_penalty=None'),
    (IDS3, dict(seed=.5), 'seed=0.5'), (IDS3, dict(seed=2**64), 'seed=18446744073709551616'), (IDS3, dict(attention_mask=[[1,1,1]]), 'need a tensor'),
    *((IDS3, dict(eos_token_id=e), f'eos_token_id={re.escape(says)}') for e,says in
      ((1.5, '1.5'), ('7', "'7'"), ([4, None, 'x'], "'x'"), (torch.tensor([4.]), '4.0'), (np.array([.5]), '0.5'), (50, '50'), (-1, '-1'), (True, 'True'))),
    (IDS3, dict(attention_mask=torch.ones(1,2)), 'attention_mask: shape'),
    (IDS3, dict(attention_mask=torch.tensor([[1,1,0]])), 'pad on the left'),
    (IDS3, dict(attention_mask=torch.tensor([[1,0,1]])), 'pad on the left'),
    (IDS3, dict(attention_mask=torch.tensor([[0,0,0]])), 'pad on the left'),
    (IDS3, dict(attention_mask=torch.tensor([[0,2,2]])), 'pad on the left')])
def test_bad_calls_get_one_clear_line(ids, kw, message):
    with pytest.raises(ValueError, match=message) as e: generate(a_whale(), ids, **{'max_new_tokens':2, **kw})
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('eos', [7, [7], (7, 9), {7}, range(7, 8), np.int64(7), [np.int32(7), 9], np.array(7), np.array([[7, 9]]),
    torch.tensor(7), torch.tensor([9, 7]), torch.tensor([[7], [9]]), [torch.tensor(7), torch.tensor([9])]], ids=repr)
def test_an_end_in_any_shape(eos):
    "Ints, lists, numpy's and tensors of any rank: a row ends at 7, whichever way that was said, and nothing else changes"
    whale,ids = a_whale(),torch.randint(10, 50, (3,4))
    rows = Rows(whale, ids[:2], eos_token_id=eos)
    rows.add(torch.tensor([7,3]))
    assert rows.done.tolist()==[True,False] and {7}<=set(rows.ends)<={7,9} and all(type(i) is int for i in rows.ends)
    plain = generate(whale, ids, 12, seed=0, eos_token_id=rows.ends)
    assert generate(whale, ids, 12, seed=0, eos_token_id=eos).equal(plain)

def test_numbers_in_any_coat():
    "numpy's numbers and tensors of one give what Python's give"
    whale,ids = a_whale(),torch.randint(2, 50, (2,4))
    plain = generate(whale, ids, 6, temperature=.5, top_k=5, top_p=.9, min_p=.1, repetition_penalty=1.2, seed=3)
    for whole,broken in ((np.int32, np.float32), (torch.tensor, torch.tensor)):
        rules = {k: broken(v) for k,v in dict(temperature=.5, top_p=.9, min_p=.1, repetition_penalty=1.2).items()}
        assert generate(whale, ids, whole(6), top_k=whole(5), seed=whole(3), **rules).equal(plain)

def test_no_limit_has_two_names():
    "`top_k` 0 and None, as in transformers"
    whale,ids = a_whale(),torch.randint(2, 50, (2,4))
    assert generate(whale, ids, 6, seed=0, top_k=0).equal(generate(whale, ids, 6, seed=0))

@pytest.mark.parametrize('temperature', [0, 1])
def test_broken_weights_are_named(temperature):
    whale = a_whale()
    with torch.no_grad(): whale.lm_head.weight[3] = float('nan')
    with pytest.raises(ValueError, match='not finite'): generate(whale, IDS3, 3, temperature=temperature)

def test_left_pad():
    ids,mask = left_pad([[1,2,3],[4]], 9)
    assert ids.tolist()==[[1,2,3],[9,9,4]] and mask.tolist()==[[1,1,1],[0,0,1]]
    assert docs_of(mask).tolist()==[[0,0,0],[-1,-1,0]]
    for bad in ([], [[1],[]]):
        with pytest.raises(ValueError, match='empty prompt'): left_pad(bad)

def test_evaluating_nests_and_keeps_gradients_off():
    whale = a_whale().train()
    with evaluating(whale):
        with evaluating(whale): pass
        assert not whale.training and torch.is_inference_mode_enabled()
    assert whale.training and not torch.is_inference_mode_enabled()

# ---------------------------------------------------------------- streaming

class Bytes:
    def decode(self, ids, skip_special_tokens=True): return bytes(i for i in ids if i<256).decode(errors='replace')

def stream(tokenizer, ids):
    out = []
    with TextStream(tokenizer, out.append) as s:
        for i in ids: s(torch.tensor([i]))
    assert all(out)
    return out

TEXTS = ['plain', 'à bientôt, où ça?', 'whale 🐋🐳 sea 🌊', '日本語のくじら', 'e\u0301 combining', '👩‍👩‍👧 family', 'नमस्ते', '\ufffd real one \ufffd', '']

@pytest.mark.parametrize('text', TEXTS)
def test_stream_of_bytes_is_the_text(text):
    out = stream(Bytes(), text.encode())
    assert ''.join(out)==text
    assert all(len(piece)==1 or '\ufffd' in text for piece in out)

def test_stream_of_random_bytes_is_what_decoding_gives():
    r = random.Random(0)
    for _ in range(300):
        data = bytes(r.choice([r.randrange(256), 0xF0, 0x9F, 0x90, 0x8B, 0xE2, 0x61]) for _ in range(r.randint(0, 40)))
        assert ''.join(stream(Bytes(), data))==data.decode(errors='replace')

def test_stream_of_a_real_tokenizer_is_the_text():
    tok = train_tokenizer(['the whale sings to the sea', 'à bientôt dit la mer']*3, 270)
    for text in [*TEXTS, 'the whale sings: à bientôt 🐋 the sea']:
        ids = tok(text, add_special_tokens=False).input_ids
        for decoder in (tok, tok.backend_tokenizer):
            out = stream(decoder, [tok.bos_token_id, *ids, tok.eos_token_id])
            assert ''.join(out)==text
            assert '\ufffd' in text or not any('\ufffd' in piece for piece in out)

def test_stream_shows_text_at_once_and_follows_its_row(capsys):
    s = TextStream(Bytes(), row=1)
    s(torch.tensor([65,66])); assert capsys.readouterr().out=='B'
    s(torch.tensor([65,0xC3])); assert capsys.readouterr().out==''
    s(torch.tensor([65,0xA0])); assert capsys.readouterr().out=='à'
    s(torch.tensor([65,0xC3])); s.close(); assert capsys.readouterr().out=='\ufffd'

def test_stream_is_cheap():
    "Pending tokens are decoded, not the whole text again"
    class Counting(Bytes):
        seen = 0
        def decode(self, ids, **kw): Counting.seen += len(ids); return super().decode(ids, **kw)
    stream(Counting(), b'x'*1000)
    assert Counting.seen<5000

# ---------------------------------------------------------------- the table

def main():
    p = argparse.ArgumentParser(description='Cached decoding, the full forward and transformers over random configurations')
    p.add_argument('--n', type=int, default=100, help='configurations (default: 100)')
    p.add_argument('--seed', type=int, default=0, help='seed of the first one (default: 0)')
    a = p.parse_args()
    rows = [compare_twice(s) for s in range(a.seed, a.seed+a.n)]
    print(f'{a.n} configurations (seeds {a.seed} to {a.seed+a.n-1}), 300 positions each; drawn again: {[r["seed"] for r in rows if r["again"]] or "none"}')
    print(f'{"":10}{"allowed":>10}{"median":>10}{"worst":>10}  seed')
    for what in [*LIMITS, 'rounding']:
        rows.sort(key=lambda r: r[what])
        print(f'{what:10}{LIMITS.get(what, 0):10.0e}{rows[len(rows)//2][what]:10.1e}{rows[-1][what]:10.1e}  {rows[-1]["seed"]}')
    over = [r for r in rows if any(r[k]>limit for k,limit in LIMITS.items())]
    print(f'above 1e-5, where float32 itself is that coarse: {len(over)}')
    for r in over: print(f'  seed {r["seed"]}: worst {max(r[k] for k in LIMITS if not k.endswith("64")):.1e}, rounding {r["rounding"]:.1e}')
    print('windows: ' + ', '.join(map(str, sorted({r["cfg"].sliding_window for r in rows}))))
    if bad := sorted(r['seed'] for r in rows if beyond(r)): raise SystemExit(f'FAILED for seeds {bad}')

if __name__=='__main__': main()
