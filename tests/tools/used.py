"""How much of its limit does each numerical comparison use? What fills a third of it here may overflow elsewhere.

    pytest --used tests/test_attention.py                  a table at the end, the fullest first
    pytest --used --used-out FILE.json -n 2 tests    the whole list as a file as well
    python tests/tools/used.py [--out FILE] [NOTEBOOKS]    the same for the cells of notebooks (default: all)
    python tests/tools/used.py --compare A.json B.json     the worst share of each comparison over several such files

Counted are `assert_close`, `allclose`, `isclose`, `test_close`, `pytest.approx`, and every `a < b` in an assertion that
compares floats: its share is a/b. A limit is what two ways to compute one thing may differ by; whatever else an
assertion asks of a number ("the loss has halved") is a bound, listed apart: it has no rounding to leave room for.
Kernels of other processors are tried on this one by ATEN_CPU_CAPABILITY=avx2 or =default, ONEDNN_MAX_CPU_ISA=AVX2,
MKL_CBWR=COMPATIBLE and OMP_NUM_THREADS.
"""
import argparse, ast, builtins, json, math, operator, os, subprocess, sys, tempfile
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FULL = 1/3       # of a limit; above it the comparison is mended
LARGEST = 0.05   # a limit holds a number as small as this; what holds none is a bound
ORDER = {ast.Lt: '<', ast.LtE: '<=', ast.Gt: '>', ast.GtE: '>='}
SAYS = {'<': operator.lt, '<=': operator.le, '>': operator.gt, '>=': operator.ge}
found,now = {},['']   # place -> row; the test or cell that runs

def note(place, share, kind, text):
    "Keep the worst share of each comparison that held"
    share = float(share)
    if not 0<=share<=1: return   # it failed, as some must: the assertion around it decides
    row = found.setdefault(f'{place} {now[0].split("[")[0]}: {text}', dict(share=-1., kind=kind, times=0))
    row['times'] += 1
    if share>row['share']: row.update(share=share, by=now[0])

# ---------------------------------------------------------------- a < b

def real(x):
    "`x` as a tensor of float64, if it is a number or an array of floats"
    import numpy as np, torch
    if isinstance(x, (bool, str, bytes)) or x is None: return None
    if isinstance(x, torch.Tensor) and x.device.type!='meta' and x.dtype!=torch.bool: return x.detach().cpu().double()
    if isinstance(x, (int, float, np.floating, np.integer)) and abs(x)<2**1000: return torch.tensor(float(x), dtype=torch.float64)
    return torch.from_numpy(x).double() if isinstance(x, np.ndarray) and x.dtype.kind in 'fi' else None

def is_float(x):
    "A float, or an array of them, torch's or numpy's"
    dtype = getattr(x, 'dtype', None)
    return isinstance(x, float) or getattr(dtype, 'is_floating_point', False) or getattr(dtype, 'kind', '')=='f'

def compared(place, text, small, slack, ops, *values):
    "What the chain of comparisons gives; the share of each pair of floats is noted, of `slack` where the end of the line is x+slack"
    out = True
    for i,(op,a,b) in enumerate(zip(ops.split(), values, values[1:]), 2):
        out = SAYS[op](a, b)
        if is_float(a) or is_float(b):
            low,high = (real(x) for x in ((a, b) if '<' in op else (b, a)))
            if low is None or high is None or not low.numel() or not high.numel(): continue
            if slack and i==len(values): note(place, ((low-high)/slack+1).clamp(min=0).max(), 'limit', text)
            elif (high>0).all() and (low>=0).all(): note(place, (low/high).max(), 'limit' if len(values)==2 and '<' in op and small else 'bound', text)
        if len(values)>2 and not out: return out
    return out

def sizes(node):
    "Numbers in an expression, 2**-8 and the like included"
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, float) and n.value: yield abs(n.value)
        if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Pow) and isinstance(n.right, ast.UnaryOp) and isinstance(n.left, ast.Constant):
            yield eval(ast.unparse(n))

def is_small(node):
    "Is it a limit, by a small number in it or by its name?"
    return min(sizes(node), default=1)<=LARGEST or any(w in ast.unparse(node).upper() for w in ('LIMIT', 'TOL'))

def slack_of(node):
    "The 1e-9 of `x+1e-9` and `x-1e-9`, where x has no small number of its own"
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and isinstance(node.right, ast.Constant)): return 0
    return node.right.value if isinstance(node.right.value, float) and node.right.value<=LARGEST and not is_small(node.left) else 0

class Watch(ast.NodeTransformer):
    "Every comparison of order inside an assertion tells `compared`"
    def __init__(self, name): self.name,self.inside = name,0
    def visit_Assert(self, node):
        self.inside += 1
        node.test = self.visit(node.test)
        self.inside -= 1
        return node
    def visit_Compare(self, node):
        text = ast.unparse(node)
        self.generic_visit(node)
        if not self.inside or any(type(o) not in ORDER for o in node.ops): return node
        last = node.comparators[-1]
        words = [f'{self.name}:{node.lineno}', text, is_small(last), slack_of(last), ' '.join(ORDER[type(o)] for o in node.ops)]
        call = ast.Call(ast.Name('__compared__', ast.Load()), [*map(ast.Constant, words), node.left, *node.comparators], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))

# ---------------------------------------------------------------- a is close to b

def here():
    "The line of the test or cell that asks, or None: the package's own comparisons are not counted"
    f = sys._getframe(2)
    while f and (f.f_code.co_filename==__file__ or any(p in f.f_code.co_filename for p in ('_pytest', 'fastcore'))): f = f.f_back
    name = Path(f.f_code.co_filename)
    if name.parent==ROOT/'tests': return f'{name.name}:{f.f_lineno}'
    return f'line {f.f_lineno}' if f.f_globals.get('__name__')=='__main__' else None

def share_of(a, b, rtol=None, atol=None):
    "The largest of |a-b|/(atol+rtol|b|), over nested lists and dicts as well; None where nothing is a float"
    import torch
    if isinstance(b, dict): pairs = [(a[k], b[k]) for k in b]
    elif isinstance(b, (list, tuple)): pairs = list(zip(a, b))
    else:
        a,b = (torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else torch.as_tensor(x) for x in (a, b))
        if not a.is_floating_point() or a.numel()==0 or a.device.type=='meta': return None
        if rtol is None: rtol,atol = torch.testing._comparison.default_tolerances(a, b)
        a,b = a.detach().cpu().double(),b.detach().cpu().double()
        off,room = (a-b).abs(),atol+rtol*b.abs()
        return torch.where((off==0) | (a==b) | (a.isnan() & b.isnan()), 0., off/room).max().item()
    return max((s for x,y in pairs if (s := share_of(x, y, rtol, atol)) is not None), default=None)

def watch(owner, name, limits):
    "Have `owner.name` note its share once it has said yes; `limits(arguments)` gives rtol and atol"
    plain = getattr(owner, name)
    @wraps(plain)
    def noted(a, b, *args, **kwargs):
        out,place = plain(a, b, *args, **kwargs),here()
        if place and out is not False and (s := share_of(a, b, *limits(*args, **kwargs))) is not None: note(place, s, 'limit', name)
        return out
    setattr(owner, name, noted)

def watch_approx():
    "pytest.approx compares lists and dicts number by number, here"
    import pytest
    scalar = type(pytest.approx(1.))
    plain = scalar.__eq__
    def noted(self, actual):
        out,place = plain(self, actual),here()
        if out and place and isinstance(self.expected, float) and math.isfinite(self.expected):
            off,room = abs(actual-self.expected),self.tolerance
            note(place, 0 if not off else off/room if room else 2, 'limit', 'approx')
        return out
    scalar.__eq__ = noted

def install():
    import fastcore.test, torch
    builtins.__compared__ = compared
    given = lambda rtol=None, atol=None, **kw: (rtol, atol)
    watch(torch.testing, 'assert_close', given)
    watch(torch, 'allclose', lambda rtol=1e-5, atol=1e-8, **kw: (rtol, atol))
    watch(torch.Tensor, 'allclose', lambda rtol=1e-5, atol=1e-8, **kw: (rtol, atol))
    watch(math, 'isclose', lambda rel_tol=1e-9, abs_tol=0.: (rel_tol, abs_tol))
    watch(fastcore.test, 'is_close', lambda eps=1e-5: (0, eps))

# ---------------------------------------------------------------- tables

def merge(rows):
    "Rows of another process or file, among those found here"
    for place,row in rows.items():
        if place not in found: found[place] = dict(row)
        else:
            times = found[place]['times']+row['times']
            found[place] = dict(max(found[place], row, key=lambda r: r['share']), times=times)

def table(rows, most=40):
    "The fullest limits, as lines"
    limits = sorted((r | dict(place=p) for p,r in rows.items() if r['kind']=='limit'), key=lambda r: -r['share'])
    full = [r for r in limits if r['share']>FULL]
    yield f'{len(limits)} limits, {len(full)} of them filled by more than {FULL:.0%}; {len(rows)-len(limits)} bounds'
    for r in limits[:max(most, len(full))]: yield f'{r["share"]:7.1%}  {r["place"]}  ({r["times"]}x, worst: {r["by"]})'

def save(rows, path): Path(path).write_text(json.dumps(dict(sorted(rows.items())), indent=1)+'\n', encoding='utf-8')

# ---------------------------------------------------------------- pytest, from conftest.py

class Plugin:
    def __init__(self, config):
        from _pytest.assertion import rewrite
        self.config,self.out = config,config.getoption('used_out')
        install(); watch_approx()
        plain = rewrite.rewrite_asserts
        def rewritten(tree, source, path=None, *args, **kwargs):
            plain(Watch(Path(path).name).visit(tree), source, path, *args, **kwargs)
        rewrite.rewrite_asserts,rewrite._read_pyc,sys.dont_write_bytecode = rewritten,lambda *a, **k: None,True
    def pytest_runtest_logstart(self, nodeid): now[0] = nodeid.split('::')[-1]
    def pytest_sessionfinish(self):
        if hasattr(self.config, 'workeroutput'): self.config.workeroutput['used'] = found   # to the process that prints
    def pytest_testnodedown(self, node): merge(getattr(node, 'workeroutput', {}).get('used', {}))
    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section('of its limit')
        for line in table(found): terminalreporter.write_line(line)
        if self.out: save(found, self.out)

# ---------------------------------------------------------------- notebooks

def cells(path, out):
    "In a child: execute one notebook with its assertions watched"
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT/'tests/tools'))
    import notebooks
    from execnb.shell import CaptureShell
    install()
    plain,at = CaptureShell.run,path.stem
    def run(self, code, *args, **kwargs):
        now[0] = f'{at} cell {self._cell_idx}'
        try: code = ast.unparse(Watch('line').visit(ast.parse(code)))
        except SyntaxError: pass   # a magic
        return plain(self, code, *args, **kwargs)
    CaptureShell.run = run
    with tempfile.TemporaryDirectory() as tmp: notebooks.execute(str(path), str(Path(tmp)/path.name), [])
    save(found, out)

def all_cells(paths):
    "Each notebook in a process of its own, under the environment of the caller"
    for path in paths:
        with tempfile.TemporaryDirectory() as tmp:
            out = Path(tmp)/'used.json'
            env = {**os.environ, 'MPLBACKEND': 'agg', 'HF_HUB_OFFLINE': '1', 'IN_TEST': '1',
                   'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
            res = subprocess.run([sys.executable, __file__, '--child', str(out), str(path)], cwd=path.parent, env=env,
                                 capture_output=True, text=True, check=False)
            if out.exists(): merge(json.loads(out.read_text()))
            print(path.name, 'ok' if res.returncode==0 else 'FAILED\n'+res.stderr.strip(), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('files', nargs='*', type=Path)
    p.add_argument('--out', type=Path, help='write all rows to this file')
    p.add_argument('--compare', action='store_true', help='FILES are tables of earlier runs: print the worst share over all')
    p.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return cells(a.files[0], a.child)
    if a.compare: [merge(json.loads(f.read_text())) for f in a.files]
    else: all_cells([f.resolve() for f in a.files] or sorted((ROOT/'nbs').rglob('[!.]*.ipynb')))
    print(*table(found), sep='\n')
    if a.out: save(found, a.out)

if __name__=='__main__': main()
