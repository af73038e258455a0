"""Training an indexer in stages: who moves, what each teacher teaches, how good picks are"""
import pytest, torch
from torch.testing import assert_close
from nanowhale.beyond import indexer
from nanowhale.beyond.indexer import (branches, entry_weights, index_recall, judged, recall_of, share_weights, teach, train_stages,
    v4_order)
from nanowhale.fast.kernels import use
from nanowhale.model.attention import attend
from nanowhale.model.compress import far_sums, far_weights, index_loss
from nanowhale.model.config import CSA, HCA, WhaleConfig
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import get_recipe

CFG = WhaleConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, layer_types=(CSA,HCA), num_attention_heads=4, head_dim=8,
    qk_rope_head_dim=4, q_lora_rank=8, o_groups=2, o_lora_rank=5, moe_intermediate_size=12, n_routed_experts=3, num_experts_per_tok=2,
    sliding_window=6, hc_mult=2, hc_sinkhorn_iters=2, compress_rate_csa=4, compress_rate_hca=8, index_n_heads=3, index_head_dim=6, index_topk=2,
    num_nextn_predict_layers=0, max_position_embeddings=256, initializer_range=.3)
RECIPE = get_recipe('tiny', steps=6, mtp_weight=0., balance_weight=.1)
DENSE,WARMUP,SPARSE = v4_order(2, 2, 2)

def batch(i, B=2, T=33):
    "Rows of two documents"
    lot = torch.Generator().manual_seed(i)
    docs = (torch.arange(T)>=13+i).long().expand(B, T)
    return dict(input_ids=torch.randint(40, (B,T), generator=lot), docs=docs)

def begin(kernels='plain', cfg=CFG, muon=True):
    torch.manual_seed(0)
    whale = use(Whale(cfg), kernels)
    return whale, [use(opt, kernels) for opt in make_optimizers(whale, RECIPE.lr, RECIPE.muon_lr if muon else 0., RECIPE.weight_decay)]

def run(whale, opts, *stages): return list(train_stages(whale, opts, batch, RECIPE, stages))
def state(whale): return {name: t.clone() for name,t in whale.state_dict().items()}
def moved(a, b): return {name for name in a if not a[name].equal(b[name])}
def split(names):
    mine = {name for name in names if '.indexer.' in name}
    return names-mine, mine

# ---------------------------------------------------------------- who moves

@pytest.mark.parametrize('kernels,muon', [('plain', True), ('fast', True), ('plain', False)])
def test_each_stage_moves_its_branch_and_nothing_else(kernels, muon):
    whale,opts = begin(kernels, muon=muon)
    run(whale, opts, SPARSE)                      # every optimizer has momentum for every parameter
    language,mine = split(set(state(whale)))
    assert len(mine)==6                           # of the layer of CSA; that of HCA has none
    for stage,may in ((DENSE, language), (WARMUP, mine), (SPARSE, language|mine)):
        before = state(whale)
        run(whale, opts, stage)
        got = moved(before, state(whale))
        assert got<=may and all('correction_bias' in name for name in may-got)   # a bias may go up and down again

def zeros(whale, opts):
    "Planted: gradients of zero where there should be none"
    for opt in opts: opt.zero_grad = lambda opt=opt: type(opt).zero_grad(opt, set_to_none=False)



@pytest.mark.parametrize('bug', ['zeros for gradients', 'the bias is moved in the warm-up', 'one clip for all'])
def test_planted_ways_in_which_the_branches_touch_are_seen(bug, monkeypatch):
    dense = DENSE._replace(indexer=bug=='one clip for all')
    def language(*stages, planted=False):
        whale,opts = begin()
        if planted and bug=='zeros for gradients': zeros(whale, opts)
        if planted and bug=='one clip for all':
            both = branches
            monkeypatch.setattr(indexer, 'branches', lambda w: dict(language=sum(both(w).values(), []), indexer=[]) if w.training else both(w))
            for p in whale.parameters(): p.requires_grad_(True)
            monkeypatch.setattr(indexer, 'enter', lambda w, stage: None)
        if planted and bug.startswith('the bias'):
            stages = tuple(s._replace(language=True) if s.name=='warm-up' else s for s in stages)
            monkeypatch.setattr(indexer, 'stage_losses', lambda out, stage, b: dict(indexer_loss=out.indexer_loss) if stage.indexer else dict(loss=out.loss))
        run(whale, opts, *stages)
        monkeypatch.undo()
        return {name: t for name,t in state(whale).items() if '.indexer.' not in name}
    want = language(DENSE)
    stages = (dense,) if bug=='one clip for all' else (dense, WARMUP)
    assert not moved(want, language(*stages))
    assert moved(want, language(*stages, planted=True))

def test_the_language_model_takes_the_same_steps_whatever_its_indexers_learned():
    "In the dense view; rows and learning rate go on where they stopped"
    def language(*stages):
        whale,opts = begin()
        run(whale, opts, *stages)
        return {name: t for name,t in state(whale).items() if '.indexer.' not in name}
    assert not moved(language(DENSE._replace(steps=4)), language(DENSE, WARMUP, DENSE))
    assert not moved(language(DENSE), language(DENSE._replace(indexer=True)))

def test_a_warm_up_reads_ahead():
    read = []
    whale,opts = begin()
    list(train_stages(whale, opts, lambda i: read.append(i) or batch(i), RECIPE, v4_order(2, 3, 2)))
    assert read==[0, 1, 2, 3, 4, 2, 3]

def test_text_without_an_entry_teaches_nothing():
    whale,opts = begin()
    before = state(whale)
    short = lambda i: {k: v[:,:3] for k,v in batch(i).items()}
    assert [losses for _,losses in train_stages(whale, opts, short, RECIPE, (WARMUP,))]==[{}]*2
    assert not moved(before, state(whale))

def test_losses_of_a_stage():
    whale,opts = begin()
    found = {stage.name: set(losses) for stage,losses in run(whale, opts, DENSE, WARMUP, SPARSE)}
    assert found=={'dense': {'loss', 'balance_loss'}, 'warm-up': {'indexer_loss'}, 'sparse': {'loss', 'balance_loss', 'indexer_loss'}}

# ---------------------------------------------------------------- teachers

def layer(B=3, T=17, H=3, C=4, K=5, W=6):
    torch.manual_seed(1)
    q,kv,far = torch.randn(B, T, H, K).double(), torch.randn(B, T, K).double(), torch.randn(B, C, K).double()
    seen = (4*torch.arange(C)+3<=torch.arange(T)[:,None]).expand(B, T, C).clone()
    seen[1,:,2] = False                           # not picked
    ago = torch.arange(T)[:,None]-torch.arange(T)
    window = ((ago>=0) & (ago<W))[None]
    sinks = torch.randn(H).double()
    return q, kv, far, sinks, window, seen, attend(q, kv, sinks, window, far, seen)[1]

def test_teachers_against_loops():
    q,kv,far,sinks,window,seen,lse = layer()
    B,T,H,K = q.shape
    joint,share,alone = (torch.zeros(seen.shape).double() for _ in range(3))
    for b in range(B):
        for t in range(T):
            read = seen[b,t].nonzero().flatten()
            if not len(read): continue
            for h in range(H):
                e = (far[b,read]@q[b,t,h]/K**.5).exp()
                near = (kv[b,window[0,t]]@q[b,t,h]/K**.5).exp().sum()+sinks[h].exp()
                share[b,t,read] += e/(e.sum()+near)/H
                alone[b,t,read] += e/e.sum()/H
            joint[b,t] = share[b,t]/share[b,t].sum()
    for teacher,want in ((far_weights, joint), (share_weights, share), (entry_weights, alone)):
        assert_close(teacher(q, far, lse, seen), want, atol=1e-12, rtol=1e-10)
        assert not teacher(q.clone().requires_grad_(), far, lse, seen).requires_grad

def test_with_one_head_the_window_cancels_and_with_two_it_does_not():
    q,kv,far,sinks,window,seen,_ = layer()
    for n,same in ((1, True), (2, False)):
        lse = attend(q[:,:,:n], kv, sinks[:n], window, far, seen)[1]
        a,b = (f(q[:,:,:n], far, lse, seen) for f in (far_weights, entry_weights))
        assert torch.allclose(a, b, atol=1e-12)==same

def test_without_the_last_division_gradients_are_weighted_by_the_share():
    q,_,far,_,_,seen,lse = layer()
    scores = torch.randn(seen.shape).double().requires_grad_()
    by = {f: torch.autograd.grad(index_loss(scores, f(q, far, lse, seen), seen), scores)[0] for f in (far_weights, share_weights)}
    assert_close(by[share_weights], by[far_weights]*share_weights(q, far, lse, seen).sum(-1, keepdim=True))

def attached(q, far, lse, seen):
    p = far_sums(q, far, lse, seen).clamp(min=1e-20)
    return p/p.sum(-1, keepdim=True)

@pytest.mark.parametrize('teacher', [far_weights, entry_weights, share_weights, attached])
def test_the_indexers_loss_reaches_indexers_alone(teacher):
    whale,_ = begin()
    teach(whale, teacher)
    ids = batch(0)
    whale(ids['input_ids'], labels=ids['input_ids'], docs=ids['docs']).indexer_loss.backward()
    reached = {name for name,p in whale.named_parameters() if p.grad is not None and p.grad.any()}
    language,mine = split(reached)
    assert mine and bool(language)==(teacher is attached)

# ---------------------------------------------------------------- picks

def test_recall_against_its_definition():
    torch.manual_seed(2)
    scores,target = torch.randn(2, 9, 7), torch.rand(2, 9, 7)
    seen = torch.arange(7)<torch.arange(9)[:,None]
    seen = seen.expand(2, 9, 7)
    held = best_held = hit = n = 0
    for b in range(2):
        for t in range(9):
            read = seen[b,t].nonzero().flatten().tolist()
            if len(read)<=3: continue
            picked = sorted(read, key=lambda s: -scores[b,t,s])[:3]
            best = sorted(read, key=lambda s: -target[b,t,s])[:3]
            held += sum(target[b,t,s].item() for s in picked)
            best_held += sum(target[b,t,s].item() for s in best)
            hit += len(set(picked) & set(best))
            n += 3
    assert index_recall(scores, target, seen, 3)==pytest.approx((held/best_held, hit/n))
    assert index_recall(target, target, seen, 3)==(1, 1)

@pytest.mark.parametrize('kernels', ['plain', 'fast'])
def test_recall_of_a_whale_is_that_of_its_layers_in_the_dense_view(kernels):
    whale,_ = begin(kernels)
    rows = batch(0)
    found = recall_of(whale, rows)
    met = []
    def note(attn, args, out): met.append((attn, *args[:3]))
    layers = [block.self_attn for block in whale.model.layers if block.self_attn.compressor.indexer]
    hooks = [attn.register_forward_hook(note) for attn in layers]
    with torch.no_grad():
        whale(rows['input_ids'], docs=rows['docs'], sparse=False)
        want = [index_recall(*judged(*args), 2) for args in met]
    for h in hooks: h.remove()
    assert found==want and len(found)==1
    assert not any(m._forward_hooks for m in whale.modules())
    assert all(0<held<=1 and 0<=hits<=1 for held,hits in found)

def test_judged_is_what_the_layer_trains_on():
    "The loss of its scores and weights is the one that the layer leaves behind"
    whale,_ = begin()
    rows = batch(3)
    met = []
    attn = whale.model.layers[0].self_attn
    hook = attn.register_forward_hook(lambda attn, args, out: met.append(args[:3]))
    out = whale(rows['input_ids'], labels=rows['input_ids'], docs=rows['docs'], sparse=False)
    hook.remove()
    x,rope,blocks = met[0]
    scores,target,seen = judged(attn, x, rope, blocks)
    assert_close(index_loss(scores, target, seen), blocks.losses[0])
    assert_close(out.indexer_loss, torch.stack(blocks.losses).mean())
