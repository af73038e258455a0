"""A run may be killed at any instant: what a process leaves behind, and what --resume makes of it

    pytest tests/test_checkpoint.py                                          two kills, a full disk, a folder one may not write to
    python tests/test_checkpoint.py --kills 20 --out results/kills.json      twenty kills at random moments
"""
import paths   # noqa: F401, for tests/tools
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from nanowhale.train.checkpoint import Claim, checkpoints, drop_metrics, link, load_trainer_state, noting_signals, prune, read_metrics
from nanowhale.train.files import atomic_folder
from nanowhale.model.whale import Whale
from nanowhale.train.files import atomic
from runs import DOOR, FAST, PATIENCE, SMALL, environment, fingerprint, jsonl, last_line, nanowhale, provenance, start, texts

STEPS = 6
def options(ahead=0): return ['train', '--data', 'words.jsonl', '--steps', STEPS, '--evals', STEPS, '--buffer', 150, '--ahead', ahead, *SMALL]

def place(folder):
    "A folder with a text and a run that nothing interrupts"
    (folder/'words.jsonl').write_text(jsonl(texts()))
    code,err = nanowhale(*options(), '--out', 'whole', cwd=folder)
    assert code==0, err
    return folder, fingerprint(folder/'whole')

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return place(tmp_path_factory.mktemp('runs'))

# ---------------------------------------------------------------- what is loaded

def test_a_loaded_optimizer_is_where_a_fresh_one_would_be():
    "On a GPU a fused step looks for its count there, and fails where it finds it on the CPU (tensors without storage: no GPU is needed)"
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(4, 3, device='cuda'))
    with FakeTensorMode():
        whale = Model()
        fresh,loaded = (torch.optim.AdamW(whale.parameters(), fused=True) for _ in range(2))
        whale.p.grad = torch.zeros(4, 3, device='cuda')
        fresh.step()
        state = {f'0.p.{k}': torch.zeros(v.shape) for k,v in fresh.state[whale.p].items()}
        load_trainer_state(whale, [loaded], state | dict(rng=torch.get_rng_state()))
        kept = [{k: v.device.type for k,v in opt.state[whale.p].items()} for opt in (fresh, loaded)]
    assert kept[0]==kept[1]==dict(step='cuda', exp_avg='cuda', exp_avg_sq='cuda')

def test_only_a_second_ctrl_c_is_raised():
    with noting_signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)                     # the step under way is still finished
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert noted==[signal.SIGTERM, signal.SIGINT]

# ---------------------------------------------------------------- kills

def wait_for(p, what, seconds=PATIENCE):
    "Wait until `what()` or until the process has ended; does it still run?"
    end = time.monotonic()+seconds
    while not what() and p.poll() is None and time.monotonic()<end: time.sleep(0.002)
    return p.poll() is None

def steps_done(out): return (out/'metrics.jsonl').read_bytes().count(b'\n') if (out/'metrics.jsonl').exists() else 0

def children(pid):
    "Processes that `pid` started to prepare data"
    listed = subprocess.run(['ps', '-o', 'pid=,args=', '--ppid', str(pid)], capture_output=True, text=True).stdout.splitlines()
    return [int(l.split()[0]) for l in listed if 'spawn_main' in l]

def kill_at_random(p, out, rng):
    "Some time after some step: mid-step, while it measures, while it saves or draws"
    n = rng.randrange(STEPS)
    wait_for(p, lambda: steps_done(out)>=n)
    time.sleep(rng.uniform(0, 1.5))
    p.kill()

def kill_mid_save(p, out, rng):
    "While a checkpoint's folder has its hidden name: some of its files are there"
    n = rng.randrange(STEPS)
    wait_for(p, lambda: steps_done(out)>=n and list((out/'checkpoints').glob('.step-*.tmp')))
    time.sleep(rng.uniform(0, 0.05))
    p.kill()

def kill_worker(p, out, rng):
    "Only the process that prepares the data; the run must notice, save and end by itself"
    n = rng.randrange(1, STEPS-4)
    wait_for(p, lambda: steps_done(out)>=n)
    for pid in children(p.pid): os.kill(pid, signal.SIGKILL)   # a block or two are on their way still

KILLS = {'random moment': kill_at_random, 'mid-save': kill_mid_save, 'data process': kill_worker}

def killed(folder, name, kind, rng, door=FAST):
    "Run, kill, resume; what the dead run left, and the fingerprint after the resumed one"
    out = folder/name
    p = start(*options(ahead=int(kind=='data process')), '--out', name, cwd=folder, door=door)
    KILLS[kind](p, out, rng)
    err = p.communicate(timeout=PATIENCE)[1]
    left = dict(code=p.returncode, error=last_line(err) if err.strip() else '', steps=steps_done(out), half=len(list((out/'checkpoints').glob('.step-*.tmp'))),
        checkpoint=max([int(f.name[5:]) for f in checkpoints(out)], default=0))
    for f in checkpoints(out): Whale.from_pretrained(f)   # each that has the name is whole
    again = ['--resume'] if (out/'run.json').exists() else options()[1:]   # killed before there was anything
    code,err = nanowhale('train', *again, '--out', name, cwd=folder, door=door)
    if code and 'nothing to go on with' in err: code = 0   # it had finished before the kill came
    assert code==0, err
    return left, fingerprint(out)

def differences(a, b):
    "A run without a process for data counts the same blocks: everything must agree"
    return [what for what,x,y in zip(('metrics', 'tensors', 'state'), a, b) if x!=y]

@pytest.mark.parametrize('kind,seed', [('random moment', 0), ('mid-save', 1)])
def test_a_killed_run_goes_on_to_the_bit(whole, kind, seed):
    folder,want = whole
    for n in range(9):   # until the kill came in time: one machine has ended the run before, another wakes up late
        left,got = killed(folder, f'kill-{seed}-{n}', kind, random.Random(seed+2*n))
        if left['code']!=0: break
    assert left['code']==-signal.SIGKILL and not differences(got, want), (left, differences(got, want))
    if kind=='mid-save': assert left['half']==1

@pytest.mark.slow
def test_a_lost_data_process_ends_the_run_with_a_checkpoint(whole):
    folder,want = whole
    left,got = killed(folder, 'worker', 'data process', random.Random(2))
    assert left['code']==1 and left['error'].startswith('nanowhale: the process that prepares the data was lost'), left
    assert left['checkpoint']==left['steps']>0 and not differences(got, want)

@pytest.mark.parametrize('signum,exit_code,ahead', [(signal.SIGTERM, 143, 0), pytest.param(signal.SIGINT, 130, 1, marks=pytest.mark.slow)])
def test_signals_sent_to_a_process(whole, signum, exit_code, ahead):
    "SIGTERM ends in 143; Ctrl-C reaches all processes of a terminal, the one that prepares data too, and ends in 130"
    folder,want = whole
    out = folder/f'signal-{signum}'
    p = start(*options(ahead), '--out', out.name, cwd=folder, start_new_session=True)
    wait_for(p, lambda: steps_done(out)>=2)
    os.killpg(p.pid, signum) if signum==signal.SIGINT else p.send_signal(signum)
    err = p.communicate(timeout=PATIENCE)[1]
    assert p.returncode==exit_code and 'Traceback' not in err and last_line(err).startswith('nanowhale: stopped after step'), err
    code,err = nanowhale('train', '--resume', '--out', out.name, cwd=folder)
    assert code==0 and not differences(fingerprint(out), want), err

def test_no_pickle(whole):
    kinds = {'.json', '.jsonl', '.safetensors', '.png', '.md'}
    found = [f for f in (whole[0]/'whole').rglob('*') if f.is_file()]
    assert {f.suffix for f in found}<=kinds and len(found)>15
    for f in found:
        if f.suffix=='.json': json.loads(f.read_text())
        assert not f.name.startswith('.') and b'\x80\x04' not in f.read_bytes()[:2]

# ---------------------------------------------------------------- a kill between two lines

@pytest.fixture
def copy(whole, tmp_path):
    "The whole run, which a test may spoil; its text beside it"
    shutil.copy(whole[0]/'words.jsonl', tmp_path)
    shutil.copytree(whole[0]/'whole', tmp_path/'run', copy_function=shutil.copy)
    return tmp_path, whole[1]

def test_a_kill_after_the_last_checkpoint_and_before_its_links(copy):
    folder,want = copy
    out = folder/'run'
    for name in ('README.md', 'results.json', 'model.safetensors'): (out/name).unlink()
    shutil.copy(out/'checkpoints'/f'step-{STEPS-1:08}'/'model.safetensors', out/'model.safetensors')   # the links are still the older one's
    shutil.copy(out/'model.safetensors', out/'.model.safetensors.tmp')
    code,err = nanowhale('train', '--resume', '--out', 'run', cwd=folder, door=DOOR)
    assert code==0 and not differences(fingerprint(out), want) and (out/'loss.png').exists(), err
    assert not [f for f in out.rglob('.*')]

@pytest.mark.slow
def test_half_a_line_of_metrics(copy):
    folder,want = copy
    out = folder/'run'
    shutil.rmtree(out/'checkpoints'/f'step-{STEPS:08}')
    with (out/'metrics.jsonl').open('a') as f: f.write('{"step": 6, "lo')
    assert len(read_metrics(out/'metrics.jsonl'))==STEPS
    code,err = nanowhale('train', '--resume', '--out', 'run', cwd=folder)
    assert code==0 and not differences(fingerprint(out), want), err

def test_drop_metrics(tmp_path):
    path = tmp_path/'m.jsonl'
    drop_metrics(path, 3); assert path.read_text()==''
    path.write_text(''.join(f'{{"step": {i}}}\n' for i in range(5))+'{"ste')
    drop_metrics(path, 3)
    assert path.read_text()=='{"step": 0}\n{"step": 1}\n{"step": 2}\n'

# ---------------------------------------------------------------- pieces

@pytest.mark.parametrize('keep,best,left', [(1, None, [9]), (2, 3, [3, 8, 9]), (3, 9, [7, 8, 9]), (20, 1, list(range(10)))])
def test_prune_keeps_the_last_and_the_best(tmp_path, keep, best, left):
    for i in range(10): (tmp_path/'checkpoints'/f'step-{i:08}').mkdir(parents=True)
    (tmp_path/'checkpoints'/'.step-00000010.tmp').mkdir()
    prune(tmp_path, keep, best)
    assert [int(f.name[5:]) for f in checkpoints(tmp_path)]==left

@pytest.mark.slow
def test_the_best_checkpoint_stays(whole, tmp_path):
    "A run whose held-out loss rises at the end (a rate far too high) keeps the checkpoint from before"
    shutil.copy(whole[0]/'words.jsonl', tmp_path)
    code,err = nanowhale(*options(), '--lr', 0.3, '--muon-lr', 0.5, '--warmup', 1, '--decay', 0, '--keep', 1, '--out', 'run', cwd=tmp_path)
    assert code==0, err
    losses = {m['step']+1: m['held_out_loss'] for m in read_metrics(tmp_path/'run'/'metrics.jsonl')}
    best = min(losses, key=losses.get)
    assert best<STEPS and [f.name for f in checkpoints(tmp_path/'run')]==[f'step-{best:08}', f'step-{STEPS:08}']

def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path/'a'/'b'
    with pytest.raises(OSError), atomic_folder(path) as f:
        (f/'x').write_text('1'); assert not path.exists()
        raise OSError
    assert not list((tmp_path/'a').iterdir())
    (tmp_path/'a'/'.b.tmp').mkdir(); (tmp_path/'a'/'.b.tmp'/'old').touch()   # a killed run's
    with atomic_folder(path) as f: (f/'x').write_text('2')
    assert [p.name for p in path.iterdir()]==['x'] and [p.name for p in path.parent.iterdir()]==['b']

def test_links(tmp_path, monkeypatch):
    a,b = tmp_path/'a',tmp_path/'b'
    a.write_text('new'); b.write_text('old')
    link(a, b); link(a, b)
    assert b.read_text()=='new' and b.stat().st_ino==a.stat().st_ino and sorted(os.listdir(tmp_path))==['a', 'b']
    def none(*_): raise OSError('no links here')
    monkeypatch.setattr(os, 'link', none)
    link(a, b)
    assert b.read_text()=='new' and b.stat().st_ino!=a.stat().st_ino and sorted(os.listdir(tmp_path))==['a', 'b']

def test_a_name_comes_after_the_bytes_are_on_the_disk(tmp_path, monkeypatch):
    "What a power cut leaves: each file of a new folder is forced to the disk before the folder has its name, and so is a replaced file"
    done,real = [],(os.fsync, os.replace)
    def fsync(f): done.append(os.path.basename(os.readlink(f'/proc/self/fd/{f}')) if sys.platform=='linux' else 'x'); real[0](f)
    def replace(a, b): done.append(f'-> {os.path.basename(b)}'); real[1](a, b)
    monkeypatch.setattr(os, 'fsync', fsync); monkeypatch.setattr(os, 'replace', replace)
    with atomic_folder(tmp_path/'a') as f: (f/'x').write_text('1'); (f/'y').write_text('2')
    assert len(done)==5 and done[3]=='-> a'                          # x, y and their folder; the name; the folder that holds the name
    done.clear()
    with atomic(tmp_path/'z') as tmp: tmp.write_text('3')
    assert len(done)==2 and done[1]=='-> z'

# ---------------------------------------------------------------- one run at a time

HOLD = 'import sys, time; from nanowhale.train.checkpoint import Claim; c = Claim(); c.take(sys.argv[1]); print("held", flush=True); time.sleep(600)'

@pytest.mark.skipif(os.name!='posix', reason='locks of POSIX')
def test_a_claim_ends_with_its_process(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline()=='held\n'
    with Claim() as c, pytest.raises(FileExistsError, match='another run is at work') as e: c.take(tmp_path)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
    p.kill(); p.wait()
    with Claim() as c: c.take(tmp_path)

# ---------------------------------------------------------------- a disk that is full, a folder that is read-only

@pytest.fixture
def mounted(tmp_path):
    "Make small file systems of the kernel's; they go when the test ends"
    made = []
    def mount(*words):
        folder = tmp_path/f'disk{len(made)}'
        folder.mkdir()
        done = subprocess.run(['mount', *words, str(folder)], capture_output=True, text=True)
        if done.returncode: pytest.skip(f'this user may not mount here: {done.stderr.strip()}')
        made.append(folder)
        return folder
    if sys.platform!='linux' or not shutil.which('mount'): pytest.skip('needs mount(8) of Linux')
    yield mount
    for folder in reversed(made): subprocess.run(['umount', str(folder)], check=True)

def is_intact(out, step):
    "The last checkpoint is that step's, whole, and so is the folder that others load"
    assert [f.name for f in checkpoints(out)][-1]==f'step-{step:08}' and not list((out/'checkpoints').glob('.*'))
    for f in (out, *checkpoints(out)): Whale.from_pretrained(f)

def test_full_disk(whole, mounted):
    folder,want = whole
    size = sum(f.stat().st_size for f in (folder/'whole'/'checkpoints'/f'step-{STEPS:08}').rglob('*') if f.is_file())
    out = mounted('-t', 'tmpfs', '-o', f'size={int(1.6*size)}', 'tmpfs')/'run'
    code,err = nanowhale(*options(), '--out', out, cwd=folder)
    assert code==1 and 'Traceback' not in err, err
    assert last_line(err).startswith('nanowhale: step 2 could not be saved') and 'step-00000001' in last_line(err) and '--resume' in last_line(err)
    is_intact(out, 1)
    subprocess.run(['mount', '-o', f'remount,size={6*size}', str(out.parent)], check=True)   # room again
    code,err = nanowhale('train', '--resume', '--out', out, cwd=folder)
    assert code==0 and not differences(fingerprint(out), want), err

@pytest.mark.slow
def test_a_file_that_may_not_grow(whole, tmp_path):
    "What a quota does: writing beyond a size fails (no rights needed for this one)"
    import resource
    folder,_ = whole
    size = (folder/'whole'/'model.safetensors').stat().st_size
    limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (size//2, size//2)))
    p = start(*options(), '--out', tmp_path/'run', cwd=folder, preexec_fn=limit)
    err = p.communicate(timeout=PATIENCE)[1]
    assert p.returncode==1 and 'Traceback' not in err and last_line(err).startswith('nanowhale: step 1 could not be saved'), err
    assert 'there is no earlier checkpoint' in err and not list((tmp_path/'run'/'checkpoints').iterdir())

@pytest.mark.slow
def test_read_only_folder(whole, mounted):
    "Root may write everywhere; only a read-only file system stops it"
    folder,want = whole
    disk = mounted('-t', 'tmpfs', '-o', 'size=200m', 'tmpfs')
    shutil.copytree(folder/'whole', disk/'run', copy_function=shutil.copy)
    shutil.rmtree(disk/'run'/'checkpoints'/f'step-{STEPS:08}')
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    for words in (['--resume', '--out', disk/'run'], ['--data', 'words.jsonl', '--out', disk/'new', *SMALL]):
        code,err = nanowhale('train', *words, cwd=folder)
        assert code==1 and 'Traceback' not in err and last_line(err).startswith('nanowhale: ') and 'read-only' in last_line(err).lower(), err
        is_intact(disk/'run', STEPS-1)
    subprocess.run(['mount', '-o', 'remount,rw', str(disk)], check=True)
    code,err = nanowhale('train', '--resume', '--out', disk/'run', cwd=folder)
    assert code==0 and not differences(fingerprint(disk/'run'), want), err

# ---------------------------------------------------------------- twenty kills

def main():
    p = argparse.ArgumentParser(description='Kill a run at random moments, resume it, and compare with one that was never killed')
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', help='a JSON file for the table')
    a = p.parse_args()
    rng,kinds = random.Random(a.seed),['random moment', 'random moment', 'mid-save', 'data process', 'random moment']
    rows = []
    with tempfile.TemporaryDirectory() as d:
        folder,want = place(Path(d))
        for i in range(a.kills):
            kind = kinds[i%len(kinds)]
            left,got = killed(folder, 'run', kind, rng, DOOR)
            rows.append(dict(kind=kind, **{k: left[k] for k in ('code', 'steps', 'checkpoint', 'half')}, exact=not differences(got, want)))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(folder/'run')
    table = {k: dict(tried=sum(r['kind']==k for r in rows), exact=sum(r['kind']==k and r['exact'] for r in rows)) for k in KILLS}
    command = f'python tests/test_checkpoint.py --kills {a.kills} --seed {a.seed}'
    if a.out: Path(a.out).write_text(json.dumps(dict(**provenance(command), seed=a.seed, steps=STEPS, table=table, kills=rows), indent=1)+'\n')
    print(f'{"kind":16}tried  exact', *(f'{k:16}{v["tried"]:5}  {v["exact"]:5}' for k,v in table.items()), sep='\n')
    if not all(r['exact'] for r in rows): raise SystemExit('a resumed run differs')

if __name__=='__main__': main()
