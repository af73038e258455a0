"""The small trained whale that the explorers run in the reader's browser: an ordinary checkpoint folder, in half precision.

    python nbs/site/explorers/build.py [--model FOLDER] [--out FOLDER]

Without --model the default whale is trained first, which takes two minutes on two cores. The pages read config.json, tokenizer.json
and model.safetensors; about.json says how good the whale is, check.json holds logits of PyTorch's to compare theirs with, and
whale.zip is the folder that a reader may download.
"""
import argparse, json, os, subprocess, sys, tempfile, zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
import torch
from nanowhale.model.config import SWA
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.mtp import next_embeddings
from nanowhale.model.whale import Whale
from nanowhale.train.data import load_tokenizer

SENTENCE = 'If the file cannot be opened, an exception is raised; otherwise the method returns a new string object.'
FACTS = ('held-out loss, nats per token', 'held-out bits per byte', 'held-out token accuracy', 'targets seen in training')

def compact(path, value): path.write_text(json.dumps(value, separators=(',', ':'), ensure_ascii=False), encoding='utf-8')

@torch.no_grad()
def logits(whale, ids):
    "[T,V] of one text, in float32"
    return whale.eval()(torch.tensor([ids])).logits[0]

@torch.no_grad()
def second(whale, ids):
    "[T-1,V]: at token i, told token i+1, what the MTP block says of token i+2"
    ids = torch.tensor([ids])
    e,X = whale.model.embed_tokens(ids),whale.eval()(ids).streams
    rope,mask = views(whale.cfg, whole_rows(whale.cfg, ids, None))[SWA]
    return whale.lm_head(whale.mtp[0](X, next_embeddings(e), rope, mask)[0])[0,:-1]

def export(
    model,                # folder of a trained whale
    out,                  # folder to write, made if needed
    dtype=torch.float16,  # of the large matrices; norms, routers and mixes stay float32
):
    "What the pages need of a checkpoint folder; returns the whale with the weights as they were rounded, in float32"
    model,out = Path(model),Path(out)
    whale,tok = Whale.from_pretrained(model),load_tokenizer(model)
    whale.to(dtype).save_pretrained(out)
    compact(out/'tokenizer.json', json.loads((model/'tokenizer.json').read_text(encoding='utf-8')))
    results = model/'results.json'
    facts = {k: v for k,v in json.loads(results.read_text()).items() if k in FACTS} if results.exists() else {}
    whale = Whale.from_pretrained(out).float()
    compact(out/'about.json', dict(parameters=whale.n_params(), **facts))
    ids = [tok.bos_token_id, *tok.encode(SENTENCE, add_special_tokens=False)]
    heads = dict(logits=logits) | (dict(second=second) if len(whale.mtp) else {})
    compact(out/'check.json', dict(text=SENTENCE, ids=ids, **{name: [round(z, 5) for z in f(whale, ids)[-1].tolist()] for name,f in heads.items()}))
    pack(model, out)
    return whale

README = """A small whale, trained by `nanowhale train` on the English that ships with Python

Its large matrices are in half precision. With the course installed:

    nanowhale generate "The assert statement" --model whale

With transformers alone:

    from transformers import pipeline
    pipeline("text-generation", model="whale")("The assert statement")
"""

def pack(
    model,   # folder of the trained whale, for its tokenizer's files
    out,     # folder with the weights as the pages read them
):
    "`out` as a checkpoint folder that other programs read: whale.zip"
    given = {n: out/n for n in ('config.json', 'generation_config.json', 'model.safetensors')}
    given |= {n: model/n for n in ('tokenizer.json', 'tokenizer_config.json')}
    with zipfile.ZipFile(out/'whale.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for name,file in given.items():
            if file.exists(): z.write(file, f'whale/{name}')
        z.writestr('whale/README.md', README)

def train(out):
    "`nanowhale train`, in a process of its own"
    code = 'import sys; from nanowhale.cli import main; sys.exit(main())'
    path = os.pathsep.join([str(HERE.parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])])
    subprocess.run([sys.executable, '-c', code, 'train', '--out', str(out)], check=True, env={**os.environ, 'PYTHONPATH': path})

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', help='folder of a trained whale; none: train the default one')
    p.add_argument('--out', default=HERE/'whale'/'model', type=Path)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        if not args.model: train(Path(d)/'whale')
        export(args.model or Path(d)/'whale', args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir() if f.name!='whale.zip')
    print(f'{size/1e6:.1f} MB in {args.out}')
