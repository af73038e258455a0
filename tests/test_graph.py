"""A step as one graph: the same logits as the ordinary step, for every window, batch, padding and type, compiled and not"""
import shutil
from dataclasses import replace
import pytest, torch
from torch.testing import assert_close
from nanowhale.model.config import CSA, HCA, SWA
from nanowhale.presets import tiny
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import Recipe
from nanowhale.train.step import train_step
from nanowhale.train.evaluate import evaluating
from nanowhale.generate.cache import Cache
from nanowhale.generate.sample import generate, left_pad, next_logits
from nanowhale.fast import experts, graph, products
from nanowhale.fast.graph import Decoder, one_step
from nanowhale.fast.kernels import use
from nanowhale.cli import main

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')

def small(window=9, layers=2, kernels='fast', **changes):
    "A whale of odd sizes whose weights are large enough for every part to matter"
    torch.manual_seed(window)
    sizes = dict(vocab_size=97, sliding_window=window, num_hidden_layers=layers, num_nextn_predict_layers=0,
        initializer_range=0.2, hc_sinkhorn_iters=2)
    return use(Whale(replace(tiny(), **sizes | changes)).double(), kernels)

def far_sighted(window=6, **changes):
    "The same with layers of every kind, blocks of 2 and of 5, and two entries for a query to choose"
    return small(window, 4, layer_types=(SWA, CSA, HCA, CSA), compress_rate_csa=2, compress_rate_hca=5,
        index_topk=2, **changes)

def logits(whale, ids, docs=None, prompt=3, decoder=None):
    "[B,T-prompt+1,V] with the ordinary step, or with a decoder after the prompt"
    with evaluating(whale):
        past = Cache(whale.cfg)
        out = [next_logits(whale, ids[:,:prompt], None if docs is None else docs[:,:prompt], past)]
        step = decoder(whale, past, ids.shape[1], None if docs is None else docs[:,:prompt]) if decoder else None
        for t in range(prompt, ids.shape[1]):
            out.append(step(ids[:,t:t+1]) if step else next_logits(whale, ids[:,:t+1], None if docs is None else docs[:,:t+1], past))
    return torch.stack(out, 1)

def plain(*args): return Decoder(*args, compile=False)

@pytest.mark.parametrize('window', [1, 2, 9, 40])
@pytest.mark.parametrize('prompt', [1, 3, 9, 20])
@pytest.mark.parametrize('B,kernels', [(1, 'fast'), (3, 'fast'), (2, 'plain')])
def test_the_step_with_fixed_shapes(window, prompt, B, kernels):
    whale,ids = small(window, kernels=kernels),torch.randint(97, (B,31))
    assert_close(logits(whale, ids, prompt=prompt, decoder=plain), logits(whale, ids, prompt=prompt), atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('window', [1, 6, 40])
@pytest.mark.parametrize('B,prompt,kernels', [(1, 1, 'fast'), (1, 10, 'fast'), (3, 3, 'fast'), (3, 21, 'fast'), (2, 7, 'plain')])
def test_layers_that_compress(window, prompt, B, kernels, monkeypatch):
    monkeypatch.setattr(graph, 'LEAST', 8)
    whale,ids = far_sighted(window, kernels=kernels),torch.randint(97, (B,39))
    assert_close(logits(whale, ids, prompt=prompt, decoder=plain), logits(whale, ids, prompt=prompt), atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('changes', [dict(index_topk=100), dict(layer_types=(HCA,)*4), dict(layer_types=(CSA,)*4),
    dict(yarn_factor=4., yarn_context=16)], ids=str)
def test_other_layers_that_compress(changes):
    whale,ids = far_sighted(6),torch.randint(97, (2,30))
    whale = use(Whale(replace(whale.cfg, **changes)).double())
    assert_close(logits(whale, ids, decoder=plain), logits(whale, ids), atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('least', [1, 8, 256])
def test_rings_shorter_than_the_window(least, monkeypatch):
    monkeypatch.setattr(graph, 'LEAST', least)
    whale,ids = small(64),torch.randint(97, (2,33))
    assert_close(logits(whale, ids, decoder=plain), logits(whale, ids), atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('make', [small, far_sighted])
@pytest.mark.parametrize('lengths', [(8, 3, 1), (1, 17, 12, 6)])
def test_padding_is_not_seen(make, lengths):
    whale = make()
    ids,mask = left_pad([torch.randint(97, (n,)).tolist() for n in lengths])
    ask = dict(temperature=0, attention_mask=mask, eos_token_id=None)
    assert generate(whale, ids, 25, **ask, decoder=plain).equal(generate(whale, ids, 25, **ask))

def test_hash_layers_and_the_first_whales_streams():
    for changes in (dict(mlp_layer_types=('hash_moe', 'moe')), dict(hc_transposed=True)):
        whale,ids = small(**changes),torch.randint(97, (2,20))
        assert_close(logits(whale, ids, decoder=plain), logits(whale, ids), atol=1e-10, rtol=1e-8)

@pytest.mark.parametrize('make', [small, far_sighted])
def test_what_was_read_is_left_alone(make):
    whale,ids = make(),torch.randint(97, (1,12))
    held = lambda past: [x.clone() for layer in past.layers for x in (layer.kv, *(y for m in getattr(layer, 'far', ()) for y in (m.tail, m.entries)))]
    with evaluating(whale):
        past = Cache(whale.cfg)
        next_logits(whale, ids, cache=past)
        kept = held(past)
        step = plain(whale, past, 20)
        for t in range(3): step(torch.tensor([[t]]))
        assert past.length==12 and all(a.equal(b) for a,b in zip(kept, held(past), strict=True))

def test_what_it_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(graph, 'LEAST', 4)
    ids = torch.randint(97, (1,12))
    with pytest.raises(ValueError, match='without spare slots'): plain(small(), Cache(small().cfg, spare=2), 20)
    for whale in (small(64), far_sighted(9)):
        with pytest.raises(ValueError, match='made for 16 tokens'), evaluating(whale):
            past = Cache(whale.cfg)
            next_logits(whale, ids, cache=past)
            step = plain(whale, past, 16)
            for _ in range(5): step(ids[:,:1])

def test_a_decoder_needs_a_cache():
    with pytest.raises(ValueError, match='use_cache must be True'): generate(small(), torch.zeros(1, 3).long(), 2, use_cache=False, decoder=plain)

def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    graph.compiled.cache_clear()
    with pytest.raises(ValueError, match='C\\+\\+ compiler'): graph.compiled('cpu')

def test_no_compiler_ends_a_command_in_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    for words in (['train'], ['bench', '--preset', 'tiny', '--context', '16']):
        assert main([*words, '--compile', '--device', 'cpu', '--out', str(tmp_path/'out')])==1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said)==1 and 'C++ compiler' in said[0]
    assert not any(tmp_path.iterdir())

# ---------------------------------------------------------------- compiled

@pytest.mark.parametrize('make', [small, far_sighted])
@pytest.mark.parametrize('B', [1, 2])
def test_one_graph(B, make):
    "Nothing in the step makes the compiler give up and go back to Python"
    whale,ids = make(),torch.zeros(B, 9, dtype=torch.long)
    with evaluating(whale):
        past = Cache(whale.cfg)
        next_logits(whale, ids, cache=past)
        d = plain(whale, past, 20)
        seen = torch._dynamo.explain(one_step)(whale, ids[:,:1], d.pos, d.first, d.rings, d.far, d.ends)
    assert (seen.graph_count, seen.graph_break_count)==(1, 0), seen.break_reasons

@needs_compiler
@pytest.mark.parametrize('B,dtype,changes', [*(pytest.param(B, dtype, {}, marks=pytest.mark.slow) for B,dtype in ((1, torch.float32), (2, torch.bfloat16))),
    (1, torch.float32, dict(layer_types=(CSA,), compress_rate_csa=2, index_topk=2))], ids=['one', 'two in bfloat16', 'compressing'])
def test_compiled(B, dtype, changes):
    torch._dynamo.reset(); graph.compiled.cache_clear()
    whale,ids = small(layers=1, **changes),torch.randint(97, (B,24))
    exact = logits(whale, ids).float()
    whale = whale.float().to(dtype)
    got = logits(whale, ids, decoder=Decoder)
    if dtype==torch.float32: assert_close(got, exact, atol=1e-4, rtol=1e-4)
    else: assert (got-exact).abs().mean()<=1.1*(logits(whale, ids)-exact).abs().mean()      # no worse than the ordinary step's own rounding

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_sums(dtype):
    x,W,each = torch.randn(3, 5, 40, dtype=dtype),torch.randn(7, 40, dtype=dtype),torch.randn(3, 5, 7, 40, dtype=dtype)
    close = lambda a, b: assert_close(a.double(), b, atol=0.05 if dtype==torch.bfloat16 else 1e-4, rtol=1e-2 if dtype==torch.bfloat16 else 1e-5)
    close(products.sums(x, W), x.double()@W.double().mT)
    close(products.sums(x, each), (each.double()@x.double()[...,None])[...,0])

def test_experts_each_for_itself():
    J,E,D,I = 5,3,8,6
    x,gu,down = torch.randn(J, D),torch.randn(E, 2*I, D),torch.randn(E, D, I)
    expert = torch.tensor([0, 0, 1, 2, 2])
    assert_close(experts.each_for_itself(x, expert, gu, down, 1.), experts.one_by_one(x, torch.tensor([2, 1, 2]), gu, down, 1.), atol=1e-5, rtol=1e-5)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(experts.each_for_itself(x[order], expert[order], gu, down, 1.), experts.each_for_itself(x, expert, gu, down, 1.)[order])

@needs_compiler
@pytest.mark.parametrize('dtype,mtp', [(torch.float64, 0), *(pytest.param(dtype, 1, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float32))])
def test_training_steps_of_a_compiled_whale(dtype, mtp):
    "Losses, norms, loads and what the watchers see, over three steps, beside the same steps uncompiled; in float64 to the last choice of an expert"
    torch._dynamo.reset()
    def run(compile):
        whale = small(layers=1, num_nextn_predict_layers=mtp, initializer_range=0.05).to(dtype)
        net = torch.compile(whale, dynamic=False) if compile else whale
        recipe = Recipe(steps=3, batch_size=2, accum=2, context=20, compile=compile)
        opts = [use(opt) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr)]
        draw = torch.Generator().manual_seed(0)
        for step in range(3):
            rows = dict(input_ids=torch.randint(97, (4,21), generator=draw), docs=(torch.arange(21)>13).long().expand(4, -1).contiguous())
            yield train_step(net, whale, opts, rows, recipe, step)
    for got,want in zip(run(True), run(False)):
        assert got.keys()==want.keys()
        assert got['expert_load']==want['expert_load'] or dtype==torch.float32   # where rounding turns what was nearly a tie
        for k in ('loss', *('mtp_loss',)*mtp, 'balance_loss', 'grad_norm', 'comb_logit', 'column_error'): assert got[k]==pytest.approx(want[k], rel=2e-3), k

@pytest.mark.slow
@needs_compiler
def test_a_compiled_whale_is_compiled_once():
    "With every kind of layer and rows of many blocks: within the compiler's limit, and with the gradients of the uncompiled one"
    torch._dynamo.reset()
    whale = far_sighted(window=20, num_nextn_predict_layers=1, initializer_range=0.05)     # in float64, where no two entries change their order
    ids,docs = torch.randint(97, (2,200)),(torch.arange(200)>90).long().expand(2, -1).contiguous()
    def step(net):
        whale.zero_grad()
        out = net(ids, labels=ids, docs=docs)
        (out.loss+out.mtp_loss+out.indexer_loss+out.balance_loss).backward()
        return [out.loss.detach(), out.indexer_loss.detach(), *(p.grad for p in whale.parameters() if p.grad is not None)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        net = torch.compile(whale, dynamic=False)
        step(net); got = step(net)
    for a,b in zip(got, step(whale), strict=True): assert_close(a, b, atol=1e-6, rtol=1e-5)
