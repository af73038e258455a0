"""Speculative decoding: greedy text identical to plain decoding on 200 prompts, drawn text from the same distribution, logits
right after every rollback, drafts those of an uncached MTP block; and bugs planted that must show.

    pytest tests/test_speculate.py
    python tests/test_speculate.py --model FOLDER --out results/speculative.json   acceptance and speed of a trained whale

Speed is measured at batch 1 on continuations of held-out text, with and without drafts in turn; medians over the repeats.
"""
import paths   # noqa: F401, for tests/tools
import argparse, contextlib, json, random, statistics, time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from torch.testing import assert_close
import nanowhale.generate.speculate as spec
from nanowhale.fast.kernels import use
from nanowhale.model.config import SWA, WhaleConfig
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import Whale
from nanowhale.generate.cache import Cache, KVCache
from nanowhale.generate.sample import Rows, draw, generate, left_pad, warp
from nanowhale.generate.speculate import Drafter, distributions, residual, speculate, verify
from nanowhale.processor import processor
from runs import provenance

V,PERIOD = 12,[2, 3, 4, 5, 3, 6, 7, 2, 8, 9, 4, 10, 11]   # the next token needs the one before it; some need more

def pattern(r, T, noise=.35):
    "The period over and over from a random place, with random tokens in between"
    at,row = r.randrange(13),[]
    for _ in range(T): row.append(r.randrange(2, V) if r.random()<noise else PERIOD[at%13]); at += 1
    return row

@pytest.fixture(scope='module')
def trained():
    "A whale that has seen the pattern for a few dozen steps: its drafts are often right and often wrong"
    torch.manual_seed(0)
    r = random.Random(0)
    whale = Whale(WhaleConfig(vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, head_dim=10, qk_rope_head_dim=6,
        q_lora_rank=9, o_groups=3, o_lora_rank=5, sliding_window=6, moe_intermediate_size=14, n_routed_experts=3, num_experts_per_tok=2,
        hc_mult=3, hc_sinkhorn_iters=3, initializer_range=.2, bos_token_id=None, eos_token_id=None))
    opt = torch.optim.AdamW(whale.parameters(), lr=1e-2)
    for _ in range(40):
        ids = torch.tensor([pattern(r, 20) for _ in range(12)])
        out = whale(ids, labels=ids)
        (out.loss+out.mtp_loss).backward(); opt.step(); opt.zero_grad()
    return whale

def trunk_view(whale, ids, docs=None):
    "Rotation and mask of plain attention over whole rows"
    return views(whale.cfg, whole_rows(whale.cfg, ids, docs))[SWA]

def with_window(whale, W, **kw): return Whale.from_state_dict(replace(whale.cfg, sliding_window=W, **kw), whale.state_dict())

# ---------------------------------------------------------------- identity

@pytest.mark.parametrize('kernels', ['plain', 'fast'])
@pytest.mark.parametrize('window', range(1, 11))
def test_greedy_is_plain_decoding(trained, window, kernels):
    "20 prompts for each of ten windows, lengths around the window's edge, 1 to 5 drafts, some texts ended by an EOS"
    whale,r,rounds = use(with_window(trained, window), kernels),random.Random(window),[]
    lengths = [1, 2, max(1, window-1), window, window+1, window+2, 2*window, 3*window+1]
    for i in range(20):
        ids = torch.tensor([pattern(r, lengths[i] if i<8 else r.randint(1, 25))])
        n,kw = r.randint(1, 15),dict(temperature=0, eos_token_id=r.choice([None, None, 5, [2, 8]]), repetition_penalty=r.choice([1., 1., 1.4]))
        got = speculate(whale, ids, n, drafts=r.randint(1, 5), on_round=lambda *k: rounds.append(k), **kw)
        assert got.equal(generate(whale, ids, n, **kw))
    drafted,used = (sum(x) for x in zip(*rounds))
    assert .1<used/drafted<.9, (drafted, used)   # both ways were gone, often

@pytest.mark.parametrize('seed', range(3))
def test_greedy_batches_of_unequal_prompts(trained, seed):
    whale,r = with_window(trained, 3+seed),random.Random(seed)
    ids,mask = left_pad([pattern(r, r.randint(1, 14)) for _ in range(5)])
    for drafts in (1, 2, 4):
        columns = []
        kw = dict(temperature=0, attention_mask=mask, eos_token_id=[4, 9][:seed] or None)
        got = speculate(whale, ids, 20, drafts=drafts, on_token=columns.append, **kw)
        assert got.equal(generate(whale, ids, 20, **kw))
        assert torch.stack(columns, 1).equal(got[:,ids.shape[1]:])   # streamed column by column

def test_many_new_tokens_far_past_the_window(trained):
    ids = torch.tensor([pattern(random.Random(0), 9)])
    assert speculate(trained, ids, 100, temperature=0, drafts=3).equal(generate(trained, ids, 100, temperature=0))

# ---------------------------------------------------------------- rollback

@torch.inference_mode()
def worst_after_rollbacks(whale, spare, T=60, seed=0):
    "Worst error of cached logits against the full forward's, each pass reading some right tokens, then wrong ones that are taken back"
    r,V,W = random.Random(seed),whale.cfg.vocab_size,whale.cfg.sliding_window
    ids,docs = torch.randint(0, V, (2, T)),torch.zeros(2, T).long()
    docs[1,:5] = -1
    full,worst,cache = whale(ids, docs=docs).logits,0.,Cache(whale.cfg, spare)
    while cache.length<T:
        start,n = cache.length,min(T-cache.length, r.choice([1, 1, 1, 2, spare+1, r.randint(1, 2*W)]))
        wrong = r.choice([0, 1, 1])*max(0, spare+1-n)*(start>0)   # as many as can be taken back, or none
        new = torch.cat([ids[:,start:start+n], torch.randint(0, V, (2, wrong))], 1)
        d = torch.cat([docs[:,start:start+n], docs[:,-1:].expand(2, wrong)], 1)
        got = whale(new, docs=d, cache=cache).logits[:,:n]
        cache.rewind(wrong)
        assert cache.length==start+n==cache.docs.length
        real = docs[:,start:start+n]>=0
        worst = max(worst, (got-full[:,start:start+n])[real].abs().max().item() if real.any() else 0)
    return worst/max(1, full.abs().max().item())

@pytest.mark.parametrize('window', range(1, 10))
def test_logits_after_rollbacks(trained, window):
    whale = with_window(trained, window)
    for spare in range(5): assert worst_after_rollbacks(whale, spare, seed=spare)<1e-5

class SmallRing(KVCache):
    "Bug: as many slots as the window, whatever the drafts"
    def __init__(self, window, spare=0): super().__init__(window, spare); self.size = window

class OneShort(KVCache):
    "Bug: one slot too few"
    def __init__(self, window, spare=0): super().__init__(window, spare); self.size -= 1

class Sticky(KVCache):
    "Bug: what was taken back stays in sight, as if it stood where the next token does"
    top = 0
    def extend(self, kv): self.top = max(self.top, self.length+kv.shape[1]); return super().extend(kv)
    def positions(self, T, device=None):
        pos = super().positions(T, device)
        return torch.where(pos+self.size<self.top, self.length, pos) if T<=self.room else pos

@pytest.mark.parametrize('ring', [SmallRing, OneShort, Sticky])
def test_rollback_bugs_show(trained, ring):
    with patch('nanowhale.generate.cache.KVCache', ring):
        assert max(worst_after_rollbacks(with_window(trained, w), 3) for w in (4, 6))>1e-3

def test_forgotten_rewind_shows(trained):
    ids = torch.tensor([pattern(random.Random(1), 9)])
    want = generate(trained, ids, 30, temperature=0)
    with patch.object(KVCache, 'rewind', lambda self, n: None), contextlib.suppress(RuntimeError, IndexError):
        assert not speculate(trained, ids, 30, temperature=0, drafts=3).equal(want)

# ---------------------------------------------------------------- drafting

@torch.inference_mode()
def test_drafts_are_those_of_the_uncached_block(trained):
    "At every position, alone and padded; later drafts from the block's own streams"
    for window in (1, 2, 5, 9):
        whale,r = with_window(trained, window),random.Random(window)
        block = whale.mtp[0]
        ids,mask = left_pad([pattern(r, 24), pattern(r, 19)])
        docs = mask-1
        X = whale(ids, docs=docs).streams
        drafter,t = Drafter(whale, 3),6   # padding ends at 5
        while t<23:
            n = r.randint(1, 3)
            rows = Rows(whale, ids[:,:t+1], mask[:,:t+1])
            guess,q = drafter.propose(X[:,drafter.cache.length:t], rows, n, temperature=1.3)
            Y,told = X[:,:t],ids[:,1:t+1]
            for i in range(n):   # all from the start, growing by the drafts; stand-in streams at their end
                d = torch.cat([docs[:,:t], docs[:,-1:].expand(2, i)], 1)
                Z,_ = block.streams(Y, whale.model.embed_tokens(told), *trunk_view(whale, told, d))
                want = whale.lm_head(block.norm(block.hc_head(Z[:,-1:])))[:,0]
                assert_close(q[:,i], (want/1.3).softmax(-1), atol=1e-5, rtol=1e-4)
                Y,told = torch.cat([Y, Z[:,-1:]], 1),torch.cat([told, guess[:,i:i+1]], 1)
            assert drafter.cache.length==t
            t += r.randint(1, 3)

@torch.inference_mode()
def test_first_draft_is_what_training_teaches(trained):
    "The MTP logits that the training loss sees at position i, from next_embeddings, are the drafter's"
    from nanowhale.model.mtp import next_embeddings
    ids = torch.tensor([pattern(random.Random(3), 15)])
    out,block = trained(ids),trained.mtp[0]
    h,_ = block(out.streams, next_embeddings(trained.model.embed_tokens(ids)), *trunk_view(trained, ids))
    logits,_ = Drafter(trained, 1).logits(out.streams[:,:-1], ids[:,1:])
    assert_close(logits, trained.lm_head(h)[:,-2], atol=1e-5, rtol=1e-5)

# ---------------------------------------------------------------- distributions

def test_verify_follows_p_whatever_q():
    "Chains over 4 words, 3 drafts, 120,000 rows at once; q good, bad, with holes and with certainties"
    torch.manual_seed(0)
    P = (torch.randn(4, 4)*1.5).softmax(-1)
    for Q in (P, (torch.randn(4, 4)*2).softmax(-1), torch.eye(4).roll(1, 1), torch.tensor([[.5, .5, 0, 0]]*4), .8*P+.2*torch.eye(4)[0]):
        n,N = 120_000,3
        drafts,before = [],torch.zeros(n).long()
        for _ in range(N): drafts.append(draw(Q[before].log())); before = drafts[-1]
        drafts = torch.stack(drafts, 1)
        before = torch.cat([torch.zeros(n, 1).long(), drafts], 1)
        tokens,kept = verify(P[before], Q[before[:,:N]], drafts)
        for i in range(1, N+1): tokens[:,i] = torch.where(i>kept, draw(P[tokens[:,i-1]].log()), tokens[:,i])
        want = torch.einsum('a,ab,bc,cd->abcd', P[0], P, P, P).flatten()*n
        seen = (tokens@torch.tensor([64, 16, 4, 1])).bincount(minlength=256)
        assert ((seen-want)**2/want).sum()<255+4*(2*255)**.5
        assert abs((kept>0).float().mean()-torch.minimum(P, Q)[0].sum())<.01   # 1 - total variation distance

def test_verify_without_drafts_and_residual_without_rest():
    p = torch.tensor([[[.25, .75]]]).expand(2000, 1, 2)
    tokens,kept = verify(p, p[:,:0], torch.zeros(2000, 0).long())
    assert tokens.shape==(2000, 1) and (kept==0).all() and abs(tokens.float().mean()-.75)<.05
    assert residual(p, p).equal(p)
    for q in (p, p*(1+1e-7)): assert residual(p, q).isfinite().all()

def test_distributions_count_drafts_as_seen():
    z,seen = torch.randn(1, 3, 5),torch.tensor([[True, False, False, False, False]])
    p = distributions(z, torch.tensor([[2, 4]]), seen, repetition_penalty=2., temperature=.7)
    for i,ids in enumerate(([0], [0, 2], [0, 2, 4])):
        now = torch.zeros(1, 5, dtype=torch.bool).index_fill(1, torch.tensor(ids), True)
        assert_close(p[:,i], warp(z[:,i], now, temperature=.7, repetition_penalty=2.).softmax(-1))

RULES = dict(temperature=1.2, top_k=2, repetition_penalty=1.3)

@torch.inference_mode()
def exact(whale, ids, n, **rules):
    "{text: probability} of every text of n tokens, by plain forwards"
    texts = {(): 1.}
    for _ in range(n):
        more = {}
        for text,p in texts.items():
            row = torch.cat([ids, torch.tensor([text]).long()], 1)
            seen = torch.zeros(1, whale.cfg.vocab_size, dtype=torch.bool).scatter(1, row, True)
            for x,px in enumerate(warp(whale(row).logits[:,-1], seen, **rules).softmax(-1)[0].tolist()):
                if px>0: more[(*text, x)] = p*px
        texts = more
    assert abs(sum(texts.values())-1)<1e-4
    return texts

def drawn(whale, ids, n, runs, rows=1, **kw):
    "How often each text comes, `rows` at a time"
    torch.manual_seed(0)
    count = {}
    for _ in range(runs):
        for row in speculate(whale, ids.expand(rows, -1), n, **kw)[:,ids.shape[1]:].tolist(): count[tuple(row)] = count.get(tuple(row), 0)+1
    return count

def excess(count, want):
    "chi-square over the texts expected at least 5 times (the others as one), in standard deviations above its mean; inf for the impossible"
    n = sum(count.values())
    if any(want.get(t, 0)==0 for t in count): return float('inf')
    often = [t for t,p in want.items() if p*n>=5]
    cells = [(count.get(t, 0), want[t]*n) for t in often]+[(n-sum(count.get(t, 0) for t in often), n*(1-sum(want[t] for t in often)))]
    cells = [(o, e) for o,e in cells if e>=5]
    df = len(cells)-1
    return (sum((o-e)**2/e for o,e in cells)-df)/(2*df)**.5

@pytest.fixture(scope='module')
def small(trained):
    "A whale quick enough to be drawn from thousands of times, its drafts right about half the time; one layer, 5 tokens, window 2"
    torch.manual_seed(1)
    return Whale(replace(trained.cfg, vocab_size=5, num_hidden_layers=1, hidden_size=10, hc_mult=2, sliding_window=2, n_routed_experts=2,
                         initializer_range=.6))

PROMPT = torch.tensor([[1, 3, 2]])

@pytest.mark.parametrize('n,drafts,rows,runs,rules', [(3, 1, 1, 500, {}), (4, 2, 1, 300, RULES), (3, 1, 3, 200, dict(temperature=.7, top_p=.95))])
def test_drawn_text_follows_the_distribution(small, n, drafts, rows, runs, rules):
    rounds = []
    count = drawn(small, PROMPT, n, runs, rows, drafts=drafts, on_round=lambda *k: rounds.append(k), **rules)
    assert excess(count, exact(small, PROMPT, n, **rules))<4
    assert .05<sum(u for _,u in rounds)/sum(d for d,_ in rounds)<.95

def accept_all(p, q, drafts, generator=None):
    return torch.cat([drafts, draw(p[:,-1].log(), generator)[:,None]], 1),torch.full((len(drafts),), drafts.shape[1])

def redraw_from_p(p, q): return p

@pytest.mark.parametrize('name,bug', [('verify', accept_all), ('residual', redraw_from_p)])
def test_planted_bugs_change_the_distribution(small, monkeypatch, name, bug):
    monkeypatch.setattr(spec, name, bug)
    assert excess(drawn(small, PROMPT, 3, 200, rows=8), exact(small, PROMPT, 3))>5

# ---------------------------------------------------------------- manners

def test_seeds(trained):
    ids = torch.tensor([pattern(random.Random(5), 6)])
    run = lambda **kw: speculate(trained, ids, 20, drafts=2, **kw)
    state = torch.get_rng_state()
    a,b,c = run(seed=1),run(seed=1),run(seed=2)
    run(temperature=0)
    assert a.equal(b) and not a.equal(c) and torch.get_rng_state().equal(state)

def test_no_new_tokens_and_one():
    whale,ids = Whale(WhaleConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4, qk_rope_head_dim=2,
        q_lora_rank=3, o_groups=1, o_lora_rank=3, sliding_window=3, moe_intermediate_size=4, n_routed_experts=2, num_experts_per_tok=1)),torch.tensor([[3, 4]])
    assert speculate(whale, ids, 0).equal(ids)
    for n in (1, 2, 3): assert speculate(whale, ids, n, eos_token_id=None, drafts=4).shape==(1, 2+n)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_float_types(trained, dtype):
    whale = with_window(trained, 4).to(dtype)
    ids,mask = left_pad([[3, 4, 5], [7]])
    assert speculate(whale, ids, 9, seed=0, attention_mask=mask, drafts=2).shape==(2, 12)

def test_refusals(trained):
    ids = torch.tensor([[3, 4]])
    for kw,says in ((dict(drafts=0), 'drafts=0'), (dict(temperature=-1), 'temperature'), (dict(attention_mask=torch.tensor([[1, 0]])), 'pad on the left')):
        with pytest.raises(ValueError, match=says): speculate(trained, ids, 3, **kw)
    with pytest.raises(ValueError, match='outside the vocabulary'): speculate(trained, ids+90, 3)
    state = {k: v for k,v in trained.state_dict().items() if not k.startswith('mtp.')}
    with pytest.raises(ValueError, match='no MTP block'): speculate(Whale.from_state_dict(trained.cfg, state), ids)

def test_memory_is_constant(trained):
    "Trunk and drafter: the window and the drafts, in the same place from first to last"
    homes = set()
    def look(n, used):
        if n: homes.add(tuple(r.kv.data_ptr() for c in caches for r in c.layers))
    caches,real = [],spec.Cache
    def keep(*a, **kw): caches.append(real(*a, **kw)); return caches[-1]
    with patch.object(spec, 'Cache', keep): speculate(trained, torch.tensor([pattern(random.Random(2), 30)]), 60, drafts=2, on_round=look)
    assert len(homes)==1 and [[r.kv.shape[1] for r in c.layers] for c in caches]==[[8, 8], [8]]

# ---------------------------------------------------------------- acceptance and speed

def clock(f):
    began = time.perf_counter()
    f()
    return time.perf_counter()-began

@torch.inference_mode()
def pass_times(whale, ids, repeats=60, most=5):
    "Median milliseconds of a cached pass over 1 to `most` tokens, and of one draft, interleaved"
    cache,drafter = Cache(whale.cfg, spare=most),Drafter(whale, most)
    X = whale(ids[:,:-1], cache=cache).streams
    drafter.logits(X, ids[:,1:])
    times = {n: [] for n in [*range(1, most+1), 'draft']}
    for _ in range(repeats):
        for n in range(1, most+1):
            times[n].append(clock(lambda: whale(ids[:,:n], cache=cache)))
            cache.rewind(n)
        times['draft'].append(clock(lambda: warp(drafter.logits(X[:,-1:], ids[:,-1:])[0])))
        drafter.cache.rewind(1)
    return {str(k): round(statistics.median(v)*1e3, 3) for k,v in times.items()}

def measure(whale, prompts, n, repeats, settings):
    "One row for each (temperature, top_k, drafts): medians of tokens per second over the repeats, plain and speculative in turn"
    table = []
    for temperature,top_k,drafts in settings:
        kw,speeds,rounds = dict(temperature=temperature, top_k=top_k, eos_token_id=None),{'plain':[], 'spec':[]},[]
        for i in range(repeats+1):   # the first one only warms up
            t = {'plain':0, 'spec':0}
            for j,ids in enumerate(prompts):
                seed = 1000*i+j
                def plain(): generate(whale, ids, n, seed=seed, **kw)
                def fast(): speculate(whale, ids, n, seed=seed, drafts=drafts, on_round=lambda d,u: rounds.append((d, u)), **kw)
                for name,f in ((('plain', plain), ('spec', fast)) if (i+j)%2 else (('spec', fast), ('plain', plain))): t[name] += clock(f)
            for name in t: speeds[name].append(n*len(prompts)/t[name])
        plain,fast = (statistics.median(speeds[name][1:]) for name in ('plain', 'spec'))
        ratio = statistics.median(b/a for a,b in zip(speeds['plain'][1:], speeds['spec'][1:]))
        drafted,used = (sum(x) for x in zip(*[r for r in rounds if r[0]==drafts]))
        first = sum(u>0 for d,u in rounds if d==drafts)/sum(d==drafts for d,_ in rounds)
        table.append(dict(temperature=temperature, top_k=top_k, drafts=drafts, first_kept=round(first, 4), kept=round(used/drafted, 4),
            tokens_per_pass=round(1+drafts*used/drafted, 4), plain_tokens_per_s=round(plain, 1), tokens_per_s=round(fast, 1), speed_up=round(ratio, 4)))
        print(table[-1], flush=True)
    return table

def main():
    p = argparse.ArgumentParser(description='Acceptance and speed of speculative decoding at batch 1')
    p.add_argument('--model', required=True, help='folder of a trained whale with an MTP block and a tokenizer')
    p.add_argument('--out', help='write the figures to this json file')
    p.add_argument('--tokens', type=int, default=80, help='new tokens for each prompt (default: 80)')
    p.add_argument('--prompts', type=int, default=4, help='prompts, from the held-out part of the embedded text (default: 4)')
    p.add_argument('--repeats', type=int, default=5, help='how often each is timed (default: 5)')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='processor threads')
    a = p.parse_args()
    from nanowhale.train.data import embedded_corpus, load_tokenizer, split_held_out
    torch.set_num_threads(a.threads)
    whale,tok = Whale.from_pretrained(a.model).eval(),load_tokenizer(a.model)
    held = [t for t in split_held_out(embedded_corpus())[1] if len(t)>400]
    texts = held[::max(1, len(held)//a.prompts)][:a.prompts]
    prompts = [torch.tensor([[tok.bos_token_id, *tok.encode(t, add_special_tokens=False)[:32]]]) for t in texts]
    for ids in prompts: assert speculate(whale, ids, a.tokens, temperature=0, drafts=2).equal(generate(whale, ids, a.tokens, temperature=0))
    times = pass_times(whale, torch.cat([prompts[0]]*6, 1))
    draft = times.pop('draft')
    settings = [(0, None, 1), (0, None, 2), (0, None, 3), (.7, 40, 1), (.7, 40, 2), (.7, 40, 3), (1., None, 1)]
    table = measure(whale, prompts, a.tokens, a.repeats, settings)
    out = provenance('python tests/test_speculate.py --model FOLDER --out FILE') | dict(
        hardware=f'{processor()}, threads: {torch.get_num_threads()}, torch {torch.__version__}', layers=whale.cfg.num_hidden_layers,
        vocabulary=whale.cfg.vocab_size, prompts=len(prompts), tokens=a.tokens, repeats=a.repeats, pass_ms=times, draft_ms=draft, table=table)
    if a.out: Path(a.out).write_text(json.dumps(out, indent=1)+'\n')
    print({k: v for k,v in out.items() if k!='table'})

if __name__=='__main__': main()
