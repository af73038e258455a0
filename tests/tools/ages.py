"""Ages: does the package work on the oldest and the newest of what `settings.ini` allows?

    python tests/tools/ages.py --python 3.11 --bounds lowest --out results/ages.json
    python tests/tools/ages.py --python python3.13 --bounds newest --pin torch==2.13.0 --out results/ages.json
    python tests/tools/ages.py --python 3.12 --bounds tested
    python tests/tools/ages.py --freeze         write the versions that are installed here into tested.txt

A new environment in a temporary folder, of the Python asked for; the wheel of the last commit, with every requirement at
its lowest bound, at the newest release that the bounds allow, or as in tested.txt (`--pin` names others); `pip check`,
`nanowhale --help` and the import of every module of the wheel, outside the checkout; then the quick tests of the commit, in one
process. The row it adds to the file says what was installed, what passed and what did not. A bound of `lowest` that pip cannot
install is no bound: raise it.

Left out are the tests that need npm or node, and the tools that no such test needs. With `lowest` tools are the newest: they are
a contributor's, not a user's. For that reason `lowest` leaves out those that want a later fastcore too, and with them the
tests of the export (tests/test_project.py). Where `--minutes` are too few, the files of `FIRST` have run, which meet other people's
code most, and the row says how many tests there were. torch takes up to 7 GB on a disk; the environment is deleted at the end, but
for one that `--venv` names: it is kept, and used again by the next call.
"""
import argparse, json, os, re, shutil, signal, subprocess, sys, tempfile, time
import xml.etree.ElementTree as ET
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from runs import ROOT, provenance

FIRST = [f'test_{n}.py' for n in 'golden data weights parity config optim linear legacy model generate hub cli checkpoint train chat stream'.split()]
LEFT_OUT = ('test_site.py', 'test_explorers.py')
NO_TOOL = dict(newest=('jupyter', 'ruff'), tested=('jupyter', 'ruff'), lowest=('jupyter', 'ruff', 'nbdev', 'execnb'))
TESTED = 'tested.txt'

def name(r): return re.match(r'[\w-]+', r)[0]
def lowest(r): return f'{name(r)}=={re.search(r">=([^,]+)", r)[1]}'

def constraints(args, need, folder):
    "Lines that pip obeys: what `--pin` says, and of all else what `--bounds` says"
    rows = dict(lowest=[lowest(r) for r in need], newest=[], tested=(folder/TESTED).read_text().splitlines())[args.bounds]
    pinned = [name(p) for p in args.pin]
    return [*args.pin, *(r for r in rows if r and r[0]!='#' and name(r) not in pinned)]

def freeze(path):
    "Write the versions installed here into the lines of a constraints file; a build's own mark, as in 2.13.0+cpu, is left out"
    def here(m): return f'{m[1]}=={version(m[1]).split("+")[0]}'
    path.write_text(re.sub(r'^([\w.-]+)==[^\s;]+', here, path.read_text(), flags=re.M))

def quiet(*cmd, log, **kw):
    "Run, with all that it says in a file; the exit code"
    with open(log, 'a') as f: return subprocess.run(list(map(str, cmd)), stdout=f, stderr=subprocess.STDOUT, check=False, **kw).returncode

def limited(cmd, minutes, log, **kw):
    "The same, interrupted as if from the keyboard when the time is up; whether it was. A shell may have told its children to ignore that"
    with open(log, 'a') as f:
        p = subprocess.Popen(list(map(str, cmd)), stdout=f, stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kw)
        try: p.wait(60*minutes)
        except subprocess.TimeoutExpired: p.send_signal(signal.SIGINT); p.wait(60); return True
        return False

def say(*cmd, **kw): return subprocess.run(list(map(str, cmd)), capture_output=True, text=True, check=False, **kw)

def interpreter(python):
    "A version, a command or a path"
    for p in (python, f'python{python}'):
        if found := shutil.which(p): return found
    raise SystemExit(f'ages: no Python {python} here')

def counts(junit):
    "What pytest wrote: how many of each, which failed, and why the skipped ones were skipped"
    got,failed,skipped = dict(passed=0, failed=0, skipped=0),[],{}
    for case in ET.parse(junit).getroot().iter('testcase'):
        bad,skip = [c for c in case if c.tag in ('failure', 'error')],case.find('skipped')
        got['failed' if bad else 'passed' if skip is None else 'skipped'] += 1
        if bad: failed.append(f'{case.get("classname")}::{case.get("name")}: {re.sub(r"/tmp/[^ ]*/", "", bad[0].get("message"))}'.replace('\n', ' ')[:300])
        elif skip is not None: skipped[skip.get('message')] = skipped.get(skip.get('message'), 0)+1
    return got|dict(failures=failed, skips=dict(sorted(skipped.items())))

def age(args, home):
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    cfg,log,copy,venv = ini['DEFAULT'],home/'log.txt',home/'copy',args.venv or home/'venv'
    need,python = cfg['requirements'].split(),venv.absolute()/'bin'/'python'
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    env.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PIP_DISABLE_PIP_VERSION_CHECK='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
    copy.mkdir()
    subprocess.run(f'git archive HEAD | tar x -C {copy}', shell=True, cwd=ROOT, check=True)
    assert (ROOT/'settings.ini').read_bytes()==(copy/'settings.ini').read_bytes(), 'commit settings.ini first'

    start = time.time()
    tools = [r for r in cfg['dev_requirements'].split() if name(r) not in {*NO_TOOL[args.bounds], *map(name, need)}]
    (home/'constraints.txt').write_text('\n'.join(constraints(args, need, copy))+'\n')
    fresh = not python.exists()
    if fresh and quiet(interpreter(args.python), '-m', 'venv', venv, log=log): raise SystemExit(log.read_text())
    pip = [python, '-m', 'pip', '-q']
    wheels = lambda: [args.wheel] if args.wheel else (home/'dist').glob('*.whl')
    bad = (not args.wheel and quiet(*pip, 'wheel', '--no-deps', '--use-pep517', '-w', home/'dist', copy, log=log, env=env)
        or quiet(*pip, 'install', '-c', home/'constraints.txt', *wheels(), *tools, log=log, env=env)
        or quiet(*pip, 'install', '--no-deps', '--force-reinstall', *wheels(), log=log, env=env))   # a kept environment may hold an older one
    installed = time.time()
    if bad: return dict(install=' '.join(l for l in log.read_text().splitlines() if not l.startswith('WARNING'))[-600:])
    consistent = say(*pip, 'check', env=env)

    ask = f"""import json, sys, importlib.metadata as m
print(json.dumps(dict(python=sys.version.split()[0], **{{n: m.version(n) for n in {[*map(name, need), 'numpy']}}})))"""
    versions = json.loads(say(python, '-c', ask, cwd=home, env=env).stdout)
    modules = sorted('.'.join(p.relative_to(copy/'nanowhale').with_suffix('').parts) for p in (copy/'nanowhale').rglob('[!_]*.py') if p.parent.name!='course')
    look = say(python, '-W', 'error::DeprecationWarning:nanowhale', '-c', 'import importlib, nanowhale\nassert "site-packages" in nanowhale.__file__\n'
        +f'for n in {modules}: importlib.import_module("nanowhale."+n); print(n)', cwd=home, env=env)
    imported,door = look.stdout.split(),say(python.parent/'nanowhale', '--help', cwd=home, env=env).returncode==0

    there = {p.name for p in (copy/'tests').glob('test_*.py')}-{*LEFT_OUT}
    files = args.tests or [f'tests/{n}' for n in (*FIRST, *sorted(there-{*FIRST}))]
    nice = [] if os.name=='nt' else ['nice', '-n', '15']
    env['PYTHONPATH'] = str(copy)
    pytest = [*nice, python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *files]
    asked = say(*pytest, '--collect-only', cwd=copy, env=env).stdout
    begun = time.time()
    stopped = limited([*pytest, '--junitxml', home/'junit.xml'], args.minutes, log, cwd=copy, env=env)
    tests = dict(tests=int((re.search(r'(\d+) tests? collected', asked) or [0, 0])[1]), stopped=stopped)
    if (home/'junit.xml').exists(): tests |= counts(home/'junit.xml')
    else: tests |= dict(passed=0, failed=1, skipped=0, failures=['pytest: '+log.read_text()[-600:]], skips={})
    if not args.tests: tests['golden'] = json.loads(say(*nice, python, 'tests/test_golden.py', '--here', cwd=copy, env=env).stdout or 'null')
    if args.log: shutil.copy(log, args.log)
    return dict(versions=versions, consistent=consistent.returncode==0, command_line=door,
        modules=dict(imported=len(imported), of=len(modules), error=look.stderr[-300:]), files=' '.join(args.tests or ['all but', *LEFT_OUT]), **tests,
        minutes=dict(install=round((installed-start)/60, 1) if fresh else None, tests=round((time.time()-begun)/60, 1)))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--python', default=f'{sys.version_info[0]}.{sys.version_info[1]}', help='version, command or path of an interpreter')
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--bounds', choices=('lowest', 'newest', 'tested'), help='which releases of the requirements')
    what.add_argument('--freeze', action='store_true', help=f'write what is installed here into {TESTED}')
    p.add_argument('--pin', nargs='*', default=[], metavar='NAME==VERSION', help='releases that differ from it')
    p.add_argument('--tests', nargs='*', help='test files, instead of the quick ones')
    p.add_argument('--minutes', type=float, default=60, help='the tests may take')
    p.add_argument('--wheel', type=Path, help='try this one, instead of one made of the last commit')
    p.add_argument('--venv', type=Path, help='an environment to keep, or one that was kept')
    p.add_argument('--out', type=Path, help='add the row to this file')
    p.add_argument('--log', type=Path, help='keep what pip and pytest said here')
    args = p.parse_args()
    if args.freeze: return freeze(ROOT/TESTED)
    python = say(interpreter(args.python), '-c', 'import sys; print("%d.%d" % sys.version_info[:2])').stdout.strip()
    words = ['--python', python, '--bounds', args.bounds, *(['--pin', *args.pin] if args.pin else []), *(['--tests', *args.tests] if args.tests else [])]
    head = provenance(' '.join(['python tests/tools/ages.py', *words]))
    with tempfile.TemporaryDirectory() as d: row = age(args, Path(d))
    torch = row.get('versions', {}).get('torch', 'missing')
    row = head|dict(hardware=re.sub(r'torch .*', f'torch {torch}', head['hardware']))|row
    key = f'Python {python}, {args.bounds}'+''.join(f', {p}' for p in args.pin)
    print(json.dumps({key: row}, indent=1))
    if args.out:
        whole = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(whole|dict(ages=whole.get('ages', {})|{key: row}), indent=1)+'\n')
    return int('install' in row or bool(row['failed']) or not row['consistent'] or not row['command_line'] or row['modules']['imported']<row['modules']['of'])

if __name__=='__main__': sys.exit(main())
