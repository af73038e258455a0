"`WhaleConfig` against transformers' `DeepseekV4Config`, its accounting against the real module, and every bad value refused"
import json, random
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV4Config
from nanowhale.generate.hf_config import BUILT, rope_factor
from nanowhale.model.config import CSA, HCA, SWA, WhaleConfig
from nanowhale.validate import number_fields

SIZES = number_fields(WhaleConfig, int)
POSITIVE = number_fields(WhaleConfig, float)
from nanowhale.presets import (PRESETS, cache_bytes, count_flops, count_params, get_preset,
    layer_params, mean_entries, mean_keys, nanowhale_100m, tiny)
from nanowhale.generate.legacy import NO_CLAMP, legacy_config

INTS = [f.name for f in fields(WhaleConfig) if f.type in (int, int|None)]
FLOATS = [f.name for f in fields(WhaleConfig) if f.type in (float, float|None)]

def some_config(seed):
    "A small valid configuration with odd sizes"
    r = random.Random(seed)
    K,G,E,L = r.choice([6,10,44,45,47,96]),r.randint(1,3),r.randint(1,6),r.randint(1,4)
    return WhaleConfig(vocab_size=r.randint(20,99), hidden_size=r.randint(3,40), num_hidden_layers=L,
        num_attention_heads=G*r.randint(1,3), head_dim=K, qk_rope_head_dim=2*r.randint(1,K//2), q_lora_rank=r.randint(1,30),
        o_groups=G, o_lora_rank=r.randint(1,20), sliding_window=r.randint(1,50), rope_theta=r.choice([10000,500.5]),
        max_position_embeddings=r.randint(10,600), moe_intermediate_size=r.randint(1,30), n_routed_experts=E,
        num_experts_per_tok=r.randint(1,E), scoring_func=r.choice(['sqrtsoftplus','sigmoid','softmax']),
        routed_scaling_factor=r.choice([1,2.5]), swiglu_limit=r.choice([7,10.0]), hc_mult=r.randint(1,5),
        hc_sinkhorn_iters=r.randint(1,20), hc_eps=r.choice([1e-6,1e-4]), num_nextn_predict_layers=r.randint(0,1),
        layer_types=r.choices([SWA,CSA,HCA], k=L), mlp_layer_types=r.choices(['moe','hash_moe'], k=L), compress_rate_csa=r.choice([4,3]),
        compress_rate_hca=r.choice([128,5]), compress_rope_theta=r.choice([160000,77.]), yarn_factor=r.choice([1,16]), yarn_context=r.choice([65536,90]),
        index_n_heads=r.randint(1,3), index_head_dim=r.randint(48,60)*2, index_topk=r.randint(1,9),
        rms_norm_eps=1e-5, initializer_range=0.006, bos_token_id=r.choice([None,3]), eos_token_id=r.randint(0,19),
        pad_token_id=r.choice([None,0]))

def refused(field, make, *words):
    "`make` raises one line that starts with `field` and holds `words`"
    with pytest.raises(ValueError) as e: make()
    text = str(e.value)
    assert text.startswith(field) and '\n' not in text and len(text)<300, text
    for w in words: assert w in text, text

# ---------------------------------------------------------------- transformers

def test_field_names_and_defaults_are_those_of_transformers():
    ours,theirs = WhaleConfig(),DeepseekV4Config()
    for f in fields(WhaleConfig):
        if f.name in ('hc_transposed','compress_rate_csa','compress_rate_hca','yarn_factor','yarn_context'): continue   # ours alone
        assert hasattr(theirs, f.name), f.name
        if f.name not in ('layer_types','mlp_layer_types','partial_rotary_factor'): assert getattr(ours,f.name)==getattr(theirs,f.name), f.name

@pytest.mark.parametrize('seed', range(25))
def test_round_trip(seed, tmp_path):
    cfg = some_config(seed)
    hf = cfg.to_hf()
    assert hf.qk_rope_head_dim==cfg.qk_rope_head_dim and hf.rope_parameters['main']['rope_theta']==cfg.rope_theta
    assert WhaleConfig.from_hf(hf)==cfg and WhaleConfig.from_hf(hf.to_dict())==cfg
    assert WhaleConfig.from_hf(json.loads(json.dumps(cfg.to_dict())))==cfg
    for name,value in cfg.to_dict().items(): assert getattr(hf,name)==value, name
    assert WhaleConfig.from_hf(hf).to_hf().to_dict()==hf.to_dict()
    hf.save_pretrained(tmp_path)
    assert WhaleConfig.from_hf(json.loads((tmp_path/'config.json').read_text()))==cfg
    assert WhaleConfig.from_hf(AutoConfig.from_pretrained(tmp_path))==cfg

def test_rotary_fraction_survives_truncation():
    for K in range(2, 513):
        for R in range(2, K+1, 2): assert int(K*rope_factor(R,K))==R and rope_factor(R,K)<=1, (R,K)
    for K,R in ((44,30), (45,26), (47,6), (49,2), (49,48), (96,64), (512,64), (2,2)):
        hf = WhaleConfig(head_dim=K, qk_rope_head_dim=R).to_hf()
        assert hf.qk_rope_head_dim==R and json.loads(hf.to_json_string())['qk_rope_head_dim']==R

def test_two_spellings_of_the_rotary_size():
    assert WhaleConfig(head_dim=48).qk_rope_head_dim==6                                         # transformers' default eighth
    assert WhaleConfig(head_dim=96, partial_rotary_factor=2/3).qk_rope_head_dim==64
    cfg = WhaleConfig(head_dim=96, qk_rope_head_dim=64)
    assert cfg==WhaleConfig(head_dim=96, partial_rotary_factor=64/96)
    assert replace(cfg, qk_rope_head_dim=32).qk_rope_head_dim==32                               # neither change is lost
    assert replace(cfg, partial_rotary_factor=0.25).qk_rope_head_dim==24
    assert replace(cfg, head_dim=128).qk_rope_head_dim==64
    both = dict(head_dim=96, qk_rope_head_dim=32, partial_rotary_factor=0.5)                    # transformers: the fraction wins
    assert WhaleConfig.from_hf(both).qk_rope_head_dim==48==DeepseekV4Config(**both).qk_rope_head_dim

def test_inner_rope_parameters_win():
    rope = dict(main=dict(rope_type='default', rope_theta=500.0, partial_rotary_factor=0.5),
        compress=dict(rope_type='yarn', factor=16, partial_rotary_factor=0.5, attention_factor=1.0))
    cfg = WhaleConfig.from_hf(dict(head_dim=32, rope_theta=10000.0, partial_rotary_factor=0.25, rope_parameters=rope))
    assert (cfg.rope_theta, cfg.qk_rope_head_dim)==(500.0, 16)
    del rope['main']['partial_rotary_factor'],rope['compress']['partial_rotary_factor']     # then the whole head rotates
    assert WhaleConfig.from_hf(dict(head_dim=32, partial_rotary_factor=0.25, rope_parameters=rope)).qk_rope_head_dim==32
    flat = dict(rope_type='yarn', factor=16, rope_theta=9.0)                                    # concerns compressed layers only
    assert WhaleConfig.from_hf(dict(rope_parameters=flat)).rope_theta==10000.0

def test_deepseeks_own_spelling():
    cfg = WhaleConfig.from_hf(dict(model_type='deepseek_v4', num_hidden_layers=2, compress_ratios=[0,0,0], num_hash_layers=0, qk_rope_head_dim=64))
    assert cfg.num_hidden_layers==2 and cfg.qk_rope_head_dim==64

def test_layer_lists():
    cfg = replace(tiny(), num_hidden_layers=3, layer_types=['sliding_attention']*3, mlp_layer_types=('moe',)*3)
    assert cfg==replace(tiny(), num_hidden_layers=3) and cfg.layer_types is None
    assert cfg.to_hf().layer_types==['sliding_attention']*3 and cfg.to_hf().mlp_layer_types==['moe']*3

def test_frozen_and_hashable():
    cfg = tiny()
    with pytest.raises(FrozenInstanceError): cfg.hidden_size = 1
    assert {cfg: 1}[tiny()]==1

# ---------------------------------------------------------------- bad input

BAD = [
    ('qk_rope_head_dim', dict(head_dim=32, qk_rope_head_dim=15), 'even'),
    ('qk_rope_head_dim', dict(head_dim=32, qk_rope_head_dim=34), 'head_dim=32'),
    ('qk_rope_head_dim', dict(head_dim=32, qk_rope_head_dim=0), 'between 2'),
    ('qk_rope_head_dim', dict(head_dim=10), 'even'),
    ('partial_rotary_factor', dict(partial_rotary_factor=1.5), 'at most 1'),
    ('partial_rotary_factor', dict(partial_rotary_factor=-0.5), 'above 0'),
    ('num_attention_heads', dict(num_attention_heads=7, o_groups=2), 'multiple of o_groups=2'),
    ('num_experts_per_tok', dict(n_routed_experts=4, num_experts_per_tok=5), 'n_routed_experts=4'),
    ('n_shared_experts', dict(n_shared_experts=2), '1'),
    ('scoring_func', dict(scoring_func='relu'), 'sqrtsoftplus, sigmoid, softmax'),
    ('scoring_func', dict(scoring_func=None), 'string'),
    ('num_nextn_predict_layers', dict(num_nextn_predict_layers=2), '0 or 1'),
    ('num_nextn_predict_layers', dict(num_nextn_predict_layers=-1), '0 or 1'),
    ('initializer_range', dict(initializer_range=-0.1), 'negative'),
    ('bos_token_id', dict(vocab_size=10, bos_token_id=10), 'vocab_size-1=9'),
    ('eos_token_id', dict(eos_token_id=-1), 'id from 0'),
    ('eos_token_id', dict(eos_token_id=[1,'2']), 'whole number'), ('eos_token_id', dict(vocab_size=10, eos_token_id=[1,10]), 'vocab_size-1=9'),
    ('pad_token_id', dict(vocab_size=10, pad_token_id=99), 'vocab_size-1=9'),
    ('layer_types', dict(num_hidden_layers=2, layer_types=['sliding_attention']), '2 entries, has 1'),
    ('layer_types', dict(layer_types='sliding_attention'), 'list'),
    ('layer_types[1]', dict(num_hidden_layers=2, layer_types=['sliding_attention','linear_attention']), 'compressed_sparse_attention'),
    ('index_head_dim', dict(num_hidden_layers=1, layer_types=[CSA], index_head_dim=32), 'qk_rope_head_dim=64'),
    ('yarn_factor', dict(yarn_factor=0.5), 'at least 1'),
    ('mlp_layer_types[0]', dict(num_hidden_layers=1, mlp_layer_types=['dense']), 'hash_moe'),
    ('hidden_size', dict(hidden_size=10**30), 'whole number')]
UNBUILT = [
    ('num_key_value_heads', dict(num_key_value_heads=8)), ('hidden_act', dict(hidden_act='gelu')),
    ('attention_bias', dict(attention_bias=True)), ('mlp_bias', dict(mlp_bias=True)),
    ('tie_word_embeddings', dict(tie_word_embeddings=True)), ('attention_dropout', dict(attention_dropout=0.1)),
    ('num_hash_layers', dict(num_hash_layers=44)), ('compress_ratios', dict(compress_ratios=[0,0,5,128,0])),
    ('compress_rates', dict(compress_rates=[4,128])), ('compress_rates', dict(compress_rates=dict(csa=4))),
    ('compress_ratios', dict(compress_ratios=4)), ('model_type', dict(model_type='llama')),
    ('layer_types', dict(model_type='deepseek_v4', num_hash_layers=0, compress_ratios=[0])),
    ('rope_parameters.compress.rope_type', dict(rope_scaling=dict(type='linear', factor=2))),
    ('rope_parameters.compress.beta_fast', dict(rope_scaling=dict(type='yarn', factor=2, beta_fast=16))),
    ('rope_parameters.compress.attention_factor', dict(rope_parameters=dict(main={}, compress=dict(rope_type='yarn', factor=2)))),
    ('rope_parameters.compress.partial', dict(rope_parameters=dict(main=dict(), compress=dict(partial_rotary_factor=0.5)))),
    ('rope_parameters.main.rope_type', dict(rope_parameters=dict(main=dict(rope_type='yarn', factor=16)))),
    ('rope_parameters.main.rope_type', dict(rope_parameters=dict(main=dict(type='linear', factor=2))))]

@pytest.mark.parametrize('field,values,word', BAD, ids=[f'{f}-{i}' for i,(f,*_) in enumerate(BAD)])
def test_bad_sizes_are_named(field, values, word):
    refused(field, lambda: WhaleConfig(**values), word)
    refused(field, lambda: WhaleConfig.from_hf(values), word)

@pytest.mark.parametrize('field,values', UNBUILT, ids=[f'{f}-{i}' for i,(f,_) in enumerate(UNBUILT)])
def test_what_is_not_built_is_refused(field, values): refused(field, lambda: WhaleConfig.from_hf(values))

def test_every_unbuilt_switch_is_in_the_table(): assert set(BUILT) <= {f for f,_ in UNBUILT}

@pytest.mark.parametrize('field', SIZES)
@pytest.mark.parametrize('value', [0, -1])
def test_sizes_are_at_least_one(field, value): refused(field, lambda: WhaleConfig(**{field: value}), str(value), 'at least 1')

@pytest.mark.parametrize('field', POSITIVE)
@pytest.mark.parametrize('value', [0, -1.0])
def test_positive_numbers(field, value): refused(field, lambda: WhaleConfig(**{field: value}), 'above 0')

@pytest.mark.parametrize('field', INTS)
def test_whole_numbers_only(field):
    for value in ('320', 320.0, True, 2**31, [1], float('nan')): refused(field, lambda: WhaleConfig(**{field: value}), 'whole number')
    if field not in ('qk_rope_head_dim','bos_token_id','eos_token_id','pad_token_id'):
        refused(field, lambda: WhaleConfig.from_hf({field: None}), 'whole number')

@pytest.mark.parametrize('field', FLOATS)
def test_finite_numbers_only(field):
    for value in ('1e-6', True, float('nan'), float('inf'), [1.0], 10**400): refused(field, lambda: WhaleConfig(**{field: value}), 'finite')

@pytest.mark.parametrize('changes', [{}, dict(num_hidden_layers=5), dict(num_hidden_layers=1, layer_types=['sliding_attention'])])
def test_default_transformers_layers(changes):
    theirs = DeepseekV4Config(**changes)
    for ours in (WhaleConfig.from_hf(theirs), WhaleConfig.from_hf(dict(model_type='deepseek_v4', **changes))):
        assert [list(x) for x in zip(*ours.kinds)]==[theirs.layer_types, theirs.mlp_layer_types]

@pytest.mark.parametrize('junk', [None, 3, 'config.json', ['a']])
def test_not_a_config(junk): refused('config', lambda: WhaleConfig.from_hf(junk), 'dictionary')

def test_presets_by_name():
    for name,make in PRESETS.items(): assert get_preset(name)==make()
    assert get_preset('nanowhale_100m', vocab_size=500).vocab_size==500
    for name in ('huge', '', None): refused('unknown preset', lambda: get_preset(name), *PRESETS)

# ---------------------------------------------------------------- accounting

def component(name):
    "Which entry of `count_params` a tensor of the real module belongs to"
    if name.startswith('mtp.'): return 'mtp'
    if name.startswith('lm_head.'): return 'head'
    if 'embed_tokens' in name: return 'embed'
    for part,comp in (('_hc.','hyper'), ('hc_head.','hyper'), ('compressor.','compress'), ('self_attn.','attention'), ('mlp.','moe')):
        if part in name: return comp
    return 'norm'

def real_counts(cfg):
    from nanowhale.model.whale import Whale
    with torch.device('meta'): whale = Whale(cfg)
    n = dict.fromkeys(count_params(cfg), 0)
    for name,p in whale.state_dict().items(): n[component(name)] += p.numel() if p.is_floating_point() else 0   # a table is none
    return n

@pytest.mark.parametrize('cfg', [*(make() for make in PRESETS.values()), *map(some_config, range(12))])
def test_counts_are_those_of_the_real_module(cfg): assert count_params(cfg)==real_counts(cfg)

@pytest.mark.parametrize('name', ['tiny', 'tiny_v4'])
def test_flops_are_those_that_transformers_computes(name):
    "Its attention looks at all keys and entries, seen or not; streams are read and written by sums, which are no products"
    c = get_preset(name, vocab_size=500, num_nextn_predict_layers=0)
    theirs = AutoModelForCausalLM.from_config(c.to_hf(), experts_implementation='eager')
    T,L,HK = 64,c.num_hidden_layers,c.num_attention_heads*c.head_dim
    with FlopCounterMode(display=False) as counter: theirs(torch.randint(500, (1,T)))
    n = count_flops(c, T)
    seen = L*T
    for attention,_ in c.kinds:
        if attention in c.rates: seen += T//c.rates[attention]
        if attention==CSA: n['compress'] += 2*c.index_n_heads*c.index_head_dim*(T//4-mean_entries(T, 4))
    n['scores'] = 4*HK*seen
    n['hyper'] -= (4*L+1)*2*c.hc_mult*c.hidden_size
    assert T*sum(n.values())==counter.get_total_flops()

# The table "Architecture" of the model card of HuggingFaceTB/nanowhale-100m-base; its "Head dim" is "96 (32 RoPE + 64 NoPE)"
CARD = dict(
    hidden_size=320, num_hidden_layers=8, num_attention_heads=8, head_dim=96, qk_rope_head_dim=32,
    q_lora_rank=160, o_groups=2, o_lora_rank=80,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=640, scoring_func='sqrtsoftplus',
    hc_mult=4, hc_sinkhorn_iters=2, num_nextn_predict_layers=1, vocab_size=129_280, max_position_embeddings=2048)
# What the card leaves open, from the training configuration that it links to (configs/main_100m.yaml of huggingface/nanowhale):
# `compress_ratios` all 0 and `num_hash_layers` 0 are the two None, and special tokens are the defaults of its configuration class
TRAINED = dict(
    routed_scaling_factor=1.5, rope_theta=10_000.0, hc_eps=1e-6, rms_norm_eps=1e-6, initializer_range=0.02,
    layer_types=None, mlp_layer_types=None, bos_token_id=0, eos_token_id=1, pad_token_id=None)
# Where this preset decides: its code ignores the window and sees all of the context; that run had no clamp (`swiglu_limit: 0`), and V4 has
OURS = dict(sliding_window=2048, swiglu_limit=10.0, hc_transposed=False)
# V4's own values of what a whale without compressed layers never reads
IDLE = dict(
    partial_rotary_factor=None, compress_rate_csa=4, compress_rate_hca=128, compress_rope_theta=160_000.0, yarn_factor=1.0,
    yarn_context=65_536, index_n_heads=64, index_head_dim=128, index_topk=512)

def test_the_preset_is_the_card():
    "Every field of it, each from one place"
    tables = (CARD, TRAINED, OURS, IDLE)
    want = {k: v for table in tables for k,v in table.items()}
    assert len(want)==sum(map(len, tables)) and set(want)=={f.name for f in fields(WhaleConfig)}
    assert asdict(nanowhale_100m())==want

def test_all_of_v4_keeps_the_cards_widths():
    "`nanowhale_v4` differs in kinds of layers and what belongs to them, in the window and in V4's Sinkhorn rounds"
    card = asdict(nanowhale_100m())
    v4 = asdict(get_preset('nanowhale_v4'))
    assert {k for k in card if card[k]!=v4[k]}=={'layer_types', 'mlp_layer_types', 'sliding_window', 'hc_sinkhorn_iters', 'yarn_factor',
        'index_n_heads', 'index_head_dim', 'index_topk'}

def test_a_checkpoint_of_that_run_has_the_presets_sizes():
    "As its config.json reads, beside what is known of its code: no clamp, the transposed mix, the window ignored"
    file = CARD | TRAINED | dict(swiglu_limit=0.0, sliding_window=128, num_hash_layers=0, compress_ratios=[0]*9)
    assert WhaleConfig.from_hf(legacy_config(file))==replace(nanowhale_100m(), swiglu_limit=NO_CLAMP, hc_transposed=True)

def test_what_the_card_counts():
    card = nanowhale_100m()
    assert sum(count_params(card).values())==114_033_628
    assert sum(count_params(replace(card, num_nextn_predict_layers=0)).values())==110_369_621
    assert sum(layer_params(card).values())==3_453_122
    millions = lambda w,mtp: sum(count_flops(replace(card, sliding_window=w, num_nextn_predict_layers=mtp), 2048).values())/1e6
    assert [round(millions(w,m), 1) for w,m in ((2048,0), (128,0), (128,1), (2048,1))]==[143.7, 121.6, 210.3, 235.2]

def test_mean_keys_and_cache():
    for T in range(1, 20):
        for W in range(1, 25):
            assert mean_keys(T, W)==pytest.approx(sum(min(t,W) for t in range(1, T+1))/T)
            cfg = replace(tiny(), sliding_window=W)
            assert cache_bytes(cfg, T, 4)==2*cache_bytes(cfg, T)==cfg.num_hidden_layers*min(T,W)*cfg.head_dim*4
