"""The benchmark, small: both sides do the same work, and its table and file say what was measured"""
import json
import pytest, torch
from nanowhale.fast.bench import (add_to, alternate, bench, decode_rate, make_sides,
    profile_step, table, token_bytes)
from nanowhale.presets import tiny, tiny_v4
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
