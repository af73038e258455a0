"""What stored outputs hang on: a change that may change them is seen, any other is not, and nothing is read that was not counted."""
import json, os, subprocess, sys
import pytest
import inputs, notebooks

def notebook(*cells): return dict(cells=[dict(cell_type='code', source=c, metadata={}, outputs=[], execution_count=None, id=f'{i:08x}')
    for i,c in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5)

FILES = {
    'nanowhale/__init__.py': 'from nanowhale import moved\n', 'nanowhale/last.py': '',
    'nanowhale/moved.py': "PUBLIC = {'part.Whale': 'part.whale'}\nMOVED = {'part': 'part.whale last'}\n",
    'nanowhale/part/__init__.py': '', 'nanowhale/part/whale.py': "from .plain import norm\nsave = later('files.save')\nclass Whale: pass\n",
    'nanowhale/part/plain.py': '# %% ../../nbs/1_part/01_plain.ipynb\ndef norm(x): return x\n', 'nanowhale/files.py': 'def save(x): pass\n',
    'nanowhale/other.py': 'from .part import plain\n', 'nbs/1_part/01_plain.ipynb': '{}', 'tests/tools/cut.py': '',
    'results/a.json': '[1]', 'results/b.json': '[2]', 'tested.txt': 'torch==2.0\n'}

def forget():
    "What was read once"
    for f in (inputs.everything, inputs.asked, inputs.behind, inputs.content, inputs.versions, inputs.moved): f.cache_clear()

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A small project, and the digest of a notebook in it, computed anew"
    for name,text in FILES.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    monkeypatch.setattr(inputs, 'ROOT', tmp_path)
    monkeypatch.setattr(inputs, 'version', dict(torch='2.0+cpu').__getitem__)
    def seen(*cells, env='1'):
        forget()
        return inputs.digest(notebook(*cells), dict(A=env))
    yield tmp_path, seen
    monkeypatch.undo()
    forget()

USES = dict(
    module='from nanowhale.part.whale import Whale', package='from nanowhale.part import Whale', whole='import nanowhale.part.whale as w',
    lookup='from nanowhale.part import plain', result="read('../../results/a.json')", folder="read(f'../../results/{name}.json')",
    process='import subprocess', own='x = 1')

@pytest.mark.parametrize('use,file,counts', [
    ('module', 'nanowhale/part/whale.py', True), ('module', 'nanowhale/part/plain.py', True), ('module', 'nanowhale/files.py', True),
    ('module', 'nanowhale/part/__init__.py', True), ('module', 'nanowhale/__init__.py', True),
    ('module', 'nanowhale/other.py', False), ('module', 'results/a.json', False), ('module', 'nbs/1_part/01_plain.ipynb', False),
    ('package', 'nanowhale/part/plain.py', True), ('package', 'nanowhale/other.py', False),
    ('lookup', 'nanowhale/last.py', True), ('module', 'nanowhale/last.py', False),
    ('whole', 'nanowhale/part/plain.py', True),
    ('result', 'results/a.json', True), ('result', 'results/b.json', False), ('folder', 'results/b.json', True),
    ('process', 'nanowhale/other.py', True), ('process', 'results/b.json', True), ('process', 'tests/tools/cut.py', True),
    ('own', 'nanowhale/part/whale.py', False)])
def test_a_changed_file_is_seen_where_it_counts(project, use, file, counts):
    root,seen = project
    before = seen(USES[use])
    assert seen(USES[use])==before
    (root/file).write_text(FILES[file]+' ')
    assert (seen(USES[use])!=before)==counts

def test_a_new_result_code_version_and_environment_are_seen(project, monkeypatch):
    root,seen = project
    before = [seen(u) for u in ('x = 1', USES['folder'], "read('../../results/c.json')")]
    (root/'results/c.json').write_text('[3]')
    after = [seen(u) for u in ('x = 1', USES['folder'], "read('../../results/c.json')")]
    assert [a==b for a,b in zip(before, after)]==[True, False, False]
    (root/'results/__pycache__').mkdir()
    assert seen(USES['folder'])==after[1]      # a folder in it is none of its files
    assert len({before[0], seen('x = 2'), seen('x = 1', ''), seen('x = 1', env='2')})==4
    monkeypatch.setattr(inputs, 'version', dict(torch='2.0').__getitem__)
    assert seen('x = 1')==before[0]      # another build of the same
    monkeypatch.setattr(inputs, 'version', dict(torch='2.1').__getitem__)
    assert seen('x = 1')!=before[0]

def test_text_and_outputs_do_not_count():
    nb = notebook('x = 1')
    before = inputs.digest(nb, {})
    nb['cells'][0]['outputs'] = [dict(output_type='stream', name='stdout', text='1')]
    nb['cells'].append(dict(cell_type='markdown', source='Some words', metadata={}, id='9'))
    assert inputs.digest(nb, {})==before

def ran(path, *words):
    done = subprocess.run([sys.executable, inputs.ROOT/'tests/tools/notebooks.py', *words, str(path)], capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(inputs.ROOT)})
    return done.returncode, done.stdout

def test_a_run_leaves_the_digest_and_what_was_not_counted_fails(tmp_path):
    "In one go: imports take seconds. Each cheat hides from `inputs.files` what it reads"
    good = tmp_path/'good.ipynb'
    good.write_text(json.dumps(notebook('#| default_exp x', 'from nanowhale.model.config import WhaleConfig\nprint(WhaleConfig().hc_mult)')))
    assert ran(good, 'run')[0]==0
    nb = json.loads(good.read_text())
    assert nb['cells'][1]['outputs'][0]['text']==['4\n'] and notebooks.fresh(nb)
    nb['cells'][1]['source'] = ['print(5)']
    assert not notebooks.fresh(nb)
    for cheat in ("import nanowhale\nopen(nanowhale.__path__[0]+'/../LIC'+'ENSE').close()", "exec('from nanowhale' '.model import rope')"):
        bad = tmp_path/'bad.ipynb'
        bad.write_text(json.dumps(notebook(cheat)))
        code,said = ran(bad, 'check')
        assert code==1 and 'does not count among its inputs' in said, cheat
