"Drift: the test is exact, the detector keeps its promise and its state, and what moved is named."
import subprocess, sys, time, tracemalloc
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from edgenb.attribution import channel_shift, estimate_accuracy, feature_shift, group_shift, ks, psi, witness
from edgenb.core import EdgenbError
from edgenb.drift import UNIT, Detector, fourier
from edgenb.watch import Sketch, median_bandwidth, mmd_test


def refused(call, words):
    with pytest.raises(EdgenbError) as e: call()
    assert words in str(e.value) and '\n' not in str(e.value)


def things(n, seed=0, dimensions=6, **change):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimensions))*change.get('wider', 1) + rng.integers(3, size=(n, 1)) + change.get('shift', 0)


# The exact test ------------------------------------------------------------------------------------------------------

def naive(x, y, permutations, bandwidth, seed):
    "The same test by indexing the whole kernel matrix, as one would write it down."
    z, n = np.concatenate([x, y]).astype(np.float64), len(x)
    k = np.exp(-((z[:, None] - z[None])**2).sum(-1)/(2*bandwidth**2))
    def statistic(order):
        a, b = order[:n], order[n:]
        def mean(s): return (k[np.ix_(s, s)].sum() - len(s))/(len(s)*(len(s) - 1))
        return mean(a) + mean(b) - 2*k[np.ix_(a, b)].mean()
    rng = np.random.default_rng(seed)
    found = [statistic(np.arange(len(z)))] + [statistic(rng.permutation(len(z))) for _ in range(permutations)]
    return found[0], (1 + sum(f >= found[0] - 1e-12 for f in found[1:]))/(permutations + 1)


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
@pytest.mark.parametrize('n,m,permutations,tile', [(7, 9, 30, 8), (150, 90, 40, 64), (300, 200, 17, 128), (300, 201, 2, 1024)])
def test_the_exact_test_is_the_naive_one_whatever_the_tiles(monkeypatch, dtype, n, m, permutations, tile):
    monkeypatch.setattr('edgenb.watch.TILE', tile)
    x, y = things(n, 1).astype(dtype), things(m, 2, shift=0.1).astype(dtype)
    statistic, p = naive(x, y, permutations, 2.5, 3)
    found = mmd_test(x, y, permutations=permutations, bandwidth=2.5, seed=3)
    assert found.statistic == pytest.approx(statistic, rel=1e-9 if dtype == np.float64 else 2e-5) and found.p_value == p


@pytest.mark.parametrize('scale,offset,dimensions', [(1, 0, 50), (1, 30, 50), (1e-3, 0, 384), (1e4, 0, 5)])
def test_single_precision_keeps_five_digits(scale, offset, dimensions):
    rng = np.random.default_rng(5)
    x, y = ((rng.normal(size=(1500, dimensions)) + s)*scale + offset*scale for s in (0, 0.02))
    x, y = x.astype(np.float32), y.astype(np.float32)
    single, double = (mmd_test(x.astype(t), y.astype(t), permutations=60, bandwidth=scale*dimensions**0.5) for t in (np.float32, np.float64))
    assert single.statistic == pytest.approx(double.statistic, rel=1e-5, abs=5e-9) and single.p_value == double.p_value   # it is a difference of means of about a half, each rounded as this machine multiplies


def test_a_row_far_out_does_not_cost_the_digits_of_the_others():
    x, y = things(400, 1).astype(np.float32), things(400, 2, shift=0.05).astype(np.float32)
    x[0] = 1e5
    single, double = (mmd_test(x.astype(t), y.astype(t), permutations=20, bandwidth=2.0) for t in (np.float32, np.float64))
    assert single.statistic == pytest.approx(double.statistic, rel=1e-4)


def test_identical_rows_are_no_drift():
    for t in (np.float32, np.float64): assert mmd_test(np.ones((300, 4), t), np.ones((200, 4), t), permutations=50).p_value == 1


def test_p_values_are_uniform_without_drift():
    p = np.array([mmd_test(things(40, 2*s).astype(np.float32), things(30, 2*s + 1).astype(np.float32), permutations=99, seed=s).p_value for s in range(400)])
    assert abs(np.mean(p <= 0.05) - 0.05) < 0.035 and abs(np.mean(p <= 0.5) - 0.5) < 0.08      # three standard errors


def test_memory_does_not_grow_with_the_square_of_the_rows():
    x, y = (np.random.default_rng(s).standard_normal((4000, 8), dtype=np.float32) for s in (0, 1))
    tracemalloc.start()
    try:
        mmd_test(x, y, permutations=700)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 40e6      # the matrix alone would take 256 MB, the group vectors another 22


def test_the_median_is_that_of_all_pairs():
    for n in (2, 3, 10, 31):
        x = things(n, n)
        assert median_bandwidth(x) == pytest.approx(np.median([np.linalg.norm(a - b) for i, a in enumerate(x) for b in x[:i]]))


# The detector --------------------------------------------------------------------------------------------------------

REFERENCE = things(900, 11)

def small(**given): return Detector.fit(REFERENCE, **{'window': 10, 'windows_per_month': 300, 'false_alarms_per_month': 3, 'scales': (1, 4, 16), 'features': 32} | given)

@pytest.fixture(scope='module', params=['calibrated', 'guaranteed'])
def fitted(request): return small(mode=request.param).to_bytes()

STREAM = np.concatenate([things(150, 12), things(200, 13, shift=0.8)])
STREAM[::17] = np.nan; STREAM[5::50, 2] = np.inf


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12), saves=st.integers(0, 2**12 - 1))
def test_however_a_stream_is_cut_and_wherever_power_is_lost_the_alarms_are_the_same(fitted, cuts, saves):
    whole = Detector.from_bytes(fitted)
    expected, rang, d = whole.update(STREAM), [], Detector.from_bytes(fitted)
    for i, part in enumerate(np.split(STREAM, sorted(cuts))):
        rang += d.update(part).alarms
        if saves >> i & 1: d = Detector.from_bytes(d.to_bytes())
    assert rang == expected.alarms and len(rang) > 0
    assert d.to_bytes() == whole.to_bytes()


def test_what_is_no_number_is_counted_left_out_and_never_rings():
    clean, dirty = small(), small()
    rows = things(400, 21)
    mixed = np.insert(rows, np.arange(0, 400, 4), np.nan, axis=0)
    mixed = np.concatenate([np.full((300, 6), np.inf), mixed, np.full((300, 6), -np.inf)])
    seen = dirty.update(mixed)
    assert seen.alarms == clean.update(rows).alarms
    assert (seen.rows, seen.left_out, seen.windows) == (400, 700, 40) and dirty.regimes[''].left_out == 700
    assert np.array_equal(dirty.regimes[''].sums, clean.regimes[''].sums)


def test_rows_of_another_shape_are_refused_by_name():
    d = small()
    for rows in (np.zeros((3, 5)), np.zeros(7), np.zeros((2, 3, 6)), np.zeros((0, 4))): refused(lambda: d.update(rows), 'embeddings of 6 values')
    refused(lambda: d.update([['a']*6]), 'numbers')
    refused(lambda: d.update(REFERENCE[:3], regime='winter'), "'winter'")
    assert d.update(np.zeros((0, 6))).rows == 0 and d.update(REFERENCE[0]).rows == 1


@pytest.mark.parametrize('given,words', [({'window': 1}, 'window'), ({'window': 2.5}, 'window'), ({'mode': 'guarantee'}, 'Did you mean guaranteed'), ({'scales': (4, 16)}, 'scales'), ({'scales': ()}, 'scales'),
    ({'false_alarms_per_month': 0}, 'false_alarms_per_month'), ({'false_alarms_per_month': 290}, 'false_alarms_per_month'), ({'false_alarms_per_month': float('nan')}, 'false_alarms_per_month'),
    ({'devices': 0}, 'devices'), ({'features': 7}, 'features'), ({'bandwidth': -1.0}, 'bandwidth'), ({'false_alarms_per_month': 1e-6}, 'too rare'), ({'windows_per_month': 0}, 'windows_per_month')], ids=str)
def test_choices_that_make_no_sense_are_refused(given, words): refused(lambda: small(**given), words)


def test_a_reference_that_cannot_support_the_promise_is_refused_and_the_size_that_can_is_said():
    refused(lambda: Detector.fit(things(200)), 'a reference of about 401 rows')
    Detector.fit(things(410), windows_per_month=100, false_alarms_per_month=5)
    lonely = np.concatenate([np.random.default_rng(0).normal(size=(995, 6))*0.01, np.full((5, 6), 30.0)])     # the tail hangs on five rows
    refused(lambda: Detector.fit(lonely, bandwidth=1.0, windows_per_month=720, false_alarms_per_month=0.1), 'rows would do')


@pytest.mark.parametrize('bad,words', [(np.full((900, 6), np.nan), '900 rows'), (np.zeros(900), 'table'), (np.zeros((0, 6)), 'table'), ({}, 'no reference'), (np.ones((900, 6)), 'same row'), ([['a']], 'numbers'),
                                       ({'a': REFERENCE, 'b': REFERENCE[:, :3]}, 'columns')], ids=range(7))
def test_a_reference_that_is_none_is_refused(bad, words): refused(lambda: Detector.fit(bad, window=10), words)


def test_every_changed_bit_of_a_saved_detector_is_refused(fitted):
    rng = np.random.default_rng(0)
    for at in rng.permutation(len(fitted))[:600]:
        damaged = bytearray(fitted); damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(EdgenbError): Detector.from_bytes(bytes(damaged))
    for end in rng.integers(0, len(fitted), 100): refused(lambda: Detector.from_bytes(fitted[:end]), 'copy it again')


def test_a_detector_of_a_newer_format_says_so(monkeypatch):
    monkeypatch.setattr('edgenb.drift.FORMAT', 2)
    newer = small().to_bytes()
    monkeypatch.undo()
    refused(lambda: Detector.from_bytes(newer), 'newer edgenb')


def test_a_saved_detector_holds_no_row_and_is_small(fitted):
    assert len(fitted) < 4000 and b'pickle' not in fitted
    d = Detector.fit(things(2000, dimensions=384))
    assert len(d.to_bytes()) < 8000
    d.update(things(70, 5, dimensions=384))
    assert len(d.to_bytes()) < 8000


def rings(d, reference_seed, windows=3000, **change):
    "Alarms for each scale on windows never seen, many at a time."
    rows = things(windows*d.window, 10_000 + reference_seed, **change)
    sums = np.rint(fourier(rows, d.directions)*UNIT).reshape(windows, d.window, -1).sum(1)
    return sum(len(d.update_merged(Sketch(d.dimensions, d.bandwidth, d.features, d.seed, d.window, s/UNIT/np.sqrt(d.features/2))).alarms) for s in sums)


def test_false_alarms_stay_within_the_promise():
    found = [rings(Detector.fit(things(800, s), window=20, windows_per_month=300, false_alarms_per_month=6, features=64, seed=s), s, windows=1500) for s in range(8)]
    assert 40 < np.sum(found) < 240      # promised: 240 in all; not silent either


def test_the_guaranteed_mode_keeps_its_promise_with_hardly_any_reference():
    found = [rings(Detector.fit(things(100, s), window=20, windows_per_month=300, false_alarms_per_month=6, features=64, mode='guaranteed', seed=s), s, windows=1000) for s in range(5)]
    assert np.sum(found) < 100      # promised: 100


def test_what_many_windows_see_together_is_found_and_one_alone_does_not_see_it():
    many, one = (Detector.fit(things(4000, 3), window=20, windows_per_month=2000, false_alarms_per_month=1, features=128, scales=s) for s in ((1, 4, 16), (1,)))
    assert rings(many, 5, windows=160, shift=0.15) > 0 == rings(one, 5, windows=160, shift=0.15)


def test_a_fleet_in_any_order_is_one_stream():
    together, rng = small(window=40), np.random.default_rng(3)
    start = together.to_bytes()
    parts = [[together.sketch().update(things(10, 100*w + i, shift=0.3)) for i in range(4)] for w in range(16)]
    def run(order):
        d, out = Detector.from_bytes(start), []
        for w in parts:
            merged = d.sketch()
            for i in order: merged = merged.merge(w[i])
            out += d.update_merged(merged).alarms
        return out
    found = run([0, 1, 2, 3])
    assert found and run([3, 1, 0, 2]) == found
    refused(lambda: together.update_merged(parts[0][0]), 'must have 40 rows')
    refused(lambda: together.update_merged(Sketch(6, 9.0, 32).update(things(40))), 'different settings')


def test_the_budget_is_divided_among_devices():
    alone, shared = small(), small(devices=3, false_alarms_per_month=3)
    assert shared.windows_to_alarm == 3*alone.windows_to_alarm and (shared.regimes[''].limits > alone.regimes[''].limits).all()


def test_each_regime_has_its_own_reference_and_its_own_state():
    d = Detector.fit({'summer': things(900, 1), 'winter': things(900, 2, shift=2)}, window=10, windows_per_month=300, false_alarms_per_month=1, features=64)
    assert not d.update(things(200, 3), 'summer').alarms and not d.update(things(205, 4, shift=2), 'winter').alarms
    d = Detector.from_bytes(d.to_bytes())
    assert {n: (r.windows, r.rows) for n, r in d.regimes.items()} == {'summer': (20, 0), 'winter': (20, 5)}
    assert {a.regime for a in d.update(things(100, 5, shift=2), 'summer').alarms} == {'summer'}


def test_the_device_side_needs_numpy_only():
    code = 'import sys, numpy, edgenb.drift; print([m for m in ("torch", "scipy", "pandas", "sklearn", "PIL") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


# What moved ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n,m,shift', [(50, 80, 0), (400, 300, 0.2), (200, 200, 1.5)])
def test_ks_is_that_of_scipy(n, m, shift):
    from scipy.stats import ks_2samp
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n).round(1), rng.normal(size=m).round(1) + shift
    found, there = ks(x, y), ks_2samp(x, y, method='exact')
    assert found[0] == pytest.approx(there.statistic) and found[1] == pytest.approx(there.pvalue, abs=0.04)


def test_without_drift_hardly_any_feature_is_accused():
    accused = [feature_shift(things(200, 2*s), things(150, 2*s + 1))[0]['p_value'] <= 0.05 for s in range(200)]
    assert np.mean(accused) < 0.10      # six features each, corrected: 5 % of all looks, within three standard errors


def test_parts_of_groups_and_witnesses_add_up_to_the_whole():
    x, y = things(300, 1), things(200, 2, shift=0.2)
    w = witness(x, y, bandwidth=2.0)
    n, m, unbiased = len(x), len(y), mmd_test(x, y, bandwidth=2.0, permutations=1).statistic
    def mean(v): return np.exp(-((v[:, None] - v[None])**2).sum(-1)/8).mean()
    cross = np.exp(-((x[:, None] - y[None])**2).sum(-1)/8).mean()
    assert w.mmd2 == pytest.approx(mean(x) + mean(y) - 2*cross) and w.mmd2 > unbiased
    rows = group_shift(x, y, np.arange(n) % 3, np.arange(m) % 4, permutations=20)
    assert sum(r['part'] for r in rows) == pytest.approx(1) and rows[-1]['moved_p'] <= 1
    assert next(r for r in rows if r['group'] == '3')['mmd2'] is None      # a group that is new has nothing to be compared with


def test_the_channel_that_moved_is_named():
    x, y = things(200, 1), things(200, 2)
    y[:, 3] += 0.8
    rows = channel_shift(x, y, {'a': [0, 1], 'b': [2, 3], 'c': [4, 5]}, permutations=200)
    assert rows[0]['channel'] == 'b' and rows[0]['p_value'] < 0.05


def answers(n, rng, harder=0.0, overconfident=0.0):
    sure = rng.beta(6 - 4*harder, 1.2, n)*0.5 + 0.5
    return sure, rng.random(n) < sure - overconfident


def test_the_interval_of_the_estimated_accuracy_covers_the_truth():
    hits = []
    for s in range(200):
        rng = np.random.default_rng(s)
        then, right = answers(800, rng)
        now, truth = answers(400, rng, harder=0.6)
        e = estimate_accuracy(now, then, right)
        hits.append(e.low <= truth.mean() <= e.high)
    assert np.mean(hits) > 0.9


def test_an_overconfident_model_is_estimated_by_what_it_got_right():
    rng = np.random.default_rng(0)
    then, right = answers(3000, rng, overconfident=0.2)
    now, truth = answers(2000, rng, harder=0.5, overconfident=0.2)
    e = estimate_accuracy(now, then, right)
    assert e.low <= truth.mean() <= e.high and now.mean() > e.high


def test_an_estimate_is_not_trusted_where_labelled_rows_never_were():
    rng = np.random.default_rng(0)
    then, right = answers(1000, rng)
    e = estimate_accuracy(np.full(100, 0.3), then, right)
    assert not e.trusted and '100% of the rows' in e.why
    assert estimate_accuracy(then, then, right).trusted


@pytest.mark.parametrize('call,words', [(lambda: psi(np.zeros(5), np.zeros(50)), 'at least 10 values'), (lambda: witness(np.zeros((5, 2)), np.zeros((5, 3))), 'same columns'),
    (lambda: feature_shift(np.full((20, 2), np.nan), np.zeros((20, 2))), 'NaN'), (lambda: feature_shift(things(20), things(20), ['a']), '1 names for 6 columns'),
    (lambda: group_shift(things(20), things(20), ['a']*19, ['a']*20), '19 and 20 groups'), (lambda: estimate_accuracy([0.5], np.full(50, 0.5), np.ones(50)), 'at least 100 labelled'),
    (lambda: estimate_accuracy([1.5], np.full(200, 0.5), np.ones(200)), 'between 0 and 1'), (lambda: estimate_accuracy([0.5], np.full(200, 0.5), np.ones(100)), '200 confidences')], ids=range(8))
def test_tables_that_do_not_fit_are_refused(call, words): refused(call, words)


# In a bundle ---------------------------------------------------------------------------------------------------------

def test_the_detector_travels_in_the_bundle_and_a_changed_one_is_refused(tmp_path, monkeypatch):
    from types import SimpleNamespace
    from edgenb.core import Card, write_json
    from edgenb.pipeline import image_pipeline
    from edgenb.ship import drift_detector, load_bundle, pack
    embeddings = things(300, 1)
    detector, promise = drift_detector(embeddings, 2.0, 30_000, 1.0)
    assert promise['rows'] == 75 and drift_detector(embeddings[:60], 2.0, 30_000, 1.0)[1]['refused'].startswith('Detector: ')
    image_pipeline(['bad', 'good'], 8, 'L', [0.5], [0.2], negative=1).save(tmp_path/'pipeline.json')
    (tmp_path/'model.onnx').write_bytes(b'weights')
    write_json(tmp_path/'parity.json', {})
    card = Card(room='data', key='', asked={}, read={}, wrote={}, result={}, data='synthetic', started='', seconds=0.0, environment={}, edgenb='')
    row = {'artifact': 'a', 'runtime': 'onnxruntime', 'precision': 'fp32', 'device': 'local', 'verdict': 'pass', 'reason': ''}
    def packed(name, *detector): pack(tmp_path/name, 'm', row, tmp_path/'model.onnx', tmp_path/'pipeline.json', tmp_path/'parity.json', Sketch.fit(embeddings), [card], [], *detector)
    packed('with', detector); packed('without')
    monkeypatch.setattr('edgenb.ship.ready', lambda name: SimpleNamespace(load=lambda *a: None))
    assert load_bundle(tmp_path/'with').detector.to_bytes() == detector.to_bytes() and load_bundle(tmp_path/'without').detector is None
    saved = tmp_path/'with'/'drift.detector'
    saved.write_bytes(saved.read_bytes()[:-1] + b'x')
    refused(lambda: load_bundle(tmp_path/'with'), 'drift.detector')
