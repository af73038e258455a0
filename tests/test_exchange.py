"""Experts and tables on many processes, beside one: to the bit where sums have the same order. Most tests make processes of threads, which
exchange lists and need no network, so that five are as cheap as two; the last ones start two real processes.

    pytest tests/test_exchange.py
"""
import paths   # noqa: F401, for tests/tools
import copy, itertools, os, random, subprocess, sys, threading, types
from dataclasses import replace
from pathlib import Path
import pytest, torch, torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from nanowhale.beyond import exchange as X
from nanowhale.model.config import WhaleConfig
from nanowhale.model.moe import Experts, MoE
from nanowhale.model.whale import Whale
from nanowhale.presets import tiny, tiny_v4
from nanowhale.train.parallel import rank, ranks
from runs import PATIENCE

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures('one_thread')

# ---------------------------------------------------------------- processes that are threads

@pytest.fixture
def processes(monkeypatch):
    "processes(R, f): f(rank) in R threads that exchange as processes do; what each returned, or the first error"
    def run(R, f, module=X):
        me,wait = threading.local(), threading.Barrier(R, timeout=PATIENCE)
        board,answers,errors = [None]*R, [None]*R, []
        def exchanged(parcel):
            wait.wait()
            board[me.rank] = parcel
            wait.wait()
            return list(board)
        def all_to_all_single(out, rows, gets, sends):
            assert sum(sends)==len(rows) and len(sends)==len(gets)==R
            got = [boxes[me.rank] for boxes in exchanged(rows.split(sends))]
            assert [len(box) for box in got]==gets, 'a process expects other rows than it is sent'
            out.copy_(torch.cat(got))
        def work(r):
            me.rank = r
            try: answers[r] = f(r)
            except Exception as e:
                errors.append(e)
                wait.abort()
        network = dict(dist=types.SimpleNamespace(all_to_all_single=all_to_all_single), n_ranks=lambda: R, rank=lambda: me.rank,
            total=lambda t: sum(exchanged(t)))
        for name,replacement in network.items(): monkeypatch.setattr(module, name, replacement)
        threads = [threading.Thread(target=work, args=(r,)) for r in range(R)]
        for t in threads: t.start()
        for t in threads: t.join()
        monkeypatch.undo()
        if errors: raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return answers
    return run

def config(D, I, E, k): return WhaleConfig(hidden_size=D, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=k, initializer_range=.5,
    swiglu_limit=1., vocab_size=50)

def case(seed, R, dtype=None, k=None):
    "Experts; tokens, choices, gate weights and gradients from above; how many tokens each process has, some none"
    r = random.Random(seed)
    torch.manual_seed(seed)
    E = R*r.randint(1, 4)
    k,D,I = min(k or r.randint(1, 4), E), r.choice([5, 8, 16, 17]), r.choice([3, 4, 8])
    dtype = dtype or r.choice([torch.float32, torch.float64])
    sizes = [r.choice([0, 1, r.randint(2, 30)]) for _ in range(R)]
    M = sum(sizes)
    experts = Experts(config(D, I, E, k)).to(dtype)
    idx = torch.rand(M, E).topk(k).indices
    if seed%4==0: idx = torch.arange(k).expand(M, k)          # all want the same: most boxes stay empty
    w = torch.rand(M, k, dtype=torch.float64 if dtype==torch.float64 else torch.float32)
    return experts, (torch.randn(M, D).to(dtype), idx, w, torch.randn(M, D).to(dtype)), sizes

def outcome(experts, x, idx, w, dy):
    x,w = (t.clone().requires_grad_() for t in (x, w))
    h = experts(x, idx, w)
    return dict(zip(('output', 'x', 'w', 'gate_up', 'down'), (h.detach(), *torch.autograd.grad(h, [x, w, *experts.parameters()], dy))))

def split_outcome(processes, R, experts, tensors, sizes, module=X):
    shares = list(zip(*(t.split(sizes) for t in tensors)))
    parts = processes(R, lambda r: outcome(module.SplitExperts(experts), *shares[r]), module)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

def unequal(a, b): return [name for name in a if not torch.equal(a[name], b[name])]

# ---------------------------------------------------------------- to the bit

@pytest.mark.parametrize('R', [1, 2, 3, 5])
def test_outputs_and_gradients_are_those_of_one_process(processes, R):
    for seed in range(12):
        experts,tensors,sizes = case(seed, R)
        assert not unequal(split_outcome(processes, R, experts, tensors, sizes), outcome(experts, *tensors)), seed

@pytest.mark.parametrize('k', [2, 4])
def test_bfloat16(processes, k):
    "The tokens' gradient of the plain loop rounds after each expert, so with more than two it may differ; ours alone and together do not"
    for seed in range(1, 6):
        experts,tensors,sizes = case(seed, 2, torch.bfloat16, k)
        got,plain = split_outcome(processes, 2, experts, tensors, sizes), outcome(experts, *tensors)
        assert not unequal(got, outcome(X.SplitExperts(experts), *tensors))
        assert set(unequal(got, plain))<=({'x'} if k>2 else set())
        assert_close(got['x'], plain['x'], rtol=.05, atol=.05)

def test_another_order_rounds_differently(processes):
    "What the proof rests on: tokens dealt like cards give another sum, and the same as one process that reads them in this order"
    experts,tensors,_ = case(1, 2, torch.float32, 3)
    tensors = [t[torch.arange(len(t)).repeat(40)[:40]] for t in tensors]
    cards = [torch.cat([t[::2], t[1::2]]) for t in tensors]
    got = split_outcome(processes, 2, experts, cards, [20, 20])
    assert not unequal(got, outcome(experts, *cards))
    assert {'gate_up', 'down'}<=set(unequal(got, outcome(experts, *tensors)))

PLANTED = dict(   # what is replaced, by what, and where it shows; None: an exchange fails
    gradients_the_same_way=('ctx.ways = gets, sends', 'ctx.ways = sends, gets', None),
    last_token_first=('idx.flatten().argsort(stable=True)', '(idx.flatten()*idx.numel()-torch.arange(idx.numel())).argsort()', {'gate_up', 'down'}),
    first_expert_first=('x.index_select(0, token.flip(0)).flip(0)', 'x.index_select(0, token)', {'x'}),
    weights_not_sorted=('w.flatten()[trip.order,None]', 'w.flatten()[:,None]', {'output', 'x', 'w', 'gate_up', 'down'}),
    counts_by_expert=('.repeat(R)', '.repeat_interleave(R)', {'output', 'x', 'w', 'gate_up', 'down'}))

@pytest.mark.parametrize('name', PLANTED)
def test_planted(processes, name):
    old,new,shows = PLANTED[name]
    source = Path(X.__file__).read_text(encoding='utf-8').replace('from ..', 'from nanowhale.')
    assert source.count(old)==1
    planted = types.ModuleType('planted')
    exec(source.replace(old, new), vars(planted))
    torch.manual_seed(0)
    experts,idx = Experts(config(16, 8, 6, 3)), torch.rand(40, 6).topk(3).indices
    tensors = torch.randn(40, 16), idx, torch.rand(40, 3), torch.randn(40, 16)
    def got(): return split_outcome(processes, 2, experts, tensors, [25, 15], planted)
    if shows is None:
        with pytest.raises((AssertionError, RuntimeError)): got()
    else: assert shows<=set(unequal(got(), outcome(experts, *tensors)))

# ---------------------------------------------------------------- counts

@pytest.mark.parametrize('R', [1, 2, 4])
def test_rows_are_counted(processes, R):
    "What p says it sends to q is what q expects from p, expert by expert as a loop counts them"
    torch.manual_seed(R)
    E,shares = 3*R, [torch.rand(7+r, 3*R).topk(2).indices for r in range(R)]
    trips = processes(R, lambda r: X.plan(shares[r], E))
    for p,q in itertools.product(range(R), repeat=2):
        assert trips[p].sends[q]==trips[q].gets[p]==sum(e//3==q for e in shares[p].flatten().tolist())
    for q,trip in enumerate(trips):
        assert trip.expert.tolist()==[e%3 for idx in shares for e in sorted(idx.flatten().tolist()) if e//3==q]

@pytest.mark.parametrize('R', [1, 2, 4])
def test_even_choices_send_what_the_formula_says(processes, R):
    "A token that chooses one expert of each process"
    D,M,E = 6, 5, 3*R
    idx = 3*torch.arange(R)+torch.randint(3, (M, R))
    away = sum(sum(trip.sends)-trip.sends[p] for p,trip in enumerate(processes(R, lambda r: X.plan(idx, E))))
    assert away*D*2/(M*R)==X.bytes_sent(R, D, R)

@pytest.mark.parametrize('E,k,groups', [(6, 2, 3), (8, 3, 2), (6, 4, 6), (5, 5, 1), (9, 4, 3)])
def test_places_are_those_of_all_choices(E, k, groups):
    reached = [len({e*groups//E for e in chosen}) for chosen in itertools.combinations(range(E), k)]
    assert X.places(E, k, groups)==pytest.approx(sum(reached)/len(reached))

def test_slowdown():
    load = torch.ones(12)
    assert X.slowdown(load, 4)==1
    load[5] = 7
    for R in (1, 3, 12): assert X.slowdown(load, R)==pytest.approx((12/R+6)/(18/R))
    assert X.slowdown(load.long(), 12)==pytest.approx(7*12/18)

# ---------------------------------------------------------------- gradients of a whole part, tables

@pytest.mark.parametrize('R', [1, 2, 3])
def test_replicas_are_summed_and_experts_are_left_alone(processes, R):
    torch.manual_seed(R)
    whole = MoE(config(8, 4, 6, 2)).double()
    x = torch.randn(R, 5, 8).double()
    unused = nn.Linear(2, 2).double()                # with a gradient in the last process alone
    def loss(moe, x): return moe(x)[0].square().sum()
    def part(r):
        model = nn.ModuleList([X.split_experts(copy.deepcopy(whole)), copy.deepcopy(unused)])
        y = loss(model[0], x[r:r+1])
        (y+model[1](x[0,:,:2]).sum() if r==R-1 else y).backward()
        X.sum_gradients(model)
        return {n: p.grad for n,p in model[0].named_parameters()}, model[1].weight.grad
    parts = processes(R, part)
    loss(whole, x).backward()
    for name,p in whole.named_parameters():
        got = [grads[name] for grads,_ in parts]
        if '.experts.' in f'.{name}': assert_close(torch.cat(got), p.grad, rtol=1e-12, atol=1e-12)
        else:
            for g in got: assert_close(g, p.grad, rtol=1e-12, atol=1e-12)
    unused(x[0,:,:2]).sum().backward()
    for _,g in parts: assert_close(g, unused.weight.grad)

@pytest.mark.parametrize('R', [1, 2, 3, 6])
def test_a_table_by_rows(processes, R):
    for seed in range(4):
        torch.manual_seed(seed)
        whole,ids = nn.Embedding(12, 4), torch.randint(0, 12 if seed else 2, (R, 3, 5))
        dy = torch.randn(R, 3, 5, 4)
        def part(r):
            table = X.SplitTable(whole)
            out = table(ids[r])
            return out.detach(), torch.autograd.grad(out, table.weight, dy[r])[0]
        outs,grads = zip(*processes(R, part))
        assert torch.equal(torch.stack(outs), whole(ids))
        assert torch.equal(torch.cat(grads), torch.autograd.grad(whole(ids), whole.weight, dy)[0])

def test_a_whole_whale_is_split(processes):
    cfg = replace(tiny_v4(64), hidden_size=32, moe_intermediate_size=8)
    def held(r):
        torch.manual_seed(0)
        whale = X.split_experts(Whale(cfg))
        return sum(p.numel() for p in whale.parameters()), sum(p.numel() for p in X.replicas(whale))
    (all_,shared),(half,also) = held(0), processes(2, held)[1]
    assert shared==also and all_-half==(all_-shared)/2 and all_-shared==4*4*3*32*8       # three layers and MTP

def test_what_cannot_be_shared_is_refused(processes):
    with pytest.raises(ValueError, match='7 cannot be shared equally by 2 processes'):
        processes(2, lambda r: X.SplitExperts(Experts(config(8, 4, 7, 2))))
    with pytest.raises(ValueError, match='9 cannot be shared equally'): processes(2, lambda r: X.SplitTable(nn.Embedding(9, 2)))

# ---------------------------------------------------------------- two real processes

CASES = [(seed, dtype) for seed in range(4) for dtype in (torch.float32, torch.float64)]   # with seed 0 all boxes but one are empty

def six_steps(how):
    "Losses of a whale of one layer in float64, and how long its experts' gradient is at first"
    torch.manual_seed(0)
    whale = Whale(replace(tiny(64), hidden_size=32, num_hidden_layers=1, num_nextn_predict_layers=0, hc_sinkhorn_iters=2)).double()
    R,ids = X.n_ranks(), torch.randint(0, 64, (6, 12))
    X.split_experts(whale)
    opt = torch.optim.SGD(whale.parameters(), lr=.5)
    losses,norms = [], []
    for _ in range(6):
        loss = whale(ids[rank()::R], labels=ids[rank()::R]).loss
        (loss if how=='averaged' else loss/R).backward()
        X.sum_gradients(whale)
        if how=='averaged':
            for p in X.replicas(whale): p.grad /= R
        norms.append(X.total(sum(p.grad.square().sum() for n,p in whale.named_parameters() if '.experts.' in n)).sqrt().item())
        losses.append(X.total(loss.detach()/R).item())
        opt.step()
        opt.zero_grad()
    return losses, norms[0]

def work():
    "What each of the two processes does"
    torch.set_num_threads(1)
    with ranks(torch.device('cpu'), minutes=PATIENCE/60):
        halves = [case(seed, 2, dtype) for seed,dtype in CASES]
        got = [outcome(X.SplitExperts(experts), *(t.split(sizes)[rank()] for t in tensors)) for experts,tensors,sizes in halves]
        return dict(bits=got, right=six_steps('summed'), wrong=six_steps('averaged'))

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What both found: this process is the first, and starts the second"
    out = tmp_path_factory.mktemp('two')/'second.pt'
    store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    known = dict(WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True')
    path = dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests/tools')]), OMP_NUM_THREADS='1')
    second = subprocess.Popen([sys.executable, __file__, str(out)], env=os.environ | known | path | dict(RANK='1'), stderr=subprocess.PIPE, text=True)
    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as m:
            for name,value in (known | dict(RANK='0')).items(): m.setenv(name, value)
            first = work()
        err = second.communicate(timeout=PATIENCE)[1]
        assert not second.returncode, err[-2000:]
    finally:
        second.kill()
        torch.set_num_threads(threads)
    return first, torch.load(out)

def test_two_real_processes_to_the_bit(two):
    for (seed,dtype),first,second in zip(CASES, *(part['bits'] for part in two)):
        experts,tensors,_ = case(seed, 2, dtype)
        assert not unequal({name: torch.cat([first[name], second[name]]) for name in first}, outcome(experts, *tensors)), seed

def test_two_real_processes_train_one_whale(two):
    losses,norm = six_steps('summed')
    assert losses[-1]<losses[0]-.5
    for part in two: assert_close(part['right'], (losses, norm), rtol=1e-9, atol=0)

def test_gradients_that_nobody_averages_are_twice_as_long(two):
    "The planted bug: the loss falls, and only the comparison with one process sees it"
    losses,norm = six_steps('summed')
    for part in two:
        wrong,length = part['wrong']
        assert wrong[-1]<wrong[0]-.5 and abs(wrong[-1]-losses[-1])<.05 and length==pytest.approx(2*norm, rel=1e-9)

if __name__=='__main__': torch.save(work(), sys.argv[1])
