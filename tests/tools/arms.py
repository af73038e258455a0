"""Ablations of the tiny whale at the default run's tokens: rates are tuned for each arm, then it is judged on five fresh seeds

    python tests/tools/arms.py tune --plan      what is missing and what it will take; likewise for the others
    python tests/tools/arms.py tune             one seed that judges nothing, on held-out text of its own        results/arms.json
    python tests/tools/arms.py judge            five seeds, equal tokens, at the best rates
    python tests/tools/arms.py pace             what a step costs beside the base's, in turns
    python tests/tools/arms.py time             five seeds, as many steps as fit into the base's time
    python tests/tools/arms.py again            five seeds more, as judge, where correction has left a doubt

    python tests/tools/arms.py judge --arms base adamw          only these; --part 0/2 for one of two processes

Held-out documents are dealt out in turn: the even ones to tuning, the odd ones to judging. Tuning goes rate by rate, in steps of
two, until the best value has worse ones on both sides, and last one factor on all of them. An arm that has no rates of its own
starts from the base's best, and has the factor only. Several rounds of `tune` may be needed: each makes what the last one asks for.
"""
import argparse, time
from functools import cache, partial
from itertools import permutations
import torch
from torch import nn
from nanowhale.fast.bench import read_entries
from nanowhale.fast.kernels import use
from nanowhale.lab import ablate
from nanowhale.lab.compare import start_by_name
from nanowhale.model.config import CSA, HCA, SWA
from nanowhale.model.hyper import HyperConnection, sinkhorn
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny
from nanowhale.train.loop import HeldOut, keep_freed_memory
from nanowhale.train.optim import make_optimizers, split_params
from nanowhale.train.recipe import get_recipe
from nanowhale.train.step import train_step
from plans import Run, beyond, go, options, seconds_of

TINY = {name: getattr(tiny(), name) for name in ablate.SMALL if hasattr(tiny(), name)} | dict(batch_size=8, context=256)
STEPS = get_recipe('tiny').steps
TUNING,JUDGING,AGAIN = 100, range(5), range(5, 10)     # seeds

# ---------------------------------------------------------------- what differs

class HeadApart(torch.optim.AdamW):
    "AdamW whose groups may learn at a multiple of the rate that is set before each step"
    def step(self, closure=None):
        for group in self.param_groups: group['lr'] = group['lr']*group.get('times', 1.)
        return super().step(closure)

def adamw_apart(whale, recipe, head):
    "AdamW thrice: embedding and vectors at `lr`, matrices at `muon_lr`, the head at `head` times `lr`"
    matrices,tables,vectors = split_params(whale).values()
    tables = dict(tables)
    heads = [tables.pop('lm_head.weight')]
    decay,common = recipe.weight_decay, dict(betas=(0.9, 0.95), lr=recipe.lr)
    first = [dict(params=list(tables.values()), weight_decay=decay), dict(params=list(vectors.values()), weight_decay=0.),
        dict(params=heads, weight_decay=decay, times=head)]
    return [HeadApart(first, **common), torch.optim.AdamW(list(matrices.values()), weight_decay=decay, **common)]

def by_permutations(whale):
    "Mixes as weighted means of all permutations, exact without a loop (mHC-lite, arXiv 2601.05732)"
    N,std = whale.cfg.hc_mult, whale.cfg.initializer_range
    every = torch.stack([torch.eye(N)[list(p)] for p in permutations(range(N))])   # [N!,N,N]
    def mixes(logits, iters, eps): return torch.einsum('...p,pjk->...jk', logits.flatten(-2).softmax(-1), every)
    for hc in whale.modules():
        if not isinstance(hc, HyperConnection): continue
        hc.sizes = N,N,len(every)
        hc.fn = nn.Parameter(torch.randn(sum(hc.sizes), hc.fn.shape[1])*std)
        hc.base = nn.Parameter(torch.zeros(sum(hc.sizes)))
        hc.sinkhorn = mixes

def without_rounds(whale):
    "Mixes as a softmax over targets: no sum over sources is made one"
    for hc in whale.modules():
        if isinstance(hc, HyperConnection): hc.iters,hc.sinkhorn = 0,sinkhorn

class Arm:
    "What one arm trains: sizes and values of the recipe, a change of the built whale, the names of the rates that are its own to tune"
    def __init__(self, change=None, tuned=('both',), start=None, **values):
        self.change,self.tuned,self.start,self.values = change,tuned,start or {},values

HALF = dict(hidden_size=64, head_dim=16, qk_rope_head_dim=8, q_lora_rank=32, o_lora_rank=16, moe_intermediate_size=64)
ARMS = dict(
    base=Arm(tuned=('muon_lr', 'lr', 'both'), start=dict(muon_lr=0.02, lr=0.012)),
    untuned=Arm(tuned=(), start=dict(muon_lr=0.02, lr=0.012)),   # chosen roughly: the default recipe's until this campaign
    adamw=Arm(tuned=('lr',), start=dict(muon_lr=0., lr=0.006)),
    adamw_apart=Arm(tuned=('muon_lr', 'lr', 'head', 'both'), start=dict(muon_lr=0.006, lr=0.006, head=1.)),
    one_stream=Arm(hc_mult=1), four_0=Arm(without_rounds), four_2=Arm(hc_sinkhorn_iters=2),
    two_0=Arm(without_rounds, hc_mult=2), two_2=Arm(hc_mult=2, hc_sinkhorn_iters=2), two_20=Arm(hc_mult=2),
    permutations=Arm(by_permutations),
    mtp_0=Arm(mtp_weight=0.), mtp_01=Arm(mtp_weight=0.1, mtp_final=0.03),
    half=Arm(**HALF), half_mtp_0=Arm(mtp_weight=0., **HALF), half_mtp_01=Arm(mtp_weight=0.1, mtp_final=0.03, **HALF),
    dense=Arm(n_routed_experts=1, num_experts_per_tok=1, moe_intermediate_size=192, routed_scaling_factor=1.),
    more=Arm(n_routed_experts=8), fine=Arm(n_routed_experts=9, num_experts_per_tok=5, moe_intermediate_size=64),
    finer=Arm(n_routed_experts=19, num_experts_per_tok=11, moe_intermediate_size=32),
    window_32=Arm(sliding_window=32), full=Arm(sliding_window=256),
    compressed=Arm(sliding_window=32, layer_types=(SWA,CSA,HCA), compress_rate_csa=4, compress_rate_hca=16, index_n_heads=4,
        index_head_dim=32, index_topk=16))

# ---------------------------------------------------------------- a run

def begin(arm, rates, seed, steps, half):
    "A fresh whale, the function that takes a step, and every second held-out document"
    values = TINY | ARMS[arm].values | {k: v for k,v in rates.items() if k!='head'}
    cfg,recipe,_ = ablate.setup('base', **values, steps=steps)
    rows,_ = ablate.material(cfg.vocab_size, recipe.context, seed)
    texts,_,tok = ablate.words(cfg.vocab_size)
    torch.manual_seed(seed)
    whale = use(Whale(cfg))
    if ARMS[arm].change: ARMS[arm].change(whale)
    start_by_name(whale, seed)
    if 'head' in rates: opts = adamw_apart(whale, recipe, rates['head'])
    else: opts = [use(opt) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)]
    n = recipe.rows
    def step(i):
        at = torch.arange(i*n, (i+1)*n)%len(rows['docs'])
        return train_step(whale, whale, opts, {k: v[at] for k,v in rows.items()}, recipe, i)
    return whale, step, HeldOut(texts[half::2], tok, recipe, cfg.vocab_size)

def measure(arm, rates, seed, steps, half):
    keep_freed_memory()
    whale,step,held = begin(arm, rates, seed, steps, half)
    began = time.process_time()
    told = [step(i) for i in range(steps)]
    seconds = time.process_time()-began
    found = held.scores(whale)
    return dict(bits_per_byte=round(found['bits_per_byte'], 5), loss=round(found['loss'], 5), rates=rates, params=whale.n_params(mtp=False),
        skipped=sum(m['skipped'] for m in told), cpu_seconds=round(seconds, 1))

def first_rates(arm):
    "Where tuning starts; for an arm without rates of its own, the base's"
    return ARMS[arm].start or ARMS['base'].start

@cache
def seconds(arm, tried=2):
    "Processor seconds of a step"
    torch.set_num_threads(1)
    _,step,_ = begin(arm, first_rates(arm), 0, tried+1, 0)
    return seconds_of(step, tried)

def pace(arm, repeats=10):
    "A step's cost as a multiple of the base's, in turns: every ratio"
    steps = [begin(name, first_rates(name), 0, repeats+2, 0)[1] for name in ('base', arm)]
    return dict(ratios=ablate.in_turns(*steps, repeats))

# ---------------------------------------------------------------- which runs

def tuned(entries, arm):
    "The best rates so far, and those to try next: none, if each best value has worse ones on both sides; None: the base comes first"
    found = {tuple(sorted(e['rates'].items())): e['bits_per_byte'] for e in entries if (e['stage'], e['arm'])==('tune', arm)}
    best,todo = (ARMS[arm].start, []) if ARMS[arm].start else tuned(entries, 'base')
    if todo or todo is None: return best, None
    for name in ARMS[arm].tuned:
        def scaled(x, name=name, best=best):
            "All rates, with one of them times x, or all; `head` is no rate but a multiple of one"
            def moves(k): return k==name or name=='both' and k!='head'
            return {k: float(f'{v*x:.6g}') if moves(k) else v for k,v in best.items()}
        grid = [0.5, 1., 2.]
        while not todo:
            bits = {x: found.get(tuple(sorted(scaled(x).items()))) for x in grid}
            todo = [scaled(x) for x,b in bits.items() if b is None]
            if todo: break
            at = min(bits, key=bits.get)
            if (more := beyond(grid, at)) is None: break
            grid.append(more)
        if todo: break
        best = scaled(at)
    return best, todo

def in_time(entries, arm):
    "Steps that take as long as those of the base; None where its pace is not known, or not to be told from the base's"
    ratios = next((e['ratios'] for e in entries if (e['stage'], e['arm'])==('pace', arm)), None)
    steps = ablate.steps_for(ablate.cost_of(ratios), STEPS) if ratios else STEPS
    return None if steps==STEPS else steps

def runs(stage, arms, entries):
    "What a stage has to make, as far as the stages before it have come"
    for arm in arms:
        if stage=='pace':
            yield Run(dict(stage=stage, arm=arm, seed=0), arm, partial(cost, arm, 24), partial(pace, arm))
            continue
        best,todo = tuned(entries, arm)
        if stage=='tune': plan = [(rates, TUNING, STEPS, 0) for rates in todo or ()]
        elif todo or todo is None: continue
        else:
            steps = in_time(entries, arm) if stage=='time' else STEPS
            plan = [(best, seed, steps, 1) for seed in (AGAIN if stage=='again' else JUDGING) if steps]
        for rates,seed,steps,half in plan:
            key = dict(stage=stage, arm=arm, seed=seed, steps=steps) | (dict(rates=rates) if stage=='tune' else {})
            yield Run(key, arm, partial(cost, arm, steps), partial(measure, arm, rates, seed, steps, half))

def cost(arm, steps): return steps*seconds(arm)+5

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('stage', choices=('tune', 'judge', 'pace', 'time', 'again'))
    p.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS), metavar='ARM', help=f'of {", ".join(ARMS)}; none: all')
    options(p, 'results/arms.json')
    args = p.parse_args()
    go(list(runs(args.stage, args.arms, read_entries(args.out))), args, f'python tests/tools/arms.py {args.stage}')

if __name__=='__main__': main()
