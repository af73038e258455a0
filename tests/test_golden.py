"""Age: what this release saved, every later one must load and go on with; and what it computed, every later one must compute.

    pytest tests/test_golden.py            loads tests/golden/, and checks the bounds of the requirements
    python tests/test_golden.py --far      how far from them this machine is, in the ways it can add up
    python tests/test_golden.py --make     writes those files; only for a change that alters the mathematics on purpose, which must say so

`golden/run.json` and `golden/run.tar.xz` are a run of a very small whale with all kinds of layers after one of two steps: the recipe;
metrics, checkpoint and trainer's state. `golden/losses.json` holds ten losses of each preset made small, and a few logits. Together they
are 19 KB, and not much less is possible: numbers and moments of 280 tensors do not compress (8 KB), nor does the state of torch's random
numbers (3 KB); the names of the tensors take 3 KB more, JSON files the rest.

Tolerance: where the files were made, on x86-64 Linux, 1e-5. The largest differences seen there are 1e-6 in a logit and 5e-7 in a loss, for
torch 2.9 and 2.13, one and two threads, with and without AVX2 and AVX-512 (`--far`; results/ages.json keeps what it said). Other processors
and systems, which nobody has measured, add up in another order, which ten steps at gentle rates may make larger: 1e-3.
"""
import paths   # noqa: F401, for tests/tools
import argparse, ast, io, json, os, platform, re, shutil, subprocess, sys, tarfile, tempfile
from configparser import ConfigParser
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
import pytest, torch
from nanowhale import __version__
from nanowhale import cli
from nanowhale.fast.kernels import KERNELS, use
from nanowhale.run import check_spec
from nanowhale.train import loop as train
from nanowhale.train.checkpoint import read_metrics
from nanowhale.model.config import CSA, HCA, WhaleConfig
from nanowhale.presets import PRESETS
from nanowhale.train.data import load_tokenizer, train_tokenizer
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import get_recipe
from nanowhale.train.step import train_step
import ages
from runs import ROOT, jsonl, provenance, texts, unpack

GOLDEN = Path(__file__).parent/'golden'
STEP = 'step-00000001'
RUN = ['--data', 'words.jsonl', '--steps', '2', '--evals', '2', '--batch-size', '2', '--context', '16', '--lr', '1e-3', '--muon-lr', '2e-3', '--buffer', '1000']
TOLERANCE = 1e-5 if platform.machine()=='x86_64' and sys.platform=='linux' else 1e-3

SEEN = ('loss', 'mtp_loss', 'held_out_loss', 'grad_norm', 'balance_loss', 'indexer_loss')

def golden(): return json.loads((GOLDEN/'losses.json').read_text())

def minnow():
    "A whale smaller than any other, with all kinds of layers: the plain one is its MTP block"
    return WhaleConfig(vocab_size=28, hidden_size=3, num_hidden_layers=2, num_attention_heads=2, head_dim=4, qk_rope_head_dim=2, q_lora_rank=2, o_groups=2,
        o_lora_rank=1, sliding_window=4, max_position_embeddings=32, moe_intermediate_size=2, n_routed_experts=2, num_experts_per_tok=1, hc_mult=2,
        layer_types=(CSA,HCA), mlp_layer_types=('hash_moe','moe'), compress_rate_csa=2, compress_rate_hca=4, index_n_heads=2, index_head_dim=2,
        index_topk=2, initializer_range=0.3)

def letters(rows):
    "A tokenizer that knows the bytes of these texts and no other: `train_tokenizer` starts at all 256, which would be most of the checkpoint"
    from tokenizers import Tokenizer
    tok = train_tokenizer(rows, 258)
    bpe = json.loads(tok.backend_tokenizer.to_str())
    used = sorted({c for r in rows for w,_ in tok.backend_tokenizer.pre_tokenizer.pre_tokenize_str(r) for c in w})
    bpe['model']['vocab'] = {c: i for i,c in enumerate([tok.bos_token, tok.eos_token, *used])}
    return type(tok)(tokenizer_object=Tokenizer.from_str(json.dumps(bpe)), bos_token=tok.bos_token, eos_token=tok.eos_token, pad_token=tok.pad_token,
        clean_up_tokenization_spaces=False)

def small(name):
    "A preset with all that makes it special, but its size"
    cfg = PRESETS[name]()
    kinds = {f: getattr(cfg, f) and getattr(cfg, f)[:1]+getattr(cfg, f)[-2:] for f in ('layer_types', 'mlp_layer_types')}
    return replace(cfg, vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8,
        o_lora_rank=4, sliding_window=6, moe_intermediate_size=8, initializer_range=0.1, compress_rate_csa=2,
        compress_rate_hca=3, index_n_heads=2, index_head_dim=8, index_topk=3, **kinds)

def losses(name, kernels='fast'):
    "Main and MTP loss of ten steps, with documents of uneven length"
    torch.manual_seed(0)
    whale,g = use(Whale(small(name)), kernels), torch.Generator().manual_seed(1)
    recipe = get_recipe(name, steps=10, batch_size=2, accum=2, context=24, lr=1e-3, muon_lr=2e-3, precision='fp32')
    opts,out = make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay), []
    for opt in opts: use(opt, kernels)
    for i in range(10):
        rows = dict(input_ids=torch.randint(0, 50, (4, 25), generator=g)**2//50, docs=(torch.rand(4, 25, generator=g)<0.1).cumsum(1))
        m = train_step(whale, whale, opts, rows, recipe, i)
        out.append([round(m[k], 7) for k in ('loss', 'mtp_loss')])
    return out

def probe(whale):
    "A few logits"
    with torch.no_grad(): return [round(v, 6) for v in whale(torch.arange(12)[None]*2).logits[0,-1,:8].tolist()]

def command(*words, cwd):
    was = Path.cwd()
    os.chdir(cwd)
    try: return cli.main([str(w) for w in words])
    finally: os.chdir(was)

def old_run(folder):
    "As it lay on the disk"
    unpack(GOLDEN/'run.tar.xz', folder/'run')
    shutil.copy(GOLDEN/'run.json', folder/'run')
    return folder/'run'

def pack(run):
    files = [run/'metrics.jsonl', *sorted(f for f in (run/'checkpoints'/STEP).rglob('*') if f.is_file())]
    with tarfile.open(GOLDEN/'run.tar.xz', 'w:xz', preset=9) as tar:
        for f in files:
            info = tarfile.TarInfo(f.relative_to(run).as_posix())
            info.size = f.stat().st_size
            tar.addfile(info, io.BytesIO(f.read_bytes()))
    shutil.copy(run/'run.json', GOLDEN)

def here():
    "The largest difference from the golden files, of each kind; no difference may be larger than the tolerance"
    want,largest = golden(),lambda a,b: max(abs(x-y) for x,y in zip(a, b, strict=True))
    with tempfile.TemporaryDirectory() as d, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        old = old_run(Path(d))
        (old.parent/'words.jsonl').write_text(jsonl(texts(60)))
        rows,logits = read_metrics(old/'metrics.jsonl'),probe(Whale.from_pretrained(old/'checkpoints'/STEP))
        assert command('train', '--resume', '--out', 'run', cwd=old.parent)==0
        again = read_metrics(old/'metrics.jsonl')
    seen = [[r[k] for r in run for k in SEEN] for run in (again, rows)]
    out = dict(logits=largest(logits, want['logits']), resumed=largest(*seen))
    out |= {n: largest(sum(losses(n), []), sum(want['losses'][n], [])) for n in PRESETS}
    return {k: float(f'{v:.1e}') for k,v in out.items()}

def far():
    "The same, for the ways in which one processor can add up"
    ways = [dict(OMP_NUM_THREADS=n) for n in '12']
    if platform.machine() in ('x86_64', 'AMD64'):
        ways += [dict(OMP_NUM_THREADS=n, ATEN_CPU_CAPABILITY=c) for n in '12' for c in ('default', 'avx2', 'avx512')]
        ways += [dict(OMP_NUM_THREADS='1', ONEDNN_MAX_CPU_ISA=i) for i in ('SSE41', 'AVX2', 'AVX512_CORE', 'AVX512_CORE_BF16')]
        ways += [dict(OMP_NUM_THREADS='1', ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41', MKL_CBWR='COMPATIBLE')]
    def one(way):
        env = os.environ|dict(OMP_WAIT_POLICY='PASSIVE')|way
        return subprocess.run([sys.executable, __file__, '--here'], env=env, check=True, capture_output=True, text=True).stdout
    return {' '.join(f'{k}={v}' for k,v in way.items()): json.loads(one(way)) for way in ways}

def make():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d/'words.jsonl').write_text(jsonl(texts(60)))
        torch.manual_seed(0)
        Whale(minnow()).save_pretrained(d/'minnow'); letters(texts(60)).save_pretrained(d/'minnow')
        assert command('train', '--init', 'minnow', *RUN, '--out', 'run', cwd=d)==0
        pack(d/'run')
        logits = probe(Whale.from_pretrained(d/'run'/'checkpoints'/STEP))
    lines = [f'{json.dumps(n)}: {json.dumps(losses(n))}' for n in PRESETS]
    head = f'"made_by": "nanowhale {__version__}, torch {torch.__version__}, {platform.machine()}",\n"logits": {json.dumps(logits)}'
    (GOLDEN/'losses.json').write_text('{'+head+',\n"losses": {\n'+',\n'.join(lines)+'}}\n')

# ---------------------------------------------------------------- what was saved, and what was computed

@pytest.fixture
def old(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Log, 'plot', lambda self: None); monkeypatch.setenv('TQDM_DISABLE', '1')
    (tmp_path/'words.jsonl').write_text(jsonl(texts(60)))
    return old_run(tmp_path)

def test_an_old_checkpoint_computes_the_same(old):
    whale = Whale.from_pretrained(old/'checkpoints'/STEP)
    assert whale.cfg==replace(minnow(), pad_token_id=1) and probe(whale)==pytest.approx(golden()['logits'], abs=TOLERANCE)

def test_an_old_tokenizer_reads_the_same(old):
    tok = load_tokenizer(old/'checkpoints'/STEP)
    assert len(tok)==28 and tok('a whale sings').input_ids==[0, *(tok.convert_tokens_to_ids(c) for c in 'aĠwhaleĠsings')] and tok.unk_token_id is None

def test_an_old_run_goes_on(old):
    want = read_metrics(old/'metrics.jsonl')
    assert command('train', '--resume', '--out', 'run', cwd=old.parent)==0
    got = read_metrics(old/'metrics.jsonl')
    assert len(got)==len(want)==2
    for a,b in zip(got, want):
        assert set(b)<=set(a)     # later versions may note more
        for k in SEEN: assert a[k]==pytest.approx(b[k], abs=TOLERANCE), k
        assert a['expert_load']==b['expert_load']

def test_an_old_recipe_means_the_same():
    "Every value that was saved is still a value of a recipe, of the same kind"
    spec = json.loads((GOLDEN/'run.json').read_text())
    check_spec(spec, GOLDEN/'run.json')
    with pytest.raises(ValueError, match='no run of nanowhale'): check_spec(spec|dict(recipe=spec['recipe']|dict(invented=1)), GOLDEN)

@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('name', PRESETS)
def test_ten_losses(name, kernels):
    for got,want in zip(losses(name, kernels), golden()['losses'][name], strict=True): assert got==pytest.approx(want, abs=TOLERANCE)

def test_golden_files_are_small(): assert sum(f.stat().st_size for f in GOLDEN.rglob('*') if f.is_file())<20_000

# ---------------------------------------------------------------- requirements

def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def parsed(lines): return [pytest.importorskip('packaging.requirements').Requirement(r) for r in lines]
def requirements(key): return parsed(settings()[key].split())

ALL = ('requirements', 'dev_requirements', 'docs_requirements')

def test_what_is_installed_is_within_the_bounds():
    for r in requirements('requirements'):
        assert r.specifier.contains(version(r.name), prereleases=True), f'{r}, but {version(r.name)} is here'
        assert any(s.operator=='>=' for s in r.specifier), f'{r} has no lower bound'

def test_an_upper_bound_stands_where_something_breaks():
    "What that is stands above it in settings.ini. A bound for caution would take a user's own newer torch away"
    upper = {r.name for key in ALL for r in requirements(key) for s in r.specifier if s.operator!='>='}
    assert upper=={'fastcore', 'nbdev', 'execnb'}

def test_tested_versions_are_within_the_bounds():
    "tested.txt has one line for each requirement of any kind, with a release that settings.ini allows"
    rows = parsed(r for r in (ROOT/'tested.txt').read_text().splitlines() if r and r[0]!='#')
    tested = {r.name.lower(): r for r in rows}
    assert len(tested)==len(rows)
    for r in rows:
        assert [s.operator for s in r.specifier]==['=='] and str(r.marker or '') in ('', 'python_version >= "3.11"'), r
    for r in (r for key in ALL for r in requirements(key)):
        pinned = next(iter(tested[r.name.lower()].specifier)).version
        assert r.specifier.contains(pinned), f'{r}, but tested.txt has {pinned}'

def test_freeze_writes_what_is_installed(tmp_path):
    "Into the lines there are, conditions kept; remarks stay"
    path = tmp_path/'tested.txt'
    path.write_text('# torch==1 is old\ntorch==1\nnumpy==1; python_version >= "3.11"\n')
    ages.freeze(path)
    torch_version = torch.__version__.split('+')[0]
    assert path.read_text()==f'# torch==1 is old\ntorch=={torch_version}\nnumpy=={version("numpy")}; python_version >= "3.11"\n'

def test_every_import_is_required():
    "numpy comes with transformers, fsspec and pyarrow with datasets"
    known = {re.match(r'[\w-]+', r)[0] for r in settings()['requirements'].split()}|{'numpy', 'fsspec', 'pyarrow', 'nanowhale'}|set(sys.stdlib_module_names)
    for path in sorted((ROOT/'nanowhale').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            outside = isinstance(node, ast.ImportFrom) and not node.level
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if outside else []
            assert {n.split('.')[0] for n in names}<=known, f'{path.name}: {names}'

def test_the_version_stands_in_one_place():
    "settings.ini; the export writes it into the package, setup.py reads it"
    number = settings()['version']
    for path in [ROOT/'setup.py', *(ROOT/'nanowhale').rglob('[!_]*.py')]: assert number not in path.read_text(encoding='utf-8'), path.name

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--make', action='store_true', help='write tests/golden')
    what.add_argument('--far', action='store_true', help='measure the differences, each way of adding up in a process of its own')
    what.add_argument('--here', action='store_true', help='measure them in this process')
    p.add_argument('--out', type=Path, help='with --far: put what was measured into this file of results')
    args = p.parse_args()
    os.environ['TQDM_DISABLE'] = '1'
    train.Log.plot = lambda self: None
    if args.make: torch.set_num_threads(1); make()
    else:
        got = here() if args.here else provenance('python tests/test_golden.py --far')|dict(ways=far())
        print(json.dumps(got, indent=1))
        if args.out: args.out.write_text(json.dumps((json.loads(args.out.read_text()) if args.out.exists() else {})|dict(golden=got), indent=1)+'\n')
