"Telemetry: the device and the files follow the same rules, to the bit, and a plain re-implementation agrees."
import json, math, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from edgenb.core import EdgenbError
from edgenb.intake import read_orders, read_telemetry
from edgenb.telemetry import CODES, GAP, OUTSIDE, Channel, History, Plan, Rules, Stream, clean, windows

CHANNELS = [Channel('oil', '°C', -40, 160, usual=(0, 95), others=('°F', 'K'), swing=10, stuck_hours=6),
            Channel('gas', 'ppm', 0, 20_000, usual=(0, 500), others=('ppb',), stuck_hours=math.inf),
            Channel('load', 'fraction', 0, 2.5, stuck_hours=8)]
RULES = Rules(confirm=3, jump_days=2, forget_hours=8, warm_days=0.25, memory_days=1)
MINUTE, HOUR = 60, 3600


@st.composite
def readings(draw):
    "What a gateway might send: (seconds, values) with gaps, repeats, wrong clocks, wrong units, stuck and nonsense values."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    t, out, shift, unit = 1_700_000_000 + int(rng.integers(0, 7200)), [], 0, 0
    for kind in draw(st.lists(st.sampled_from(['run']*6 + ['gap', 'long gap', 'again', 'back', 'reset', 'right', 'fahrenheit', 'kelvin', 'celsius', 'stuck', 'burst', 'spike', 'jump']), min_size=1, max_size=14)):
        n, still = int(rng.integers(3, 40)), None
        if kind == 'gap': t += int(rng.integers(1, 40))*HOUR
        if kind == 'long gap': t += int(rng.integers(2, 200))*24*HOUR
        if kind == 'back': t -= int(rng.integers(1, 40))*HOUR
        if kind == 'reset': shift = -t + int(rng.integers(0, 5000))
        if kind == 'right': shift = 0
        unit = {'fahrenheit': 1, 'kelvin': 2, 'celsius': 0}.get(kind, unit)
        if kind == 'stuck': still = 55 + rng.random()
        if kind == 'again' and out: out += out[-int(rng.integers(1, 8)):]
        every = int(rng.choice([10*MINUTE, 17*MINUTE, HOUR, 61*MINUTE]))
        for k in range(n):
            oil = still if still else 60 + 5*math.sin(t/20_000) + (30 if kind == 'jump' else 0) + 0.1*rng.normal()
            v = np.array([(oil, oil*1.8 + 32, oil + 273.15)[unit], 40 + rng.normal(), rng.random()])
            if kind == 'burst': v[rng.random(3) < 0.7] = np.nan
            if kind == 'spike' and rng.random() < 0.4: v[rng.integers(0, 3)] = rng.choice([1e9, -500, 300])
            out.append((t + shift, v))
            if rng.random() < 0.05: out.append((t + shift, v if rng.random() < 0.5 else v + 1))
            t += every + int(rng.integers(0, 60))
    return out


def as_arrays(sent): return np.array([t for t, _ in sent], np.int64), np.stack([v for _, v in sent])

def from_file(sent, window=12, step=3):
    (steps, values, codes, outside, found), = clean([as_arrays(sent)], Plan(CHANNELS, RULES))
    history = History('T', '', '', (steps*RULES.grid_s).astype('datetime64[s]'), values)
    return history, codes, outside, found, windows(history, CHANNELS, window, step, RULES)

def same(stream_windows, batch):
    assert [w.time for w in stream_windows] == batch.time.tolist() or np.array_equal([w.time for w in stream_windows], batch.time)
    for name in ('values', 'mask', 'raw'):
        got = np.stack([getattr(w, name) for w in stream_windows]) if stream_windows else getattr(batch, name)
        assert got.dtype == getattr(batch, name).dtype and np.array_equal(got, getattr(batch, name), equal_nan=name == 'raw')


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(readings(), st.lists(st.integers(0, 400), max_size=4), st.sampled_from([(12, 3), (1, 1), (5, 7)]))
def test_the_device_sees_the_same_windows_and_finds_the_same_things_as_the_files(sent, power_losses, size):
    stream, got = Stream(CHANNELS, *size, RULES), []
    for n, (t, v) in enumerate(sent):
        if n in power_losses: stream = Stream.from_bytes(stream.to_bytes())
        got += stream.push(t, v if n % 2 else dict(zip(('oil', 'gas', 'load'), v.tolist())))
    got += stream.flush()
    history, codes, outside, found, batch = from_file(sent, *size)
    same(got, batch)
    events = {(e['what'], e['channel']): e['count'] for e in stream.events()}
    expected = {(w, ''): n for w, n, _, _ in found}
    for code in range(1, len(CODES)):
        count = outside.sum(0) if code == OUTSIDE else (codes == code).sum(0)
        if code == GAP: count = count[:1]
        expected |= {(CODES[code], '' if code == GAP else CHANNELS[c].name): int(n) for c, n in enumerate(count) if n}
    assert events == expected


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(readings())
def test_a_plain_reading_of_the_rules_gives_the_same_history_and_windows(sent):
    history, codes, _, _, batch = from_file(sent)
    rows, deviations = plainly(sent)
    assert history.time.astype(np.int64).tolist() == [g*HOUR for g in rows]
    assert np.allclose(history.values, np.array(list(rows.values()), np.float32), rtol=1e-6, atol=1e-6, equal_nan=True)
    for time, values, mask in zip(batch.time.astype(np.int64)//HOUR, batch.values, batch.mask):
        for k in range(12):
            z = deviations.get(int(time) - 11 + k, [None]*3)
            assert np.allclose(values[:, k], [x or 0 for x in z], rtol=1e-4, atol=1e-4) and mask[:, k].tolist() == [x is not None for x in z]


def plainly(sent):
    "The rules read aloud: one value after the other, no arrays. -> {step: values or NaN}, {step: deviations or None}"
    return history_plainly(steps_plainly(clock_plainly(sent)))

def clock_plainly(sent):
    last = doubted = None; offset = agree = 0; kept = {}
    for t, v in sent:
        jump = RULES.jump_days*86400
        if last is None: at = t
        elif 0 <= t - last <= jump: at, offset, doubted, agree = t, 0, None, 0
        elif 0 <= t + offset - last <= jump: at, doubted, agree = t + offset, None, 0
        elif -jump <= t + offset - last < 0 or -jump <= t - last < 0: continue
        else:
            agree = agree + 1 if doubted is not None and 0 < t - doubted <= jump else 1
            doubted = t
            if agree < RULES.confirm: continue
            offset = 0 if t > last else last + HOUR - t
            at, doubted, agree = t + offset, None, 0
        last = at
        old = kept.setdefault(at, [math.nan]*3)
        kept[at] = [n if math.isnan(o) else o for o, n in zip(old, v)]
    return kept

def steps_plainly(kept):
    steps = {}
    for t, v in kept.items():
        for c, x in enumerate(v):
            steps.setdefault(math.ceil(t/HOUR), [[], [], []])
            if not math.isnan(x): steps[math.ceil(t/HOUR)][c].append(x)
    return steps

UNITS_PLAINLY = [[lambda x: x, lambda x: (x - 32)/1.8, lambda x: x - 273.15], [lambda x: x, lambda x: x/1000], [lambda x: x]]

def history_plainly(steps):
    rows, deviations, first, last = {}, {}, min(steps), max(steps)
    mute, hushed = max(2*RULES.confirm, 8), None
    judges, learners = [Judge(c) for c in range(3)], [Learner(c) for c in range(3)]
    times = sorted(steps)
    for before, g in zip([None, *times], times):
        silent = 0 if before is None else g - before - 1
        for k in range(silent):
            quiet = [j.step([]) for j in judges]
            z = [l.step(math.nan) for l in learners]
            if silent <= RULES.jump_days*24: rows[before + 1 + k] = quiet
            deviations[before + 1 + k] = z
        rows[g] = [j.step(x) for j, x in zip(judges, steps[g])]
        deviations[g] = [l.step(x) for l, x in zip(learners, rows[g])]
    return rows, deviations

class Judge:
    def __init__(self, c):
        self.c, self.units, self.unit, self.range, self.age, self.pending, self.to, self.strange, self.aside, self.anchor, self.run = CHANNELS[c], UNITS_PLAINLY[c], 0, None, 0, 0, 0, 0, None, None, 0
    def learn(self, v):
        drift = 1 - 2**(-1/max(8, RULES.confirm))
        least, most = self.range or (v, v)
        self.range = v if v < least else least + drift*(v - least), v if v > most else most + drift*(v - most)
    def outside(self, v): return max(self.range[0] - v, 0, v - self.range[1])
    def off(self, v): return self.outside(v)/(self.c.swing or max(1e-300, 0.25*abs(min(max(v, self.range[0]), self.range[1]))))   # in swings
    def step(self, xs):
        means, lasts = [], []
        for convert in self.units:
            fine = [convert(x) for x in xs if self.c.low <= convert(x) <= self.c.high]
            means.append(sum(fine)/len(fine) if fine else None)
            lasts.append(fine[-1] if fine else None)
        usual, fresh = self.c.usual or (self.c.low, self.c.high), self.range is None
        def fits(v, swings=1): return v is not None and (usual[0] <= v <= usual[1] if fresh else self.off(v) <= swings)
        x, now, before = means[self.unit], lasts[self.unit], self.pending
        others = [u for u, v in enumerate(lasts) if u != self.unit and (fits(v) or not fresh and now is not None and fits(v, 2) and self.outside(v) <= self.outside(now)/4)]
        if xs and fits(now, 2):
            self.pending = 0
            if before and not fresh: self.surprise(self.aside)
            self.learn(now)
        elif xs and len(others) == 1:
            self.pending = before + 1 if before and self.to == others[0] else 1
            self.to, self.aside, x = others[0], now, None
            if not fresh or self.pending >= RULES.confirm: self.learn(lasts[self.to])
            if self.pending >= RULES.confirm: self.unit, self.pending, self.strange, x = self.to, 0, 0, means[self.to]
        elif xs:
            self.pending = 0
            if others: x = None
            elif now is not None: self.surprise(now)
        if fresh: self.strange = 0
        if x is None:
            self.age += 1
            if self.age > 8: self.range = None
            return math.nan
        self.age = 0
        if self.anchor is not None and abs(x - self.anchor) <= 1e-9*abs(self.anchor): self.run += 1
        else: self.anchor, self.run = x, 1
        return math.nan if self.run > max(2, self.c.stuck_hours) else float(np.float32(x))
    def surprise(self, v):
        self.strange += 1
        if self.range is None or self.strange >= RULES.confirm:
            self.strange = 0
            if v is not None: self.learn(v)

class Learner:
    def __init__(self, c): self.floor, self.held, self.age, self.level, self.spread, self.n = 1e-3*(CHANNELS[c].high - CHANNELS[c].low), None, 0, 0.0, 0.0, 0
    def step(self, y):
        known, rate = not math.isnan(y), max(1 - 2**(-1/24), 1/(self.n + 1))
        self.age = 0 if known else self.age + 1
        if known: self.held = y
        spread, z = max(self.spread, self.floor), None
        if self.held is not None and self.age <= 1 and self.n >= 6: z = max(-10, min(10, (self.held - self.level)/spread))
        if not known: return z
        if self.n == 0: self.level = y
        d = y - self.level
        if self.n >= 6: d = max(-3*spread, min(3*spread, d))
        self.level += rate*d
        self.spread += rate*(1.2533*abs(d) - self.spread)
        self.n += 1
        return z


def calm(days=30, every=HOUR):
    t = 1_700_006_400 + np.arange(days*86400//every)*every
    rng = np.random.default_rng(3)
    return [(int(x), np.array([60 + 5*math.sin(x/14_000) + 0.2*rng.normal(), 40 + rng.normal(), 0.5 + 0.2*math.sin(x/14_000) + 0.01*rng.normal()])) for x in t]

def stream_of(sent, **kw):
    stream = Stream(CHANNELS, 24, 24, RULES)
    return stream, [w for t, v in sent for w in stream.push(t, v)]


def test_no_fault_on_the_line_looks_like_a_failure_to_the_model():
    sent = calm()
    _, quiet = stream_of(sent)
    loudest = max(np.abs(w.values[:, :]).max() for w in quiet)
    def fahrenheit(n, v): v = v.copy(); v[0] = v[0]*1.8 + 32 if n > 400 else v[0]; return v
    def parts_per_billion(n, v): v = v.copy(); v[1] = v[1]*1000 if n > 400 else v[1]; return v
    def bursts(n, v): return np.where(np.arange(3) == n//7 % 3, np.nan, v)
    def spikes(n, v): return np.where(n % 50 == 0, 1e6, v)
    for fault in (fahrenheit, parts_per_billion, bursts, spikes):
        stream, got = stream_of([(t, fault(n, v)) for n, (t, v) in enumerate(sent)])
        assert len(got) == len(quiet) and max(np.abs(w.values).max() for w in got) < loudest + 0.5, fault.__name__
    reset = [(t if n < 300 or n > 400 else t - 1_700_000_000, v) for n, (t, v) in enumerate(sent)]
    stream, got = stream_of(reset)
    assert {'clock doubted', 'clock set back'} <= {e['what'] for e in stream.events()} and max(np.abs(w.values).max() for w in got) < loudest + 2


def test_a_missing_channel_leaves_the_others_their_windows():
    stream, got = stream_of([(t, {'gas': v[1], 'load': v[2]}) for t, v in calm()])
    assert len(got) > 20 and not got[-1].mask[0].any() and got[-1].mask[1:].all() and (got[-1].values[0] == 0).all()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.none(), st.text(max_size=12), st.floats(), st.integers(), st.binary(max_size=4), st.datetimes(), st.integers(1_700_000_000, 1_700_900_000)),
                          st.one_of(st.none(), st.text(max_size=5), st.lists(st.one_of(st.floats(), st.text(max_size=3), st.none()), max_size=5),
                                    st.dictionaries(st.one_of(st.sampled_from(['oil', 'gas', 'load']), st.text(max_size=5)), st.one_of(st.floats(), st.text(max_size=3), st.none(), st.integers(), st.lists(st.integers(), max_size=2)), max_size=4))), max_size=12))
def test_whatever_is_sent_the_stream_neither_raises_nor_gives_a_number_that_is_none(sent):
    stream = Stream(CHANNELS, 4, 1, RULES)
    for t, v in sent:
        for w in stream.push(t, v): assert np.isfinite(w.values).all()
    stream.flush()
    json.dumps(stream.events())
    assert Stream.from_bytes(stream.to_bytes()).to_bytes() == stream.to_bytes()


def test_the_size_of_the_state_does_not_grow():
    sent = calm(20)
    stream, _ = stream_of(sent[:200])
    before = len(stream.to_bytes())
    for n, (t, v) in enumerate(sent[200:]):
        stream.push(t, v)
        stream.push(t - 3600, v); stream.push('no time', v); stream.push(t, {f'unknown {n}': 1.0, 'oil': 'x'*n})
    assert len(stream.to_bytes()) < before + 1000
    stream.push(sent[-1][0] + 40*365*86400, sent[-1][1])   # decades of silence are over in a moment
    for k in range(1, 4): assert len(stream.push(sent[-1][0] + 40*365*86400 + 3600*k, sent[-1][1])) < 5


def test_a_reading_that_comes_after_its_step_was_flushed_is_too_late():
    stream = Stream(CHANNELS, 4, 1, RULES)
    stream.push(HOUR - 60, [60, 40, 1]); stream.flush()
    stream.push(HOUR - 30, [61, 41, 1]); stream.push(HOUR, [62, 41, 1]); stream.push(2*HOUR, [62, 41, 1])
    assert [e['count'] for e in stream.events() if e['what'] == 'time backwards'] == [2] and stream.open == 2


def test_after_a_night_of_silence_a_channel_is_judged_by_its_usual_range():
    night = [(n*HOUR, np.array([-5 + n/10, 40, 1.])) for n in range(6)] + [(n*HOUR, np.array([25 + n/10, 40, 1.])) for n in range(20, 26)]   # -5 °C, or 25 °F: not by what was before
    stream = Stream(CHANNELS, 1, 1, RULES)
    for t, v in night: stream.push(t, v)
    stream.flush()
    assert [e['what'] for e in stream.events() if e['channel'] == 'oil'] == [] and not (from_file(night)[1][:, 0] > GAP).any()


def test_a_changed_byte_of_the_state_is_noticed():
    stream, _ = stream_of(calm(4))
    data = stream.to_bytes()
    for at in (0, 20, 60, len(data)//2, len(data) - 1):
        with pytest.raises(EdgenbError, match='not the whole state'): Stream.from_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])


def frame(sent, asset='T1'): return pd.DataFrame({'asset': asset, 'time': pd.to_datetime([t for t, _ in sent], unit='s', utc=True), **{c.name: [v[n] for _, v in sent] for n, c in enumerate(CHANNELS)}})

@pytest.fixture
def table(): return frame(calm(10))


def test_every_form_of_the_same_table_gives_the_same_history(table, tmp_path):
    def read(name, t, **kw):
        t.to_parquet(tmp_path/name, index=False) if name.endswith('parquet') else t.to_csv(tmp_path/name, index=False)
        (h,), report = read_telemetry(tmp_path/name, CHANNELS, RULES, **kw)
        return h, report
    first, report = read('a.csv', table)
    assert report.findings == [] and 'Nothing was found' in report.table()
    long = table.melt(['asset', 'time'], var_name='channel')
    named = long.assign(unit=long['channel'].map({'oil': 'F', 'gas': 'ppm', 'load': 'fraction'}), value=np.where(long['channel'] == 'oil', long['value']*1.8 + 32, long['value']))
    seconds = table.assign(time=(table['time'].astype('int64')//10**np.ceil(np.log10(table['time'].astype('int64').iloc[0]/1e10)).astype(int)))
    fahrenheit = table.assign(oil=table['oil']*1.8 + 32).rename(columns={'oil': 'oil (degF)'})
    for name, t in (('b.parquet', table), ('c.csv', long), ('d.csv', table[::-1]), ('e.csv', fahrenheit), ('f.csv', table.assign(time=table['time'].astype(str))), ('g.csv', seconds),
                    ('h.csv', named), ('i.parquet', named)):
        h, _ = read(name, t)
        assert np.array_equal(h.time, first.time) and np.allclose(h.values, first.values, rtol=1e-5, equal_nan=True), name


def test_a_folder_of_files_is_put_in_order_and_overlaps_are_counted(table, tmp_path):
    table[100:].to_csv(tmp_path/'1.csv', index=False); table[:110].to_parquet(tmp_path/'2.parquet'); frame(calm(3), 'T2').to_csv(tmp_path/'3.csv', index=False)
    histories, report = read_telemetry(tmp_path, CHANNELS, RULES)
    assert {h.asset: len(h.time) for h in histories} == {'T1': 240, 'T2': 72}
    assert {f['what']: f['count'] for f in report.findings if f['asset'] == 'T1'} == {'files overlap': 1, 'time backwards': 9, 'duplicate': 1}


def test_many_assets_side_by_side_give_what_each_gives_alone():
    def history(n):
        rng = np.random.default_rng(n)
        t = 1_700_006_400 + np.sort(rng.choice(60*24*20, 300 + 100*n, replace=False))*60
        return t, np.stack([60 + rng.normal(size=len(t)), 40 + rng.normal(size=len(t)), rng.random(len(t))], 1)
    plan, many = Plan(CHANNELS, RULES), [history(n) for n in range(6)]
    for alone, together in zip([clean([m], plan)[0] for m in many], clean(many, plan)):
        for a, b in zip(alone[:4], together[:4]): assert np.array_equal(a, b, equal_nan=a.dtype.kind == 'f')


def test_windows_of_many_histories_are_those_of_each():
    histories = [from_file(calm(2 + n))[0] for n in range(4)]
    for h, together in zip(histories, windows(histories, CHANNELS, 12, 3, RULES)):
        alone = windows(h, CHANNELS, 12, 3, RULES)
        assert all(np.array_equal(getattr(alone, k), getattr(together, k), equal_nan=k == 'raw') for k in ('time', 'values', 'mask', 'raw'))
    off = History('T', '', '', histories[0].time + np.timedelta64(1, 's'), histories[0].values)
    for wrong, message in ((off, 'whole steps of 3600 s'), (History('T', '', '', off.time, off.values[:, :2]), 'values have the shape')):
        with pytest.raises(EdgenbError, match=message): windows(wrong, CHANNELS, 12, 3, RULES)


def test_nothing_is_silent_and_errors_name_file_row_and_way_out(table, tmp_path):
    def read(t, **kw): t.to_csv(tmp_path/'x.csv', index=False); return read_telemetry(tmp_path/'x.csv', CHANNELS, RULES, **kw)
    text = table.assign(time=table['time'].astype(str), oil=table['oil'].astype(object))
    for wrong, message in ((table.rename(columns={'oil': 'iol'}), r"no channel iol. Did you mean oil.*ignore=\['iol'\]"), (table.drop(columns='asset'), 'no column asset'),
                           (table.rename(columns={'oil': 'oil [cubits]'}), 'no rule converts cubits to °C'), (table[['asset', 'time']].assign(x=1), 'none of the channels'), (table[:0], 'no rows'),
                           (text.assign(time='31/12/2024'), r"row 2.*'31/12/2024'.*2024-05-31T13"), (text.assign(oil='61,5'), 'decimal comma')):
        with pytest.raises(EdgenbError, match=message): read(wrong)
    for path, message in ((tmp_path/'none', 'does not exist'), (tmp_path/'empty', 'holds no')):
        (tmp_path/'empty').mkdir(exist_ok=True)
        with pytest.raises(EdgenbError, match=message): read_telemetry(path, CHANNELS)
    text.loc[5, 'time'] = 'noon'; text.loc[7, 'oil'] = 'n/k'
    (h,), report = read(text.assign(inspector='AB').drop(columns='gas').assign(asset=['T1']*239 + [None]))
    found = {f['what']: f['detail'] for f in report.findings}
    assert {'unreadable time', 'not a number', 'unknown column', 'missing channel', 'no asset', 'missing'} <= set(found) and "'n/k' in x.csv, row 9" in found['not a number'] and 'row 7' in found['unreadable time']
    assert all(f['done'] for f in report.findings) and json.loads(report.to_json())['findings'] == report.findings


def test_an_ambiguous_unit_is_refused_and_an_early_mix_up_is_seen_without_a_past():
    either = [Channel('x', 'ppm', 0, 20_000, usual=(0, 20), others=('ppb', '%'))]
    rules = Rules(confirm=3)
    t = np.arange(12)*HOUR
    def codes(values, channel): return [CODES[c] for c in clean([(t, np.asarray(values, float)[:, None])], Plan(channel, rules))[0][2][:, 0]]
    ppb = [*np.linspace(4000, 4100, 12)]
    assert codes(ppb, either) == ['unit suspected']*2 + ['unit converted']*10
    broad = [Channel('x', '°C', -300, 500, usual=(0, 50), others=('°F', 'K'))]
    assert codes([120.0 + k for k in range(12)], [Channel('x', '°C', -300, 500, usual=(-200, 60), others=('°F', 'K'))]) == ['unit unclear']*12
    assert codes([120.0 + k/10 for k in range(12)], broad) == ['unit suspected']*2 + ['unit converted']*10
    oil = [Channel('oil', '°C', -40, 160, others=('°F',), swing=10)]
    assert codes([-16 + k/10 for k in range(6)] + [3.2 + k/5 for k in range(6)], oil) == ['']*12   # 19 degrees in the cold may be either: taken as it says
    assert codes([-12 + k/10 for k in range(6)] + [10.4 + k/5 for k in range(6)], oil) == ['']*6 + ['unit suspected']*2 + ['unit converted']*4
    assert codes([5, 5.1, 5, 40, 41, 42, 43, 44, 45, 46, 47, 48], either) == ['']*12   # a real jump stays one


WARM = Channel('hot spot', '°C', -60, 250, usual=(-40, 140), others=('°F',), swing=8, stuck_hours=math.inf)

def season(rng, low, high, every, days=60):
    "A temperature (synthetic) with a season, a day, a bit of noise: seconds, °C."
    t = 1_699_920_000 + np.arange(days*86400//every)*every
    day, slow = rng.uniform(0, 10), rng.uniform(0, 12)
    middle = rng.uniform(low + day + slow, high - day - slow)
    return t, np.clip(middle + slow*np.sin(2*np.pi*(t/86400/365 + rng.random())) + day*np.sin(2*np.pi*(t/86400 + rng.random())) + rng.normal(0, 0.6, len(t)), low, high)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 600), (1, 3600), (3, 3600), (3, 10800), (6, 3600), (6, 10800), (12, 3600), (12, 10800)]), st.booleans())
def test_a_switch_to_fahrenheit_at_any_reading_is_converted_and_the_season_alone_never_is(seed, every, switched):
    rng, (hours, seconds) = np.random.default_rng(seed), every
    rules = Rules(grid_s=hours*3600)
    t, truth = season(rng, 5 if switched else -10, 60, seconds)
    at = int(rng.integers(len(t)//3, len(t)//2)) if switched else len(t)
    sent = np.where(np.arange(len(t)) < at, truth, truth*1.8 + 32)
    (steps, values, codes, _, _), = clean([(t, sent[:, None])], Plan([WARM], rules))
    names, first = [CODES[c] for c in codes[:, 0]], -(-int(t[min(at, len(t) - 1)])//rules.grid_s) - int(steps[0])
    if not switched: assert 'unit converted' not in names; return
    later = slice(first + rules.confirm + 2, None)
    mean = np.array([truth[-(-t//rules.grid_s) == g].mean() for g in steps[later]])
    assert 'unit converted' not in names[:first] and 'unit suspected' in names[first:first + 2] and set(names[later]) <= {'unit converted', 'unit suspected'}
    assert (np.abs(values[later, 0] - mean) < 2).mean() >= 0.95
    stream = Stream([WARM], 1, 1, rules)
    for n, (now, v) in enumerate(zip(t.tolist(), sent.tolist())):
        if n in (at - 1, at + 1): stream = Stream.from_bytes(stream.to_bytes())
        stream.push(now, [v])
    stream.flush()
    assert {e['what']: e['count'] for e in stream.events()} == {n: names.count(n) for n in set(names) - {''}}


def test_a_real_jump_is_taken_at_once_and_the_way_back_to_the_truth_is_not_lost():
    def run(values):
        (_, cleaned, codes, _, _), = clean([(np.arange(len(values))*HOUR, np.asarray(values, float)[:, None])], Plan([WARM], Rules(confirm=3)))
        return cleaned[:, 0].tolist(), [CODES[c] for c in codes[:, 0]]
    jump = [80.0 + k/10 for k in range(10)] + [130.0 + k/10 for k in range(10)]   # 130 °F are 54 °C: nobody was there before
    assert np.allclose(run(jump)[0], jump) and set(run(jump)[1]) == {''}
    odd = [38 + k/10 for k in range(10)] + [69] + [(38 + k/10)*1.8 + 32 for k in range(10)]   # a mean over the switch, as a gateway may send it
    assert run(odd)[1] == ['']*11 + ['unit suspected']*2 + ['unit converted']*8


def test_work_orders_that_cannot_be_placed_are_refused_with_their_rows(table, tmp_path):
    table.to_csv(tmp_path/'t.csv', index=False)
    histories, _ = read_telemetry(tmp_path/'t.csv', CHANNELS, RULES)
    when = str(histories[0].time[50])
    def orders(*lines, **kw): (tmp_path/'o.csv').write_text('asset,time,kind,mode\n' + '\n'.join(lines)); return read_orders(tmp_path/'o.csv', histories, **kw)
    assert [(o.kind, o.mode) for o in orders(f'T1,{when},Failure,leak', f'T1,{when},visit,', f'T1,{when},rundgang,', kinds={'visit': 'maintenance', 'Rundgang': None})] == [('failure', 'leak'), ('maintenance', '')]
    with pytest.raises(EdgenbError) as e: orders(f'T1,{when},failure,', f'T7,{when},failure,', 'T1,2001-01-01,failure,', 'T1,soon,failure,', f'T1,{when},fialure,')
    assert all(s in str(e.value) for s in ('4 of 5', 'row 3: no telemetry of asset T7. Did you mean T1', 'row 4', 'outside', "row 5: 'soon'", "row 6: kind 'fialure'"))
    end = histories[0].time[-1]
    assert len(orders(f'T1,{end + np.timedelta64(6, "D")},failure,')) == 1
    with pytest.raises(EdgenbError, match='outside the telemetry'): orders(f'T1,{end + np.timedelta64(8, "D")},failure,')
    with pytest.raises(EdgenbError, match='no kind repair'): orders(f'T1,{when},visit,', kinds={'visit': 'repair'})


def test_the_modules_load_numpy_only():
    code = "import sys, edgenb.telemetry, edgenb.intake, edgenb.events; print(sorted({'pandas', 'pyarrow', 'scipy', 'torch', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
