"""Engram: rows against Python's unbounded integers, values and gradients against loops, pieces against one pass, and its planted bugs"""
import copy, itertools, re, unicodedata
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from nanowhale.beyond import engram as E
from nanowhale.beyond.engram import (Engram, EngramConfig, add_engram, engram_flops, engram_params, lookback, memory_gate,
    ngram_rows, odd_multipliers, plain_spelling, primes_from, smaller_vocabulary, table_sizes)
from nanowhale.fast.kernels import use
from nanowhale.generate.cache import Cache
from nanowhale.model.config import WhaleConfig
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny_v4
from nanowhale.train.optim import make_optimizers, split_params

FEW = EngramConfig(layers=(1,), longest=3, hashes=2, rows=40, width=5)

# ---------------------------------------------------------------- the smaller vocabulary

@pytest.mark.parametrize('text,spelling', [('Whale', 'whale'), (' WHALE', 'whale'), ('whale\n', 'whale'), ('É', 'e'), ('e\u0301', 'e'), ('ﬁ', 'fi'),
    ('Ａ', 'a'), (' ', ' '), ('\t\r\n', ' '), ('a \n b', 'a b'), ('İ', 'i'), ('', ''), ('\u0301', '')])
def test_spelling(text, spelling): assert plain_spelling(text)==spelling

@settings(max_examples=40, deadline=None)
@given(st.text(max_size=6))
def test_a_spelling_is_plain(text):
    "No mark, no blanks at the ends or in runs, and nothing is left to do"
    s = plain_spelling(text)
    assert not any(unicodedata.category(c)=='Mn' for c in s)
    assert not re.search(r'[ \t\r\n]{2,}', s) and (s==' ' or s==s.strip())

class Tokens:
    "As much of a tokenizer as is asked for"
    def __init__(self, texts, raw=None): self.texts,self.raw = texts,raw or texts
    def __len__(self): return len(self.texts)
    def decode(self, ids): return self.texts[ids[0]]
    def convert_ids_to_tokens(self, i): return self.raw[i]

def test_tokens_that_read_alike_share_an_id():
    tok = Tokens(['<pad>', 'Whale', ' whale', '\ufffd', '\ufffd', 'x', ' ', '\n', '\u0301', '\u0300'], list('abcdefghij'))
    assert smaller_vocabulary(tok).tolist()==[0, 1, 1, 2, 3, 4, 5, 5, 6, 7]     # halves and lone accents keep their own

# ---------------------------------------------------------------- rows

@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2**40), st.integers(2, 5), st.integers(0, 200), st.data())
def test_rows_are_those_of_unbounded_integers(V, longest, layer, data):
    factors = odd_multipliers(layer, longest, V)
    sizes = data.draw(st.lists(st.integers(2, 2**33), min_size=2*(longest-1), max_size=2*(longest-1)))
    back = [data.draw(st.sampled_from([0, 1, V-1]) | st.integers(0, V-1)) for _ in range(longest)]
    exact = []
    for c,p in enumerate(sizes):
        z = 0
        for d in range(c//2+2):
            assert back[d]*factors[d].item()<2**63
            z ^= back[d]*factors[d].item()
        exact.append(sum(sizes[:c])+z%p)
    assert ngram_rows(torch.tensor([[back]]), factors, torch.tensor(sizes))[0,0].tolist()==exact

def test_factors_are_odd_and_differ_by_layer_and_distance():
    factors = torch.stack([odd_multipliers(layer, 4, 99_092) for layer in range(40)])
    assert (factors%2==1).all() and len(factors.unique())==160
    assert torch.equal(factors[1], odd_multipliers(1, 4, 99_092))      # the same each time

@pytest.mark.parametrize('n', [2, 3, 4, 50, 1000, 16_000_000])
def test_primes(n):
    found = list(itertools.islice(primes_from(n), 5))
    small = [p for p in range(n, found[-1]+1) if p>1 and not any(p%d==0 for d in range(2, int(p**.5)+1))]
    assert found==small

@pytest.mark.parametrize('layers', [(0,), (1, 4), (1, 14, 20)])
def test_no_prime_is_used_twice(layers):
    sizes = table_sizes(EngramConfig(layers=layers, rows=90, longest=4, hashes=3))
    flat = sum(sizes.values(), [])
    assert list(sizes)==list(layers) and len(set(flat))==len(flat)==9*len(layers) and min(flat)>=90

def test_a_shared_prime_tells_no_more_apart():
    lot = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 500, (3000,1,2), generator=lot).unique(dim=0)
    def apart(sizes): return len(ngram_rows(pairs, odd_multipliers(1, 2, 500), torch.tensor(sizes)).unique(dim=0))
    assert apart([101]*4)==apart([101])==101 and apart([101, 103, 107, 109])>.99*len(pairs)

@pytest.mark.parametrize('longest', [2, 3, 5])
def test_nothing_is_looked_up_across_a_document(longest):
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (3,30))
    back = lookback(ids, longest, 9, 0)
    for b,t in itertools.product(range(3), range(30)):
        want = []
        for d in range(longest):
            inside = t-d>=0 and not (ids[b,t-d+1:t+1]==0).any() if d else True
            want.append(ids[b,t-d].item() if inside else 9)
        assert back[b,t].tolist()==want

def test_ids_that_the_tokenizer_lacks_have_rows_too():
    whale = add_engram(Whale(tiny_v4(64)), EngramConfig(layers=(1,), rows=64, width=2, hashes=1, longest=2), torch.arange(50)//2)
    assert whale(torch.tensor([[3, 63, 50]])).logits.isfinite().all()

# ---------------------------------------------------------------- the gate and the module

def test_the_gate_is_its_formula_and_has_finite_gradients_everywhere():
    torch.manual_seed(0)
    X,key,w = torch.randn(2,3,4,6).double(), torch.randn(2,3,4,6).double(), torch.randn(4,6).double()
    def norm(v): return v/(v.square().mean(-1, keepdim=True)+1e-20).sqrt()
    a = (norm(X)*w*norm(key)).sum(-1)/6**.5
    assert_close(memory_gate(X, key, w, 1e-20), torch.sigmoid(a.sign()*a.abs().clamp(min=1e-6).sqrt()))
    for scale in (0., 1e-12, 1e12):      # rows nobody has taught, and wild ones
        k = (scale*key.float()).requires_grad_()
        x = X.float().requires_grad_()
        grads = torch.autograd.grad(memory_gate(x, k, w.float(), 1e-20).sum(), (x, k))
        assert all(g.isfinite().all() for g in grads)

QUICK = dict(hidden_size=16, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_lora_rank=8, moe_intermediate_size=8, index_head_dim=8, hc_sinkhorn_iters=3)

def whales(**changes):
    torch.manual_seed(0)
    plain = Whale(replace(tiny_v4(64), **QUICK | changes))
    whale = add_engram(copy.deepcopy(plain), replace(FEW, layers=(0,2)))
    return plain, whale

def taught(whale):
    for m in whale.modules():
        if isinstance(m, Engram): nn.init.normal_(m.embed_tokens.weight)
    return whale

def test_a_fresh_table_adds_nothing_but_can_learn():
    plain,whale = whales()
    ids = torch.randint(0, 64, (2,12))
    assert_close(whale(ids, labels=ids).loss, plain(ids, labels=ids).loss, rtol=0, atol=0)
    whale(ids, labels=ids).loss.backward()
    table = whale.model.layers[2].engram.embed_tokens.weight
    assert table.grad.any() and sum(p.numel() for p in whale.parameters())-sum(p.numel() for p in plain.parameters())== \
        sum(engram_params(whale.cfg, replace(FEW, layers=(0,2))).values())
    assert set(plain.state_dict())<set(whale.state_dict())

@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('kernels', ['plain', 'fast'])
def test_pieces_are_the_whole(seed, kernels):
    _,whale = whales(num_nextn_predict_layers=0)
    use(taught(whale), kernels)
    lot = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (2,30), generator=lot)
    ids[0,11] = 0                                       # a document begins in the middle of a row
    with torch.no_grad():
        full = whale(ids).logits
        cache,pieces,at = Cache(whale.cfg, spare=2), [], 0
        while at<30:
            n = min(torch.randint(1, 6, (), generator=lot).item(), 30-at)
            pieces.append(whale(ids[:,at:at+n], cache=cache).logits)
            at += n
            whale(torch.randint(0, 64, (2,2), generator=lot), cache=cache)      # drafts, all rejected
            cache.rewind(2)
    assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=2e-4)

def test_a_token_is_seen_by_the_next_two_alone_in_the_rows():
    engram = Engram(WhaleConfig(vocab_size=64, hidden_size=8, hc_mult=2), FEW, 1)
    ids = torch.randint(2, 64, (1,9))
    other = ids.clone()
    other[0,4] = (ids[0,4]+1-2)%62+2
    changed = (engram.rows(ids)!=engram.rows(other)).any(-1)[0]
    assert not changed[:4].any() and changed[4] and not changed[7:].any()

def test_a_table_is_adamws_and_maps_are_muons():
    _,whale = whales()
    for kind,ends in dict(tables='embed_tokens.weight', matrices='proj.weight', vectors='norm').items():
        mine = [n for n in split_params(whale)[kind] if 'engram' in n]
        assert mine and all(n.endswith(ends) for n in mine)
    make_optimizers(whale, .01, .02)

def test_flops_are_those_of_the_products():
    cfg = WhaleConfig(vocab_size=64, hidden_size=16, hc_mult=3)
    engram = Engram(cfg, FEW, 1)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: engram(torch.randn(1,1,3,16), torch.randint(0, 64, (1,1)))
    assert counter.get_total_flops()==engram_flops(cfg, FEW)-2*2*3*16      # but for the gate's dot products and the sum

def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match='this whale has 3 blocks'): add_engram(Whale(tiny_v4(64)), EngramConfig(rows=40, width=2))

def test_half_precision_keeps_the_norm():
    _,whale = whales()
    taught(whale).bfloat16()
    engram = whale.model.layers[0].engram
    assert engram.norm.dtype==torch.float32 and engram.embed_tokens.weight.dtype==torch.bfloat16
    assert whale(torch.randint(0, 64, (1,5))).hidden.isfinite().all()

# ---------------------------------------------------------------- planted bugs

def first_disagreement(monkeypatch, **bugs):
    "Do the rows of a small text still equal exact arithmetic with a bug in place?"
    for name,f in bugs.items(): monkeypatch.setattr(E, name, f)
    cfg = WhaleConfig(vocab_size=64, hidden_size=8, hc_mult=2)
    engram = Engram(cfg, FEW, 1)
    ids = torch.randint(1, 64, (2,20), generator=torch.Generator().manual_seed(0))
    exact = []
    for row in ids.tolist():
        for t in range(20):
            back = [row[t-d] if t>=d else 1 for d in range(3)]
            m,found = engram.multipliers.tolist(), []
            for c,p in enumerate(engram.sizes.tolist()):
                z = 0
                for d in range(c//2+2): z ^= back[d]*m[d]
                found.append(sum(engram.sizes[:c].tolist())+z%p)
            exact.append(found)
    return (engram.rows(ids).flatten(0,1)!=torch.tensor(exact)).any().item()

def wild(layer, longest, V): return 2*torch.randint(2**60, 2**62, (longest,), generator=torch.Generator().manual_seed(layer))+1
def shifted(ids, longest, pad, first=None): return lookback(ids, longest, pad, first).roll(1, 1)
def summed(back, m, sizes): return (back*m).cumsum(-1)[...,1:].repeat_interleave(2, -1)%sizes+sizes.cumsum(0)-sizes

@pytest.mark.parametrize('bugs', [dict(odd_multipliers=wild), dict(lookback=shifted), dict(ngram_rows=summed)], ids=lambda b: next(iter(b)))
def test_a_planted_bug_is_seen(monkeypatch, bugs):
    assert not first_disagreement(monkeypatch)
    assert first_disagreement(monkeypatch, **bugs)
