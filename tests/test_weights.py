"Checkpoint folders: round trips with transformers, damaged and hostile folders, writes that fail half-way"
import paths   # noqa: F401, for tests/tools
import json, os, subprocess, sys
from dataclasses import replace
import pytest, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import nanowhale.generate.weights as weights
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny_v4
from nanowhale.train.files import INDEX, WEIGHTS, atomic, read_file, read_json
from nanowhale.generate.weights import (check_blobs, check_keys, check_types, checksum, find_folder, hub_says, n_mtp, native_name, read_config,
    read_weights, shard_names, stack_experts, translate, write_weights)
from runs import PATIENCE
from test_parity import pair, randomise, same_logits, small

transformers.utils.logging.disable_progress_bar()
EAGER = dict(attn_implementation='eager', experts_implementation='eager')   # the others demand even sizes

@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(0, 31, (2, 11))

@pytest.fixture
def whale():
    torch.manual_seed(1)
    return randomise(Whale(small()))

@pytest.fixture
def hf():
    torch.manual_seed(2)
    return pair(small())[1]

def same_state(a, b):
    assert set(a)==set(b), set(a)^set(b)
    for k in a: assert a[k].dtype==b[k].dtype and torch.equal(a[k], b[k]), k

# ---------------------------------------------------------------- round trips

def test_ours_loads_in_transformers(whale, ids, tmp_path):
    whale.save_pretrained(tmp_path)
    hf,info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs')), info
    assert type(hf).__name__=='DeepseekV4ForCausalLM'
    same_logits(whale(ids).logits, hf(ids).logits)
    same_state(hf.state_dict(), {k: v for k,v in whale.state_dict().items() if not k.startswith('mtp.')})

def test_ours_comes_back_to_the_last_bit(whale, ids, tmp_path):
    whale.save_pretrained(tmp_path)
    same_state(read_weights(tmp_path), whale.state_dict())
    again = Whale.from_pretrained(tmp_path)
    assert again.cfg==whale.cfg
    same_state(again.state_dict(), whale.state_dict())
    assert torch.equal(again(ids).logits, whale(ids).logits)
    assert all(p.requires_grad for p in again.parameters())

@pytest.mark.parametrize('size', ['1GB', '4KB'])
def test_transformers_loads_here(hf, ids, tmp_path, size):
    "One file, and shards with an index; transformers writes no MTP block, so none is invented"
    hf.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path/INDEX).exists()==(size=='4KB')
    assert read_json(tmp_path/'config.json')['num_nextn_predict_layers']==1
    whale = Whale.from_pretrained(tmp_path)
    assert len(whale.mtp)==whale.cfg.num_nextn_predict_layers==0
    same_state(whale.state_dict(), hf.state_dict())
    same_logits(whale(ids).logits, hf(ids).logits)

def test_there_and_back_and_there(whale, ids, tmp_path):
    "Ours, saved by transformers, loaded here, saved here, loaded there"
    whale.save_pretrained(tmp_path/'a')
    AutoModelForCausalLM.from_pretrained(tmp_path/'a', **EAGER).save_pretrained(tmp_path/'b')
    Whale.from_pretrained(tmp_path/'b').save_pretrained(tmp_path/'c')
    hf = AutoModelForCausalLM.from_pretrained(tmp_path/'c', **EAGER)
    same_state(hf.state_dict(), {k: v for k,v in whale.state_dict().items() if not k.startswith('mtp.')})
    assert Whale.from_pretrained(tmp_path/'c').cfg==replace(whale.cfg, num_nextn_predict_layers=0)

def test_compressed_layers_there_and_back(tmp_path):
    "transformers stores parts of compressors and indexers under other names"
    torch.manual_seed(3)
    cfg = replace(tiny_v4(31), num_nextn_predict_layers=0)
    whale,ids = randomise(Whale(cfg)),torch.randint(0, 31, (2, 40))
    whale.save_pretrained(tmp_path/'a')
    AutoModelForCausalLM.from_pretrained(tmp_path/'a', **EAGER).save_pretrained(tmp_path/'b')
    assert any('compressor.norm' in k for k in load_file(tmp_path/'b'/WEIGHTS))      # a name that only it writes
    back = Whale.from_pretrained(tmp_path/'b')
    same_state(back.state_dict(), whale.state_dict())
    assert torch.equal(back(ids).logits, whale(ids).logits)

@pytest.mark.parametrize('deepseeks,ours', [
    ('layers.1.attn.compressor.ape', 'model.layers.1.self_attn.compressor.position_bias'),
    ('layers.1.attn.compressor.wgate.weight', 'model.layers.1.self_attn.compressor.gate_proj.weight'),
    ('layers.1.attn.compressor.wkv.weight', 'model.layers.1.self_attn.compressor.kv_proj.weight'),
    ('layers.1.attn.compressor.norm.weight', 'model.layers.1.self_attn.compressor.kv_norm.weight'),
    ('layers.1.attn.indexer.wq_b.weight', 'model.layers.1.self_attn.compressor.indexer.q_b_proj.weight'),
    ('layers.1.attn.indexer.weights_proj.weight', 'model.layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight'),
    ('layers.1.attn.indexer.compressor.ape', 'model.layers.1.self_attn.compressor.indexer.position_bias'),
    ('layers.1.attn.indexer.compressor.wgate.weight', 'model.layers.1.self_attn.compressor.indexer.gate_proj.weight'),
    ('layers.1.attn.indexer.compressor.norm.weight', 'model.layers.1.self_attn.compressor.indexer.kv_norm.weight')])
def test_names_in_deepseeks_files(deepseeks, ours): assert native_name(deepseeks)==ours

def test_bfloat16(whale, ids, tmp_path):
    "Half the bytes; both libraries read the same numbers from them"
    whale.bfloat16().save_pretrained(tmp_path)
    kinds = {k: v.dtype for k,v in read_weights(tmp_path).items()}
    assert all(t==(torch.float32 if weights.FLOAT32.search(native_name(k)) else torch.bfloat16) for k,t in kinds.items()) and len(set(kinds.values()))==2
    again = Whale.from_pretrained(tmp_path)
    same_state(again.state_dict(), whale.state_dict())
    assert torch.equal(again(ids).logits, whale(ids).logits)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **EAGER)
    same_logits(Whale.from_pretrained(tmp_path).float()(ids).logits, hf(ids).logits)

def test_a_model_and_its_copy_share_no_memory(whale, hf):
    for ours,theirs in ((whale, whale.to_hf()), (Whale.from_hf(hf), hf)):
        places = [{p.data_ptr() for p in m.parameters()} for m in (ours, theirs)]
        assert places[0].isdisjoint(places[1])

def test_mixed_types_from_transformers(ids, tmp_path):
    """A bfloat16 model saved by transformers keeps norms, sinks and mixes in float32. It runs here, close to what it says there;
    with all experts chosen, since transformers scores them in bfloat16, which turns near ties around"""
    whale = randomise(Whale(small(num_experts_per_tok=5)))
    whale.bfloat16().save_pretrained(tmp_path/'a')
    hf = AutoModelForCausalLM.from_pretrained(tmp_path/'a', **EAGER)
    hf.save_pretrained(tmp_path/'b')
    assert {v.dtype for v in read_weights(tmp_path/'b').values()}=={torch.bfloat16, torch.float32}
    logits,exact = (f(Whale.from_pretrained(tmp_path/'b'))(ids).logits.float() for f in (lambda w: w, Whale.float))
    assert (logits-exact).norm()<4*(hf(ids).logits.float()-exact).norm()<0.2*exact.norm()       # bfloat16 costs both alike

def test_compiled_model_loads_everywhere(whale, ids, tmp_path):
    "Bug 19: `_orig_mod.` never reaches the disk, and is understood where others wrote it"
    whale.model.layers[0] = torch.compile(whale.model.layers[0])
    compiled = torch.compile(whale).state_dict()
    assert all(k.startswith('_orig_mod.') for k in compiled) and any(k.count('_orig_mod.')==2 for k in compiled)
    plain = Whale(small()).state_dict()
    write_weights(compiled, tmp_path)
    assert set(read_weights(tmp_path))==set(plain)
    save_file(compiled, tmp_path/WEIGHTS, metadata={'format': 'pt'})
    assert set(translate(read_weights(tmp_path)))==set(plain)

def test_the_layout_of_the_hub_cache(hf, ids, tmp_path):
    "There, every file of a folder is a link to a blob outside of it"
    hf.save_pretrained(tmp_path/'blobs', max_shard_size='4KB')
    snapshot = tmp_path/'snapshots'/'0123abc'
    snapshot.mkdir(parents=True)
    for f in (tmp_path/'blobs').iterdir(): (snapshot/f.name).symlink_to(os.path.relpath(f, snapshot))
    same_state(translate(read_weights(snapshot)), hf.state_dict())

@pytest.mark.parametrize('seed', range(6))
def test_translation_is_exact_for_random_models(seed, tmp_path):
    import random
    from test_parity import random_config
    torch.manual_seed(seed)
    hf = pair(random_config(random.Random(seed))[0])[1]
    hf.save_pretrained(tmp_path, max_shard_size='10KB')
    disk = read_weights(tmp_path)
    assert not set(disk)<=set(hf.state_dict())
    same_state(translate(disk), hf.state_dict())
    same_state(translate(translate(disk)), hf.state_dict())

def test_every_native_name_is_its_own_translation(whale):
    assert [native_name(k) for k in whale.state_dict()]==[*whale.state_dict()]
    assert n_mtp(whale.state_dict())==1

# ---------------------------------------------------------------- the file decides about the MTP block

def test_partly_missing_mtp_block_is_an_error(whale, tmp_path):
    whale.save_pretrained(tmp_path)
    state = {k: v for k,v in whale.state_dict().items() if not k.startswith('mtp.0.h_proj')}
    write_weights(state, tmp_path)
    with pytest.raises(ValueError, match=r'mtp\.0\.h_proj\.weight is missing, expected shape \[14, 14\]'): Whale.from_pretrained(tmp_path)

def test_config_without_mtp_keeps_the_mtp_in_the_file(whale, ids, tmp_path):
    whale.save_pretrained(tmp_path)
    config = read_config(tmp_path)|dict(num_nextn_predict_layers=0)
    (tmp_path/'config.json').write_text(json.dumps(config))
    same_state(Whale.from_pretrained(tmp_path).state_dict(), whale.state_dict())

# ---------------------------------------------------------------- damaged and foreign folders: one clear line each

def change(f): return lambda folder: save_file(f(load_file(folder/WEIGHTS)), folder/WEIGHTS)
def drop(k): return change(lambda s: {n: t for n,t in s.items() if n!=k})
def edit(name, text): return lambda folder: (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
def config(**kw): return lambda folder: (folder/'config.json').write_text(json.dumps(read_json(folder/'config.json')|kw))
def delete(name): return lambda folder: (folder/name).unlink()
def cut(n): return lambda folder: os.truncate(folder/WEIGHTS, n)
def index(where):
    def f(folder):
        (folder/WEIGHTS).rename(folder/'model-00001-of-00001.safetensors')
        (folder/INDEX).write_text(json.dumps(where))
    return f
def promise(k, shard): return index(dict(weight_map={k: shard}))

DAMAGE = dict(   # what is done to a good folder: (how, what the message must name)
    no_config=(delete('config.json'), ['config.json', 'no such file']),
    empty_config=(edit('config.json', ''), ['config.json', 'not valid JSON']),
    half_config=(edit('config.json', '{"vocab_size": 3'), ['config.json', 'not valid JSON']),
    binary_config=(edit('config.json', b'\xff\xfe\x00'), ['config.json']),
    list_config=(edit('config.json', '[]'), ['config.json', 'list']),
    other_model=(config(model_type='llama'), ['config.json', 'llama', 'deepseek_v4']),
    impossible_size=(config(num_attention_heads=3), ['num_attention_heads', 'o_groups']),
    no_weights=(delete(WEIGHTS), [WEIGHTS, INDEX]),
    pickled=(lambda f: (f/WEIGHTS).rename(f/'pytorch_model.bin'), [WEIGHTS, '.bin']),
    empty_weights=(cut(0), [WEIGHTS, 'not a complete']),
    cut_in_header=(cut(100), [WEIGHTS, 'not a complete']),
    cut_in_tensors=(cut(20_000), [WEIGHTS, 'not a complete']),
    lfs_pointer=(edit(WEIGHTS, 'version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 5\n'), [WEIGHTS, 'not a complete']),
    missing_key=(drop('model.norm.weight'), ['model.norm.weight is missing', '[14]']),
    extra_key=(change(lambda s: s|{'model.extra': torch.zeros(2)}), ['model.extra', 'no place', '[2]']),
    wrong_shape=(change(lambda s: s|{'lm_head.weight': torch.zeros(32, 14)}), ['lm_head.weight', '[32, 14]', '[31, 14]']),
    wrong_config=(config(hidden_size=16), ['[31, 14]', '[31, 16]']),
    eight_bits=(change(lambda s: s|{'lm_head.weight': s['lm_head.weight'].to(torch.float8_e4m3fn)}), [WEIGHTS, 'lm_head.weight', 'F8_E4M3']),
    expert_lost=(change(lambda s: {k: v for k,v in s.items() if 'layers.0.mlp.experts' not in k}|{
        f'model.layers.0.ffn.experts.{e}.w{i}.weight': torch.zeros(2, 2) for e in range(5) for i in (1, 2, 3) if (e,i)!=(3,2)}), ['experts.3.w2']),
    index_escapes=(promise('lm_head.weight', '../other.safetensors'), [INDEX, 'lm_head.weight', 'plain file name']),
    index_absolute=(promise('lm_head.weight', '/etc/passwd'), [INDEX, 'plain file name']),
    index_empty=(index({}), [INDEX, 'weight_map']),
    index_lies=(promise('no.such.key', 'model-00001-of-00001.safetensors'), ['no.such.key', 'model-00001-of-00001.safetensors']),
    shard_lost=(promise('lm_head.weight', 'model-00002-of-00002.safetensors'), ['model-00002-of-00002.safetensors', 'no such file']))

def header(f):
    "Rewrite the header of the weights: `f` changes the dictionary, the numbers stay"
    def do(folder):
        raw = (folder/WEIGHTS).read_bytes()
        n = int.from_bytes(raw[:8], 'little')
        head = json.loads(raw[8:8+n])
        head = json.dumps(f(head) or head).encode()
        (folder/WEIGHTS).write_bytes(len(head).to_bytes(8, 'little')+head+raw[8+n:])
    return do
def sparse(name, size, start=b''):
    def do(folder):
        (folder/name).write_bytes(start)
        os.truncate(folder/name, size)
    return do
def two(*fs): return lambda folder: [f(folder) for f in fs]
def names_only(n):
    head = json.dumps({str(i): dict(dtype='F32', shape=[0], data_offsets=[0,0]) for i in range(n)}).encode()
    return edit(WEIGHTS, len(head).to_bytes(8, 'little')+head)
def head_of(k, **kw): return header(lambda h: h[k].update(kw))

HEAD,BIG = 'lm_head.weight',2**31-1
HOSTILE = dict(   # what a file may claim: (how, what the one line must name)
    billions_of_layers=(config(num_hidden_layers=BIG), ['config.json', 'num_hidden_layers=2147483647']),
    many_layers=(config(num_hidden_layers=10**5, layer_types=['sliding_attention']*10**5, mlp_layer_types=['moe']*10**5),
        ['num_hidden_layers=100000', 'hold 2']),
    long_layer_list=(config(layer_types=['sliding_attention']*10**6), ['layer_types', '2 entries']),
    **{f'huge_{f}': (config(**{f: BIG-BIG%2}), [f]) for f in ('vocab_size', 'hidden_size', 'q_lora_rank', 'o_lora_rank', 'moe_intermediate_size',
        'n_routed_experts', 'hc_mult', 'hc_sinkhorn_iters', 'head_dim', 'num_attention_heads')},
    large_vocab=(config(vocab_size=10**7), ['embed_tokens', '[10000000, 14]', '[31, 14]']),
    large_experts=(config(n_routed_experts=10**7), ['gate', '10000000']),
    more_than_64_bits=(config(hidden_size=10**30), ['hidden_size', 'below 2147483648']),
    digits=(edit('config.json', '{"model_type": "deepseek_v4", "hidden_size": '+'9'*10**5+'}'), ['config.json', 'not valid JSON']),
    size_as_text=(config(hidden_size='14'), ['hidden_size']), size_as_list=(config(hidden_size=[14]), ['hidden_size']),
    not_a_number=(edit('config.json', '{"model_type": "deepseek_v4", "layer_types": [], "mlp_layer_types": [], "hc_eps": NaN}'), ['hc_eps', 'finite']),
    infinite=(edit('config.json', '{"model_type": "deepseek_v4", "layer_types": [], "mlp_layer_types": [], "rope_theta": Infinity}'), ['rope_theta', 'finite']),
    negative=(config(hidden_size=-14), ['hidden_size']), none_of_it=(config(hidden_size=None), ['hidden_size']),
    type_is_a_list=(config(model_type=['deepseek_v4']*1000), ['config.json', 'model_type']),
    deep=(edit('config.json', '['*10**5), ['config.json', 'not valid JSON']),
    deep_value=(edit('config.json', '{"model_type": '+'['*400+']'*400+'}'), ['config.json', 'model_type']),
    deep_field=(edit('config.json', '{"model_type": "deepseek_v4", "layer_types": '+'['*400+']'*400+', "mlp_layer_types": []}'), ['layer_types']),
    gigabyte_of_json=(sparse('config.json', 2**40), ['config.json', 'too many']),
    code=(config(auto_map=dict(AutoConfig='evil.Config', AutoModelForCausalLM='evil.Model'), vocab_size=32),
        ['embed_tokens.weight', '[32, 14]']),   # read past, not run
    header_beyond_file=(edit(WEIGHTS, (2**62).to_bytes(8, 'little')+b'{}'), [WEIGHTS, 'not a complete']),
    header_of_gigabytes=(sparse(WEIGHTS, 2**36, (2**35).to_bytes(8, 'little')), [WEIGHTS, 'header of 34,359,738,368 bytes']),
    header_not_json=(edit(WEIGHTS, (4).to_bytes(8, 'little')+b'{{{{'), [WEIGHTS, 'not a complete']),
    header_deep=(edit(WEIGHTS, (10**5).to_bytes(8, 'little')+b'['*10**5), [WEIGHTS, 'not a complete']),
    many_names=(names_only(2*10**5), ['hold 0']),
    overlap=(header(lambda h: h.update({'spare': h[HEAD]})), [WEIGHTS, 'not a complete']),
    gap=(head_of(HEAD, data_offsets=[10**6, 10**6+31*14*4]), [WEIGHTS, 'not a complete']),
    beyond=(head_of(HEAD, shape=[2**40, 14]), [WEIGHTS, 'not a complete']),
    negative_offset=(head_of(HEAD, data_offsets=[-4, 31*14*4-4]), [WEIGHTS, 'not a complete']),
    overflow=(head_of(HEAD, shape=[2**62, 2**62]), [WEIGHTS, 'not a complete']),
    zero_and_huge=(header(lambda h: h.update({'spare': dict(dtype='F32', shape=[0, 2**62], data_offsets=[0, 0])})), ['spare', 'no place']),
    zero_and_beyond=(header(lambda h: h.update({'spare': dict(dtype='F32', shape=[0, 2**64-1], data_offsets=[0, 0])})), [WEIGHTS]),
    many_axes=(header(lambda h: h.update({'spare': dict(dtype='F32', shape=[0]*10**4, data_offsets=[0, 0])})), []),
    unknown_type=(head_of(HEAD, dtype='F4711'), [WEIGHTS, 'not a complete']),
    other_type=(head_of(HEAD, dtype='I32'), [HEAD, 'torch.int32']),
    mixed_types=(change(lambda s: s|{HEAD: s[HEAD].bfloat16()}), [HEAD, 'bfloat16', 'one type']),
    unpickled=(edit(WEIGHTS, b'\x80\x04\x95'+b'.'*100), [WEIGHTS, 'not a complete']),
    zip=(lambda f: torch.save({HEAD: torch.zeros(31, 14)}, f/WEIGHTS), [WEIGHTS, 'not a complete']),
    expert_of_a_million=(change(lambda s: s|{'model.layers.0.ffn.experts.'+'9'*5000+'.w1.weight': torch.zeros(2, 2)}), ['experts']),
    expert_with_a_gap=(change(lambda s: s|{'model.layers.0.ffn.experts.999999.w1.weight': torch.zeros(2, 2)}), ['experts.0.w1 is missing']),
    layer_of_a_million=(change(lambda s: s|{'model.layers.999999.input_layernorm.weight': torch.zeros(14)}), ['num_hidden_layers=2', 'hold 3']),
    many_mtp=(change(lambda s: s|{f'mtp.{i}.norm.weight': torch.zeros(14) for i in range(1, 300)}), ['num_nextn_predict_layers']),
    newline_in_name=(change(lambda s: s|{'a\nTraceback': torch.zeros(2)}), ['Traceback', 'no tensor of any model']),
    long_name=(change(lambda s: s|{'a'*10**5: torch.zeros(2)}), ['no tensor of any model']),
    no_tensors=(change(lambda s: {}), ['num_hidden_layers=2', 'hold 0']),
    dotted_name=(change(lambda s: s|{'mtp.': torch.zeros(2), 'model.layers.': torch.zeros(2)}), ['2 MTP blocks']),
    index_of_gigabytes=(two(delete(WEIGHTS), sparse(INDEX, 2**40)), [INDEX, 'too many']),
    index_deep=(two(delete(WEIGHTS), edit(INDEX, '{"weight_map": '*20000)), [INDEX, 'not valid JSON']),
    index_of_lists=(two(delete(WEIGHTS), edit(INDEX, '{"weight_map": {"a": ["x.safetensors"]}}')), [INDEX, 'plain file name']),
    index_long=(two(delete(WEIGHTS), edit(INDEX, json.dumps(dict(weight_map={'a': 'x'*10**6})))), [INDEX, 'plain file name']),
    index_newline=(two(delete(WEIGHTS), edit(INDEX, json.dumps(dict(weight_map={'a': 'x.safetensors\n'})))), [INDEX, 'plain file name']))

LIMITED = """
import json, resource, sys, torch
from nanowhale.model.whale import Whale
Whale.from_pretrained(sys.argv[1])                            # everything that is loaded on first use
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used+2**29, -1))
for folder in sys.argv[2:]:
    try: Whale.from_pretrained(folder); print(json.dumps('loaded'))
    except (ValueError, FileNotFoundError) as e: print(json.dumps(str(e)))
    except BaseException as e: print(json.dumps(f'{type(e).__name__} {e}'[:300]))
"""

@pytest.mark.skipif(sys.platform!='linux', reason='limits memory as Linux does')
def test_hostile_files_are_one_clear_line_in_little_memory(tmp_path):
    "All in one process that may take half a gigabyte more than it needs to load a good folder"
    torch.manual_seed(1)
    whale = randomise(Whale(small()))
    whale.save_pretrained(tmp_path/'good')
    for name,(how,_) in HOSTILE.items():
        whale.save_pretrained(tmp_path/name)
        how(tmp_path/name)
    root = os.path.dirname(os.path.dirname(os.path.abspath(weights.__file__)))
    done = subprocess.run([sys.executable, '-c', LIMITED, str(tmp_path/'good'), *(str(tmp_path/n) for n in HOSTILE)], env=os.environ|dict(PYTHONPATH=root),
                          capture_output=True, text=True, timeout=PATIENCE)
    lines = [json.loads(l) for l in done.stdout.splitlines()]
    assert len(lines)==len(HOSTILE), done.stderr[-2000:]
    wrong = {n: l for (n,(_,says)),l in zip(HOSTILE.items(), lines) if '\n' in l or len(l)>600 or str(tmp_path/n) not in l or not all(s in l for s in says)}
    print('\n'.join(f'{n:22}{l.replace(str(tmp_path), "")}' for n,l in zip(HOSTILE, lines)))
    assert not wrong, wrong

@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_one_clear_line(damage, whale, tmp_path):
    how,names = DAMAGE[damage]
    whale.save_pretrained(tmp_path/'run')
    how(tmp_path/'run')
    with pytest.raises((ValueError, FileNotFoundError)) as e: Whale.from_pretrained(tmp_path/'run')
    message = str(e.value)
    print(message)
    assert '\n' not in message and len(message)<400 and all(n in message for n in names), message

def test_only_a_v4_is_written(whale, tmp_path):
    "A folder that nobody could read again is no folder"
    whale.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='other parts'): whale.save_pretrained(tmp_path/'x')
    assert not (tmp_path/'x').exists()

def test_no_folder(tmp_path):
    for f in (tmp_path/'none', tmp_path/'file'):
        (tmp_path/'file').write_text('')
        for read in (read_config, read_weights, Whale.from_pretrained):
            with pytest.raises(FileNotFoundError, match='no such folder'): read(f)

def test_a_row_of_odd_tensors(tmp_path):
    "Scalars, empty tensors, views with gaps, float16, integers, names with odd letters"
    state = {'a b/ü': torch.tensor(3.0), 'empty': torch.zeros(0, 4), 'view': torch.arange(24.).view(2, 3, 4).permute(2, 0, 1)[::2],
             'half': torch.ones(3).half(), 'ids': torch.arange(5), 'wide': torch.ones(2).double(), 'grad': torch.ones(2, requires_grad=True)}
    path = write_weights(state, tmp_path/'x'/'y')
    same_state(read_file(path), {k: v.detach() for k,v in state.items()})

# ---------------------------------------------------------------- writing: all or nothing

def test_a_failed_write_keeps_the_old_file(whale, tmp_path, monkeypatch):
    whale.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    def full_disk(tensors, path, **kw):
        with open(path, 'wb') as f: f.write(b'\x10\x00')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(weights, 'save_file', full_disk)
    with torch.no_grad(): whale.lm_head.weight.zero_()
    with pytest.raises(OSError, match='No space'): whale.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()}==before

def test_a_killed_writer_keeps_the_old_file(tmp_path):
    "The process dies without cleaning up; the name still leads to the whole old file, and the next write succeeds"
    write_weights({'w': torch.zeros(3)}, tmp_path)
    code = ('import os, sys; from nanowhale.train.files import atomic\n'
            'with atomic(sys.argv[1]) as tmp: tmp.write_text("half"); os._exit(9)')
    root = os.path.dirname(os.path.dirname(os.path.abspath(weights.__file__)))
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/WEIGHTS)], cwd=root, env=os.environ|dict(PYTHONPATH=root))
    assert done.returncode==9
    assert torch.equal(read_weights(tmp_path)['w'], torch.zeros(3))
    write_weights({'w': torch.ones(3)}, tmp_path)
    assert torch.equal(read_weights(tmp_path)['w'], torch.ones(3))

@pytest.mark.skipif(os.name!='posix', reason='permissions of POSIX')
def test_a_checkpoint_can_be_read_by_whoever_may_read_new_files(tmp_path):
    (tmp_path/'plain').write_text('')
    path = write_weights({'w': torch.zeros(3)}, tmp_path)
    assert path.stat().st_mode==(tmp_path/'plain').stat().st_mode

def test_a_link_is_replaced_not_written_through(tmp_path):
    "Saving into a folder of the Hub's cache must not change the blob that other folders share"
    blob = write_weights({'w': torch.zeros(3)}, tmp_path/'blobs')
    (tmp_path/WEIGHTS).symlink_to(blob)
    write_weights({'w': torch.ones(3)}, tmp_path)
    assert torch.equal(read_file(blob)['w'], torch.zeros(3)) and torch.equal(read_weights(tmp_path)['w'], torch.ones(3))

def test_reading_is_independent_of_the_file_afterwards(tmp_path):
    write_weights({'w': torch.zeros(3)}, tmp_path)
    w = read_weights(tmp_path)['w']
    w.add_(1)
    assert torch.equal(read_weights(tmp_path)['w'], torch.zeros(3))
    write_weights({'w': torch.full((3,), 7.0)}, tmp_path)
    assert torch.equal(w, torch.ones(3))

def test_atomic_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError):
        with atomic(tmp_path/'x') as tmp:
            tmp.write_text('half')
            raise RuntimeError
    assert not [*tmp_path.iterdir()]

def test_check_keys_takes_shapes_or_tensors():
    state = {'a': torch.zeros(2, 3)}
    assert check_keys(state, {'a': (2, 3)}) is check_keys(state, {'a': [2, 3]}) is check_keys(state, state) is state
    for expected in ({'a': (3, 2)}, {'b': (2, 3)}, {}, {'a': (2, 3), 'b': ()}):
        with pytest.raises(ValueError): check_keys(state, expected)

def test_one_kind_of_number_and_one_type():
    half = {'lm_head.weight': torch.zeros(2, 3).bfloat16(), 'model.norm.weight': torch.zeros(3)}     # a norm may differ
    assert check_types(half) is half
    with pytest.raises(ValueError, match='lm_head.weight as torch.float32'):
        check_types({'model.embed_tokens.weight': half['lm_head.weight'], 'lm_head.weight': half['lm_head.weight'].float()})
    with pytest.raises(ValueError, match='lm_head.weight is stored as torch.int32'):
        check_keys({'lm_head.weight': half['lm_head.weight'].int()}, {'lm_head.weight': half['lm_head.weight']})

def test_experts_that_cannot_be_stacked():
    parts = {(e,i): torch.zeros((6, 7) if i==2 else (7, 6)) for e in range(3) for i in (1, 2, 3)}
    with pytest.raises(ValueError, match='here: the experts of x differ in shape'): stack_experts('x', parts|{(1,2): torch.zeros(5, 7)}, 'here')
    assert not weights.EXPERT.fullmatch('model.layers.0.mlp.shared_experts.w3.weight')               # it stands alone
    del parts[1,3]
    with pytest.raises(ValueError, match='here: x.1.w3 is missing'): stack_experts('x', parts, 'here')

# ---------------------------------------------------------------- folders, here and on the Hub

def test_a_shard_without_what_its_index_promises(tmp_path):
    save_file({'a': torch.zeros(2)}, tmp_path/'a.safetensors')
    def say(where): (tmp_path/INDEX).write_text(json.dumps(dict(weight_map=where)))
    say({'b': 'a.safetensors'})
    with pytest.raises(ValueError, match="a.safetensors: 'b' is not in it"): read_weights(tmp_path)
    say({})
    with pytest.raises(ValueError, match='has no weight_map'): shard_names(tmp_path/INDEX)
    (tmp_path/INDEX).unlink()
    with pytest.raises(FileNotFoundError, match='pickled weights'): read_weights(tmp_path)

def test_another_model_is_refused_by_its_name(tmp_path):
    (tmp_path/'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'"): read_config(tmp_path)

def test_shards_are_written_where_no_weights_are(tmp_path):
    state = {k: torch.full((5,), float(i)) for i,k in enumerate('abc')}
    assert write_weights(state, tmp_path, max_shard_size=20).name==INDEX
    assert sorted(set(shard_names(tmp_path/INDEX).values()))==[f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
    same_state(read_weights(tmp_path), state)
    with pytest.raises(FileExistsError, match='already holds weights'): write_weights(state, tmp_path, max_shard_size=20)

def test_checksums_are_those_of_sha256sum_and_git(tmp_path):
    (tmp_path/'hello').write_text('hello')
    assert checksum(tmp_path/'hello')[:16]=='2cf24dba5fb0a30e'
    assert checksum(tmp_path/'hello', git=True)=='b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    check_blobs(tmp_path)                          # no links: nothing was promised

def test_only_data_is_wanted():
    from fnmatch import fnmatch
    data = ['config.json', 'model-00001-of-00002.safetensors', INDEX, 'tokenizer.json']
    code = ['modeling_whale.py', 'tokenizer_whale.py', 'pytorch_model.bin']
    assert [f for f in data+code if any(fnmatch(f, w) for w in weights.WANTED)]==data

@pytest.mark.parametrize('name', ['whale', './gone', '/gone/away', '../x/y', 'a/b/c'])
def test_a_mistyped_path_does_not_go_out_to_the_network(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, 'snapshot_download', lambda *a, **kw: pytest.fail('asked the Hub'))
    with pytest.raises(FileNotFoundError, match='no such folder; name one'): find_folder(name)

def test_a_folder_has_no_revision(tmp_path):
    assert find_folder(tmp_path)==tmp_path
    with pytest.raises(ValueError, match="a folder has no revision 'v1'"): find_folder(tmp_path, 'v1')

def test_the_clients_errors_in_one_line():
    assert '(disk full); try again' in hub_says(OSError('disk full\nsee the log'))
    assert 'cannot be reached' in hub_says(weights.LocalEntryNotFoundError('...'))
