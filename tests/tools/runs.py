"""Real runs for the tests of streams, checkpoints and processes: small data, `nanowhale train` as a process, and what must not differ"""
import hashlib, json, os, platform, random, subprocess, sys, tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT/'tests'))   # some tools use what stands in tests
DOOR = [sys.executable, '-c', 'import sys; from nanowhale.cli import main; sys.exit(main())']
FAST = [sys.executable, '-c', DOOR[2].replace(';', '; from nanowhale.train.loop import Log; Log.plot = lambda self: None;', 1)]   # no pictures: half the time
PATIENCE = 1800   # seconds until a test gives up on a process: only one in which nothing happens reaches them, on the busiest machine
SMALL = ['--batch-size', '2', '--context', '32']
WORDS = 'the whale sings a song of two or three notes and dives into the sea where no light is left'.split()

def texts(n=200, words=40, seed=0):
    "Documents of random words, all different"
    rng = random.Random(seed)
    return [f'{i} '+' '.join(rng.choices(WORDS, k=words)) for i in range(n)]

def jsonl(rows): return ''.join(json.dumps(dict(text=t))+'\n' for t in rows)

def environment(): return {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
    'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1', 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

def start(*words, cwd, door=FAST, **kw):
    "`nanowhale WORDS`, begun"
    return subprocess.Popen([*door, *map(str, words)], cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kw)

def nanowhale(*words, cwd, door=FAST, timeout=PATIENCE):
    "`nanowhale WORDS`, done: exit code and what it said on standard error"
    p = start(*words, cwd=cwd, door=door)
    err = p.communicate(timeout=timeout)[1]
    return p.returncode, err

def last_line(err):
    "The command's own last word; when a child of Python's was killed, Python may add a warning"
    lines = err.strip().split('\n')
    return next((l for l in reversed(lines) if l.startswith('nanowhale: ')), lines[-1])

def metrics(out):
    "What a run wrote about each step, without speed and memory"
    lines = (out/'metrics.jsonl').read_text().splitlines()
    return [{k: v for k,v in json.loads(l).items() if k not in ('tokens_per_second', 'memory', 'waited', 'mfu')} for l in lines]

def fingerprint(out):
    "All that must be the same to the bit: the steps, the weights, the optimizers and where the stream stands"
    last = sorted((out/'checkpoints').glob('step-*'))[-1]
    state = json.loads((last/'trainer'/'state.json').read_text())
    files = [out/'model.safetensors', last/'model.safetensors', last/'trainer'/'optimizer.safetensors']
    return metrics(out), [hashlib.sha256(f.read_bytes()).hexdigest() for f in files], {k: v for k,v in state.items() if k not in ('seconds', 'waited')}

def unpack(archive, folder):
    "Put the files of a tar archive into a folder, and none outside of it"
    safe = dict(filter='data') if hasattr(tarfile, 'data_filter') else {}   # early releases of 3.10 and 3.11 have none
    with tarfile.open(archive) as tar: tar.extractall(folder, **safe)

def preload():
    "What takes seconds to import, once, before the forks of a process; nanowhale itself is not among it"
    import datasets, matplotlib.pyplot, torch, torch.testing, torch.utils.data   # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV4ForCausalLM, PreTrainedTokenizerFast   # noqa: F401

def provenance(command):
    "Where a figure comes from"
    import torch
    git = lambda *a: subprocess.run(['git', *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(command=command, commit=git('rev-parse', '--short', 'HEAD'),
        hardware=f'{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}')
