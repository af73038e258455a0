"""What tests/tools/gpu.py measures on a GPU: sections of parts in the order of their value, each with its bound in seconds.
A part gets `note`, which adds figures to its file, and `job`: where things are, on which device, and how large all is to be"""
import math, os, shutil, subprocess, sys, time
from collections import namedtuple
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
import torch, torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
import nanowhale.fast.attention, nanowhale.fast.experts, nanowhale.fast.loss
from gpu import read, unpack_text
from nanowhale.cli import main
from nanowhale.fast.attention import row_mask
from nanowhale.fast.bench import (adamw, alternate, ceilings, decode_rate, make_sides, prefill_job, there_and_back, token_bytes,
    training_job)
from nanowhale.fast.graph import Decoder, one_step
from nanowhale.fast.kernels import FAST, use
from nanowhale.generate.cache import Cache
from nanowhale.generate.sample import generate, next_logits
from nanowhale.model.attention import attend
from nanowhale.model.compress import far_weights, index_scores
from nanowhale.model.hyper import sinkhorn
from nanowhale.model.moe import run_experts
from nanowhale.model.mtp import head_loss
from nanowhale.model.rope import rotate
from nanowhale.model.visibility import window_mask
from nanowhale.model.whale import Whale
from nanowhale.presets import cache_bytes, count_flops, count_params, get_preset
from nanowhale.train.checkpoint import checkpoints, read_metrics
from nanowhale.train.data import load_tokenizer
from nanowhale.train.evaluate import evaluating
from nanowhale.train.loop import hardware, peak_flops, peak_memory, pick_device
from nanowhale.train.optim import Muon
from nanowhale.train.recipe import get_recipe
from nanowhale.train.step import cast

# `backend` compiles functions, `whole` our whole step: to trace that one takes a processor long, and tests/test_graph.py does it
REAL = SimpleNamespace(preset='nanowhale_100m', all_kinds='nanowhale_v4', precision='bf16', rows=8, more=(16, 32), context=2048, T=2048,
    prompt=128, new=64, batch=64, repeats=5, side=None, backend='inductor', whole='inductor', evals=5, recipe={}, tokenizer=True, steps=None)
SMALL = SimpleNamespace(preset='tiny', all_kinds='tiny_v4', precision='fp32', rows=2, more=(), context=48, T=160,
    prompt=8, new=4, batch=3, repeats=1, side=64, backend='eager', whole=None, evals=3, recipe=dict(batch_size=2, accum=1, context=64),
    tokenizer=False, steps=12)
TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)

def compiled(f, backend): return torch.compile(f, dynamic=False, backend=backend) if backend else f

def freed():
    "Let go of what an earlier figure needed"
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def wait(device):
    if device.type=='cuda': torch.cuda.synchronize(device)

# ---------------------------------------------------------------- machine

def driver():
    "Of the GPU, where its tool is there"
    asked = ['nvidia-smi', '--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit', '--format=csv,noheader']
    try: return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError: return None

def machine(note, job):
    "Name, driver and versions, and what this machine can do at all"
    import numpy, transformers
    device = pick_device(job.device)
    try: from triton import __version__ as triton
    except ImportError: triton = None
    note(name=hardware(device), driver=driver(), python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda,
        triton=triton, transformers=transformers.__version__, numpy=numpy.__version__, peak=peak_flops(hardware(device)),
        cores=os.cpu_count())
    note(ceilings={k: float(f'{v:.4g}') for k,v in ceilings(device, side=job.size.side).items()})

# ---------------------------------------------------------------- sound

Case = namedtuple('Case', 'plain fast leaves full')    # `full`: the input that stays float32 where products are bfloat16

def kept(out): return out[0], out[1].detach()   # the lse is no output of a compiled whale, and PyTorch 2.11 would refuse it as one

def attention_case(c, some, T, C, window):
    "Three documents, a window, and entries from afar if there are any"
    pos = torch.arange(T, device=some(1).device)
    docs = (pos*3//T).expand(2, -1).contiguous()
    q,kv,sinks,far = some(2, T, c.num_attention_heads, c.head_dim), some(2, T, c.head_dim), some(c.num_attention_heads), some(2, C, c.head_dim)
    if not C:
        def plain(q, kv, sinks): return attend(q, kv, sinks, window_mask(pos, pos, window, docs))
        def fast(q, kv, sinks): return kept(FAST_OF['attend'](q, kv, sinks, row_mask(pos, pos, window, docs, K=c.head_dim)))
        return Case(plain, fast, [q, kv, sinks], 2)
    seen = (pos[:,None]>=torch.arange(1, C+1, device=pos.device)*(T//C))[None]
    def plain(q, kv, sinks, far): return attend(q, kv, sinks, window_mask(pos, pos, window, docs), far, seen)
    def fast(q, kv, sinks, far): return kept(FAST_OF['attend'](q, kv, sinks, row_mask(pos, pos, window, docs), far, seen))
    return Case(plain, fast, [q, kv, sinks, far], 2)

def entry_cases(c, some, T, C):
    "Which entries an indexer prefers, and how much attention they get"
    seen = (torch.arange(T, device=some(1).device)[:,None]>=torch.arange(1, C+1, device=some(1).device)*(T//C))[None]
    def alone(f): return lambda *a: f(*a, seen)*seen        # the others may have any score
    def weights(f): return lambda *a: f(*a, seen)
    J,W,H,K = c.index_n_heads, c.index_head_dim, c.num_attention_heads, c.head_dim
    scores = Case(alone(index_scores), alone(FAST_OF['index_scores']), [some(2, T, J, W), some(2, T, J), some(2, C, W)], 1)
    return {'index scores': scores, 'weights of entries':
        Case(weights(far_weights), weights(FAST_OF['far_weights']), [some(2, T, H, K), some(2, C, K), some(2, T, H)+5], 2)}

def expert_case(c, some, M):
    "Each token chooses some of the experts, the last of which has nothing to do"
    E,k,D,inner = c.n_routed_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size
    idx = some(M, E-1).topk(min(k, E-1), -1).indices
    def run(f): return lambda x, w, gate_up, down: f(x, idx, w, gate_up, down, c.swiglu_limit)
    leaves = [some(M, D), some(M, idx.shape[1]), 0.1*some(E, 2*inner, D), 0.1*some(E, D, inner)]
    return Case(run(run_experts), run(FAST_OF['run']), leaves, 1)

def loss_case(c, some, M):
    labels = (1e6*some(1, M)).long()%c.vocab_size
    labels[:,::7] = -100
    def loss(f): return lambda h, W: f(h, W, labels)
    return Case(loss(head_loss), loss(FAST_OF['head_loss']), [some(1, M, c.hidden_size), 0.05*some(c.vocab_size, c.hidden_size)], None)

FAST_OF = {name: f for functions in FAST.values() for name,f in functions.items()}

def cases(size, device):
    "Every fast function, beside the plain one and with inputs of the whale's sizes"
    c = get_preset(size.all_kinds)
    draw = torch.Generator(device).manual_seed(0)
    def some(*shape): return torch.randn(shape, generator=draw, device=device, dtype=torch.float64)
    T,C,D,N = size.T, size.T//c.compress_rate_csa, c.hidden_size, c.hc_mult
    angles = torch.arange(T, device=device)[:,None]/torch.arange(1, 1+c.qk_rope_head_dim//2, device=device)
    def mixes(f): return lambda z: f(z, c.hc_sinkhorn_iters)
    def turned(f): return lambda x: f(x, angles.cos(), angles.sin())
    return {
        'attention, one window': attention_case(c, some, T, 0, 4*T),
        'attention, short window': attention_case(c, some, T, 0, c.sliding_window),
        'attention, entries from afar': attention_case(c, some, T, C, c.sliding_window),
        'experts': expert_case(c, some, 2*T),
        'loss': loss_case(c, some, T),
        'product': Case(F.linear, FAST_OF['product'], [some(2, T, D), some(2*D, D)], None),
        **entry_cases(c, some, T, C),
        'Sinkhorn': Case(mixes(sinkhorn), mixes(FAST_OF['sinkhorn']), [some(2, T, N, N)], 0),
        'rotation': Case(turned(rotate), turned(FAST_OF['rotate']), [some(2, T, 3, c.head_dim)], None),
        'directions of Muon': Case(*(torch.no_grad()(f) for f in (Muon.orthogonalize, FAST_OF['orthogonalize'])), [some(4, D, 2*D)], None)}

def both_ways(f, case, dtype, device):
    "Outputs and gradients, in float64"
    leaves = [x.to(torch.float32 if i==case.full and dtype==torch.bfloat16 else dtype).requires_grad_() for i,x in enumerate(case.leaves)]
    with cast(device, 'bf16' if dtype==torch.bfloat16 else 'fp32'): out = f(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    grads = []
    if outs[0].requires_grad:
        draw = torch.Generator(device).manual_seed(1)
        ways = torch.randn(outs[0].shape, generator=draw, dtype=torch.float64, device=device).to(outs[0].dtype)
        grads = torch.autograd.grad((outs[0]*ways).sum(), leaves)
    return [t.detach().double() for t in (*outs, *grads)]

def off(found, exact): return max(((a-b).norm()/b.norm().clamp(min=1e-30)).item() for a,b in zip(found, exact, strict=True))

def compare(case, precision, device, size=None):
    "Largest relative error of outputs and gradients, of the fast function and of the plain one; with `size` it is compiled"
    dtype = TYPES[precision]
    rounded = case._replace(leaves=[x.to(dtype).double() for x in case.leaves])
    exact = both_ways(case.plain, rounded, torch.float64, device)
    plain = off(both_ways(case.plain, rounded, dtype, device), exact)
    begun = time.perf_counter()
    f = compiled(case.fast, size.backend) if size else case.fast
    fast = off(both_ways(f, rounded, dtype, device), exact)
    wait(device)
    limit = 3*plain+1e-5 if precision=='fp32' else 2*plain+2**-8
    freed()
    return dict(fast=float(f'{fast:.2g}'), plain=float(f'{plain:.2g}'), ok=fast<=limit, seconds=round(time.perf_counter()-begun, 2))

def decoding(preset, device, decoder=None, T=48, prompt=16):
    "Logits of one pass over a text, and token by token from a cache: the largest relative difference"
    torch.manual_seed(0)
    whale = use(Whale(get_preset(preset, num_nextn_predict_layers=0))).to(device)
    ids = torch.randint(0, whale.cfg.vocab_size, (2,T), device=device)
    with evaluating(whale):
        whole = whale(ids).logits[:,prompt-1:]
        past = Cache(whale.cfg)
        each = [next_logits(whale, ids[:,:prompt], cache=past)]
        step = decoder(whale, past, T) if decoder else None
        for t in range(prompt, T): each.append((step(ids[:,t:t+1]) if step else next_logits(whale, ids[:,:t+1], cache=past)).clone())
    found = off([torch.stack(each, 1).double()], [whole.double()])
    freed()
    return dict(difference=float(f'{found:.2g}'), ok=found<1e-4)

def kernels(note, job):
    "Each fast function as it is, and decoding from a cache"
    device = pick_device(job.device)
    every = cases(job.size, device)
    for precision in ('bf16', 'fp32'):
        for name,case in every.items(): note.tried(f'{name}, {precision}', compare, case, precision, device)
    for preset in (job.size.preset, job.size.all_kinds): note.tried(f'cached decoding, {preset}', decoding, preset, device)

def a_decoder(job): return Decoder if job.size.backend=='inductor' else partial(Decoder, compile=False)

def compiling(note, job):
    "The same, compiled"
    device = pick_device(job.device)
    every = cases(job.size, device)
    def each(precision):
        for name,case in every.items(): note.tried(f'{name}, {precision}, compiled', compare, case, precision, device, job.size)
    each('bf16')
    note.tried('cached decoding, compiled', decoding, job.size.preset, device, a_decoder(job))
    each('fp32')

# ---------------------------------------------------------------- speed

def ids_for(device, V, rows, T): return torch.randint(0, V, (rows,T), device=device, generator=torch.Generator(device).manual_seed(1))

def timed_steps(job, model, rows, device):
    "A training step by AdamW: tokens per second, memory, seconds of the first two steps, and the step itself"
    size = job.size
    V = model.lm_head.weight.shape[0]
    step = training_job(model, [adamw(model)], ids_for(device, V, rows, size.context), size.precision)
    begun = time.perf_counter()
    loss = step().item()
    step()
    wait(device)
    first = time.perf_counter()-begun
    took = alternate(dict(step=step), size.repeats, device)['step']
    return dict(tokens_per_second=round(rows*size.context/took, 1), loss=round(loss, 5), memory=peak_memory(device), first_steps=round(first, 1)), step

def with_mfu(found, cfg, T, device):
    "Beside the speed, its share of the card's dense bf16 peak by the package's own count"
    flops = 3*sum(count_flops(cfg, T).values())*found['tokens_per_second']
    peak = peak_flops(hardware(device))
    return found | dict(flops_per_second=float(f'{flops:.4g}'), mfu=round(flops/peak, 4) if peak else None)

def largest_kernels(step, device, n=10):
    "Where the GPU's time goes in one step: its largest kernels"
    gpu = device.type=='cuda'
    with profile(activities=[ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*gpu) as p:
        step()
        wait(device)
    key = 'self_device_time_total' if gpu else 'self_cpu_time_total'
    events = [e for e in p.key_averages() if not gpu or e.device_type==torch.autograd.DeviceType.CUDA]
    total = sum(getattr(e, key) for e in events)
    largest = sorted(events, key=lambda e: -getattr(e, key))[:n]
    return [dict(kernel=e.key[:80], milliseconds=round(getattr(e, key)/1000, 3), calls=e.count, share=round(getattr(e, key)/total, 3)) for e in largest]

def our_steps(job, mtp, rows, note=None):
    "Our compiled training step; with `note`, its largest kernels too"
    freed()
    device = pick_device(job.device)
    whale = make_sides(job.size.preset, device, job.size.context, peer=False, mtp=mtp)['nanowhale']
    found,step = timed_steps(job, compiled(whale, job.size.whole), rows, device)
    if note: note.tried('largest kernels', largest_kernels, step, device)
    return with_mfu(found, whale.cfg, job.size.context, device)

def training(note, job):
    "Our training step, with and without MTP, at several micro-batch sizes"
    for rows in (job.size.rows, *job.size.more):
        for mtp in (False, True):
            note.tried(f'{rows} rows, {"with" if mtp else "without"} MTP', our_steps, job, mtp, rows, None if mtp or rows!=job.size.rows else note)

def their_steps(job, sides, name, with_compiler):
    freed()
    device = pick_device(job.device)
    model = sides[name].to(device)
    found,_ = timed_steps(job, compiled(model, job.size.backend) if with_compiler else model, job.size.rows, device)
    model.zero_grad(set_to_none=True)
    return with_mfu(found, get_preset(job.size.preset, num_nextn_predict_layers=0), job.size.context, device)

def peer(note, job):
    "transformers' model with the same weights on the same rows, eager and compiled, beside ours eager"
    sides = make_sides(job.size.preset, pick_device(job.device), job.size.context)
    for name,with_compiler in (('transformers', False), ('transformers', True), ('nanowhale', False)):
        note.tried(f'{name}, {"compiled" if with_compiler else "eager"}', their_steps, job, sides, name, with_compiler)

def bytes_of_step(cfg, rows, cached, per_number):
    "What decoding a token for each of some rows must read: of many rows, together, all experts"
    if rows==1: return token_bytes(cfg, cached, per_number)
    n = count_params(cfg)
    return (sum(n.values())-n['mtp']-n['embed']+rows*cfg.hidden_size)*per_number+rows*cache_bytes(cfg, cached, per_number)

def written(job, model, ids, decoder, memory, cfg):
    "Tokens per second of decoding, over all rows, and the share of the memory's rate that reading the weights takes"
    size = job.size
    steps = decode_rate(model, ids, size.new, decoder)
    needed = bytes_of_step(cfg, len(ids), ids.shape[1]+size.new//2, TYPES[size.precision].itemsize)
    freed()
    return dict(tokens_per_second=round(steps*len(ids), 1), share_of_memory=round(steps*needed/memory, 4))

def writing(note, job):
    "Prefill, and decoding of one row and of many, beside transformers"
    size,device = job.size, pick_device(job.device)
    sides = make_sides(size.preset, device, size.context, dtype=TYPES[size.precision])
    cfg = sides['nanowhale'].cfg
    known = job.results/'machine.json'
    top = read(known).get('ceilings') if known.exists() else None
    top = top or ceilings(device, side=size.side)
    memory = max(top['copy'], top['read'])
    ids = ids_for(device, cfg.vocab_size, size.batch, size.context)
    ours,theirs = sides['nanowhale'], sides['transformers']
    for name,model,rows,decoder in (('nanowhale compiled', ours, 1, a_decoder(job)), ('nanowhale compiled', ours, size.batch, a_decoder(job)),
            ('transformers', theirs, 1, None), ('nanowhale', ours, 1, None), ('transformers', theirs, size.batch, None), ('nanowhale', ours, size.batch, None)):
        note.tried(f'{name}, {rows} row{"s"*(rows>1)}', written, job, model, ids[:rows,:size.prompt], decoder, memory, cfg)
    def prefill():
        took = alternate({name: prefill_job(m, ids[:1]) for name,m in sides.items()}, size.repeats, device)
        return {name: round(size.context/s, 1) for name,s in took.items()}
    note.tried('prefill', prefill)

# ---------------------------------------------------------------- train

START = 15       # seconds that a run needs besides its steps and its compiler
SAVE = 5         # that an evaluation and a checkpoint take
CAREFUL = 0.75   # of the steps that would fit

def plan(job):
    "Steps of both recipes: as many as fit into the bound of the slower one, by what `training` measured"
    size = job.size
    recipe = get_recipe(size.preset, 'whale', **size.recipe)
    if job.tokens or size.steps: return max(size.evals, job.tokens//recipe.targets if job.tokens else size.steps)
    known = job.results/'speed-training.json'
    measured = read(known) if known.exists() else {}
    fits = []
    for name,runs,row in (('card', 1, f'{size.rows} rows, without MTP'), ('whale', 2, f'{size.rows} rows, with MTP')):
        found = dict(tokens_per_second=100_000, first_steps=40) | measured.get(row, {})
        bound = next(p.seconds for p in PARTS if p.name==name)
        seconds = bound-runs*(START+found['first_steps'])-size.evals*SAVE
        fits.append(CAREFUL*seconds*found['tokens_per_second']/recipe.targets)
    return max(4*size.evals, int(min(fits)))

def curves(out, recipe, packed):
    "What is known of a run so far"
    metrics = read_metrics(out/'metrics.jsonl')
    if not metrics: return {}
    later = metrics[len(metrics)//4:]
    def middle(key):
        values = sorted(m[key] for m in later if m.get(key) is not None)
        return values[len(values)//2] if values else None
    thin = max(1, len(metrics)//150)
    return dict(steps=len(metrics), tokens=len(metrics)*recipe.targets, repeats=float(f'{len(metrics)*recipe.targets/packed:.3g}'),
        loss=[[m['step']+1, round(m['loss'], 4)] for m in metrics[::thin]], skipped=sum(m['skipped'] for m in metrics),
        held_out=[[(m['step']+1)*recipe.targets, round(m['held_out_bits_per_byte'], 4)] for m in metrics if 'held_out_bits_per_byte' in m],
        tokens_per_second=middle('tokens_per_second'), mfu=middle('mfu'), memory=middle('memory'), max_vio=round(later[-1]['max_vio'], 3))

def kill_and_resume(note, p, out, recipe, go_on, follow):
    "Kill a run between two checkpoints, go on from the last one, and hold the steps that were taken twice against each other"
    gap = max(1, recipe.steps//recipe.evals)
    def far_enough():
        saved = checkpoints(out)
        return saved and len(read_metrics(out/'metrics.jsonl'))>=int(saved[-1].name[5:])+max(2, gap//2)
    while p.is_alive() and not far_enough():
        p.join(0.05)
        follow()
    if not p.is_alive():
        note(resume=dict(error='the run had ended before it could be killed'))
        return p
    p.kill()
    p.join()
    before = read_metrics(out/'metrics.jsonl')
    step = int(checkpoints(out)[-1].name[5:])
    note(resume=dict(killed_after=len(before), from_step=step))
    p = go_on()
    while p.is_alive() and len(read_metrics(out/'metrics.jsonl'))<len(before):
        p.join(0.05)
        follow()
    again = {m['step']: m for m in read_metrics(out/'metrics.jsonl')}
    pairs = [(m, again[m['step']]) for m in before if m['step']>=step and m['step'] in again]
    gaps = [abs(a[k]-b[k])/abs(a[k]) for a,b in pairs for k in ('loss', 'grad_norm')]
    note(resume=dict(killed_after=len(before), from_step=step, steps_taken_twice=len(pairs), to_the_bit=bool(pairs) and not any(gaps),
        largest_relative_difference=float(f'{max(gaps, default=math.nan):.2g}'), tolerance=0.01, ok=bool(pairs) and max(gaps)<=0.01))
    return p

def command(*words):
    "A command of the package, as a process of its own does it"
    sys.exit(main([*map(str, words)]))

def samples(out, device, prompts=('The cell is', 'In the year', 'She looked at')):
    "What it goes on to write"
    whale,tok = use(Whale.from_pretrained(out)).to(device), load_tokenizer(out)
    def continued(text):
        ids = torch.tensor([[tok.bos_token_id, *tok.encode(text, add_special_tokens=False)]], device=device)
        return tok.decode(generate(whale, ids, 60, temperature=0.7, top_k=40, seed=0)[0], skip_special_tokens=True)
    return [continued(p) for p in prompts]

def pictures(note, out, name):
    for kind in ('loss', 'expert-load'):
        if (out/f'{kind}.png').exists(): shutil.copy(out/f'{kind}.png', note.path.with_name(f'{name}-{kind}.png'))

def trained(name, kill, note, job):
    "A run by one recipe, its curve followed while it lasts"
    size = job.size
    packed = read(job.pack/'pack.json')['tokens']
    data = unpack_text(job.pack, job.home/'text.jsonl')
    changes = size.recipe | dict(steps=plan(job), evals=size.evals)
    recipe = get_recipe(size.preset, name, **changes)
    out = job.home/name
    words = ['--preset', size.preset, '--recipe', name, '--data', data, '--seed', job.seed]
    if size.tokenizer: words += ['--tokenizer', job.pack/'tokenizer']
    if size.backend=='inductor': words += ['--compile']
    for k,v in changes.items(): words += ['--'+k.replace('_', '-'), v]
    def begin(*words):
        p = get_context('fork').Process(target=command, args=('train', *words, '--out', out, '--device', job.device))
        p.start()
        return p
    note(recipe=f'{name}, scaled to {recipe.steps*recipe.targets:,} tokens', n=1, precision=recipe.precision, planned_steps=recipe.steps)
    told = 0
    def follow(every=2):
        nonlocal told
        if time.time()-told<every: return
        note(**curves(out, recipe, packed))
        told = time.time()
    p = begin(*words)
    if kill: p = kill_and_resume(note, p, out, recipe, lambda: begin('--resume'), follow)
    while p.is_alive():
        p.join(0.2)
        follow()
    follow(0)
    pictures(note, out, name)
    if p.exitcode: raise SystemExit(p.exitcode)
    note(results=read(out/'results.json'))
    note.tried('samples', samples, out, pick_device(job.device))

# ---------------------------------------------------------------- tune

def milliseconds(job, device): return round(1000*alternate(dict(job=job), 3, device)['job'], 3)

class Instead:
    "A module's name means something else inside the block"
    def __init__(self, module, name, value): self.module,self.name,self.value = module, name, value
    def __enter__(self):
        self.was = getattr(self.module, self.name)
        setattr(self.module, self.name, self.value)
    def __exit__(self, *_): setattr(self.module, self.name, self.was)

def inputs_of(case, precision, rows):
    return [x.to(TYPES[precision] if i!=case.full else torch.float32).requires_grad_() for i,x in enumerate(case.leaves)]

def case_time(job, name, device, module, what, value, with_compiler=False):
    "Milliseconds of one part, forward and backward, with one setting changed"
    freed()
    case = cases(job.size, device)[name]
    leaves = inputs_of(case, job.size.precision, job.size.rows)
    with Instead(module, what, value), cast(device, job.size.precision):
        f = compiled(case.fast, job.size.backend) if with_compiler else case.fast
        def first(*leaves):
            out = f(*leaves)
            return out[0] if isinstance(out, tuple) else out
        return dict(milliseconds=milliseconds(there_and_back(first, *leaves), device))

def decode_time(job, device, mode):
    "Tokens per second of decoding one row, its step compiled in this mode"
    freed()
    whale = make_sides(job.size.preset, device, job.size.context, peer=False, dtype=TYPES[job.size.precision])['nanowhale']
    ids = ids_for(device, whale.cfg.vocab_size, 1, job.size.prompt)
    step = torch.compile(one_step, dynamic=False, mode=mode) if job.size.backend=='inductor' else one_step
    with Instead(nanowhale.fast.graph, 'compiled', lambda device: step):
        return dict(tokens_per_second=round(decode_rate(whale, ids, job.size.new, Decoder), 1))

def tune(note, job):
    "One setting at a time, beside what it is"
    device = pick_device(job.device)
    attention,experts,loss = nanowhale.fast.attention, nanowhale.fast.experts, nanowhale.fast.loss
    kernel = attention.flex_attention
    blocks = {f'{m} x {n}': partial(kernel, kernel_options=dict(BLOCK_M=m, BLOCK_N=n)) for m,n in ((64, 64), (128, 64), (64, 128), (128, 128))}
    for name,f in (dict(default=kernel) | blocks).items():
        note.tried(f'attention in blocks of {name}', case_time, job, 'attention, one window', device, attention, 'flex_attention', f, True)
    for power in (26, 27, 28, 29, 30):
        note.tried(f'loss, 2^{power} logits at a time', case_time, job, 'loss', device, loss, 'LOGITS', {device.type: 2**power})
    for name,f in dict(default=experts.in_bf16, ungrouped=lambda x, down: False).items():
        note.tried(f'experts, {name}', case_time, job, 'experts', device, experts, 'in_bf16', f)
    for name,mode in dict(with_graphs='reduce-overhead', without=None).items():
        note.tried(f'decoding, CUDA graphs: {name}', decode_time, job, device, mode)

# ---------------------------------------------------------------- all of it

Part = namedtuple('Part', 'section name seconds f')
Part.key = property(lambda p: p.section if p.section==p.name else f'{p.section}-{p.name}')

PARTS = [
    Part('machine', 'machine', 20, machine),
    Part('sound', 'kernels', 25, kernels),
    Part('sound', 'compiling', 35, compiling),
    Part('speed', 'training', 100, training),
    Part('speed', 'peer', 50, peer),
    Part('speed', 'writing', 45, writing),
    Part('train', 'card', 95, partial(trained, 'card', False)),
    Part('train', 'whale', 130, partial(trained, 'whale', True)),
    Part('tune', 'tune', 40, tune)]

# ---------------------------------------------------------------- what it comes to

def figure(found, part, name, key):
    "One figure of a part, or None where it was not measured"
    row = found.get(part, {}).get(name)
    return row.get(key) if isinstance(row, dict) else None

def best(found, mtp, key):
    "The largest over the micro-batch sizes that were tried"
    named = [name for name in found.get('speed-training', {}) if name.endswith(f'{mtp} MTP')]
    return max(filter(None, (figure(found, 'speed-training', name, key) for name in named)), default=None)

def times_peer(found):
    "Our compiled step over transformers' compiled step, both without MTP and at the same number of rows"
    theirs = figure(found, 'speed-peer', 'transformers, compiled', 'tokens_per_second')
    names = [name for name in found.get('speed-training', {}) if name.endswith('without MTP')]
    ours = figure(found, 'speed-training', names[0], 'tokens_per_second') if names else None
    return round(ours/theirs, 2) if ours and theirs else None

def share_of_tokens(found):
    "After which share of its tokens `whale` has the bits per byte at which `card` ends, between two measurements by a straight line"
    card,whale = (found.get(f'train-{name}', {}).get('held_out') or [] for name in ('card', 'whale'))
    if not card or not whale or found['train-card'].get('steps')!=found['train-card'].get('planned_steps'): return None
    goal,last = card[-1][1], card[-1][0]
    for (a,x),(b,y) in zip(whale, whale[1:]):
        if y<=goal<x: return round((a+(b-a)*(x-goal)/(x-y))/last, 3)
    return round(whale[0][0]/last, 3) if whale[0][1]<=goal else None

def goals(found):
    "What was aimed at, and what was reached"
    rows = [
        ("MFU of the training step without MTP", 0.4, best(found, 'without', 'mfu')),
        ("MFU of the training step with MTP", 0.4, best(found, 'with', 'mfu')),
        ("training step over transformers' compiled one, same rows", 3, times_peer(found)),
        ("decoding one row, share of the memory's rate", 0.5, figure(found, 'speed-writing', 'nanowhale compiled, 1 row', 'share_of_memory')),
        ("share of its tokens after which whale is where card ends (less is better)", 0.6, share_of_tokens(found))]
    return [dict(goal=goal, aim=aim, reached=reached) for goal,aim,reached in rows]

def headline(head, found):
    "The figures in a sentence"
    if head['rehearsal']: return 'This was a rehearsal on a processor: its figures say nothing about a GPU.'
    said = []
    for mtp in ('without', 'with'):
        speed,mfu = best(found, mtp, 'tokens_per_second'), best(found, mtp, 'mfu')
        if speed: said.append(f'{speed:,.0f} tokens a second {mtp} MTP'+(f' ({mfu:.0%} of its bf16 peak)' if mfu else ''))
    decode = figure(found, 'speed-writing', 'nanowhale compiled, 1 row', 'tokens_per_second')
    name = found.get('machine', {}).get('name', 'one GPU')
    trains = f'On one {name} the 110M whale trains at {" and ".join(said)}' if said else f'On one {name} no training step was timed'
    return trains+(f', and writes {decode:,.0f} tokens a second' if decode else '')+f' (n = 1, commit {head["commit"]}).'
