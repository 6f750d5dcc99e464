"Campaigns: strict documents, steps that are refused or taken, decisions, no state for ever, a log that can be decided again."
import datetime, itertools, json, os, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np
import pytest
from filelock import FileLock, Timeout
from hypothesis import given, settings, strategies as st
from edgenb.cli import main
from edgenb.core import EdgenbError
from edgenb.fleet.campaign import CHECKS, Policy, abort, apply, complete, decide, parse, pause, policy, promote, resume, roll_back, stage_alpha, start
from edgenb.fleet.windows import DAYS, window_of, window_open
from edgenb.fleet.cohorts import cohort
from edgenb.fleet.controller import act, append, begin, go_on, plan_text, policy_for, read_inventory, read_log, replaced, replay, Standing, standing, standing_text, step, watch
from edgenb.fleet.sequential import Evidence

NEW, OLD, T0 = 'b'*64, 'a'*64, 29_500_000


def fleet(n=340): return [{'id': f'cam-{i}', 'site': f'plant-{i % 12}', 'hardware': ['orin', 'pi'][i//12 % 2]} for i in range(n)]


def campaign(devices=None, **kw): return start(devices or fleet(), 'scratches', NEW, kw.pop('replaces', OLD), seed='5eed', **kw)


def seen(c, hours, devices=None, errors=0.03, n=250, offline=0, crashed=0, before=400, seed=0):
    "Simulated: controls err in 3 %, canaries in `errors`."
    devices = devices or fleet()
    d, rng, members = len(devices), np.random.default_rng(seed), cohort(devices, c.to_dict())
    arm = np.where(members, 1, 0); arm[np.flatnonzero(members)[:offline]] = -1
    counts, crashes = np.where(arm >= 0, n, 0), np.zeros(d, int)
    crashes[np.flatnonzero(arm == 1)[:crashed]] = 1
    return Evidence(since=T0, at=T0 + int(60*hours), stratum=[f"{x['site']}/{x['hardware']}" for x in devices], arm=arm, cohort=members, n_before=[before]*d, errors_before=rng.binomial(before, 0.03, d), n=counts,
                    errors=rng.binomial(counts, np.where(arm == 1, errors, 0.03)), last_seen=T0 + np.where(arm >= 0, int(60*hours), -14_400), crashes=crashes)


THREE_DAYS = replace(policy(340), deadline_hours=72)
def at(c, hours, p=THREE_DAYS, **kw): return decide(c, seen(c, hours, **kw), T0 + int(60*hours), p)


# ---- the signed document

def document(): return campaign(windows=({'days': 'mon-fri', 'from': '22:00', 'to': '04:00'},)).to_dict()


def test_a_campaign_is_the_same_after_it_was_signed_and_read():
    assert parse(json.loads(json.dumps(document()))).to_dict() == document()


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CHECKS)), JUNK)
def test_a_field_of_another_kind_is_refused_in_words(name, value):
    try: c = parse(document() | {name: value})
    except EdgenbError: return
    assert parse(c.to_dict()) == c


@settings(max_examples=200, deadline=None)
@given(JUNK)
def test_what_is_no_campaign_is_refused_in_words(value):
    with pytest.raises(EdgenbError): parse(value)


@pytest.mark.parametrize('wrong', [{'release': 'B'*64}, {'release': NEW + '\n'}, {'stages': [5, 25]}, {'stages': [0, 100]}, {'stages': [5, 5, 100]}, {'stages': [True, 100]}, {'stages': [5, float('nan'), 100]}, {'stage': True}, {'stage': -1}, {'stage': 4},
                                   {'replaces': NEW}, {'cutoffs': {'a/b': 'f'*63}}, {'windows': [{'days': 'mon', 'from': '1:00', 'to': '02:00'}]}, {'windows': [{'days': 'mon', 'from': '01:00', 'to': '02:00', 'tz': 'UTC'}]}, {'reason': 'a\nb'}, {'id': '../x'}, {'extra': 1},
                                   {'agent': '1.2.3.4'}, {'strata': []}, {'strata': ['site', 'site']}])
def test_a_value_out_of_range_is_refused(wrong):
    with pytest.raises(EdgenbError): parse(document() | wrong)


@pytest.mark.parametrize('field', sorted(CHECKS))
def test_a_missing_field_is_named(field):
    with pytest.raises(EdgenbError, match=field): parse({k: v for k, v in document().items() if k != field})


# ---- windows

@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DAYS), st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 7*1440 - 1))
def test_a_window_is_open_for_exactly_its_minutes_over_midnight_and_over_the_week(day, a, b, now):
    w = {'days': day, 'from': f'{a//60:02}:{a % 60:02}', 'to': f'{b//60:02}:{b % 60:02}'}
    begins = DAYS.index(day)*1440 + a
    inside = (now - begins) % (7*1440) < ((b - a) % 1440 or 1440)
    assert window_open([w], datetime.datetime(2026, 3, 2) + datetime.timedelta(minutes=now)) == inside           # 2 March 2026 was a Monday


@pytest.mark.parametrize('text', ['mon-fri 22:00-4:00', 'monday 22:00-04:00', '22:00', 'mon- 22:00-04:00', '-fri 22:00-04:00', '', 'mon,,tue 22:00-04:00', '24:00-01:00', '٢٢:00-04:00'])
def test_a_window_that_cannot_be_read_is_refused(text):
    with pytest.raises(EdgenbError, match='window'): window_of(text)


# ---- steps

STEPS = {'promote': lambda c: promote(c, fleet(60), 'r'), 'pause': lambda c: pause(c, 'r'), 'resume': lambda c: resume(c, 'r'), 'abort': lambda c: abort(c, 'r'), 'roll back': lambda c: roll_back(c, 'r'), 'complete': lambda c: complete(c, 'r')}
ALLOWED = {'running': {'promote', 'pause', 'abort', 'roll back', 'complete'}, 'paused': {'resume', 'abort', 'roll back'}, 'rolled-back': set(), 'aborted': {'roll back'}, 'complete': {'roll back'}}


@pytest.mark.parametrize('state, name, stage', [(s, n, g) for s in ALLOWED for n in STEPS for g in (0, 3)])
def test_a_step_that_makes_no_sense_is_refused_with_the_reason(state, name, stage):
    c = replace(campaign(fleet(60)), state=state, stage=stage)
    may = name in ALLOWED[state] and (name, stage) not in (('promote', 3), ('complete', 0))
    if may: assert parse(STEPS[name](c).to_dict()).reason == 'r'
    else:
        with pytest.raises(EdgenbError, match=c.id): STEPS[name](c)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12), st.booleans())
def test_no_order_of_steps_takes_a_device_out_or_makes_a_campaign_that_cannot_be_read(order, first):
    c, members = campaign(fleet(60), replaces=None if first else OLD), None
    for name in order:
        try: c = STEPS[name](c)
        except EdgenbError: pass
        now = cohort(fleet(60), parse(json.loads(json.dumps(c.to_dict()))).to_dict())
        assert members is None or (members <= now).all()
        members = now
    assert not (first and c.state == 'rolled-back')


def test_stages_are_exact_and_nested():
    c, counts = campaign(), []
    for _ in range(3): counts.append(cohort(fleet(), c.to_dict()).sum()); c = promote(c, fleet(), 'x')
    assert counts + [cohort(fleet(), c.to_dict()).sum()] == [17, 85, 170, 340]


# ---- decisions

@pytest.mark.parametrize('hours, kw, action, said', [
    (0.5, {}, 'hold', 'at least 1 hours'), (6, {'n': 500}, 'promote', 'within the margin'), (6, {'errors': 0.05}, 'rollback', 'labels'), (0.2, {'crashed': 5}, 'rollback', 'crashes'), (6, {'n': 4}, 'hold', 'labels have not shown'),
    (6, {'offline': 9}, 'hold', '80 % are needed'), (72, {'offline': 9}, 'stuck', 'a person must decide'), (72, {'n': 4}, 'stuck', 'a person must decide'), (408, {'offline': 17}, 'rollback', 'nobody has decided'), (6, {'n': 0}, 'hold', 'a comparison needs both')])
def test_each_situation_has_its_decision_and_says_why(hours, kw, action, said):
    d = at(campaign(), hours, **kw)
    assert d.action == action and said in d.reason
    after = apply(campaign(), d, fleet())
    assert after.state == {'hold': 'running', 'promote': 'running', 'rollback': 'rolled-back', 'stuck': 'paused'}[action] and len(after.reason) < 2000 and parse(after.to_dict()) == after


def test_a_device_that_is_offline_is_not_evidence_of_a_bad_model():
    for offline in (1, 3, 16, 17): assert at(campaign(), 6, offline=offline).action in ('hold', 'promote')
    assert at(campaign(), 6, offline=3, n=500).action == 'promote'                                # 14 of 17 are enough


def test_a_stage_past_its_deadline_goes_on_if_the_policy_says_so_but_not_on_nothing():
    p = replace(THREE_DAYS, at_deadline='promote')
    d = at(campaign(), 73, p, n=4, offline=9)
    assert d.action == 'promote' and 'the policy is to go on' in d.reason
    assert at(campaign(), 73, p, offline=17).action == 'stuck' and at(campaign(), 73, p, errors=0.06).action == 'rollback'


def test_a_paused_campaign_is_still_guarded_and_still_ends():
    c = pause(campaign(), 'lunch')
    assert at(c, 6).action == 'hold' and at(c, 6, errors=0.06).action == 'rollback' and at(c, 6, crashed=5).action == 'rollback' and at(c, 409).action == 'rollback'


def test_the_last_stage_has_no_controls_and_ends_at_its_deadline_at_the_latest():
    c = replace(promote(replace(campaign(), stage=2), fleet(), 'x'))
    assert at(c, 2).action == 'complete' and at(c, 2, offline=200).action == 'hold'
    d = at(c, 72, offline=200)
    assert d.action == 'complete' and '200 devices were not reached' in d.reason
    assert at(c, 2, crashed=340).action == 'rollback' and at(c, 2, crashed=40).action == 'complete'


def test_a_first_release_has_nothing_to_go_back_to_and_is_aborted():
    assert at(campaign(replaces=None), 0.5, crashed=6).action == 'abort' and apply(campaign(replaces=None), at(campaign(replaces=None), 0.5, crashed=6), fleet()).state == 'aborted'
    assert at(campaign(replaces=None), 409, n=0).action == 'abort'


def test_nothing_is_decided_when_it_is_over():
    for state in ('complete', 'aborted', 'rolled-back'): assert at(replace(campaign(), state=state), 500, errors=0.2).action == 'hold'


def test_the_error_budget_of_all_stages_adds_up_to_alpha():
    for stages in range(1, 8): assert sum(stage_alpha(0.05, i, stages) for i in range(stages)) == pytest.approx(0.05)


@pytest.mark.parametrize('devices, size', [(1, '1-10'), (10, '1-10'), (11, '10-100'), (100, '10-100'), (101, '100-1,000'), (1000, '100-1,000'), (1001, '1,000+'), (10**6, '1,000+')])
def test_every_size_of_fleet_has_a_policy_with_reasons(devices, size):
    p = policy(devices)
    assert p.size == size and p.stages[-1] == 100 and Policy.from_dict(json.loads(json.dumps(p.to_dict()))) == p and all(len(v) > 20 for v in p.why.values())
    c = campaign(fleet(min(devices, 2000)), stages=p.stages)
    assert cohort(fleet(min(devices, 2000)), c.to_dict()).sum() <= max(1, 0.11*min(devices, 2000)) or devices == 1


# ---- whole campaigns, simulated

def rollout(errors, seed, devices=None, hours=1, per=60):
    "One campaign from start to end: (campaign, share of devices that ever had the release)."
    devices = devices or fleet()
    p, rng, d = policy(len(devices)), np.random.default_rng(seed), len(devices)
    c, base, before = campaign(devices, stages=p.stages), np.clip(0.03 + 0.005*rng.normal(size=d), 0.002, 1), np.full(d, 400)
    errors_before = rng.binomial(before, base)
    stratum = [f"{x['site']}/{x['hardware']}" for x in devices]
    while not c.over:
        members, n, wrong = cohort(devices, c.to_dict()), np.zeros(d, int), np.zeros(d, int)
        for look in range(1, 500):
            n += per*hours; wrong += rng.binomial(per*hours, np.clip(base + (errors - 0.03)*members, 0, 1))
            e = Evidence(since=T0, at=T0 + 60*look, stratum=stratum, arm=members.astype(int), cohort=members, n_before=before, errors_before=errors_before, n=n, errors=wrong, last_seen=np.full(d, T0 + 60*look))
            decision = decide(c, e, T0 + 60*look, p)
            if decision.action != 'hold': c = apply(c, decision, devices); break
    return c, members.mean()


def test_a_bad_model_reaches_the_first_stage_and_a_good_one_everybody():
    bad, good = [rollout(0.055, s) for s in range(12)], [rollout(0.03, 100 + s) for s in range(12)]
    assert all(c.state == 'rolled-back' and reached <= 0.06 for c, reached in bad)
    assert sum(c.state == 'complete' for c, _ in good) >= 11


# ---- no state for ever

def moves(c, when, few, p):
    members, d = cohort(few, c.to_dict()), len(few)
    for state, errors in itertools.product(np.array(list(itertools.product(('offline', 'old', 'new', 'fell back', 'crashing'), repeat=d))), (None, 0.03, 0.2)):
        arm = np.where(np.isin(state, ('new', 'crashing')) & members, 1, np.where((state == 'old') & ~members, 0, -1))
        n = np.where((arm >= 0) & (errors is not None), 100_000, 0)
        e = Evidence(since=0, at=when, stratum=['a/x']*d, arm=arm, cohort=members, n_before=[10_000]*d, errors_before=[300]*d, n=n, errors=(n*np.where(arm == 1, errors or 0, 0.03)).astype(int),
                     last_seen=np.full(d, when), failed=state == 'fell back', crashes=np.where(state == 'crashing', 9, 0))
        yield 'controller', apply(c, decide(c, e, when, p), few)
    for person in (pause, resume, abort, roll_back, lambda c, reason: go_on(c, reason, few)):
        try: yield 'person', person(c, 'a person')
        except EdgenbError: pass


@pytest.mark.parametrize('at_deadline, replaces', [('pause', OLD), ('promote', OLD), ('pause', None)])
def test_no_state_of_devices_controller_and_people_lasts_for_ever(at_deadline, replaces):
    few, p = [{'id': f'd{i}', 'site': 'a', 'hardware': 'x'} for i in range(3)], replace(policy(3), stages=(34, 67, 100), quorum=0.6, at_deadline=at_deadline)
    clock = [0, int(60*p.soak_hours), int(60*p.deadline_hours), int(60*(p.deadline_hours + p.patience_hours))]
    todo, known, ends = [(start(few, 'toy', NEW, replaces, p.stages, seed='00'), 0)], set(), set()
    while todo:
        c, tick = todo.pop()
        if (c.state, c.stage, tick) in known: continue
        known.add((c.state, c.stage, tick))
        if c.over: ends.add(c.state); continue
        after = {(who, n.state, n.stage): n for who, n in moves(c, clock[tick], few, p)}
        assert all(n.stage >= c.stage for n in after.values())
        if tick == 3: assert all(n.over or n.stage > c.stage for (who, *_), n in after.items() if who == 'controller'), (c.state, c.stage, sorted(after))
        for n in after.values():
            now = 0 if n.stage > c.stage else tick
            todo += [(n, t) for t in {now, min(3, now + 1)}]
    assert {s for s, _, _ in known} == {'running', 'paused', 'aborted', 'complete'} | ({'rolled-back'} if replaces else set())


def test_the_exploration_would_find_a_state_without_end():
    "The same with a controller that waits for every device, as others do: it is caught."
    few, p = [{'id': f'd{i}', 'site': 'a', 'hardware': 'x'} for i in range(3)], replace(policy(3), patience_hours=1e5, deadline_hours=1e5)
    c = start(few, 'toy', NEW, OLD, (34, 67, 100), seed='00')
    assert any(n == c for who, n in moves(c, 10**6, few, p) if who == 'controller')


# ---- the controller

def simulated(devices, errors):
    def look(c, began, since, now):
        rng, members, d = np.random.default_rng(now), cohort(devices, c), len(devices)
        n = np.full(d, 40*(now - since)//60)
        return Evidence(since=since, at=now, stratum=[f"{x['site']}/{x['hardware']}" for x in devices], arm=members.astype(int), cohort=members, n_before=[2000]*d, errors_before=rng.binomial(2000, 0.03, d), n=n,
                        errors=rng.binomial(n, np.where(members, errors, 0.03)), last_seen=[now]*d, crashes=[0]*d)
    return look


def begun(tmp_path, devices, signed, **kw):
    p = policy(len(devices))
    return begin(tmp_path/'c', campaign(devices, stages=p.stages, **kw), p, devices, signed.append, T0).folder


def test_every_decision_of_a_whole_campaign_follows_again_from_its_log(tmp_path):
    devices, signed, now = fleet(60), [], T0
    folder = begun(tmp_path, devices, signed)
    act(folder, 'pause', 'lunch', signed.append, T0 + 10); act(folder, 'resume', 'back', signed.append, T0 + 50)
    while not Standing(folder).campaign.over: now += 240; step(folder, simulated(devices, 0.03), signed.append, devices + fleet(64)[60:], now)
    s = Standing(folder)
    assert s.campaign.state == 'complete' and replay(folder) == [] and signed[-1] == s.campaign and 'complete at 100 %' in standing_text(s)
    assert step(folder, None, signed.append).action == 'hold'


@pytest.mark.parametrize('forge', [lambda r: r['decision'].update(action='hold'), lambda r: r['decision']['guards'][0].update(holds=True), lambda r: r['decision'].update(reached=1), lambda r: r.update(now=r['now'] - 600), lambda r: r['campaign'].update(state='running'),
                                   lambda r: r['campaign']['cutoffs'].update({'*': 'f'*64})])
def test_a_log_that_was_rewritten_with_a_new_chain_does_not_follow(tmp_path, forge):
    devices, signed = fleet(60), []
    folder = begun(tmp_path, devices, signed)
    for h in (5, 10): step(folder, simulated(devices, 0.08), signed.append, now=T0 + 60*h)
    log = read_log(folder)
    last = next(r for r in log if 'decision' in r and r['decision']['action'] == 'rollback')
    forge(last); (folder/'log.jsonl').unlink()
    for r in log: append(folder, {k: v for k, v in r.items() if k not in ('n', 'before')})
    assert [n for n, _ in replay(folder)] == [last['n']]


def test_a_changed_line_or_changed_evidence_is_found(tmp_path):
    devices, signed = fleet(60), []
    folder = begun(tmp_path, devices, signed)
    step(folder, simulated(devices, 0.03), signed.append, now=T0 + 300)
    kept_file = folder/'kept'/read_log(folder)[1]['evidence']
    data = kept_file.read_bytes(); kept_file.write_bytes(data[:-1] + b'x')
    assert 'changed' in replay(folder)[0][1]
    kept_file.unlink(); assert 'missing' in replay(folder)[0][1]
    text = (folder/'log.jsonl').read_text()
    (folder/'log.jsonl').write_text(text.replace('"now": 29500000', '"now": 29500001'))
    with pytest.raises(EdgenbError, match='does not follow'): read_log(folder)


def test_a_line_cut_by_a_loss_of_power_at_any_byte_is_as_if_never_written(tmp_path):
    append(tmp_path, {'event': 'a'}); whole = (tmp_path/'log.jsonl').read_bytes()
    append(tmp_path, {'event': 'b', 'say': 'ü'*20}); both = (tmp_path/'log.jsonl').read_bytes()
    for cut in range(len(whole), len(both)):
        (tmp_path/'log.jsonl').write_bytes(both[:cut])
        assert [r['event'] for r in read_log(tmp_path)] == ['a']
        append(tmp_path, {'event': 'c'})
        assert [(r['event'], r['n']) for r in read_log(tmp_path)] == [('a', 0), ('c', 1)]


def test_a_controller_killed_between_its_line_and_its_signature_signs_at_the_next_look(tmp_path):
    devices, signed = fleet(60), []
    folder = begun(tmp_path, devices, signed)
    def dies(c): raise KeyboardInterrupt
    def unsigned(c):
        if c.state == 'rolled-back': dies(c)
    with pytest.raises(KeyboardInterrupt): step(folder, simulated(devices, 0.08), unsigned, now=T0 + 600)
    assert Standing(folder).campaign.state == 'rolled-back' and signed[-1].state == 'running'
    step(folder, simulated(devices, 0.08), signed.append, now=T0 + 615)
    assert signed[-1].state == 'rolled-back' and replay(folder) == []


def test_killed_at_any_moment_the_log_is_whole_and_replays(tmp_path):
    devices = fleet(60)
    folder = begun(tmp_path, devices, [])
    code = f'''
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_fleet_campaign import *
now = Standing({str(folder)!r}).log[-1]['now']
print('ready', flush=True)
while True: now += 1; step({str(folder)!r}, simulated(fleet(60), 0.031), lambda c: None, now=now)
'''
    rng = np.random.default_rng(0)
    for _ in range(4):
        child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline().strip() == 'ready'
        time.sleep(rng.uniform(0.05, 0.3)); child.send_signal(signal.SIGKILL); child.wait(); child.stdout.close()
        read_log(folder)
    assert len(read_log(folder)) > 4 and replay(folder) == []


def test_a_person_and_a_look_at_the_same_time_do_not_undo_each_other(tmp_path):
    devices, signed = fleet(60), []
    folder = begun(tmp_path, devices, signed)
    def look(c, began, since, now):
        with pytest.raises(Timeout): FileLock(folder/'.lock').acquire(timeout=0)              # nobody else may write while it looks
        return simulated(devices, 0.03)(c, began, since, now)
    step(folder, look, signed.append, now=T0 + 30)
    assert act(folder, 'pause', 'lunch', signed.append).state == 'paused'


def test_an_action_needs_a_reason_and_a_name_that_exists(tmp_path):
    folder = begun(tmp_path, fleet(60), [])
    with pytest.raises(EdgenbError, match='--reason'): act(folder, 'pause', '  ', print)
    with pytest.raises(EdgenbError, match='Did you mean'): standing(tmp_path/'c', 'scratchesbbbbbbbb')
    with pytest.raises(EdgenbError, match='edgenb ship'): standing(tmp_path/'nowhere')


@pytest.mark.parametrize('name, text', [('a.csv', 'id;site;hardware\n1;2;3\n'), ('a.json', '{}'), ('a.json', '[1]'), ('a.json', '[{"id": "x"}]'), ('a.csv', ''), ('a.csv', 'id,site,hardware\nx,a/b,c\n'), ('a.csv', 'id,site,hardware\nx,a,c\nx,a,c\n'), ('a.json', '{"devices": 3}')])
def test_an_inventory_that_cannot_be_used_is_refused(tmp_path, name, text):
    (tmp_path/name).write_text(text)
    with pytest.raises(EdgenbError, match=name): read_inventory(tmp_path/name)


def test_the_plan_names_the_numbers_that_matter():
    p = policy_for(340, guards=['latency_p99=50ms', 'drift=off'])
    text = plan_text(campaign(stages=p.stages), p, fleet())
    assert '17 devices in 12 of 12 sites' in text and '50 ms' in text and 'more than 64 ms' in text and '24 h after a stage' in text and 'alarms of drift' not in text and 'at most 5 %' in text


@pytest.mark.parametrize('kw', [{'canary': 'few'}, {'stages': '5;100'}, {'alpha': 0.0}, {'alpha': 0.7}, {'margin': '0%'}, {'deadline_hours': 0.1}, {'guards': ['x=1']}, {'guards': ['latency_p99=40000ms']}, {'label_delay_hours': -1.0}, {'windows': ['always']}])
def test_a_plan_that_makes_no_sense_is_refused(kw):
    with pytest.raises(EdgenbError): policy_for(340, **kw)


# ---- what is written down and could not be signed

class Busy:
    "A repository that cannot be written for a while: signs like `publisher`'s function, and says whether it has."
    def __init__(self): self.there, self.broken, self.tried = None, False, 0
    def __call__(self, c):
        if self.there == c: return False
        self.tried += 1
        if self.broken: raise EdgenbError('the repository is busy')
        self.there = c
        return True


def collected(tmp_path, devices):
    from edgenb.fleet.collector import enrol
    from edgenb.fleet.envelope import new_key
    for n, d in enumerate(devices): enrol(tmp_path/'t.db', new_key(tmp_path/f'{n}.key'), d['site'], d['hardware'], f'{n:032x}')
    return tmp_path/'t.db'


def test_watch_does_not_end_before_the_rollback_that_it_wrote_down_is_signed(tmp_path, monkeypatch):
    "It used to: the log said rolled back, so it left, and devices kept the release."
    from edgenb.fleet import collector
    devices, signs = fleet(60), Busy()
    folder = begin(tmp_path/'c', campaign(devices, stages=policy(60).stages), policy(60), devices, signs, T0).folder
    db = collected(tmp_path, devices)
    monkeypatch.setattr(collector, 'evidence', lambda telemetry, c, began, since, now, label_delay: simulated(devices, 0.2)(c, began, since, now))
    signs.broken = True
    def wait(seconds):
        if signs.tried >= 3: signs.broken = False
        assert signs.tried < 10
    assert watch(folder, db, signs, wait=wait) == 1
    assert Standing(folder).campaign.state == 'rolled-back' and signs.there.state == 'rolled-back'


def test_a_persons_decision_that_could_not_be_signed_is_signed_when_it_is_made_again(tmp_path):
    devices, signs = fleet(60), Busy()
    folder = begin(tmp_path/'c', campaign(devices, stages=policy(60).stages), policy(60), devices, signs, T0).folder
    for action, state, stage in (('pause', 'paused', 0), ('promote', 'running', 1), ('rollback', 'rolled-back', 1)):
        signs.broken = True
        with pytest.raises(EdgenbError, match='busy'): act(folder, action, 'no good', signs, T0 + 5)
        assert signs.there != Standing(folder).campaign
        signs.broken = False
        assert (c := act(folder, action, 'no good', signs, T0 + 6)) == signs.there and (c.state, c.stage) == (state, stage)
    assert [r['event'] for r in read_log(folder)] == ['ship', 'pause', 'promote', 'rollback'] and replay(folder) == []
    with pytest.raises(EdgenbError, match='cannot be rolled back'): act(folder, 'rollback', 'again', signs, T0 + 7)


def test_the_release_before_the_last_cannot_be_rolled_back_as_if_devices_followed_it(tmp_path):
    devices, signed = fleet(60), []
    one = begin(tmp_path/'c', campaign(devices, stages=policy(60).stages, id='one'), policy(60), devices, signed.append, T0).folder
    with pytest.raises(EdgenbError, match='running'): begin(tmp_path/'c', campaign(devices, stages=policy(60).stages, id='one'), policy(60), devices, signed.append, T0 + 1)
    act(one, 'abort', 'enough', signed.append, T0 + 2)
    begin(tmp_path/'c', start(devices, 'scratches', 'c'*64, NEW, policy(60).stages, id='two'), policy(60), devices, signed.append, T0 + 3)
    with pytest.raises(EdgenbError, match='two .running'): act(one, 'rollback', 'worse', signed.append, T0 + 4)
    assert Standing(one).campaign.state == 'aborted'


# ---- labels that come late

@pytest.mark.parametrize('right_h, wrong_h, worse, fooled, judged', [(24, 2, 0.0, (False, False), (True, True)), (2, 24, 0.03, (True, True), (False, False))])
def test_labels_that_come_later_for_right_or_wrong_decisions_do_not_judge_a_release(tmp_path, right_h, wrong_h, worse, fooled, judged):
    """(holds, allowed to go on), counted from the update and counted after a day. In its first hours a canary has only the quick labels, controls have those of the days before as well:
    a good release was sent back where wrong ones are found first, one that errs in 6 % instead of 3 went to everybody where they are found last."""
    from edgenb.fleet import collector
    from edgenb.fleet.guards import judge_labels
    devices = fleet(60)
    db, c = collected(tmp_path, devices), campaign([{**d, 'id': f'{n:032x}'} for n, d in enumerate(devices)], stages=(20, 100))
    for digest in (OLD, NEW): collector.accept(db, digest)
    members = cohort([{**d, 'id': f'{n:032x}'} for n, d in enumerate(devices)], c.to_dict())
    def rows():
        for hour in range(-72, 72):
            for n, on_new in enumerate(members & (hour > 0)):
                share = 0.03 + worse*on_new
                right, wrong = (int(round(1000*v))*(not on_new or hour > late) for v, late in ((1 - share, right_h), (share, wrong_h)))
                yield n + 1, hour + 80, T0 + 60*hour, 2 if on_new else 1, json.dumps({'edgenb.interval.duration': 60, 'edgenb.outcome.count': right + wrong, 'edgenb.outcome.error.count': wrong})
    with collector.store(db, write=True) as d: d.executemany('INSERT INTO rows (device, boot, seq, at, received, clock, model, metrics) VALUES (?, 0, ?, ?, 0, 0, ?, ?)', list(rows()))
    def said(hours, delay):
        v, allowed = judge_labels(0.01, collector.evidence(db, c.to_dict(), T0, T0, T0 + 60*hours, label_delay=delay), 0.0125, 0.05)
        return v.holds, allowed
    assert said(23, 0) == fooled and said(23, 24*60)[1] is False and said(70, 26*60) == judged


# ---- where nothing can be shown

def test_a_person_can_take_a_small_fleet_on_where_labels_show_nothing(tmp_path):
    "`resume` alone let the next look pause it again."
    devices, signed = fleet(6), []
    p = policy(6)
    folder = begin(tmp_path/'c', campaign(devices, stages=p.stages), p, devices, signed.append, T0).folder
    def look(c, began, since, now): return replace_counts(simulated(devices, 0.03)(c, began, since, now))
    late = T0 + int(60*p.deadline_hours)
    assert step(folder, look, signed.append, now=late).action == 'stuck'
    act(folder, 'resume', 'more time', signed.append, late + 1)
    assert step(folder, look, signed.append, now=late + 15).action == 'stuck'
    c = act(folder, 'promote', 'looked at 40 parts, all right', signed.append, late + 20)
    assert (c.state, c.stage) == ('running', 1) and cohort(devices, c.to_dict()).all() and Standing(folder).since == late + 20
    assert act(folder, 'promote', 'all of them as well', signed.append, late + 60).state == 'complete'
    assert replay(folder) == []


def replace_counts(e): return replace(e, n=np.zeros(len(e.n), int), errors=np.zeros(len(e.n), int))


@pytest.mark.parametrize('at_deadline', ['pause', 'promote'])
def test_devices_that_fell_silent_do_not_promote(at_deadline):
    "Heard of when the stage began, and never with the release: a release that kills its device before it can say so."
    p = replace(policy(340), at_deadline=at_deadline, deadline_hours=12)
    def killed(c, few):
        e = seen(c, 12, offline=few, n=0)
        return replace(e, last_seen=np.where(e.arm < 0, T0 - 30, e.last_seen))
    assert decide(campaign(), killed(campaign(), 16), T0 + 720, p).action == 'stuck'
    last = replace(promote(replace(campaign(), stage=2), fleet(), 'x'))
    for few in (340, 300): assert decide(last, killed(last, few), T0 + 720, p).action == 'stuck'
    assert decide(last, killed(last, 340), T0 + 60*(12 + 336), p).action == 'rollback'
    assert decide(last, killed(last, 60), T0 + 720, p).action == 'complete'


def test_one_device_that_was_never_heard_with_the_release_does_not_complete_it():
    one = fleet(1)
    c, p = campaign(one, stages=(100,)), policy(1)
    assert decide(c, seen(c, p.deadline_hours, one, offline=1), T0 + int(60*p.deadline_hours), p).action == 'stuck'


# ---- with a repository and the command line

def bundle(folder, name) -> str:   # its digest
    from edgenb.core import digest, digest_of, write_json
    folder.mkdir()
    for n, text in {'pipeline.json': '{}', 'reference.sketch': '', 'model.bin': folder.name, 'card.json': '{"lineage": []}'}.items(): (folder/n).write_text(text)
    manifest = {'edgenb_bundle': 1, 'name': name, 'runtime': 'onnxruntime', 'model': 'model.bin', 'warnings': [], 'files': {p.name: digest(p) for p in sorted(folder.iterdir())}}
    write_json(folder/'manifest.json', manifest | {'digest': digest_of(manifest)})
    return digest_of(manifest)


@pytest.fixture
def published(tmp_path, monkeypatch):
    keys, repository = pytest.importorskip('edgenb.fleet.keys'), pytest.importorskip('edgenb.fleet.repository')
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'correct horse battery staple')
    word = lambda _: b'correct horse battery staple'
    ring, found = keys.ceremony(tmp_path/'keys', word), []
    signers = keys.unlock(tmp_path/'keys', passphrase=word)
    repo = repository.create(tmp_path/'fleet', ring, signers, bins=4)
    for weights in ('one', 'two'): found.append(bundle(tmp_path/weights, 'scratches')); assert repository.publish(repo, tmp_path/weights, signers=signers).done
    (tmp_path/'devices.csv').write_text('id,site,hardware\n' + ''.join(f"{d['id']},{d['site']},{d['hardware']}\n" for d in fleet()))
    return tmp_path, found, lambda: repository.Repository(tmp_path/'fleet').campaigns()['campaigns']


def test_ship_signs_a_campaign_that_devices_read_and_people_steer(published, capsys):
    root, (old, new), signed = published
    repo, keys = ['--repository', str(root/'fleet')], ['--keys', str(root/'keys')]
    base = ['ship', str(root/'two'), *repo, '--inventory', str(root/'devices.csv')]
    assert main([*base, '--dry-run']) == 2 and '--replaces' in capsys.readouterr().err                      # which of the releases do the devices run?
    base += ['--replaces', old[:12]]
    assert main([*base, '--canary', '5%', '--stages', '5,25,50,100', '--guard', 'latency_p99=50ms', '--alpha', '0.05', '--margin', '1%', '--dry-run']) == 0 and 'nothing was signed' in capsys.readouterr().out and signed() == []
    assert main(base) == 2 and main([*base, *keys, '--window', 'mon-fri 22:00-04:00']) == 0
    c, = signed()
    assert parse(c).release == new and c['replaces'] == old and c['windows'] == [{'days': 'mon-fri', 'from': '22:00', 'to': '04:00'}] and cohort(fleet(), c).sum() == 17
    assert main([*base, *keys]) == 2 and 'is running' in capsys.readouterr().err
    assert main(['campaign', 'pause', *repo, *keys]) == 2 and main(['campaign', 'pause', *repo, *keys, '--reason', 'a look']) == 0 and signed()[0]['state'] == 'paused' and signed()[0]['reason'] == 'a look'
    assert main(['campaign', 'rollback', *repo, *keys, '--reason', 'no good']) == 0 and signed()[0]['state'] == 'rolled-back'
    capsys.readouterr()
    assert main(['campaign', 'list', *repo, '--json']) == 0 and json.loads(capsys.readouterr().out)[0]['state'] == 'rolled-back'
    assert main(['campaign', 'replay', c['id'], *repo]) == 0 and main(['campaign', 'show', c['id'], *repo, '--json']) == 0 and main(['campaign', 'show', *repo]) == main(['campaign', 'replay', *repo]) == 0   # it is over: the last one is meant
    assert main([*base[:-2], *keys, '--dry-run']) == 0                                                       # again: it replaces what it was rolled back to
    assert not list((root/'fleet').rglob('log.jsonl'))                                                      # a repository is public, a log is not


def test_what_cannot_be_signed_for_want_of_the_passphrase_is_not_written_down(published, capsys, monkeypatch):
    "It was, and went out with whatever was signed next."
    root, (old, new), signed = published
    repo, keys = ['--repository', str(root/'fleet')], ['--keys', str(root/'keys')]
    ship = ['ship', 'scratches:2', *repo, *keys, '--inventory', str(root/'devices.csv'), '--replaces', 'scratches:1']
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'wrong')
    assert main(ship) == 2 and 'does not open' in capsys.readouterr().err and not list((root/'fleet.campaigns').glob('*/log.jsonl'))
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'correct horse battery staple')
    assert main(ship) == 0 and (signed()[0]['release'], signed()[0]['replaces']) == (new, old)
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'wrong')
    for action in ('pause', 'promote', 'abort', 'rollback'): assert main(['campaign', action, *repo, *keys, '--reason', 'x']) == 2
    assert main(['campaign', 'watch', *repo, *keys, '--telemetry', str(collected(root, fleet(2)))]) == 2            # and not for ever
    s = standing(root/'fleet.campaigns')
    assert [r['event'] for r in s.log] == ['ship'] and signed()[0]['state'] == 'running'
    act(s.folder, 'rollback', 'no good', lambda c: False)                                                          # written down, and the machine went off
    capsys.readouterr()
    assert main(['campaign', 'show', *repo]) == main(['campaign', 'list', *repo]) == 0 and capsys.readouterr().out.count('NOT SIGNED: devices read running') == 2
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'correct horse battery staple')
    assert main(['campaign', 'rollback', *repo, *keys, '--reason', 'no good']) == 0 and signed()[0]['state'] == 'rolled-back'
    assert main(['campaign', 'show', *repo]) == 0 and 'NOT SIGNED' not in capsys.readouterr().out
    for odd, said in ((['ship', 'scratches:7', *ship[2:]], 'scratches:7 is not released'), ([*ship[:-1], 'scratches:9'], 'no release has'), ([*ship[:-1], 'f'*12], 'no release has')): assert main(odd) == 2 and said in capsys.readouterr().err


def test_ship_refuses_what_is_not_released(published, capsys):
    root, _, signed = published
    (root/'one/model.bin').write_text('other')
    assert main(['ship', str(root/'one'), '--repository', str(root/'fleet'), '--inventory', str(root/'devices.csv'), '--dry-run']) == 2 and 'changed after' in capsys.readouterr().err
    assert main(['ship', str(root/'two'), '--repository', str(root/'nowhere'), '--inventory', str(root/'devices.csv'), '--dry-run']) == 2 and signed() == []


def test_a_second_release_replaces_what_the_last_campaign_left():
    document = {'campaigns': [campaign().to_dict() | {'state': 'complete'}]}
    assert replaced(document, 'scratches', 'c'*64) == NEW and replaced(document, 'other', 'c'*64) is None
    with pytest.raises(EdgenbError, match='already'): replaced(document, 'scratches', NEW)
    document['campaigns'][0]['state'] = 'paused'
    with pytest.raises(EdgenbError, match='paused'): replaced(document, 'scratches', 'c'*64)


# ---- what a controller may sign

@pytest.fixture
def signing(published):
    from edgenb.fleet.controller import publisher
    root, (old, new), signed = published
    return publisher(root/'fleet', root/'keys', lambda _: b'correct horse battery staple'), root, old, new, signed


def test_an_older_copy_of_a_log_signs_nothing(signing):
    "A folder restored from a backup, or a second controller with a log of its own: devices that went back would take the release again."
    publish, root, old, new, signed = signing
    first = start(fleet(), 'scratches', new, old, seed='5eed', id='one')
    second = promote(first, fleet(), 'well')
    back = roll_back(second, 'worse')
    for later, older in ((second, [first]), (back, [second, first, replace(second, state='complete')])):
        assert publish(later) and not publish(later)
        for c in older:
            with pytest.raises(EdgenbError, match='older copy'): publish(c)
        assert signed() == [later.to_dict()]


def test_a_second_campaign_of_a_model_is_not_signed_beside_one_that_runs(signing):
    publish, root, old, new, signed = signing
    one, two = (start(fleet(), 'scratches', new, old, seed='5eed', id=i) for i in ('one', 'two'))
    publish(one)
    with pytest.raises(EdgenbError, match='one at a time'): publish(two)
    publish(abort(one, 'enough')); assert publish(two) and [c['id'] for c in signed()] == ['one', 'two']


def test_the_last_campaign_of_every_model_stays_signed_however_many_there_are(signing):
    "New devices go by it, and those that were away; with twenty other models it used to be gone."
    from edgenb.fleet.controller import KEEP
    from edgenb.fleet.keys import unlock
    from edgenb.fleet.repository import Repository
    publish, root, old, new, signed = signing
    repo, signers = Repository(root/'fleet'), unlock(root/'keys', passphrase=lambda _: b'correct horse battery staple')
    releases = []
    for n in range(KEEP + 2):
        releases.append(bundle(root/f'm{n}', f'model-{n}')); assert repo.publish(root/f'm{n}', signers=signers).done
        publish(start(fleet(12), f'model-{n}', releases[n], None, seed='5eed', id=f'm{n}'))
    begun = lambda id: start(fleet(12), 'model-0', releases[0], None, seed='5eed', id=id)
    publish(abort(begun('m0'), 'x'))
    for n in range(2): publish(begun(f'again-{n}')); publish(abort(begun(f'again-{n}'), 'x'))
    assert {c['name'] for c in signed()} == {f'model-{n}' for n in range(KEEP + 2)} and signed()[-1]['id'] == 'again-1' and not publish(abort(begun('m0'), 'x'))


def test_a_step_without_a_name_signs_the_end_that_a_killed_controller_left(published, capsys):
    root, (old, new), signed = published
    repo, keys = ['--repository', str(root/'fleet')], ['--keys', str(root/'keys')]
    assert main(['ship', str(root/'two'), *repo, *keys, '--inventory', str(root/'devices.csv'), '--replaces', old[:12]]) == 0
    c, = signed()
    folder = root/'fleet.campaigns'/c['id']
    with pytest.raises(KeyboardInterrupt): act(folder, 'rollback', 'worse', lambda c: (_ for _ in ()).throw(KeyboardInterrupt()) if c.state == 'rolled-back' else False)
    assert signed()[0]['state'] == 'running' and Standing(folder).campaign.state == 'rolled-back'
    db = collected(root, fleet(2))
    assert main(['campaign', 'step', *repo, *keys, '--telemetry', str(db)]) == 1 and signed()[0]['state'] == 'rolled-back'


def test_a_person_takes_it_on_from_the_command_line(published, capsys):
    root, (old, new), signed = published
    repo, keys = ['--repository', str(root/'fleet')], ['--keys', str(root/'keys')]
    assert main(['ship', str(root/'two'), *repo, *keys, '--inventory', str(root/'devices.csv'), '--replaces', old[:12]]) == 0
    assert main(['campaign', 'promote', *repo, *keys]) == 2 and main(['campaign', 'promote', *repo, *keys, '--reason', 'looked at it']) == 0
    assert signed()[0]['stage'] == 1 and cohort(fleet(), signed()[0]).sum() == 85
