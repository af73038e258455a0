"""Text to rows: nothing lost, nothing twice, nothing leaked, and one clear line for each kind of bad input"""
import paths   # noqa: F401, for tests/tools
import csv, gzip, importlib, io, json, os, random, uuid
from datetime import date, datetime
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
import pytest, torch
import nanowhale.train.data as D
from nanowhale.cli import main
from nanowhale.train.data import (BOM, embedded_corpus, encode, find_files, is_held_out, pack,
    piece_size, pieces, read_texts, split_held_out, train_tokenizer)
from nanowhale.train.stream import held_out_texts
from runs import SMALL, jsonl, texts

TEXTS = ['Whales sing.', 'Some dive for an hour.\n\nNo one knows how.', 'é 鯨 🐋', 'x'*50]

@pytest.fixture(scope='module')
def tok(): return train_tokenizer(TEXTS*20, 300)

@pytest.mark.parametrize('seed', range(20))
def test_pack_makes_each_token_a_target_once(seed):
    rng = random.Random(seed)
    docs = [[0, *(rng.randrange(2, 50) for _ in range(rng.randrange(0, 40))), 1] for _ in range(rng.randrange(1, 12))]
    context = rng.randrange(1, 30)
    rows = pack(docs, context, pad=1)
    flat,owner = [t for d in docs for t in d], [i for i,d in enumerate(docs) for _ in d]
    assert rows['input_ids'].shape==rows['docs'].shape and rows['input_ids'].shape[1]==context+1
    ids = torch.cat([rows['input_ids'][:1,0], rows['input_ids'][:,1:].flatten()]).tolist()
    doc = torch.cat([rows['docs'][:1,0], rows['docs'][:,1:].flatten()]).tolist()
    assert ids[:len(flat)]==flat and doc[:len(flat)]==owner
    assert set(doc[len(flat):])<={-1} and len(ids)-len(flat)<max(context, 2)
    assert torch.equal(rows['input_ids'][1:,0], rows['input_ids'][:-1,-1])   # neighbours overlap by one

def test_encode_marks_each_document_once_whatever_the_tokenizer_adds(tok):
    for ids,text in zip(encode(tok, TEXTS), TEXTS):
        assert ids[0]==0 and ids[-1]==1 and 0 not in ids[1:] and 1 not in ids[:-1]
        assert tok.decode(ids[1:-1])==text

def test_a_document_that_spells_a_mark_stays_text_to_a_reader(tok):
    assert tok.decode(tok('a <|unk|> b').input_ids[1:])=='a <|unk|> b'

def test_held_out_depends_on_content_alone():
    texts = [f'document {i}' for i in range(400)]
    train,held = split_held_out(texts)
    assert 5<len(held)<50 and not set(train)&set(held) and all(is_held_out(t) for t in held)
    shuffled = random.Random(0).sample(texts, 400)
    assert set(split_held_out(shuffled+['another'])[1])-{'another'}==set(held)
    assert split_held_out(texts+texts)==(train+train, held+held)   # copies stay on the same side

def test_documents_that_begin_alike_are_not_all_on_one_side():
    train,held = split_held_out([f'{"the same beginning "*50}{i}' for i in range(400)])
    assert 5<len(held)<50 and len(train)+len(held)==400

def test_the_embedded_corpus_shares_no_document_and_few_lines():
    train,held = split_held_out(embedded_corpus())
    assert not set(train)&set(held)
    assert shared_lines(train, held)<0.25

def test_pieces_lose_nothing():
    rng = random.Random(0)
    for _ in range(50):
        text = ''.join(rng.choice(['a', ' ', '\n', '\n\n', '\r\n', '\r', '. ', 'word', '鯨。']) for _ in range(200))
        size = rng.randrange(1, 100)
        out = list(pieces(text, size))
        assert ''.join(out)==text and all(size<=len(p)<=2*size for p in out[:-1]) and (len(out)==1 or size<=len(out[-1])<=3*size)
        parts = [text[i:i+7] for i in range(0, len(text), 7)]
        assert list(pieces(parts, size))==out                     # however it is read

ENDS = ['\n\n', '\r\n\r\n', '\n \t\n', '\r\r', '\n', '\r\n', '\r', '. ', '!" ', '。', ' ', '\t']

@pytest.mark.parametrize('best', range(len(ENDS)))
def test_a_long_document_is_cut_at_the_best_boundary_there_is(best):
    "Blank lines before lines before sentences before words: each piece ends with the best kind that its text holds"
    kinds = [ENDS[:4], ENDS[4:7], ENDS[7:10], ENDS[10:]]
    level = next(i for i,k in enumerate(kinds) if ENDS[best] in k)
    worse = [e for k in kinds[level+1:] for e in k]
    rng = random.Random(best)
    text = ''.join(f'whale{rng.choice(worse) if worse else ""}'*rng.randrange(3, 6)+'sea'+ENDS[best] for _ in range(200))
    out = list(pieces(text, 100))
    assert ''.join(out)==text and len(out)>20 and all(p.endswith('sea'+ENDS[best]) for p in out[:-1])

def test_without_any_boundary_characters_are_as_good(): assert [len(p) for p in pieces('鯨'*1000, 300)]==[300, 700]

def write(path, rows): path.write_text('\n'.join(map(json.dumps, rows)))

def test_files_and_folders(tmp_path):
    (tmp_path/'a.txt').write_text('One.\n\nTwo.')
    write(tmp_path/'b.jsonl', [dict(text='Three.'), dict(text=''), dict(text='Four.')])
    (tmp_path/'sub').mkdir()
    pq.write_table(pa.table(dict(text=['Five.'], n=[1])), tmp_path/'sub'/'c.parquet')
    (tmp_path/'sub'/'d.md').write_text('# Six')
    assert list(read_texts(tmp_path))==['One.\n\nTwo.', 'Three.', 'Four.', 'Five.', '# Six']
    write(tmp_path/'d.jsonl', [dict(body='Six.')])
    assert list(read_texts(tmp_path/'d.jsonl', field='body'))==['Six.']

# ---------------------------------------------------------------- names

ODD = ['book[1].txt', 'a*.txt', 'wh?le.txt', 'a::b.txt', '**', 'a{b,c}.txt', 'with space.txt', '100%.txt', 'é鯨.txt', '#1.txt', "it's.txt", '~x.txt', '!.txt']

@pytest.mark.parametrize('kind', ['text', 'jsonl', 'parquet', 'gz'])
@pytest.mark.parametrize('name', ODD)
def test_a_path_is_a_name_and_no_pattern(tmp_path, name, kind):
    "Beside it lie files that the name would match as a pattern; in a folder of such a name too"
    def put(path, text):
        path.parent.mkdir(exist_ok=True)
        if kind=='text': path.write_text(text)
        if kind=='jsonl': write(path.with_name(path.name+'.jsonl'), [dict(text=text)])
        if kind=='parquet': pq.write_table(pa.table(dict(text=[text])), path.with_name(path.name+'.parquet'))
        if kind=='gz': path.with_name(path.name+'.gz').write_bytes(gzip.compress(text.encode()))
        return path.with_name(path.name+dict(text='').get(kind, f'.{kind}'))
    asked = put(tmp_path/name, 'the right one')
    for other in ('book1.txt', 'ab.txt', 'whale.txt', 'a', 'b.txt'): put(tmp_path/other, 'the wrong one')
    assert list(read_texts(asked))==['the right one']
    assert sorted(read_texts(tmp_path))==['the right one']+['the wrong one']*5
    folder = tmp_path/f'data {name}'
    put(folder/'x.txt', 'inside')
    assert list(read_texts(folder))==['inside']

def test_a_missing_name_is_no_pattern_either(tmp_path):
    (tmp_path/'book1.txt').write_text('the wrong one')
    for gone in ('book[1].txt', 'book?.txt', '*.txt', '**', 'gone.txt'):
        with pytest.raises(FileNotFoundError, match='no such file'): list(read_texts(tmp_path/gone))
    with pytest.raises(ValueError, match='empty name'): find_files('')

# ---------------------------------------------------------------- the asked field alone

TEXTS_OF_ROWS = ['2024-01-31', '2024-01-31T12:00:00Z', '12:30', '31.12.1999', '1e5', 'null', '0012', 'true', 'Whale 鯨 🐋', 'two\r\nlines\rand more\n']

def test_other_fields_may_be_anything_in_jsonl(tmp_path):
    others = [{}, dict(n=None), dict(n=dict(a=[1, {}])), dict(n=3), dict(n='three'), dict(n=[[], 'x', None]), dict(type='message',
        payload=dict(role='user'), message=dict(id=1)),
        dict(n=10**4000), dict(n=float('nan')), dict(half='\ud800'), dict(n=True, text2='no')]
    rows = [dict(other, text=t) for other,t in zip(others*3, TEXTS_OF_ROWS*3)]
    lines = [json.dumps(r).replace('1'+'0'*4000, '9'*5000) for r in rows]
    (tmp_path/'a.jsonl').write_text('\n'.join(lines[:1]*3000+lines))                        # late, too
    assert list(read_texts(tmp_path/'a.jsonl'))==[t for t in [rows[0]['text']]*3000+[r['text'] for r in rows]]

def test_other_columns_may_be_anything_in_parquet(tmp_path):
    n = len(TEXTS_OF_ROWS)
    table = pa.table({'text': TEXTS_OF_ROWS, 'map': pa.array([[('a', 1)]]*n, pa.map_(pa.string(), pa.int64())), 'when': [datetime(2024, 1,
        1)]*n, 'none': pa.nulls(n),
        'id': pa.array([uuid.uuid4().bytes]*n, pa.uuid()), 'deep': [[[{'text': 'no'}]]]*n, 'text.x': ['no']*n, 'half': pa.array([1.5]*n, pa.float16()),
        'broken': pa.array([b'\xff']*n).cast(pa.binary()), 'day': [date(2024, 1, 1)]*n, 'long': pa.array([1]*n, pa.decimal128(38, 0))})
    pq.write_table(table, tmp_path/'a.parquet')
    assert list(read_texts(tmp_path/'a.parquet'))==TEXTS_OF_ROWS

@pytest.mark.parametrize('kind', [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_a_column_of_text_has_many_types(tmp_path, kind):
    pq.write_table(pa.table(dict(text=pa.array(TEXTS_OF_ROWS, pa.string()).cast(kind))), tmp_path/'a.parquet')
    assert list(read_texts(tmp_path/'a.parquet'))==TEXTS_OF_ROWS

@pytest.mark.parametrize('mark', [',', ';', '\t'])
def test_csv_keeps_every_text(tmp_path, mark):
    out = io.StringIO(newline='')
    rows = csv.writer(out, delimiter=mark)
    rows.writerow(['id', 'text'])
    for i,t in enumerate([*TEXTS_OF_ROWS, 'say "ah", then;\tdive', 'x'*300_000]): rows.writerow([i, t])
    (tmp_path/'a.csv').write_bytes(out.getvalue().encode())
    assert ''.join(read_texts(tmp_path/'a.csv'))==''.join([*TEXTS_OF_ROWS, 'say "ah", then;\tdive', 'x'*300_000])

def test_a_file_whose_every_text_looks_like_a_time(tmp_path):
    days = [f'2024-01-{i:02}T00:00:00' for i in range(1, 29)]
    write(tmp_path/'a.jsonl', [dict(text=t) for t in days])
    chats = [[dict(role='user', content=t), dict(role='assistant', content=t[:10])] for t in days]
    write(tmp_path/'b.jsonl', [dict(messages=c) for c in chats])
    assert list(read_texts(tmp_path/'a.jsonl'))==days
    assert [json.loads(t) for t in read_texts(tmp_path/'b.jsonl', 'messages')]==chats

def test_a_dataset_of_the_hub_follows_the_same_rules(monkeypatch):
    "Its rows come from `datasets`; a position in the middle of a long document is exact"
    import datasets
    long = ' '.join(f'whale {i}' for i in range(9000))
    rows = [dict(id=i, text=t, whole=3) for i,t in enumerate(['One.', None, ' ', long, BOM+'Two.'])]
    monkeypatch.setattr(datasets, 'load_dataset', lambda name, **kw: datasets.IterableDataset.from_generator(lambda: iter(rows)))
    got = list(read_texts('us/whales'))
    assert got==['One.', *pieces(long), 'Two.'] and len(got)>4
    for n in range(1, len(got)):
        stream = D.open_texts('us/whales')
        for _ in zip(range(n), stream): pass
        later = D.open_texts('us/whales')
        later.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert [r['text'] for r in later]==got[n:], n
    rows[3] = dict(id=3, body='x')
    with pytest.raises(D.NoText, match='us/whales, row 4: no text in "text"'): list(read_texts('us/whales'))
    rows[3] = dict(id=3, text=[dict(role='user', content=long)])
    assert json.loads(list(read_texts('us/whales'))[1])==rows[3]['text']

# ---------------------------------------------------------------- one rule for bad rows

@pytest.mark.parametrize('name,content,says', [
    ('empty.txt', b'', 'is empty'), ('latin.txt', b'caf\xe9', 'not UTF-8 text (byte 3)'), ('wide.txt', 'whale'.encode('utf-16-le'), 'not UTF-8 text (byte 1)'),
    ('late.txt', b'a'*10**6+b'\xe9', 'not UTF-8 text (byte 1000000)'), ('cut.txt', 'é'.encode()[:1], 'not UTF-8 text (byte 0)'),
    ('picture', b'\x89PNG\r\n\x1a\n', 'not UTF-8 text (byte 0)'),
    ('broken.jsonl', b'{"text": "a"}\n{"text": ', 'broken.jsonl is not a readable .jsonl file: line 2'), ('bad.jsonl',
        b'{"text": "a"}\n{"text": "caf\xe9"}', 'not UTF-8 text (line 2)'),
    ('field.jsonl', b'{"text": "a"}\n\n{"body": "a"}', 'field.jsonl, line 3: no text in "text" (its fields: body)'), ('number.jsonl',
        b'{"text": 3}', 'line 1: no text in "text", but 3'),
    ('object.jsonl', b'{"text": {"a": 1}}', 'line 1: no text in "text"'), ('list.jsonl', b'["a"]', 'line 1: no row with fields'),
        ('word.jsonl', b'"a"', 'line 1: no row with fields'),
    ('half.jsonl', b'{"text": "a"}\n{"text": "\\ud83d"}', 'half.jsonl, line 2: half a character'), ('chat.jsonl',
        b'{"text": ["\\ud83d"]}', 'line 1: half a character'),
    ('deep.jsonl', b'{"text": "a", "n": '+b'['*10**5+b'}', 'deep.jsonl is not a readable .jsonl file: line 1'),
    ('wide.jsonl', '{"text": "a"}'.encode('utf-16'), 'not UTF-8 text (line 1)'), ('blank.jsonl', b'\n\n', 'has no rows'), ('nulls.jsonl',
        b'{"text": null}\n', 'holds no text'),
    ('other.csv', b'a,b\n1,2', 'line 1: no text in "text" (its fields: a, b)'), ('comma.csv', b'n,text\n1,a\n2,Well, no', 'comma.csv, line 3: 3 values'),
    ('short.csv', b'n,text\n1', 'short.csv, line 2: 1 values'), ('quote.csv', b'n,text\n1,"a', 'quote.csv is not a readable .csv file: line 2'),
    ('latin.csv', b'n,text\n1,caf\xe9', 'not UTF-8 text (line 2)'), ('head.csv', b'n,text\n', 'has no rows'),
    ('broken.parquet', b'PAR1 no', 'not a readable .parquet'), ('not.txt.gz', b'plain', 'not a readable .gz'), ('not.jsonl.zst', b'plain',
        'not a readable .zst')])
def test_bad_files_end_in_one_line(tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(D.NoText) as e: list(read_texts(tmp_path/name))
    assert name in str(e.value) and says in str(e.value) and '\n' not in str(e.value)

def test_bad_parquet_rows_are_named(tmp_path):
    good = ['Whales sing.']*2500
    cases = {'null': (pa.array([*good, None]), None), 'bytes': (pa.array([*(t.encode() for t in good), b'\xff']), 'row 2501: "text" is not UTF-8'),
        'number': (pa.array([3]), 'row 1: no text in "text", but 3'), 'time': (pa.array([datetime(2024, 1, 1)]), 'row 1: no text in "text", but 2024'),
        'none': (pa.array([], pa.string()), 'has no rows'),
        'broken': (pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b'\0\0\0\0\1\0\0\0'), pa.py_buffer(b'\xff')]), 'row 1: "text" is not UTF-8')}
    for name,(column,says) in cases.items():
        pq.write_table(pa.table(dict(text=column)), path := tmp_path/f'{name}.parquet')
        if says is None: assert list(read_texts(path))==good; continue
        with pytest.raises(D.NoText) as e: list(read_texts(path))
        assert says in str(e.value) and str(path) in str(e.value)
    pq.write_table(pa.table(dict(body=good)), path)
    with pytest.raises(D.NoText, match='its fields: body'): list(read_texts(path))

@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv', 'a.parquet'])
def test_null_and_blank_texts_are_left_out_of_every_table(tmp_path, name):
    rows = ['One.', None, '', ' \n', 'Two.']
    if name=='a.jsonl': write(tmp_path/name, [dict(text=t) for t in rows])
    if name=='a.csv': (tmp_path/name).write_text('n,text\n'+''.join(f'1,"{t or ""}"\n' for t in rows))
    if name=='a.parquet': pq.write_table(pa.table(dict(text=rows)), tmp_path/name)
    assert list(read_texts(tmp_path/name))==['One.', 'Two.']

def test_what_a_folder_leaves_out_is_said_in_one_line_and_once(tmp_path, capsys):
    """A folder called x.parquet, links to nothing and to folders, empty files beside good ones, a parquet file without
    rows, pictures, other encodings, tables without the field"""
    (tmp_path/'x.parquet').mkdir()
    pq.write_table(pa.table(dict(text=['Inside.'])), tmp_path/'x.parquet'/'part-0.parquet')
    (tmp_path/'good.rst').write_text('Good.'); (tmp_path/'code.py').write_text('print("Code.")')
    (tmp_path/'.git').mkdir(); (tmp_path/'.git'/'HEAD').write_text('ref'); (tmp_path/'.hidden').write_text('no')
    left = dict(empty='empty', gone='a link to nothing', linked='a link to a folder', picture='not UTF-8 text', tar='not UTF-8 text',
        latin='not UTF-8 text', rows='no rows', other='no field "text"',
        pipe='no regular file')
    (tmp_path/'empty').touch(); (tmp_path/'gone').symlink_to(tmp_path/'nowhere'); (tmp_path/'linked').symlink_to(tmp_path/'x.parquet')
    (tmp_path/'picture').write_bytes(b'\x89PNG'); (tmp_path/'tar').write_bytes(b'a\0\0'); (tmp_path/'latin').write_bytes(b'caf\xe9'); os.mkfifo(tmp_path/'pipe')
    pq.write_table(pa.table(dict(text=pa.array([], pa.string()))), tmp_path/'rows.parquet')
    (tmp_path/'other.csv').write_text('a,b\n1,2')
    for _ in range(3): assert sorted(read_texts(tmp_path))==['Good.', 'Inside.', 'print("Code.")']
    said = capsys.readouterr().err
    assert said.count('\n')==1 and said.startswith(f'left out of {tmp_path}: ') and said.endswith('and 4 more\n')
    files = {Path(f).relative_to(tmp_path).as_posix().removesuffix('.parquet').removesuffix('.csv'): D.why_left(f, 'text') for f in tmp_path.iterdir()}
    assert all(why in files[name] for name,why in left.items()), files
    for f in ('good.rst', 'code.py'): (tmp_path/f).unlink()
    (tmp_path/'x.parquet'/'part-0.parquet').unlink()
    with pytest.raises(D.NoText, match='holds no text: left out empty'): find_files(tmp_path)

def test_what_begins_well_and_breaks_later_is_no_file_to_leave_out(tmp_path):
    (tmp_path/'a.txt').write_text('Good.')
    for name,content in {'b.txt': b'a'*10**6+b'\xff', 'b.jsonl': b'{"text": "a"}\n{"te', 'c.jsonl': b'{"te', 'b.parquet': b'PAR1',
        'b.txt.gz': gzip.compress(b'whale')[:-9]}.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(D.NoText, match=name): list(read_texts(tmp_path))
        (tmp_path/name).unlink()

def test_a_link_to_nothing_is_a_missing_file(tmp_path):
    (tmp_path/'book').symlink_to(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='no such file'): list(read_texts(tmp_path/'book'))

def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(D.NoText, match='no regular file'): list(read_texts(tmp_path/'pipe'))

@pytest.mark.parametrize('end,squeeze', [('gz', 'gzip'), ('zst', 'zstandard')])
@pytest.mark.parametrize('name', ['a.txt', 'b.jsonl', 'c.csv', 'd.parquet', 'e.md'])
def test_compressed_files_read_like_plain_ones(tmp_path, name, end, squeeze):
    plain,packed = tmp_path/name,tmp_path/f'{name}.{end}'
    if name=='b.jsonl': write(plain, [dict(text='Three 鯨.'), dict(text='Four.')])
    elif name=='d.parquet': pq.write_table(pa.table(dict(text=['Three 鯨.', 'Four.'])), plain)
    else: plain.write_text('text\nOne é.\n\nTwo.')
    packed.write_bytes(importlib.import_module(squeeze).compress(plain.read_bytes()))
    assert list(read_texts(packed))==list(read_texts(plain))!=[]
    packed.write_bytes(packed.read_bytes()[:-9])   # cut short
    with pytest.raises(ValueError, match=f'{name}.{end} is not a readable'): list(read_texts(packed))

def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'): list(read_texts(tmp_path/'gone.txt'))
    with pytest.raises(ValueError, match='holds no text'): list(read_texts(tmp_path))

# ---------------------------------------------------------------- text of any shape, not a byte lost

def store(folder, kind, text):
    "The same text as one document of a file of that kind; its path"
    path = folder/f'data.{kind}'
    if kind=='jsonl': write(path, [dict(text=text)])
    elif kind=='parquet': pq.write_table(pa.table(dict(text=[text])), path)
    elif kind=='csv':
        with path.open('w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([['n', 'text'], ['1', text]])
    else: path.write_bytes(text.encode())
    return path

FORMATS = ['txt', 'md', 'tex', 'log', 'jsonl', 'csv', 'parquet']
VERSE = '\n'.join(t for t in texts(9000, words=5))
SHAPES = dict(verse=VERSE, line=VERSE.replace('\n', ' '), old_mac=VERSE.replace('\n', '\r'), windows=VERSE.replace('\n', '\r\n'),
    mixed=VERSE.replace('sea\n', 'sea\r\n\r'),
    paragraphs=VERSE.replace('sea\n', 'sea\n\n'), no_spaces=''.join(t for t in VERSE.split()), small=VERSE[:3000], few_kb=VERSE[:3000].replace('\n', ' '))

@pytest.mark.parametrize('shape', SHAPES)
def test_a_text_of_any_shape_is_cut_alike_in_every_format_and_can_be_held_out(tmp_path, shape):
    text,all_pieces = SHAPES[shape],[]
    for kind in FORMATS:
        path = store(tmp_path, kind, text)
        got = list(read_texts(path))
        assert ''.join(got)==text and len(got)>5, kind
        if path.stat().st_size>850_000 or kind in ('txt', 'md', 'tex', 'log'): all_pieces.append(got)
        held,one_in = held_out_texts(path)
        train = [t for t in got if not is_held_out(t, one_in)]
        assert train and held and not set(train)&set(held) and len(''.join(train))>len(text)/2, (kind, one_in)
    assert all(p==all_pieces[0] for p in all_pieces)

@pytest.mark.parametrize('mark', ['', BOM])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('kind', FORMATS)
def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path, kind, end, mark):
    text = f'One.{end}Two.{end}{BOM}{end}Three.{end}'
    path = store(tmp_path, kind, mark+text)
    if kind in ('jsonl', 'csv'): path.write_bytes(mark.encode()+path.read_bytes())        # of the file, and of its text
    assert list(read_texts(path))==[text]

def test_two_different_documents_are_enough(tmp_path):
    for seed in range(30):
        for n in (2, 3, 10, 20):
            rows = [f'{t} ' for t in texts(n, words=9, seed=seed)]*2
            write(tmp_path/'a.jsonl', [dict(text=t) for t in rows])
            held,one_in = held_out_texts(tmp_path/'a.jsonl')
            train,again = split_held_out(rows, one_in)
            assert train and set(again)==set(held) and len(set(train))+len(held)==n

@pytest.mark.parametrize('n', [2, 5, 10, 20])
def test_few_long_documents_are_held_out_in_pieces(tmp_path, n):
    "A hundred files of so many books: none is refused, and a copy of a book is on the same side piece by piece"
    words = texts(n*100, words=900)
    for seed in range(100):
        books = [' '.join(words[(seed+7*i)%len(words)].split()*2) for i in range(n)]
        write(tmp_path/'a.jsonl', [dict(text=t) for t in books+books[:1]])
        held,one_in = held_out_texts(tmp_path/'a.jsonl')
        train = [t for t in read_texts(tmp_path/'a.jsonl') if not is_held_out(t, one_in)]
        assert train and held and not set(train)&set(held)

def test_the_embedded_corpus_is_split_as_ever():
    held,one_in = held_out_texts(None)
    assert one_in==20 and held==split_held_out(embedded_corpus())[1]

def test_pieces_follow_the_size_of_the_source(tmp_path):
    (tmp_path/'a.txt').write_text(VERSE[:100_000])
    assert piece_size(100_000)==2000 and all(2000<=len(t)<=6000 for t in read_texts(tmp_path/'a.txt'))

@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'csv', 'parquet', 'txt.gz'])
def test_a_large_file_is_never_in_memory(tmp_path, kind):
    "150 MB, read by a process that may take 100 MB more than it has"
    if not hasattr(os, 'fork'): pytest.skip('limits memory as Linux does')
    from test_abuse import limited
    path,text = tmp_path/f'a.{kind}','the whale sings a song of two or three notes\n'*20_000
    if kind=='parquet':
        with pq.ParquetWriter(path, pa.schema([('text', pa.string())]), compression='none', use_dictionary=False) as w:
            for _ in range(17): w.write_table(pa.table(dict(text=[text]*10)))
    else:
        row = dict(jsonl=json.dumps(dict(text=text))+'\n', csv=f'"{text}"\n').get(kind, text)
        with (gzip.open(path, 'wt') if kind=='txt.gz' else path.open('w')) as f:
            if kind=='csv': f.write('text\n')
            for _ in range(170): f.write(row)
    list(read_texts(store(tmp_path, 'parquet', 'x')))   # what is loaded once is loaded
    limited({0: lambda: count(path, 170*len(text))}, room=220*2**20)

def count(path, want):
    n = sum(len(t) for t in read_texts(path))
    if n!=want: raise RuntimeError(f'{n} characters of {want}')
    return ''

# ---------------------------------------------------------------- at the command line

def test_a_run_on_one_long_line_and_on_a_few_books(tmp_path, monkeypatch, capsys):
    import nanowhale.train.loop as T
    monkeypatch.setattr(T.Log, 'plot', lambda self: None)
    (tmp_path/'verse.txt').write_text(' '.join(texts(60)))
    write(tmp_path/'books.jsonl', [dict(text=' '.join(texts(30, seed=i))) for i in range(3)])
    for data in ('verse.txt', 'books.jsonl'):
        assert main(['train', '--data', str(tmp_path/data), '--out', str(tmp_path/data.split('.')[0]), '--steps', '1', '--evals', '1',
            *SMALL])==0, capsys.readouterr().err

def test_rows_that_are_mostly_padding_are_told(tmp_path, monkeypatch, capsys):
    import nanowhale.train.loop as T
    monkeypatch.setattr(T.Run, 'go', lambda self: (_ for _ in ()).throw(ValueError('far enough')))
    (tmp_path/'a.jsonl').write_text(jsonl(texts(60)))
    for context,warned in ((64, False), (20_000, True)):
        assert main(['train', '--data', str(tmp_path/'a.jsonl'), '--out', str(tmp_path/f'{context}'), '--context', str(context), '--batch-size', '1'])==1
        err = capsys.readouterr().err
        assert ('are padding' in err)==warned and err.count('choose a smaller --context')==warned, err

@pytest.mark.parametrize('words,says', [
    (['--init', 'A', '--tokenizer', 'B'], "init='A' takes the place of tokenizer='B'"), (['--init', 'A', '--init-std', '0.1'], "takes the place of init_std"),
    (['--chat', 'C', '--init', 'A', '--data', 'B'], "chat='C' takes the place of data='B'"), (['--chat', 'C'], 'name its folder with --init'),
    (['--recipe', 'chat', '--data', 'B'], 'name them with --chat'), (['--preset', 'nanowhale_100m', '--init', 'A', '--tokenizer', 'B'],
        "takes the place of tokenizer='B'")])
def test_options_that_exclude_each_other(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(['train', *words])==1
    err = capsys.readouterr().err
    assert says in err and err.count('\n')==1 and not list(tmp_path.iterdir())

def test_a_resumed_run_keeps_its_recipe_or_says_so(tmp_path, capsys):
    from dataclasses import asdict
    from nanowhale.train.recipe import Recipe
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'run.json').write_text(json.dumps(dict(preset='tiny', seed=3, recipe=asdict(Recipe(lr=0.5, data='x.txt')), version='1')))
    resume = ['train', '--resume', '--out', str(tmp_path/'run')]
    begun = ((['--lr', '1'], '--lr 1.0 (it has 0.5)'), (['--data', 'y.txt'], '--data y.txt (it has x.txt)'),
        (['--seed', '4'], '--seed 4 (it has 3)'), (['--preset', 'tiny_v4'], '--preset tiny_v4 (it has tiny)'))
    for words,says in begun:
        assert main([*resume, *words])==1
        assert f'not with {says}' in capsys.readouterr().err
    assert main([*resume, '--lr', '0.5', '--data', 'x.txt', '--seed', '3'])==1
    assert 'x.txt: no such file' in capsys.readouterr().err            # it went on, and further

def test_a_run_does_not_read_what_it_writes(tmp_path, capsys):
    (tmp_path/'a.jsonl').write_text(jsonl(texts(60)))
    assert main(['train', '--data', str(tmp_path), '--out', str(tmp_path/'runs'/'whale')])==1
    assert 'would read what it writes' in capsys.readouterr().err and not (tmp_path/'runs').exists()

def shared_lines(train, held) -> float:
    "Share of the held-out lines over 40 characters that also stand in the training text"
    lines = {l.strip() for t in train for l in t.split('\n') if len(l.strip())>40}
    unseen = [l.strip() for t in held for l in t.split('\n') if len(l.strip())>40]
    return sum(l in lines for l in unseen)/len(unseen)

def overlap() -> dict:
    "How much of the embedded corpus's held-out part the training part gives away, and what that is worth to a compressor"
    import lzma
    train,held = split_held_out(embedded_corpus())
    a,b = ('\n\n'.join(t).encode() for t in (train, held))
    xz = lambda data: len(lzma.compress(data, preset=9|lzma.PRESET_EXTREME))
    return {'held-out lines over 40 characters that also stand in training': round(shared_lines(train, held), 3),
            'xz -9e, bits per byte': round(8*xz(b)/len(b), 3),
            'xz -9e after the training text, bits per byte': round(8*(xz(a+b)-xz(a))/len(b), 3)}

if __name__=='__main__':
    for k,v in overlap().items(): print(f'{k}: {v}')
