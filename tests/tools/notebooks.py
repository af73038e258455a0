"""Execute the course's notebooks in fresh processes, keep their stored outputs true, and make README.md.

    python tests/tools/notebooks.py run [FILES]     execute, store the outputs, clean; a second run executes nothing
    python tests/tools/notebooks.py check [FILES]   execute, write nothing, fail where a stored output is stale
    python tests/tools/notebooks.py readme          make README.md (and nbs/images/) from nbs/index.ipynb; --check compares

Without FILES, those notebooks under `nbs/` are meant whose code, modules, results or versions have changed since `run` stored
their outputs (tests/tools/inputs.py; the digest of these stands in a notebook's metadata); with `--all`, every one. Each runs
in a process of its own (where the system can, a fork of one that has imported what takes seconds), in its folder, under the
environment `ENV`, so that nothing leaks from one to the next and no graphics card or network is ever used. Cells marked
`#| eval: false`, or with a flag that `tst_flags` of settings.ini names, are skipped and keep their outputs (`--flags slow` runs
them); so are notebooks whose front matter says `skip_exec: true`, as in nbdev_test.

What counts as stale: text must be equal to the letter, so a notebook rounds what it prints. Figures, drawn on white,
may differ by `MEAN` in the mean over pixels and colour channels and by `MOST` in any one of them, of 255. Measured on
a line plot: noise of a thousandth in the data, more than another processor causes, gives 0.01 and 6; one other letter
in the title 0.02 and 130; another colour or curve 2 and more. `--exact` asks for equal pixels. `--native` leaves the choice
of kernels to the processor, or to the caller's environment: what goes stale then is printed to more digits than it has.
"""
import argparse, base64, io, json, multiprocessing, multiprocessing.connection, os, platform, re, subprocess, sys, tempfile, time
from pathlib import Path
import inputs
from runs import preload

ROOT = Path(__file__).resolve().parents[2]
NBS, README, IMAGES = ROOT/'nbs', ROOT/'README.md', ROOT/'nbs/images'
MEAN,MOST = 0.25,32
ENV = dict(
    OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE',   # a thread for each notebook: two in each, on two cores, take 1.3 times the seconds
    PYTHONHASHSEED='0', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='', COLUMNS='80',
    MPLBACKEND='module://matplotlib_inline.backend_inline', LC_ALL='C.UTF-8', IN_TEST='1')
if platform.machine() in ('x86_64', 'AMD64'):   # the same floating-point sums on every processor of this kind
    KERNELS = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_CBWR='COMPATIBLE')
else: KERNELS = {}

def digest(nb): return inputs.digest(nb, ENV | KERNELS)   # nb: as JSON
def fresh(nb): return nb['metadata'].get('inputs')==digest(nb)

# ---------------------------------------------------------------- in the child: one notebook, executed

def skipped(cell, flags):
    "Would nbdev_test skip `cell`?"
    from nbdev.process import extract_directives
    if cell.cell_type!='code' or 'nbdev_export'+'(' in cell.source: return True
    directives = extract_directives(cell, remove=False)
    return directives.get('eval:', [''])[0].lower()=='false' or bool(flags & directives.keys())

def execute(path, dst, allow):
    "Execute the notebook `path`, clean it, and write it to `dst`; its end names the cell that failed"
    sys.path[0] = str(ROOT)   # the checkout in place of tests/tools/
    from execnb.nbio import read_nb, write_nb, _dict2obj
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    cfg,nb = get_config(), read_nb(path)
    flags = set(cfg.tst_flags.split()) - set(allow)
    front = NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_
    shell = CaptureShell(path, mpl_format='png')
    known = {Path(path).resolve(), *inputs.files(json.loads(Path(path).read_text(encoding='utf-8')))}
    read = inputs.watch()
    for i,cell in enumerate(nb.cells):
        if skipped(cell, flags) or str(front.get('skip_exec', False)).lower()=='true': continue
        shell._cell_idx = i+1   # for prettytb
        cell.outputs = _dict2obj(list(shell.run(cell.source)))
        if shell.exc:
            sys.stderr.write(shell.prettytb(fname=path)+'\n')
            sys.exit(f'{where(path, i, cell)}: {type(shell.exc).__name__}: {" ".join(str(shell.exc).split())[:200]}')
        shown = json.dumps([v for k,v in parts(cell.outputs) if not k.startswith('image')])
        if found := [p for p in (str(ROOT), 'site-packages', tempfile.gettempdir()+'/') if p in shown]:
            sys.exit(f'{where(path, i, cell)}: the output holds a path of this machine ({found[0]})')
    if more := sorted(p.relative_to(ROOT).as_posix() for p in read()-known):
        sys.exit(f'{path.name} has read {more[0]}, which tests/tools/inputs.py does not count among its inputs')
    clean_nb(nb, False, cfg.allowed_metadata_keys.split(), cfg.allowed_cell_metadata_keys.split(), cfg.clean_ids)
    write_nb(nb, dst)

# ---------------------------------------------------------------- in the parent: processes, comparison

def where(path, i, cell): return f'{Path(path).name} cell {i+1} (#{cell.get("id", "")})'

def child(path, dst, log, allow):
    "Execute a notebook in its folder; what it prints besides its outputs goes to the file `log`"
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(path.parent)
    execute(path, dst, allow)

def serve(folder, jobs, timeout, allow, *files):
    "Execute each notebook in a process of its own, `jobs` at a time, into a folder; print a line of JSON for each that ended"
    forks = 'fork' in multiprocessing.get_all_start_methods() and sys.platform!='darwin'
    context,waiting,running = multiprocessing.get_context('fork' if forks else 'spawn'), list(enumerate(map(Path, files))), {}
    if forks and len(files)>4:   # fewer import it sooner themselves
        preload()
        import execnb.shell, nbdev.clean   # noqa: F401
    while waiting or running:
        while waiting and len(running)<int(jobs):
            i,path = waiting.pop(0)
            process = context.Process(target=child, args=(path, Path(folder)/f'{i}.ipynb', Path(folder)/f'{i}.log', allow.split()))
            process.start()
            running[process.sentinel] = i,process,time.monotonic()
        ended = multiprocessing.connection.wait(list(running), timeout=1)
        late = [s for s,(_,_,began) in running.items() if time.monotonic()-began>float(timeout) and s not in ended]
        for s in [*ended, *late]:
            i,process,began = running.pop(s)
            if s in late: process.kill()
            process.join()
            print(json.dumps(dict(i=i, code=process.exitcode, late=s in late, seconds=time.monotonic()-began)), flush=True)

def executed(files, flags, jobs=1, timeout=3600, native=False):
    "Execute the notebooks under `ENV`; yields path, its text before and after (None on failure), seconds, error text, as they end"
    env = {**os.environ, **ENV, **({} if native else KERNELS), 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    if 'cuda' in flags: env['CUDA_VISIBLE_DEVICES'] = '0'
    before = [path.read_text(encoding='utf-8') for path in files]
    with tempfile.TemporaryDirectory() as d:
        words = [d, jobs, timeout, ' '.join(flags), *(path.resolve() for path in files)]
        server = subprocess.Popen([sys.executable, __file__, '_serve', *map(str, words)], env=env, stdout=subprocess.PIPE, text=True)
        for said in map(json.loads, server.stdout):
            path,dst,log = files[i := said['i']], Path(d)/f'{i}.ipynb', Path(d)/f'{i}.log'
            after = dst.read_text(encoding='utf-8') if dst.exists() and said['code']==0 else None
            err = log.read_text(errors='replace').strip() if log.exists() else ''
            if said['late']: err = f'{path.name}: not done after {timeout:g} s'
            yield path, before[i], after, said['seconds'], '' if after else err or f'{path.name}: exit code {said["code"]}'
        if server.wait(): sys.exit(f'the process that executes the notebooks ended with {server.returncode}')

def pixels(png):
    "PNG in base64, drawn on white, as an array; and the program that wrote it"
    import numpy as np
    from PIL import Image
    im = Image.open(io.BytesIO(base64.b64decode(''.join(png))))
    rgba,by = im.convert('RGBA'), im.info.get('Software', '').split(',')[0]
    return np.asarray(Image.alpha_composite(Image.new('RGBA', im.size, 'white'), rgba).convert('RGB'), dtype=float), by

def differs(kind, old, new, exact=False):
    "What differs between two stored values of one mime type, or None"
    if kind=='image/png':
        (a,was),(b,now) = pixels(old),pixels(new)
        by = f'; drawn by {was}, here {now}' if was!=now else ''
        if a.shape!=b.shape: return f'figure was {a.shape[1]}x{a.shape[0]} pixels, is {b.shape[1]}x{b.shape[0]}{by}'
        mean,most = (d := abs(a-b)).mean(), d.max()
        if most<=(0 if exact else MOST) and mean<=MEAN: return None
        return f'figure differs by {mean:.3f} in the mean and {most:.0f} at most (allowed: {MEAN} and {MOST}, of 255){by}'
    old,new = (''.join(o) if isinstance(o, list) else str(o) for o in (old,new))
    if old==new: return None
    a,b = old.splitlines()+['(nothing)'], new.splitlines()+['(nothing)']
    line = next((i for i,(x,y) in enumerate(zip(a,b)) if x!=y), 0)
    return f'{kind} line {line+1} was {a[line][:100]!r}, is {b[line][:100]!r}'

def parts(outputs):
    "The outputs of one cell as (kind, value) pairs"
    for o in outputs:
        if o['output_type'] in ('stream', 'error'): yield o.get('name', 'error'), o.get('text', o.get('evalue'))
        yield from sorted(o.get('data', {}).items())

def stale(old, new, name, exact):
    "One line for each stored output of notebook `old` that is not what `new` shows"
    for i,(a,b) in enumerate(zip(old['cells'], new['cells'])):
        a,b,at = list(parts(a.get('outputs', []))), list(parts(b.get('outputs', []))), where(name, i, b)
        if (was := [k for k,_ in a])!=(now := [k for k,_ in b]): yield f'{at}: stored outputs {was}, now {now}'
        else: yield from (f'{at}: {d}' for (k,x),(_,y) in zip(a,b) if (d := differs(k, x, y, exact)))

def keep_equal_pictures(old, new):
    "Where a figure has not one different pixel keep its old bytes: another zlib or matplotlib writes others"
    for a,b in zip(old['cells'], new['cells']):
        for x,y in zip(a.get('outputs', []), b.get('outputs', [])):
            was,now = (o.get('data', {}).get('image/png') for o in (x, y))
            if was and now and not differs('image/png', was, now, exact=True): y['data']['image/png'] = was
    return new

def work(files, mode, flags, jobs, exact, timeout, native=False):
    "Run or check `files`; returns the number of notebooks that failed"
    start,failed = time.time(),0
    for path,before,after,secs,err in executed(files, flags, jobs, timeout, native):
        *trace,line = err.splitlines() or ['']
        if trace: print(*trace, sep='\n', file=sys.stderr)
        problems = [line] if err else []
        if not err:
            old,new = json.loads(before), json.loads(after)
            if mode=='check': problems = list(stale(old, new, path, exact))
            elif path.read_text(encoding='utf-8')!=before: problems = ['edited while it ran, so nothing was stored: run it again']
            else:
                new['metadata']['inputs'] = digest(new)
                path.write_text(json.dumps(keep_equal_pictures(old, new), sort_keys=True, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
        failed += bool(problems)
        print(f'{secs:6.1f} s  {path.name}  {"FAILED" if problems else "ok"}', *problems, sep='\n    ', flush=True)
    print(f'{time.time()-start:6.1f} s  {len(files)} notebooks, {failed} failed')
    return failed

# ---------------------------------------------------------------- README.md from nbs/index.ipynb

def readme():
    "README.md and its pictures, made from nbs/index.ipynb: dict path -> bytes"
    files,out = {},['<!-- Made from nbs/index.ipynb by `python tests/tools/notebooks.py readme`: edit the notebook, not this file. -->']
    local = lambda m: f'{m[1]}{os.path.normpath("nbs/"+m[2])}' if (NBS/m[2].split('#')[0]).exists() else m[0]
    for cell in json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells']:
        src = ''.join(cell['source'])
        said = set(re.findall(r'^#\|\s*([\w-]+(?::\s*\w+)?)', src, flags=re.M))
        if said & {'hide', 'default_exp', 'include: false'}: continue
        if cell['cell_type']!='code':   # links that are right in nbs/ must be right one folder up
            out.append(re.sub(r'(\]\(|(?:src|href)=")(?!\w+:|#|/)([^)"\s]+)', local, src))
            continue
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if code and 'echo: false' not in said: out.append(f'```python\n{code}\n```')
        if 'output: false' in said: continue
        for o in cell.get('outputs', []):
            data = o.get('data', {})
            if 'image/png' in data:
                files[png := IMAGES/f'index-{len(files)+1}.png'] = base64.b64decode(''.join(data['image/png']))
                alt = re.search(r'^#\|\s*fig-alt:\s*(.*)', src, flags=re.M)
                out.append(f'![{alt[1] if alt else "figure"}]({png.relative_to(ROOT).as_posix()})')
            elif 'text/markdown' in data: out.append(''.join(data['text/markdown']))
            elif text := ''.join(o.get('text', data.get('text/plain', ''))).rstrip(): out.append(f'```text\n{text}\n```')
    return {**files, README: ('\n\n'.join(out)+'\n').encode()}

def write_readme(check):
    "Write README.md and its pictures, or name what is stale; returns the number of problems"
    files = readme()
    bad = [p for p,b in files.items() if not p.exists() or p.read_bytes()!=b]
    left = set(IMAGES.glob('index-*.png'))-set(files)
    if check:
        for p in [*bad, *left]: print(f'{p.relative_to(ROOT)} is stale: run `python tests/tools/notebooks.py readme`')
        return len(bad)+len(left)
    for p in bad: p.parent.mkdir(exist_ok=True); p.write_bytes(files[p])
    for p in left: p.unlink()
    print(f'README.md: {len(files)-1} pictures, {len(bad)+len(left)} files changed')
    return 0

def main():
    if sys.argv[1:2]==['_serve']: return serve(*sys.argv[2:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('mode', choices=['run', 'check', 'readme'])
    p.add_argument('files', nargs='*', type=Path, help='notebooks (default: those of nbs/ whose inputs have changed)')
    p.add_argument('--all', action='store_true', help='every notebook of nbs/')
    p.add_argument('--check', action='store_true', help='readme: compare only')
    p.add_argument('--flags', default='', help='tst_flags whose cells run too, separated by spaces')
    p.add_argument('--jobs', type=int, default=1, help='notebooks at a time (default: 1)')
    p.add_argument('--exact', action='store_true', help='check: not one pixel of a figure may differ')
    p.add_argument('--native', action='store_true', help="check: with this processor's own kernels")
    p.add_argument('--timeout', type=float, default=3600, help='seconds after which a notebook is given up (default: 3600)')
    a = p.parse_args()
    if a.mode=='readme': sys.exit(bool(write_readme(a.check)))
    files = [f.resolve() for f in a.files] or sorted(NBS.rglob('[!.]*.ipynb'))
    if not (a.files or a.all or a.flags or a.native): files = [f for f in files if not fresh(json.loads(f.read_text(encoding='utf-8')))]
    if a.native and a.mode=='run': p.error('--native is for check: what is stored is made with the kernels that every processor has')
    if missing := [f for f in files if not f.is_file()]: sys.exit(f'no such notebook: {missing[0]}')
    if not files: sys.exit(print('nothing has changed that a stored output hangs on'))
    sys.exit(bool(work(files, a.mode, a.flags.split(), a.jobs, a.exact, a.timeout, a.native)))

if __name__=='__main__': main()
