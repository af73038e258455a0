"""The explorers' JavaScript beside the package: rotation, Sinkhorn, tokens, and the logits of a whole whale. Pages in a browser: slow"""
import ast, importlib.util, json, random, re, shutil, subprocess
from pathlib import Path
from pydoc_data.topics import topics
import pytest, torch
from torch.testing import assert_close
import browser
from runs import PATIENCE
from nanowhale.model.config import WhaleConfig
from nanowhale.validate import number_fields
from nanowhale.presets import tiny, tiny_v4
from nanowhale.train.data import load_tokenizer, train_tokenizer
from nanowhale.generate.sample import generate
from nanowhale.model.hyper import sinkhorn
from nanowhale.model.attention import attend
from nanowhale.model.visibility import window_mask
from nanowhale.generate.cache import Cache
from nanowhale.model.whale import Whale
from nanowhale.model.moe import SCORES, route
from nanowhale.model.rope import rope_cos_sin, rotate

EXPLORERS = Path(__file__).resolve().parents[1]/'nbs'/'site'/'explorers'
ENGLISH = list(topics.values())
spec = importlib.util.spec_from_file_location('explorers_build', EXPLORERS/'build.py')
build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build)

needs_node = pytest.mark.skipif(not shutil.which('node'), reason='needs node, which runs the JavaScript')

HEAD = '''import fs from "node:fs"
import * as whale from "WHALE"
import {Tokenizer} from "TOKENIZER"
const given = JSON.parse(fs.readFileSync(0)), read = name => fs.readFileSync(given.folder+"/"+name), json = name => JSON.parse(read(name))
const load = () => { const b = read("model.safetensors")
  return new whale.Whale(json("config.json"), b.buffer.slice(b.byteOffset, b.byteOffset+b.length)) }
const say = x => console.log(JSON.stringify(x, (_, v) => ArrayBuffer.isView(v) ? Array.from(v) : v))
'''

def js(code, whale=EXPLORERS/'whale.js', **given):
    "What a few lines of JavaScript say, given some values"
    head = HEAD.replace('WHALE', whale.as_uri()).replace('TOKENIZER', (EXPLORERS/'tokenizer.js').as_uri())
    res = subprocess.run(['node', '--input-type=module', '-e', head+code], input=json.dumps(given), capture_output=True, text=True, timeout=PATIENCE)
    assert res.returncode==0, res.stderr[-3000:]
    return json.loads(res.stdout)

# ---------------------------------------------------------------- the parts

@needs_node
def test_rotation():
    torch.manual_seed(0)
    x,pos,theta = torch.randn(5,1,12),torch.tensor([0, 1, 7, 100, 511]),500.
    there = js('say(given.x.map((x, i) => whale.rotate(x, whale.ropeAngles(given.pos[i], 8, given.theta))))', x=x[:,0].tolist(), pos=pos.tolist(), theta=theta)
    cos,sin = rope_cos_sin(pos, 8, theta)
    assert_close(torch.tensor(there)[:,None], rotate(x, cos, sin), rtol=0, atol=1e-4)
    back = js('say(given.x.map((x, i) => whale.rotate(x, whale.ropeAngles(given.pos[i], 8, given.theta), -1)))', x=there, pos=pos.tolist(), theta=theta)
    assert_close(torch.tensor(back), x[:,0], rtol=0, atol=1e-6)

@needs_node
def test_sinkhorn():
    torch.manual_seed(0)
    cases = [(n, iters, (size*torch.randn(n, n)).double()) for n in (2, 3, 4) for iters in (1, 2, 20) for size in (.5, 3, 30)]
    got = js('say(given.cases.map(([iters, logits]) => whale.sinkhorn(logits, iters)))', cases=[[i, x.flatten().tolist()] for _,i,x in cases])
    for (n,iters,x),y in zip(cases, got): assert_close(torch.tensor(y, dtype=torch.float64).view(n, n), sinkhorn(x, iters), rtol=1e-9, atol=1e-12)

@needs_node
@pytest.mark.parametrize('name', SCORES)
def test_routing(name):
    torch.manual_seed(0)
    z,bias = torch.cat([3*torch.randn(20,6), 100*torch.randn(20,6)]).double(),torch.randn(6).double()/2
    code = 'say(given.z.map(z => { const s = whale.SCORES[given.name](z); return [s, whale.route(s, given.bias, 2, 1.5)] }))'
    got,scores = js(code, z=z.tolist(), bias=bias.tolist(), name=name),SCORES[name](z)
    idx,w = route(scores, bias, 2, 1.5)
    assert_close(torch.tensor([g[0] for g in got]).double(), scores, rtol=1e-6, atol=1e-9)
    assert [g[1]['experts'] for g in got]==idx.tolist()
    assert_close(torch.tensor([g[1]['weights'] for g in got]).double(), w, rtol=1e-6, atol=1e-9)

@needs_node
def test_choosing_a_token():
    z = [1., 3., -2., 3.5, 0., 2.]
    greedy,top,cold = js('say([[0], [1, 3], [.5]].map(rules => whale.probabilities(given.z, ...rules)))', z=z)
    assert greedy==[0, 0, 0, 1, 0, 0]
    assert_close(torch.tensor(top), torch.tensor([-torch.inf, 3, -torch.inf, 3.5, -torch.inf, 2]).softmax(0))
    assert_close(torch.tensor(cold), (2*torch.tensor(z)).softmax(0))
    assert js('say([0, .1, .75, .999999, 1].map(r => whale.draw([0, .25, .5, .25, 0], r)))')==[1, 1, 3, 3, 3]

# ---------------------------------------------------------------- whole whales

TEXTS = ['', ' ', 'The whale sings.', "  it's   we'll\n\n\tDON'T 'quoted'\n", 'def f(x, *, y=3.14): return x**2  # 100%\n    ',
    'naïve café — Ωmega 鯨が歌う 🐳🐋 ½ ⅷ',
    'a<|bos|>b<|eos|>', '<|bos', 'line\r\nline\x85line\u2028 \ufeffx\u00a0y\u3000z\u200bz', '\x00\x01\x7f\x80ÿ', 'a    \ufeffx    \x85y     \x85    z',
    '1234567890'*5, '.'*70+' '*33+'x', 'e\u0301\u200d']

def whale_folder(folder, seed=0, **sizes):
    "A small whale with random weights in which nothing is zero, and a tokenizer of its own"
    torch.manual_seed(seed)
    tok = train_tokenizer(ENGLISH[:40], 400)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=6, head_dim=10, qk_rope_head_dim=4, q_lora_rank=12, o_groups=3, o_lora_rank=5,
        sliding_window=8, moe_intermediate_size=14, n_routed_experts=5, num_experts_per_tok=3, hc_mult=3, swiglu_limit=0.5) | sizes
    whale = Whale(type(tiny())(**(vars(tiny(len(tok))) | sizes)))
    with torch.no_grad():
        for name,p in [*whale.named_parameters(), *whale.named_buffers()]: p.add_(torch.randn_like(p)*(0.3 if p.ndim<2 else 0.15))
    whale.save_pretrained(folder); tok.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return whale_folder(tmp_path_factory.mktemp('explorers')/'whale')

BOTH = '''const model = load(), memory = model.memory(), first = [], second = []
    given.ids.forEach((id, i) => { const step = model.step(id, memory), told = given.ids[i+1]
      first.push(step.logits); if (i+1<given.ids.length) second.push(model.second(step, told, memory)) })
    say([first, second])'''
READ = 'const model = load(), memory = model.memory(); say(given.ids.map(id => model.step(id, memory).logits))'

@needs_node
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits(folder, tmp_path, dtype):
    "More tokens than the window holds: all at once and one by one in PyTorch, one by one in JavaScript, from both heads"
    whale,ids = build.export(folder, tmp_path, dtype),random.Random(0).choices(range(400), k=29)
    whole,cache = build.logits(whale, ids),Cache(whale.cfg)
    with torch.no_grad(): steps = torch.cat([whale(torch.tensor([[i]]), cache=cache).logits[0] for i in ids])
    got,second = map(torch.tensor, js(BOTH, folder=str(tmp_path), ids=ids))
    assert min(whole.std(), build.second(whale, ids).std())>0.3, 'logits that differ too little to be compared'
    assert_close(got, whole, rtol=0, atol=1e-4)
    assert_close(got, steps, rtol=0, atol=1e-4)
    assert_close(second, build.second(whale, ids), rtol=0, atol=1e-4)

def test_the_second_guess_is_the_one_that_was_trained(folder):
    "Its loss on what came is the one that training sees"
    whale,ids = Whale.from_pretrained(folder),random.Random(3).choices(range(400), k=29)
    with torch.no_grad(): want = whale(torch.tensor([ids]), labels=torch.tensor([ids])).mtp_loss
    assert_close(torch.nn.functional.cross_entropy(build.second(whale, ids)[:-1], torch.tensor(ids[2:])), want)

PLANTED = {   # what goes wrong -> what stands in whale.js or in the loop above, and what takes its place
    'comb transposed': ('comb[j*N+k]', 'comb[k*N+j]'),
    'post without its factor': ('2*sigmoid(z)', 'sigmoid(z)'),
    'told its own token once more': ('told = given.ids[i+1]', 'told = id'),
    'told the token after next': ('told = given.ids[i+1]', 'told = given.ids[i+2] ?? id'),
    'the keys of the last layer': ('memory.mtp, true', 'memory.layers.at(-1), true'),
    'keys forgotten': ('memory.mtp, true', '[], true'),
    'the collapse of the trunk': ("this.read('mtp.0.hc_head'", "this.read('model.hc_head'"),
    'the norm of the trunk': ("'mtp.0.norm'", "'model.norm'"),
    'the norms swapped': ("this.norm('mtp.0.enorm'", "this.norm('mtp.0.hnorm'")}

@needs_node
@pytest.mark.parametrize('name', PLANTED)
def test_a_planted_bug_moves_the_logits(folder, tmp_path, name):
    "The comparison above can fail: each of these is ten times what it lets pass, and more"
    source,(right,wrong) = (EXPLORERS/'whale.js').read_text(encoding='utf-8'),PLANTED[name]
    assert (source+BOTH).count(right)==1
    (tmp_path/'whale.mjs').write_text(source.replace(right, wrong), encoding='utf-8')
    ids = random.Random(0).choices(range(400), k=29)
    first,second = map(torch.tensor, js(BOTH.replace(right, wrong), tmp_path/'whale.mjs', folder=str(folder), ids=ids))
    whale = Whale.from_pretrained(folder)
    assert max((first-build.logits(whale, ids)).abs().max(), (second-build.second(whale, ids)).abs().max())>1e-2

@needs_node
def test_a_whale_without_a_second_guess(tmp_path):
    "It runs, says that it has none, and its check asks for none"
    folder,ids = whale_folder(tmp_path/'whole', num_nextn_predict_layers=0),[5, 17, 200]
    whale = build.export(folder, tmp_path/'small')
    got,twice = js('const model = load(), memory = model.memory(); say([given.ids.map(id => model.step(id, memory).logits), model.guessesTwice])',
        folder=str(tmp_path/'small'), ids=ids)
    assert_close(torch.tensor(got), build.logits(whale, ids), rtol=0, atol=1e-4)
    assert not twice and 'second' not in json.loads((tmp_path/'small/check.json').read_text())

@needs_node
def test_the_small_file_is_the_whale(folder, tmp_path):
    "Rounded matrices cost little; the file has half the bytes"
    build.export(folder, tmp_path)
    ids = list(range(50, 70))
    assert_close(torch.tensor(js(READ, folder=str(tmp_path), ids=ids)), build.logits(Whale.from_pretrained(folder), ids), rtol=0, atol=0.02)
    check = json.loads((tmp_path/'check.json').read_text())
    for got,name in zip(js(BOTH, folder=str(tmp_path), ids=check['ids']), ('logits', 'second')):
        assert_close(torch.tensor(got[-1]), torch.tensor(check[name]), rtol=0, atol=1e-4)

@needs_node
@pytest.mark.parametrize('sizes', [dict(hc_mult=1), dict(scoring_func='softmax', sliding_window=64),
    dict(scoring_func='sigmoid', qk_rope_head_dim=10)], ids=str)
def test_other_sizes(tmp_path, sizes):
    folder,ids = whale_folder(tmp_path, seed=1, **sizes),[5, 17, 200, 6, 0, 399, 8, 8, 8, 90, 91]
    for got,f in zip(js(BOTH, folder=str(folder), ids=ids), (build.logits, build.second)):
        assert_close(torch.tensor(got), f(Whale.from_pretrained(folder), ids), rtol=0, atol=1e-4)

def mixes(whale, ids):
    "Of each sublayer of the trunk, in order: pre [T,N], post [T,N] and comb [T,N,N]"
    seen = []
    hooks = [hc.register_forward_hook(lambda m, i, o: seen.append([x[0] for x in o])) for l in whale.model.layers for hc in (l.attn_hc, l.ffn_hc)]
    build.logits(whale, ids)
    for h in hooks: h.remove()
    return seen

@needs_node
def test_what_a_step_shows(folder):
    ids = random.Random(1).choices(range(400), k=12)
    code = '''const model = load(), run = rules => { const memory = model.memory(); return given.ids.map(id => model.step(id, memory, rules)) }
        say([run(), run({bias: false})])'''
    on,off = js(code, folder=str(folder), ids=ids)
    for t,step in enumerate(on):
        for layer in step['layers']:
            assert [len(h['weights']) for h in layer['heads']]==[min(t+1, 8)]*6
            for h in layer['heads']: assert abs(sum(h['weights'])+h['sink']-1)<1e-9 and h['sink']>0
            assert abs(sum(layer['moe']['weights'])-1.5)<1e-6 and len(set(layer['moe']['experts']))==3
    whale,inputs = Whale.from_pretrained(folder),[]
    hooks = [layer.self_attn.register_forward_pre_hook(lambda m, args: inputs.append((m, *args))) for layer in whale.model.layers]
    build.logits(whale, ids)
    for h in hooks: h.remove()
    mask = window_mask(torch.arange(12), torch.arange(12), 8)
    for l,(attention,x,rope,*_) in enumerate(inputs):
        with torch.no_grad(): q,kv = attention.query(x, *rope),attention.latent(x, *rope)
        lse = attend(q, kv, attention.sinks, mask)[1][0]
        p = (torch.einsum('thk,sk->ths', q[0], kv[0])*10**-0.5-lse[...,None]).exp()
        for t,step in enumerate(on):
            heads = step['layers'][l]['heads']
            assert_close(torch.tensor([h['weights'] for h in heads]), p[t,:,max(0, t-7):t+1], rtol=0, atol=1e-5)
            assert_close(torch.tensor([h['sink'] for h in heads]), (attention.sinks-lse[t]).exp(), rtol=0, atol=1e-5)
    for i,(pre,post,comb) in enumerate(mixes(whale, ids)):
        there = [step['layers'][i//2]['mixes'][i%2] for step in on]
        for name,want in dict(pre=pre, post=post, comb=comb.flatten(1)).items():
            assert_close(torch.tensor([m[name] for m in there]), want, rtol=0, atol=1e-5)
        assert (comb-comb.mT).abs().max()>0.05, 'a mix like its transpose shows nothing'
    for layer in whale.model.layers: layer.mlp.gate.e_score_correction_bias.zero_()
    assert_close(torch.tensor([s['logits'] for s in off]), build.logits(whale, ids), rtol=0, atol=1e-4)
    assert any(a['layers'][0]['moe']['experts']!=b['layers'][0]['moe']['experts'] for a,b in zip(on, off))

@needs_node
def test_layers_that_it_cannot_run_are_refused(tmp_path):
    Whale(tiny_v4(300)).save_pretrained(tmp_path)
    assert 'layer_types' in js('try { load(); say("no error") } catch (e) { say(e.message) }', folder=str(tmp_path))

# ---------------------------------------------------------------- tokens

@needs_node
def test_tokens(folder):
    tok,r = load_tokenizer(folder),random.Random(0)
    corpus = [r.choice(ENGLISH)[:r.randrange(1, 400)] for _ in range(100)]
    chars = [''.join(r.choices("ab'sdl 01\n\t.,é鲸🐳\u00a0\u2003-_", k=30)) for _ in range(100)]
    texts = TEXTS+corpus+chars
    want = [tok.encode(t, add_special_tokens=False) for t in texts]
    ids,back = js('const t = new Tokenizer(json("tokenizer.json")); const ids = given.texts.map(x => t.encode(x)); say([ids, ids.map(x => t.decode(x))])',
        folder=str(folder), texts=texts)
    for text,a,b in zip(texts, ids, want): assert a==b, repr(text)
    assert back==[tok.decode(i, skip_special_tokens=True) for i in want]
    half = tok.encode('🐳', add_special_tokens=False)[:1]
    assert js('say(new Tokenizer(json("tokenizer.json")).decode(given.ids))', folder=str(folder), ids=half)=='\ufffd'

# ---------------------------------------------------------------- the whale that can be taken home, and the one of the home page

def test_the_folder_to_download_opens_elsewhere(folder, tmp_path):
    "whale.zip: the package loads it, and so does transformers, with the same logits"
    whale,ids = build.export(folder, tmp_path/'out'),random.Random(1).choices(range(400), k=9)
    shutil.unpack_archive(tmp_path/'out/whale.zip', tmp_path)
    model = tmp_path/'whale'
    assert sorted(p.name for p in model.iterdir())==['README.md', 'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    assert_close(build.logits(Whale.from_pretrained(model).float(), ids), build.logits(whale, ids))
    assert load_tokenizer(model).encode(EXAMPLE)==load_tokenizer(folder).encode(EXAMPLE)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    there = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation='eager').eval()
    with torch.no_grad(): assert_close(there(torch.tensor([ids])).logits[0], build.logits(whale, ids), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(model).encode(EXAMPLE)==load_tokenizer(folder).encode(EXAMPLE)

@needs_node
def test_a_text_goes_on(folder, tmp_path):
    "At temperature 0 as `generate` does; and no further than there are positions"
    whale,tok = build.export(folder, tmp_path),load_tokenizer(folder)
    code = 'const t = new Tokenizer(json("tokenizer.json")); say([...whale.goOn(load(), t, given.text, given.n, 0)])'
    ids = [tok.bos_token_id, *tok.encode(EXAMPLE, add_special_tokens=False)]
    want = generate(whale, torch.tensor([ids]), 12, temperature=0)[0,len(ids):].tolist()
    want = want[:want.index(tok.eos_token_id)] if tok.eos_token_id in want else want
    assert js(code, folder=str(tmp_path), text=EXAMPLE, n=12)==[tok.decode([i]) for i in want] and len(want)>1
    short = code.replace('load()', 'Object.assign(load(), {config: {...load().config, max_position_embeddings: given.most}})')
    assert len(js(short, folder=str(tmp_path), text=EXAMPLE, n=12, most=len(ids)+1))<=1

HOME = '''import fs from "node:fs"
import {fileURLToPath} from "node:url"
const given = JSON.parse(fs.readFileSync(0)), said = [], asked = []
const element = id => ({id, text: "", value: given.text, on: {}, addEventListener(kind, f) { this.on[kind] = f },
  set textContent(t) { this.text = t; said.push([id, t]) }, get textContent() { return this.text },
  replaceChildren(...x) { this.text = x.map(e => e.text).join("") }, append(x) { this.text += x }})
const all = Object.fromEntries(["live-text", "live-go", "live-status", "live-out"].map(id => [id, element(id)]))
globalThis.document = {getElementById: id => all[id], createElement: () => element("b")}
globalThis.fetch = async url => {
  asked.push(url)
  const bytes = url.startsWith("file:") && given.folder ? fs.readFileSync(given.folder+"/"+url.split("/").at(-1)) : null
  return new Response(bytes, {status: bytes ? 200 : 404, headers: bytes ? {"content-length": bytes.length} : {}})
}
await import(given.script)
const before = [said.length, asked.length]
await all["live-go"].on.click()
console.log(JSON.stringify({before, said, asked, out: all["live-out"].text, button: all["live-go"].text, status: all["live-status"].text}))
'''

def home(**given):
    given = dict(text=EXAMPLE, script=(EXPLORERS/'home.js').as_uri()) | given
    res = subprocess.run(['node', '--input-type=module', '-e', HOME], input=json.dumps(given), capture_output=True, text=True, timeout=PATIENCE)
    assert res.returncode==0, res.stderr[-3000:]
    return json.loads(res.stdout)

@needs_node
def test_the_home_page_loads_nothing_before_it_is_asked(folder, tmp_path):
    whale = build.export(folder, tmp_path)
    got = home(folder=str(tmp_path))
    assert got['before']==[0, 0] and {u.rsplit('/', 1)[1] for u in got['asked']}=={'config.json', 'tokenizer.json', 'about.json', 'model.safetensors'}
    assert any(re.fullmatch(r'Reading the whale: [\d.]+ of [\d.]+ MB', t) for _,t in got['said'])
    assert got['out'].startswith(EXAMPLE) and got['button']=='Write again' and f'{whale.n_params():,} weights' in got['status']

@needs_node
def test_a_home_page_without_its_whale_says_so():
    assert home(folder='')['status'].startswith('The whale could not be loaded: ')
    assert home(folder='')['button']=='Try again'

# ---------------------------------------------------------------- what stands on a page before its script has run

BEFORE = sorted([*EXPLORERS.glob('*/index.html'), EXPLORERS/'home.html'])
LATER = {'pace', 'came', 'tally', 'difference', 'about', 'verdict', 'changed'}   # sentences of their own, added below what stands there

@pytest.mark.parametrize('page', BEFORE, ids=lambda p: p.parent.name if p.name=='index.html' else 'home')
def test_pages_read_well_before_their_script(page):
    "No hole in a heading, a sentence, or beside a slider; where a whale is loaded, what it is and how large"
    text = page.read_text(encoding='utf-8')
    holes = [m for m in re.findall(r'<(?:span|output|h1|h2|p|caption)\b[^>]*></', text) if not (i := re.search(r'id="(\w+)"', m)) or i[1] not in LATER]
    assert not holes, holes
    if 'hale…' in text or re.search(r'id="(?:live-)?status"', text):
        assert re.search(r'id="(?:live-)?status"[^>]*>[^<]*about 5 MB, [^<]*weights and [^<]*vocabulary', text)
        assert not re.findall(r'<div id="(?!controls|settings)\w+"[^>]*></div>', text), 'an empty box'
    assert '<noscript>' in text

@pytest.mark.parametrize('page', BEFORE, ids=lambda p: p.parent.name if p.name=='index.html' else 'home')
def test_scripts_find_what_they_look_for(page):
    "Every `$('id')` and `show('id'` of a script is an element of its page, and stands there once"
    script = page.with_name('home.js') if page.name=='home.html' else next(page.parent.glob('*.js'))
    wanted = set(re.findall(r"(?:\$|show|drawGuesses|chart)\('([\w-]+)'", script.read_text(encoding='utf-8')))
    ids = re.findall(r'\sid="([\w-]+)"', page.read_text(encoding='utf-8'))
    assert wanted and wanted<=set(ids) and len(ids)==len(set(ids)), (wanted-set(ids), ids)

def test_the_whale_is_as_large_as_its_pages_say():
    "Half precision: two bytes a weight, and 0.11 MB of vocabulary"
    assert round((2*sum(p.numel() for p in Whale(tiny()).parameters())+110e3)/1e6)==5

# ---------------------------------------------------------------- the pages in a browser

slow_page = [pytest.mark.slow, pytest.mark.skipif(not browser.chromium(), reason='needs a Chromium')]
NAMES = ['', 'rope', 'sinkhorn', 'routing', 'whale']
EXAMPLE = 'The sea is  deep.\nIs it?'

@pytest.fixture(scope='module')
def site(tmp_path_factory):  # yields an address, the whale that the pages run, its tokenizer
    "The explorers with a whale of random weights"
    top = tmp_path_factory.mktemp('site')
    shutil.copytree(EXPLORERS, top/'explorers', ignore=shutil.ignore_patterns('model', '__pycache__'))
    folder = whale_folder(top/'whole', **{k: v for k,v in vars(tiny(400)).items() if k in number_fields(WhaleConfig, int)})
    whale = build.export(folder, top/'explorers'/'whale'/'model')
    server,url = browser.serve(top)
    yield url, whale, load_tokenizer(folder)
    server.shutdown()

@pytest.fixture(scope='module')
def page():
    pytest.importorskip('websocket', reason='needs websocket-client, which comes with jupyter')
    tab = browser.Browser()
    yield tab
    tab.close()

def until(page, code): return page.until(lambda: page.js(code))

def visit(page, site, name, ready='true', **kw):
    page.open(f'{site[0]}/explorers/{name}/index.html'.replace('//index', '/index'), **kw)
    until(page, ready)

def enter(page, css, value):
    "As if a reader had moved or typed"
    page.js(f'(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event("input", {{bubbles: true}})) }})(document.querySelector({json.dumps(css)}))')

def click(page, css): page.js(f'document.querySelector({json.dumps(css)}).click()')

def press(page, key):
    code = dict(ArrowUp=38, ArrowDown=40, ArrowLeft=37, ArrowRight=39)[key]
    for kind in ('keyDown', 'keyUp'): page.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

def mouse(page, kind, x, y):
    page.call('Input.dispatchMouseEvent', type=f'mouse{kind}', x=x, y=y, button='left', buttons=int(kind!='Released'), clickCount=1)

def text(page, css): return page.js(f'document.querySelector({json.dumps(css)}).textContent').replace('−', '-')
def texts(page, css): return page.js(f'Array.from(document.querySelectorAll({json.dumps(css)}), e => e.textContent)')
def second(page): return page.js('[...document.querySelectorAll("#second button")].map(e => +e.dataset.id)')

def assert_mixes(page, whale, ids, at):
    "The tables show what PyTorch's hyper-connections do with token `at`: comb with sources as rows, pre beside it, post below"
    tables = page.js('''[...document.querySelectorAll("#mixes table")].map(t => [...t.rows].slice(1).map(r =>
        [...r.querySelectorAll("td")].map(e => e.textContent)))''')
    want = mixes(whale, ids)
    assert len(tables)==len(want)
    for rows,(pre,post,comb) in zip(tables, want):
        assert_close(torch.tensor([[float(x) for x in r] for r in rows[:-1]]), torch.cat([comb[at], pre[at][:,None]], 1), rtol=0, atol=.0051)
        assert_close(torch.tensor([float(x) for x in rows[-1] if x]), post[at], rtol=0, atol=.0051)

READY = {'routing': 'document.querySelectorAll("#load .bar").length', 'whale': 'document.body.dataset.ready'}

class TestPages:
    pytestmark = slow_page

    @pytest.mark.parametrize('name', NAMES)
    @pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
    @pytest.mark.parametrize('width', [1000, 390])
    def test_loads_alone_and_in_peace(self, page, site, name, dark, width):
        visit(page, site, name, READY.get(name, 'document.readyState=="complete"'), dark=dark, width=width)
        assert page.complaints==[]
        assert page.asked and all(r.startswith((site[0], 'data:')) for r in page.asked), page.asked
        assert page.js('document.documentElement.scrollWidth')<=width
        assert (page.js('getComputedStyle(document.body).backgroundColor')=='rgb(19, 20, 22)')==dark
        unnamed = page.js('''Array.from(document.querySelectorAll("button, input, select, textarea, [role=slider]"))
            .filter(e => !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length)).length''')
        assert unnamed==0, 'controls without a name'

    def test_a_missing_whale_is_said(self, page, site):
        page.open(f'{site[0]}/explorers/whale/index.html')
        until(page, READY['whale'])
        page.js('document.body.dataset.ready = ""')
        said = page.js('import("../load.js").then(m => m.load("nowhere")).catch(e => e.message)')
        assert 'build.py' in said

    def test_rope(self, page, site):
        source = (EXPLORERS/'rope'/'rope.js').read_text()
        q,k = (torch.tensor([ast.literal_eval(re.search(rf'{name} = (\[.*?\])', source)[1])]) for name in ('query', 'key'))
        def score(t, s, theta=1e4):
            turn = lambda x, at: rotate(x[None], *rope_cos_sin(torch.tensor([at]), 8, theta))
            return (turn(q, t)*turn(k, s)).sum().item()
        visit(page, site, 'rope')
        for t,s in ((24, 17), (107, 100), (3, 150)):
            enter(page, '[name=t]', t); enter(page, '[name=s]', s)
            assert float(text(page, '#score'))==pytest.approx(score(t, s), abs=2e-3) and text(page, '#distance')==str(t-s)
        click(page, '[data-shift="10"]'); click(page, '[data-shift="1"]')
        assert page.js('[...document.querySelectorAll("[type=range]")].map(e => +e.value)')==[14, 161]
        assert float(text(page, '#score'))==pytest.approx(score(3, 150), abs=2e-3)
        enter(page, '[name=theta]', '100')
        assert float(text(page, '#score'))==pytest.approx(score(14, 161, 100.), abs=2e-3)
        assert float(text(page, '#moved'))==0
        click(page, '#back')
        assert float(text(page, '#moved'))>0.5
        page.js('document.querySelector("[name=t]").focus()')
        press(page, 'ArrowRight')
        assert text(page, '#distance')=='-146'

    def test_sinkhorn(self, page, site):
        def check(iters):
            logits = torch.tensor(page.js('[...document.querySelectorAll(".cell")].map(e => +e.getAttribute("aria-valuenow"))'), dtype=torch.float64)
            m = sinkhorn(logits.view(4, 4), iters)
            assert_close(torch.tensor([float(x) for x in texts(page, '.cell b')], dtype=torch.float64).view(4, 4), m, rtol=0, atol=6e-4)
            assert float(text(page, '#given'))==pytest.approx((m.sum(1)-1).abs().max().item(), abs=2e-6)
            assert float(text(page, '#received'))==pytest.approx((m.sum(0)-1).abs().max().item(), abs=2e-6)
            return logits
        visit(page, site, 'sinkhorn')
        for preset in ('small', 'large', 'keep', 'hard'):
            click(page, f'[data-preset={preset}]')
            for iters in (1, 2, 20): enter(page, '[name=iters]', iters); check(iters)
        click(page, '[data-preset=large]'); enter(page, '[name=iters]', 2)
        before = check(2)
        page.js('document.querySelector("[data-cell=\'5\']").focus()')
        press(page, 'ArrowUp'); press(page, 'ArrowUp')
        assert check(2)[5]-before[5]==pytest.approx(.2)
        x,y = page.js('(r => [r.x+r.width/2, r.y+r.height/2])(document.querySelector("[data-cell=\'2\']").getBoundingClientRect())')
        mouse(page, 'Pressed', x, y)
        for dy in (10, 25, 40): mouse(page, 'Moved', x, y-dy)
        mouse(page, 'Released', x, y-40); mouse(page, 'Moved', x, y)
        assert check(2)[2]-before[2]==pytest.approx(2.)
        enter(page, '[name=depth]', 64)
        said = {}
        for how in ('right', 'transposed', 'free'): click(page, f'[value={how}]'); said[how] = text(page, '#verdict')
        assert 'now 1.00.' in said['right'] and 'the gradient 1.00.' in said['transposed'] and 'e+' in said['free']

    def test_routing(self, page, site):
        _,whale,tok = site
        visit(page, site, 'routing', READY['routing'])
        enter(page, '#text', EXAMPLE)
        ids = tok.encode(EXAMPLE, add_special_tokens=False)
        until(page, f'document.querySelectorAll("#tokens button").length=={len(ids)}')
        seen = []
        hooks = [layer.mlp.gate.register_forward_hook(lambda m, i, o: seen.append(o[0][0,1:])) for layer in whale.model.layers]
        build.logits(whale, [tok.bos_token_id, *ids])
        for h in hooks: h.remove()
        differ = 0
        for layer,scores in enumerate(seen):
            click(page, f'#layers [value="{layer}"]')
            bias = whale.model.layers[layer].mlp.gate.e_score_correction_bias
            choices = []
            for on in (True, False):
                want = route(scores, bias*on, whale.cfg.num_experts_per_tok, 1.5)[0]+1
                got = page.js('[...document.querySelectorAll("#tokens button")].map(e => e.title)')
                assert got==[f'experts {a} and {b}' for a,b in want.tolist()]
                load = [f'{(want==e+1).sum().item()/len(ids):.1%}' for e in range(4)]
                assert [float(x.split()[0]) for x in texts(page, '#load .number')]==pytest.approx([float(x[:-1]) for x in load], abs=.51)
                choices.append(want.sort().values)
                click(page, '#bias')
            many = (choices[0]!=choices[1]).any(1).sum().item()
            differ += many
            assert len(texts(page, '#tokens .other'))==many
        assert differ, 'a bias that changes nothing shows nothing'
        enter(page, '#biases [name=b0]', 1); enter(page, '#biases [name=b1]', 1); enter(page, '#biases [name=b2]', -1); enter(page, '#biases [name=b3]', -1)
        assert page.complaints==[]
        enter(page, '#text', '')
        until(page, 'document.querySelectorAll("#tokens button").length==0')
        assert page.complaints==[]

    def test_whale(self, page, site):
        _,whale,tok = site
        visit(page, site, 'whale', READY['whale'])
        page.js('document.querySelector("#compare").click()')
        worst = float(until(page, 'document.querySelector("#difference").dataset.worst'))
        assert worst<1e-3 and 'the same' in text(page, '#difference')
        enter(page, '#text', EXAMPLE); enter(page, '[name=temperature]', 0)
        ids = [tok.bos_token_id, *tok.encode(EXAMPLE, add_special_tokens=False)]
        until(page, f'document.querySelectorAll("#tokens button").length=={len(ids)}')
        best = build.logits(whale, ids)[-1].softmax(-1).topk(8)
        assert page.js('[...document.querySelectorAll("#next button")].map(e => +e.dataset.id)')==best.indices.tolist()
        shown = [float(x.split()[0])/100 for x in texts(page, '#next .number')]
        assert shown==pytest.approx(best.values.tolist(), abs=.006)
        first = best.indices[0].item()
        assert second(page)==build.second(whale, [*ids, first])[-1].topk(8).indices.tolist()
        assert 'only the likeliest so far' in text(page, '#came')
        want = generate(whale, torch.tensor([ids]), 61, temperature=0)[0].tolist()
        click(page, '#one')
        assert len(texts(page, '#tokens button'))==len(ids)+1
        click(page, '#go')
        until(page, 'document.querySelector("#go").textContent=="Continue"')
        pieces = [{tok.bos_token_id: '‹begin›', tok.eos_token_id: '‹end›'}.get(i) or tok.decode([i]) for i in want]
        visible = lambda s: '␣'*len(s) if s and not s.strip(' ') else s.replace('\n', '⏎').replace('\t', '⇥')
        assert [x for x in texts(page, '#tokens button')]==[visible(p) or ' ' for p in pieces]
        page.js('document.querySelector("#tokens [aria-pressed=true]").focus()')
        for _ in range(3): press(page, 'ArrowLeft')
        t = page.js('[...document.querySelectorAll("#tokens button")].findIndex(e => e.ariaPressed=="true")')
        assert t<=len(want)-4 and page.js('document.activeElement.ariaPressed')=='true'
        best = build.logits(whale, want[:t+1])[-1].topk(8).indices.tolist()
        assert page.js('[...document.querySelectorAll("#next button")].map(e => +e.dataset.id)')==best
        later = build.second(whale, want)
        assert second(page)==later[t].topk(8).indices.tolist()
        shown = [float(x.split()[0])/100 for x in texts(page, '#second .number')]
        assert shown==pytest.approx(later[t].softmax(-1).topk(8).values.tolist(), abs=.006)
        assert_mixes(page, whale, want, t)
        click(page, '[data-head="2.3"]')
        assert text(page, '#looks').startswith('Layer 3, head 4')
        chosen = page.js('+document.querySelectorAll("#next button")[1].dataset.id')
        page.js('document.querySelectorAll("#next button")[1].click()')
        assert len(texts(page, '#tokens button'))==t+2
        best = build.logits(whale, [*want[:t+1], chosen])[-1].topk(8).indices.tolist()
        assert page.js('[...document.querySelectorAll("#next button")].map(e => +e.dataset.id)')==best
        between,after = page.js('["next", "second"].map(e => +document.querySelector(`#${e} button`).dataset.id)')
        click(page, '#second button')
        now = [*want[:t+1], chosen, between, after]
        assert len(texts(page, '#tokens button'))==len(now)
        best = build.logits(whale, now)[-1].topk(8).indices.tolist()
        assert page.js('[...document.querySelectorAll("#next button")].map(e => +e.dataset.id)')==best
        second_right,first_right = (f(whale, now)[at:-1].argmax(-1)==torch.tensor(now[2:]) for f,at in ((build.second, 0), (build.logits, 1)))
        assert second_right[-1] and not second_right.all() and first_right.any()
        named = page.js('[...document.querySelectorAll("#tokens button")].map(e => !!e.querySelector("i"))')
        assert named==[False, False, *second_right.tolist()]
        assert text(page, '#tally')==(f'Of {len(now)-2} tokens the second guess named {second_right.sum()}; '
            f'the first one, a token later, {first_right.sum()}.')
        for at in (t+1, second_right.int().argmin().item()):
            page.js(f'document.querySelectorAll("#tokens button")[{at}].click()')
            assert second(page)==build.second(whale, now)[at].topk(8).indices.tolist()
            assert ('was right' in text(page, '#came'))==second_right[at] and ('came, not' in text(page, '#came'))!=second_right[at]
            assert_mixes(page, whale, now, at)
        page.js(f'document.querySelectorAll("#tokens button")[{t+2}].click()')
        assert text(page, '#came')=='What comes there is not written yet.'
        click(page, '#again')
        assert len(texts(page, '#tokens button'))==len(ids) and page.complaints==[]

    def test_a_whale_without_a_second_guess_shows_none(self, page, tmp_path):
        shutil.copytree(EXPLORERS, tmp_path/'explorers', ignore=shutil.ignore_patterns('model', '__pycache__'))
        build.export(whale_folder(tmp_path/'whole', num_nextn_predict_layers=0), tmp_path/'explorers'/'whale'/'model')
        server,url = browser.serve(tmp_path)
        visit(page, [url], 'whale', READY['whale'])
        click(page, '#one'); click(page, '#compare')
        assert float(until(page, 'document.querySelector("#difference").dataset.worst'))<1e-3
        assert page.js('document.querySelector("#twice").checkVisibility()') is False and page.complaints==[]
        server.shutdown()
