"""Receipts: measured values in prose are those of results/, and no number with a unit stands there without a source."""
import json, shutil
from pathlib import Path

import pytest

import receipts
from receipts import NBS, RECEIPT, ROOT, read, source

NOTEBOOKS = receipts.notebooks()

def markdown(text, id='said'): return dict(cell_type='markdown', id=id, metadata={}, source=text)
def code(text, *printed):
    outputs = [dict(output_type='stream', name='stdout', text=text) for text in printed]
    return dict(cell_type='code', id='code', metadata={}, source=text, outputs=outputs, execution_count=None)

def notebook(folder, *cells):
    "A chapter in a project of its own, beside a file of results"
    (folder/'nbs/part').mkdir(parents=True)
    (folder/'results').mkdir()
    runs = [dict(kind=k, seed=s, bits=b, command='c', commit='d') for k,s,b in (('a', 0, 2.0), ('a', 1, 2.5), ('b', 0, 1.751))]
    (folder/'results/runs.json').write_text(json.dumps(runs))
    (folder/'results/one.json').write_text(json.dumps(dict(command='c', results={'minutes, of training': 1234.5678, 'loss': -0.5, 'name': 'x'})))
    path = folder/'nbs/part/01_chapter.ipynb'
    path.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def receipt(text, way, file='runs'): return f'[{text}](../../results/{file}.json "{way}")'

# ---------------------------------------------------------------- the course

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_receipts_say_what_their_files_say(nb):
    stale = list(receipts.stale(nb))
    assert not stale, '\n'.join([*stale, 'run `python tests/tools/receipts.py render`'])

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_numbers_with_a_unit_have_a_source(nb):
    bare = list(receipts.bare(nb))
    assert not bare, '\n'.join(bare)

def test_what_is_cited_says_how_it_was_made():
    "Command, commit, and a seed or the processor"
    cited = {(nb.parent/m[2], m[3]) for nb in NOTEBOOKS for c in read(nb)['cells'] for m in RECEIPT.finditer(source(c))}
    lost = {f'{file.name}: {title}': missing for file,title in cited if (missing := receipts.unsigned(file, title))}
    assert len(cited)>10 and not lost

def test_the_readme_has_receipts_that_lead_somewhere():
    links = RECEIPT.findall((ROOT/'README.md').read_text(encoding='utf-8'))
    assert len(links)>=3 and all((ROOT/target).exists() for _,target,_ in links)

# ---------------------------------------------------------------- what is planted turns red

def test_a_changed_result_turns_red(tmp_path):
    "The page that everybody reads first, and its own file, with another value in it"
    (tmp_path/'nbs').mkdir()
    (tmp_path/'results').mkdir()
    nb = Path(shutil.copy(NBS/'index.ipynb', tmp_path/'nbs'))
    old = read(ROOT/'results/tiny.json')
    file = tmp_path/'results/tiny.json'
    file.write_text(json.dumps(old))
    assert not list(receipts.stale(nb))
    old['results']['minutes of training'] += 1
    file.write_text(json.dumps(old))
    line, = receipts.stale(nb)
    assert f'is stale: ../results/tiny.json says {old["results"]["minutes of training"]:.2f} minutes' in line
    assert receipts.render(nb) and not list(receipts.stale(nb)) and not receipts.render(nb)

@pytest.mark.parametrize('text,says', {
    receipt('2.00 bits', 'kind=a, seed=2 > bits'): 'there is no "kind=a, seed=2 > bits"',
    receipt('2.00 bits', 'kind=a, seed=0 > bytes'): 'there is no "kind=a, seed=0 > bytes"',
    receipt('2.00 bits', 'kind=a > bits'): 'finds 2 values: say which, or "mean of"',
    receipt('2.00 bits', 'kind=a, seed=0 > bits', 'gone'): 'gone.json is gone',
    receipt('2.00 bits', 'kind=a, seed=0 > kind'): 'leads to no number',
    receipt('bits', 'kind=a, seed=0 > bits'): 'its text must hold one number',
    receipt('2.10 bits', 'kind=a, seed=0 > bits'): 'is stale: ../../results/runs.json says 2.00 bits',
}.items())
def test_a_receipt_that_leads_nowhere_is_one_clear_line(text, says, tmp_path):
    nb = notebook(tmp_path, markdown(f'It needs {text} here.'))
    line, = receipts.stale(nb)
    assert says in line and line.startswith('01_chapter.ipynb #said: [')
    assert not list(receipts.bare(nb))

@pytest.mark.parametrize('planted', ['3.7 times as fast', '3.7', '41 %', '41 per cent', '7 minutes', '12 to 41 ms', '1,234 tokens a second',
    '0.27 bits a byte', '41 GB', '512 GFLOP/s', '0.4 nats', '[41 minutes](../../results/one.json)', '41 MB, see [us](https://nanowhale.github.io/nanowhale/)'])
def test_a_typed_number_turns_red(planted, tmp_path):
    nb = notebook(tmp_path, markdown('# A\n\n> b'), code('x = 7', '3.61\n'), markdown(f'This is {planted}.'))
    line, = receipts.bare(nb)
    assert line.startswith('01_chapter.ipynb #said: no receipt for "')

def test_a_typed_number_turns_red_in_every_notebook():
    "In every section of every notebook but the exercises"
    for nb in NOTEBOOKS:
        for section in receipts.sections(read(nb)['cells']):
            planted = [*section, markdown('And it is 73.519 times as fast.', 'planted')]
            assert [at for at,*_ in receipts.typed(nb, planted)]==['planted'], nb

@pytest.mark.parametrize('words', ['It takes `41 minutes`.', '$x=41$ minutes', '41 tokens of 8 bytes', '## 41 minutes',
    'See section 4.5 of it.', 'A 95 % interval of it', '**1. Guess** ●○○○○ · 20 minutes\n\nA machine does 400 GFLOP/s.'])
def test_what_is_not_measured_stays_quiet(words, tmp_path):
    assert not list(receipts.bare(notebook(tmp_path, markdown(words))))

# ---------------------------------------------------------------- what counts as a source

@pytest.mark.parametrize('cells', [
    (code('', 'took 3.6512 times\n'),), (code('times = 3.7'),), (markdown('It is $7.4/2=3.7$.'),)], ids=['printed', 'code', 'formula'])
def test_a_source_stands_in_the_same_section(cells, tmp_path):
    claim = markdown('So it is 3.7 times as fast.')
    assert not list(receipts.bare(notebook(tmp_path/'beside', *cells, claim)))
    assert len(list(receipts.bare(notebook(tmp_path/'below', *cells, markdown('## Next\n\n'+claim['source'])))))==1

def test_a_section_elsewhere_or_a_paper_is_a_source_where_it_is_linked(tmp_path):
    nb = notebook(tmp_path, markdown('## What came out?'), code('', '3.7\n'), markdown('## Then'))
    def left(text): return len(list(receipts.typed(nb, [markdown(text)])))
    assert left('3.7 times')==left('3.7 times, as [it](01_chapter.ipynb)')==left('3.7 times, as [it](01_chapter.ipynb#then)')==1
    assert left('3.7 times, as [it](01_chapter.ipynb#what-came-out)')==left('3.7 times, says [V3](https://arxiv.org/abs/2412.19437)')==0

def test_a_share_may_be_printed_as_it_is_and_one_digit_in_code_is_no_source():
    assert receipts.holds('41', {.412}, set(), True) and not receipts.holds('41', {.412}, set(), False)
    assert receipts.holds('2', set(), {.02}, True) and not receipts.holds('2', set(), {2.}, False) and receipts.holds('2', {2.}, set(), False)

def test_an_exercise_ends_at_the_next_heading(tmp_path):
    nb = notebook(tmp_path, markdown('**1. Guess** ●○○○○ · 20 minutes\n\nIt does 400 GFLOP/s.\n\n### Recap\n\nIt did 300 GFLOP/s.'))
    line, = receipts.bare(nb)
    assert '"300 GFLOP/s"' in line

def test_words_for_a_figure_are_prose(tmp_path):
    line, = receipts.bare(notebook(tmp_path, code('#| fig-alt: It falls by 41 per cent.\nx = 41.5')))
    assert '41 per cent' in line

# ---------------------------------------------------------------- rendering

@pytest.mark.parametrize('old,new', {
    receipt('1 minutes', 'results > minutes, of training', 'one'): '1,235 minutes',
    receipt('about 9.00 minutes', 'results > minutes, of training', 'one'): 'about 1,234.57 minutes',
    receipt('0.1', 'results > loss', 'one'): '−0.5',
    receipt('9.99 bits', 'mean of kind=a > bits - kind=b > bits'): '0.50 bits',
    receipt('9 %', 'least of * > bits * 100 / most of kind=a > bits', 'runs'): None,
    receipt('9 %', 'kind=b > bits * 100 / most of kind=a > bits'): '70 %',
    receipt('9 runs', 'number of kind=*'): '3 runs', receipt('9.9', '-1 > bits'): '1.8', receipt('9.9', 'sum of seed=0 > bits'): '3.8'}.items())
def test_the_value_keeps_the_form_of_the_text(old, new, tmp_path):
    folder = notebook(tmp_path).parent
    text = receipts.rendered(f'a {old} b [1](x) {old}', folder)
    expected = old if new is None else f'[{new}]'+old[old.index(']')+1:]
    assert text==f'a {expected} b [1](x) {expected}' and receipts.rendered(text, folder)==text

def test_what_a_file_does_not_say_of_itself_is_named(tmp_path):
    folder = notebook(tmp_path).parent
    assert receipts.unsigned(folder/'../../results/runs.json', 'mean of kind=a > bits')==[]
    assert receipts.unsigned(folder/'../../results/one.json', 'results > loss * 2')==['commit', 'seed or processor']

def test_the_command_names_what_is_wrong_and_fails(tmp_path, monkeypatch, capsys):
    nb = notebook(tmp_path, markdown(f"{receipt('9.00 bits', 'kind=a, seed=0 > bits')}, 3.7 times"))
    def run(mode):
        monkeypatch.setattr('sys.argv', ['receipts.py', mode, str(nb)])
        return receipts.main(), capsys.readouterr().out
    code,said = run('check')
    assert code and 'is stale' in said and '3.7 times' in said and said.endswith('1 receipts, 2 lines to mend\n')
    assert run('render')[0]==0
    code,said = run('check')
    assert code and 'is stale' not in said and '2.00 bits' in source(read(nb)['cells'][0])
