"""Build the site: chapters as they are stored, never executed, and reference pages made from the modules.

    python nbs/site/build.py                    write the site to _site/; needs `pip install -e '.[docs]'` and npm
    python nbs/site/build.py --cdn              without npm: readers fetch MathJax from a CDN
    python nbs/site/build.py --hasty            to try it: a whale of five steps where the explorers have none yet
    python nbs/site/build.py --notebooks DIR    only the notebooks with an install cell, as Colab and the download links open them

Every warning is an error. What is made on the way stands in _proc/site/ and may be deleted at any time.
"""
import argparse, hashlib, json, re, shutil, subprocess, sys, tarfile, tempfile
from configparser import ConfigParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import made  # noqa: E402
import pages  # noqa: E402
from pages import PARTS, chapters, name_of, number, read, solutions, source, title  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NBS,SITE,OUT,WORK = ROOT/'nbs', ROOT/'nbs/site', ROOT/'_site', ROOT/'_proc/site'
SRC = WORK/'src'
MATHJAX = '3.2.2'
PAGES = pages.OWN   # of the site -> files
EXPLORERS = dict(   # folder of nbs/site/explorers -> the chapter that shows it, and what it is called there
    rope=('1_architecture/04_rope', 'only the distance counts'), sinkhorn=('1_architecture/09_hyper', 'reins on a matrix'),
    routing=('1_architecture/08_moe', 'who reads which token'), whale=('3_generation/24_sample', 'a live whale'))

def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

GIT = settings()['git_url']
COLAB = GIT.replace('github.com', 'colab.research.google.com/github')+'/blob/colab'   # the branch that docs.yml writes
INSTALL = f"""import os, sys
if 'COLAB_RELEASE_TAG' in os.environ:   # on Colab: fetch the course, install it, work in its folder
    !git clone -q --depth 1 {GIT} course && pip install -q ./course
    sys.path.insert(0, os.path.abspath('course'))   # where nanowhale.course is, which the wheel leaves out
    %cd -q course/nbs/FOLDER"""

def shown(): return {name: at for name,at in EXPLORERS.items() if (SITE/'explorers'/name/'index.html').exists()}

def stamp():
    "One number for all that the site is made of: it tells whether _site/ is still true"
    files = [*NBS.rglob('*.ipynb'), *(ROOT/'nanowhale').rglob('*.py'), *SITE.rglob('*'),
        *(ROOT/n for n in ('settings.ini', 'results/course.json', 'results/tiny.json', *PAGES.values()))]
    h = hashlib.sha256()
    for f in sorted(f for f in files if f.is_file() and not {'__pycache__', 'node_modules', '.ipynb_checkpoints'} & {*f.parts}):
        h.update(f.relative_to(ROOT).as_posix().encode()+b'\0'+f.read_bytes())
    return h.hexdigest()

# ---------------------------------------------------------------- notebooks

def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)

def install(name): return INSTALL.replace('FOLDER', name.rpartition('/')[0]).rstrip('/')

def with_install(nb, name):
    "A copy of a notebook that can be opened anywhere: its first code cell fetches the course if this is Colab"
    cells,first = list(nb['cells']),1 if nb['cells'][0]['cell_type']=='markdown' else 0
    cells.insert(first, dict(cell_type='code', metadata={}, source=install(name), outputs=[], execution_count=None, id='install'))
    return nb | dict(cells=cells)

def exports(nb): return next((m[1] for c in nb['cells'] if (m := re.match(r'#\|\s*default_exp\s+([\w.]+)', source(c)))), None)

def links(name, module):
    "The row of links below a chapter's title"
    up = '../'*name.count('/')
    row = [f'<a href="{COLAB}/{name}.ipynb">Open in Colab</a>', f'<a href="{up}notebooks/{name}.ipynb" download>Download</a>',
        f'<a href="{GIT}/blob/main/nbs/{name}.ipynb">On GitHub</a>']
    if module: row.append(f'<a href="{up}api/{module}.html">nanowhale.{module}</a>')
    return '<p class="links">'+'\n'.join(row)+'</p>'

def explorer(name, title, at):
    "The section that shows an explorer inside its chapter"
    page = f'{"../"*at.count("/")}explorers/{name}/index.html'
    return (f'## Try it: {title}\n\n<iframe class="explorer" src="{page}" title="{title}" loading="lazy"></iframe>\n'
        f'<p class="links"><a href="{page}">On a page of its own</a></p>\n\n')

def link_names(text, names, seen):
    "The first mention in backticks of each name in `names` (name -> reference) becomes a link"
    def link(m):
        if m[1] not in names or m[1] in seen: return m[0]
        seen.add(m[1])
        return f'[`{m[1]}`](#{names[m[1]]})'
    keep = r'(```.*?```|^#.*?$|\[[^\]]*\]\([^)]*\)|\$[^$]*\$)'   # code blocks, headings, links and maths stay as they are
    return ''.join(part if i%2 else re.sub(r'(?<!`)`(\w+)`(?!`)', link, part) for i,part in enumerate(re.split(keep, text, flags=re.S|re.M)))

def page(name, nb, names):
    "A notebook as the site shows it: no directives, exported source in sight, links, an alternative text for each figure"
    cells,heading,seen,module = [],'',set(),exports(nb)
    parts = ''.join(explorer(k, title, at) for k,(at,title) in shown().items() if at==name)
    for i,c in enumerate(nb['cells']):
        text = source(c)
        said = dict((m+' ').split(':', 1) if ':' in m else (m, '') for m in re.findall(r'^#\|\s*(.*?)\s*$', text, flags=re.M))
        if said.keys() & {'hide', 'default_exp'} or said.get('include', '').strip()=='false': continue
        if c['cell_type']=='markdown':
            if i==0:
                text = re.sub(r'^> ', '{.subtitle}\n> ', text, count=1, flags=re.M)
                if name!='index': text = re.sub(r'\{\.subtitle\}\n> .*', lambda m: m[0]+'\n\n'+links(name, module), text, count=1)
            if parts: text,n = re.subn(r'^(?=## (Exercises|Recap))', lambda m: parts, text, count=1, flags=re.M); parts = '' if n else parts
            if h := re.findall(r'^##+ (.*)', text, flags=re.M): heading = h[-1]
            cells.append(markdown(link_names(text, names, seen)))
            continue
        meta = dict(mystnb=dict(image=dict(alt=(said.get('fig-alt') or f'Figure of the section {heading or name}').strip())))
        if said.get('echo', '').strip()=='false': meta['tags'] = ['remove-input']
        if said.get('output', '').strip()=='false': meta['tags'] = [*meta.get('tags', []), 'remove-output']
        cells.append(c | dict(source=re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip('\n'), metadata=meta))
    if parts: cells.append(markdown(parts))
    for n,c in enumerate(cells): c['id'] = f'cell-{n}'
    lang = dict(name='python', pygments_lexer='ipython3')
    return dict(cells=cells, metadata=dict(kernelspec=nb['metadata'].get('kernelspec', {}), language_info=lang), nbformat=4, nbformat_minor=5)

def toctree(caption, lines): return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n'+'\n'.join(lines)+'\n```'

def entry(f): return f'{number(f)} {title(read(f))} <{name_of(f)}>'.strip()

def contents(modules):
    "The navigation in the order of reading: the way in, chapters by their parts, what is looked up, then the reference and the project's own pages"
    first,*use = [f for f in chapters() if f.parent.name=='0_start']
    trees = [toctree('Start here', [entry(first), 'course'])]
    for part in [p for p in PARTS if p!='0_start']:
        if at := [f for f in chapters() if f.parent.name==part]: trees.append(toctree(PARTS[part][0], map(entry, at)))
    trees.append(toctree('Use and look up', [*map(entry, use), *(n for n in pages.MADE if n!='course')]))
    if solutions(): trees.append(toctree('Solutions', map(entry, solutions())))
    return markdown('\n\n'.join([*trees, toctree('Reference', [f'{m} <api/{m}>' for m in modules]), toctree('The project', list(PAGES))]))

def live():
    "The whale of the home page: what stands there before a script runs is true and can be read"
    return (SITE/'explorers/home.html').read_text(encoding='utf-8').strip()

def home(nb, names):
    "The first page: what it is, something to play with, the three paths, and then the rest of the README"
    first = page('index', nb, names)
    text = [source(c) if c['cell_type']=='markdown' else '' for c in first['cells']]
    ways = next(i for i,t in enumerate(text) if t.startswith('## Three ways in'))
    name,below,*intro = re.sub(r' You can read all of it \[on the site\]\([^)]*\)\.', '', text[0]).split('\n\n')
    _,_,*rest = text[ways].split('\n\n')   # without heading and table
    made = [f'{name}\n\n{below}', live(), *intro[::-1], '## Three ways in\n\n'+pages.cards(), *rest]
    first['cells'] = [*map(markdown, made), *(c for i,c in enumerate(first['cells']) if i not in (0, ways))]
    return first

# ---------------------------------------------------------------- the whole

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def write_notebooks(folder):
    for f in [NBS/'index.ipynb', *chapters(), *solutions()]:
        write(folder/f.relative_to(NBS), json.dumps(with_install(read(f), name_of(f)), indent=1, ensure_ascii=False)+'\n')

def inside(text):
    "Links that are right on GitHub, right on the site: to the project's own pages, to pages that the site alone has, and to results"
    cfg = settings()
    text = re.sub(r'\]\((?:\.\./)+(results/\w+\.json)', rf']({GIT}/blob/main/\1', text)
    text = re.sub(r'\]\((?:\.\./)((?:\.\./)*)CONTRIBUTING\.md\)', r'](\1CONTRIBUTING.md)', text)
    return re.sub(rf'\]\({re.escape(cfg["doc_host"]+cfg["doc_baseurl"])}/(\w+)\.html', r'](\1.md', text)

def write_sources():
    "All that Sphinx reads, in SRC"
    import api
    shutil.rmtree(SRC, ignore_errors=True)
    names,reference = api.pages(ROOT, GIT, {m: (name_of(f), title(nb), nb) for f in chapters() if (m := exports(nb := read(f)))})
    for m,text in reference.items(): write(SRC/f'api/{m}.md', text)
    for f in [*chapters(), *solutions()]: write(SRC/f.relative_to(NBS), inside(json.dumps(page(name_of(f), read(f), names))))
    first = home(read(NBS/'index.ipynb'), names)
    first['cells'].append(contents(sorted(reference)))
    for n,c in enumerate(first['cells']): c['id'] = f'cell-{n}'
    write(SRC/'index.ipynb', inside(json.dumps(first)))
    for name,make in pages.MADE.items(): write(SRC/f'{name}.md', make())
    for name,path in PAGES.items():
        text = (ROOT/path).read_text(encoding='utf-8')
        write(SRC/f'{name}.md', text.replace('(tests/README.md)', '(TESTS.md)').replace('(../CONTRIBUTING.md)', '(CONTRIBUTING.md)'))
    if (NBS/'images').is_dir(): shutil.copytree(NBS/'images', SRC/'images')

def need(program, why):
    if not (found := shutil.which(program)): sys.exit(f'build.py: {program} is missing; {why}')
    return found

def fetch_mathjax(folder):
    "MathJax and its fonts from npm, once, to `folder`"
    if (folder/'tex-chtml-full.js').exists(): return
    npm = need('npm', 'it fetches MathJax for the formulas: install Node.js, or build with --cdn')
    folder.mkdir(parents=True, exist_ok=True)
    res = subprocess.run([npm, 'pack', f'mathjax@{MATHJAX}', '--silent', '--pack-destination', str(folder)], check=False, capture_output=True, text=True)
    if res.returncode: sys.exit(f'build.py: npm pack mathjax@{MATHJAX} failed: {" ".join(res.stderr.split())[-300:]}')
    packed = folder/res.stdout.split()[-1]
    with tarfile.open(packed) as tar:
        for m in tar.getmembers():
            name = m.name.removeprefix('package/es5/')
            if m.isfile() and (name=='tex-chtml-full.js' or name.startswith('output/chtml/fonts')):
                (folder/name).parent.mkdir(parents=True, exist_ok=True)
                (folder/name).write_bytes(tar.extractfile(m).read())
    packed.unlink()

def run(*command):
    code = subprocess.run([sys.executable, *map(str, command)], check=False, cwd=ROOT).returncode
    if code: sys.exit(f'build.py: {command[0]} failed with exit code {code}')

def add_explorers(hasty):
    "The explorers go along as they are; a whale that is not there yet is trained for them first, a hasty one for this site alone"
    there = SITE/'explorers'
    if not there.is_dir(): return
    missing = (there/'build.py').exists() and not (there/'whale/model/whale.zip').exists()
    if missing and not hasty: run(there/'build.py')
    shutil.copytree(there, OUT/'explorers', ignore=shutil.ignore_patterns('*.py', 'package*.json', 'node_modules', '__pycache__', 'home.html'))
    if missing and hasty:
        with tempfile.TemporaryDirectory() as d:
            run('-c', 'import sys; from nanowhale.cli import main; sys.exit(main())', 'train', '--steps', 5, '--out', Path(d)/'whale')
            run(there/'build.py', '--model', Path(d)/'whale', '--out', OUT/'explorers/whale/model')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cdn', action='store_true', help='maths from a CDN, without npm')
    p.add_argument('--hasty', action='store_true', help='where the explorers have no whale yet, one of five steps')
    p.add_argument('--notebooks', type=Path, metavar='DIR', help='only the notebooks with an install cell')
    a = p.parse_args()
    if a.notebooks: return write_notebooks(a.notebooks)
    try:
        from sphinx.cmd.build import main as sphinx
        import furo, myst_nb, sphinx_copybutton  # noqa: F401
    except ImportError as e: sys.exit(f"build.py: {e.name} is missing; run `pip install -e '.[docs]'`")
    if not a.cdn: fetch_mathjax(WORK/'static/mathjax')
    write_sources()
    shutil.rmtree(OUT, ignore_errors=True)
    define = ['-D', 'mathjax_path=mathjax/tex-chtml-full.js', '-D', f'html_static_path={SITE/"static"},{WORK/"static"}'] if not a.cdn else []
    html = WORK/'html'   # not at once to _site/: myst-nb leaves a folder beside it
    shutil.rmtree(html, ignore_errors=True)
    options = ['-q', '-W', '--keep-going', '-E', '-j', 'auto', '-c', str(SITE), '-d', str(WORK/'doctrees'), *define]
    if failed := sphinx([*options, str(SRC), str(html)]): return failed
    shutil.move(html, OUT)
    add_explorers(a.hasty)
    write_notebooks(OUT/'notebooks')
    write(OUT/'.nojekyll', '')
    if dead := list(made.dead_links(OUT)): sys.exit('\n'.join(['build.py: links that lead nowhere', *dead]))
    write(OUT/'.stamp', stamp())
    print('heaviest pages, with their pictures:', *(f'{size/1000:6.0f} kB  {name}' for size,name in made.heaviest(OUT)), sep='\n')
    print(f'{len(list(OUT.rglob("*.html")))} pages in {OUT.relative_to(ROOT)}/: open index.html, or `python -m http.server -d {OUT.relative_to(ROOT)}`')

if __name__=='__main__': sys.exit(main())
