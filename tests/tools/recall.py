"""What reaches beyond the window? Associative recall, by kind of attention and by distance; books, by position; and the cost of a long memory.

    python tests/tools/recall.py recall [--plan] [--part 0/2]     every kind and both texts, five seeds      results/recall.json
    python tests/tools/recall.py books --data FILE.jsonl --kinds window csa hca all full                     results/books.json
    python tests/tools/recall.py decode                                              results/decode.json
    python tests/tools/recall.py look --model FOLDER                                 results/look.json
    python tests/tools/recall.py --help

Recall: the text is a stream of pairs, key and value. Half of them are new while there are keys left, the others repeat an
earlier pair; the value of a repeated pair can be known, and it is all that is learned and measured. Rows to train on have from
2 to 32 keys, so that some are easy; those to measure on have all 32. The distance is counted in tokens, from a value to the
same value when it was last read. In a loose text a token that says nothing stands before every second pair, by lot, so that no
block of a compressor holds whole pairs by its place. `full` sees the whole row: what attention could do that forgets nothing.
`window_told` and `full_told` are `window` and `full` whose embedding also tells which token stood before, as an entry does.

Books: rows of 1,024 tokens from anywhere in a book (a jsonl file whose rows have `title` and `text`); the loss on books held
out, by how much of the book stands before a token.
"""
import argparse, json, random, time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
import torch
from torch import nn
from torch.nn import functional as F
from nanowhale.model.config import CSA, HCA, SWA, WhaleConfig
from nanowhale.beyond.indexer import judged, recall_of
from nanowhale.presets import cache_bytes, layer_flops, nanowhale_v4
from nanowhale.model.compress import CompressedAttention, choose
from nanowhale.model.whale import Whale
from nanowhale.train.data import split_held_out, train_tokenizer
from nanowhale.train.optim import make_optimizers, schedule
from nanowhale.generate.cache import Cache
from nanowhale.fast.kernels import use
from nanowhale.fast.bench import add_to
from nanowhale.lab.compare import start_by_name
from nanowhale.train.loop import keep_freed_memory
from plans import Run, go, options
from runs import provenance

FULL = dict(sliding_window=1024)             # of the kinds that see everything
KEYS = 32                                    # as many values; ids 1 to KEYS, and on from there
KINDS = dict(window=(SWA,SWA,SWA), full=(SWA,SWA,SWA), csa=(SWA,CSA,CSA), hca=(SWA,HCA,HCA), all=(SWA,CSA,HCA),
    window_told=(SWA,SWA,SWA), full_told=(SWA,SWA,SWA))    # told: with each token, which one stood before it
EDGES = (2, 10, 18, 34, 66, 128)             # distances, always even, are counted from one to the next; a window of 8 reaches back to 8
PLACES = (0, 32, 64, 128, 256, 512, 1024)    # so are positions in a row of a book

def pairs(T, keys, rng, loose=False):
    "Ids, labels and distances of one row with so many keys, T each"
    fresh,last,ids,labels,far = rng.sample(range(1, KEYS+1), keys),{},[],[],[]   # last: key -> value and where it was last read
    while len(ids)<T:
        gap = [0]*(loose and rng.random()<0.5)
        t = len(ids)+len(gap)+1
        known = bool(last) and (rng.random()<0.5 or not fresh)
        k = rng.choice(list(last)) if known else fresh.pop()
        v,at = last.get(k) or (KEYS+1+rng.randrange(KEYS), t)
        last[k] = v,t
        ids += [*gap, k, v]; labels += [-100]*(len(gap)+1)+[v if known else -100]; far += [0]*(len(gap)+1)+[t-at]
    return ids[:T],labels[:T],far[:T]

def stream(B, T, rng, fewest=KEYS, loose=False):
    "Ids, labels and distances [B,T], with `fewest` to all keys in a row"
    return [torch.tensor(x) for x in zip(*(pairs(T, rng.randint(fewest, KEYS), rng, loose) for _ in range(B)))]

def config(kind, vocab_size=2*KEYS+1, **sizes):
    return WhaleConfig(**dict(vocab_size=vocab_size, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=64, qk_rope_head_dim=8,
        q_lora_rank=64, o_groups=2, o_lora_rank=32, sliding_window=8, max_position_embeddings=1024, moe_intermediate_size=64, n_routed_experts=2,
        num_experts_per_tok=1, hc_mult=2, hc_sinkhorn_iters=6, num_nextn_predict_layers=0, layer_types=KINDS[kind], compress_rate_csa=2,
        compress_rate_hca=4, index_n_heads=4, index_head_dim=16, index_topk=4, bos_token_id=None, eos_token_id=None) | sizes)

class Told(nn.Module):
    "An embedding that also tells of each token which one stood before it"
    def __init__(self, table):
        super().__init__()
        self.table,self.before = table,nn.Linear(table.embedding_dim, table.embedding_dim, bias=False)
    def forward(self, ids):
        x = self.table(ids)
        return x+F.pad(self.before(x), (0, 0, 1, -1))

def build(kind, seed, **sizes):
    "A fresh whale of a kind"
    whale = Whale(config(kind, **sizes | (FULL if kind.startswith('full') else {})))
    if kind.endswith('told'): whale.model.embed_tokens = Told(whale.model.embed_tokens)
    return use(start_by_name(whale, seed))

@torch.no_grad()
def accuracy(whale, T, rng, loose, rows=192):
    "Share of right answers between each pair of `EDGES`"
    ids,labels,far = stream(rows, T, rng, loose=loose)
    right = whale(ids).logits[:,:-1].argmax(-1)==labels[:,1:]
    among = lambda a, b: (labels[:,1:]>=0) & (far[:,1:]>=a) & (far[:,1:]<b)
    return [round(right[among(a, b)].float().mean().item(), 4) for a,b in zip(EDGES, EDGES[1:])]

def recall_of_indexer(whale, ids):
    "Of the weight that the best entries hold, the share that the indexers' picks hold, mean over layers"
    found = [held for held,_ in recall_of(whale, dict(input_ids=ids))]
    return round(sum(found)/len(found), 4) if found else None

def fit(whale, rows, steps, dense=0.5, lr=4e-3, muon_lr=1e-2):
    "Train on the (ids, labels) of `rows()`, queries seeing all entries for the first `dense` of the steps; returns the loss every 25 steps"
    opts,start,curve = [use(opt) for opt in make_optimizers(whale, lr, muon_lr, 0.)],time.monotonic(),[]
    for step in range(steps):
        ids,labels = rows()
        out = whale(ids, labels=labels, sparse=step>=dense*steps)
        (out.loss+(0 if out.indexer_loss is None else out.indexer_loss)+1e-3*out.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(whale.parameters(), 1.)
        for opt,rate in zip(opts, (lr, muon_lr)):
            for group in opt.param_groups: group['lr'] = rate*schedule(step, steps, steps//20, 0.6, 0.1)
            opt.step(); opt.zero_grad()
        whale.update_router_bias(out.expert_load)
        if step%25==0 or step==steps-1:
            curve.append((step, round(out.loss.item(), 3)))
            print(*curve[-1], round(time.monotonic()-start), flush=True)
    whale.eval()
    return curve

def recall(kind, loose, seed, steps, B=16, T=128):
    keep_freed_memory()
    rng,probe = random.Random(seed),stream(16, T, random.Random(7), loose=loose)[0]
    whale = build(kind, seed)
    before,start = recall_of_indexer(whale, probe),time.process_time()
    curve = fit(whale, lambda: stream(B, T, rng, 2, loose)[:2], steps)
    return dict(tokens=steps*B*T, edges=EDGES, accuracy=accuracy(whale, T, random.Random(999), loose),
        indexer=[before, recall_of_indexer(whale, probe)], curve=curve, cpu_seconds=round(time.process_time()-start))

def recalls(steps, kinds):
    for seed,loose,kind in product(range(5), (False, True), kinds):
        yield Run(dict(kind=kind, loose=loose, seed=seed, steps=steps), f'{kind}{", loose" if loose else ""}', lambda: steps*0.25,
            partial(recall, kind, loose, seed, steps))

def read_books(path, vocab_size=1024, chars=100_000):
    "Token ids of the beginnings of books to train on, and of those held out"
    books = {}
    for row in map(json.loads, Path(path).open(encoding='utf8')): books.setdefault(row['title'], []).append(row['text'])
    parts = split_held_out(['\n\n'.join(texts)[:chars] for texts in books.values()], 10)
    tok = train_tokenizer(parts[0], vocab_size)
    return [[torch.tensor(ids) for ids in tok(part, add_special_tokens=False).input_ids] for part in parts]

@torch.no_grad()
def by_position(whale, rows):
    "Loss [rows,T] of every token after the first"
    losses = [F.cross_entropy(whale(r).logits[:,:-1].transpose(1, 2), r[:,1:], reduction='none') for r in rows.split(4)]
    return torch.cat(losses)

def read(kind, seed, steps, books, B=4, T=PLACES[-1], held_rows=96):
    "Train on random rows of the books, the same for every kind, and measure by position"
    torch.manual_seed(seed)
    whale = build(kind, seed, vocab_size=1024, hidden_size=96, moe_intermediate_size=128, sliding_window=32, compress_rate_csa=4,
        compress_rate_hca=16, index_topk=32)
    rng,start = random.Random(seed),time.process_time()
    def rows():
        some = rng.choices(books[0], [len(b) for b in books[0]], k=B)
        ids = torch.stack([b[i:i+T] for b in some for i in [rng.randrange(len(b)-T)]])
        return ids,ids
    curve = fit(whale, rows, steps)
    held = torch.cat([b.unfold(0, T+1, T) for b in books[1]])
    loss = by_position(whale, held[::len(held)//held_rows][:held_rows])
    mean = [round(loss[:,a:b].mean().item(), 4) for a,b in zip(PLACES, PLACES[1:])]
    return dict(tokens=steps*B*T, places=PLACES, loss=mean, curve=curve, cpu_seconds=round(time.process_time()-start))

@torch.no_grad()
def decode(lengths, groups=8, n=4):
    "Seconds and bytes of one more token after texts of different lengths, layer kinds apart, at the width of `nanowhale_v4`; the median of groups of n"
    for name,kinds in dict(window=(SWA,)*2, csa=(CSA,)*2, hca=(HCA,)*2).items():
        cfg = replace(nanowhale_v4(), vocab_size=512, num_hidden_layers=2, layer_types=kinds, mlp_layer_types=None, num_nextn_predict_layers=0,
            max_position_embeddings=2**17)
        torch.manual_seed(0)
        whale,cache,done = use(Whale(cfg)).eval(),Cache(cfg),0
        def total(T): return T*sum(x for k,x in layer_flops(cfg, T, kinds[0]).items() if k in ('scores', 'compress'))*len(kinds)
        for T in sorted(lengths):
            while done<T:
                k = min(512, T-done)
                whale(torch.randint(512, (1,k)), cache=cache); done += k
            times = []
            for _ in range(groups):
                start = time.perf_counter()
                for _ in range(n): whale(torch.randint(512, (1,1)), cache=cache).logits
                times.append((time.perf_counter()-start)/n); done += n
            kept = sum(l.kv.nbytes+sum(m.tail.nbytes+m.entries.nbytes for m in getattr(l, 'far', [])) for l in cache.layers)
            yield dict(kind=name, context=T, milliseconds=round(1000*median(times), 3), bytes=kept, formula=cache_bytes(cfg, done, 4),
                flops=round(total(T+1)-total(T)))

TEXT = """A dictionary is a mapping from keys to values. To add a key, assign to it; if the key is already there, the old value is lost. Looking up
a key that is not in the dictionary raises an exception, unless the method get is used, which returns a default value instead. A list cannot be a
key, since its contents may change; a tuple can, if all of its items can. Iterating over a dictionary returns its keys in the order in which they
were added."""

@torch.no_grad()
def look(folder):
    "What the layers of a trained whale look at: the indexers' choice for the last token, and the weights of the compressors' slots"
    from transformers import AutoTokenizer
    whale,tokenizer = use(Whale.from_pretrained(folder)).eval(),AutoTokenizer.from_pretrained(folder)
    ids,rows = tokenizer(TEXT.replace(chr(10), ' '), return_tensors='pt').input_ids,[]
    def judge(layer, args, out):
        x,rope,blocks = args[:3]
        comp,i = layer.compressor,int([n for n,m in whale.named_modules() if m is layer][0].split('.')[2])
        w = comp.weigh(x, blocks)[1][0,1:]      # [C,slots,W], without the block that has none before it
        row = dict(layer=i, kind=comp.indexer and 'csa' or 'hca', ends=blocks.ends[0].tolist(),
            slots=[round(v, 3) for v in w.mean((0,2)).tolist()], channels=[[round(v, 2) for v in c] for c in w.mean(0).T[:16].tolist()])
        if comp.indexer: row['chosen'] = choose(judged(layer, x, rope, blocks)[0], blocks.seen, comp.indexer.topk)[0,-1].nonzero()[:,0].tolist()
        rows.append(row)
    hooks = [m.register_forward_hook(judge) for m in whale.modules() if isinstance(m, CompressedAttention)]
    whale(ids).logits
    for h in hooks: h.remove()
    return dict(tokens=[tokenizer.decode([i]) for i in ids[0].tolist()], layers=rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('recall', 'books', 'decode', 'look'))
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=list(KINDS), help='of attention; none: all')
    parser.add_argument('--seeds', nargs='+', type=int, default=list(range(5)), help='of books')
    parser.add_argument('--steps', type=int, help='none: 200 for recall, 300 for books')
    parser.add_argument('--data', help='books, a jsonl file')
    parser.add_argument('--lengths', nargs='+', type=int, default=[2**i for i in range(9, 17)])
    parser.add_argument('--model', default='v4', help='checkpoint folder to look into')
    options(parser, 'results/WHAT.json')
    args = parser.parse_args()
    command,args.out = f'python tests/tools/recall.py {args.what}',args.out.replace('WHAT', args.what)
    args.steps = args.steps or (200 if args.what=='recall' else 300)
    if args.what=='recall': go(list(recalls(args.steps, args.kinds)), args, f'{command} --steps {args.steps}')
    elif args.what=='decode':
        for r in decode(args.lengths): print(r, flush=True); add_to(args.out, r | provenance(command), ('kind', 'context'))
    elif args.what=='look':
        found = look(args.model) | provenance(f'{command} --model {Path(args.model).name}')
        Path(args.out).write_text(json.dumps(found)+'\n')
    elif not (args.data and Path(args.data).exists()): print(f'no books at {args.data}: nothing measured (pass --data FILE.jsonl)')
    else:
        books = read_books(args.data)
        plan = [Run(dict(kind=kind, seed=seed, steps=args.steps), kind, lambda: args.steps*.6, partial(read, kind, seed, args.steps, books))
            for seed,kind in product(args.seeds, args.kinds)]
        go(plan, args, f'{command} --data {Path(args.data).name} --steps {args.steps}')

if __name__=='__main__': main()
