"""The agent: what it decides, that it always serves and never sticks, and that it does so as a process that is killed."""
import base64, datetime, json, os, random, re, shutil, signal, subprocess, sys, tempfile, threading, time, urllib.error, urllib.request
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import pytest
from http.client import HTTPConnection
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tinyfleet import DAY, EPOCH, NOW, Clock, Plant, Word, device_of, live, machine_of, prove_word, settled, tiny_bundle, use
from edgenb.agent import machine as machine_module
from edgenb.agent.decide import decide
from edgenb.fleet.cohorts import takes_part
from edgenb.fleet.windows import until_open, window_open
from edgenb.agent.machine import Machine, Nobody, Proof, STATES, prove, table
from edgenb.agent.serve import BODY_MAX, QUEUE, Busy, Server, http_server, inputs_of
from edgenb.agent.service import Agent, enrol, status, status_text
from edgenb.agent.storage import Device, Disk, Held, Journal, Store
from edgenb.agent.trust import Deadline, FolderSource, Unreachable
from edgenb.cli import main
from edgenb.core import EdgenbError, json_text
from edgenb.drift import Detector, fourier

ROOT = Path(__file__).resolve().parents[1]
A, B, C = 'a'*64, 'b'*64, 'c'*64
TUESDAY = datetime.datetime(2026, 6, 2, 12)


@pytest.fixture
def here():
    with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as folder: yield Path(folder)


# ---- what the campaigns ask
def campaign(**kw): return {'id': 'c1', 'name': 'toy', 'release': B, 'replaces': A, 'state': 'running', 'stage': 1, 'stages': [5, 25], 'seed': 'ab', 'strata': ['site', 'hardware'], 'cutoffs': {'*': 'f'*64}, 'agent': '0.1.0', 'windows': [], 'reason': ''} | kw
def asked(*campaigns, runs=None, model='', at=TUESDAY, tries={}, version='0.1.0'):
    journal = Journal('a', {'a': Held(runs, good=True)}, tries=tries) if runs else Journal()
    return decide({'edgenb_campaigns': 1, 'serial': 1, 'campaigns': list(campaigns)}, device_of('/x', model=model), journal, at, version)

OUT = {'*': '0'*64}
@pytest.mark.parametrize('runs, change, wanted', [
    (A, {}, B), (A, {'cutoffs': OUT}, None), (None, {'cutoffs': OUT}, A), (None, {}, B), (B, {}, None), (C, {'cutoffs': OUT}, A), (B, {'cutoffs': OUT}, None),
    (A, {'state': 'paused'}, None), (None, {'state': 'paused'}, A), (B, {'state': 'paused'}, None), (A, {'state': 'aborted'}, None), (B, {'state': 'aborted'}, None),
    (B, {'state': 'rolled-back'}, A), (A, {'state': 'rolled-back'}, None), (C, {'state': 'rolled-back'}, None), (None, {'state': 'rolled-back'}, A), (B, {'state': 'rolled-back', 'replaces': None}, None),
    (A, {'state': 'complete', 'cutoffs': OUT}, B), (None, {'state': 'complete', 'cutoffs': {}}, B), (A, {'cutoffs': {'plant-3/orin': 'f'*64, '*': '0'*64}}, B), (A, {'cutoffs': {'plant-4/orin': 'f'*64}}, None),
    (A, {'agent': '0.10.0'}, None), (A, {'state': 'hibernating'}, None), (A, {'release': '../../x'}, None), (A, {'cutoffs': None}, None), (A, {'windows': [{'from': '25:99', 'to': 'x'}]}, None)])
def test_a_campaign_moves_a_device_exactly_where_it_says(runs, change, wanted):
    d = asked(campaign(**change), runs=runs)
    assert d.release == wanted and len(d.why) > 10


def test_the_last_campaign_of_a_name_counts_and_other_names_do_not():
    assert asked(campaign(), campaign(id='c2', release=C, replaces=B), runs=A).release == C
    assert asked(campaign(), campaign(id='x', name='other', release=C), runs=A, model='toy').release == B
    d = asked(campaign(), campaign(id='x', name='other'), runs=A)
    assert d.release is None and 'enrol this device with --model' in d.why
    assert 'no campaign is about toy' in asked(campaign(name='other'), model='toy').why
    assert 'newer edgenb' in decide({'edgenb_campaigns': 2}, device_of('/x'), Journal(), TUESDAY).why


@pytest.mark.parametrize('state', ['running', 'paused', 'aborted', 'rolled-back', 'complete'])
def test_a_device_that_was_away_during_a_roll_back_leaves_the_release_whatever_came_after(state):
    first, after = campaign(state='rolled-back'), campaign(id='c2', release=C, state=state, cutoffs=OUT)
    assert asked(first, after, runs=B).release == (C if state == 'complete' else A)
    again = campaign(id='c3', state='complete')                        # the same release, tried anew and found good
    assert asked(first, again, campaign(id='c4', release=C, replaces=B, state=state, cutoffs=OUT), runs=B).release == (C if state == 'complete' else None)


def test_a_release_that_failed_here_waits_for_another_campaign():
    tries = {B: {'count': 3, 'campaign': 'c1', 'reason': 'it is sick', 'quarantined': True}}
    assert asked(campaign(), runs=A, tries=tries).release is None and 'it is sick' in asked(campaign(), runs=A, tries=tries).why
    assert asked(campaign(id='c2'), runs=A, tries=tries).release == B


def test_a_share_of_devices_takes_part_and_a_larger_share_holds_the_smaller_one():
    devices = [replace(device_of('/x'), id=f'{i:032x}') for i in range(2000)]
    cut = lambda share: {'seed': 's', 'strata': ['site', 'hardware'], 'cutoffs': {'*': f'{int(share*16**8):08x}' + 'f'*56}}
    few, more = ({d.id for d in devices if takes_part(cut(s), asdict(d))} for s in (0.05, 0.25))
    assert few < more and 60 < len(few) < 140


@pytest.mark.parametrize('days, start, end, at, wanted', [
    ('mon-sun', '22:00', '04:00', '2026-06-02T23:00', True), ('mon-sun', '22:00', '04:00', '2026-06-02T03:59', True), ('mon-sun', '22:00', '04:00', '2026-06-02T04:00', False), ('mon-sun', '22:00', '04:00', '2026-06-02T12:00', False),
    ('sat', '22:00', '04:00', '2026-06-07T03:00', True), ('sat', '22:00', '04:00', '2026-06-06T03:00', False), ('mon-fri', '08:00', '17:00', '2026-06-06T09:00', False), ('fri-mon', '08:00', '17:00', '2026-06-07T09:00', True), ('sat,sun', '00:00', '00:00', '2026-06-07T23:59', True)])
def test_windows_are_in_the_devices_time_and_pass_midnight(days, start, end, at, wanted):
    w = [{'days': days, 'from': start, 'to': end}]
    at = datetime.datetime.fromisoformat(at)
    assert window_open(w, at) == wanted and (until_open(w, at) == 0) == wanted
    assert wanted or window_open(w, at + datetime.timedelta(seconds=until_open(w, at) + 300))


# ---- the table
def test_every_state_has_a_timeout_and_a_next_state_and_leads_to_rest():
    for name, s in STATES.items():
        assert s.timeout_s > 0 and {s.success, s.nothing, s.failure, s.timeout} <= set(STATES) and hasattr(Machine, f'_{name.lower()}')
        seen, todo = set(), [name]
        while todo:
            n = todo.pop()
            if n not in seen: seen.add(n); todo += [STATES[n].success, STATES[n].nothing, STATES[n].failure, STATES[n].timeout]
        assert 'IDLE' in seen
    assert all(r.count('|') == 8 for r in table().splitlines())


def test_the_page_about_the_agent_shows_the_table_of_the_code():
    assert table() in (ROOT/'docs/howto/agent.md').read_text(encoding='utf-8')


def test_a_state_that_takes_too_long_ends_in_the_state_the_table_names(here):
    plant, clock = Plant(here/'repo'), Clock()
    v1 = tiny_bundle(here/'v1'); plant.release(here/'v1'); plant.campaign(v1)
    class Slow(FolderSource):
        def _read(self, fd, offset):
            clock.go(700 if 'blobs' not in os.readlink(f'/proc/self/fd/{fd}') else 5*3600)
            yield from super()._read(fd, offset)
    m = machine_of(here/'device', plant, clock, source=Slow(plant.path))
    m.run_once()
    assert m.state == 'BACK_OFF' and 'longer than 600 s' in m.last['CHECK']


# ---- serving while it updates
def test_thousands_of_requests_during_updates_and_a_roll_back_get_an_answer_each(here):
    plant, clock = Plant(here/'repo'), Clock()
    v = {n: tiny_bundle(here/n, n) for n in ('v1', 'v2')}
    for n in v: plant.release(here/n)
    plant.campaign(v['v1'], state='complete')
    m = machine_of(here/'device', plant, clock)
    live(m, clock, 10**6, settled)
    http = http_server(m.server, 0)
    threading.Thread(target=http.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
    url, over, wrong, seen = f'http://127.0.0.1:{http.server_address[1]}/v1/predict', threading.Event(), [], []
    def ask():
        while not over.is_set():
            try:
                with urllib.request.urlopen(urllib.request.Request(url, b'picture'), timeout=20) as r: answer = json.load(r)
                if v[answer['answers'][0]['label']] != answer['model']: wrong.append(answer)
                seen.append(answer['answers'][0]['label'])
            except Exception as e: wrong.append(repr(e))
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads: t.start()
    for round_ in range(6):
        plant.campaign(v['v2'], v['v1'], state='complete' if round_ % 2 == 0 else 'rolled-back')
        live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == (v['v2'] if round_ % 2 == 0 else v['v1']))
    time.sleep(0.2); over.set()
    for t in threads: t.join()
    http.shutdown(); http.server_close()
    assert not wrong, wrong[:3]
    assert len(seen) > 50 and set(seen) == {'v1', 'v2'}


def test_where_memory_is_short_the_old_model_leaves_first_and_no_request_is_dropped(here):
    for n in ('a', 'b'): tiny_bundle(here/n, n)
    alive, most = [], []
    class Counted(Word):
        def __init__(self, folder): super().__init__(folder); alive.append(1); most.append(len(alive)); time.sleep(0.05)
        def __del__(self): alive.pop()
    s = Server(Counted, available=lambda: 10)
    s.serve(here/'a', 'A')
    over, answers, errors = threading.Event(), [], []
    def ask():
        while not over.is_set():
            try: answers.append(s.predict([b'x'])[0]['label'])
            except Exception as e: errors.append(e)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads: t.start()
    for n in 'babab': s.serve(here/n, n.upper(), need_mb=100)
    over.set()
    for t in threads: t.join()
    assert not errors and set(answers) == {'a', 'b'} and max(most) == 1 and 'stop-start' in s.how
    s.available = lambda: 1000
    s.serve(here/'a', 'A', need_mb=100)
    assert max(most) == 2 and 'blue-green' in s.how


def test_a_model_that_does_not_load_leaves_the_old_one_serving_in_either_way(here):
    for n in ('a', 'b'): tiny_bundle(here/n, n)
    def load(folder):
        if folder.name == 'b': raise RuntimeError('no such operator')
        return Word(folder)
    for memory in (10, 1e9):
        s = Server(load, available=lambda: memory)
        s.serve(here/'a', 'A')
        with pytest.raises(RuntimeError): s.serve(here/'b', 'B', need_mb=100)
        assert s.predict([b'x'])[0]['label'] == 'a' and s.digest == 'A'


def test_more_requests_than_the_queue_holds_are_told_to_come_again(here):
    tiny_bundle(here/'a', 'a')
    hold, going = threading.Event(), []
    class Slow(Word):
        def predict(self, inputs): going.append(1); hold.wait(10); return super().predict(inputs)
    s = Server(Slow); s.serve(here/'a', 'A')
    results = []
    def ask():
        try: results.append(s.predict([b'x'])[0]['label'])
        except Busy: results.append('busy')
    threads = [threading.Thread(target=ask) for _ in range(QUEUE + 5)]
    for t in threads: t.start()
    while results.count('busy') < 5: time.sleep(0.01)
    hold.set()
    for t in threads: t.join()
    assert results.count('busy') == 5 and results.count('a') == QUEUE


def test_the_http_api_answers_programs_of_this_device_and_refuses_the_rest(here):
    tiny_bundle(here/'a', 'a')
    seen = []
    s = Server(Word, lambda *told: seen.append(told))
    http = http_server(s, 0, lambda: {'model': s.digest})
    assert http.server_address[0] == '127.0.0.1'
    threading.Thread(target=http.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
    base = f'http://127.0.0.1:{http.server_address[1]}'
    def get(path, data=None, **headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(base + path, data, headers={k.replace('_', '-'): v for k, v in headers.items()}), timeout=10) as r: return r.status, json.load(r)
        except urllib.error.HTTPError as e: return e.code, json.loads(e.read())
    assert get('/healthz')[0] == 503 and get('/v1/predict', b'x')[0] == 503
    s.serve(here/'a', 'A')
    assert get('/healthz') == (200, {'ok': True, 'model': 'A'}) and get('/v1/model')[1] == {'model': 'A'}
    assert get('/v1/predict', b'x')[1]['answers'][0]['label'] == 'a'
    many = json.dumps({'inputs': [{'base64': base64.b64encode(b'x').decode()}, {'text': '/etc/passwd'}, {'values': [[1, None], [2.5, 3]]}]}).encode()
    assert len(get('/v1/predict', many, Content_Type='application/json')[1]['answers']) == 3
    for bad in (b'', b'{', b'[]', b'{"inputs": []}', b'{"inputs": ["/etc/passwd"]}', b'{"inputs": [{"values": [[1],[1,2]]}]}', b'{"inputs": [{"base64": "!"}]}', json.dumps({'inputs': [{'text': 'x'}]*65}).encode()):
        assert get('/v1/predict', bad, Content_Type='application/json')[0] == 400
    assert get('/v1/predict', b'x', Origin='https://evil.example')[0] == 403 and get('/healthz', Host='evil.example')[0] == 403
    assert get('/nothing')[0] == 404 and all(get(p)[0] == 405 and 'POST' in get(p)[1]['error'] for p in ('/v1/predict', '/v1/outcome'))
    for model, correct in (('A', True), ('A', False)): assert get('/v1/outcome', json.dumps({'model': model, 'correct': correct}).encode()) == (200, {'ok': True})
    for bad in (b'', b'{', b'[]', b'{"correct": true}', b'{"model": "A", "correct": 1}', b'{"model": "A", "correct": true, "why": "a note"}', b'{"model": "B", "correct": true}', b'{"model": "", "correct": true}'):
        assert get('/v1/outcome', bad)[0] == 400
    assert [n for n in seen if 'outcome' in n[0]] == [('edgenb.outcome.count', 1, 'A'), ('edgenb.outcome.error.count', 1, 'A'), ('edgenb.outcome.count', 1, 'A')]     # the part before its whole
    c = HTTPConnection('127.0.0.1', http.server_address[1])
    c.putrequest('POST', '/v1/predict'); c.putheader('Content-Length', str(BODY_MAX + 1)); c.endheaders()
    assert c.getresponse().status == 413
    http.shutdown(); http.server_close()


class Ears:
    "A bundle whose input is its embedding."
    def __init__(self, reference): self.detector = Detector.fit(reference, window=20, windows_per_month=100, false_alarms_per_month=1, scales=(1,), seed=1)
    def answer(self, inputs): return {'embedding': np.stack(inputs), 'score': np.full(len(inputs), 0.9)}
    def told(self, a): return [{'decision': 'accept', 'label': 'a', 'score': float(s)} for s in a['score']]


def test_what_a_model_sees_is_held_against_its_reference_and_told_as_sums(here):
    rng = np.random.default_rng(3)
    tiny_bundle(here/'a', 'a'); tiny_bundle(here/'b', 'b')
    ears, seen = Ears(rng.normal(size=(3000, 4))), []
    s = Server(lambda folder: ears if folder.name == 'a' else Word(folder), lambda *told: seen.append(told))
    s.serve(here/'a', 'A')
    same = rng.normal(size=(100, 4))
    for x in same: s.predict([x])
    sums = [v for n, v, model in seen if n == 'edgenb.drift.sums' and model == 'A']
    assert np.allclose(np.sum(sums, 0), fourier(same, ears.detector.directions).sum(0)) and not [n for n in seen if n[0] == 'edgenb.drift.alarm.count']
    for x in rng.normal(3, size=(100, 4)): s.predict([x])
    alarms = [v for n, v, _ in seen if n == 'edgenb.drift.alarm.count']
    statistic = [v for n, v, _ in seen if n == 'edgenb.drift.statistic']
    assert alarms and len(statistic) == len(alarms) and max(statistic) > 1e4
    s.predict([np.full(4, np.nan)])                                    # no number: decided, not counted as drift
    assert len([n for n in seen if n[0] == 'edgenb.drift.sums']) == 200 and len([n for n in seen if n[0] == 'edgenb.decision.count']) == 201
    s.serve(here/'b', 'B'); s.predict([b'x'])                          # a model without a detector
    assert seen[-1][2] == 'B' and len([n for n in seen if n[0] == 'edgenb.drift.sums']) == 200
    s.outcome(False, 'A')                                              # the one before: its label came late
    assert seen[-2:] == [('edgenb.outcome.error.count', 1, 'A'), ('edgenb.outcome.count', 1, 'A')]


def test_text_in_a_request_is_never_a_path():
    assert inputs_of(json.dumps({'inputs': [{'text': '/etc/passwd'}]}).encode(), 'application/json') == [b'/etc/passwd']
    x, = inputs_of(json.dumps({'inputs': [{'values': [[1, None]]}]}).encode(), 'application/json')
    assert np.isnan(np.load(__import__('io').BytesIO(x))[0, 1])


# ---- a trial, windows, no network, by hand
def ready(here, *names, clock=None, device=None, **kw):
    plant, clock = Plant(here/'repo'), clock or Clock()
    plant.days |= dict.fromkeys(plant.days, 365)
    v = {n: tiny_bundle(here/n, n) for n in ('v1', *names)}
    for i, n in enumerate(v, 1): plant.release(here/n, i)
    plant.campaign(v['v1'], state='complete')
    m = machine_of(here/'device', plant, clock, device=device and device(plant.path), **kw)
    live(m, clock, 10**6, settled)
    return plant, clock, v, m


def test_a_model_that_takes_the_process_down_on_trial_is_given_up_without_a_word_from_it(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.campaign(v['v2'], v['v1'], id='c2')
    live(m, clock, 10**6, lambda m: m.state == 'TRIAL' and m.trial_began is not None)
    for n in range(5):                       # the process is gone each time before a minute is over
        m = machine_of(here/'device', plant, clock); m.step()
        if m.state == 'ROLL_BACK': m.step(); break
    assert n == 3 and use(m) == 'v1' and m.journal.tries[v['v2']]['count'] == 1 and 'ended 3 times' in m.journal.tries[v['v2']]['reason']


def test_the_status_tells_of_a_healthy_trial_no_failure_and_of_a_roll_back_by_hand_that_it_was_one(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.campaign(v['v2'], v['v1'], id='c2')
    live(m, clock, 10**6, lambda m: m.state == 'TRIAL' and m.trial_began is not None)
    assert m.journal.tries[v['v2']]['count'] == 1 and m.status()['failed_here'] == {}      # counted before it is made
    m.roll_back_by_hand()
    words = status_text(m.status() | {'site': 's', 'hardware': 'h', 'repository': 'r', 'running': True})
    assert f"other slot: toy 2 ({v['v2'][:12]}…), rolled back by hand\n" in words and f"not taken: {v['v2'][:12]}…" in words


def test_a_model_in_use_that_begins_to_fail_gives_way_to_the_one_before(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.campaign(v['v2'], v['v1'], id='c2')
    live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])
    m.server._now.model.word = 'crash'
    for _ in range(3): use(m)
    assert m.rest() == 0
    for _ in range(4): m.step()
    assert use(m) == 'v1' and m.journal.tries[v['v2']]['quarantined'] and 'in a row' in m.journal.tries[v['v2']]['reason']
    plant.campaign(v['v2'], v['v1'], id='c3')
    live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])


def test_an_update_is_fetched_outside_its_window_and_switched_inside_even_without_network(here):
    at = datetime.datetime(2026, 6, 1, 12).timestamp()   # local noon
    plant, clock, v, m = ready(here, 'v2', clock=Clock(max(at, NOW)))
    plant.now = datetime.datetime.fromtimestamp(clock.now, datetime.timezone.utc)
    plant.campaign(v['v2'], v['v1'], id='c2', windows=[{'days': 'mon-sun', 'from': '22:00', 'to': '23:00'}])
    live(m, clock, 3600)
    other = m.journal.held(m.journal.other())
    assert use(m) == 'v1' and other.digest == v['v2'] and not other.proven and 'waits for its window' in m.last['STAGE']
    shutil.move(plant.path, here/'gone')          # the line is dead from now on
    live(m, clock, 2*86400, lambda m: settled(m) and m.journal.serving().digest == v['v2'])
    assert datetime.datetime.fromtimestamp(clock.now).hour in (22, 23) and use(m) == 'v2'


def test_a_decision_from_before_the_line_went_dead_holds_only_until_the_signatures_expire(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.days |= dict.fromkeys(plant.days, 2)
    plant.campaign(v['v2'], v['v1'], id='c2', windows=[{'days': 'sun', 'from': '01:00', 'to': '02:00'}])   # six days away
    live(m, clock, 3600)
    assert m.journal.plan
    shutil.move(plant.path, here/'gone')
    live(m, clock, 10*86400)
    assert use(m) == 'v1'


def test_a_device_uses_the_network_only_when_it_may(here):
    plant = Plant(here/'repo'); clock = Clock(datetime.datetime(2026, 6, 1, 12).timestamp())
    m = machine_of(here/'device', plant, clock, device=device_of('http://127.0.0.1:1', connect=[{'days': 'mon-sun', 'from': '03:00', 'to': '04:00'}]))
    asked = []
    def look(deadline):
        m.checked = m.steady(); asked.append(datetime.datetime.fromtimestamp(clock.now).hour)
        return 'nothing', ''
    m._check = look
    live(m, clock, 3*86400)
    assert set(asked) == {3} and len(asked) >= 3


def test_a_roll_back_by_hand_holds_until_another_campaign(here):
    plant, clock, v, m = ready(here, 'v2')
    with pytest.raises(EdgenbError, match='no earlier model'): m.roll_back_by_hand()
    plant.campaign(v['v2'], v['v1'], id='c2')
    live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])
    m = machine_of(here/'device', plant, clock); m.step()
    assert 'by hand' in m.roll_back_by_hand() and use(m) == 'v1'
    live(m, clock, 86400)
    assert use(m) == 'v1' and 'rolled back by hand' in m.why
    plant.campaign(v['v2'], v['v1'], id='c3'); live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])


def test_a_delta_is_used_where_the_device_has_what_it_starts_from(here):
    from edgenb.fleet.delta import make_delta
    rng = np.random.default_rng(0)
    old = rng.integers(0, 255, 300_000, np.uint8)
    new = old.copy(); new[rng.integers(0, len(new), 2000)] += 1
    plant, clock = Plant(here/'repo'), Clock()
    d1, d2 = tiny_bundle(here/'v1', 'v1', weights=old.tobytes()), tiny_bundle(here/'v2', 'v2', weights=new.tobytes())
    plant.release(here/'v1', 1); plant.release(here/'v2', 2, deltas=[make_delta(here/'v1', here/'v2', plant.path/'blobs')])
    plant.campaign(d1, state='complete')
    m = machine_of(here/'device', plant, clock)
    live(m, clock, 10**6, settled)
    plant.campaign(d2, d1, id='c2')
    live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == d2)
    assert '(delta)' in m.last['FETCH'] and float(re.search(r'of ([\d.]+) MB', m.last['FETCH'])[1]) < 0.05
    assert (m.store.slot(m.journal.active)/'weights').read_bytes() == new.tobytes()


# ---- what must not block a good release, nor stop the agent
def test_a_device_offline_leaves_a_release_alone_that_takes_it_down_in_its_health_check(here):
    plant, clock, v, m = ready(here, 'sick', clock=Clock(max(datetime.datetime(2026, 6, 1, 12).timestamp(), NOW)))
    plant.campaign(v['sick'], v['v1'], id='c2', windows=[{'days': 'mon-sun', 'from': '22:00', 'to': '23:00'}])
    live(m, clock, 3600)
    count = []
    class PowerCut(BaseException): pass
    def down(*a): count.append(1); raise PowerCut
    for night in range(6):
        m = machine_of(here/'device', plant, clock, prove=down, source=FolderSource(here/'gone'))   # it starts again
        try: live(m, clock, 86400)
        except PowerCut: clock.go(60)
    assert len(count) == 3 and use(m) == 'v1' and 'not tried again' in m.last['CHECK']


def test_tries_that_keep_failing_come_further_and_further_apart_but_not_where_something_arrives(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.campaign(v['v2'], v['v1'], id='c2')
    sound = {c['stored'] for f in plant.releases[v['v1']]['files'] for c in f['chunks']}
    for p in (plant.path/'blobs').rglob('*'):
        if p.is_file() and p.name not in sound: p.write_bytes(b'x'*p.stat().st_size)      # a damaged mirror
    tried, real = [], m._blob
    m._blob = lambda *a: (tried.append(clock.now), real(*a))
    live(m, clock, 86400, most=100_000)
    assert 5 < len(tried) < 30 and tried[-1] - tried[-2] > 3*3600
    plant.campaign(v['v2'], v['v1'], id='c3')
    begun = clock.now
    def drips(sha, n, deadline): m.failures = 0; raise Unreachable('broke off after a blob')
    m._blob = drips
    m.poll(); live(m, clock, 3600)
    assert m.failures == 1 and m.due - clock.steady_now < 120


def test_a_service_that_is_stopped_during_a_health_check_blames_no_release(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.campaign(v['v2'], v['v1'], id='c2')
    for _ in range(5):
        stopped = []
        def prove(folder, deadline, memory_mb=0): stopped.append(1); return Proof(False, 'the health check: the agent was asked to stop')
        m = machine_of(here/'device', plant, clock, prove=prove, stopped=lambda: bool(stopped)); m.run_once()
        assert stopped and not m.journal.tries
    m = machine_of(here/'device', plant, clock)
    live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])


def test_a_slow_disk_delays_a_model_and_does_not_take_it_away(here, monkeypatch):
    plant, clock, v, m = ready(here, 'v2')
    real = Store.holds
    monkeypatch.setattr(Store, 'holds', lambda self, slot: (clock.go(400), real(self, slot))[1])   # a large model on a worn card
    m = machine_of(here/'device', plant, clock); m.step()
    assert use(m) == 'v1'
    plant.campaign(v['v2'], v['v1'], id='c2')
    live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])
    assert not m.journal.tries


def test_a_journal_that_cannot_be_read_at_once_is_read_again_before_anything_else(here):
    plant, clock, v, m = ready(here, 'v2')
    m = machine_of(here/'device', plant, clock)
    plant.campaign(v['v2'], v['v1'], id='c2')
    real, n = m.store.load, []
    def load():
        n.append(1)
        if len(n) == 1: raise OSError(5, 'Input/output error')
        return real()
    m.store.load, m._check = load, lambda deadline: pytest.fail('it looked at the repository without its journal') if m.journal == Journal() else ('nothing', '')
    for _ in range(6): m.step(); clock.go(m.rest())
    assert use(m) == 'v1'


def test_a_roll_back_by_hand_holds_although_another_campaign_has_named_the_release_meanwhile(here):
    plant, clock, v, m = ready(here, 'v2')
    for id in ('c2', 'c3'): plant.campaign(v['v2'], v['v1'], id=id); live(m, clock, 7200, lambda m: settled(m) and m.journal.serving().digest == v['v2'])
    live(m, clock, 7200)
    m.roll_back_by_hand(); live(m, clock, 86400)
    assert use(m) == 'v1' and 'rolled back by hand' in m.why


def test_a_roll_back_by_hand_that_cannot_be_done_leaves_what_serves(here):
    plant, clock, v, m = ready(here, 'v2')
    plant.campaign(v['v2'], v['v1'], id='c2'); live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v2'])
    real, m.server.load = m.server.load, lambda folder: (_ for _ in ()).throw(MemoryError())
    before = m.store.load()
    with pytest.raises(MemoryError): m.roll_back_by_hand()
    assert m.store.load() == before and use(m) == 'v2'


def test_a_model_that_fails_on_trial_is_left_even_if_the_one_before_cannot_be_loaded_at_once(here):
    plant, clock, v, m = ready(here, 'crash')
    plant.campaign(v['crash'], v['v1'], id='c2')
    live(m, clock, 10**6, lambda m: m.state == 'TRIAL' and m.trial_began is not None)
    real, n = m.server.load, []
    def load(folder):
        n.append(1)
        if len(n) == 1: raise MemoryError('not now')
        return real(folder)
    m.server.load = load
    live(m, clock, 3600, lambda m: m.server.digest == v['v1'])
    assert use(m) == 'v1'


def test_windows_that_cannot_be_read_are_refused_by_a_device_without_a_model_too(here):
    plant, clock = Plant(here/'repo'), Clock()
    v1 = tiny_bundle(here/'v1'); plant.release(here/'v1')
    for windows in ([{'days': 'mon'}], [{'days': 'mon-sun', 'from': '00:00', 'to': '00:00'}, {'days': 'never'}]):
        plant.campaign(v1, windows=windows)
        m = machine_of(here/'device', plant, clock)
        live(m, clock, 7200)
        assert 'windows cannot be read' in m.why
    m.journal = replace(m.journal, plan={'windows': [{'days': 'mon'}]})     # as an older agent may have written it
    m.go('BACK_OFF', ''); assert m.rest() > 0


def running(here, plant, **device):
    "A device as it was left by an agent that ran."
    (here/'device/device.json').write_text(json_text(asdict(device_of(plant.path, **device)))); (here/'device/root.json').write_bytes(plant.root)
    return here/'device'


def test_an_agent_starts_on_a_disk_that_is_read_only_as_a_whole(here, monkeypatch):
    plant, clock, v, m = ready(here)
    root = running(here, plant)
    for lock in (True, False):
        (root/'lock').write_text('1') if lock else (root/'lock').unlink()
        import builtins
        real = {'open': builtins.open, 'os': os.open}
        def refused(path): raise OSError(30, 'Read-only file system', str(path))
        with monkeypatch.context() as mp:
            mp.setattr(builtins, 'open', lambda f, mode='r', *a, **k: refused(f) if str(f).startswith(str(here)) and set(mode) & set('wax+') else real['open'](f, mode, *a, **k))
            mp.setattr(os, 'open', lambda f, flags, *a, **k: refused(f) if str(f).startswith(str(here)) and flags & (os.O_WRONLY | os.O_RDWR) else real['os'](f, flags, *a, **k))
            with Agent(root, load=Word, prove=prove_word, clock=clock) as agent: assert agent.predict([b'x'])[0]['label'] == 'v1'


def test_telemetry_that_cannot_be_kept_does_not_keep_the_agent_from_starting(here, monkeypatch, capsys):
    from edgenb.agent import service
    from edgenb.fleet import reporter
    plant, clock, v, m = ready(here)
    root = running(here, plant)
    monkeypatch.setattr(reporter, 'outbox_at', lambda *a: (_ for _ in ()).throw(EdgenbError('the outbox cannot be used')))
    monkeypatch.setattr(Agent, 'run', lambda self: None); monkeypatch.setattr(signal, 'signal', lambda *a: None)
    monkeypatch.setattr(service, 'Server', lambda load, observe: Server(Word, observe))
    service.run(root, 0)
    said = capsys.readouterr()
    assert f'serves {v["v1"][:12]}' in said.out and 'it decides, and reports nothing until its next start: the outbox cannot be used' in said.err


def test_a_stick_that_comes_during_a_trial_is_read_when_it_is_over_and_no_request_stops_the_agent(here):
    plant, clock, v, m = ready(here, 'v2', 'v3')
    root = running(here, plant, trial_s=100)
    plant.campaign(v['v2'], v['v1'], id='c2')
    with Agent(root, load=Word, prove=prove_word, clock=clock, steady=clock.steady) as agent:
        live(agent.machine, clock, 10**6, lambda m: m.state == 'TRIAL' and m.trial_began is not None)
        shutil.copytree(plant.path, here/'stick')
        stick = Plant.__new__(Plant); stick.__dict__ |= plant.__dict__ | {'path': here/'stick'}
        stick.campaign(v['v3'], v['v2'], id='c3')
        (root/'request.json').write_text(json.dumps({'do': 'poll', 'usb': str(here/'stick')}))
        agent.asked(); assert agent.machine.state == 'TRIAL' and (root/'request.json').exists()
        live(agent.machine, clock, 10**6, settled)
        agent.asked(); assert not (root/'request.json').exists()
        live(agent.machine, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == v['v3'])
        agent.machine.save = lambda **kw: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
        (root/'request.json').write_text('{"do": "rollback"}')
        agent.asked()
        assert 'the disk refused' in agent.machine.why


def test_a_label_may_come_after_the_agent_was_started_again(here):
    plant, clock, v, m = ready(here, 'v2')
    seen = []
    with Agent(running(here, plant), observe=lambda *a: seen.append(a), load=Word, prove=prove_word, clock=clock) as agent:
        agent.outcome(False, v['v1'])
        with pytest.raises(EdgenbError, match='decided nothing here'): agent.outcome(True, v['v2'])
    assert seen == [('edgenb.outcome.error.count', 1, v['v1']), ('edgenb.outcome.count', 1, v['v1'])]     # the part before its whole


def test_a_long_request_keeps_its_model_where_there_is_no_memory_for_two(here, monkeypatch):
    from edgenb.agent import serve
    monkeypatch.setattr(serve.Server._drain, '__defaults__', (0.2,))
    for n in ('a', 'b'): tiny_bundle(here/n, n)
    hold, begun, answers = threading.Event(), threading.Event(), []
    class Slow(Word):
        def predict(self, inputs): begun.set(); hold.wait(10); return super().predict(inputs)
    s = Server(Slow, available=lambda: 10); s.serve(here/'a', 'A')
    t = threading.Thread(target=lambda: answers.append(s.predict([b'x', b'y']))); t.start(); begun.wait(10)
    with pytest.raises(Busy): s.serve(here/'b', 'B', need_mb=100)
    hold.set(); t.join()
    assert [a['label'] for a in answers[0]] == ['a', 'a'] and s.digest == 'A' and not s.trouble()
    s.serve(here/'b', 'B', need_mb=100); assert s.digest == 'B'


def test_input_that_is_no_window_is_the_inputs_fault_and_costs_no_model(tmp_path):
    from test_golden import make_bundle, window_pipeline
    s = Server(); s.serve(make_bundle(tmp_path/'w', window_pipeline(), seed=3), 'W')
    magic = lambda header: b'\x93NUMPY\x01\x00' + (n := len(header) + 1).to_bytes(2, 'little') + header + b'\n'
    for bad in (b'x', magic(b"{'descr': '<f4', 'fortran_order': False, 'shape': ((3, 32), }"), magic(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000000, 32), }"), magic(b"{'descr': '<f4', 'fortran_order': False, 'shape': ("), magic(b'{[')):
        for _ in range(3):
            with pytest.raises(EdgenbError, match='not an .npy file'): s.predict([bad])
    assert not s.trouble()


@pytest.mark.parametrize('change', [{'poll_s': '900'}, {'poll_s': 0}, {'trial_s': None}, {'tries': True}, {'site': 3}, {'connect': ['mon']}, {'connect': [{'days': 'mon', 'from': '8', 'to': '9'}]}, {'colour': 1}])
def test_a_mistyped_device_file_is_said_in_words(change, here):
    from edgenb.agent.storage import load_device
    here.joinpath('device.json').write_text(json_text(asdict(device_of('/x')) | change))
    with pytest.raises(EdgenbError): load_device(here)


# ---- never without a model, never stuck: hypothesis plays the operator, the network, the disk and the mains
class Failing(Disk):
    "Fails when told to."
    left = None
    def _maybe(self):
        if self.left is None: return
        self.left -= 1
        if self.left < 0: raise OSError(28, 'No space left on device')
    def write(self, *a, **kw): self._maybe(); super().write(*a, **kw)
    def rename(self, *a): self._maybe(); super().rename(*a)


class AgentMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None)
        self.here = Path(self.folder.name)
        self.plant, self.clock, self.disk = Plant(self.here/'repo'), Clock(), Failing()
        self.plant.days |= dict.fromkeys(self.plant.days, 3650)
        self.words = {tiny_bundle(self.here/n, n): n for n in ('v1', 'v2', 'v3', 'sick', 'crash')}
        for i, n in enumerate(self.words.values(), 1): self.plant.release(self.here/n, i)
        self.digests = {n: d for d, n in self.words.items()}
        self.network, self.number, self.named, self.had = True, 0, set(), False
        self.ask('v1', None, 'complete')
        self.start()
        live(self.m, self.clock, 10**6, settled)
        self.had = True

    def teardown(self):
        if hasattr(self, 'folder'): self.folder.cleanup()

    def start(self):
        world = self
        class Line(FolderSource):
            def pieces(self, url, offset):
                if not world.network: raise Unreachable('the line is dead')
                return super().pieces(url, offset)
        self.m = machine_of(self.here/'device', self.plant, self.clock, disk=self.disk, source=Line(self.plant.path))

    def ask(self, release, replaces, state):
        self.number += 1
        self.wanted = (release, replaces, state)
        self.named |= {release, replaces}
        self.plant.campaign(self.digests[release], replaces and self.digests[replaces], state=state, id=f'c{self.number}')

    @rule(release=st.sampled_from(['v1', 'v2', 'v3', 'sick', 'crash']), replaces=st.sampled_from(['v1', 'v2']), state=st.sampled_from(['running', 'paused', 'aborted', 'complete', 'rolled-back']))
    def campaign(self, release, replaces, state):
        if release != replaces: self.ask(release, replaces, state)

    @rule(state=st.sampled_from(['running', 'paused', 'aborted', 'complete', 'rolled-back']))
    def change(self, state):
        self.wanted = (*self.wanted[:2], state)
        self.plant.list[-1]['state'] = state; self.plant.publish()

    @rule(n=st.integers(1, 12))
    def work(self, n):
        for _ in range(n):
            self.m.step(); use(self.m)
            self.clock.go(self.m.rest()*0.7)

    @rule(hours=st.integers(1, 48))
    def wait(self, hours): self.clock.go(hours*3600)

    @rule(on=st.booleans())
    def line(self, on): self.network = on

    @rule(left=st.one_of(st.none(), st.integers(0, 30)))
    def fill_disk(self, left): self.disk.left = left

    @rule(after=st.integers(0, 4))
    def lose_power(self, after):
        for _ in range(after): self.m.step()
        self.start(); self.m.step()

    @rule()
    def by_hand(self):
        try: self.m.roll_back_by_hand(); self.named |= set(self.words.values())
        except (EdgenbError, OSError): pass

    @rule(years=st.sampled_from([-30, -1, 1]))
    def turn_clock(self, years): self.clock.now = max(0.0, self.clock.now + years*365*86400)

    @invariant()
    def something_good_serves(self):
        if not getattr(self, 'had', False) or self.m.state == 'START': return
        label = use(self.m)
        assert label in ('v1', 'v2', 'v3') or label == 'Failed' and self.m.state in ('TRIAL', 'ROLL_BACK', 'IDLE', 'BACK_OFF', 'CHECK', 'START', 'COMMIT'), (label, self.m.state, self.m.why)
        assert label != 'sick'

    @invariant()
    def what_serves_was_named_by_a_signed_campaign(self):
        if getattr(self, 'had', False) and self.m.server.digest: assert self.words[self.m.server.digest] in self.named

    @invariant()
    def it_is_never_stuck(self):
        "With the line up and the disk well it comes to rest on what was asked, or has said why not."
        if not getattr(self, 'had', False) or not self.network or self.disk.left is not None: return
        self.look = getattr(self, 'look', 0) + 1
        if self.look % 4: return     # the states between are wanted too
        self.m.poll()
        asked = self.clock.steady_now
        def rests(m): return settled(m) and m.checked > asked and m.before in ('CHECK', 'COMMIT')   # not between two tries
        live(self.m, self.clock, 30*86400, rests)
        assert rests(self.m), (self.m.state, self.m.why, self.m.last)
        held, (release, replaces, state) = self.m.journal.serving(), self.wanted
        assert self.m.store.holds(self.m.journal.active) and use(self.m) == self.words[held.digest]
        if state in ('running', 'complete') and not (failed := self.m.journal.tries.get(self.digests[release], {})).get('quarantined'): assert held.digest == self.digests[release], (self.m.why, failed)
        assert self.words[held.digest] != 'sick'      # ('crash' may stay as long as nobody asks it anything)
        if state == 'rolled-back': assert held.digest != self.digests[release] or replaces is None or self.digests[replaces] in self.m.journal.tries

AgentMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestAgentMachine = AgentMachine.TestCase


# ---- a real process
def proc(root, port=0):
    p = subprocess.Popen([sys.executable, str(ROOT/'tests/agentproc.py'), str(root), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': f"{ROOT}{os.pathsep}{ROOT/'tests'}"})
    return p

def kills(here, rounds, seed=0):
    "Kill a real agent at random moments of an update until it is through; returns how often, and whether the journal ever lied."
    from test_fleet_crash import lies
    plant = Plant(here/'repo', datetime.datetime.now(datetime.timezone.utc))
    v = {n: tiny_bundle(here/n, n, weights=np.random.default_rng(i).bytes(1_500_000)) for i, n in enumerate(('v1', 'v2'))}
    for n in v: plant.release(here/n)
    plant.campaign(v['v1'], state='complete')
    (here/'root.json').write_bytes(plant.root)
    enrol(here/'device', here/'root.json', str(plant.path), 'plant-3', 'orin', poll_s=1, trial_s=1, tries=1000, reserve_mb=0)
    rng, count, serving = random.Random(seed), 0, lambda: Store(here/'device').load().serving()
    for n in ('v1', 'v2'):
        plant.campaign(v[n], v['v1'] if n != 'v1' else None, state='complete', id=n)
        for _ in range(rounds):
            p = proc(here/'device')
            p.stdout.readline() if rng.random() < 0.7 else None
            time.sleep(rng.random()*0.6)
            p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close(); p.stderr.close()
            count += 1
            assert not lies(here/'device')
        p = proc(here/'device')
        end = time.monotonic() + 60
        while not ((held := serving()) and held.digest == v[n] and held.good):
            assert time.monotonic() < end and p.poll() is None, (p.poll() is not None and p.stderr.read(), status(here/'device'))
            time.sleep(0.05)
        p.send_signal(signal.SIGTERM)
        assert p.wait(20) == 0, p.stderr.read()
        p.stdout.close(); p.stderr.close()
    return count


def test_an_agent_killed_at_random_moments_arrives_at_the_new_model(here): assert kills(here, 5) == 10


def test_two_agents_do_not_work_in_one_folder(here):
    plant = Plant(here/'repo'); (here/'root.json').write_bytes(plant.root)
    enrol(here/'device', here/'root.json', str(plant.path), 'plant-3', 'orin')
    with Agent(here/'device', load=Word, prove=prove_word, clock=Clock()):
        with pytest.raises(EdgenbError, match='another agent'): Agent(here/'device')


def test_enrolment_refuses_what_cannot_be_right_and_leaves_nothing_half_done(here, capsys):
    plant = Plant(here/'repo'); (here/'root.json').write_bytes(plant.root); (here/'bad.json').write_text('{}')
    def edgenb(*a): return main(['agent', *map(str, a), '--root', str(here/'device')])
    ok = ['enrol', '--root-json', here/'root.json', '--repository', plant.path, '--site', 'plant-3', '--hardware', 'orin']
    for change in (['--root-json', here/'bad.json'], ['--root-json', here/'none.json'], ['--repository', 'ftp://x'], ['--site', 'a/b'], ['--id', 'short'], ['--connect', 'noon']):
        assert edgenb(*ok, *change) == 2 and not (here/'device/device.json').exists()
        assert capsys.readouterr().err.startswith('edgenb: ')
    forged = json.loads(plant.root); forged['signed']['version'] = 9; (here/'bad.json').write_text(json.dumps(forged))
    assert edgenb(*ok, '--root-json', here/'bad.json') == 2
    assert edgenb('status') == 2 and 'not enrolled' in capsys.readouterr().err.splitlines()[-1]
    assert edgenb(*ok) == 0 and edgenb('status') == 0 and 'has not run yet' in capsys.readouterr().out
    assert edgenb(*ok) == 2 and 'enrolled already' in capsys.readouterr().err
