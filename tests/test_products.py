"""Matrix products: every size, view and type, with whichever library computes them, against plain sums in float64"""
import json
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
from nanowhale.fast import products as L

def gradients(f, x, W):
    x,W = x.detach().requires_grad_(),W.detach().requires_grad_()
    y = f(x, W)
    return y.detach(), *torch.autograd.grad((y*torch.arange(y.numel()).view_as(y)).sum()/max(1, y.numel()), (x, W))

def views(x):
    "The same numbers, differently laid out in memory"
    yield x
    yield x.mT.contiguous().mT
    yield torch.cat([x, x], -1)[...,:x.shape[-1]]
    yield x[:1].expand_as(x) if len(x)>1 and (x[:1]==x).all() else x

@pytest.mark.parametrize('M,K,N', [(1,1,1), (1,320,70), (2,7,3), (33,64,5), (130,96,257), (512,24,8)])
@pytest.mark.parametrize('f', [L.OneDnnLinear.apply, L.linear])
def test_linear_and_its_gradients(M, K, N, f):
    if not hasattr(torch.ops.mkldnn, '_linear_pointwise'): pytest.skip('this torch has no such operator')
    g = torch.Generator().manual_seed(M*K+N)
    x,W = torch.randn(M, K, generator=g),torch.randn(N, K, generator=g)
    exact = [t.float() for t in gradients(F.linear, x.double(), W.double())]
    for a in views(x):
        for b in (W, W.mT.contiguous().mT):
            for mine,want in zip(gradients(f, a, b), exact): assert_close(mine, want, atol=1e-4*max(1, want.abs().max().item()), rtol=1e-5)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_pass_through(dtype):
    x,W = torch.randn(3, 8, dtype=dtype),torch.randn(5, 8, dtype=dtype)
    assert not L.by_onednn(x, W) and L.linear(x, W).equal(F.linear(x, W))

def test_only_asked_for_gradients_are_made():
    x,W = torch.randn(4, 6),torch.randn(3, 6, requires_grad=True)
    L.OneDnnLinear.apply(x, W).sum().backward()
    assert W.grad is not None and x.grad is None
    with torch.no_grad(): assert not L.linear(x, W).requires_grad

def test_a_slice_of_each_row_is_laid_out_anew(monkeypatch):
    "Not for the numbers: the kernel that takes it as it is needs a hundred times as long"
    if not hasattr(torch.ops.mkldnn, '_linear_pointwise'): pytest.skip('this torch has no such operator')
    met,real = [],L.onednn
    monkeypatch.setattr(L, 'onednn', lambda x, W: met.append(x.is_contiguous()) or real(x, W))
    L.OneDnnLinear.apply(torch.randn(4, 12)[:,:6], torch.randn(3, 6))
    assert met==[True]

def test_autocast_decides():
    x,W = torch.randn(4, 6),torch.randn(3, 6)
    with torch.autocast('cpu', torch.bfloat16):
        assert L.linear(x, W).dtype==torch.bfloat16
        with torch.autocast('cpu', enabled=False): assert L.linear(x, W).dtype==torch.float32

@pytest.mark.parametrize('n,size', [(0,4), (1,4), (3,4), (1,200), (3,200)])
def test_products(n, size):
    x,W = torch.randn(n, size, 160),torch.randn(n, size+3, 160)
    assert_close(L.products(x, W), (x.double()@W.double().mT).float(), atol=1e-4, rtol=1e-5)

MACHINES = json.loads((Path(__file__).resolve().parents[1]/'results/products.json').read_text())['machines']

@pytest.mark.parametrize('m', [m for m in MACHINES if m.get('ceiling')], ids=lambda m: m['processor'])
def test_no_product_exceeds_the_ceiling_of_its_processor(m):
    "A rate above it would mean that one of the two was measured wrongly"
    float32 = [rate for name,rate in m['gflops'].items() if name!='bfloat16']
    float32 += [rate for shape in m['step'] for lib in ('BLAS', 'oneDNN') for rate in shape[lib].values()]
    assert max(float32)<m['ceiling']['float32']
    assert m['gflops']['bfloat16']<m['ceiling'].get('bfloat16', float('inf'))
