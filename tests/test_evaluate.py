"""Evaluation: against loops in float64, against transformers' loss, independent of the batch size, each byte counted once.
Bugs of this chapter (means of means, rows that do not overlap, padding as a target) are planted and must show."""
import json, lzma, math, random, shutil, subprocess
import pytest, torch
from torch.testing import assert_close
from nanowhale.model.config import WhaleConfig
from nanowhale.train.data import pack
from nanowhale.train.evaluate import bits_per_byte, entropy, evaluate, xz_bits_per_byte
from nanowhale.model.whale import Whale
from test_parity import pair, randomise, random_config

def a_whale(seed=0, **changes):
    sizes = dict(vocab_size=23, hidden_size=12, num_hidden_layers=2, num_attention_heads=4, head_dim=10, qk_rope_head_dim=6,
        q_lora_rank=7, o_groups=2, o_lora_rank=5, sliding_window=4, moe_intermediate_size=8, n_routed_experts=5,
        num_experts_per_tok=2, hc_mult=3, hc_sinkhorn_iters=3, initializer_range=0.4, swiglu_limit=2.0)
    torch.manual_seed(seed)
    return randomise(Whale(WhaleConfig(**{**sizes, **changes})))

def some_docs(V, seed, n=9):
    r = random.Random(seed)
    return [[0, *(r.randrange(2, V) for _ in range(r.choice([0, 1, 2, 5, 11]))), 1] for _ in range(n)]

def loops(whale, rows):
    "Nats, hits and entropy of each target, and of each target two ahead, row by row and token by token in float64"
    whale = Whale.from_state_dict(whale.cfg, {k: v.double() for k,v in whale.state_dict().items()})
    out,two = [],0
    for ids,docs in zip(rows['input_ids'], rows['docs']):
        p = whale(ids[None], docs=docs[None]).logits[0].softmax(-1).tolist()
        for t in range(len(ids)-1):
            if docs[t]<0 or docs[t+1]!=docs[t]: continue
            y = ids[t+1].item()
            out.append((-math.log(p[t][y]), float(max(p[t])==p[t][y]), -sum(x*math.log(x) for x in p[t])))
            two += t+2<len(ids) and docs[t+2].item()==docs[t].item()
    return out, two

def mean(xs): return sum(xs)/len(xs)

@pytest.mark.parametrize('seed', range(8))
def test_against_loops_over_configurations(seed):
    torch.manual_seed(seed)
    cfg = WhaleConfig(**{**random_config(random.Random(seed))[0].to_dict(), 'bos_token_id':0, 'eos_token_id':1})
    whale = randomise(Whale(cfg))
    rows = pack(some_docs(cfg.vocab_size, seed), 7)
    want,two = loops(whale, rows)
    got = evaluate(whale, rows, n_bytes=100, batch_size=3)
    assert got['tokens']==len(want)
    for i,name in enumerate(('loss', 'accuracy', 'entropy')):
        assert got[name]==pytest.approx(mean([w[i] for w in want]), rel=1e-5, abs=1e-5)
    assert got['bits_per_byte']==pytest.approx(sum(w[0] for w in want)/math.log(2)/100, rel=1e-5)
    assert (got['mtp_loss'] is None)==(cfg.num_nextn_predict_layers==0 or two==0)

def test_transformers_loss_is_ours():
    torch.manual_seed(0)
    whale,hf = pair(a_whale().cfg)
    ids = torch.randint(0, 23, (4,15))
    with torch.no_grad(): theirs = hf(ids, labels=ids).loss.item()
    for rows in (dict(input_ids=ids), dict(input_ids=ids, docs=torch.zeros_like(ids))):
        got = evaluate(whale, rows, batch_size=3)
        assert got['loss']==pytest.approx(theirs, rel=1e-5) and got['tokens']==4*14

@pytest.mark.parametrize('seed', range(3))
def test_batch_size_does_not_matter(seed):
    whale,rows = a_whale(seed),pack(some_docs(23, seed, 30), 9)
    results = [evaluate(whale, rows, 500, batch_size=B) for B in (1, 2, 3, 7, 16, 1000)]
    for r in results[1:]:
        for k in r: assert_close(torch.tensor(r[k]).double(), torch.tensor(results[0][k]).double(), atol=1e-6, rtol=1e-6)

def test_order_of_rows_does_not_matter():
    whale,rows = a_whale(),pack(some_docs(23, 5, 30), 9)
    a = evaluate(whale, rows, batch_size=4)
    b = evaluate(whale, {k: v.flip(0) for k,v in rows.items()}, batch_size=4)
    for k in ('loss', 'mtp_loss', 'accuracy', 'entropy'): assert a[k]==pytest.approx(b[k], rel=1e-6)

def test_bug_mean_of_means_shows():
    whale,rows = a_whale(),pack(some_docs(23, 5, 30), 9)
    parts = [evaluate(whale, {k: v[i:i+4] for k,v in rows.items()}) for i in range(0, len(rows['docs']), 4)]
    assert len({p['tokens'] for p in parts})>1
    right = evaluate(whale, rows)
    for k in ('loss', 'entropy'):
        assert abs(mean([p[k] for p in parts])-right[k])>1e-4
        assert sum(p[k]*p['tokens'] for p in parts)/right['tokens']==pytest.approx(right[k], rel=1e-6)

def test_mtp_loss_is_weighted_by_its_own_targets():
    whale,rows = a_whale(),pack(some_docs(23, 5, 30), 9)
    nats = n = 0
    for ids,docs in zip(rows['input_ids'], rows['docs']):
        two = sum(a==b and a>=0 for a,b in zip(docs.tolist(), docs[2:].tolist()))
        with torch.no_grad(): nats,n = nats+two*whale(ids[None], labels=ids[None], docs=docs[None]).mtp_loss.item(), n+two
    assert evaluate(whale, rows, batch_size=5)['mtp_loss']==pytest.approx(nats/n, rel=1e-6)
    assert evaluate(a_whale(num_nextn_predict_layers=0), rows)['mtp_loss'] is None

@pytest.mark.parametrize('context', [1, 2, 7, 40, 1000])
def test_every_token_but_bos_is_a_target_once(context):
    docs = some_docs(23, 1, 20)
    got = evaluate(a_whale(), pack(docs, context))
    assert got['tokens']==sum(len(d)-1 for d in docs)

def test_bug_rows_without_overlap_show():
    docs = some_docs(23, 1, 20)
    flat = [t for d in docs for t in d]
    n = len(flat)//8
    rows = dict(input_ids=torch.tensor(flat[:8*n]).view(n, 8), docs=torch.tensor([i for i,d in enumerate(docs) for _ in d][:8*n]).view(n, 8))
    assert evaluate(a_whale(), rows)['tokens']<sum(len(d)-1 for d in docs)

def test_bug_padding_as_target_shows():
    rows = pack(some_docs(23, 1, 20), 32)
    assert (rows['docs']<0).any()
    a,b = evaluate(a_whale(), rows),evaluate(a_whale(), dict(input_ids=rows['input_ids'], docs=rows['docs'].clamp(min=0)))
    assert b['tokens']>a['tokens'] and abs(a['loss']-b['loss'])>1e-4

def test_padding_and_other_documents_change_nothing():
    whale,ids = a_whale(),torch.randint(2, 23, (3,9))
    alone = evaluate(whale, dict(input_ids=ids))
    padded = dict(input_ids=torch.cat([torch.full((3,4), 5), ids, torch.full((3,6), 7)], 1), docs=torch.full((3,19), -1))
    padded['docs'][:,4:13] = 0
    got = evaluate(whale, padded)
    for k in ('loss', 'mtp_loss', 'accuracy', 'entropy', 'tokens'): assert got[k]==pytest.approx(alone[k], rel=1e-5)

def test_a_whale_that_knows_nothing():
    whale = a_whale()
    with torch.no_grad(): whale.lm_head.weight.zero_()
    got = evaluate(whale, pack(some_docs(23, 2), 9), n_bytes=50)
    for k in ('loss', 'mtp_loss', 'entropy'): assert got[k]==pytest.approx(math.log(23), rel=1e-6)
    assert got['bits_per_byte']==pytest.approx(got['tokens']*math.log2(23)/50, rel=1e-6)

def test_expert_load_is_the_share_of_all_rows():
    whale,rows = a_whale(),pack(some_docs(23, 4, 30), 9)
    with torch.no_grad(): out = whale(rows['input_ids'], labels=rows['input_ids'], docs=rows['docs']).expert_load.double()
    got = torch.tensor(evaluate(whale, rows, batch_size=4)['expert_load'], dtype=torch.double)
    assert got.shape==(3,5)
    assert_close(got, out/out.sum(-1, keepdim=True))

def test_modes_and_gradients_are_left_alone():
    whale,rows = a_whale().train(),pack(some_docs(23, 4), 9)
    whale.mtp.eval()
    modes = [m.training for m in whale.modules()]
    before = {k: v.clone() for k,v in whale.state_dict().items()}
    evaluate(whale, rows)
    with pytest.raises(ValueError): evaluate(whale, rows, n_bytes=0)
    with pytest.raises(ValueError): evaluate(whale, dict(input_ids=rows['input_ids']+23))
    assert modes==[m.training for m in whale.modules()] and torch.is_grad_enabled()
    assert all(p.grad is None for p in whale.parameters())
    for k,v in whale.state_dict().items(): assert v.equal(before[k])
    whale(rows['input_ids'], labels=rows['input_ids'], docs=rows['docs']).loss.backward()   # nothing was born in inference mode

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    rows = pack(some_docs(23, 4), 9)
    got,want = evaluate(a_whale().to(dtype), rows),evaluate(a_whale(), rows)
    assert got['loss']==pytest.approx(want['loss'], rel=.1 if dtype==torch.bfloat16 else 1e-5)

def test_result_is_plain_numbers():
    got = evaluate(a_whale(), pack(some_docs(23, 4), 9), 77)
    assert json.loads(json.dumps(got))==got
    assert list(got)==['loss', 'mtp_loss', 'bits_per_byte', 'accuracy', 'entropy', 'expert_load', 'tokens']
    assert evaluate(a_whale(), pack(some_docs(23, 4), 9))['bits_per_byte'] is None

@pytest.mark.parametrize('rows,kw,message', [
    (dict(), {}, 'at least one row'), (dict(input_ids=torch.zeros(0,5).long()), {}, 'at least one row'),
    (dict(input_ids=torch.tensor([[5]])), {}, 'nothing to predict'),
    (dict(input_ids=torch.tensor([[5,6]]), docs=torch.tensor([[0,1]])), {}, 'nothing to predict'),
    (dict(input_ids=torch.tensor([[5,6]]), docs=torch.tensor([[-1,-1]])), {}, 'nothing to predict'),
    (dict(input_ids=torch.tensor([[5,23]])), {}, 'outside the vocabulary'),
    (dict(input_ids=torch.tensor([[5,6]])), dict(batch_size=0), 'batch_size=0'),
    (dict(input_ids=torch.tensor([[5,6]])), dict(n_bytes=0), 'n_bytes=0')])
def test_bad_calls_get_one_clear_line(rows, kw, message):
    with pytest.raises(ValueError, match=message) as e: evaluate(a_whale(), rows, **kw)
    assert '\n' not in str(e.value)

# ---------------------------------------------------------------- the yardsticks

def test_entropy_is_torchs():
    z = torch.randn(4, 6, 31)*torch.tensor([.1, 1, 5, 30])[:,None,None]
    assert_close(entropy(z), torch.distributions.Categorical(logits=z).entropy(), atol=1e-5, rtol=1e-5)
    z[...,3:] = -math.inf
    assert_close(entropy(z), entropy(z[...,:3]))
    assert entropy(z.bfloat16()).dtype==torch.float32 and entropy(z.double()).dtype==torch.float64

def test_bits_per_byte_does_not_see_the_tokenizer():
    p = {'a':.6, 'b':.3, 'c':.1}
    text = ''.join(random.Random(0).choices('abc', k=120))
    for size in (1, 2, 3, 5):
        tokens = [text[i:i+size] for i in range(0, 120, size)]
        nats = sum(-math.log(math.prod(p[c] for c in t)) for t in tokens)
        assert bits_per_byte(nats, 120)==pytest.approx(sum(-math.log2(p[c]) for c in text)/120)

TEXT = 'The whale sings to the sea, à bientôt. '.encode()*20
def test_xz_gives_the_bytes_back():
    assert xz_bits_per_byte(TEXT)==8*len(lzma.compress(TEXT, preset=9|lzma.PRESET_EXTREME))/len(TEXT)
    assert xz_bits_per_byte(TEXT)<xz_bits_per_byte(TEXT[:len(TEXT)//2])
    with pytest.raises(ValueError, match='no bytes'): xz_bits_per_byte(b'')

@pytest.mark.skipif(not shutil.which('xz'), reason='no xz here')
def test_xz_is_the_program():
    from pydoc_data.topics import topics
    long = '\n'.join(topics.values()).encode()[:200_000]
    for data in (TEXT, open(__file__, 'rb').read(), long):
        program = len(subprocess.run(['xz', '-9e', '-T1', '-c'], input=data, capture_output=True, check=True).stdout)
        assert abs(xz_bits_per_byte(data)*len(data)/8-program)<=16   # versions differ in a header
