"""Files, words and conversations that nobody wrote: random damage, seeded, and what the user then sees.

    pytest tests/test_abuse.py                   a hundred and some cases
    pytest --flags slow tests/test_abuse.py      ten times as many

Every case ends: well, or with one line. None hangs, takes unbounded memory, ends in a traceback, or runs code out of a file. The cases
of a kind run in a fork of this process that may take a gigabyte more than it has and a few minutes of computing.
"""
import ast, contextlib, io, json, os, random, shutil, struct, sys
from copy import deepcopy
from pathlib import Path
import pytest, torch
from nanowhale.generate import chat
from nanowhale import cli
from nanowhale.train import data
from nanowhale.train import stream
from nanowhale.train import loop
from nanowhale.run import train
from nanowhale.train.checkpoint import checkpoints, drop_metrics, read_metrics
from nanowhale.model.whale import Whale
from nanowhale.generate.weights import find_folder
from runs import ROOT, SMALL, jsonl, texts

pytestmark = pytest.mark.skipif(sys.platform!='linux', reason='limits memory as Linux does')
NASTY = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, 1e308, float('nan'), float('inf'), '', 'x', '../../etc/passwd', '\ud800', '9'*4000, 'é\n\tTraceback',
    [], {}, [[]]*50, {'a': {'b': {}}}, ['x']*1000, '{{ 1/0 }}', "__import__('os').system('true')"]

# ---------------------------------------------------------------- damage

def places(x, at=()):
    "Paths to everything inside a JSON value"
    for k,v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield (*at, k)
        yield from places(v, (*at, k))

def spoil_json(r, value, times=2):
    "Some values replaced by nasty ones, or gone, or under another name"
    value = json.loads(json.dumps(value))
    for _ in range(r.randint(1, times)):
        here = list(places(value))
        if not here: return r.choice(NASTY)
        *path,last = r.choice(here)
        inner = value
        for k in path: inner = inner[k]
        how = r.random()
        if how<0.7: inner[last] = deepcopy(r.choice(NASTY))      # a later change may be inside it
        elif how<0.85: del inner[last]
        elif isinstance(inner, dict): inner[r.choice(['', 'x', '\n', 'step'])] = inner.pop(last)
    return value

def spoil_bytes(r, raw):
    "Bytes flipped, cut out, doubled or cut off"
    raw = bytearray(raw)
    for _ in range(r.randint(1, 4)):
        i,n = r.randrange(len(raw) or 1),r.choice([1, 1, 3, 50])
        how = r.random()
        if how<0.5: raw[i:i+1] = bytes([r.randrange(256)])
        elif how<0.65: del raw[i:i+n]
        elif how<0.8: raw[i:i] = raw[i:i+n]*r.choice([1, 100])
        elif how<0.9: raw[i:i+n] = b'['*1000
        else: del raw[i:]
    return bytes(raw)

def spoil_file(r, path):
    raw = path.read_bytes()
    try: value = json.loads(raw)
    except ValueError: value = None
    if value is None or r.random()<0.4: path.write_bytes(spoil_bytes(r, raw))
    else: path.write_text(json.dumps(spoil_json(r, value)), errors='replace')

def spoil_header(r, path):
    "The header of a safetensors file: its length, its JSON, its bytes"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], 'little')
    head,rest,how = raw[8:8+n],raw[8+n:],r.random()
    if how<0.4: head = json.dumps(spoil_json(r, json.loads(head))).encode(errors='replace')
    elif how<0.8: head = spoil_bytes(r, head)
    else: n = r.choice([0, 1, n-1, n+1, 2**20, 2**40, 2**63])
    path.write_bytes(struct.pack('<Q', n if how>=0.8 else len(head))+head+rest)

# ---------------------------------------------------------------- one fork for all cases of a kind

def limited(cases, seconds=400, room=2**30):
    "Run `cases`, name -> function, in a fork with limits; each must return or raise a `ValueError` or `OSError` of one line"
    import resource
    read,write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.close(read)
            used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used+room, -1)); resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2): os.dup2(null, fd)
            with os.fdopen(write, 'w') as f:
                for name,case in cases.items():
                    print(json.dumps([name, 'begun']), file=f, flush=True)
                    try: said = case() or ''
                    except (ValueError, OSError) as e: said = str(e)
                    except BaseException as e: said = f'\n{type(e).__name__}: {e}'[:300]
                    print(json.dumps([name, said[:3000]]), file=f, flush=True)
        finally: os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: told = dict(map(json.loads, f))
    os.waitpid(pid, 0)
    bad = {n: told.get(n, 'never begun') for n in cases if (s := told.get(n, '\n'))=='begun' or '\n' in s.strip() or s.startswith('\n') or len(s)>2000}
    assert not bad, f'{len(bad)} of {len(cases)}: {list(bad.items())[:5]}'
    return told

def numbered(n, make): return {i: make(random.Random(i)) for i in range(n)}
many = pytest.mark.parametrize('times', [1, pytest.param(10, marks=pytest.mark.slow)])

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small run of three steps, and the text it is made of"
    d = tmp_path_factory.mktemp('abuse')
    (d/'words.jsonl').write_text(jsonl(texts(60)))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop.Log, 'plot', lambda self: None); m.setenv('TQDM_DISABLE', '1')
        train(data=str(d/'words.jsonl'), out=str(d/'run'), steps=3, evals=3, batch_size=2, context=32)
    return d/'run'

def copy(run, to, ignore=()):
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(*ignore), copy_function=shutil.copy)
    return to

def command(words, stdin=''):
    "`main(words)`, in this process; what it said last, or an error that it did not answer"
    out,err = io.StringIO(),io.StringIO()
    sys.stdin = io.StringIO(stdin)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = cli.main(words)
        except SystemExit as e: code = e.code
    said = [l for l in err.getvalue().replace('\r', '\n').split('\n') if l.strip()]
    if code not in (0, 1, 2): raise RuntimeError(f'exit code {code}')
    if code==1 and not (said and said[-1].startswith('nanowhale: ')): raise RuntimeError(f'no line: {said[-3:]}')
    return said[-1] if code==1 else ''

# ---------------------------------------------------------------- files of a model

@many
@pytest.mark.parametrize('name,spoil,n', [('config.json', spoil_file, 30), ('model.safetensors', spoil_header, 20)])
def test_a_models_files(run, tmp_path, name, spoil, n, times):
    folder = copy(run, tmp_path/'m', ('checkpoints',))
    whole = (folder/name).read_bytes()
    def make(r):
        def case():
            (folder/name).write_bytes(whole); spoil(r, folder/name)
            Whale.from_pretrained(folder)
        return case
    limited(numbered(n*times, make))

@many
def test_tokenizers(run, tmp_path, times):
    folder = copy(run, tmp_path/'m', ('checkpoints', 'model.safetensors'))
    files = {n: (folder/n).read_bytes() for n in ('tokenizer.json', 'tokenizer_config.json')}
    def make(r):
        def case():
            for n,raw in files.items(): (folder/n).write_bytes(raw)
            spoil_file(r, folder/r.choice(list(files)))
            tok = data.load_tokenizer(find_folder(folder))
            tok.decode(tok.encode('a whale sings', add_special_tokens=False))
        return case
    limited(numbered(20*times, make))

# ---------------------------------------------------------------- files of a run

@many
def test_metrics(run, tmp_path, times):
    raw = (run/'metrics.jsonl').read_bytes()
    def make(r):
        def case():
            (tmp_path/'m.jsonl').write_bytes(spoil_bytes(r, raw))
            drop_metrics(tmp_path/'m.jsonl', 2); assert all(m['step']<2 for m in read_metrics(tmp_path/'m.jsonl'))
        return case
    limited(numbered(40*times, make))

def test_metrics_without_an_end(tmp_path):
    with open(tmp_path/'m.jsonl', 'wb') as f: f.truncate(2**40)
    limited({0: lambda: assert_none(read_metrics(tmp_path/'m.jsonl'))})

def assert_none(x): assert x==[]

@many
def test_resuming_from_a_damaged_run(run, tmp_path, times, monkeypatch):
    "run.json, the trainer's state and its tensors: the command goes on, or says in one line what is damaged"
    monkeypatch.setattr(loop.Log, 'plot', lambda self: None); monkeypatch.setenv('TQDM_DISABLE', '1')
    monkeypatch.setattr(stream, 'WAITS', ()); monkeypatch.setattr(stream.time, 'sleep', lambda s: None)
    def make(r):
        def case():
            out = copy(run, tmp_path/'r')
            (out/'README.md').unlink(); shutil.rmtree(checkpoints(out)[-1])
            last = checkpoints(out)[-1]
            name = r.choice(['run.json', 'state.json', 'state.json', 'optimizer.safetensors'])
            if name=='run.json':
                spec = spoil_json(r, json.loads((out/name).read_text()))
                if isinstance(spec, dict) and isinstance(spec.get('recipe'), dict): \
                    spec['recipe'] |= {k: 3 for k in ('steps',) if type(spec['recipe'].get(k)) is int}
                (out/name).write_text(json.dumps(spec), errors='replace')
            elif name=='state.json': spoil_file(r, last/'trainer'/name)
            else: spoil_header(r, last/'trainer'/name)
            return command(['train', '--resume', '--out', str(out)])
        return case
    limited(numbered(14*times, make), 600)

# ---------------------------------------------------------------- words and conversations

OPTIONS = dict(   # command: options that it has, without those that would start real work
    generate=['--temperature', '--top-k', '--top_p', '--min-p', '--repetition-penalty', '--seed', '--drafts', '--speculative', '--device',
        '--revision', '--tokens', '--max-new-tokens'],
    eval=['--data', '--context', '--batch-size', '--field', '--documents', '--device', '--model'], info=['--preset', '--model'],
    export=['--out', '--dtype', '--max-shard-size', '--model', '--private'],
    chat=['--system', '--max-new-tokens', '--temperature', '--top-k', '--seed'],
    train=['--preset', '--recipe', '--seed', '--device', '--lr', '--context', '--precision',
        '--data', '--field', '--tokenizer', '--init', '--chat', '--parallel', '--warmup', '--buffer', '--batch-size', '--accum', '--evals',
        '--keep'])
VALUES = ['', '-1', '0', '1', '3', '0.5', 'nan', 'inf', '-inf', '1e400', '99999999999999999999999', 'x', '/', '.', '/dev/null', 'a/b', '--',
    '-', '\udcff', 'é', '{}', '../..', '5GB', 'cpu', 'cuda:99']

@many
def test_command_lines(run, tmp_path, times, monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '1'); monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.Run, 'go', lambda self: (_ for _ in ()).throw(ValueError('far enough')))
    (tmp_path/'short.txt').write_text('a whale sings\n\n'*300)
    def make(r):
        def case():
            name = r.choice(list(OPTIONS))
            words = [name]+dict(generate=['Hi', '--model', str(run), '--tokens', '3'], eval=[str(run), '--data', 'short.txt', '--context', '16'],
                export=[str(run)], chat=['--model', str(run), '--tokens', '3'], info=[], train=['--data', str(run.parent/'words.jsonl'), *SMALL])[name]
            for _ in range(r.randint(1, 3)):
                o,v = r.choice(OPTIONS[name]),r.choice(VALUES)
                words += r.choice([[o, v], [f'{o}={v}'], [o], [v]])
            return command(words+(['--out', f'o{r.random()}'] if name in ('train', 'export') and r.random()<0.9 else []), 'hello\n')
        return case
    limited(numbered(24*times, make), 600, 2**31)

TALK = ['', ' ', '/', '/save', '/save /', '/save /dev/full', '/save a/b/c', '/reset', '/help', '/nothing', 'x'*5000,
    '\ud800', '\x00', '{{ 1/0 }}', '<|eos|>'*50, '<|bos|>', 'é'*100, '/quit now', '\\n']

@many
def test_conversations(run, times):
    tok,whale = chat.with_template(data.load_tokenizer(run)),Whale.from_pretrained(run)
    good = [dict(role='system', content='Be a whale'), dict(role='user', content='Sing'), dict(role='assistant', content='la')]*2
    def make(r):
        def history():
            text = json.dumps(spoil_json(r, good))
            chat.pack_chats(tok, [text if r.random()<0.7 else text[:r.randrange(len(text))]], 64)
        def typed():
            lines = iter([r.choice(TALK) for _ in range(3)])
            def ask(_):
                try: return next(lines)
                except StopIteration: raise EOFError from None
            chat.talk(chat.Chat(whale, tok, 2, r.choice([None, *(x for x in NASTY if isinstance(x, str))])), ask, lambda s: None, lambda s: None)
        return typed if r.random()<0.3 else history
    limited(numbered(40*times, make))

def test_a_prompt_of_half_a_character(run): limited({0: lambda: command(['generate', '\udcff', '--model', str(run)])})

def test_deep_conversations(): limited({0: lambda: chat.parse_chat('['*10**5), 1: lambda: chat.parse_chat('['*400+']'*400)})

# ---------------------------------------------------------------- no code out of a file

def test_nothing_in_the_package_can_run_code_out_of_a_file():
    "No pickle and its kin, no eval or exec, no torch.load"
    for path in sorted((ROOT/'nanowhale').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = [a.name for a in node.names]+[getattr(node, 'module', '')] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {n.split('.')[0] for n in names if n}&{'pickle', 'cPickle', 'dill', 'shelve', 'marshal', 'joblib', 'cloudpickle', 'runpy'}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ('eval', 'exec', 'compile', '__import__', 'torch.load', 'importlib.import_module', 'os.system'), f'{path}:{node.lineno}'
                said = {k.arg: getattr(k.value, 'value', None) for k in node.keywords}
                assert not any(said.get(k) for k in ('trust_remote_code', 'allow_pickle', 'shell')), f'{path}:{node.lineno}'

def test_a_case_that_hangs_or_grows_or_raises_is_seen():
    for bad in (lambda: [0 for _ in iter(int, 1)], lambda: bytearray(2**34), lambda: {}['x'], lambda: os.kill(os.getpid(), 9)):
        with pytest.raises(AssertionError): limited({0: bad}, seconds=4)
