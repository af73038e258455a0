"""Every fast function against its plain twin: values, gradients and what bfloat16 costs; then whole whales, training and writing"""
import itertools
from dataclasses import replace
import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
from nanowhale.model.attention import attend
from nanowhale.model.compress import far_weights, index_scores
from nanowhale.model.config import CSA, HCA, SWA
from nanowhale.model.hyper import sinkhorn
from nanowhale.model.moe import run_experts
from nanowhale.model.mtp import head_loss
from nanowhale.model.rope import rotate
from nanowhale.model.visibility import window_mask
from nanowhale.model.whale import Whale
from nanowhale.validate import check_batch
from nanowhale.presets import tiny, tiny_v4
from nanowhale.train.optim import Muon, make_optimizers
from nanowhale.train.recipe import Recipe
from nanowhale.train.step import train_step
from nanowhale.generate.sample import generate
from nanowhale.fast import loss, products
from nanowhale.fast.attention import CHUNK
from nanowhale.fast.kernels import FAST, use

def inputs(*shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]

def documents(B, T, pad=3):
    "Three documents in a row, the first row padded on its left"
    docs = (torch.arange(T)*3//T).expand(B, -1).clone()
    docs[0,:pad] = -1
    return docs

# ---------------------------------------------------------------- a case: a name, the plain function, the fast one, inputs with gradients

def product_cases():
    for M in (1, 5, 70): yield f'product of {M} rows', F.linear, FAST_OF['product'], inputs((M,24), (9,24))
    yield 'product of a batch', F.linear, FAST_OF['product'], inputs((2,7,24), (9,24))

def rotation_cases():
    def turned(f, angles): return lambda x: f(x, angles.cos(), angles.sin())
    for R,K in ((4, 8), (2, 7), (6, 6)):
        angles, = inputs((5,R//2))
        for a in (angles, -angles): yield f'rotation of {R} in {K}', turned(rotate, a), turned(FAST_OF['rotate'], a), inputs((2,5,3,K))

def attention_cases():
    "What `see` returns goes to `attend`, as in a whale: causal, a window, blocks, with documents, with entries from afar"
    see,fast = FAST_OF['see'],FAST_OF['attend']
    for T,W,packed,C in ((1, 4, False, 0), (9, 20, False, 0), (CHUNK+3, 500, False, 0), (CHUNK+3, 7, True, 0), (2*CHUNK+5, 70, False, 0),
            (2*CHUNK+5, 70, True, 0), (9, 4, True, 5), (2*CHUNK+5, 70, True, 40), (2*CHUNK+5, 70, False, 40)):
        pos,docs = torch.arange(T),documents(2, T, min(3, T-1)) if packed else None
        q,kv,sinks,far = inputs((2,T,3,8), (2,T,8), (3,), (2,C,8))
        far_mask = (torch.arange(T)[:,None]>=torch.arange(C)*(T//max(1, C)))[None]
        slow_mask,fast_mask = window_mask(pos, pos, W, docs),see(pos, pos, W, docs)
        name = f'attention over {T}, window {W}, {C} entries{", packed" if packed else ""}'
        if C:
            yield (name, lambda *a, m=slow_mask, fm=far_mask: attend(*a[:3], m, a[3], fm), lambda *a, m=fast_mask, fm=far_mask: fast(*a[:3], m, a[3], fm),
                [q, kv, sinks, far])
        else: yield name, lambda *a, m=slow_mask: attend(*a, m), lambda *a, m=fast_mask: fast(*a, m), [q, kv, sinks]

def entry_cases():
    for T,C in ((5, 3), (2*CHUNK+5, 60)):
        seen = (torch.arange(T)[:,None]>=torch.arange(C)*(T//C)+1)[None]
        q,w,keys,far_q,far,lse = inputs((2,T,3,8), (2,T,3), (2,C,8), (2,T,4,8), (2,C,8), (2,T,4))
        def alone(f, seen=seen): return lambda *a: f(*a, seen)*seen         # the others may have any score
        yield f'index scores of {T} queries', alone(index_scores), alone(FAST_OF['index_scores']), [q, w, keys]
        def weights(f, seen=seen): return lambda *a: f(*a, seen)
        yield f'weights of {C} entries', weights(far_weights), weights(FAST_OF['far_weights']), [far_q, far, lse]

def expert_cases():
    for M,E,k in ((1, 3, 1), (7, 5, 2), (200, 4, 3)):
        x,w,gate_up,down = inputs((M,6), (M,k), (E,10,6), (E,6,5))
        idx = torch.rand(M, E-1, generator=torch.Generator().manual_seed(M)).topk(min(k, E-1), -1).indices     # the last expert has nothing to do
        w = w[:,:idx.shape[1]].contiguous()
        def run(f, idx=idx): return lambda x, w, gate_up, down: f(x, idx, w, gate_up, down, 0.7)
        yield f'{E} experts for {M} tokens', run(run_experts), run(FAST_OF['run']), [x, w, gate_up, down]

def other_cases():
    for scale,iters in ((0.1, 1), (1, 3), (20, 20)):
        z, = inputs((2,5,4,4))
        def mixes(f, n=iters): return lambda z: f(z, n)
        yield f'Sinkhorn, {iters} rounds, logits of {scale}', mixes(sinkhorn), mixes(FAST_OF['sinkhorn']), [z*scale]
    for share in (0, 0.5, 1):
        h,W = inputs((2,9,6), (31,6))
        draw = torch.Generator().manual_seed(1)
        labels = torch.randint(31, (2,9), generator=draw).where(torch.rand(2, 9, generator=draw)<share, -100)
        def loss(f, y=labels): return lambda h, W: f(h, W, y)
        yield f'loss, {share:.0%} labels', loss(head_loss), loss(FAST_OF['head_loss']), [h, W]

FAST_OF = {name: f for functions in FAST.values() for name,f in functions.items()}
CASES = [*product_cases(), *rotation_cases(), *attention_cases(), *entry_cases(), *expert_cases(), *other_cases()]
TO_COMPILE = [c for c in CASES if c[0].startswith(('loss', 'Sinkhorn', 'attention over 9'))]

KEPT = dict(attention=2, index=1, weights=2, experts=1)     # the input that stays float32 in a whale of bfloat16

def everything(f, leaves, dtype=torch.float64, kept=None):
    "Outputs, and the gradients of their weighted sum, all in float64"
    leaves = [x.to(torch.float32 if i==kept else dtype).requires_grad_() for i,x in enumerate(leaves)]
    out = f(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    if not outs[0].requires_grad: return [o.detach().double() for o in outs]
    ways = torch.linspace(-1, 1, outs[0].numel(), dtype=torch.float64).view_as(outs[0]).to(outs[0].dtype)
    grads = torch.autograd.grad((outs[0]*ways).sum(), leaves)
    return [t.detach().double() for t in (*outs, *grads)]

@pytest.mark.parametrize('name,plain,fast,leaves', CASES, ids=[c[0] for c in CASES])
def test_float64(name, plain, fast, leaves):
    for a,b in zip(everything(fast, leaves), everything(plain, leaves), strict=True): assert_close(a, b, atol=1e-11, rtol=1e-10)

@pytest.mark.parametrize('name,plain,fast,leaves', CASES, ids=[c[0] for c in CASES])
def test_float32(name, plain, fast, leaves):
    "Where oneDNN computes: as near to float64 as the plain one, up to the order of sums"
    exact = everything(plain, leaves)
    for got,slow,want in zip(everything(fast, leaves, torch.float32), everything(plain, leaves, torch.float32), exact, strict=True):
        assert (got-want).norm()<=3*(slow-want).norm()+1e-5*want.norm()+1e-12

@pytest.mark.parametrize('name,plain,fast,leaves', CASES, ids=[c[0] for c in CASES])
def test_bfloat16(name, plain, fast, leaves):
    "No further from float64 than twice what the plain one is; inputs are rounded before"
    leaves = [x.bfloat16().double() for x in leaves]
    kept = next((i for word,i in KEPT.items() if word in name), None)
    rounded = [everything(f, leaves, torch.bfloat16, kept) for f in (fast, plain)]
    for got,slow,want in zip(*rounded, everything(plain, leaves), strict=True):
        assert (got-want).norm()<=2*(slow-want).norm()+2**-8*want.norm()+1e-12

@pytest.mark.parametrize('name,plain,fast,leaves', TO_COMPILE, ids=[c[0] for c in TO_COMPILE])
def test_compiled(name, plain, fast, leaves):
    "As the compiler takes it apart: PyTorch 2.11 lost the gradient of a loss that was added up in place"
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: fast(*a), backend='eager', dynamic=False)
    for a,b in zip(everything(compiled, leaves), everything(plain, leaves), strict=True): assert_close(a, b, atol=1e-11, rtol=1e-10)

def test_every_function_has_a_case():
    assert {'product', 'attend', 'rotate', 'see', 'index_scores', 'far_weights', 'run', 'sinkhorn', 'head_loss'}==set(FAST_OF)-{'check', 'orthogonalize'}

@pytest.mark.parametrize('shape', [(0, 3, 4), (1, 4, 3), (3, 40, 70), (5, 2, 60, 9), (4, 5)])
def test_orthogonalize(shape, monkeypatch):
    "A few matrices at a time, also fewer than a cache holds, tall and wide"
    G, = inputs(shape)
    want = Muon.orthogonalize(G)
    for cache in (1, 2**15, products.CACHE):
        monkeypatch.setattr(products, 'CACHE', cache)
        assert_close(FAST_OF['orthogonalize'](G), want, atol=1e-9, rtol=1e-9)

def test_orthogonalize_by_onednn(monkeypatch):
    if not hasattr(torch.ops.mkldnn, '_linear_pointwise'): pytest.skip('this torch has no oneDNN')
    G = inputs((3, 40, 70))[0].float()
    monkeypatch.setattr(products, 'ONEDNN', True)
    assert_close(FAST_OF['orthogonalize'](G), Muon.orthogonalize(G), atol=1e-3, rtol=1e-3)

def test_orthogonalize_in_bfloat16():
    "Where autocast asks for it: no further from one than on a GPU, where all rounds are in bfloat16"
    G = torch.randn(3, 40, 70)
    with torch.autocast('cpu', torch.bfloat16): half = FAST_OF['orthogonalize'](G)
    assert half.dtype==torch.float32
    assert (torch.linalg.svdvals(half)-1).abs().max()<0.05
    assert (half*Muon.orthogonalize(G)).sum((1,2)).div(40).min()>0.99   # the same directions

@pytest.mark.parametrize('words', [1, 4, 19, 20, 64])
@pytest.mark.parametrize('rows', [1, 5, 100])
def test_the_loss_in_blocks_of_words_and_rows(words, rows, monkeypatch):
    "Blocks that hold one word, a label's word at either end, all words; labels that repeat; rows without one"
    h,W = inputs((2,9,6), (20,6))
    monkeypatch.setattr(loss, 'WORDS', words)
    monkeypatch.setattr(loss, 'LOGITS', dict(cpu=20*rows))
    labels = torch.tensor([[0, 19, 3, 4, -100, 3, 3, 18, 7], [-100, 1, 4, 8, 19, 0, 0, 5, -100]])
    def all_of(f, scale=1):
        leaves = [(x*scale).requires_grad_() for x in (h, W)]
        out = f(*leaves, labels)
        return out, *torch.autograd.grad(0.3*out, leaves)
    for scale in (1, 30):   # and logits far apart
        for a,b in zip(all_of(FAST_OF['head_loss'], scale), all_of(head_loss, scale), strict=True): assert_close(a, b)
    with torch.no_grad(): assert_close(FAST_OF['head_loss'](h, W, labels), head_loss(h, W, labels))

def test_the_check_says_what_the_plain_one_says():
    ids = torch.zeros(2, 3, dtype=torch.long)
    for batch in ((ids.float(),), (ids[0],), (ids+9,), (ids, ids-1), (ids, ids[:,:2]), (ids, ids, ids.float()), (ids[:,:0],), ([0],)):
        said = []
        for f in (check_batch, FAST_OF['check']):
            with pytest.raises(ValueError) as e: f(9, *batch)
            said.append(str(e.value))
        assert said[0]==said[1]
    FAST_OF['check'](9, torch.full((1,1), 9, device='meta'))         # nobody waits for numbers that lie elsewhere

# ---------------------------------------------------------------- whole whales

ALL_KINDS = dict(num_hidden_layers=4, layer_types=(SWA,CSA,HCA,CSA), compress_rate_csa=2, compress_rate_hca=5, index_topk=3,
    mlp_layer_types=('hash_moe','moe','moe','moe'))

def whale_of(preset, kernels='fast', **changes):
    torch.manual_seed(3)
    small = dict(vocab_size=97, sliding_window=16, initializer_range=0.1, hc_sinkhorn_iters=3)
    cfg = replace(preset(), **small | (ALL_KINDS if preset is tiny_v4 else {}) | changes)
    return use(Whale(cfg).double(), kernels)

def passed(whale, ids, docs, labels=None):
    "Logits, losses, loads and gradients"
    whale.zero_grad()
    out = whale(ids, labels=ids if labels is None else labels, docs=docs)
    losses = {k: getattr(out, k) for k in ('loss', 'mtp_loss', 'balance_loss', 'indexer_loss') if getattr(out, k) is not None}
    sum(losses.values()).backward()
    grads = {n: p.grad for n,p in whale.named_parameters() if p.grad is not None}
    return dict(logits=out.logits.detach(), load=out.expert_load, **{k: v.detach() for k,v in losses.items()}), grads

@pytest.mark.parametrize('preset', [tiny, tiny_v4])
@pytest.mark.parametrize('T,packed', [(1, False), (12, False), (150, False), (150, True), (300, True)])
def test_a_pass(preset, T, packed):
    ids = torch.randint(97, (2,T), generator=torch.Generator().manual_seed(T))
    docs = documents(2, T) if packed else None
    labels = ids.masked_fill(torch.arange(T)%4==1, -100)
    (plain,grads),(fast,fast_grads) = (passed(whale_of(preset, kernels), ids, docs, labels) for kernels in ('plain', 'fast'))
    assert plain.keys()==fast.keys() and grads.keys()==fast_grads.keys()
    assert fast['load'].equal(plain['load'])
    for k in plain: assert_close(fast[k], plain[k], atol=1e-10, rtol=1e-9)
    for n in grads: assert_close(fast_grads[n], grads[n], atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('preset', [tiny, tiny_v4])
@pytest.mark.parametrize('T', [1, 129, 193])      # of blocks of 64 tokens the last holds one query
def test_a_pass_without_gradients(preset, T):
    ids = torch.randint(97, (2,T), generator=torch.Generator().manual_seed(T))
    with torch.inference_mode(): plain,fast = (whale_of(preset, kernels)(ids, labels=ids) for kernels in ('plain', 'fast'))
    for k in ('logits', 'loss', 'mtp_loss', 'balance_loss'): assert_close(getattr(fast, k), getattr(plain, k), atol=1e-10, rtol=1e-9)

@pytest.mark.parametrize('preset', [tiny, tiny_v4])
def test_a_pass_in_bfloat16_products(preset):
    "What autocast costs the fast whale is no more than twice what it costs the plain one"
    ids = torch.randint(97, (2,150), generator=torch.Generator().manual_seed(0))
    exact = passed(whale_of(preset, 'plain'), ids, None)[0]['loss']
    with torch.autocast('cpu', torch.bfloat16):
        off = [abs(passed(whale_of(preset, kernels).float(), ids, None)[0]['loss']-exact) for kernels in ('fast', 'plain')]
    assert off[0]<=2*off[1]+0.002*exact

@pytest.mark.parametrize('preset', [tiny, tiny_v4])
@pytest.mark.parametrize('padded', [False, True])
def test_writing_from_a_cache(preset, padded):
    ids = torch.randint(97, (2,20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded: mask[0,:6] = 0
    ask = dict(temperature=0, attention_mask=mask, eos_token_id=None)
    plain,fast = (generate(whale_of(preset, kernels), ids, 30, **ask) for kernels in ('plain', 'fast'))
    assert fast.equal(plain)
    assert fast.equal(generate(whale_of(preset), ids, 30, **ask, use_cache=False))

@pytest.mark.parametrize('preset,muon_lr', [(tiny, 0.01), (tiny_v4, 0.01), (tiny, 0.)])
def test_training_steps(preset, muon_lr):
    "The same losses, norms and loads, and in the end the same weights"
    recipe = Recipe(steps=4, batch_size=2, accum=2, context=40, lr=1e-3, muon_lr=muon_lr)
    def run(kernels):
        whale = whale_of(preset, kernels)
        opts = [use(opt, kernels) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr)]
        draw = torch.Generator().manual_seed(0)
        rows = [dict(input_ids=torch.randint(97, (4,41), generator=draw), docs=documents(4, 41)) for _ in range(recipe.steps)]
        return [train_step(whale, whale, opts, r, recipe, i) for i,r in enumerate(rows)], whale.state_dict()
    (plain,weights),(fast,fast_weights) = run('plain'),run('fast')
    for a,b in zip(fast, plain, strict=True):
        assert a['expert_load']==b['expert_load'] and not a['skipped']
        for k in ('loss', 'mtp_loss', 'balance_loss', 'grad_norm'): assert a[k]==pytest.approx(b[k], rel=1e-8), k
    for n in weights: assert_close(fast_weights[n], weights[n], atol=1e-7, rtol=1e-6)

# ---------------------------------------------------------------- the table

def test_plain_takes_everything_away_again():
    fresh,whale = whale_of(tiny_v4, 'plain'),use(whale_of(tiny_v4, 'fast'), 'plain')
    for a,b in zip(fresh.modules(), whale.modules(), strict=True): assert vars(a).keys()==vars(b).keys()
    muon = next(opt for opt in make_optimizers(whale, 1e-3, 1e-3) if isinstance(opt, Muon))
    assert 'orthogonalize' in vars(use(muon)) and 'orthogonalize' not in vars(use(muon, 'plain'))

def test_each_part_gets_its_functions_and_no_other_whale_does():
    whale,other = whale_of(tiny_v4, 'fast'),whale_of(tiny_v4, 'plain')
    met = set()
    for (cls,functions),part in itertools.product(FAST.items(), whale.modules()):
        if not isinstance(part, cls): continue
        met.add(cls)
        for name,f in functions.items(): assert name=='see' or vars(part)[name] is f, (cls, name)
    assert met==set(FAST)-{Muon}
    assert not any(name in vars(part) for part in other.modules() for functions in FAST.values() for name in functions)

def test_one_kernel_is_for_heads_of_windows_alone():
    whale = whale_of(tiny)
    assert whale.see.keywords==dict(K=whale.cfg.head_dim)
    assert whale_of(tiny_v4).see.keywords==dict(K=0)

def test_a_wrong_name_is_refused():
    whale = whale_of(tiny)
    with pytest.raises(ValueError, match='choose plain or fast'): use(whale, 'quick')
    assert 'check' in vars(whale)         # and what was in use stays
