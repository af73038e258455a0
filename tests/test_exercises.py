"""Exercises: every checker takes the right function, turns every planted mistake away by its own sentence, and says something useful about the rest."""
import ast, functools, inspect, json, re
from pathlib import Path
import pytest, torch, torch.nn.functional as F
import course
from nanowhale.course.checker import EXERCISES, answer, copied, drawn, tensors, verdict
from nanowhale.course import exercise_model, exercises
from nanowhale.course.exercises import check
from nanowhale.generate.sample import keep_top_p
from nanowhale.model.attention import attend

NBS = Path(__file__).resolve().parents[1]/'nbs'
MISTAKES = [(name, says) for name,ex in EXERCISES.items() for says in ex.wrong]

def handed_in(f, name): return f if EXERCISES[name].within is None else f()     # a function, or the number that it computes

def cells(nb, kind): return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def section(nb): return next((t.partition('## Exercises')[2].partition('\n## ')[0] for t in cells(nb, 'markdown') if '## Exercises' in t), '')

SECTIONS = {nb.stem: section(nb) for nb in sorted(NBS.glob('[!s]*/[0-9]*.ipynb')) if section(nb)}
SOLUTIONS = sorted((NBS/'solutions').glob('*.ipynb'))
ASKED = {name: (stem, text) for stem,text in SECTIONS.items() for name in re.findall(r"^check\('(\w+)', \w+\)$", text, flags=re.M)}

# ---------------------------------------------------------------- each exercise

@pytest.mark.parametrize('name', EXERCISES)
def test_the_right_function_passes(name): assert verdict(name, handed_in(EXERCISES[name].right, name)) is None

@pytest.mark.parametrize('name,says', MISTAKES, ids=lambda s: s[:40])
def test_a_planted_mistake_is_named(name, says):
    with pytest.raises(AssertionError) as e: check(name, handed_in(EXERCISES[name].wrong[says], name))
    assert str(e.value)==f'{name}: {says}'

def adam(p, g, m, v, t, lr, b1, b2, eps, wd):
    "torch's Adam, which adds the decay to the gradient"
    w = torch.nn.Parameter(p.clone()); w.grad = g
    opt = torch.optim.Adam([w], lr=lr, betas=(b1, b2), eps=eps, weight_decay=wd)
    opt.state[w] = dict(step=torch.tensor(t-1.), exp_avg=m.clone(), exp_avg_sq=v.clone())
    opt.step()
    return w.detach(), opt.state[w]['exp_avg'], opt.state[w]['exp_avg_sq']

def sdpa(q, kv, sinks, mask):
    k = kv[:,None].expand(-1, q.shape[2], -1, -1)
    return F.scaled_dot_product_attention(q.transpose(1,2), k, k, attn_mask=mask[:,None]).transpose(1,2)

def softmax_weights(scores, bias, k, scale):
    top = (scores+bias).topk(k, -1)
    return top.indices, scale*top.values/top.values.sum(-1, keepdim=True)

OTHERS = dict(   # what people write, by other means than the list of mistakes: name -> function, a part of what it must be told
    full_turns=(lambda W, R, theta: sum(W*theta**(-2*i/R)>=1 for i in range(R//2)), '2 pi'),
    ring=(lambda n, size: torch.tensor(list(range(n))[-size:]), 'nothing moves'),
    attend_sdpa=(sdpa, 'sink is missing'),
    visible=(lambda T, m: torch.arange(0, T//m*m, m)<=torch.arange(T)[:,None], 'has begun, but not ended'),
    route=(softmax_weights, 'the bias only chooses'),
    mix=(lambda post, comb, X, y: post[...,None]*y[...,None,:]+comb@X, 'target index'),
    shift=(lambda labels, by, docs: F.pad(labels, (0,by), value=-100)[:,by:], 'another document'),
    packed=(lambda whale, texts: whale(torch.cat(texts)[None]).logits[0].split([len(t) for t in texts]), 'see each other'),
    encode_word=(lambda word, merges: functools.reduce(lambda s, m: re.sub(' '.join(m), ''.join(m), s), merges, ' '.join(word)).split(), 'two whole pieces'),
    orthogonal=(lambda G: G/G.norm(), 'every direction'),
    adamw=(adam, 'went into the gradient'),
    combine=(lambda grads, counts: torch.stack(grads).mean(0), 'a plain mean'),
    step_loss=(lambda batches: torch.stack([F.cross_entropy(z, y) for z,y in batches]).mean(), 'a mean of means'),
    clip=(lambda grads, most: [g.clip(-most, most) for g in grads], 'clip the norm'),
    stochastic_round=(lambda x, u: x.to(torch.bfloat16), 'nearest neighbour'),
    keep_typical=(keep_top_p, 'that is top-p'),
    prefill=(lambda whale, ids, n: torch.cat([whale(part).logits for part in ids.split(n, 1)], 1), 'one cache'),
    speedup=(lambda ours, theirs: (theirs[1:]/ours[1:]).quantile(.5).item(), 'median of ratios'),
    second_guess=(lambda mtp, ids, docs: (mtp[:,:-1].argmax(-1)==ids[:,1:])[(docs[:,1:]==docs[:,:-1])&(docs[:,1:]>=0)].float().mean(), 'was told'),
    sink_share=(lambda scores, sinks, mask: 1/(1+(scores-sinks[:,None]).exp().masked_fill(~mask[:,:,None], 0).sum(-1)).mean((0,1)), 'a share of sums'),
    streams_left=(lambda combs: functools.reduce(lambda x, c: c@x, combs), 'comes first'),
    answer_labels=(lambda ids, who: [i if w else -100 for i,w in zip(ids, who)], 'to ask as well'))

@pytest.mark.parametrize('name', OTHERS)
def test_the_same_mistake_by_other_means_is_named(name): assert OTHERS[name][1] in verdict(name, OTHERS[name][0])

@pytest.mark.parametrize('name', EXERCISES)
def test_what_nobody_foresaw_is_turned_away_in_one_line(name):
    ex = EXERCISES[name]
    first = drawn(ex)[0]
    right = lambda *args: ex.right(*args)
    def spoiled(*args):
        out = right(*args)
        for t in tensors(args): t.data = t.data.bitwise_not() if t.dtype==torch.bool else t.data+1
        return out
    def stops(*args): raise KeyError('no such stream')
    def changed(f):     # of every tensor, number and string in the result
        def g(x):
            if isinstance(x, dict): return {k: g(v) for k,v in x.items()}
            return type(x)(map(g, x)) if isinstance(x, (list, tuple)) else f(x)
        return lambda *args: g(right(*args))
    shape = lambda x: x[None] if isinstance(x, torch.Tensor) else [x]
    dtype = lambda x: x.to(torch.float16 if x.dtype!=torch.float16 else torch.float32) if isinstance(x, torch.Tensor) else str(x)+'?'
    value = lambda x: (~x if x.dtype==torch.bool else 2*x+1) if isinstance(x, torch.Tensor) else 2*x+('?' if isinstance(x, str) else 1)
    attempts = dict(nothing=lambda *args: None, text=lambda *args: 'whale', stops=stops, arguments=lambda: 0,
        shape=changed(shape), dtype=changed(dtype), value=changed(value))
    if any(True for _ in tensors(first)): attempts['spoiled'] = spoiled
    for kind,f in attempts.items():
        said = verdict(name, f)
        assert said and '\n' not in said, kind
        if kind=='stops': assert said.startswith("your function stopped with KeyError: 'no such stream'")
        if kind=='spoiled': assert 'was changed in place' in said
        if kind=='nothing': assert 'is a `return` missing?' in said
        if kind in ('shape', 'dtype'): assert ' is ' in said or ' has ' in said, (kind, said)

@pytest.mark.parametrize('name', EXERCISES)
def test_drawing_and_checking_leave_no_trace(name):
    state = torch.get_rng_state()
    a,b = drawn(EXERCISES[name]),drawn(EXERCISES[name])
    assert verdict(name, EXERCISES[name].right) is None
    assert torch.equal(state, torch.get_rng_state())
    for x,y in zip(tensors(a), tensors(b)): assert torch.equal(x, y)
    assert all(t.grad is None for t in tensors(a)) and all(x is not y for x,y in zip(tensors(a), tensors(copied(a))))

def test_a_lost_gradient_is_noticed():
    "The value is right, and nothing can be learned from it"
    for name in ('balance_loss', 'attend_sdpa', 'index_loss', 'two_heads', 'step_loss'):
        said = verdict(name, lambda *args: EXERCISES[name].right(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args)) if name!='step_loss'
            else EXERCISES[name].right([(z.detach(), y) for z,y in args[0]]))
        assert said.startswith('the gradients'), (name, said)

def test_every_exercise_has_three_mistakes_and_no_two_alike():
    for name,ex in EXERCISES.items(): assert len(ex.wrong)>=3, name
    assert len({says for _,says in MISTAKES})==len(MISTAKES)

def test_every_planted_function_is_in_the_list():
    "A second mistake with the same sentence would take the place of the first, a second exercise that of its namesake"
    planted = [inspect.getsource(m) for m in (exercise_model, exercises)]
    for kind,listed in dict(exercise=EXERCISES, mistake=MISTAKES).items():
        assert sum(len(re.findall(rf'^@{kind}\(', source, flags=re.M)) for source in planted)==len(listed), kind

def test_attention_is_asked_for_its_averages_alone():
    "The course's `attend` returns its log-sum-exp as well, which no reader has to compute"
    q,kv,sinks,mask = drawn(EXERCISES['attend_sdpa'])[0]
    assert torch.equal(answer('attend_sdpa', q, kv, sinks, mask), attend(q, kv, sinks, mask)[0].detach())
    assert 'a tuple of 2, not a tensor' in verdict('attend_sdpa', attend)

def test_a_wrong_name_and_no_function():
    with pytest.raises(ValueError, match='do you mean mix'): check('mixx', abs)
    with pytest.raises(AssertionError, match='pass the function itself, not a tensor'): check('mix', torch.zeros(2))
    assert answer('ring', 13, 5).tolist()==[10, 11, 12, 8, 9]

# ---------------------------------------------------------------- the chapters and the solutions

def test_every_exercise_is_asked_and_solved_once():
    said = [n for text in SECTIONS.values() for n in re.findall(r"^check\('(\w+)'", text, flags=re.M)]
    assert sorted(said)==sorted(set(said)) and set(said)==set(EXERCISES)
    solved = [n for nb in SOLUTIONS for c in cells(nb, 'code') for n in re.findall(r"^check\('(\w+)'", c, flags=re.M)]
    assert sorted(solved)==sorted(EXERCISES)

@pytest.mark.parametrize('stem', SECTIONS)
def test_exercises_look_alike(stem):
    "Two to four a chapter; each with a title, five dots, minutes, and where there is a check, a specification and a hint that is folded"
    text = SECTIONS[stem]
    parts = re.split(r'^\*\*\d\. ', text, flags=re.M)[1:]
    assert 2<=len(parts)<=4
    for i,part in enumerate(parts, 1):
        assert re.match(r'[^*\n]+\*\* ([●○]{5}) · \d+ minutes\n\n', part), part[:80]
        dots = re.search('[●○]{5}', part)[0]
        assert '○●' not in dots and '●' in dots
        if "\ncheck('" not in part: continue
        assert re.search(r'```python\n(?:from|import|def|#)[^`]*\n```', part), f'{stem} {i}: no specification'
        assert part.count('<details><summary>Hint</summary>\n\n')==part.count('\n\n</details>')==1
        name = re.search(r"^check\('(\w+)', (\w+)\)$", part, flags=re.M)
        assert f'def {name[2]}(' in part and name[2].startswith('my_')
        for spec in re.findall(r'```python\n(.*?)```', part, flags=re.S): ast.parse(spec)
    if "\ncheck('" in text: assert text.count('from nanowhale.course.exercises import check')==1 and re.search(r'\]\(\.\./solutions/\w+\.ipynb\)', text)

def test_solutions_do_not_call_what_they_solve():
    "A solution that returns the course's function proves nothing"
    for nb in SOLUTIONS:
        for c in cells(nb, 'code'):
            for name in re.findall(r"^check\('(\w+)'", c, flags=re.M):
                assert not re.search(rf'\b(EXERCISES|answer|{name})\b', c.split('\ncheck(')[0]), (nb.name, name)

# ---------------------------------------------------------------- tests/tools/course.py

def test_the_course_is_counted_right(tmp_path):
    md = '# A title\n\nTwo words [here](there.ipynb).\n\n```python\nnot this\n```\n\n$$x+y$$\n\n'
    md += '## Exercises\n\n**1. One** ●●○○○ · 5 minutes\n\nnot these\n\n## Recap\n\n- end'
    code = ['#| export\nA,B = 1,2\nTABLE = {}\nTABLE["x"] = [n for n in (A, B)]\n\ndef f(): pass\n_hidden = 3',
        'for n in 1, 2: assert f() is None\ntest_eq(A, 1)', 'x']
    cells = [dict(cell_type='markdown', source=[md])]+[dict(cell_type='code', source=[c], outputs=[]) for c in code]
    cells[-1]['outputs'] = [dict(output_type='display_data', data={'image/png': '', 'text/plain': ''})]
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=cells)))
    row = course.measure(tmp_path/'x.ipynb')
    assert row==dict(code_lines=8, words=7, words_per_line=0.9, cell_median=2, cell_p90=5, cell_max=5, export_median=5, export_p90=5,
        exports=4, assertions=2, unchecked=2, figures=1, exercises=1)
    assert course.p90(range(1, 11))==9
    table = list(course.table(dict(x=row | dict(seconds=None))))
    assert '0.9*' in table[1] and '7*' not in table[1] and table[1].endswith('-')
