"""The whole small V4.1 beside a V4 of equal parameters, and with one part of it taken back (nbs/6_beyond/54_small.ipynb); `beyond.py small` asks for it

All arms learn the same bytes in the same order; a parameter begins with the same value in each arm that has it (by name). Then all
read the same held-out text, and write on from the same prompt.
"""
import math, time
from functools import partial
from statistics import mean
import torch
import plans
from nanowhale.beyond.csa2 import SharedTrunk
from nanowhale.beyond.engram import EngramBlock
from nanowhale.beyond.small import WholeWhale, equal_v4, whole_v41
from nanowhale.fast.kernels import use
from nanowhale.lab.compare import start_by_name
from nanowhale.lab.ladder import batches, held_out_bits, written
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import get_recipe
from nanowhale.train.step import train_step

FAR = tuple(range(1, 8))
EXPERTS = dict(engram_layers=(), n_routed_experts=7, moe_intermediate_size=63)   # as many parameters, none of them in tables
OWN = dict(kv_source_layer_ids=FAR, index_source_layer_ids=FAR, candidate_source_layer_id=None)   # every far layer makes its entries and picks among all

class TwoPass(WholeWhale):
    "V4's hyper-connections, and its learned collapse at the end"
    trunk,block = SharedTrunk,EngramBlock

SMALL = dict(v4=(Whale, equal_v4()), v41=(WholeWhale, whole_v41()), no_tables=(WholeWhale, whole_v41(**EXPERTS)),
    no_sharing=(WholeWhale, whole_v41(**OWN)), two_pass=(TwoPass, whole_v41()))

ROWS,CONTEXT = 3,128

def small_recipe(steps): return get_recipe('tiny', steps=steps, batch_size=ROWS, context=CONTEXT, mtp_weight=0., lr=0.012, muon_lr=0.02)

def small_run(arm, seed, steps):
    "Train one, and see what it has learned"
    kind,cfg = SMALL[arm]
    whale,recipe = use(start_by_name(kind(cfg), seed)),small_recipe(steps)
    opts = [use(opt) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)]
    losses,seconds = [],[]
    for i,ids in enumerate(batches(seed, steps, ROWS, CONTEXT)):
        began = time.process_time()
        found = train_step(whale, whale, opts, dict(input_ids=ids, docs=torch.zeros_like(ids)), recipe, i)
        seconds.append(time.process_time()-began)
        losses.append(found['loss']/math.log(2))
    n = max(1, steps//20)
    return dict(params=whale.n_params(), bits_per_byte=round(held_out_bits(whale, 100), 4), seconds=round(mean(sorted(seconds)[:len(seconds)//2]), 4),
        curve=[round(mean(losses[i:i+n]), 3) for i in range(0, steps, n)], text=written(lambda ids: whale(ids).logits, 'The ', 60))

def small(args):
    def seconds(arm):
        kind,cfg = SMALL[arm]
        return plans.pace(cfg, small_recipe(4), kind=kind)*args.steps+9     # reading and writing
    runs = [plans.Run(dict(campaign='small', arm=arm, seed=seed, steps=args.steps), arm, partial(seconds, arm), partial(small_run, arm, seed, args.steps))
        for seed in range(5) for arm in SMALL]
    plans.go(runs, args, f'python tests/tools/beyond.py small --steps {args.steps}')
