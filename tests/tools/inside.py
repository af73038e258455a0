"""What happens inside a trained whale, on one sentence and on held-out text, as results/inside.json for the chapter on it.

    python tests/tools/inside.py --model FOLDER    a run of `nanowhale train`
"""
import argparse, json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from nanowhale.model.config import SWA
from nanowhale.model.hyper import HyperConnection
from nanowhale.model.visibility import views, whole_rows
from nanowhale.model.whale import Whale
from nanowhale.train.data import embedded_corpus, load_tokenizer, split_held_out
from runs import ROOT, provenance

SENTENCE = 'The parser reads each line of the file and returns a list of strings, or None if there is nothing left. The list is a copy.'
FAR = [0, 1, 2, 4, 8, 16, 32]   # first distance of each group that attention is summed over; the sink comes before them

def shares(attn, x, rope):
    "Attention [T,H,T+1] of one row: how much each query takes from each key, and last from its sink"
    q,kv = attn.query(x, *rope)[0],attn.latent(x, *rope)[0]
    scores = torch.einsum('thk,sk->ths', q, kv)*q.shape[-1]**-0.5
    scores.masked_fill_(~torch.ones(len(q), len(q)).tril().bool()[:,None], float('-inf'))
    return torch.cat([scores, attn.sinks[:,None].expand(len(q), -1, 1)], -1).softmax(-1)

def watch(whale, ids):
    "One row [T] through the whale: what its blocks attend to, which experts they choose, how they mix, and both heads' logits"
    seen = dict(attention=[], experts=[], comb=[])
    def attention(m, args): seen['attention'].append(shares(m, args[0], args[1]))
    def chosen(m, args, out): seen['experts'].append(out[1].gather(-1, out[2].argsort(-1, descending=True)).view(len(ids), -1))   # the heaviest first
    def mixed(m, args, out): seen['comb'].append(out[2][0])
    hooks = [h for b in whale.model.layers for h in (b.self_attn.register_forward_pre_hook(attention), b.mlp.gate.register_forward_hook(chosen))]
    hooks += [m.register_forward_hook(mixed) for m in whale.model.layers.modules() if isinstance(m, HyperConnection)]
    out = whale(ids[None])
    for h in hooks: h.remove()
    view = views(whale.cfg, whole_rows(whale.cfg, ids[None,:-1], None))[SWA]
    h,_ = whale.mtp[0](out.streams[:,:-1], whale.model.embed_tokens(ids[None,1:]), *view)
    return seen, out.logits[0], whale.lm_head(h)[0]

def by_distance(A):
    "Attention [T,H,T+1] of the later half of a row, summed over groups of distances: [H,1+len(FAR)], the sink first"
    T = len(A)
    far = (torch.arange(T)[:,None]-torch.arange(T)).clamp(min=-1)
    group = torch.bucketize(far, torch.tensor(FAR), right=True)-1
    parts = [A[...,-1], *((A[...,:-1]*(group==g)[:,None]).sum(-1) for g in range(len(FAR)))]
    return torch.stack(parts, -1)[T//2:].mean(0)

def known_from_token(pairs):
    "Share of tokens whose first expert is that of most equal tokens seen before, and share of the commonest expert"
    half,table = len(pairs)//2,defaultdict(Counter)
    for t,e in pairs[:half]: table[t][e] += 1
    later = [(table[t].most_common(1)[0][0], e) for t,e in pairs[half:] if t in table]
    return sum(a==b for a,b in later)/len(later), Counter(e for _,e in later).most_common(1)[0][1]/len(later)

def rounded(x, digits=3): return [rounded(v, digits) for v in x] if isinstance(x, list) else round(x, digits)

@torch.inference_mode()
def main(folder, rows=48, T=128):
    whale,tok = Whale.from_pretrained(folder).eval(),load_tokenizer(folder)
    spec,results = (json.loads((Path(folder)/f'{n}.json').read_text()) for n in ('run', 'results'))
    say = lambda i: tok.decode([int(i)])
    ids = torch.tensor([tok.bos_token_id, *tok.encode(SENTENCE, add_special_tokens=False)])
    seen,logits,second = watch(whale, ids)
    sentence = dict(tokens=[say(i) for i in ids], experts=[e.tolist() for e in seen['experts']],
        sink=[rounded(A[...,-1].T.tolist(), 2) for A in seen['attention']],
        guesses=[say(i) for i in logits.argmax(-1)], second_guesses=[say(i) for i in second.argmax(-1)])
    text = torch.tensor([i for t in split_held_out(embedded_corpus())[1] for i in tok.encode(t, add_special_tokens=False)])
    starts = torch.linspace(0, len(text)-T, rows).long()
    far,combs,loads,pairs,right = [],[],[],defaultdict(list),Counter()
    for s in starts:
        row = torch.cat([torch.tensor([tok.bos_token_id]), text[s:s+T-1]])
        seen,logits,second = watch(whale, row)
        far.append(torch.stack([by_distance(A) for A in seen['attention']]))
        combs.append(torch.stack([c.mean(0) for c in seen['comb']]))
        loads.append(torch.stack([torch.bincount(e.flatten(), minlength=whale.cfg.n_routed_experts) for e in seen['experts']]))
        for layer,e in enumerate(seen['experts']): pairs[layer] += zip(row.tolist(), e[:,0].tolist())
        right['next'] += int((logits[:-2].argmax(-1)==row[1:-1]).sum()); right['after'] += int((second[:-1].argmax(-1)==row[2:]).sum()); right['n'] += T-2
        right['agreed'] += int((second[:-1].argmax(-1)==logits[1:-1].argmax(-1)).sum())
    held_out = dict(tokens=rows*T, next_right=right['next']/right['n'], after_right=right['after']/right['n'], agrees=right['agreed']/right['n'],
        attention=rounded(torch.stack(far).mean(0).tolist()), comb=rounded(torch.stack(combs).mean(0).tolist()),
        heaviest=[[round(sum(e==k for _,e in pairs[l])/len(pairs[l]), 3) for k in range(whale.cfg.n_routed_experts)] for l in pairs],
        chosen=rounded((sum(loads)/sum(loads).sum(-1, keepdim=True)).tolist()),
        known_from_token=[rounded(list(known_from_token(pairs[l]))) for l in pairs])
    model = dict(preset=spec['preset'], steps=spec['recipe']['steps'], bits_per_byte=results['held-out bits per byte'], trained_on=results['hardware'])
    held_out = {k: round(v, 3) if isinstance(v, float) else v for k,v in held_out.items()}
    whole = provenance('python tests/tools/inside.py --model FOLDER') | dict(seed=spec['seed'], whale=model, groups=FAR, sentence=sentence, held_out=held_out)
    (ROOT/'results/inside.json').write_text(json.dumps(whole)+'\n')
    print(json.dumps(held_out))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    main(p.parse_args().model)
