"""What a collector does when it is treated badly: slow strangers, a lost key, a crash while it is made, devices that were stolen."""
import json, socket, threading, time
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from edgenb.cli import main
from edgenb.core import EdgenbError
from edgenb.fleet import collector
from edgenb.fleet.collector import accept, collector_key, enrol, retire, server, store, take
from edgenb.fleet.envelope import ROWS, new_key, public_of, seal, signer_of
from edgenb.fleet.outbox import Outbox, acknowledge, batch, send
from edgenb.fleet.schema import METRICS, Refused

NOW = 29_800_800

def device_of(folder):
    db = folder/'fleet.db'
    told = enrol(db, new_key(folder/'device.key'), 'plant-1', 'orin', minute=NOW)
    return db, told, Outbox(folder/'outbox.db', told['id'], folder/'device.key', told['collector'])

def test_strangers_that_send_a_header_now_and_then_hold_no_connection_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(collector, 'SECONDS', 1); monkeypatch.setattr(collector, 'AT_ONCE', 4)
    db, told, box = device_of(tmp_path); box.close(NOW)
    s = server(db); threading.Thread(target=s.serve_forever, daemon=True).start()
    slow, stop = [socket.create_connection(s.server_address) for _ in range(4)], threading.Event()
    for c in slow: c.sendall(b'POST /v1/rows HTTP/1.1\r\n')
    def drip():
        while not stop.wait(0.3):
            for c in slow:
                try: c.sendall(b'X-A: b\r\n')
                except OSError: pass
    threading.Thread(target=drip, daemon=True).start()
    time.sleep(0.5); url = f'http://127.0.0.1:{s.server_address[1]}/v1/rows'
    assert send(box, url).rows == 0                       # all connections are taken
    until, sent = time.monotonic() + 8, 0
    while not sent and time.monotonic() < until: time.sleep(0.3); sent = send(box, url).rows
    stop.set(); s.shutdown(); s.server_close()
    assert sent == 1

def test_a_collector_whose_key_was_lost_says_so_instead_of_making_another(tmp_path, capsys):
    db, told, box = device_of(tmp_path); key = collector_key(db); data = key.read_bytes(); key.unlink()
    with pytest.raises(EdgenbError, match='backup'): server(db)
    assert main(['collect', 'key', '--db', str(db)]) == 2 and not key.exists()
    key.write_bytes(data); server(db).server_close()

def test_a_crash_while_a_collector_was_made_does_not_spoil_it(tmp_path):
    (tmp_path/'fleet.db').touch()
    accept(tmp_path/'fleet.db', 'ab'*32)
    db, told, box = device_of(tmp_path); box.close(NOW)
    assert acknowledge(box, take(db, batch(box)[0], NOW))['gone'] == 1

@pytest.mark.parametrize('command', [['collect', 'serve'], ['collect', 'accept', 'ab'*32], ['collect', 'mqtt', '--broker', 'mqtt://127.0.0.1'], ['collect', 'key'], ['collect', 'devices']])
def test_only_enrol_makes_a_collector(tmp_path, capsys, command):
    assert main([*command, '--db', str(tmp_path/'flet.db')]) == 2 and not list(tmp_path.iterdir())
    assert 'enrol a device first' in capsys.readouterr().err

def test_a_model_is_called_by_the_name_it_was_accepted_under(tmp_path):
    from edgenb.fleet.alerts import status
    db, told, box = device_of(tmp_path)
    for name in ('', 'wafer', ''): accept(db, 'ab'*32, name)      # a campaign's controller may know no name
    box.set_model('ab'*32); box.close(NOW)
    assert acknowledge(box, take(db, batch(box)[0], NOW))['gone'] == 1 and 'wafer abababab (1)' in status(db, NOW)

def test_cases_of_a_stolen_device_are_not_believed(tmp_path, capsys):
    db, told, _ = device_of(tmp_path); other = enrol(db, 'ab'*32, 'plant-1', 'orin')['id']
    retire(db, told['id'])
    assert main(['collect', 'devices', '--db', str(db)]) == 0 and list(json.loads(capsys.readouterr().out)) == [other]

def test_a_model_that_is_rolled_out_again_is_one_that_may_run(tmp_path):
    from edgenb.fleet import alerts
    db, told, box = device_of(tmp_path)
    for n, model in enumerate(('aa'*32, 'bb'*32, 'cc'*32, 'aa'*32)): accept(db, model, minute=NOW + n)
    box.set_model('aa'*32); box.close(NOW); take(db, batch(box)[0], NOW)
    assert [a for a in alerts.look(db, NOW + 10) if a.kind == 'off-version'] == []

def test_what_cannot_be_read_on_a_stick_does_not_keep_the_rest(tmp_path, monkeypatch):
    import os
    from edgenb.fleet.outbox import export_files
    db, told, box = device_of(tmp_path); box.close(NOW); stick = tmp_path/'stick'
    export_files(box, stick)
    (stick/'a.rows.json').mkdir(); os.mkfifo(stick/'b.rows.json'); (stick/'c.rows.json').symlink_to('/proc/self/mem')
    assert collector.import_folder(db, stick, NOW) == {'files': 1, 'refused': {'unreadable': 1}}

value = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.text(max_size=6), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from([*METRICS, 'at', 'boot', 'rows', 'device']), v, max_size=3), max_leaves=8)

@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(['envelope', 'payload', 'row', 'metrics']), st.sampled_from(['edgenb_telemetry', 'after', 'device', 'life', 'rows', 'payload', 'payloadType', 'signatures', 'at', 'boot', 'seq', 'model', 'metrics', *METRICS]), value)
def test_whatever_a_device_signs_is_taken_or_refused_and_nothing_else(tmp_path_factory, where, name, value):
    folder = tmp_path_factory.getbasetemp()/'fuzz'
    if not folder.exists(): folder.mkdir(); device_of(folder)
    db, signer = folder/'fleet.db', signer_of(folder/'device.key')
    with store(db) as d: device = d.execute('SELECT device FROM devices').fetchone()[0]
    row = {'at': NOW, 'boot': 0, 'device': device, 'metrics': {'edgenb.decision.count': 1}, 'model': None, 'seq': 1}
    said = {'edgenb_telemetry': 1, 'after': None, 'device': device, 'life': '0'*8, 'rows': [row]}
    {'payload': said, 'row': row, 'metrics': row['metrics'], 'envelope': {}}[where][name] = value
    data = seal(said, ROWS, signer)
    if where == 'envelope': data = json.dumps(json.loads(data) | {name: value}, sort_keys=True, separators=(',', ':')).encode()
    try: take(db, data, NOW)
    except Refused: pass
