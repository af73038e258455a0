"""A training step and a decoded token as ladders: the plain functions, then one part of the fast set more with every rung.

`python tests/tools/measure.py rungs` calls `measure` and keeps what it returns in results/rungs.json: an entry for each
processor and shape. All rungs share one whale and its optimizers, whose functions are exchanged before each step.
"""
import time
from copy import deepcopy
from statistics import median
import torch
from nanowhale.fast.bench import beside, decode_rate, make_sides, rounds, token_bytes, training_job
from nanowhale.fast.graph import Decoder
from nanowhale.fast.kernels import FAST, cxx_compiler, use
from nanowhale.fast.products import product
from nanowhale.presets import count_flops
from nanowhale.train.loop import hardware, keep_freed_memory, pick_device
from nanowhale.train.optim import ROUNDS, Muon, make_optimizers
from nanowhale.train.step import cast

PARTS = 'products', 'attention', 'experts', 'loss', 'sinkhorn', 'muon', 'check'   # in the order of the chapters; the last changes
                                                                                  # nothing on a CPU, and has no rung there
PEER = 'transformers'

def part(cls, function):
    "The part of the fast set that a function belongs to: the chapter that wrote it, but Muon's rounds are one of their own"
    chapter = function.__module__.rpartition('.')[-1]
    return 'muon' if cls is Muon else 'check' if chapter=='kernels' else chapter

def ladder(parts=PARTS):
    "Name of a rung -> class -> functions: those of the rung before and one part more; the last of all is the fast set"
    kinds = {part(cls, f) for cls,functions in FAST.items() for f in functions.values()}
    assert kinds==set(PARTS), f'parts without a rung: {kinds^set(PARTS)}'
    def upto(n):
        return {cls: {k: f for k,f in functions.items() if part(cls, f) in parts[:n]} for cls,functions in FAST.items()}
    return {name: upto(n) for n,name in enumerate(('plain', *parts))}

def switch(whole, functions):
    "`use` with some of the fast functions: class -> name -> function"
    use(whole, 'plain')
    for m in whole.modules() if isinstance(whole, torch.nn.Module) else [whole]:
        for cls,some in functions.items():
            if isinstance(m, cls): vars(m).update(some)

def muon_flops(opts):
    "FLOPs of the products in one step of Muon"
    total = 0
    for opt in opts:
        for group in opt.param_groups if isinstance(opt, Muon) else []:
            for p in group['params']:
                r,c = sorted(opt.size(p, group))
                total += p.numel()//(r*c)*len(ROUNDS)*(4*r*r*c+2*r**3)
    return total

def step_jobs(model, opts, ids, precision, functions=None):
    "The two halves of a step: gradients, which must be followed by the optimizers"
    gradients = training_job(model, [], ids, precision)
    def first():
        if functions is not None:
            for whole in (model, *opts): switch(whole, functions)
        return gradients()
    def second():
        with cast(ids.device, precision):
            for opt in opts: opt.step()
        for opt in opts: opt.zero_grad()
    return dict(gradients=first, optimizer=second)

LONG = 20   # repetitions of what takes the machine to a limit, so that a moment's noise counts for little

def multiplying(precision, device):
    "FLOPs of some large products, and a function that computes them"
    n = 8192 if device.type=='cuda' else 1024
    a,b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision=='bf16' else torch.float32)
    def products():
        for _ in range(LONG): product(a, b)
    return LONG*2*n**3, products

def reading(device):
    "Bytes of memory, and a function that reads them"
    block = torch.ones(2**26, device=device)
    def sums():
        for _ in range(LONG): block.sum()
    return LONG*block.nbytes, sums

def shares(rates, limits):
    "The share of the machine's limit, which is measured anew in every round: what disturbs a round disturbs both"
    return round(median(r/l for r,l in zip(rates, limits)), 3)

def spread(xs, digits=2): return [round(f(xs), digits) for f in (median, min, max)]

def training(preset, B, T, precision, repeats, device):
    "A step on every rung, transformers' model with the optimizers of rung 0, and the machine's limit, in alternating rounds"
    sides = make_sides(preset, device, T)
    whale,cfg = sides['nanowhale'],sides['nanowhale'].cfg
    ids = torch.randint(0, cfg.vocab_size, (B,T), device=device, generator=torch.Generator(device).manual_seed(1))
    most,at_most = multiplying(precision, device)
    jobs,losses = dict(limit=at_most),{}
    opts = make_optimizers(whale, 1e-5, 1e-5)
    rungs = {name: (whale, opts, functions) for name,functions in ladder(PARTS[:-1] if device.type=='cpu' else PARTS).items()}
    if PEER in sides:
        sides[PEER].cfg = cfg
        rungs[PEER] = sides[PEER],make_optimizers(sides[PEER], 1e-5, 1e-5),None
    for name,(model,some,functions) in rungs.items():
        if functions is not None: switch(model, functions)
        with torch.no_grad(), cast(device, precision): losses[name] = round(model(ids, labels=ids).loss.item(), 5)
        for half,job in step_jobs(model, some, ids, precision, functions).items(): jobs[name, half] = job
    took = rounds(jobs, repeats, device)
    flops = dict(model=3*B*T*sum(count_flops(cfg, T).values()), optimizer=muon_flops(opts))
    rows,before = [],None
    for name in rungs:
        halves = {half: took[name, half] for half in ('gradients', 'optimizer')}
        step = [sum(pair) for pair in zip(*halves.values())]
        rates = [sum(flops.values())/s for s in step]
        rows.append(dict(rung=name, tokens_per_second=spread([B*T/s for s in step]), gflops=round(median(rates)/1e9, 1),
            of_ceiling=shares(rates, [most/s for s in took['limit']]),
            milliseconds={half: spread([1000*s for s in t], 1) for half,t in halves.items()}))
        peer = 'plain' if name==PEER else before      # the same round of the rung before it
        if peer: rows[-1]['beside'] = {peer: spread([sum(took[peer, half][i] for half in halves)/s for i,s in enumerate(step)], 3)}
        before = name
    return dict(flops={k: round(v) for k,v in flops.items()}, losses=losses, training=rows)

def decoding(preset, T, precision, repeats, device, new=32):
    "A decoded token: plain, fast, compiled, and transformers', and what memory delivers, in alternating rounds"
    sides = make_sides(preset, device, T, dtype=torch.bfloat16 if precision=='bf16' else torch.float32)
    whale = sides.pop('nanowhale')
    jobs = dict(plain=(use(deepcopy(whale), 'plain'), None), fast=(whale, None))
    if device.type=='cuda' or cxx_compiler(): jobs['compiled'] = whale,Decoder
    jobs |= {name: (model, None) for name,model in sides.items()}
    ids = torch.randint(0, whale.cfg.vocab_size, (1,min(128, T)), device=device, generator=torch.Generator(device).manual_seed(2))
    moved,read = reading(device)
    paces,memory = {name: [] for name in jobs},[]
    for _ in range(repeats+1):
        start = time.perf_counter()
        read()
        if device.type=='cuda': torch.cuda.synchronize(device)
        memory.append(moved/(time.perf_counter()-start))
        for name,(model,decoder) in jobs.items(): paces[name].append(decode_rate(model, ids, new, decoder))
    paces = {name: p[1:] for name,p in paces.items()}        # as in `rounds`
    needed = token_bytes(whale.cfg, ids.shape[1]+new//2, 2 if precision=='bf16' else 4)
    ratios = beside(paces, 'plain')
    rows = [dict(rung=name, tokens_per_second=spread(p), gbytes_per_second=round(needed*median(p)/1e9, 2),
        of_ceiling=shares([needed*x for x in p], memory[1:])) | (dict(beside=dict(plain=ratios[name])) if name in ratios else {})
        for name,p in paces.items()]
    return dict(bytes_per_token=needed, decoding=rows)

def measure(preset='nanowhale_100m', B=1, T=512, precision='fp32', repeats=5, device=None):
    "Both ladders of one preset at one shape"
    keep_freed_memory()
    device = pick_device(device)
    res = dict(preset=preset, dtype=precision, batch_size=B, context=T, hardware=hardware(device), torch=torch.__version__,
        repeats=repeats)
    res |= training(preset, B, T, precision, repeats, device)
    return res | decoding(preset, T, precision, repeats, device)

def table(res):
    "What `measure` returned, as text"
    lines = ['{preset}, {batch_size} x {context}, {dtype}, {hardware}'.format(**res)]
    for what,unit in dict(training='gflops', decoding='gbytes_per_second').items():
        lines.append(f"\n{what:12}{'tokens/s (least, most)':>28}{unit.replace('_per_', '/'):>16}{'of ceiling':>12}  beside")
        for r in res[what]:
            pace = '{:,.1f} ({:,.1f}, {:,.1f})'.format(*r['tokens_per_second'])
            ratio = ', '.join('{}: {:.2f} ({:.2f} to {:.2f})'.format(k, *x) for k,x in r.get('beside', {}).items())
            lines.append(f"{r['rung']:12}{pace:>28}{r[unit]:>16,.1f}{r['of_ceiling']:>12.0%}  {ratio}")
    return '\n'.join(lines)
