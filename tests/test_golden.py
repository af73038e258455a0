"""Age: what this release saved, every later one must load and go on with; and what it computed, every later one must compute.

    pytest tests/test_golden.py            loads tests/golden/, and checks the bounds of the requirements
    python tests/test_golden.py --make     writes those files; only for a change that alters the mathematics on purpose, which must say so

`golden/run` is a run of a very small whale with all kinds of layers after one of two steps: recipe, metrics, checkpoint, trainer's state.
`golden/losses.json` holds ten losses of each preset made small. Tolerances: where the files were made (x86-64 Linux, torch 2.13) losses
agree to 1e-5; other processors, threads and versions of torch add up in another order, which ten steps at gentle rates turn into less
than 1e-3.
"""
import argparse, ast, json, os, platform, re, shutil, sys, tempfile
from configparser import ConfigParser
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
import pytest, torch
from nanowhale import cli, train
from nanowhale.checkpoint import read_metrics
from nanowhale.config import CSA, HCA, PRESETS, WhaleConfig
from nanowhale.data import train_tokenizer
from nanowhale.model import Whale
from nanowhale.optim import make_optimizers
from nanowhale.step import get_recipe, train_step
from runs import ROOT, jsonl, texts

GOLDEN = Path(__file__).parent/'golden'
RUN = ['--data', 'words.jsonl', '--steps', '2', '--evals', '2', '--batch-size', '2', '--context', '16', '--lr', '1e-3', '--muon-lr', '2e-3', '--buffer', '1000']
TOLERANCE = 1e-5 if platform.machine()=='x86_64' and sys.platform=='linux' and torch.__version__.startswith('2.13') else 1e-3

def minnow():
    "A whale smaller than any other, with all kinds of layers: the plain one is its MTP block"
    return WhaleConfig(vocab_size=258, hidden_size=6, num_hidden_layers=2, num_attention_heads=2, head_dim=4, qk_rope_head_dim=2, q_lora_rank=3, o_groups=2,
        o_lora_rank=2, sliding_window=4, max_position_embeddings=32, moe_intermediate_size=3, n_routed_experts=2, num_experts_per_tok=1, hc_mult=2,
        layer_types=(CSA,HCA), mlp_layer_types=('hash_moe','moe'), compress_rate_csa=2, compress_rate_hca=4, index_n_heads=2, index_head_dim=4,
        index_topk=2, initializer_range=0.3)

def small(name):
    "A preset with all that makes it special, but its size"
    cfg = PRESETS[name]()
    kinds = {f: getattr(cfg, f) and getattr(cfg, f)[:1]+getattr(cfg, f)[-2:] for f in ('layer_types', 'mlp_layer_types')}
    return replace(cfg, vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8,
        o_lora_rank=4, sliding_window=6, moe_intermediate_size=8, initializer_range=0.1, compress_rate_csa=2,
        compress_rate_hca=3, index_n_heads=2, index_head_dim=8, index_topk=3, **kinds)

def losses(name):
    "Main and MTP loss of ten steps, with documents of uneven length"
    torch.manual_seed(0)
    whale,g = Whale(small(name)),torch.Generator().manual_seed(1)
    recipe = get_recipe(name, steps=10, batch_size=2, accum=2, context=24, lr=1e-3, muon_lr=2e-3, precision='fp32')
    opts,out = make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay),[]
    for i in range(10):
        rows = dict(input_ids=torch.randint(0, 50, (4, 25), generator=g)**2//50, docs=(torch.rand(4, 25, generator=g)<0.1).cumsum(1))
        m = train_step(whale, whale, opts, rows, recipe, i)
        out.append([round(m[k], 7) for k in ('loss', 'mtp_loss')])
    return out

def probe(whale):
    "A few logits"
    with torch.no_grad(): return [round(v, 6) for v in whale(torch.arange(12)[None]*21).logits[0,-1,:8].tolist()]

def command(*words, cwd):
    was = Path.cwd()
    os.chdir(cwd)
    try: return cli.main([str(w) for w in words])
    finally: os.chdir(was)

def make():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        (d/'words.jsonl').write_text(jsonl(texts(60)))
        torch.manual_seed(0)
        Whale(minnow()).save_pretrained(d/'minnow'); train_tokenizer(texts(60), 258).save_pretrained(d/'minnow')
        assert command('train', '--init', 'minnow', *RUN, '--out', 'run', cwd=d)==0
        shutil.copytree(d/'run'/'checkpoints'/'step-00000001', GOLDEN/'run'/'checkpoints'/'step-00000001')
        for name in ('run.json', 'metrics.jsonl'): shutil.copy(d/'run'/name, GOLDEN/'run')
    logits = probe(Whale.from_pretrained(GOLDEN/'run'/'checkpoints'/'step-00000001'))
    (GOLDEN/'losses.json').write_text(json.dumps(dict(made_by=f'torch {torch.__version__}, {platform.machine()}', logits=logits,
        losses={n: losses(n) for n in PRESETS}), indent=1)+'\n')

# ---------------------------------------------------------------- what was saved, and what was computed

@pytest.fixture
def old(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Log, 'plot', lambda self: None); monkeypatch.setenv('TQDM_DISABLE', '1')
    (tmp_path/'words.jsonl').write_text(jsonl(texts(60)))
    shutil.copytree(GOLDEN/'run', tmp_path/'run')
    return tmp_path

def test_an_old_checkpoint_computes_the_same():
    whale = Whale.from_pretrained(GOLDEN/'run'/'checkpoints'/'step-00000001')
    assert whale.cfg==minnow() and probe(whale)==pytest.approx(json.loads((GOLDEN/'losses.json').read_text())['logits'], abs=TOLERANCE)

def test_an_old_run_goes_on(old):
    want = read_metrics(GOLDEN/'run'/'metrics.jsonl')
    assert command('train', '--resume', '--out', 'run', cwd=old)==0
    got = read_metrics(old/'run'/'metrics.jsonl')
    assert len(got)==len(want)==2
    for a,b in zip(got, want):
        assert set(b)<=set(a)     # later versions may note more
        for k in ('loss', 'mtp_loss', 'held_out_loss', 'grad_norm', 'balance_loss', 'indexer_loss'): assert a[k]==pytest.approx(b[k], abs=TOLERANCE), k
        assert a['expert_load']==b['expert_load']

def test_an_old_recipe_means_the_same():
    "Every value that was saved is still a value of a recipe, of the same kind"
    spec = json.loads((GOLDEN/'run'/'run.json').read_text())
    train.check_spec(spec, GOLDEN/'run'/'run.json')
    with pytest.raises(ValueError, match='no run of nanowhale'): train.check_spec(spec|dict(recipe=spec['recipe']|dict(invented=1)), GOLDEN)

@pytest.mark.parametrize('name', PRESETS)
def test_ten_losses(name):
    want = json.loads((GOLDEN/'losses.json').read_text())['losses'][name]
    for got,w in zip(losses(name), want): assert got==pytest.approx(w, abs=TOLERANCE)

def test_golden_files_are_small(): assert sum(f.stat().st_size for f in GOLDEN.rglob('*') if f.is_file())<2**17

# ---------------------------------------------------------------- requirements

def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def test_what_is_installed_is_within_the_bounds():
    requirements = pytest.importorskip('packaging.requirements')
    for r in map(requirements.Requirement, settings()['requirements'].split()):
        assert r.specifier.contains(version(r.name), prereleases=True), f'{r}, but {version(r.name)} is here'
        assert any(s.operator=='>=' for s in r.specifier), f'{r} has no lower bound'

def test_every_import_is_required():
    "numpy comes with transformers"
    known = {re.match(r'[\w-]+', r)[0] for r in settings()['requirements'].split()}|{'numpy', 'nanowhale'}|set(sys.stdlib_module_names)
    for path in sorted((ROOT/'nanowhale').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            outside = isinstance(node, ast.ImportFrom) and not node.level
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if outside else []
            assert {n.split('.')[0] for n in names}<=known, f'{path.name}: {names}'

def test_the_version_stands_in_one_place():
    "settings.ini; the export writes it into the package, setup.py reads it"
    number = settings()['version']
    for path in [ROOT/'setup.py', *(ROOT/'nanowhale').glob('[!_]*.py')]: assert number not in path.read_text(encoding='utf-8'), path.name

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--make', action='store_true', required=True, help='write tests/golden')
    p.parse_args()
    train.Log.plot = lambda self: None
    torch.set_num_threads(1)
    make()
