"""What the stored outputs of a notebook hang on, as one digest: whatever changes it may change them

Counted are the notebook's code; the modules that it imports, and theirs, each as a whole; the files that either names
(`../../results/bugs.json`, or all of a folder); the versions installed, of what tested.txt names; and the environment in which
notebooks are executed. Code that starts other processes or finds modules by name hangs on everything: all modules, tools and
results. That nothing is forgotten is seen whenever a notebook is executed: what it has opened and imported must be among these.
"""
import ast, hashlib, os, re, sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ANYTHING = re.compile(r'\bsubprocess\b|\bimport_module\b|\bsys\.path\b|\b__file__\b')   # in a notebook: it may read whatever there is
NAMED = re.compile(r'(?:\.\./)+([\w/.-]*\w)|\b(results/\w+\.json)')

def code_of(nb): return [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']

@cache
def everything(): return frozenset([*(ROOT/'nanowhale').rglob('*.py'), *(ROOT/'tests').rglob('*.py'), *(ROOT/'results').glob('*.json')])

def module(name):
    "Where a module of the package lies, or None"
    path = ROOT.joinpath(*name.split('.'))
    return next((p for p in (path/'__init__.py', path.with_suffix('.py')) if p.is_file()), None)

@cache
def moved():
    "Names that a package gives itself, each with its module; and what is looked through for a name that it has not"
    tree = ast.parse((ROOT/'nanowhale/moved.py').read_text(encoding='utf-8')).body
    tables = {n.targets[0].id: ast.literal_eval(n.value) for n in tree if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)}
    def full(names): return [f'nanowhale.{name}' for name in names.split()]
    return {k: full(names) for table in ('PUBLIC', 'MOVED') for name,names in tables.get(table, {}).items() for k in full(name)}

def imported(code, package=''):
    "Names of the package's modules that code asks for; relative ones are seen from `package`"
    yield from ('nanowhale.'+name for name in re.findall(r"\blater\('([\w.]+)\.\w+'\)", code))   # asked for when it is called
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package.split('.')[:len(package.split('.'))+1-node.level] if node.level else []
            base = '.'.join([*above, *filter(None, [node.module])])
            for name in (base, *(f'{base}.{a.name}' for a in node.names)): yield from (name, *moved().get(name, ()))

def named(code):
    "Files of the project that code names, and all that lie in a folder that it names"
    for a,b in NAMED.findall(code):
        path = ROOT/(a or b)
        yield from filter(Path.is_file, path.glob('*')) if path.is_dir() else [path]

@cache
def asked(path, name):
    "What the file of module `name` names and imports itself; its comments name the notebook it was made of"
    code = re.sub(r'^#.*', '', path.read_text(encoding='utf-8'), flags=re.M)
    package = name if path.name=='__init__.py' else name.rpartition('.')[0]
    return {path, *named(code)}, {name.rpartition('.')[0], *imported(code, package)}

@cache
def behind(name):
    "Files that a module hangs on: its own, those of its packages, what it imports and what it names"
    found,seen,waiting = set(), set(), {name}
    while waiting:
        seen.add(name := waiting.pop())
        path = module(name) if name.split('.')[0]=='nanowhale' else None
        if path is None: continue
        files,names = asked(path, name)
        found |= files
        waiting |= names-seen
    return frozenset(found)

def python(code): return '\n'.join(line for line in code.split('\n') if not re.match(r'\s*[%!]', line))   # without magics

def files(nb):
    "All files that a notebook, as JSON, may read"
    cells = [python(c) for c in code_of(nb)]
    own = {p for c in cells for p in named(c)}
    if any(map(ANYTHING.search, cells)): return own | everything()
    return own.union(*(behind(name) for c in cells for name in imported(c)))

@cache
def content(path): return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'none'

@cache
def versions():
    "What is installed of the packages in tested.txt, without the build of torch"
    def installed(name):
        try: return version(name).partition('+')[0]
        except PackageNotFoundError: return None
    return {name: installed(name) for name in re.findall(r'^([\w-]+)==', (ROOT/'tested.txt').read_text(encoding='utf-8'), flags=re.M)}

def digest(nb, env):
    "Of a notebook as JSON, executed under `env`"
    read = sorted((p.relative_to(ROOT).as_posix(), content(p)) for p in files(nb))
    return hashlib.sha256(repr((code_of(nb), read, versions(), sorted(env.items()))).encode()).hexdigest()[:16]

def watch():
    "From now on, note what this process reads of the project; returns a function that lists it"
    opened = set()
    def note(event, args):
        if event=='open' and isinstance(args[0], str): opened.add(os.path.abspath(args[0]))
    def loaded(): return {os.path.abspath(f) for m in list(sys.modules.values()) if isinstance(f := getattr(m, '__file__', None), str)}
    before = loaded()
    sys.addaudithook(note)
    def read():
        mine = (Path(p) for p in (opened | loaded())-before if p.startswith(str(ROOT)+os.sep))
        return {p for p in mine if p.is_file() and p.parent.name not in ('__pycache__', 'nanowhale.egg-info')}   # what Python and pip leave
    return read
