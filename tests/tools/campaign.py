"""Everything that can happen to a run, done to real runs and counted: nothing that was reported saved is lost, and the resume is exact

    python tests/tools/campaign.py                              the table, in about ten minutes on one core
    python tests/tools/campaign.py --out results/trust.json     the same, kept
    python tests/tools/campaign.py --only truncated clock       some kinds; with --out the others' rows stay

A run counts as survived when it ended as it should (done, stopped, or one line that says what to do), when every checkpoint that has
its name can be loaded, and when `--resume`, after mending what the line says, ends with the bits of a run that nothing happened to.
Commands run in forks of this process, which saves loading torch each time; signals, locks, disks and sockets are real.
"""
import argparse, importlib.util, json, os, random, shutil, signal, subprocess, sys, tempfile, time, traceback
from contextlib import contextmanager
from pathlib import Path
import torch
from nanowhale.train.checkpoint import checkpoints, link
from nanowhale.cli import main as command
from nanowhale.model.whale import Whale
from nanowhale.train.loop import Log
from runs import SMALL, fingerprint, jsonl, last_line, provenance, texts
from test_checkpoint import KILLS, STEPS, differences, options, steps_done, wait_for
from test_stream import serving

class Fork:
    "`nanowhale WORDS` in a fork of this process, with what `subprocess.Popen` has"
    def __init__(self, words, cwd, prepare=lambda: None):
        self.stderr,self.returncode = tempfile.TemporaryFile('w+'),None
        self.pid = os.fork()
        if self.pid: return
        code = 70
        try:
            os.setsid(); os.chdir(cwd)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1): os.dup2(null, fd)
            os.dup2(self.stderr.fileno(), 2)
            sys.stderr = os.fdopen(2, 'w', 1)
            prepare()
            code = command([str(w) for w in words])
        except SystemExit as e: code = e.code
        except BaseException: traceback.print_exc()
        finally: sys.stderr.flush(); os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid,status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
    def send_signal(self, s):
        if self.poll() is None: os.kill(self.pid, s)
    def kill(self): self.send_signal(signal.SIGKILL)
    def end(self, seconds=300):
        "Exit code and what it said"
        until = time.monotonic()+seconds
        while self.poll() is None and time.monotonic()<until: time.sleep(0.01)
        assert self.returncode is not None, 'it hangs'
        self.stderr.seek(0)
        return self.returncode, self.stderr.read()

class Place:
    "A folder with a text, a run that nothing happened to, and room for one to which something does"
    def __init__(self, folder, rng):
        self.folder,self.rng,self.out = folder,rng,folder/'run'
        (folder/'words.jsonl').write_text(jsonl(texts()))
        code,err = self.train('--out', 'whole')
        assert code==0, err
        self.want = fingerprint(folder/'whole')

    def begin(self, *more, ahead=0, prepare=lambda: None): return Fork([*options(ahead), '--out', self.out, *more], self.folder, prepare)
    def train(self, *more, **kw): return self.begin(*more, **kw).end()
    def resume(self, prepare=lambda: None): return Fork(['train', '--resume', '--out', self.out], self.folder, prepare).end()
    def fresh(self):
        shutil.rmtree(self.out, ignore_errors=True)
        return self
    def done(self, upto=STEPS):
        "A copy of the whole run, as it was after that step"
        shutil.copytree(self.folder/'whole', self.fresh().out, copy_function=shutil.copy)
        for f in checkpoints(self.out):
            if f.name>f'step-{upto:08}': shutil.rmtree(f)
        for name in ('README.md', 'results.json'): (self.out/name).unlink()
        for f in checkpoints(self.out)[-1].iterdir():
            if f.is_file(): link(f, self.out/f.name)              # second names of the same bytes, as in a real run

    def saved(self): return max([int(f.name[5:]) for f in checkpoints(self.out)], default=0)
    def whole(self):
        "Every checkpoint that has its name loads, and so does the folder that others load"
        for f in [*checkpoints(self.out), *([self.out] if checkpoints(self.out) else [])]: Whale.from_pretrained(f)
    def exact(self):
        "Resume, and compare to the bit"
        self.whole()
        code,err = self.resume() if (self.out/'run.json').exists() else self.fresh().train()
        if code and 'nothing to go on with' in err: code = 0      # it had finished
        assert code==0, last_line(err)
        assert not (wrong := differences(fingerprint(self.out), self.want)), wrong
        assert not list(self.out.rglob('.*'))

def one_line(code, err, want=1):
    "It said in one line what is wrong, and that exit code came"
    assert code==want and 'Traceback' not in err and last_line(err).startswith('nanowhale: '), (code, err[-1500:])
    return last_line(err)

# ---------------------------------------------------------------- kinds of faults: each takes a `Place`, and raises where something is lost

def killed(how, ahead=0):
    def f(p):
        run = p.fresh().begin(ahead=ahead)
        KILLS[how](run, p.out, p.rng)
        code,err = run.end()
        assert code==(1 if ahead else -9) or code==0, (code, err[-500:])
        if ahead and code: assert 'the process that prepares the data was lost' in one_line(code, err) and p.saved()==steps_done(p.out)
        p.exact()
    return f

def signalled(signum, want):
    def f(p):
        run,n = p.fresh().begin(),p.rng.randrange(STEPS-1)
        wait_for(run, lambda: steps_done(p.out)>=n)
        time.sleep(p.rng.uniform(0, 0.5))
        run.send_signal(signum)
        code,err = run.end()
        if code==0: return p.exact()                              # it was done before
        assert 'stopped' in one_line(code, err, want)
        if p.saved(): assert p.saved()==steps_done(p.out)         # every step that was noted is in the checkpoint
        p.exact()
    return f

def names(file, said):
    "The file itself; `transformers` reads both of a tokenizer's, and does not say which of them it was"
    return (f'{file.parent}: no tokenizer' if file.name.startswith('tokenizer') else str(file)) in said

def truncated(name, kept):
    "Of the last checkpoint, of one that has two; the line must name what is damaged, and without that checkpoint the run goes on from the one before"
    def f(p):
        p.done(STEPS-1)
        last = checkpoints(p.out)[-1]
        file = p.out/name if name in OF_THE_RUN else last/name
        whole = file.read_bytes()
        os.truncate(file, int(kept(p.rng)*(len(whole)-1)))
        if name in LOADED:                                        # what generates needs it, and says so, or does without
            code,err = Fork(['generate', 'a whale', '--tokens', 2, '--model', p.out], p.folder).end()
            assert code==0 or names(p.out/name, one_line(code, err)), err[-500:]
        code,err = p.resume()
        if code:
            said = one_line(code, err)
            assert names(file, said), said
            if file.parent==p.out: file.write_bytes(whole)        # nothing but a copy brings these back; nothing else was harmed
            else: shutil.rmtree(last)
            assert p.resume()[0]==0
        if name=='metrics.jsonl':                                 # lines of the log are gone with the cut, the weights are not
            assert fingerprint(p.out)[1:]==p.want[1:]
        else: assert not (wrong := differences(fingerprint(p.out), p.want)), wrong
        for n in LOADED:                                          # `transformers` notes in the other one that it was read from a folder
            if n!='tokenizer_config.json': assert (p.out/n).read_bytes()==(p.folder/'whole'/n).read_bytes(), n
    return f

@contextmanager
def disk(p, *words):
    "A small file system of the kernel's in the place of the run's parent folder"
    folder = p.folder/'disk'
    folder.mkdir(exist_ok=True)
    subprocess.run(['mount', *words, str(folder)], check=True, capture_output=True)
    was,p.out = p.out,folder/'run'
    try: yield lambda *w: subprocess.run(['mount', '-o', 'remount,'+','.join(w), str(folder)], check=True)
    finally: subprocess.run(['umount', str(folder)], check=True); p.out = was

def full_disk(p):
    size = sum(f.stat().st_size for f in checkpoints(p.folder/'whole')[-1].rglob('*') if f.is_file())
    with disk(p, '-t', 'tmpfs', '-o', f'size={int(p.rng.uniform(0.5, 3.5)*size)}', 'tmpfs') as again:
        said = one_line(*p.train())
        assert 'could not be saved' in said and '--resume' in said, said
        again(f'size={6*size}')
        p.exact()

def no_more_bytes(p):
    "A quota: no file may grow beyond a size"
    size = int(p.rng.uniform(0.1, 0.9)*(p.folder/'whole'/'model.safetensors').stat().st_size)
    import resource   # it is not everywhere
    limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    one_line(*p.fresh().train(prepare=limit))
    p.exact()

def read_only(p):
    with disk(p, '-t', 'tmpfs', '-o', 'size=200m', 'tmpfs') as again:
        p.done(STEPS-1)
        again('ro')
        assert 'Read-only' in one_line(*p.resume())
        p.whole(); again('rw'); p.exact()

def network(short):
    "A source at an address of this machine goes away after some steps: for a moment, or until somebody mends it"
    def f(p):
        few = jsonl(texts(14)).encode()                   # an epoch is over after a few steps, and the source is asked again
        patient = lambda: setattr(time, 'sleep', lambda s: None)  # the waits between attempts
        with serving({'a.jsonl': few}) as (server,url):
            words = ['train', '--data', f'{url}/a.jsonl', '--steps', 9, '--evals', 1, *SMALL]
            p.fresh()
            code,err = Fork([*words, '--out', p.folder/'steady'], p.folder, patient).end()
            assert code==0, err[-500:]
            want = fingerprint(p.folder/'steady')
            run = Fork([*words, '--out', p.out], p.folder, patient)
            n = p.rng.randrange(1, 4)
            wait_for(run, lambda: steps_done(p.out)>=n)
            server.fails = 4 if short else 10**9
            code,err = run.end()
            server.fails = 0
            if not short and code:
                assert 'attempts to read on failed' in one_line(code, err) and p.saved()==steps_done(p.out)
                code,err = p.resume(patient)
            assert code==0 and not differences(fingerprint(p.out), want), err[-500:]
        shutil.rmtree(p.folder/'steady')
    return f

def clock(p):
    "The wall clock jumps by up to a year at each look, forwards and backwards; files seem to come from other centuries"
    real,rng = time.time,random.Random(p.rng.random())
    jump = lambda: setattr(time, 'time', lambda: real()+rng.uniform(-3e7, 3e7))
    run = p.fresh().begin(prepare=jump)
    wait_for(run, lambda: steps_done(p.out)>=2)
    run.kill(); run.end()
    for file in p.out.rglob('*'): os.utime(file, (rng.uniform(0, 4e9),)*2)
    p.whole()
    assert (p.resume(jump) if (p.out/'run.json').exists() else p.train(prepare=jump))[0]==0
    assert not differences(fingerprint(p.out), p.want)

def two_at_once(p):
    "Begun in the same moment: one does all the work, the other says that it may not"
    runs = [p.fresh().begin(), p.begin()]
    ends = sorted(r.end() for r in runs)
    assert [code for code,_ in ends]==[0, 1] and any(s in one_line(*ends[1]) for s in ('another run is at work', 'already holds a run')), ends
    assert not differences(fingerprint(p.out), p.want)

def resumed_twice(p):
    "A second --resume while the first run is at work; killed, it leaves no lock behind"
    run = p.fresh().begin()
    wait_for(run, lambda: checkpoints(p.out))
    said = one_line(*p.resume())
    assert 'another run is at work' in said, said
    run.kill(); run.end()
    p.exact()

def lost_rank(p):
    "One of two processes is killed; the other ends with one line"
    from test_parallel import begin, children, options as parallel_options
    run = begin(2, *parallel_options(400), '--evals', 100, '--out', p.fresh().out, cwd=p.folder)
    until = time.monotonic()+300
    while not checkpoints(p.out) and time.monotonic()<until: time.sleep(0.1)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    err = run.communicate(timeout=300)[1]
    said = [l for l in err.replace('\r', '\n').split('\n') if l.startswith('nanowhale: ')]
    assert run.returncode and len(said)==1 and 'another process was lost' in said[0] and '--resume' in said[0], said
    p.whole()

LOADED = 'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'   # by whoever uses the model
OF_THE_RUN = 'run.json', 'metrics.jsonl'
FILES = *LOADED, 'trainer/optimizer.safetensors', 'trainer/state.json', *OF_THE_RUN
CUTS = lambda rng: 0, lambda rng: 1, lambda rng: rng.random()     # an empty file, one without its last byte, any part of it
CAMPAIGN = {   # kind: faults
    'kill -9 at a random moment': [killed('random moment')]*5, 'kill -9 while saving': [killed('mid-save')]*4,
    'lost data process': [killed('data process', ahead=1)]*2, 'SIGTERM': [signalled(signal.SIGTERM, 143)]*3, 'SIGINT': [signalled(signal.SIGINT, 130)]*3,
    'truncated file': [truncated(n, kept) for n in FILES for kept in CUTS],
    'full disk': [full_disk]*2, 'a file may not grow': [no_more_bytes], 'read-only folder': [read_only],
    'network cut for a moment': [network(True)]*2, 'network cut for long': [network(False)]*2, 'clock jumps': [clock]*2,
    'two new runs at once': [two_at_once]*2, 'a second --resume': [resumed_twice], 'lost rank': [lost_rank]}

def main():
    a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    a.add_argument('--only', nargs='*', default=[''], help='words in the names of the kinds to try')
    a.add_argument('--most', type=int, default=99, help='faults of a kind to try')
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--out', help='a JSON file; the campaign stands there under `faults`')
    a = a.parse_args()
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE='1', TQDM_DISABLE='1', OMP_NUM_THREADS='1', MPLBACKEND='agg')
    Log.plot = lambda self: None                                  # no pictures: half the time
    table,lost,began = {},[],time.monotonic()
    with tempfile.TemporaryDirectory() as d:
        place = Place(Path(d), random.Random(a.seed))
        found = {str(f.relative_to(c)) for c in checkpoints(place.folder/'whole') for f in c.rglob('*') if f.is_file()}
        assert found|{*OF_THE_RUN}=={*FILES}, f'each file of a checkpoint is to be cut: {found^{*FILES}}'
        for kind,faults in CAMPAIGN.items():
            if not any(w in kind for w in a.only): continue
            row = table[kind] = dict(tried=0, survived=0)
            for i,fault in enumerate(faults[:a.most]):
                if fault in (full_disk, read_only) and os.geteuid(): continue                           # only root may mount
                if 'network' in kind and not importlib.util.find_spec('aiohttp'): continue              # what reads addresses
                row['tried'] += 1
                try: fault(place); row['survived'] += 1
                except Exception as e: lost.append(dict(kind=kind, number=i, what=f'{type(e).__name__}: {e}'[:500])); print(lost[-1], flush=True)
            print(f'{kind:28} {row["tried"]:3} tried {row["survived"]:3} survived   {time.monotonic()-began:5.0f} s', flush=True)
    result = dict(**provenance('python tests/tools/campaign.py'+f' --most {a.most}'*(a.most<99)), seed=a.seed,
        minutes=round((time.monotonic()-began)/60, 1), table=table, lost=lost)
    if a.out:
        path = Path(a.out)
        kept = json.loads(path.read_text()) if path.exists() else {}
        if a.only!=[''] and 'faults' in kept:
            was = kept['faults']
            result.update(table=was['table']|table, lost=[l for l in was['lost'] if l['kind'] not in table]+lost,
                minutes=round(was['minutes']+result['minutes'], 1))
        path.write_text(json.dumps(kept|dict(faults=result), indent=1)+'\n')
    sys.exit(bool(lost))

if __name__=='__main__': main()
