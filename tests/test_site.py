"""The site: what its builder makes of notebooks and modules; and, slow, every page of _site/ in a real browser"""
import ast, importlib.util, json, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'nbs/site'))
import api, browser  # noqa: E402
spec = importlib.util.spec_from_file_location('site_build', ROOT/'nbs/site/build.py')   # `build` is another package's name, too
build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build)

NOTEBOOKS = [ROOT/'nbs/index.ipynb', *build.chapters()]

def cell(text, kind='code'): return dict(cell_type=kind, metadata={}, source=text) | (dict(outputs=[], execution_count=None) if kind=='code' else {})
def notebook(*cells): return dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)

# ---------------------------------------------------------------- what the builder makes

def test_directives_go_and_source_stays():
    nb = notebook(cell('# T\n\n> sub\n\ntext', 'markdown'), cell('#| default_exp x'), cell('#| hide\nsecret'),
        cell('#| export\ndef f(): return 1'), cell('#| echo: false\n1'))
    page = build.page('9_part/98_x', nb, {})
    said = [''.join(c['source']) for c in page['cells']]
    assert 'def f(): return 1' in said and not any('#|' in s or 'secret' in s for s in said)
    assert page['cells'][-1]['metadata']['tags']==['remove-input']
    assert 'colab' in said[0] and '../notebooks/9_part/98_x.ipynb' in said[0] and 'api/x.html' in said[0] and '{.subtitle}\n> sub' in said[0]

def test_explorers_come_before_the_exercises(monkeypatch):
    monkeypatch.setattr(build, 'shown', lambda: dict(rope=('1_part/01_rope', 'turn it')))
    for last in ('costs.\n\n## Exercises\n\n1. do', '## Recap'):
        said = [c['source'] for c in build.page('1_part/01_rope', notebook(cell('# T', 'markdown'), cell(last, 'markdown')), {})['cells']]
        assert len(said)==2 and said[1].count('../explorers/rope/index.html')==2 and said[1].index('iframe')<said[1].index(last[-12:])
    assert 'iframe' in build.page('1_part/01_rope', notebook(cell('# T', 'markdown')), {})['cells'][-1]['source']
    assert 'iframe' not in str(build.page('1_part/02_mla', notebook(cell('# T\n\n## Recap', 'markdown')), {}))

def test_names_become_links_once_and_only_in_prose():
    text = '# `f` here\n\n`f` and `f`, `g`, $a`f`b$, [`f`](x)\n\n```python\n`f`\n```'
    assert build.link_names(text, dict(f='api-m-f'), set())==text.replace('\n\n`f` and', '\n\n[`f`](#api-m-f) and', 1)

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_install_cell_goes_into_every_copy(nb):
    before,after = build.read(nb),build.with_install(build.read(nb), build.name_of(nb))
    assert [c for c in after['cells'] if c.get('id')!='install']==before['cells']
    first = next(c for c in after['cells'] if c['cell_type']=='code')
    assert first['id']=='install' and build.GIT in first['source']
    assert first['source'].endswith(f'course/nbs/{build.name_of(nb)}'.removesuffix('/'+nb.stem))

def test_install_cell_does_nothing_elsewhere(monkeypatch):
    from IPython.core.inputtransformer2 import TransformerManager
    monkeypatch.delenv('COLAB_RELEASE_TAG', raising=False)
    exec(compile(TransformerManager().transform_cell(build.install('1_part/01_x')), 'install', 'exec'), {})   # elsewhere there is no get_ipython either

def test_missing_npm_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match='^build.py: npm is missing; .*--cdn$'): build.fetch_mathjax(tmp_path/'mathjax')

def test_source_links_stand_on_the_line_that_defines_the_name():
    lessons = {m: (build.name_of(f), build.title(nb), nb) for f in build.chapters() if (m := build.exports(nb := build.read(f)))}
    names,pages = api.pages(ROOT, build.GIT, lessons)
    found = 0
    for module,text in pages.items():
        path = f'nanowhale/{module.replace(".", "/")}.py'
        lines = (ROOT/path).read_text(encoding='utf-8').splitlines()
        for name,at in re.findall(rf'^##+ `([\w.]+)`\n\n[^\n]*\n\[source\]\({build.GIT}/blob/main/{path}#L(\d+)\)', text, flags=re.M):
            assert re.search(rf'\b{name.split(".")[-1]}\b', lines[int(at)-1]), f'{module}.{name}'
            found += 1
        public = ast.literal_eval(re.search(r'^__all__ = (\[.*?\])', '\n'.join(lines), flags=re.M|re.S)[1])
        assert set(public)<={*re.findall(r'^## `(\w+)`', text, flags=re.M)}, module
    assert found>250 and names['sinkhorn']=='function-model-hyper-sinkhorn'

def test_comments_become_tables():
    def f(x:int,  # how | many
          y=None, # [B,T] of_what
    )->int:       # a sum
        "doc"
    assert api.table(f).splitlines()[2:]==[r'| `x` | `int` |  | how \| many |', r'| `y` |  | `None` | \[B,T\] of\_what |', '| *returns* | `int` |  | a sum |']
    assert api.table(lambda x: x)==''

def test_stamp_sees_every_source(monkeypatch):
    before,read = build.stamp(),Path.read_bytes
    for name in ('nbs/1_architecture/09_hyper.ipynb', 'nanowhale/model/hyper.py', 'nbs/site/conf.py', 'CHANGELOG.md'):
        monkeypatch.setattr(Path, 'read_bytes', lambda p: read(p)+(b' ' if p==ROOT/name else b''))
        assert build.stamp()!=before, name

# ---------------------------------------------------------------- the site itself

SITE = build.OUT

@pytest.fixture(scope='module')
def site():
    if not (SITE/'.stamp').exists(): pytest.skip('no site: run `python nbs/site/build.py` first')
    if (SITE/'.stamp').read_text()!=build.stamp(): pytest.skip('the site is older than its sources: run `python nbs/site/build.py` again')
    return SITE

def pages(): return sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html') if 'explorers' not in p.parts) if SITE.exists() else []

class Page(HTMLParser):
    "Addresses and anchors of a page"
    def __init__(self, path):
        super().__init__()
        self.links,self.ids = [],set()
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k in ('href', 'src') and v: self.links.append((tag, v))
            if k in ('id', 'name'): self.ids.add(v)

@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    parsed,dead,outside = {p: Page(site/p) for p in pages()},[],[]
    for name,page in parsed.items():
        for tag,link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if tag!='a' and not link.startswith(('data:', build.settings()['doc_host'])): outside.append(f'{name}: {link}')
                continue
            to = ((site/name).parent/unquote(url.path)).resolve() if url.path else site/name
            target = to.relative_to(site).as_posix() if to.is_relative_to(site) else ''
            lost = target in parsed and url.fragment and url.fragment not in parsed[target].ids
            if not to.exists() or lost: dead.append(f'{name}: {link}')
    assert not dead and not outside, [*dead, *outside]

@pytest.mark.slow
def test_every_chapter_has_its_links_and_neighbours(site):
    for f in build.chapters():
        text = (site/f'{build.name_of(f)}.html').read_text(encoding='utf-8')
        assert f'{build.COLAB}/{build.name_of(f)}.ipynb"' in text, f.name
        assert f'href="../notebooks/{build.name_of(f)}.ipynb" download' in text, f.name
        assert 'class="prev-page"' in text and 'class="next-page"' in text, f.name
        assert json.loads((site/f'notebooks/{build.name_of(f)}.ipynb').read_text(encoding='utf-8'))==build.with_install(build.read(f), build.name_of(f)), f.name

@pytest.fixture(scope='module')
def tab(site):
    pytest.importorskip('websocket', reason='needs websocket-client, which comes with jupyter')
    if not browser.chromium(): pytest.skip(f'needs one of {", ".join(browser.NAMES)} on the PATH')
    server,home = browser.serve(site)
    tab = browser.Browser()
    tab.home_page = home
    yield tab
    tab.close()
    server.shutdown()

def outside(tab): return [u for u in tab.asked if not u.startswith((tab.home_page, 'data:', 'blob:', 'about:'))]

@pytest.mark.slow
@pytest.mark.parametrize('width,dark', [(1280, False), (390, True)], ids=['wide', 'phone'])
@pytest.mark.parametrize('page', pages())
def test_page_in_a_browser(tab, page, width, dark):
    "No request leaves the site, nothing is complained about, formulas are set, and nothing is wider than the screen"
    tab.open(f'{tab.home_page}/{page}', width=width, dark=dark)
    assert not tab.complaints and not outside(tab), [*tab.complaints, *outside(tab)]
    wanted,wide = tab.js('''[document.querySelectorAll("article .math").length, document.documentElement.scrollWidth]''')
    assert wide<=width, f'{wide} pixels wide'
    if wanted: assert tab.js('document.querySelectorAll("article .math mjx-container").length')>=wanted
    assert not tab.js('document.querySelectorAll("mjx-merror").length')
    assert tab.js('[...document.querySelectorAll("article img")].every(i => i.complete && i.naturalWidth>0 && i.alt)')

@pytest.mark.slow
def test_formulas_need_no_network(tab):
    tab.open(f'{tab.home_page}/1_architecture/09_hyper.html')
    assert any('mathjax/tex-chtml-full.js' in u for u in tab.asked) and any(u.endswith('.woff') for u in tab.asked)

@pytest.mark.slow
def test_search_finds_a_chapter_and_a_function(tab):
    for word,page in (('sinkhorn', '09_hyper.html'), ('weights_loops', '09_hyper.html'), ('load_tokenizer', 'api/train.data.html')):
        tab.open(f'{tab.home_page}/search.html?q={word}')
        browser.Browser.until(lambda: tab.js('document.querySelectorAll("ul.search li").length'))
        assert any(page in h for h in tab.js('[...document.querySelectorAll("ul.search li a")].map(a => a.getAttribute("href"))')), word
        assert not tab.complaints and not outside(tab)

@pytest.mark.slow
def test_dark_mode_can_be_chosen_and_figures_stay_readable(tab):
    tab.open(f'{tab.home_page}/1_architecture/09_hyper.html')
    paper = 'getComputedStyle(document.body).backgroundColor'
    light = tab.js(paper)
    click = 'document.querySelector(".theme-toggle-content .theme-toggle").click() ?? document.body.dataset.theme'
    assert 'dark' in (tab.js(click), tab.js(click)) and (tab.js('document.body.dataset.theme="dark"'), tab.js(paper))[1]!=light
    assert set(tab.js('[...document.querySelectorAll(".cell_output img")].map(i => getComputedStyle(i).backgroundColor)'))=={'rgba(0, 0, 0, 0)'}
    tab.js('localStorage.clear()')

@pytest.mark.slow
def test_explorers_stand_in_their_chapters(tab):
    if not build.shown(): pytest.skip('nbs/site/explorers/ holds none')
    for name,(chapter,_) in build.shown().items():
        tab.open(f'{tab.home_page}/{chapter}.html', dark=True)
        tab.js('document.querySelector("iframe.explorer").scrollIntoView()')
        browser.Browser.until(lambda: tab.js('document.querySelector("iframe.explorer").contentDocument?.documentElement?.dataset.theme')=='dark')
        assert not tab.complaints and not outside(tab), (name, tab.complaints, outside(tab))

@pytest.mark.slow
def test_the_browser_sees_what_is_wrong(tab, tmp_path):
    "A page with an error, a request that leaves, a broken formula and a wide table: each must be noticed"
    (tmp_path/'bad.html').write_text('<script>undefined_name()</script><img src="http://127.0.0.1:9/x.png"><div style="width: 900px">wide</div>')
    server,home = browser.serve(tmp_path)
    tab.open(f'{home}/bad.html', width=390)
    assert any('undefined_name' in c for c in tab.complaints) and any(':9/' in u for u in outside(tab))
    assert tab.js('document.documentElement.scrollWidth')>390
    server.shutdown()

def test_a_site_without_tools_says_so():
    "Where Sphinx is not installed, the builder says in one line what to do"
    code = 'import sys; sys.modules["sphinx.cmd.build"] = None; sys.argv = ["build.py"]; sys.path.insert(0, "nbs/site"); import build; build.main()'
    res = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert res.returncode==1 and re.fullmatch(r"build.py: \S+ is missing; run `pip install -e '.\[docs\]'`\n", res.stderr), res.stderr
