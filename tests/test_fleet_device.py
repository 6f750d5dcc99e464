"""From a bundle to a device and back, with the real parts: keys, repository, stick, golden check, ONNX Runtime, the command line."""
import json, os, signal, subprocess, sys, time, urllib.request
from pathlib import Path
import numpy as np
import pytest
from edgenb.cli import main
from edgenb.fleet.keys import ceremony, unlock
from edgenb.fleet.repository import create
from edgenb.ship import load_bundle
from test_golden import make_bundle, seal, window_pipeline

ROOT = Path(__file__).resolve().parents[1]
SECRET = lambda folder: b'five random words are enough'


def campaign(release, replaces=None, state='complete', id='c1', **more):
    return {'id': id, 'name': 'm', 'release': release, 'replaces': replaces, 'state': state, 'stage': 0, 'stages': [100], 'seed': 'ab', 'strata': ['site', 'hardware'], 'cutoffs': {}, 'agent': '0.1.0', 'windows': [], 'reason': ''} | more


@pytest.fixture(scope='module')
def plant(tmp_path_factory):
    "Keys, a repository with three releases of a small network (the third answers wrongly), and a window of readings."
    here = tmp_path_factory.mktemp('plant')
    ring = ceremony(here/'keys', SECRET)
    signers = unlock(here/'keys', passphrase=SECRET)
    repository = create(here/'repository', ring, signers)
    digests = {}
    for n, (name, change) in enumerate({'one': 0.0, 'two': 0.01, 'wrong': 0.0}.items(), 1):
        folder = make_bundle(here/name, window_pipeline(), seed=3, change=change)
        if name == 'wrong':   # its network was exchanged after the golden answers were written down, and sealed again
            from test_golden import onnx_model
            onnx_model(folder/'model.onnx', (6, 32), 3, seed=8); seal(folder, artifact='wrong')
        assert repository.publish(folder, signers=signers).done
        digests[name] = json.loads((folder/'manifest.json').read_text())['digest']
    x = np.random.default_rng(5).normal(size=(3, 32)).astype(np.float32)
    np.save(here/'x.npy', x)
    return here, repository, signers, digests, {n: load_bundle(here/n).predict([(here/'x.npy').read_bytes()])[0] for n in ('one', 'two')}


def edgenb(*words, **kw):
    return subprocess.run([sys.executable, '-c', 'import sys; from edgenb.cli import main; sys.exit(main())', *map(str, words)], capture_output=True, text=True, timeout=120, env=os.environ | {'PYTHONPATH': str(ROOT)}, **kw)


def enrolled(plant, root, **device):
    repository = plant[1]
    done = edgenb('agent', 'enrol', '--root', root, '--root-json', repository.path/'metadata/1.root.json', '--repository', repository.path, '--site', 'plant-3', '--hardware', 'orin')
    assert done.returncode == 0, done.stderr
    d = json.loads((root/'device.json').read_text())
    (root/'device.json').write_text(json.dumps(d | {'reserve_mb': 0} | device))


def test_a_device_polls_proves_serves_refuses_and_goes_back_by_the_command_line_alone(plant, tmp_path):
    here, repository, signers, digests, expected = plant
    enrolled(plant, tmp_path/'agent')
    def poll(*more): return edgenb('agent', 'poll', '--root', tmp_path/'agent', *more)
    def state(): return json.loads(edgenb('agent', 'status', '--root', tmp_path/'agent', '--json').stdout)
    repository.set_campaigns({'campaigns': [campaign(digests['one'])]}, signers)
    done = poll()
    assert done.returncode == 0 and 'in use: m 1' in done.stdout, done.stdout + done.stderr
    repository.set_campaigns({'campaigns': [campaign(digests['wrong'], digests['one'], id='c2')]}, signers)
    done = poll()
    assert done.returncode == 2 and 'failed its health check' in done.stderr and 'times the tolerance' in done.stderr, done.stderr
    assert state()['serving']['digest'] == digests['one']
    repository.set_campaigns({'campaigns': [campaign(digests['two'], digests['one'], id='c3')]}, signers)
    done = poll()
    assert done.returncode == 0 and 'in use: m 2' in done.stdout, done.stdout + done.stderr
    text = edgenb('agent', 'status', '--root', tmp_path/'agent').stdout
    assert 'in use: m 2' in text and 'edgenb agent rollback goes back to it' in text and 'does not run now' in text
    assert edgenb('agent', 'rollback', '--root', tmp_path/'agent').returncode == 0 and state()['serving']['digest'] == digests['one']
    assert 'rolled back by hand' in poll().stdout and state()['serving']['digest'] == digests['one']


def test_a_device_without_a_network_is_updated_from_a_stick(plant, tmp_path):
    from edgenb.fleet.stick import export_usb
    here, repository, signers, digests, expected = plant
    enrolled(plant, tmp_path/'agent', repository='https://unreachable.invalid')
    repository.set_campaigns({'campaigns': [campaign(digests['two'], id='c9')]}, signers)
    assert export_usb(repository, tmp_path/'stick', valid_days=30, signers=signers, only=['m:2']).done
    assert edgenb('agent', 'poll', '--root', tmp_path/'agent').returncode == 2
    done = edgenb('agent', 'poll', '--root', tmp_path/'agent', '--usb', tmp_path/'stick')
    assert done.returncode == 0 and 'in use: m 2' in done.stdout, done.stdout + done.stderr
    assert edgenb('agent', 'poll', '--root', tmp_path/'agent', '--usb', tmp_path/'no-stick').returncode == 2


def test_a_running_agent_serves_over_http_is_told_to_look_and_ends_cleanly(plant, tmp_path):
    here, repository, signers, digests, expected = plant
    enrolled(plant, tmp_path/'agent', trial_s=1, poll_s=100_000)
    repository.set_campaigns({'campaigns': [campaign(digests['one'], id='d1')]}, signers)
    p = subprocess.Popen([sys.executable, '-c', 'import sys; from edgenb.cli import main; sys.exit(main())', 'agent', 'run', '--root', str(tmp_path/'agent'), '--port', '0'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    try:
        line = p.stdout.readline()
        url = next(w.rstrip(',') for w in line.split() if w.startswith('http://'))
        def ask():
            request = urllib.request.Request(f'{url}/v1/predict', (here/'x.npy').read_bytes())
            with urllib.request.urlopen(request, timeout=30) as r: return json.load(r)
        def until(digest):
            end = time.monotonic() + 90
            while True:
                assert p.poll() is None and time.monotonic() < end, edgenb('agent', 'status', '--root', tmp_path/'agent').stdout
                with urllib.request.urlopen(f'{url}/v1/model', timeout=30) as r: now = json.load(r)
                if now['model'] == digest and not now['trial']: return
                time.sleep(0.1)
        until(digests['one'])
        assert ask() == {'model': digests['one'], 'answers': [expected['one']]}
        repository.set_campaigns({'campaigns': [campaign(digests['two'], digests['one'], id='d2')]}, signers)
        done = edgenb('agent', 'poll', '--root', tmp_path/'agent')
        assert done.returncode == 0 and f'process {p.pid}' in done.stdout
        until(digests['two'])
        assert ask()['answers'] == [expected['two']]
        assert f'process {p.pid}' in edgenb('agent', 'rollback', '--root', tmp_path/'agent').stdout
        until(digests['one'])
        assert 'rolled back by hand' in edgenb('agent', 'status', '--root', tmp_path/'agent').stdout
    finally:
        p.send_signal(signal.SIGTERM)
        out, err = p.communicate(timeout=30)
    assert p.returncode == 0 and 'stopped' in out and 'Traceback' not in err, err


def test_a_model_that_hangs_crashes_or_eats_memory_in_its_health_check_hurts_nobody(tmp_path, monkeypatch):
    "Stand-ins for `edgenb.golden`: the process is real."
    from edgenb.agent import machine
    from edgenb.agent.trust import Deadline
    real = subprocess.Popen
    def body(code): monkeypatch.setattr(subprocess, 'Popen', lambda args, **kw: real([sys.executable, '-c', code], **kw))
    body('import time; time.sleep(60)')
    p = machine.prove(tmp_path, Deadline(1)); assert not p.ok and 'longer than 1 s' in p.reason
    body('import os; os.kill(os.getpid(), 11)')
    p = machine.prove(tmp_path, Deadline(20)); assert not p.ok and 'SIGSEGV' in p.reason
    body('x = []\nwhile True: x.append(bytearray(b"1")*4_000_000)')
    p = machine.prove(tmp_path, Deadline(60), memory_mb=150); assert not p.ok and 'at most 150' in p.reason
    body('print("not JSON")')
    p = machine.prove(tmp_path, Deadline(20)); assert not p.ok and 'died' in p.reason
    body('print(\'{"ok": true, "reason": "fine"}\'); raise SystemExit(1)')
    assert not machine.prove(tmp_path, Deadline(20)).ok
    body('print(\'{"ok": true, "reason": "fine"}\')')
    assert machine.prove(tmp_path, Deadline(20)).ok
