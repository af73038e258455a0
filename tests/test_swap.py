"""Replacing a part of the whale, as one does to try an idea: a few lines each, in a whale of either set of functions, trained for
some steps, and held against an oracle that knows nothing of the replacement, before and after. The oracles are transformers with its
sinks out of reach, transformers with a router in loops, and a plain pre-norm transformer made of the whale's own sublayers."""
import copy, math
import pytest, torch, torch.nn.functional as F
from torch import nn
from nanowhale.fast.kernels import KERNELS, use
from nanowhale.model.config import HCA, SWA, WhaleConfig
from nanowhale.model.moe import SCORES, Router
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import Recipe
from nanowhale.train.step import train_step
from test_parity import exactly, randomise

def blocks(whale): return [*whale.model.layers, *whale.mtp]

# ---------------------------------------------------------------- attention without sinks

def all_to_the_keys(attend):
    "`attend`, but that a head's weights sum to 1: a sink at minus infinity takes nothing"
    def without_sinks(q, kv, sinks, *rest): return attend(q, kv, torch.full_like(sinks, -math.inf), *rest)
    return without_sinks

def no_sinks(whale):
    for block in blocks(whale): block.self_attn.attend = all_to_the_keys(block.self_attn.attend)

def transformers_without_sinks(whale, ids):
    hf = whale.to_hf()
    for layer in hf.model.layers: nn.init.constant_(layer.self_attn.sinks, -1e9)
    return hf(ids).logits

# ---------------------------------------------------------------- softmax routing

class SoftmaxRouter(Router):
    "Experts share a softmax, and a chosen one counts for its probability among all of them, not among the chosen"
    def __init__(self, cfg):
        super().__init__(cfg)
        self.score = SCORES['softmax']
    def choose(self, scores, ids):
        idx = (scores+self.e_score_correction_bias).topk(self.k, -1).indices
        return idx, self.scale*scores.gather(-1, idx)

def softmax_routing(whale):
    for block in blocks(whale):
        router = SoftmaxRouter(whale.cfg).to(block.mlp.gate.weight)
        router.load_state_dict(block.mlp.gate.state_dict())
        block.mlp.gate = router

def routed_in_loops(gate):
    "For transformers' router: its own weights, one token and one expert at a time"
    def forward(x):
        rows = []
        for z in F.linear(x.flatten(0, -2), gate.weight):
            e = [v.exp() for v in z]
            p = [v/sum(e) for v in e]
            chosen = sorted(range(len(p)), key=lambda i: -(p[i]+gate.e_score_correction_bias[i]).item())[:gate.top_k]
            rows.append((z, torch.stack([gate.routed_scaling_factor*p[i] for i in chosen]), torch.tensor(chosen)))
        return tuple(torch.stack(column) for column in zip(*rows))
    return forward

def transformers_with_softmax(whale, ids):
    hf = whale.to_hf()
    for layer in hf.model.layers: layer.mlp.gate.forward = routed_in_loops(layer.mlp.gate)
    return hf(ids).logits

# ---------------------------------------------------------------- one residual stream

class Residual(nn.Module):
    "In place of a hyper-connection: the one stream is read as it is, kept, and added to"
    def forward(self, X):
        one = X.new_ones(X.shape[:3])
        return one, one, one[...,None]

class TheStream(nn.Module):
    "In place of the learned collapse"
    def forward(self, X): return X[:,:,0]

def one_stream(whale):
    for block in blocks(whale): block.attn_hc,block.ffn_hc = Residual(), Residual()
    for part in (whale.model, *whale.mtp): part.hc_head = TheStream()

def plain_transformer(whale, ids):
    seen,x = views(whale.cfg, whole_rows(whale.cfg, ids, None), whale.see), whale.model.embed_tokens(ids)
    for layer,(kind,_) in zip(whale.model.layers, whale.cfg.kinds):
        x = x + layer.self_attn(layer.input_layernorm(x), *seen[kind])
        x = x + layer.mlp(layer.post_attention_layernorm(x), ids)[0]
    return whale.lm_head(whale.model.norm(x))

# ---------------------------------------------------------------- each beside its oracle

IDEAS = dict(no_sinks=(no_sinks, transformers_without_sinks, 3), softmax_routing=(softmax_routing, transformers_with_softmax, 3),
    one_stream=(one_stream, plain_transformer, 1))   # what is replaced, its oracle, streams
T = 140   # long enough for the fast set to look at a window in blocks

def small(kernels, streams=3):
    "A whale with a plain layer and one that compresses, every weight random"
    torch.manual_seed(0)
    cfg = WhaleConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=12, qk_rope_head_dim=6,
        q_lora_rank=12, o_groups=2, o_lora_rank=8, sliding_window=9, layer_types=(SWA,HCA), compress_rate_hca=4, moe_intermediate_size=16,
        n_routed_experts=5, num_experts_per_tok=2, hc_mult=streams, hc_sinkhorn_iters=3, initializer_range=0.2)
    return use(randomise(Whale(cfg)), kernels)

def text(rows):
    "Walks in which the next token is one of two"
    ids = torch.randint(64, (rows, 1))
    for _ in range(T): ids = torch.cat([ids, (2*ids[:,-1:]+torch.randint(2, (rows, 1)))%64], 1)
    return ids

def train(whale, steps=12):
    recipe = Recipe(steps=steps, batch_size=4, context=T, lr=1e-2, muon_lr=2e-2)
    opts = make_optimizers(whale, recipe.lr, recipe.muon_lr)
    losses = []
    for step in range(steps):
        rows = text(recipe.batch_size)
        losses.append(train_step(whale, whale, opts, dict(input_ids=rows, docs=torch.zeros_like(rows)), recipe, step)['loss'])
    return losses

@torch.no_grad()
def difference(whale, oracle):
    "Largest difference of a logit in float64, relative to the largest logit"
    whale,ids = copy.deepcopy(whale).double(), text(1)[:,:T]
    with exactly(): ours,theirs = whale(ids).logits, oracle(whale, ids)
    return ((ours-theirs).abs().max()/theirs.abs().max()).item()

@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('idea', IDEAS)
def test_a_part_replaced(idea, kernels):
    swap,oracle,streams = IDEAS[idea]
    whale = small(kernels, streams)
    assert difference(whale, oracle)>1e-3       # the oracle sees that nothing has been replaced yet
    swap(whale)
    assert difference(whale, oracle)<1e-10
    losses = train(whale)
    assert losses[-1]<losses[0]-0.5, losses
    assert difference(whale, oracle)<1e-10

@pytest.mark.parametrize('idea', IDEAS)
def test_both_sets_train_it_alike(idea):
    "The same first losses, whatever computes them"
    swap,_,streams = IDEAS[idea]
    def first(kernels):
        whale = small(kernels, streams)
        swap(whale)
        torch.manual_seed(1)
        return train(whale.double(), 3)
    assert first('fast')==pytest.approx(first('plain'), rel=1e-6)
