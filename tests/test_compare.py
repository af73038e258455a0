"""Comparisons: the t interval against scipy, beginnings by name, corrections, and files that survive being interrupted."""
import json, math, subprocess, sys
import pytest, torch
from scipy import stats
from nanowhale.fast.bench import read_entries
from nanowhale.lab.compare import by_seed, commit, holm, once, paired, processor, start_by_name, t_quantile, t_within, widened
from nanowhale.model.plain import PlainConfig, PlainTransformer
from nanowhale.presets import tiny, tiny_v4
from nanowhale.model.whale import Whale

@pytest.mark.parametrize('df', [*range(1, 31), 99, 400])
def test_students_distribution_is_scipys(df):
    for t in (1e-3, 0.5, 1.0, 2.1, 6.0, 50.0): assert t_within(t, df)==pytest.approx(1-2*stats.t.sf(t, df), abs=1e-12)
    for level in (0.5, 0.9, 0.95, 0.99, 0.9999): assert t_quantile(df, level)==pytest.approx(stats.t.ppf((1+level)/2, df), rel=1e-9)

@pytest.mark.parametrize('n', [2, 3, 5, 12])
@pytest.mark.parametrize('level', [0.9, 0.95])
def test_a_paired_difference_is_scipys(n, level):
    torch.manual_seed(n)
    new,old = ({s: x for s,x in enumerate(torch.randn(n).double().tolist())} for _ in range(2))
    theirs = stats.ttest_rel(list(new.values()), list(old.values()))
    low,high = theirs.confidence_interval(level)
    d = paired(new, old, level)
    assert (d.mean, d.low, d.high, d.p, d.n)==pytest.approx((sum(new.values())/n-sum(old.values())/n, low, high, theirs.pvalue, n), rel=1e-9)

def test_pairs_are_found_by_seed_and_lone_runs_are_left_out():
    d = paired({3: 1.5, 1: 1.1, 9: 100.}, {1: 1.0, 3: 1.3, 4: -100.})
    assert d.n==2 and d.mean==pytest.approx(0.15)

@pytest.mark.parametrize('new', [{}, {0: 1.}, {5: 1., 6: 2.}])
def test_too_few_pairs_are_refused(new):
    with pytest.raises(ValueError, match=r'seeds in common: an interval needs at least 2'): paired(new, {0: 1., 1: 2.})

def test_no_spread_is_no_division_by_zero():
    assert paired({0: 1., 1: 2.}, {0: 1., 1: 2.}).p==1
    same = paired({0: 1.5, 1: 2.5}, {0: 1., 1: 2.})
    assert same.p==0 and same.low==same.mean==same.high==0.5

def test_holm_is_scipys_procedure_by_hand():
    "Holm's steps written out: the i-th smallest is compared with level/(m-i), and the first failure stops"
    torch.manual_seed(0)
    for _ in range(50):
        ps = {i: p for i,p in enumerate((torch.rand(7)**2).tolist())}
        for level in (0.01, 0.05, 0.3):
            rejected = []
            for i,name in enumerate(sorted(ps, key=ps.get)):
                if ps[name]*(len(ps)-i)>level: break
                rejected.append(name)
            assert {n for n,p in holm(ps).items() if p<=level}==set(rejected)
    assert holm({})=={} and list(holm(dict(b=0.5, a=0.1)))==['b', 'a']
    assert holm(dict(a=0.045, b=0.04))==dict(a=0.08, b=0.08)     # none is below one that is smaller

def test_parameters_of_one_name_begin_equal_whatever_else_there_is():
    whales = [start_by_name(Whale(c), 5).state_dict() for c in (tiny(64), tiny_v4(64))]
    both = [k for k in whales[0].keys() & whales[1].keys() if whales[0][k].shape==whales[1][k].shape]
    assert len(both)>40 and all(torch.equal(whales[0][k], whales[1][k]) for k in both)

def test_beginnings_depend_on_seed_and_name_and_on_nothing_else():
    def begun(seed, before):
        torch.manual_seed(before)
        return start_by_name(PlainTransformer(PlainConfig()), seed)
    a,b,c = begun(1, 0), begun(1, 99), begun(2, 0)
    for (name,p),q,r in zip(a.named_parameters(), b.parameters(), c.parameters()):
        assert torch.equal(p, q)
        if p.ndim==1: assert torch.equal(p, torch.ones_like(p)), name   # a norm stays one
        else: assert not torch.equal(p, r) and 0.018<p.std()<0.022, name
    assert not torch.equal(a.layers[0].self_attn.q_proj.weight, a.layers[1].self_attn.q_proj.weight)

def test_entries_say_how_they_were_made(tmp_path):
    once(tmp_path/'a.json', dict(rung='x', seed=0), lambda: dict(loss=1.), 'a command')
    r, = read_entries(tmp_path/'a.json')
    assert r | dict(rung='x', seed=0, loss=1., command='a command')==r and r['commit']==commit() and processor() in r['processor']

INTERRUPTED = """
import os, sys, time
from nanowhale.lab.compare import once
for seed in range(3):
    def run():
        if seed==2: os.kill(os.getpid(), 9)
        return dict(loss=seed)
    once(sys.argv[1], dict(name='x', seed=seed), run, 'c')
"""

@pytest.mark.skipif(sys.platform=='win32', reason='has no such signal')
def test_a_killed_campaign_keeps_what_had_ended_and_goes_on(tmp_path):
    path = tmp_path/'a.json'
    assert subprocess.run([sys.executable, '-c', INTERRUPTED, str(path)]).returncode==-9
    assert by_seed(read_entries(path), 'loss', name='x')=={0: 0, 1: 1}
    made = []
    for seed in range(3): once(path, dict(name='x', seed=seed), lambda: made.append(seed) or dict(loss=seed), 'c')
    assert made==[2] and by_seed(read_entries(path), 'loss', name='x')=={0: 0, 1: 1, 2: 2}

def test_a_file_cut_short_while_written_is_not_left_behind(tmp_path, monkeypatch):
    "A full disk, say: the old file stays whole"
    path = tmp_path/'a.json'
    once(path, dict(seed=0), dict, 'c')
    before = path.read_text()
    def full(self, text, *a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(type(path), 'write_text', full)
    with pytest.raises(OSError, match='No space'): once(path, dict(seed=1), dict, 'c')
    assert path.read_text()==before and [p.name for p in tmp_path.iterdir()]==['a.json']
    json.loads(before)

@pytest.mark.parametrize('n', [2, 5])
def test_independent_errors_add_up_in_squares(n):
    d = paired({s: math.sin(s)+.2 for s in range(n)}, dict.fromkeys(range(n), 0.))
    for shared in (0., .3, 4.):
        half = math.sqrt((d.high-d.mean)**2+shared**2)
        wide = widened(d, shared)
        assert (wide.mean, wide.low, wide.high)==pytest.approx((d.mean, d.mean-half, d.mean+half))
        assert wide.p==pytest.approx(2*stats.t.sf(abs(d.mean)/half*stats.t.ppf(.975, n-1), n-1))
