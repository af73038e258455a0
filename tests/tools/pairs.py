"""Pairs of whole default runs that share seed, text and first weights: what bf16 costs, and how many drafts a whale keeps

    python tests/tools/pairs.py --plan       what is missing and what it will take
    python tests/tools/pairs.py              make it; the same command goes on after a stop          results/pairs.json
    python tests/tools/pairs.py --part 0/2   every second run, for one of two processes

Each whale is trained by `nanowhale train` in one of two precisions. Then its MTP block drafts, in float32, on held-out text.
"""
import argparse, json, tempfile
from functools import partial
from itertools import product
from pathlib import Path
import torch
from nanowhale.fast.kernels import use
from nanowhale.generate.speculate import speculate
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny
from nanowhale.train.data import embedded_corpus, load_tokenizer, split_held_out
from nanowhale.train.recipe import get_recipe
from plans import Run, go, options, pace
from runs import metrics, nanowhale

SETTINGS = list(product((0, 0.7, 1.0), (1, 2, 3)))   # temperature, drafts a round
TEXTS,PROMPT,TOKENS = 24,32,60                        # held-out beginnings, tokens of each, tokens to add

def beginnings(tok):
    "Beginnings of held-out documents, spread over all of them"
    held = [t for t in split_held_out(embedded_corpus())[1] if len(t)>400]
    return [torch.tensor([[tok.bos_token_id, *tok.encode(t, add_special_tokens=False)[:PROMPT]]]) for t in held[::len(held)//TEXTS][:TEXTS]]

def drafting(folder):
    "Of each setting: how often a round's first draft is kept, and tokens a round"
    whale,tok = use(Whale.from_pretrained(folder)).eval(),load_tokenizer(folder)
    out = []
    for temperature,drafts in SETTINGS:
        rounds = []
        for i,ids in enumerate(beginnings(tok)):
            speculate(whale, ids, TOKENS, temperature=temperature, seed=i, drafts=drafts, eos_token_id=None,
                on_round=lambda n, used: rounds.append(used) if n==drafts else None)   # noqa: B023, called at once
        first = sum(used>0 for used in rounds)/len(rounds)
        out.append(dict(temperature=temperature, drafts=drafts, rounds=len(rounds), first_kept=round(first, 4),
            tokens_a_round=round(1+sum(rounds)/len(rounds), 4)))
    return out

def measure(precision, seed, steps):
    "Train one whale, and let it draft"
    with tempfile.TemporaryDirectory() as d:
        code,err = nanowhale('train', '--seed', seed, '--precision', precision, '--steps', steps, '--evals', 10, '--out', 'whale', cwd=d)
        if code: raise SystemExit(err)
        folder = Path(d)/'whale'
        told = metrics(folder)
        held = [(m['step'], round(m['held_out_bits_per_byte'], 5)) for m in told if 'held_out_bits_per_byte' in m]
        minutes = json.loads((folder/'results.json').read_text())['minutes of training']
        return dict(bits_per_byte=held[-1][1], held_out=held, skipped=sum(m.get('skipped', 0) for m in told), minutes=minutes, drafting=drafting(folder))

def runs(steps):
    def seconds(precision): return steps*pace(tiny(4096), get_recipe('tiny', precision=precision))+60
    for seed,precision in product(range(5), ('fp32', 'bf16')):
        yield Run(dict(arm=precision, seed=seed, steps=steps), precision, partial(seconds, precision), partial(measure, precision, seed, steps))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=get_recipe('tiny').steps, help='of each run; none: as many as the default run')
    options(p, 'results/pairs.json')
    args = p.parse_args()
    go(list(runs(args.steps)), args, f'python tests/tools/pairs.py --steps {args.steps}')

if __name__=='__main__': main()
