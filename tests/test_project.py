"""The project as a whole: notebooks, modules, README and wheel say the same. Everything runs on a copy of the checkout."""
import json, os, re, shutil, subprocess, sys, warnings, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import notebooks

for needed in ('nbdev', 'build', 'setuptools', 'wheel'): pytest.importorskip(needed, reason="needs `pip install -e '.[dev]'`")

ROOT = Path(__file__).resolve().parents[1]
PARTS = 'nbs nanowhale settings.ini setup.py MANIFEST.in README.md LICENSE'.split()
MODULES = sorted(p for p in (ROOT/'nanowhale').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
NOTEBOOKS = sorted((ROOT/'nbs').rglob('[!.]*.ipynb'))

def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def run(*cmd, cwd, path=''):
    "Run `cmd` in the folder `cwd` with `path` as the PYTHONPATH; its output must tell what went wrong"
    env = {**os.environ, 'PYTHONPATH': str(path), 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    res = subprocess.run([sys.executable, *map(str, cmd)], cwd=cwd, env=env, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert res.returncode==0, res.stdout[-4000:]
    return res.stdout

def copy_to(folder):
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked', '*.egg-info')
    for part in PARTS:
        if (ROOT/part).is_dir(): shutil.copytree(ROOT/part, folder/part, ignore=skip)
        elif (ROOT/part).exists(): shutil.copy(ROOT/part, folder/part)
    return folder

def snapshot(folder):
    "Every file under nbs/ and nanowhale/ with its bytes: a new, untracked file counts as a change"
    return {str(p.relative_to(folder)): p.read_bytes() for part in ('nbs', 'nanowhale') for p in (folder/part).rglob('*')
            if p.is_file() and '__pycache__' not in p.parts and p.name!='.last_checked'}

def changed(folder, script):
    "Names of the files that an nbdev command changes, makes or removes"
    before = snapshot(folder)
    run('-c', script, cwd=folder, path=folder)
    after = snapshot(folder)
    return sorted(n for n in before.keys()|after.keys() if before.get(n)!=after.get(n))

def source(nb): return '\n'.join(''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code')
def exports_to(nb): return re.findall(r'^#\|\s*default_exp\s+(\S+)', source(nb), flags=re.M)
def origin(module): return (m := re.search(r'File to edit: (?:\.\./)+nbs/(\S+\.ipynb)', module.read_text(encoding='utf-8'))) and ROOT/'nbs'/m[1]
def dotted(module): return '.'.join(module.relative_to(ROOT/'nanowhale').with_suffix('').parts)

# ---------------------------------------------------------------- notebooks and modules

def test_export_leaves_no_diff(tmp_path):
    bad = changed(copy_to(tmp_path), 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    assert not bad, f'run nbdev_export: {bad}'

def test_clean_leaves_no_diff(tmp_path):
    bad = changed(copy_to(tmp_path), 'from nbdev.clean import nbdev_clean; nbdev_clean()')
    assert not bad, f'run nbdev_clean: {bad}'

@pytest.mark.parametrize('module', MODULES, ids=dotted)
def test_module_comes_from_a_live_notebook(module):
    nb = origin(module)
    assert nb, f'{module.name} names no notebook: nothing in nanowhale/ is written by hand'
    assert nb.exists(), f'{module.name} is an orphan: {nb.name} is gone'
    assert exports_to(nb)==[dotted(module)], f'{module.name} is an orphan: {nb.name} exports to {exports_to(nb)}'

@pytest.mark.parametrize('module', MODULES, ids=dotted)
def test_module_compiles_without_a_warning(module):
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # LaTeX in a subtitle becomes a docstring with invalid escapes
        compile(module.read_text(encoding='utf-8'), module.name, 'exec')

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_chapters_import_only_earlier_ones(nb):
    chapter = {dotted(m): origin(m).name for m in MODULES if origin(m)}
    used = set(re.findall(r'^\s*from nanowhale\.([\w.]+) import', source(nb), flags=re.M))
    free = ('course.', 'validate', 'processor')   # of the notebooks alone; needs no other chapter itself
    late = sorted(m for m in used if chapter.get(m, '')>nb.name and not m.startswith(free))
    assert not late or nb.parent.name=='solutions', f'{nb.name} imports from later chapters: {late}'
    stars = re.findall(r'^\s*from \S+ import \*.*', source(nb), flags=re.M)
    assert not stars, f'{nb.name}: {stars[0]}'

@pytest.mark.parametrize('name', ['validate', 'processor'])
def test_what_all_may_import_needs_no_other_chapter(name):
    text = re.sub(r'^#.*', '', (ROOT/f'nanowhale/{name}.py').read_text(encoding='utf-8'), flags=re.M)
    assert not re.search(r'^\s*(from|import) (nanowhale|\.)', text, flags=re.M)

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_live(nb):
    text = '\n'.join(''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
    dead = [u for u in re.findall(r'\]\(([^)\s#]+)[^)]*\)', text) if '://' not in u and not u.startswith('mailto:') and not (nb.parent/u).exists()]
    assert not dead, f'{nb.name} links to {dead}'

def test_notebooks_leave_nothing_behind():
    "After nbdev_test, which runs them in nbs/: what a notebook writes belongs in a temporary folder"
    known = ('.ipynb_checkpoints', '.last_checked', '.notest')
    folders = [ROOT/'nbs', *{nb.parent for nb in NOTEBOOKS}]
    parts = [*folders, ROOT/'nbs/images', ROOT/'nbs/site']
    left = sorted(p.name for f in folders for p in f.iterdir() if p.suffix!='.ipynb' and p not in parts and p.name not in known)
    assert not left, f'nbs/ holds {left}'

# ---------------------------------------------------------------- README and .ci/run

def test_readme_regenerates_unchanged(): assert notebooks.write_readme(check=True)==0

def test_readme_and_ci_agree_on_the_test_command():
    command = "pip install -e '.[dev]' -c tested.txt && nbdev_test && pytest -q -n 2 --dist loadfile tests"
    assert command in (ROOT/'README.md').read_text(encoding='utf-8')
    assert (ROOT/'.ci/run').read_text(encoding='utf-8').strip().endswith(command)

ALONE = """
import importlib, json, sys
from pathlib import Path
folder,wanted = Path(sys.argv[1]),json.loads(sys.argv[2])
path = [str(folder), *sys.path[1:]]
for names in wanted:
    sys.path[:] = path
    for name in [n for n,m in sys.modules.items() if 'tests' in Path(getattr(m, '__file__', None) or '').parts]: del sys.modules[name]
    for name in names: importlib.import_module(name)
"""

@pytest.mark.parametrize('folder', ['tests', 'tests/tools'])
def test_whatever_is_a_command_finds_what_it_imports(folder):
    "Without pytest's search path, each as if it were alone; also what a function imports"
    sources = {f.stem: f.read_text(encoding='utf-8') for f in sorted((ROOT/folder).glob('*.py'))}
    wanted = [[name, *re.findall(r'^ +(?:import|from) (test_\w+)', text, flags=re.M)] for name,text in sources.items()
        if re.search(r"^if __name__=='__main__'", text, flags=re.M)]
    assert len(wanted)>9
    run('-c', ALONE, ROOT/folder, json.dumps(wanted), cwd=ROOT, path=ROOT)

def test_all_install_the_tested_versions():
    "But for one job of the weekly workflow, which is there for the newest ones"
    for place in ('README.md', 'CONTRIBUTING.md', '.ci/run', '.devcontainer/devcontainer.json', '.github/workflows/test.yml', '.github/workflows/docs.yml'):
        text = (ROOT/place).read_text(encoding='utf-8')
        installs = re.findall(r"pip install -e \S+(.*)", text)
        assert installs and all(rest.startswith(' -c tested.txt') for rest in installs), place
    newest,outputs = (ROOT/'.github/workflows/weekly.yml').read_text(encoding='utf-8').split('\n  outputs:')
    assert '-c tested.txt' not in newest and "'.[dev]' -c tested.txt && python tests/tools/notebooks.py check --all" in outputs

# ---------------------------------------------------------------- the wheel

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('wheel')
    run('-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp/'dist', cwd=copy_to(tmp))
    return next((tmp/'dist').glob('*.whl'))

def test_wheel_says_what_settings_say(wheel):
    cfg = settings()
    with zipfile.ZipFile(wheel) as z: meta,entry = (z.read(next(n for n in z.namelist() if n.endswith(f))).decode() for f in ('/METADATA', '/entry_points.txt'))
    norm = lambda reqs: sorted((re.match(r'[\w-]+', r)[0], *sorted(re.sub(r'^[\w-]+', '', r).split(','))) for r in reqs)
    needs = [re.sub(r'[\s()]', '', r).split(';') for r in re.findall(r'^Requires-Dist: (.*)$', meta, flags=re.M)]
    for key,extra in dict(requirements=None, dev_requirements='dev', docs_requirements='docs').items():
        got = [r for r,*mark in needs if mark==([] if extra is None else [f'extra=="{extra}"'])]
        assert norm(got)==norm(cfg[key].split()), key
    assert f'\nVersion: {cfg["version"]}\n' in meta and 'License-Expression: Apache-2.0' in meta.replace('License: ', 'License-Expression: ')
    assert re.search(r'^__version__ = "(.*)"$', (ROOT/'nanowhale/__init__.py').read_text(), flags=re.M)[1]==cfg['version']
    assert 'nanowhale = nanowhale.cli:main' in entry and 'nanowhale = nanowhale._modidx:d' in entry

def test_wheel_installs_elsewhere_and_imports(wheel, tmp_path):
    run('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', tmp_path/'site', wheel, cwd=tmp_path)
    names = ['nanowhale.'+dotted(m) for m in MODULES if m.parent.name!='course']+['nanowhale', 'nanowhale._modidx']
    assert not (tmp_path/'site/nanowhale/course').exists()      # what only the notebooks need
    code = f'import importlib\nfor n in {sorted(names, reverse=True)}: print(importlib.import_module(n).__file__)'
    files = run('-c', code, cwd=tmp_path, path=tmp_path/'site').splitlines()
    assert len(files)==len(names) and all(f.startswith(str(tmp_path/'site')) for f in files), files

# ---------------------------------------------------------------- the house

WIDE = 100

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_code_fits_in_a_hundred_columns(nb):
    cells = [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    wide = [line for c in cells if re.match(r'#\|\s*export', c) for line in c.splitlines() if len(line)>WIDE]
    assert not wide, f'{nb.name}: {wide[0]}'

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_is_told_in_words(nb):
    "`#| fig-alt: ...` among the first lines, for those who do not see it"
    cells = [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    drawn = [''.join(c['source']) for c in cells if any('image/png' in o.get('data', {}) for o in c['outputs'])]
    silent = [text for text in drawn if not re.search(r'^#\|\s*fig-alt: .{30}', text, flags=re.M)]
    assert not silent, f'{nb.name}: {silent[0][:80]}'

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_cell_prints_is_kept(nb):
    "A `;` at a cell's end silences more than its value: nbdev's shell then drops what the cell has printed, too"
    cells = [''.join(c['source']).rstrip() for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    lost = [text for text in cells if text.endswith(';') and re.search(r'\b(print|bug_table|ladder_table)\(', text)]
    assert not lost, f'{nb.name}: {lost[0][-80:]}'

@pytest.mark.parametrize('module', [m for m in MODULES if m.parent.name=='model'], ids=dotted)
def test_the_model_is_plain(module):
    "No kernel, compiler flag, device test or file, and nothing of the other packages: `fast`, `train` and `generate` come after it"
    text = module.read_text(encoding='utf-8')
    machinery = re.findall(r'mkldnn|flex_attention|autograd\.Function|is_compiling|safetensors|device\.type|triton|import os|open\(', text)
    assert not machinery, f'{dotted(module)}: {machinery[0]}'
    assert not re.findall(r'^from \.\.|^from nanowhale\.(?!model)|^import nanowhale', text, flags=re.M)
