"""The site: what its builder makes of notebooks and modules; and, slow, every page of _site/ in a real browser"""
import ast, importlib.util, json, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'nbs/site'))
import api, browser, made  # noqa: E402
import pages as entrance  # noqa: E402
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

# ---------------------------------------------------------------- pages that are made of the chapters

QUESTIONS,ANSWERS = entrance.asked(),entrance.answers()

def test_every_question_about_v4_is_answered():
    "Once in a chapter; no cell answers what nobody asks"
    numbers = [q['number'] for q in QUESTIONS]
    assert sorted(numbers)==list(range(1, len(numbers)+1)) and set(ANSWERS)<=set(numbers)
    open_ones = [f'{q["number"]}: {q["question"]}' for q in QUESTIONS if q['number'] not in ANSWERS and 'beyond' not in q]
    assert not open_ones, open_ones
    for n,at in ANSWERS.items(): assert len({f for f,_ in at})==len(at), f'question {n} twice in a chapter'

@pytest.mark.parametrize('q', QUESTIONS, ids=lambda q: str(q['number']))
def test_links_of_a_question(q):
    "Its threads can be addresses, its answers stand below headings that exist, and each names one of the threads"
    assert q['threads'] or q['source']
    for t in q['threads']: assert re.fullmatch(r'[\w.-]+/[\w.-]+#\d+', t)
    for f,heading in ANSWERS.get(q['number'], []):
        nb = build.read(f)
        assert heading in [h for _,h in entrance.headings(nb)]
        said = entrance.prose(nb)
        named = [t for t in q['threads'] if re.search(re.escape(t).replace(r'\#', '/(issues|pull|discussions)/')+r'\b', said)]
        assert named or not q['threads'], f'{f.stem}: no link to {q["threads"]}'

def test_a_question_added_later_joins_by_itself(tmp_path, monkeypatch):
    nb = notebook(cell('# T\n\n> sub', 'markdown'), cell('## A\n\n```python\n## no heading\n```\n\n### Is it?', 'markdown'), cell('#| question: 3\n1'))
    (tmp_path/'2_training').mkdir()
    (tmp_path/'2_training/99_new.ipynb').write_text(json.dumps(nb))
    monkeypatch.setattr(entrance, 'NBS', tmp_path)
    assert [(f.stem, h) for f,h in entrance.answers()[3]]==[('99_new', 'Is it?')]
    monkeypatch.setattr(entrance, 'asked', lambda: [q for q in QUESTIONS if q['number']==3])
    assert '[99 T](2_training/99_new.ipynb#is-it)' in entrance.questions_page()

def test_every_exercise_is_listed():
    "As many as the chapters have, and in part 1 of three kinds: predict, change, ask the paper"
    listed = list(entrance.exercises())
    for f in build.chapters():
        text = entrance.prose(build.read(f)).partition('## Exercises')[2].partition('\n## ')[0]
        here = [e for e in listed if e['chapter']==f]
        assert [str(e['number']) for e in here]==re.findall(r'^\*\*(\d)\. ', text, flags=re.M), f.stem
        if f.parent.name=='1_architecture' and here: assert [e['kind'] for e in here]==['predict', 'change', 'paper'], f.stem
    page = entrance.exercises_page()
    for e in listed: assert f'{e["number"]}. {entrance.cell(e["title"])} |' in page

def test_paths_take_what_they_say():
    "Hours in the table of the first page, beside those that are counted: a fifth more or less, since chapters change"
    table = entrance.prose(build.read(ROOT/'nbs/index.ipynb'))
    assert list(entrance.paths())==['Three hours', 'A weekend', 'All of it']
    for name,(steps,can) in entrance.paths().items():
        said = re.search(rf'\*\*{name}\*\*: (\d+)([¼½¾]?)(?: hours)? of reading(?:, (\d+) of exercises)?, (\d+) minutes of computing', table)
        hours = int(said[1])+'¼½¾'.find(said[2] or '¼')*.25+.25*bool(said[2])
        counted = dict(reading=sum(map(entrance.reading, steps))/60, computing=sum(map(entrance.computing, steps))/60, exercises=entrance.exercising()/60)
        given = dict(reading=hours, computing=int(said[4])) | (dict(exercises=int(said[3])) if said[3] else {})
        for what,much in given.items(): assert 0.8*much<=counted[what]<=1.2*much, f'{name}: {counted[what]:.1f} of {what}, not {much}'
        assert can.endswith('.') and len(steps)>5
    steps = entrance.paths()['Three hours'][0]
    assert sum(map(entrance.reading, steps))+sum(map(entrance.computing, steps))/60<=180
    assert {*build.chapters()}-{*entrance.paths()['All of it'][0]}=={f for f in build.chapters() if f.parent.name in ('0_start', 'appendix')}-{*steps}

def test_hours_in_words():
    assert [entrance.hours(m) for m in (4.4, 89, 95, 112, 480, 610)]==['4 minutes', '89 minutes', '1½ hours', '1¾ hours', '8 hours', '10 hours']

def test_all_links_that_leave_are_listed():
    found,page = entrance.outer_links(),entrance.links_page()
    assert any(f.stem=='08_moe' and entrance.link(f) in found['https://arxiv.org/abs/2412.19437'] for f in build.chapters())
    for url in found: assert f']({url}): ' in page

def test_home_begins_with_something_to_play_with():
    "Title, what it is, the whale that writes, the paths; nothing that the README says is lost"
    nb = build.read(ROOT/'nbs/index.ipynb')
    cells = [''.join(c['source']) for c in build.home(nb, {})['cells']]
    assert cells[0].startswith('# nanowhale') and len(cells[0])<250 and 'id="live-go"' in cells[1]
    assert sum('class="paths"' in c for c in cells)==1 and next(i for i,c in enumerate(cells) if 'class="paths"' in c)<5
    text = '\n'.join(cells)
    for block in entrance.prose(nb).split('\n\n'):
        if block.startswith('| ') or '[on the site]' in block: continue
        assert block.removeprefix('> ') in text, block[:60]

@pytest.mark.parametrize('given,made_of', [('](../../CONTRIBUTING.md)', '](../CONTRIBUTING.md)'), ('](../CONTRIBUTING.md)', '](CONTRIBUTING.md)'),
    ('](https://nanowhale.github.io/nanowhale/course.html)', '](course.md)'), ('](https://nanowhale.github.io/nanowhale/)',)*2,
    ('[1.35](../../results/tiny.json "results > minutes")', f'[1.35]({build.GIT}/blob/main/results/tiny.json "results > minutes")')])
def test_links_that_are_right_on_github_are_right_on_the_site(given, made_of): assert build.inside(given)==made_of

def test_dead_links_and_weights(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'p.png').write_bytes(b'x'*500)
    (tmp_path/'a/b.html').write_text('<h1 id="here">b</h1><a href="../c.html#there"></a><a href="#here"></a><a href="https://x.org/y"></a><img src="../p.png">')
    (tmp_path/'c.html').write_text('<a href="a/b.html#here"></a><a href="a/b.html#gone"></a><a href="d.html"></a><img src="q.png">')
    assert list(made.dead_links(tmp_path))==['a/b.html: ../c.html#there', 'c.html: a/b.html#gone', 'c.html: d.html', 'c.html: q.png']
    assert made.heaviest(tmp_path)[0]==((tmp_path/'a/b.html').stat().st_size+500, 'a/b.html')

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
    "Explorers and made pages among them; and a page asks for no script, style or picture of another host"
    away = [f'{name}: {link}' for name in pages() for tag,link in Page(site/name).links
        if tag!='a' and urlsplit(link).netloc and not link.startswith(build.settings()['doc_host'])]
    assert not [*made.dead_links(site), *away]

@pytest.mark.slow
def test_no_page_is_heavy(site):
    heavy = [(n, name) for n,name in made.heaviest(site) if n>made.MOST]
    assert not heavy, heavy

@pytest.mark.slow
def test_pages_follow_in_the_order_of_reading(site):
    "From the first page through the chapters: each names the next"
    def after(name): return re.search(r'<a class="next-page" href="([^"]+)"', (site/name).read_text(encoding='utf-8'))
    name,seen = 'index.html',[]
    while m := after(name):
        name = ((site/name).parent/m[1]).resolve().relative_to(site.resolve()).as_posix()
        seen.append(name.removesuffix('.html'))
    chapters = [build.name_of(f) for f in build.chapters() if f.parent.name!='0_start']
    assert seen[:3]==['0_start/ten_minutes', 'course', chapters[0]] and [n for n in seen if n in chapters]==chapters
    assert {'questions', 'exercises', 'links', '0_start/glossary', '0_start/swap'}<={*seen}

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
