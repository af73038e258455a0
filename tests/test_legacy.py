"""First-generation nanowhale checkpoints: their forward written down once more, plainly and under their names, against the import.

    pytest tests/test_legacy.py
    python tests/test_legacy.py    a table: worst error over random configurations, and what leaving a translation out costs

The oracle shares no line with the package: tokens, heads and streams are loops, RoPE turns halves by minus the angle, attention
is causal over everything without a sink, each expert is called by itself, nothing is clamped when the limit is 0.
"""
import paths   # noqa: F401, for tests/tools
import copy, json, math, os, random, subprocess, sys
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from safetensors.torch import save_file
import nanowhale.generate.legacy as legacy
from nanowhale.model.config import WhaleConfig
from nanowhale.model.whale import Whale
from nanowhale.generate.sample import generate
from runs import PATIENCE
from test_parity import exact_angles

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1e-9      # of logits in float64, relative to the largest of them (or 1): no processor's order of summation comes near

# ---------------------------------------------------------------- the old model, in float64

def random_old(seed):
    "A config.json of odd sizes and random weights for it: nonzero sinks, biases, norms and scales"
    r = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    G,K,E,L,N = r.randint(1, 3),r.randint(3, 15),r.randint(2, 6),r.randint(1, 3),r.randint(1, 5)
    c = dict(model_type='deepseek_v4', architectures=['DeepseekV4ForCausalLM'], torch_dtype='float32',
        auto_map=dict(AutoConfig='configuration_deepseek_v4.DeepseekV4Config', AutoModelForCausalLM='modeling_deepseek_v4.DeepseekV4ForCausalLM'),
        vocab_size=r.randint(20, 60), hidden_size=r.randint(3, 20), num_hidden_layers=L, num_attention_heads=G*r.randint(1, 3), num_key_value_heads=1,
        head_dim=K, qk_rope_head_dim=2*r.randint(1, K//2), nope_head_dim=0, q_lora_rank=r.randint(2, 9), o_groups=G, o_lora_rank=r.randint(1, 6),
        moe_intermediate_size=r.randint(2, 12), n_routed_experts=E, n_shared_experts=1, num_experts_per_tok=r.randint(1, E), norm_topk_prob=True,
        scoring_func='sqrtsoftplus', topk_method='noaux_tc', routed_scaling_factor=1.5, num_hash_layers=0, swiglu_limit=0.0, hc_mult=N,
        hc_sinkhorn_iters=r.randint(1, 4), hc_eps=1e-6, rms_norm_eps=1e-6, rope_theta=r.choice([100.0, 1e4]), rope_scaling=None,
        compress_ratios=[0]*(L+1), compress_rope_theta=160000.0, index_n_heads=64, index_head_dim=128, index_topk=512, sliding_window=r.randint(2, 4),
        num_nextn_predict_layers=1, max_position_embeddings=64, initializer_range=0.02, hidden_act='silu', attention_bias=False,
        attention_dropout=0.0, use_cache=True, bos_token_id=0, eos_token_id=1, pad_token_id=None, tie_word_embeddings=False)
    c['nope_head_dim'] = K-c['qk_rope_head_dim']
    V,D,H,I,Q,O = (c[k] for k in ('vocab_size', 'hidden_size', 'num_attention_heads', 'moe_intermediate_size', 'q_lora_rank', 'o_lora_rank'))
    M = N*N+2*N
    layer = {'attn_norm.weight': (D,), 'ffn_norm.weight': (D,), 'attn.wq_a.weight': (Q,D), 'attn.q_norm.weight': (Q,), 'attn.wq_b.weight': (H*K,Q),
        'attn.wkv.weight': (K,D), 'attn.kv_norm.weight': (K,), 'attn.wo_a.weight': (G*O,H*K//G), 'attn.wo_b.weight': (D,G*O), 'attn.attn_sink': (H,),
        'ffn.gate.weight': (E,D), 'ffn.gate.bias': (E,)}
    for s in ('attn','ffn'): layer |= {f'hc_{s}_fn': (M,N*D), f'hc_{s}_base': (M,), f'hc_{s}_scale': (3,)}
    for e in [f'experts.{e}' for e in range(E)]+['shared_expert']: layer |= {f'ffn.{e}.w{i}.weight': (D,I) if i==2 else (I,D) for i in (1, 2, 3)}
    shapes = {'model.embed_tokens.weight': (V,D), 'lm_head.weight': (V,D), 'model.norm.weight': (D,),
        'model.hc_head_fn': (N,N*D), 'model.hc_head_base': (N,), 'model.hc_head_scale': (1,)}
    shapes |= {f'model.layers.{l}.{k}': s for l in range(L) for k,s in layer.items()}
    def draw(k, s):
        if len(s)>1: return torch.randn(s, generator=g)*(0.3 if 'hc_' in k else s[1]**-0.5)
        return (1.0 if 'norm' in k or 'scale' in k else 0.0)+torch.randn(s, generator=g)*0.5
    return c, {k: draw(k, s) for k,s in shapes.items()}

def norm(x, eps): return x/math.sqrt((x*x).mean().item()+eps)

def old_turn(x, pos, R, theta, back=False):
    "Channel i and channel i+R/2 of the trailing slice, turned by minus the angle"
    y,s = x.clone(),len(x)-R
    for i in range(R//2):
        a = pos*theta**(-2*i/R)
        c,sn = math.cos(a), -math.sin(a) if back else math.sin(a)
        x1,x2 = x[s+i],x[s+R//2+i]
        y[s+i],y[s+R//2+i] = x1*c+x2*sn, -x1*sn+x2*c
    return y

def old_attention(c, w, xs):
    "Causal over everything before; no sink"
    H,K,G,R = c['num_attention_heads'],c['head_dim'],c['o_groups'],c['qk_rope_head_dim']
    eps,theta,kvs,out = c['rms_norm_eps'],c['rope_theta'],[],[]
    for t,x in enumerate(xs):
        kvs.append(old_turn(norm(w['attn.wkv.weight']@x, eps)*w['attn.kv_norm.weight'], t, R, theta))
        q = (w['attn.wq_b.weight']@(norm(w['attn.wq_a.weight']@x, eps)*w['attn.q_norm.weight'])).view(H,K)
        heads = []
        for h in range(H):
            qh = old_turn(norm(q[h], eps), t, R, theta)
            z = torch.stack([(qh@kv)/math.sqrt(K) for kv in kvs])
            p = (z-z.max()).exp()
            o = sum(pi*kv for pi,kv in zip(p/p.sum(), kvs))
            heads.append(old_turn(o, t, R, theta, back=True))
        groups = torch.cat(heads).view(G,-1)
        low = [a@g for a,g in zip(w['attn.wo_a.weight'].view(G,-1,groups.shape[1]), groups)]
        out.append(w['attn.wo_b.weight']@torch.cat(low))
    return out

def old_expert(w, name, x, limit):
    gate,up = w[f'ffn.{name}.w1.weight']@x,w[f'ffn.{name}.w3.weight']@x
    if limit>0: gate,up = gate.clamp(max=limit),up.clamp(-limit, limit)
    return w[f'ffn.{name}.w2.weight']@(gate/(1+(-gate).exp())*up)

def old_experts(c, w, x):
    s = (1+(w['ffn.gate.weight']@x).exp()).log().sqrt()
    chosen = (s+w['ffn.gate.bias']).topk(c['num_experts_per_tok']).indices.tolist()
    total = sum(s[e] for e in chosen)+1e-20
    y = old_expert(w, 'shared_expert', x, c['swiglu_limit'])
    for e in chosen: y = y+c['routed_scaling_factor']*s[e]/total*old_expert(w, f'experts.{e}', x, c['swiglu_limit'])
    return y

def sigmoid(x): return 1/(1+(-x).exp())

def old_mix(c, w, which, X):
    "What a sublayer reads, its weight in each stream, and comb: as in V4"
    N,eps = c['hc_mult'],c['hc_eps']
    m = w[f'hc_{which}_fn']@norm(X.flatten(), c['rms_norm_eps'])
    a,b = w[f'hc_{which}_scale'],w[f'hc_{which}_base']
    pre,post = sigmoid(a[0]*m[:N]+b[:N])+eps, 2*sigmoid(a[1]*m[N:2*N]+b[N:2*N])
    comb = (a[2]*m[2*N:]+b[2*N:]).view(N,N).softmax(-1)+eps
    comb = comb/(comb.sum(0, keepdim=True)+eps)
    for _ in range(c['hc_sinkhorn_iters']-1):
        comb = comb/(comb.sum(1, keepdim=True)+eps)
        comb = comb/(comb.sum(0, keepdim=True)+eps)
    return sum(pre[n]*X[n] for n in range(N)), post, comb

def old_forward(c, state, ids):
    "Logits [T,V] of one row, in float64"
    state = {k.replace('_orig_mod.', ''): v.double() for k,v in state.items()}
    N,eps = c['hc_mult'],c['rms_norm_eps']
    Xs = [state['model.embed_tokens.weight'][i].repeat(N,1) for i in ids]
    for l in range(c['num_hidden_layers']):
        w = {k.removeprefix(f'model.layers.{l}.'): v for k,v in state.items() if k.startswith(f'model.layers.{l}.')}
        for which in ('attn','ffn'):
            read = [old_mix(c, w, which, X) for X in Xs]
            xs = [norm(u, eps)*w[f'{which}_norm.weight'] for u,_,_ in read]
            ys = old_attention(c, w, xs) if which=='attn' else [old_experts(c, w, x) for x in xs]
            Xs = [torch.stack([post[i]*y+sum(comb[i,j]*X[j] for j in range(N)) for i in range(N)]) for X,y,(_,post,comb) in zip(Xs, ys, read)]
    out = []
    for X in Xs:
        m = state['model.hc_head_fn']@norm(X.flatten(), eps)
        pre = sigmoid(state['model.hc_head_scale']*m+state['model.hc_head_base'])+c['hc_eps']
        out.append(state['lm_head.weight']@(norm(sum(pre[n]*X[n] for n in range(N)), eps)*state['model.norm.weight']))
    return torch.stack(out)

# ---------------------------------------------------------------- the comparison

def write(folder, c, state, prefix=''):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'config.json').write_text(json.dumps(c))
    save_file({(prefix+k if k!='lm_head.weight' else k): v.clone() for k,v in state.items()}, folder/'model.safetensors', metadata={'format': 'pt'})
    return folder

def ids_for(c, seed, T=23): return torch.randint(0, c['vocab_size'], (1,T), generator=torch.Generator().manual_seed(seed))

def error(whale, c, state, ids):
    "In float64 on both sides, angles included"
    with torch.no_grad(), exact_angles(): got = copy.deepcopy(whale).double()(ids).logits[0]
    want = old_forward(c, state, ids[0].tolist())
    return ((got-want).abs().max()/want.abs().max().clamp(min=1)).item()

@pytest.mark.parametrize('seed', range(12))
def test_logits_are_the_old_ones(seed, tmp_path):
    c,state = random_old(seed)
    whale = Whale.from_pretrained(write(tmp_path, c, state, '_orig_mod.' if seed%3==0 else ''))
    ids = ids_for(c, seed)
    assert error(whale, c, state, ids)<LIMIT

def test_the_card(tmp_path):
    "The published sizes, with a small vocabulary and two layers"
    c,_ = random_old(0)
    c |= dict(vocab_size=50, hidden_size=320, num_hidden_layers=2, num_attention_heads=8, head_dim=96, qk_rope_head_dim=32, q_lora_rank=160, o_groups=2,
        o_lora_rank=80, moe_intermediate_size=640, n_routed_experts=4, num_experts_per_tok=2, hc_mult=4, hc_sinkhorn_iters=2, compress_ratios=[0]*3,
        max_position_embeddings=2048, sliding_window=128)
    state = resize(c)
    whale = Whale.from_pretrained(write(tmp_path, c, state))
    assert error(whale, c, state, ids_for(c, 1, 9))<LIMIT

def resize(c):
    "Random weights for another config"
    g = torch.Generator().manual_seed(5)
    whale = Whale(WhaleConfig.from_hf(legacy.legacy_config(c|dict(num_nextn_predict_layers=0))))
    names = {'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'self_attn': 'attn', 'mlp': 'ffn', 'q_a_proj': 'wq_a',
        'q_a_norm': 'q_norm', 'q_b_proj': 'wq_b', 'kv_proj': 'wkv', 'o_a_proj': 'wo_a', 'o_b_proj': 'wo_b', 'sinks': 'attn_sink',
        'e_score_correction_bias': 'bias',
        'shared_experts': 'shared_expert', 'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2'}
    out = {}
    for k,v in whale.state_dict().items():
        std = 0.3 if 'hc' in k or v.ndim==1 else v.shape[-1]**-0.5
        v = (1.0 if 'norm' in k or 'scale' in k else 0.0)+torch.randn(v.shape, generator=g)*std
        parts = k.split('.')
        k = '.'.join(names.get(p, p) for p in parts).replace('.hc_head.hc_', '.hc_head_').replace('.attn_hc.', '.hc_attn_').replace('.ffn_hc.', '.hc_ffn_')
        if k.endswith('experts.gate_up_proj'):
            for e,x in enumerate(v): out |= {k.replace('gate_up_proj', f'{e}.w{i}.weight'): part.clone() for i,part in zip((1,3), x.chunk(2))}
        elif k.endswith('experts.w2'): out |= {k.replace('w2', f'{e}.w2.weight'): x.clone() for e,x in enumerate(v)}
        else: out[k] = v
    return out

def without(name):
    "The import with one of its translations left out"
    def config(**kw):
        full = legacy.legacy_config
        return patch.object(legacy, 'legacy_config', lambda c: full(c)|kw)
    identity = patch.object(legacy, 'pair_order', lambda K, R: torch.arange(K))
    def no_part(part): return patch.object(legacy, 'PERMUTED', {k: v for k,v in legacy.PERMUTED.items() if k!=part})
    return {'the context as window': lambda: config(sliding_window=4), 'the sink': lambda: patch.object(legacy, 'NO_SINK', 0.0),
        'the transposed mix': lambda: config(hc_transposed=False), 'the clamp': lambda: config(swiglu_limit=0.5), 'the order of channels': lambda: identity,
        **{f'the order in {k}': (lambda k=k: no_part(k)) for k in legacy.PERMUTED}}[name]()

WITHOUT = ['the context as window', 'the sink', 'the transposed mix', 'the clamp', 'the order of channels', *(f'the order in {k}' for k in legacy.PERMUTED)]

@pytest.mark.parametrize('name', WITHOUT)
def test_no_translation_is_idle(name, tmp_path):
    c,state = random_old(12)
    assert (c['hc_mult'], c['hc_sinkhorn_iters'], c['qk_rope_head_dim'])==(3, 2, 4)
    folder,ids = write(tmp_path, c, state),ids_for(c, 12)
    assert error(Whale.from_pretrained(folder), c, state, ids)<LIMIT
    with without(name): assert error(Whale.from_pretrained(folder), c, state, ids)>1e-3

def test_a_limit_that_is_not_zero_clamps(tmp_path):
    c,state = random_old(2)
    c['swiglu_limit'] = 0.3
    whale,ids = Whale.from_pretrained(write(tmp_path, c, state)),ids_for(c, 2)
    assert error(whale, c, state, ids)<LIMIT
    assert error(whale, c|dict(swiglu_limit=0.0), state, ids)>1e-3

def test_saved_and_loaded_again(tmp_path):
    "By us to the last bit, in one file, in shards and in bfloat16; transformers refuses the folder, and says why in one line when asked to convert"
    from transformers import AutoConfig
    c,state = random_old(3)
    whale,ids = Whale.from_pretrained(write(tmp_path/'old', c, state)),ids_for(c, 3)
    for name,size in (('one', None), ('shards', '4KB')):
        whale.save_pretrained(tmp_path/name, max_shard_size=size)
        again = Whale.from_pretrained(tmp_path/name)
        assert again.cfg==whale.cfg and torch.equal(again(ids).logits, whale(ids).logits)
        assert all(v.isfinite().all() for v in again.state_dict().values())
    config = json.loads((tmp_path/'one'/'config.json').read_text())
    assert config['model_type']=='nanowhale' and config['hc_transposed'] is True and 'auto_map' not in config
    with pytest.raises(ValueError, match='nanowhale'): AutoConfig.from_pretrained(tmp_path/'one')
    with pytest.raises(ValueError, match='transformers has no such switch'): whale.to_hf()
    again.bfloat16().save_pretrained(tmp_path/'half')
    half = Whale.from_pretrained(tmp_path/'half')
    assert (half.model.layers[0].self_attn.sinks.float()<-9e29).all()
    assert torch.equal(half(ids).logits, again(ids).logits)

def test_generation(tmp_path):
    "With the cache, token by token, as the old forward would greedily"
    c,state = random_old(6)
    whale,ids = Whale.from_pretrained(write(tmp_path, c, state)),ids_for(c, 6, 5)
    got = generate(whale, ids, max_new_tokens=12, temperature=0, eos_token_id=None)[0].tolist()
    for t in range(5, 17): assert got[t]==old_forward(c, state, got[:t])[-1].argmax().item()

def test_the_command(tmp_path):
    "`nanowhale generate --model FOLDER`, with code beside the weights that must not run"
    from nanowhale.train.data import train_tokenizer
    c,_ = random_old(1)
    c |= dict(vocab_size=300)
    tok = train_tokenizer(['the meaning of life is a whale song'], 258)
    state = resize(c)
    folder = write(tmp_path/'old', c, state, '_orig_mod.')
    tok.save_pretrained(folder)
    for f in ('modeling_deepseek_v4.py', 'configuration_deepseek_v4.py'): (folder/f).write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    env = os.environ|dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1')
    door = [sys.executable, '-c', 'import sys; from nanowhale.cli import main; sys.exit(main())']
    r = subprocess.run([*door, 'generate', 'The meaning of life is', '--model', str(folder), '--tokens', '5', '--seed', '0'], env=env, cwd=tmp_path,
                       stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    assert r.returncode==0 and r.stdout.startswith('The meaning of life is') and not r.stderr, r.stderr
    assert not (tmp_path/'ran').exists()
    r = subprocess.run([*door, 'info', '--model', str(folder)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert r.returncode==0 and f'{sum(v.numel() for v in state.values()):,}' in r.stdout, r.stdout+r.stderr

def damaged(how):
    c,state = random_old(7)
    how(c, state)
    return c,state

DAMAGE = dict(
    head_dim=(lambda c, s: c.update(head_dim=c['head_dim']+1), ['kv_norm.weight', 'head_dim']),
    layers=(lambda c, s: c.update(num_hidden_layers=c['num_hidden_layers']+1), ['num_hidden_layers']),
    lost=(lambda c, s: s.pop('model.layers.0.attn.wq_a.weight'), ['model.layers.0.self_attn.q_a_proj.weight is missing']),
    gained=(lambda c, s: s.update({'model.layers.0.attn.extra': torch.ones(2)}), ['model.layers.0.self_attn.extra', 'no place']),
    hashed=(lambda c, s: c.update(num_hash_layers=1), ['num_hash_layers=1']))

@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_one_clear_line(name, tmp_path):
    how,says = DAMAGE[name]
    folder = write(tmp_path, *damaged(how))
    with pytest.raises(ValueError) as e: Whale.from_pretrained(folder)
    assert '\n' not in str(e.value) and all(s in str(e.value) for s in says), str(e.value)

if __name__=='__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        errors = []
        for seed in range(100):
            c,state = random_old(seed)
            whale,ids = Whale.from_pretrained(write(Path(d)/str(seed), c, state)),ids_for(c, seed)
            errors.append(error(whale, c, state, ids))
        print(f'100 random configurations in float64: worst relative error of the logits {max(errors):.1e}')
        c,state = random_old(12)
        for name in WITHOUT:
            with without(name): print(f'without {name:30}{error(Whale.from_pretrained(Path(d)/"12"), c, state, ids_for(c, 12)):.1e}')
