"""Conversations: who speaks, what is a target, who sees whom; a run that resumes to the bit; a terminal that keeps its manners.

    python tests/test_chat.py --data FILE --init FOLDER [--steps N]     fine-tune a whale, before and after: results/chat.json
"""
import paths   # noqa: F401, for tests/tools
import argparse, json, math, os, platform, signal, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
import nanowhale.generate.chat as C
from nanowhale.presets import get_preset
from nanowhale.train.data import load_tokenizer, train_tokenizer
from nanowhale.train.evaluate import evaluate
from nanowhale.model.whale import Whale
from nanowhale.train.recipe import Recipe
from nanowhale.train.step import n_targets
from nanowhale.train.stream import held_out_texts
from nanowhale.train.loop import Run
from nanowhale.train.checkpoint import Stopped, read_metrics
from nanowhale.run import train
from runs import WORDS, provenance

ROOT = Path(__file__).resolve().parents[1]
MAIN = 'import sys; from nanowhale.cli import main; sys.exit(main())'

def measure(args):
    "Fine-tune, and keep what it measured: held-out loss on the answers, and what the whale answers before and after"
    with tempfile.TemporaryDirectory() as d:
        out = Path(args.keep or d)/'chat'
        results = train(chat=args.data, init=args.init, out=str(out), steps=args.steps)
        recipe = Recipe(**json.loads((out/'run.json').read_text())['recipe'])
        texts,_ = held_out_texts(args.data, recipe.field)
        held = C.HeldOutChats(texts, load_tokenizer(out), recipe, 2048)
        said = {when: held.sample(Whale.from_pretrained(f), 2) for when,f in (('before', args.init), ('after', out))}
        curve = [[m['step']+1, round(m['held_out_loss'], 4)] for m in read_metrics(out/'metrics.jsonl') if 'held_out_loss' in m]
    command = ' '.join(['python tests/test_chat.py', *(Path(w).name if '/' in w else w for w in args.words)])
    spec = {k: v for k,v in vars(recipe).items() if k not in ('chat', 'init', 'data', 'tokenizer')}
    figures = provenance(command) | dict(python=platform.python_version(), data=Path(args.data).name, recipe=spec, results=results,
        held_out=curve, conversations=len(held.chats), samples=said)
    (ROOT/'results'/'chat.json').write_text(json.dumps(figures, indent=1, ensure_ascii=False)+'\n')
    print(json.dumps(figures, indent=1, ensure_ascii=False))

# ---------------------------------------------------------------- masks

def said(g, n): return ' '.join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=g))

def conversations(n, seed=0):
    "Conversations of one to four exchanges, some with a system message, in words, blanks and signs"
    g,odd,out = torch.Generator().manual_seed(seed),['assistant\n', 'user:', '\n\n x ', 'été 🐋', '  '],[]
    for i in range(n):
        c = [dict(role='system', content=said(g, 3))] if i%3==0 else []
        for j in range(1+i%4): c += [dict(role='user', content=said(g, 4)+odd[(i+j)%5]), dict(role='assistant', content=odd[i%4]+said(g, 5))]
        out.append(c)
    return out

@pytest.fixture(scope='module')
def tok(): return C.with_template(train_tokenizer([m['content'] for c in conversations(60) for m in c], 400))

def wanted(tok, c):
    "Ids and labels of our own template, a message at a time and by no template at all"
    enc = lambda s: tok.encode(s, add_special_tokens=False)
    ids,labels = [tok.bos_token_id],[-100]
    for m in c:
        mark,body = enc(m['role']+'\n'),enc(m['content'].strip())+[tok.eos_token_id]
        ids += mark+body; labels += [-100]*len(mark)+(body if m['role']=='assistant' else [-100]*len(body))
    return ids, labels

def check_masks(tok, encode):
    for c in conversations(24, seed=1): assert encode(tok, c)==wanted(tok, c)

def test_exactly_the_answers_and_their_end_marks_are_targets(tok): check_masks(tok, C.encode_chat)

def user_too(tok, c): ids,_ = C.encode_chat(tok, c); return ids, [-100, *ids[1:]]
def one_early(tok, c): ids,labels = C.encode_chat(tok, c); return ids, [*labels[1:], -100]
def no_end(tok, c): ids,labels = C.encode_chat(tok, c); return ids, [-100 if l==tok.eos_token_id else l for l in labels]

@pytest.mark.parametrize('bug', [user_too, one_early, no_end])
def test_a_planted_mask_is_caught(tok, bug):
    with pytest.raises(AssertionError): check_masks(tok, bug)

def test_deepseeks_tokenizer(tok):
    folder = ROOT.parent/'shared'/'data'/'tokenizer'
    if not folder.exists(): pytest.skip('needs the DeepSeek-V4 tokenizer in ../shared/data/tokenizer')
    deep = load_tokenizer(folder)
    size = len(deep)
    check_masks(C.with_template(deep), C.encode_chat)
    assert len(deep)==size

def test_transformers_writes_the_same_from_the_saved_folder(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for c in conversations(8):
        assert again.apply_chat_template(c, return_dict=False)==C.encode_chat(tok, c)[0]

# ---------------------------------------------------------------- rows

def small(): return Whale(get_preset('tiny', vocab_size=400, num_hidden_layers=1)).eval()

@pytest.mark.parametrize('context', [40, 90, 200])
def test_rows_hold_every_answer_once(tok, context):
    chats = conversations(30, seed=2)
    rows = C.pack_chats(tok, [json.dumps(c) for c in chats], context)
    assert {k: v.shape[1] for k,v in rows.items()}==dict(input_ids=context+1, docs=context+1, labels=context+1)
    answers = lambda ids: sorted(tok.decode(ids).split(tok.eos_token)[:-1])
    flat = rows['labels'][rows['labels']!=-100].tolist()
    want = [i for c in chats for i in wanted(tok, c)[1] if i!=-100]
    if context>=90: assert answers(flat)==answers(want)                      # also where conversations are cut between exchanges
    assert n_targets(rows)[0]==len(flat) and n_targets({k: v for k,v in rows.items() if k!='labels'})[0]>len(flat)
    for ids,docs in zip(rows['input_ids'], rows['docs']):
        starts = ids[(docs!=docs.roll(1)) & (docs>=0)]
        assert (starts==tok.bos_token_id).all()                              # each part begins as conversations begin

def test_each_part_of_a_long_conversation_begins_with_what_the_system_said(tok):
    told = [c for c in conversations(48) if c[0]['role']=='system']
    parts = [[ids for ids,_ in C.parts_of(tok, c, 60)] for c in told]
    assert any(len(p)>1 for p in parts)
    for c,p in zip(told, parts):
        head = wanted(tok, c[:1])[0]
        assert all(ids[:len(head)]==head for ids in p)

def test_a_long_history_is_cut_after_what_the_system_said(tok):
    chat = C.Chat(SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=80)), tok, 20, system='three notes')
    said = [m for c in conversations(8) for m in c if m['role']!='system']+[dict(role='user', content='a song')]
    chat.messages += said
    ids,head = chat.prompt(),wanted(tok, chat.first)[0]
    assert len(ids)<=60 and ids[:len(head)]==head and chat.messages[0]==chat.first[0]
    kept = chat.messages[1:]
    assert 1<len(kept)<len(said) and kept==said[-len(kept):] and kept[0]['role']=='user'

def neighbours(tok, rows, docs=None):
    "Main and MTP loss of each conversation but the first, with the first as it is and with other tokens"
    torch.manual_seed(0)
    whale,other = small(),torch.where(rows['docs']==0, (rows['input_ids']+5)%400, rows['input_ids'])
    labels = rows['labels'].masked_fill(rows['docs']==0, -100)
    with torch.no_grad(): outs = [whale(x, labels=labels, docs=rows['docs'] if docs is None else docs) for x in (rows['input_ids'], other)]
    return [(o.loss.item(), o.mtp_loss.item()) for o in outs]

def test_conversations_in_a_row_do_not_hear_each_other(tok):
    rows = C.pack_chats(tok, [json.dumps(c) for c in conversations(12)], 200)
    assert (rows['docs'].amax(1)>0).any()
    was,now = neighbours(tok, rows)
    assert was==now
    leaky = rows | dict(docs=torch.where(rows['docs']>=0, 0, -1))            # the bug: one document a row
    a,b = neighbours(tok, rows, leaky['docs'])
    assert a!=b

def test_evaluation_is_over_the_answers(tok):
    rows,whale = C.pack_chats(tok, [json.dumps(c) for c in conversations(6)], 120),small()
    got = evaluate(whale, rows, batch_size=2)
    nats = 0.
    with torch.no_grad():
        for c in conversations(6):
            for part,l in C.parts_of(tok, [dict(m) for m in c], 121):
                z = whale(torch.tensor([part])).logits[0].log_softmax(-1)
                nats -= sum(z[i-1,t].item() for i,t in enumerate(l) if t!=-100)
    assert abs(got['loss']-nats/got['tokens'])<1e-4

# ---------------------------------------------------------------- runs and the terminal

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp('chat')
    (d/'chat.jsonl').write_text('\n'.join(json.dumps(dict(source='x', messages=c)) for c in conversations(90)))
    (d/'text.jsonl').write_text('\n'.join(json.dumps(dict(text=said(torch.Generator().manual_seed(i), 60))) for i in range(60)))
    train(data=str(d/'text.jsonl'), out=str(d/'base'), steps=2, batch_size=2, context=64, evals=1)
    return d

def tune(data, out):
    options = dict(steps=4, batch_size=2, context=128, buffer=4000, evals=2)
    return train(chat=str(data/'chat.jsonl'), init=str(data/'base'), out=str(out), **options)

def test_a_run_on_conversations_resumes_to_the_bit(data, tmp_path, monkeypatch):
    whole = tune(data, tmp_path/'whole')
    step = Run.one_step
    def stopping(run):
        if run.state['step']==1: signal.raise_signal(signal.SIGTERM)
        return step(run)
    monkeypatch.setattr(Run, 'one_step', stopping)
    with pytest.raises(Stopped): tune(data, tmp_path/'cut')
    monkeypatch.undo()
    rest = train(out=str(tmp_path/'cut'), resume=True)
    a,b = ([(m['step'], m['loss'], m['mtp_loss'], m.get('held_out_loss')) for m in read_metrics(tmp_path/f/'metrics.jsonl')] for f in ('whole', 'cut'))
    assert a==b and len(a)==4
    for k in ('held-out loss before, nats per token', 'held-out loss, nats per token', 'sample'): assert whole[k]==rest[k]
    x,y = (Whale.from_pretrained(tmp_path/f).state_dict() for f in ('whole', 'cut'))
    assert all(torch.equal(x[k], y[k]) for k in x)
    card = (tmp_path/'whole'/'README.md').read_text()
    assert str(whole['held-out loss before, nats per token']) in card and 'the answers in' in card
    assert load_tokenizer(tmp_path/'whole').chat_template==C.TEMPLATE

def nanowhale(*words, stdin=''):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, '-c', MAIN, *map(str, words)], check=False, input=stdin, capture_output=True, text=True, env=env)

def test_the_terminal_with_a_pipe(data, tmp_path):
    lines = ['the whale', '/nap', f'/save {tmp_path}/a.jsonl', '/reset', '/help', 'a song', '/quit', 'never']
    res = nanowhale('chat', '--model', data/'base', '--tokens', 6, '--temperature', 0, stdin='\n'.join(lines))
    assert res.returncode==0 and 'Traceback' not in res.stderr, res.stderr
    assert 'there is no /nap' in res.stdout and '/save FILE' in res.stdout and '(forgotten)' in res.stdout
    assert 'not trained on conversations' in res.stderr
    if '(no answer)' not in res.stdout: assert [m['role'] for m in json.loads((tmp_path/'a.jsonl').read_text())['messages']]==['user', 'assistant']
    assert nanowhale('chat', '--model', data/'base').returncode==0           # end of file at once

@pytest.mark.parametrize('content,says', [
    ('{"messages": [{"role": "robot", "content": "Hi"}]}', "unknown role 'robot'"), ('{"messages": []}', 'no message'),
    ('{"messages": [{"role": "user"}]}', 'no text'), ('{"messages": "Hi"}', 'not a conversation'), ('{"text": "Hi"}', 'no text in "messages"'),
    ('no json at all', 'not a readable .jsonl'), ('', 'is empty')])
def test_bad_files_are_one_line(data, tmp_path, content, says):
    from nanowhale.cli import main
    path = tmp_path/'bad.jsonl'
    good = '{"messages": [{"role": "user", "content": "Hi %d"}, {"role": "assistant", "content": "Ho %d"}]}'
    rows = [content.replace('Hi', f'Hi {i}') if 'Hi' in content else good % (i, i) for i in range(40) if content]
    path.write_text('\n'.join([*rows, content]))
    with pytest.raises(ValueError, match=says): train(chat=str(path), init=str(data/'base'), out=str(tmp_path/'out'), steps=1)
    assert main(['train', '--chat', str(path), '--out', str(tmp_path/'no-init')])==1

# ---------------------------------------------------------------- what foreign templates and careless typists do

def spoken(tok, template, messages, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(tok, 'chat_template', template)
        return [C.render(tok, messages)[a:b] for a,b in C.answer_spans(tok, messages)]

def test_templates_that_are_not_ours(tok, monkeypatch):
    asked = [dict(role='user', content='why?'), dict(role='assistant', content='Far.')]
    first = [dict(role='assistant', content='Hm.')]                          # nobody asked
    assert spoken(tok, C.TEMPLATE, first+asked, monkeypatch)==['Hm.'+tok.eos_token, 'Far.'+tok.eos_token]
    assert C.SIGN not in C.opening(tok, first, 0) and C.answer_spans(tok, asked[:1])==[]
    refusal = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(ValueError, match=r'does not take this conversation \(no system message'): spoken(tok, refusal, asked, monkeypatch)
    with pytest.raises(ValueError, match='rewrites earlier messages'): spoken(tok, '{{ messages[-1].content }}', asked, monkeypatch)

def test_the_mark_that_ends_an_answer_becomes_the_end_mark():
    tok = train_tokenizer([m['content'] for c in conversations(60) for m in c], 400)
    assert tok.chat_template is None and C.ChatRun.fit_tokenizer(tok).chat_template==C.TEMPLATE
    end = tok.eos_token
    tok.add_special_tokens(dict(additional_special_tokens=['<|turn|>']))
    tok.chat_template = C.TEMPLATE.replace('eos_token', "'<|turn|>'")
    assert tok.eos_token==end and C.for_answers(tok).eos_token=='<|turn|>'

def test_held_out_conversations_need_an_answer_that_fits(tok):
    texts = [json.dumps(c) for c in conversations(3)]
    with pytest.raises(ValueError, match='toy: no held-out conversation has an answer that fits'):
        C.HeldOutChats(texts, tok, Recipe(chat='toy', init='a whale', context=3), 400)

def test_bits_per_byte_are_of_the_bytes_in_the_rows(tok):
    "What was cut from a long answer costs nothing, so it may not count"
    def held(words, context):
        talk = [dict(role='user', content='why?'), dict(role='assistant', content='far '*words)]
        return C.HeldOutChats([json.dumps(talk)], tok, Recipe(chat='toy', init='a whale', context=context), 400)
    whole,cut = held(10, 200),held(200, 32)
    assert whole.targets()==[('far '*10).strip()] and whole.n_bytes==39
    assert 0<cut.n_bytes<100 and set(cut.targets()[0].split())=={'far'}

def test_a_first_message_that_is_too_long_ends_no_run(tok):
    talk = [dict(role='user', content='please '*80), dict(role='assistant', content='No.')]
    held = C.HeldOutChats([json.dumps(talk)], tok, Recipe(chat='toy', init='a whale', context=900), 400)
    whale = Whale(get_preset('tiny', vocab_size=400, num_hidden_layers=1, max_position_embeddings=128)).eval()
    assert 'this message is too long' in held.sample(whale)

def test_a_failed_answer_leaves_no_question_behind(tok):
    whale = small()
    chat = C.Chat(whale, tok, 5)
    assert C.obey(chat, '/save nowhere/x.jsonl')=='(nothing was said yet)'
    with torch.no_grad(): whale.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match='not finite'): chat.answer('hi', write=len)
    assert chat.messages==[]

def test_empty_places_are_for_nobody(tok):
    "Neither the load of a block nor that of the MTP block counts them, and two tokens stand before every answer"
    rows,whale = C.pack_chats(tok, [json.dumps(c) for c in conversations(6)], 120),small()
    main,ahead = n_targets(rows).tolist()
    filled = (rows['docs']>=0).sum().item()
    assert main==ahead==(rows['labels']!=-100).sum() and filled<rows['docs'].numel()
    with torch.no_grad(): out = whale(**rows)
    k = whale.cfg.num_experts_per_tok
    assert out.expert_load.sum(-1).tolist()==[k*filled, k*ahead]

def test_what_was_said_before_ctrl_c_stays(tok, monkeypatch):
    def interrupted(whale, ids, tokens, on_token, **rules):
        on_token(torch.tensor(tok('the whale', add_special_tokens=False).input_ids[:1]))
        raise KeyboardInterrupt
    monkeypatch.setattr(C, 'generate', interrupted)
    chat = C.Chat(small(), tok, tokens=400)
    part = chat.answer('why?', len)
    assert part and chat.messages[-1]==dict(role='assistant', content=part)
    was = list(chat.messages)
    with pytest.raises(ValueError, match='this message is too long'): chat.answer('a song '*600, len)
    assert chat.messages==was                                                # refused, and nothing was said

def test_what_a_person_may_type(tok, tmp_path, monkeypatch):
    def replied(whale, ids, tokens, on_token, **rules): on_token(torch.tensor(tok('sea', add_special_tokens=False).input_ids[:1]))
    monkeypatch.setattr(C, 'generate', replied)
    chat,out = C.Chat(small(), tok, tokens=400),[]
    def type_in(*lines):
        lines = iter(lines)
        def ask(_):
            line = next(lines, EOFError())
            if isinstance(line, BaseException): raise line
            return line
        C.talk(chat, ask, out.append, len)
        return out
    type_in('why?', '/nap', f'/save {tmp_path}/a.jsonl', '/save', f'/save {tmp_path}/gone/a.jsonl', '', '/help', KeyboardInterrupt(), '/quit', 'never read')
    assert [m['role'] for m in chat.messages]==['user', 'assistant'] and C.HELP in out
    for says in ('there is no /nap', '(saved in ', 'save where?', 'No such file', '/quit or Ctrl-D ends'): assert any(says in line for line in out), says
    assert len(C.check_messages(json.loads((tmp_path/'a.jsonl').read_text())['messages']))==2
    type_in('/reset')
    assert chat.messages==[]

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--data', required=True); parser.add_argument('--init', required=True)
    parser.add_argument('--steps', type=int, default=150); parser.add_argument('--keep')
    args = parser.parse_args()
    args.words = [w for i,w in enumerate(sys.argv[1:]) if '--keep' not in (w, sys.argv[i])]
    measure(args)
