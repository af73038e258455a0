"""Campaigns: planned, stopped and gone on with, shared by processes."""
import subprocess, sys, time
from argparse import Namespace
from pathlib import Path
import pytest
import plans
from nanowhale.fast.bench import add_to, read_entries
from nanowhale.lab.compare import by_seed
from nanowhale.presets import tiny
from nanowhale.train.recipe import get_recipe

ROOT = Path(__file__).resolve().parents[1]

def campaign(made, n=6, arms=('base', 'new')):
    def run(arm, s): return plans.Run(dict(arm=arm, seed=s, steps=9), arm, lambda: 1800., lambda: made.append((arm, s)) or dict(loss=s))
    return [run(arm, s) for arm in arms for s in range(n//2)]

def asked(path, **more): return Namespace(**dict(plan=False, part='0/1', out=str(path)) | more)

def test_a_plan_says_what_is_missing_and_makes_nothing(tmp_path, capsys):
    made,path = [], tmp_path/'a.json'
    plans.go(campaign(made), asked(path, plan=True), 'c')
    said = capsys.readouterr().out
    assert not made and not path.exists() and '6 of 6 runs are to be made: about 3.0 hours' in said and '0 1 2' in said
    add_to(path, dict(arm='base', seed=1, steps=9, loss=1), ('arm', 'seed'))
    plans.go(campaign(made), asked(path, plan=True), 'c')
    said = capsys.readouterr().out
    assert '5 of 6 runs' in said and [line.split()[:3] for line in said.splitlines()[1:3]]==[['base', '3', '1'], ['new', '3', '0']]

def test_a_stopped_campaign_goes_on_and_keeps_whole_comparisons(tmp_path):
    made,path = [], tmp_path/'a.json'
    runs = campaign(made)
    def stops(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): plans.go([*runs[:3], runs[3]._replace(measure=stops), *runs[4:]], asked(path), 'c')
    assert made==[('base', 0), ('base', 1), ('base', 2)]
    plans.go(runs, asked(path), 'c')
    assert made==[('base', 0), ('base', 1), ('base', 2), ('new', 0), ('new', 1), ('new', 2)]
    assert by_seed(read_entries(path), 'loss', arm='new')=={0: 0, 1: 1, 2: 2}

def test_parts_share_the_runs(tmp_path):
    made,path = [], tmp_path/'a.json'
    for i in range(2):
        before = len(made)
        plans.go(campaign(made), asked(path, part=f'{i}/2'), 'c')
        assert len(made)-before==3
    assert len(set(made))==6==len(read_entries(path))

@pytest.mark.parametrize('word', ['', '2/2', '1', '-1/2', 'a/b', '0/0'])
def test_no_part(word, tmp_path):
    with pytest.raises(SystemExit, match='is no part: 0/2 is the first of two'): plans.go([], asked(tmp_path/'a.json', part=word), 'c')

def test_no_folder(tmp_path):
    with pytest.raises(SystemExit, match='there is no folder'): plans.go([], asked(tmp_path/'none'/'a.json'), 'c')

AT_ONCE = """
import sys
from nanowhale.fast.bench import add_to
for i in range(40): add_to(sys.argv[1], dict(who=sys.argv[2], i=i), ('who', 'i'))
"""

@pytest.mark.skipif(sys.platform=='win32', reason='has no such locks')
def test_processes_that_add_to_one_file_lose_nothing(tmp_path):
    path = tmp_path/'a.json'
    started = [subprocess.Popen([sys.executable, '-c', AT_ONCE, str(path), str(i)], cwd=ROOT) for i in range(3)]
    assert [p.wait() for p in started]==[0, 0, 0]
    assert len(read_entries(path))==120 and [p.name for p in tmp_path.iterdir()]==['a.json']

def test_a_grid_goes_on_past_its_edge():
    assert plans.beyond([0.003, 0.006, 0.012], 0.006) is None
    assert plans.beyond([0.012, 0.003, 0.006], 0.012)==pytest.approx(0.024) and plans.beyond([0.003, 0.006], 0.003)==pytest.approx(0.0015)

def test_a_pace_is_that_of_a_step():
    cfg,recipe = tiny(64), get_recipe('tiny', batch_size=1, context=8)
    began = time.process_time()
    pace = plans.pace(cfg, recipe)
    assert 0<pace<time.process_time()-began and plans.pace(cfg, recipe)==pace
