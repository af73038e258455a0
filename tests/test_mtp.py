"""The MTP chapter over many sizes: labels and embeddings against loops, reach, packing, and what each planted bug turns red."""
import random
from contextlib import contextmanager, nullcontext
from unittest.mock import patch
import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
import nanowhale.model.whale
from nanowhale.model.config import SWA, WhaleConfig
from nanowhale.presets import count_flops, count_params, nanowhale_100m
from nanowhale.model import mtp
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import Whale
from nanowhale.model.mtp import MTPBlock, next_embeddings, shift_labels
from nanowhale.fast import loss as fast
from nanowhale.fast.kernels import KERNELS, use

HEAD_LOSS = dict(plain=mtp.head_loss, fast=fast.head_loss)

def surroundings(cfg, ids): return views(cfg, whole_rows(cfg, ids, None))[SWA]   # rope and mask of whole rows

def small(**kw):
    return WhaleConfig(**dict(dict(
        vocab_size=31, hidden_size=14, num_hidden_layers=2, num_attention_heads=4, head_dim=10, qk_rope_head_dim=6, q_lora_rank=7,
        o_groups=2, o_lora_rank=5, sliding_window=4, moe_intermediate_size=9, n_routed_experts=5, num_experts_per_tok=2, hc_mult=3,
        hc_sinkhorn_iters=5, initializer_range=0.3), **kw))

def random_docs(r, B, T):
    "Rows of documents of random lengths, some beginning with padding"
    rows = []
    for _ in range(B):
        row,doc = [-1]*r.choice([0, 0, r.randint(0, T-1)]),0
        while len(row)<T: row,doc = row+[doc]*r.randint(1, 5),doc+1
        rows.append(row[:T])
    return torch.tensor(rows)

def slow_shift(labels, by, docs):
    out = torch.full_like(labels, -100)
    for b in range(labels.shape[0]):
        for i in range(labels.shape[1]-by):
            if docs[b,i+by]==docs[b,i] and docs[b,i]>=0: out[b,i] = labels[b,i+by]
    return out

def slow_next(e, docs):
    out = torch.zeros_like(e)
    for b in range(e.shape[0]):
        for i in range(e.shape[1]-1):
            if docs[b,i+1]==docs[b,i]: out[b,i] = e[b,i+1]
    return out

@pytest.mark.parametrize('seed', range(40))
def test_labels_and_embeddings_are_the_loops(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    B,T,D = r.randint(1, 3),r.randint(1, 19),r.randint(1, 5)
    docs,labels,e = random_docs(r, B, T),torch.randint(0, 30, (B,T)),torch.randn(B,T,D)
    labels[torch.rand(B,T)<0.2] = -100
    for by in (1,2,3):
        assert_close(shift_labels(labels, by, docs), slow_shift(labels, by, docs))
        assert_close(shift_labels(labels, by), slow_shift(labels, by, torch.zeros_like(docs)))
    assert_close(next_embeddings(e, docs), slow_next(e, docs))
    assert_close(next_embeddings(e), slow_next(e, torch.zeros_like(docs)))
    told = next_embeddings(torch.ones(B,T,1), docs)[...,0]>0
    assert told[shift_labels(labels, 2, docs)!=-100].all()   # who has a label was told the token before it

def test_padding_is_no_target():
    "Padding stands next to padding: the same document, and still nothing to learn"
    assert (shift_labels(torch.arange(5)[None], 1, torch.tensor([[-1,-1,-1,0,0]]))==torch.tensor([[-100,-100,-100,4,-100]])).all()

def test_next_embeddings_pass_gradients_on():
    e = torch.randn(1,5,2, requires_grad=True)
    next_embeddings(e, torch.tensor([[0,0,1,1,1]])).sum().backward()
    assert_close(e.grad[0,:,0], torch.tensor([0.,1,0,1,1]))

def naive_loss(h, W, labels):
    logits = F.linear(h, W)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0,1)
    return F.cross_entropy(logits, labels.flatten().long(), reduction='sum')/(labels!=-100).sum().clamp(min=1)

def loss_and_grads(f, h, W, labels, autocast=False):
    h,W = h.detach().requires_grad_(),W.detach().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): loss = f(h, W, labels)
    (0.3*loss).backward()
    return loss.detach(), h.grad, W.grad

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('int_dtype,V,kernels', [(torch.int64, 7, 'plain'), (torch.int64, 7, 'fast'), (torch.int32, 7, 'plain'),
    (torch.int32, 7, 'fast'), (torch.int64, 2**22, 'fast')])   # one slice; slices of eight rows
def test_head_loss(dtype, int_dtype, V, kernels):
    head_loss = HEAD_LOSS[kernels]
    torch.manual_seed(0)
    shape = (2,13) if V==7 else (1,10)
    h,W = torch.randn(*shape, 3, dtype=dtype),torch.randn(V, 3, dtype=dtype)
    labels = torch.randint(0, V, shape, dtype=int_dtype).masked_fill(torch.rand(shape)<0.2, -100)
    labels[0,1],labels[0,2] = -100,labels[0,0]
    fast,slow,exact = (loss_and_grads(f, *hW, labels) for f,hW in ((head_loss, (h, W)), (naive_loss, (h, W)), (naive_loss, (h.double(), W.double()))))
    for f,s,e in zip(fast, slow, exact):
        assert f.dtype==dtype
        assert (f-e).norm()<=2*(s-e).norm()+(1e-12 if dtype==torch.float64 else 1e-6)*e.norm()
    none = loss_and_grads(head_loss, h, W, torch.full(shape, -100, dtype=int_dtype))
    assert all((t==0).all() for t in none)

@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('kernels', KERNELS)
def test_head_loss_in_bf16_is_no_worse_than_the_naive_one(autocast, kernels):
    head_loss = HEAD_LOSS[kernels]
    torch.manual_seed(0)
    h,W,labels = torch.randn(2, 40, 24),torch.randn(300, 24),torch.randint(0, 300, (2,40))
    exact = loss_and_grads(naive_loss, h.double(), W.double(), labels)
    if not autocast: h,W = h.bfloat16(),W.bfloat16()
    fast,slow = (loss_and_grads(f, h, W, labels, autocast) for f in (head_loss, naive_loss))
    assert fast[0].dtype==torch.float32
    for f,s,e in zip(fast, slow, exact):
        assert f.dtype==s.dtype and (f-e).norm()<=4*(s-e).norm()   # two ways to round; sums in bfloat16 would cost many times as much

def test_the_fast_head_loss_keeps_no_logits_and_needs_no_gradient():
    head_loss = fast.head_loss
    h,W,labels = torch.randn(1, 64, 4),torch.randn(2**20, 4),torch.randint(0, 9, (1,64))
    with torch.no_grad(): quiet = head_loss(h, W, labels)
    assert not quiet.requires_grad
    assert_close(quiet, loss_and_grads(head_loss, h, W, labels)[0])
    loss = head_loss(h.requires_grad_(), W.requires_grad_(), labels)
    kept = loss.grad_fn.next_functions[0][0]
    assert type(kept).__name__=='LinearCrossEntropyBackward' and sum(t.numel() for t in kept.saved_tensors)==h.numel()+W.numel()

def test_block_is_v3s_formula():
    "Two D x D matrices are V3's one D x 2D matrix on the concatenation (eq. 21), per stream"
    torch.manual_seed(0)
    cfg = small()
    whale,ids = Whale(cfg),torch.randint(0, 31, (2,9))
    block,X,e = whale.mtp[0],whale(ids).streams,whale.model.embed_tokens(ids)
    for norm in (block.enorm, block.hnorm): torch.nn.init.normal_(norm.weight)
    rope,mask = surroundings(cfg, ids)
    W = torch.cat([block.h_proj.weight, block.e_proj.weight], 1)
    norm = lambda n,x: x*(x.square().mean(-1, keepdim=True)+cfg.rms_norm_eps).rsqrt()*n.weight
    both = torch.cat([norm(block.hnorm, X), norm(block.enorm, e)[:,:,None].expand_as(X)], -1)
    Y,_ = super(MTPBlock, block).forward(both @ W.T, rope, mask)
    assert_close(block(X, e, rope, mask)[0], block.norm(block.hc_head(Y)), atol=1e-5, rtol=1e-5)

def test_own_and_shared_parts():
    whale = Whale(small())
    names = {n.removeprefix('mtp.0.') for n in whale.state_dict() if n.startswith('mtp.')}
    block = {n.removeprefix('model.layers.0.') for n in whale.state_dict() if n.startswith('model.layers.0.')}
    assert names-block=={'e_proj.weight', 'h_proj.weight', 'enorm.weight', 'hnorm.weight', 'norm.weight',
        'hc_head.hc_fn', 'hc_head.hc_base', 'hc_head.hc_scale'}
    assert block<=names   # and no embedding, no head of its own

def test_cost_at_110m():
    cfg = nanowhale_100m()
    with torch.device('meta'): n = sum(v.numel() for v in MTPBlock(cfg).state_dict().values())
    assert n==count_params(cfg)['mtp']==3_664_007
    flops = count_flops(cfg, 2048)
    assert abs(flops['mtp']/sum(flops.values())-0.389)<1e-3 and 0.90<flops['head']/flops['mtp']<0.91

def test_rows_shorter_than_the_shift_and_labels_that_are_none():
    assert shift_labels(torch.tensor([[5]]), 2).tolist()==[[-100]]
    assert shift_labels(torch.tensor([[5,-100,7]]), 1).tolist()==[[-100,7,-100]]

# ---------------------------------------------------------------- where the best loss is known: a step appends one bit to the last four

def walk(B, T): return torch.randint(2, (B,T+3)).unfold(1, 4, 1) @ torch.tensor([8,4,2,1])

def same_label(labels, by, docs=None): return shift_labels(labels, 1, docs)
def untold(e, docs=None): return torch.zeros_like(e)

@pytest.mark.parametrize('kind,bits', [('right', 1), ('untold', 2), ('same_label', 0)])
def test_each_wiring_has_its_floor(kind, bits):
    "Told one token, one bit is unknown; not told, two; asked for what it was told, none. The main loss shows nothing of it"
    torch.manual_seed(2)
    whale = Whale(small(vocab_size=16, hidden_size=20, num_hidden_layers=1, initializer_range=0.2, hc_sinkhorn_iters=2))
    opt,last = torch.optim.Adam(whale.parameters(), lr=1.5e-2, betas=(0.9,0.95)),[]
    plants = dict(right={}, untold=dict(next_embeddings=untold), same_label=dict(shift_labels=same_label))[kind]
    with patch.multiple(nanowhale.model.whale, **plants) if plants else nullcontext():
        for _ in range(60):
            ids = walk(32, 12)
            out = whale(ids, labels=ids)
            opt.zero_grad(); (out.loss+0.3*out.mtp_loss).backward(); opt.step()
            last.append([out.loss.item(), out.mtp_loss.item()])
    main,mtp = torch.tensor(last[-15:]).mean(0)/torch.tensor(2.).log()
    assert abs(main-1)<0.1 and abs(mtp-bits)<0.1

# ---------------------------------------------------------------- checks of a whole whale, by its mtp_loss alone, and bugs that they must see

def one_label(ids, j):
    "Labels with the single target token j"
    return torch.full_like(ids, -100).index_copy(1, torch.tensor([j]), ids[:,j:j+1])

@torch.no_grad()
def check_reach(whale, ids):
    "With token j as the only target: token j-1 is an input of the MTP loss, token j itself and later ones are not"
    for j in range(2, ids.shape[1]):
        labels,losses = one_label(ids, j),[]
        for changed in (None, j-1, j, j+1):
            other = ids.clone()
            if changed is not None and changed<ids.shape[1]: other[:,changed] = (other[:,changed]+1)%31
            losses.append(whale(other, labels=labels).mtp_loss)
        base,before,at,after = losses
        assert (base-before).abs()>1e-4, f'the MTP head is not told token {j-1}'
        assert (base-at).abs()<1e-5 and (base-after).abs()<1e-5, f'the MTP head peeks at token {j} or later'

@torch.no_grad()
def check_label(whale, ids):
    "The MTP loss is that of the logits at i and the token i+2"
    rope,mask = surroundings(whale.cfg, ids)
    e,X = whale.model.embed_tokens(ids),whale(ids).streams
    told = torch.cat([e[:,1:], torch.zeros_like(e[:,:1])], 1)
    logp = whale.lm_head(whale.mtp[0](X, told, rope, mask)[0]).log_softmax(-1)
    want = -torch.stack([logp[b,i,ids[b,i+2]] for b in range(ids.shape[0]) for i in range(ids.shape[1]-2)]).mean()
    assert_close(whale(ids, labels=ids).mtp_loss, want, atol=1e-5, rtol=1e-5)

def check_streams(whale, ids):
    "The trunk's own collapse and final norm have no part in the MTP loss; its blocks, the embedding and the head have"
    params = dict(whale.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(whale(ids, labels=ids).mtp_loss, list(params.values()), allow_unused=True)))
    silent = {n for n,g in grads.items() if g is None or not g.any()}
    assert silent=={'model.norm.weight', 'model.hc_head.hc_fn', 'model.hc_head.hc_base', 'model.hc_head.hc_scale'}, silent

@torch.no_grad()
def check_packing(whale, ids):
    "Two documents in one row: the loss and the expert load of the two alone, and the choices of every place, also where there is no target"
    docs,chosen = (torch.arange(ids.shape[1])>=5).int()[None].expand(ids.shape),[]
    hook = whale.mtp[0].register_forward_hook(lambda block, args, out: chosen.append(out[1].idx))
    parts = [whale(i, labels=i) for i in (ids[:,:5], ids[:,5:])]
    n = [3, ids.shape[1]-7]
    pack = whale(ids, labels=ids, docs=docs)
    hook.remove()
    assert_close(pack.mtp_loss, sum(p.mtp_loss*k for p,k in zip(parts, n))/sum(n), atol=1e-5, rtol=1e-5)
    assert_close(pack.expert_load, sum(p.expert_load for p in parts))
    assert torch.equal(chosen[2], torch.cat(chosen[:2], 1))

CHECKS = [check_reach, check_label, check_streams, check_packing]

@pytest.fixture(params=KERNELS)
def whale_and_ids(request):
    torch.manual_seed(1)
    whale = use(Whale(small()), request.param)
    with torch.no_grad():
        for p in whale.state_dict().values():
            if p.ndim==1: p.add_(torch.randn_like(p), alpha=0.3)
    return whale,torch.randint(0, 31, (2,11))

@pytest.mark.parametrize('check', CHECKS)
def test_right_wiring(check, whale_and_ids): check(*whale_and_ids)

def in_model(name, f): return patch.object(nanowhale.model.whale, name, f)

class Collapsed(MTPBlock):
    "Bug 10: fed from the collapsed and normed state, copied to every stream"
    trunk = None
    def forward(self, X, e, rope, mask, cache=None):
        h = self.trunk[0].norm(self.trunk[0].hc_head(X))
        return super().forward(h[:,:,None].expand_as(X), e, rope, mask, cache)

@contextmanager
def collapsed(whale):
    block = whale.mtp[0]
    block.__class__,Collapsed.trunk = Collapsed,[whale.model]
    try: yield
    finally: block.__class__ = MTPBlock

BUGS = {   # name -> (the bug, planted; the checks that must turn red)
    'label of the main head (bug 9)': (lambda w: in_model('shift_labels', lambda l,by,docs=None: shift_labels(l, 1, docs)), {'check_label', 'check_reach'}),
    'embedding not shifted (bug 9)': (lambda w: in_model('next_embeddings', lambda e,docs=None: e), {'check_label', 'check_reach'}),
    'no embedding: parallel head (bug 9)': (lambda w: in_model('next_embeddings', lambda e,docs=None: e*0), {'check_label', 'check_reach', 'check_streams'}),
    'embedding shifted twice': (lambda w: in_model('next_embeddings', lambda e,docs=None: next_embeddings(next_embeddings(e))), {'check_label', 'check_reach'}),
    'collapsed state (bug 10)': (collapsed, {'check_streams'}),
    'labels cross documents (bug 15)': (lambda w: in_model('shift_labels', lambda l,by,docs=None: shift_labels(l, by)), {'check_packing'}),
    'embeddings cross documents': (lambda w: in_model('next_embeddings', lambda e,docs=None: next_embeddings(e)), {'check_packing'}),
}

@pytest.mark.parametrize('name', BUGS)
def test_planted(name, whale_and_ids):
    plant,expected = BUGS[name]
    red = set()
    with plant(whale_and_ids[0]):
        whale,ids = whale_and_ids
        assert whale(ids, labels=ids).mtp_loss.isfinite()   # it would train
        for check in CHECKS:
            try: check(whale, ids)
            except AssertionError: red.add(check.__name__)
    assert expected<=red, f'only {red} noticed'
