"""What bugs do to training: the small whale with each bug of tests/tools/bugs.py, beside the right one, in pairs

    python tests/tools/bug_runs.py --plan       what is missing and what it will take
    python tests/tools/bug_runs.py              make it; the same command goes on after a stop        results/bugs.json
    python tests/tools/bug_runs.py --part 0/2   every second run, for one of two processes

A pair shares seed, first weights and rows. `--seeds 1` first: a bug that leaves that training as it is, to the bit, gets no other seed.
"""
import argparse, hashlib, math, time
from contextlib import nullcontext
from functools import cache, partial
from statistics import mean
import torch
from nanowhale.fast.bench import read_entries
from nanowhale.lab import ablate
from nanowhale.model.config import CSA, HCA
from nanowhale.train.loop import keep_freed_memory
from bugs import BUGS, accumulation_changes_nothing, every_token_is_a_target_once, planted
from plans import Run, go, options, seconds_of

SIZES = dict(context=64, sliding_window=16, hc_sinkhorn_iters=4)     # over those of 42_ablate
FAR = dict(layer_types=(CSA,HCA), mlp_layer_types=('hash_moe','moe'), compress_rate_csa=4, compress_rate_hca=16, index_n_heads=2,
    index_head_dim=16, index_topk=8)
PIECES = 40     # of a loss curve, each the mean of its steps
WATCHED = ('load_entropy', 'max_vio', 'column_error', 'comb_logit', 'grad_norm', 'indexer_loss')   # of the last piece's steps

CASES = dict(A='a parallel head', B='every query sees every', C='a routing table of zeros', D='comb contracted', E='gradients of small',
    F='MTP told the')     # whom 46_museum shows without a name

def begin(b, far, seed, steps):
    "A fresh whale of the plain functions, since into these bugs are planted; bugs of accumulation get their rows in small batches"
    small = dict(batch_size=2, accum=4) if b and b.check is accumulation_changes_nothing else {}
    return ablate.begin('base', seed, 'plain', **SIZES | (FAR if far else {}) | small, steps=steps)

def rounded(x): return round(x, 4) if math.isfinite(x) else None

def score(held, whale): return {k: rounded(v) for k,v in held.scores(whale).items() if k in ('loss', 'mtp_loss', 'bits_per_byte')}

def digest(whale): return hashlib.sha256(b''.join(v.contiguous().numpy().tobytes() for v in whale.state_dict().values())).hexdigest()[:12]

def train(b, far, seed, steps):
    "A run with a bug, or without; its weights measured by the code it was trained with, loaded by that code, and by the right one"
    keep_freed_memory()
    repack = b and b.check is every_token_is_a_target_once      # the text is packed once, unless packing is what is wrong
    with planted(b) if b else nullcontext():
        if repack: ablate.material.cache_clear()
        whale,step,held = begin(b, far, seed, steps)
        start = time.process_time()
        told = [step(i) for i in range(steps)]
        seconds = time.process_time()-start
        said = score(held, whale)            # as whoever trains it sees it
        end = {k: v.clone() for k,v in whale.state_dict().items()}
        again,_,_ = begin(b, far, seed, steps)
        again.load_state_dict(end)
        loaded = score(held, again)          # as whoever loads it sees it
    if repack: ablate.material.cache_clear()
    right,_,held = begin(None, far, seed, steps)
    right.load_state_dict(end)
    n = steps//PIECES
    def curve(name): return [rounded(mean(m[name] for m in told[j:j+n])) for j in range(0, n*PIECES, n)]
    watched = {name: rounded(mean(m[name] for m in told[-n:])) for name in WATCHED if name in told[-1]}
    return dict(end=digest(whale), curve=curve('loss'), mtp_curve=curve('mtp_loss'), said=said, loaded=loaded, right=score(held, right),
        skipped=sum(m['skipped'] for m in told), cpu_seconds=round(seconds, 1), **watched)

@cache
def pace(far, tried=3):
    "Processor seconds of a step"
    torch.set_num_threads(1)
    _,step,_ = begin(None, far, 0, tried+1)
    return seconds_of(step, tried)

def runs(steps, seeds, path):
    "Seed by seed: the right whales, then every bug that changes what is trained"
    held = read_entries(path)
    def end(name, far, seed): return next((e['end'] for e in held if (e['name'], e['far'], e['seed'], e['steps'])==(name, far, seed, steps)), None)
    def harmless(b): return end(b.name, b.far, 0) is not None and end(b.name, b.far, 0)==end('right', b.far, 0)
    for seed in range(seeds):
        for b,far in [(None, False), (None, True)]+[(b, b.far) for b in sorted(BUGS, key=lambda b: b.number)]:
            if b and seed and harmless(b): continue
            about = dict(number=b.number, check=b.check.__name__) if b else dict(number=0, check='')
            key = dict(name=b.name if b else 'right', seed=seed, far=far, steps=steps)
            yield Run(key, key['name'], partial(seconds, far, steps), partial(measure, about, b, far, seed, steps))

def seconds(far, steps): return steps*pace(far)+6
def measure(about, b, far, seed, steps): return about | train(b, far, seed, steps)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=400, help='of each run; none: 400')
    p.add_argument('--seeds', type=int, default=5, help='of each bug; none: 5')
    options(p, 'results/bugs.json')
    args = p.parse_args()
    go(list(runs(args.steps, args.seeds, args.out)), args, f'python tests/tools/bug_runs.py --steps {args.steps} --seeds {args.seeds}')

if __name__=='__main__': main()
