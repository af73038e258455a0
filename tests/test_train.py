"""The whole job: gradients however batches are cut, exact resume, and a folder that transformers can use"""
import json, signal
from dataclasses import replace
import pytest, torch
from torch.testing import assert_close
import nanowhale.train as T
from nanowhale.config import tiny
from nanowhale.evaluate import evaluate
from nanowhale.model import Whale

def packed(n, T, V=60, seed=0):
    "Random rows with document boundaries and padding in unequal places"
    g = torch.Generator().manual_seed(seed)
    docs = (torch.rand(n, T+1, generator=g)<0.15).cumsum(1)
    docs[0,T//2:] = -1
    return dict(input_ids=torch.randint(0, V, (n, T+1), generator=g), docs=docs)

def small(): return replace(tiny(vocab_size=300), num_hidden_layers=1)

def grads(whale, batches, add=T.add_gradients):
    whale.zero_grad(); add(whale, batches, 0.3, 0.)
    return torch.cat([p.grad.flatten() for p in whale.parameters() if p.grad is not None])

@pytest.mark.parametrize('cuts', [[1]*6, [2, 4], [5, 1], [3, 3]])
def test_accumulated_gradients_are_the_large_batch(cuts):
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(6, 12)
    batches,i = [],0
    for c in cuts: batches.append({k: v[i:i+c] for k,v in rows.items()}); i += c
    assert_close(grads(whale, batches), grads(whale, [rows]), atol=2e-6, rtol=1e-3)

def test_planted_sum_over_batches_is_caught():
    def summed(whale, batches, *_):
        for b in batches: whale(b['input_ids'], labels=b['input_ids'], docs=b['docs']).loss.backward()
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(6, 12)
    halves = [{k: v[i::2] for k,v in rows.items()} for i in (0, 1)]
    one,two = grads(whale, [rows], summed),grads(whale, halves, summed)
    assert 1.5<(two.norm()/one.norm())<2.5   # the mistake: about twice the gradient

def test_a_batch_without_targets_moves_nothing_but_is_no_error():
    torch.manual_seed(0)
    whale = Whale(small())
    rows = dict(input_ids=torch.ones(2, 5).long(), docs=torch.full((2, 5), -1))
    sums,_ = T.add_gradients(whale, [rows], balance_weight=0.)
    assert sums['loss']==0 and sums['mtp_loss']==0
    assert all(p.grad is None or (p.grad==0).all() for p in whale.parameters())

def test_a_loss_that_is_not_finite_stops_before_anything_moved():
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(2, 8)
    whale.model.norm.weight.data[0] = float('nan')
    was = [p.detach().clone() for p in whale.parameters()]
    with pytest.raises(FloatingPointError, match='step 3'): T.train_step(whale, T.make_optimizers(whale, 1e-3), [rows], T.Recipe(), 3)
    assert all(torch.equal(a, b) or a.isnan().any() for a,b in zip(was, whale.parameters()))

def test_router_bias_moves_by_its_rule_alone():
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(4, 12)
    bias = whale.model.layers[0].mlp.gate.e_score_correction_bias
    m = T.train_step(whale, T.make_optimizers(whale, 1e-3, 0.02), [rows], T.Recipe(bias_speed=0.01), 0)
    load = torch.tensor(m['expert_load'][0]).float()
    assert_close(bias, 0.01*torch.sign(load.mean()-load))

def test_mtp_weight_drops_when_the_rate_starts_to_fall(monkeypatch):
    seen,add = [],T.add_gradients
    monkeypatch.setattr(T, 'add_gradients', lambda w, b, mtp, bal: seen.append(mtp) or add(w, b, mtp, bal))
    whale,recipe = Whale(small()),T.Recipe(steps=10, batch_size=2, warmup=1, decay=0.5)
    list(T.train_steps(whale, T.make_optimizers(whale, 1e-3), packed(4, 8), recipe))
    assert seen==[0.3]*5+[0.1]*5

# ---------------------------------------------------------------- the whole job, once for all the tests below

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')/'words.jsonl'
    words = 'the whale sings a song of two or three notes and dives into the sea where no light is left'.split()
    g = torch.Generator().manual_seed(0)
    rows = [' '.join(words[i] for i in torch.randint(0, len(words), (40,), generator=g)) for _ in range(200)]
    path.write_text('\n'.join(json.dumps(dict(text=r)) for r in rows))
    return path

@pytest.fixture(scope='module')
def run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'whale'
    return out, T.train(data=str(text), out=str(out), steps=6, batch_size=2)

def test_the_folder_is_complete(run):
    out,results = run
    files = {str(f.relative_to(out)) for f in out.rglob('*') if f.is_file()}
    assert files=={'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'README.md',
                   'metrics.jsonl', 'loss.png', 'trainer/optimizer.safetensors', 'trainer/state.json'}
    metrics = T.read_metrics(out/'metrics.jsonl')
    assert [m['step'] for m in metrics]==list(range(6)) and {'loss', 'mtp_loss', 'balance_loss', 'lr', 'grad_norm', 'expert_load'}<=set(metrics[0])
    assert str(results['held-out bits per byte']) in (out/'README.md').read_text()

def test_transformers_gives_the_same_logits(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out,_ = run
    whale,tok = Whale.from_pretrained(out).eval(),AutoTokenizer.from_pretrained(out)
    hf = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = tok('the whale sings', return_tensors='pt').input_ids
    assert ids[0,0]==0
    with torch.no_grad(): assert_close(whale(ids).logits, hf(ids).logits, atol=1e-5, rtol=1e-5)

def test_pipeline(run):
    from transformers import pipeline
    said = pipeline('text-generation', model=str(run[0]))('the whale', max_new_tokens=5, do_sample=False)[0]['generated_text']
    assert said.startswith('the whale')

def test_reported_loss_is_that_of_the_saved_model(run, text):
    out,results = run
    state = json.loads((out/'trainer'/'state.json').read_text())
    _,_,held_rows,held = T.prepare(str(text), 'text', str(out), 2048, T.Recipe(**state['recipe']))
    again = evaluate(Whale.from_pretrained(out), held_rows, n_bytes=sum(len(t.encode()) for t in held))
    assert abs(again['loss']-results['held-out loss, nats per token'])<1e-3

def test_a_stopped_run_goes_on_to_the_bit(text, tmp_path, monkeypatch):
    whole = T.train(data=str(text), out=str(tmp_path/'whole'), steps=6, batch_size=2)
    steps = T.train_steps
    def stopped(*args):
        for m in steps(*args):
            if m['step']==2: signal.raise_signal(signal.SIGINT)
            yield m
    monkeypatch.setattr(T, 'train_steps', stopped)
    T.train(data=str(text), out=str(tmp_path/'cut'), steps=6, batch_size=2)
    monkeypatch.undo()
    assert len(T.read_metrics(tmp_path/'cut'/'metrics.jsonl'))==3
    rest = T.train(out=str(tmp_path/'cut'), resume=True)
    losses = [[(m['step'], m['loss'], m['mtp_loss']) for m in T.read_metrics(tmp_path/d/'metrics.jsonl')] for d in ('whole', 'cut')]
    assert losses[0]==losses[1]
    key = 'held-out loss, nats per token'
    assert whole[key]==rest[key]
    a,b = (Whale.from_pretrained(tmp_path/d).state_dict() for d in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_the_same_seed_gives_the_same_whale(text, tmp_path):
    a,b,c = (T.train(data=str(text), out=str(tmp_path/d), steps=2, batch_size=2, seed=s) for d,s in (('a', 1), ('b', 1), ('c', 2)))
    key = 'held-out loss, nats per token'
    assert a[key]==b[key]!=c[key] and a['sample']==b['sample']

def test_nothing_is_overwritten(run, text):
    out,_ = run
    before = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    with pytest.raises(FileExistsError, match='already holds a run'): T.train(data=str(text), out=str(out), steps=1)
    assert before=={f: f.read_bytes() for f in out.rglob('*') if f.is_file()}

def test_a_tokenizer_that_does_not_fit(run, text, tmp_path):
    with pytest.raises(ValueError, match='the preset a vocabulary of'): T.prepare(str(text), 'text', str(run[0]), 100, T.Recipe())
    with pytest.raises(ValueError, match='no tokenizer could be loaded'): T.prepare(str(text), 'text', str(tmp_path), 300, T.Recipe())
