"""Rows are stored once, whatever is killed on the way; alerts ring as rarely as they say; feedback needs consent."""
import datetime, hashlib, json, os, random, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from edgenb.core import EdgenbError
from edgenb.fleet import alerts, feedback
from edgenb.fleet.collector import accept, collector_key, enrol, import_folder, retire, store, take
from edgenb.fleet.envelope import ROWS, new_key, public_of, sealed_ack, signer_of, unverified
from edgenb.fleet.outbox import Outbox, acknowledge, batch, export_files, import_acks, send
from edgenb.fleet.schema import Refused, encode

NOW = 29_800_800
MOSQUITTO = shutil.which('mosquitto', path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}")

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def enrolled(folder, n=0):
    "A collector, and a device that knows it."
    db = folder/'fleet.db'
    key = folder/f'device{n}.key'
    told = enrol(db, new_key(key), 'plant-1', 'orin', minute=NOW)
    return db, key, told

def counts(db):
    "What is stored: (boot, seq) and the decisions of every row."
    with store(db) as d: return d.execute("SELECT boot, seq, json_extract(metrics, '$.\"edgenb.decision.count\"') FROM rows ORDER BY device, boot, seq").fetchall()

# ---------------------------------------------------------------- killed processes

DEVICE = '''
import sys, time
from edgenb.fleet.outbox import Outbox
folder, device, collector, minute = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
box = Outbox(folder + '/outbox.db', device, folder + '/device0.key', collector, most=5000)
for n in range(10**6):
    box.observe('edgenb.decision.count', 1)
    row = box.close(minute, force=True)
    print(row['boot'], row['seq'], flush=True)
'''
SENDER = '''
import sys, time
from edgenb.fleet.outbox import Outbox, send
folder, device, collector, url = sys.argv[1:]
box = Outbox(folder + '/outbox.db', device, folder + '/device0.key', collector, most=5000)
while True:
    send(box, url); box.failures = 0
    time.sleep(0.02)
'''
COLLECTOR = '''
import sys
from edgenb.fleet.collector import server
server(sys.argv[1], port=int(sys.argv[2]), budget=10**9).serve_forever()
'''

def start(code, *args): return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
def kill(process): process.send_signal(signal.SIGKILL); process.wait()

def test_rows_survive_kills_of_device_sender_and_collector_each_stored_once(tmp_path):
    db, _, told = enrolled(tmp_path)
    port, rng, said = free_port(), random.Random(0), []
    collector = start(COLLECTOR, db, port)
    for life in range(4):
        sender = start(SENDER, tmp_path, told['id'], told['collector'], f'http://127.0.0.1:{port}/v1/rows')
        device = start(DEVICE, tmp_path, told['id'], told['collector'], NOW)
        for _ in range(rng.randrange(20, 50)): said.append(tuple(map(int, device.stdout.readline().split())))   # closed, so it must arrive
        kill(device)
        kill(collector); collector = start(COLLECTOR, db, port)
        kill(sender)
    box = Outbox(tmp_path/'outbox.db', told['id'], tmp_path/'device0.key', told['collector'], most=5000)
    for _ in range(600):
        if not send(box, f'http://127.0.0.1:{port}/v1/rows').waiting: break
        time.sleep(0.1)
    kill(collector)
    stored = counts(db)
    keys = [k[:2] for k in stored]
    assert box.waiting == 0 and len(keys) == len(set(keys)) and set(said) <= set(keys) and all(n == 1 for *_, n in stored)
    assert len(stored) - len(said) <= 4*3000 and {b for b, _ in keys} == {0, 1, 2, 3}
    for b in range(4): assert sorted(s for boot, s in keys if boot == b) == list(range(sum(boot == b for boot, _ in keys)))   # no gap

@pytest.mark.skipif(not MOSQUITTO, reason='mosquitto is not installed')
def test_a_killed_broker_loses_no_row(tmp_path):
    pytest.importorskip('paho.mqtt.client')
    import threading
    from edgenb.fleet.mqtt import collect_mqtt, send_mqtt
    db, key, told = enrolled(tmp_path)
    box, port, stop = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector']), free_port(), threading.Event()
    def broker():
        p = subprocess.Popen([MOSQUITTO, '-p', str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try: socket.create_connection(('127.0.0.1', port), 1).close(); return p
            except OSError: time.sleep(0.05)
    running = broker()
    collecting = threading.Thread(target=collect_mqtt, args=(db, f'mqtt://127.0.0.1:{port}'), kwargs={'stop': stop}, daemon=True); collecting.start()
    for n in range(60):
        box.observe('edgenb.decision.count', 1); box.close(NOW + 5*n)
        if n == 30:
            from edgenb.fleet.envelope import MOST   # a batch that the broker has, and nobody else yet
            killer = threading.Timer(0.05, lambda: kill(running)); killer.start()
            send_mqtt(box, f'mqtt://127.0.0.1:{port}', patience=1); killer.join(); running = broker()
    for _ in range(60):
        if not send_mqtt(box, f'mqtt://127.0.0.1:{port}', patience=2).waiting: break
    stop.set(); collecting.join(10); kill(running)
    assert box.waiting == 0 and sum(n for *_, n in counts(db)) == 60 and len(counts(db)) == 60

AGENT = '''
import functools, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tinyfleet import Word, prove_word
from edgenb.agent import service
service.Agent = functools.partial(service.Agent, load=Word, prove=prove_word)
service.run(Path(sys.argv[1]), 0)
'''

def test_an_agent_that_runs_reports_what_it_decides_and_its_update(tmp_path):
    import urllib.request
    from tinyfleet import Plant, tiny_bundle
    from edgenb.agent.service import enrol as agent_enrol
    from edgenb.agent.storage import load_device
    from edgenb.fleet.reporter import configure, outbox_at, public_key
    plant = Plant(tmp_path/'plant', datetime.datetime.now(datetime.UTC).replace(microsecond=0))
    digest = tiny_bundle(tmp_path/'v1'); plant.release(tmp_path/'v1'); plant.campaign(digest)
    (tmp_path/'root.json').write_bytes(plant.root)
    device = agent_enrol(tmp_path/'agent', tmp_path/'root.json', str(plant.path), 'plant-1', 'orin', '', 'toy', [])
    db = tmp_path/'fleet.db'
    told = enrol(db, public_key(tmp_path/'agent'), device.site, device.hardware, device.id); accept(db, digest)
    configure(tmp_path/'agent', told['collector'])
    running = start(AGENT, tmp_path/'agent', Path(__file__).parent)
    address = running.stdout.readline().split(', ')[1]
    running.send_signal(signal.SIGHUP)       # look now
    for _ in range(600):     # until the first model serves
        try:
            request = urllib.request.Request(f'{address}/v1/predict', b'x', {'Content-Type': 'image/png'})
            urllib.request.urlopen(request, timeout=5).read(); break
        except OSError: time.sleep(0.2)
    for _ in range(25):
        try: urllib.request.urlopen(urllib.request.Request(f'{address}/v1/predict', b'x', {'Content-Type': 'image/png'}), timeout=5).read()
        except OSError: pass
    for correct in (True, False, True):
        urllib.request.urlopen(urllib.request.Request(f'{address}/v1/outcome', json.dumps({'model': digest, 'correct': correct}).encode()), timeout=5).read()
    running.send_signal(signal.SIGTERM); assert running.wait(30) == 0
    box = outbox_at(tmp_path/'agent', load_device(tmp_path/'agent').id)
    assert box.waiting >= 1
    take(db, batch(box)[0])
    with store(db) as d: rows = [(m, json.loads(t)) for m, t in d.execute('SELECT m.digest, r.metrics FROM rows r LEFT JOIN models m ON m.id = r.model')]
    assert sum(m.get('edgenb.decision.count', 0) for d, m in rows if d == digest) >= 25 and rows[0][1]['edgenb.process.restart.count'] == 1
    assert [sum(m.get(f'edgenb.outcome.{n}', 0) for d, m in rows if d == digest) for n in ('count', 'error.count')] == [3, 1]

def test_an_agent_that_is_killed_says_so_at_its_next_start_and_one_that_is_stopped_does_not(tmp_path):
    "What the guard `crashes` of a rollout judges by; nothing told it before."
    from tinyfleet import Plant, tiny_bundle
    from edgenb.agent.service import enrol as agent_enrol
    from edgenb.agent.storage import Store, load_device
    from edgenb.fleet.collector import evidence
    from edgenb.fleet.cohorts import ALL
    from edgenb.fleet.reporter import configure, outbox_at, public_key
    plant = Plant(tmp_path/'plant', datetime.datetime.now(datetime.UTC).replace(microsecond=0))
    digest = tiny_bundle(tmp_path/'v1'); plant.release(tmp_path/'v1'); plant.campaign(digest)
    (tmp_path/'root.json').write_bytes(plant.root)
    device = agent_enrol(tmp_path/'agent', tmp_path/'root.json', str(plant.path), 'plant-1', 'orin', '', 'toy', [], trial_s=1)
    db = tmp_path/'fleet.db'
    told = enrol(db, public_key(tmp_path/'agent'), device.site, device.hardware, device.id); accept(db, digest)
    configure(tmp_path/'agent', told['collector'])
    def serves(): return (h := Store(tmp_path/'agent').load().serving()) and h.good
    for end in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM):
        running = start(AGENT, tmp_path/'agent', Path(__file__).parent)
        assert 'http' in running.stdout.readline()
        if not serves(): running.send_signal(signal.SIGHUP)
        for _ in range(600):
            if serves(): break
            time.sleep(0.1)
        assert serves()
        running.send_signal(end); running.wait(30); running.stdout.close()
    box = outbox_at(tmp_path/'agent', load_device(tmp_path/'agent').id)
    take(db, batch(box)[0])
    with store(db) as d: assert sum(json.loads(t).get('edgenb.process.crash.count', 0) for t, in d.execute('SELECT metrics FROM rows')) == 2
    now = int(time.time()//60) + 10
    e = evidence(db, {'release': digest, 'replaces': None, 'seed': 'ab', 'strata': ['site', 'hardware'], 'cutoffs': {'*': ALL}}, now - 500, now - 400, now)
    assert e.arm.tolist() == [1] and e.crashes.tolist() == [2]
    (tmp_path/'agent/running').write_text('before the power went')
    running = start(AGENT, tmp_path/'agent', Path(__file__).parent); running.stdout.readline(); running.send_signal(signal.SIGTERM); running.wait(30); running.stdout.close()
    assert box.waiting and 'crash' not in str([json.loads(r) for r in rows_waiting(tmp_path/'agent/telemetry.db')])


def rows_waiting(path):
    import sqlite3
    from contextlib import closing
    with closing(sqlite3.connect(path)) as db: return [r for r, in db.execute('SELECT row FROM rows WHERE NOT handed_out')]

# ---------------------------------------------------------------- whatever the order

class Deliveries(RuleBasedStateMachine):
    "One device, a small outbox, answers that get lost, sticks that come late, restarts: what was decided is counted once."
    @initialize()
    def begin(self):
        import tempfile
        self.folder = Path(tempfile.mkdtemp()); self.db, self.key, self.told = enrolled(self.folder)
        self.minute, self.decided, self.lost, self.answers = NOW, 0, 0, []
        self.box = self.opened()

    def opened(self): return Outbox(self.folder/'outbox.db', self.told['id'], self.key, self.told['collector'], most=6)

    @rule(n=st.integers(1, 3))
    def interval(self, n):
        self.minute += 60
        for _ in range(n): self.box.observe('edgenb.decision.count', 1)
        self.decided += n
        assert self.box.close(self.minute) is not None

    @rule()
    def restart(self): self.box = self.opened()     # all is closed at this point, so nothing is in memory

    @rule()
    def disk_is_replaced(self):     # after all was delivered, or its rows would be gone
        if self.box.waiting: return
        for p in self.folder.glob('outbox.db*'): p.unlink()
        self.box = self.opened()

    @rule(answer=st.sampled_from(['arrives', 'late', 'lost']))
    def sends(self, answer):
        data, _ = batch(self.box)
        if data is None: return
        ack = take(self.db, data, self.minute)
        if answer == 'arrives': acknowledge(self.box, ack)
        if answer == 'late': self.answers.append(ack)

    @rule()
    def a_late_answer(self):
        if self.answers: acknowledge(self.box, self.answers.pop(0))

    @rule()
    def an_old_answer_again(self):
        if self.answers: acknowledge(self.box, self.answers[0])

    @rule()
    def packets_get_lost(self): batch(self.box)

    @rule()
    def onto_the_stick(self): export_files(self.box, self.folder/'stick')

    @rule()
    def the_stick_arrives(self):
        if list((self.folder/'stick').glob('*.rows.json')): import_folder(self.db, self.folder/'stick', self.minute)

    @rule()
    def the_stick_comes_back(self): import_acks(self.box, self.folder/'stick')

    @invariant()
    def nothing_is_counted_twice(self):
        if hasattr(self, 'db'): assert sum(n or 0 for *_, n in counts(self.db)) <= self.decided

    def teardown(self):
        if not hasattr(self, 'db'): return
        for _ in range(4):
            data, _ = batch(self.box)
            if data is not None: acknowledge(self.box, take(self.db, data, self.minute))
        assert self.box.waiting == 0 and sum(n or 0 for *_, n in counts(self.db)) == self.decided
        shutil.rmtree(self.folder)

Deliveries.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
test_whatever_the_order_every_decision_is_counted_once = Deliveries.TestCase

def test_a_device_with_a_new_disk_is_not_taken_for_its_old_self(tmp_path):
    db, key, told = enrolled(tmp_path)
    old = Outbox(tmp_path/'old.db', told['id'], key, told['collector'])
    for n in range(5): old.observe('edgenb.decision.count', 1); old.close(NOW + 60*n)
    acknowledge(old, take(db, batch(old)[0], NOW + 300))
    new = Outbox(tmp_path/'new.db', told['id'], key, told['collector'])        # the same key, nothing else
    for n in range(7): new.observe('edgenb.decision.count', 2); new.close(NOW + 600 + 60*n)
    for _ in range(3):
        if (data := batch(new)[0]) is not None: acknowledge(new, take(db, data, NOW + 1200))
    assert new.waiting == 0 and sum(n for *_, n in counts(db)) == 5 + 14 and new.close(NOW + 1300)['boot'] == 1

def test_a_stick_from_before_the_disk_was_replaced_makes_no_row_count_twice(tmp_path):
    db, key, told = enrolled(tmp_path)
    def box(name): return Outbox(tmp_path/name, told['id'], key, told['collector'])
    def decides(box): box.observe('edgenb.decision.count', 1); box.close(NOW)
    old, new = box('old.db'), box('new.db')
    decides(old); export_files(old, tmp_path/'stick'); acknowledge(old, take(db, batch(old)[0], NOW))
    decides(new)
    acknowledge(new, take(db, batch(new)[0], NOW)); acknowledge(new, take(db, batch(new)[0], NOW))     # these keys are used; then with others
    decides(new); take(db, batch(new)[0], NOW)                                                          # committed, and the answer is lost
    import_folder(db, tmp_path/'stick', NOW); import_acks(new, tmp_path/'stick')                        # the old stick turns up
    acknowledge(new, take(db, batch(new)[0], NOW))
    assert new.waiting == 0 and sum(n for *_, n in counts(db)) == 3

def certificate(folder):
    "A certificate for this machine, signed by itself."
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    import ipaddress
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'collector')]), datetime.datetime.now(datetime.UTC)
    cert = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1).not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address('127.0.0.1'))]), critical=False).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256()))
    (folder/'cert.pem').write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder/'key.pem').write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return str(folder/'cert.pem'), str(folder/'key.pem')

def test_over_tls_a_device_sends_only_to_a_collector_whose_certificate_it_trusts(tmp_path):
    import threading
    from edgenb.fleet.collector import server
    db, key, told = enrolled(tmp_path)
    cert, private = certificate(tmp_path)
    s = server(db, cert=cert, key=private); threading.Thread(target=s.serve_forever, daemon=True).start()
    box, url = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector']), f'https://127.0.0.1:{s.server_address[1]}/v1/rows'
    box.close(NOW)
    silent = socket.create_connection(s.server_address)          # says nothing, and holds up nobody
    untrusted = send(box, url)
    assert untrusted.rows == 0 and 'SSL' in untrusted.why and counts(db) == []
    assert send(box, url, ca=cert).rows == 1 and box.waiting == 0
    silent.close(); s.shutdown(); s.server_close()
    with pytest.raises(EdgenbError, match='certificate'): server(db, cert=str(tmp_path/'no.pem'))

def test_nobody_but_its_collector_makes_a_device_forget(tmp_path):
    db, key, told = enrolled(tmp_path)
    box = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector'])
    row = box.close(NOW)
    sha, stranger = hashlib.sha256(encode(row)).hexdigest(), tmp_path/'stranger.key'
    new_key(stranger)
    other, life = enrol(db, 'cd'*32, 'plant-1', 'orin')['id'], unverified(batch(box)[0], ROWS)[1]['life']
    for forged in (sealed_ack(told['id'], life, (0, 0), sha, 0, signer_of(stranger)), sealed_ack(other, life, (0, 0), sha, 0, signer_of(collector_key(db))), b'', b'{}', batch(box)[0]):
        with pytest.raises(Refused): acknowledge(box, forged)
    assert box.waiting == 1

def test_a_retired_device_is_not_heard(tmp_path):
    db, key, told = enrolled(tmp_path)
    box = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector'])
    box.close(NOW); retire(db, told['id'])
    with pytest.raises(Refused, match='not enrolled'): take(db, batch(box)[0], NOW)

def test_a_model_that_is_not_known_waits_on_the_device(tmp_path):
    db, key, told = enrolled(tmp_path)
    box = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector'], model='ab'*32)
    box.close(NOW)
    with pytest.raises(Refused): take(db, batch(box)[0], NOW)
    assert [a.kind for a in alerts.look(db, NOW + 60) if a.kind == 'off-version'] == ['off-version']      # somebody is told
    accept(db, 'ab'*32)
    assert acknowledge(box, take(db, batch(box)[0], NOW + 70))['gone'] == 1 and box.waiting == 0

def test_a_damaged_outbox_says_so(tmp_path):
    _, key, told = enrolled(tmp_path)
    (tmp_path/'outbox.db').write_bytes(b'not a database at all'*100)
    with pytest.raises(EdgenbError, match='outbox'): Outbox(tmp_path/'outbox.db', told['id'], key, told['collector'])

def test_histograms_are_never_of_few_decisions(tmp_path):
    db, key, told = enrolled(tmp_path)
    box = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector'])
    rows = []
    for n in range(30):
        for _ in range(3): box.observe('edgenb.decision.confidence', 0.95)
        rows.append(box.close(NOW + 60*n))
    shown = [sum(r['metrics']['edgenb.decision.confidence']) for r in rows if 'edgenb.decision.confidence' in r['metrics']]
    assert shown == [21]*4         # 7 intervals of 3 together; what is left waits
    box.set_model('ab'*32)
    assert 'edgenb.decision.confidence' not in box.close(NOW + 1860)['metrics']     # six of the old model are not told as the new one's

def many_files(tmp_path, monkeypatch, rows=12):
    "A stick with a file a row."
    monkeypatch.setattr('edgenb.fleet.outbox.FULL', 1)
    db, key, told = enrolled(tmp_path)
    box = Outbox(tmp_path/'outbox.db', told['id'], key, told['collector'])
    for n in range(rows): box.observe('edgenb.decision.count', 1); box.close(NOW + 60*n)
    return db, box, export_files(box, tmp_path/'stick')

def test_a_stick_with_more_than_ten_files_is_taken_in_order(tmp_path, monkeypatch):
    db, box, files = many_files(tmp_path, monkeypatch)
    assert len(files) == 12 and import_folder(db, tmp_path/'stick', NOW + 900)['files'] == 12
    assert import_acks(box, tmp_path/'stick') == 12 and len(counts(db)) == 12

@pytest.mark.parametrize('what', ['missing', 'damaged', 'over the budget'])
def test_rows_that_did_not_arrive_are_never_acknowledged_by_a_later_file(tmp_path, monkeypatch, what):
    db, box, files = many_files(tmp_path, monkeypatch, 6)
    data = files[2].read_bytes()
    if what == 'missing': files[2].unlink()
    elif what == 'damaged': files[2].write_bytes(data[:-5])
    else:
        monkeypatch.setattr('edgenb.fleet.collector.capacity', lambda row, models: 1e12 if row['seq'] == 2 else 1.0)
    told = import_folder(db, tmp_path/'stick', NOW + 900)
    assert told['refused']['gap'] == 3 and import_acks(box, tmp_path/'stick') == 2 and box.waiting == 4
    monkeypatch.undo()
    assert acknowledge(box, take(db, batch(box)[0], NOW + 900))['gone'] == 4 and len(counts(db)) == 6     # and nothing is lost

# ---------------------------------------------------------------- alerts

def test_different_from_the_cohort_rings_about_as_often_as_was_permitted():
    rng, months = np.random.default_rng(11), 24
    stratum = np.array([f'plant-{i % 12}/{"orin" if i < 240 else "pi5"}' for i in range(340)])
    level = 1/(alerts.DAYS*len(alerts.COMPARED)*340)
    false = sum(alerts.odd(rng.normal(size=340), stratum, level, 0)[0].sum() for _ in range(months*alerts.DAYS*len(alerts.COMPARED)))
    assert 8 <= false <= 42           # 24 permitted; Poisson leaves these bounds once in ten thousand

@pytest.mark.parametrize('devices', [1, 12, 340, 10_000])
def test_drift_alarms_beyond_chance_are_as_rare_as_was_permitted(devices):
    rng, days = np.random.default_rng(3), max(30, 300_000//devices)
    false = (rng.poisson(1/30, (days, devices)) >= alerts.alarms_beyond_chance(devices)).sum()
    assert false/days*30 <= 1 + 3*np.sqrt(30/days)

@pytest.mark.parametrize('devices', [29, 340, 2500, 5000])
def test_drift_alarms_are_as_rare_as_was_permitted_however_often_one_looks(devices):
    at, k = np.cumsum(np.random.default_rng(4).exponential(30, 500_000)), alerts.alarms_beyond_chance(devices)     # days: 41,000 years of one device
    complete = at[k - 1:][at[k - 1:] - at[:len(at) - k + 1] < 1]           # within any day, not only from midnight to midnight
    opened = 1 + (np.diff(complete) > 1.1).sum() if len(complete) else 0
    assert opened/at[-1]*30*devices <= 1.1

def test_labels_for_the_model_before_do_not_make_a_device_look_idle(tmp_path):
    db, day = tmp_path/'fleet.db', NOW//1440*1440
    ids = [enrol(db, f'{i:064x}', 'plant-1', 'orin', minute=day)['id'] for i in range(12)]
    rng = np.random.default_rng(0)
    with store(db, write=True) as d:
        for i in range(12):
            for hour in range(24):
                row = {'edgenb.decision.count': int(rng.integers(95, 106)), 'edgenb.interval.duration': 60, 'edgenb.telemetry.queue': 0}
                for n, m in enumerate([{'edgenb.interval.duration': 60, 'edgenb.outcome.count': 5}]*(i == 3) + [row]):     # device 3 runs a new model, and is told of the old one's decisions
                    d.execute('INSERT INTO rows (device, boot, seq, at, received, clock, metrics) VALUES (?, 0, ?, ?, ?, 0, ?)', (i + 1, 2*hour + n, day + 60*hour, day + 60*hour, json.dumps(m)))
            d.execute('UPDATE devices SET received = ? WHERE id = ?', (day + 1440, i + 1))
    assert [a for a in alerts.look(db, day + 1445) if a.kind == 'different'] == []

def test_an_alert_does_not_flap():
    rng, open_, opened = np.random.default_rng(0), {}, 0
    for minute in range(0, 6000, 5):
        found = [alerts.Finding('5f', 'hot', bool(held), '') for t in [rng.normal(84, 3)] if (held := alerts.held_against(t, (85, 78))) is not False]
        before = set(open_)
        open_, over = alerts.turned(open_, found, minute, 60)
        opened += len(set(open_) - before)
    assert opened == 1

def test_a_collector_that_is_not_there_is_named_not_made(tmp_path):
    from edgenb.cli import main
    assert main(['fleet', 'status', '--db', str(tmp_path/'no.db')]) == 2 and not list(tmp_path.iterdir())

# ---------------------------------------------------------------- feedback

WHEN = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)

def organisation(folder):
    private, public = feedback.keygen(folder/'reviewers', 'five random words here')
    return private, feedback.public_key(public)

def case(box, folder, **kw): return feedback.keep(box, signer_of(folder/'device.key'), '5f'*16, **{'data': b'the scratch on die 14', 'media': 'image/png', 'model': 'ab'*32, 'suggested': 'none', 'confidence': 0.6, 'label': 'scratch', 'who': 'C. Oduya', 'now': WHEN} | kw)

def test_no_case_is_kept_without_consent(tmp_path):
    new_key(tmp_path/'device.key'); _, public = organisation(tmp_path); box = tmp_path/'box'
    def refused(**kw):
        with pytest.raises(EdgenbError, match='consent'): case(box, tmp_path, **kw)
        assert not list(box.glob('*.case*'))
    refused()
    feedback.consent(box, 'A. Berg', ['uncertain'], 30, public, WHEN)
    refused()                                                             # not for corrections
    feedback.consent(box, 'A. Berg', ['corrections'], 30, public, WHEN)
    refused(now=WHEN + datetime.timedelta(days=30)); refused(label=None, who='')
    case(box, tmp_path)
    assert feedback.withdraw(box, 'A. Berg', WHEN) == 1
    refused()
    (box/'consent.json').write_text('{')
    with pytest.raises(EdgenbError, match='damaged'): case(box, tmp_path)

def test_what_is_kept_can_be_read_with_the_organisations_key_alone(tmp_path):
    key, (private, public), box = new_key(tmp_path/'device.key'), organisation(tmp_path), tmp_path/'box'
    feedback.consent(box, 'A. Berg', ['corrections', 'uncertain'], 30, public, WHEN)
    case(box, tmp_path); case(box, tmp_path, data=b'unsure', label=None, who='')
    for p in box.iterdir(): assert p.name == 'consent.json' or not any(word in p.read_bytes() for word in (b'scratch', b'Oduya', b'unsure'))
    assert feedback.export(box, tmp_path/'stick', WHEN) == 2
    other, _ = feedback.keygen(tmp_path/'other', 'five random words here')
    assert feedback.import_cases(tmp_path/'stick', tmp_path/'a', other, 'five random words here', {'5f'*16: key})['refused'] == {'it was encrypted to another key': 2}
    told = feedback.import_cases(tmp_path/'stick', tmp_path/'home', private, 'five random words here', {'5f'*16: key})
    assert (told['corrections'], told['to_review'], told['refused']) == (1, 1, {})
    from edgenb.data import load_examples
    assert [(e.label, e.read()) for e in load_examples(tmp_path/'home'/'examples.jsonl')] == [('scratch', b'the scratch on die 14')]     # nobody has looked at the other

@pytest.mark.parametrize('damage', ['flipped', 'swapped', 'cut', 'gone'])
def test_a_case_that_was_changed_on_the_way_is_refused_and_the_others_count(tmp_path, damage):
    key, (private, public), box = new_key(tmp_path/'device.key'), organisation(tmp_path), tmp_path/'box'
    feedback.consent(box, 'A. Berg', ['corrections'], 30, public, WHEN)
    for n in range(3): case(box, tmp_path, data=b'die %d' % n)
    feedback.export(box, tmp_path/'stick', WHEN)
    a, b, _ = sorted((tmp_path/'stick').glob('*.case'))
    data = a.read_bytes()
    if damage == 'gone': a.unlink()
    else: a.write_bytes({'flipped': data[:-1] + bytes([data[-1] ^ 1]), 'swapped': b.read_bytes(), 'cut': data[:100]}[damage])
    told = feedback.import_cases(tmp_path/'stick', tmp_path/'home', private, 'five random words here', {'5f'*16: key})
    assert told['corrections'] == 2 and sum(told['refused'].values()) == 1

def test_telemetry_refuses_a_case(tmp_path):
    db, key, told = enrolled(tmp_path)
    shutil.copy(key, tmp_path/'device.key'); _, public = organisation(tmp_path); box = tmp_path/'box'
    feedback.consent(box, 'A. Berg', ['corrections'], 30, public, WHEN)
    path = case(box, tmp_path)
    for data in (path.read_bytes(), path.with_suffix('').read_bytes()):
        with pytest.raises(Refused): take(db, data, NOW)
    assert counts(db) == []
