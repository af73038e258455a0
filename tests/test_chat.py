"""Conversations: who speaks, what is a target, who sees whom; a run that resumes to the bit; a terminal that keeps its manners.

    python tests/test_chat.py --data FILE --init FOLDER [--steps N]     fine-tune a whale, before and after: results/chat.json
"""
import argparse, contextlib, io, json, os, platform, signal, subprocess, sys, tempfile
from pathlib import Path
import pytest, torch
import nanowhale.chat as C
from nanowhale.config import get_preset
from nanowhale.data import load_tokenizer, train_tokenizer
from nanowhale.evaluate import evaluate
from nanowhale.model import Whale
from nanowhale.step import Recipe, add_gradients
from nanowhale.stream import held_out_texts
from nanowhale.train import Run, Stopped, make_tokenizer, read_metrics, train

ROOT = Path(__file__).resolve().parents[1]
MAIN = 'import sys; from nanowhale.cli import main; sys.exit(main())'

def measure(args):
    "Fine-tune, and keep what it measured: held-out loss on the answers, and what the whale answers before and after"
    with tempfile.TemporaryDirectory() as d:
        out = Path(args.keep or d)/'chat'
        results = train(chat=args.data, init=args.init, out=str(out), steps=args.steps)
        recipe = Recipe(**json.loads((out/'run.json').read_text())['recipe'])
        texts,_ = held_out_texts(args.data, recipe.field)
        held = C.HeldOutChats(texts, load_tokenizer(out), recipe, 2048)
        said = {when: held.sample(Whale.from_pretrained(f), 2) for when,f in (('before', args.init), ('after', out))}
        curve = [[m['step']+1, round(m['held_out_loss'], 4)] for m in read_metrics(out/'metrics.jsonl') if 'held_out_loss' in m]
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, check=False, capture_output=True, text=True).stdout.strip()
    command = ' '.join(['python tests/test_chat.py', *(Path(w).name if '/' in w else w for w in args.words)])
    spec = {k: v for k,v in vars(recipe).items() if k not in ('chat', 'init', 'data', 'tokenizer')}
    figures = dict(command=command, commit=commit, python=platform.python_version(), data=Path(args.data).name, recipe=spec, results=results,
        held_out=curve, conversations=len(held.chats), samples=said)
    (ROOT/'results'/'chat.json').write_text(json.dumps(figures, indent=1, ensure_ascii=False)+'\n')
    print(json.dumps(figures, indent=1, ensure_ascii=False))

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--data', required=True); parser.add_argument('--init', required=True)
    parser.add_argument('--steps', type=int, default=150); parser.add_argument('--keep')
    args = parser.parse_args()
    args.words = [w for i,w in enumerate(sys.argv[1:]) if '--keep' not in (w, sys.argv[i])]
    measure(args)
