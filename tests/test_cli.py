"""The commands as a user meets them: in a process of their own, with right and with wrong words"""
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOOR = [sys.executable, '-c', 'import sys; from nanowhale.cli import main; sys.exit(main())']

def nanowhale(*words, cwd, stdin=''):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1'}
    return subprocess.run([*DOOR, *words], cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    (d/'data.txt').write_text('\n\n'.join(f'Whale number {i} sings to whale number {i*i}, and so on, for a while. '*8 for i in range(300)))
    r = nanowhale('train', '--data', 'data.txt', '--steps', '3', '--batch_size', '2', cwd=d)
    assert r.returncode==0, r.stderr
    return d, r

def test_train_tells_what_it_did(place):
    d,r = place
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
    r = nanowhale('eval', 'whale', '--data', 'data.txt', cwd=d)
    assert r.returncode==0 and 'bits per byte' in r.stdout
    assert r.stdout==nanowhale('eval', 'whale', '--data', 'data.txt', '--batch_size', '3', cwd=d).stdout

def test_info(place):
    r = nanowhale('info', '--preset', 'nanowhale_100m', cwd=place[0])
    assert '114,033,628' in r.stdout
    assert nanowhale('info', '--model', 'whale', cwd=place[0]).returncode==0

def test_help_explains_every_option(place):
    for command in ('train', 'generate', 'eval', 'info'):
        r = nanowhale(command, '--help', cwd=place[0])
        assert r.returncode==0
        options = [l for l in r.stdout.split('\n') if l.startswith('  --')]
        assert options and all(len(l.split(maxsplit=2))==3 for l in options), command

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
    'one document': (['train', '--data', 'one.txt', '--out', 'x'], 'cannot be split'),
    'folder in use': (['train', '--data', 'data.txt'], 'already holds a run'),
    'out is a file': (['train', '--data', 'data.txt', '--out', 'data.txt'], 'already holds'),
    'no steps': (['train', '--data', 'data.txt', '--steps', '0', '--out', 'x'], 'steps=0'),
    'no such device': (['train', '--data', 'data.txt', '--device', 'abacus', '--out', 'x'], 'device'),
    'nothing to resume': (['train', '--resume', '--out', 'gone'], 'holds no run'),
    'a finished run': (['train', '--resume'], 'nothing to go on with'),
    'no such model': (['generate', 'Hi', '--model', 'gone'], 'gone'),
    'truncated weights': (['generate', 'Hi', '--model', 'cut'], 'model.safetensors'),
    'impossible config': (['generate', 'Hi', '--model', 'odd'], 'num_attention_heads'),
    'config that is no JSON': (['generate', 'Hi', '--model', 'nojson'], 'config.json'),
    'no tokenizer': (['generate', 'Hi', '--model', 'notok'], 'tokenizer'),
    'impossible temperature': (['generate', 'Hi', '--temperature', '-1'], 'temperature'),
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
    assert not (broken/'x'/'config.json').exists()

def test_ctrl_c_saves(place):
    "A real interrupt, in the middle of a real run"
    import signal, time
    d,_ = place
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TQDM_DISABLE': '1'}
    p = subprocess.Popen([*DOOR, 'train', '--data', 'data.txt', '--steps', '100000', '--batch_size', '1', '--out', 'cutshort'], cwd=d, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log,deadline = d/'cutshort'/'metrics.jsonl',time.time()+120
    while not (log.exists() and log.read_text().count('\n')>=2) and time.time()<deadline: time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=240)
    assert p.returncode==0 and 'saved in cutshort' in out+err, err
    assert nanowhale('generate', 'Whale', '--model', 'cutshort', '--tokens', '3', cwd=d).returncode==0
