"The coder of mentions: what it may learn from, what it must not, how it fails, and that it is what it was after saving and in 8 bits; real data where they are."
import json
import numpy as np
import pytest
from edgenb.codes import category3
from edgenb.codiesp import _gpt4, by_mention, codiesp_folder, codiesp_notes, codiesp_table, system_row
from edgenb.core import EdgenbError
from edgenb.mentions import EXACT, FEATURES, Coder, Lexicon, Words, candidates, lexicon_of, platt, project, term_of
from edgenb.notes import Code, Note, read_notes
from edgenb.ranking import (abstention_curve, average_precision, expected_calibration_error, interval, mean_average_precision, micro, micro_f1, paired_difference, review_effort, seen_and_unseen, top_k)

SAID = {'I10': ('hypertension', 'high blood pressure'), 'E11.9': ('type 2 diabetes', 'diabetes mellitus'), 'J45.909': ('asthma', 'bronchial asthma'), 'N20.0': ('kidney stone', 'renal calculus'), 'R51.9': ('headache', 'migraine')}


def made_up(n, seed):
    "Two things the patient has, two that are denied; made up."
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        names = list(rng.permutation(list(SAID)))
        words = {c: str(rng.choice(SAID[c])) for c in names}
        text = f'Seen for {words[names[0]]} since {rng.integers(2, 9)} days. Denies {words[names[2]]}. Exam: {words[names[1]]}, stable. No {words[names[3]]}.'
        out.append(Note(f'{seed}-{i}', text, tuple(Code(c, spans=((text.index(words[c]), text.index(words[c]) + len(words[c])),)) for c in names[:2]), kind='synthetic'))
    return out


@pytest.fixture(scope='module')
def coder(): return Coder.fit(made_up(60, 0), language='en', members=2, epochs=40, titles=False)


def real():
    if not codiesp_folder().is_dir(): pytest.skip(f'no CodiEsp at {codiesp_folder()}: set EDGENB_SHARED_DATA')
    return codiesp_folder()


# measures

def plain_map(truth, ranked):
    "As the rules say it, the long way."
    each = []
    for t, r in zip(truth, ranked):
        if not t: continue
        r = [c for n, c in enumerate(r) if c not in r[:n]]
        each.append(sum(len(set(r[:n + 1]) & t)/(n + 1) for n, c in enumerate(r) if c in t)/len(t))
    return sum(each)/len(each)


def test_map_is_the_published_rule_on_random_lists():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = [{str(c) for c in rng.integers(0, 12, rng.integers(0, 5))} for _ in range(9)]
        ranked = [[str(c) for c in rng.integers(0, 12, rng.integers(0, 15))] for _ in range(9)]
        if any(truth): assert mean_average_precision(truth, ranked) == pytest.approx(plain_map(truth, ranked))


def test_a_code_in_lower_case_or_given_twice_changes_no_map():
    assert average_precision({'I10', 'R52'}, ['i10', 'I10', 'r52']) == 1


def test_micro_f1_counts_codes_not_documents():
    assert micro_f1([{'A', 'B', 'C'}, {'D'}], [{'A', 'B', 'C'}, {'X'}]) == (0.75, 0.75, 0.75)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(EdgenbError, match='2 and 1'): micro_f1([{'A'}, {'B'}], [{'A'}])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(1), 0
    for n in range(60):
        truth = [{'A', 'B'}]*60
        found = [{c for c in 'AB' if rng.random() < 0.6} for _ in truth]
        low, high = interval(lambda t, p: micro_f1(t, p)[1], truth, found, draws=200, seed=n)
        held += low <= 0.6 <= high
    assert 51 <= held <= 60


def test_a_system_is_not_better_than_itself_and_a_better_one_is():
    truth, rng = [{f'{n}{c}' for c in 'ABCDE'} for n in range(200)], np.random.default_rng(0)
    good, bad = ([{c for c in sorted(t) if rng.random() < p} for t in truth] for p in (0.8, 0.5))
    assert paired_difference(micro, truth, good, good, draws=20)['interval'] == (0, 0)
    assert paired_difference(micro, truth, good, bad, draws=100)['interval'][0] > 0.1


def test_intervals_hold_the_truth_where_the_notes_of_a_patient_say_the_same():
    "Forty patients with six notes each, all found or all not: drawn by notes the interval claims to know too much."
    rng, held, claimed = np.random.default_rng(2), 0, 0
    patients, truth = [p for p in range(40) for _ in range(6)], [{'A'}]*240
    for n in range(60):
        found = [{'A'} if known else set() for known in rng.random(40) < 0.6 for _ in range(6)]
        (low, high), (a, b) = (interval(lambda t, f: micro_f1(t, f)[1], truth, found, groups=g, draws=200, seed=n) for g in (patients, None))
        held, claimed = held + (low <= 0.6 <= high), claimed + (a <= 0.6 <= b)
    assert 51 <= held <= 60 and claimed < 45
    none = [set()]*240
    by_patient, by_note = (paired_difference(micro, truth, found, none, groups=g, draws=200)['interval'] for g in (patients, None))
    assert by_patient[1] - by_patient[0] > 1.5*(by_note[1] - by_note[0])
    assert interval(micro, truth, found, groups=range(240), draws=50) == interval(micro, truth, found, draws=50)   # each note its own
    with pytest.raises(EdgenbError, match='240 and 240 and 2'): interval(micro, truth, found, groups=[1, 2])


def test_the_recipe_draws_patients_where_they_have_several_notes():
    from edgenb.recipes.icd import coding_row
    rng = np.random.default_rng(0)
    said, patients = np.repeat(rng.dirichlet((1, 1), 30), 4, axis=0), [f'p{i//4}' for i in range(120)]
    right = ['I10']*120
    wide, narrow = (coding_row('x', said, ('I10', 'R51.9'), right, [{'I10'}]*120, 0.9, patients=p) for p in (patients, range(120)))
    for k in ('top-1', 'MAP', 'micro-F1'): assert wide[k][0] == narrow[k][0] and wide[k][2] - wide[k][1] > 1.4*(narrow[k][2] - narrow[k][1])


def test_the_threshold_of_the_recipe_is_about_the_best_for_lists_that_are_never_empty():
    from edgenb.recipes.icd import coded, threshold_for
    rng, classes = np.random.default_rng(5), [f'A{n:02}' for n in range(20)]
    said = rng.dirichlet([0.15]*20, 300)
    truth = [{c for c, p in zip(classes, row) if rng.random() < 1.3*p} or {classes[int(rng.integers(20))]} for row in said]
    f1 = lambda t: micro(truth, coded(said, classes, t)[1])
    assert f1(threshold_for(said, classes, truth)) > max(f1(t/100) for t in range(1, 100)) - 0.01 > f1(0.02) + 0.02


def test_unseen_codes_are_scored_apart():
    apart = seen_and_unseen([{'A', 'B'}], [['A', 'B']], [{'A', 'C'}], seen={'A'})
    assert apart['seen']['f1'] == 1 and apart['unseen']['recall'] == 0 and apart['unseen']['precision'] == 0 and apart['unseen']['map'] == 1


def test_the_right_category_counts_where_categories_are_asked():
    assert not top_k(['E11.9'], [['E11.65']])[0] and top_k(['E11.9'], [['E11.65']], level=category3)[0]


def test_checking_the_least_sure_helps_only_as_far_as_the_confidence_says_something():
    rng = np.random.default_rng(0)
    confidence = rng.random(3000)
    right = rng.random(3000) < confidence
    told, mute = (review_effort(c, right, 0.3) for c in (confidence, rng.permutation(confidence)))
    assert told > mute + 0.05 and review_effort(confidence, right, 1.0) == 1 and abstention_curve(right, confidence)['area'] < abstention_curve(right, rng.permutation(confidence))['area']
    assert review_effort([0.1, 0.2, 0.9], [False, False, True], 0.5, cost=[1, 9, 10]) == 1 and review_effort([0.1, 0.2, 0.9], [False, False, True], 0.4, cost=[1, 9, 10]) == pytest.approx(2/3)


def test_a_confidence_that_is_no_probability_is_refused():
    with pytest.raises(EdgenbError, match='between 0 and 1'): expected_calibration_error([True, False], [0.5, 2.0])


# the coder

def test_what_is_denied_is_not_coded(coder):
    note = Note('x', 'Seen for high blood pressure since three days. Denies asthma. No kidney stone.')
    assert coder.predict(note) == {'I10'}


def test_evidence_points_at_the_words(coder):
    for note in made_up(10, 3):
        for code, p, spans in coder.rank(note):
            assert 0 <= p <= 1 and all(note.text[a:b] in (w for s in SAID[code] for w in (s, *s.split())) for a, b in spans), (code, spans)


def test_an_empty_note_and_a_long_one_have_their_answers(coder):
    assert coder.rank(Note('x', '')) == [] and coder.predict(Note('x', '¿?')) == set()
    assert coder.predict(Note('x', 'Unremarkable visit today. '*4000 + 'Seen for asthma since 3 days.')) <= {'J45.909'}


def test_what_a_note_brought_itself_is_not_held_for_it():
    notes = [Note('1', 'A rash.', (Code('R21', spans=((2, 6),)),)), Note('2', 'A fever.', (Code('R50.9', spans=((2, 7),)),))]
    lexicon, texts, own = lexicon_of(notes, 'ICD-10-CM', patients=1)
    assert [c.code for c in candidates(lexicon, texts[0])] == ['R21'] and candidates(lexicon, texts[0], own[0]) == []


def test_features_of_a_training_note_are_those_it_would_have_as_a_new_note():
    notes = made_up(40, 5)
    lexicon, texts, own = lexicon_of(notes, 'ICD-10-CM')
    others, _, _ = lexicon_of(notes[1:], 'ICD-10-CM')
    theirs = {c.code: c.features for c in candidates(others, texts[0])}
    weights = [i for i, f in enumerate(FEATURES) if f.endswith('weight')]   # of words, which counts every text
    for c in candidates(lexicon, texts[0], own[0]): assert np.delete(c.features, weights) == pytest.approx(np.delete(theirs[c.code], weights)), c.code


def test_a_saved_coder_and_one_in_8_bits_answer_alike(coder, tmp_path):
    small = coder.quantized(made_up(30, 2))
    again = Coder.load(small.save(tmp_path/'coder'))
    notes = made_up(30, 9)
    assert all(again.rank(n) == small.rank(n) for n in notes)
    assert sum(small.predict(n) == coder.predict(n) for n in notes) >= 28 and len(small.onnx) < len(coder.onnx)


def test_the_same_notes_and_seed_give_the_same_coder_whatever_was_drawn_before(coder):
    import torch
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again, other = (Coder.fit(made_up(60, 0), language='en', seed=seed, members=2, epochs=40, titles=False) for seed in (0, 1))
    note = made_up(1, 7)[0]
    assert again.rank(note) == coder.rank(note) != other.rank(note) and again.threshold == coder.threshold and torch.equal(before, torch.random.get_rng_state())


def test_a_saved_coder_holds_no_sentence_of_a_note(coder, tmp_path):
    text = (coder.save(tmp_path/'coder')/'lexicon.json').read_text()
    assert 'stable' not in json.loads(text)['counts'] and 'Seen for' not in text and not any(n.text[:20] in text for n in made_up(60, 0))


def test_a_name_or_number_of_one_patient_is_nowhere_in_a_saved_coder(tmp_path):
    notes = made_up(60, 0)
    for i, patient in enumerate(('p0', 'p0')):   # two notes of one patient; a coder marked the names as well
        text = f'{notes[i].text} Kowalczyk disease, MRN 4471902, sign of Zorrillanza. Asthma.'
        spans = tuple((text.index(w), text.index(w) + len(w)) for w in ('Kowalczyk disease', '4471902', 'sign of Zorrillanza'))
        notes[i] = Note(notes[i].id, text, (*notes[i].codes, *(Code('I10', spans=(s,)) for s in spans), Code('J45.909', spans=((len(text) - 7, len(text) - 1),))), patient=patient)
    for i in (2, 3): notes[i] = Note(notes[i].id, notes[i].text + ' Zorrilla clinic, ward 4471902. A disease, a sign.', notes[i].codes)   # two more patients: the beginning of the name is not of one patient alone, its end is
    saved = b''.join(p.read_bytes() for p in Coder.fit(notes, language='en', members=2, epochs=2, titles=False).save(tmp_path/'coder').iterdir()).lower()
    assert not any(w in saved for w in (b'kowal', b'cowal', b'447', b'zorrillan')) and b'asthma' in saved and b'hypert' in saved


@pytest.mark.parametrize('name, content, said', [('lexicon.json', '{"counts": ', 'damaged'), ('coder.json', '{}', 'damaged'), ('coder.json', None, 'missing'), ('network.onnx', 'no network', 'cannot be loaded')])
def test_a_damaged_coder_is_refused_in_one_line(coder, tmp_path, name, content, said):
    folder = coder.save(tmp_path/'coder')
    (folder/name).unlink()
    if content is not None: (folder/name).write_text(content)
    with pytest.raises(EdgenbError, match=said) as e: Coder.load(folder).rank(Note('x', 'Seen for asthma.'))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('notes, said', [([], 'no notes'), ([Note('a', 'Tos.', (Code('R05'),), language='es')], "'es'"), ([Note('a', 'Cough.', (Code('R05'),))], 'spans')])
def test_notes_to_learn_nothing_from_are_refused(notes, said):
    with pytest.raises(EdgenbError, match=said): Coder.fit(notes, language='en', members=2, titles=False)


def test_too_few_notes_are_refused():
    with pytest.raises(EdgenbError): Coder.fit(made_up(2, 0), language='en', members=2, titles=False)


def test_order_words_between_and_endings_do_not_hide_a_term():
    lexicon = Lexicon({('marked', *_key('renal cyst')): 1, ('surface', term_of('renal cyst', 'en')[0], term_of('renal cyst', 'en')[1]): 1}, {}, 1)
    for text, found in (('Renal cysts.', 1), ('A cyst, probably renal.', 1), ('A cyst. Renal function is normal.', 0), ('A cyst.', 0)):
        assert len(lexicon.find(Words(text, 'en'))) == found, text
    assert next(iter(lexicon.find(Words('Renal cysts.', 'en')).values())).popitem()[1][0] == EXACT


def _key(text): return term_of(text, 'en')[0], 'N28.1'


def test_platt_takes_over_confidence_away():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5000)*2
    slope, offset = platt(logits*3, rng.random(5000) < 1/(1 + np.exp(-logits)))
    assert abs(slope - 1/3) < 0.05 and abs(offset) < 0.15


def test_a_translation_without_its_original_is_refused():
    with pytest.raises(EdgenbError, match='1 of 1 translations are of no note with evidence, the first is number 1') as e: project([Note('a', 'Tos.', language='es')], [Note('Smith', 'Cough.')])
    assert 'Smith' not in str(e.value)


def test_a_note_in_another_language_is_named_by_its_place():
    with pytest.raises(EdgenbError, match="1 of 2 notes are not in 'es'.*note 2, is in 'en'") as e: Coder.fit([Note('a', 'Tos.', language='es'), Note('Smith', 'Cough.')], language='es')
    assert 'Smith' not in str(e.value)


def test_mentions_of_a_wrong_line_are_refused_by_file_and_line(tmp_path):
    (tmp_path/'train').mkdir(); (tmp_path/'train'/'trainX.tsv').write_text('n\tDIAGNOSTICO\tr52\tdolor\t0-5\n')
    with pytest.raises(EdgenbError, match='trainX.tsv, line 1'): by_mention([Note('n', 'Dolor.', (Code('R52'),), language='es')], tmp_path)


# real data

def test_the_codes_gpt4_gave_score_as_listed():
    folder = real()
    if not (folder.parent/'codiesp_peer_gpt4').is_dir(): pytest.skip('no codes of GPT-4 beside CodiEsp')
    held = read_notes(folder/'test', 'es')
    truth = [{c.code for c in n.codes if c.system == 'ICD-10-CM'} for n in held]
    answers = _gpt4(folder, 'ICD-10-CM', held)
    assert round(micro_f1(truth, [{c for c, _ in a} for a in answers])[2], 3) == 0.457


def test_a_coder_of_a_few_real_notes_beats_the_published_word_baseline_on_procedures_of_the_development_part():
    folder = real()
    notes, held = codiesp_notes(folder, 'train'), codiesp_notes(folder, 'dev')[:60]
    coder = Coder.fit(notes, 'ICD-10-PCS', 'es', members=2, epochs=4, by_mention=True)
    truth = [{c.code for c in n.codes if c.system == 'ICD-10-PCS'} for n in held]
    row = system_row('small', truth, [coder.rank(n) for n in held], coder.threshold, coder.seen, draws=50)
    assert row['f1'] > 0.4 and row['unseen']['recall'] == 0 and '| small |' in codiesp_table({'rows': {'ICD-10-PCS': [row]}, 'language': 'es', 'part': 'dev', 'notes': 60})
