"""Streams: the same rows from any position, from any kind of file, over bad networks, and never a held-out document"""
import gzip, http.server, importlib.util, json, os, re, signal, threading, time
from contextlib import contextmanager
import pytest, torch, zstandard
import nanowhale.train.stream as S
import nanowhale.train.loop as T
from nanowhale.train.data import is_held_out, train_tokenizer
from nanowhale.train.stream import Blocks, Documents, Stream, held_out_texts
from runs import SMALL, jsonl, metrics, texts

TEXTS = texts(60, words=30)
tok = train_tokenizer(TEXTS, 300)

def write(folder, kind):
    "The same documents in a file of that kind, or in a folder of several files; its path"
    data = jsonl(TEXTS).encode()
    path = folder/f'data.{kind}'
    if kind=='jsonl': path.write_bytes(data)
    if kind=='jsonl.gz': path.write_bytes(gzip.compress(data))
    if kind=='jsonl.zst': path.write_bytes(zstandard.compress(data))
    if kind=='txt': path.write_text('\n\n'.join(t*40 for t in TEXTS))   # cut at blank lines into pieces of 4,000 characters and more
    if kind=='parquet':
        from datasets import Dataset
        Dataset.from_dict(dict(text=TEXTS)).to_parquet(path, batch_size=7)
    if kind=='folder':
        (path/'b').mkdir(parents=True)
        (path/'1.jsonl').write_text(jsonl(TEXTS[:21])); (path/'2.jsonl.gz').write_bytes(gzip.compress(jsonl(TEXTS[21:22]).encode()))
        (path/'b'/'3.jsonl').write_text(jsonl(TEXTS[22:]))
    return str(path)

def blocks(data, chars=700, **kw): return Blocks(data, tok, 16, chars=chars, **kw)

def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

def rows_and_states(stream, n, take=7):
    rows,states = [],[]
    for _ in range(n): states.append(json.loads(json.dumps(stream.state()))); rows.append(stream.take(take))
    return rows, states

# ---------------------------------------------------------------- positions

@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'jsonl.zst', 'txt', 'parquet', 'folder'])
def test_any_position_is_exact(tmp_path, kind):
    data,chars = write(tmp_path, kind),50_000 if kind=='txt' else 700
    take = 300 if kind=='txt' else 15
    rows,states = rows_and_states(Stream(blocks(data, chars, seed=3)), 24, take)
    epochs = {s['at']['epoch'] for s in states[1:] if s['at']}
    assert len(epochs)>=2, epochs                                      # the end of the text was passed
    for i in (0, 1, 2, 9, 17, 22):
        rest = Stream(blocks(data, chars, seed=3), state=states[i])
        assert rest.state()==states[i]
        for r in rows[i:i+3]: assert same(r, rest.take(take)), i

class Noting(Blocks):
    "Blocks that note the texts they are made of, by epoch"
    def __init__(self, *a, **kw): super().__init__(*a, **kw); self.noted = []
    def rows(self, texts, number): self.noted.append(texts); return super().rows(texts, number)

@pytest.mark.parametrize('chars', [1, 700, 10**9])
def test_every_training_document_once_an_epoch(tmp_path, chars):
    source = Noting(write(tmp_path, 'folder'), tok, 16, chars=chars)
    stream = Stream(source)
    while (block := stream.next_block())['at'] is None or block['at']['epoch']<2: pass
    seen,train = [t for ts in source.noted for t in ts],[t for t in TEXTS if not is_held_out(t)]
    assert seen[:len(train)]==train and seen[len(train):2*len(train)]==train and 0<len(train)<len(TEXTS)
    assert stream.loader is not None and all(ids.min()>=0 for ids in (block['input_ids'], block['docs']+1))

def test_each_block_shuffles_otherwise_and_the_seed_decides(tmp_path):
    data = write(tmp_path, 'jsonl')
    a,b,c = (Stream(blocks(data, 10**9, seed=s)) for s in (0, 0, 1))
    one,two,three,again = a.next_block(),a.next_block(),c.next_block(),b.next_block()
    assert (one['input_ids']==again['input_ids']).all()
    for other in (two, three): assert other['input_ids'].shape==one['input_ids'].shape and (other['input_ids']!=one['input_ids']).any()

# ---------------------------------------------------------------- held out

def grams(ids, n=6): return {tuple(g) for g in torch.tensor(ids).unfold(-1, n, 1).reshape(-1, n).tolist()}

@pytest.mark.parametrize('one_in', [20, 5, 2])
def test_no_row_holds_anything_of_a_held_out_document(tmp_path, one_in):
    "Over three epochs, by runs of six tokens that no training document has"
    (tmp_path/'a.jsonl').write_text(jsonl(texts(150, words=30, seed=7)*2))   # each twice: copies stay on one side
    side = [[], []]
    for t in texts(150, words=30, seed=7): side[is_held_out(t, one_in)].append(t)
    (train,held),source = ({g for t in part for g in grams(tok.encode(t, add_special_tokens=False))} for part in side),blocks(str(tmp_path/'a.jsonl'), 4000)
    source.one_in = one_in
    stream,found,at = Stream(source),set(),None
    while at is None or at['epoch']<3: block = stream.next_block(); at = block['at']; found |= grams(block['input_ids'])
    assert len(held-train)>100 and not found & (held-train)
    assert len(found & train)>0.6*len(train)   # the rest is cut by rows of 17

def test_what_is_measured_is_what_was_kept_out(tmp_path):
    for n in (8, 60, 400):
        (tmp_path/'a.jsonl').write_text(jsonl(texts(n, seed=n)))
        held,one_in = held_out_texts(str(tmp_path/'a.jsonl'))
        assert held and all(is_held_out(t, one_in) for t in held) and len(held)<n

@pytest.mark.parametrize('kind', ['all the same', 'blank', 'one'])
def test_a_source_with_nothing_to_train_on(tmp_path, kind):
    rows = {'all the same': ['the same text']*50, 'blank': ['', ' ', '\n\n'], 'one': ['Alone.']}[kind]
    path = tmp_path/'a.jsonl'
    path.write_text(jsonl(rows))
    with pytest.raises(ValueError, match='no document is left to train on|too little text|holds no text') as e:
        _,one_in = held_out_texts(str(path))
        Stream(Blocks(str(path), tok, 16, one_in=one_in)).take(1)
    assert str(path) in str(e.value)

def test_blank_documents_and_copies(tmp_path):
    train = [t for t in TEXTS if not is_held_out(t)][:5]
    (tmp_path/'a.jsonl').write_text(jsonl(['', train[0], '  ', train[1], train[1], '\n', *train[2:], train[0]]))
    source = Noting(str(tmp_path/'a.jsonl'), tok, 16)
    Stream(source).take(3)
    assert source.noted[0]==[train[0], train[1], train[1], *train[2:], train[0]]

def test_documents_longer_than_a_row(tmp_path):
    "Their pieces overlap by a token, each token is a target once, and no row mixes two numbers for one document"
    from nanowhale.model.mtp import shift_labels
    train = [t for t in texts(30, words=500, seed=4) if not is_held_out(t)]
    (tmp_path/'a.jsonl').write_text(jsonl(train))
    block = Stream(blocks(str(tmp_path/'a.jsonl'), 10**9)).next_block()
    ids,docs = (torch.from_numpy(block[k]).long() for k in ('input_ids', 'docs'))
    assert len(set(docs.flatten().tolist())-{-1})==len(train) and max((docs[:,0]==d).sum() for d in docs.unique())>20   # tens of rows each
    targets = shift_labels(ids, 1, docs)
    want = sorted(i for t in train for i in [*tok.encode(t, add_special_tokens=False), tok.eos_token_id])
    assert sorted(targets[targets!=-100].tolist())==want

# ---------------------------------------------------------------- a process of its own

def test_another_process_changes_nothing_and_its_loss_is_told(tmp_path):
    data = write(tmp_path, 'folder')
    rows,states = rows_and_states(Stream(blocks(data)), 12)
    stream = Stream(blocks(data), ahead=2)
    got,marks = rows_and_states(stream, 10)
    assert all(map(same, got, rows)) and marks==states[:10]
    worker = stream.loader._workers[0]
    rest = Stream(blocks(data), ahead=2, state=marks[5])
    os.kill(rest.loader._workers[0].pid, signal.SIGINT)       # Ctrl-C in a terminal reaches every process
    assert all(same(rest.take(7), r) for r in rows[5:12])
    os.kill(worker.pid, signal.SIGKILL)
    end = time.monotonic()+1
    while time.monotonic()<end: pass                               # work goes on undisturbed
    where = stream.state()
    with pytest.raises(OSError, match='the process that prepares the data was lost') as e:
        while True: where = stream.state(); stream.take(50)
    assert '\n' not in str(e.value) and stream.state()==where
    assert same(Stream(blocks(data), state=where).take(50), Stream(blocks(data), state=where).take(50))

def test_an_error_in_the_other_process_arrives(tmp_path):
    (tmp_path/'a.jsonl').write_text(jsonl(TEXTS)+'{"body": "no text here"}\n')
    with pytest.raises(ValueError, match='its fields: '): Stream(blocks(str(tmp_path/'a.jsonl'), 10**9), ahead=1).take(1)

# ---------------------------------------------------------------- a bad network

needs_http = pytest.mark.skipif(not importlib.util.find_spec('aiohttp'), reason='files at an address need the package aiohttp')

class Site(http.server.BaseHTTPRequestHandler):
    "Serves `server.files`, whole or in ranges; fails while `server.fails` is above 0, once for each request"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def do_HEAD(self): self.do_GET(body=False)
    def do_GET(self, body=True):
        server = self.server
        server.asked += 1
        if server.fails>0:
            server.fails -= 1
            if server.asked%2: self.close_connection = True; return self.connection.close()   # now hang up, now refuse
            self.send_response(503); self.send_header('Content-Length', '0'); return self.end_headers()
        data = server.files.get(self.path)
        if data is None: self.send_response(404); self.send_header('Content-Length', '0'); return self.end_headers()
        size,part = len(data),re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range') or '')
        lo,hi = (int(part[1]), min(int(part[2]), size-1)) if part else (0, size-1)
        self.send_response(206 if part else 200)
        if part: self.send_header('Content-Range', f'bytes {lo}-{hi}/{size}')
        self.send_header('Accept-Ranges', 'bytes'); self.send_header('Content-Length', str(hi+1-lo)); self.end_headers()
        if body: self.wfile.write(data[lo:hi+1])

@contextmanager
def serving(files):
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site) as server:
        server.files,server.fails,server.asked = {f'/{k}': v for k,v in files.items()},0,0
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try: yield server, f'http://127.0.0.1:{server.server_port}'
        finally: server.shutdown(); thread.join()

@needs_http
@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz'])
def test_an_address_gives_the_rows_of_the_file(tmp_path, kind):
    data = write(tmp_path, kind)
    with serving({os.path.basename(data): open(data, 'rb').read()}) as (_,url):
        rows,_ = rows_and_states(Stream(blocks(data)), 20)
        got,_ = rows_and_states(Stream(blocks(f'{url}/{os.path.basename(data)}')), 20)
    assert all(map(same, got, rows))

@needs_http
def test_failed_reads_are_tried_again(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(S.time, 'sleep', slept.append)
    data = write(tmp_path, 'jsonl')
    with serving({'a.jsonl': jsonl(TEXTS).encode()}) as (server,url):
        rows,_ = rows_and_states(Stream(blocks(data)), 60)
        stream = Stream(blocks(f'{url}/a.jsonl'))
        got = [stream.take(7) for _ in range(3)]
        server.fails = 4   # at the next epoch's first requests
        got += [stream.take(7) for _ in range(57)]
        assert all(map(same, got, rows)) and server.fails==0
        assert slept and slept==list(S.WAITS[:len(slept)])
        server.fails,slept[:] = 10**9,[]
        with pytest.raises(OSError, match='7 attempts to read on failed') as e:
            while True: stream.take(7)
        assert slept==list(S.WAITS) and '\n' not in str(e.value)
    with pytest.raises(OSError, match='could not be read'): Documents(f'{url}/a.jsonl').read(10)   # no server at all: at once
    assert len(slept)==len(S.WAITS)

@pytest.mark.parametrize('at', [1, 7, 33, 59])
def test_a_break_in_the_middle_of_a_block_loses_nothing(tmp_path, monkeypatch, at):
    "The connection breaks twice after `at` documents: they are read again, each still comes once"
    import nanowhale.train.data as data
    path,real,breaks = write(tmp_path, 'jsonl'),data.read_file,[2]
    def breaking(*a):
        for i,t in enumerate(real(*a)):
            if i==at and breaks[0]: breaks[0] -= 1; raise ConnectionError('connection reset')
            yield t
    rows,_ = rows_and_states(Stream(blocks(path)), 40)
    monkeypatch.setattr(data, 'read_file', breaking); monkeypatch.setattr(S.time, 'sleep', lambda s: None)
    source = blocks(path)
    docs = Documents(path, waits=(0, 0)); docs.fresh = False   # it has worked before
    monkeypatch.setattr(S, 'Documents', lambda *a: docs)
    got,_ = rows_and_states(Stream(source), 40)
    assert breaks==[0] and all(map(same, got, rows))

@needs_http
def test_a_run_whose_source_goes_away_ends_with_a_checkpoint_and_goes_on_later(tmp_path, monkeypatch, capsys):
    from nanowhale.cli import main
    monkeypatch.setattr(S.time, 'sleep', lambda s: None)
    monkeypatch.setattr(T.Log, 'plot', lambda self: None)
    few = jsonl([t for t in TEXTS][:14]).encode()   # an epoch is over after a few steps
    common = ['train', '--steps', '9', '--evals', '1', '--patience', '3', *SMALL]
    with serving({'a.jsonl': few}) as (server,url):
        source = ['--data', f'{url}/a.jsonl']
        assert main([*common, *source, '--out', str(tmp_path/'whole')])==0
        step = T.train_step
        def fade(*args):
            if args[-1]==2: server.fails = 10**9
            return step(*args)
        monkeypatch.setattr(T, 'train_step', fade)
        capsys.readouterr()
        assert main([*common, *source, '--out', str(tmp_path/'cut')])==1
        last = capsys.readouterr().err.strip().split('\n')[-1]
        assert last.startswith('nanowhale: ') and '7 attempts to read on failed' in last
        done = len(metrics(tmp_path/'cut'))
        assert 3<=done<9 and [int(f.name[5:]) for f in T.Path(tmp_path/'cut'/'checkpoints').iterdir()]==[done]
        monkeypatch.setattr(T, 'train_step', step)
        server.fails = 0
        assert main(['train', '--resume', '--out', str(tmp_path/'cut')])==0
    assert metrics(tmp_path/'cut')==metrics(tmp_path/'whole')
    assert (tmp_path/'cut'/'model.safetensors').read_bytes()==(tmp_path/'whole'/'model.safetensors').read_bytes()
