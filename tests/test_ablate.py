"""An ablation changes what it names and nothing else, and compares like with like"""
import json, math
from dataclasses import asdict
import pytest, torch
from nanowhale.lab import ablate
from nanowhale.train import data
from nanowhale.lab.ablate import (ABLATIONS, Nothing, against_base, begin, cost_of, entries, gained_by_steps, kept,
    routing_by_lot, setup, steps_for, table, told, train_one)
from nanowhale.lab.compare import paired
from nanowhale.presets import count_params
from nanowhale.model.hyper import HyperConnection
from nanowhale.model.whale import Whale
from nanowhale.train.optim import Muon, make_optimizers
from runs import texts

@pytest.fixture(autouse=True)
def a_small_corpus(monkeypatch):
    "A few hundred documents in place of the standard library's English"
    for f in (ablate.words, ablate.material): f.cache_clear()
    monkeypatch.setattr(data, 'embedded_corpus', lambda: tuple(texts(300)))
    yield
    for f in (ablate.words, ablate.material): f.cache_clear()

def built(name): return begin(name, steps=3)[0]

def blocks(whale): return [*whale.model.layers, *whale.mtp]

CHANGES = dict(   # name -> what must hold for it, and must not for the base: (whale, config, recipe) -> bool
    one_stream=lambda w, c, r: w.model.n_streams==1,
    sinkhorn_2=lambda w, c, r: all(m.iters==2 for m in w.modules() if isinstance(m, HyperConnection)),
    transposed=lambda w, c, r: all(m.transposed for m in w.modules() if isinstance(m, HyperConnection)),
    no_sinks=lambda w, c, r: all(b.self_attn.sinks.isinf().all() and not b.self_attn.sinks.requires_grad for b in blocks(w)),
    window_32=lambda w, c, r: c.sliding_window==32, window_8=lambda w, c, r: c.sliding_window==8,
    one_group=lambda w, c, r: all(b.self_attn.o_a_proj.groups==1 for b in blocks(w)),
    dense=lambda w, c, r: all(len(b.mlp.experts.down_proj)==1 for b in blocks(w)),
    sigmoid=lambda w, c, r: all(torch.equal(b.mlp.gate.score(torch.ones(3)), torch.ones(3).sigmoid()) for b in blocks(w)),
    softmax=lambda w, c, r: all(torch.equal(b.mlp.gate.score(torch.ones(3)), torch.ones(3)/3) for b in blocks(w)),
    bias_only=lambda w, c, r: r.balance_weight==0 and r.bias_speed>0, loss_only=lambda w, c, r: r.balance_weight>0 and r.bias_speed==0,
    unbalanced=lambda w, c, r: r.balance_weight==0 and r.bias_speed==0,
    no_shared=lambda w, c, r: all(isinstance(b.mlp.shared_experts, Nothing) for b in blocks(w)),
    no_mtp=lambda w, c, r: len(w.mtp)==0,
    vocab_512=lambda w, c, r: len(w.lm_head.weight)==512, vocab_2048=lambda w, c, r: len(w.lm_head.weight)==2048,
    **{f'adamw_{lr:03}': lambda w, c, r, lr=lr: r.lr==lr/1000 and not any(isinstance(o, Muon) for o in make_optimizers(w, r.lr, r.muon_lr))
        for lr in (3, 6, 12)})

def test_every_ablation_has_its_proof(): assert set(CHANGES)==set(ABLATIONS)-{'base'}

@pytest.mark.parametrize('name', CHANGES)
def test_changes_what_it_names(name):
    for n in ('base', name):
        cfg,recipe,_ = setup(n)
        assert CHANGES[name](built(n), cfg, recipe)==(n==name)

@pytest.mark.parametrize('name', CHANGES)
def test_changes_nothing_else(name):
    "The fields that differ from the base are those that the ablation lists; and what was changed in the whale is all that was"
    listed = set(ABLATIONS[name])-{'change'} | ({'num_nextn_predict_layers'} if name=='no_mtp' else set())
    (c0,r0,_),(c,r,change) = setup('base'),setup(name)
    assert {k for a,b in ((c0,c), (r0,r)) for k,v in asdict(a).items() if asdict(b)[k]!=v}==listed
    if change:
        left = {k for k in Whale(c).state_dict() if k in built(name).state_dict()}
        assert {k for k in Whale(c).state_dict() if k not in left}=={k for k in Whale(c).state_dict() if 'shared_experts' in k and name=='no_shared'}

def test_sizes_are_equal_where_it_is_said():
    size = lambda name: sum(count_params(setup(name)[0], active=True).values())
    assert size('one_group')==size('base')==size('sigmoid') and abs(size('dense')/size('base')-1)<0.01
    c,shared = setup('no_shared')[0],3*setup('base')[0].hidden_size*setup('base')[0].moe_intermediate_size
    assert abs(size('no_shared')-shared*(c.num_hidden_layers+1)-size('base'))<=(c.num_hidden_layers+1)*(c.hidden_size+1)   # a row of the router, and its bias

def test_no_sinks_stay_away_through_training():
    whale,step,_ = begin('no_sinks', steps=3)
    for i in range(3): assert not step(i)['skipped']
    assert all(b.self_attn.sinks.isinf().all() for b in blocks(whale))
    x = torch.randn(1, 5, 64)
    rope = torch.ones(5, 4),torch.zeros(5, 4)
    attn = whale.model.layers[0].self_attn
    q,kv = attn.query(x, *rope),attn.latent(x, *rope)
    w = (torch.einsum('bthk,bsk->bhts', q, kv)/4).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e30).softmax(-1)
    want = attn.output(torch.einsum('bhts,bsk->bthk', w, kv), *rope)
    torch.testing.assert_close(attn(x, rope, None), want, atol=1e-5, rtol=1e-4)

def test_runs_of_a_seed_read_the_same_rows(monkeypatch):
    seen = {}
    monkeypatch.setattr(ablate, 'train_step', lambda net, whale, opts, rows, recipe, i: seen.setdefault((name, i), rows['input_ids']))
    for name in ('base', 'dense'):
        step = begin(name, 1, steps=2)[1]
        step(0); step(1)
    assert all(torch.equal(seen['base', i], seen['dense', i]) for i in (0, 1)) and not torch.equal(seen['base', 0], seen['base', 1])

def test_a_run_of_two_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, 'pace', lambda name: [0.5, 0.5])
    found = ablate.ablate('one_stream', seeds=2, steps=2, out=tmp_path/'a.json')
    assert [(r['name'], r['seed'], r['equal'], r.get('steps')) for r in found]==[('base', 0, 'tokens', 2), ('one_stream', 0, 'tokens', 2),
        ('base', 1, 'tokens', 2), ('one_stream', 1, 'tokens', 2), ('one_stream', 0, 'pace', None), ('one_stream', 0, 'time', 4), ('one_stream', 1, 'time', 4)]
    for r in found:
        assert r.keys()>={'command', 'commit', 'hardware'}
        assert r['equal']=='pace' or r['skipped']==0 and 0<r['bits_per_byte']<20 and 'cpu_seconds' in r
    assert 'one_stream    0.50x +-0.00' in capsys.readouterr().out
    def again(*a): raise RuntimeError('measured twice')
    for what in ('train_one', 'pace'): monkeypatch.setattr(ablate, what, again)
    assert ablate.ablate('one_stream', seeds=2, steps=2, out=tmp_path/'a.json')==found     # what is there is not measured again
    with pytest.raises(RuntimeError, match='twice'): ablate.ablate('one_stream', seeds=3, steps=2, out=tmp_path/'a.json')

def test_a_pace_is_a_ratio_of_times(monkeypatch):
    "Time stands still but in steps: of the base it takes 2, of the other 3, and the first two of each take a while"
    clock = [0.]
    monkeypatch.setattr(ablate.time, 'process_time', lambda: clock[0])
    def begun(name, **kw): return None,lambda i: clock.__setitem__(0, clock[0]+90*(i<2)+(2 if name=='base' else 3)),None
    monkeypatch.setattr(ablate, 'begin', begun)
    assert ablate.pace('dense', 3)==[1.5]*3

def test_a_run_can_be_repeated():
    once,again = (train_one('window_8', 0, 2) for _ in range(2))
    assert {k: v for k,v in once.items() if k!='cpu_seconds'}=={k: v for k,v in again.items() if k!='cpu_seconds'}

def test_unknown_names_are_answered(tmp_path):
    with pytest.raises(ValueError, match='no ablation .tail.: choose one of all, base, one_stream'): ablate.ablate('tail', out=tmp_path/'a.json')
    assert not (tmp_path/'a.json').exists()

def test_equal_time_is_more_steps_for_a_faster_step():
    assert [steps_for(cost_of(r), 100) for r in ([.5, .5], [1.25, 1.25], [.94, 1.04, .99], [.97, .97, .971])]==[200, 80, 100, 103]

def test_the_cost_of_a_step_has_the_interval_of_its_logarithms():
    ratios = [1.1, 1.2, 1.4]
    d,x = cost_of(ratios),torch.tensor(ratios, dtype=torch.float64).log()
    assert abs(d.mean-x.mean())<1e-9 and abs(d.high-d.mean-4.302653*x.std()/3**.5)<1e-5

def made(*rows):
    return [dict(name=n, seed=s, equal=e, base_steps=10, steps=k, bits_per_byte=b) for n,s,e,k,b in rows]

PAIRS = made(('base', 0, 'tokens', 10, 3.), ('base', 1, 'tokens', 10, 4.), ('base', 2, 'tokens', 10, 5.),
    ('dense', 1, 'tokens', 10, 4.5), ('dense', 0, 'tokens', 10, 3.1), ('dense', 2, 'tokens', 10, 5.3), ('dense', 3, 'tokens', 10, 9.))

def test_differences_are_taken_seed_by_seed(tmp_path):
    d = against_base(PAIRS, 'dense')
    assert abs(d.mean-.3)<1e-9 and abs(d.sd-.2)<1e-9 and d.n==3 and against_base(PAIRS, 'dense', 'time') is None
    assert str(d) in table(PAIRS) and against_base(PAIRS[:4], 'dense') is None
    (tmp_path/'a.json').write_text(json.dumps(PAIRS))
    assert entries(tmp_path/'a.json', 10)==PAIRS and entries(tmp_path/'a.json', 11)==[]

def test_the_error_of_the_pace_widens_the_interval_at_equal_time():
    "As much as the steps may be off, times what a step gains; by hand"
    again = made(*(('dense', s, 'time', 20, b) for s,b in enumerate((2.9, 4.2, 5.1))))
    pace = [dict(name='dense', equal='pace', ratios=[.4, .5, .6])]
    runs = PAIRS+again+pace
    gained = ((2.9-3.1)+(4.2-4.5)+(5.1-5.3))/3/math.log(2)
    assert abs(gained_by_steps(runs)-gained)<1e-9
    d = against_base(runs, 'dense', 'time')
    plain = paired({0: 2.9, 1: 4.2, 2: 5.1}, {0: 3., 1: 4., 2: 5.})
    off = cost_of(pace[0]['ratios'])
    want = math.sqrt((plain.high-plain.mean)**2+(gained*(off.high-off.mean))**2)
    assert abs(d.mean-plain.mean)<1e-9 and abs(d.high-d.mean-want)<1e-9 and abs(d.mean-d.low-want)<1e-9 and d.p>plain.p
    exact = against_base(PAIRS+again+[pace[0] | dict(ratios=[.5, .5, .5])], 'dense', 'time')
    assert abs(exact.high-plain.high)<1e-9 and abs(exact.p-plain.p)<1e-9

def test_stars_are_corrected_for_all_comparisons():
    other = [r | dict(name='sigmoid', bits_per_byte=r['bits_per_byte']+1+.001*r['seed']) for r in PAIRS[:3]]
    found = told(PAIRS+other)
    raw = {k: against_base(PAIRS+other, k[0]).p for k in found}
    assert found['sigmoid', 'tokens'][1]==2*raw['sigmoid', 'tokens']<.05<found['dense', 'tokens'][1]
    assert [line.count('*') for line in table(PAIRS+other).splitlines()[3:]]==[0, 1]

def test_runs_of_a_seed_begin_with_the_same_weights(monkeypatch):
    "Also where a variant lacks parts that come before, or has others"
    first = {}
    def step(net, whale, opts, rows, recipe, i):
        first.setdefault(name, {k: v.clone() for k,v in whale.state_dict().items()})
        return dict(loss=1., load_entropy=0., skipped=0)
    monkeypatch.setattr(ablate, 'train_step', step)
    for name in ('base', 'one_stream', 'no_shared', 'vocab_512'): train_one(name, 1, 1)
    for name,some in first.items():
        alike = [k for k,v in some.items() if k in first['base'] and v.shape==first['base'][k].shape]
        assert len(alike)>20 and all(torch.equal(some[k], first['base'][k]) for k in alike), name

def test_what_stays_in_a_stream():
    whale,_,held = begin('base', steps=2)
    some = {k: v[:2] for k,v in held.rows.items()}
    assert all(abs(s-1/4)<0.1 for s in kept(whale, some))           # a fresh one mixes everything
    with torch.no_grad():
        for m in whale.modules():
            if isinstance(m, HyperConnection): m.base[8:] = 30*torch.eye(4).flatten(); m.fn.zero_()
    assert all(s>0.99 for s in kept(whale, some))

def test_routing_by_lot():
    whale,_,held = begin('base', steps=2)
    ids = held.rows['input_ids'][:8]
    seen = []
    hook = whale.model.layers[0].mlp.experts.register_forward_hook(lambda m, args, out: seen.append(args[1:]))
    whale(ids).logits
    with routing_by_lot(whale): whale(ids).logits
    whale(ids).logits
    hook.remove()
    (idx,w),(lot,w2),(back,_) = seen
    assert torch.equal(idx, back) and torch.equal(w, w2) and (lot[:,0]!=lot[:,1]).all() and not torch.equal(idx.sort(1).values, lot.sort(1).values)
    assert lot.flatten().bincount().float().std()<0.1*lot.numel()/4
