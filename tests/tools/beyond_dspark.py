"""Drafting in blocks beside serial drafting (nbs/6_beyond/55_dspark.ipynb); `beyond.py dspark` asks for it"""
import time
from dataclasses import replace
from functools import cache, lru_cache, partial
from types import SimpleNamespace
import torch, torch.nn.functional as F
from torch import nn
from nanowhale.beyond.dspark import BeforeBlock, BlockDrafter, DSpark, Lesson, SparkConfig, accepted, answers, cut, lessons, spark_loss, tapping
from nanowhale.fast.kernels import use
from nanowhale.generate.speculate import Drafter
from nanowhale.lab.ablate import begin, material, setup
from nanowhale.lab.compare import start_by_name
from nanowhale.model.config import CSA, HCA, SWA
from nanowhale.model.mtp import MTPBlock, next_embeddings
from nanowhale.model.rope import rope_cos_sin
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import init_weights
from nanowhale.train.loop import keep_freed_memory
from nanowhale.train.optim import make_optimizers, schedule
from plans import Run, go

SEEDS = range(5)

# One trunk a seed, with all of V4's layers; then each drafter learns for it on text that the trunk has not seen, and is judged on
# held-out text. `serial` is an MTP block that learns as the others do: fresh, four drafts, the same losses and anchors.

SPARK_V4 = dict(num_hidden_layers=3, layer_types=(SWA,CSA,HCA), mlp_layer_types=('hash_moe','moe','moe'), sliding_window=32,
    compress_rate_csa=4, compress_rate_hca=16, index_n_heads=4, index_head_dim=16, index_topk=16)
SPARK_TRUNK,SPARK_ANCHORS,SPARK_PLACES = 280,24,range(33, 121, 11)   # steps; anchors of a row; where held-out rows are cut
SPARK = SparkConfig(taps=(1,2), blocks=1, drafts=4, rank=16, noise=96)   # a byte that no text here has
SPARK_WIDTH = 78   # of the drafter's experts: a round costs what the serial block's does, to 2 % (tests/test_dspark.py)

@lru_cache(1)
def spark_trunk(seed, steps):
    "A trained whale, its recipe, the rows for its drafters, and the held-out ones"
    keep_freed_memory()
    whale,step,held = begin('base', seed, steps=steps, **SPARK_V4)
    for i in range(steps): step(i)
    recipe = setup('base', **SPARK_V4)[1]
    rows = material(whale.cfg.vocab_size, recipe.context, seed)[0]
    return whale.requires_grad_(False), recipe, {k: v[steps*recipe.rows:] for k,v in rows.items()}, held

def spark_cfg(whale): return replace(whale.cfg, moe_intermediate_size=SPARK_WIDTH)

class Causal(DSpark):
    "A row sees the rows before it, and not those after"
    def mask(self, seen, n): return super().mask(seen, n).clone().logical_and(F.pad(torch.ones(n, n).tril()>0, (seen.shape[1],0), value=True))

def spark_plain(whale): return DSpark(spark_cfg(whale), SPARK)
def spark_causal(whale): return Causal(spark_cfg(whale), SPARK)
def spark_end(whale): return DSpark(spark_cfg(whale), replace(SPARK, taps=(2, 3)))
def spark_parallel(whale):
    "Without the Markov head"
    spark = spark_plain(whale)
    nn.init.zeros_(spark.markov.lm_head.weight).requires_grad_(False)
    return spark

class Growing(BeforeBlock):
    "Keeps the keys = values of drafts for the drafts after them"
    def extend(self, kv): self.kv = super().extend(kv); return self.kv

class Noted:
    "Shows the keys = values of a pass"
    def extend(self, kv): self.kv = kv; return kv

def serial_lessons(whale, block, ids, docs, at, n=SPARK.drafts):
    "As `lessons`, by an MTP block that is asked again with its own streams, told the true tokens"
    W,note = whale.cfg.sliding_window,Noted()
    with torch.no_grad(): out = whale(ids, docs=docs)
    rope,mask = views(whale.cfg, whole_rows(whale.cfg, ids, docs))[SWA]
    Y,_ = block.streams(out.streams, next_embeddings(whale.model.embed_tokens(ids), docs), rope, mask, note)
    X,h,keys = cut(Y, at-1, 1),[],Growing(cut(F.pad(note.kv, (0,0,W-1,0)), at, W-1))
    seen = cut(F.pad(docs, (W-1,0), value=-1), at, W-1)==cut(docs, at, 1)
    for k in range(n):
        if k:
            told = whale.model.embed_tokens(cut(F.pad(ids, (0,n)), at+k, 1))
            own = (torch.arange(k, 0, -1)<=W).expand(len(seen), -1)      # of drafts; the window moves on over both
            near = torch.cat([seen & (torch.arange(W-1)>=k-1), own], 1)[:,None]
            rope = rope_cos_sin((at-1+k).repeat(len(ids))[:,None], whale.cfg.qk_rope_head_dim, whale.cfg.rope_theta)
            X,_ = block.streams(X, told, rope, near, keys)
        h.append(block.norm(block.hc_head(X)))
    logits = whale.lm_head(torch.cat(h, 1))
    return Lesson(logits, logits[...,0].detach()*0, *answers(out.logits.softmax(-1), ids, docs, at, n))

def serial_block(whale):
    block = MTPBlock(whale.cfg)
    init_weights(block, whale.cfg.initializer_range)
    block.cfg = whale.cfg   # where the optimizers look
    return block

def spark_learn(module, lessons, weights, seed, steps, trunk):
    "Teach a drafter: `lessons` of its blocks behind anchors drawn anew for every step, by the trunk's optimizers and schedule"
    whale,recipe,rows,_ = trunk
    use(start_by_name(module, seed)).train()
    opts = [use(opt) for opt in make_optimizers(module, recipe.lr, recipe.muon_lr, recipe.weight_decay)]
    lot,losses,n = torch.Generator().manual_seed(seed),[],recipe.rows
    for i in range(steps):
        ids,docs = (rows[k][torch.arange(i*n, (i+1)*n)%len(rows['docs'])] for k in ('input_ids', 'docs'))
        at = 1+torch.randperm(ids.shape[1]-SPARK.drafts-1, generator=lot)[:SPARK_ANCHORS]
        loss = spark_loss(lessons(whale, module, ids, docs, at), weights=weights)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        for opt,lr in zip(opts, (recipe.lr, recipe.muon_lr)):
            for group in opt.param_groups: group['lr'] = lr*schedule(i, steps, round(recipe.warmup*steps), recipe.decay, recipe.final_lr)
            opt.step(); opt.zero_grad()
        losses.append(loss.item())
    return losses

@torch.inference_mode()
def spark_judge(whale, draft, held, seed):
    "Drafts behind cut held-out rows, drawn as in generation, and what the whale says of them, place by place: reach, chance, sure [M,n]"
    lot,found = torch.Generator().manual_seed(seed),[]
    rows = {k: v[:64] for k,v in held.rows.items()}
    for a in SPARK_PLACES:
        ids,docs = (rows[k][:,:a+1] for k in ('input_ids', 'docs'))
        real = docs[:,-1]>=0
        text = SimpleNamespace(ids=ids[real], docs=docs[real], seen=torch.zeros(int(real.sum()), whale.cfg.vocab_size, dtype=torch.bool))
        drafts,q,sure = draft(whale, text, lot)
        n = drafts.shape[1]
        longer = torch.cat([text.ids, drafts], 1),torch.cat([text.docs, text.docs[:,-1:].expand(-1, n)], 1)
        p = whale(longer[0], docs=longer[1]).logits[:,-n-1:-1].softmax(-1)
        kept = (p.gather(-1, drafts[...,None])/q.gather(-1, drafts[...,None]))[...,0].clamp(max=1)
        found.append(torch.stack([F.pad(kept, (1,0), value=1.)[:,:-1].cumprod(-1), accepted(p, q), sure]))
    return torch.cat(found, 1)

def spark_draft(spark, whale, text, lot):
    with tapping(whale, spark.spark.taps) as taps: X = whale(text.ids[:,:-1], docs=text.docs[:,:-1]).streams
    return BlockDrafter(whale, spark, taps).draft(X, text, SPARK.drafts, lot)

def serial_draft(block, whale, text, lot):
    X = whale(text.ids[:,:-1], docs=text.docs[:,:-1]).streams
    own,whale.mtp[0] = whale.mtp[0],block
    drafts,q = Drafter(whale, SPARK.drafts).propose(X, text, SPARK.drafts, lot)
    whale.mtp[0] = own
    return drafts, q, torch.zeros(drafts.shape)

def spark_figures(reach, chance, sure):
    "Tokens of a round, place by place; the confidence's bins [weight, mean, chance]; rounds that stop early [least, verified, tokens]"
    kept = reach*chance                       # all drafts so far are kept
    bins = (sure*10).long().clamp(0, 9)
    bins = [[round((reach*on).sum().item(), 2), *(round(((x*reach*on).sum()/(reach*on).sum().clamp(min=1e-9)).item(), 4) for x in (sure, chance))]
        for on in ((bins==b).float() for b in range(10))]
    def stop(least):
        on = sure.cumprod(-1)>=least
        return [least, round(on.float().sum(-1).mean().item(), 4), round(1+(kept*on).sum(-1).mean().item(), 4)]
    return dict(kept=[round(x, 4) for x in kept.mean(0).tolist()], tokens=round(1+kept.sum(-1).mean().item(), 4), blocks=len(kept),
        bins=bins, stops=[stop(x) for x in (0., .05, .1, .15, .2, .3, .4, .5, .6, .7)])

SPARKS = dict(mtp=None, serial=(serial_block, serial_lessons, serial_draft), dspark=(spark_plain, lessons, spark_draft),
    parallel=(spark_parallel, lessons, spark_draft), causal=(spark_causal, lessons, spark_draft), end=(spark_end, lessons, spark_draft))

def spark_run(arm, seed, steps, trunk_steps):
    torch.set_num_threads(1)
    trunk = spark_trunk(seed, trunk_steps)
    whale,_,_,held = trunk
    made,losses = whale.mtp[0],[0.]
    draft = serial_draft
    if SPARKS[arm]:
        make,taught,draft = SPARKS[arm]
        made = make(whale)
        losses = spark_learn(made, taught, (.1, .9, float(taught is lessons)), seed, steps, trunk)
        made.eval()
    found = spark_judge(whale, partial(draft, made), held, seed)
    return spark_figures(*found) | dict(trunk_steps=trunk_steps, loss=round(sum(losses[-20:])/len(losses[-20:]), 4),
        params=sum(p.numel() for p in made.parameters()))

@cache
def spark_seconds(taught):
    "Processor seconds of the parts, by the pace of a few steps: the trunk's step, a lesson's"
    trunk = spark_trunk(0, 3)
    began = time.process_time()
    if not taught: spark_trunk.__wrapped__(0, 3)
    else: spark_learn(taught[0](trunk[0]), taught[1], (.1, .9, 1.), 0, 3, trunk)
    return (time.process_time()-began)/3

def dspark(args):
    def run(arm, seed):
        key = dict(campaign='dspark', arm=arm, seed=seed, steps=args.steps)
        def seconds(): return 30+(args.steps*spark_seconds(SPARKS[arm]) if SPARKS[arm] else args.trunk*spark_seconds(None))
        return Run(key, arm, seconds, partial(spark_run, arm, seed, args.steps, args.trunk))
    go([run(arm, seed) for seed in SEEDS for arm in SPARKS], args, f'python tests/tools/beyond.py dspark --steps {args.steps} --trunk {args.trunk}')
