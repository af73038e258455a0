"""The course against its own targets, a row for each notebook: words per code line, sizes of cells, assertions, figures, exercises, seconds.

    python tests/tools/course.py           measure, write results/course.json, print the table; seconds are those of the last --time
    python tests/tools/course.py --time    run every notebook too, one after the other, for its seconds

What is counted: code lines are those of code cells that are neither blank nor a directive. Words are those of the prose; code in
fences, displayed formulas, the targets of links and the exercises are left out, since they do not explain the code. Assertions
are `assert` statements and calls that check, each counted once however often a loop runs it. Exports are public functions,
classes and constants; unchecked are those whose name stands in no cell that asserts something. Seconds are of processor time,
all threads together, so that what else the machine does counts for little.
A figure that misses its target has a `*`.
"""
import argparse, ast, json, os, re
from pathlib import Path
from statistics import median
import notebooks
from runs import provenance

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT/'results/course.json'
TARGETS = dict(   # column -> least and most
    words_per_line=(4, 7), cell_median=(0, 5), cell_p90=(0, 15), cell_max=(0, 40), export_median=(0, 8), export_p90=(0, 20),
    assertions=(10, 20), unchecked=(0, 0), exercises=(2, 4), seconds=(0, 40))   # 20 seconds on two cores
CHECKS = {'assert_close', 'test_eq', 'test_ne', 'test_close', 'test_fail', 'test_is', 'test_warns', 'test_stdout', 'expect_fail', 'check'}

def source(cell): return ''.join(cell['source'])
def lines(code): return [l for l in code.splitlines() if l.strip() and not l.startswith('#|')]
def p90(xs): return sorted(xs)[int(0.9*(len(xs)-1)+0.5)]
def exported(code): return re.search(r'^#\|\s*exporti?\b', code, flags=re.M) is not None

def prose(text):
    "The words of markdown that explain the code"
    text = re.sub(r'^## Exercises.*?(?=^## |\Z)', '', text, flags=re.M|re.S)
    text = re.sub(r'```.*?```|\$\$.*?\$\$|<[^>]+>', ' ', text, flags=re.S)
    return re.findall(r'\S*\w\S*', re.sub(r'\]\([^)]*\)', ']', text))

def n_assertions(code):
    "`assert` statements and checking calls; a name that is only assigned or imported is none"
    tree = ast.walk(ast.parse(code))
    return sum(isinstance(n, ast.Assert) or isinstance(n, ast.Call) and getattr(n.func, 'id', getattr(n.func, 'attr', '')) in CHECKS for n in tree)

def public(code):
    "Names that a module gets from an exported cell"
    for n in ast.parse(code).body:
        targets = [n] if hasattr(n, 'name') else [t for x in getattr(n, 'targets', []) for t in getattr(x, 'elts', [x])]
        names = [getattr(t, 'name', None) or getattr(t, 'id', '_') for t in targets]     # not those of `TABLE[key] = ...`
        yield from (name for name in names if not name.startswith('_'))

def measure(path):
    "The row of one notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = [source(c) for c in cells if c['cell_type']=='code']
    text = '\n\n'.join(source(c) for c in cells if c['cell_type']=='markdown')
    sizes = [n for c in code if (n := len(lines(c)))]
    out = [n for c in code if exported(c) and (n := len(lines(c)))]
    names = [n for c in code if exported(c) for n in public(c)]
    used = '\n'.join(c for c in code if n_assertions(c))
    figures = sum(k.startswith('image/') for c in cells for k,_ in notebooks.parts(c.get('outputs', [])))
    return dict(code_lines=sum(sizes), words=len(prose(text)), words_per_line=round(len(prose(text))/max(1, sum(sizes)), 1),
        cell_median=median(sizes or [0]), cell_p90=p90(sizes or [0]), cell_max=max(sizes, default=0),
        export_median=median(out or [0]), export_p90=p90(out or [0]), exports=len(names), assertions=sum(map(n_assertions, code)),
        unchecked=sum(not re.search(rf'\b{n}\b', used) for n in names), figures=figures,
        exercises=len(re.findall(r'^\*\*\d\. [^*]+\*\* [●○]{5}', text, flags=re.M)))

def seconds(path):
    "Processor seconds of one notebook in a fresh process; None where it fails"
    begun = os.times()
    [(_,_,after,_,err)] = notebooks.executed([path], [], timeout=600)
    if not after: print(err.splitlines()[-1])
    now = os.times()
    return round(now.children_user+now.children_system-begun.children_user-begun.children_system, 1) if after else None

def table(rows):
    "Lines of a table, a star where a target is missed"
    columns = list(next(iter(rows.values())))
    def cell(column, value):
        low,high = TARGETS.get(column, (0, 1e9))
        return '-' if value is None else f'{value:g}'+' *'[not low<=value<=high]
    heads = [c.replace('words_per_line', 'words/line').replace('_', ' ') for c in columns]
    yield f'{"":22}'+' '.join(f'{h:>{max(7, len(h))}}' for h in heads)
    for name,row in rows.items(): yield f'{name:22}'+' '.join(f'{cell(c, row.get(c)):>{max(7, len(h))}}' for c,h in zip(columns, heads))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--time', action='store_true', help='run every notebook for its seconds')
    args = p.parse_args()
    before = json.loads(RESULT.read_text()).get('notebooks', {}) if RESULT.exists() else {}
    paths = sorted(ROOT.glob('nbs/[!s]*/[0-9]*.ipynb'))
    rows = {p.stem: measure(p) | dict(seconds=before.get(p.stem, {}).get('seconds')) for p in paths}
    head = provenance('python tests/tools/course.py'+' --time'*args.time)
    save = lambda: RESULT.write_text(json.dumps(head | dict(targets=TARGETS, notebooks=rows), indent=1)+'\n')
    for p in paths if args.time else []:
        rows[p.stem]['seconds'] = seconds(p)
        save()
    save()
    print('\n'.join(table(rows)))
