"""What reaches beyond the window? Associative recall, by kind of attention and by distance; and the cost of a long memory.

    python tests/recall.py recall --kinds window csa hca all --seeds 0 1 2     results/recall.json
    python tests/recall.py decode                                              results/decode.json
    python tests/recall.py look --model FOLDER                                 results/look.json
    python tests/recall.py --help

The text is a stream of pairs, key and value. Half of them are new, the other half repeat an earlier pair; the value of a
repeated pair can be known, and it is all that is learned and measured. The distance is counted in tokens, from value to value.
"""
import argparse, json, time
from dataclasses import replace
from pathlib import Path
from statistics import median
import torch
from nanowhale.bench import add_to
from nanowhale.compress import CompressedAttention, choose, far_weights, index_recall
from nanowhale.config import CSA, HCA, SWA, WhaleConfig, cache_bytes, layer_flops, nanowhale_v4
from nanowhale.mla import attend
from nanowhale.model import Cache, Whale
from nanowhale.optim import make_optimizers, schedule
from runs import provenance

KEYS = 32                         # as many values; ids 1 to KEYS, and on from there
KINDS = dict(window=(SWA,SWA,SWA), csa=(SWA,CSA,CSA), hca=(SWA,HCA,HCA), all=(SWA,CSA,HCA))
EDGES = (2, 8, 16, 32, 64, 96, 128)   # distances are counted between these

def stream(B, T, generator):
    "ids and labels [B,T], and [B,T] the distance at every label"
    ids,labels,far = torch.zeros(B, T).long(),torch.full((B,T), -100),torch.zeros(B, T).long()
    rand = lambda n: int(torch.randint(n, (1,), generator=generator))
    for b in range(B):
        keys,where = (torch.randperm(KEYS, generator=generator)+1).tolist(),{}
        for t in range(0, T-1, 2):
            if where and (rand(2) or not keys):
                k = list(where)[rand(len(where))]
                v = ids[b,where[k]].item()
                labels[b,t+1],far[b,t+1] = v,t+1-where[k]
            else: k,v = keys.pop(),KEYS+1+rand(KEYS)
            ids[b,t],ids[b,t+1] = k,v
            where[k] = where.get(k, t+1) if labels[b,t+1]<0 else where[k]
    return ids,labels,far

def config(kind):
    return WhaleConfig(vocab_size=2*KEYS+1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, qk_rope_head_dim=8, q_lora_rank=48,
        o_groups=2, o_lora_rank=32, sliding_window=8, max_position_embeddings=256, moe_intermediate_size=64, n_routed_experts=2, num_experts_per_tok=1,
        hc_mult=2, hc_sinkhorn_iters=6, num_nextn_predict_layers=0, layer_types=KINDS[kind], compress_rate_csa=4, compress_rate_hca=8,
        index_n_heads=4, index_head_dim=16, index_topk=4, bos_token_id=None, eos_token_id=None)

@torch.no_grad()
def accuracy(whale, T, generator, rows=128):
    "Share of right answers between each pair of `EDGES`"
    ids,labels,far = stream(rows, T, generator)
    right = whale(ids).logits[:,:-1].argmax(-1)==labels[:,1:]
    out = []
    for a,b in zip(EDGES, EDGES[1:]):
        at = (labels[:,1:]>=0) & (far[:,1:]>=a) & (far[:,1:]<b)
        out.append(round(right[at].float().mean().item(), 4))
    return out

def judged(layer, x, rope, blocks):
    "What a layer's indexer thinks of all entries"
    indexer = layer.compressor.indexer
    return indexer.scores(x, layer.low_rank(x), indexer(x, blocks), rope)

@torch.no_grad()
def recall_of_indexer(whale, ids):
    "`index_recall` of every indexer, judged by what attention does while it sees all entries"
    found = []
    def judge(layer, args, out):
        x,rope,blocks = args[:3]
        q,kv,far = layer.query(x, *rope),layer.latent(x, *rope),layer.compressor(x, blocks)
        seen = blocks.seen.expand(len(x), -1, -1)
        _,lse = attend(q, kv, layer.sinks, blocks.window, far, seen, lse=True)
        found.append(index_recall(judged(layer, x, rope, blocks), far_weights(q, far, lse, seen), seen, layer.compressor.indexer.topk))
    hooks = [m.register_forward_hook(judge) for m in whale.modules() if isinstance(m, CompressedAttention) and m.compressor.indexer]
    whale(ids, sparse=False).logits
    for h in hooks: h.remove()
    return round(sum(found)/len(found), 4) if found else None

def train(kind, seed, steps, B=32, T=128, dense=0.5, lr=4e-3, muon_lr=1e-2, show=False):
    torch.manual_seed(seed)
    whale,g = Whale(config(kind)),torch.Generator().manual_seed(seed+100)
    opts,start,curve,before = make_optimizers(whale, lr, muon_lr, 0.),time.monotonic(),[],None
    probe = stream(16, T, torch.Generator().manual_seed(7))[0]
    for step in range(steps):
        ids,labels,_ = stream(B, T, g)
        if step==0: before = recall_of_indexer(whale, probe)
        out = whale(ids, labels=labels, sparse=step>=dense*steps)
        (out.loss+(0 if out.indexer_loss is None else out.indexer_loss)+1e-3*out.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(whale.parameters(), 1.)
        for opt,rate in zip(opts, (lr, muon_lr)):
            for group in opt.param_groups: group['lr'] = rate*schedule(step, steps, steps//20, 0.6, 0.1)
            opt.step(); opt.zero_grad()
        whale.update_router_bias(out.expert_load)
        if step%20==0 or step==steps-1:
            curve.append((step, round(out.loss.item(), 4)))
            if show: print(*curve[-1], None if out.indexer_loss is None else round(out.indexer_loss.item(), 3), round(time.monotonic()-start), flush=True)
    whale.eval()
    test = torch.Generator().manual_seed(999)
    return dict(kind=kind, seed=seed, steps=steps, tokens=steps*B*T, accuracy=accuracy(whale, T, test), indexer=[before, recall_of_indexer(whale, probe)],
        curve=curve, seconds=round(time.monotonic()-start))

@torch.no_grad()
def decode(lengths, repeats=15):
    "Seconds and bytes of one more token after texts of different lengths, layer kinds apart, at the width of `nanowhale_v4`"
    rows = []
    for name,kinds in dict(window=(SWA,)*2, csa=(CSA,)*2, hca=(HCA,)*2).items():
        cfg = replace(nanowhale_v4(), vocab_size=512, num_hidden_layers=2, layer_types=kinds, mlp_layer_types=None, num_nextn_predict_layers=0,
            max_position_embeddings=2**17)
        torch.manual_seed(0)
        whale,cache,done = Whale(cfg).eval(),Cache(cfg),0
        for n in sorted(lengths):
            while done<n:
                k = min(512, n-done)
                whale(torch.randint(512, (1,k)), cache=cache); done += k
            times = []
            for _ in range(repeats):
                start = time.perf_counter(); whale(torch.randint(512, (1,1)), cache=cache).logits; times.append(time.perf_counter()-start); done += 1
            kept = sum(l.kv.nbytes+sum(m.tail.nbytes+m.entries.nbytes for m in getattr(l, 'far', [])) for l in cache.layers)
            flops = sum(x for k,x in layer_flops(cfg, n, kinds[0]).items() if k in ('scores', 'compress'))
            rows.append(dict(kind=name, context=n, milliseconds=round(1000*median(times), 3), bytes=kept, formula=cache_bytes(cfg, done, 4),
                flops=round(2*flops)))
            print(rows[-1], flush=True)
    return rows

TEXT = """A dictionary is a mapping from keys to values. To add a key, assign to it; if the key is already there, the old value is lost. Looking up
a key that is not in the dictionary raises an exception, unless the method get is used, which returns a default value instead. A list cannot be a
key, since its contents may change; a tuple can, if all of its items can. Iterating over a dictionary returns its keys in the order in which they
were added."""

@torch.no_grad()
def look(folder):
    "What the layers of a trained whale look at: the indexers' choice for the last token, and the weights of the compressors' slots"
    from transformers import AutoTokenizer
    whale,tokenizer = Whale.from_pretrained(folder).eval(),AutoTokenizer.from_pretrained(folder)
    ids,rows = tokenizer(TEXT.replace(chr(10), ' '), return_tensors='pt').input_ids,[]
    def judge(layer, args, out):
        x,rope,blocks = args[:3]
        comp,i = layer.compressor,int([n for n,m in whale.named_modules() if m is layer][0].split('.')[2])
        w = comp.weigh(comp.slots_of(comp.project(x), blocks), blocks.first)[1][0,1:]      # [C,slots,W], without the block that has none before it
        row = dict(layer=i, kind=comp.indexer and 'csa' or 'hca', ends=blocks.ends[0].tolist(),
            slots=[round(v, 3) for v in w.mean((0,2)).tolist()], channels=[[round(v, 2) for v in c] for c in w.mean(0).T[:16].tolist()])
        if comp.indexer: row['chosen'] = choose(judged(layer, x, rope, blocks), blocks.seen, comp.indexer.topk)[0,-1].nonzero()[:,0].tolist()
        rows.append(row)
    hooks = [m.register_forward_hook(judge) for m in whale.modules() if isinstance(m, CompressedAttention)]
    whale(ids).logits
    for h in hooks: h.remove()
    return dict(tokens=[tokenizer.decode([i]) for i in ids[0].tolist()], layers=rows)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('recall', 'decode', 'look'))
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=list(KINDS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--steps', type=int, default=250)
    parser.add_argument('--lengths', nargs='+', type=int, default=[2**i for i in range(9, 17)])
    parser.add_argument('--model', default='v4', help='checkpoint folder to look into')
    parser.add_argument('--out')
    args = parser.parse_args()
    command = f'python tests/recall.py {args.what}'
    if args.what=='decode':
        for r in decode(args.lengths): add_to(args.out or 'results/decode.json', r | provenance(command), ('kind', 'context'))
    elif args.what=='look':
        found = look(args.model) | provenance(f'{command} --model {Path(args.model).name}')
        Path(args.out or 'results/look.json').write_text(json.dumps(found)+'\n')
    else:
        for seed in args.seeds:
            for kind in args.kinds:
                r = train(kind, seed, args.steps, show=True) | provenance(f'{command} --kinds {kind} --seeds {seed} --steps {args.steps}')
                add_to(args.out or 'results/recall.json', r, ('kind', 'seed', 'steps'))
                print(kind, seed, r['accuracy'], r['indexer'], r['seconds'], flush=True)
