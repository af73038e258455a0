"Block drafting: every way the real program can go, added up; lessons against drafting; refusals in half-full blocks; planted bugs"
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest.mock import patch
import pytest, torch
from torch.testing import assert_close
import beyond_dspark as beyond
import nanowhale.beyond.dspark as ds
import nanowhale.generate.speculate as spec
from nanowhale.beyond.csa2 import SharedWhale, small_v41
from nanowhale.beyond.dspark import (BlockDrafter, DSpark, Drafted, SparkConfig, accepted, lessons, serial_flops, spark_flops, spark_loss,
    speculate_blocks, tapping)
from nanowhale.fast.graph import Decoder
from nanowhale.generate.cache import Cache
from nanowhale.generate.sample import Rows, generate, left_pad
from nanowhale.generate.speculate import Drafter
from nanowhale.lab.ablate import setup
from nanowhale.model.config import CSA, HCA, SWA, WhaleConfig
from nanowhale.model.whale import Whale
from test_speculate import exact

CFG = WhaleConfig(vocab_size=7, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, head_dim=10, qk_rope_head_dim=6, q_lora_rank=7,
    o_groups=3, o_lora_rank=5, sliding_window=5, moe_intermediate_size=8, n_routed_experts=3, num_experts_per_tok=2, hc_mult=2, hc_sinkhorn_iters=2,
    layer_types=(SWA,CSA,HCA), mlp_layer_types=('hash_moe','moe','moe'), compress_rate_csa=3, compress_rate_hca=4, index_n_heads=2, index_head_dim=8,
    index_topk=2, initializer_range=.5, bos_token_id=None, eos_token_id=None)

SPARK = SparkConfig((1, 2), 2, 3, 2)

def pair(seed=0, spark=SPARK, cls=DSpark, **changes):
    "A whale with every kind of layer and a drafter for it, both rough, in float64"
    torch.manual_seed(seed)
    cfg = replace(CFG, **changes)
    return Whale(cfg).double().requires_grad_(False), cls(cfg, spark).double().requires_grad_(False)

# ---------------------------------------------------------------- the distribution

def every_way(program, first=()):
    "Outcome -> probability of a program whose random decisions all go through `choose(weights)`: it is run once for each way it can go"
    found,todo = Counter(),[first]
    while todo:
        script,taken,weight = todo.pop(),[],[1.]
        def choose(weights):
            options = [i for i,w in enumerate(weights) if w>1e-14]
            if len(taken)<len(script): i = script[len(taken)]
            else:
                i = options[0]
                todo.extend([(*taken, j) for j in options[1:]])
            taken.append(i)
            weight[0] *= weights[i]
            return i
        found[program(choose)] += weight[0]
    return found

def written(whale, spark, ids, n, drafter=BlockDrafter, **kw):
    "Probability of each text from token 0 on that `speculate_blocks` writes, by its own draws, acceptance, residual and rewinding"
    real = spec.verify
    def program(choose):
        def chosen(logits, generator=None): return torch.tensor([choose(logits.softmax(-1)[0].tolist())])
        def verify(p, q, drafts, generator=None):
            d = drafts[...,None]
            keep = (p[:,:-1].gather(-1, d)/q.gather(-1, d)).clamp(max=1)[0,:,0].tolist()
            k = choose([math.prod(keep[:i])*(1-keep[i]) for i in range(len(keep))]+[math.prod(keep)])
            with patch.object(torch, 'rand', lambda *a, **kw: torch.tensor([[0.]*k+[1.]*(len(keep)-k)]).double()): return real(p, q, drafts)
        ours,theirs = patch.multiple(ds, draw=chosen, BlockDrafter=drafter),patch.multiple(spec, draw=chosen, verify=verify)
        with ours, theirs:
            return tuple(speculate_blocks(whale, spark, ids, n, **kw)[0,ids.shape[1]:].tolist())
    return every_way(program, (0, 0))   # the first round has no drafts to judge; it draws token 0

def furthest(found, want): return max(abs(found[t]-want.get(t, 0)) for t in found.keys() | want.keys() if t[0]==0)

TWO = dict(spark=SparkConfig((0, 1), 1, 2, 2), vocab_size=2, index_topk=1, num_hidden_layers=1, layer_types=(CSA,),
    mlp_layer_types=('moe',))   # two words, two drafts

@pytest.mark.parametrize('seed,T,n,kw', [(4, 4, 4, {}), (10, 5, 4, dict(least=.35)), (3, 3, 3, dict(temperature=1.5, repetition_penalty=1.4))])
def test_the_whole_program_writes_the_trunks_distribution(seed, T, n, kw):
    "Rounds of two drafts, of one and of none; refusals at every place; stops by confidence, which leave one where there is room for two"
    whale,spark = pair(seed, **TWO)
    ids = torch.tensor([[1, 0, 0, 1, 0]])[:,:T]
    stops = []
    found = written(whale, spark, ids, n, on_round=lambda *r: stops.append(r), **kw)
    assert furthest(found, exact(whale, ids, n, **{k: v for k,v in kw.items() if k!='least'}))<1e-12
    if not kw: assert {(2, 0), (2, 1), (2, 2), (1, 0), (1, 1)}<=set(stops)
    if 'least' in kw: assert {n for n,_ in stops}=={0, 1}

class Hasty(BlockDrafter):
    "Bug: all places are drawn at once, and corrected afterwards"
    def draft(self, X, rows, n, generator=None, least=0., **rules):
        if not n: return super().draft(X, rows, n)
        self.read(X.shape[1])
        h = self.hidden(rows)[:,:n]
        base = self.whale.lm_head(self.spark.norm(h))
        drafts = torch.stack([ds.draw(base[:,k]) for k in range(n)], 1)
        logits,sure = self.spark.heads(h, torch.cat([rows.ids[:,-1:], drafts[:,:-1]], 1), self.whale.lm_head)
        return Drafted(drafts, logits.softmax(-1), sure.sigmoid())

class Chooser(BlockDrafter):
    "Bug: what was unlikely to be drawn is dropped after it was drawn"
    def draft(self, *args, **rules):
        d = super().draft(*args, **rules)
        on = int((d.q.gather(-1, d.drafts[...,None])[0,:,0]>.5).long().cumprod(0).sum())
        return Drafted(*(x[:,:on] for x in d))

@pytest.mark.parametrize('drafter,n', [(Hasty, 4), (Chooser, 3)])
def test_bugs_of_drafting_change_the_distribution(drafter, n):
    whale,spark = pair(4, **TWO)
    ids = torch.tensor([[1, 0, 0, 1]])
    assert furthest(written(whale, spark, ids, n, drafter), exact(whale, ids, n))>1e-3

@pytest.mark.parametrize('B', [1, 3])
def test_stop_is_decided_before_the_draw(B):
    "Whatever is drawn at a place, whether there is a place is already settled; a batch goes on while one of its rows is sure"
    whale,spark = pair(1)
    ids = torch.randint(7, (B, 9))
    with torch.inference_mode(), tapping(whale, (1, 2)) as taps:
        X = whale(ids[:,:-1]).streams
        sure = BlockDrafter(whale, spark, taps).draft(X, Rows(whale, ids), 3, torch.Generator().manual_seed(0)).confidence
        for least in (0., .1, .3, .6, .99):
            d = BlockDrafter(whale, spark, taps).draft(X, Rows(whale, ids), 3, torch.Generator().manual_seed(0), least=least)
            n = int((sure.cumprod(-1).amax(0)>=least).sum())
            assert [x.shape[1] for x in d]==[n]*3 and d.confidence.equal(sure[:,:n])

def test_refused_drafts_leave_no_trace_in_the_context():
    "Of a pass over the text and two drafts, a drafter reads the text"
    whale,spark = pair(2)
    ids = torch.randint(7, (2, 8))
    kept = []
    for read in (ids, ids[:,:6]):
        with torch.inference_mode(), tapping(whale, (1, 2)) as taps:
            whale(read)
            drafter = BlockDrafter(whale, spark, taps)
            drafter.read(6)
        kept.append(drafter.kept)
    for a,b in zip(*kept, strict=True): assert_close(a, b)
    assert len(kept[0])==2

# ---------------------------------------------------------------- caches

@pytest.mark.parametrize('window', [1, 4])
def test_greedy_is_plain_decoding(window):
    "Prompts of every length around half-full blocks, some texts ended; the drafter's weights are the trunk's own luck"
    whale,spark = pair(window, sliding_window=window)
    rounds = []
    for T in (1, 2, 4, 7):
        ids = torch.randint(7, (1, T))
        kw = dict(temperature=0, eos_token_id=[None, 3][T%2])
        assert speculate_blocks(whale, spark, ids, 6, on_round=lambda *r: rounds.append(r), **kw).equal(generate(whale, ids, 6, **kw))
    assert len({used for n,used in rounds if n==3})>1

def test_a_v41_may_draft_through_the_plain_cache():
    "Its layers have compressors that never read anything; a compressed step says that it cannot go on there"
    torch.manual_seed(0)
    whale = SharedWhale(small_v41(40)).eval().requires_grad_(False)
    spark = DSpark(whale.cfg, SparkConfig((0, 1), 1, 3, 2)).eval().requires_grad_(False)
    ids = torch.randint(2, 40, (1, 9))
    assert speculate_blocks(whale, spark, ids, 12, temperature=0).equal(generate(whale, ids, 12, temperature=0, use_cache=False))
    with pytest.raises(ValueError, match='layers of V4 alone'): generate(whale, ids, 4, decoder=partial(Decoder, compile=False))

def test_greedy_batch_of_padded_prompts():
    whale,spark = pair(3)
    ids,mask = left_pad([torch.randint(7, (n,)).tolist() for n in (7, 2, 5)])
    kw = dict(temperature=0, attention_mask=mask)
    assert speculate_blocks(whale, spark, ids, 9, **kw).equal(generate(whale, ids, 9, **kw))

def test_padding_and_what_is_beyond_the_window_change_no_draft():
    whale,spark = pair(5)
    ids,mask = left_pad([torch.randint(7, (n,)).tolist() for n in (11, 6)])
    def q(ids, mask):
        with torch.inference_mode(), tapping(whale, (1, 2)) as taps:
            X = whale(ids[:,:-1], docs=mask[:,:-1]-1).streams
            return BlockDrafter(whale, spark, taps).draft(X, Rows(whale, ids, mask), 1).q
    assert_close(q(ids, mask)[1:], q(ids[1:,5:], mask[1:,5:]))

# ---------------------------------------------------------------- lessons

def lessons_by_drafting(whale, spark, ids, a, drafter=BlockDrafter):
    "Logits at an anchor from a drafter that has read all before it, told the true tokens"
    with torch.inference_mode(), tapping(whale, spark.spark.taps) as taps:
        d,cache = drafter(whale, spark, taps),Cache(whale.cfg)
        for t in range(a): d.read(whale(ids[:,t:t+1], cache=cache).streams.shape[1])
        return spark.heads(d.hidden(Rows(whale, ids[:,:a+1]))[0], ids[0,a:a+3], whale.lm_head)[0]

@pytest.mark.parametrize('window', [4, 30])
def test_lessons_are_what_drafting_meets(window):
    "Two documents in a row: each as if it stood alone"
    whale,spark = pair(window, sliding_window=window)
    ids,docs = torch.randint(7, (1, 16)),torch.tensor([[0]*7+[1]*9])
    lesson = lessons(whale, spark, ids, docs, torch.arange(16))
    for start,end in ((0, 7), (7, 16)):
        for a in range(max(1, start), end-3):
            alone = lessons_by_drafting(whale, spark, ids[:,start:end], a-start) if a>start else lesson.logits[a]
            assert_close(lesson.logits[a], alone, rtol=1e-4, atol=1e-5)   # angles are float32
    assert [(t!=-100).sum().item() for t in lesson.targets]==[min(3, (6 if a<7 else 15)-a) for a in range(16)]
    said = whale(ids, docs=docs).logits.softmax(-1)
    assert_close(lesson.p[5,0], said[0,5])

def leaks(whale, spark):
    "Does what the trunk computes at the anchor or behind it change the first row?"
    ids,other = torch.randint(7, (2, 1, 14))
    other[:,:7] = ids[:,:7]                      # the anchor is 6
    first = [lessons(whale, spark, x, torch.zeros_like(x), torch.tensor([6])).logits[0,0] for x in (ids, other)]
    return not torch.allclose(*first, rtol=1e-9, atol=1e-9)

def test_a_block_sees_nothing_from_its_anchor_on():
    whale,spark = pair(2)
    assert not leaks(whale, spark)
    real = ds.cut
    with patch.object(ds, 'cut', lambda x, at, size: real(x, at+2*(size==5), size)):
        assert leaks(whale, spark)               # bug: windows that reach past the anchor

class Early(BlockDrafter):
    "Bug: the block stands a position too early"
    def hidden(self, rows):
        self.length -= 1
        h = super().hidden(rows)
        self.length += 1
        return h

def test_a_block_a_position_too_early_shows():
    whale,spark = pair(6)
    ids = torch.randint(7, (1, 12))
    right = lessons_by_drafting(whale, spark, ids, 6)
    assert (lessons_by_drafting(whale, spark, ids, 6, Early)-right).abs().max()>1e-3

def test_rows_see_each_other_both_ways_and_causal_ones_do_not():
    for cls,ahead in ((DSpark, True), (beyond.Causal, False)):
        _,spark = pair(7, cls=cls)
        e = torch.randn(1, 3, 12).double().requires_grad_()
        kept,seen = [torch.randn(1, 4, 10).double()]*2,torch.ones(1, 4)>0
        for i in range(3):
            g, = torch.autograd.grad(spark(e, torch.arange(3)[None], kept, seen)[0,i].sum(), e)
            assert [bool(g[0,j].any()) for j in range(3)]==[ahead or j<=i for j in range(3)]

def test_loss_is_a_weighted_mean_and_its_confidence_term_teaches_the_confidence_alone():
    whale,spark = pair(8)
    ids,docs = torch.randint(7, (2, 12)),torch.tensor([[0]*12, [-1]*4+[0]*8])
    spark.requires_grad_()
    def loss(**kw): return spark_loss(lessons(whale, spark, ids, docs, torch.arange(12)), **kw)
    loss(weights=(0, 0, 1)).backward()
    learns = {n for n,p in spark.named_parameters() if p.grad is not None and p.grad.any()}
    assert {'confidence.weight', 'markov.embed_tokens.weight'}<=learns and not {'markov.lm_head.weight', 'norm.weight'}&learns
    lesson = lessons(whale, spark, ids, docs, torch.arange(12))
    total = weight = 0
    for m in range(24):
        for k in range(3):
            if lesson.targets[m,k]<0: continue
            w,q,p = math.exp(-k/2),lesson.logits[m,k].softmax(-1),lesson.p[m,k]
            total += w*(.3*-q[lesson.targets[m,k]].log()+.7*(p-q).abs().sum())
            weight += w
    assert_close(loss(gamma=2., weights=(.3, .7, 0)), total/weight)
    there = lesson.targets>=0
    p,q = lesson.p[there],lesson.logits[there].softmax(-1)
    assert_close(accepted(p, q), torch.minimum(p, q).sum(-1))

# ---------------------------------------------------------------- the campaign

def test_serial_lessons_are_what_the_mtp_block_drafts():
    "The rival learns in the very setting in which it is judged"
    for window in (2, 5):
        whale,_ = pair(9, sliding_window=window)
        ids = torch.randint(7, (1, 15))
        lesson = beyond.serial_lessons(whale, whale.mtp[0], ids, torch.zeros_like(ids), torch.arange(1, 12))
        for a in (1, 3, 8):
            told = iter(ids[0,a+1:].split(1))
            with torch.inference_mode(), patch.object(spec, 'draw', lambda logits, g: next(told)):
                _,q = Drafter(whale, 4).propose(whale(ids[:,:a]).streams, Rows(whale, ids[:,:a+1]), 4)
            assert_close(q[0], lesson.logits[a-1].softmax(-1), rtol=1e-7, atol=1e-7)

def test_rounds_cost_the_same_in_the_campaign():
    cfg,_,_ = setup('base', **beyond.SPARK_V4)
    for tokens in (2., 2.5, 3.):
        mine,theirs = spark_flops(replace(cfg, moe_intermediate_size=beyond.SPARK_WIDTH), beyond.SPARK, tokens),serial_flops(cfg, 4, tokens)
        assert abs(sum(mine.values())/sum(theirs.values())-1)<.02

def test_figures_of_a_known_drafter():
    chance = torch.tensor([[.5, .25], [1., .75]])
    reach = torch.tensor([[1., 1.], [1., 1.]])
    found = beyond.spark_figures(reach, chance, torch.tensor([[.45, .9], [.95, .5]]))
    assert found['kept']==[.75, .5] and found['tokens']==2.25
    assert [b[0] for b in found['bins']]==[0, 0, 0, 0, 1, 1, 0, 0, 0, 2] and found['bins'][9][1:]==[.925, .625]
    assert found['stops'][0]==[0., 2., 2.25] and [.5, .5, 1.5] in found['stops']
