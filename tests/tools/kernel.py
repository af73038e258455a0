"""The kernels that a GPU would run for attention, on a machine without one

    python tests/tools/kernel.py --out results/kernel.json

PyTorch's compiler is told of a GPU that is not there, and writes what it would write for `attend` with a fused mask, forward and
backward. That is then (1) compiled to machine code for cards of several kinds, which tells how much memory on their chip it wants, and
(2) run as it stands by Triton's interpreter, on the processor, and compared with the plain `attend` in float64. What a card's own
arithmetic rounds, and how fast it is, only a card can tell.

It wants a CUDA build of PyTorch 2.9 with its Triton (`pip install torch==2.9.0`, 7 GB), and no GPU. It reaches deep into both: for
another version the stand-ins of `pretend` may have to change.
"""
import argparse, importlib.util, json, math, re, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import torch
from runs import environment, provenance

CARDS = {'7.5': 65536, '8.0': 166912, '8.6': 101376, '8.9': 101376, '9.0': 232448, '12.0': 101376}    # compute capability -> bytes on the chip for a block
SIZES = [('bfloat16', 96), ('bfloat16', 128), ('float32', 64), ('float32', 96), ('bfloat16', 192)]     # of which `fused_here` takes the first three
RUNS = [('float32', 32, 300, 128, True), ('float32', 64, 200, 200, False), ('float16', 96, 300, 128, True)]   # dtype, K, T, W, documents?; the interpreter
# computes no bfloat16, for which the compiler writes the kernel of float16
B,H = 2,8

def inputs(dtype, K, T, docs):
    "q, kv, sinks and documents, the first row padded on its left"
    torch.manual_seed(0)
    d = (torch.arange(T)//(T//3)).expand(B, -1).clone()
    d[0,:7] = -1
    return torch.randn(B, T, H, K).to(dtype), torch.randn(B, T, K).to(dtype), torch.randn(H), d if docs else None

# ---------------------------------------------------------------- what the compiler writes

def pretend(capability, room):
    "A card of that compute capability, as far as PyTorch's compiler asks about it"
    import triton
    from triton.backends.compiler import GPUTarget
    import torch._dynamo.device_interface as di
    import torch._inductor.graph, torch._inductor.runtime.triton_helpers as helpers
    import torch._subclasses.fake_tensor as fake
    import torch._higher_order_ops.flex_attention   # noqa: F401
    from torch.nn.attention import flex_attention as flex
    number = int(capability.replace('.', ''))
    card = SimpleNamespace(name='none', major=number//10, minor=number%10, multi_processor_count=80, max_threads_per_multi_processor=2048, warp_size=32,
        regs_per_multiprocessor=65536, shared_memory_per_block_optin=room, L2_cache_size=40<<20, total_memory=40<<30, gcnArchName='')
    always = lambda value: lambda *args, **kw: value
    for name,value in dict(is_available=True, device_count=1, current_device=0, get_device_properties=card, get_device_capability=(number//10, number%10),
        is_initialized=True, _lazy_init=None, is_tf32_supported=True, synchronize=None, _exchange_device=0, _maybe_exchange_device=0, set_rng_state=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8)).items(): setattr(torch.cuda, name, always(value))
    for name in ('_cuda_getDevice', '_cuda_exchangeDevice', '_cuda_maybeExchangeDevice'): setattr(torch._C, name, always(0))
    for name,value in dict(is_available=True, device_count=1, current_device=0, get_device_properties=card, get_compute_capability=number,
        is_triton_capable=True, raise_if_triton_unavailable=None).items(): setattr(di.CudaInterface, name, staticmethod(always(value)))
    di.CudaInterface.Worker.get_device_properties,di.CudaInterface.Worker.current_device = staticmethod(always(card)),staticmethod(always(0))
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=always(GPUTarget('cuda', number, 32)), get_current_device=always(0),
        get_active_torch_device=always(torch.device('cuda', 0)),
        utils=SimpleNamespace(get_device_properties=always(dict(max_shared_mem=room, multiprocessor_count=80)))))
    fake.init_gpu_context = helpers.set_driver_to_gpu = flex._validate_device = always(None)
    hop = sys.modules['torch._higher_order_ops.flex_attention']
    def permuted(o, like, real=hop._permute_strides):      # without copying, for which PyTorch would look for the card
        if o.device.type=='cpu': return real(o, like)
        strides,step = [0]*o.ndim,1
        for i in sorted(range(o.ndim), key=lambda i: like[i]): strides[i],step = step,step*o.shape[i]
        return torch.empty_strided(o.shape, strides, dtype=o.dtype, device=o.device)
    hop._permute_strides = permuted

def lowered(dtype, K, T, W, docs):
    "Code of the forward and of the backward graph, traced on the processor and then said to lie on a GPU"
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch.utils._pytree import tree_map
    from nanowhale.fast import attention
    codes = []
    class Written(Exception): pass
    def stop(self): codes.append(self.codegen()[0].value); raise Written
    GraphLowering.compile_to_module = stop
    def write(graph, args):
        mode = detect_fake_mode(args)
        def moved(t):
            if not isinstance(t, torch.Tensor): return t
            with mode: return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='cuda:0')
        out = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) if isinstance(v := getattr(n, 'meta', {}).get('val'), torch.Tensor) else v
            for n in next(n for n in graph.graph.nodes if n.op=='output').args[0]]
        for g in graph.modules():
            for n in g.graph.nodes if isinstance(g, torch.fx.GraphModule) else ():
                if 'val' in n.meta: n.meta['val'] = tree_map(moved, n.meta['val'])
                if 'device' in n.kwargs: n.kwargs = {**n.kwargs, 'device': torch.device('cuda:0')}
            if isinstance(g, torch.fx.GraphModule): g.recompile()
        try: compile_fx_inner(graph, [moved(t) for t in args])
        except Exception as e:
            if 'Written' not in repr(e): raise
        return lambda *args: [torch.zeros_like(t) if isinstance(t, torch.Tensor) else t for t in out]
    def backend(graph, args): return aot_module_simplified(graph, args, fw_compiler=write, bw_compiler=write, decompositions=select_decomp_table())
    def attended(q, kv, s, docs): return attention.attend(q, kv, s, attention.fused_mask(T, W, docs))[0]
    *leaves,d = inputs(dtype, K, T, docs)
    torch.compile(attended, backend=backend, fullgraph=True, dynamic=False)(*(x.requires_grad_() for x in leaves), d).sum().backward()
    return codes

def kernels(code): return re.findall(r"(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.S)

def room_wanted(codes):
    "Bytes on the chip that the forward and the backward kernel want, compiled to machine code"
    from torch._inductor.codecache import PyCodeCache
    wants = []
    for name,source in (k for code in codes for k in kernels(code) if 'flex' in k[1] or '_tem_' in k[0]):
        tuner = getattr(PyCodeCache.load(source), name)
        wants.append(tuner._precompile_config(tuner.configs[0]).kernel.metadata.shared)
    return wants

def lower(capability, dtype, K, T, W, docs, path):
    "In a process of its own: `lowered` into a file, and what it wants of a card"
    import torch._inductor.config as config
    config.compile_threads,config.force_disable_caches,config.use_static_cuda_launcher = 1,True,False
    pretend(capability, CARDS[capability])
    codes = lowered(getattr(torch, dtype), K, T, W, docs)
    Path(path).write_text(json.dumps(codes))
    sizes = [math.prod(map(int, s.strip(', ').split(','))) for code in codes for s in re.findall(r'empty_strided_cuda\(\(([\d, ]+)\)', code)]
    return dict(wants=room_wanted(codes), largest=max(sizes))

# ---------------------------------------------------------------- what it computes

NO_TUNING = """
from types import SimpleNamespace
triton_heuristics = SimpleNamespace(**{k: lambda **kw: lambda f: f for k in ('template', 'pointwise', 'reduction', 'persistent_reduction')})
"""

class Kernel:
    "A kernel of the compiler's, under Triton's interpreter"
    def __init__(self, name, source, folder):
        path = Path(folder)/f'{name[:80]}_{abs(hash(source))}.py'
        source = source.replace('import triton_helpers, triton_heuristics', 'import triton_helpers').replace('triton_helpers.set_driver_to_gpu()', '')
        path.write_text(NO_TUNING+source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.f,self.template = getattr(module, name),'_tem_' in name
    def run(self, *args, stream):
        if self.template: *args,x,y,z = args; return self.f[(x,y,z)](*args)
        given = dict(zip(self.f.arg_names, args))          # for all other kernels, blocks that leave no rest: they may not look for one
        size = {n: given[n.lower().replace('block', 'numel')] for n in self.f.arg_names if n.endswith('BLOCK')}
        block = {n: x & -x for n,x in size.items()}
        self.f[tuple(size.get(n, 1)//block.get(n, 1) for n in ('XBLOCK', 'YBLOCK', 'ZBLOCK'))](*args, **block)

def program(code, folder):
    "The compiler's host code around its kernels, on the processor"
    class Nothing:
        def __init__(self, *args): pass
        def __enter__(self): pass
        def __exit__(self, *args): pass
    torch.cuda._DeviceGuard,torch.cuda.set_device = Nothing,lambda *args: None
    empty = lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    names = {n: Kernel(n, s, folder) for n,s in kernels(code)} | dict(torch=torch, assert_size_stride=lambda *a: None, get_raw_stream=lambda i: 0,
        reinterpret_tensor=torch.as_strided, empty_strided_cuda=empty)
    body = code.split('async_compile.wait(globals())')[1].split('\ndef benchmark')[0]
    exec(body[min(i for i in (body.find('class Runner'), body.find('def call')) if i>=0):], names)
    return names['call'] if 'call' in names else names['runner'].call

def interpret(dtype, K, T, W, docs, path):
    "In a process of its own: the errors of outputs and gradients against the plain `attend` in float64, relative to their norms"
    import triton.runtime.interpreter as interpreter
    from nanowhale.model.attention import attend
    from nanowhale.model.visibility import window_mask
    real = interpreter._patch_lang_tensor
    def patched(tensor):                                   # numpy makes no number of an array of one any more
        real(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang_tensor = patched
    codes = json.loads(Path(path).read_text())
    forward,backward = (program(code, Path(path).parent) for code in codes)
    q,kv,s,d = inputs(getattr(torch, dtype), K, T, docs)
    shapes = dict(re.findall(r'assert_size_stride\((primals_\d), (\([^)]*\))', codes[0]))
    order = re.search(r'(primals_1[\w, ]*) = args', codes[0])[1].split(', ')
    o,*saved = forward([next(x for x in (q, kv, s, d) if x is not None and tuple(x.shape)==eval(shapes[n])) for n in order])
    leaves,ways = [x.double().requires_grad_() for x in (q, kv, s)],torch.randn(o.shape).to(o.dtype)
    want,_ = attend(*leaves, window_mask(torch.arange(T), torch.arange(T), W, d))
    want.backward(ways.double())
    grads = [g for g in backward([*saved, ways]) if g is not None]
    found = dict(output=(o, want.detach())) | {n: (next(g for g in grads if g.shape==x.shape), x.grad) for n,x in zip(('q', 'kv', 'sinks'), leaves)}
    return {n: float(f'{((a.double()-b).norm()/b.norm()).item():.2g}') for n,(a,b) in found.items()}

def child(what, *args, **env):
    "One of the two above in a process of its own"
    done = subprocess.run([sys.executable, __file__, what, json.dumps(args)], env=environment() | env, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', default='kernel.json', help='file for the figures')
    a = p.parse_args()
    room,runs = [],[]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder)/'code.json')
        for dtype,K in SIZES:
            for capability,has in CARDS.items():
                if capability=='7.5' and dtype=='bfloat16': continue       # it has none
                seen = child('lower', capability, dtype, K, 2048, 128, True, path)
                room.append(dict(dtype=dtype, K=K, capability=capability, has=has, **seen, fits=max(seen['wants'])<=has))
                print(room[-1], flush=True)
        for case in RUNS:
            child('lower', '8.6', *case, path)
            runs.append(dict(zip(('dtype', 'K', 'T', 'window', 'docs'), case)) | dict(errors=child('interpret', *case, path, TRITON_INTERPRET='1')))
            print(runs[-1], flush=True)
    Path(a.out).write_text(json.dumps(provenance('python tests/tools/kernel.py') | dict(room=room, runs=runs), indent=1)+'\n')

if __name__=='__main__':
    if sys.argv[1:2] in (['lower'], ['interpret']): print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
    else: main()
