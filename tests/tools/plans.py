"""Campaigns: many runs of minutes, planned before they are made, kept one by one, and shared by several processes.

A campaign is a list of `Run`s in the order of their value. `go` prints what is missing and what it will take (`--plan`), or makes
it: each run is kept by `lab.compare.once` as soon as it has ended, so the same command goes on after a stop. `--part 0/2` and
`--part 1/2` are two processes that take every second run.
"""
import sys, time
from collections import namedtuple
from functools import cache
from pathlib import Path
import torch
from nanowhale.fast.bench import read_entries
from nanowhale.fast.kernels import use
from nanowhale.lab.compare import once
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.step import train_step

Run = namedtuple('Run', 'key arm seconds measure')   # what it is; its line in the plan; processor seconds; a function that makes it

def part(word):
    "`0/2`: the first of two processes"
    i,_,n = word.partition('/')
    if not (i.isdigit() and n.isdigit() and int(i)<int(n)): raise ValueError(f'{word!r} is no part: 0/2 is the first of two')
    return int(i),int(n)

def options(parser, out):
    "What every campaign can be asked"
    parser.add_argument('--plan', action='store_true', help='say what is missing and what it will take, and end')
    parser.add_argument('--part', default='0/1', help='I/N: every Nth run from the Ith on, for N processes')
    parser.add_argument('--out', default=out, help=f'none: {out}')

def missing(runs, path):
    "Runs that the file does not have"
    held = read_entries(path)
    return [r for r in runs if not any(r.key.items()<=e.items() for e in held)]

def table(runs, left):
    "Arm by arm: its runs, their seeds and steps, how many are there, processor hours of the others"
    lines = [f'{"":34}{"runs":>5}{"there":>7}  {"seeds":12}{"steps":14}{"hours left":>10}']
    for arm in dict.fromkeys(r.arm for r in runs):
        mine = [r for r in runs if r.arm==arm]
        todo = [r for r in left if r.arm==arm]
        def of(name): return ' '.join(dict.fromkeys(str(r.key[name]) for r in mine if name in r.key))
        lines.append(f'{arm:34}{len(mine):5}{len(mine)-len(todo):7}  {of("seed"):12}{of("steps"):14}{sum(r.seconds() for r in todo)/3600:10.2f}')
    hours = sum(r.seconds() for r in left)/3600
    lines.append(f'{len(left)} of {len(runs)} runs are to be made: about {hours:.1f} hours of one core, by the pace measured now')
    return '\n'.join(lines)

def seconds_of(step, tried=3):
    "Processor seconds of `step(i)`, the mean of a few after a first"
    step(0)
    began = time.process_time()
    for i in range(1, tried+1): step(i)
    return (time.process_time()-began)/tried

@cache
def pace(cfg, recipe, steps=3, kind=Whale):
    "Processor seconds of a training step, the least of those after a first"
    torch.set_num_threads(1)
    whale = use(kind(cfg))
    opts = [use(opt) for opt in make_optimizers(whale, recipe.lr, recipe.muon_lr, recipe.weight_decay)]
    ids = torch.randint(cfg.vocab_size, (recipe.rows, recipe.context+1))
    took = []
    for i in range(steps):
        began = time.process_time()
        train_step(whale, whale, opts, dict(input_ids=ids, docs=torch.zeros_like(ids)), recipe, i)
        took.append(time.process_time()-began)
    return min(took[1:])

def beyond(values, best):
    "The next value past the edge of a grid, in the ratio of the last two, where the best stands at an edge; else None"
    v = sorted(values)
    if best==v[0]: return float(f'{v[0]**2/v[1]:.6g}')
    if best==v[-1]: return float(f'{v[-1]**2/v[-2]:.6g}')

def go(runs, args, command):
    "Say what there is to do, or do it; one thread, as every entry says"
    torch.set_num_threads(1)
    try:
        i,n = part(args.part)
        left = missing(runs, args.out)
    except (ValueError, OSError) as e: sys.exit(str(e))
    if args.plan:
        print(table(runs, left))
        return
    for r in runs[i::n]:
        if r not in left: continue
        print(f'{r.arm}: {r.key}', flush=True)
        once(args.out, r.key, r.measure, command)

def by_name(path):
    "A path as a command in a results file may name it: without the folders of one machine"
    return Path(path).name
