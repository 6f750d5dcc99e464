"The way from a model's scores to a physician's decision: evidence, the desk, the record, and what is learned from it."
import errno, html, json, math, os, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from edgenb import coder, decisions as record
from edgenb.coder import Desk, Suggestion, after_confirmation, confirmation_table, evidence, highlighted, known_code, log_odds, parsed_command, reading, review, review_table, span_overlap, suggest, suggested, windowed
from edgenb.core import EdgenbError
from edgenb.decisions import Decisions, corrections, summary_table
from edgenb.notes import REASON, Code, Note, primary, windows
from edgenb.pipeline import text_pipeline

CODES = {'J45.909': 'Unspecified asthma, uncomplicated', 'I20.9': 'Angina pectoris, unspecified', 'E11.9': 'Type 2 diabetes mellitus without complications', 'I10': 'Essential (primary) hypertension'}
CUES = {'J45.909': ('wheezing', 'albuterol'), 'I20.9': ('chest pain', 'nitroglycerin'), 'E11.9': ('insulin', 'polyuria'), 'I10': ('BP 160/95', 'lisinopril')}
FILLER = ('Seen for follow-up.', 'No new complaints today.', 'Speaks in full sentences, no distress.', 'Lives with family; works part time.', 'Denies fever or chills.', 'Abdomen soft, not tender.',
          'Return in two weeks.', 'Questions answered.', 'Alert and oriented x3.', 'Gait steady.', 'Skin warm and dry.', 'Neck supple.')
FIRST = ('J45.909', .61)


class BagOfWords:
    "Adds a weight for every cue it finds: what its answers rest on is known."
    def __init__(self, weight=2.0): self.asked, self.calls, self.weight = [], 0, weight
    def __call__(self, texts):
        self.calls += 1
        self.asked += list(map(str, texts))
        return {'logits': np.array([[sum(self.weight*bool(re.search(rf'(?<!\w){re.escape(c)}(?!\w)', str(t))) for c in cues) for cues in CUES.values()] for t in texts], float)}


def written(rng, code, sentences=8):
    "A synthetic note with both cues of a code, and where they stand."
    cues, parts = CUES[code], [str(s) for s in rng.permutation(FILLER)[:sentences - 2]]
    for cue in cues: parts.insert(rng.integers(0, len(parts) + 1), rng.choice([f'Today {cue} noted again.', f'Has {cue}, as before.', f'Plan reviewed, {cue} since Monday.']))
    text = ''.join(p + str(rng.choice([' ', '\n'])) for p in parts)
    return text, [(text.index(c), text.index(c) + len(c)) for c in cues]


def added(d, note='visit-1', action='confirm', after='J45.909', rank=1, who='Dr. Osei', before=FIRST):
    return d.add(note, who, action, before, after, rank, model='sha256:5f1c', seconds=4.0)


# -- evidence

def test_evidence_is_what_the_model_rests_on_and_little_else():
    rng, overlaps = np.random.default_rng(0), []
    for code in [c for c in CODES for _ in range(12)]:
        text, truth = written(rng, code)
        model = BagOfWords()
        found = evidence(model, text, list(CODES).index(code))
        assert len(model.asked) <= 96 and model.calls <= 5
        assert found == sorted(found, key=lambda s: -s[2])
        overlaps.append(span_overlap(found, truth))
    assert np.mean([o['recall'] for o in overlaps]) > 0.97
    assert np.mean([o['precision'] for o in overlaps]) > 0.9


def test_the_weight_of_a_span_is_the_log_odds_lost_without_it():
    text = 'Lives alone. Long history of polyuria. Gait steady.'
    [(b, e, weight)] = evidence(BagOfWords(), text, 2)
    with_it, without = BagOfWords()([text, text[:b] + text[e:]])['logits']
    assert text[b:e] == 'polyuria' and weight == pytest.approx(log_odds(with_it[None], 2)[0] - log_odds(without[None], 2)[0])


def test_without_its_evidence_an_answer_is_lost_and_without_other_words_it_is_not():
    def lost_without(model, text, class_index, spans):
        left = text
        for b, e, *_ in sorted(spans, reverse=True): left = left[:b] + left[e:]
        whole, part = log_odds(model([text, left])['logits'], class_index)
        return whole - part
    text, truth = written(np.random.default_rng(3), 'I10')
    k, found = list(CODES).index('I10'), evidence(BagOfWords(), written(np.random.default_rng(3), 'I10')[0], 3)
    others = [(b, e) for b, e in coder.sentences(text) if not any(b < t and s < e for s, t in truth)][:2]
    assert lost_without(BagOfWords(), text, k, found) == pytest.approx(4.0) == lost_without(BagOfWords(), text, k, truth)   # two cues of weight 2
    assert lost_without(BagOfWords(), text, k, others) == pytest.approx(0) and lost_without(BagOfWords(), text, k, []) == 0
    [(b, e, weight)] = evidence(BagOfWords(), 'insulin', 2)
    assert (b, e) == (0, 7) and weight == pytest.approx(2.0)   # nothing is left, and the model is not asked about nothing


def test_two_neighbours_that_say_the_same_are_found_though_neither_is_missed_alone():
    either = lambda texts: {'logits': np.array([[4.0*('renal' in str(t) or 'kidney' in str(t)), 0.0] for t in texts])}
    text = 'Gait steady. Known renal kidney disease for years. Neck supple.'
    [(b, e, weight)] = evidence(either, text, 0)
    assert 'renal kidney' in text[b:e] and weight > 3


@pytest.mark.parametrize('limit', [32, 48, 96])
def test_evidence_in_a_long_note_is_narrowed_down_within_the_limit(limit):
    model, rng = BagOfWords(), np.random.default_rng(1)
    text = ' '.join(str(s) for s in rng.choice(FILLER, 1500)) + ' Has polyuria, as before. ' + ' '.join(str(s) for s in rng.choice(FILLER, 1500))
    found = evidence(model, text, 2, limit=limit)
    assert len(text.split()) > 9000 and len(model.asked) <= limit
    assert len(found) == 1 and 'polyuria' in text[slice(*found[0][:2])]
    if limit == 96: assert text[slice(*found[0][:2])] == 'polyuria'


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from('ab .,;\n\té<-'), min_size=1, max_size=200), st.integers(1, 4), st.integers(32, 96))
def test_evidence_of_any_text_lies_inside_it_apart_and_within_the_limit(text, spans, limit):
    asked = []
    def model(texts):
        asked.extend(texts)
        assert all(str(t).strip() for t in texts)
        return {'logits': np.array([[str(t).count('a')**1.3, str(t).count('b'), 1.0] for t in texts])}
    if not text.strip():
        with pytest.raises(EdgenbError, match='empty'): evidence(model, text, 0)
        return
    found = evidence(model, text, 0, spans=spans, limit=limit)
    assert len(asked) <= limit and len(found) <= spans
    taken = sorted((b, e) for b, e, w in found)
    assert all(0 <= b < e <= len(text) for b, e in taken) and all(e <= b for (_, e), (b, _) in zip(taken, taken[1:])) and all(w > 0 for *_, w in found)


def test_log_odds_hold_where_probabilities_have_run_out_of_digits():
    z = np.array([[0., -800., -900.], [-800., 0., -900.]])
    assert log_odds(z, 0) == pytest.approx([800, -800])
    with pytest.raises(EdgenbError, match='two answers'): log_odds(np.zeros((3, 1)), 0)


def test_overlap_of_spans_is_counted_in_characters():
    assert span_overlap([(0, 10), (5, 15)], [(10, 20)]) == {'precision': pytest.approx(1/3), 'recall': .5, 'f1': pytest.approx(.4)}
    assert math.isnan(span_overlap([], [])['f1']) and span_overlap([], [(0, 1)])['recall'] == 0


# -- suggestions and long notes

def test_suggestions_are_the_likeliest_codes_and_share_the_model_s_answers():
    model, texts = BagOfWords(), ['Has wheezing, on albuterol. Gait steady.', 'Polyuria denied. BP 160/95, has insulin.']
    z = model(texts)['logits']
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    model = BagOfWords()
    found = suggest({'probabilities': p}, CODES, texts, k=3, model=model)
    assert [len(f) for f in found] == [3, 3] and found[0][0].code == 'J45.909' and found[0][0].description.startswith('Unspecified asthma')
    assert [s.confidence for s in found[1]] == sorted((s.confidence for s in found[1]), reverse=True)
    assert {texts[0][b:e] for b, e, _ in found[0][0].spans} == {'wheezing', 'albuterol'}
    assert len(model.asked) == len(set(model.asked))   # nothing twice
    assert suggest({'probabilities': p}, CODES, texts)[0][0].spans == ()
    first = suggest({'probabilities': p}, CODES, texts, model=model, explain=1)[0]
    assert first[0].spans == found[0][0].spans and not any(s.spans for s in first[1:])


@pytest.mark.parametrize('texts, shape, words', [(['a', ' '], (2, 4), 'empty'), (['a'], (2, 4), 'shape'), (['a'], (1, 3), 'shape')])
def test_suggest_refuses_what_does_not_fit_together(texts, shape, words):
    with pytest.raises(EdgenbError, match=words): suggest({'probabilities': np.full(shape, .25)}, CODES, texts)


def test_a_long_note_is_as_likely_a_code_as_its_most_telling_window():
    model = BagOfWords()
    long = windowed(model, lambda text: windows(text, 20))
    text = 'Gait steady. '*300 + 'Has insulin. ' + 'Neck supple. '*300
    assert max(len(t.split()) for t in (long(np.array([text])), model.asked)[1]) <= 20
    z = long({'text': np.array([text, 'Has insulin.'])})['logits']
    assert z.dtype == np.float32 and z.argmax(1).tolist() == [2, 2] and z[0, 2] == pytest.approx(z[1, 2])
    assert z[1] == pytest.approx([0, 0, 2, 0])   # as the model gave them: a step may read more than their order
    with pytest.raises(EdgenbError, match='1 of 2 notes are empty, the first at place 1'): long(np.array([text, ' \n']))


class Short:
    "A bundle whose model, like any, reads the first words only."
    def __init__(self, most=30, max_characters=2000, sections=()):
        self.pipeline, self.cues, self.most = text_pipeline(list(CODES), max_characters=max_characters, sections=sections), BagOfWords(), most
        self.model = lambda texts: self.cues([' '.join(str(t).split()[:most]) for t in texts])
        self.model.reads = lambda text: len(text.split()) <= most


def test_of_fifty_pages_the_one_that_says_it_is_read_and_shown():
    pages = ['Seen for follow-up. Gait steady. Neck supple. No new complaints today. '*35 for _ in range(50)]   # some 400 words each
    middle = len(pages[39])//2//71*71
    pages[39] = pages[39][:middle] + 'Has polyuria again, insulin started. ' + pages[39][middle:]
    text, bundle = '\f\n'.join(pages), Short()
    with pytest.raises(EdgenbError, match='cut it into windows'): bundle.pipeline.before(text.encode())
    first, *others = suggested(bundle, CODES, [text, 'No complaints.'], explain=1)[0]
    assert first.code == 'E11.9' and first.confidence > 3*others[0].confidence
    assert sorted(text[b:e] for b, e, _ in first.spans) == ['insulin', 'polyuria']
    assert all(len(pages[0])*39 < b < len(pages[0])*41 for b, *_ in first.spans)
    dense = 'a-b '*20 + 'insulin ' + 'a-b '*200                                # what fits is asked of the model, not guessed from words
    bundle.model.reads = lambda text: len(text.replace('-', ' ').split()) <= 30
    assert suggested(bundle, CODES, [dense], explain=1)[0][0].code == 'E11.9'


def test_sections_that_are_not_read_cut_no_note_that_is():
    bundle = Short(sections=REASON)
    text = 'CC: Has insulin.\nMeds: ' + 'wheezing tablets daily, '*40 + '\nPE: ' + 'Gait steady. '*40 + '\nPlan: Neck supple.'
    assert not bundle.model.reads(text) and str(bundle.pipeline.before(text.encode())) == 'CC: Has insulin.\nPlan: Neck supple.'   # this is what `verify` judged
    ask, cut = reading(bundle)
    assert cut(text) == [(0, len(text))]
    [listed], [judged] = suggested(bundle, CODES, [text]), bundle.pipeline([text.encode()], bundle.model)['probabilities']
    assert [s.confidence for s in listed] == pytest.approx(sorted(judged, reverse=True)[:len(listed)]) and 'insulin' in [text[b:e] for b, e, _ in listed[0].spans]
    long = text.replace('Has insulin.', 'Has insulin. ' + 'Neck supple. '*30)
    assert len(cut(long)) > 1 and all(len(str(bundle.pipeline.before(long[b:e].encode())).split()) <= 30 for b, e in cut(long))
    assert cut('\x00') == [(0, 1)]
    with pytest.raises(EdgenbError, match='is empty'): ask(['\x00'])


def test_an_encoder_knows_what_it_reads_whole():
    tokenizers = pytest.importorskip('tokenizers')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[UNK]': 0, 'insulin': 1}, '[UNK]'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pipeline = text_pipeline(list(CODES), tokenizer=words.to_str(), length=8, max_characters=100)
    assert pipeline.reads('a b c d e f g h') and not pipeline.reads('a b c d e f g h insulin') and not pipeline.reads('a'*101)
    model = lambda x: {'logits': np.stack([3.0*np.array([0, 0, 1, 0])*(1 in row) for row in x])}
    bundle = SimpleNamespace(pipeline=pipeline, model=model)
    assert suggested(bundle, CODES, ['no-news '*60 + 'insulin ' + 'no-news '*60], explain=1)[0][0].code == 'E11.9'


def test_a_note_that_is_read_whole_is_answered_as_ever():
    bundle, text = Short(), 'Has insulin. Gait steady.'
    [listed] = suggested(bundle, CODES, [text])
    assert [(s.code, round(s.confidence, 6), s.spans) for s in listed] == [(s.code, round(s.confidence, 6), s.spans) for s in
            suggest(bundle.pipeline([text.encode()], bundle.model), CODES, [text], model=BagOfWords())[0]]


def test_windows_keep_the_embedding_of_the_model():
    model = lambda texts: {'logits': np.zeros((len(texts), 2)), 'embedding': np.array([[len(str(t).split())] for t in texts], float)}
    assert windowed(model, lambda text: windows(text, 4))(np.array(['a b c d e f', 'a']))['embedding'].tolist() == [[3.0], [1.0]]


# -- the record

def test_every_action_is_a_line_and_the_file_only_grows(tmp_path):
    d = Decisions(tmp_path/'run'/'decisions.jsonl')
    sizes = []
    for step in (lambda: added(d), lambda: added(d, 'visit-2', 'correct', 'I10', None), lambda: d.undo('visit-2', 'Dr. Li'), lambda: added(d, 'visit-2', 'reject', None, None)):
        before = d.path.read_bytes()
        step()
        assert d.path.read_bytes().startswith(before)
        sizes.append(d.path.read_bytes().count(b'\n'))
    assert sizes == [1, 2, 3, 4]
    row = json.loads(d.path.read_text().splitlines()[1])
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z', row.pop('when'))
    assert row == {'note': 'visit-2', 'who': 'Dr. Osei', 'action': 'correct', 'before': {'code': 'J45.909', 'confidence': .61}, 'after': 'I10', 'rank': None, 'model': 'sha256:5f1c', 'seconds': 4.0}
    s = Decisions(d.path).summary()
    assert (s['notes'], s['confirm'], s['correct'], s['reject'], s['agreement'], s['listed'], s['lines'], s['undone'], s['torn_lines']) == (2, 1, 0, 1, .5, .5, 4, 1, 0)
    assert json.loads(json.dumps(s)) == s


@pytest.mark.parametrize('change, words', [({'who': ' '}, 'who'), ({'note': 'a\nb'}, 'note'), ({'note': 'x'*201}, 'note'), ({'action': 'confirmed'}, 'Did you mean confirm'), ({'after': 'I10'}, 'use correct'), ({'action': 'correct'}, 'use confirm'),
                                           ({'action': 'correct', 'after': None, 'rank': None}, 'code'), ({'action': 'reject'}, 'has no code'), ({'before': ('J45.909', 1.2)}, 'confidence'), ({'before': ('J45.909', float('nan'))}, 'confidence'),
                                           ({'action': 'correct', 'after': 'The patient says that he has had chest pain for a week', 'rank': None}, 'the code')])
def test_a_decision_that_makes_no_sense_is_refused_and_not_written(tmp_path, change, words):
    d = Decisions(tmp_path/'d.jsonl')
    with pytest.raises(EdgenbError, match=words): added(d, **change)
    assert d.path.read_bytes() == b'' and d.standing() == []


def test_a_line_cut_anywhere_by_power_loss_is_set_aside_and_the_rest_stands(tmp_path):
    d = Decisions(tmp_path/'whole.jsonl')
    added(d); added(d, 'visit-2'); whole = d.path.read_bytes()
    last = whole.index(b'\n') + 1
    for cut in [*range(last, len(whole) - 3, 7), *range(len(whole) - 3, len(whole) + 1)]:
        path = tmp_path/f'{cut}.jsonl'
        path.write_bytes(whole[:cut])
        again = Decisions(path)
        assert [x.note for x in again.standing()] == ['visit-1', 'visit-2'][:1 + (cut == len(whole))]
        added(again, 'visit-3')
        assert [x.note for x in Decisions(path).standing()][-1] == 'visit-3'
        kept = [bytes.fromhex(json.loads(l)['hex']) for l in again._log.torn.read_text().splitlines()] if again._log.torn.exists() else []
        assert kept == ([whole[last:cut]] if last < cut < len(whole) else [])
        assert again.summary()['torn_lines'] == len(kept)


@pytest.mark.parametrize('tail', [b'\0'*300, b'\0'*100 + b'\n', b'{"note": "visit-9"}\n', b'\xff\xfe'])
def test_what_a_disk_leaves_at_the_end_is_set_aside(tmp_path, tail):
    d = Decisions(tmp_path/'d.jsonl'); added(d)
    with open(d.path, 'ab') as f: f.write(tail)
    again = Decisions(d.path)
    assert again.standing() == d.standing() and again.summary()['torn_lines'] == 1
    assert added(d, 'visit-2') and [x.note for x in Decisions(d.path).standing()] == ['visit-1', 'visit-2']


def test_a_changed_line_in_the_middle_is_not_read_over(tmp_path):
    d = Decisions(tmp_path/'d.jsonl'); added(d); added(d, 'visit-2')
    for damaged in (d.path.read_bytes().replace(b'confirm', b'confurm', 1), d.path.read_bytes()[5:], b'{"action": "undo", "note": "visit-1", "who": "x", "when": "y"}\n' + d.path.read_bytes()):
        (tmp_path/'damaged.jsonl').write_bytes(damaged)
        with pytest.raises(EdgenbError, match='line 1: not what was written'): Decisions(tmp_path/'damaged.jsonl')
        assert (tmp_path/'damaged.jsonl').read_bytes() == damaged
    (tmp_path/'damaged.jsonl').write_bytes(d.path.read_bytes().replace(b'correct', b'korrect') + b'{"note": \n{"no')   # a bad line is the last only if nothing follows
    with pytest.raises(EdgenbError, match='line 3: not what was written'): Decisions(tmp_path/'damaged.jsonl')
    d.path.write_bytes(d.path.read_bytes()[:-400])
    with pytest.raises(EdgenbError, match='became shorter'): added(d)


@pytest.mark.parametrize('fault', ['half a line', 'nothing', 'no fsync', 'interrupted'])
def test_a_failed_write_leaves_no_trace_and_says_so(tmp_path, monkeypatch, fault):
    d = Decisions(tmp_path/'d.jsonl'); added(d); before = d.path.read_bytes()
    write, full = os.write, OSError(errno.ENOSPC, 'No space left on device')
    def broken(fd, data):
        if fault == 'half a line': return write(fd, data[:len(data)//2])
        if fault == 'nothing': raise full
        write(fd, data)
        if fault == 'interrupted': raise KeyboardInterrupt
        return len(data)
    def no_sync(fd): raise full
    with monkeypatch.context() as m:
        m.setattr(record.os, 'write', broken)
        if fault == 'no fsync': m.setattr(record.os, 'fsync', no_sync)
        with pytest.raises(KeyboardInterrupt if fault == 'interrupted' else EdgenbError, match=None if fault == 'interrupted' else 'disk is full'): added(d, 'visit-2')
    assert d.path.read_bytes() == before and d.state('visit-2') is None
    added(d, 'visit-2')
    assert [x.note for x in Decisions(d.path).standing()] == ['visit-1', 'visit-2'] and not d._log.torn.exists()


def test_a_decision_is_synced_before_it_is_believed(tmp_path, monkeypatch):
    d, order = Decisions(tmp_path/'d.jsonl'), []
    fsync = os.fsync
    monkeypatch.setattr(record.os, 'fsync', lambda fd: (order.append((d.path.read_bytes().count(b'\n'), len(d.standing()))), fsync(fd))[1])
    added(d)
    assert order == [(1, 0)]   # the line was in the file, and not yet held for decided


def test_two_processes_write_to_one_file_and_lose_nothing(tmp_path):
    code = "import sys; from edgenb.decisions import Decisions; d = Decisions(sys.argv[1])\nfor i in range(40): d.add(f'{sys.argv[2]}-{i}', sys.argv[2], 'confirm', ('I10', .5), 'I10', 1, model='m', seconds=1.0)"
    path = tmp_path/'d.jsonl'
    mine = Decisions(path)
    running = [subprocess.Popen([sys.executable, '-c', code, str(path), who]) for who in 'ab']
    for i in range(10): added(mine, f'mine-{i}')
    assert [r.wait(60) for r in running] == [0, 0]
    added(mine, 'last')
    assert len(mine.standing()) == len(Decisions(path).standing()) == 91 and not mine._log.torn.exists()


@pytest.mark.skipif(os.name != 'posix', reason='no locks of files here')
def test_a_writer_waits_for_another_to_finish(tmp_path):
    import fcntl, threading
    d = Decisions(tmp_path/'d.jsonl')
    with open(d.path, 'rb') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=added, args=(d,))
        waiting.start(); waiting.join(0.3)
        assert waiting.is_alive() and d.path.read_bytes() == b''
    waiting.join(20)
    assert d.path.read_bytes().count(b'\n') == 1


def test_the_table_of_what_was_decided_counts_notes_with_intervals(tmp_path):
    d = Decisions(tmp_path/'d.jsonl')
    assert summary_table(d.summary()) == 'No note was reviewed.'
    for i in range(8): added(d, f'visit-{i}')
    for i in (8, 9): added(d, f'visit-{i}', 'correct', 'I10', 4)
    table = summary_table(d.summary())
    assert '| 8 of 10 | 80.0% (49.0% to 94.3%) |' in table and '| J45.909 | I10 | 2 |' in table and '| 10 of 10 | 100.0%' in table


# -- the desk

def noted(n=3): return [Note(f'visit-{i}', f'Has insulin. Note number {i}.', kind='synthetic') for i in range(n)]
def listed(n=3): return [[Suggestion(c, CODES[c], p, ((0, 11, 2.0),)) for c, p in zip(CODES, (.6, .2, .1, .1))] for _ in range(n)]
def desk_of(path, n=3): return Desk(noted(n), listed(n), Decisions(path), 'Dr. Osei', 'sha256:5f1c', CODES)


def test_the_whole_way_can_be_typed(tmp_path):
    d = desk_of(tmp_path/'d.jsonl')
    for typed in ('v 2', 'n', 'p', '2', '1', 'u', 'x', 'c e11.9'): d.command(typed)
    assert [(x.note, x.action, x.after, x.rank) for x in d.decisions.standing()] == [('visit-0', 'correct', 'I20.9', 2), ('visit-1', 'reject', None, None), ('visit-2', 'correct', 'E11.9', 3)]
    assert d.message == 'visit-2: corrected to E11.9. All 3 notes are decided' and d.decided == 3
    assert all(x.who == 'Dr. Osei' and x.model == 'sha256:5f1c' for x in d.decisions.standing())


@pytest.mark.parametrize('typed', ['', ' ', '0', '10', '1 2', 'c', 'x y', 'v', 'v 0', 'v 12', 'yes', 'n 3', '٣', '²', '-1', 'I10', '<script>'])
def test_what_is_no_command_is_refused(typed):
    with pytest.raises(EdgenbError, match='not a command'): parsed_command(typed)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_any_typing_is_a_command_or_refused(typed):
    try: name, arguments = parsed_command(typed)
    except EdgenbError: return
    assert callable(getattr(Desk, name)) and all(isinstance(a, int) and 1 <= a <= 9 or a for a in arguments)


def test_one_decision_after_the_other_can_be_taken_back(tmp_path):
    d = desk_of(tmp_path/'d.jsonl')
    for typed in ('1', '2', 'u', 'u'): d.command(typed)
    assert d.decided == 0 and d.note.id == 'visit-0' and d.decisions.summary()['undone'] == 2


def test_a_correction_to_what_was_put_first_is_a_confirmation(tmp_path):
    d = desk_of(tmp_path/'d.jsonl')
    d.command('c J45.909')
    assert d.decisions.state('visit-0').action == 'confirm'


@pytest.mark.parametrize('typed, words', [('c J45.9', 'choose one of J45.901'), ('c Z99.99', 'no such code'), ('c diabetes', 'E11.9'), ('c 0DTJ4ZZ', 'this review is of ICD-10-CM'), ('9', 'there are 4 suggestions'), ('u', 'no decision'), ('q', 'not a command')])
def test_a_code_that_does_not_exist_is_not_recorded(tmp_path, typed, words):
    d = desk_of(tmp_path/'d.jsonl')
    with pytest.raises(EdgenbError, match=words): d.command(typed)
    assert d.at == 0 and d.decisions.path.read_bytes() == b''


def test_codes_are_known_without_dot_and_with_their_description():
    assert [known_code(t, CODES) for t in ('j45909', 'I10  Essential (primary) hypertension', ' e11.9 ', 'J45.901')] == ['J45.909', 'I10', 'E11.9', 'J45.901']
    assert known_code('local 7', {'local 7': 'our own'}) == 'local 7'


def test_review_goes_on_where_it_was_left(tmp_path):
    d = desk_of(tmp_path/'d.jsonl'); d.command('1')
    again = desk_of(tmp_path/'d.jsonl')
    assert again.at == 1 and again.decided == 1
    again.command('p'); again.command('u')
    assert again.decided == 0 and again.at == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(['1', '2', '4', '9', 'x', 'c I10', 'c j45.909', 'c J45.9', 'v 3', 'n', 'p', 'u', 'zzz']), max_size=25))
def test_any_sequence_of_commands_leaves_a_record_that_reads_back_the_same(tmp_path_factory, typed):
    path = tmp_path_factory.mktemp('desk')/'d.jsonl'
    d, stacks = desk_of(path), {}
    for t in typed:
        at, before = d.note.id, len(path.read_bytes())
        try: d.command(t)
        except EdgenbError:
            assert len(path.read_bytes()) == before and d.note.id == at
            continue
        if t in ('1', '2', '4', 'x', 'c I10', 'c j45.909'): stacks.setdefault(at, []).append({'1': 'J45.909', '2': 'I20.9', '4': 'I10', 'x': None, 'c I10': 'I10', 'c j45.909': 'J45.909'}[t])
        elif t == 'u': stacks[d.note.id].pop()
        else: assert len(path.read_bytes()) == before
        assert 0 <= d.at < 3
    assert {x.note: x.after for x in d.decisions.standing()} == {n: s[-1] for n, s in stacks.items() if s}
    assert Decisions(path).standing() == d.decisions.standing() and Decisions(path).summary() == d.decisions.summary()
    s = d.decisions.summary()
    assert s['confirm'] + s['correct'] + s['reject'] == s['notes'] == d.decided


def test_the_desk_needs_a_reviewer_and_a_list_for_every_note(tmp_path):
    d = Decisions(tmp_path/'d.jsonl')
    for notes, lists, who, words in ((noted(), listed(), ' ', 'reviewer'), (noted(), listed(2), 'x', 'each note'), (noted()[:1]*2, listed(2), 'x', 'same id'), ([], [], 'x', 'each note'), (noted(1), [[]], 'x', 'empty')):
        with pytest.raises(EdgenbError, match=words): Desk(notes, lists, d, who, 'm', CODES)


# -- on the screen

@given(st.text(max_size=80), st.lists(st.tuples(st.integers(-5, 90), st.integers(-5, 90)), max_size=4))
def test_a_note_is_shown_letter_for_letter_and_nothing_in_it_is_markup(text, spans):
    shown = highlighted(text, [(b, e, 1.0) for b, e in spans])
    bare = re.sub('</?mark>', '', shown)
    assert '<' not in bare and '>' not in bare and html.unescape(bare) == text
    marked = ''.join(re.findall('<mark>(.*?)</mark>', shown, re.S))
    assert '<' not in marked
    inside = {i for b, e in spans for i in range(max(b, 0), min(e, len(text)))}
    assert marked == ''.join(html.escape(c) for i, c in enumerate(text) if i in inside)


def markup(box):
    "All that the front end takes for HTML: the values of HTML widgets (descriptions of buttons are set as text)."
    return (box.value if type(box).__name__ == 'HTML' else '') + ''.join(markup(c) for c in getattr(box, 'children', ()))


def test_a_script_in_a_note_an_id_or_a_code_is_inert(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror=alert(1)>'
    notes, lists = [Note(evil, evil, kind='synthetic')], [[Suggestion(evil, evil, .5, ((2, 9, 1.0),)), Suggestion('I10', evil, .2)]]
    d = Decisions(tmp_path/'d.jsonl')
    box = review(notes, lists, d, evil, 'm', CODES)
    box.desk.message = evil
    coder._draw(box.desk, box.parts)
    for shown in (markup(box), review_table(notes, lists, d, show_text=True), review_table(notes, lists)):
        assert '<script' not in shown and '<img' not in shown and '&lt;' in shown
    assert markup(box).count('alert(1)&lt;/script') == 4   # id, message and both descriptions are there to be read; in the note a mark stands between


def test_the_static_table_shows_notes_only_if_they_are_synthetic(tmp_path):
    d = Decisions(tmp_path/'d.jsonl'); added(d, 'visit-1', 'correct', 'I10', None)
    plain, shown = review_table(noted(), listed(), d), review_table(noted(), listed(), d, show_text=True)
    assert 'insulin' not in plain and 'visit-1' in plain and 'correct I10' in plain and '60%' in plain
    assert '<mark>Has insulin</mark>' in shown and 'synthetic' in shown
    with pytest.raises(EdgenbError, match='synthetic'): review_table([Note('a', 'text')], listed(1), show_text=True)


def entered(box, text):
    "What the front end sends when a person types and presses Enter."
    box._handle_custom_msg({'event': 'submit'}, [])
    box.set_state({'value': text})


def test_the_command_line_acts_on_enter_only(tmp_path):
    box = review(noted(), listed(), Decisions(tmp_path/'d.jsonl'), 'Dr. Osei', 'm', CODES)
    line = box.parts['command']
    line.set_state({'value': 'x'})                                   # left half-typed
    assert box.desk.decided == 0 and line.value == '' and 'press Enter' in box.parts['status'].value
    entered(line, 'x')
    assert box.desk.decided == 1 and line.value == '' and 'visit-1' in box.parts['status'].value
    entered(line, 'c zzz')
    assert box.desk.decided == 1 and 'not a code' in box.parts['status'].value
    entered(line, '1'); entered(line, '1')
    assert box.desk.decided == 3 and [d.action for d in box.desk.decisions.standing()] == ['reject', 'confirm', 'confirm']


def test_the_buttons_do_what_the_commands_do(tmp_path):
    box = review(noted(), listed(), Decisions(tmp_path/'d.jsonl'), 'Dr. Osei', 'm', CODES)
    p = box.parts
    p['rows'][1][0].click(); assert '(looked at)' in p['rows'][1][0].description and box.desk.decided == 0
    p['take'].click(); p['reject'].click(); p['other'].value = 'I10  Essential (primary) hypertension'; p['correct'].click()
    assert [d.after for d in box.desk.decisions.standing()] == ['I20.9', None, 'I10'] and p['other'].value == ''
    p['undo'].click(); p['previous'].click()
    assert box.desk.decided == 2 and box.desk.at == 1
    p['next'].click(); assert box.desk.at == 2


def test_a_decision_that_could_not_be_written_is_said_on_the_screen(tmp_path, monkeypatch):
    box = review(noted(), listed(), Decisions(tmp_path/'d.jsonl'), 'Dr. Osei', 'm', CODES)
    def broken(*_): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(record.os, 'write', broken)
    box.parts['take'].click()
    assert 'not recorded' in box.parts['status'].value and box.desk.at == 0 and box.desk.decided == 0


# -- what is learned, and what stays inside

def test_no_word_of_a_note_is_written_anywhere(tmp_path):
    canary = 'Xanthippe-Quill-4471'
    notes = [Note(f'visit-{i}', f'{canary} has insulin and {canary}.', patient=canary) for i in range(3)]
    suggestions = suggest({'probabilities': np.full((3, 4), .25)}, CODES, [n.text for n in notes], model=BagOfWords())
    d = Desk(notes, suggestions, Decisions(tmp_path/'decisions.jsonl'), 'Dr. Osei', 'm', CODES)
    for typed in ('1', 'u', 'c I10', 'x'): d.command(typed)
    with open(d.decisions.path, 'ab') as f: f.write(b'{"note": "visi')
    again = Decisions(d.decisions.path)
    made = [summary_table(again.summary()), json.dumps(again.summary()), review_table(notes, suggestions, again), d.message, repr(corrections(again, notes, lambda t, patient: t.replace(canary, 'A')))]
    made += [p.read_text() for p in tmp_path.rglob('*') if p.is_file()]
    assert len(made) == 7 and not [m for m in made if canary in m or 'insulin' in m and m is not made[4]]


def test_only_what_was_confirmed_or_corrected_is_learned_from_and_only_deidentified(tmp_path):
    d = Decisions(tmp_path/'d.jsonl')
    notes = [Note(f'visit-{i}', f'Ms. Kowalski, number {i}.', (Code('J45.909', spans=((0, 3),), primary=True), Code('E78.5')), patient='MRN 4471', language='es', kind='real', split='test') for i in range(5)]
    added(d, 'visit-0'); added(d, 'visit-1', 'correct', 'I10', None, who='Dr. Li'); added(d, 'visit-2', 'reject', None, None); added(d, 'visit-3'); d.undo('visit-3', 'Dr. Osei')
    asked = []
    taught = corrections(d, notes, lambda t, patient: (asked.append(patient), t.replace('Kowalski', 'Anders'))[1])
    assert asked == ['MRN 4471']*2   # so that its surrogates can belong to the patient
    assert [(t.note.codes, t.who, t.action) for t in taught] == [((Code('J45.909', primary=True), Code('E78.5')), 'Dr. Osei', 'confirm'), ((Code('I10', primary=True), Code('E78.5')), 'Dr. Li', 'correct')]
    assert [t.when for t in taught] == [d.state(f'visit-{i}').when for i in (0, 1)] and all(t.note.language == 'es' and t.note.kind == 'real' and t.note.split == '' for t in taught)
    assert not re.search('Kowalski|4471|visit', repr(taught)) and taught[0].note.patient == taught[1].note.patient != ''


@pytest.mark.parametrize('after, kept', [('J45.909', 'J45.909 I10 0DTJ4ZZ'), ('E11.9', 'E11.9 I10 0DTJ4ZZ'), ('I10', 'I10 0DTJ4ZZ'), ('0DTJ4ZZ', '0DTJ4ZZ')])
def test_a_corrected_note_keeps_its_other_codes_with_the_code_decided_on_first(tmp_path, after, kept):
    d = Decisions(tmp_path/'d.jsonl')
    note = Note('a', 'Asthma, HTN, lap appy.', (Code('I10', spans=((8, 11),)), Code('J45.909', spans=((0, 6),), primary=True), Code('0DTJ4ZZ', 'ICD-10-PCS')))
    added(d, 'a', *(() if after == 'J45.909' else ('correct', after, None)))
    same, moved = ([t.note for t in corrections(d, [note], f)][0] for f in (lambda t, patient: t, lambda t, patient: f'Ms. A. {t}'))
    for n in (same, moved): assert [c.code for c in n.codes] == kept.split() and [c.code for c in n.codes if c.primary] == [after]
    assert primary(same) == (after if after != '0DTJ4ZZ' else '')          # a diagnosis that nobody decided on is not made the first one
    assert all(c.spans == {'I10': ((8, 11),), 'J45.909': ((0, 6),)}.get(c.code, ()) for c in same.codes) and not any(c.spans for c in moved.codes)


def test_the_same_note_is_learned_once_with_the_latest_code(tmp_path):
    d = Decisions(tmp_path/'d.jsonl')
    notes = [Note('a', 'Has  insulin.'), Note('b', 'has insulin.'), Note('c', 'Neck supple.')]
    added(d, 'b', 'correct', 'I10', None); added(d, 'a'); added(d, 'c')
    for order in (notes, notes[::-1]):
        taught = corrections(d, order, lambda t, patient: t)
        assert sorted(t.note.codes[0].code for t in taught) == ['J45.909', 'J45.909'] and len({t.note.id for t in taught}) == 2


def test_the_later_line_of_the_log_holds_whatever_the_clock_said(tmp_path, monkeypatch):
    times = iter(['2026-03-02T09:00:00.000Z', '2026-03-02T09:00:00.000Z', '2026-03-02T08:00:00.000Z'])   # within one tick, and a clock that was set back
    monkeypatch.setattr('edgenb.decisions.utc_now', lambda: next(times))
    d = Decisions(tmp_path/'d.jsonl')
    notes = [Note(i, 'Has insulin.') for i in 'abc']
    added(d, 'c', 'correct', 'I10', None); added(d, 'a')
    code = lambda order: [t.note.codes[0].code for t in corrections(Decisions(d.path), order, lambda t, patient: t)]
    two = notes[:1] + notes[2:]
    assert code(two) == code(two[::-1]) == ['J45.909']
    added(d, 'b', 'correct', 'E11.9', None)
    assert code(notes) == code(notes[::-1]) == ['E11.9'] and [x.note for x in Decisions(d.path).standing()] == ['c', 'a', 'b']


def test_nothing_is_learned_without_a_way_to_deidentify(tmp_path):
    d = Decisions(tmp_path/'d.jsonl'); added(d)
    with pytest.raises(TypeError): corrections(d, [Note('visit-1', 'text')])
    with pytest.raises(EdgenbError, match='must be a function'): corrections(d, [Note('visit-1', 'text')], None)
    with pytest.raises(EdgenbError, match='left no text of note 1 of the 1 given'): corrections(d, [Note('visit-1', 'text')], lambda t, patient: '')
    with pytest.raises(EdgenbError, match=r'1 of 1 reviewed notes are not .* line 1 of .*d.jsonl'): corrections(d, [Note('other', 'text')], lambda t, patient: t)


# -- what confirmation brings

def brute(p, truth, shown, checked):
    order = sorted(range(len(p)), key=lambda i: (max(p[i]), i))[:round(checked*len(p))]
    best = [sorted(range(len(row)), key=lambda c: (-row[c], c)) for row in p]
    return sum(truth[i] in best[i][:shown] if i in order else best[i][0] == truth[i] for i in range(len(p)))/len(p)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(2, 7), st.integers(0, 10**6), st.data())
def test_confirmation_brings_what_counting_by_hand_says_and_never_harms(n, classes, seed, data):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 5, (n, classes))/5 + 0.01   # with ties
    truth, shown = rng.integers(-1, classes, n), data.draw(st.integers(1, classes))
    rows = after_confirmation(p, truth, shown=shown)
    assert [r['right'] for r in rows] == pytest.approx([brute(p.tolist(), truth, shown, r['checked']) for r in rows])
    right = [r['right'] for r in rows]
    assert right == sorted(right) and all(r['low'] <= r['right'] <= r['high'] for r in rows)
    assert rows[0]['at_random'] == pytest.approx(right[0]) and rows[-1]['at_random'] == pytest.approx(right[-1])


def test_confirmation_is_as_sure_as_the_number_of_patients_allows():
    rng = np.random.default_rng(0)
    p, truth = rng.dirichlet(np.ones(4), 40), rng.integers(0, 4, 40)
    once, often = after_confirmation(p, truth, shown=2), after_confirmation(p.repeat(10, 0), truth.repeat(10), shown=2, patients=np.repeat(np.arange(40), 10))
    assert [r['right'] for r in often] == pytest.approx([r['right'] for r in once])
    assert all(r['high'] - r['low'] == pytest.approx(o['high'] - o['low'], abs=0.05) for r, o in zip(often, once))   # 400 notes, of 40 patients
    assert after_confirmation(p, truth, shown=2, patients=range(40)) == once


def test_confirmation_in_words_and_refusals():
    p, truth = np.array([[.9, .05, .05], [.4, .35, .25], [.4, .3, .3]]), np.array([0, 1, -1])
    assert '| 100% | 66.7%' in confirmation_table(after_confirmation(p, truth, shown=2)) and '| 0% | 33.3%' in confirmation_table(after_confirmation(p, truth, shown=2))
    for bad in (dict(shown=4), dict(shown=0), dict(checked=[1.5])):
        with pytest.raises(EdgenbError, match='out of range'): after_confirmation(p, truth, **{'shown': 2, **bad})
    with pytest.raises(EdgenbError, match='true codes'): after_confirmation(p, truth[:2], shown=2)
