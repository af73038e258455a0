"""The campaigns of part 5: how rates are tuned, what arms change, and which runs a bug needs (tests/tools/arms.py, bug_runs.py, pairs.py)"""
import json, math
import numpy as np
import pytest, torch
import arms, bug_runs, bugs, pairs, scaling
from nanowhale.fast.bench import add_to
from nanowhale.lab.scaling import fit, law
from nanowhale.model.hyper import HyperConnection
from nanowhale.train.data import embedded_corpus, split_held_out
from runs import ROOT

def valley(**best):
    "Bits per byte of rates, least at `best`"
    return lambda rates: sum(abs(torch.tensor(rates[k]/v).log2().item()) for k,v in best.items())

def tune(arm, bits, entries=()):
    "Make what is asked for until nothing is: (best rates, how many runs)"
    entries,made = list(entries),0
    while True:
        best,todo = arms.tuned(entries, arm)
        if todo is None: return None, made
        if not todo: return best, made
        for rates in todo: entries.append(dict(stage='tune', arm=arm, rates=rates, bits_per_byte=bits(rates)))
        made += len(todo)

def test_tuning_walks_until_both_neighbours_are_worse():
    best,made = tune('adamw', valley(lr=0.048))
    assert best==dict(muon_lr=0., lr=0.048) and made==6          # 0.003 to 0.096
    best,made = tune('adamw', valley(lr=0.006))
    assert best['lr']==0.006 and made==3
    assert tune('adamw', valley(lr=0.00075))[0]['lr']==0.00075

def test_rates_are_tuned_one_after_the_other():
    best,_ = tune('adamw_apart', valley(muon_lr=0.003, lr=0.024, head=4.))
    assert best==dict(muon_lr=0.003, lr=0.024, head=4.)

def test_the_last_factor_is_on_all_rates():
    "So that the base is tuned along the line on which its variants are"
    asked = []
    def bits(rates):
        asked.append(rates)
        return valley(**arms.ARMS['adamw_apart'].start)(rates)
    best,_ = tune('adamw_apart', bits)
    assert best==arms.ARMS['adamw_apart'].start and dict(muon_lr=0.012, lr=0.012, head=1.) in asked
    def along(rates): return abs(math.log2(rates['muon_lr']/rates['lr']*0.6))*9+abs(math.log2(rates['lr']/0.048))
    assert tune('base', along)[0]==dict(muon_lr=0.08, lr=0.048)

def test_other_arms_wait_for_the_base_and_scale_its_rates():
    assert arms.tuned([], 'half')==(arms.ARMS['base'].start, None)
    assert list(arms.runs('tune', ['half'], []))==[] and list(arms.runs('judge', ['base'], []))==[]
    entries = []
    while (todo := arms.tuned(entries, 'base')[1]):
        entries += [dict(stage='tune', arm='base', rates=r, bits_per_byte=valley(muon_lr=0.01, lr=0.012)(r)) for r in todo]
    best,_ = tune('half', valley(muon_lr=0.04), entries)
    assert best==dict(muon_lr=0.04, lr=0.048)
    assert len(list(arms.runs('judge', ['base'], entries)))==len(arms.JUDGING)
    assert {r.key['seed'] for r in arms.runs('judge', ['base'], entries)}.isdisjoint({arms.TUNING})

def test_rates_where_tuning_begins_are_judged_as_they_are():
    assert arms.tuned([], 'untuned')==(arms.ARMS['base'].start, [])
    assert len(list(arms.runs('judge', ['untuned'], [])))==len(arms.JUDGING)

def test_the_default_recipe_has_the_rates_that_tuning_came_to():
    recipe,entries = arms.get_recipe('tiny'),json.loads((ROOT/'results/arms.json').read_text())
    assert arms.tuned(entries, 'base')[0]==dict(muon_lr=recipe.muon_lr, lr=recipe.lr)

def test_a_doubt_is_settled_by_seeds_that_have_judged_nothing():
    seeds = {stage: {r.key['seed'] for r in arms.runs(stage, ['untuned'], [])} for stage in ('judge', 'again')}
    assert len(seeds['again'])==len(seeds['judge']) and not seeds['again'] & (seeds['judge'] | {arms.TUNING})

def test_steps_in_the_same_time():
    entries = [dict(stage='pace', arm='half', ratios=[0.5, 0.4, 0.625]), dict(stage='pace', arm='full', ratios=[1.04, .98, 1.01])]
    assert arms.in_time(entries, 'half')==2*arms.STEPS and arms.in_time(entries, 'full') is None and arms.in_time(entries, 'base') is None

@pytest.fixture
def little(monkeypatch):
    for k,v in dict(hidden_size=16, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_lora_rank=8, moe_intermediate_size=16, vocab_size=300,
        batch_size=1, context=16).items(): monkeypatch.setitem(arms.TINY, k, v)

def test_mixes_of_permutations_are_doubly_stochastic(little):
    whale,step,_ = arms.begin('permutations', arms.first_rates('permutations'), 0, 2, 0)
    hc = next(m for m in whale.modules() if isinstance(m, HyperConnection))
    X = torch.randn(2, 3, 4, 16)
    comb = hc(X)[2]
    assert hc.fn.shape[0]==4+4+24 and (comb.sum(-1)-1).abs().max()<1e-5 and (comb.sum(-2)-1).abs().max()<1e-5
    before = hc.fn.clone()
    step(0)
    assert not torch.equal(before, hc.fn)             # it is trained

def test_mixes_without_rounds_only_divide_by_targets(little):
    hc = next(m for m in arms.begin('four_0', arms.first_rates('four_0'), 0, 2, 0)[0].modules() if isinstance(m, HyperConnection))
    comb = hc(3*torch.randn(2, 3, 4, 16))[2]
    assert (comb.sum(-1)-1).abs().max()<1e-4 and (comb.sum(-2)-1).abs().max()>1e-3

def test_adamw_has_rates_of_its_own_for_matrices_tables_and_head(little):
    "With no rate for the others, only the named part moves"
    cases = ((dict(muon_lr=.01, lr=0., head=1.), 'q_a_proj'), (dict(muon_lr=0., lr=.01, head=0.), 'embed_tokens'),
        (dict(muon_lr=0., lr=1e-9, head=1e7), 'lm_head'))
    for rates,moves in cases:
        whale,step,_ = arms.begin('adamw_apart', rates, 0, 4, 0)
        before = {n: p.detach().clone() for n,p in whale.named_parameters()}
        step(0)
        moved = {n for n,p in whale.named_parameters() if (p-before[n]).abs().max()>1e-6}
        assert any(moves in n for n in moved), (moves, moved)
        for other in {'q_a_proj', 'embed_tokens', 'lm_head'}-{moves}: assert not any(other in n for n in moved), (moves, moved)

def test_tuning_and_judging_share_no_held_out_document(little):
    (_,_,a),(_,_,b) = (arms.begin('base', arms.first_rates('base'), 0, 2, half) for half in (0, 1))
    assert a.texts and b.texts and not set(a.texts)&set(b.texts)

def test_a_harmless_bug_gets_one_seed(tmp_path):
    out = tmp_path/'bugs.json'
    def note(name, far, end): add_to(out, dict(name=name, far=far, seed=0, steps=40, end=end), ('name', 'far', 'seed', 'steps'))
    some,other = bugs.BUGS[0],bugs.BUGS[1]
    note('right', False, 'abc')
    note(some.name, False, 'abc')
    note(other.name, False, 'def')
    seeds = {name: [r.key['seed'] for r in bug_runs.runs(40, 3, out) if r.key['name']==name] for name in (some.name, other.name, 'right')}
    assert seeds=={some.name: [0], other.name: [0, 1, 2], 'right': [0, 0, 1, 1, 2, 2]}

def test_the_museum_shows_bugs_that_there_are():
    for begins in bug_runs.CASES.values(): assert sum(b.name.startswith(begins) for b in bugs.BUGS)==1, begins

def test_drafts_start_from_held_out_text():
    class Tok:
        bos_token_id = 1
        def encode(self, text, add_special_tokens): return list(text.encode())
    held = split_held_out(embedded_corpus())[1]
    starts = pairs.beginnings(Tok())
    assert len(starts)==pairs.TEXTS
    for ids in starts: assert any(t.encode().startswith(bytes(ids[0,1:].tolist())) for t in held)

def test_the_fit_finds_a_law_again_and_what_is_held_stays():
    "Also far outside, where nothing was measured, if there is no noise"
    w = torch.tensor([-.2, 3., .35, 4., .4], dtype=torch.float64)
    N,D = (torch.tensor(x, dtype=torch.float64) for x in zip(*((n, d) for n in (8e4, 3e5, 9e5, 3e6) for d in (2.6e5, 5e5, 1e6))))
    exact = law(w, N, D)
    assert (law(fit(N, D, exact), N, D)/exact-1).abs().max()<1e-3
    far = torch.tensor(3e7, dtype=torch.float64),torch.tensor(1e8, dtype=torch.float64)
    assert abs(law(fit(N, D, exact), *far)/law(w, *far)-1)<.05
    held = fit(N, D, exact, ((-50., 2., .1, 3., .1),), torch.tensor([True, False, False, False, False]))
    assert held[0]==-50

def test_of_several_searches_the_best_end_counts():
    N,D = torch.tensor([1e5, 1e6, 1e5, 1e6, 3e6]).double(),torch.tensor([3e5, 3e5, 1e6, 1e6, 2e6]).double()
    loss = law(torch.tensor([-.2, 3., .35, 4., .4]).double(), N, D)
    near,away = (0., 2., .3, 3., .3),(5., 9., .05, 9., .05)
    def off(w): return (law(w, N, D)/loss).log().square().sum()
    ends = {starts: fit(N, D, loss, starts, rounds=3) for starts in ((near,), (away,), (near, away), (away, near))}
    best = min((ends[near,], ends[away,]), key=off)
    assert off(ends[near,])!=off(ends[away,])
    for both in ((near, away), (away, near)): torch.testing.assert_close(ends[both], best)

def test_sizes_of_the_small_law_keep_the_cards_proportions():
    for width in scaling.WIDTHS:
        cfg = scaling.sizes(width)
        assert cfg.vocab_size==129280 and cfg.moe_intermediate_size==2*width and cfg.num_nextn_predict_layers==0
    for budget in scaling.BUDGETS: assert scaling.recipe(128, budget).steps*scaling.recipe(128, budget).targets==budget
    assert scaling.recipe(128, 2**18).lr==0.012 and scaling.recipe(32, 2**18).lr==0.024

def test_text_of_the_small_law_comes_in_the_order_of_the_gpu_run(tmp_path):
    docs = [f'{i} '+'word '*50 for i in range(40)]
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(dict(text=t))+'\n' for t in docs))
    got = [json.loads(line)['text'] for line in open(scaling.text(str(tmp_path/'a.jsonl'), str(tmp_path)))]
    assert got==[docs[i] for i in np.random.default_rng(0).permutation(40)]
