"""Exercises: each check takes what is right, turns every planted mistake away by its own sentence, and refuses what the reader did not write."""
import ast, functools, inspect, json, re, types
from pathlib import Path
import pytest, torch, torch.nn.functional as F
import course
from nanowhale.course.checker import EXERCISES, Exercise, answer, borrowed, copied, drawn, tensors, verdict
from nanowhale.course import exercise_model, exercises
from nanowhale.course.exercises import check
from nanowhale.generate.sample import keep_top_p
from nanowhale.model.attention import attend

NBS = Path(__file__).resolve().parents[1]/'nbs'
FUNCTIONS = [name for name,ex in EXERCISES.items() if ex.within is None]
NUMBERS = [name for name in EXERCISES if name not in FUNCTIONS]
MISTAKES = [(name, says) for name,ex in EXERCISES.items() for says in ex.wrong]

def handed_in(f, name): return f if EXERCISES[name].within is None else f()     # a function, or the number that it computes

def cells(nb, kind): return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def in_order(nb): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']]
def section(nb): return next((t.partition('## Exercises')[2].partition('\n## ')[0] for t in cells(nb, 'markdown') if '## Exercises' in t), '')

SECTIONS = {nb.stem: section(nb) for nb in sorted(NBS.glob('[!s]*/[0-9]*.ipynb')) if section(nb)}
SOLUTIONS = sorted((NBS/'solutions').glob('*.ipynb'))

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
    reach=(lambda masks: sum(m.int() for m in masks)==len(masks), 'may lead through other tokens'),
    attend_sdpa=(sdpa, 'sink is missing'),
    reads=(lambda t, window, m, k: len(range(max(0, t-window+1), t+1))+min(k, len(range(0, t+1, m))), 'has begun, but not ended'),
    route=(softmax_weights, 'the bias only chooses'),
    mix=(lambda post, comb, X, y: post[...,None]*y[...,None,:]+comb@X, 'target index'),
    encode_word=(lambda word, merges: functools.reduce(lambda s, m: re.sub(' '.join(m), ''.join(m), s), merges, ' '.join(word)).split(), 'two whole pieces'),
    orthogonal=(lambda G, blocks: G/G.norm(), 'every direction'),
    adamw=(adam, 'went into the gradient'),
    combine=(lambda grads, counts: torch.stack(grads).mean(0), 'a plain mean'),
    step_loss=(lambda batches: torch.stack([F.cross_entropy(z, y) for z,y in batches]).mean(), 'a mean of means'),
    stochastic_round=(lambda x, u: x.to(torch.bfloat16), 'nearest neighbour'),
    keep_typical=(keep_top_p, 'that is top-p'),
    prefill=(lambda whale, ids, n: torch.cat([whale(part).logits for part in ids.split(n, 1)], 1), 'one cache'),
    speedup=(lambda ours, theirs: (theirs[1:]/ours[1:]).quantile(.5).item(), 'median of ratios'),
    second_guess=(lambda mtp, ids, docs: (mtp[:,:-1].argmax(-1)==ids[:,1:])[(docs[:,1:]==docs[:,:-1])&(docs[:,1:]>=0)].float().mean(), 'was told'),
    sink_share=(lambda scores, sinks, mask: 1/(1+(scores-sinks[:,None]).exp().masked_fill(~mask[:,:,None], 0).sum(-1)).mean((0,1)), 'a share of sums'),
    online_step=(lambda o, m, total, z, v: (o+(z-torch.maximum(m, z.amax(-1))[...,None]).exp()@v[:,None], torch.maximum(m, z.amax(-1)),
        (m-torch.maximum(m, z.amax(-1))).exp()*total+(z-torch.maximum(m, z.amax(-1))[...,None]).exp().sum(-1)), 'output so far'),
    queue=(lambda idx: (idx.flatten()[:,None]==idx.flatten()).tril().sum(1).view_as(idx), 'has place 0'),
    streams_left=(lambda combs: functools.reduce(lambda x, c: c@x, combs), 'comes first'),
    answer_labels=(lambda ids, who: [i if w else -100 for i,w in zip(ids, who)], 'to ask as well'))

@pytest.mark.parametrize('name', OTHERS)
def test_the_same_mistake_by_other_means_is_named(name): assert OTHERS[name][1] in verdict(name, OTHERS[name][0])

@pytest.mark.parametrize('name', FUNCTIONS)
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

@pytest.mark.parametrize('name', FUNCTIONS)
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
    for name,ex in EXERCISES.items(): assert len(ex.wrong)>=(3 if ex.within is None else 1), name
    assert len({says for _,says in MISTAKES})==len(MISTAKES)

def test_every_planted_function_is_in_the_list():
    "A second mistake with the same sentence would take the place of the first, a second exercise that of its namesake"
    planted = [inspect.getsource(m) for m in (exercise_model, exercises)]
    for kind,listed in dict(exercise=FUNCTIONS, prediction=NUMBERS, mistake=MISTAKES).items():
        assert sum(len(re.findall(rf'^@{kind}\(', source, flags=re.M)) for source in planted)==len(listed), kind

def test_attention_is_asked_for_its_averages_alone():
    "The course's `attend` returns its log-sum-exp as well, which no reader has to compute"
    q,kv,sinks,mask = drawn(EXERCISES['attend_sdpa'])[0]
    assert torch.equal(answer('attend_sdpa', q, kv, sinks, mask), attend(q, kv, sinks, mask)[0].detach())
    assert 'a tuple of 2, not a tensor' in verdict('attend_sdpa', attend)

# ---------------------------------------------------------------- what the reader did not write

def like_the_first(x, axis):
    "All along an axis as the first one: what is left when a function looks at nothing else"
    if isinstance(x, dict): return {k: like_the_first(v, axis) for k,v in x.items()}
    if isinstance(x, (list, tuple)): return type(x)(like_the_first(v, axis) for v in x)
    return x.narrow(axis, 0, 1).expand_as(x).clone() if isinstance(x, torch.Tensor) and x.ndim>axis and len(x) else x

def known(args):
    "Arguments as a key: what was given, not where it lies"
    return repr([a.tolist() if isinstance(a, torch.Tensor) else a if isinstance(a, (int, float, str, list, dict)) else 0 for a in args])

def borrowing(name):
    "The right function, under other names"
    right = EXERCISES[name].right
    hidden = {'it': right}
    yield 'itself', right
    yield 'another name', lambda *args: right(*args)
    yield 'from a table', lambda *args: hidden['it'](*args)
    yield 'partial', functools.partial(right)
    yield 'wrapped', functools.wraps(lambda: 0)(lambda *args: right(*args))
    yield 'its code', types.FunctionType(right.__code__, right.__globals__, 'mine', right.__defaults__, right.__closure__)
    yield 'through answer', lambda *args: answer(name, *args)
    yield 'through the list', lambda *args: EXERCISES[name].right(*args)

def remembering(name):
    "Results that were there before"
    ex = EXERCISES[name]
    old = [args for more in (0, 1, 2) for args in drawn(ex, more)]
    table = {known(args): ex.right(*args) for args in old}
    first = next(iter(table.values()))
    yield 'one result', lambda *args: first
    yield 'a table', lambda *args: table.get(known(args), first)
    @functools.lru_cache
    def cached(key): return ex.right(*next(args for args in old if known(args)==key))
    def from_the_cache(*args): return cached(known(args)) if known(args) in table else first
    for args in old: from_the_cache(*args)
    yield 'a cache that is full', from_the_cache

def partly(name):
    "Results that are right for the first row, head or document, and results that hang on the first of an argument alone"
    ex = EXERCISES[name]
    calls = drawn(ex)
    def result_like_first(axis): return lambda *args: like_the_first(ex.right(*args), axis)
    def argument_like_first(i, axis): return lambda *args: ex.right(*args[:i], like_the_first(args[i], axis), *args[i+1:])
    def always(i): return lambda *args: ex.right(*args[:i], calls[0][i], *args[i+1:])
    for axis in range(4):
        if any(t.ndim>axis and t.shape[axis]>1 for args in calls for t in tensors(ex.right(*args))): yield f'result, axis {axis}', result_like_first(axis)
    for i,x in enumerate(calls[0]):
        if isinstance(x, torch.Tensor):
            for axis in range(x.ndim): yield f'argument {i}, axis {axis}', argument_like_first(i, axis)
        elif isinstance(x, list): yield f'argument {i}, first member', (lambda i: lambda *args: ex.right(*args[:i], args[i][:1]*len(args[i]), *args[i+1:]))(i)
        elif isinstance(x, (int, float)): yield f'argument {i}, one value', always(i)

BORROWED = 'from a table', 'partial', 'wrapped', 'its code', 'through answer', 'through the list'
SPARED = {('sinkhorn', 'argument 2, one value'): 'eps is too small to matter, as the exercise says'}

@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('kind', [borrowing, remembering, partly], ids=lambda f: f.__name__)
def test_what_the_reader_did_not_write_is_refused(kind, name):
    for how,f in kind(name):
        if (name, how) in SPARED: continue
        if how in BORROWED: said = borrowed(EXERCISES[name], f)      # what `check` asks when the result is right
        else:
            with pytest.raises(AssertionError) as e: check(name, f)
            said = str(e.value).removeprefix(f'{name}: ')
        assert said and '\n' not in said, how
        if kind is borrowing: assert "calls the package's own" in said and 'write that yourself' in said, how

@pytest.mark.parametrize('name', FUNCTIONS)
def test_new_arguments_are_new_and_larger(name):
    "Otherwise results could be written down"
    def size(x):
        if isinstance(x, (list, tuple, dict)): return sum(map(size, x.values() if isinstance(x, dict) else x))
        return x.numel() if isinstance(x, torch.Tensor) else len(x) if isinstance(x, str) else 1
    fixed,a,*others = (drawn(EXERCISES[name], more) for more in (0, 1, 1, 1, 1))
    assert len({repr([known(x) for x in calls]) for calls in (a, *others)})>1, 'its arguments do not change'
    if any(isinstance(x, (torch.Tensor, list)) for args in fixed for x in args): assert size(a)>size(fixed)

def test_what_an_exercise_names_may_be_used():
    "Calling it, what it calls in turn, and functions among the arguments are free; importing is no call"
    hc = lambda hc, norm, f, X: hc(X)[0]
    assert borrowed(EXERCISES['sublayer'], hc) is None
    assert 'HyperConnection' in EXERCISES['sublayer'].uses[0].__name__ and 'forward' in borrowed(Exercise(abs, EXERCISES['sublayer'].calls, {}), hc)
    def imports(*args): from nanowhale.model import hyper   # noqa: F401
    assert borrowed(EXERCISES['mix'], imports) is None
    def prefill(whale, ids, n): return whale(ids[:,:n]).logits
    assert borrowed(EXERCISES['prefill'], prefill) is None

def test_all_at_once_where_pieces_are_asked_for():
    assert 'a pass of 13 tokens' in verdict('prefill', lambda whale, ids, n: whale(ids).logits)

def test_a_profiler_that_was_there_stays(monkeypatch):
    import sys
    def mine(*args): pass
    sys.setprofile(mine)
    try:
        check('mix', lambda post, comb, X, y: post[...,None]*y[...,None,:]+comb.mT@X)
        assert sys.getprofile() is mine
    finally: sys.setprofile(None)

# ---------------------------------------------------------------- numbers to predict

@pytest.fixture
def guess(monkeypatch):
    monkeypatch.setitem(EXERCISES, 'bytes', Exercise(lambda: 1024, None, {'count it once': lambda: 2048, 'a sign': lambda: -1024}, within=0.05))
    return functools.partial(check, 'bytes')

def test_a_number_is_right_within_its_tolerance(guess, capsys):
    for x in 1024, 1000., torch.tensor(1070): guess(x)
    assert capsys.readouterr().out=='bytes: right\n'*3

@pytest.mark.parametrize('x,says', [(2048, 'count it once'), (2000, 'count it once'), (-1024., 'a sign'), (900, '900 is too low'), (1100, '1100 is too high'),
    (float('nan'), 'not nan'), (True, 'not True'), (None, 'is a `return` missing'), ('1024', "not '1024'"),
    (torch.zeros(2), 'not a tensor [2]'), (lambda: 1024, 'not a function')])
def test_a_wrong_guess_is_named_and_the_number_not_given_away(guess, x, says):
    with pytest.raises(AssertionError) as e: guess(x)
    assert says in str(e.value) and '\n' not in str(e.value) and ('1024' in repr(x) or '1024' not in str(e.value))

def test_a_number_is_not_told(guess):
    with pytest.raises(ValueError, match='guess, then check'): answer('bytes')

@pytest.mark.parametrize('name', NUMBERS)
def test_guesses_lie_apart(name):
    ex = EXERCISES[name]
    numbers = [ex.right(), *(wrong() for wrong in ex.wrong.values())]
    for i,a in enumerate(numbers):
        for b in numbers[:i]: assert abs(a-b)>2*ex.within*max(abs(a), abs(b)), (a, b)

def test_a_wrong_name_and_no_function():
    with pytest.raises(ValueError, match='do you mean mix'): check('mixx', abs)
    with pytest.raises(AssertionError, match='pass the function itself, not a tensor'): check('mix', torch.zeros(2))
    assert answer('lookup', [1,2,3,1,2,4,5,1,2], 2, 2)==[4, 5]

# ---------------------------------------------------------------- the chapters and the solutions

def test_every_exercise_is_asked_and_solved_once():
    said = [n for text in SECTIONS.values() for n in re.findall(r"^check\('(\w+)'", text, flags=re.M)]
    assert sorted(said)==sorted(set(said)) and set(said)==set(EXERCISES)
    solved = [n for nb in SOLUTIONS for c in cells(nb, 'code') for n in re.findall(r"^check\('(\w+)'", c, flags=re.M)]
    assert sorted(solved)==sorted(EXERCISES)

FIRST = {nb.stem for nb in NBS.glob('1_*/*.ipynb')}     # the part whose exercises differ in kind
KINDS = [r'predict|guess', r'change|measure|swap|instead', r'paper|report|arxiv\.org']

def asked(text): return re.split(r'^\*\*\d\. ', text, flags=re.M)[1:]

@pytest.mark.parametrize('stem', SECTIONS)
def test_exercises_look_alike(stem):
    "Each with a title, five dots, minutes; where there is a check of a function, a specification and a hint that is folded"
    text = SECTIONS[stem]
    parts = asked(text)
    assert len(parts)==3 if stem in FIRST else 2<=len(parts)<=4
    for i,part in enumerate(parts, 1):
        assert re.match(r'[^*\n]+\*\* ([●○]{5}) · \d+ minutes\n\n', part), part[:80]
        dots = re.search('[●○]{5}', part)[0]
        assert '○●' not in dots and '●' in dots
        for name,mine in re.findall(r"^check\('(\w+)', (\w+)\)$", part, flags=re.M):
            assert mine.startswith('my_')
            if name in NUMBERS: assert re.search(rf'^{mine} = ', part, flags=re.M), f'{stem} {i}: no place for the number'
            else:
                assert f'def {mine}(' in part
                assert re.search(r'```python\n(?:from|import|def|#)[^`]*\n```', part), f'{stem} {i}: no specification'
                assert part.count('<details><summary>Hint</summary>\n\n')==part.count('\n\n</details>')==1
        for spec in re.findall(r'```python\n(.*?)```', part, flags=re.S): ast.parse(spec)
    if "\ncheck('" in text: assert text.count('from nanowhale.course.exercises import check')==1
    assert f'](../solutions/{stem}.ipynb)' in text, 'no way to the answers'

@pytest.mark.parametrize('stem', sorted(FIRST & set(SECTIONS)))
def test_three_exercises_differ_in_kind(stem):
    "Predict a number; change a part and measure; a question on the paper"
    for part,kind in zip(asked(SECTIONS[stem]), KINDS): assert re.search(kind, part, flags=re.I), (part[:40], kind)

@pytest.mark.parametrize('stem', SECTIONS)
def test_every_exercise_has_an_answer(stem):
    "A heading each in the chapter's own solutions, in the same order; below it a check where the exercise has one, and code or an answer in words"
    text = '\n'.join(t if kind=='markdown' else f'```python\n{t}\n```' for kind,t in in_order(NBS/'solutions'/f'{stem}.ipynb'))
    answers = re.split(r'^## (\d)\. .*$', text, flags=re.M)
    assert answers[1::2]==[str(i) for i,_ in enumerate(asked(SECTIONS[stem]), 1)]
    for part,answered in zip(asked(SECTIONS[stem]), answers[2::2]):
        checks = r"^check\('(\w+)'"
        assert re.findall(checks, answered, flags=re.M)==re.findall(checks, part, flags=re.M), part[:40]
        words = len(re.sub(r'```.*?```', '', answered, flags=re.S).split())
        assert words>=15 or '```' in answered, f'no answer: {part[:40]}'

def test_no_solutions_without_a_chapter(): assert {nb.stem for nb in SOLUTIONS}<=set(SECTIONS)

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
