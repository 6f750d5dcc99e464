"""12,000 rows of four devices through MQTT while the broker is killed twice, the collector once and one device once: how many are stored, and how often. Then what taking and storing them costs.

    python benchmarks/telemetry.py            # needs mosquitto and edgenb[mqtt]; some minutes

Everything is SIGKILLed, which keeps what the operating system has in memory: a real power cut is governed by fsync, which SQLite does here at every commit (synchronous=FULL)."""
import os, shutil, signal, socket, sqlite3, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
from edgenb.fleet.collector import accept, enrol, store, take
from edgenb.fleet.envelope import new_key, sealed_rows, signer_of
from edgenb.fleet.schema import METRICS, encode, quantised

DEVICES, ROWS, NOW = 4, 3000, int(time.time()//60)

DEVICE = '''
import sys
from edgenb.fleet.mqtt import send_mqtt
from edgenb.fleet.outbox import Outbox
folder, n, device, collector, url, rows, minute = sys.argv[1], *sys.argv[2:]
box = Outbox(f'{folder}/outbox{n}.db', device, f'{folder}/device{n}.key', collector, most=5000)
for i in range(int(rows)):
    box.observe('edgenb.decision.count', 1); box.close(int(minute), force=True)
    if i % 100 == 99: send_mqtt(box, url, patience=3)
while box.waiting: send_mqtt(box, url, patience=3)
'''
COLLECTOR = 'import sys; from edgenb.fleet.mqtt import collect_mqtt; collect_mqtt(sys.argv[1], sys.argv[2], budget=10**9)'

def start(code, *args): return subprocess.Popen([sys.executable, '-c', code, *map(str, args)])
def kill(process): process.send_signal(signal.SIGKILL); process.wait()

def broker(mosquitto, port):
    p = subprocess.Popen([mosquitto, '-p', str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try: socket.create_connection(('127.0.0.1', port), 1).close(); return p
        except OSError: time.sleep(0.05)

def collecting(db, url):
    "A collector that is started again while there is no broker."
    p = start(COLLECTOR, db, url); time.sleep(3)
    return p if p.poll() is None else collecting(db, url)

def stored(db):
    with store(db) as d: return d.execute('SELECT count(*), count(DISTINCT device || \' \' || boot || \' \' || seq), sum(json_extract(metrics, \'$."edgenb.decision.count"\')) FROM rows').fetchone()

def kills(folder):
    mosquitto = shutil.which('mosquitto', path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}")
    if not mosquitto: sys.exit('mosquitto is not installed')
    db = folder/'fleet.db'
    told = [enrol(db, new_key(folder/f'device{n}.key'), 'plant-1', 'orin') for n in range(DEVICES)]
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    url = f'mqtt://127.0.0.1:{port}'
    running, collector = broker(mosquitto, port), None
    collector = collecting(db, url)
    def device(n, rows): return start(DEVICE, folder, n, told[n]['id'], told[n]['collector'], url, rows, NOW)
    devices = [device(n, ROWS) for n in range(DEVICES)]
    def wait_for(n):
        while stored(db)[0] < n: time.sleep(0.2)
    wait_for(1500); kill(running); print(f'broker killed, {stored(db)[0]} rows stored', flush=True); time.sleep(2); running = broker(mosquitto, port)
    wait_for(3500); kill(collector); print(f'collector killed, {stored(db)[0]} rows stored', flush=True); time.sleep(2); collector = collecting(db, url)
    wait_for(5000); kill(devices[0])
    with sqlite3.connect(folder/'outbox0.db') as d: closed = int(d.execute("SELECT value FROM meta WHERE name = 'seq'").fetchone()[0]) + 1
    print(f'device killed after {closed} of its {ROWS} rows, {stored(db)[0]} rows stored', flush=True)
    devices[0] = device(0, ROWS - closed)
    wait_for(6500); kill(running); print(f'broker killed, {stored(db)[0]} rows stored', flush=True); time.sleep(2); running = broker(mosquitto, port)
    for d in devices: assert d.wait(900) == 0
    kill(collector); kill(running)
    rows, keys, decisions = stored(db)
    print(f'{DEVICES*ROWS} rows closed: {rows} stored, {keys} different keys, {decisions} decisions counted')
    assert rows == keys == decisions == DEVICES*ROWS

def costs(folder):
    "Processor time of the collector for full rows, in envelopes of 100."
    db, rng = folder/'costs.db', np.random.default_rng(0)
    device = enrol(db, new_key(folder/'costs.key'), 'plant-1', 'orin', minute=NOW - 1440)['id']   # a budget that does not get in the way
    accept(db, 'ab'*32)
    signer = signer_of(folder/'costs.key')
    def row(n):
        metrics = {m.name: quantised(m, int(rng.integers(m.low, min(m.high, 5000) + 1))) if not m.size else [quantised(m, int(v)) for v in rng.integers(20, 400, m.size)] for m in METRICS.values() if not m.name.startswith('edgenb.drift.') and not m.name.endswith('error.count')}
        return {'device': device, 'boot': 0, 'seq': n, 'at': NOW//5*5, 'model': 'ab'*32, 'metrics': metrics}
    rows = [row(n) for n in range(3000)]
    sealed = [sealed_rows(device, '0'*8, rows[i:i + 100], signer) for i in range(0, len(rows), 100)]
    cpu, wall = time.process_time(), time.perf_counter()
    for e in sealed: take(db, e, budget=10**9)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert stored(db)[0] == len(rows)
    size = sum(p.stat().st_size for p in folder.glob('costs.db*'))
    print(f'a full row without drift sums: {np.mean([len(encode(r)) for r in rows]):.0f} bytes as written, {sum(map(len, sealed))/len(rows):.0f} on the wire, {size/len(rows):.0f} in the database; taken at {len(rows)/cpu:,.0f} rows per CPU-second ({len(rows)/wall:,.0f}/s by the clock)')

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as t: costs(Path(t)); kills(Path(t))
