"Events: counted as the written rules say, by a second, plain reading of them; alerts keep their promises whatever happens."
import json, math
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from edgenb.core import EdgenbError
from edgenb.events import COUNTS, DAY, FIGURES, SEVERITIES, Alerts, Event, Split, alarms, choose_threshold, difference, evaluate, events_table, lead_time_figure, split_assets

HOUR = 3600


def alarms_plainly(t, s, threshold, clear, merge_days):
    out, standing, last = [], False, None
    for now, x in zip(t, s):
        if math.isnan(x): continue
        if not standing and x >= threshold: standing, begin = True, now
        elif standing and x < clear: standing = False; out.append([begin, last])
        last = now
    if standing: out.append([begin, last])
    merged = []
    for b, e in out:
        if merged and b - merged[-1][1] < merge_days*DAY: merged[-1][1] = e
        else: merged.append([b, e])
    return [(b, e, max(x for now, x in zip(t, s) if b <= now <= e and not math.isnan(x))) for b, e in merged]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 5, 12, 30, 48]), st.one_of(st.sampled_from([0., 1, 2, 3, 4, math.nan]))), max_size=60), st.sampled_from([2., 3]), st.sampled_from([1., 2]), st.sampled_from([0, 0.5, 2]))
def test_alarms_begin_end_and_merge_as_a_plain_loop_says(steps, threshold, clear, merge_days):
    t, s = (np.cumsum([d for d, _ in steps])*HOUR if steps else np.empty(0, int)), [x for _, x in steps]
    got = [(e.begin, e.end, e.peak) for e in alarms(t, s, threshold, clear, merge_days)]
    assert got == alarms_plainly(t.tolist(), s, threshold, clear, merge_days)
    assert got == [(e.begin, e.end, e.peak) for e in alarms(t.astype('datetime64[s]'), s, threshold, clear, merge_days)]


def count_plainly(events, failures, begin, end, excluded, near, far, standing, repair):
    "The four rules, hour by hour."
    def hours(a, b): return range(a, b)
    out = {h for b, e in [*excluded, *((f, f + repair) for f in failures)] for h in hours(b + 1, e + 1)}      # (b, e]
    def observed(h): return begin < h <= end and h not in out
    counted = []
    for f in failures:
        want = far - near
        seen = sum(observed(h) for h in hours(f - far + 1, f - near + 1))
        if 2*seen >= want and f not in out: counted.append(f)
    starts = []
    for b, e in events:
        at = max(b, begin)
        while at in out and at <= end: at += 1
        if at in out or at > end: continue
        if at != b:
            at = max(begin, at - 1) if at - 1 >= begin and at > max(b, begin) else at     # spans end at the hour itself
            if at >= e: continue
        starts.append((at, e))
    credit = {f: [b for b, e in starts if f - far <= b <= f - near or (f - standing <= b < f - far <= e)] for f in counted}
    used = {b for bs in credit.values() for b in bs}
    false = [b for b, _ in starts if b not in used and not any(f - far <= b <= f for f in failures)]
    late = [b for b, _ in starts if b not in used and any(f - near < b <= f for f in failures)]
    return len(counted), sum(bool(c) for c in credit.values()), len(starts), len(false), len(late), sorted((f - min(c))/24 for f, c in credit.items() if c), sum(map(observed, hours(begin, end + 1)))/(24*365.25)


@settings(max_examples=150, deadline=None)
@example([(1301, 200)], set(), [(1300, 200)], 0, 14)
@example([], {1405, 1501}, [], 0, 14)
@example([(2, 0)], {1}, [], 2, 14)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 300)), max_size=5), st.sets(st.integers(1, 1600), max_size=3),
       st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 200)), max_size=2), st.integers(0, 300), st.sampled_from([14, 25]))
def test_counts_agree_with_the_rules_read_hour_by_hour(raw, failures, raw_out, begin, standing):
    events, at = [], 0
    for b, n in sorted(raw):
        if b > at or not events: events.append((b, b + n)); at = b + n
    excluded, end = [(b, b + n) for b, n in raw_out], 1500
    result = evaluate({'A': [Event(b*HOUR, e*HOUR, 1.) for b, e in events]}, {'A': [f*HOUR for f in failures]}, {'A': (begin*HOUR, end*HOUR)}, {'A': [(b*HOUR, e*HOUR) for b, e in excluded]}, standing_days=standing, repair_days=4)
    got = dict(zip(COUNTS, result.counts[0]))
    failures, warned, number, false, late, leads, years = count_plainly(events, sorted(failures), begin, end, excluded, 48, 336, standing*24, 96)
    assert (got['failures'], got['warned'], got['alarms'], got['false'], got['late']) == (failures, warned, number, false, late)
    assert np.allclose(result.lead_days, leads) and math.isclose(got['years'], years, abs_tol=1e-9)
    assert got['early'] <= got['false'] and got['false_months'] <= got['months'] <= 3


@pytest.mark.parametrize('day, credit, false, late', [(85.9, 0, 1, 0), (86, 1, 0, 0), (98, 1, 0, 0), (98.1, 0, 0, 1), (100, 0, 0, 1), (101, 0, 0, 0), (110, 0, 1, 0)])
def test_only_a_warning_two_to_fourteen_days_ahead_gets_credit(day, credit, false, late):
    r = evaluate({'A': [Event(int(day*DAY), int(day*DAY) + 60, 1.)]}, {'A': [100*DAY]}, {'A': (0, 365*DAY)})
    assert [r.counts[0, COUNTS.index(k)] for k in ('warned', 'false', 'late')] == [credit, false, late]


def test_an_alarm_that_just_reaches_the_window_still_stands_in_it_and_mostly_excluded_months_do_not_count():
    for end, credit in ((86*DAY, 1), (86*DAY - 1, 0)): assert evaluate({'A': [Event(80*DAY, end, 1.)]}, {'A': [100*DAY]}, {'A': (0, 365*DAY)}, standing_days=20).counts[0, 1] == credit
    r = evaluate({'A': [Event(DAY, 2*DAY, 1.)]}, {}, {'A': (0, 90*DAY)}, {'A': [(5*DAY, 25*DAY), (32*DAY, 40*DAY)]})
    assert dict(zip(COUNTS, r.counts[0]))['months'] == 2 and math.isclose(r.counts[0, COUNTS.index('years')]*365.25, 62)


def test_a_failure_nobody_could_have_been_warned_of_does_not_count():
    r = evaluate({}, {'A': [3*DAY, 200*DAY], 'B': [100*DAY, 103*DAY], 'C': [100*DAY]}, {a: (0, 300*DAY) for a in 'ABC'}, excluded={'C': [(80*DAY, 99*DAY)]})
    assert r.counts[:, 0].tolist() == [1, 1, 0]


def fleet(assets, hit, wrong, seed, clusters=1):
    "Alarms and failures of a made-up fleet; each asset that fails does so `clusters` times, with one luck for all."
    rng = np.random.default_rng(seed)
    observed, failures, events = {n: (0, 365*DAY*2) for n in range(assets)}, {}, {}
    for n in range(assets):
        if n % 3 == 0:
            failures[n] = [(60 + 60*k)*DAY for k in range(clusters)]
            lucky = rng.random() < hit
            events[n] = [Event(f - 5*DAY, f - 4*DAY, 1.) for f in failures[n] if lucky]
        events[n] = sorted(events.get(n, []) + [Event(int(d)*DAY + 3*DAY//2, int(d)*DAY + 2*DAY, 1.) for d in rng.choice(np.arange(400, 700), rng.poisson(wrong*2), replace=False)], key=lambda e: e.begin)
    return events, failures, observed


def test_intervals_by_asset_hold_the_truth_as_often_as_they_say():
    held = np.zeros(2)
    for seed in range(150):
        r = evaluate(*fleet(90, 0.6, 0.5, seed, clusters=5), draws=400, seed=seed)
        for k, (name, truth) in enumerate((('warned', 0.6), ('false_per_year', 0.5))):
            _, low, high = r.estimate(name)
            held[k] += low <= truth*(1 if k == 0 else 731/730.5) <= high or low <= truth <= high
    assert (held/150 > 0.87).all() and (held/150 < 0.995).all()


def test_the_paired_interval_is_that_of_the_same_draws_and_finds_what_two_intervals_hide():
    events, failures, observed = fleet(150, 0.6, 0.5, 1)
    better = {a: [e for e in es if e.begin < 400*DAY or a % 6] for a, es in events.items()}
    a, b = evaluate(better, failures, observed), evaluate(events, failures, observed)
    d = difference(a, b, 'false_per_year')
    rng = np.random.default_rng(0)
    plain = []
    for w in rng.multinomial(150, np.full(150, 1/150), 2000):
        at = np.repeat(np.arange(150), w)
        plain.append((a.counts[at, 3].sum() - b.counts[at, 3].sum())/a.counts[at, 6].sum())
    assert np.allclose([d['low'], d['high']], np.quantile(plain, [.025, .975])) and d['high'] < 0
    assert a.estimate('false_per_year')[2] > b.estimate('false_per_year')[1]      # side by side they overlap
    with pytest.raises(EdgenbError, match='differ in assets'): difference(a, evaluate(*fleet(90, 0.6, 0.5, 1)))
    with pytest.raises(EdgenbError, match='other failures'): difference(a, evaluate(better, {k: v for k, v in failures.items() if k}, observed))


def test_nothing_seen_is_not_nothing_possible():
    events, failures, observed = fleet(30, 1.0, 0, 0)
    r = evaluate(events, failures, observed)
    value, low, high = r.estimate('warned')
    assert value == high == 1 and math.isclose(low, 0.025**(1/10))           # Clopper-Pearson, 10 of 10
    value, low, high = r.estimate('false_per_year')
    assert value == low == 0 and 3.68 < high*r.counts[:, 6].sum() < 3.70     # Poisson, none seen
    assert all(math.isnan(x) for x in evaluate({}, {}, observed).estimate('warned'))
    assert 'not known' in events_table({'nobody failed': evaluate({}, {}, observed)})


def test_the_threshold_is_the_best_of_all_candidates_within_the_budget():
    rng = np.random.default_rng(4)
    t, series, failures = np.arange(4*365)*DAY//4, {}, {}
    for n in range(24):
        s = np.abs(rng.normal(size=len(t)))
        if n % 3 == 0: failures[n] = [(50 + 12*n)*DAY]; s[(43 + 12*n)*4:(50 + 12*n)*4] += rng.uniform(0, 4)
        series[n] = t, s
    observed = {n: (0, 365*DAY) for n in series}
    for budget in (0.0, 0.3, 3):
        threshold, result, curve = choose_threshold(series, failures, observed, budget, clear=0.8, candidates=25)
        by_hand = {x: evaluate({n: alarms(t, s, x, 0.8*x) for n, (t, s) in series.items()}, failures, observed) for x, _, _ in curve}
        fine = {x: r.estimate('warned')[0] for x, r in by_hand.items() if r.estimate('false_per_year')[0] <= budget}
        assert threshold == max(x for x, w in fine.items() if w == max(fine.values())) and np.array_equal(result.counts, by_hand[threshold].counts)
    with pytest.raises(EdgenbError, match='no failure'): choose_threshold(series, {}, observed, 1)
    with pytest.raises(EdgenbError, match='the budget is 0'): choose_threshold({n: (t, -np.abs(s - 1)) for n, (t, s) in series.items()} | {1: (t, np.full(len(t), 9.))}, failures, observed, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 120), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([(0.6, 0.2, 0.2), (0.5, 0.25, 0.25), (0.7, 0.0, 0.3)]), st.booleans())
def test_no_split_leaks_and_every_kind_is_dealt_out_evenly(assets, kinds, seed, shares, in_time):
    rng = np.random.default_rng(seed)
    equipment = {f'A{n}': f'K{rng.integers(kinds)}' for n in range(assets)}
    failed = {a for a in equipment if rng.random() < 0.3}
    until = np.datetime64('2024-06-01') if in_time else None
    split = split_assets(equipment, failed, shares, until, pause_days=20, seed=seed)
    parts = dict(train=set(split.train), validation=set(split.validation), test=set(split.test))
    assert sum(map(len, parts.values())) == assets and set().union(*parts.values()) == set(equipment)
    assert split == split_assets(dict(reversed(equipment.items())), failed, shares, until, pause_days=20, seed=seed)
    for stratum in {(equipment[a], a in failed) for a in equipment}:
        members = {a for a in equipment if (equipment[a], a in failed) == stratum}
        for part, share in zip(parts.values(), shares): assert abs(len(members & part) - share*len(members)) < 2.01
    if in_time:   # any two examples on different sides are at least the pause apart, whatever is asked
        days = np.datetime64('2024-05-01') + rng.integers(0, 80, 40)
        placed = [(split.part(a, b, b + 5), b, b + 5) for a in list(equipment)[:20] for b in days]
        ends, begins = [e for p, _, e in placed if p in ('train', 'validation')], [b for p, b, _ in placed if p == 'test']
        assert not ends or not begins or min(begins) - max(ends) >= np.timedelta64(20, 'D')


def test_mistakes_are_named():
    events, failures, observed = fleet(9, 1, 1, 0)
    for wrong, message in ((lambda: evaluate(events, {'T9': [5]}, observed), 'failures of T9'), (lambda: evaluate(events, failures, observed, ahead=(14, 2)), 'latest, earliest'), (lambda: evaluate({}, {}, {}), 'no asset'),
                           (lambda: evaluate({}, {}, {1: (9, 9)}), 'no time at all'), (lambda: evaluate(events, failures, observed).estimate('waned'), 'Did you mean warned'), (lambda: alarms([2, 1], [0, 0], 1), 'increase'),
                           (lambda: alarms([1], [0, 0], 1), '1 times and 2 scores'), (lambda: split_assets({'a': 'x', 'b': 'x', 'c': 'x'}, {'d'}), 'd failed'), (lambda: split_assets(dict.fromkeys('abcd', 'x'), [], (0.9, 0.2, 0.1)), 'add up to 1'),
                           (lambda: Split(('a',), (), ()).part('b', 0, 1), 'in no part'), (lambda: events_table({}, {'x': {'hits': '9'}}), 'no figure hits')):
        with pytest.raises(EdgenbError, match=message): wrong()


def test_the_lead_time_figure_ends_at_the_share_that_was_warned():
    r = evaluate(*fleet(60, 0.7, 0.2, 0))
    line, = lead_time_figure({'toy': r}).data
    assert line.y[0] == r.estimate('warned')[0] and list(line.y) == sorted(line.y, reverse=True)


class AlertLife(RuleBasedStateMachine):
    "Anything in any order; what was promised is checked after each step."
    keys = [(a, c) for a in ('T1', 'T2') for c in ('leak', 'fan')]

    @initialize()
    def begin(self): self.desk, self.now, self.rang, self.acked, self.quiet = Alerts({'leak': 'look', 'fan': 'oil'}, again_hours=24), 0, [], set(), {}

    @rule(hours=st.integers(-5, 60))
    def wait(self, hours): self.now += hours*HOUR

    @rule(key=st.sampled_from(keys), severity=st.sampled_from(SEVERITIES))
    def report(self, key, severity):
        a = self.desk.report(self.now, *key, severity, 3.0)
        if a is None: return
        time = self.desk.now
        assert a.state == 'raised' and (a.asset, a.cause) == key and key not in self.acked, 'an acknowledged alert rang'
        assert self.quiet.get(key, -1) <= time, 'a suppressed alert rang'
        self.rang.append((time, key, a.severity))

    @rule(key=st.sampled_from(keys))
    def clear(self, key): self.desk.clear(self.now, *key); self.acked.discard(key)

    @rule(key=st.sampled_from(keys))
    def acknowledge(self, key):
        try: self.desk.acknowledge(self.now, *key)
        except EdgenbError: assert key not in [(a.asset, a.cause) for a in self.desk.open()]
        else: self.acked.add(key)

    @rule(key=st.sampled_from(keys), hours=st.integers(-10, 31*24))
    def suppress(self, key, hours):
        until = max(self.now, self.desk.now) + hours*HOUR
        try: self.desk.suppress(self.now, *key, until)
        except EdgenbError: assert hours <= 0 or hours > 30*24
        else: self.quiet[key] = until

    @rule()
    def power_loss(self): self.desk = Alerts.from_bytes(self.desk.to_bytes())

    @precondition(lambda self: self.quiet)
    @rule(key=st.sampled_from(keys))
    def suppression_ends(self, key):
        if key in self.acked: return
        self.now = max(self.now, self.desk.now, self.quiet.get(key, 0))
        self.desk.report(self.now, *key, 'critical', 9.0)
        assert self.desk.alerts[key].state == 'raised'

    @invariant()
    def one_open_alert_for_an_asset_and_cause(self):
        keys = [(a.asset, a.cause) for a in self.desk.open()]
        assert len(keys) == len(set(keys)) and len(self.desk.alerts) <= len(self.keys) and len(self.desk.quiet) <= len(self.keys)

    @invariant()
    def no_storm(self):
        for key in self.keys:
            times = [t for t, k, _ in self.rang if k == key]
            assert all(b - a >= 24*HOUR for a, b in zip(times, times[3:])), 'more than one ring for each severity within a day'

TestAlertLife = AlertLife.TestCase
TestAlertLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_an_acknowledged_alert_is_silent_however_bad_it_gets_until_it_was_cleared():
    desk = Alerts({'leak': 'look'})
    assert desk.report(0, 'T1', 'leak', 'notice', 1).rings == 1
    desk.acknowledge(1, 'T1', 'leak')
    assert desk.report(2, 'T1', 'leak', 'critical', 9) is None and desk.open()[0].severity == 'critical'
    desk.clear(3, 'T1', 'leak')
    assert desk.report(4, 'T1', 'leak', 'notice', 1).severity == 'critical'   # worse than what was acknowledged


def test_a_flapping_sensor_rings_once_and_an_alert_says_what_to_do():
    desk, rings = Alerts({'leak': 'close the valve'}), []
    for n in range(500):
        rings += [a] if (a := desk.report(n*HOUR, 'T1', 'leak', 'warning', 2 + n % 3, {'gas': 7.12345})) else []
        desk.clear(n*HOUR + 1800, 'T1', 'leak')
    assert len(rings) == 1
    sent = json.loads(rings[0].to_json())
    assert (sent['action'], sent['severity'], sent['evidence']) == ('close the valve', 'warning', {'gas': 7.12}) and len(rings[0].to_json()) < 300
    for broken in (b'', b'{}', desk.to_bytes()[:-1], b'[1]'):
        with pytest.raises(EdgenbError, match='not the state'): Alerts.from_bytes(broken)
