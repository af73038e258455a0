r"""Measured values in prose come out of `results/`, and no number is typed that nobody can look up.

    python tests/tools/receipts.py render [FILES]   write the values of the files into the texts of their receipts
    python tests/tools/receipts.py check [FILES]    name what is stale, and every number without a source

Without FILES, every notebook under `nbs/` is meant. A receipt is a link with a title. Its target is a file of `results/`, its
title says where the value stands in it, and the number in its text is rendered, with as many decimals as are there now:

    [1.69 minutes](../results/tiny.json "results > minutes of training")
    [0.26 bits](../results/ladder.json "mean of rung=attention > bits_per_byte - mean of rung=compress > bits_per_byte")

A step of the way is a key, or `*` for all of them; in a list, a place counted from 0, or what an entry says: `rung=moe, seed=0`.
Where more than one value is found, `mean of`, `median of`, `least of`, `most of`, `sum of` or `number of` stands before the way.
Values, and numbers as they are, can be joined by ` + `, ` - `, ` * ` and ` / `, from left to right.

Typed is every other number that has a unit (`UNIT`) or decimals, in prose, tables and the words for figures. Its source is the
section it stands in, from one `##` to the next: a stored output, rounded; the code; a formula that works it out (`$18/4=4.5$`).
Or its paragraph links to a section that prints it (`#the-proof`, `41_ladder.ipynb#what-came-out`), or outside, to who measured
it. An exercise may suppose what it likes, and its solution takes that up. Code, formulas and headings are no prose.
"""
import argparse, json, re, statistics, sys
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
N = r'\d+(?:,\d{3})*(?:\.\d+)?'
OF = dict(mean=statistics.mean, median=statistics.median, least=min, most=max, sum=sum, number=len)
DO = {'+': lambda a,b: a+b, '-': lambda a,b: a-b, '*': lambda a,b: a*b, '/': lambda a,b: a/b}
RECEIPT = re.compile(r'\[([^\[\]]*)\]\(([^)\s]*results/\w+\.json) "([^"]*)"\)')

def read(path): return json.loads(Path(path).read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def notebooks(): return sorted(NBS.rglob('[!.]*.ipynb'))

# ---------------------------------------------------------------- receipts

def step(node, name):
    "The values that one step of a way finds in a node"
    if isinstance(node, dict): return list(node.values()) if name=='*' else [node[name]] if name in node else []
    if not isinstance(node, list): return []
    if re.fullmatch(r'-?\d+', name): return node[int(name):][:1]
    wanted = [w.split('=', 1) for w in name.split(', ') if '=' in w]
    return [e for e in node if isinstance(e, dict) and wanted and all(fnmatchcase(str(e.get(k)), v) for k,v in wanted)]

def found(data, way):
    "Every (value, what the entries around it say of themselves) at the end of a way"
    def fields(node): return node if isinstance(node, dict) else {}
    ends = [(data, fields(data))]
    for name in way.split(' > '):
        ends = [(to, said|fields(to)) for node,said in ends for to in step(node, name)]
    return ends

def term(data, words):
    "One value of a title"
    if re.fullmatch(N, words): return float(words)
    which,way = m.groups() if (m := re.fullmatch(rf'({"|".join(OF)}) of (.*)', words)) else (None, words)
    values = [v for v,_ in found(data, way)]
    if not values: raise ValueError(f'there is no "{way}"')
    if which=='number': return len(values)
    if len(values)==1 and isinstance(values[0], list): values = values[0]
    if len(values)>1 and not which: raise ValueError(f'"{way}" finds {len(values)} values: say which, or "mean of"')
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values): raise ValueError(f'"{way}" leads to no number')
    return OF[which](values) if which else values[0]

def terms(title): return re.split(r' ([-+*/]) ', title)

def value(data, title):
    "The value that a title asks for"
    first,*rest = terms(title)
    x = term(data, first)
    for sign,words in zip(rest[::2], rest[1::2]): x = DO[sign](x, term(data, words))
    return x

def written(text, x):
    "The text of a receipt with `x` in place of its number, in as many decimals"
    if len(numbers := list(re.finditer(f'[−-]?{N}', text)))!=1: raise ValueError('its text must hold one number')
    old = numbers[0]
    new = f'{x:,.{len(old[0].partition(".")[2])}f}'.replace('-', '−')
    return text[:old.start()]+new+text[old.end():]

def receipts(text, folder):
    "(match, what its text should be, what is wrong) of each receipt"
    for m in RECEIPT.finditer(text):
        text,target,title = m.groups()
        try: yield m, written(text, value(read(folder/target), title)), None
        except FileNotFoundError: yield m, text, f'{target} is gone'
        except ValueError as e: yield m, text, f'{target}: {e}'

def rendered(text, folder):
    "A text with the values of today in its receipts"
    for m,new,_ in reversed(list(receipts(text, folder))): text = text[:m.start(1)]+new+text[m.end(1):]
    return text

SIGNED = {'command': ['command'], 'commit': ['commit'], 'seed or processor': ['seed', 'seeds', 'processor', 'hardware']}

def unsigned(target, title):
    "What of `SIGNED` the entries around a receipt's values do not say"
    ways = [re.sub(rf'^({"|".join(OF)}) of ', '', words) for words in terms(title)[::2] if not re.fullmatch(N, words)]
    around = [said for way in ways for _,said in found(read(target), way)]
    return [what for what,keys in SIGNED.items() if not all(any(k in said for k in keys) for said in around)]

# ---------------------------------------------------------------- typed numbers

UNIT = (r'(?:%|per ?cent|times|(?:milli)?seconds?|minutes?|hours?|days|[mµ]?s|nats?|bits? (?:per|a) byte|[kKMGT]i?B(?:/s)?'
    r'|[kMGT]?FLOPs?(?:/s)?|(?:tokens?|targets?)(?:/s| (?:per|a) second))(?!\w)')
TYPED = re.compile(rf'(?<![\w.,/])({N}(?:(?:,| to| and| or|,? and| ±) {N})*)[ -]?{UNIT}|(?<![\w.,/])(\d+\.\d+)(?![\w.]*\d)')
NO_PROSE = (   # what is left out, and what stands for it
    (r'```.*?```', ''), (r'`[^`\n]*`', '`'), (r'^#+ [^\n]*', '#'), (r'\$\$.*?\$\$|\$[^$\n]*\$', '$'), (RECEIPT.pattern, 'a receipt'),
    (r'\b(?:[Ss]ections?|Tables?|Figures?|PyTorch|Python|version|Apache)[ -][\d.]+(?:(?:,| and| to) [\d.]+)*', 'a place'),
    (r'\b9\d(?: %| per ?cent) (?=interval|confidence)', ''),
    (r'[●○]{5} · \d+ minutes', '●'),   # an exercise begins
    (r'[\d¾½¼]+ (?:hours|minutes) of (?:reading|computing|exercises)', 'a path'))   # tests/test_site.py counts these

def prose(cell):
    "What a reader sees as text: markdown, and the words for a figure"
    text = source(cell)
    if cell['cell_type']=='code': text = '\n'.join(re.findall(r'^#\|\s*fig-alt:\s*(.*)', text, flags=re.M))
    for pattern,instead in NO_PROSE: text = re.sub(pattern, instead, text, flags=re.M|re.S)
    return text

def printed(cell):
    "The stored outputs of a cell, as text"
    for o in cell.get('outputs', []):
        data = {'text/plain': o.get('text', ''), **o.get('data', {})}
        yield from (''.join(v) for k,v in data.items() if not k.startswith('image'))

def amounts(text): return {float(n.replace(',', '').replace('_', '')) for n in re.findall(rf'(?<![\w.])(?:\d+(?:_\d+)+|{N})(?:e[+-]?\d+)?', text)}

def known(cells):
    "The amounts that cells print, and those that their code and formulas hold"
    shown,held = set(), set()
    for c in cells:
        if c['cell_type']=='code':
            shown |= {x for text in printed(c) for x in amounts(text)}
            held |= amounts(re.sub(r'^#\|.*', '', source(c), flags=re.M).replace(',', ', '))
            continue
        formulas = re.findall(r'\$\$.*?\$\$|\$[^$\n]*\$', source(c), flags=re.S)
        held |= {x for f in formulas if re.search(r'=|\\approx|\\le|\\ge', f) for x in amounts(f.replace('{,}', ''))}
    return shown, held

def holds(n, shown, held, percent):
    "Is a typed number one of those shown, rounded, or one of those held? (A single digit stands in too much code to be found there)"
    x,half = float(n.replace(',', '')), 0.5*10**-len(n.partition('.')[2])
    scales = (1, 100) if percent else (1,)     # a share may be printed as it is
    return any(abs(k*y-x)<=half*(1+1e-9) for k in scales for y in shown) or \
        any(abs(k*y-x)<=1e-9*x for k in scales for y in held if len(n)>1 or k>1)

def sections(cells):
    "The cells from one heading of the second level to the next; a heading within a cell divides it"
    parts = [[]]
    for c in cells:
        pieces = re.split('^(?=## )', source(c), flags=re.M) if c['cell_type']=='markdown' else [source(c)]
        for i,text in enumerate(pieces):
            if i: parts.append([])
            parts[-1].append(c | dict(source=text))
    return parts

def lines(cell):
    "The paragraphs of a cell's prose; those of an exercise, up to the next heading, are marked"
    asks = False
    for line in prose(cell).splitlines():
        asks = '●' in line or asks and line!='#'
        yield line, asks

def supposed(path):
    "The amounts in the exercises that a notebook of solutions answers"
    if path.parent.name!='solutions': return set()
    chapter = [c for p in NBS.glob(f'[0-9a]*/{path.name}') for c in read(p)['cells']]
    return {x for c in chapter for line,asks in lines(c) if asks for x in amounts(line)}

OUTSIDE = r'\]\(https?://(?!nanowhale\.|github\.com/nanowhale/|colab\.)'

def slug(heading): return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')

def shown_elsewhere(line, path):
    "The amounts that cells print in the sections that a paragraph links to"
    shown = set()
    for file,anchor in re.findall(r'\]\(([\w./]+\.ipynb)?#([\w-]+)\)', line):
        for cells in sections(read(path.parent/file if file else path)['cells']):
            headings = re.findall('^#+ (.*)', '\n'.join(source(c) for c in cells if c['cell_type']=='markdown'), flags=re.M)
            if anchor in map(slug, headings): shown |= known(cells)[0]
    return shown

def typed(path, planted=None):
    "(cell, number with its unit, the line) of each typed number that has no source"
    given = supposed(path)
    for cells in sections(planted or read(path)['cells']):
        shown,held = known(cells)
        for c in cells:
            for line in [line for line,asks in lines(c) if not asks and not re.search(OUTSIDE, line)]:
                there = shown|shown_elsewhere(line, path)
                for m in TYPED.finditer(line):
                    lost = [n for n in re.findall(N, m[0]) if not holds(n, there|given, held, re.search('%|cent', m[0]))]
                    if lost: yield c['id'], m[0], line

# ---------------------------------------------------------------- the whole

def name(path): return path.relative_to(NBS).as_posix() if path.is_relative_to(NBS) else path.name

def stale(path):
    "One line for each receipt that does not say what its file says"
    for c in [c for c in read(path)['cells'] if c['cell_type']=='markdown']:
        for m,text,wrong in receipts(source(c), path.parent):
            if wrong or text!=m[1]: yield f'{name(path)} #{c["id"]}: [{m[1]}] {wrong or f"is stale: {m[2]} says {text}"}'

def bare(path):
    "One line for each typed number without a source"
    for at,number,line in typed(path):
        i = line.index(number)
        yield f'{name(path)} #{at}: no receipt for "{number}", and no source beside it: ...{line[max(0, i-30):i+len(number)+20]}...'

def render(path):
    "Write the values of today into a notebook; whether that changed it"
    nb = read(path)
    for c in [c for c in nb['cells'] if c['cell_type']=='markdown']: c['source'] = rendered(source(c), path.parent).splitlines(keepends=True)
    text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+'\n'
    changed = text!=path.read_text(encoding='utf-8')
    if changed: path.write_text(text, encoding='utf-8')
    return changed

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('mode', choices=['render', 'check'])
    p.add_argument('files', nargs='*', type=Path, help='notebooks (default: all of nbs/)')
    a = p.parse_args()
    files = [f.resolve() for f in a.files] or notebooks()
    if a.mode=='render': print(*[f'{name(f)}: rendered' for f in files if render(f)], sep='\n')
    wrong = [line for f in files for line in [*stale(f), *(bare(f) if a.mode=='check' else ())]]
    print(*wrong, f'{sum(len(RECEIPT.findall(source(c))) for f in files for c in read(f)["cells"])} receipts, {len(wrong)} lines to mend', sep='\n')
    return bool(wrong)

if __name__=='__main__': sys.exit(main())
