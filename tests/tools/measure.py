"""Runs of minutes to hours whose figures stand in results/, each with its command, seed, commit and hardware.

    python tests/tools/measure.py default                    `nanowhale train` as a new user types it                results/tiny.json
    python tests/tools/measure.py recipes --seeds 5          the tiny whale under both recipes, same tokens        results/recipes.json
    python tests/tools/measure.py tune lr 0.024 0.048 0.096  the tiny whale with other values of its recipe          results/tuning.json
    python tests/tools/measure.py balance [--seeds 0 1 ...]  does every expert work? bias speeds and weights of the loss  results/balance.json
    python tests/tools/measure.py loss [--repeats N]         the loss over V4's vocabulary, from plain to blocks   results/loss.json
    python tests/tools/measure.py precision --steps 1000     fp32, bf16 products, bf16 everywhere                  results/precision.json
    python tests/tools/measure.py identity [--model FOLDER]  greedy ids: ours, transformers', speculative            results/identity.json
    python tests/tools/measure.py muon [--seeds 5]           Muon's rounds in float32 and in bfloat16              results/muon.json
    python tests/tools/measure.py products                   one matrix product, by several libraries                 results/products.json
    python tests/tools/measure.py ceiling                    what the cores can do at most (needs a C compiler)      results/products.json
    python tests/tools/measure.py scaling                    what a layer costs against context, rows, experts, streams   results/scaling.json
    python tests/tools/measure.py bench [--repeats N --sizes 1x512 ... --compile --profile]   `nanowhale bench` on this processor   results/bench.json
    python tests/tools/measure.py bench_v4 [--repeats N]     the same for the preset with compressed attention          results/bench_v4.json
    python tests/tools/measure.py rungs [--repeats N --sizes 1x512 ... --precision fp32 ...]   a part of the fast set a rung   results/rungs.json
    python tests/tools/measure.py explorers [--model FOLDER]  page weight, seconds to the first token, logits      results/explorers.json
    python tests/tools/measure.py full --data DATA --tokenizer FOLDER [--steps N] [--device cuda] [--eval FILE] [--resume]
                                                       the 110M whale: both recipes in bf16, one in fp32     results/full.json

`full` on a GPU is the run to compare recipes at full size: give it as many --steps as the time allows; a run that was cut
short goes on with --resume. On a CPU three steps show that it works, at what speed and in how much memory.
"""
import argparse, json, os, platform, re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runs import provenance

ROOT = Path(__file__).resolve().parents[2]
MAIN = 'import sys; from nanowhale.cli import main; sys.exit(main())'

def nanowhale(*words, code=MAIN, **env):
    "Run a command of the package in a process of its own; what it prints on standard error passes through"
    res = subprocess.run([sys.executable, '-c', code, *map(str, words)], check=False, cwd=os.getcwd(), stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), **env})
    if res.returncode: sys.exit(f'nanowhale {" ".join(map(str, words))}: exit code {res.returncode}')
    return res.stdout

def lines(path): return [json.loads(l) for l in Path(path).read_text().splitlines()]

def record(name, **figures):
    "Write results/NAME.json"
    command = ' '.join(['python tests/tools/measure.py', *(Path(w).name if '/' in w else w for w in sys.argv[1:])])
    head = provenance(command) | dict(python=platform.python_version())
    (ROOT/'results'/f'{name}.json').write_text(json.dumps(head|figures, indent=1)+'\n')
    print(json.dumps({k: v for k,v in figures.items() if k!='runs'}, indent=1))

def record_machine(name, here):
    "The same for what depends on the processor; what others said stays"
    path = ROOT/'results'/f'{name}.json'
    kept = json.loads(path.read_text())['machines'] if path.exists() else []
    record(name, seed=0, machines=[*(m for m in kept if m['processor']!=here['processor']), here])

def summary(out, every=1):
    "What is kept of a run: its figures and thinned curves"
    metrics,results = lines(out/'metrics.jsonl'),json.loads((out/'results.json').read_text())
    held = [[m['step']+1, round(m['held_out_bits_per_byte'], 4), round(m['held_out_loss'], 4)] for m in metrics if 'held_out_loss' in m]
    thin = [[m['step']+1, round(m['loss'], 3)] for m in metrics[::every]]
    keep = {k: v for k,v in results.items() if k!='hardware'}
    return dict(results=keep, held_out=held, loss=thin, skipped=sum(m['skipped'] for m in metrics),
        load_entropy=round(sum(m['load_entropy'] for m in metrics[-20:])/len(metrics[-20:]), 3), hardware=results['hardware'])

def default(args):
    "The default run, and what of its held-out text stands in the training text as well"
    import test_data
    with tempfile.TemporaryDirectory() as d:
        out = Path(d)/'whale'
        nanowhale('train', '--out', out)
        spec,metrics = json.loads((out/'run.json').read_text()),lines(out/'metrics.jsonl')
        results = json.loads((out/'results.json').read_text())
    keep = [m for m in metrics if m['step']%5==0 or 'held_out_loss' in m]
    metrics = [{k: round(m[k], 4) for k in ('step', 'loss', 'mtp_loss', 'held_out_loss') if k in m} for m in keep]
    record('tiny', seed=spec['seed'], preset=spec['preset'], recipe=spec['recipe'], results=results, metrics=metrics, overlap=test_data.overlap())

def at_once(commands, n=2):
    "Run commands of the package on one thread each, `n` at a time"
    def run(words): nanowhale(*words, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    with ThreadPoolExecutor(n) as pool: list(pool.map(run, commands))

def recipes(args):
    "Both recipes on the same tokens; after which share of them has `whale` reached the loss at which `card` ends?"
    runs,steps = [],['--steps', args.steps] if args.steps else []
    with tempfile.TemporaryDirectory() as d:
        plans = [(name, seed, Path(d)/f'{name}{seed}') for seed in range(args.seeds) for name in ('card', 'whale')]
        at_once([['train', '--recipe', name, '--seed', seed, '--evals', 10, '--out', out, *steps] for name,seed,out in plans])
        runs = [dict(recipe=name, seed=seed, **summary(out, 5)) for name,seed,out in plans]
    share = []
    for seed in range(args.seeds):
        card,whale = (next(r['held_out'] for r in runs if r['recipe']==n and r['seed']==seed) for n in ('card', 'whale'))
        goal,before = card[-1][1],[0, 99.]
        for step,bpb,_ in whale:
            if bpb<=goal: share.append(round((before[0]+(step-before[0])*(before[1]-goal)/(before[1]-bpb))/whale[-1][0], 3)); break
            before = [step, bpb]
    record('recipes', share_of_the_tokens=share, runs=runs, hardware=runs[0]['hardware'])

def tune(args):
    "The tiny whale with each of some values of one field of its recipe, all else equal; the file keeps what was measured of other fields"
    with tempfile.TemporaryDirectory() as d:
        plans = [(v, seed, Path(d)/f'{v}-{seed}') for v in args.values for seed in range(args.seeds)]
        at_once([['train', '--recipe', args.recipe, '--seed', seed, f'--{args.field}', v, '--out', out] for v,seed,out in plans])
        runs = [dict(value=v, seed=seed, **summary(out, 10**9)) for v,seed,out in plans]
    table = {v: [r['results']['held-out bits per byte'] for r in runs if r['value']==v] for v in args.values}
    path = ROOT/'results'/'tuning.json'
    earlier = json.loads(path.read_text())['tables'] if path.exists() else {}
    entropy = {v: [r['load_entropy'] for r in runs if r['value']==v] for v in args.values}
    one = dict(held_out_bits_per_byte=table, load_entropy=entropy, seeds=args.seeds, targets=runs[0]['results']['targets seen in training'],
        hardware=runs[0]['hardware'])
    record('tuning', tables=earlier | {f'{args.recipe}: {args.field}': dict(command=' '.join(['tests/tools/measure.py', *sys.argv[1:]]), **one)})

def pair(word): return tuple(map(float, word.split(',')))   # a speed and a weight, as typed

def balance(args):
    "The default run with other speeds of the bias and other weights of the balance loss; each run is kept as soon as it has ended"
    from nanowhale.processor import processor
    path = ROOT/'results'/'balance.json'
    runs = json.loads(path.read_text())['runs'] if path.exists() else []
    where = dict(commit=provenance('')['commit'], processor=processor())
    for seed in args.seeds:
        for speed,weight in args.pairs:
            key = dict(bias_speed=speed, balance_weight=weight, seed=seed)
            if any(key.items()<=r.items() for r in runs): continue
            with tempfile.TemporaryDirectory() as d:
                out = Path(d)/'whale'
                nanowhale('train', '--bias_speed', speed, '--balance_weight', weight, '--seed', seed, '--out', out)
                end = lines(out/'metrics.jsonl')[-1]
            load = [[round(share, 4) for share in block] for block in end['held_out_load']]
            bpb = round(end['held_out_bits_per_byte'], 4)
            runs.append(key | dict(held_out_bits_per_byte=bpb, held_out_load=load) | where)
            record('balance', runs=runs)
            print(runs[-1], flush=True)

def products(args):
    "The six versions of 32_products, and the rate at which one row's product reads its weights"
    import torch, torch.nn.functional as F
    from nanowhale.fast.bench import alternate
    from nanowhale.fast.products import onednn
    from nanowhale.processor import instruction_set, processor, this_processor
    torch.manual_seed(0); torch.set_grad_enabled(False)
    x,W = torch.randn(512, 320),torch.randn(1280, 320)
    def loops(x, W):
        for a in x.tolist():
            for b in W.tolist():
                total = 0.
                for k in range(len(a)): total += a[k]*b[k]
    def dots(x, W):
        for a in x:
            for b in W: (a*b).sum()
    def rows(x, W):
        for a in x: W@a
    half = x.bfloat16(),W.bfloat16()
    plans = {'three loops': (loops, x[:1], W[:64]), 'dot products': (dots, x[:8], W[:64]), 'matrix times vector': (rows, x[:32], W),
        'BLAS': (lambda x, W: x@W.T, x, W), 'oneDNN': (onednn, x, W), 'bfloat16': (F.linear, *half)}
    took = alternate({name: lambda p=p: p[0](*p[1:]) for name,p in plans.items()}, 7)
    rates = {name: round(2*len(p[1])*p[2].numel()/took[name]/1e9, 4) for name,p in plans.items()}
    one,head = torch.randn(1, 320),torch.randn(129280, 320)
    took = alternate({'BLAS': lambda: F.linear(one, head), 'oneDNN': lambda: onednn(one, head)}, 7)
    here = dict(processor=processor(), maker=this_processor().maker, instructions=instruction_set(), threads=torch.get_num_threads(),
        commit=provenance('')['commit'], torch=torch.__version__, gflops=rates, one_row_gbytes={name: round(head.nbytes/s/1e9, 1) for name,s in took.items()},
        step=products_of_a_step(), ceiling=peak(torch.get_num_threads()))
    record_machine('products', here)

def peak(threads):
    "GFLOP/s of multiply-adds on registers alone, by type; None where nothing compiles C"
    with tempfile.TemporaryDirectory() as d:
        build = ['-O2', '-march=native', '-ffp-contract=fast', str(ROOT/'tests/tools/peak.c'), '-o', f'{d}/peak', '-lpthread']
        try: subprocess.run([os.environ.get('CC', 'cc'), *build], check=True)
        except (OSError, subprocess.CalledProcessError): return None
        out = subprocess.run([f'{d}/peak', str(threads)], check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name,rate in map(str.split, out.splitlines())} | dict(commit=provenance('')['commit'])

def ceiling(args):
    "The same for this processor's entry of an earlier day"
    from nanowhale.processor import processor
    path = ROOT/'results/products.json'
    kept = json.loads(path.read_text())
    here = next((m for m in kept['machines'] if m['processor']==processor()), None)
    if not here: sys.exit(f'{processor()} has no entry yet: python tests/tools/measure.py products makes one, with its ceiling')
    here['ceiling'] = peak(here['threads'])
    path.write_text(json.dumps(kept, indent=1)+'\n')
    print(here['ceiling'])

def products_of_a_step():
    "GFLOP/s of both libraries at the shapes of a training step of 512 tokens: forward, and the gradients of x and of W"
    import torch
    from nanowhale.fast.bench import alternate
    from nanowhale.fast.products import onednn
    out = []
    for M,K,N in ((512, 320, 160), (512, 160, 768), (256, 320, 1280), (256, 640, 320), (512, 1280, 24), (512, 320, 16384)):
        x,W,d = torch.randn(M, K),torch.randn(N, K),torch.randn(M, N)
        pairs = dict(forward=(x, W), dx=(d, W.mT), dW=(d.mT, x.mT))
        jobs = {(lib, what): lambda f=f, p=p: f(*p) for what,p in pairs.items() for lib,f in (('BLAS', lambda a, b: a@b.mT), ('oneDNN', onednn))}
        rates = {k: round(2*M*K*N/s/1e9, 1) for k,s in alternate(jobs, 7).items()}
        out.append(dict(M=M, K=K, N=N) | {lib: {what: rates[lib, what] for what in pairs} for lib in ('BLAS', 'oneDNN')})
    return out

def scaling(args):
    "Milliseconds forward and backward of one part of a layer at the width of the 110M whale, beside the formula's FLOPs"
    import torch
    from dataclasses import replace
    from nanowhale.model.config import CSA, HCA, SWA
    from nanowhale.presets import layer_flops, nanowhale_v4
    from nanowhale.model.visibility import views, whole_rows
    from nanowhale.model.attention import Attention
    from nanowhale.model.compress import CompressedAttention
    from nanowhale.model.moe import MoE
    from nanowhale.model.hyper import HyperConnection, collapse, mix
    from nanowhale.fast.attention import row_mask
    from nanowhale.fast.kernels import use
    from nanowhale.fast.bench import alternate, there_and_back
    torch.manual_seed(0)
    out,cfg = {},replace(nanowhale_v4(), num_hidden_layers=1, layer_types=None, mlp_layer_types=None, vocab_size=512)
    def attention(kind, T, window=128):
        c = replace(cfg, layer_types=(kind,), sliding_window=window, max_position_embeddings=max(T, window))
        layer = use(Attention(c) if kind==SWA else CompressedAttention(c, kind))
        parts = layer_flops(c, T, kind)
        rows = whole_rows(c, torch.zeros(1, T).long(), None)
        seen,x = views(c, rows, row_mask)[kind],torch.randn(1, T, cfg.hidden_size)
        return there_and_back(lambda x: layer(x, *seen), x),3*T*sum(v for k,v in parts.items() if k in ('attention', 'scores', 'compress'))
    def moe(E, T):
        layer,x = use(MoE(replace(cfg, n_routed_experts=E))),torch.randn(1, T, cfg.hidden_size)
        return there_and_back(lambda x: layer(x)[0], x),3*T*layer_flops(replace(cfg, n_routed_experts=E), T)['moe']
    def hyper(N, T):
        c = replace(cfg, hc_mult=N)
        hc,X = use(HyperConnection(c)),torch.randn(1, T, N, cfg.hidden_size)
        def f(X):
            pre,post,comb = hc(X)
            return mix(post, comb, X, collapse(pre, X))
        return there_and_back(f, X),3*T*layer_flops(c, T)['hyper']/2
    def measure(name, jobs):
        took = alternate({k: job for k,(job,_) in jobs.items()}, args.repeats)
        out[name] = [dict(at=k, milliseconds=round(1000*took[k], 2), flops=round(f)) for k,(_,f) in jobs.items()]
        print(name, out[name], flush=True)
    Ts = (256, 512, 1024, 2048, 4096)
    for name,kind,window in (('whole context', SWA, 4096), ('window', SWA, 128), ('csa', CSA, 128), ('hca', HCA, 128)):
        measure(name, {T: attention(kind, T, window) for T in Ts})
    measure('experts', {E: moe(E, 2048) for E in (2, 4, 8, 16, 32)})
    measure('tokens', {T: moe(4, T) for T in (256, 512, 1024, 2048, 4096)})
    measure('streams', {N: hyper(N, 2048) for N in (1, 2, 4, 8)})
    record('scaling', seed=0, runs=out)

def benched(name, preset, args):
    "`nanowhale bench` at these sizes, one after the other; what other processors and sizes said stays in the file"
    from nanowhale.processor import processor
    path,head = ROOT/'results'/f'{name}.json',provenance(f'python tests/tools/measure.py {name}')
    extra = [f'--{flag}' for flag in ('profile', 'compile') if getattr(args, flag)]
    for dtype in args.precision:
        for size in args.sizes:
            B,T = map(int, size.split('x'))
            words = ['bench', '--preset', preset, '--batch-size', B, '--context', T, '--precision', dtype, '--repeats', args.repeats]
            print(nanowhale(*words, *extra, '--out', path), flush=True)
            rows = json.loads(path.read_text())
            rows[-1] |= dict(command=head['command'], commit=head['commit'], processor=processor())
            path.write_text(json.dumps(rows, indent=1)+'\n')

LOSS_TOKENS = 1024

def losses():
    "The versions of 35_loss, slowest idea first: name -> function as `head_loss`"
    import torch, torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
    from nanowhale.fast import loss as fast
    from nanowhale.model.mtp import head_loss
    def rows_again(h, W, labels):
        def part(x, y): return F.cross_entropy(F.linear(x, W), y, reduction='sum')
        parts = zip(h.flatten(0, 1).split(256), labels.flatten().split(256))
        return sum(checkpoint(part, x, y, use_reentrant=False) for x,y in parts)/labels.numel()
    def all_words(h, W, labels):
        was,fast.WORDS = fast.WORDS,len(W)
        try: return fast.head_loss(h, W, labels)
        finally: fast.WORDS = was
    def torchs(h, W, labels): return F.linear_cross_entropy(h.flatten(0, 1), W, labels.flatten(), options=torch.nn.LinearCrossEntropyOptions())
    out = {'plain': head_loss, 'rows, computed again': rows_again, 'both gradients on the way': all_words, 'in blocks of words': fast.head_loss}
    return out | ({"PyTorch's own": torchs} if hasattr(torch.nn, 'LinearCrossEntropyOptions') else {})

def loss_job(name):
    "Loss and both gradients of one version as a job, at the size of the 110M whale"
    import torch
    from nanowhale.presets import nanowhale_100m
    torch.manual_seed(0)
    cfg,f = nanowhale_100m(),losses()[name]
    h,W = torch.randn(1, LOSS_TOKENS, cfg.hidden_size),torch.randn(cfg.vocab_size, cfg.hidden_size)*0.02
    labels = torch.randint(cfg.vocab_size, (1, LOSS_TOKENS))
    def job():
        leaves = [x.detach().requires_grad_() for x in (h, W)]
        torch.autograd.grad(f(*leaves, labels), leaves)
    return job

def loss_memory(name):
    "MiB that a fresh process needs beyond what it holds before"
    import torch
    from nanowhale.train.loop import keep_freed_memory, peak_memory
    torch.set_num_threads(1)
    keep_freed_memory()
    job,before = loss_job(name),peak_memory(torch.device('cpu'))
    job()
    return peak_memory(torch.device('cpu'))-before

def loss(args):
    "On one thread, whose own time is counted: what other programs take of the processor counts for nobody"
    import time, torch
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from statistics import median
    from nanowhale.presets import nanowhale_100m
    from nanowhale.processor import instruction_set, processor
    torch.set_num_threads(1)
    cfg,(a,b) = nanowhale_100m(),torch.randn(2, 1024, 1024)
    def large():
        for _ in range(20): a@b.mT
    jobs = {name: loss_job(name) for name in losses()} | dict(ceiling=large)
    flops = dict.fromkeys(jobs, 6*LOSS_TOKENS*cfg.hidden_size*cfg.vocab_size) | dict(ceiling=40*1024**3)   # without what is computed again
    paces = {name: [] for name in jobs}
    for _ in range(args.repeats+1):
        for name,job in jobs.items():
            start = time.process_time()
            job()
            paces[name].append(flops[name]/(time.process_time()-start))
    paces = {name: p[1:] for name,p in paces.items()}
    top = paces.pop('ceiling')
    rungs = {name: dict(gflops=round(median(p)/1e9, 1), of_ceiling=round(median(x/y for x,y in zip(p, top)), 3)) for name,p in paces.items()}
    for name,rung in rungs.items():
        with ProcessPoolExecutor(1, get_context('spawn')) as alone: rung['MiB'] = alone.submit(loss_memory, name).result()
    here = dict(processor=processor(), instructions=instruction_set(), threads=1, tokens=LOSS_TOKENS, repeats=args.repeats, torch=torch.__version__,
        commit=provenance('')['commit'], busy_processes=round(os.getloadavg()[0], 1), ceiling=round(median(top)/1e9, 1), rungs=rungs)
    record_machine('loss', here)

HALF_ROUNDS = """
import sys, torch, nanowhale.fast.kernels as K
from nanowhale.cli import main
rounds = K.FAST[K.Muon]['orthogonalize']
def half(G):
    with torch.autocast('cpu', torch.bfloat16): return rounds(G)
K.FAST[K.Muon]['orthogonalize'] = half
sys.exit(main())
"""

def muon(args):
    "Paired runs of the tiny whale: Muon's rounds in float32 and in bfloat16, all other products in float32"
    from nanowhale.lab.compare import once
    def run(rounds, seed):
        with tempfile.TemporaryDirectory() as d:
            words = ['train', '--seed', seed, '--steps', args.steps, '--evals', 1, '--out', Path(d)/'whale']
            nanowhale(*words, code=HALF_ROUNDS if rounds=='bf16' else MAIN)
            end = lines(Path(d)/'whale'/'metrics.jsonl')[-1]
        return dict(held_out_bits_per_byte=round(end['held_out_bits_per_byte'], 5))
    for seed in range(args.seeds):
        for rounds in ('fp32', 'bf16'):
            key = dict(rounds=rounds, seed=seed, steps=args.steps)
            once(ROOT/'results/muon.json', key, lambda: run(rounds, seed), f'python tests/tools/measure.py muon --steps {args.steps}')

def bench(args):
    "The 110M whale"
    benched('bench', 'nanowhale_100m', args)

def bench_v4(args):
    "The one that leaves nothing of V4 out"
    benched('bench_v4', 'nanowhale_v4', args)

def rungs(args):
    "A step of the 110M whale and a decoded token, one part of the fast set more a rung; an entry for each processor and shape"
    import rungs as tool
    from nanowhale.fast.bench import add_to
    from nanowhale.processor import processor
    head = provenance('python tests/tools/measure.py rungs')
    for dtype in args.precision:
        for size in args.sizes:
            B,T = map(int, size.split('x'))
            res = tool.measure(args.preset, B, T, dtype, args.repeats, args.device)
            print(tool.table(res), flush=True)
            add_to(args.out, res|dict(command=head['command'], commit=head['commit'], processor=processor()))

EVERYWHERE = '''
import re, sys, torch, nanowhale.model.whale as M, nanowhale.train.loop as T
from nanowhale.cli import main
M.FLOAT32 = re.compile('^$')                       # nothing stays float32
was = T.Whale.__init__
def init(self, cfg): was(self, cfg); self.bfloat16()
T.Whale.__init__ = init
sys.exit(main(sys.argv[1:]))
'''

def precision(args):
    "The same rows and first weights: all float32; products in bf16; weights, averages, router and mixes in bf16 as well"
    runs = {}
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'everywhere.py').write_text(EVERYWHERE)
        words = ['train', '--steps', args.steps, '--batch-size', 4, '--context', 128, '--evals', 10, '--seed', args.seed]
        started = {}
        for name,more in dict(fp32=[], bf16=['--precision', 'bf16'], everywhere=['--precision', 'bf16']).items():
            start = [str(Path(d)/'everywhere.py')] if name=='everywhere' else ['-c', MAIN]
            env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
            started[name] = subprocess.Popen([sys.executable, *start, *map(str, words), *more, '--out', f'{d}/{name}'], env=env)
            if len(started)%2==0: [p.wait() for p in started.values()]
        for name,p in started.items():
            p.wait(); out = Path(d)/name
            runs[name] = summary(out, 20) if (out/'results.json').exists() else dict(failed=True)
    last = {n: r['held_out'][-1][2] for n,r in runs.items() if 'held_out' in r}
    record('precision', seed=args.seed, steps=args.steps, held_out_loss=last, difference={n: round(v-last['fp32'], 4) for n,v in last.items()}, runs=runs)

def compare(whale, pairs):
    "How many texts are the same, and for the others how near the two best logits were where the texts part"
    import torch
    differ = []
    for i,(mine,other) in enumerate(pairs):
        if mine.equal(other): continue
        n = min(mine.shape[1], other.shape[1])
        at = next((t for t in range(n) if mine[0,t]!=other[0,t]), n)
        with torch.inference_mode(): best = whale(mine[:,:at]).logits[0,-1].double().topk(2)
        both = [int(x[0,at]) for x in (mine, other) if at<x.shape[1]]
        differ.append(dict(prompt=i, position=at, gap=float(best.values[0]-best.values[1]), largest_logit=float(best.values[0]),
            the_two_best=sorted(both)==sorted(best.indices.tolist())))
    return dict(prompts=len(pairs), identical=len(pairs)-len(differ), differ=differ)

def identity(args):
    "Greedy continuations of held-out text: `generate` beside transformers' own, and speculative decoding beside `generate`"
    import random, torch
    from nanowhale.model.whale import Whale
    from nanowhale.train.data import embedded_corpus, load_tokenizer, split_held_out
    from nanowhale.generate.sample import generate
    from nanowhale.generate.speculate import speculate
    from nanowhale.fast.kernels import use
    with tempfile.TemporaryDirectory() as d:
        if not args.model: nanowhale('train', '--out', Path(d)/'whale')
        folder = Path(args.model or Path(d)/'whale')
        whale,tok = use(Whale.from_pretrained(folder)).eval(),load_tokenizer(folder)
        spec,results = json.loads((folder/'run.json').read_text()),json.loads((folder/'results.json').read_text())
    r,hf,runs = random.Random(args.seed),whale.to_hf().eval(),{}
    text = [i for t in split_held_out(embedded_corpus())[1] for i in tok.encode(t, add_special_tokens=False)]
    def prompt():
        at,n = r.randrange(len(text)-200),r.randint(1, 200)
        return torch.tensor([[tok.bos_token_id, *text[at:at+n]]])
    prompts = [prompt() for _ in range(args.prompts)]
    head = dict(seed=args.seed, hardware=f'{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}',
        whale={k: spec[k] for k in ('preset', 'seed')} | {k: spec['recipe'][k] for k in ('steps', 'precision')} |
            {k: results[k] for k in ('held-out bits per byte', 'targets seen in training')},
        prompt_tokens=[min(p.shape[1] for p in prompts), max(p.shape[1] for p in prompts)])
    def theirs(ids): return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False, pad_token_id=tok.pad_token_id)
    plan = dict(transformers=(prompts[:args.hf_prompts], args.tokens, theirs),
        speculative=(prompts, args.drafted_tokens, lambda ids: speculate(whale, ids, args.drafted_tokens, temperature=0, drafts=args.drafts)))
    for name,(some,n,f) in plan.items():
        runs[name] = dict(new_tokens=n, **compare(whale, [(generate(whale, ids, n, temperature=0), f(ids)) for ids in some]))
        if name=='speculative': runs[name]['drafts'] = args.drafts
        record('identity', **head, **runs)

def explorers(args):
    "The pages that run in a reader's browser: their weight, how soon a whale answers there, and how near its logits are to PyTorch's"
    import shutil, statistics, torch
    import browser, test_explorers as T
    from nanowhale.train.data import embedded_corpus, load_tokenizer, split_held_out
    from nanowhale.model.whale import Whale
    with tempfile.TemporaryDirectory() as d:
        folder,site = Path(args.model or Path(d)/'whale'),Path(d)/'site'
        if not args.model: nanowhale('train', '--out', folder)
        shutil.copytree(T.EXPLORERS, site, ignore=shutil.ignore_patterns('model', '__pycache__', '*.py', 'package.json'))
        small,tok = T.build.export(folder, site/'whale'/'model'),load_tokenizer(folder)
        server,home = browser.serve(site)
        weight,first,pace,differences = {},[],[],[]
        for n in range(args.loads):       # each in a browser that has never seen the page
            tab = browser.Browser()
            for name in ['rope', 'sinkhorn', 'routing', 'whale'] if n==0 else ['whale']:
                tab.open(f'{home}/{name}/index.html')
                T.until(tab, T.READY.get(name, 'true'))
                weight[name] = sum((site/u.removeprefix(home+'/')).stat().st_size for u in set(tab.asked) if u.startswith(home))
            first.append(float(tab.js('document.body.dataset.ready')))
            tab.js('document.querySelector("#compare").click()')
            differences.append(float(T.until(tab, 'document.querySelector("#difference").dataset.worst')))
            T.enter(tab, '[name=temperature]', 1)
            tab.js('document.querySelector("#go").click()')
            T.until(tab, 'document.querySelector("#go").textContent=="Continue"')
            pace.append(float(T.text(tab, '#pace').split()[-3]))
            said = tab.call('Browser.getVersion')['product']
            tab.close()
        server.shutdown()
        full = Whale.from_pretrained(folder)
        ids = [tok.bos_token_id, *tok.encode('\n'.join(split_held_out(embedded_corpus())[1]), add_special_tokens=False)[:199]]
        ours = torch.tensor(T.js('const model = load(), memory = model.memory(); say(given.ids.map(id => model.step(id, memory).logits))',
            folder=str(site/'whale'/'model'), ids=ids))
        rounded,exact = T.build.logits(small, ids),T.build.logits(full, ids)
        gap = lambda a, b: float(f'{(a-b).abs().max().item():.1e}')
        loss = lambda z: torch.nn.functional.cross_entropy(z[:-1], torch.tensor(ids[1:])).item()
        loaded = [f for f in (site/'whale'/'model').iterdir() if f.name!='whale.zip']
        record('explorers', browser=said, loads=args.loads, page_bytes=weight, model_bytes=sum(f.stat().st_size for f in loaded),
            seconds_to_first_prediction=dict(median=round(statistics.median(first), 3), all=[round(s, 3) for s in first]),
            milliseconds_per_token=dict(median=statistics.median(pace), all=pace),
            busy_processes=round(os.getloadavg()[0], 1), logits=dict(tokens=len(ids),
                largest_difference_in_the_browser=float(f'{max(differences):.1e}'), largest_difference_to_pytorch=gap(ours, rounded),
                largest_change_by_half_precision=gap(rounded, exact), same_best_token=round((rounded.argmax(-1)==exact.argmax(-1)).float().mean().item(), 4),
                loss_in_half_precision=round(loss(rounded), 5), loss_in_full_precision=round(loss(exact), 5)))

def full(args):
    "The 110M whale"
    runs,base = [],Path(args.folder or tempfile.mkdtemp())
    plans = [('whale', 'bf16'), ('card', 'bf16'), ('whale', 'fp32')]
    if not args.device: plans.reverse()      # a processor may have no fast bf16
    for name,kind in plans[:args.plans]:
        out = base/f'{name}-{kind}'
        size = ['--steps', args.steps, '--evals', args.evals, '--batch-size', args.batch_size, '--accum', args.accum, '--context', args.context]
        more = ['--resume'] if args.resume and (out/'run.json').exists() else [
            '--preset', 'nanowhale_100m', '--recipe', name, '--precision', kind, '--data', args.data, '--tokenizer', args.tokenizer, *size]
        if not (out/'README.md').exists(): nanowhale('train', '--out', out, *(['--device', args.device] if args.device else []), *more)
        about = dict(recipe=name, precision=kind, batch_size=args.batch_size, accum=args.accum, context=args.context)
        runs.append(about | summary(out, max(1, args.steps//200)))
        if args.eval:
            said = nanowhale('eval', out, '--data', args.eval, '--context', 2048, '--batch-size', 4)
            runs[-1]['eval'] = dict(text=Path(args.eval).name, **{k: float(v) for k,v in re.findall(r'^(.*): ([\d.]+)$', said, flags=re.M)})
        record('full', steps=args.steps, runs=runs)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    sub.add_parser('default').set_defaults(f=default)
    a = sub.add_parser('recipes'); a.add_argument('--seeds', type=int, default=3); a.add_argument('--steps', type=int); a.set_defaults(f=recipes)
    a = sub.add_parser('tune'); a.add_argument('field'); a.add_argument('values', nargs='+'); a.add_argument('--recipe', default='whale')
    a.add_argument('--seeds', type=int, default=1); a.set_defaults(f=tune)
    a = sub.add_parser('balance'); a.set_defaults(f=balance)
    a.add_argument('--seeds', type=int, nargs='+', default=[0])
    a.add_argument('--pairs', type=pair, nargs='+', help='SPEED,WEIGHT ...', default=[(s, w) for w in (1e-4, 1e-2, 1e-1) for s in (1e-3, 1e-2, 3e-2)])
    a = sub.add_parser('precision'); a.add_argument('--steps', type=int, default=1000); a.add_argument('--seed', type=int, default=0)
    a.set_defaults(f=precision)
    a = sub.add_parser('identity'); a.set_defaults(f=identity); a.add_argument('--model', help='folder of a trained run; none: the default run first')
    for name,n in dict(seed=0, prompts=200, hf_prompts=50, tokens=40, drafted_tokens=40, drafts=2).items():
        a.add_argument(f'--{name.replace("_", "-")}', type=int, default=n)
    sub.add_parser('products').set_defaults(f=products)
    a = sub.add_parser('loss'); a.set_defaults(f=loss); a.add_argument('--repeats', type=int, default=5)
    sub.add_parser('ceiling').set_defaults(f=ceiling)
    a = sub.add_parser('muon'); a.set_defaults(f=muon)
    for name,n in dict(seeds=5, steps=75).items(): a.add_argument(f'--{name}', type=int, default=n)
    for f,sizes in ((scaling, None), (bench, ['1x512', '2x1024', '1x2048']), (bench_v4, ['1x512'])):
        a = sub.add_parser(f.__name__); a.add_argument('--repeats', type=int, default=5); a.set_defaults(f=f)
        if not sizes: continue
        a.add_argument('--sizes', nargs='*', default=sizes, help='rows x context')
        a.add_argument('--precision', nargs='*', default=['fp32', 'bf16'])
        for flag in ('profile', 'compile'): a.add_argument(f'--{flag}', action='store_true')
    a = sub.add_parser('rungs'); a.set_defaults(f=rungs); a.add_argument('--repeats', type=int, default=5)
    a.add_argument('--sizes', nargs='*', default=['1x512'], help='rows x context'); a.add_argument('--precision', nargs='*', default=['fp32'])
    a.add_argument('--preset', default='nanowhale_100m'); a.add_argument('--device')
    a.add_argument('--out', default=ROOT/'results/rungs.json', help='file to add the figures to')
    a = sub.add_parser('explorers'); a.set_defaults(f=explorers); a.add_argument('--model', help='folder of a trained run; none: the default run first')
    a.add_argument('--loads', type=int, default=5)
    a = sub.add_parser('full'); a.set_defaults(f=full)
    for name in ('data', 'tokenizer'): a.add_argument(f'--{name}', required=True)
    for name in ('device', 'eval', 'folder'): a.add_argument(f'--{name}')
    for name,n in {'steps': 3, 'evals': 1, 'batch-size': 8, 'accum': 4, 'context': 2048, 'plans': 3}.items(): a.add_argument(f'--{name}', type=int, default=n)
    a.add_argument('--resume', action='store_true')
    args = p.parse_args(); args.f(args)
