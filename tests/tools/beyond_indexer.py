"""How an indexer is taught (nbs/6_beyond/57_indexer.ipynb); `beyond.py indexer` asks for it"""
import time
from functools import cache, partial
from itertools import product
import torch
from nanowhale.beyond.indexer import entry_weights, recall_of, share_weights, stage_step, enter, teach, train_stages, v4_order
from nanowhale.fast.kernels import use
from nanowhale.lab.ablate import material, setup
from nanowhale.lab.compare import start_by_name
from nanowhale.model.compress import far_sums
from nanowhale.model.config import CSA, SWA
from nanowhale.model.whale import Whale
from nanowhale.train.loop import keep_freed_memory
from nanowhale.train.optim import make_optimizers
from plans import Run, go

SEEDS = range(5)

# A window of four tokens leaves much to the entries, of which a query picks two of up to 64
CSA_SIZES = dict(num_hidden_layers=2, layer_types=(SWA,CSA), mlp_layer_types=None, sliding_window=4, head_dim=32, qk_rope_head_dim=16,
    compress_rate_csa=4, index_n_heads=4, index_head_dim=16, index_topk=2, batch_size=4, context=256, mtp_weight=0.)

def attached_weights(q, far, lse, seen):
    "Planted: a teacher that can be taught; the floor keeps its logarithm's slope finite"
    p = far_sums(q, far, lse, seen).clamp(min=1e-20)
    return p/p.sum(-1, keepdim=True)

def stages_of(arm, steps):
    "Half of the language model's steps dense, half sparse, a sixth as many of warm-up between them"
    dense,warmup,sparse = v4_order(steps//2, steps//6, steps-steps//2)
    return dict(no_warmup=(dense, sparse), beside=(dense._replace(indexer=True), sparse),
        scratch=(sparse._replace(steps=steps),)).get(arm, (dense, warmup, sparse))

TEACHERS = dict(entries=entry_weights, share=share_weights, attached=attached_weights)   # of the other arms: far_weights

def begin_staged(arm, seed, steps):
    "A fresh whale, a function that gives the rows of a step, the rest of what `train_stages` takes, and the held-out text"
    cfg,recipe,_ = setup('base', steps=steps, **CSA_SIZES)
    rows,held = material(cfg.vocab_size, recipe.context, seed)
    torch.manual_seed(seed)
    whale = use(start_by_name(Whale(cfg), seed))
    if arm in TEACHERS: teach(whale, TEACHERS[arm])
    opts = [use(opt) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)]
    def batch_at(i):
        at = torch.arange(i*recipe.rows, (i+1)*recipe.rows)%len(rows['docs'])
        return {k: v[at] for k,v in rows.items()}
    return whale, opts, batch_at, recipe, held

@torch.no_grad()
def look_at_picks(whale, rows):
    "Recall of the picks, and the loss with all entries and with the picked ones, nats a token"
    recall = torch.tensor(recall_of(whale, rows)).mean(0).tolist()
    ids,docs = rows['input_ids'], rows['docs']
    losses = [whale(ids, labels=ids, docs=docs, sparse=sparse).loss.item() for sparse in (False, True)]
    return {k: round(v, 4) for k,v in zip(('recall', 'hits', 'dense', 'picked'), recall+losses)}

def measure_stages(arm, seed, steps, every=25):
    "Train one arm; look at it every so many steps and where a stage ends, at more rows when all is done"
    keep_freed_memory()
    whale,opts,batch_at,recipe,held = begin_staged(arm, seed, steps)
    some,more = ({k: v[:n] for k,v in held.rows.items()} for n in (12, 48))
    stages = stages_of(arm, steps)
    ends = [sum(s.steps for s in stages[:i+1]) for i in range(len(stages))]
    points = [dict(step=0, stage='start') | look_at_picks(whale, some)]
    kl = []
    for i,(stage,losses) in enumerate(train_stages(whale, opts, batch_at, recipe, stages), 1):
        kl += [v for name,v in losses.items() if name=='indexer_loss']
        if i%every==0 or i in ends: points.append(dict(step=i, stage=stage.name) | look_at_picks(whale, some))
    bits = round(held.scores(whale)['bits_per_byte'], 4)
    return dict(bits_per_byte=bits, kl=round(sum(kl[-20:])/len(kl[-20:]), 5), points=points) | look_at_picks(whale, more)

@cache
def pace_of_stages(steps, tried=2):
    "Processor seconds of a run: steps of every stage, looks, and the held-out text"
    torch.set_num_threads(1)
    whale,opts,batch_at,recipe,held = begin_staged('order', 0, steps)
    def clocked(f, n=1):
        f()
        began = time.process_time()
        for _ in range(n): f()
        return (time.process_time()-began)/n
    seconds = 15*clocked(lambda: look_at_picks(whale, {k: v[:12] for k,v in held.rows.items()}))+clocked(lambda: held.scores(whale))
    for stage in stages_of('order', steps):
        enter(whale, stage)
        seconds += stage.steps*clocked(partial(stage_step, whale, opts, batch_at(0), recipe, stage, 0), tried)
    return seconds

def indexer(args):
    arms = 'order no_warmup beside scratch entries share attached'.split()
    runs = [Run(dict(campaign='indexer', arm=arm, seed=seed, steps=args.steps), arm, partial(pace_of_stages, args.steps),
        partial(measure_stages, arm, seed, args.steps)) for seed,arm in product(SEEDS, arms)]
    go(runs, args, f'python tests/tools/beyond.py indexer --steps {args.steps}')
