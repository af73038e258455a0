"""Campaigns of part 6, what came after V4: each trains small whales in pairs that share seed, text and first weights

    python tests/tools/beyond.py engram --plan      what is missing and what it will take
    python tests/tools/beyond.py engram             make it; the same command goes on after a stop
    python tests/tools/beyond.py onepass --part 0/2 every second run, for one of two processes (dspark: each trains the trunks anew)

Runs are kept one by one in results/NAME.json (tests/tools/plans.py), and the chapters read them there by arm and seed.
"""
import argparse
from dataclasses import replace
from functools import cache, partial
from itertools import product
import torch
from nanowhale.beyond.engram import Engram, EngramConfig, add_engram, smaller_vocabulary
from nanowhale.beyond.onepass import one_pass
from nanowhale.fast.kernels import use
from nanowhale.lab.ablate import begin, train_one, words
from nanowhale.lab.compare import start_by_name
from nanowhale.model.hyper import HyperHead
from nanowhale.train.loop import keep_freed_memory
from plans import Run, go, options, seconds_of
from beyond_csa2 import csa2
from beyond_dspark import SPARK_TRUNK, dspark
from beyond_indexer import indexer
from beyond_lowbit import lowbit
from beyond_small import small

SEEDS = range(5)

class Arm:
    "What one arm of a campaign trains: `sizes` as in `lab.ablate.setup`, and a function that changes the built whale"
    def __init__(self, change=None, look=None, **sizes):
        self.change,self.look,self.sizes = change,look,sizes

    def options(self, seed, built):
        "For `begin` and `train_one`: the whale is changed and drawn anew by name, and put into the list `built`"
        def change(whale):
            if self.change: use(self.change(whale))
            built.append(start_by_name(whale, seed))
        return dict(change=change, **self.sizes)

    def measure(self, seed, steps):
        "Train it; `look` adds what it sees in the trained whale"
        keep_freed_memory()
        built = []
        found = train_one('base', seed, steps, **self.options(seed, built))
        return {k: v for k,v in found.items() if k!='name'} | (self.look(built[0]) if self.look else {})

@cache
def pace(arm, tried=3):
    "Processor seconds of one of its steps"
    torch.set_num_threads(1)
    _,step,_ = begin('base', 0, steps=tried+1, **arm.options(0, []))
    return seconds_of(step, tried)

def runs(campaign, arms, steps):
    "Seed by seed, so that every arm has as many pairs as any other whenever it is stopped"
    def seconds(arm): return steps*pace(arm)+8     # and what it measures
    for seed,(name,arm) in product(SEEDS, arms.items()):
        key = dict(campaign=campaign, arm=name, seed=seed, steps=steps)
        yield Run(key, name, partial(seconds, arm), partial(arm.measure, seed, steps))

def campaign(name, arms, args): go(list(runs(name, arms, args.steps)), args, f'python tests/tools/beyond.py {name} --steps {args.steps}')

# ---------------------------------------------------------------- 50_engram

TABLES = EngramConfig(layers=(1,), longest=3, hashes=4, rows=4253, width=8)

def tables(whale, e=TABLES): return add_engram(whale, e, smaller_vocabulary(words(whale.cfg.vocab_size)[2]))
def few_rows(whale): return tables(whale, replace(TABLES, rows=1200))
def parts(whale): return [m for m in whale.modules() if isinstance(m, Engram)]

def tables_of_one(whale):
    "Rows are found by the last token alone"
    for engram in parts(tables(whale)): engram.multipliers[1:] = 0
    return whale

def tables_open(whale):
    "Every gate stands at one"
    def one(X, key, weight, eps): return X.new_ones(X.shape[:-1])
    for engram in parts(tables(whale)): engram.gate = one
    return whale

def rows_used(whale):
    "Share of the rows that were ever moved, and how long they are beside the token embeddings"
    table = torch.cat([engram.embed_tokens.weight.detach() for engram in parts(whale)])
    moved = table.any(-1)
    return dict(rows_used=round(moved.float().mean().item(), 4), row_size=round(table[moved].square().mean().sqrt().item(), 4))

SIZES = dict(mtp_weight=0.)
ENGRAM = dict(base=Arm(**SIZES), engram=Arm(tables, rows_used, **SIZES), experts=Arm(n_routed_experts=16, **SIZES),
    mixed=Arm(few_rows, rows_used, n_routed_experts=12, **SIZES), width=Arm(moe_intermediate_size=218, **SIZES),
    width_flops=Arm(moe_intermediate_size=82, **SIZES), alone=Arm(tables_of_one, rows_used, **SIZES),
    open=Arm(tables_open, rows_used, **SIZES))

def engram(args): campaign('engram', ENGRAM, args)

# ---------------------------------------------------------------- 51_onepass

def learned_collapse(whale):
    "Single-pass all the way, but with V4's collapse at the end"
    one_pass(whale).model.hc_head = HyperHead(whale.cfg)
    return whale

DEEP = dict(num_hidden_layers=4, mtp_weight=0.)
ONEPASS = dict(v4=Arm(**DEEP), onepass=Arm(one_pass, **DEEP), collapse=Arm(learned_collapse, **DEEP))

def onepass(args): campaign('onepass', ONEPASS, args)

# ----------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True)
    def add(run, steps):
        p = sub.add_parser(run.__name__)
        p.add_argument('--steps', type=int, default=steps, help=f'of each run; none: {steps}')
        options(p, f'results/{run.__name__}.json')
        p.set_defaults(run=run)
        return p
    add(engram, 240)
    add(onepass, 150)
    add(csa2, 150)
    add(lowbit, 160)
    add(dspark, 160).add_argument('--trunk', type=int, default=SPARK_TRUNK, help=f'steps of each trunk; none: {SPARK_TRUNK}')
    add(indexer, 200)
    add(small, 170)
    args = parser.parse_args()
    args.run(args)

if __name__=='__main__': main()
