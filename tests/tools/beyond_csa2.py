"""Shared attention, and reading with half of the layers, in trained whales (nbs/6_beyond/52_csa2, 53_halves); `beyond.py csa2` asks for it

Arm shared: the small V4.1 learns bytes; then held-out text is read token by token, with and without the stale index keys, and after
a bounded replay. Arm picks: the same, but every far layer picks among all entries for itself; then neighbours' picks are compared.
"""
from functools import partial
from unittest.mock import patch
import torch, torch.nn.functional as F
import plans
from nanowhale.beyond.csa2 import Shared, SharedAttention, SharedCache, SharedTrunk, SharedWhale, small_v41
from nanowhale.beyond.halves import replayed_rows, replaying
from nanowhale.fast.kernels import use
from nanowhale.lab.compare import start_by_name
from nanowhale.lab.ladder import batches, corpus, held_out_bits
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import get_recipe
from nanowhale.train.step import train_step

FAR = tuple(range(1, 8))
CSA2 = dict(shared={}, picks=dict(index_source_layer_ids=FAR, candidate_source_layer_id=None))

def csa2_recipe(steps): return get_recipe('tiny', steps=steps, batch_size=8, context=128, mtp_weight=0., lr=0.012, muon_lr=0.02)
def held_rows(n, T): return torch.stack([corpus()[1][T*i:T*i+T].long() for i in range(n)])
def nats(logits, ids): return F.cross_entropy(logits.flatten(0,1), ids.flatten()).item()
def kl(right, other): return (right.softmax(-1)*(right.log_softmax(-1)-other.log_softmax(-1))).sum(-1)

def publish_late(attn, x, blocks, shared, memory):
    "What the released code does: where no entry is completed, the index keys stay those of the source before"
    before = shared.keys
    shared.entries,shared.keys = attn.source(x, blocks, memory)
    if not blocks.ends.shape[1] and before is not None: shared.keys = before[:,:shared.entries.shape[1]]

def watched(whale, read):
    "What `read` returns, and every layer's picks by layer: a list of (seen, picks)"
    found = {i: [] for i,b in enumerate(whale.model.layers) if getattr(b.self_attn, 'indexer', None)}
    pick = SharedAttention.pick
    number = {b.self_attn: i for i,b in enumerate(whale.model.layers)}
    def noted(attn, x, low, rope, blocks, shared):
        scores = pick(attn, x, low, rope, blocks, shared)
        found[number[attn]].append((blocks.seen.expand_as(scores), shared.picks.expand_as(scores)))
        return scores
    with torch.no_grad(), patch.object(SharedAttention, 'pick', noted): return read(), found

def one_by_one(whale, ids, late=False):
    kept,cache = Shared(),SharedCache(whale.cfg)
    publish = publish_late if late else SharedAttention.publish
    begin = staticmethod((lambda: kept) if late else Shared)
    with patch.object(SharedAttention, 'publish', publish), patch.object(SharedTrunk, 'begin', begin):
        return torch.cat([whale(t, cache=cache).logits for t in ids.split(1, 1)], 1)

def stale(whale, rows=32, T=96):
    "How much the stale keys change, where pairs are half full and in the text"
    ids = held_rows(rows, T)
    (right,a),(wrong,b) = (watched(whale, partial(one_by_one, whale, ids, late)) for late in (False, True))
    changed = [(p!=q).any(-1).float().mean().item() for i in a if whale.cfg.compress_ratios[i]==2
        for t,((seen,p),(_,q)) in enumerate(zip(a[i], b[i])) if t%2==0 and seen.shape[-1]>whale.cfg.index_topk]
    bits = [nats(x[:,:-1], ids[:,1:])/0.693147 for x in (right, wrong)]
    return dict(picks=round(sum(changed)/len(changed), 4), right=round(bits[0], 5), wrong=round(bits[1], 5),
        same=round((right.argmax(-1)==wrong.argmax(-1)).float().mean().item(), 5), kl=round(kl(right, wrong).mean().item(), 7))

def replay(whale, rows=32, prompt=96, more=32):
    "A prompt read in full or by a bounded replay, and the bytes after it one by one"
    ids = held_rows(rows, prompt+more+1)
    def read(bound):
        cache = SharedCache(whale.cfg)
        with replaying(whale, bound): first = whale(ids[:,:prompt], cache=cache).logits[:,-1:]
        return torch.cat([first, *(whale(t, cache=cache).logits for t in ids[:,prompt:-1].split(1, 1))], 1)
    with torch.no_grad(): full,bounded,exact = (read(x) for x in ([], replayed_rows(whale.cfg), replayed_rows(whale.cfg, True)))
    off = kl(full, bounded)
    targets = ids[:,prompt:]
    return dict(prompt=prompt, first=round(off[:,0].mean().item(), 7), later=round(off[:,1:].mean().item(), 7),
        exact=round(kl(full, exact).abs().max().item(), 7), full_bits=round(nats(full, targets)/0.693147, 5),
        bits=round(nats(bounded, targets)/0.693147, 5), same=round((full.argmax(-1)==bounded.argmax(-1)).float().mean().item(), 5))

def picks_of(whale, rows=16, T=128):
    ids = held_rows(rows, T)
    return {i: f[0] for i,f in watched(whale, lambda: whale(ids))[1].items()}

def overlap(whale, before):
    "Picks that neighbours with the same entries have in common, where there are more entries than picks"
    trained,out,k = picks_of(whale),{},whale.cfg.index_topk
    for a,b in zip(FAR, FAR[1:]):
        if whale.cfg.compress_ratios[a]!=whale.cfg.compress_ratios[b]: continue
        behind = trained[a][0].sum(-1)
        many = behind>k
        def share(found): return ((found[a][1] & found[b][1]).sum(-1)[many]/k).float().mean().item()
        out[f'{a} and {b}'] = dict(trained=round(share(trained), 4), untrained=round(share(before), 4),
            chance=round((k/behind[many]).mean().item(), 4))
    return out

def csa2_run(arm, seed, steps):
    whale = use(start_by_name(SharedWhale(small_v41(**CSA2[arm])), seed))
    recipe = csa2_recipe(steps)
    opts = [use(opt) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)]
    before = picks_of(whale) if arm=='picks' else None
    for i,ids in enumerate(batches(seed, steps)): train_step(whale, whale, opts, dict(input_ids=ids, docs=torch.zeros_like(ids)), recipe, i)
    found = dict(bits_per_byte=round(held_out_bits(whale, 100), 4))
    if arm=='picks': return found | dict(overlap=overlap(whale, before))
    return found | dict(stale=stale(whale), replay=replay(whale))

def csa2(args):
    cfg,recipe = small_v41(),csa2_recipe(args.steps)
    def seconds(): return plans.pace(cfg, recipe, kind=SharedWhale)*(args.steps+40)
    runs = [plans.Run(dict(campaign='csa2', arm=arm, seed=seed, steps=args.steps), arm, seconds, partial(csa2_run, arm, seed, args.steps))
        for seed in range(5) for arm in CSA2]
    plans.go(runs, args, f'python tests/tools/beyond.py csa2 --steps {args.steps}')
