"""The tool for a GPU that is seldom there: rehearsed on a processor from packing to report, and killed, failed and cut in every part"""
import json, os, random, signal, subprocess, sys, tarfile, time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
import pytest, torch

if not hasattr(os, 'fork'): pytest.skip('parts are forked', allow_module_level=True)

import gpu, gpu_parts
from gpu_parts import PARTS, Part
from nanowhale.train.data import train_tokenizer
from runs import ROOT, environment, jsonl, texts

TOOL = ROOT/'tests'/'tools'/'gpu.py'

def packed_in(folder, words=None):
    "A small text and its tokenizer, packed"
    words = words or texts(300)
    (folder/'text.jsonl').write_text(jsonl(words))
    train_tokenizer(words[:20], 300).save_pretrained(folder/'tokenizer')
    gpu.main(['pack', '--data', str(folder/'text.jsonl'), '--tokenizer', str(folder/'tokenizer'), '--no-wheels', '--pack', str(folder/'pack')])
    return folder/'pack'

# ---------------------------------------------------------------- the rehearsal

@pytest.fixture(scope='module')
def came_back(tmp_path_factory):
    "The folder of results, and the archive, of a rehearsal of all parts"
    home = tmp_path_factory.mktemp('gpu')
    words = ['run', '--small', '--pack', packed_in(home), '--results', home/'results', '--archive', home/'gpu.tar.gz']
    done = subprocess.run([sys.executable, TOOL, *map(str, words)], cwd=home, env=environment(), capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-2000:]
    return home/'results', home/'gpu.tar.gz'

def of(folder, part): return json.loads((folder/f'{part}.json').read_text())

def test_every_part_ends_and_every_file_appears(came_back):
    folder,archive = came_back
    head = of(folder, 'run')
    assert {k: r['ended'] for k,r in head['parts'].items()}=={p.key: 'done' for p in PARTS}
    assert head['rehearsal'] and head['seed']==0 and head['commit'] and head['command'].startswith('python3 tests/tools/gpu.py run --small')
    pictures = {f'{n}-{kind}.png' for n in ('card', 'whale') for kind in ('loss', 'expert-load')}
    wanted = {'run.json', *pictures, *(f'{p.key}.{end}' for p in PARTS for end in ('json', 'txt'))}
    assert {f.name for f in folder.iterdir()}==wanted
    with tarfile.open(archive) as tar: assert {n.removeprefix('gpu/') for n in tar.getnames()}==wanted
    assert archive.stat().st_size<2**24
    assert 'error' not in json.dumps([of(folder, p.key) for p in PARTS])

def test_what_is_measured(came_back):
    folder,_ = came_back
    machine = of(folder, 'machine')
    assert machine['name'] and machine['torch'] and machine['transformers'] and set(machine['ceilings'])=={'fp32', 'bf16', 'copy', 'read'}
    sound = of(folder, 'sound-kernels') | of(folder, 'sound-compiling')
    assert len(sound)==4*len(gpu_parts.cases(gpu_parts.SMALL, torch.device('cpu')))+3 and all(r['ok'] for r in sound.values())
    speed = of(folder, 'speed-training')
    assert len(speed['largest kernels'])==10 and {'2 rows, with MTP', '2 rows, without MTP'}<=set(speed)
    assert set(of(folder, 'speed-peer'))=={'transformers, eager', 'transformers, compiled', 'nanowhale, eager'}
    assert of(folder, 'speed-peer')['nanowhale, eager']['loss']==pytest.approx(of(folder, 'speed-peer')['transformers, eager']['loss'], abs=1e-4)
    assert {'nanowhale compiled, 1 row', 'nanowhale compiled, 3 rows', 'prefill'}<=set(of(folder, 'speed-writing'))
    assert all(list(r.values())[0]>0 for r in of(folder, 'tune').values())

def test_both_recipes_learn_from_the_same_tokens(came_back):
    folder,_ = came_back
    card,whale = of(folder, 'train-card'), of(folder, 'train-whale')
    assert card['recipe']=='card, scaled to 1,536 tokens' and whale['recipe']=='whale, scaled to 1,536 tokens'
    assert card['steps']==whale['steps']==card['planned_steps'] and card['n']==whale['n']==1
    assert [t for t,_ in card['held_out']]==[t for t,_ in whale['held_out']]==[512, 1024, 1536]
    assert card['results']['held-out bytes']==whale['results']['held-out bytes'] and len(whale['samples'])==3
    assert whale['resume']['to_the_bit'] and whale['resume']['steps_taken_twice']>0
    assert 0<card['repeats']<1

def test_the_report_and_the_chapter(came_back, tmp_path, monkeypatch, capsys):
    folder,archive = came_back
    with pytest.raises(SystemExit, match='rehearsal'): gpu.main(['report', str(archive)])
    out = tmp_path/'results'/'gpu.json'
    out.parent.mkdir()
    gpu.main(['report', str(folder), str(archive), '--out', str(out)])
    whole = json.loads(out.read_text())
    assert 'rehearsal' in whole['says'] and len(whole['goals'])==5 and {p.key for p in PARTS}<=set(whole)
    (tmp_path/'nbs'/'5_evidence').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'nbs'/'5_evidence')
    for there in (True, False):
        if not there: out.unlink()
        said = chapter(capsys)
        assert ('rehearsal' in said)==there and ('No GPU was at hand' in said)==(not there)
        assert ('card, scaled to 1,536 tokens (n = 1' in said)==there

def chapter(capsys):
    "What the cells of the chapter of results say about a GPU"
    cells = json.loads((ROOT/'nbs'/'5_evidence'/'49_results.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type']=='code']
    begin = next(i for i,s in enumerate(sources) if 'gpu.json' in s)
    capsys.readouterr()
    scope = {}
    for s in [*sources[:2], *(s for s in sources[begin:] if 'gpu' in s)]: exec(s, scope)
    return capsys.readouterr().out

# ---------------------------------------------------------------- kills, failures, bounds

def quick(note, job): note(figure=1, done=True)

def endless(note, job):
    n = 0
    while True:
        n += 1
        note(n=n, pid=os.getpid(), much=['x'*100]*200)

def fails(note, job):
    note(figure=1)
    raise ValueError('no such thing')

def killed(note, job):
    note(figure=1)
    os.kill(os.getpid(), signal.SIGKILL)

def asked(folder, **more):
    "What `go_through` is told"
    return SimpleNamespace(**dict(results=folder/'results', archive=folder/'gpu.tar.gz', pack=folder, minutes=1, seed=0, commit='', tokens=None, device='cpu',
        small=True) | more)

def go(folder, parts, **more): gpu.go_through(parts, asked(folder, **more), folder, time.time())

def named(k, f): return [p._replace(f=f if i==k else quick) for i,p in enumerate(PARTS)]

def gone(pid):
    try: return Path(f'/proc/{pid}/status').read_text().split('State:')[1].split()[0]=='Z'
    except FileNotFoundError: return True

@pytest.mark.parametrize('k', range(len(PARTS)), ids=[p.key for p in PARTS])
def test_a_kill_in_any_part_leaves_the_earlier_ones_whole(k, tmp_path):
    p = get_context('fork').Process(target=go, args=(tmp_path, named(k, endless)))
    p.start()
    file = tmp_path/'results'/f'{PARTS[k].key}.json'
    while not file.exists(): time.sleep(0.01)
    time.sleep(random.Random(k).random()/3)
    p.kill()
    p.join()
    folder = tmp_path/'results'
    last = of(folder, PARTS[k].key)                  # whole, although it was being written
    for _ in range(100):
        if gone(last['pid']): break
        time.sleep(0.1)
    assert gone(last['pid'])
    for part in PARTS[:k]: assert of(folder, part.key)==dict(figure=1, done=True)
    ended = [r['ended'] for r in of(folder, 'run')['parts'].values()]
    assert ended==['done']*k+['stopped in the middle']
    with tarfile.open(tmp_path/'gpu.tar.gz') as tar:
        for part in PARTS[:k]: assert json.load(tar.extractfile(f'gpu/{part.key}.json'))==dict(figure=1, done=True)

def test_one_that_fails_is_killed_or_takes_too_long_leaves_a_line_and_the_next_begins(tmp_path):
    toys = [Part('a', 'fails', 9, fails), Part('a', 'killed', 9, killed), Part('b', 'endless', 1, endless), Part('b', 'quick', 9, quick)]
    go(tmp_path, toys)
    folder = tmp_path/'results'
    parts = of(folder, 'run')['parts']
    assert [r['ended'] for r in parts.values()]==['failed: ValueError: no such thing', f'killed by signal {signal.SIGKILL.value}',
        'cut after 1 s, its bound', 'done']
    assert [of(folder, t.key).get('figure') for t in toys]==[1, 1, None, 1] and gone(of(folder, 'b-endless')['pid'])
    with tarfile.open(tmp_path/'gpu.tar.gz') as tar: assert {'gpu/a-fails.json', 'gpu/b-quick.json', 'gpu/a-fails.txt'}<=set(tar.getnames())

def test_no_time_is_left(tmp_path):
    go(tmp_path, [Part('a', 'first', 9, quick)], minutes=0.01)
    assert of(tmp_path/'results', 'run')['parts']['a-first']['ended']=='left out: no time was left'

def test_a_signal_ends_it_with_the_archive(tmp_path):
    p = get_context('fork').Process(target=terminated, args=(tmp_path,))
    p.start()
    while not (tmp_path/'results'/'b-endless.json').exists(): time.sleep(0.01)
    os.kill(p.pid, signal.SIGTERM)
    p.join()
    assert p.exitcode==128+signal.SIGTERM and gone(of(tmp_path/'results', 'b-endless')['pid'])
    with tarfile.open(tmp_path/'gpu.tar.gz') as tar: assert 'gpu/a-quick.json' in tar.getnames()

def terminated(folder):
    signal.signal(signal.SIGTERM, gpu.stop)
    go(folder, [Part('a', 'quick', 9, quick), Part('b', 'endless', 60, endless)])

def test_parts_are_chosen_by_name():
    assert [p.key for p in gpu.chosen(['sound'], PARTS)]==['sound-kernels', 'sound-compiling']
    assert [p.key for p in gpu.chosen(['tune', 'peer'], PARTS)]==['speed-peer', 'tune'] and gpu.chosen([], PARTS)==PARTS
    with pytest.raises(SystemExit, match="no part 'tuna': choose of card, "): gpu.chosen(['tuna'], PARTS)

def test_the_bounds_fit_into_the_minutes():
    assert sum(p.seconds for p in PARTS)<=9*60 and {p.section for p in PARTS}=={'machine', 'sound', 'speed', 'train', 'tune'}
    assert sum(p.seconds for p in PARTS if p.section=='sound')==60

def test_what_an_archive_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'MOST_ARCHIVED', 1000)
    monkeypatch.setattr(gpu, 'LOG', 50)
    for name,size in {'a.json': 100, 'b.json': 2000, '.c.json': 1, 'model.safetensors': 5, 'log.txt': 500, **{f'{i}.png': 10 for i in range(6)}}.items():
        (tmp_path/name).write_bytes(b'x'*size)
    gpu.archive(tmp_path, tmp_path/'x.tar.gz')
    with tarfile.open(tmp_path/'x.tar.gz') as tar:
        assert tar.getnames()==['gpu/a.json', *(f'gpu/{i}.png' for i in range(4)), 'gpu/log.txt'] and tar.getmember('gpu/log.txt').size==50

# ---------------------------------------------------------------- packing, and what the figures come to

def test_a_text_comes_back_as_it_was(tmp_path):
    words = [*texts(20), 'two\nlines', 'naïve 🐳', 'a\u2028b']
    folder = packed_in(tmp_path, words)
    rows = [json.loads(line)['text'] for line in gpu.unpack_text(folder, tmp_path/'out.jsonl').read_text().splitlines()]
    assert sorted(rows)==sorted(words) and rows!=words
    assert gpu.read(folder/'pack.json')['documents']==len(words)

def test_too_much_is_refused_and_the_old_pack_stays(tmp_path, monkeypatch):
    before = (packed_in(tmp_path)/'pack.json').read_bytes()
    monkeypatch.setattr(gpu, 'MOST_PACKED', 100)
    with pytest.raises(SystemExit, match='MiB are more than'): packed_in(tmp_path, texts(10))
    assert (tmp_path/'pack'/'pack.json').read_bytes()==before

def test_all_that_is_packed_was_tested():
    for name in gpu.MISSING: assert gpu.tested(name)[0].isdigit()

def test_the_share_of_tokens():
    def runs(whale, steps=9): return {'train-card': dict(held_out=[[50, 3.], [100, 2.]], steps=steps, planned_steps=9), 'train-whale': dict(held_out=whale)}
    assert gpu_parts.share_of_tokens(runs([[50, 2.5], [100, 1.5]]))==0.75
    assert gpu_parts.share_of_tokens(runs([[50, 1.9], [100, 1.5]]))==0.5
    for none in (runs([[50, 2.5], [100, 2.1]]), runs([[50, 1.9]], steps=5), {}): assert gpu_parts.share_of_tokens(none) is None

def test_goals_and_headline_say_what_was_measured():
    found = {'machine': dict(name='NVIDIA H200'), 'speed-training': {'8 rows, without MTP': dict(tokens_per_second=9e5, mfu=0.41),
        '8 rows, with MTP': dict(error='out of memory'), '16 rows, without MTP': dict(tokens_per_second=1e6, mfu=0.45)},
        'speed-peer': {'transformers, compiled': dict(tokens_per_second=3e5)}}
    assert [g['reached'] for g in gpu_parts.goals(found)]==[0.45, None, 3.0, None, None]
    said = gpu_parts.headline(dict(rehearsal=False, commit='abc'), found)
    assert said=='On one NVIDIA H200 the 110M whale trains at 1,000,000 tokens a second without MTP (45% of its bf16 peak) (n = 1, commit abc).'

def test_the_later_of_two_runs_counts_where_it_measured_something(tmp_path):
    for i,(a,b) in enumerate(((dict(x=1), dict(y=1)), (dict(x=2), {}))):
        folder = tmp_path/str(i)
        folder.mkdir()
        rows = dict(a=dict(ended='done'), b=dict(ended='done' if b else 'failed'))
        for name,value in dict(run=dict(parts=rows, rehearsal=False, commit='c'), a=a, **(dict(b=b) if b else {})).items():
            (folder/f'{name}.json').write_text(json.dumps(value))
    head,found = gpu.merged([tmp_path/'0', tmp_path/'1'])
    assert found==dict(a=dict(x=2), b=dict(y=1)) and head['parts']['b']['ended']=='done'
