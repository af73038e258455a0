"""What one GPU says of the package, in a few minutes and without a network

    python tests/tools/gpu.py pack --data DIR --tokenizer DIR   beforehand, with a network: what is missing there, into .gpu/
    python3 tests/tools/gpu.py run --minutes 9 --archive ${OUT:-.}/gpu.tar.gz   there, in the root of the checkout
    python tests/tools/gpu.py report gpu.tar.gz                 what came back, as results/gpu.json

`pack` gathers wheels for the Python of that machine (what it has of torch and Triton stays), the tokenizer, and the text as
token ids. It says how large that is, and refuses more than 52 MiB.

`run` installs the wheels into a temporary folder and goes through the parts of `gpu_parts.PARTS`, the most valuable first
(`--only` names sections or parts). Each part is a process of its own with a bound in seconds: one that fails, or takes too
long, leaves a line in run.json that says so, and the next one begins. A part writes its file anew with each figure it finds,
and the archive is written anew when a file has changed, so the command can be stopped at any moment. The archive has all
files but checkpoints: JSON, the ends of what the parts printed, and at most four pictures.

`run --small` is a rehearsal on a processor: a tiny whale in float32, every part in seconds. `report` writes no
results/gpu.json from one. Given several archives, `report` takes of each part the last that measured something.
"""
import argparse, io, json, lzma, os, re, shutil, signal, subprocess, sys, tarfile, tempfile, time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from runs import ROOT, provenance, unpack

MiB = 2**20
MOST_PACKED = 52*MiB
MOST_ARCHIVED = 15*MiB
PICTURES = 4
LOG = 100_000          # bytes of what a part printed that are kept
LEAST = 3              # seconds: with less left no part begins
PLATFORMS = [f'manylinux{p}_x86_64' for p in ('_2_28', '_2_27', '_2_17', '2014', '1')]
MISSING = 'transformers datasets fastcore zstandard dill multiprocess'.split()   # on a machine with torch, Triton, an older transformers

def say(line): print(line, flush=True)

def read(path): return json.loads(Path(path).read_text(encoding='utf-8'))

def commit(): return provenance('')['commit']

# ---------------------------------------------------------------- pack

def tested(name):
    "The version of a requirement in tested.txt"
    return re.search(rf'^{name}==([^\s;]+)', (ROOT/'tested.txt').read_text(), flags=re.M)[1]

def fetch_wheels(folder, python):
    "Wheels for that Python on x86-64 Linux, of the tested versions"
    platforms = [w for p in PLATFORMS for w in ('--platform', p)]
    names = [f'{n}=={tested(n)}' for n in MISSING]
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--implementation', 'cp',
        '--python-version', python, *platforms, '-d', folder, *names], check=True)

def pack_text(data, tokenizer, folder, seed=0, shard=2**22):
    "Documents in a random order as token ids: the ranks of the ids by frequency, compressed; how much it is"
    import numpy as np
    from nanowhale.train.data import load_tokenizer, read_texts
    tok = load_tokenizer(tokenizer)
    texts = list(read_texts(data))
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    ids = tok(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    if tok.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)!=texts:
        raise SystemExit('gpu: this tokenizer does not give back the text that it read')
    flat = np.concatenate([np.array(i, np.uint32) for i in ids])
    known,rank,count = np.unique(flat, return_inverse=True, return_counts=True)
    order = np.argsort(-count, kind='stable')
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ranks = place[rank].astype('<u2' if len(known)<=2**16 else '<u4')
    n = range(0, len(ranks), shard)
    for i,a in enumerate(n): (folder/f'tokens-{i:02}.xz').write_bytes(lzma.compress(ranks[a:a+shard].tobytes()))
    held = dict(dtype=ranks.dtype.str, ids=known[order].tolist(), lengths=[len(i) for i in ids])
    (folder/'tokens.json').write_text(json.dumps(held))
    return dict(documents=len(texts), characters=sum(map(len, texts)), tokens=len(flat))

def unpack_text(folder, out):
    "The packed documents as a file that `nanowhale train` reads; made once"
    import numpy as np
    from nanowhale.train.data import load_tokenizer
    from nanowhale.train.files import atomic
    if out.exists(): return out
    held = read(folder/'tokens.json')
    ranks = b''.join(lzma.decompress(f.read_bytes()) for f in sorted(folder.glob('tokens-*.xz')))
    ids = np.array(held['ids'], np.uint32)[np.frombuffer(ranks, held['dtype'])]
    docs = [part.tolist() for part in np.split(ids, np.cumsum(held['lengths'])[:-1])]
    texts = load_tokenizer(folder/'tokenizer').backend_tokenizer.decode_batch(docs, skip_special_tokens=False)
    with atomic(out) as tmp: tmp.write_text(''.join(json.dumps(dict(text=t))+'\n' for t in texts))
    return out

def size_of(folder): return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())

def pack(args):
    "Into a new folder that takes the place of the old one when all of it is there"
    fresh = args.pack.with_name(args.pack.name+'.new')
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh/'wheels').mkdir(parents=True)
    (fresh/'tokenizer').mkdir()
    for f in Path(args.tokenizer).glob('tokenizer*'): shutil.copyfile(f, fresh/'tokenizer'/f.name)
    text = pack_text(args.data, args.tokenizer, fresh)
    if not args.no_wheels: fetch_wheels(fresh/'wheels', args.python)
    about = dict(commit=commit(), python=args.python, source=Path(args.data).name, **text)
    (fresh/'pack.json').write_text(json.dumps(about, indent=1)+'\n')
    parts = {f.name: size_of(f) if f.is_dir() else f.stat().st_size for f in sorted(fresh.iterdir())}
    if sum(parts.values())>MOST_PACKED:
        largest = max(parts, key=parts.get)
        raise SystemExit(f'gpu: {sum(parts.values())/MiB:.1f} MiB are more than {MOST_PACKED//MiB}; most is {largest} '
            f'({parts[largest]/MiB:.1f} MiB): give less --data')
    shutil.rmtree(args.pack, ignore_errors=True)
    fresh.rename(args.pack)
    words = sum(n for name,n in parts.items() if name.startswith('tokens'))
    say(f'{args.pack}: {sum(parts.values())/MiB:.1f} MiB (wheels {parts["wheels"]/MiB:.1f}, tokenizer {parts["tokenizer"]/MiB:.1f}, '
        f'text {words/MiB:.1f}: {text["documents"]:,} documents, {text["tokens"]:,} tokens)')

# ---------------------------------------------------------------- run

def install(pack, home):
    "The wheels into a temporary folder; where Python finds them, for this process and those that it begins"
    wheels = sorted((pack/'wheels').glob('*.whl'))
    site = home/'site'
    if wheels:
        done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--no-cache-dir',
            '--target', site, *wheels], capture_output=True, text=True)
        if done.returncode: say(f'gpu: the wheels were not installed: {done.stderr.strip().splitlines()[-1]}')
    paths = [str(site), str(ROOT)]
    sys.path[:0] = paths
    os.environ['PYTHONPATH'] = os.pathsep.join([*paths, *filter(None, [os.environ.get('PYTHONPATH')])])
    os.environ.update(HF_HUB_OFFLINE='1', TQDM_DISABLE='1', MPLBACKEND='agg', TORCHINDUCTOR_CACHE_DIR=str(home/'inductor'),
        TRITON_CACHE_DIR=str(home/'triton'))

class Notes:
    "The file of one part, whole after every figure"
    def __init__(self, path):
        self.path = path
        self.said = {}

    def __call__(self, **figures):
        "Add figures"
        from nanowhale.train.files import write_json
        self.said |= figures
        write_json(self.path, self.said)

    def tried(self, name, f, *args):
        "Add what a function returns; if it fails, why, in a line"
        from nanowhale.train.data import first_line
        try: found = f(*args)
        except Exception as e: found = dict(error=f'{type(e).__name__}: {first_line(e)}'[:300])
        self(**{name: found})
        say(f'{name}: {json.dumps(found)[:200]}')
        return found

def archive(folder, path):
    "JSON first, then pictures, then the ends of the logs, while there is room; whole or not at all"
    from nanowhale.train.files import atomic
    def of(end): return sorted(folder.glob(f'[!.]*.{end}'))
    room = MOST_ARCHIVED
    with atomic(path) as tmp, tarfile.open(tmp, 'w:gz') as tar:
        for f in (*of('json'), *of('png')[:PICTURES], *of('txt')):
            data = f.read_bytes()
            if f.suffix=='.txt': data = data[-LOG:]
            if len(data)>room: continue
            room -= len(data)
            info = tarfile.TarInfo(f'gpu/{f.name}')
            info.size = len(data)
            info.mtime = int(f.stat().st_mtime)
            tar.addfile(info, io.BytesIO(data))

def stamps(folder): return {f.name: f.stat().st_mtime_ns for f in folder.glob('[!.]*') if f.suffix!='.txt'}

def follow(parent):
    "Do not outlive the process that began this one"
    while os.getppid()==parent: time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)

def child(part, job, parent):
    "A part at work, leader of all processes that it begins"
    from threading import Thread
    os.setpgrp()
    for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(job.results/f'{part.key}.txt', 'w', buffering=1, encoding='utf-8')
    for fd in (1, 2): os.dup2(sys.stdout.fileno(), fd)
    Thread(target=follow, args=(parent,), daemon=True).start()
    part.f(Notes(job.results/f'{part.key}.json'), job)

def end(p):
    "Of a process and all that it began"
    try: os.killpg(p.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): p.kill()
    p.join()

def last_words(log):
    "The last line that a part printed"
    lines = log.read_text(errors='replace').strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else 'it said nothing'

def one_part(part, job, seconds, changed):
    "Begin a part, wait for it within its bound, and say how it ended"
    p = get_context('fork').Process(target=child, args=(part, job, os.getpid()))
    begun = time.time()
    p.start()
    how = None
    try:
        while p.is_alive() and how is None:
            p.join(0.2)
            changed()
            if time.time()-begun>seconds: how = f'cut after {seconds:.0f} s, its bound'
    finally: end(p)
    log = job.results/f'{part.key}.txt'
    if how is None and not p.exitcode: how = 'done'
    if how is None and p.exitcode<0: how = f'killed by signal {-p.exitcode}'
    return dict(ended=how or f'failed: {last_words(log)}', seconds=round(time.time()-begun, 1), bound=round(seconds, 1))

def chosen(only, parts):
    "Parts by their own names or their section's; none named: all"
    known = {p.section for p in parts} | {p.name for p in parts}
    if wrong := set(only)-known: raise SystemExit(f'gpu: no part {wrong.pop()!r}: choose of {", ".join(sorted(known))}')
    return [p for p in parts if not only or {p.section, p.name} & set(only)]

def stop(signum, frame): raise SystemExit(128+signum)

def preload():
    "What all parts import, before they are begun as copies of this process; nothing here may touch the GPU"
    import nanowhale.cli, nanowhale.fast.bench, nanowhale.run   # noqa: F401, E401
    from transformers import DeepseekV4ForCausalLM   # noqa: F401

def run(args):
    "All parts, each for itself"
    begun = time.time()
    home = Path(tempfile.mkdtemp(prefix='nanowhale-gpu-'))
    for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, stop)
    try:
        install(args.pack, home)
        import gpu_parts
        parts = chosen(args.only, gpu_parts.PARTS)
        go_through(parts, args, home, begun)
    finally: shutil.rmtree(home, ignore_errors=True)

def go_through(parts, args, home, begun):
    "The parts in their order; after each, and whenever a file has changed, the archive"
    from nanowhale.train.files import write_json
    import gpu_parts
    results = args.results or Path('runs')/time.strftime('gpu-%Y%m%d-%H%M%S')
    path = args.archive or results.with_name(f'{results.name}.tar.gz')
    results.mkdir(parents=True, exist_ok=True)
    packed = read(args.pack/'pack.json') if (args.pack/'pack.json').exists() else {}
    told = ' '.join(['python3 tests/tools/gpu.py', *(Path(w).name if '/' in w else w for w in sys.argv[1:])])
    head = dict(command=told, commit=commit() or args.commit or packed.get('commit'), seed=args.seed, rehearsal=args.small, text=packed,
        began=time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()), parts={})
    job = SimpleNamespace(results=results.absolute(), pack=args.pack.absolute(), home=home, seed=args.seed, tokens=args.tokens,
        device=args.device or ('cpu' if args.small else 'cuda'), size=gpu_parts.SMALL if args.small else gpu_parts.REAL)
    seen = {}
    def changed():
        nonlocal seen
        if seen==(now := stamps(results)): return
        archive(results, path)
        seen = now
    def note(part, row):
        head['parts'][part.key] = row
        write_json(results/'run.json', head)
        changed()
    say(f'results in {results}, and in {path}')
    preload()
    for part in parts:
        left = 60*args.minutes-(time.time()-begun)
        seconds = min(part.seconds, left)
        if left<LEAST: note(part, dict(ended='left out: no time was left'))
        else:
            note(part, dict(ended='stopped in the middle', bound=round(seconds, 1)))
            note(part, one_part(part, job, seconds, changed))
        say(f'{part.key:16} {head["parts"][part.key].get("seconds", 0):6.1f} s  {head["parts"][part.key]["ended"]}')
    archive(results, path)

# ---------------------------------------------------------------- report

def opened(source, home):
    "The folder of results that an archive holds, or the folder itself"
    if source.is_dir(): return source
    unpack(source, home)
    return home/'gpu'

def merged(folders):
    "Figures of several runs, part by part, of which the last that measured something counts"
    head,parts,found = {},{},{}
    for folder in folders:
        head = read(folder/'run.json')
        for key,row in head['parts'].items():
            figures = read(folder/f'{key}.json') if (folder/f'{key}.json').exists() else {}
            if figures or key not in parts:
                parts[key] = row
                found[key] = figures
    return head | dict(parts=parts), found

def report(args):
    "What came back, as one file"
    import gpu_parts
    with tempfile.TemporaryDirectory() as d:
        folders = [opened(source, Path(d)/str(i)) for i,source in enumerate(args.sources)]
        head,found = merged(folders)
    out = args.out or ROOT/'results'/'gpu.json'
    if head['rehearsal'] and not args.out: raise SystemExit('gpu: this was a rehearsal without a GPU; to see it, name a file with --out')
    whole = head | dict(hardware=found.get('machine', {}).get('name', 'unknown'), goals=gpu_parts.goals(found), says=gpu_parts.headline(head, found)) | found
    out.write_text(json.dumps(whole, indent=1)+'\n')
    say(whole['says'])
    for key,row in head['parts'].items(): say(f'{key:16} {row["ended"]}')
    for goal in whole['goals']: say(f'{goal["goal"]}: {goal["reached"]} of {goal["aim"]}')

def main(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    a = sub.add_parser('pack'); a.set_defaults(f=pack)
    a.add_argument('--data', required=True, help='text: a file or a folder, as for `nanowhale train`')
    a.add_argument('--tokenizer', required=True, help='folder of a tokenizer')
    a.add_argument('--python', default='3.12', help='of the machine with the GPU')
    a.add_argument('--no-wheels', action='store_true', help='for a rehearsal here')
    b = sub.add_parser('run'); b.set_defaults(f=run)
    b.add_argument('--minutes', type=float, default=9, help='for all of it')
    b.add_argument('--only', nargs='+', default=[], metavar='NAME', help='sections or parts')
    b.add_argument('--results', type=Path, help='folder for the files; none: a new one in runs/')
    b.add_argument('--archive', type=Path, help='none: beside that folder')
    b.add_argument('--device', help='none: cuda, or cpu for a rehearsal')
    b.add_argument('--small', action='store_true', help='a rehearsal: tiny sizes in float32')
    b.add_argument('--tokens', type=int, help='that each recipe trains on; none: as many as the time allows')
    b.add_argument('--seed', type=int, default=0)
    b.add_argument('--commit', default='', help='of the checkout, where git cannot tell; none: that of the pack')
    for x in (a, b): x.add_argument('--pack', type=Path, default=ROOT/'.gpu', help='folder of what was packed')
    c = sub.add_parser('report'); c.set_defaults(f=report)
    c.add_argument('sources', type=Path, nargs='+', help='archives or folders of results, oldest first')
    c.add_argument('--out', type=Path, help='none: results/gpu.json')
    args = p.parse_args(words)
    args.f(args)

if __name__=='__main__': main()
