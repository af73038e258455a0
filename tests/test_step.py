"""One step: half precision beside float32, what a skipped step leaves alone, and figures that add up"""
import copy, inspect, math, random
from dataclasses import asdict, replace
import pytest, torch
from torch.testing import assert_close
import nanowhale.train.step as S, nanowhale.train.loop as T
from nanowhale.train.checkpoint import load_trainer_state, trainer_state
from nanowhale.presets import tiny, tiny_v4
from nanowhale.train.evaluate import evaluate
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import CARD, RECIPES, Recipe, get_recipe
from nanowhale.train.step import (add_gradients, first_not_finite, gradient_norms, load_balance,
    load_entropy, n_targets, part_of, train_step)
from runs import jsonl, metrics, texts

def packed(n, T, V=300, seed=0):
    "Random rows with document boundaries and padding in unequal places"
    g = torch.Generator().manual_seed(seed)
    docs = (torch.rand(n, T+1, generator=g)<0.15).cumsum(1)
    docs[0,T//2:] = -1
    return dict(input_ids=torch.randint(0, V, (n, T+1), generator=g), docs=docs)

def small(**kw): return replace(tiny(vocab_size=300), num_hidden_layers=2, **kw)

def whale_and_opts(recipe, seed=0):
    torch.manual_seed(seed)
    whale = Whale(small())
    return whale, make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)

def everything(whale, opts): return {**{k: v.clone() for k,v in whale.state_dict().items()}, **{k: v.clone() for k,v in trainer_state(whale, opts).items()}}

def flat_grad(whale): return torch.cat([p.grad.flatten() for p in whale.parameters() if p.grad is not None])

def norm(x):
    "In float64: the float32 norm of a million numbers at once is off in the fourth digit"
    return x.double().norm().item()

# ---------------------------------------------------------------- recipes

def test_recipes_are_what_they_say():
    card,whale = get_recipe('nanowhale_100m', 'card'),get_recipe('nanowhale_100m')
    assert (card.steps, card.batch_size, card.accum, card.context, card.lr, card.warmup, card.weight_decay, card.clip, card.precision)==(
        5000, 8, 4, 2048, 6e-4, 0.03, 0.1, 1.0, 'bf16')
    assert card.decay==1 and not card.muon_lr and card.rows==32 and card.targets==65536
    assert (whale.balance_weight, whale.bias_speed, whale.mtp_weight, whale.mtp_final)==(1e-4, 1e-3, 0.3, 0.1) and whale.muon_lr
    assert whale.targets==card.targets and whale.data==card.data=='HuggingFaceFW/fineweb-edu'
    assert all(asdict(r['card']).items()>=CARD.items() for r in RECIPES.values())
    with pytest.raises(ValueError, match='choose one of'): get_recipe('tiny', 'cake')

@pytest.mark.parametrize('bad', [dict(steps=0), dict(batch_size=-1), dict(lr=float('nan')), dict(clip=-1.), dict(precision='fp16'), dict(parallel='tensor'),
    dict(keep=0), dict(patience=0), dict(warmup=1.01), dict(dense=2), dict(compile=True, parallel='fsdp')])
def test_impossible_values(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): Recipe(**bad)

# ---------------------------------------------------------------- half precision

def test_bf16_is_close_to_fp32_and_keeps_float32_weights():
    rows,grads,losses = packed(6, 24),{},{}
    for precision in ('fp32', 'bf16'):
        whale,opts = whale_and_opts(Recipe())
        sums,_,_ = add_gradients(whale, rows, 3, precision=precision)
        losses[precision],grads[precision] = sums['loss'].item(),flat_grad(whale)
        assert all(t.dtype==torch.float32 for t in [*whale.state_dict().values(), grads[precision]])
    assert 0<abs(losses['bf16']-losses['fp32'])<0.01*losses['fp32']   # it did run in another precision
    assert torch.cosine_similarity(*grads.values(), dim=0)>0.99

def test_a_short_training_in_bf16_follows_fp32():
    ends = {}
    for precision in ('fp32', 'bf16'):
        recipe = Recipe(steps=12, batch_size=4, precision=precision)
        whale,opts = whale_and_opts(recipe)
        ms = [train_step(whale, whale, opts, packed(8, 24, seed=i%2), recipe, i) for i in range(12)]
        assert not any(m['skipped'] for m in ms) and ms[-1]['loss']<ms[0]['loss']-0.5
        ends[precision] = evaluate(whale, packed(8, 24, seed=0))['loss']
    assert abs(ends['bf16']-ends['fp32'])<0.05*ends['fp32']

def test_losses_and_gradients_do_not_depend_on_how_rows_are_split():
    "The balance loss, too, is a mean over all rows of the step, also where the last batch is smaller"
    rows,found = packed(5, 24),{}
    for size in (5, 2, 1):
        whale,_ = whale_and_opts(Recipe())
        sums,_,_ = add_gradients(whale, rows, size, balance_weight=1.)
        found[size] = torch.stack([sums[k] for k in ('loss', 'mtp_loss', 'balance_loss')]),flat_grad(whale)
    assert found[5][0].min()>0
    for size in (2, 1):
        for a,b in zip(found[size], found[5]): assert_close(a, b, atol=1e-5, rtol=1e-4)

def uneven(seed, n=6, T=26, V=40):
    "Documents of all lengths, padding on either side, and tokens that are no targets"
    g = torch.Generator().manual_seed(seed)
    docs = (torch.rand(n, T+1, generator=g)<torch.rand(n, 1, generator=g)/2).cumsum(1)
    docs[torch.arange(T+1)>=torch.randint(T//2, T+2, (n, 1), generator=g)] = -1
    docs[0] = docs[0].flip(0)
    ids = torch.randint(0, V, (n, T+1), generator=g)
    return dict(input_ids=ids, docs=docs, labels=ids.masked_fill(torch.rand(n, T+1, generator=g)<0.3, -100))

def one_step(rows, size, sparse=True):
    "All four losses, load and gradient of a whale with all kinds of layers, in float64"
    torch.manual_seed(0)
    whale = Whale(replace(tiny_v4(40), hidden_size=24, moe_intermediate_size=16, index_topk=2, initializer_range=0.1)).double()
    sums,load,_ = add_gradients(whale, rows, size, balance_weight=1., sparse=sparse)
    return torch.stack(list(sums.values())), load, flat_grad(whale)

def the_same(got, want):
    for a,b in zip(got, want, strict=True): assert_close(a, b, atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('sparse', [True, False])
@pytest.mark.parametrize('seed', range(4))
def test_no_loss_depends_on_a_random_split(seed, sparse):
    "The rows of a step in any order, any number at a time"
    rows,r = uneven(seed),random.Random(seed)
    want = one_step(rows, 6, sparse)
    assert len(want[0])==4 and want[0].min()>0
    for size in (1, r.randint(2, 5)):
        order = r.sample(range(6), 6)
        the_same(one_step({k: v[order] for k,v in rows.items()}, size, sparse), want)

@pytest.mark.parametrize('seed', range(2))
def test_no_loss_depends_on_how_many_processes_share_a_step(seed, monkeypatch):
    "Two of them, one after the other: each says what it counts, then both are told the sum"
    rows = uneven(seed)
    want = one_step(rows, 6)
    monkeypatch.setattr(S, 'n_ranks', lambda: 2)
    def process(rank, counted=None):
        said = []
        def total(t):
            said.append(t)
            return t if counted is None or len(said)>1 else counted
        monkeypatch.setattr(S, 'total', total)
        return one_step({k: v[rank::2] for k,v in rows.items()}, 2), said[0]
    counted = sum(process(rank)[1] for rank in (0, 1))
    losses,load,grads = (sum(parts) for parts in zip(*(process(rank, counted)[0] for rank in (0, 1))))
    the_same((losses, load, grads/2), want)       # DDP averages gradients

def test_each_optimizer_has_its_own_rate():
    recipe = Recipe(steps=4, batch_size=2, lr=1e-3, muon_lr=0.02)
    whale,opts = whale_and_opts(recipe)
    for i in range(4):
        factor = train_step(whale, whale, opts, packed(2, 8), recipe, i)['lr']/recipe.lr
        for opt,lr in zip(opts, (1e-3, 0.02), strict=True):
            for group in opt.param_groups: assert group['lr']==pytest.approx(lr*factor, rel=1e-9) and factor>0

def test_indexers_only_learn_for_the_first_share_of_the_steps(monkeypatch):
    met,real = [],S.add_gradients
    def noted(*args, **kw): met.append(inspect.signature(real).bind(*args, **kw).arguments['sparse']); return real(*args, **kw)
    monkeypatch.setattr(S, 'add_gradients', noted)
    recipe = Recipe(steps=4, batch_size=2, dense=0.5)
    whale,opts = whale_and_opts(recipe)
    for i in range(4): train_step(whale, whale, opts, packed(2, 8), recipe, i)
    assert met==[False, False, True, True]

# ---------------------------------------------------------------- steps that are skipped

@pytest.mark.parametrize('where', ['norm', 'one gradient', 'one row'])
@pytest.mark.parametrize('muon_lr', [0., 0.02])
def test_a_skipped_step_leaves_everything_alone(where, muon_lr, monkeypatch):
    recipe = Recipe(steps=10, batch_size=2, muon_lr=muon_lr, bias_speed=0.01)
    whale,opts = whale_and_opts(recipe)
    rows = packed(4, 12)
    for i in range(2): assert train_step(whale, whale, opts, rows, recipe, i)['skipped']==0   # so that the optimizers have a state
    before = everything(whale, opts)
    hooks = []
    if where=='norm': hooks = [whale.model.norm.register_forward_hook(lambda m, a, out: out*float('inf'))]
    if where=='one gradient': hooks = [whale.mtp[0].e_proj.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), float('nan')))]
    if where=='one row':   # of one of the two batches only
        calls = []
        def spoil(m, a, out): calls.append(1); return out*float('nan') if len(calls)==2 else out
        hooks = [whale.model.embed_tokens.register_forward_hook(spoil)]
    m = train_step(whale, whale, opts, rows, recipe, 2)
    for h in hooks: h.remove()
    after = everything(whale, opts)
    assert m['skipped']==1 and before.keys()==after.keys() and all(torch.equal(v, after[k]) for k,v in before.items())
    assert all(p.grad is None or not p.grad.any() for p in whale.parameters())   # and nothing is left for the next step
    assert train_step(whale, whale, opts, rows, recipe, 3)['skipped']==0
    assert any(not torch.equal(v, everything(whale, opts)[k]) for k,v in before.items())

def test_an_optimizers_state_of_another_shape_is_refused():
    recipe = Recipe(steps=4, batch_size=2)
    whale,opts = whale_and_opts(recipe)
    train_step(whale, whale, opts, packed(2, 8), recipe, 0)
    state = trainer_state(whale, opts)
    name = next(k for k,v in state.items() if v.ndim>1)
    fresh = lambda: make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)
    load_trainer_state(whale, fresh(), state)
    for wrong in (state[name][:1], state[name].mT.contiguous()):
        with pytest.raises(ValueError, match='no state of these optimizers'): load_trainer_state(whale, fresh(), state|{name: wrong})

def test_the_step_after_a_skipped_one_is_the_step_without_it():
    recipe = Recipe(steps=10, batch_size=2)
    a,opts_a = whale_and_opts(recipe)
    b,opts_b = copy.deepcopy(a),None
    opts_b = make_optimizers(b, recipe.lr, recipe.muon_lr, recipe.weight_decay)
    h = a.model.norm.register_forward_hook(lambda m, args, out: out*float('nan'))
    assert train_step(a, a, opts_a, packed(2, 8), recipe, 1)['skipped']
    h.remove()
    for whale,opts in ((a, opts_a), (b, opts_b)): train_step(whale, whale, opts, packed(4, 12), recipe, 2)
    assert all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))

@pytest.mark.parametrize('name', ['model.layers.1.self_attn.q_b_proj', 'model.layers.0.mlp.experts', 'mtp.0.h_proj', 'lm_head'])
def test_the_first_module_that_is_not_finite_is_named(name):
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(2, 8)
    assert first_not_finite(whale, rows) is None
    p = next(p for n,p in whale.get_submodule(name).named_parameters())
    p.data.fill_(float('nan'))
    found = first_not_finite(whale, rows)
    assert found.startswith(name.rsplit('.', 1)[0] if 'experts' in name else name), found
    assert not any(m._forward_hooks for m in whale.modules())

def test_patience_ends_the_run_and_names_the_module(tmp_path, monkeypatch, capsys):
    from nanowhale.cli import main
    monkeypatch.setattr(T.Log, 'plot', lambda self: None)
    (tmp_path/'a.jsonl').write_text(jsonl(texts()))
    step = T.train_step
    def spoil(net, whale, *rest):
        if rest[-1]==3: whale.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: out*float('nan'))
        return step(net, whale, *rest)
    monkeypatch.setattr(T, 'train_step', spoil)
    code = main(['train', '--data', str(tmp_path/'a.jsonl'), '--steps', '10', '--evals', '5', '--batch-size', '2', '--context', '32', '--patience', '4',
                 '--out', str(tmp_path/'run')])
    last = capsys.readouterr().err.strip().split('\n')[-1]
    assert code==1 and '4 steps in a row' in last and 'model.layers.1.self_attn ' in last and 'up to step 6' in last, last
    steps = metrics(tmp_path/'run')
    assert [m['skipped'] for m in steps[:3]]==[0]*3 and all(m['skipped'] for m in steps[3:])
    for f in T.Path(tmp_path/'run'/'checkpoints').iterdir(): assert all(v.isfinite().all() for v in Whale.from_pretrained(f).state_dict().values())

# ---------------------------------------------------------------- figures

def test_gradient_norms_add_up():
    torch.manual_seed(0)
    whale = Whale(small())
    add_gradients(whale, packed(4, 12), 2, 0.3, 1e-4)
    norms = gradient_norms(whale)
    assert set(norms)=={'mtp', 'hyper', 'head', 'embed', 'attention', 'moe', 'collapse', 'norm'}
    assert abs(math.hypot(*norms.values())-norm(flat_grad(whale)))<1e-5*norm(flat_grad(whale))
    for part in norms:
        alone = torch.cat([p.grad.flatten() for n,p in whale.named_parameters() if part_of(n)==part])
        assert abs(norm(alone)-norms[part])<1e-5*max(1, norms[part])

def test_clipping_scales_the_whole_gradient():
    "With AdamW's first step the scale cannot be seen, so look at the gradients that the optimizer is given"
    for clip in (0.01, 1e9):
        recipe = Recipe(clip=clip, batch_size=4)
        whale,opts = whale_and_opts(recipe)
        seen = {}
        opts[0].register_step_pre_hook(lambda *a, seen=seen, whale=whale: seen.update(norm=norm(flat_grad(whale))))
        m = train_step(whale, whale, opts, packed(4, 12), recipe, 0)
        assert abs(seen['norm']-min(clip, m['grad_norm']))<1e-5*seen['norm']

def test_targets_are_counted_as_the_losses_count_them():
    rows = packed(5, 17)
    docs = rows['docs']
    want = [sum(docs[b,t]>=0 and docs[b,t]==docs[b,t-by] for b in range(5) for t in range(by, 18)) for by in (1, 2)]
    assert n_targets(rows).tolist()==want

def test_losses_are_means_over_the_targets_of_the_step():
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(5, 12)
    with torch.no_grad(): out = whale(rows['input_ids'], labels=rows['input_ids'], docs=rows['docs'])
    for size in (1, 2, 5):
        sums,load,_ = add_gradients(whale, rows, size)
        assert_close(torch.stack([sums['loss'], sums['mtp_loss']]).float(), torch.stack([out.loss, out.mtp_loss]), atol=1e-5, rtol=1e-5)
        assert torch.equal(load, out.expert_load.double())

def test_load_entropy():
    assert abs(load_entropy(torch.ones(3, 4))-math.log(4))<1e-6
    assert load_entropy(torch.tensor([[5., 0, 0, 0]]))==0

def test_a_block_without_a_target_is_no_collapsed_router():
    "Rows of two tokens have nothing for the MTP block: its load is zero, and no figure is NaN or tells of idle experts"
    recipe = Recipe(batch_size=4, context=1)
    whale,opts = whale_and_opts(recipe)
    m = train_step(whale, whale, opts, dict(input_ids=torch.randint(300, (4, 2)), docs=torch.zeros(4, 2).long()), recipe, 0)
    assert sum(m['expert_load'][-1])==0 and not m['skipped']
    assert all(math.isfinite(m[k]) for k in ('load_entropy', 'max_vio', 'smallest_share', 'busiest_share'))
    assert_close(m['load_entropy'], load_entropy(torch.tensor(m['expert_load'][:-1])))
    assert whale.mtp[0].mlp.gate.e_score_correction_bias.abs().max()==0

def test_balance_of_the_worst_block():
    load = torch.tensor([[5, 5, 5, 5], [8, 4, 0, 8], [10, 5, 4, 1]])
    assert load_balance(load)==pytest.approx(dict(max_vio=1., smallest_share=0., busiest_share=0.5))
    assert load_balance(load[:1])==pytest.approx(dict(max_vio=0., smallest_share=0.25, busiest_share=0.25))

def test_evaluation_does_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(9, 20)
    got = [evaluate(whale, rows, n_bytes=700, batch_size=n) for n in (1, 2, 4, 9, 100)]
    for g in got[1:]:
        for k in ('loss', 'mtp_loss', 'bits_per_byte', 'accuracy', 'entropy'): assert abs(g[k]-got[0][k])<1e-5*max(1, abs(got[0][k])), k
        assert g['tokens']==got[0]['tokens'] and g['expert_load']==got[0]['expert_load']
