"The rooms for notes: nothing of a patient is kept, every hop of a language model is judged, and what ships decides without torch."
import json, re, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from edgenb.core import EdgenbError, Run
from edgenb.notes import Code, Note, primary, save_notes
from toylm import CHATML, rewritten, tiny_llama

torch, _, _ = pytest.importorskip('torch'), pytest.importorskip('presidio_analyzer'), pytest.importorskip('peft')
CANARY = 'zebrafinch'   # a word that stands in every note, and must stand nowhere but in the frozen notes
SAID = {'E11.9': ['T2DM, A1c 8.1', 'sugars high, on metformin'], 'J45.909': ['asthma, wheezing', 'SOB, uses inhaler'], 'I10': ['HTN, on lisinopril', 'BP up, no meds']}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_secrets(tmp_path, monkeypatch): monkeypatch.setattr('edgenb.records._secrets', lambda: tmp_path/'secrets')


def visits(per_code=26):
    "Synthetic notes of three codes, two visits a patient, each with a name, a number and a date."
    rng, found = np.random.default_rng(0), []
    for i in range(per_code*len(SAID)):
        code = list(SAID)[i % len(SAID)]
        words = ' '.join(rng.choice(['afebrile', 'alert', 'stable', 'comfortable', 'ambulating', 'eating', 'sleeping', 'tired', 'walking', 'resting', 'talking', 'calm'], 5))
        said = SAID[code][int(rng.integers(2))]
        head = f'Pt: John Marlowe MRN {4400000 + i//2} seen 03/{1 + i % 27:02}/2024. '
        text = f'{head}{CANARY}. {words}. A/P: {said}. Visit {i}'
        start = text.index(said)
        found.append(Note(f'Marlowe-{i}', text, (Code(code, spans=((start, start + len(said)),), primary=True),), f'Marlowe {i//2}', kind='synthetic'))
    return found


@pytest.fixture(scope='module')
def source(tmp_path_factory): return str(save_notes(visits(), tmp_path_factory.mktemp('clinic')/'visits.jsonl'))


READING = dict(kind='synthetic', least_recall=0.3, recall_notes=30, field=0.1)


@pytest.fixture(scope='module')
def read(source, tmp_path_factory):
    from edgenb.records import data
    run = Run.start('notes', tmp_path_factory.mktemp('runs'))
    return run, data(run, source=source, **READING)


def accepted(card): return [g['gate'] for g in card.result['certificate']['gates'] if not g['passed']]


def test_frozen_notes_name_nobody_and_evidence_still_points_at_its_words(read):
    from edgenb.records import frozen_notes
    run, card = read
    notes = frozen_notes(run, 'all')
    assert len(notes) == 78 and not any('Marlowe' in n.text or 'Marlowe' in n.id or re.search(r'MRN 44000', n.text) for n in notes)
    assert all(n.text[a:b] in SAID[c.code] for n in notes for c in n.codes for a, b in c.spans) and all(n.codes[0].spans for n in notes)
    everything = b''.join(p.read_bytes() for p in run.path.rglob('*') if p.is_file())
    assert b'Marlowe' not in everything                                       # nor any card, listing or log of the run


def test_a_patient_is_in_one_split_only(read, source):
    run, card = read
    units = json.loads(run.file('data', 'units.json').read_text())
    assert all(len([u for u in units if u['cluster'] == c]) == 2 for c in {u['cluster'] for u in units})   # both visits of a test patient are for testing
    assert card.result['splits']['field'] and sum(map(sum, (s.values() for s in card.result['splits'].values()))) == 78


def test_a_judged_note_says_whose_it_is_without_saying_who(read):
    from edgenb.records import judged_notes
    run, card = read
    notes = judged_notes(run)
    assert len(notes) == 2*len({n.patient for n in notes}) and all(re.fullmatch('[0-9a-f]{12}', n.patient) for n in notes)   # two visits each


def test_below_the_recall_that_is_asked_for_nothing_is_read(source, tmp_path):
    from edgenb.records import data
    run = Run(tmp_path/'run')
    with pytest.raises(EdgenbError, match='nothing was read'): data(run, source=source, **READING | {'least_recall': 0.9999})
    assert not list(run.path.glob('01-data*'))


def test_a_file_of_own_names_is_read_with_a_mark_and_refused_in_one_line_where_it_is_no_utf_8_text(source, tmp_path):
    from edgenb.deidentify import Deidentifier
    from edgenb.records import _names, data
    own = tmp_path/'own.txt'
    own.write_bytes('Zuzny\r\n\r\n Muñoz \r\n'.encode('utf-8-sig'))
    assert _names(str(own)) == ('Zuzny', 'Muñoz') and 'zuzny' not in Deidentifier(names=_names(str(own))).replace('mom brings zuzny')[0]
    own.write_bytes('Anders\nMuñoz\n'.encode('cp1252'))
    with pytest.raises(EdgenbError, match='own.txt, line 2: byte 0xf1 is not UTF-8.*save the file as UTF-8') as e: data(Run(tmp_path/'run'), source=source, own_names=str(own), **READING)
    assert 'Mu' not in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(EdgenbError, match='there is no file .* that can be read'): data(Run(tmp_path/'run'), source=source, own_names=str(tmp_path), **READING)
    with pytest.raises(EdgenbError, match='does not exist'): data(Run(tmp_path/'run'), source=source, own_names=str(tmp_path/'none.txt'), **READING)
    with pytest.raises(EdgenbError, match='there is no file'): _names(str(tmp_path/'none.txt'))


def test_recall_is_that_of_the_text_which_is_left(source, tmp_path, monkeypatch):
    from edgenb import records
    from edgenb.deidentify import Deidentifier
    monkeypatch.setattr(records, '_recall_rows', records._recall_rows.__wrapped__)
    assert records._measured_recall('en', (), 20, 0.3, 0)
    monkeypatch.setattr(Deidentifier, 'replace', lambda self, text, patient='': (text, [(f.start, f.end, f.start, f.end, f.kind) for f in self.find(text)]))
    with pytest.raises(EdgenbError, match='does not reach.* 0 of'): records._measured_recall('en', (), 20, 0.3, 0)


def test_codes_that_do_not_exist_are_named_and_left_out(tmp_path):
    from edgenb.records import data
    odd = visits()
    odd[3] = replace(odd[3], codes=(*odd[3].codes, Code('E11')))
    odd[4] = replace(odd[4], codes=(Code('J45', primary=True), Code('I10')))          # not to become a note about I10
    run = Run(tmp_path/'run')
    card = data(run, source=str(save_notes(odd, tmp_path/'v.jsonl')), **READING)
    rows = [json.loads(l) for l in run.file('data', 'problems.jsonl').read_text().splitlines()]
    assert card.result['problems'] == 2 and [r['code'] for r in rows] == ['E11', 'J45'] and 'codes' in accepted(card) and sum(map(sum, (s.values() for s in card.result['splits'].values()))) == 77
    assert not any(b'Marlowe' in p.read_bytes() for p in run.path.rglob('*') if p.is_file())


def test_the_class_of_a_note_is_a_diagnosis_and_never_a_procedure_that_is_listed_first(tmp_path):
    from edgenb.records import data, frozen_notes, judged_notes
    mixed = [replace(n, codes=((Code('0DTJ4ZZ', 'ICD-10-PCS'), Code('J1100', 'HCPCS'))[i % 2], *(replace(c, primary=False) for c in n.codes))) for i, n in enumerate(visits())]
    mixed[5] = replace(mixed[5], codes=(Code('0DTJ4ZZ', 'ICD-10-PCS', primary=True), Code('J1100', 'HCPCS')))
    mixed[6] = replace(mixed[6], codes=())
    run = Run(tmp_path/'run')
    card = data(run, source=str(save_notes(mixed, tmp_path/'v.jsonl')), **READING)
    assert card.result['classes'] == sorted(SAID) and {primary(n) for n in judged_notes(run)} <= set(SAID) and len(frozen_notes(run, 'all')) == 76
    assert all(primary(n, 'ICD-10-PCS') or primary(n, 'HCPCS') for n in frozen_notes(run, 'all'))                     # what else was coded stays with the note
    row, = (json.loads(l) for l in run.file('data', 'problems.jsonl').read_text().splitlines())
    assert card.result['left_out']['without ICD-10-CM'] == card.result['problems'] == 1 and row['code'] == '0DTJ4ZZ' and 'no ICD-10-CM code' in row['problem'] and 'codes' not in accepted(card)


def test_a_long_note_is_judged_as_one(tmp_path):
    from edgenb.data import units_of
    from edgenb.records import data
    long = [replace(n, text=n.text + '. ' + ' '.join(f'Day {d} unchanged, ward round {n.id[-1]}.' for d in range(60))) for n in visits()]
    run = Run(tmp_path/'run')
    data(run, source=str(save_notes(long, tmp_path/'v.jsonl')), words=60, overlap=10, **READING)
    assert all(u.last - u.first > 3 for u in units_of(run))


def test_no_window_is_trained_with_a_label_whose_evidence_is_elsewhere(tmp_path):
    from edgenb.records import data, frozen_notes
    def longer(n):
        text = n.text + '. ' + ' '.join(f'Day {d} unchanged, ward round {n.id[-1]}.' for d in range(30)) + ' Former smoker.'
        return replace(n, text=text, codes=(*n.codes, Code('Z87.891', spans=((len(text) - 14, len(text) - 1),))))
    run = Run(tmp_path/'run')
    data(run, source=str(save_notes([longer(n) for n in visits()], tmp_path/'v.jsonl')), words=60, overlap=10, **READING)
    trained, tested = frozen_notes(run, 'train'), frozen_notes(run, 'test')
    assert trained and all(any(s in n.text for s in SAID[primary(n)]) and 'smoker' not in n.text and [c.code for c in n.codes] == [primary(n)] for n in trained)
    assert any('smoker' in n.text for n in tested) and all(len(n.codes) == 2 for n in tested)        # what is judged is read whole


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Its rows are no multiple of 256."
    return tiny_llama(tmp_path_factory.mktemp('tiny')/'base', [n.text for n in visits()], 400, hidden_size=96, intermediate_size=256, max_position_embeddings=1024)


def test_tuning_what_is_no_language_model_is_one_line(read, tiny, tmp_path, monkeypatch):
    import huggingface_hub, shutil
    from edgenb.language import tune
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    mute, torn = (shutil.copytree(tiny, tmp_path/n) for n in ('mute', 'torn'))
    (mute/'tokenizer.json').unlink(); (torn/'tokenizer.json').write_text('[]')
    for name, why in ((mute, 'mute holds no tokenizer'), (torn, 'torn holds no tokenizer'), ('nobody/nothing', 'nobody/nothing is neither a folder here nor a model'), ('bundled:smollm3', 'bundled')):
        run = Run(tmp_path/f'run-{Path(str(name)).name}', pool=read[0].pool)
        run.path.mkdir()
        for p in read[0].path.glob('01-data*'): (run.path/p.name).symlink_to(p)
        with pytest.raises(EdgenbError, match=why) as e: tune(run, model_name_or_path=str(name), accept_gates=accepted(read[1]), num_threads=1)
        assert '\n' not in str(e.value) and not list(run.path.glob('02-tune*'))


def ready_or_skip():
    from edgenb.runtime import runtime
    if why := runtime('gguf').missing(build=True): pytest.skip(why)


@pytest.fixture(scope='module')
def squeezed(read, tiny):
    "The tiny language model, tuned and merged."
    ready_or_skip()
    from edgenb.language import squeeze, tune
    run, card = read
    tune(run, model_name_or_path=str(tiny), instruction='Give the code.', max_tokens=96, num_train_epochs=4, learning_rate=5e-3, lora_r=8, lora_alpha=16, accept_gates=accepted(card), num_threads=1)
    squeeze(run, levels=['f16', 'q8_0', 'q4_k_m', 'q8_0+adapter', 'gptq'], importance=True, importance_notes=8, num_threads=1)
    return run


@pytest.fixture(scope='module')
def shipped(squeezed):
    "The whole loop with it."
    from edgenb.language import compile
    from edgenb.records import learn
    from edgenb.ship import ship
    from edgenb.verify import verify
    from edgenb.watch import watch
    compile(squeezed, tolerance=1.0, num_threads=1)
    verify(squeezed, tolerance=0.5, latency_budget_ms=10_000, timing_runs=5)
    ship(squeezed, accept=['undecided'])
    watch(squeezed, shifts=['capitals'], window=10)
    learn(squeezed, budget=4)
    return squeezed


def test_every_hop_of_a_language_model_is_judged(shipped):
    rows = {r['artifact']: r for r in shipped.card('verify').result['rows']}
    assert list(rows) == ['reference', 'squeezed', 'gguf-f16', 'gguf-q8_0', 'gguf-q4_k_m', 'gguf-q8_0+adapter', 'gguf-base']
    assert rows['squeezed']['language']['top1'] == 1 and rows['squeezed']['language']['kl_mean'] < 1e-4
    assert rows['gguf-f16']['language']['kl_mean'] < 0.01 < rows['gguf-base']['language']['kl_mean'] and rows['gguf-f16']['flipped'] == []
    assert rows['gguf-base']['verdict'] == 'fail' and 'before tuning' in rows['gguf-base']['reason'] and all(rows[n]['language']['tokens_per_s'] > 0 for n in rows if n.startswith('gguf'))
    assert rows['gguf-f16']['size_mb'] > rows['gguf-q8_0']['size_mb']
    assert rows['gguf-q8_0+adapter']['language']['kl_mean'] < 0.01 and rows['gguf-q8_0+adapter']['size_mb'] > rows['gguf-q8_0']['size_mb']
    types = shipped.card('compile').result['types']['gguf-q4_k_m']
    assert types['left'] and '96' in types['why']                             # the label says K-quants; rows of 96 columns cannot be
    assert {p.split('/', 1)[1] for p in shipped.card('compile').wrote} >= {'gguf-q4_k_m.Modelfile', 'vllm.md'} and 'gguf-base.Modelfile' not in str(shipped.card('compile').wrote)


def test_a_bundle_with_base_and_adapter_apart_is_updated_by_the_adapter_alone(shipped, tiny, tmp_path):
    import shutil
    from edgenb.fleet.delta import chunk_files, plan, slot_files
    from edgenb.golden import check_golden
    from edgenb.gguf import write_gguf
    from edgenb.kquants import quantize
    from edgenb.language import prompt_of_run
    from edgenb.runtimes.gguf import Gguf
    from edgenb.ship import bundle_of, load_bundle, ship
    run = Run(tmp_path/'run')
    run.path.mkdir()
    for p in shipped.path.iterdir():
        if p.name[:2] in ('01', '02', '03', '04', '05'): (run.path/p.name).symlink_to(p)
    ship(run, artifact='gguf-q8_0+adapter', accept=['undecided'])
    bundle = bundle_of(run)
    assert sorted(p.name for p in (bundle/'model').iterdir()) == ['adapter.gguf', 'base.gguf'] and check_golden(bundle).ok
    notes, probability = [n.text for n in visits()[:8]], lambda path: np.exp(Gguf.load(path)(notes)['logits'])
    whole, apart, untuned = (probability(p) for p in (run.file('compile', 'gguf-f16.gguf'), bundle/'model', run.file('compile', 'gguf-base.gguf')))
    near, far = (np.abs(p - whole).max() for p in (apart, untuned))
    assert near < 0.1 and near < far/3 and load_bundle(bundle).predict([notes[0].encode()])[0]['label'] in SAID
    base = quantize(write_gguf(tiny, tmp_path/'f16.gguf', prompt_of_run(run)), tmp_path/'base.gguf', 'q8_0', num_threads=1)
    assert base.read_bytes() == (bundle/'model/base.gguf').read_bytes()          # whatever was tuned
    after = shutil.copytree(bundle, tmp_path/'after')
    adapter = bytearray((after/'model/adapter.gguf').read_bytes()); adapter[-2000:] = np.random.default_rng(0).bytes(2000)
    (after/'model/adapter.gguf').write_bytes(adapter)
    release = {'edgenb_release': 1, 'bundle': '0'*64, 'files': (files := chunk_files(after, tmp_path/'blobs')), 'total_bytes': sum(f['length'] for f in files), 'deltas': []}
    p = plan(release, slot_files(bundle))
    assert p.kind == 'kept' and p.bytes <= len(adapter) < 0.5*p.total_bytes
    (bundle/'model/adapter.gguf').unlink()
    with pytest.raises(EdgenbError, match='adapter.gguf'): Gguf.load(bundle/'model')


def test_no_card_log_or_bundle_holds_a_word_of_a_note(shipped):
    kept = [p for p in shipped.path.rglob('*') if p.is_file() and p.parent.name != 'notes' and p.name != 'new_notes.jsonl']
    assert len(kept) > 25 and not [p for p in kept if CANARY.encode() in p.read_bytes() and p.suffix not in ('.gguf',) and p.name not in ('tokenizer.json',)]   # the toy tokenizer was made from these notes


def test_the_bundle_answers_without_torch_and_ranks_the_codes(shipped, tmp_path):
    from edgenb.ship import bundle_of
    (tmp_path/'note.txt').write_text(visits()[0].text)
    script = ("import sys; [sys.modules.__setitem__(m, None) for m in ('torch', 'transformers', 'peft', 'gguf', 'spacy')]; "
              "from edgenb.cli import main; sys.exit(main(['predict', sys.argv[1], sys.argv[2], '--json']))")
    done = subprocess.run([sys.executable, '-c', script, str(bundle_of(shipped)), str(tmp_path/'note.txt')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer['label'] in SAID and answer['decision'] in ('suggest', 'review') and [c for c, _ in answer['codes']][0] == answer['label'] and abs(sum(p for _, p in answer['codes']) - 1) < 1e-3


@pytest.mark.parametrize('content, why', [(b'', 'empty'), (' \n'.encode(), 'empty'), ('señora'.encode('latin-1'), 'UTF-8'), (b'Pt stable. '*20_000, 'windows')])
def test_a_note_that_cannot_be_read_is_one_line(shipped, tmp_path, content, why):
    from edgenb.ship import bundle_of, load_bundle
    (tmp_path/'note.txt').write_bytes(content)
    with pytest.raises(EdgenbError, match=why): load_bundle(bundle_of(shipped)).predict([str(tmp_path/'note.txt')])


def test_corrections_come_back_as_notes_that_data_reads(shipped, source, tmp_path):
    from edgenb.records import data
    new = shipped.file('learn', 'new_notes.jsonl')
    learned = shipped.card('learn').result
    assert learned['notes'] == learned['asked'] == len(learned['actions']) == 4 and 'simulated' in learned['reviewer']
    again = Run(tmp_path/'again')
    card = data(again, source=source, extra=[str(new)], **READING)
    assert sum(card.result['splits']['train'].values()) >= sum(shipped.card('data').result['splits']['train'].values())


def test_a_shipped_language_model_reads_a_long_note_to_its_end(shipped):
    from edgenb.coder import reading, suggested
    from edgenb.ship import bundle_of, load_bundle
    bundle = load_bundle(bundle_of(shipped))
    text = 'Afebrile, alert, stable, no complaints today. '*300 + 'HTN, on lisinopril. ' + 'Afebrile, alert. '*300
    _, cut = reading(bundle)
    parts = cut(text)
    assert len(parts) > 20 and all(bundle.model.reads(text[b:e]) for b, e in parts) and not bundle.model.reads(text)
    assert parts[0][0] == 0 and parts[-1][1] == len(text) and all(e == b for (_, e), (b, _) in zip(parts, parts[1:])) and cut('HTN.') == [(0, 4)]
    [listed] = suggested(bundle, {c: c for c in bundle.pipeline.classes}, [text], explain=1)
    assert {s.code for s in listed} == set(SAID)


def test_the_card_has_every_action_and_names_no_note(shipped, tmp_path):
    from edgenb.decisions import Decisions
    from edgenb.records import learn
    notes = [replace(n, id=f'visit-of-Marlowe-{i}') for i, n in enumerate(visits()[:3])]
    record = Decisions(tmp_path/'decisions.jsonl')
    def decide(i, action, after, rank): record.add(notes[i].id, 'Dr. Osei', action, ('E11.9', 0.6), after, rank, model='sha256:5f1c', seconds=2.0)
    decide(0, 'confirm', 'E11.9', 1); decide(1, 'correct', 'I10', None); record.undo(notes[1].id, 'Dr. Li'); decide(1, 'correct', 'J45.909', 2); decide(2, 'reject', None, None)
    run = Run(tmp_path/'run', pool=shipped.pool)
    run.path.mkdir(parents=True, exist_ok=True)
    for p in shipped.path.iterdir():
        if p.name[:2].isdigit() and not p.name.startswith('08-'): (run.path/p.name).symlink_to(p)
    rows = learn(run, decisions=str(record.path), source=str(save_notes(notes, tmp_path/'reviewed.jsonl'))).result['actions']
    assert [(r['who'], r['action'], r['before'], r['after']) for r in rows] == [('Dr. Osei', 'confirm', 'E11.9', 'E11.9'), ('Dr. Osei', 'correct', 'E11.9', 'I10'), ('Dr. Li', 'undo', None, None),
                                                                                ('Dr. Osei', 'correct', 'E11.9', 'J45.909'), ('Dr. Osei', 'reject', 'E11.9', None)]
    assert [r['when'] for r in rows] == [json.loads(l)['when'] for l in record.path.read_text().splitlines()]
    a, b, *more, c = [r['note'] for r in rows]
    assert more == [b, b] and len({a, b, c}) == 3 and all(re.fullmatch('[0-9a-f]{12}', x) for x in (a, b, c))
    card, = (p for p in run.path.glob('08-*.json'))
    assert not re.search(f'Marlowe|{CANARY}', card.read_text())


def test_levels_for_gpus_are_made_where_they_can_be_and_end_no_run_elsewhere(squeezed, merged, monkeypatch):
    from edgenb import handoff, language
    told = squeezed.card('squeeze').result
    assert told['precisions'] == ['f16', 'q8_0', 'q4_k_m', 'q8_0+adapter'] and told['skipped'] == ({'gptq': handoff.gpu_missing()} if handoff.gpu_missing() else {})
    def made(folder, out, method, texts):
        if method == 'gptq': raise RuntimeError(f'cannot tokenize {texts[0]!r}')
        (out.mkdir(), (out/'config.json').write_text(method))
        assert (folder/'config.json').exists() and all(t.startswith('<|im_start|>') and t.endswith('<|im_end|>') for t in texts)
    monkeypatch.setattr(handoff, 'gpu_missing', lambda: ''); monkeypatch.setattr(handoff, 'gpu_quantize', made)
    for p in merged.path.glob('03-squeeze*'): p.unlink()
    told = language.squeeze(merged, levels=['q8_0', 'awq', 'gptq'], num_threads=1).result     # asked again, since now it can
    assert merged.file('squeeze', 'awq/config.json').read_text() == 'awq' and told['skipped'] == {'gptq': 'LLM Compressor could not (RuntimeError)'}   # not a word of a note
    with pytest.raises(EdgenbError, match='at least one level of GGUF'): language.squeeze(merged, levels=['awq'], num_threads=1)
    with pytest.raises(EdgenbError, match='Did you mean q8_0.adapter'): language.squeeze(merged, levels=['q8_0+adaptor'], num_threads=1)


@pytest.fixture
def merged(squeezed, tmp_path):
    "A run as `squeeze` left it."
    run = Run(tmp_path/'run', pool=squeezed.pool)
    run.path.mkdir()
    for name in ('01-data', '02-tune', '03-squeeze'):
        for p in squeezed.path.glob(f'{name}*'): (run.path/p.name).symlink_to(p)
    return run


@pytest.mark.parametrize('change, words', [
    (lambda t: t.replace('{% for m in messages %}', "{% for m in messages if m['role'] != 'system' %}"), 'lost its system turn: in a conversation with a system turn'),
    (lambda t: t + '{# another #}', 'template of the GGUF file is not that of the merged model')], ids=['rendered otherwise', 'rendered alike'])
def test_a_file_whose_template_changed_on_the_way_does_not_pass(change, words, merged, monkeypatch):
    from edgenb import gguf, language
    write = gguf.write_gguf
    def converted(folder, path, prompt): return rewritten(write(folder, path, prompt), path, tokenizer__chat_template=change(CHATML))
    monkeypatch.setattr(gguf, 'write_gguf', converted)
    with pytest.raises(EdgenbError, match=words) as e: language.compile(merged, tolerance=0.99, num_threads=1)
    assert '\n' not in str(e.value) and not list(merged.path.glob('04-compile*'))


@pytest.mark.parametrize('kept', [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_file_cut_short_on_the_way_does_not_pass(kept, merged, monkeypatch):
    from edgenb import gguf, language
    write = gguf.write_gguf
    def converted(folder, path, prompt):
        whole = write(folder, path, prompt).read_bytes()
        path.write_bytes(whole[:int(kept*len(whole))])
        return path
    monkeypatch.setattr(gguf, 'write_gguf', converted)
    with pytest.raises(EdgenbError, match='gguf-f16.gguf') as e: language.compile(merged, tolerance=0.99, num_threads=1)
    assert '\n' not in str(e.value) and not list(merged.path.glob('04-compile*'))


def test_sixteen_bits_whose_scores_are_no_numbers_do_not_pass(merged, monkeypatch):
    from edgenb import gguf, language
    write = gguf.write_gguf
    def nans(a): return np.frombuffer(np.full(a.nbytes//4, np.nan, np.float32).tobytes(), a.dtype).reshape(a.shape)
    monkeypatch.setattr(gguf, 'write_gguf', lambda folder, path, prompt: rewritten(write(folder, path, prompt), path, {'output_norm.weight': nans}))   # 32-bit floats in every file
    with pytest.raises(EdgenbError, match='no level holds. gguf-f16: its scores are not finite') as e: language.compile(merged, tolerance=0.98, num_threads=1)
    assert '\n' not in str(e.value)


def test_a_name_that_is_added_to_the_clinics_list_goes_from_what_is_learned(read, source, tmp_path):
    "The shipped bundle is not asked when decisions are on record, so that this run ends with `data` and a bundle of nothing."
    from edgenb.core import room
    from edgenb.decisions import Decisions
    from edgenb.records import data, learn
    @room(6, needs=('data',))
    def ship(run): return {}
    own, run = tmp_path/'own.txt', Run.start('names', read[0].pool.parent)
    own.write_text('Marlowe\n')
    data(run, source=source, own_names=str(own), **READING)
    ship(run)
    seen = visits()[:2]
    record = Decisions(tmp_path/'decisions.jsonl')
    record.add(seen[0].id, 'Dr. Osei', 'confirm', ('E11.9', 0.6), 'E11.9', 1, model='m', seconds=2.0)
    given = dict(decisions=str(record.path), source=str(save_notes(seen, tmp_path/'reviewed.jsonl')))
    first, left = learn(run, **given), lambda: run.file('learn', 'new_notes.jsonl').read_text()
    assert not first.skipped and learn(run, **given).skipped and CANARY in left()
    own.write_text(f'Marlowe\n{CANARY}\n')
    again = learn(run, **given)
    assert not again.skipped and CANARY not in left() and again.read['own names'] != first.read['own names']
    own.unlink()
    with pytest.raises(EdgenbError, match='own.txt does not exist'): learn(run, **given)


def test_what_comes_back_from_the_desk_is_not_trained_on_where_its_note_or_patient_is_tested_on(read, source, tmp_path):
    from edgenb.core import room
    from edgenb.decisions import Decisions
    from edgenb.notes import read_notes
    from edgenb.records import data, frozen_notes, learn, spread
    @room(6, needs=('data',))
    def ship(run): return {}
    run, placed = Run.start('returned', read[0].pool.parent), spread(visits(), {'test': 0.25, 'validation': 0.12, 'field': 0.1})
    data(run, source=source, **READING)
    ship(run)
    of = lambda split: next(n for n in placed if n.split == split)
    later = lambda n, i: replace(n, id=f'later-{i}', text=f'{n.text}. Seen again, {i} weeks later, as planned', codes=n.codes[:1])
    seen = [replace(n, split='') for n in (of('test'), of('validation'), of('field'), later(of('test'), 2), later(of('train'), 3), replace(later(of('train'), 4), patient='Quimby 9'))]
    record = Decisions(tmp_path/'decisions.jsonl')
    for n in seen: record.add(n.id, 'Dr. Osei', *(('confirm', ('E11.9', 0.6), 'E11.9', 1) if primary(n) == 'E11.9' else ('correct', ('E11.9', 0.6), primary(n), 2)), model='m', seconds=2.0)
    learn(run, decisions=str(record.path), source=str(save_notes(seen, tmp_path/'reviewed.jsonl')))
    back, again = read_notes(new := run.file('learn', 'new_notes.jsonl')), Run.start('returned', read[0].pool.parent)
    assert len(back) == 6 and not re.search('Marlowe|later-|Quimby', new.read_text())
    card = data(again, source=source, extra=[str(new)], **READING)
    frozen, held = frozen_notes(again, 'train'), frozen_notes(again, 'validation') + frozen_notes(again, 'test')
    before = {n.text for n in frozen_notes(run, 'all')}
    assert card.result['left_out']['extra, but of validation or test'] == 3 and 'leakage' not in accepted(card) and len(held) == len([n for n in placed if n.split in ('validation', 'test')])
    assert {n.text for n in frozen} - before == {n.text for n in back} - before - {back[3].text} and len({n.text for n in back} - before) == 3      # as they came: not de-identified again
    patients = json.loads(again.file('data', 'patients.json').read_text())
    assert not {patients[n.id] for n in held} & {patients[n.id] for n in frozen}
    (own := tmp_path/'own.txt').write_text(f'{CANARY}\n')                                                                                         # a name that was learned of since
    data(wiser := Run.start('returned', read[0].pool.parent), source=source, extra=[str(new)], own_names=str(own), **READING)
    assert wiser.card('data').result['left_out']['extra, but of validation or test'] == 3 and not any(CANARY in n.text for n in frozen_notes(wiser, 'all'))
    patients = [json.loads(r.file('data', 'patients.json').read_text()) for r in (again, wiser)]
    assert patients[0] == patients[1]
    forged = save_notes([replace(back[5], text='Pt: John Marlowe, asthma, wheezing. ' + back[5].text)], tmp_path/'forged.jsonl')
    data(elsewhere := Run.start('returned', read[0].pool.parent), source=source, extra=[str(forged)], **READING)
    assert not any('John Marlowe' in n.text for n in frozen_notes(elsewhere, 'all'))                                                             # a text that was changed since is not believed


def test_an_encoder_goes_the_same_way(read, tmp_path_factory):
    "A random encoder of two layers: its ONNX file answers as it does."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel
    from edgenb.compile import compile
    from edgenb.encoder import tune
    from edgenb.squeeze import squeeze
    from edgenb.verify import verify
    folder, (run, card) = tmp_path_factory.mktemp('encoder'), read
    words = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator([n.text for n in visits()], trainers.WordPieceTrainer(vocab_size=400, special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]'], show_progress=False))
    words.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    words.save(str(folder/'tokenizer.json'))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=words.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128)).save_pretrained(folder)
    beside = Run(run.path.parent/'beside', pool=run.pool)
    from edgenb.records import data
    data(beside, **card.asked)
    tune(beside, model_name_or_path=str(folder), length=96, num_train_epochs=4, learning_rate=1e-2, accept_gates=accepted(card), num_threads=1)
    squeeze(beside, precisions=['fp32'])
    compile(beside, runtimes=['onnxruntime'], tolerance=1.0)
    rows = {r['artifact']: r for r in verify(beside, tolerance=0.5, latency_budget_ms=10_000, timing_runs=5).result['rows']}
    assert rows['onnxruntime-fp32']['delta'] == 0 and rows['onnxruntime-fp32']['flipped'] == [] and rows['onnxruntime-fp32']['also']['auc']['value'] is None


def small_encoder():
    "A network of one layer, and notes in which one word says the code."
    from transformers import BertConfig
    from edgenb.encoder import NoteEncoder, code_targets
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), NoteEncoder(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=8).to_dict(), classes=2)
    y = rng.integers(0, 2, 96)
    ids = np.concatenate([rng.integers(5, 20, (96, 4)), 2 + y[:, None]], 1)
    return net, lambda a, b: (ids[a:b], y[a:b], code_targets(y[a:b], [set()]*(b - a), 2))


@pytest.mark.parametrize('batch_size, epochs', [(8, 1), (16, 2), (73, 10)])
def test_an_encoder_trains_in_ten_steps_as_in_any_other_number(batch_size, epochs):
    from edgenb.encoder import train
    net, part = small_encoder()
    _, history = train(net, part(0, 73), part(80, 96), epochs, batch_size, 1e-3, 4, 8, patience=epochs)
    assert len(history) == epochs and all(np.isfinite(list(h.values())).all() for h in history)


def test_an_encoder_that_diverges_is_one_line_and_one_that_does_so_late_is_its_best(monkeypatch):
    from edgenb import encoder
    net, part = small_encoder()
    with pytest.raises(EdgenbError, match=r'diverged in its first epoch.*lower learning_rate, which was 1e\+30'): encoder.train(net, part(0, 64), part(80, 96), 2, 8, 1e30, 4, 8, patience=2)
    asked = []
    logits_of = encoder.logits_of
    def third_time_broken(net, ids): asked.append(0); return logits_of(net, ids)*(np.nan if len(asked) == 3 else 1)
    monkeypatch.setattr(encoder, 'logits_of', third_time_broken)
    late, history = encoder.train(net, part(0, 64), part(80, 96), 6, 8, 1e-3, 4, 8, patience=6)
    assert len(history) == 2 and len(asked) == 3 and all(np.isfinite(list(h.values())).all() for h in history)   # a card holds numbers
    assert np.isfinite(logits_of(late, part(80, 96)[0])).all()


def test_a_patient_whom_the_source_puts_on_both_sides_fails_the_gate(tmp_path):
    from edgenb.records import data
    both = [replace(n, split=('train', 'train', 'train', 'validation', 'test', 'train')[i % 6]) for i, n in enumerate(visits())]
    run = Run(tmp_path/'run')
    assert 'leakage' in accepted(data(run, source=str(save_notes(both, tmp_path/'v.jsonl')), **READING))


def test_splits_of_some_notes_only_are_refused_and_not_drawn_anew(tmp_path):
    from edgenb.records import data
    some = [replace(n, split='test') if i < 20 else n for i, n in enumerate(visits())]
    with pytest.raises(EdgenbError, match='20 notes have a split and 58 have none: .*Give every note with codes its split, or none'): data(Run(tmp_path/'run'), source=str(save_notes(some, tmp_path/'v.jsonl')), **READING)


LM, ENCODER = ([dict(artifact=a, runtime=r, value=v, delta_low=-0.01, size_mb=mb, p95_ms=ms, verdict=said, reason='a reason') for a, r, v, mb, ms, said in rows] for rows in (
    [('reference', 'torch', 0.9, 538, 900, ''), ('gguf-f16', 'gguf', 0.9, 270, 400, 'pass'), ('gguf-q8_0', 'gguf', 0.9, 135, 300, 'pass'), ('gguf-q3_k_s', 'gguf', 0.5, 88, 200, 'fail'), ('gguf-base', 'gguf', 0.0, 270, 400, 'fail')],
    [('reference', 'torch', 0.9, 91, 20, ''), ('onnxruntime-fp32', 'onnxruntime', 0.9, 90, 9, 'pass'), ('onnxruntime-int8', 'onnxruntime', 0.9, 22.5, 4, 'pass')]))


def test_the_verdict_speaks_of_the_family_that_ships():
    from edgenb.recipes.icd import verdict
    right = {'language model': np.arange(100) < 99, 'encoder': np.arange(100) < 50}
    said = verdict('encoder', ENCODER, 'onnxruntime-int8', 0.05, right, 'synthetic')
    assert said.startswith('The encoder as onnxruntime-int8 (22 MB, 4.0 times smaller than onnxruntime-fp32) may ship') and 'gguf' not in said and 'not reached by the encoder' in said
    said = verdict('language model', LM, 'gguf-q8_0', 0.05, right, 'synthetic')
    assert said.startswith('The language model as gguf-q8_0 (135 MB, 2.0 times smaller than gguf-f16) may ship') and 'Refused: gguf-q3_k_s.' in said and ' reached by the language model' in said and 'not reached' not in said
    assert verdict('encoder', ENCODER, None, 0.05, right, 'synthetic').startswith('No file of the encoder may ship. onnxruntime-fp32: a reason.')


def test_a_family_is_better_where_the_same_notes_say_so():
    from edgenb.recipes.icd import verdict
    from edgenb.verify import rate_interval
    nested = {'language model': np.arange(200) < 170, 'encoder': np.arange(200) < 160}                      # right wherever the encoder is, and ten times more
    crossed = {'language model': np.arange(200) < 170, 'encoder': (np.arange(200) < 145) | (np.arange(200) >= 185)}   # as many of each; 25 times one, 15 times the other
    assert [int(h.sum()) for h in crossed.values()] == [int(h.sum()) for h in nested.values()] and rate_interval(170, 200)[0] < rate_interval(160, 200)[1]
    for ships, rows, chosen in (('language model', LM, 'gguf-q8_0'), ('encoder', ENCODER, 'onnxruntime-int8')):
        assert 'the language model is the better coder here' in verdict(ships, rows, chosen, 0.05, nested, 'synthetic')
        assert 'neither is proven better' in verdict(ships, rows, chosen, 0.05, crossed, 'synthetic')


def test_several_notes_of_a_patient_say_no_more_than_the_patient_does():
    from edgenb.recipes.icd import verdict
    right = {'language model': np.arange(200) < 170, 'encoder': np.arange(200) < 160}
    told = lambda *patients: verdict('encoder', ENCODER, 'onnxruntime-int8', 0.05, right, 'synthetic', *patients)
    rate = lambda said: np.diff([float(v) for v in re.search(r'the encoder names 80.0% \[([\d.]+)%, ([\d.]+)%\]', said).groups()])[0]
    assert 'the language model is the better coder here' in told() == told(np.arange(200))   # each a patient's only one
    tens = told(np.arange(200)//10)                                                          # the ten notes between the two are one patient's
    assert 'neither is proven better' in tens and rate(tens) > 2*rate(told())


def test_what_is_known_of_the_invented_clinic_alone_is_not_asked_of_own_synthetic_notes():
    cells = [''.join(c['source']) for c in json.loads((Path(__file__).parent.parent/'nbs'/'recipes'/'icd.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    own = {'notes': 'visits.jsonl', 'source': 'visits.jsonl', 'kind': 'synthetic', 'switched': 0.5}
    exec(next(c for c in cells if 'switched-{' in c), dict(own))   # there is nothing to switch: no file is looked for, no training notes are
    said, = (l for c in cells for l in c.splitlines() if l.startswith('unseen = '))
    exec(said, own, found := {})
    assert found == {'unseen': None}


def test_every_module_of_the_recipes_can_be_imported():
    import importlib
    for p in (Path(__file__).parents[1]/'edgenb'/'recipes').glob('[a-z]*.py'): importlib.import_module(f'edgenb.recipes.{p.stem}')


def test_more_losses_never_look_better_when_few_patients_have_several_notes():
    from edgenb.verify import parity
    y, clusters = np.zeros(104, int), [i//2 if i < 96 else i for i in range(104)]
    def low(flips):
        answers = [{'label': np.where(np.arange(104) < f, 1, 0), 'score': np.full(104, 0.9), 'negative': -1} for f in (0, flips)]
        return parity(*answers, (None, y), 'accuracy', 0.05, clusters=clusters).delta_low
    found = [low(2*f) for f in range(6)]   # both notes of one patient after the other
    assert found == sorted(found, reverse=True) and found[0] < -0.05


def test_two_runs_of_a_workspace_freeze_the_same_notes_and_share_their_rooms(tmp_path, capsys):
    from edgenb.records import data
    source = str(save_notes(visits(), tmp_path/'v.jsonl'))
    one, two, elsewhere = Run.start('a', tmp_path/'runs'), Run.start('a', tmp_path/'runs'), Run.start('a', tmp_path/'other')
    first = data(one, source=source, **READING)
    secret = one.pool.parent/'.secret'
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_bytes()) == 32
    assert data(two, source=source, **READING).skipped and 'taken over' in capsys.readouterr().out
    again = data(two, source=source, **READING | {'recall_notes': 31})                # done anew, but nothing that later rooms read has changed
    files = lambda run: {p.name: p.read_bytes() for p in run.path.rglob('*.txt')}
    assert not again.skipped and files(one) == files(two)
    data(elsewhere, source=source, **READING)
    assert not set(files(one)) & set(files(elsewhere))                                # another workspace, another secret
    kept = b''.join(p.read_bytes() for p in (tmp_path/'runs').rglob('*') if p.is_file() and p != secret) + capsys.readouterr().out.encode()
    assert secret.read_bytes() not in kept and secret.read_bytes().hex().encode() not in kept


def test_a_damaged_secret_is_one_clear_line(tmp_path):
    from edgenb.records import workspace_secret
    run = Run.start('a', tmp_path)
    assert workspace_secret(run) == workspace_secret(run)
    (run.pool.parent/'.secret').write_bytes(b'half')
    with pytest.raises(EdgenbError, match='damaged.*32 bytes'): workspace_secret(run)


def test_a_run_that_is_handed_over_holds_no_secret_and_agrees_with_itself(source, tmp_path):
    from edgenb.records import data, workspace_secret
    run = Run(tmp_path/'handover')
    card = data(run, source=source, **READING)
    [kept] = (tmp_path/'secrets').iterdir()
    secret = workspace_secret(Run(tmp_path/'handover'))
    assert len(secret) == 32 and kept.read_bytes() == secret and kept.stat().st_mode & 0o777 == 0o600 and kept.parent.stat().st_mode & 0o777 == 0o700
    left = [p for p in run.path.rglob('*') if p.is_file()]
    assert card.result['classes'] and not any('secret' in p.name or secret in p.read_bytes() or secret.hex().encode() in p.read_bytes() for p in left)
    assert workspace_secret(Run(tmp_path/'beside', pool=run.pool)) == secret and not list(tmp_path.rglob('.secret'))   # a pool in another run's folder
    assert workspace_secret(Run(tmp_path/'other')) != secret
    (tmp_path/'link').symlink_to(run.path)
    assert workspace_secret(Run(tmp_path/'link')) == secret


def test_a_secret_that_lay_in_a_run_moves_out_and_one_beside_the_runs_stays(tmp_path, monkeypatch):
    from edgenb.records import workspace_secret
    (tmp_path/'handover/.rooms').mkdir(parents=True); (tmp_path/'handover/.secret').write_bytes(b'h'*32)
    assert [workspace_secret(Run(tmp_path/'handover')) for _ in range(2)] == [b'h'*32]*2 and not (tmp_path/'handover/.secret').exists()
    shared = Run.start('a', tmp_path/'runs')
    (tmp_path/'runs/a/.secret').write_bytes(b's'*32)
    assert workspace_secret(shared) == workspace_secret(Run.start('a', tmp_path/'runs')) == b's'*32 == (tmp_path/'runs/a/.secret').read_bytes()
    monkeypatch.setattr('edgenb.records._secrets', lambda: tmp_path/'lone/cache')
    with pytest.raises(EdgenbError, match='handed over with it: set EDGENB_CACHE'): workspace_secret(Run(tmp_path/'lone'))
    assert not (tmp_path/'lone').exists()


def test_a_note_in_another_language_is_read_in_its_own(tmp_path):
    from edgenb.records import data, frozen_notes
    mixed = [replace(n, language='es', text=n.text + '. Dña. aitana echaburu ingresó el 3 de mayo de 2023') if i % 3 == 1 else n for i, n in enumerate(visits())]
    run = Run(tmp_path/'run')
    card = data(run, source=str(save_notes(mixed, tmp_path/'v.jsonl')), **READING)
    assert set(card.result['other languages']) == {'es'} and not any('echaburu' in n.text for n in frozen_notes(run, 'all'))
    assert sorted(n.language for n in frozen_notes(run, 'all')) == sorted(n.language for n in mixed)   # as learning again needs them
    rows = [json.loads(l) for l in (tmp_path/'v.jsonl').read_text().splitlines()]
    rows[0]['language'] = 'fr'
    (tmp_path/'w.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(EdgenbError, match='line 1: the language must be one of en, es'): data(run, source=str(tmp_path/'w.jsonl'), **READING)


def test_a_bundle_tells_digests_and_no_names_of_the_files_it_was_made_from(tmp_path):
    from edgenb.records import data
    from edgenb.ship import _leaving
    run, own, more = Run(tmp_path/'run'), tmp_path/'ward of Dr Marlowe.txt', tmp_path/'Marlowe-late.jsonl'
    own.write_text('Marlowe\n')
    save_notes([replace(n, id=f'more-{n.id}', text=f'late {n.text}', patient=f'late {n.patient}') for n in visits(1)], more)
    card = data(run, source=str(save_notes(visits(), tmp_path/'Marlowe.jsonl')), own_names=str(own), extra=[str(more)], **READING)
    left = _leaving(card)
    assert 'Marlowe' not in json.dumps(left) and 'Marlowe.jsonl' in card.asked['source']
    assert [left['asked'][k] for k in ('source', 'own_names', 'extra')] == [f"digest {card.read['source']}", f"digest {card.read['own names']}", [f"digest {card.read['extra 0']}"]]
    assert left['asked']['language'] == 'en' and left['asked']['field'] == 0.1


def test_the_model_card_of_a_language_model_says_what_was_measured_and_no_word_of_a_note(shipped, tmp_path):
    from test_card import checked_card
    text = checked_card(shipped, tmp_path, 'text-classification')
    assert 'language: en' in text and 'A professional' in text or 'suggestions to a professional' in text
    assert 'de-identified' in text and "edgenb[gguf]" in text
