"""Telemetry never stands in the way of decisions; what it says of the machine survives clocks that jump and files that are damaged."""
import datetime, functools, json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from edgenb.agent import service
from edgenb.agent.storage import load_device
from edgenb.core import EdgenbError
from edgenb.fleet.collector import collector_key, enrol
from edgenb.fleet.envelope import new_key, public_of
from edgenb.fleet.outbox import ALIKE, Damaged, Outbox, Sent
from edgenb.fleet.reporter import Reporter, by_stick, configure, outbox_at, public_key, setup_of
from edgenb.fleet.schema import FEATURES

NOW = 29_800_800

def device_at(folder, url=''):
    "A device that reports: its folder and its set-up."
    configure(folder, public_of(collector_key(folder/'fleet.db')), url)
    enrol(folder/'fleet.db', public_key(folder), 'plant-1', 'orin', '5f'*16)
    return folder

def damage(path): path.write_bytes(b'SQLite format 3\0' + b'\xff'*8000)

# ---------------------------------------------------------------- the agent decides all the same

@pytest.mark.parametrize('broken', ['telemetry.db', 'telemetry.json', 'telemetry.key', 'a full disk'])
def test_an_agent_whose_telemetry_is_broken_starts_and_decides(tmp_path, monkeypatch, broken):
    from tinyfleet import Plant, Word, prove_word, tiny_bundle
    plant = Plant(tmp_path/'plant', datetime.datetime.now(datetime.UTC).replace(microsecond=0))
    digest = tiny_bundle(tmp_path/'v1'); plant.release(tmp_path/'v1'); plant.campaign(digest)
    (tmp_path/'root.json').write_bytes(plant.root)
    root = tmp_path/'agent'
    service.enrol(root, tmp_path/'root.json', str(plant.path), 'plant-1', 'orin', '', 'toy', [])
    configure(root, 'ab'*32)
    if broken == 'a full disk': (root/'telemetry.db').mkdir()      # cannot be opened: as where no file can be made
    else: damage(root/broken)
    decided = []
    class Agent(service.Agent):
        def run(self):
            self.poll()
            decided.extend(self.predict([b'x']*3))
    monkeypatch.setattr(service, 'Agent', functools.partial(Agent, load=Word, prove=prove_word))
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): monkeypatch.setattr(signal, 'signal', lambda *a: None)
    service.run(root, 0)
    assert len(decided) == 3

def test_a_damaged_outbox_is_set_aside_and_the_device_goes_on_reporting(tmp_path):
    root = device_at(tmp_path)
    outbox_at(root, '5f'*16).close(NOW)
    for p in root.glob('telemetry.db-*'): p.unlink()
    damage(root/'telemetry.db')
    box = outbox_at(root, '5f'*16)
    assert box.waiting == 0 and (root/'telemetry.db.damaged').is_file()
    clock, said = [1_788_048_000.0], []
    r = Reporter(box, root, setup_of(root), clock=lambda: clock[0], log=said.append)
    damage(root/'telemetry.db')                       # while it runs
    clock[0] += 3600; box.observe('edgenb.decision.count', 7); r.look()
    assert 'set aside' in said[-1] and box.waiting == 0
    clock[0] += 3600; r.look()
    assert box.waiting == 1 and '"edgenb.decision.count":7' in _text(box)     # what was in memory is told all the same

def _text(box):
    import sqlite3
    with sqlite3.connect(box.path) as db: return ''.join(t for t, in db.execute('SELECT row FROM rows'))

def test_a_reading_of_the_machine_that_fails_stops_no_row(tmp_path, monkeypatch):
    root = device_at(tmp_path); box = outbox_at(root, '5f'*16)
    monkeypatch.setattr('edgenb.fleet.reporter.machine_facts', lambda root: int('no number'))
    clock = [1_788_048_000.0]
    r = Reporter(box, root, setup_of(root), clock=lambda: clock[0])
    clock[0] += 3600; r.tick()
    assert box.waiting == 1

@pytest.mark.parametrize('url', ['http://collector.example/v1/rows', 'mqtt://u:secret@broker.example', 'ftp://u:secret@x', 'https://', 'mqtts:', 'collector.example', 'https://[x'])
def test_an_address_to_which_nothing_could_be_sent_is_refused_when_it_is_given(tmp_path, url):
    with pytest.raises(EdgenbError) as e: configure(tmp_path, 'ab'*32, url)
    assert 'secret' not in str(e.value) and not (tmp_path/'telemetry.json').exists()

def test_the_password_of_a_broker_is_for_the_agent_alone(tmp_path):
    configure(tmp_path, 'ab'*32, 'mqtts://plant:secret@broker.example')
    assert (tmp_path/'telemetry.json').stat().st_mode & 0o777 == 0o600

# ---------------------------------------------------------------- clocks

def test_a_clock_that_jumped_ahead_and_back_does_not_silence_a_device(tmp_path, monkeypatch):
    root = device_at(tmp_path, 'http://127.0.0.1:9/v1/rows'); box, sent = outbox_at(root, '5f'*16), []
    monkeypatch.setattr('edgenb.fleet.reporter.send', lambda box, url: sent.append(url) or Sent(0, 1, 60.0, ''))
    clock, steady = [1_788_048_000.0], [0.0]
    r = Reporter(box, root, setup_of(root), clock=lambda: clock[0], steady=lambda: steady[0])
    def passes(seconds):
        clock[0] += seconds; steady[0] += seconds; r.tick()
    passes(3700); assert len(sent) == 1
    clock[0] += 70*365*86_400; passes(60); clock[0] -= 70*365*86_400       # ahead by seventy years, for a minute
    before = len(sent)
    for _ in range(3): passes(100)
    assert len(sent) > before

def test_uptime_is_of_the_agent_not_of_a_clock_that_was_set(tmp_path):
    root = device_at(tmp_path); box = outbox_at(root, '5f'*16)
    clock, steady = [60.0], [0.0]                        # no battery: 1970
    r = Reporter(box, root, setup_of(root), clock=lambda: clock[0], steady=lambda: steady[0])
    clock[0], steady[0] = 1_788_048_000.0, 3600.0        # then the time came over the network
    r.tick()
    assert '"edgenb.process.uptime":60' in _text(box)

# ---------------------------------------------------------------- parts and wholes, labels

@pytest.mark.parametrize('model', ['', 'ab'*32])
def test_an_interval_that_ends_between_a_part_and_its_whole_loses_neither(tmp_path, model):
    box = box_at(tmp_path)
    for name in ('edgenb.outcome.error.count', 'edgenb.outcome.count'):
        box.observe(name, 1, model)
        for _ in range(2): box.close(NOW)
    import sqlite3
    with sqlite3.connect(box.path) as db: told = [json.loads(t)['metrics'] for t, in db.execute('SELECT row FROM rows')]
    assert [m['edgenb.outcome.error.count'] for m in told if 'edgenb.outcome.count' in m] == [1] and len(told) == 4 + bool(model)

def test_a_label_that_comes_after_a_restart_is_taken(tmp_path):
    from tinyfleet import Plant, Word, prove_word, tiny_bundle
    plant = Plant(tmp_path/'plant', datetime.datetime.now(datetime.UTC).replace(microsecond=0))
    digest = tiny_bundle(tmp_path/'v1'); plant.release(tmp_path/'v1'); plant.campaign(digest)
    (tmp_path/'root.json').write_bytes(plant.root)
    service.enrol(tmp_path/'agent', tmp_path/'root.json', str(plant.path), 'plant-1', 'orin', '', 'toy', [])
    with service.Agent(tmp_path/'agent', load=Word, prove=prove_word) as agent:
        agent.poll(); agent.predict([b'x'])
    seen = []
    with service.Agent(tmp_path/'agent', lambda *told: seen.append(told), load=Word, prove=prove_word) as agent:
        agent.outcome(False, digest)
        with pytest.raises(EdgenbError, match='decided nothing here'): agent.outcome(True, 'ef'*32)
    assert [s for s in seen if 'outcome' in s[0]] == [('edgenb.outcome.error.count', 1, digest), ('edgenb.outcome.count', 1, digest)]

# ---------------------------------------------------------------- the stick

@pytest.mark.parametrize('left', [b'', b'{"cut', b'x'*5000])
def test_an_acknowledgement_that_cannot_be_used_does_not_keep_rows_from_the_stick(tmp_path, left):
    root = device_at(tmp_path); box = outbox_at(root, '5f'*16); box.close(NOW)
    stick = tmp_path/'stick'; stick.mkdir(); (stick/f'{"5f"*16}.ack.json').write_bytes(left)
    words = by_stick(box, stick)
    assert '1 rows in 1 files' in words and 'acknowledgement' in words and list(stick.glob('*.rows.json'))

# ---------------------------------------------------------------- sums that would invert

def features(rows, seed=0):
    phase = np.random.default_rng(seed).normal(size=(rows, FEATURES//2))
    return np.concatenate([np.cos(phase), np.sin(phase)], 1)

def sums_of(box):
    for n in range(4):
        row = box.close(NOW + 1500*(n + 1))
        if 'edgenb.drift.sums' in row['metrics']: return row['metrics']

def box_at(folder):
    root = device_at(folder)
    return outbox_at(root, '5f'*16)

def test_drift_sums_of_one_input_that_is_repeated_are_never_told(tmp_path):
    box, one = box_at(tmp_path), features(1)
    for _ in range(30):                                   # a frozen camera, over many intervals
        for _ in range(100): box.observe('edgenb.drift.sums', one)
        assert 'edgenb.drift.sums' not in box.close(NOW, force=True)['metrics']
    assert sums_of(box) is None

def test_a_repeated_input_weighs_no_more_in_drift_sums_than_any_other(tmp_path):
    box, one = box_at(tmp_path), features(1)
    box.observe('edgenb.drift.sums', features(600, 1))
    for _ in range(600): box.observe('edgenb.drift.sums', one)
    told = sums_of(box)
    assert told['edgenb.drift.rows'] in (600, 601) and np.abs(np.array(told['edgenb.drift.sums'])/16 - features(600, 1).mean(0)).max() < 0.1

def test_drift_sums_of_inputs_that_are_all_alike_wait_for_others(tmp_path):
    box = box_at(tmp_path)
    phase = np.random.default_rng(0).normal(size=FEATURES//2) + 0.05*np.random.default_rng(1).normal(size=(600, FEATURES//2))     # one scene, and the noise of the sensor
    alike = np.concatenate([np.cos(phase), np.sin(phase)], 1)
    assert (alike.mean(0)**2).sum() > ALIKE*FEATURES/2
    box.observe('edgenb.drift.sums', alike)
    assert sums_of(box) is None
    box.observe('edgenb.drift.sums', features(600, 2))
    assert sums_of(box)['edgenb.drift.rows'] > 1000
