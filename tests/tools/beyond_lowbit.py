"""What low precision costs small whales (nbs/6_beyond/56_lowbit.ipynb); `beyond.py lowbit` asks for it

Arm float32: a whale with two layers of CSA, trained in float32, then read through each cache format and multiplied in each
product format. The other arms train with formats in place from the first step on, with the same first weights and text, and
are read with them.
"""
import copy
from functools import partial
import torch
import plans
from nanowhale.beyond.lowbit import ENTRY4, FP4, FP8, E2M1, PRODUCTS, Format, caches, multiply_low, picks_changed, read_low, turned_fp4
from nanowhale.lab.ablate import begin, setup
from nanowhale.model.compress import Indexer, choose
from nanowhale.model.config import CSA, HCA, SWA

LOW = dict(num_hidden_layers=4, layer_types=(SWA,CSA,HCA,CSA), mlp_layer_types=('hash_moe','moe','moe','moe'), sliding_window=32,
    head_dim=32, qk_rope_head_dim=16, compress_rate_csa=4, compress_rate_hca=16, index_n_heads=4, index_head_dim=64, index_topk=8,
    max_position_embeddings=512, batch_size=4, context=256, mtp_weight=0.)

def low_formats(R):
    "Name -> a function that changes a whale; R rotating channels"
    v4,v41 = (caches(R)[name] for name in ('v4', 'v41'))
    def read(**formats): return partial(read_low, **formats)
    def times(name, **more): return partial(multiply_low, **PRODUCTS[name], **more)
    def all_of(name):
        def change(whale): return multiply_low(read_low(whale, **caches(R)[name]), **PRODUCTS[name], experts=FP4)
        return change
    return {'float32': read(),
        'window FP8, V4': read(window=v4['window']), 'window FP8, V4.1': read(window=FP8), 'window FP4': read(window=ENTRY4),
        'entries FP8, V4': read(entries=v4['entries']), 'entries FP8, blocks of 32': read(entries=FP8),
        'entries FP4, V4.1': read(entries=ENTRY4), 'entries FP4, power of two': read(entries=Format(E2M1, (1,16))),
        'index FP8': read(index=FP8), 'index FP4, V4.1': read(index=FP4), 'index FP4 turned, V4': read(index=turned_fp4),
        'cache of V4': read(**v4), 'cache of V4.1': read(**v41),
        'products FP8, V4': times('v4'), 'products FP8, V4.1': times('v41'), 'experts FP4, V4.1': times('v41', experts=FP4),
        'all of V4.1': all_of('v41')}

# whales trained in float32 as well: how much does reading far count at all? entries that are zeros, and keys without a meaning
CONTROLS = {'float32': read_low, 'entries read as zeros': partial(read_low, entries=torch.zeros_like),
    'picks by lot': partial(read_low, index=torch.randn_like)}

TRAINED = 'products FP8, V4.1', 'cache of V4.1', 'all of V4.1'   # the arms beside float32

def noting_picks(whale):
    "Let the indexers note their picks, of queries that see more entries than they may pick: -> lists of [n,C], one for each"
    def note(index_scores, k, picks, q, w, keys, seen=None):
        scores = index_scores(q, w, keys, seen)
        picks.append(choose(scores, seen, k)[seen.expand_as(scores).sum(-1)>k].cpu())
        return scores
    indexers = [m for m in whale.modules() if isinstance(m, Indexer)]
    lists = [[] for _ in indexers]
    for m,picks in zip(indexers, lists): m.index_scores = partial(note, m.index_scores, m.topk, picks)
    return lists

def low_scores(whale, held, change):
    "Bits per byte of the held-out text, and the picks, one [n,C] for each indexer, of a copy of the whale that is changed"
    whale = change(copy.deepcopy(whale))
    lists = noting_picks(whale)
    bits = held.scores(whale)['bits_per_byte']
    return round(bits, 7), [torch.cat(picks) for picks in lists]

def low_outliers(whale, held):
    "Largest number of an indexer's key over its root mean square, the median over keys: one for each indexer"
    found = []
    def note(indexer, args, keys): found.append((keys.abs().amax(-1)/keys.square().mean(-1).sqrt()).median().item())
    hooks = [m.register_forward_hook(note) for m in whale.modules() if isinstance(m, Indexer)]
    with torch.no_grad(): whale(held.rows['input_ids'][:8], docs=held.rows['docs'][:8])
    for h in hooks: h.remove()
    return [round(v, 2) for v in found]

def low_run(arm, seed, steps):
    "Train one whale, and read the held-out text as often as the arm asks for"
    formats = low_formats(LOW['qk_rope_head_dim'])
    whale,step,held = begin('base', seed, steps=steps, **LOW, change=formats[arm] if arm in TRAINED else None)
    losses = [step(i)['loss'] for i in range(steps)]
    if arm in TRAINED: return dict(bits={arm: low_scores(whale, held, lambda w: w)[0]}, loss=round(sum(losses[-20:])/len(losses[-20:]), 4))
    bits,picks = {},{}
    for name,change in (CONTROLS if arm=='controls' else formats).items():
        torch.manual_seed(seed)
        bits[name],now = low_scores(whale, held, change)
        if name=='float32': first = now
        else: picks[name] = [round(picks_changed(a, b), 4) for a,b in zip(first, now)]
    return dict(bits=bits, picks=picks, outliers=low_outliers(whale, held), loss=round(sum(losses[-20:])/len(losses[-20:]), 4))

def lowbit(args):
    cfg,recipe,_ = setup('base', steps=args.steps, **LOW)
    def seconds(arm): return plans.pace(cfg, recipe)*(args.steps*(1.5 if arm in TRAINED else 1)+dict(float32=150, controls=30).get(arm, 12))
    def run(arm, seed):
        key = dict(arm=arm, seed=seed, steps=args.steps)
        return plans.Run(key, arm, partial(seconds, arm), partial(low_run, arm, seed, args.steps))
    runs = [run(arm, seed) for seed in range(5) for arm in ('float32', *TRAINED, 'controls')]
    plans.go(runs, args, f'python tests/tools/beyond.py lowbit --steps {args.steps}')
