"""The benchmark, small: both sides do the same work, and its table and file say what was measured"""
import json
import pytest, torch, rungs
from torch.utils.flop_counter import FlopCounterMode
from nanowhale.fast.bench import (add_to, alternate, bench, decode_rate, make_sides,
    profile_step, table, token_bytes)
from nanowhale.fast.kernels import FAST, use
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny, tiny_v4
from nanowhale.train.optim import Muon, make_optimizers, newton_schulz
from nanowhale.train.loop import hardware
from nanowhale.fast.graph import Decoder

@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_all_of_it(dtype, tmp_path, capsys):
    out = tmp_path/'bench.json'
    add_to(out, dict(preset='tiny', dtype=dtype, batch_size=1, context=32, hardware=hardware(torch.device('cpu')), old=True))
    res = bench('tiny', 1, 32, dtype, max_new_tokens=3, repeats=1, device='cpu', profile=dtype=='fp32', out=out, force=True)
    assert json.loads(out.read_text())==[json.loads(json.dumps(res))]               # in place of the older one of its kind
    assert capsys.readouterr().out.count(table(res))>=1
    names = {'nanowhale', 'transformers'}
    assert set(res['losses'])==set(res['memory'])==set(res['prefill'])==set(res['decoding'])==names and set(res['training'])==names|{'nanowhale with MTP'}
    assert abs(res['losses']['nanowhale']-res['losses']['transformers'])<(1e-4 if dtype=='fp32' else 2e-2)
    assert all(x>0 for what in ('training', 'prefill', 'decoding', 'memory') for x in res[what].values())
    if dtype=='fp32': assert abs(sum(res['profile'].values())-2*res['profile']['step'])<1e-3      # the parts and `other` add up to the step

def test_sides_have_equal_logits():
    sides,ids = make_sides('tiny', torch.device('cpu'), 16),torch.randint(0, 4096, (2,16))
    with torch.no_grad(): torch.testing.assert_close(sides['nanowhale'](ids).logits, sides['transformers'](ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='reads at most'): make_sides('tiny', torch.device('cpu'), 10**6)

def test_turns():
    order = []
    alternate(dict(a=lambda: order.append('a'), b=lambda: order.append('b')), 2)
    assert order==['a', 'b']*3

def test_a_decoder_is_used(monkeypatch):
    used = []
    def decoder(*args): used.append(1); return Decoder(*args, compile=False)
    assert decode_rate(make_sides('tiny', torch.device('cpu'), 16, peer=False)['nanowhale'], torch.zeros(1, 4, dtype=torch.long), 5, decoder)>0 and used==[1]

def test_bytes_and_files(tmp_path):
    for cfg in (tiny(), tiny_v4()): assert token_bytes(cfg, 100, 4)==2*token_bytes(cfg, 100, 2)>0
    for x in (1, 2): add_to(tmp_path/'a.json', dict(kind='x', value=x), same=('kind',))
    assert json.loads((tmp_path/'a.json').read_text())==[dict(kind='x', value=2)]

def test_profile_of_all_kinds_of_layers():
    parts = profile_step('tiny_v4', torch.device('cpu'), 1, 32, 'fp32', 1)
    assert {'attention', 'moe', 'hyper', 'head', 'mtp', 'optimizer', 'step'}<=set(parts)

def fast_functions(whale):
    names = {k for functions in FAST.values() for k in functions}-{'see'}      # for which `use` makes a new function each time
    return {n: {k: f for k,f in vars(m).items() if k in names} for n,m in whale.named_modules()}

def test_ladder_ends_in_the_fast_set():
    steps = list(rungs.ladder().values())
    assert not any(steps[0].values()) and steps[-1]==FAST
    for less,more in zip(steps, steps[1:]):
        gained = [(cls, k) for cls in FAST for k in more[cls] if k not in less[cls]]
        assert gained and all(less[cls].items()<=more[cls].items() for cls in FAST)          # a part more, nothing lost
    whale = Whale(tiny_v4())
    rungs.switch(whale, steps[-1])
    assert fast_functions(whale)==fast_functions(use(Whale(tiny_v4()))) and whale.see.__module__.endswith('attention')
    muon = make_optimizers(whale, 1e-5, 1e-5)[1]
    for functions,rounds in zip(steps, [False]*6+[True]*2):
        rungs.switch(muon, functions)
        assert (muon.orthogonalize is not newton_schulz)==rounds and isinstance(muon, Muon)
    rungs.switch(whale, steps[0])
    assert not any(fast_functions(whale).values()) and 'see' not in vars(whale)

def test_rungs_compute_the_same():
    torch.manual_seed(0)
    whale,ids = Whale(tiny_v4()),torch.randint(0, 4096, (2,64))
    def grads(functions):
        rungs.switch(whale, functions)
        whale.zero_grad()
        loss = whale(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad for p in whale.parameters() if p.grad is not None]
    plain,*others = map(grads, rungs.ladder().values())
    for other in others: torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-4)

def test_muon_flops_are_those_of_its_products():
    whale = Whale(tiny())
    opts = make_optimizers(whale, 1e-5, 1e-5)
    for p in whale.parameters(): p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        for opt in opts: opt.step()
    assert counter.get_total_flops()==rungs.muon_flops(opts)>0

def test_the_ladder_is_measured(monkeypatch):
    monkeypatch.setattr(rungs, 'cxx_compiler', lambda: None)
    res = json.loads(json.dumps(rungs.measure('tiny', 1, 32, repeats=1, device='cpu')))
    names = ['plain', *rungs.PARTS[:-1], 'transformers']      # on a CPU the check is the plain one
    assert [r['rung'] for r in res['training']]==names==list(res['losses'])
    assert max(res['losses'].values())-min(res['losses'].values())<1e-4
    assert [r['rung'] for r in res['decoding']]==['plain', 'fast', 'transformers']
    for row in res['training']+res['decoding']:
        middle,least,most = row['tokens_per_second']
        assert 0<least<=middle<=most and row['of_ceiling']>0
    assert [list(r.get('beside', ())) for r in res['training']]==[[], *([n] for n in names[:-2]), ['plain']]
    assert all(name in rungs.table(res) for name in names)
