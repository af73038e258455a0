"""The commands as a user meets them, with right and with wrong words"""
import dataclasses, inspect, io, json, os, re, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import pytest
import nanowhale.cli as cli
from nanowhale import __version__
from nanowhale.cli import main
from nanowhale.train.recipe import Recipe
from nanowhale.fast.kernels import in_use
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
    assert said['preset']=='tiny' and said['recipe'].items()>=dict(steps=3, batch_size=2, context=64, mtp_final=0.2, balance_weight=1e-3, lr=0.048).items()
    assert list((d/'whale'/'tensorboard').glob('events.out.tfevents.*'))
    for words in ('parameters', 'held-out bits per byte', 'xz -9e', 'sample', 'saved in whale'): assert words in r.stdout+r.stderr
    assert (d/'whale'/'config.json').exists()

def test_generate_and_stdin(place):
    d,_ = place
    r = nanowhale('generate', 'Whale number', '--max-new-tokens', '5', '--seed', '0', cwd=d)
    assert r.returncode==0 and r.stdout.startswith('Whale number') and r.stderr==''
    assert nanowhale('generate', '--max-new-tokens', '5', '--seed', '0', cwd=d, stdin='Whale number\n').stdout==r.stdout

UNQUOTED = [['Whale', 'number'], ['--seed=0', 'Whale', 'number'], ['Whale', '--seed', '0', 'number'], ['--seed', '0', '--', 'Whale', 'number']]
@pytest.mark.parametrize('words', UNQUOTED, ids=' '.join)
def test_a_prompt_without_quotes(place, words):
    d,_ = place
    seed = [] if any('seed' in w for w in words) else ['--seed', '0']
    want = nanowhale('generate', 'Whale number', '--max-new-tokens', '5', '--seed', '0', cwd=d).stdout
    r = nanowhale('generate', '--max-new-tokens', '5', *seed, *words, cwd=d)
    assert (r.returncode, r.stdout, r.stderr)==(0, want, '')

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
    here = nanowhale('info', '--device', 'cpu', cwd=place[0]).stdout.split('computed on this machine (cpu):\n')[1]
    assert [line.split(maxsplit=1) for line in here.splitlines()]==[[*row] for row in in_use('cpu').items()]
    assert nanowhale('info', '--model', 'whale', cwd=place[0]).returncode==0

def test_help_explains_every_option(place):
    for command in cli.COMMANDS:
        r = nanowhale(command, '--help', cwd=place[0])
        assert r.returncode==0
        options = re.split(r'\n  (?=-)', r.stdout)[1:]   # a long option's help begins on the line below it
        assert options and all(re.sub(r'^-.* --help|^--[\w-]+( [A-Z_]+| \{[^}]*\})?', '', o).strip() for o in options), command
        assert not re.search(r'--\w*_', r.stdout), 'as typed by everyone, with hyphens'
        assert 'None' not in r.stdout, 'nobody can type None'

# ---------------------------------------------------------------- one thing, one name

SAME = [   # as it is called today, and as it was or may be called too
    (['generate', '--max-new-tokens', '3'], ['generate', '--tokens', '3']), (['generate', '--max-new-tokens=3'], ['generate', '--max_new_tokens=3']),
    (['chat', '--max-new-tokens', '3'], ['chat', '--tokens', '3']), (['bench', '--max-new-tokens', '3'], ['bench', '--tokens=3']),
    (['bench', '--precision', 'bf16'], ['bench', '--dtype', 'bf16']), (['train', '--precision', 'bf16'], ['train', '--dtype', 'bf16']),
    (['eval', 'there'], ['eval', '--model', 'there']), (['export', 'there'], ['export', '--model=there']),
    (['train', '--batch-size', '3'], ['train', '--batch_size', '3']), (['generate', '--top-k', '3'], ['generate', '--top_k', '3']),
    (['generate', '--repetition-penalty=2'], ['generate', '--repetition_penalty=2'])]

def heard(words, monkeypatch):
    "What the command would get"
    got,real = {},cli.COMMANDS[words[0]]
    command = cli.with_values(real, cli.VALUES[words[0]]) if words[0] in cli.VALUES else real
    def spy(**options): got.update(options)
    seen = spying(command, spy)
    with monkeypatch.context() as m:
        m.setitem(cli.COMMANDS, words[0], seen); m.setattr(cli, 'VALUES', {})
        assert cli.main(words)==0
    return got

@pytest.mark.parametrize('today,also', SAME, ids=lambda w: ' '.join(w))
def test_other_spellings_go_on_working(today, also, monkeypatch):
    got = heard(today, monkeypatch)
    assert got and heard(also, monkeypatch)==got

def test_one_name_over_all_commands():
    "What several commands take bears one name and one type, and nothing is called by an old name"
    options = {n: {k: p for k,p in cli.Parser(n, cli.with_values(f, cli.VALUES[n]) if n in cli.VALUES else f)._option_string_actions.items()}
               for n,f in cli.COMMANDS.items()}
    kinds = {}
    for command,named in options.items():
        for k,action in named.items(): kinds.setdefault(k, set()).add((action.type, action.nargs))
    assert all(len(kind)==1 for kind in kinds.values()), kinds
    assert '--tokens' not in kinds and all('--dtype' not in named for n,named in options.items() if n!='export')
    assert all('--model' in options[n] for n in ('generate', 'chat', 'eval', 'info', 'export'))

def test_what_follows_two_hyphens_is_text():
    assert cli.Parser('generate', cli.generate).read(['--top_k', '3', '--', '--tokens', 'a_b'])==dict(top_k=3, prompt='--tokens a_b')

# ---------------------------------------------------------------- help

@pytest.mark.parametrize('words', [[], ['--help'], ['-h'], ['--version'], *([c, '--help'] for c in cli.COMMANDS), ['sing'], ['train', '--lrr', '1']],
    ids=' '.join)
def test_help_needs_no_torch(words, tmp_path):
    "Nor anything else that takes long to import: a help text is there at once"
    slow = ('torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'huggingface_hub', 'safetensors')
    code = f'''import sys
from nanowhale.cli import main
try: main({words})
except SystemExit: pass
print('SLOW', [m for m in {slow} if m in sys.modules])'''
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert r.stdout.splitlines()[-1]=='SLOW []', r.stdout[-500:]+r.stderr

def test_version(place):
    r = nanowhale('--version', cwd=place[0])
    assert (r.returncode, r.stdout, r.stderr)==(0, f'nanowhale {__version__}\n', '') and '--version' in nanowhale(cwd=place[0]).stdout

def test_train_takes_every_value_of_a_recipe(place):
    text = nanowhale('train', '--help', cwd=place[0]).stdout
    for f in dataclasses.fields(Recipe): assert f'--{f.name.replace("_", "-")} ' in text, f.name

@pytest.mark.parametrize('f', dataclasses.fields(Recipe), ids=lambda f: f.name)
@pytest.mark.parametrize('sep', [' ', '='])
def test_values_arrive(f, sep, monkeypatch):
    got,default = {},dataclasses.asdict(Recipe())[f.name]
    value = dict(precision='bf16', parallel='fsdp', muon_lr=0.0).get(f.name, 7 if isinstance(default, int) else 0.5 if isinstance(default, float) else 'x')
    seen = lambda **options: got.update(options)
    real = cli.with_values
    monkeypatch.setattr(cli, 'with_values', lambda g, values: spying(real(g, values), seen))
    switch = isinstance(default, bool)
    if switch: value = True
    assert cli.main(['train', *f'--{f.name.replace("_", "-")}{"" if switch else f"{sep}{value}"}'.split(' ')])==0
    assert got[f.name]==value and type(got[f.name]) is type(value)
    assert not [g.name for g in dataclasses.fields(Recipe) if g is not f and g.name in got]   # the recipe decides

def test_what_is_not_given_stays_the_recipes():
    command = cli.with_values(lambda out='whale', **changes: dict(changes, out=out), Recipe)
    assert command(out=None, steps=None, lr=0., muon_lr=0, compile=False)==dict(out=None, lr=0., muon_lr=0)
    assert command(compile=True)==dict(compile=True, out='whale')

def spying(command, seen):
    "`seen`, with the options of the command"
    seen.__signature__,seen.__doc__ = inspect.signature(command),command.__doc__
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
    'one document': (['train', '--data', 'one.txt', '--out', 'x'], 'too little text to hold some of it out'),
    'folder in use': (['train', '--data', 'data.txt'], 'already holds a run'),
    'out is a file': (['train', '--data', 'data.txt', '--out', 'data.txt'], 'data.txt is a file, so no folder can be there'),
    'out is below a file': (['train', '--data', 'data.txt', '--out', 'data.txt/a/b'], 'data.txt is a file, so no folder can be there'),
    'out is a dangling link': (['train', '--data', 'data.txt', '--out', 'nowhere'], 'nowhere is a file, so no folder'),
    'export onto a file': (['export', '--out', 'data.txt'], 'data.txt is a file, so no folder can be there'),
    'bench into a folder': (['bench', '--preset', 'tiny', '--out', 'whale'], 'is a folder'),
    'bench into nowhere': (['bench', '--preset', 'tiny', '--out', 'x/y.json'], 'there is no folder x'),
    'bench into a text': (['bench', '--preset', 'tiny', '--out', 'data.txt'], 'no list of figures'),
    'ablate into a text': (['ablate', 'dense', '--out', 'data.txt'], 'no list of figures'),
    'bench in int4': (['bench', '--preset', 'tiny', '--precision', 'int4'], 'choose fp32 or bf16'),
    'bench without a row': (['bench', '--preset', 'tiny', '--batch-size', '0'], 'batch_size=0: need a whole number, 1 or more'),
    'ablate without a seed': (['ablate', 'dense', '--seeds', '0'], 'seeds=0'),
    'no such shard size': (['export', '--out', 'x', '--max-shard-size', 'five'], 'such as 5GB'),
    'private, but nowhere': (['export', '--out', 'x', '--private'], 'is about the Hub'),
    'two models': (['info', '--preset', 'tiny', '--model', 'whale'], 'choose one'),
    'a seed below 0': (['train', '--data', 'data.txt', '--seed', '-1', '--out', 'x'], 'seed=-1'),
    'no steps': (['train', '--data', 'data.txt', '--steps', '0', '--out', 'x'], 'steps=0'),
    'a warm-up in steps': (['train', '--data', 'data.txt', '--warmup', '10', '--out', 'x'], 'warmup=10.0: it is a share, 1 at most'),
    'an empty name': (['train', '--chat', '', '--out', 'x'], 'chat: an empty name'),
    'a device without numbers': (['info', '--device', 'meta'], 'device "meta" cannot be used here'),
    'no such kernels': (['train', '--data', 'data.txt', '--kernels', 'slow', '--out', 'x'], "kernels='slow': choose fast or plain"),
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
    'drafts for nobody': (['generate', 'Hi', '--drafts', '3'], '--drafts is for --speculative'),
    'no drafts': (['generate', 'Hi', '--speculative', '--drafts', '0'], 'drafts=0'),
    'too much top_p': (['generate', 'Hi', '--top_p', '2'], 'top_p=2.0: need a number above 0 and at most 1'),
    'top_k below 0': (['generate', 'Hi', '--top-k', '-1'], 'top_k=-1: need a whole number, 0 (all tokens) or more'),
    'no context': (['eval', '--data', 'data.txt', '--context', '0'], 'context=0: need a whole number, 1 or more'),
    'no documents': (['eval', '--data', 'data.txt', '--documents', '0'], 'documents=0'),
    'chat at a wrong temperature': (['chat', '--temperature', '-1'], 'temperature=-1.0'),
    'resumed for longer': (['train', '--resume', '--steps', '60'], '--steps 60 (it has 3)'),
    'resumed otherwise': (['train', '--resume', '--lr', '0.1', '--context', '64', '--seed', '4'], 'not with --lr 0.1 (it has 0.048), --seed 4 (it has 0)'),
    'resumed on another text': (['train', '--resume', '--tokenizer', 'other', '--data', 'more.txt'],
        'not with --tokenizer other (it has none), --data more.txt (it has data.txt)'),
    'resumed with another size': (['train', '--resume', '--preset', 'nanowhale_100m'], '--preset nanowhale_100m (it has tiny)'),
    'resumed by another recipe': (['train', '--resume', '--recipe', 'card'], '--lr 0.003 (it has 0.048)'),
    'two models for eval': (['eval', 'whale', '--model', 'other'], 'two models'),
    'no such option': (['generate', 'Hi', '--wit', '1'], '`nanowhale generate --help` lists'),
    'no number': (['generate', 'Hi', '--top-k', 'few'], "argument --top-k: invalid int value: 'few'"),
}

@pytest.fixture(scope='module')
def broken(place):
    d,_ = place
    (d/'nowhere').symlink_to('gone')
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
    assert r.returncode not in (0, -9) and says in r.stderr and r.stdout=='', r.stderr
    assert 'None' not in r.stderr, 'nobody can type None'
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

# ---------------------------------------------------------------- what comes first

CHECKED_FIRST = [['generate', 'Hi', '--temperature', '-1'], ['generate', '--min-p', '2'], ['generate', 'Hi', '--repetition-penalty', '0'],
    ['generate', 'Hi', '--max-new-tokens', '-3'], ['generate', 'Hi', '--seed', '-1'], ['generate', 'Hi', '--drafts', '0'], ['generate', '--device', 'abacus'],
    ['generate', 'Hi', '--speculative', '--compile'], ['chat', '--top-p', '2'], ['chat', '--device', 'abacus'], ['chat', '--max-new-tokens', '-3'],
    ['eval', '--context', '0'], ['eval', '--batch-size', '0'], ['eval', '--device', 'abacus'], ['eval', '--model', 'gone'],
    ['export', '--dtype', 'int3', '--out', 'x'], ['info', '--device', 'abacus'],
    ['export', '--max-shard-size', 'x', '--out', 'x'], ['export', '--out', 'data.txt'], ['bench', '--preset', 'huge'], ['bench', '--repeats', '0'],
    ['train', '--out', 'data.txt'], ['train', '--out', 'data.txt/x'], ['train', '--steps', '0', '--out', 'x'], ['train', '--seed', '-1', '--out', 'x'],
    ['train', '--device', 'abacus', '--out', 'x'], ['train', '--resume', '--steps', '60']]

@pytest.mark.parametrize('words', CHECKED_FIRST, ids=' '.join)
def test_options_are_checked_before_anything_is_read(place, words, monkeypatch):
    "No text, no tokenizer, no model and no standard input before every option makes sense"
    from nanowhale.train import data
    from nanowhale.model import whale as model
    from nanowhale.train import stream
    from nanowhale.train import loop as train
    def touched(*_, **__): raise AssertionError('read before the options were checked')
    for where,name in ((data, 'read_texts'), (data, 'load_tokenizer'), (stream, 'held_out_texts'), (train, 'held_out_texts'), (train, 'make_tokenizer')):
        monkeypatch.setattr(where, name, touched)
    monkeypatch.setattr(model.Whale, 'from_pretrained', touched)
    class Nobody(io.StringIO): read = touched
    with monkeypatch.context() as m:
        m.setattr(io, 'StringIO', type('Box', (io.StringIO,), {}))
        m.setattr(sys, 'stdin', Nobody())
        r = nanowhale(*words, cwd=place[0])
    assert r.returncode in (1, 2) and r.stdout=='' and r.stderr.count('\n')==1 and r.stderr.startswith('nanowhale: '), r.stdout+r.stderr

def test_the_bar_begins_on_its_own_line(place):
    d,_ = place
    env = {k: v for k,v in os.environ.items() if k!='TQDM_DISABLE'} | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
    r = subprocess.run([*DOOR, 'train', '--data', 'data.txt', '--steps', '2', '--batch-size', '2', '--context', '32', '--evals', '1', '--out', 'barred'],
        cwd=d, env=env, capture_output=True, timeout=300)
    assert r.returncode==0, r.stderr.decode()
    lines = r.stderr.decode().split('\n')   # a text's would be split at carriage returns as well
    bar = next(i for i,l in enumerate(lines) if 'step' in l and '%|' in l)
    assert 'parameters' in lines[bar-1] and '%|' not in lines[bar-1] and 'parameters' not in lines[bar]
    assert lines[bar+1].startswith('held-out loss') and lines[bar].lstrip('\r').startswith('  0%|')

def test_a_command_said_again_with_resume_is_no_contradiction(place):
    "Whoever adds `--resume` to the words of before is told that the run is done, not that they differ"
    d,_ = place
    r = nanowhale('train', '--resume', '--data', 'data.txt', '--steps', '3', '--batch_size', '2', '--context=64', '--recipe', 'whale', '--preset', 'tiny',
        '--mtp-final=0.2', '--balance-weight', '1e-3', '--seed', '0', cwd=d)
    assert r.returncode==1 and 'has done all its 3 steps' in r.stderr and '--init whale' in r.stderr

def test_a_refused_resume_changes_nothing(place):
    d,_ = place
    damage(d, 'half', lambda f: (f/'README.md').unlink())
    state = lambda: {f.relative_to(d): f.read_bytes() for f in (d/'half').rglob('*') if f.is_file()}
    before = state()
    assert nanowhale('train', '--resume', '--steps', '60', '--out', 'half', cwd=d).returncode==1 and state()==before
    assert nanowhale('train', '--resume', '--out', 'half', cwd=d).returncode==0   # and the plain way goes on

def test_the_cards_sample_is_text(place):
    "A sample's lines are lines in the card's table, and nothing in it is taken for markup"
    from nanowhale.train.loop import as_cell
    assert as_cell('a|b\n\n*c* `d`\r\n<br> \\ [e](f) _g_') == \
        'a&#124;b<br><br>&#42;c&#42; &#96;d&#96;<br>&#60;br&#62; &#92; &#91;e&#93;(f) &#95;g&#95;'
    assert as_cell(0.5)=='0.5' and as_cell('2 threads, torch 2.13.0+cpu')=='2 threads, torch 2.13.0+cpu'
    d,_ = place
    rows = [l for l in (d/'whale'/'README.md').read_text().split('\n') if l.startswith('| ')]
    sample = next(l for l in rows if l.startswith('| sample |'))
    assert '\\n' not in sample and sample.endswith(' |') and all(l.count('|')==3 for l in rows)

def test_a_command_passes_its_words_on_in_their_places(monkeypatch):
    "Two values exchanged on the way would run, and measure something else"
    from nanowhale.fast import bench
    from nanowhale.lab import ablate, ladder
    given = dict(preset='tiny', batch_size=1, context=2, precision='bf16', max_new_tokens=3, repeats=4, device=None, profile=False, compile=True,
        out='file', force=False)
    got = {}
    for module,name in ((bench, 'bench'), (ablate, 'ablate'), (ladder, 'ladder')):
        names = [*inspect.signature(getattr(module, name)).parameters]
        monkeypatch.setattr(module, name, lambda *args, names=names, name=name: got.update({name: dict(zip(names, args, strict=True))}))
    cli.bench(**given)
    cli.ablate('mtp', steps=9)
    cli.ladder('plain', seeds=1)
    assert got==dict(bench=given, ablate=dict(name='mtp', seeds=5, steps=9, out='ablate.json'),
        ladder=dict(name='plain', seeds=1, steps=400, out='ladder.json'))
