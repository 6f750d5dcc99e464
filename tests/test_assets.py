"The rooms for machines under watch, and the substation recipe's watcher: against naive implementations, against leakage, against what happens to sensors. The fleet is synthetic."
import json, math, os, shutil
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from edgenb import device
from edgenb.assets import CLEAR, assets_of, classes_of, data, learn, test_times as times_of_test, tune, units_of_asset
from edgenb.compile import compile
from edgenb.core import EdgenbError, Run
from edgenb.data import examples_of, load_examples, save_examples, units_of
from edgenb.events import alarms
from edgenb.grid import save_fleet, simulate
from edgenb.recipes.substation import ACTIONS, CHANNELS, Watcher, channel_rows, cusum_scores, ewma_scores, mode_families
from edgenb.runtime import RUNTIMES
from edgenb.runtimes.onnx import OnnxRuntime
from edgenb.ship import bundle_of, load_bundle, ship
from edgenb.squeeze import squeeze
from edgenb.verify import interval, load_answers, load_scores, over_units, parity, verify

properties = hypothesis_settings(derandomize=True, deadline=None, database=None, max_examples=150)
DAY, AHEAD, QUIET, REPAIR = 86400, (2, 14), 45.0, 10.0
TABLE = dict(channels=channel_rows(), families=mode_families(), test=0.4, min_per_class=1)


def refused(call, *words):
    "The message `call` is refused with; it holds all the words."
    with pytest.raises(EdgenbError) as caught: call()
    message = str(caught.value)
    assert 'Traceback' not in message
    for word in words: assert word in message, message
    return message


@pytest.fixture(scope='module')
def fleet(tmp_path_factory):
    "A tiny fleet that fails far too often, and its files."
    fleet = simulate(assets=40, days=300, seed=3, step_hours=6, utility='coastal', failures_per_asset_year=3)
    folder = save_fleet(fleet, tmp_path_factory.mktemp('fleet'))
    return {h.asset: h for h in fleet.histories}, dict(telemetry=str(folder/'telemetry.parquet'), orders=str(folder/'work_orders.csv'), kind='synthetic')


@pytest.fixture(scope='module')
def turn(fleet, tmp_path_factory):
    "The loop, data to learn, on the tiny fleet."
    folder = tmp_path_factory.mktemp('runs')
    run = Run(folder/'run', pool=folder/'pool')
    failing = [g['gate'] for g in data(run, **fleet[1], **TABLE).result['certificate']['gates'] if not g['passed']]
    tune(run, num_train_epochs=8, batch_size=64, learning_rate=4e-3, false_alarms_per_year=12, accept_gates=failing, num_threads=1)
    squeeze(run, precisions=['fp32'], calibration_images=16)
    compile(run, metric='auc', tolerance=1.0)
    verify(run, metric='detection rate', tolerance=0.5, latency_budget_ms=10_000, timing_runs=5)
    ship(run, accept=['undecided'], images_per_month=300)
    learn(run, budget=20)
    return run


@pytest.fixture
def copied(turn, tmp_path):
    "A copy of the run. Its files are links: replace them, never write into them."
    shutil.copytree(turn.path, tmp_path/'run', copy_function=os.link)
    return Run(tmp_path/'run', pool=tmp_path/'pool')


def moment(e): return int(np.datetime64(e.id.rsplit(' ', 1)[1], 's').astype(np.int64))
def asset(e): return e.id.rsplit(' ', 1)[0]


# Labels and units -----------------------------------------------------------------------------------------------------

def naive_class(t, failures, names):
    "Asked day by day, as a person with the work orders would."
    coming = [(f, n) for f, n in zip(failures, names) if f >= t]
    if any(0 < (t - f)/DAY <= REPAIR for f in failures): return ''
    if not coming: return 'quiet'
    days = (coming[0][0] - t)/DAY
    return 'quiet' if days > 1.2*AHEAD[1] else coming[0][1] if AHEAD[0]/2 <= days <= AHEAD[1] else ''


def naive_units(times, failures, names):
    "(label, windows of it) of each unit, found by going through the windows once for each failure and month."
    healed = lambda t: not any(0 < (t - f)/DAY <= REPAIR for f in failures)
    runs, together = [], lambda rows: all(b == a + 1 for a, b in zip(rows, rows[1:]))
    for k, f in enumerate(failures):
        rows = [i for i, t in enumerate(times) if t <= f and not any(t <= g < f for g in failures) and AHEAD[0] <= (f - t)/DAY <= AHEAD[1] and healed(t)]
        if len(rows) >= (AHEAD[1] - AHEAD[0])/2 and together(rows): runs.append((names[k], rows[0], rows[-1] + 1))
    for month in range(40):
        rows = [i for i, t in enumerate(times) if 30*month <= (t - times[0])/DAY < 30*(month + 1) and healed(t) and all(f < t or (f - t)/DAY > QUIET for f in failures)]
        if len(rows) >= 15 and together(rows): runs.append(('quiet', rows[0], rows[-1] + 1))
    return runs


@st.composite
def an_asset(draw):
    "Days on which there is a window (some are lost), and failures."
    days, lost = draw(st.integers(1, 400)), draw(st.lists(st.integers(0, 400), max_size=6))
    times = [(20_000 + d)*DAY for d in range(days) if d not in lost]
    failures = sorted(draw(st.sets(st.integers(19_990*DAY, 20_430*DAY), max_size=6)))
    return times, failures, [draw(st.sampled_from(['thermal', 'battery'])) for _ in failures]


def as_times(seconds): return np.array(seconds, 'int64').astype('datetime64[s]')


@properties
@given(an_asset())
def test_labels_are_those_of_a_naive_day_by_day_implementation(made):
    times, failures, names = made
    assert classes_of(as_times(times), as_times(failures), names, AHEAD, REPAIR, 'quiet').tolist() == [naive_class(t, failures, names) for t in times]


@properties
@given(an_asset(), st.integers(0, 1000))
def test_units_are_those_of_a_naive_day_by_day_implementation(made, first):
    times, failures, names = made
    found = units_of_asset('a', 'transformer', as_times(times), as_times(failures), names, AHEAD, QUIET, REPAIR, 'quiet', first)
    assert [(u.label, u.first - first, u.last - first) for u in found] == naive_units(times, failures, names)
    assert all(u.cluster == 'a' and u.group == 'transformer' for u in found) and len({u.id for u in found}) == len(found)


def test_the_rooms_labels_come_from_the_work_orders(turn):
    known = {a: v for part in ('train', 'validation', 'test') for a, v in assets_of(turn, part).items()}
    for e in examples_of(turn, 'all'):
        found = [(o['time'], o['class']) for o in known[asset(e)]['orders'] if o['kind'] == 'failure']
        expected = naive_class(moment(e), *(zip(*found) if found else ((), ())))
        assert e.label == (expected or 'quiet') and (expected or e.split == 'test')        # what has no label is kept for the test only, where events are counted
    assert all(e.kind == 'synthetic' for e in examples_of(turn, 'all')) and turn.card('data').data == 'synthetic'


# Leakage --------------------------------------------------------------------------------------------------------------

def test_no_asset_is_in_two_parts_and_the_test_begins_after_training_and_a_pause(turn):
    facts, each = turn.card('data').result, {s: examples_of(turn, s) for s in ('train', 'validation', 'field', 'usual', 'later', 'test')}
    assert all(each.values())
    homes = {s: {asset(e) for e in found} for s, found in each.items()}
    learnt = homes['train'] | homes['field'] | homes['usual'] | homes['later']
    assert not learnt & homes['validation'] and not learnt & homes['test'] and not homes['validation'] & homes['test']
    length, pause = facts['window']*facts['grid_hours']*3600, facts['ahead_days'][1]*DAY
    trained = max(moment(e) for e in each['train'] + each['usual'])
    assert trained <= facts['until']
    assert min(moment(e) for e in each['test'] + each['field'] + each['later']) - length >= trained + pause + length   # neither a reading nor a label in common


def test_no_window_is_in_two_parts_in_disguise(turn):
    "Also not as the same readings under another name."
    parts = {s: {e.sha256 for e in examples_of(turn, s)} for s in ('train', 'validation', 'test')}
    assert not parts['train'] & parts['validation'] and not (parts['train'] | parts['validation']) & parts['test']


def test_what_was_learnt_goes_into_training_only(fleet, turn, tmp_path):
    second, listing = Run(tmp_path/'second', pool=tmp_path/'pool'), turn.file('learn', 'new.jsonl')
    data(second, **fleet[1], **TABLE, extra=[str(listing)])
    for part in ('validation', 'field', 'usual', 'later', 'test'):
        assert [(e.id, e.label, e.sha256) for e in examples_of(second, part)] == [(e.id, e.label, e.sha256) for e in examples_of(turn, part)]
    before, after, new = examples_of(turn, 'train'), examples_of(second, 'train'), load_examples(listing)
    assert len(new) == 20 and [e.sha256 for e in after[:len(before)]] == [e.sha256 for e in before] and len(after) == len(before) + len(new)
    assert [(e.id, e.label, e.read()) for e in after[len(before):]] == [(e.id, e.label, e.read()) for e in new]
    judged = {asset(e) for s in ('validation', 'test') for e in examples_of(turn, s)}
    assert not judged & {asset(e) for e in new}
    assert units_of(second) == units_of(turn)
    table = lambda path, change: save_examples([replace(e, path=str(listing.parent/e.path.rsplit('/', 1)[1]), sha256='', **change) for e in new], tmp_path/path)
    refused(lambda: data(Run(tmp_path/'third', pool=tmp_path/'pool'), **fleet[1], **TABLE, extra=[str(table('odd.jsonl', {'label': 'rust'}))]), 'odd.jsonl', 'rust')
    np.save(tmp_path/'short.npy', np.zeros((1, len(CHANNELS), 8), np.float16))
    save_examples([replace(new[0], path='short.npy#0', sha256='')], tmp_path/'short.jsonl')
    refused(lambda: data(Run(tmp_path/'third', pool=tmp_path/'pool'), **fleet[1], **TABLE, extra=[str(tmp_path/'short.jsonl')]), 'short.jsonl', f'({len(CHANNELS)}, 8)', f'({len(CHANNELS)}, 64)')


def test_a_row_that_was_changed_on_disk_is_refused(turn, tmp_path):
    one = examples_of(turn, 'test')[5]
    file, row = one.path.rsplit('#', 1)
    rows = np.load(file)
    np.save(tmp_path/'test.npy', rows)
    moved = replace(one, path=f'{tmp_path}/test.npy#{row}')
    assert moved.read() == one.read()
    rows[int(row), 0, 0] += 1
    np.save(tmp_path/'.new.npy', rows); os.replace(tmp_path/'.new.npy', tmp_path/'test.npy')
    refused(moved.read, f'test.npy#{row}', 'changed since it was frozen')
    refused(replace(one, path=f'{tmp_path}/test.npy#{len(rows)}').read, 'test.npy', f'no row {len(rows)}')
    (tmp_path/'test.npy').unlink()
    refused(moved.read, 'test.npy', 'gone')


# Verify with units ----------------------------------------------------------------------------------------------------

def naive_counts(run, scores, labels):
    "The metrics of a row of the report, counted case by case."
    classes, negative = run.card('data').result['classes'], 0
    right = caught = rang = bad = good = 0
    for u in units_of(run):
        at = max(range(u.first, u.last), key=lambda i: scores[i])
        said, truth = labels[at], classes.index(u.label)
        right += said == truth
        if truth == negative: good += 1; rang += said != negative
        else: bad += 1; caught += said != negative
    return {'accuracy': right/(bad + good), 'detection rate': caught/bad, 'false-positive rate': rang/good}, bad, good


def test_the_report_counts_failures_and_months_as_a_naive_implementation_does(turn):
    rows, classes = turn.card('verify').result['rows'], turn.card('data').result['classes']
    each, (y, kept), bundle = load_scores(turn), load_answers(turn), load_bundle(bundle_of(turn))
    tests, units, threshold = examples_of(turn, 'test'), units_of(turn), bundle.pipeline.step('decide')['threshold']
    assert y.tolist() == [classes.index(u.label) for u in units] and turn.card('verify').result['images'] == len(units) > 20
    answer = bundle.answer([e.read() for e in tests])
    assert np.allclose(each['onnxruntime-fp32'], answer['score'], atol=1e-6)
    found, bad, good = naive_counts(turn, each['onnxruntime-fp32'], answer['label'])
    row = next(r for r in rows if r['artifact'] == 'onnxruntime-fp32')
    assert {m: row['also'][m]['value'] for m in found} == pytest.approx(found) and row['value'] == found['detection rate'] and bad > 5 and good > 20
    assert 0 < found['detection rate'] and found['false-positive rate'] < 1                     # so that the counts above can differ from nothing and everything
    for u, s in zip(units, kept['onnxruntime-fp32']['score']): assert s == each['onnxruntime-fp32'][u.first:u.last].max()
    assert all((kept['onnxruntime-fp32']['label'] != 0) == (kept['onnxruntime-fp32']['score'] >= threshold))


def test_units_lie_in_their_assets_windows_and_mean_what_they_say(turn):
    tests, at = examples_of(turn, 'test'), times_of_test(turn)
    assert sum(j - i for i, j, _ in at.values()) == len(tests)
    for u in units_of(turn):
        i, j, times = at[u.cluster]
        assert i <= u.first < u.last <= j and {e.label for e in tests[u.first:u.last]} == {u.label} and {e.group for e in tests[u.first:u.last]} == {u.group}
        if u.label != 'quiet':
            failure = int(np.datetime64(u.id.split(' before ')[1], 's').astype(np.int64))
            assert all(2*DAY <= failure - t <= 14*DAY for t in times[u.first - i:u.last - i])


def test_a_score_that_is_no_number_makes_its_unit_no_number(turn):
    units, scores = units_of(turn), load_scores(turn)['reference'].copy()
    scores[units[3].first + 1] = np.nan
    found = over_units({'score': scores, 'label': np.zeros(len(scores), int), 'negative': 0}, units)
    assert np.isnan(found['score'][3]) and np.isfinite(np.delete(found['score'], 3)).all()


@hypothesis_settings(properties, max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from(['accuracy', 'detection rate', 'false-positive rate']))
def test_copies_of_an_example_in_its_cluster_do_not_narrow_the_interval(seed, copies, metric):
    rng = np.random.default_rng(seed)
    n = 60
    y, label = rng.integers(0, 2, n), rng.integers(0, 2, n)
    alone = {'label': label, 'score': label + 0.0, 'negative': 0}
    many = {'label': label.repeat(copies), 'score': label.repeat(copies) + 0.0, 'negative': 0}
    value, low, high = interval(y.repeat(copies), many, metric, seed=1, clusters=np.arange(n).repeat(copies))
    _, narrow, wide = interval(y.repeat(copies), many, metric)
    assert (value, low, high) == pytest.approx(interval(y, alone, metric, seed=1, clusters=np.arange(n)))   # as if there were one of each
    assert high - low > 1.15*(wide - narrow)
    other = {'label': np.where(rng.random(n) < 0.2, 1 - label, label).repeat(copies), 'score': many['score'], 'negative': 0}
    whole, apart = (parity(many, other, (None, y.repeat(copies)), metric, clusters=c, resamples=300, seed=2) for c in (np.arange(n).repeat(copies), np.arange(n*copies)))
    assert whole.delta == apart.delta and (whole.delta_high - whole.delta_low > apart.delta_high - apart.delta_low or whole.delta_high == whole.delta_low)


def test_parity_over_clusters_is_the_same_for_the_same_seed_only(turn):
    units, (y, kept) = units_of(turn), load_answers(turn)
    a, b = ({**kept['reference'], 'negative': 0} for _ in range(2))
    b['label'] = np.where(np.arange(len(y)) % 3 == 0, (b['label'] + 1) % 7, b['label'])
    once, again, other = (parity(a, b, (None, y), 'accuracy', clusters=[u.cluster for u in units], seed=s) for s in (0, 0, 1))
    assert once == again and (once.delta_low, once.delta_high) != (other.delta_low, other.delta_high) and once.delta == other.delta


# The gate -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def broken(copied, monkeypatch):
    "Artifacts that never warn, whose scores are no numbers, and that cannot answer, beside a sound one; judged as units."
    def answering(called, change):
        class Wrong(OnnxRuntime):
            name = called
            variants = {'fp32': OnnxRuntime.variants['fp32']}
            @classmethod
            def load(cls, path, num_threads=1):
                model = super().load(path, num_threads)
                return lambda x, whole=False: change(model(x))
    def crash(out): raise IndexError('nothing there')
    answering('mute', lambda out: out | {'logits': out['logits'] + 50*(np.arange(out['logits'].shape[1]) == 0)})
    answering('nan', lambda out: out | {'logits': np.where(np.arange(len(out['logits']))[:, None] == 0, np.nan, out['logits'])})
    answering('crash', crash)
    figures = {'p50_ms': 1.0, 'p95_ms': 1.0, 'p99_ms': 1.0, 'model_p50_ms': 1.0, 'rss_mb': 50.0, 'error': None}
    device._runtimes_here.cache_clear()
    monkeypatch.setattr('edgenb.verify.measured', lambda candidates, *a, **k: {c['artifact']: dict(figures) for c in candidates})
    card = copied.card('compile')
    replace(card, result=card.result | {'artifacts': [a | {'artifact': f'{n}-fp32', 'runtime': n} for a in card.result['artifacts'] for n in ('onnxruntime', 'mute', 'nan', 'crash')]}).save(copied._card_path('compile'))
    verify(copied, metric='detection rate', tolerance=0.05, latency_budget_ms=10_000, timing_runs=5)
    yield copied
    for n in ('mute', 'nan', 'crash'): del RUNTIMES[n]
    device._runtimes_here.cache_clear()


def test_an_artifact_that_fails_on_units_cannot_ship_whatever_is_accepted(broken):
    for file in broken.path.glob('06-ship*/bundle'): shutil.rmtree(file)
    rows = {r['artifact']: r for r in broken.card('verify').result['rows']}
    for n, why in (('mute', 'loses at least'), ('nan', 'not finite'), ('crash', 'nothing there')):
        assert rows[f'{n}-fp32']['verdict'] == 'fail' and why in rows[f'{n}-fp32']['reason']
        for accept in ([], ['undecided', 'not run here']): refused(lambda: ship(broken, artifact=f'{n}-fp32', accept=accept, images_per_month=300), f'{n}-fp32', "'fail'")
        refused(lambda: ship(broken, artifact=f'{n}-fp32', accept=['fail'], images_per_month=300), 'fail cannot be accepted')
    assert rows['mute-fp32']['value'] == 0 and rows['mute-fp32']['delta_high'] < -0.05
    assert not list(broken.path.glob('06-ship*/bundle')) and broken.card('verify').result['chosen'] == 'onnxruntime-fp32'


# What is refused ------------------------------------------------------------------------------------------------------

def enter(fleet, tmp_path, **changes): return data(Run(tmp_path/'run', pool=tmp_path/'pool'), **fleet[1] | TABLE | changes)


def test_choices_that_cannot_be_are_refused_by_name(fleet, tmp_path):
    refused(lambda: enter(fleet, tmp_path, every_hours=20.0), 'every_hours = 20.0', 'grid_hours = 6.0')
    refused(lambda: enter(fleet, tmp_path, families={k: v for k, v in mode_families().items() if k != 'winding_hot_spot'}), "'winding_hot_spot'", 'families')
    refused(lambda: enter(fleet, tmp_path, telemetry=str(tmp_path/'gone.csv')), 'gone.csv', 'does not exist')
    refused(lambda: enter(fleet, tmp_path, extra=[str(tmp_path/'gone.jsonl')]), 'gone.jsonl', 'does not exist')
    refused(lambda: enter(fleet, tmp_path, test=1.2), 'test = 1.2')
    refused(lambda: enter(fleet, tmp_path, window=4), 'window = 4')
    refused(lambda: enter(fleet, tmp_path, kind='reel'), "'reel'", 'synthetic')
    refused(lambda: enter(fleet, tmp_path, families={**mode_families(), 'cell_short': 'quiet'}), 'quiet', 'cell_short')
    assert not list((tmp_path/'run').glob('01-data.json'))


def test_orders_that_cannot_be_placed_are_refused_with_their_row(fleet, tmp_path):
    lines = open(fleet[1]['orders']).read().splitlines()
    n = next(i for i, l in enumerate(lines) if ',failure,' in l)
    for change, *words in ((lambda l: l.replace('coastal-', 'costal-'), f'row {n + 1}', 'costal-', 'Did you mean coastal-'), (lambda l: l.replace(',failure,', ',defect,'), f'row {n + 1}', "'defect'", 'failure'),
                           (lambda l: l.replace(l.split(',')[3], 'gremlins'), "'gremlins'", 'families')):
        (tmp_path/'orders.csv').write_text('\n'.join([*lines[:n], change(lines[n]), *lines[n + 1:]]))
        refused(lambda: enter(fleet, tmp_path, orders=str(tmp_path/'orders.csv')), *words)


@pytest.mark.parametrize('what', ['classes', 'channels', 'window'])
def test_a_base_made_for_something_else_is_refused(what, turn, copied, tmp_path):
    base = tmp_path/'base'
    base.mkdir()
    for n in ('model.safetensors', 'network.json', 'pipeline.json'): shutil.copyfile(turn.file('tune', n), base/n)
    found = json.loads((base/'pipeline.json').read_text())
    if what == 'classes': found['classes'][1] = 'woodworm'
    if what == 'channels': found['steps'][0]['channels'][0] = 'humidity'
    if what == 'window': found['steps'][0]['steps'] = 32
    (base/'pipeline.json').write_text(json.dumps(found))
    refused(lambda: tune(copied, start_from=str(base/'model.safetensors'), accept_gates=['failures to judge by'], num_threads=1), 'model.safetensors', 'other channels, windows or classes')


def test_a_base_that_is_not_there_or_not_whole_is_refused(turn, copied, tmp_path):
    adapt = lambda path: tune(copied, start_from=str(path), accept_gates=['failures to judge by'], num_threads=1)
    refused(lambda: adapt(tmp_path/'model.safetensors'), 'start_from', 'does not exist')
    shutil.copyfile(turn.file('tune', 'model.safetensors'), tmp_path/'model.safetensors')
    refused(lambda: adapt(tmp_path/'model.safetensors'), 'network.json')
    for n in ('network.json', 'pipeline.json'): shutil.copyfile(turn.file('tune', n), tmp_path/n)
    (tmp_path/'model.safetensors').write_bytes(b'x'*100)
    refused(lambda: adapt(tmp_path/'model.safetensors'), 'model.safetensors')


def test_a_gate_that_failed_stops_training_until_it_is_accepted_by_name(copied):
    refused(lambda: tune(copied, num_train_epochs=1, num_threads=1), 'failures to judge by')


# On the device --------------------------------------------------------------------------------------------------------

def watched(turn, name, readings):
    "A watcher that was given the readings, and how often it rang."
    facts = turn.card('data')
    w = Watcher(name, load_bundle(bundle_of(turn)), facts.result['grid_hours'], facts.result['every_hours'], facts.asked['memory_days'])
    return w, [a for t, v in readings for a in w.push(t, v)]


def received(history): return [(t, v.astype(float)) for t, v in zip(history.time, history.values)]


@pytest.fixture(scope='module')
def loud(fleet, turn):
    "The three test assets with the highest scores: name, readings, places and times of their test examples, watcher, alerts."
    at, scores = times_of_test(turn), load_scores(turn)[turn.card('verify').result['chosen']]
    names = sorted(at, key=lambda a: -scores[at[a][0]:at[a][1]].max())[:3]
    return [(a, received(fleet[0][a]), at[a], *watched(turn, a, received(fleet[0][a]))) for a in names]


def test_reading_by_reading_the_device_decides_exactly_as_the_test_did(turn, loud):
    scores, threshold = load_scores(turn)[turn.card('verify').result['chosen']], load_bundle(bundle_of(turn)).pipeline.step('decide')['threshold']
    rang = 0
    for name, _, (i, j, times), w, _ in loud:
        found = {int(t.astype(np.int64)): s for t, s, _ in w.scores}
        assert set(times[:-1].tolist()) <= set(found) and len(times) > 90                       # the last step is still open
        assert [found[t] for t in times[:-1].tolist()] == scores[i:j][:len(times) - 1].tolist(), name
        rang += (scores[i:j] >= threshold).sum()
    assert rang > 0


def test_an_alert_names_its_family_and_rings_once_until_it_is_cleared(turn, loud):
    threshold, seen = load_bundle(bundle_of(turn)).pipeline.step('decide')['threshold'], 0
    for name, _, _, w, rang in loud:
        for a, text in rang:
            assert a.asset == name and a.cause in ACTIONS and text.startswith(f'{a.cause} (') and text.endswith(ACTIONS[a.cause][1]) and a.severity == ACTIONS[a.cause][0]
        counted = alarms([t for t, _, _ in w.scores], [s for _, s, _ in w.scores], threshold, CLEAR*threshold, 3.0)
        assert bool(rang) == bool(counted) and (len(rang) == len(counted) or len({f for _, s, f in w.scores if s >= threshold}) > 1)   # another family is another alert
        assert w.sent == sum(len(a.to_json()) for a, _ in rang) or len(rang) > 1                # an alert that rings again is the same one, with more to say
        seen += len(rang)
    assert seen


@pytest.mark.parametrize('seed', range(3))
def test_the_device_rings_as_often_as_the_table_counts_alarms(seed, turn):
    "With scores from a script: below, between and above the two thresholds in turn."
    bundle, rng = load_bundle(bundle_of(turn)), np.random.default_rng(seed)
    threshold, classes = bundle.pipeline.step('decide')['threshold'], len(bundle.pipeline.classes)
    def script(windows): return {'score': np.array([threshold*rng.choice([0.5, 0.95, 1.2], p=[0.6, 0.2, 0.2])]), 'probabilities': np.eye(classes)[[1]]}
    w = Watcher('pump', SimpleNamespace(pipeline=bundle.pipeline, model=bundle.model, answer=script), 6.0, 24.0, 60.0)
    rang = [a for n in range(800) for a in w.push(np.datetime64('2024-01-01') + np.timedelta64(6*n, 'h'), {'load_pct': 50 + rng.normal(), 'ambient_c': 15 + rng.normal()})]
    counted = alarms([t for t, _, _ in w.scores], [s for _, s, _ in w.scores], threshold, CLEAR*threshold, 3.0)
    assert len(w.scores) > 180 and len(rang) == len(counted) > 10


def channel(name): return [c.name for c in CHANNELS].index(name)


def nan_burst(readings):
    for t, v in readings[len(readings)//2:len(readings)//2 + 40]: v[:] = np.nan
    return readings

def backwards(readings):
    n = len(readings)//2
    return readings[:n] + [(t - np.timedelta64(5, 'D'), v) for t, v in readings[n:n + 30]] + readings[n:]

def silent(readings):
    for t, v in readings[len(readings)//2:]: v[channel('load_pct')] = np.nan
    return readings

def fahrenheit(readings):
    for t, v in readings[len(readings)//2:]:
        for c in ('ambient_c', 'top_oil_c', 'hot_spot_c'): v[channel(c)] = v[channel(c)]*1.8 + 32
    return readings

def garbled(readings):
    for n, (t, v) in enumerate(readings[200:260]): readings[200 + n] = (('yesterday', v), (t, ['n/a']*len(v)), (t, v[:3]), (t, {'colour': 3.0}), (None, v), (t, v*np.inf))[n % 6]
    return readings


@pytest.mark.parametrize('fault,named', [(nan_burst, 'gap'), (backwards, 'time backwards'), (silent, 'missing'), (fahrenheit, 'unit converted'), (garbled, 'unreadable time')], ids=lambda f: getattr(f, '__name__', ''))
def test_what_happens_to_sensors_raises_nothing_and_starts_no_storm(fault, named, turn, loud):
    for name, readings, _, clean, rang in loud:
        w, more = watched(turn, name, fault([(t, v.copy()) for t, v in readings]))
        assert len(more) <= 1.5*len(rang) + 1, (name, len(more), len(rang))   # the network of this toy fleet rings often
        assert all(np.isfinite(s) for _, s, _ in w.scores) and len(w.scores) >= len(clean.scores) - 45
        if fault is not fahrenheit or np.isfinite(readings[10][1][channel('ambient_c')]): assert named in [e['what'] for e in w.stream.events()]


# What the network is compared with --------------------------------------------------------------------------------------

@properties
@given(st.lists(st.lists(st.one_of(st.floats(-60, 60), st.just(math.nan)), min_size=2, max_size=2), min_size=1, max_size=50), st.floats(0.05, 1.0), st.floats(0, 2))
def test_ewma_and_cusum_are_those_of_a_loop_over_single_numbers(rows, share, slack):
    level, up, down, ewma, cusum = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [], []
    for row in rows:
        for c, d in enumerate(row):
            d = 0.0 if math.isnan(d) else min(20.0, max(-20.0, d))
            level[c] += share*(d - level[c])
            up[c], down[c] = min(100.0, max(0.0, up[c] + d - slack)), min(100.0, max(0.0, down[c] - d - slack))
        ewma.append(max(map(abs, level))*math.sqrt((2 - share)/share)); cusum.append(max(*up, *down))
    x = np.array(rows)
    assert np.allclose(ewma_scores(x, share), ewma) and np.allclose(cusum_scores(x, slack), cusum)


def test_the_model_card_of_a_fleet_says_what_was_measured(turn, tmp_path):
    from test_card import checked_card
    text = checked_card(turn, tmp_path, None)
    assert 'window of sensor data' in text and '**synthetic**' in text and 'detection rate' in text
