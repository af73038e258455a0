"""The ladder from a plain transformer to a whale: both ends, one change a step, its costs, and runs that can be repeated."""
from functools import partial
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from nanowhale.fast.kernels import use
from nanowhale.lab import ladder
from nanowhale.lab.ladder import (BOTTOM, RUNGS, TOP, HalfRotating, PlainAttention, Residual, batches, build, corpus,
    flops, kept_bytes, run, sizes, table)
from nanowhale.model.plain import PlainTransformer, rope
from nanowhale.model.whale import Whale
from nanowhale.presets import mean_keys
from nanowhale.train.data import embedded_corpus, is_held_out
from nanowhale.generate.cache import Cache

NAMES = list(RUNGS)
ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(0))

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Little held-out text and few bytes written: these tests do not ask how well anything learns"
    monkeypatch.setattr(ladder, 'held_out_bits', partial(ladder.held_out_bits, rows=20))
    monkeypatch.setattr(ladder, 'written', partial(ladder.written, n=5))

def test_the_lowest_rung_is_the_plain_transformer_gradients_included():
    low,plain = build('plain', 3).double(), PlainTransformer(BOTTOM).double()
    plain.load_state_dict({k.removeprefix('model.'): v for k,v in low.state_dict().items()})
    assert torch.allclose(low(ids).logits, plain(ids), atol=1e-12)
    low(ids).logits.square().sum().backward(); plain(ids).square().sum().backward()
    for name,p in plain.named_parameters():
        q = low.get_parameter(name if name.startswith('lm_head') else 'model.'+name)
        assert torch.allclose(p.grad, q.grad, rtol=1e-9), name

def test_the_highest_rung_is_a_whole_whale():
    top,whale = build('mtp', 1), Whale(TOP)
    assert list(top.state_dict())==list(whale.state_dict())
    assert [type(m) for m in top.modules()]==[type(m) for m in whale.modules()] and sizes('mtp')==TOP

@pytest.mark.parametrize('lower,upper', list(zip(NAMES, NAMES[1:])))
def test_neighbours_share_everything_but_one_part(lower, upper):
    "What both have begins equal; what differs belongs to the part that the rung is named after"
    part = dict(rope='self_attn', attention='self_attn', compress='self_attn', moe='mlp', hyper='hc', mtp='mtp.')[upper]
    a,b = (dict(build(r, 2).named_parameters()) for r in (lower, upper))
    for name in a.keys() | b.keys():
        if name in a and name in b and a[name].shape==b[name].shape: assert torch.equal(a[name], b[name]), name
        else: assert part in name, name

@pytest.mark.parametrize('rung', NAMES)
def test_the_fast_functions_change_no_rung(rung):
    plain,fast = build(rung), use(build(rung))
    a,b = plain(ids, labels=ids), fast(ids, labels=ids)
    assert torch.allclose(a.loss, b.loss, atol=1e-5) and torch.allclose(a.logits, b.logits, atol=1e-4)

@pytest.mark.parametrize('rung', NAMES)
def test_no_rung_sees_the_future(rung):
    whale,other = build(rung), ids.clone()
    other[:,50:] = (ids[:,50:]+1)%256
    assert torch.allclose(whale(ids).logits[:,:50], whale(other).logits[:,:50], atol=1e-5)

def test_half_of_the_channels_rotate():
    x = torch.randn(1, 9, 4, 32)
    y = HalfRotating(BOTTOM).rotate(x)
    assert torch.equal(y[...,:16], x[...,:16]) and torch.allclose(y[...,16:], rope(x[...,16:]))
    assert not torch.allclose(PlainAttention(BOTTOM).rotate(x)[:,1:,:,:16], x[:,1:,:,:16])

def test_a_residual_reads_keeps_and_adds():
    pre,post,comb = Residual()(torch.randn(2, 5, 1, 8))
    assert pre.shape==post.shape==(2, 5, 1) and comb.shape==(2, 5, 1, 1) and all((t==1).all() for t in (pre, post, comb))

@pytest.mark.parametrize('rung', NAMES[:3])
def test_operations_are_those_that_pytorch_counts(rung):
    "Without compressed entries and experts the plain code computes each product once, and hidden scores beside"
    with FlopCounterMode(display=False) as counter, torch.no_grad(): build(rung)(torch.zeros(1, 128, dtype=torch.long)).logits
    hidden = 3*4*128*(128-mean_keys(128, 128))
    adds = 3*2*(2*128+4*128)   # collapse and mix of one stream, products with ones
    assert abs(counter.get_total_flops()/128-hidden-flops(rung))<=adds

@pytest.mark.parametrize('rung', NAMES[2:])
def test_the_cache_is_as_large_as_counted(rung):
    whale = build(rung).eval()
    cache = Cache(sizes(rung), 1)
    with torch.no_grad(): whale(ids[:1,:64].repeat(1, 2), cache=cache)
    def tensors(x):
        if isinstance(x, torch.Tensor) and x.is_floating_point(): yield x
        elif isinstance(x, (list, tuple)): yield from (t for v in x for t in tensors(v))
        elif isinstance(x, dict): yield from tensors(list(x.values()))
        elif hasattr(x, '__dict__'): yield from tensors(list(vars(x).values()))
    kept = sum(t.numel() for layer in cache.layers for t in tensors(layer))*2/128
    assert kept_bytes(rung)<=round(kept)+1   # what is allocated may be more than what is used

@pytest.mark.parametrize('rung', NAMES[:2])
def test_plain_rungs_keep_every_key_and_value(rung):
    whale,made = build(rung).eval(),[]
    for name,part in whale.named_modules():
        if name.endswith(('k_proj', 'v_proj')): part.register_forward_hook(lambda part, args, out: made.append(out.numel()))
    with torch.no_grad(): whale(ids[:1,:64])
    assert kept_bytes(rung)==2*sum(made)/64      # bf16

def test_every_seed_reads_its_own_bytes_and_every_rung_the_same():
    assert torch.equal(torch.stack(list(batches(1, 3))), torch.stack(list(batches(1, 3))))
    assert not torch.equal(next(batches(1, 1)), next(batches(2, 1)))
    train,held = (bytes(t.tolist()) for t in corpus())
    places = range(0, len(held)-200, 500)
    known = sum(held[i:i+200] in train for i in places)
    assert known<0.1*len(places)   # some of Python's documents share a paragraph; how many hangs on its version
    for document in (t.encode() for t in embedded_corpus() if is_held_out(t)): assert document in held and document not in train

@pytest.mark.parametrize('rung', ['plain', 'mtp'])
def test_a_run_can_be_repeated(rung):
    torch.set_num_threads(1)
    assert run(rung, 1, 2)==run(rung, 1, 2)!=run(rung, 2, 2)

def test_a_campaign_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    made = []
    def fake(rung, seed, steps):
        made.append((rung, seed))
        if len(made)==3: raise KeyboardInterrupt
        return dict(params=1, bits_per_byte=2.+seed/10, curve=[], text='')
    monkeypatch.setattr(ladder, 'run', fake)
    path = tmp_path/'l.json'
    with pytest.raises(KeyboardInterrupt): ladder.ladder('all', 2, 5, path)
    found = ladder.ladder('all', 2, 5, path)
    assert len(found)==14 and made[2]==made[3] and len(made)==15   # one was begun twice, none is made twice
    assert all(r['command']=='nanowhale ladder all --seeds 2 --steps 5' for r in found)
    rows = capsys.readouterr().out.splitlines()
    assert [r.split()[0] for r in rows[1:8]]==NAMES and '+0.000 [+0.000, +0.000]' in rows[2] and '+0.000' not in rows[1]

def test_the_table_ends_at_a_rung_and_takes_runs_of_one_length():
    entries = [dict(rung=r, seed=s, steps=n, params=10, bits_per_byte=3.-i/10-(n==9)) for n in (5, 9) for i,r in enumerate(NAMES)
        for s in range(3 if n==5 else 1)]
    rows = table(entries, 'attention').splitlines()
    assert [r.split()[0] for r in rows[1:-1]]==NAMES[:3] and '2.800 +- 0.000' in rows[3] and rows[-1].startswith('3 seeds, 5 steps')
    assert '1.800' in table(entries, 'attention', steps=9)

def test_a_file_may_hold_figures_of_other_commands(tmp_path, monkeypatch, capsys):
    path = tmp_path/'both.json'
    path.write_text('[{"name": "dense", "pace": 1.2}, {"name": "base", "seed": 0, "steps": 60, "bits_per_byte": 5.0}]')
    monkeypatch.setattr(ladder, 'run', lambda rung, seed, steps: dict(params=1, bits_per_byte=2., curve=[], text=''))
    assert len(ladder.ladder('plain', 1, 5, path))==3 and capsys.readouterr().out.count('2.000')==1

@pytest.mark.parametrize('words,says', [(dict(name='tail'), 'no rung .tail.: choose one of all, plain'), (dict(name='plain', seeds=0), 'seeds=0'),
    (dict(name='plain', steps=-1), 'steps=-1')])
def test_mistakes_are_answered_before_anything_runs(words, says, tmp_path):
    with pytest.raises(ValueError, match=says): ladder.ladder(**words, out=tmp_path/'l.json')
    assert not (tmp_path/'l.json').exists()
