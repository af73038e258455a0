"Reference pages out of the modules: each name with its signature, its comments as a table, and the line where it stands"
import ast, importlib, inspect, re

from fastcore.docments import docments

EMPTY = inspect.Parameter.empty
SAYS_NOTHING = {None, '', EMPTY}

def plain(text):
    "`text` of a comment as Markdown in a table: what stands in backticks is code, the rest is meant to the letter"
    parts = re.split(r'(`[^`]+`)', ' '.join(str(text).split()))
    return ''.join(p.replace('|', r'\|') if i%2 else re.sub(r'([\\*_$|\[\]<>{}#~])', r'\\\1', p) for i,p in enumerate(parts))

def type_name(anno):
    if anno in (EMPTY, None, type(None)): return ''
    name = anno.__name__ if isinstance(anno, type) and not getattr(anno, '__args__', None) else str(anno)
    return f'`{re.sub(r"(typing|torch|pathlib|collections.abc)[.](nn[.]|optim[.]optimizer[.]|optim[.])?", "", name)}`'.replace('|', r'\|')

def default(value):
    if value is EMPTY: return ''
    text = value.__name__ if inspect.isroutine(value) or inspect.isclass(value) else repr(value)
    return '`'+('...' if ' at 0x' in text or len(text)>40 else text).replace('|', r'\|')+'`'

def table(obj):
    "Parameters and what is returned, as a table; nothing where nobody commented on anything"
    rows = docments(obj, full=True)
    rows.pop('self', None); rows.pop('cls', None)
    if not any(r['docment'] for r in rows.values()): return ''
    some = any(r['default'] is not EMPTY for r in rows.values())
    out = ['| | type | default | |', '|---|---|---|---|'] if some else ['| | type | |', '|---|---|---|']
    for name,r in rows.items():
        if name=='return' and not r['docment'] and type_name(r['anno']) in SAYS_NOTHING: continue
        label = '*returns*' if name=='return' else f'`{name}`'
        cells = [label, type_name(r['anno']), *([default(r['default'])] if some else []), plain(r['docment'] or '')]
        out.append(f'| {" | ".join(cells)} |')
    return '\n'.join(out)

def signature(name, obj):
    try: params = list(inspect.signature(obj).parameters.values())
    except (TypeError, ValueError): return name
    if len(params)>8 or any(p.kind is p.VAR_POSITIONAL and inspect.isclass(obj) for p in params): return f'{name}(...)'
    shown = lambda value: EMPTY if value is EMPTY else Literally(default(value).strip('`'))
    bare = [p.replace(annotation=EMPTY, default=shown(p.default)) for p in params if p.name not in ('self', 'cls')]
    return name+str(inspect.Signature(bare))

class Literally:
    def __init__(self, text): self.text = text
    def __repr__(self): return self.text

def doc(obj): return inspect.cleandoc(obj.__doc__ or '') if inspect.isroutine(obj) or inspect.isclass(obj) or isinstance(obj, property) else ''

def definitions(tree):
    "name -> (first line, last line) of what a module defines at its top, and of the methods in its classes"
    out = {}
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            out[n.name] = n.lineno,n.end_lineno
            if isinstance(n, ast.ClassDef): out |= {f'{n.name}.{m.name}': (m.lineno, m.end_lineno) for m in n.body if isinstance(m, ast.FunctionDef)}
        elif isinstance(n, ast.Assign):
            for target in n.targets:
                for t in (target.elts if isinstance(target, ast.Tuple) else [target]):
                    if isinstance(t, ast.Name): out[t.id] = n.lineno,n.end_lineno
    return out

def slug(heading): return re.sub(r'[^\w\- ]', '', heading.replace('`', '').lower()).strip().replace(' ', '-')

def sections(nb):
    "Name that a chapter's exported cells define -> anchor of the section it stands in"
    where,out = '',{}
    for c in nb['cells']:
        text = ''.join(c['source'])
        if c['cell_type']=='markdown':
            if h := re.findall(r'^##+ (.*)', text, flags=re.M): where = slug(h[-1])
        elif re.match(r'#\|\s*export', text): out |= dict.fromkeys(definitions(ast.parse(text)), where)
    return out

def reference(module, name):
    "The label of a name; labels do not tell `Linear` from `linear`, so it says what the name is"
    kind = 'constant' if name.isupper() else 'class' if name[0].isupper() else 'function'
    return f'{kind}-{module}-{name}'.lower().replace('_', '-').replace('.', '-')

def members(cls, lines):
    "Methods worth a place of their own: forward, and what has a docstring"
    for key,m in vars(cls).items():
        m = m.__func__ if isinstance(m, (classmethod, staticmethod)) else m
        if f'{cls.__name__}.{key}' in lines and (key=='forward' or (not key.startswith('_') and doc(m))): yield key,m

def page(module, lesson, root, git):
    "The reference page of one module"
    mod,file = importlib.import_module(f'nanowhale.{module}'),f'nanowhale/{module.replace(".", "/")}.py'
    code = (root/file).read_text(encoding='utf-8')
    lines,chapter,heading,nb = definitions(ast.parse(code)),*lesson
    taught,text = sections(nb),code.splitlines()
    def entry(name, obj, level):
        at,end = lines[name]
        links = [f'[source]({git}/blob/main/{file}#L{at})']
        if where := taught.get(name): links.append(f'[in its chapter](../{chapter}.ipynb#{where})')
        out = [f'({reference(module, name)})=', f'{"#"*level} `{name}`', '{.links}\n'+' '.join(links)]
        call = obj.fget if isinstance(obj, property) else obj
        if callable(obj) and not isinstance(obj, property): out.append(f'```python\n{signature(name, obj)}\n```')
        elif not isinstance(obj, property): out.append('```python\n'+'\n'.join(text[at-1:end][:12])+'\n```')
        if doc(obj): out.append(plain(doc(obj)))
        if callable(call) and (rows := table(call)): out.append(rows)
        return out
    out = [f'# nanowhale.{module}', f'{{.subtitle}}\n> {plain(mod.__doc__ or "")}',
        f'Taught in [{heading}](../{chapter}.ipynb), which exports [{file}]({git}/blob/main/{file}).']
    for name in mod.__all__:
        obj = getattr(mod, name)
        out += entry(name, obj, 2)
        if inspect.isclass(obj):
            for key,m in members(obj, lines): out += entry(f'{name}.{key}', m, 3)
    return '\n\n'.join(out)+'\n'

def pages(root, git, lessons):
    "Name -> reference for all exported names but those that two modules share, where a plain one of the model counts; and module -> its page"
    import sys
    sys.path.insert(0, str(root))
    texts = {m: page(m, lesson, root, git) for m,lesson in lessons.items()}
    names = {}
    for m in lessons:
        for n in importlib.import_module(f'nanowhale.{m}').__all__: names.setdefault(n, []).append(m)
    plain = {n: [m for m in at if m.startswith('model.')] or at for n,at in names.items()}
    return {n: reference(at[0], n) for n,at in plain.items() if len(at)==1}, texts
