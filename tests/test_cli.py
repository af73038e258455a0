"""The commands as a user meets them, with right and with wrong words"""
import dataclasses, io, json, os, re, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import pytest
from nanowhale.cli import main
from nanowhale.step import Recipe
from runs import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
DOOR = [sys.executable, '-c', 'import sys; from nanowhale.cli import main; sys.exit(main())']

def alone(*words, cwd):
    "In a process of its own"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1'}
    return subprocess.run([*DOOR, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)

def nanowhale(*words, cwd, stdin=''):
    "In this process, which saves the seconds that a new one needs to import torch; an error that `main` does not answer is raised here"
    out,err,was = io.StringIO(),io.StringIO(),Path.cwd()
    with pytest.MonkeyPatch.context() as m, redirect_stdout(out), redirect_stderr(err):
        m.setattr(sys, 'stdin', io.StringIO(stdin)); m.setenv('TQDM_DISABLE', '1')
        os.chdir(cwd)
        try: code = main(list(words))
        except SystemExit as e: code = e.code
        finally: os.chdir(was)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    (d/'data.txt').write_text('\n\n'.join(f'Whale number {i} sings to whale number {i*i}, and so on, for a while. '*8 for i in range(300)))
    r = alone('train', '--data', 'data.txt', '--steps', '3', '--batch_size', '2', '--context=64', '--mtp-final=0.2', '--balance-weight', '1e-3',
        '--tensorboard', cwd=d)
    assert r.returncode==0, r.stderr
    return d, r

def test_train_tells_what_it_did(place):
    d,r = place
    said = json.loads((d/'whale'/'run.json').read_text())
    assert said['preset']=='tiny' and said['recipe'].items()>=dict(steps=3, batch_size=2, context=64, mtp_final=0.2, balance_weight=1e-3, lr=0.012).items()
    assert list((d/'whale'/'tensorboard').glob('events.out.tfevents.*'))
    for words in ('parameters', 'held-out bits per byte', 'xz -9e', 'sample', 'saved in whale'): assert words in r.stdout+r.stderr
    assert (d/'whale'/'config.json').exists()

def test_generate_and_stdin(place):
    d,_ = place
    r = nanowhale('generate', 'Whale number', '--tokens', '5', '--seed', '0', cwd=d)
    assert r.returncode==0 and r.stdout.startswith('Whale number') and r.stderr==''
    assert nanowhale('generate', '--tokens', '5', '--seed', '0', cwd=d, stdin='Whale number\n').stdout==r.stdout

def test_speculative_is_the_same_greedily(place):
    d,_ = place
    plain,fast = (nanowhale('generate', 'Whale number', '--tokens', '12', '--temperature', '0', *more, cwd=d)
                  for more in ([], ['--speculative', '--drafts', '2', '--min_p', '0.1']))
    assert fast.returncode==0 and fast.stdout==plain.stdout and fast.stderr==''

def test_eval(place):
    d,_ = place
    (d/'short.txt').write_text((d/'data.txt').read_text()[:12000])
    rs = [nanowhale('eval', 'whale', '--data', 'short.txt', '--context', '64', '--batch-size', str(n), cwd=d) for n in (8, 1, 3, 1000)]
    assert all(r.returncode==0 and r.stdout==rs[0].stdout for r in rs)
    for figure in ('loss, nats per token: ', 'bits per byte: ', 'token accuracy: ', 'mean entropy, nats: '): assert figure in rs[0].stdout

def test_info(place):
    r = nanowhale('info', '--preset', 'nanowhale_100m', cwd=place[0])
    assert '114,033,628' in r.stdout
    assert nanowhale('info', '--model', 'whale', cwd=place[0]).returncode==0

def test_help_explains_every_option(place):
    for command in ('train', 'generate', 'chat', 'eval', 'info', 'export', 'bench'):
        r = nanowhale(command, '--help', cwd=place[0])
        assert r.returncode==0
        options = re.split(r'\n  (?=-)', r.stdout)[1:]   # a long option's help begins on the line below it
        assert options and all(re.sub(r'^-.* --help|^--\w+( [A-Z_]+| \{[^}]*\})?', '', o).strip() for o in options), command

def test_train_takes_every_value_of_a_recipe(place):
    text = nanowhale('train', '--help', cwd=place[0]).stdout
    for f in dataclasses.fields(Recipe): assert f'--{f.name} ' in text, f.name

@pytest.mark.parametrize('f', dataclasses.fields(Recipe), ids=lambda f: f.name)
@pytest.mark.parametrize('sep', [' ', '='])
def test_values_arrive(f, sep, monkeypatch):
    import nanowhale.cli as cli
    got,default = {},dataclasses.asdict(Recipe())[f.name]
    value = dict(precision='bf16', parallel='fsdp', muon_lr=0.0).get(f.name, 7 if isinstance(default, int) else 0.5 if isinstance(default, float) else 'x')
    seen = lambda **options: got.update(options)
    real = cli.with_values
    monkeypatch.setattr(cli, 'with_values', lambda g, values: spying(real(g, values), seen))
    switch = isinstance(default, bool)
    if switch: value = True
    assert cli.main(['train', *f'--{f.name.replace("_", "-")}{"" if switch else f"{sep}{value}"}'.split(' ')])==0
    assert got[f.name]==value and type(got[f.name]) is type(value)
    assert all(got[g.name] is None or got[g.name] is False for g in dataclasses.fields(Recipe) if g is not f)   # the recipe decides

def test_what_is_not_given_stays_the_recipes():
    import nanowhale.cli as cli
    command = cli.with_values(lambda out='whale', **changes: dict(changes, out=out), Recipe)
    assert command(out=None, steps=None, lr=0., muon_lr=0, compile=False)==dict(out=None, lr=0., muon_lr=0)
    assert command(compile=True)==dict(compile=True, out='whale')

def spying(command, seen):
    seen.__signature__,seen.__doc__ = command.__signature__,command.__doc__
    return seen

def damage(d, name, how):
    import shutil
    shutil.copytree(d/'whale', d/name)
    how(d/name)
    return name

CASES = {
    'no such command': (['sing'], 'commands are'),
    'unknown preset': (['train', '--preset', 'huge', '--out', 'x'], 'tiny'),
    'missing file': (['train', '--data', 'gone.txt', '--out', 'x'], 'no such file'),
    'empty file': (['train', '--data', 'empty.txt', '--out', 'x'], 'is empty'),
    'broken UTF-8': (['train', '--data', 'latin.txt', '--out', 'x'], 'not UTF-8'),
    'one document': (['train', '--data', 'one.txt', '--out', 'x'], 'no document is left to train on'),
    'folder in use': (['train', '--data', 'data.txt'], 'already holds a run'),
    'out is a file': (['train', '--data', 'data.txt', '--out', 'data.txt'], 'already holds'),
    'no steps': (['train', '--data', 'data.txt', '--steps', '0', '--out', 'x'], 'steps=0'),
    'no such precision': (['train', '--data', 'data.txt', '--precision', 'int4', '--out', 'x'], 'choose fp32 or bf16'),
    'no such recipe': (['train', '--data', 'data.txt', '--recipe', 'cake', '--out', 'x'], 'choose one of whale, card'),
    'nobody answers': (['train', '--data', 'http://127.0.0.1:9/words.jsonl', '--out', 'x'], 'could not be read'),
    'no such dataset': (['train', '--data', 'nobody/nothing', '--out', 'x'], 'neither a file here nor a dataset'),
    'no such device': (['train', '--data', 'data.txt', '--device', 'abacus', '--out', 'x'], 'device'),
    'nothing to resume': (['train', '--resume', '--out', 'gone'], 'holds no run'),
    'a finished run': (['train', '--resume'], 'nothing to go on with'),
    'no such model': (['generate', 'Hi', '--model', 'gone'], 'gone'),
    'truncated weights': (['generate', 'Hi', '--model', 'cut'], 'model.safetensors'),
    'impossible config': (['generate', 'Hi', '--model', 'odd'], 'num_attention_heads'),
    'config that is no JSON': (['generate', 'Hi', '--model', 'nojson'], 'config.json'),
    'no tokenizer': (['generate', 'Hi', '--model', 'notok'], 'tokenizer'),
    'impossible temperature': (['generate', 'Hi', '--temperature', '-1'], 'temperature'),
    'no such ablation': (['ablate', 'tail', '--out', 'x'], 'choose one of all, base, one_stream'),
    'no drafts': (['generate', 'Hi', '--speculative', '--drafts', '0'], 'drafts=0'),
}

@pytest.fixture(scope='module')
def broken(place):
    d,_ = place
    (d/'empty.txt').touch(); (d/'latin.txt').write_bytes(b'caf\xe9'); (d/'one.txt').write_text('Alone.')
    def cut(f): (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:5000])
    def odd(f): (f/'config.json').write_text(json.dumps({**json.loads((f/'config.json').read_text()), 'num_attention_heads': -3}))
    def nojson(f): (f/'config.json').write_text('{')
    def notok(f): [p.unlink() for p in f.glob('tokenizer*')]
    for name,how in dict(cut=cut, odd=odd, nojson=nojson, notok=notok).items(): damage(d, name, how)
    return d

@pytest.mark.parametrize('case', CASES)
def test_a_mistake_is_answered_in_one_line(broken, case):
    words,says = CASES[case]
    before = {f: f.stat().st_mtime_ns for f in (broken/'whale').rglob('*')}
    r = nanowhale(*words, cwd=broken)
    assert r.returncode not in (0, -9) and says in r.stderr, r.stderr
    assert 'Traceback' not in r.stderr and r.stderr.strip().split('\n')[-1].startswith('nanowhale: ')
    assert before=={f: f.stat().st_mtime_ns for f in (broken/'whale').rglob('*')}   # nothing lost
    assert not (broken/'x').exists()   # nor anything left behind

def test_a_mistake_in_a_process_of_its_own(broken):
    r = alone('train', '--data', 'gone.txt', '--out', 'x', cwd=broken)
    assert r.returncode==1 and r.stdout=='' and r.stderr=='nanowhale: gone.txt: no such file or folder\n'

def test_ctrl_c_saves(place):
    "A real interrupt, in the middle of a real run"
    import signal, time
    d,_ = place
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TQDM_DISABLE': '1'}
    p = subprocess.Popen([*DOOR, 'train', '--data', 'data.txt', '--steps', '100000', '--batch_size', '1', '--context', '32', '--out', 'cutshort'],
                         cwd=d, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log,deadline = d/'cutshort'/'metrics.jsonl',time.monotonic()+PATIENCE
    while not (log.exists() and log.read_text().count('\n')>=2) and time.monotonic()<deadline: time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=PATIENCE)
    assert p.returncode==130 and 'Traceback' not in err, err
    assert err.strip().split('\n')[-1].startswith('nanowhale: stopped after step ') and err.strip().endswith('--resume --out cutshort'), err
    assert nanowhale('generate', 'Whale', '--model', 'cutshort', '--tokens', '3', cwd=d).returncode==0
