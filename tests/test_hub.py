"""The Hub, both ways: the real huggingface_hub client against a small Hub that runs in a thread on this machine, and round trips.

    pytest tests/test_hub.py
    python tests/test_hub.py    two tables: every case on the network path with its outcome, and the round trips

The stand-in speaks the client's plain HTTP protocol: repository info, tree, HEAD and GET with ranges, create, preupload, git-lfs
batch and commit. It does not speak Xet, the Hub's newer storage protocol, which the client uses where the server offers it; so
`HF_HUB_DISABLE_XET` is set. What differs there is how bytes travel, neither names nor the checksums that the cache is built on.
"""
import paths   # noqa: F401, for tests/tools
import base64, hashlib, json, logging, os, re, subprocess, sys, threading
from contextlib import ExitStack, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit
import huggingface_hub, huggingface_hub.file_download, pytest, torch, transformers
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from nanowhale.model.config import WhaleConfig
from nanowhale.train.data import load_tokenizer, train_tokenizer
from nanowhale.generate.sample import generate
from nanowhale.generate.hub import card, export
from nanowhale.model.whale import Whale
from nanowhale.train.files import write_json
from nanowhale.model.whale import FLOAT32
from nanowhale.train.files import INDEX, WEIGHTS, read_json
from nanowhale.generate.weights import find_folder, read_weights
from runs import PATIENCE
from test_legacy import random_old, write
from test_parity import randomise

ROOT = Path(__file__).resolve().parents[1]
NAME = 'me/whale'
transformers.utils.logging.disable_progress_bar()
huggingface_hub.utils.disable_progress_bars()

# ---------------------------------------------------------------- a small Hub

def sha256(b): return hashlib.sha256(b).hexdigest()
def git_id(b): return hashlib.sha1(b'blob %d\0' % len(b)+b).hexdigest()
def is_large(path): return path.endswith('.safetensors')

class Hub(ThreadingHTTPServer):
    "Repositories are lists of commits, a commit is {path: bytes}; `fault` maps a path to what goes wrong with it"
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos,self.private,self.blobs,self.log,self.fault,self.refs = {},{},{},[],{},{}
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        threading.Thread(target=self.serve_forever, daemon=True).start()
    def publish(self, folder, name=NAME):
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in Path(folder).rglob('*') if f.is_file()}
        self.repos.setdefault(name, []).append(files)
        return self.sha(name)
    def sha(self, name, i=-1): return hashlib.sha1(f'{name}{range(len(self.repos[name]))[i]}'.encode()).hexdigest()
    def commit(self, name, revision):
        "sha and files of a revision, or None"
        shas = {self.sha(name, i): i for i in range(len(self.repos[name]))}
        if revision in ('main', None): revision = self.sha(name)
        revision = self.refs.get(revision, revision)
        return (revision, self.repos[name][shas[revision]]) if revision in shas else None
    def gets(self): return [path for method,path,_ in self.log if method=='GET' and '/resolve/' in path]

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def answer(self, status, body=b'', **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(status)
        for k,v in {'Content-Length': str(len(body)), **{k.replace('_', '-'): v for k,v in headers.items()}}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def missing(self, code): self.answer(404, dict(error=code), X_Error_Code=code)
    def serve(self):
        hub,path = self.server,urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0)) if not self.headers.get('Transfer-Encoding') else self.chunks()
        hub.log.append((self.command, path, self.headers.get('Range')))
        if m := re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree|preupload|commit)/([^/]+))?', path):
            name,what,revision = m.groups()
            if name not in hub.repos: return self.missing('RepoNotFound')
            if what=='preupload': return self.answer(200, dict(files=[
                dict(path=f['path'], uploadMode='lfs' if is_large(f['path']) else 'regular', shouldIgnore=False) for f in json.loads(body)['files']]))
            if what=='commit': return self.receive(name, body)
            found = hub.commit(name, revision) if hub.repos[name] else ('0'*40, {})
            if not found: return self.missing('RevisionNotFound')
            sha,files = found
            if what=='tree': return self.answer(200, [dict(type='file', path=p, size=len(b), oid=git_id(b),
                **(dict(lfs=dict(oid=sha256(b), size=len(b), pointerSize=130)) if is_large(p) else {})) for p,b in files.items()])
            return self.answer(200, dict(id=name, modelId=name, sha=sha, private=hub.private.get(name, False), tags=[],
                siblings=[dict(rfilename=p) for p in files]))
        if m := re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)', path): return self.file(*m.groups())
        if path=='/api/validate-yaml': return self.answer(200, dict(errors=[], warnings=[]))
        if path=='/api/repos/create':
            ask = json.loads(body)
            name = f"{ask.get('organization') or 'me'}/{ask['name']}"
            if 'Bearer good' not in self.headers.get('Authorization', ''): return self.answer(401, dict(error='Invalid username or password.'))
            if name in hub.repos: return self.answer(409, dict(error='You already created this model repo', url=f'{hub.url}/{name}'))
            hub.repos[name],hub.private[name] = [],bool(ask.get('private') or ask.get('visibility')=='private')
            return self.answer(200, dict(url=f'{hub.url}/{name}'))
        if path.endswith('.git/info/lfs/objects/batch'):
            return self.answer(200, dict(objects=[dict(oid=o['oid'], size=o['size'], **({} if o['oid'] in hub.blobs else
                dict(actions=dict(upload=dict(href=f"{hub.url}/lfs/{o['oid']}"))))) for o in json.loads(body)['objects']]))
        if path.startswith('/lfs/') and self.command=='PUT':
            hub.blobs[sha256(body)] = body
            return self.answer(200)
        self.missing('EntryNotFound')
    do_GET = do_HEAD = do_POST = do_PUT = serve
    def chunks(self):
        parts = []
        while n := int(self.rfile.readline(), 16): parts.append(self.rfile.read(n)); self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)
    def receive(self, name, body):
        "A commit: one JSON object a line"
        files = dict(self.server.repos[name][-1]) if self.server.repos[name] else {}
        for line in map(json.loads, body.decode().strip().split('\n')):
            v = line['value']
            if line['key']=='file': files[v['path']] = base64.b64decode(v['content'])
            if line['key']=='lfsFile': files[v['path']] = self.server.blobs[v['oid']]
        self.server.repos[name].append(files)
        self.answer(200, dict(commitUrl=f'{self.server.url}/{name}/commit/{self.server.sha(name)}', commitOid=self.server.sha(name), success=True))
    def file(self, name, revision, path):
        hub = self.server
        if name not in hub.repos: return self.missing('RepoNotFound')
        found = hub.commit(name, revision)
        if not found: return self.missing('RevisionNotFound')
        sha,files = found
        if path not in files: return self.answer(404, dict(error='no such entry'), X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
        data,fault = files[path],hub.fault.get(path) or {}
        head = dict(X_Repo_Commit=sha, ETag=f'"{sha256(data) if is_large(path) else git_id(data)}"', Accept_Ranges='bytes')
        if is_large(path): head |= dict(X_Linked_Etag=head['ETag'], X_Linked_Size=str(len(data)))
        if self.command=='HEAD': return self.answer(200, data, **head)
        if 'flip' in fault: data = data[:fault['flip']]+bytes([data[fault['flip']]^1])+data[fault['flip']+1:]
        if 'short' in fault: data = data[:-fault['short']]
        start = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].split('-')[0])
        part = data[start:]
        self.send_response(206 if start else 200)
        for k,v in {**head, 'Content-Length': len(part), **({'Content-Range': f'bytes {start}-{len(data)-1}/{len(data)}'} if start else {})}.items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if fault.get('cuts', 0)>0:
            fault['cuts'] -= 1
            part = part[:fault['after']]
            self.close_connection = True
        self.wfile.write(part)
        if self.close_connection: self.wfile.flush(); self.connection.shutdown(2)

@contextmanager
def online(hub, cache, token='good'):
    "Point the client of this process at `hub` and at an empty cache; what the environment variables would do before the import"
    values = dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=hub.url+'/{repo_id}/resolve/{revision}/{filename}', HF_HUB_OFFLINE=False,
        HF_HUB_CACHE=str(cache), HF_HUB_DISABLE_XET=True, DOWNLOAD_CHUNK_SIZE=1000, HF_HUB_DISABLE_TELEMETRY=True)
    with ExitStack() as stack:
        for k,v in values.items(): stack.enter_context(patch.object(constants, k, v))
        stack.enter_context(patch.dict(os.environ, dict(HF_TOKEN=token, NO_PROXY='127.0.0.1')))
        stack.enter_context(patch.object(huggingface_hub.file_download.time, 'sleep', lambda s: None))
        huggingface_hub.close_session()
        try: yield
        finally: huggingface_hub.close_session()

# ---------------------------------------------------------------- a whale to send around

def small():
    return WhaleConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16,
        o_groups=2, o_lora_rank=8, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, hc_mult=3, max_position_embeddings=128,
        initializer_range=0.2)

def make_run(folder):
    "What `train` leaves: weights, tokenizer, card, log, and the trainer's state"
    torch.manual_seed(3)
    whale,tok = randomise(Whale(small())),train_tokenizer(['The whale sings to the sea, and the sea answers. '*3], 300)
    folder.mkdir(parents=True)
    whale.save_pretrained(folder); tok.save_pretrained(folder)
    write_json(folder/'generation_config.json', dict(bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.7, top_k=40))
    write_json(folder/'run.json', dict(preset='tiny', seed=0, version='0.1', recipe=dict(data=None, steps=3)))
    write_json(folder/'results.json', {'held-out bits per byte': 2.5})
    (folder/'metrics.jsonl').write_text('{}\n')
    return folder

@pytest.fixture(scope='module')
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp('hub')/'run')

def same_state(a, b): return set(a)==set(b) and all(a[k].dtype==b[k].dtype and torch.equal(a[k], b[k]) for k in a)
def says(f, *words):
    "The one line that `f` ends in, which holds the words"
    with pytest.raises((ValueError, OSError)) as e: f()
    text = str(e.value)
    assert '\n' not in text and len(text)<600 and all(w in text for w in words), text
    return text

@pytest.mark.parametrize('data,said', [('/home/somebody/texts/words.jsonl', 'words.jsonl'), ('./texts', 'texts'), ('~/texts', 'texts'),
    ('org/set', 'org/set'), (None, 'the English that ships with CPython')])
def test_a_card_names_a_data_set_and_no_path(tmp_path, data, said):
    folder = make_run(tmp_path/'run')
    write_json(folder/'run.json', read_json(folder/'run.json')|dict(recipe=dict(data=data)))
    text = card(folder, Whale(small()), NAME)
    assert f' on {said}, seed' in text and (data==said or data is None or data not in text)

# ---------------------------------------------------------------- the network path, case by case; each returns its outcome in words

def cold_download(hub, run, cache):
    (run/'modeling_evil.py').write_text('raise SystemExit("ran")'); (run/'pytorch_model.bin').write_bytes(b'pickle')
    hub.publish(run)
    for f in ('modeling_evil.py', 'pytorch_model.bin'): (run/f).unlink()
    whale = Whale.from_pretrained(NAME)
    assert same_state(whale.state_dict(), read_weights(run))
    got = sorted(p.split('/main/')[-1].split('/', 5)[-1] for p in hub.gets())
    assert got==['config.json', 'generation_config.json', WEIGHTS, 'tokenizer.json', 'tokenizer_config.json'], got
    assert len(load_tokenizer(find_folder(NAME)))==len(load_tokenizer(run))
    return f'{len(got)} files, bit-equal; code, pickles and trainer/ not fetched'

def cache_hit(hub, run, cache):
    hub.publish(run)
    Whale.from_pretrained(NAME); n = len(hub.gets())
    asked = len(hub.log)
    Whale.from_pretrained(NAME)
    assert len(hub.gets())==n
    return f'0 files again, {len(hub.log)-asked} question(s) to the Hub'

def no_network(hub, run, cache):
    hub.publish(run)
    want = Whale.from_pretrained(NAME).state_dict()
    hub.shutdown(); hub.server_close()
    huggingface_hub.close_session()      # the client keeps connections open
    assert same_state(Whale.from_pretrained(NAME).state_dict(), want)
    says(lambda: Whale.from_pretrained('me/other'), 'me/other', 'cannot be reached')
    return 'from the cache; what is not there: one line'

def pinned(hub, run, cache):
    first = hub.publish(run)
    hub.repos[NAME].append({k: v for k,v in hub.repos[NAME][0].items() if k!='config.json'}|{'config.json': b'{}'})
    hub.refs['v1'] = first
    says(lambda: Whale.from_pretrained(NAME), 'config.json')
    for revision in ('v1', first): assert same_state(Whale.from_pretrained(NAME, revision=revision).state_dict(), read_weights(run))
    says(lambda: Whale.from_pretrained(NAME, revision='v2'), NAME, "no revision 'v2'")
    return 'tag and commit load, a broken main does not disturb them; unknown: one line'

def missing_repo(hub, run, cache):
    return says(lambda: Whale.from_pretrained(NAME), NAME, 'no such model')

def missing_file(hub, run, cache):
    hub.publish(run)
    del hub.repos[NAME][0][WEIGHTS]
    return says(lambda: Whale.from_pretrained(NAME), WEIGHTS).split(': ', 1)[1]

def truncated(hub, run, cache):
    hub.publish(run)
    hub.fault[WEIGHTS] = dict(short=1000)
    text = says(lambda: Whale.from_pretrained(NAME), NAME, 'Consistency check failed')
    hub.fault.clear()
    assert same_state(Whale.from_pretrained(NAME).state_dict(), read_weights(run))
    return f'noticed by the client ({re.search("file should be.*?has size [0-9]+", text)[0]}); loads once the Hub is whole'

def cut_and_resumed(hub, run, cache):
    hub.publish(run)
    hub.fault[WEIGHTS] = dict(cuts=3, after=50_000)
    assert same_state(Whale.from_pretrained(NAME).state_dict(), read_weights(run))
    starts = [r for m,p,r in hub.log if m=='GET' and p.endswith(WEIGHTS)]
    assert starts==[None, 'bytes=50000-', 'bytes=100000-', 'bytes=150000-'], starts
    return '3 cuts, 3 resumed where they broke, bit-equal'

def cut_for_good(hub, run, cache):
    hub.publish(run)
    hub.fault[WEIGHTS] = dict(cuts=10**9, after=0)
    says(lambda: Whale.from_pretrained(NAME), NAME, 'failed')
    hub.fault.clear()
    assert same_state(Whale.from_pretrained(NAME).state_dict(), read_weights(run))
    return f'given up after {sum(p.endswith(WEIGHTS) for p in hub.gets())-1} tries; loads once the line is back'

def wrong_checksum(hub, run, cache):
    "A bit flipped within the numbers: the header stays valid and the size is right, so only a checksum can tell"
    hub.publish(run)
    hub.fault[WEIGHTS] = dict(flip=-100 % len(hub.repos[NAME][0][WEIGHTS]))
    client = huggingface_hub.snapshot_download(NAME, allow_patterns=[WEIGHTS])      # no error: it does not look
    assert read_weights(client)
    says(lambda: Whale.from_pretrained(NAME), WEIGHTS, 'checksum', 'delete')
    hub.fault.clear()
    says(lambda: Whale.from_pretrained(NAME), WEIGHTS, 'checksum')                  # the damaged blob is still in the cache
    (Path(client)/WEIGHTS).resolve().unlink()
    assert same_state(Whale.from_pretrained(NAME).state_dict(), read_weights(run))
    return 'not noticed by the client; ours names the file and the blob to delete'

def wrong_checksum_json(hub, run, cache):
    hub.publish(run)
    hub.fault['config.json'] = dict(flip=hub.repos[NAME][0]['config.json'].index(b'"rope_theta": 1')+14)
    says(lambda: Whale.from_pretrained(NAME), 'config.json', 'checksum')
    return 'one digit of config.json changed: noticed by ours (git object id)'

def upload(hub, run, cache):
    assert export(run, push=NAME, dtype='bfloat16', private=True)==[f'{hub.url}/{NAME}']
    sent, = hub.repos[NAME]
    assert sorted(sent)==['README.md', 'config.json', 'generation_config.json', WEIGHTS, 'tokenizer.json', 'tokenizer_config.json'] and hub.private[NAME]
    assert f'from_pretrained("{NAME}")' in sent['README.md'].decode() and '2.5' in sent['README.md'].decode() and str(run) not in str(sent['README.md'])
    back = Whale.from_pretrained(NAME).state_dict()
    assert all(torch.equal(v, (x if FLOAT32.search(k) else x.bfloat16())) for (k,v),x in zip(back.items(), Whale.from_pretrained(run).state_dict().values()))
    return 'private, 6 files in one commit (weights by git-lfs), loads back bit-equal'

def upload_again(hub, run, cache):
    export(run, push=NAME); puts = sum(m=='PUT' for m,*_ in hub.log)
    export(run, push=NAME)
    assert sum(m=='PUT' for m,*_ in hub.log)==puts and len(hub.repos[NAME])<=2
    return 'the weights are not sent twice'

def upload_not_private(hub, run, cache):
    hub.publish(run)
    n = len(hub.repos[NAME])
    text = says(lambda: export(run, push=NAME, private=True), 'is public; nothing was sent')
    assert len(hub.repos[NAME])==n
    return text.split(': ', 1)[1]

def upload_no_login(hub, run, cache):
    with patch.dict(os.environ, HF_TOKEN='bad'): text = says(lambda: export(run, push=NAME), NAME, 'log in with `hf auth login`')
    assert not hub.repos
    return text.split(': ', 1)[1]

CASES = [cold_download, cache_hit, no_network, pinned, missing_repo, missing_file, truncated, cut_and_resumed, cut_for_good, wrong_checksum,
    wrong_checksum_json, upload, upload_again, upload_not_private, upload_no_login]

def play(case, run, cache):
    hub = Hub()
    with online(hub, cache): outcome = case(hub, run, cache)
    hub.shutdown(); hub.server_close()
    return outcome

@pytest.mark.parametrize('case', CASES, ids=lambda c: c.__name__)
def test_network_path(case, run, tmp_path): print(play(case, run, tmp_path/'cache'))

def test_the_commands_as_a_user_meets_them(run, tmp_path):
    "In a process of their own, with nothing but environment variables: a cold download, and a mistyped name"
    hub = Hub()
    hub.publish(run)
    env = {k: v for k,v in os.environ.items() if not k.startswith('HF_')} | dict(PYTHONPATH=str(ROOT), HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path/'home'),
        HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1')
    def nanowhale(*words):
        return subprocess.run([sys.executable, '-c', 'import sys; from nanowhale.cli import main; sys.exit(main())', *words], env=env, cwd=tmp_path,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    here,there = nanowhale('generate', 'The whale', '--tokens', '9', '--seed', '1', '--model', str(run)),nanowhale('generate', 'The whale', '--tokens', '9',
        '--seed', '1', '--model', NAME, '--revision', hub.sha(NAME))
    assert here.returncode==there.returncode==0 and here.stdout==there.stdout, there.stderr
    wrong = nanowhale('info', '--model', 'me/wale')
    assert wrong.returncode==1 and wrong.stderr.startswith('nanowhale: me/wale: no such folder here, and the Hub shows no such model')
    assert wrong.stderr.count('\n')==1
    assert nanowhale('export', str(run), '--out', 'out', '--dtype', 'bfloat16').stdout.strip()=='exported to out'
    assert read_json(tmp_path/'out'/'config.json')['dtype']=='bfloat16'
    hub.shutdown(); hub.server_close()

def test_an_older_checkpoint_by_its_name(tmp_path):
    "As `HuggingFaceTB/nanowhale-100m-base`: code beside the weights, which is not even downloaded"
    c,state = random_old(8)
    folder = write(tmp_path/'old', c, state, '_orig_mod.')
    (folder/'modeling_deepseek_v4.py').write_text('raise SystemExit("ran")')
    hub = Hub()
    hub.publish(folder, 'HuggingFaceTB/nanowhale-100m-base')
    with online(hub, tmp_path/'cache'): whale = Whale.from_pretrained('HuggingFaceTB/nanowhale-100m-base')
    assert same_state(whale.state_dict(), Whale.from_pretrained(folder).state_dict()) and not any(p.endswith('.py') for p in hub.gets())
    hub.shutdown(); hub.server_close()

# ---------------------------------------------------------------- round trips

def trunk(state): return {k: v for k,v in state.items() if not k.startswith('mtp.')}

def quiet_load(folder, **kw):
    "transformers' model; it must find nothing missing, unexpected or of the wrong shape, and say nothing at all"
    lines,catcher,logger = [],logging.Handler(logging.INFO+1),logging.getLogger('transformers')
    catcher.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(catcher)
    with patch.object(logger, 'level', logging.WARNING): hf,info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kw)
    logger.removeHandler(catcher)
    assert not any(info.values()) and not lines and type(hf).__name__=='DeepseekV4ForCausalLM', (info, lines)
    return hf

def trip(run, tmp, dtype=None, size=None):
    "Ours, exported, loaded and saved by transformers, loaded by ours again; the outcome in words"
    export(run, out=str(tmp/'out'), dtype=dtype, max_shard_size=size)
    assert (tmp/'out'/INDEX).exists()==bool(size) and AutoConfig.from_pretrained(tmp/'out').model_type=='deepseek_v4'
    ours = Whale.from_pretrained(tmp/'out')
    assert dtype or same_state(ours.state_dict(), Whale.from_pretrained(run).state_dict())
    hf = quiet_load(tmp/'out')
    assert hf.dtype==(torch.bfloat16 if dtype else torch.float32)
    hf.save_pretrained(tmp/'theirs', max_shard_size=size or '1GB')
    back = Whale.from_pretrained(tmp/'theirs').state_dict()
    want = {k: v.bfloat16() if dtype and k.endswith('gate.weight') else v for k,v in trunk(ours.state_dict()).items()}
    assert same_state(back, want)
    tok = AutoTokenizer.from_pretrained(tmp/'out')
    prompt = tok('The whale', return_tensors='pt')
    same = Whale.from_state_dict(ours.cfg, want).float()
    with torch.no_grad(): error = (hf.float()(prompt.input_ids).logits-same(prompt.input_ids).logits).abs().max().item()
    assert error<1e-5
    whole = quiet_load(tmp/'out', dtype=torch.float32)
    said = whole.generate(**prompt, max_new_tokens=15, do_sample=False)
    assert said.tolist()==generate(ours.float(), prompt.input_ids, 15, temperature=0).tolist()
    pipe = pipeline('text-generation', model=str(tmp/'out'))('The whale', max_new_tokens=15, do_sample=False)[0]['generated_text']
    assert dtype or pipe==tok.decode(said[0], skip_special_tokens=True)
    cast = ', but for the router\'s matrix, which it rounds' if dtype else ''
    return f'trunk bit-equal{cast}; MTP kept by ours, ignored in silence by theirs; logits within {error:.0e}; generate: same ids'

TRIPS = {'float32': {}, 'float32, shards of 20KB': dict(size='20KB'), 'bfloat16': dict(dtype='bfloat16'),
    'bfloat16, shards of 20KB': dict(dtype='bfloat16', size='20KB')}

@pytest.mark.parametrize('name', TRIPS)
def test_round_trip(name, run, tmp_path): print(trip(run, tmp_path, **TRIPS[name]))

def test_a_warning_would_be_noticed(run, tmp_path):
    "The check itself: a tensor too many makes transformers speak up, in the log or in its report"
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(run, tmp_path/'run')
    save_file(load_file(run/WEIGHTS)|{'model.extra.weight': torch.ones(2)}, tmp_path/'run'/WEIGHTS, metadata={'format': 'pt'})
    with pytest.raises(AssertionError) as e: quiet_load(tmp_path/'run')
    assert 'model.extra.weight' in str(e.value) and "[]))" not in str(e.value)
    quiet_load(run)

def test_the_type_of_a_bfloat16_run_can_be_raised(run, tmp_path):
    export(run, out=str(tmp_path/'half'), dtype='bfloat16')
    export(tmp_path/'half', out=str(tmp_path/'full'), dtype='float32')
    half,full = read_weights(tmp_path/'half'),read_weights(tmp_path/'full')
    assert {v.dtype for v in full.values()}=={torch.float32} and all(torch.equal(v.float(), full[k]) for k,v in half.items())

def test_an_older_checkpoint_is_not_passed_off_as_native(tmp_path):
    c,state = random_old(9)
    folder = write(tmp_path/'old', c, state)
    train_tokenizer(['a whale'], 258).save_pretrained(folder)
    says(lambda: export(folder, out=str(tmp_path/'out')), 'hc_transposed', 'transformers has no such switch')
    assert not (tmp_path/'out').exists()

BAD_TOKENIZERS = dict(   # what tokenizer.json holds -> what the one line must name
    nothing=b'',
    half=b'{"version": "1.0", "added_tokens": [], "model"', a_list=b'[]', deep=b'['*10**5, deep_value=b'{"version": '+b'['*10**5, not_utf8=b'\xff\xfe{}',
    no_vocabulary=b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}', unknown_model=b'{"version": "1.0", "model": {"type": "Evil"}}',
    wrong_types=b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": "b"}, "merges": 3}}',
    huge_id=b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 99999999999999}, "merges": []}}')

TOKENIZERS = """
import json, resource, sys
from nanowhale.train.data import load_tokenizer
from nanowhale.generate.weights import find_folder
load_tokenizer(sys.argv[1]).encode('a whale')
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used+2**29, -1))
for folder in sys.argv[2:]:
    try: print(json.dumps(f'{len(load_tokenizer(find_folder(folder)))} tokens'))
    except (ValueError, OSError) as e: print(json.dumps(str(e)))
"""

@pytest.mark.skipif(sys.platform!='linux', reason='limits memory as Linux does')
def test_a_hostile_tokenizer_is_one_clear_line(run, tmp_path):
    import shutil
    folders = [tmp_path/n for n in [*BAD_TOKENIZERS, 'terabyte']]
    for f in folders: shutil.copytree(run, f, ignore=shutil.ignore_patterns('trainer'))
    for f,b in zip(folders, BAD_TOKENIZERS.values()): (f/'tokenizer.json').write_bytes(b)
    os.truncate(tmp_path/'terabyte'/'tokenizer.json', 2**40)
    done = subprocess.run([sys.executable, '-c', TOKENIZERS, str(run), *map(str, folders)], env=os.environ|dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1'),
        capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    lines = dict(zip([f.name for f in folders], map(json.loads, done.stdout.splitlines())))
    print('\n'.join(f'{k:16}{v.replace(str(tmp_path), "")}' for k,v in lines.items()))
    assert len(lines)==len(folders), done.stderr[-2000:]
    for name,line in lines.items():
        assert '\n' not in line and len(line)<600 and str(tmp_path/name) in line, (name, line)
    assert 'tokenizer.json: 1,099,511,627,776 bytes' in lines['terabyte']

def test_a_tokenizer_of_another_model_is_one_clear_line(run, tmp_path):
    "Ids beyond the model's vocabulary"
    import shutil
    shutil.copytree(run, tmp_path/'run')
    big = train_tokenizer(['every whale sings its own long song '+chr(0x100+i)*3 for i in range(400)], 600)
    whale = Whale.from_pretrained(tmp_path/'run')
    with pytest.raises(ValueError, match='outside the vocabulary, 0 to 299; is this the right tokenizer'):
        generate(whale, big(''.join(chr(0x100+i)*3 for i in range(400)), return_tensors='pt').input_ids, 2)

def test_a_tokenizer_never_asks_to_run_code(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path/'run')
    path = tmp_path/'run'/'tokenizer_config.json'
    path.write_text(json.dumps(read_json(path)|dict(tokenizer_class='Strange', auto_map=dict(AutoTokenizer=['tok.Strange', None]))))
    (tmp_path/'run'/'tok.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")\nclass Strange: pass')
    old = tuple(map(int, transformers.__version__.split('.')[:2]))<(5, 22)   # these take the plain class instead
    with patch('builtins.input', return_value='y') as asked, nullcontext() if old else pytest.raises(ValueError): load_tokenizer(tmp_path/'run')
    assert not asked.called and not (tmp_path/'ran').exists()

if __name__=='__main__':
    import tempfile
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity(50)
    with tempfile.TemporaryDirectory() as d:
        run = make_run(Path(d)/'run')
        for i,case in enumerate(CASES): print(f'| {case.__name__.replace("_", " "):20} | {play(case, run, Path(d)/str(i)).replace(d, "...")} |')
        print()
        for i,(name,kw) in enumerate(TRIPS.items()): print(f'| {name:24} | {trip(run, Path(d)/f"t{i}", **kw)} |')
