"""Pages that are made of the chapters: the course with its three paths, the questions, the exercises, the links that leave the site.

Whatever is listed here is read from the notebooks, so a chapter that is added later joins by itself. Two things are written by hand:
`questions.json`, the questions that people ask in public, and the table of paths in `nbs/index.ipynb`.
"""
import json, re, sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
sys.path.insert(0, str(ROOT/'tests/tools'))
import course  # noqa: E402
from api import slug  # noqa: E402

PARTS = {   # folder -> what the part is called, and what it is
    '0_start': ('Start here', 'two pages to begin with, and the words of the course'),
    '1_architecture': ('The architecture', 'the package `nanowhale.model`: DeepSeek-V4 in plain PyTorch and nothing else, '
        'short enough to read from top to bottom'),
    '2_training': ('Training', '`nanowhale.train`: from text to a trained whale'),
    '3_generation': ('Generation', '`nanowhale.generate`: from a trained whale to text, and to files that others read'),
    '4_speed': ('Speed', '`nanowhale.fast`: the same functions, faster, each proved equal to its plain twin'),
    '5_evidence': ('Evidence', '`nanowhale.lab`: what was measured'),
    '6_beyond': ('Beyond', '`nanowhale.beyond`: what came after V4'),
    'appendix': ('Appendix', 'what holds the course together; `nanowhale.course`, which only the notebooks need, '
        'is not installed with the package')}
START = ['ten_minutes', 'swap', 'glossary']   # the order of notebooks that have no number
UNMEASURED = 20   # seconds: the most that a chapter may take (tests/README.md), where `course.py --time` has not measured it

def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def prose(nb): return '\n\n'.join(source(c) for c in nb['cells'] if c['cell_type']=='markdown')
def title(nb): return re.search(r'^# (.*)', source(nb['cells'][0]), flags=re.M)[1]
def subtitle(nb): return (m := re.search(r'^> (.*)', source(nb['cells'][0]), flags=re.M)) and m[1]
def place(path): return START.index(path.stem) if path.stem in START else len(START), path.name
def chapters(): return [p for part in PARTS for p in sorted(NBS.glob(f'{part}/[!.]*.ipynb'), key=place)]
def solutions(): return sorted(NBS.glob('solutions/[!.]*.ipynb'))
def name_of(path): return path.relative_to(NBS).with_suffix('').as_posix()
def number(path): return path.stem[:2] if path.stem[:2].isdigit() else ''
def label(path): return f'{number(path)} {title(read(path))}'.strip()
def head(name, below): return f'# {name}\n\n{{.subtitle}}\n> {below}'
def link(path, anchor=''): return f'[{label(path)}]({name_of(path)}.ipynb{"#"+anchor if anchor else ""})'
def cell(text): return ' '.join(text.split()).replace('|', r'\|')
def table(heads, rows): return '\n'.join(f'| {" | ".join(map(str, r))} |' for r in (heads, ['---']*len(heads), *rows))

# ---------------------------------------------------------------- minutes

@cache
def reading(path):
    "Minutes: 200 words or 20 lines of code in each; exercises have minutes of their own"
    row = course.measure(path)
    return row['words']/200+row['code_lines']/20

def computing(path):
    "Seconds of processor time for all cells, as last measured, or else the most they may take"
    rows = read(course.RESULT)['notebooks'] if course.RESULT.exists() else {}
    training = 60*read(ROOT/'results/tiny.json')['results']['minutes of training']
    seconds = rows.get(path.stem, {}).get('seconds') or UNMEASURED
    return seconds+training*(path.stem=='ten_minutes')   # whose two commands train a whale

def hours(minutes):
    "`minutes` in words, to a quarter of an hour where there are hours"
    if minutes<90: return f'{minutes:.0f} minutes'
    if minutes>=600: return f'{minutes/60:.0f} hours'
    whole,quarter = divmod(round(minutes/15), 4)
    return f'{whole}{["", "¼", "½", "¾"][quarter]} hours'

def duration(paths):
    "What reading and computing take, in words; of the whole course, the exercises too"
    read_for,compute_for = sum(map(reading, paths)),sum(map(computing, paths))/60
    more = f', {hours(exercising())} of exercises' if whole(paths) else ''
    return f'{hours(read_for)} of reading{more}, {max(1, round(compute_for))} minutes of computing'

# ---------------------------------------------------------------- paths

STEPS = r'\]\(([^)#]+\.ipynb)\)(?: to \[[^\]]*\]\(([^)]+\.ipynb)\))?'   # a chapter, or from one to another

def paths():
    "name of a path -> (its notebooks in order, what one can do at its end), from nbs/index.ipynb"
    out,order = {},chapters()
    for line in prose(read(NBS/'index.ipynb')).splitlines():
        if not (m := re.fullmatch(r'\| \*\*([^*]+)\*\*.*?\| (.*) \| (.*) \|', line)): continue
        steps = []
        for first,last in re.findall(STEPS, m[2]):
            steps += order[order.index(NBS/first):order.index(NBS/(last or first))+1]
        out[m[1]] = steps,m[3]
    return out

def whole(steps): return len(steps)>40   # a path that leaves nothing out

def cards():
    "The paths, for the home page"
    out = []
    for name,(steps,can) in paths().items():
        lines = f'<span>{len(steps)} chapters: {duration(steps)}.</span>', f'<span>Then you can {can}</span>'
        link_to = f'<a class="path" href="course.html#{slug(name)}">'
        out.append('\n'.join([f'{link_to}<strong>{name}</strong>', *lines])+'</a>')
    return '<div class="paths">\n'+'\n'.join(out)+'\n</div>'

def course_page():
    "Every path step by step, then every chapter"
    out = [head('The course', 'Three ways through it, then all chapters, with the minutes each takes'),
        'Reading is counted at 200 words or 20 lines of code a minute, without the exercises, which '
        'have [minutes of their own](exercises.md). Computing is processor time of all cells; a chapter '
        f'that has not been measured since it changed counts with {UNMEASURED} seconds, the most it may take.']
    for name,(steps,can) in paths().items():
        out += [f'## {name}', f'{len(steps)} chapters: {duration(steps)}. At the end you can {can}']
        if whole(steps):
            out.append(f'From {link(steps[0])} to {link(steps[-1])} in the order below, with [every exercise](exercises.md).')
        else: out.append('\n'.join(f'1. {link(f)} · {reading(f):.0f} minutes' for f in steps))
    out.append('## Every chapter\n\nEach part is a folder of `nbs/`. A chapter builds only on those before it; '
        'tables of stored runs come from the appendix.')
    asked_in = [e['chapter'] for e in exercises()]
    for part,(name,what) in PARTS.items():
        at = [f for f in chapters() if f.parent.name==part]
        rows = [[link(f), cell(subtitle(read(f)) or ''), f'{reading(f):.0f}', asked_in.count(f) or ''] for f in at]
        heads = ['chapter', 'what it teaches', 'minutes', 'exercises']
        if at: out += [f'### {name}', what[0].upper()+what[1:]+'.', table(heads, rows)]
    return '\n\n'.join(out)+'\n'

# ---------------------------------------------------------------- exercises

KINDS = dict(predict='predict a number', paper='ask the paper', change='change and measure',
    write='write a function', build='build and try')
EXERCISE = r'^\*\*(\d)\. ([^*]+)\*\* ([●○]{5}) · (\d+) minutes$(.*?)(?=^\*\*\d\. |\Z)'

def kind(name, text):
    "What an exercise asks for, from its words"
    said = name+' '+re.sub(r'```.*?```', ' ', text, flags=re.S)
    def found(words, where=said): return re.search(words, where, flags=re.I)
    if found('predict|guess', name) or found(r'\bpredict\b|before you (compute|look|run)'): return 'predict'
    if found(r'\bpapers?\b', name) or found(r'arxiv\.org|\bthe paper\b|sections? \d'): return 'paper'
    if 'def my_' in text: return 'change' if found(r'\b(change|measure)') else 'write'
    return 'change' if found(r'\b(change|measure|swap|replace|exchange|train)') else 'build'

def exercises():
    "Every exercise: chapter, number, title, kind, how hard (1 to 5), minutes"
    for f in chapters():
        part = prose(read(f)).partition('## Exercises')[2].partition('\n## ')[0]
        for n,name,dots,minutes,text in re.findall(EXERCISE, part, flags=re.M|re.S):
            yield dict(chapter=f, number=int(n), title=name, kind=kind(name, text), hard=dots.count('●'), minutes=int(minutes))

def exercising(): return sum(e['minutes'] for e in exercises())

def exercises_page():
    "All of them in a table for each part"
    found = list(exercises())
    many = {k: sum(e['kind']==k for e in found) for k in KINDS}
    out = [head('Every exercise', 'By chapter, with its kind, how hard it is, and the minutes it takes'),
        f'{len(found)} exercises, {hours(exercising())} together. Filled dots say how hard one is; the minutes are '
        "their authors' guess. Each stands at the end of its chapter and has an answer in the solutions. Where there "
        'is something to check, `check` tries what you wrote and names the likely mistake.',
        table(['kind', 'how many'], [[KINDS[k], n] for k,n in many.items() if n])]
    for part,(name,_) in PARTS.items():
        rows = [[link(e['chapter'], 'exercises'), f'{e["number"]}. {cell(e["title"])}', KINDS[e['kind']],
            '●'*e['hard']+'○'*(5-e['hard']), e['minutes'], f'[answer](solutions/{e["chapter"].stem}.ipynb)']
            for e in found if e['chapter'].parent.name==part]
        if rows: out += [f'## {name}', table(['chapter', 'exercise', 'kind', 'how hard', 'minutes', ''], rows)]
    return '\n\n'.join(out)+'\n'

# ---------------------------------------------------------------- questions

def asked(): return read(NBS/'site/questions.json')

def thread(name):
    "The address of `owner/name#number`; where it is a pull request, GitHub leads on to it"
    repository,_,n = name.partition('#')
    return f'https://github.com/{repository}/issues/{n}'

def headings(nb):
    "(index of the cell, heading) of a notebook, in order"
    for i,c in enumerate(nb['cells']):
        text = re.sub(r'```.*?```', '', source(c), flags=re.S) if c['cell_type']=='markdown' else ''
        for h in re.findall(r'^##+ (.*)', text, flags=re.M): yield i,h.strip()

def answers():
    "number of a question -> [(notebook, heading)] of the cells that answer it, as their `#| question: N` says"
    out = {}
    for f in chapters():
        nb = read(f)
        for i,c in enumerate(nb['cells']):
            if c['cell_type']!='code': continue
            for n in re.findall(r'^#\|\s*question:\s*(\d+)\s*$', source(c), flags=re.M):
                above = [h for at,h in headings(nb) if at<i]
                out.setdefault(int(n), []).append((f, above[-1] if above else ''))
    return out

def questions_page():
    "Question, threads and answers, by what they are about"
    found,out = answers(),[head('Questions people ask',
        'Asked in public about DeepSeek-V4 and its relatives, each answered by a cell that runs'),
        'The questions come from issues and pull requests of projects that implement, serve or teach this architecture. '
        'They are told in our words; the second column leads to the threads, the last one to the heading in a chapter '
        'below which the answer runs.']
    for topic in dict.fromkeys(q['topic'] for q in asked()):
        rows = []
        for q in [q for q in asked() if q['topic']==topic]:
            where = ', '.join(f'[{t}]({thread(t)})' for t in q['threads']) or q['source']
            there = '<br>'.join(link(f, slug(heading)) for f,heading in found.get(q['number'], []))
            rows.append([cell(q['question']), where, there or q.get('beyond', 'No chapter answers this yet.')])
        out += [f'## {topic}', table(['question', 'asked in', 'answered in'], rows)]
    return '\n\n'.join(out)+'\n'

# ---------------------------------------------------------------- links that leave the site

OWN = dict(CONTRIBUTING='CONTRIBUTING.md', TESTS='tests/README.md', CHANGELOG='CHANGELOG.md')   # page of the site -> file

def outer_links():
    "address -> links to the pages that use it, in order"
    texts = {link(f): prose(read(f)) for f in [NBS/'index.ipynb', *chapters(), *solutions()]}
    texts |= {f'[{name}]({name}.md)': (ROOT/path).read_text(encoding='utf-8') for name,path in OWN.items()}
    texts |= {'[questions](questions.md)': ' '.join(f']({thread(t)})' for q in asked() for t in q['threads'])}
    out = {}
    for page,text in texts.items():
        for url in re.findall(r'\]\((https?://[^)\s]+)\)', re.sub(r'```.*?```', '', text, flags=re.S)):
            if page not in out.setdefault(url, []): out[url].append(page)
    return out

def links_page():
    "Every address outside, by host"
    found,hosts = outer_links(),{}
    for url in sorted(found): hosts.setdefault(url.split('/')[2].removeprefix('www.'), []).append(url)
    out = [head('Where the links lead', 'Every address outside this site, with the pages that use it'),
        f'{len(found)} addresses on {len(hosts)} hosts. The site itself asks for nothing outside: no fonts, scripts or counters.']
    for host,urls in sorted(hosts.items(), key=lambda h: (-len(h[1]), h[0])):
        short = {u: u.split('://')[1].removeprefix('www.').removeprefix(host).strip('/') or host for u in urls}
        out += [f'## {host}', '\n'.join(f'- [{short[u]}]({u}): {", ".join(found[u])}' for u in urls)]
    return '\n\n'.join(out)+'\n'

MADE = dict(course=course_page, questions=questions_page, exercises=exercises_page, links=links_page)   # page -> maker
