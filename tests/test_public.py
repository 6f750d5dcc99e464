"Public data: readers against faulty copies, the published rules against a plain reading of them, and nothing of the test part in a training."
import subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from edgenb.core import EdgenbError
from edgenb.public import (CAP, LABELS, LOOP, PUBLISHED, SENSORS, TRAINING_ROWS, alarmed, cmapss, confusion, dga, drawn_again, forest_answers, judged, life_rows, life_windows, nasa_score, own_rows,
                           point_figures, point_rows, public_folder, public_table, read_cmapss, read_dga, read_skab, rmse, same_samples, scaled_windows, skab)


def real(name):
    folder = public_folder(name)
    if not folder.is_dir(): pytest.skip(f'no public data at {folder}: set EDGENB_SHARED_DATA')
    return folder


# made-up data, in the formats of the real ones

def engine_lines(engines, seed):
    rng = np.random.default_rng(seed)
    return [f'{u} {t} 0 0 100 ' + ' '.join(f'{v:.3f}' for v in [518.67, *rng.normal(t/30, 0.3, SENSORS - 1)]) for u in range(1, engines + 1) for t in range(1, 36 + 3*u)]


@pytest.fixture
def engines(tmp_path):
    for seed, part in enumerate(('train', 'test')): (tmp_path/f'{part}_FD001.txt').write_text('\n'.join(engine_lines(6, seed)))
    (tmp_path/'RUL_FD001.txt').write_text('\n'.join(str(20 + u) for u in range(6)))
    return tmp_path


@pytest.fixture
def loop(tmp_path):
    for run in range(3):
        rng, path = np.random.default_rng(run), tmp_path/('valve1' if run < 2 else 'other')/f'{run}.csv'
        path.parent.mkdir(exist_ok=True)
        fault = (np.arange(650) > 480) & (np.arange(650) < 560)
        x, time = rng.normal(size=(650, 8)) + 5*fault[:, None]*(np.arange(8) > 5), np.datetime64('2020-03-01T00:00:00') + 1000*run + np.arange(650)
        path.write_text('\n'.join([';'.join(['datetime', *LOOP, 'anomaly', 'changepoint']), *(f"{str(t).replace('T', ' ')};" + ';'.join(f'{v:.4f}' for v in r) + f';{a:.1f};0.0' for t, r, a in zip(time, x, fault))]))
    (tmp_path/'anomaly-free').mkdir()
    (tmp_path/'anomaly-free'/'anomaly-free.csv').write_text('datetime;Current\n2020-03-01 00:00:00;1\n')
    return tmp_path


@pytest.fixture
def oil(tmp_path):
    (tmp_path/'dataset_dga.csv').write_text('H2,CH4,C2H6,C2H4,C2H2,Fault Type,RF_Pred_Label\n' + ''.join(f'{i}00,20,30,40,5,{name},Partial Discharge\n' for i, name in enumerate(LABELS, 1)))
    return tmp_path


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


# readers

@pytest.mark.parametrize('header', ['', 'unit_number time opt_set1 opt_set2 opt_set3 ' + ' '.join(f's{n}' for n in range(1, 27)) + '\n'], ids=['none', '31 names over 26 columns'])
def test_a_header_line_is_passed_over_whatever_it_counts(engines, header):
    before = read_cmapss(engines)
    for name in ('train_FD001.txt', 'test_FD001.txt'): (engines/name).write_text(header + (engines/name).read_text())
    (engines/'RUL_FD001.txt').write_text('RUL  \n' + (engines/'RUL_FD001.txt').read_text() + '\n\n')
    after = read_cmapss(engines)
    assert all(np.array_equal(a, b) for part in (0, 1) for a, b in zip(before[part], after[part], strict=True)) and np.array_equal(before[2], after[2])
    assert [len(e) for e in after[0]] == [38, 41, 44, 47, 50, 53] and after[0][0].shape[1] == SENSORS and after[2].tolist() == [20, 21, 22, 23, 24, 25]


@pytest.mark.parametrize('fault, message', [
    (lambda f: (f/'train_FD001.txt').unlink(), 'there is no file .*train_FD001'),
    (lambda f: (f/'train_FD001.txt').write_text(''), 'holds no row'),
    (lambda f: (f/'train_FD001.txt').write_text('NASA\nunit cycle\n1 1 0\n'), 'line 2: .* is not a row of numbers'),
    (lambda f: edit(f/'train_FD001.txt', '\n1 2 0 0 100 ', '\n1 2 0 0 '), 'line 2: 25 columns, there must be 26'),
    (lambda f: edit(f/'train_FD001.txt', '\n1 2 0 0 100 ', '\n1 2 0 0 x '), 'line 2: .* is not a row of numbers'),
    (lambda f: edit(f/'train_FD001.txt', '\n1 2 0 0 100 ', '\n1 2 0 0 nan '), 'line 2: .* no finite number'),
    (lambda f: (f/'train_FD001.txt').write_text('\n'.join(engine_lines(6, 0)[:5] + engine_lines(6, 0)[6:])), 'cycles of engine 1 do not count'),
    (lambda f: (f/'train_FD001.txt').write_text('\n'.join(engine_lines(6, 0)[38:])), 'engine 2 where engine 1 should be'),
    (lambda f: (f/'RUL_FD001.txt').write_text('20\n21\n'), '6 test engines, but remaining cycles of 2'),
    (lambda f: (f/'RUL_FD001.txt').write_text('1 20\n2 21\n'), 'line 1: 2 columns, there must be 1')])
def test_a_faulty_copy_of_cmapss_is_refused_by_file_and_line(engines, fault, message):
    fault(engines)
    with pytest.raises(EdgenbError, match=message): read_cmapss(engines)


def test_skab_is_read_run_by_run_without_the_run_that_has_no_fault(loop):
    runs = read_skab(loop)
    assert list(runs) == ['other/2', 'valve1/0', 'valve1/1']
    assert all(r['x'].shape == (650, 8) and np.flatnonzero(r['anomaly'])[[0, -1]].tolist() == [481, 559] for r in runs.values())
    assert runs['valve1/1']['time'][0] == np.datetime64('2020-03-01T00:16:40')


@pytest.mark.parametrize('fault, message', [
    (lambda p: p.write_text(p.read_text().replace(';', ',')), 'no column datetime.*semicolons'),
    (lambda p: edit(p, 'Pressure', 'pressure'), 'no column Pressure'),
    (lambda p: edit(p, 'anomaly;', 'label;'), 'no column anomaly'),
    (lambda p: p.write_text(''), 'no column datetime'),
    (lambda p: p.write_text('\n'.join(p.read_text().splitlines()[:401])), 'has 400 rows'),
    (lambda p: p.write_text(p.read_text()[:-30]), 'cut short'),
    (lambda p: edit(p, '00:00:07;', '00:00:07;x'), 'cut short or holds something else'),
    (lambda p: edit(p, '00:00:07;', '00:00:07;nan;'), 'no finite number'),
    (lambda p: edit(p, '00:00:07;', '00:00:05;'), 'time does not increase'),
    (lambda p: edit(p, '2020-03-01 00:00:07;', 'soon;'), 'soon')])
def test_a_faulty_run_of_skab_is_refused_by_name(loop, fault, message):
    fault(loop/'valve1'/'0.csv')
    with pytest.raises(EdgenbError, match=message) as e: read_skab(loop)
    assert 'valve1/0.csv' in str(e.value)


def test_a_folder_without_runs_says_what_it_should_hold(tmp_path):
    with pytest.raises(EdgenbError, match='valve1, valve2 and other'): read_skab(tmp_path)


def test_gases_are_read_without_what_somebody_predicted(oil):
    gases, faults = read_dga(oil)
    assert gases[:, 0].tolist() == [100, 200, 300, 400, 500, 600] and gases.shape == (6, 5) and faults.tolist() == list(LABELS.values())


@pytest.mark.parametrize('old, new, message', [('C2H2,', 'acetylene,', 'no column C2H2'), ('Fault Type', 'fault', 'no column Fault Type'), ('Low Energy Discharge', 'Sparking', "line 3: fault 'Sparking' is none of"),
                                               ('\n100,', '\n-100,', 'negative'), ('\n100,', '\n,', 'not a number'), ('\n100,', '\nnan,', 'no finite number')])
def test_a_faulty_table_of_gases_is_refused(oil, old, new, message):
    edit(oil/'dataset_dga.csv', old, new)
    with pytest.raises(EdgenbError, match=message): read_dga(oil)


# rules, read a second time

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(2, 9), st.integers(1, 5))
def test_windows_of_engines_are_what_a_plain_loop_makes(ages, steps, every):
    rng = np.random.default_rng(0)
    engines = [rng.normal(size=(n, 3)) for n in ages]
    x, left, number = life_windows(engines, steps, every)
    plain = []
    for g, e in enumerate(engines):
        for end in range(len(e) - 1, -1, -every):
            w = np.full((3, steps), np.nan)
            for back in range(min(steps, end + 1)): w[:, steps - 1 - back] = e[end - back]
            plain.append((w, len(e) - 1 - end, g))
    assert np.array_equal(x, np.stack([w for w, _, _ in plain]), equal_nan=True) and left.tolist() == [l for _, l, _ in plain] and number.tolist() == [g for _, _, g in plain]


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 6).flatmap(lambda steps: st.tuples(st.just(steps), st.lists(st.sampled_from([0, 3, 3, 3]), min_size=1, max_size=40))))
def test_alarms_are_those_of_the_benchmarks_own_loop(given_):
    steps, errors = given_
    unusual, plain = [e > 2 for e in errors], np.zeros(len(errors) + steps - 1, bool)
    for row in range(steps - 1, len(errors) - steps + 1):
        if all(unusual[row - steps + 1:row]): plain[row] = True
    assert np.array_equal(alarmed(np.array(errors), 2, steps), plain)


def test_rates_are_over_the_rows_of_all_runs_and_their_intervals_over_runs():
    from sklearn.metrics import f1_score
    rng = np.random.default_rng(0)
    truth, alarm = [rng.random(n) < 0.4 for n in (50, 200, 120)], [rng.random(n) < 0.5 for n in (50, 200, 120)]
    counts = np.array([confusion(t, a) for t, a in zip(truth, alarm)])
    t, a, found = np.concatenate(truth), np.concatenate(alarm), point_figures(counts)
    assert found['F1'][0] == pytest.approx(f1_score(t, a)) and found['FAR, %'][0] == pytest.approx(100*a[~t].mean()) and found['MAR, %'][0] == pytest.approx(100*(~a)[t].mean())
    assert all(low < value < high for value, low, high in found.values())
    assert len(set(point_figures(np.repeat(counts[:1], 5, 0))['F1'])) == 1     # equal runs: nothing varies, however many rows they have


def test_errors_of_remaining_life_are_those_of_the_challenge():
    life, guess = np.array([100., 50, 10]), np.array([110., 37, 10])
    assert nasa_score(life, guess) == pytest.approx(np.e - 1 + np.e - 1) and rmse(life, guess) == pytest.approx(np.sqrt((100 + 169)/3))


def test_the_difference_to_the_first_model_is_taken_on_the_same_draws():
    rng = np.random.default_rng(0)
    life = rng.uniform(0, 145, 60)
    first = life + rng.normal(0, 15, 60)
    rows = life_rows(life, {'first': first, 'same': first.copy(), 'worse': life + 1.2*(first - life)})
    assert rows[0]['difference'] == {} and rows[1]['difference']['RMSE'] == (0, 0, 0)
    value, low, high = rows[2]['difference']['RMSE']
    assert value == pytest.approx(0.2*rows[0]['figures']['RMSE'][0]) and 0 < low < value < high
    _, own_low, own_high = rows[2]['figures']['RMSE']
    assert high - low < (own_high - own_low)/3                # pairs tell apart what intervals side by side cannot
    assert rows[0]['figures'][f'RMSE, life capped at {CAP}'][0] == pytest.approx(rmse(np.minimum(life, CAP), first))


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, inside, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        x = rng.normal(5, 1, 60)
        _, low, high = drawn_again({'mean': lambda r: x[r].mean()}, 60, resamples=400, seed=trial)['mean']
        inside += low <= 5 <= high
        widths.append((high - low)/2*np.sqrt(60)/x.std())
    assert 180 <= inside <= 198 and abs(np.mean(widths) - 1.96) < 0.05


# nothing of the test part in a training

def test_test_engines_have_no_part_in_the_training(engines):
    def run(): return cmapss(engines, (), steps=16, epochs=2, every=3, widths=(4, 4, 4, 4), held_engines=2)
    before = run()
    (engines/'test_FD001.txt').write_text('\n'.join(engine_lines(6, 7)))
    (engines/'RUL_FD001.txt').write_text('\n'.join(['90']*6))
    after = run()
    assert before['history'] == after['history'] and not np.array_equal(before['estimates']['torch, FP32'], after['estimates']['torch, FP32'])
    assert 0 <= after['estimates']['torch, FP32'].min() and after['estimates']['torch, FP32'].max() <= CAP


def test_labels_of_skab_judge_and_do_nothing_else(loop):
    def run(): return skab(loop, (), each_epochs=1, all_epochs=1)['counts']
    before = run()
    for path in loop.glob('*/[0-9].csv'): path.write_text(path.read_text().replace(';1.0;0.0', ';0.0;0.0'))
    after = run()
    assert list(before) == ['one network a run, torch, FP32', 'one network for all, torch, FP32']
    for name, c in before.items():
        assert np.array_equal(c[:, :2].sum(1), after[name][:, :2].sum(1)) and (c.sum(1) == 250).all() and after[name][:, [0, 2]].sum() == 0


def test_windows_of_a_run_are_scaled_by_its_training_rows_alone():
    x = np.random.default_rng(0).normal(7, 3, (500, 2))
    x[:, 1] = 4                                               # a sensor that stands still
    a = scaled_windows(x[:TRAINING_ROWS], x[:TRAINING_ROWS])
    assert a.shape == (341, 2, 60) and np.allclose(a[5, :, 7], [(x[12, 0] - x[:400, 0].mean())/x[:400, 0].std(), 0], atol=1e-5)


def test_a_run_is_judged_by_the_limit_and_the_scale_of_its_training_rows(loop):
    run = read_skab(loop)['valve1/0']
    run['x'][450:600] += 3
    asleep = lambda windows: {'rebuilt': np.zeros_like(windows)}    # a model that expects the mean: errors are sizes
    mean, spread = run['x'][:400].mean(0), run['x'][:400].std(0)
    size = np.abs((run['x'] - mean)/spread)
    errors = [size[i:i + 60].mean(0).sum() for i in range(591)]
    limit, rows = 4/3*np.quantile(errors[:341], 0.999), np.zeros(250, bool)
    for row in range(59, 191 - 59): rows[row] = all(e > limit for e in errors[400 + row - 59:400 + row])
    truth = run['anomaly'][400:]
    assert rows.sum() > 40 and judged(run, asleep).tolist() == [(truth & rows).sum(), (~truth & rows).sum(), (truth & ~rows).sum(), (~truth & ~rows).sum()]


def test_training_rows_that_another_run_is_judged_on_are_found(loop):
    runs = read_skab(loop)
    runs['valve1/1']['time'] = runs['valve1/0']['time'][-1] - np.timedelta64(99, 's') + np.arange(650)
    own = own_rows(runs)
    judged = {t for t in runs['valve1/0']['time'][TRAINING_ROWS:].tolist()}
    assert own['valve1/1'].tolist() == [t not in judged for t in runs['valve1/1']['time'][:TRAINING_ROWS].tolist()] and (~own['valve1/1']).sum() == 100
    assert own['valve1/0'].all() and own['other/2'].all()


def test_samples_that_are_there_twice_stay_in_one_fold():
    rng = np.random.default_rng(0)
    gases = rng.lognormal(3, 1, (60, 5))
    gases, faults = np.concatenate([gases, gases, 3*gases]), np.tile(rng.choice(['PD', 'D1', 'T3'], 60), 3)
    groups = same_samples(gases)
    assert len(np.unique(groups)) <= 60 and np.array_equal(groups[:60], groups[60:120]) and np.array_equal(groups[:60], groups[120:])
    assert (forest_answers(gases, faults, groups) == faults).mean() < 0.55 < (forest_answers(gases, faults, np.arange(180)) == faults).mean()   # labels by chance: only a leak can know them


# what is shown

def test_published_figures_are_marked_and_ours_carry_intervals():
    table = public_table(point_rows({'one network a run, torch, FP32': np.array([[8, 2, 2, 88], [7, 1, 3, 90]])})).splitlines()
    ours, theirs = [l for l in table if 'measured here |' in l and 'not' not in l], [l for l in table if 'published, not measured here' in l]
    assert len(ours) == 1 and ours[0].count('[') == 3 and len(theirs) == sum(r['data'] == 'SKAB' for r in PUBLISHED) and not any('[' in l for l in theirs)


def test_importing_loads_nothing_heavy():
    code = "import sys, edgenb.public; print(sorted({'torch', 'pandas', 'sklearn', 'scipy', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# the real files

def test_the_real_engines_are_nasas():
    train, test, left = read_cmapss(real('cmapss_fd001'))
    assert (len(train), len(test), len(left)) == (100, 100, 100) and sum(map(len, train)) == 20631 and sum(map(len, test)) == 13096 and (left.min(), left.max()) == (7, 145)


def test_on_the_real_runs_the_published_rates_give_the_published_f1():
    runs = read_skab(real('skab'))
    truth = np.concatenate([r['anomaly'][TRAINING_ROWS:] for r in runs.values()])
    assert len(runs) == 34 and len(truth) == 37401 - 34*TRAINING_ROWS
    for row in (r['figures'] for r in PUBLISHED if r['data'] == 'SKAB' and r['model'] in ('Conv-AE', 'MSET', 'T-squared+Q (PCA-based)', 'LSTM-AE', 'T-squared', 'Vanilla AE')):
        hit, false = (1 - row['MAR, %'][0]/100)*truth.sum(), row['FAR, %'][0]/100*(~truth).sum()
        assert 2*hit/(hit + false + truth.sum()) == pytest.approx(row['F1'][0], abs=0.006)      # so we count the rows that they counted


def test_the_real_samples_of_oil_hold_repeats_with_other_labels():
    found = dga(real('dga_faults'))
    assert found['repeats'] == {'samples': 589, 'there again': 7, 'alike': 16, 'with different faults': 5, 'IEC not conclusive': 207}
    agreement = {r['model']: r['figures']['agreement'] for r in found['rows']}
    assert agreement['forest, 5 folds'][1] > agreement["Duval's triangle"][2] and agreement["Duval's triangle"][0] > agreement['IEC 60599 ratios'][0]
