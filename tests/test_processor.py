"""What is asked of a processor, and what a run, a benchmark and a loaded model do where bfloat16 is a trap"""
import json
import pytest, torch
from nanowhale import cli, processor, run
from nanowhale.fast import bench
from nanowhale.processor import Processor, bf16_by_flags, differs, float32_library, instruction_set, machine_facts
from nanowhale.run import choose_precision, new_spec
from nanowhale.train import loop
from runs import SMALL, jsonl, last_line, nanowhale, texts

MACHINES = {   # what Linux says -> instruction set, library, bfloat16
    'GenuineIntel avx2 avx512f avx512_bf16 amx_bf16': ('AMX', 'blas', True),
    'GenuineIntel avx2 avx512f': ('AVX512', 'blas', False),
    'AuthenticAMD avx2 avx512f avx512_bf16': ('AVX512 with bf16', 'onednn', True),
    'AuthenticAMD avx2': ('AVX2', 'blas', False),
    'SomeoneElse avx2 avx512f': ('AVX512', 'blas', False)}   # unknown: plain torch

@pytest.mark.parametrize('says', MACHINES)
def test_machines(says, monkeypatch):
    monkeypatch.delenv('NANOWHALE_PRODUCTS', raising=False)
    maker,*flags = says.split()
    p = processor.read_cpuinfo(f'vendor_id\t: {maker}\nmodel name\t: A 1\nflags\t\t: {" ".join(flags)}\n')
    capability = 'AVX512' if 'avx512f' in flags else 'AVX2'
    kind,library,half = MACHINES[says]
    if not hasattr(torch.ops.mkldnn, '_linear_pointwise'): library = 'blas'
    assert (instruction_set(p, capability), float32_library(p, capability)[0], bf16_by_flags(p, capability))==(kind, library, half)
    assert instruction_set(p, 'AVX2')=='AVX2'       # held back by the environment

def test_the_choice_can_be_overruled(monkeypatch):
    amd = Processor('', 'AuthenticAMD', frozenset({'avx512f'}))
    monkeypatch.setenv('NANOWHALE_PRODUCTS', 'blas')
    assert float32_library(amd, 'AVX512')==('blas', 'by NANOWHALE_PRODUCTS')
    monkeypatch.setenv('NANOWHALE_PRODUCTS', 'quick')
    with pytest.raises(ValueError, match='choose onednn or blas'): float32_library()
    monkeypatch.setenv('NANOWHALE_PRODUCTS', 'onednn')
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='built without it; use blas'): float32_library()

def test_where_flags_are_silent_five_pairs_decide(monkeypatch):
    monkeypatch.setattr(processor, 'bf16_by_flags', lambda: None)
    for pace,good in ((0.03, False), (2.5, True)):
        monkeypatch.setattr(processor, 'bf16_pace', lambda: pace)
        processor.bf16_here.cache_clear()
        assert processor.bf16_here()[0]==good and f'{pace}' in processor.bf16_here()[1]
    processor.bf16_here.cache_clear()

@pytest.mark.parametrize('flags', [False, True])
def test_where_flags_speak_nothing_is_timed(flags, monkeypatch):
    monkeypatch.setattr(processor, 'bf16_by_flags', lambda: flags)
    monkeypatch.setattr(processor, 'bf16_pace', pytest.fail)
    processor.bf16_here.cache_clear()
    assert processor.bf16_here()[0]==flags and (processor.slow_bf16() is None)==flags
    processor.bf16_here.cache_clear()

@pytest.fixture
def trap(monkeypatch):
    def slow(): return 'bf16 products are slow on an old one (AVX2)'
    for module in (run, bench, processor): monkeypatch.setattr(module, 'slow_bf16', slow)

def test_a_run_in_a_trap(trap, capsys):
    half,large = new_spec(precision='bf16'), new_spec('nanowhale_100m')
    with pytest.raises(ValueError, match='use --precision fp32, or --force'): choose_precision(half, None, True, False)
    assert large['recipe']['precision']=='bf16'
    assert choose_precision(large, None, False, False)[0]['recipe']['precision']=='fp32'
    assert 'this run computes in fp32' in capsys.readouterr().err
    for spec,last,asked,force in ((half, None, True, True), (large, None, False, True), (half, 'step', True, False)):
        assert choose_precision(spec, last, asked, force)[0]['recipe']['precision']=='bf16'
    assert half['recipe']['precision']=='bf16' and 'processor' not in half     # what was given is left alone

def test_a_run_goes_on_elsewhere_and_says_so(capsys):
    here = machine_facts()
    spec = dict(new_spec(), processor=dict(here, instructions='another'))
    assert choose_precision(spec, 'step', False, False)[0]['processor']['instructions']=='another'   # where it began
    assert 'the last digits will differ' in capsys.readouterr().err
    choose_precision(dict(spec, processor=here), 'step', False, False)
    choose_precision(new_spec(), 'step', False, False)      # a run from before processors were noted
    assert not capsys.readouterr().err and differs(None, here) is None

def test_the_benchmark_in_a_trap(trap, tmp_path):
    with pytest.raises(ValueError, match='use fp32, or force it'): bench.bench('tiny', 1, 8, 'bf16', device='cpu', out=None)

def test_a_model_of_half_precision_in_a_trap(trap, tmp_path, capsys):
    from nanowhale.model.whale import Whale
    from nanowhale.presets import tiny
    from nanowhale.train.data import train_tokenizer
    folder = tmp_path/'half'
    Whale(tiny(300)).bfloat16().save_pretrained(folder)
    train_tokenizer(texts(20), 300).save_pretrained(folder)
    whale,_ = cli.load(torch.device('cpu'), folder)
    assert whale.lm_head.weight.dtype==torch.float32 and 'taken as float32' in capsys.readouterr().err

@pytest.mark.parametrize('same', [True, False])
def test_a_device_that_nobody_tried_must_agree(same, monkeypatch, capsys):
    "`meta` stands for a device that is no CPU and no GPU of NVIDIA's"
    monkeypatch.setattr(loop, 'agrees', lambda device: same)
    if same:
        assert loop.pick_device('meta').type=='meta' and 'never tried by its authors' in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="first product is not the CPU's; use cpu"): loop.pick_device('meta')

def test_a_cpu_agrees_with_itself(): assert loop.agrees(torch.device('cpu'))

def test_a_run_notes_its_processor(tmp_path):
    (tmp_path/'words.jsonl').write_text(jsonl(texts()))
    code,err = nanowhale('train', '--data', 'words.jsonl', '--steps', '2', '--evals', '1', *SMALL, '--out', 'x', cwd=tmp_path)
    assert code==0, last_line(err)
    kept = json.loads((tmp_path/'x'/'run.json').read_text())['processor']
    assert kept==json.loads(json.dumps(machine_facts()))
