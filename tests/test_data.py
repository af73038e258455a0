"""Text to rows: nothing lost, nothing twice, nothing leaked, and one clear line for each kind of bad input"""
import json, random
import pytest, torch
from nanowhale.data import embedded_corpus, encode, is_held_out, pack, pieces, read_texts, split_held_out, train_tokenizer

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
        text = ''.join(rng.choice(['a', ' ', '\n', '\n\n', 'word']) for _ in range(200))
        size = rng.randrange(1, 100)
        out = pieces(text, size)
        assert ''.join(out)==text and all(p.endswith('\n\n') and len(p)>size for p in out[:-1])

def write(path, rows): path.write_text('\n'.join(map(json.dumps, rows)))

def test_files_and_folders(tmp_path):
    import pandas as pd
    (tmp_path/'a.txt').write_text('One.\n\nTwo.')
    write(tmp_path/'b.jsonl', [dict(text='Three.'), dict(text=''), dict(text='Four.')])
    (tmp_path/'sub').mkdir()
    pd.DataFrame(dict(text=['Five.'], n=[1])).to_parquet(tmp_path/'sub'/'c.parquet')
    (tmp_path/'ignored.csv').write_text('x')
    assert list(read_texts(tmp_path))==['One.\n\nTwo.', 'Three.', 'Four.', 'Five.']
    write(tmp_path/'d.jsonl', [dict(body='Six.')])
    assert list(read_texts(tmp_path/'d.jsonl', field='body'))==['Six.']

@pytest.mark.parametrize('name,content,says', [
    ('empty.txt', b'', 'is empty'), ('latin.txt', b'caf\xe9', 'not UTF-8'), ('table.csv', b'a,b', 'cannot read ".csv"'),
    ('broken.jsonl', b'{"text": "a"}\n{"text": ', 'not a readable .jsonl'), ('bad.jsonl', b'{"text": "caf\xe9"}', 'not UTF-8'),
    ('field.jsonl', b'{"body": "a"}', 'its fields: body'), ('number.jsonl', b'{"text": 3}', 'no text in "text"'),
    ('broken.parquet', b'PAR1 no', 'not a readable .parquet')])
def test_bad_files_end_in_one_line(tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as e: list(read_texts(tmp_path/name))
    assert name in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('end,squeeze', [('gz', 'gzip'), ('zst', 'zstandard')])
@pytest.mark.parametrize('name', ['a.txt', 'b.jsonl'])
def test_compressed_files_read_like_plain_ones(tmp_path, name, end, squeeze):
    import importlib
    plain,packed = tmp_path/name,tmp_path/f'{name}.{end}'
    plain.write_text('One é.\n\nTwo.') if name=='a.txt' else write(plain, [dict(text='Three 鯨.'), dict(text='Four.')])
    packed.write_bytes(importlib.import_module(squeeze).compress(plain.read_bytes()))
    assert list(read_texts(packed))==list(read_texts(plain))!=[]
    if packed.name=='a.txt.zst': return            # zstandard's reader takes a frame cut short for its end, and text has no form that would tell
    packed.write_bytes(packed.read_bytes()[:-9])   # cut short
    with pytest.raises(ValueError, match=f'{name}.{end} is not a readable'): list(read_texts(packed))

def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'): list(read_texts(tmp_path/'gone.txt'))
    with pytest.raises(ValueError, match='holds no'): list(read_texts(tmp_path))

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
