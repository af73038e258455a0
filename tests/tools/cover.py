"""Which lines of the package run, in the notebooks, in the tests, and in both together

    python tests/tools/cover.py                             a table by module, in about half an hour on two cores
    python tests/tools/cover.py --out results/trust.json    the same, kept under `coverage`

A chapter does not run its own module: its cells define the same code again. So a module counts as run where later chapters use it.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from runs import ROOT, provenance

SETTINGS = '[run]\nsource = nanowhale\nparallel = true\npatch =\n    subprocess\n    _exit\ndata_file = {d}/.coverage\n[report]\nomit = */_modidx.py\n'
PARTS = dict(notebooks=['tests/tools/notebooks.py', 'check', '--jobs', '2'], tests=['-m', 'pytest', '-q', '-n', '2', '--dist', 'loadfile', 'tests'])

def percents(folder):
    "Per cent of the lines of each module, and of all"
    do = lambda *words: subprocess.run([sys.executable, '-m', 'coverage', *words, f'--rcfile={folder}/rc'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    do('combine', '--keep'); do('json', '-o', f'{folder}/all.json')
    (folder/'.coverage').unlink()
    found = json.loads((folder/'all.json').read_text())
    return {Path(f).stem: round(v['summary']['percent_covered'], 1) for f,v in found['files'].items()} | dict(all=round(found['totals']['percent_covered'], 1))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', help='a JSON file; the table stands there under `coverage`')
    a = p.parse_args()
    env,result = os.environ|dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)),provenance('python tests/tools/cover.py')|dict(minutes={}, percent={})
    with tempfile.TemporaryDirectory() as d:
        folders = [Path(d)/n for n in (*PARTS, 'together')]
        for f in folders: f.mkdir(); (f/'rc').write_text(SETTINGS.format(d=f))
        for folder,words in zip(folders, PARTS.values()):
            began = time.monotonic()
            done = subprocess.run([sys.executable, '-m', 'coverage', 'run', f'--rcfile={folder}/rc', *words], cwd=ROOT, env=env)
            if done.returncode: sys.exit(f'{" ".join(words)} failed: only what passes is counted')
            result['minutes'][folder.name] = round((time.monotonic()-began)/60, 1)
            for f in folder.glob('.coverage.*'): (folders[-1]/f.name).write_bytes(f.read_bytes())
        for f in folders: result['percent'][f.name] = percents(f)
    for module,all_ in result['percent']['together'].items():
        print(f'{module:12}', *(f'{n} {result["percent"][n].get(module, 0):5.1f} %' for n in PARTS), f'together {all_:5.1f} %', sep='   ')
    if a.out:
        path = Path(a.out)
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {})|dict(coverage=result), indent=1)+'\n')

if __name__=='__main__': main()
