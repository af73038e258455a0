"""A small scaling law: four sizes of the card's shape, three budgets of tokens, V4's own tokenizer, the text of the GPU run

    python tests/tools/scaling.py --data DATA --tokenizer FOLDER --plan      what is missing and what it will take
    python tests/tools/scaling.py --data DATA --tokenizer FOLDER             make it         results/scaling_law.json

DATA is what `tests/tools/gpu.py pack` is given: its documents are put into the same random order, and the first of them are read.
Every run has a learning rate's whole course of its own, so that none is a longer one cut short. Held-out documents are never read
in training. The file holds the runs alone; a chapter fits the law, and says what it foretells for the 110M.
"""
import argparse, json, tempfile, time
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
import numpy as np
import torch
from nanowhale.fast.kernels import use
from nanowhale.lab.compare import start_by_name
from nanowhale.model.whale import Whale
from nanowhale.presets import nanowhale_100m
from nanowhale.train.data import load_tokenizer, read_texts
from nanowhale.train.loop import HeldOut, keep_freed_memory
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import get_recipe
from nanowhale.train.step import train_step
from nanowhale.train.stream import Blocks, held_out_texts
from plans import Run, go, options, pace

WIDTHS = {32: 2, 48: 3, 80: 4, 128: 5}            # width -> layers; the card has 320 and 8
BUDGETS = 2**18,2**19,2**20                       # targets
CHARS = 8_000_000                                 # of text, in the order of the GPU run

def sizes(width):
    "The card's proportions at another width"
    c,f = nanowhale_100m(), width/320
    return replace(c, hidden_size=width, num_hidden_layers=WIDTHS[width], num_attention_heads=4, head_dim=max(16, round(96*f/8)*8),
        qk_rope_head_dim=max(8, round(32*f/8)*8), q_lora_rank=width//2, o_lora_rank=width//4, moe_intermediate_size=2*width,
        sliding_window=256, num_nextn_predict_layers=0)

def recipe(width, budget):
    "The tiny recipe without MTP, in bf16 as the GPU run is; its rates, 0.012 and 0.02 at width 128, fall as one over the root of it"
    base = get_recipe('tiny', mtp_weight=0., precision='bf16', lr=0.012, muon_lr=0.02)
    f = (128/width)**0.5
    return replace(base, steps=budget//base.targets, lr=round(base.lr*f, 5), muon_lr=round(base.muon_lr*f, 5))

@cache
def text(data, folder):
    "The first documents in the GPU run's order, as a file"
    texts = list(read_texts(data))
    order = np.random.default_rng(0).permutation(len(texts))
    path,n = Path(folder)/'text.jsonl', 0
    with path.open('w') as f:
        for i in order:
            f.write(json.dumps(dict(text=texts[i]))+'\n')
            n += len(texts[i])
            if n>CHARS: break
    return str(path)

@cache
def material(data, tokenizer, folder):
    "Training rows, and held-out text"
    path,tok = text(data, folder),load_tokenizer(tokenizer)
    held,one_in = held_out_texts(path, chars=150_000)
    r = recipe(128, BUDGETS[0])
    block = next(iter(Blocks(path, tok, r.context, one_in=one_in, seed=0, chars=CHARS)))
    rows = {k: torch.from_numpy(block[k]).long() for k in ('input_ids', 'docs')}
    return rows, HeldOut(held, tok, r, nanowhale_100m().vocab_size)

def measure(source, width, budget, seed):
    keep_freed_memory()
    rows,held = material(*source)
    r = recipe(width, budget)
    order = torch.randperm(len(rows['docs']), generator=torch.Generator().manual_seed(seed))
    whale = use(start_by_name(Whale(sizes(width)), seed))
    opts = [use(opt) for opt in make_optimizers(whale, r.lr, r.muon_lr, r.weight_decay)]
    began = time.process_time()
    for i in range(r.steps):
        at = order[torch.arange(i*r.rows, (i+1)*r.rows)%len(order)]
        last = train_step(whale, whale, opts, {k: v[at] for k,v in rows.items()}, r, i)
    seconds = time.process_time()-began
    found = held.scores(whale)
    tables = sum(p.numel() for n,p in whale.named_parameters() if 'embed_tokens' in n or 'lm_head' in n)
    return dict(bits_per_byte=round(found['bits_per_byte'], 5), loss=round(found['loss'], 5), last_loss=round(last['loss'], 4),
        trunk=whale.n_params(mtp=False)-tables, tables=tables, held_out_bytes=held.n_bytes, rows=len(rows['docs']), steps=r.steps, lr=r.lr,
        muon_lr=r.muon_lr, skipped=last['skipped'], cpu_seconds=round(seconds, 1))

def runs(source, seeds):
    def seconds(width, budget):
        r = recipe(width, budget)
        return r.steps*pace(sizes(width), r)+20
    for seed,budget,width in product(range(seeds), BUDGETS, WIDTHS):
        yield Run(dict(width=width, targets=budget, seed=seed), f'width {width}', partial(seconds, width, budget),
            partial(measure, source, width, budget, seed))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, help='folder of text, as `gpu.py pack` takes it')
    p.add_argument('--tokenizer', required=True, help="folder of V4's tokenizer")
    p.add_argument('--seeds', type=int, default=2, help='of each size and budget; none: 2')
    options(p, 'results/scaling_law.json')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        go(list(runs((args.data, args.tokenizer, folder), args.seeds)), args, 'python tests/tools/scaling.py --data DATA --tokenizer FOLDER')

if __name__=='__main__': main()
