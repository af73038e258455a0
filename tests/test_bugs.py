"""Every check of tests/tools/bugs.py is green on the healthy code, and red on the bug it is there for; mutate.py finds its places"""
import sys
import pytest
import mutate
from bugs import BUGS, CHECKS, planted, red, same_as_transformers


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_healthy(check): check()

@pytest.mark.parametrize('b', BUGS, ids=lambda b: f'{b.number}-{b.name}'.replace(' ', '_'))
def test_planted(b):
    with planted(b): assert red(b.check), f'planted "{b.name}", and {b.check.__name__} stayed green'

def test_bugs_are_taken_back():
    before = [mod.__dict__.copy() for name,mod in sorted(sys.modules.items()) if name.startswith('nanowhale.')]
    for b in BUGS:
        with planted(b): pass
    assert before==[mod.__dict__ for name,mod in sorted(sys.modules.items()) if name.startswith('nanowhale.')]
    for check in CHECKS[:3]: check()

def test_every_check_is_needed():
    assert set(CHECKS)==({b.check for b in BUGS} | {same_as_transformers})

def test_small_mistakes_can_be_planted(monkeypatch):
    "Each text that tests/tools/mutate.py would change is there, once"
    assert list(mutate.misplaced())==[]
    monkeypatch.setattr(mutate, 'MUTANTS', [('model.rope', 'no such text', ''), ('model.gone', 'x', 'y'), ('model.rope', 'def ', '')])
    wrong = list(mutate.misplaced())
    assert len(wrong)==4 and all('once' in w or 'model.gone' in w for w in wrong)
