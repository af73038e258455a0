"""Few bits: rounding against tables of all codes and torch's own types, blocks against loops, whales that read and multiply in formats."""
import copy, math
import pytest, torch
from hypothesis import given, strategies as st
from torch.testing import assert_close
import beyond_lowbit as beyond
from nanowhale.beyond.lowbit import (E2M1, E4M3, ENTRY4, FP4, FP8, HIGH, PRODUCTS, STILL8, Format, Numbers, apart, caches,
    e4m3_scale, hadamard, multiply_low, nearest, picks_changed, power, power_scale, read_low, turned)
from nanowhale.fast.kernels import use
from nanowhale.generate.cache import Cache
from nanowhale.model.attention import Attention
from nanowhale.model.compress import Indexer
from nanowhale.model.plain import Linear
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny_v4
from test_parity import randomise
from test_properties import examples, seeds

FORMATS = dict(fp8=FP8, fp4=FP4, fp4_16=Format(E2M1, (1,16)), fp8_64=STILL8, inputs=PRODUCTS['v4']['inputs'],
    squares=PRODUCTS['v4']['weights'], small_squares=PRODUCTS['v41']['weights'])     # all with powers of two

def table(exponent_bits, mantissa_bits, bias, last=None):
    "Values of all codes without a sign"
    codes = range(2**(exponent_bits+mantissa_bits)-(last is not None))
    def value(e, m): return (bool(e)+m*2.0**-mantissa_bits)*2.0**(max(e, 1)-bias)
    return torch.tensor([value(*divmod(c, 2**mantissa_bits)) for c in codes], dtype=torch.float64)

TABLES = {E2M1: table(2, 1, 1), E4M3: table(4, 3, 7, 'NaN')}

def by_table(x, numbers):
    "Of the two values around each number the nearer; of equals the one at an even place"
    t = TABLES[numbers]
    a = x.double().abs().clamp(max=numbers.largest)
    hi = torch.searchsorted(t, a).clamp(max=len(t)-1)
    lo = (hi-1).clamp(min=0)
    up,down = t[hi]-a, a-t[lo]
    take_hi = (up<down) | ((up==down) & (hi%2==0))
    return torch.where(take_hi, t[hi], t[lo]).copysign(x.double()).to(x.dtype)

def spread(seed, *shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype)*torch.exp2(torch.randint(-12, 12, shape, generator=g).to(dtype))

# ---------------------------------------------------------------- single numbers

@pytest.mark.parametrize('numbers', TABLES, ids=['e2m1', 'e4m3'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_marks_middles_and_their_neighbours(numbers, dtype):
    t = TABLES[numbers].to(dtype)
    spots = torch.cat([t, (t[1:]+t[:-1])/2, 4*t[-1:]])
    x = torch.cat([spots, *(spots.nextafter(spots.new_tensor(to)) for to in (math.inf, -math.inf))])
    assert torch.equal(nearest(x, numbers), by_table(x, numbers)) and torch.equal(nearest(-x, numbers), -nearest(x, numbers))

@examples(25)
@given(seed=seeds)
def test_any_number(seed):
    x = spread(seed, 3000)
    for numbers in TABLES: assert torch.equal(nearest(x, numbers), by_table(x, numbers))

def test_every_bf16_number_as_torch_casts_it():
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    x = x[x.isfinite()].clamp(-448, 448)
    assert torch.equal(nearest(x, E4M3), x.to(torch.float8_e4m3fn).float())

def test_every_code_of_torchs_type_is_a_mark():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    assert torch.equal(nearest(codes, E4M3), codes) and torch.equal(codes.abs().unique().double(), TABLES[E4M3])

@examples(30)
@given(seed=seeds)
def test_the_type_of_five_exponent_bits_too(seed):
    "e5m2 is not used by the chapter: the rounding is right for any type"
    x = spread(seed, 3000)
    assert torch.equal(nearest(x, Numbers(8, 2, -14, 57344.0, 1e-4)), x.to(torch.float8_e5m2).float())

def test_what_is_no_number_stays_none(): assert nearest(torch.tensor([math.nan]), E2M1).isnan() and nearest(torch.tensor([math.inf]), E2M1)==6

@pytest.mark.parametrize('dtype,low', [(torch.float32, -149), (torch.float64, -1000)])
def test_powers_are_exact(dtype, low):
    e = torch.arange(low, 128)
    assert [math.frexp(v) for v in power(e, torch.zeros(1, dtype=dtype)).tolist()]==[(.5, i+1) for i in e.tolist()]

# ---------------------------------------------------------------- scales

@pytest.mark.parametrize('numbers', TABLES, ids=['e2m1', 'e4m3'])
def test_the_power_is_the_first_that_is_enough(numbers):
    edges = numbers.largest*torch.exp2(torch.arange(-8., 9))
    a = torch.cat([edges, edges.nextafter(torch.tensor(0.)), edges.nextafter(torch.tensor(math.inf)), torch.rand(500)*99])
    s = power_scale(a, numbers)
    assert (s*numbers.largest>=a).all() and (s*numbers.largest<2*a).all()
    bits = (a*(1/numbers.largest)).view(torch.int32)         # as kernels do: exponent field, and one more if anything follows
    assert torch.equal(s, torch.exp2(((bits>>23)-127+((bits & 0x7fffff)!=0)).float()))

def test_floors_of_scales():
    zero = torch.zeros(2, 32)
    for f in (*FORMATS.values(), ENTRY4): assert torch.equal(f(zero), zero)
    assert FP8.codes(zero)[1].flatten()[0]==2.0**-22 and FP4.codes(zero)[1].flatten()[0]==2.0**-126      # 1e-4/448, upwards
    assert e4m3_scale(torch.zeros(1), E2M1)==2.0**-9

# ---------------------------------------------------------------- blocks

def naive(x, f):
    y = torch.empty_like(x)
    for i in range(0, len(x), f.tile[0]):
        for j in range(0, x.shape[1], f.tile[1]):
            at = slice(i, i+f.tile[0]), slice(j, j+f.tile[1])
            a = x[at].abs().max()
            if f.scale is e4m3_scale: s = by_table((a.clamp(min=6*2.0**-9)/6)[None], E4M3)[0]
            else: s = torch.tensor(2.0**next(k for k in range(-126, 128) if 2.0**k*f.numbers.largest>=max(a.item(), f.numbers.floor)))
            y[at] = s*by_table(x[at]/s, f.numbers)
    return y

@pytest.mark.parametrize('f', [*FORMATS.values(), ENTRY4, Format(E4M3, (3,5))], ids=[*FORMATS, 'entry', 'odd'])
@pytest.mark.parametrize('shape', [(1,1), (5,70), (33,31), (130,129)])
def test_blocks_against_loops(f, shape):
    x = spread(1, *shape)
    assert torch.equal(f(x), naive(x, f)) and torch.equal(f(torch.stack([x, -2*x]))[1], f(-2*x))

@pytest.mark.parametrize('name', FORMATS)
@examples(15)
@given(seed=seeds, k=st.integers(-20, 20))
def test_powers_of_two_commute_and_twice_is_once(name, seed, k):
    f,x = FORMATS[name], torch.randn(7, 96, generator=torch.Generator().manual_seed(seed))
    if f.numbers is E4M3: k = max(k, -4)                     # above the floor of its scales
    y = f(x)
    assert torch.equal(f(x*2.0**k), y*2.0**k) and torch.equal(f(y), y)

@examples(30)
@given(seed=seeds)
def test_an_entry_stays_where_its_scale_has_a_leading_one(seed):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ENTRY4(ENTRY4(x)), ENTRY4(x))
    low = torch.full((1, 16), 9*2.0**-9)
    assert not torch.equal(ENTRY4(ENTRY4(low)), ENTRY4(low))

@examples(30)
@given(seed=seeds)
def test_a_block_of_fp4_is_summed_exactly_in_any_order(seed):
    g = torch.Generator().manual_seed(seed)
    (a,s),(b,t) = (FP4.codes(torch.randn(6, 32, generator=g)) for _ in 'qk')
    products = (a*b).flatten(1)
    total = products.double().sum(1)
    assert all(torch.equal(products[:,torch.randperm(32, generator=g)].cumsum(1)[:,-1].double(), total) for _ in range(4))
    assert torch.equal(((a*s)*(b*t)).double().flatten(1).sum(1), total*(s*t).flatten())

@pytest.mark.parametrize('apart,same', [(14, True), (15, False)])
def test_fp4_fits_into_fp8_while_scales_are_near(apart, same):
    w = torch.tensor([[6.0]+[.5]*31, [6*2.0**-apart]+[.5*2.0**-apart]*31])
    assert torch.equal(FP4(w), w) and torch.equal(PRODUCTS['v4']['weights'](w), w)==same

@pytest.mark.parametrize('f', [FP8, FP4, ENTRY4, STILL8], ids=['fp8', 'fp4', 'entry', 'still'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_values_to_the_bit_and_slopes_of_one(f, dtype):
    x = torch.randn(5, 96, dtype=dtype).requires_grad_()
    y = f(x)
    codes,scales = f.codes(x.detach())
    assert y.dtype==dtype and torch.equal(y, (codes*scales).flatten(-4,-3).flatten(-2)[:,:96].to(dtype))
    d = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(y, x, d)[0], d)

def test_no_entries_are_no_trouble():
    for f in (FP4, ENTRY4, STILL8): assert f(torch.zeros(2, 0, 32)).shape==(2, 0, 32)

def test_bytes():
    assert [FP8.bytes(1, 512), ENTRY4.bytes(1, 512), FP4.bytes(1, 128), STILL8.bytes(1, 448)]==[528, 288, 68, 455]
    assert PRODUCTS['v4']['weights'].bytes(300, 130)==300*130+3*2

# ---------------------------------------------------------------- the turn

@pytest.mark.parametrize('n', [1, 2, 32, 128])
def test_the_turn(n):
    H = hadamard(n).double()
    assert_close(H@H.mT, torch.eye(n).double()) and torch.equal(H, H.mT)
    x,y = torch.randn(2, 3, n, dtype=torch.float64)
    assert_close(turned(x)@turned(y).mT, x@y.mT)
    assert_close(turned(turned(x)), x)

def test_turned_rows_are_walshs():
    "Row i has the sign of (-1)^(ones in i & j)"
    signs = torch.tensor([[(-1.)**(i & j).bit_count() for j in range(16)] for i in range(16)])
    assert torch.equal(hadamard(16)*4, signs)

# ---------------------------------------------------------------- whales

def whale(dtype=torch.float32):
    torch.manual_seed(0)
    w = randomise(Whale(tiny_v4(64)))
    return w.to(dtype).eval().requires_grad_(False)

IDS = torch.randint(64, (2, 90), generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('kernels', ['plain', 'fast'])
def test_formats_that_keep_all_change_no_bit_and_each_is_felt(kernels):
    w = use(whale(), kernels)
    before = w(IDS).logits
    assert torch.equal(read_low(copy.deepcopy(w))(IDS).logits, before)
    for formats in caches(16).values():
        for part,f in formats.items(): assert not torch.equal(read_low(copy.deepcopy(w), **{part: f})(IDS).logits, before), part

@pytest.mark.parametrize('name', ['v4', 'v41'])
def test_token_by_token_reads_what_one_pass_reads(name):
    w = read_low(whale(torch.float64), **caches(16)[name])
    cache = Cache(w.cfg)
    parts = [(0, 35), (35, 50), *((i, i+1) for i in range(50, 66))]
    assert_close(torch.cat([w(IDS[:,a:b], cache=cache).logits for a,b in parts], 1), w(IDS[:,:66]).logits)

def test_attention_and_indexer_read_the_formats_values():
    "Of what the whale's parts compute with, nothing but the three is rounded"
    w,read = whale(),[]
    def attend(q, kv, sinks, mask, far=None, far_mask=None):
        read.append((q, kv, far))
        return Attention.attend(q, kv, sinks, mask, far, far_mask)
    def scores(q, w, keys, seen=None):
        read.append((q, keys))
        return Indexer.index_scores(q, w, keys, seen)
    for m in w.modules():
        if isinstance(m, Attention): m.attend = attend
        if isinstance(m, Indexer): m.index_scores = scores
    read_low(w, **caches(16)['v41'])(IDS)
    for q,*kept in read:
        if len(kept)==1: assert torch.equal(FP4(q), q) and torch.equal(FP4(kept[0]), kept[0])
        else:
            assert not torch.equal(FP8(q), q) and torch.equal(FP8(kept[0]), kept[0])
            if kept[1] is not None: assert torch.equal(ENTRY4(kept[1]), kept[1])
    assert len(read)>=4

def test_v4_leaves_rotating_channels_in_bf16():
    x = torch.randn(3, 7, 40)
    y = apart(x, 12)
    assert torch.equal(y[...,28:], x[...,28:].bfloat16().float()) and torch.equal(y[...,:28], STILL8(x[...,:28]))

def test_products_are_rounded_where_they_should_be():
    w = multiply_low(whale(), **PRODUCTS['v41'], experts=FP4)
    low = {n for n,m in w.named_modules() if isinstance(m, Linear) and 'product' in vars(m)}
    high = {n for n,m in w.named_modules() if isinstance(m, Linear)}-low
    assert all(n.endswith(HIGH) for n in high) and {n.rpartition('.')[-1] for n in high}>={'lm_head', 'o_a_proj', 'weights_proj'}
    layer = w.model.layers[1].self_attn
    assert {f'model.layers.1.self_attn.{n}' for n in ('q_a_proj', 'kv_proj', 'o_b_proj', 'compressor.indexer.q_b_proj')}<=low
    x = torch.randn(3, 128)
    assert_close(layer.kv_proj(x), FP8(x)@PRODUCTS['v41']['weights'](layer.kv_proj.weight).mT)
    experts = w.model.layers[1].mlp.experts
    idx,gate = torch.tensor([[0, 2], [1, 3], [2, 3]]), torch.rand(3, 2)
    assert_close(experts(x, idx, gate), type(experts).run(FP8(x), idx, gate, FP4(experts.gate_up_proj), FP4(experts.down_proj), experts.limit))

def test_a_whale_learns_through_rounded_products():
    torch.manual_seed(0)
    w = multiply_low(read_low(Whale(tiny_v4(64)), **caches(16)['v41']), **PRODUCTS['v41'], experts=FP4)
    w(IDS, labels=IDS).loss.backward()
    silent = [n for n,p in w.named_parameters() if p.grad is None and 'indexer' not in n and not n.startswith('mtp.')]
    assert not silent and all(p.grad.isfinite().all() for p in w.parameters() if p.grad is not None)

def test_picks_that_changed():
    old,new = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool(), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    assert picks_changed(old, new)==.25 and picks_changed(old, old)==0

# ---------------------------------------------------------------- planted

def away(x, numbers):      # ties away from zero
    step = power((torch.frexp(x).exponent-1).clamp(min=numbers.lowest)-numbers.mantissa, x)
    return ((x/step).abs()+.5).floor().copysign(x)*step
def no_floor(x, numbers):  # leading ones below the smallest exponent
    step = power(torch.frexp(x).exponent-1-numbers.mantissa, x)
    return ((x/step).round()*step).clamp(-numbers.largest, numbers.largest)

@pytest.mark.parametrize('wrong', [away, no_floor])
def test_wrong_roundings_are_seen(wrong, monkeypatch):
    monkeypatch.setattr('test_lowbit.nearest', wrong)
    with pytest.raises(AssertionError): test_marks_middles_and_their_neighbours(E2M1, torch.float32)

def test_a_scale_that_is_rounded_down_is_seen(monkeypatch):
    def floor(a, numbers): return power(torch.frexp(a.clamp(min=numbers.floor)/numbers.largest).exponent-1, a)
    monkeypatch.setattr('test_lowbit.power_scale', floor)
    with pytest.raises(AssertionError): test_the_power_is_the_first_that_is_enough(E2M1)

# ---------------------------------------------------------------- the campaign

def test_formats_of_the_campaign():
    w = whale()
    before = w(IDS).logits
    for name,change in beyond.low_formats(16).items():
        assert torch.equal(change(copy.deepcopy(w))(IDS).logits, before)==(name=='float32'), name
    assert set(beyond.TRAINED)<set(beyond.low_formats(16))
    for name,change in beyond.CONTROLS.items():
        torch.manual_seed(0)
        assert torch.equal(change(copy.deepcopy(w))(IDS).logits, before)==(name=='float32'), name

def test_picks_are_noted_where_there_is_a_choice():
    w = use(whale())
    lists = beyond.noting_picks(w)
    w(IDS)
    (picks,), = lists
    k,m = w.cfg.index_topk, w.cfg.compress_rate_csa
    choosing = sum((t+1)//m>k for t in range(90))
    assert len(lists)==1 and picks.shape==(2*choosing, 90//m) and (picks.sum(-1)==k).all()
