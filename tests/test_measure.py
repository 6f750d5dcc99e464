"Candidates are measured side by side in processes of their own, whatever they do there; and on another machine over SSH."
import base64, contextlib, io, itertools, json, os, shlex, shutil, signal, socket, subprocess, sys, threading, time, types, zipfile
from pathlib import Path
import numpy as np
import pytest
import edgenb.measure
from edgenb.cli import main
from edgenb.core import EdgenbError, digest, digest_of, write_json
from edgenb.measure import energy_counter, measure_all, percentiles
from edgenb.pipeline import image_pipeline
from edgenb.remote import PROTOCOL, image_files, local_measure, remote_measure, verify_bundle

ACTOR = '''
import json, os, signal, sys, threading, time, types
import numpy as np
import edgenb.measure
from edgenb.runtime import Runtime, one_at_a_time

class Actor(Runtime):
    "Does what its artifact says."
    name = 'actor'
    @classmethod
    def load(cls, path, num_threads=1):
        do, calls, kept = json.loads(path.read_text()), [0], []
        def note(**what):
            if 'log' in do:
                with open(do['log'], 'a') as f: f.write(json.dumps(what | {'pid': os.getpid(), 'who': path.stem}) + chr(10))
        note(event='load')
        def states():
            "Of the other candidates' processes."
            pids = {json.loads(line)['pid'] for line in open(do['log'])} - {os.getpid()}
            return [open(f'/proc/{p}/stat').read().split(') ')[1][0] for p in pids if os.path.exists(f'/proc/{p}/stat')]
        if do.get('print'): os.write(1, b'{"a library": "prints"}' + bytes([10])); print('and Python too')
        now = [time.perf_counter()]
        if 'takes' in do: edgenb.measure.time = types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0]/2)   # a clock that only calls advance
        if do.get('thread'): threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()
        def call(x):
            start, cpu = time.perf_counter(), time.process_time()
            calls[0] += 1
            now[0] += do.get('takes', 0)
            if calls[0] == do.get('at', 1):
                if do.get('then') == 'crash': os.kill(os.getpid(), signal.SIGSEGV)
                if do.get('then') == 'exit': sys.stderr.write('out of luck'); sys.stderr.flush(); os._exit(3)
                if do.get('then') == 'hang': note(event='hang'); time.sleep(600)
                if do.get('then') == 'raise': raise ValueError('no such operator: Foo')
                if 'allocate_mb' in do: kept.append(np.ones(do['allocate_mb']*2**20, np.uint8))
            time.sleep(do.get('sleep', 0))
            while time.process_time() < cpu + do.get('work', 0): pass
            value, = x.values()
            mean = value.reshape(len(value), -1).mean(1).astype(np.float32)
            note(event='call', start=start, end=time.perf_counter(), n=len(value), mean=float(mean[0]), others=states() if 'log' in do else [])
            cores = np.full(len(value), len(os.sched_getaffinity(0)))
            return {'logits': np.stack([mean, -mean], 1), 'cores': cores}
        return one_at_a_time(call, ('image',), cls.any_batch)

class Single(Actor):
    name, any_batch = 'single', False

class Card(Actor):
    name, computes_on = 'card', 'GPU'
'''


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    "A folder that, on PYTHONPATH, is an installed package with two runtimes."
    folder = tmp_path_factory.mktemp('package')
    (folder/'actors.py').write_text(ACTOR)
    about = folder/'actors-1.0.dist-info'
    about.mkdir()
    (about/'METADATA').write_text('Metadata-Version: 2.1\nName: actors\nVersion: 1.0\n')
    (about/'entry_points.txt').write_text('[edgenb.runtimes]\nactor = actors:Actor\nsingle = actors:Single\ncard = actors:Card\n')
    return folder


@pytest.fixture(scope='module')
def python_path(package): return os.pathsep.join(filter(None, [str(package), str(Path(edgenb.__file__).parents[1]), os.environ.get('PYTHONPATH')]))


@pytest.fixture
def actor(tmp_path, python_path, monkeypatch):
    "Makes candidates that act as they are told."
    monkeypatch.setenv('PYTHONPATH', python_path)
    np.savez(tmp_path/'inputs.npz', image=np.random.default_rng(0).normal(size=(7, 3, 4)).astype(np.float32))
    def make(name, runtime='actor', **do):
        write_json(tmp_path/f'{name}.actor', do)
        return {'artifact': name, 'runtime': runtime, 'file': tmp_path/f'{name}.actor', 'pipeline': None, 'inputs': tmp_path/'inputs.npz'}
    return make


def events(log): return [json.loads(line) for line in Path(log).read_text().splitlines()]


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0] != 'Z'
    except OSError: return False


def until(true, seconds=60.0):   # ends as soon as it is true
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(0.05)
    return true()


def refused(call, *words):
    with pytest.raises(EdgenbError) as e: call()
    for w in words: assert w in str(e.value), str(e.value)
    assert 'Traceback' not in str(e.value)
    return str(e.value)


# Taking turns

def test_candidates_take_turns_in_a_random_order_and_only_one_is_at_work(actor, tmp_path):
    orders = {}
    for run, seed in enumerate([3, 3, 4]):
        log = tmp_path/f'log{run}'
        rows = measure_all([actor(n, log=str(log), sleep=0.0005) for n in 'abc'], runs=20, warm_up=0, block=4, seed=seed, batches=())
        assert [r['runs'] for r in rows] == [20]*3 and not any(r['error'] for r in rows)
        calls = sorted((e for e in events(log) if e['event'] == 'call'), key=lambda e: e['start'])
        assert all(a['end'] <= b['start'] for a, b in zip(calls, calls[1:]))         # never two at once
        assert len({e['pid'] for e in events(log)}) == 3                             # each in its own process
        assert [c['who'] for c in calls[:3]] == ['a', 'b', 'c']                      # the first decisions, on loading
        turns = [[c['who'] for c in calls[3 + i:3 + i + 5]] for i in range(0, len(calls) - 3, 5)]   # 4 timed and 1 untimed each
        assert len(turns) == 15 and all(len(set(t)) == 1 for t in turns)
        rounds = [''.join(t[0] for t in turns[i:i + 3]) for i in range(0, 15, 3)]
        assert all(sorted(r) == ['a', 'b', 'c'] for r in rounds) and len(set(rounds)) > 1
        orders[run] = rounds
    assert orders[0] == orders[1] != orders[2]


def test_runs_that_are_no_multiple_of_a_block_are_all_done(actor):
    row, = measure_all([actor('a')], runs=23, warm_up=0, block=10, batches=())
    assert row['runs'] == 23


# Figures

def test_percentiles_are_those_of_linear_interpolation():
    assert percentiles([n/1e3 for n in range(1, 101)]) == {'p50_ms': 50.5, 'p95_ms': 95.05, 'p99_ms': 99.01}


def test_figures_are_those_of_the_clock(actor):
    two, four, single = measure_all([actor('two', takes=0.002), actor('four', takes=0.004), actor('single', 'single', takes=0.002)], runs=40, warm_up=3, batches=(1, 4))
    for row, ms in ((two, 2.0), (four, 4.0)):
        assert {row[k] for k in ('p50_ms', 'p95_ms', 'p99_ms', 'model_p50_ms', 'model_p95_ms', 'model_p99_ms', 'first_ms')} == {ms} and row['spread'] == 1
        assert row['cpu_ms'] == ms/2 and row['batch_ms'] == {'1': ms, '4': ms/4} and row['batch_why'] == '' and row['load_ms'] > 0     # a batch: of each example
    assert single['batch_ms'] is None and 'one example a call' in single['batch_why'] and not single['error']


def test_a_real_time_is_no_shorter_than_the_runtime_saw_and_no_longer_than_it_was_left_alone(actor, tmp_path):
    row, = measure_all([actor('nap', sleep=0.002, log=str(tmp_path/'log'))], runs=40, warm_up=3, batches=())
    calls = [e for e in events(tmp_path/'log') if e['event'] == 'call'][5:49]        # after the first and 1 + 3 to warm up: 4 turns, each of 1 untimed and 10 timed
    timed = [(c['end'] - c['start'], after['start'] - before['end']) for n, (before, c, after) in enumerate(zip(calls, calls[1:], calls[2:]), 1) if n % 11 and n % 11 < 10]
    assert len(timed) == 36                                                          # the last of a turn has no next
    low, high = (np.percentile([t[k]*1e3 for t in timed] + [unknown]*4, 50) for k, unknown in ((0, 0), (1, 1e9)))
    assert 2.0 <= low <= row['model_p50_ms'] + 0.001 and row['model_p50_ms'] <= high + 0.001     # rounded
    assert row['model_p50_ms'] <= row['p50_ms'] <= row['p95_ms'] <= row['p99_ms'] and row['spread'] >= 1


def test_inputs_are_taken_in_turn(actor, tmp_path):
    measure_all([actor('a', log=str(tmp_path/'log'))], runs=14, warm_up=0, block=14, batches=())
    seen = [e['mean'] for e in events(tmp_path/'log') if e['event'] == 'call'][-14:]
    assert len(set(seen[:7])) == 7 and seen[:7] == seen[7:]


def test_cpu_time_is_counted_and_a_sleep_costs_none(actor):
    busy, asleep = measure_all([actor('busy', work=0.02), actor('asleep', sleep=0.02)], runs=10, warm_up=1, batches=())
    assert asleep['cpu_ms'] < 20 <= busy['cpu_ms'] and asleep['p50_ms'] >= 20


def test_peak_memory_is_a_candidates_own(actor):
    plain, heavy, after = measure_all([actor('plain'), actor('heavy', allocate_mb=200), actor('after')], runs=5, batches=())
    assert 195 < heavy['rss_mb'] - plain['rss_mb'] < 215 and abs(after['rss_mb'] - plain['rss_mb']) < 10


def test_answers_are_those_of_every_input_and_a_library_may_print(actor, tmp_path):
    loud = actor('loud', print=True)
    row, = measure_all([loud], runs=2, warm_up=0, batches=(), answers=tmp_path)
    answers, images = np.load(row['answers']), np.load(tmp_path/'inputs.npz')['image']
    assert np.array_equal(answers['logits'][:, 0], images.reshape(7, -1).mean(1).astype(np.float32))


def test_who_has_no_turn_is_stopped_even_if_its_threads_go_on(actor, tmp_path):
    log = str(tmp_path/'log')
    rows = measure_all([actor('quiet', log=log), actor('spinning', log=log, thread=True), actor('third', log=log)], runs=10, block=5, batches=(2,))
    assert not any(r['error'] for r in rows)
    others = [e['others'] for e in events(log) if e['event'] == 'call']
    assert len(others[-1]) == 2 and {state for o in others for state in o} == {'T'}


def test_a_busy_machine_is_said(actor, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (os.cpu_count() + 3.3, 0, 0))
    assert measure_all([actor('a')], runs=2, batches=())[0]['busy'] == f'load {os.cpu_count() + 3.3:.1f} on {os.cpu_count()} cores'


# What goes wrong

def test_candidates_that_fail_leave_a_row_and_the_others_go_on(actor, tmp_path, monkeypatch):
    bad = {'crash': dict(then='crash'), 'crash later': dict(then='crash', at=9), 'exit': dict(then='exit', at=5), 'hang': dict(then='hang', at=8), 'raise': dict(then='raise', at=3)}
    log = tmp_path/'log'
    candidates = [actor('good', log=str(log)), *(actor(n, log=str(log), **do) for n, do in bad.items()), actor('gone') | {'file': tmp_path/'not there.actor'},
                  actor('unknown', 'acter'), actor('inputless') | {'inputs': tmp_path/'none.npz'}, actor('last')]
    class Impatient(edgenb.measure.Measured):   # with one of them, so that a slow machine fails no other
        def ask(self, do, *a, **kw):
            if self.candidate['artifact'] == 'hang' and do == 'block': self.timeout_s = 3
            return super().ask(do, *a, **kw)
    monkeypatch.setattr(edgenb.measure, 'Measured', Impatient)
    rows = {r['artifact']: r for r in measure_all(candidates, runs=10, block=2, warm_up=2)}
    said = {'crash': 'SIGSEGV', 'crash later': 'SIGSEGV', 'exit': 'exit code 3: out of luck', 'hang': 'no answer within 3 s', 'raise': 'no such operator: Foo',
            'gone': 'not there.actor does not exist', 'unknown': 'Did you mean actor', 'inputless': 'none.npz does not exist'}
    for name, words in said.items(): assert words in rows[name]['error'] and rows[name]['p50_ms'] is None, rows[name]
    for name in ('good', 'last'): assert rows[name]['error'] == '' and rows[name]['runs'] == 10 and rows[name]['batch_ms']
    assert not any(alive(e['pid']) for e in events(log))
    assert {len(r) for r in rows.values()} == {len(rows['good'])}


@pytest.mark.parametrize('ending', [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_harness(ending, actor, tmp_path):
    log = tmp_path/'log'
    candidates = [{k: str(v) if v else v for k, v in actor(n, log=str(log), **do).items()} for n, do in (('waiting', {}), ('hanging', dict(then='hang', at=2)))]
    harness = subprocess.Popen([sys.executable, '-c', f'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)   # a job in the background ignores it\nfrom edgenb.measure import measure_all; measure_all({candidates!r}, warm_up=0)'], stderr=subprocess.DEVNULL)
    try: assert until(lambda: log.exists() and any(e['event'] == 'hang' for e in events(log)))
    finally: harness.send_signal(ending)
    harness.wait(60)
    assert len({e['pid'] for e in events(log)}) == 2 and until(lambda: not any(alive(e['pid']) for e in events(log)))


@pytest.mark.parametrize('choices, words', [({'runs': 0}, 'runs = 0'), ({'block': 0}, 'block = 0'), ({'limits': {'memory': 5}}, 'Did you mean memory_mb?'),
                                            ({'limits': {'cores': [4096]}}, 'cores = [4096]'), ({'limits': {'cores': []}}, 'cores = []'),
                                            ({'limits': {'slowdown': 0.5}}, 'slowdown = 0.5'), ({'limits': {'memory_mb': 0}}, 'memory_mb = 0')])
def test_choices_that_make_no_sense_are_refused(choices, words, actor): refused(lambda: measure_all([actor('a')], **choices), words)


def test_a_candidate_that_is_not_described_is_refused(): refused(lambda: measure_all([{'artifact': 'a', 'runtime': 'actor', 'inputs': []}]), 'does not say its file')


# A smaller machine

def test_a_memory_limit_ends_who_needs_more_and_names_the_limit(actor):
    small, big, sudden = measure_all([actor('small'), actor('big', allocate_mb=400), actor('sudden', allocate_mb=400, at=8)], runs=10, limits={'memory_mb': 256})
    assert big['error'] == sudden['error'] == 'needed more than 256 MB of memory (emulated limit)'
    assert small['error'] == '' and small['rss_mb'] < 256 and small['emulated'] == big['emulated'] == '256 MB'


def test_a_candidate_runs_on_the_cores_it_is_given_and_times_are_multiplied(actor, tmp_path):
    core = sorted(os.sched_getaffinity(0))[-1]
    row, = measure_all([actor('a', takes=0.002)], runs=5, batches=(1,), answers=tmp_path, limits={'cores': [core], 'slowdown': 3.0}, power_w=(7, 15))
    assert set(np.load(row['answers'])['cores'].tolist()) == {1}
    assert row['emulated'] == '1 core, 3.0x slower (times multiplied by 3)'
    assert row['p50_ms'] == row['first_ms'] == row['batch_ms']['1'] == 6.0 and row['cpu_ms'] == 3.0
    assert row['energy_how'].endswith('a slower machine is emulated')


# Energy

def powercap(root, **zones):
    "A tree as Linux shows it: name -> (what it counts, microjoules)."
    for zone, (name, value) in zones.items():
        folder = root/'class'/'powercap'/zone.replace('_', ':').replace('rapl', 'intel-rapl')
        folder.mkdir(parents=True)
        (folder/'name').write_text(f'{name}\n'); (folder/'energy_uj').write_text(f'{value}\n'); (folder/'max_energy_range_uj').write_text('262143328850\n')


def test_rapl_sums_packages_leaves_out_what_they_contain_and_survives_a_wrap(tmp_path):
    powercap(tmp_path, rapl_0=('package-0', 1_000_000), rapl_1=('package-1', 262_143_000_000), rapl_0_0=('core', 5), rapl_2=('psys', 7))
    set_to = lambda zone, uj: (tmp_path/'class'/'powercap'/zone/'energy_uj').write_text(str(uj))
    with energy_counter(tmp_path) as (joules, how):
        assert how == 'measured: RAPL package' and joules() == 0
        set_to('intel-rapl:0', 3_000_000); set_to('intel-rapl:0:0', 999_999_999); set_to('intel-rapl:2', 999_999_999)
        assert joules() == pytest.approx(2.0)
        set_to('intel-rapl:1', 1_671_150)      # 328,850 to the end, and 1,671,150 from the start
        assert joules() == pytest.approx(4.0) and joules() == pytest.approx(4.0)


def test_a_counter_for_root_only_is_said(tmp_path, monkeypatch):
    powercap(tmp_path, rapl_0=('package-0', 1))
    monkeypatch.setattr(os, 'access', lambda *_: False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with energy_counter(tmp_path) as (joules, how): assert joules is None and how.endswith('may be read by root only')


@pytest.fixture
def seconds(monkeypatch):
    "A clock that is a second later each time it is read; gives the readings."
    readings, count = [], itertools.count()
    monkeypatch.setattr(edgenb.measure, 'time', types.SimpleNamespace(perf_counter=lambda: readings.append(next(count)) or float(readings[-1])))
    return readings


def test_the_sensor_of_a_jetson_is_summed_up(tmp_path, seconds):
    chip = tmp_path/'class'/'hwmon'/'hwmon3'
    chip.mkdir(parents=True)
    for name, text in {'name': 'ina3221', 'in1_label': 'VDD_CPU', 'in1_input': '900', 'curr1_input': '100', 'in2_label': 'VDD_IN', 'in2_input': '5000', 'curr2_input': '2000'}.items():
        (chip/name).write_text(f'{text}\n')
    with energy_counter(tmp_path) as (joules, how):
        assert how == 'measured: INA3221 at the supply' and until(lambda: joules() >= 50)
    assert joules() == pytest.approx(10*seconds[-1])          # 10 W, for each second from the first reading on; not 0.09 W, the processor's
    assert threading.active_count() < 10


@pytest.mark.parametrize('line, watts', [('RAM 2448/7620MB CPU [1%@729] cpu@45C VDD_IN 4944mW/4900mW VDD_CPU_GPU_CV 772mW/772mW', 4.944), ('RAM 1/2MB POM_5V_IN 2430/2400 POM_5V_GPU 40/40', 2.43)])
def test_tegrastats_is_asked_where_nothing_else_may_be_read(line, watts, tmp_path, monkeypatch, seconds):
    tool = tmp_path/'tegrastats'
    tool.write_text(f'#!/bin/sh\nwhile :; do echo "{line}"; sleep 0.05; done\n'); tool.chmod(0o755)
    monkeypatch.setenv('PATH', f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with energy_counter(tmp_path/'sys') as (joules, how):
        assert how == 'measured: tegrastats' and until(lambda: joules() > 3*watts)
    counted = joules()/watts                                               # seconds since it first said anything
    assert counted == pytest.approx(round(counted)) and 3 < round(counted) <= seconds[-1]


def test_measured_energy_is_that_of_the_machine_while_it_decides(actor, monkeypatch):
    counted = iter([100, 103, 103, 113, 190, 195])     # J: before and after idling, before and after each
    @contextlib.contextmanager
    def counter(): yield (lambda: next(counted)), 'measured: a counter'
    monkeypatch.setattr(edgenb.measure, 'energy_counter', counter)
    five, ten = measure_all([actor('five', takes=0.005), actor('ten', takes=0.01)], runs=5, batches=(), power_w=(7, 15))
    assert five['energy_mj'] == pytest.approx(10e3/200, rel=0.01) and ten['energy_mj'] == pytest.approx(5e3/100, rel=0.02)   # mJ over decisions in a second
    assert five['idle_w'] == ten['idle_w'] == 3 and five['energy_how'] == ten['energy_how'] == 'measured: a counter'


def test_energy_without_a_counter_is_an_estimate_that_says_so_or_unknown(actor, monkeypatch):
    @contextlib.contextmanager
    def none(): yield None, 'no counter here'
    monkeypatch.setattr(edgenb.measure, 'energy_counter', none)
    estimate, = measure_all([actor('a', work=0.004)], runs=10, batches=(), power_w=(7, 15))
    assert estimate['energy_mj'] == pytest.approx(estimate['cpu_ms']*15/os.cpu_count(), rel=1e-3)
    assert estimate['energy_how'].startswith('estimate: ') and estimate['energy_how'].endswith('no counter here') and estimate['idle_w'] is None
    unknown, = measure_all([actor('a')], runs=2, batches=())
    assert unknown['energy_mj'] is None and unknown['energy_how'] == 'unknown: no counter here, and the power of the device is not stated'


@pytest.mark.parametrize('how, sees_the_card', [('measured: RAPL package', False), ('measured: INA3221 at the supply', True), ('measured: tegrastats', True), (None, False)])
def test_what_computes_on_a_gpu_gets_its_energy_only_from_a_counter_of_the_whole_board(how, sees_the_card, actor, monkeypatch):
    clock = itertools.count()
    @contextlib.contextmanager
    def counter(): yield (lambda: float(next(clock)), how) if how else (None, 'no counter here')
    monkeypatch.setattr(edgenb.measure, 'energy_counter', counter)
    on_card, on_processor, gone = measure_all([actor('on card', 'card', takes=0.01), actor('on processor', takes=0.01), actor('gone', 'card', then='crash')], runs=2, batches=(), power_w=(7, 15))
    if sees_the_card: assert on_card['energy_mj'] == pytest.approx(10, rel=0.02) and (on_card['energy_how'], on_card['idle_w']) == (how, 1)
    else:
        assert on_card['energy_mj'] is None and on_card['idle_w'] is None and not on_card['error']
        assert on_card['energy_how'] == f"unknown: {'the counter (RAPL) covers only the processor' if how else 'no counter here'}, and the work is done on the GPU"
    assert on_processor['energy_mj'] > 0 and on_processor['energy_how'].startswith(how or 'estimate: ') and gone['error']


def test_the_runtime_of_nvidias_gpus_says_that_it_computes_there():
    from edgenb.runtime import runtimes
    assert (runtimes()['tensorrt'].computes_on, runtimes()['onnxruntime'].computes_on) == ('GPU', 'processor')


# A bundle, here and over SSH

def make_bundle(folder, runtime='actor', **do):
    "A bundle whose model is an actor; its labels depend on the mean brightness."
    folder.mkdir()
    write_json(folder/'model.actor', do)
    image_pipeline(['clean', 'scratch'], size=16).save(folder/'pipeline.json')
    for name in ('parity.json', 'card.json', 'reference.sketch'): (folder/name).write_text('{}')
    manifest = {'edgenb_bundle': 1, 'edgenb': edgenb.__version__, 'name': 'model', 'artifact': f'{runtime}-fp32', 'runtime': runtime, 'precision': 'fp32', 'model': 'model.actor',
                'warnings': [], 'files': {p.name: digest(p) for p in sorted(folder.iterdir())}}
    write_json(folder/'manifest.json', manifest | {'digest': digest_of(manifest)})
    return folder


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    from PIL import Image
    folder, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(5)
    (folder/'some').mkdir()
    for n in range(9): Image.fromarray(rng.integers(0, 60 + 20*n, (20, 20)).clip(0, 255).astype(np.uint8)).save(folder/'some'/f'{n}.png')
    return folder


def quickly(call, *args, **kw): return call(*args, runs=4, warm_up=1, batches=(), **kw)


def test_a_bundle_is_measured_and_questioned_here(actor, tmp_path, images):
    found = quickly(verify_bundle, make_bundle(tmp_path/'bundle'), [images])
    row, = found['rows']
    assert row['p50_ms'] > 0 and row['size_mb'] >= 0 and len(found['answers']['score']) == 9 == len(found['images']) and found['machine']['cores'] == os.cpu_count()


@pytest.mark.parametrize('harm', ['changed', 'missing', 'none'])
def test_a_broken_bundle_is_refused_before_anything_is_sent(harm, actor, tmp_path, images, monkeypatch):
    bundle = make_bundle(tmp_path/'bundle')
    if harm == 'changed': (bundle/'model.actor').write_text('{"sleep": 0}')
    if harm == 'missing': (bundle/'pipeline.json').unlink()
    if harm == 'none': bundle = tmp_path/'nothing'
    monkeypatch.setenv('EDGENB_SSH', 'false')   # would end with exit code 1
    words = {'changed': 'its digest differs', 'missing': 'is missing', 'none': 'is not a bundle'}[harm]
    for on in (None, 'ssh://host'): refused(lambda: verify_bundle(bundle, [images], on), words)
    refused(lambda: remote_measure('ssh://host', bundle, image_files([images])), words)


def request(bundle, images, **changes):
    "What `remote_measure` sends."
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w') as z:
        for p in bundle.rglob('*'): z.write(p, f'bundle/{p.relative_to(bundle).as_posix()}')
        for p in images: z.write(p, f'images/{p.name}')
    header = {'protocol': PROTOCOL, 'edgenb': edgenb.__version__, 'size': len(packed.getvalue()), 'keep': False, 'choices': {'runs': 2, 'batches': []}} | changes
    return json.dumps(header).encode() + b'\n' + packed.getvalue()


def serving(there, **kw):
    there.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, '-c', 'from edgenb.remote import serve; serve()'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {'TMPDIR': str(there)}, **kw)


@pytest.mark.parametrize('harm, words', [('tampered', 'digest differs'), ('newer', 'install the same'), ('climbing', 'not part of the bundle'), (None, None)])
def test_the_device_checks_what_arrives_and_leaves_nothing(harm, words, actor, tmp_path, images):
    bundle, changes = make_bundle(tmp_path/'bundle'), {}
    if harm == 'tampered': (bundle/'model.actor').write_text('{"sleep": 0}')
    if harm == 'newer': changes = {'protocol': PROTOCOL + 1, 'edgenb': '99'}
    sent = request(bundle, sorted((images/'some').iterdir()), **changes)
    if harm == 'climbing':
        packed = io.BytesIO(sent.split(b'\n', 1)[1])
        with zipfile.ZipFile(packed, 'a') as z: z.writestr('bundle/../../../escaped', 'x')
        sent = request(bundle, [], size=len(packed.getvalue())).split(b'\n', 1)[0] + b'\n' + packed.getvalue()
    process = serving(tmp_path/'there')
    process.stdin.write(sent); process.stdin.flush()
    reply = json.loads(process.stdout.readline())
    process.communicate()
    if words: assert words in reply['error']
    else: assert np.load(io.BytesIO(base64.b64decode(reply['answers'])))['score'].shape == (9,)
    assert not any((tmp_path/'there').iterdir()) and not [*tmp_path.parent.rglob('escaped')]


@pytest.mark.parametrize('when', ['while sending', 'while measuring'])
def test_a_device_stops_and_cleans_up_when_the_connection_breaks(when, actor, tmp_path, images):
    log = tmp_path/'log'
    sent = request(make_bundle(tmp_path/'bundle', log=str(log), then='hang', at=3), sorted((images/'some').iterdir()))
    process = serving(tmp_path/'there')
    process.stdin.write(sent if when == 'while measuring' else sent[:-100]); process.stdin.flush()
    if when == 'while measuring': assert until(lambda: log.exists() and any(e['event'] == 'hang' for e in events(log)))
    process.stdin.close()
    process.wait(60)
    assert not any((tmp_path/'there').iterdir()) and (when == 'while sending' or not any(alive(e['pid']) for e in events(log)))
    process.stdout.close(); process.stderr.close()


@pytest.fixture(scope='module')
def device(tmp_path_factory, python_path):
    "An SSH server on this machine, for this user: (address, folder with its files)."
    sshd = next((p for p in ('/usr/sbin/sshd', shutil.which('sshd')) if p and Path(p).exists()), None)
    if not sshd or not shutil.which('ssh') or not shutil.which('ssh-keygen'): pytest.skip('there is no OpenSSH server here: apt-get install openssh-server')
    folder = tmp_path_factory.mktemp('ssh')
    (folder/'there').mkdir()
    for key in ('host', 'user', 'stranger'): subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', str(folder/key)], check=True)
    (folder/'authorized').write_text((folder/'user.pub').read_text())
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    (folder/'known').write_text(f"[127.0.0.1]:{port} {(folder/'host.pub').read_text()}")
    (folder/'sshd_config').write_text(f'''Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv PYTHONPATH={python_path} TMPDIR={folder}/there
''')
    for name, key, known in (('config', 'user', 'known'), ('config.stranger', 'stranger', 'known'), ('config.unknown', 'user', 'known.none')):
        (folder/name).write_text(f'Host *\n IdentityFile {folder}/{key}\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/{known}\n GlobalKnownHostsFile none\n IdentityAgent none\n')
    if os.getuid() == 0: Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
    with open(folder/'log', 'wb') as log: server = subprocess.Popen([sshd, '-D', '-e', '-f', str(folder/'sshd_config')], stderr=log)
    try:
        probe = ['ssh', '-F', str(folder/'config'), '-o', 'BatchMode=yes', '-p', str(port), '127.0.0.1', 'true']
        if not until(lambda: subprocess.run(probe, capture_output=True).returncode == 0, 20): pytest.skip(f"sshd lets nobody in here: {(folder/'log').read_text()[-300:]}")
        yield f'ssh://127.0.0.1:{port}', folder
    finally: server.kill(); server.wait()


@pytest.fixture
def client(device, monkeypatch, actor):
    "Chooses the configuration of the SSH client."
    def use(name): monkeypatch.setenv('EDGENB_SSH', shlex.join(['ssh', '-F', str(device[1]/name)]))
    use('config')
    return use


def test_a_device_answers_over_ssh_exactly_as_this_machine_and_keeps_nothing(device, client, tmp_path, images):
    bundle, files = make_bundle(tmp_path/'bundle'), sorted((images/'some').iterdir())
    there, here = (quickly(f, *a) for f, a in ((remote_measure, (device[0], bundle, files, sys.executable)), (local_measure, (bundle, files))))
    assert set(there['answers']) == set(here['answers']) and len(there['answers']['score']) == 9
    for k in here['answers']: assert np.array_equal(here['answers'][k], there['answers'][k])
    row, = there['rows']
    assert row['error'] == '' and row['p50_ms'] > 0 and set(row) == set(here['rows'][0]) and there['machine']['edgenb'] == edgenb.__version__
    assert not any((device[1]/'there').iterdir())


def test_the_first_step_that_a_device_does_differently_is_named(actor, tmp_path, images, monkeypatch):
    from edgenb.remote import STEP, report_text
    bundle, files = make_bundle(tmp_path/'bundle'), sorted((images/'some').iterdir())
    here = quickly(local_measure, bundle, files)
    other = {k: v + 3 if k in (f'{STEP}resize', f'{STEP}to_tensor') else v for k, v in here['answers'].items()}
    monkeypatch.setattr('edgenb.remote.remote_measure', lambda *a, **kw: here | {'rows': [dict(here['rows'][0])], 'answers': dict(other)})
    found = verify_bundle(bundle, files, 'ssh://elsewhere')
    assert found['first_step_apart']['step'] == 'resize' and 'resize gives something else than here' in report_text(found)


def test_files_are_kept_on_the_device_when_asked(device, client, tmp_path, images):
    found = quickly(remote_measure, device[0], make_bundle(tmp_path/'bundle'), sorted((images/'some').iterdir()), sys.executable, keep=True)
    kept = device[1]/'there'/found['kept']
    assert (kept/'bundle'/'manifest.json').exists() and len([*(kept/'images').iterdir()]) == 9
    shutil.rmtree(kept)


def test_limits_hold_on_the_device_too(device, client, tmp_path, images):
    bundle, files = make_bundle(tmp_path/'bundle', allocate_mb=400), sorted((images/'some').iterdir())
    refused(lambda: verify_bundle(bundle, files, device[0], sys.executable, limits={'memory_mb': 256}), device[0], 'needed more than 256 MB')


@pytest.mark.parametrize('harm, words', [('unreachable', 'cannot be reached'), ('stranger', 'refuses this user or key'), ('unknown', 'its host key is not known here'),
                                         ('no python', 'there is no /nowhere/python3 there'), ('no edgenb', 'has no edgenb.remote there'), ('no address', 'is not the address of a device')])
def test_a_device_that_cannot_be_used_is_an_error_that_says_what_to_do(harm, words, device, client, tmp_path, images):
    bare = tmp_path/'bare'
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n'); bare.chmod(0o755)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); closed = s.getsockname()[1]
    if harm in ('stranger', 'unknown'): client(f'config.{harm}')
    on = {'unreachable': f'ssh://127.0.0.1:{closed}', 'no address': '127.0.0.1'}.get(harm, device[0])
    python = {'no python': '/nowhere/python3', 'no edgenb': str(bare)}.get(harm, sys.executable)
    refused(lambda: quickly(verify_bundle, make_bundle(tmp_path/'bundle'), [images], on, python), words, on)
    assert not (device[1]/'known.none').exists()      # a host key is never accepted unseen


def test_a_login_script_that_prints_does_no_harm(device, client, tmp_path, images):
    chatty = tmp_path/'chatty'
    chatty.write_text(f'#!/bin/sh\necho Welcome to this device\nexec {sys.executable} "$@"\n'); chatty.chmod(0o755)
    assert quickly(verify_bundle, make_bundle(tmp_path/'bundle'), [images], device[0], str(chatty))['rows'][0]['runs'] == 4


def test_a_bundle_that_only_the_device_can_run_is_measured_there_and_compared_with_nothing(device, client, tmp_path, images, monkeypatch, package, python_path):
    monkeypatch.setenv('PYTHONPATH', python_path.replace(str(package), str(tmp_path)))
    found = quickly(verify_bundle, make_bundle(tmp_path/'bundle'), [images], device[0], sys.executable)
    assert 'there is no runtime actor' in found['agreement']['why'] and len(found['answers']['score']) == 9


def test_an_image_that_cannot_be_read_on_the_device_is_named(device, client, tmp_path):
    (tmp_path/'broken.png').write_bytes(b'not an image')
    refused(lambda: verify_bundle(make_bundle(tmp_path/'bundle'), [tmp_path/'broken.png'], device[0], sys.executable), 'is not an image')


def test_the_command_verifies_on_a_device(device, client, tmp_path, images, capsys):
    bundle = str(make_bundle(tmp_path/'bundle'))
    common = ['verify', bundle, '--images', str(images), '--on', device[0], '--python', sys.executable, '--runs', '5']
    assert main(common) == 0
    out = capsys.readouterr().out
    assert 'agreement  9 of 9 images decided as on this machine, scores differ by at most 0' in out and 'p95' in out and 'each step before the model gives what it gives here' in out
    assert main([*common, '--json', '--slowdown', '2']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['rows'][0]['emulated'].startswith('2.0x slower') and len(found['answers']['score']) == 9
    assert main([*common[:4], '--on', 'ssh://nobody@-x']) == 2 and main(['verify', bundle, '--images', str(tmp_path/'none')]) == 2
    assert 'is not the address of a device' in (err := capsys.readouterr().err) and 'none does not exist' in err
    assert main(['verify', str(tmp_path)]) == 2 and 'is not a bundle' in capsys.readouterr().err


def test_a_run_is_judged_on_the_device_by_its_own_test_set(toy_run, device, client, capsys, monkeypatch):
    run = str(toy_run.path)
    assert main(['verify', run, '--on', device[0], '--python', sys.executable, '--runs', '10', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    known = next(r for r in toy_run.card('verify').result['rows'] if r['artifact'] == found['rows'][0]['artifact'])
    assert found['parity']['verdict'] in ('pass', 'undecided') and found['parity']['value'] == pytest.approx(known['value']) and len(found['images']) == len(found['answers']['score'])
    monkeypatch.setattr('edgenb.remote.remote_measure', lambda *a, **kw: found | {'answers': {'score': 1 - np.array(found['answers']['score']), 'label': 1 - np.array(found['answers']['label'])}})
    worse = verify_bundle(run, on=device[0])['parity']      # a device that decides everything the other way round
    assert worse['verdict'] == 'fail' and worse['flipped'] == len(found['images'])
