"""The whole job: gradients however batches are cut, exact resume, and a folder that transformers can use"""
import json, math, shutil, signal
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from torch.testing import assert_close
import nanowhale.train.step as step
import nanowhale.run as R
import nanowhale.train.loop as T
from nanowhale.presets import tiny
from nanowhale.train.data import encode, load_tokenizer, pack
from nanowhale.train.evaluate import evaluate
from nanowhale.fast.kernels import use
from nanowhale.model.whale import Whale
from nanowhale.train.optim import make_optimizers
from nanowhale.train.recipe import Recipe
from nanowhale.train.step import add_gradients, train_step
from nanowhale.train.stream import Blocks, Stream, held_out_texts
from nanowhale.train.loop import as_cell

def packed(n, T, V=60, seed=0):
    "Random rows with document boundaries and padding in unequal places"
    g = torch.Generator().manual_seed(seed)
    docs = (torch.rand(n, T+1, generator=g)<0.15).cumsum(1)
    docs[0,T//2:] = -1
    return dict(input_ids=torch.randint(0, V, (n, T+1), generator=g), docs=docs)

def small(): return replace(tiny(vocab_size=300), num_hidden_layers=1)

def grads(whale, rows, size, add=add_gradients):
    whale.zero_grad(); add(whale, rows, size, 0.3, 0.)
    return torch.cat([p.grad.flatten() for p in whale.parameters() if p.grad is not None])

@pytest.mark.parametrize('size', [1, 2, 4, 5])
def test_accumulated_gradients_are_the_large_batch(size):
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(6, 12)
    assert_close(grads(whale, rows, size), grads(whale, rows, 6), atol=2e-6, rtol=1e-3)

def test_planted_sum_over_batches_is_caught():
    def summed(whale, rows, size, *_):
        for ids,docs in zip(rows['input_ids'].split(size), rows['docs'].split(size)): whale(ids, labels=ids, docs=docs).loss.backward()
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(6, 12)
    two = grads(whale, rows, 3, summed)
    with pytest.raises(AssertionError): assert_close(two, grads(whale, rows, 6), atol=2e-6, rtol=1e-3)
    assert 1.5<two.norm()/grads(whale, rows, 6).norm()<2.5   # the mistake: about twice the gradient

def test_a_batch_without_targets_moves_nothing_but_is_no_error():
    torch.manual_seed(0)
    whale = Whale(small())
    rows = dict(input_ids=torch.ones(2, 5).long(), docs=torch.full((2, 5), -1))
    sums,_,_ = add_gradients(whale, rows, 2, balance_weight=0.)
    assert sums['loss']==0 and sums['mtp_loss']==0
    assert all(p.grad is None or (p.grad==0).all() for p in whale.parameters())

def test_router_bias_moves_by_its_rule_alone():
    torch.manual_seed(0)
    whale,rows = Whale(small()),packed(4, 12)
    bias = whale.model.layers[0].mlp.gate.e_score_correction_bias
    m = train_step(whale, whale, make_optimizers(whale, 1e-3, 0.02), rows, Recipe(bias_speed=0.01), 0)
    load = torch.tensor(m['expert_load'][0]).float()
    assert_close(bias, 0.01*torch.sign(load.mean()-load))

def test_mtp_weight_drops_when_the_rate_starts_to_fall(monkeypatch):
    seen = []
    monkeypatch.setattr(step, 'add_gradients', lambda net, rows, size, mtp, *a, **kw: seen.append(mtp) or add_gradients(net, rows, size, mtp, *a, **kw))
    whale,recipe = Whale(small()),Recipe(steps=10, batch_size=2, warmup=0.1, decay=0.5)
    opts = make_optimizers(whale, 1e-3)
    rates = [train_step(whale, whale, opts, packed(2, 8), recipe, i)['lr'] for i in range(10)]
    assert seen==[0.3]*5+[0.1]*5
    assert rates[:6]==[recipe.lr]*6 and rates[5:]==sorted(rates[5:], reverse=True) and rates[6]<recipe.lr

def test_a_second_prediction_without_weight_stays_without_one(monkeypatch):
    "Also when the rate falls, where the weight of others becomes `mtp_final`"
    seen = []
    monkeypatch.setattr(step, 'add_gradients', lambda net, rows, size, mtp, *a, **kw: seen.append(mtp) or add_gradients(net, rows, size, mtp, *a, **kw))
    whale,recipe = Whale(small()),Recipe(steps=4, batch_size=2, mtp_weight=0., decay=0.5)
    opts = make_optimizers(whale, 1e-3)
    for i in range(4): train_step(whale, whale, opts, packed(2, 8), recipe, i)
    assert seen==[0.]*4

def test_no_limit_is_no_limit():
    "`clip` 0 does what an endless one does, and not nothing"
    def moved(clip):
        torch.manual_seed(0)
        whale,rows = Whale(small()),packed(4, 12)
        train_step(whale, whale, make_optimizers(whale, 1e-3, 0.02), rows, Recipe(batch_size=4, clip=clip), 0)
        return whale.lm_head.weight
    assert torch.equal(moved(0.), moved(1e9)) and not torch.equal(moved(0.), Whale(small()).lm_head.weight)

def test_nan_is_never_the_best():
    def best(*losses):
        run = SimpleNamespace(state=dict(step=0, best=None), whale=None)
        for i,loss in enumerate(losses):
            run.state['step'] = i
            run.held = SimpleNamespace(scores=lambda whale, loss=loss: dict(loss=loss, bits_per_byte=1., expert_load=[[1, 1]]))
            T.Run.evaluate(run, {})
        return run.state['best']
    assert best(math.nan, 5., 3., math.nan)==[2, 3.] and best(5., 3., 4.)==[1, 3.]
    assert best(math.nan) is None

@pytest.mark.parametrize('says', ['not enough memory: you tried to allocate 9 bytes', "DefaultCPUAllocator: can't allocate memory"])
def test_memory_of_a_processor_runs_out_in_one_line(says):
    with pytest.raises(ValueError, match='--batch-size 4 --accum 2'), R.within_memory(Recipe()): raise RuntimeError(says)
    with pytest.raises(RuntimeError, match='shape'), R.within_memory(Recipe()): raise RuntimeError('wrong shape')

def test_a_resumed_run_keeps_its_precision(monkeypatch):
    "Also before its first checkpoint; and the same words with --resume contradict nothing where the machine has chosen float32"
    monkeypatch.setattr(R, 'slow_bf16', lambda: 'bfloat16 is slow here')
    spec = R.new_spec(precision='bf16')
    begun = spec | dict(processor=R.machine_facts())
    assert R.choose_precision(begun, None, asked=False, force=False)[0]['recipe']['precision']=='bf16'
    assert R.choose_precision(spec, None, asked=False, force=False)[0]['recipe']['precision']=='fp32'
    with pytest.raises(ValueError, match='--precision bf16'): R.choose_precision(spec, None, asked=True, force=False)
    large = R.new_spec('nanowhale_100m', 'whale')
    large['recipe']['precision'] = 'fp32'
    R.check_asked(large, 'x', 'nanowhale_100m', 'whale')
    with pytest.raises(ValueError, match='--precision bf16'): R.check_asked(large, 'x', 'nanowhale_100m', 'whale', precision='bf16')

# ---------------------------------------------------------------- the whole job, once for all the tests below

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')/'words.jsonl'
    words = 'the whale sings a song of two or three notes and dives into the sea where no light is left'.split()
    g = torch.Generator().manual_seed(0)
    rows = [' '.join(words[i] for i in torch.randint(0, len(words), (40,), generator=g)) for _ in range(200)]
    path.write_text('\n'.join(json.dumps(dict(text=r)) for r in rows))
    return path

SMALL = dict(batch_size=2, context=32)

@pytest.fixture(scope='module')
def run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'whale'
    return out, R.train(data=str(text), out=str(out), steps=6, **SMALL)

FOLDER = {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'}   # what others load
TRAINER = {'trainer/optimizer.safetensors', 'trainer/state.json'}

def files(folder): return {str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file()}

def test_the_folder_is_complete(run):
    out,results = run
    metrics = T.read_metrics(out/'metrics.jsonl')
    best = 1+min((m['held_out_loss'], m['step']) for m in metrics if 'held_out_loss' in m)[1]
    kept = {f'checkpoints/step-{n:08}/{f}' for n in {best, 4, 6} for f in FOLDER|TRAINER}     # the best and the last two
    assert files(out)==FOLDER|kept|{'README.md', 'run.json', 'results.json', 'metrics.jsonl', 'loss.png', 'expert-load.png'}
    assert [m['step'] for m in metrics]==list(range(6)) and [i for i,m in enumerate(metrics) if 'held_out_loss' in m]==[1, 3, 5]
    assert {'loss', 'mtp_loss', 'balance_loss', 'lr', 'grad_norm', 'grad_norms', 'expert_load', 'load_entropy', 'comb_logit', 'column_error',
            'max_vio', 'smallest_share', 'busiest_share', 'tokens_per_second', 'memory', 'waited', 'skipped'}<=set(metrics[0])
    assert str(results['held-out bits per byte']) in (out/'README.md').read_text()
    assert json.loads((out/'results.json').read_text())==results
    assert (out/'model.safetensors').read_bytes()==(out/'checkpoints/step-00000006/model.safetensors').read_bytes()

def test_how_evenly_experts_work_stands_in_metrics_report_and_card(run):
    "MaxVio, smallest and largest share by their definitions, from the loads beside them; held-out in the report"
    out,results = run
    metrics = T.read_metrics(out/'metrics.jsonl')
    def by_hand(load):
        shares = [[n/sum(block) for n in block] for block in load]
        return [max(s)*len(s)-1 for s in shares],min(map(min, shares)),max(map(max, shares))
    for m in metrics:
        vio,least,most = by_hand(m['expert_load'])
        assert (m['max_vio'], m['smallest_share'], m['busiest_share'])==pytest.approx((max(vio), least, most))
    vio,least,most = by_hand(metrics[-1]['held_out_load'])
    measured = [metrics[-1][f'held_out_{k}'] for k in ('max_vio', 'smallest_share', 'busiest_share')]
    assert measured==pytest.approx([max(vio), least, most])
    assert results['held-out MaxVio of each block']==pytest.approx(vio, abs=0.006)
    shares = [results[f'held-out share of the {which} expert of a block'] for which in ('idlest', 'busiest')]
    assert shares==pytest.approx([least, most], abs=1e-4)
    assert f"| held-out MaxVio of each block | {as_cell(results['held-out MaxVio of each block'])} |" in (out/'README.md').read_text()

@pytest.mark.parametrize('where', ['.', 'checkpoints/step-00000006'])
def test_transformers_gives_the_same_logits(run, where):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = run[0]/where
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
    held,_ = held_out_texts(str(text))
    rows = pack(encode(load_tokenizer(out), held), 32)
    again = evaluate(use(Whale.from_pretrained(out)), rows, n_bytes=sum(len(t.encode()) for t in held))
    assert abs(again['loss']-results['held-out loss, nats per token'])<3e-4       # written with four digits
    assert abs(again['bits_per_byte']-results['held-out bits per byte'])<3e-4
    assert abs(T.read_metrics(out/'metrics.jsonl')[-1]['held_out_loss']-again['loss'])<1e-6

def test_targets_are_counted_one_by_one(run, text):
    "A row's last place, or one before another document, has none"
    out,results = run
    _,one_in = held_out_texts(str(text))
    stream,n = Stream(Blocks(str(text), load_tokenizer(out), 32, one_in=one_in)),0
    for _ in range(6):
        for row in stream.take(2)['docs'].tolist(): n += sum(a==b>=0 for a,b in zip(row, row[1:]))
    assert results['targets seen in training']==n<6*2*32

def stop_at(monkeypatch, n, signum):
    "The signal comes while step `n` is under way"
    def signalled(*args):
        if args[-1]==n: signal.raise_signal(signum)
        return train_step(*args)
    monkeypatch.setattr(T, 'train_step', signalled)

def test_every_skipped_step_is_counted(text, tmp_path, monkeypatch):
    def spoiled(*args): m = train_step(*args); return m|dict(skipped=int(args[-1] in (0, 2)))
    monkeypatch.setattr(T, 'train_step', spoiled); monkeypatch.setattr(T.Log, 'plot', lambda self: None)
    assert R.train(data=str(text), out=str(tmp_path/'run'), steps=4, evals=1, **SMALL)['steps skipped']==2

@pytest.mark.parametrize('signum,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_bit(run, text, tmp_path, monkeypatch, signum, code):
    whole,out = run[0],tmp_path/'cut'
    stop_at(monkeypatch, 2, signum)
    with pytest.raises(T.Stopped, match='stopped after step 3 and saved; .*--resume') as e: R.train(data=str(text), out=str(out), steps=6, **SMALL)
    assert e.value.code==code
    monkeypatch.undo()
    assert len(T.read_metrics(out/'metrics.jsonl'))==3 and files(out)>=FOLDER and not (out/'README.md').exists()
    rest = R.train(out=str(out), resume=True)
    assert steps_of(out)==steps_of(whole)
    assert all(rest[k]==run[1][k] for k in ('held-out loss, nats per token', 'sample', 'targets seen in training'))
    assert (out/'model.safetensors').read_bytes()==(whole/'model.safetensors').read_bytes()

def steps_of(out):
    "The metrics of each step but speed and memory"
    return [{k: v for k,v in m.items() if k not in ('tokens_per_second', 'memory', 'waited')} for m in T.read_metrics(out/'metrics.jsonl')]

def test_the_same_seed_gives_the_same_whale(text, tmp_path):
    a,b,c = (R.train(data=str(text), out=str(tmp_path/d), steps=2, seed=s, **SMALL) for d,s in (('a', 1), ('b', 1), ('c', 2)))
    key = 'held-out loss, nats per token'
    assert a[key]==b[key]!=c[key] and a['sample']==b['sample']

def test_nothing_is_overwritten(run, text):
    out,_ = run
    before = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    with pytest.raises(FileExistsError, match='already holds a run'): R.train(data=str(text), out=str(out), steps=1)
    with pytest.raises(ValueError, match='nothing to go on with'): R.train(out=str(out), resume=True)
    assert before=={f: f.read_bytes() for f in out.rglob('*') if f.is_file()}

def test_two_runs_do_not_share_a_folder(run, text, tmp_path, monkeypatch):
    "Neither a resumed one nor a new one, nor one that began earlier and got its first rows later"
    old,new = tmp_path/'old',tmp_path/'new'
    shutil.copytree(run[0], old); (old/'README.md').unlink(); new.mkdir()
    with R.Claim() as a, R.Claim() as b:
        a.take(old); b.take(new)
        with pytest.raises(FileExistsError, match='another run is at work'): R.train(out=str(old), resume=True)
        with pytest.raises(FileExistsError, match='another run is at work'): R.train(data=str(text), out=str(new), steps=1, **SMALL)
        assert not list(new.iterdir())
    real = R.Claim.take
    def late(self, out): (out/'run.json').write_text('{}'); real(self, out)
    monkeypatch.setattr(R.Claim, 'take', late)
    with pytest.raises(FileExistsError, match='already holds a run'): R.train(data=str(text), out=str(new), steps=1, **SMALL)
    assert (new/'run.json').read_text()=='{}'

def begun_before_kernels(run, out):
    "A copy of the run as it was after four steps, by a version whose recipes knew no kernels"
    shutil.copytree(run[0], out)
    shutil.rmtree(out/'checkpoints/step-00000006')
    (out/'README.md').unlink()
    spec = json.loads((out/'run.json').read_text())
    assert spec['recipe'].pop('kernels')=='fast'
    (out/'run.json').write_text(json.dumps(spec))

@pytest.mark.parametrize('asked', [{}, dict(kernels='fast')])
def test_a_run_from_before_there_were_kernels_goes_on_to_the_bit(run, tmp_path, asked):
    out = tmp_path/'old'
    begun_before_kernels(run, out)
    R.train(out=str(out), resume=True, **asked)
    assert steps_of(out)==steps_of(run[0])
    assert (out/'model.safetensors').read_bytes()==(run[0]/'model.safetensors').read_bytes()

def test_a_run_from_before_there_were_kernels_does_not_change_them(run, tmp_path):
    out = tmp_path/'old'
    begun_before_kernels(run, out)
    with pytest.raises(ValueError, match=r'not with --kernels plain \(it has fast\)'): R.train(out=str(out), resume=True, kernels='plain')

@pytest.mark.parametrize('kernels', ['plain', 'fast'])
def test_whale_and_optimizers_compute_with_the_kernels_of_the_recipe(text, tmp_path, monkeypatch, kernels):
    "And so does a run that goes on"
    met = []
    def noted(net, whale, opts, *rest):
        met.append(['head_loss' in vars(whale), any('orthogonalize' in vars(o) for o in opts)])
        return train_step(net, whale, opts, *rest)
    monkeypatch.setattr(T, 'train_step', noted)
    monkeypatch.setattr(T.Log, 'plot', lambda self: None)
    R.train(data=str(text), out=str(tmp_path/'run'), steps=2, evals=2, kernels=kernels, **SMALL)
    shutil.rmtree(tmp_path/'run/checkpoints/step-00000002')
    (tmp_path/'run/README.md').unlink()
    R.train(out=str(tmp_path/'run'), resume=True)
    assert met==[[kernels=='fast']*2]*3

def test_the_best_step_is_noted(run):
    held = {m['step']+1: m['held_out_loss'] for m in T.read_metrics(run[0]/'metrics.jsonl') if 'held_out_loss' in m}
    step = min(held, key=held.get)
    assert json.loads((run[0]/'checkpoints/step-00000006/trainer/state.json').read_text())['best']==[step, held[step]]

def test_rows_of_an_evaluation(): assert [T.eval_batch(V, n) for V,n in ((300, 32), (2**17, 2**9), (2**17, 2**20))]==[16, 4, 1]

def test_a_tokenizer_that_does_not_fit(run, text, tmp_path):
    recipe = Recipe(data=str(text), tokenizer=str(run[0]))
    with pytest.raises(ValueError, match='the preset a vocabulary of'): T.make_tokenizer(recipe, 100, 20, None)
    with pytest.raises(ValueError, match='no tokenizer could be loaded'): T.make_tokenizer(replace(recipe, tokenizer=str(tmp_path)), 300, 20, None)

def test_a_given_tokenizer_is_the_runs(run, text, tmp_path):
    R.train(data=str(text), out=str(tmp_path/'other'), steps=1, evals=1, tokenizer=str(run[0]), seed=5, **SMALL)
    assert (tmp_path/'other'/'tokenizer.json').read_bytes()==(run[0]/'tokenizer.json').read_bytes()
