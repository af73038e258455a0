"""pytest in the checkout: the package is importable uninstalled, no network or window is used, and the flags that mark
notebook cells (`tst_flags` of settings.ini) mark tests as well: `@pytest.mark.slow` runs with `pytest --flags slow`.
`pytest --used` tells how much of its limit each numerical comparison used (tests/tools/used.py)."""
import os
from configparser import ConfigParser

import pytest

from paths import ROOT

for name,value in dict(HF_HUB_OFFLINE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false').items(): os.environ.setdefault(name, value)

ini = ConfigParser(interpolation=None)
ini.read(ROOT/'settings.ini', encoding='utf-8')
FLAGS = ini['DEFAULT']['tst_flags'].split()

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help=f'run these tests too, separated by spaces: {" ".join(FLAGS)}')
    parser.addoption('--used', action='store_true', help='how much of its limit each numerical comparison used')
    parser.addoption('--used-out', metavar='FILE', help='with --used: the whole list as JSON')

def pytest_configure(config):
    if hasattr(config.option, 'loadscopereorder'): config.option.loadscopereorder = False   # in the order below
    if config.getoption('used'):
        import used
        config.pluginmanager.register(used.Plugin(config), 'used')
    for flag in FLAGS: config.addinivalue_line('markers', f'{flag}: runs only with --flags {flag}')

SLOWEST = 'parallel bench graph checkpoint run cli hub chat speculate whale stream'.split()   # files that take a minute or so

def pytest_collection_modifyitems(config, items):
    """Slow files first: with several processes, the last ones to be handed out are then short"""
    first = {f'test_{name}': i for i,name in enumerate(SLOWEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))
    for item in items:
        for flag in set(FLAGS)-set(config.getoption('--flags').split()):
            if flag in item.keywords: item.add_marker(pytest.mark.skip(reason=f'needs --flags {flag}'))

@pytest.fixture
def one_thread():
    "Toys are too small to share between threads, which also cut products into pieces of other sizes"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
