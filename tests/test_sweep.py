"Sweeps: planned, killed, gone on with, searched, on a cluster."
import collections, json, os, random, signal, subprocess, time
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from edgenb.core import EdgenbError
from edgenb.mill import Parameter, record_of
from edgenb.sweep import axis, plan_sweep, standing, sweep
from test_mill import call, edgenb, notebook, refused

ROOMS = '''import os, time
from edgenb.core import room
def tally(name): fd = os.open(os.environ['TALLY'], os.O_WRONLY | os.O_APPEND | os.O_CREAT); os.write(fd, (name + '\\n').encode()); os.close(fd)
@room(1)
def shared(run, kind='a'):
    time.sleep(0.2); run.new('x.txt').write_text(kind); tally(f'shared {kind}'); return {'data': 'synthetic', 'size': len(kind)}
@room(2, needs=('shared',))
def own(run, n=0):
    time.sleep(0.1); run.new('y.txt').write_text(f'{n}'); tally(f'own {n}'); return {'square': n*n}
'''


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    "A folder with a recipe of two rooms, the first of which all runs share."
    (tmp_path/'toyrooms_sweep.py').write_text(ROOMS)
    notebook(tmp_path/'toy.ipynb', 'import sys; sys.path.insert(0, "."); from toyrooms_sweep import own, shared', 'shared(output_dir); own(output_dir, n=n)', '1/(n - 13)')
    monkeypatch.setenv('TALLY', str(tmp_path/'tally'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def computed(workspace): return collections.Counter((workspace/'tally').read_text().split('\n')[:-1])
def last_json(done): return json.loads(done.stdout.splitlines()[-1])


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=6), st.lists(st.sampled_from(['fp32', 'int8', 'fp16']), min_size=1, max_size=4))
def test_an_axis_holds_each_value_once_in_the_order_given(numbers, words):
    known = {'n': Parameter('n', 'int', 0), 'w': Parameter('w', 'list', [])}
    assert axis(f"n={','.join(map(str, numbers))}", known) == ('n', list(dict.fromkeys(numbers)))
    assert axis(f"w={json.dumps([[w] for w in words])}", known) == axis(f"w={','.join(words)}", known) == ('w', [[w] for w in dict.fromkeys(words)])


@pytest.mark.parametrize('given, says', [(['-g', 'nn=1'], 'Did you mean n'), (['-g', 'n='], 'zero runs'), ([], 'nothing to sweep over'), (['-g', 'n=1', '-g', 'n=2'], 'given twice'), (['-g', 'n=1', '-p', 'n', '2'], 'given twice'), (['-g', 'n=1..3'], 'is a range'),
                                         (['-g', 'n=1', '--search', '3'], 'needs both'), (['-g', 'n=1..9', '--search', '3', '--maximize', 'valu'], 'value'), (['-g', 'output_dir=a,b'], 'cannot be set'), (['-f', 'none.yaml'], 'cannot be read'),
                                         (['-f', 'empty.yaml'], 'no points'), (['-g', 'n=1', '--workers', '0'], 'out of range'), (['-g', 'n=1', '--scheduler', 'nowhere'], 'not the address'), (['-g', 'n=one'], 'whole number')])
def test_what_cannot_be_done_is_refused_in_a_line_and_leaves_nothing(workspace, given, says):
    (workspace/'empty.yaml').write_text('[]')
    refused(call('sweep', 'toy.ipynb', *given, cwd=workspace), says)
    assert not list(workspace.glob('runs/toy/point-*'))


def test_a_shared_room_is_computed_once_and_the_same_command_repeats_nothing(workspace):
    first = last_json(call('sweep', 'toy.ipynb', '-g', 'n=1,2,2,3', '--workers', '2', '--json', cwd=workspace))
    assert first['done'] == 3 and computed(workspace) == {'shared a': 1, 'own 1': 1, 'own 2': 1, 'own 3': 1}
    dry = last_json(call('sweep', 'toy.ipynb', '-g', 'n=1,4', '--dry-run', '--json', cwd=workspace))
    assert [r['standing'] for r in dry['runs']] == ['finished', 'new'] and dry['pool'] == {'shared': 1, 'own': 3} and len(list(workspace.glob('runs/toy/point-*'))) == 3
    again = last_json(call('sweep', 'toy.ipynb', '-g', 'n=3,1,2', '--json', cwd=workspace))
    assert again['before'] == 3 and again['sweep'] == first['sweep'] and sum(computed(workspace).values()) == 4
    more = last_json(call('sweep', 'toy.ipynb', '-g', 'n=1,2,3,4', '--json', cwd=workspace))
    assert more['before'] == 3 and more['done'] == 4 and computed(workspace)['own 4'] == 1 and computed(workspace)['shared a'] == 1
    call('run', 'toy.ipynb', '-p', 'n', '4', '--no-progress', cwd=workspace)
    assert sum(computed(workspace).values()) == 5                                 # a single run takes over from a sweep


def test_a_failed_run_stops_no_other_and_is_tried_again(workspace):
    done = call('sweep', 'toy.ipynb', '-g', 'n=12,13,14', '--json', cwd=workspace)
    told = last_json(done)
    assert done.returncode == 1 and told['done'] == 2 and 'ZeroDivisionError: division by zero (cell [5])' in [r['reason'] for r in told['runs']][1]
    table = call('compare', 'runs/toy', cwd=workspace).stdout
    assert 'ZeroDivisionError' in table and 'cell [5]' in table
    again = last_json(call('sweep', 'toy.ipynb', '-g', 'n=12,13,14', '--json', cwd=workspace))
    assert again['before'] == 2 and again['failed'] == 1 and computed(workspace)['own 13'] == 1


def test_changed_data_or_code_is_another_sweep(workspace):
    notebook(workspace/'reads.ipynb', 'open(source).read()', choices="output_dir: str = ''\nsource: str = ''\nn: int = 0")
    (workspace/'data.txt').write_text('a')
    plan = lambda: plan_sweep('reads.ipynb', {'n': [1]}, common={'source': 'data.txt'}).names
    before = plan()
    assert plan() == before
    (workspace/'data.txt').write_text('bb')
    assert (changed := plan()) != before
    notebook(workspace/'reads.ipynb', 'open(source).read(); 1', choices="output_dir: str = ''\nsource: str = ''\nn: int = 0")
    assert plan() not in (before, changed)


def kill_and_go_on(workspace, kills, n, rng):
    "Kill a sweep at random moments until there were enough, then let it end; returns its answer and the finished runs that were done again."
    seen, go = [], [edgenb, 'sweep', 'toy.ipynb', '-g', f"n={','.join(map(str, range(20, 20 + n)))}", '--workers', '2', '--json']
    started = lambda: {p.parent.name: r['started'] for p in workspace.glob('runs/toy/point-*/job.json') if (r := json.loads(p.read_text()))['status'] == 'done' and 'wrote' in r}
    for _ in range(kills):
        process = subprocess.Popen(go, cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: process.wait(rng.uniform(0.3, 4)); break
        except subprocess.TimeoutExpired: process.kill(); process.wait(); seen.append(started())
    done = subprocess.run(go, cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return last_json(done), [run for s in seen for run, when in s.items() if started()[run] != when]


def test_a_sweep_killed_at_random_moments_loses_nothing_and_repeats_nothing_that_finished(workspace):
    told, redone = kill_and_go_on(workspace, 4, 8, random.Random(3))
    counts = computed(workspace)
    assert told['done'] == 8 and told['failed'] == 0 and not redone
    assert set(counts) == {'shared a', *(f'own {n}' for n in range(20, 28))} and sum(counts.values()) <= 9 + 4*2    # at most what was at work when a kill fell


def test_an_interrupt_ends_a_sweep_cleanly(workspace):
    notebook(workspace/'slow.ipynb', 'import time; time.sleep(n)')
    process = subprocess.Popen([edgenb, 'sweep', 'slow.ipynb', '-g', 'n=0,500', '--workers', '1'], cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(workspace.glob('runs/slow/point-*/job.json'))) < 2: assert process.poll() is None; time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and 'interrupted' in err.splitlines()[-1] and 'Traceback' not in err
    assert sorted(standing(plan_sweep('slow.ipynb', {'n': [0, 500]})))[1] == 'finished'


def test_a_time_limit_fails_only_the_run_that_needs_longer(workspace):
    notebook(workspace/'slow.ipynb', 'import time; time.sleep(n)')
    told = last_json(call('sweep', 'slow.ipynb', '-g', 'n=0,500', '--timeout', '6', '--json', cwd=workspace))
    assert told['done'] == 1 and told['runs'][1]['reason'] == 'it did not end within 6 s (cell [3])'


def test_a_search_finds_the_best_and_goes_on_where_it_was(workspace):
    notebook(workspace/'toy.ipynb', 'import sys; sys.path.insert(0, "."); from toyrooms_sweep import own, shared', 'shared(output_dir); own(output_dir, n=n)')
    ask = ['toy.ipynb', '-g', 'n=-8..8', '--minimize', 'own.square', '--workers', '1', '--json']
    short = last_json(call('sweep', *ask, '--search', '4', cwd=workspace))
    assert short['done'] == len(short['runs']) <= 4
    entries = sum(computed(workspace).values())
    longer = last_json(call('sweep', *ask, '--search', '8', cwd=workspace))
    assert {r['run'] for r in short['runs']} <= {r['run'] for r in longer['runs']} and longer['before'] == short['done']
    assert sum(computed(workspace).values()) - entries == len(longer['runs']) - len(short['runs'])


def test_a_scheduler_that_is_not_there_is_a_line_within_seconds(workspace):
    started = time.perf_counter()
    refused(call('sweep', 'toy.ipynb', '-g', 'n=1', '--scheduler', 'tcp://127.0.0.1:9', cwd=workspace), 'no Dask scheduler answers at tcp://127.0.0.1:9')
    assert time.perf_counter() - started < 30


@pytest.fixture
def cluster():
    distributed = pytest.importorskip('distributed')
    import logging
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1', dashboard_address=None, silence_logs=logging.CRITICAL) as c: yield c


def test_a_worker_that_is_killed_costs_no_run(workspace, cluster):
    notebook(workspace/'waits.ipynb', f"import os, time\nopen(f'{workspace}/at-{{n}}-{{os.getpid()}}', 'w').write(str(os.getppid()))\ntime.sleep(1.5)\nopen(f'{{output_dir}}/n.txt', 'w').write(str(n))")
    process = subprocess.Popen([edgenb, 'sweep', 'waits.ipynb', '-g', 'n=1,2,3', '--scheduler', cluster.scheduler_address, '--json'], cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (at := [p for p in workspace.glob('at-*') if p.read_text()]): assert process.poll() is None, process.communicate(); time.sleep(0.05)
    zygote = int(at[0].read_text())
    worker = int(Path(f'/proc/{zygote}/stat').read_text().rpartition(') ')[2].split()[1])     # the zygote's parent
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    told = json.loads(out.splitlines()[-1])
    assert told['done'] == 3 and told['failed'] == 0 and {(workspace/'runs'/'waits'/r['run']/'n.txt').read_text() for r in told['runs']} == {'1', '2', '3'}, err
    assert len(list(workspace.glob('at-*'))) >= 4           # one of them was done twice


def test_results_of_workers_without_a_common_disk_arrive_by_digest(workspace, cluster, tmp_path_factory):
    import distributed
    from edgenb import executors
    notebook(workspace/'far.ipynb', "open(f'{output_dir}/n.bin', 'wb').write(bytes(range(256))*n)")
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    def not_shared():
        import tempfile
        tempfile.tempdir = str(elsewhere)
        executors.BLOCK = 100
    with distributed.Client(cluster, set_as_default=False) as client:
        client.run(not_shared)
        job = executors.Job(workspace/'far.ipynb', {'n': 3}, workspace/'runs'/'far'/'point-x')
        fields = {k: str(v) if isinstance(v, Path) else v for k, v in vars(job).items()}
        future = client.submit(executors.work, fields, job.notebook.read_text(), (str(workspace/'no-such-mark'), 'x'), executors.code_of_edgenb(), {}, pure=False)
        record = executors._arrived(client, future, job, fetched := [])
        left = list(elsewhere.rglob('n.bin'))
        client.run(executors.forget, [*fetched, str(workspace/'runs'/'far'/'point-x')])       # the second is not the worker's to delete
    assert record['status'] == 'done' and executors.finished(job.folder) and (job.folder/'n.bin').read_bytes() == bytes(range(256))*3
    assert left and not list(elsewhere.rglob('*far*')) and record_of(job.folder)['wrote'] == record['wrote']


def test_whatever_a_rooms_key_holds_is_in_the_name_of_a_point(workspace, monkeypatch):
    import importlib.metadata
    import edgenb as package
    for path, text in {'data/a.json': '[]', 'data/1.png': '1', 'beside.py': 'import pack.deep', 'pack/__init__.py': '', 'pack/deep.py': 'X = 1', 'unrelated.py': '', 'lib/far.py': 'X = 1', 'settings.ini': '[gates]\nmin_per_class = 50\n', 'own/edgenb/__init__.py': '', 'own/edgenb/devices.toml': 'a = 1'}.items():
        (workspace/path).parent.mkdir(parents=True, exist_ok=True); (workspace/path).write_text(text)
    notebook(workspace/'reads.ipynb', '%matplotlib inline\nimport sys; sys.path.insert(0, "lib"); import beside, far, toyrooms_sweep', choices="output_dir: str = ''\nsource: str = ''\nn: int = 0")
    plan = lambda source='data/a.json': plan_sweep('reads.ipynb', {'n': [1]}, common={'source': source}).names[0]
    seen = [plan(), plan('.')]
    assert plan() == seen[0] and seen[0] != seen[1]
    for path in ('runs/reads/point-x/job.json', 'unrelated.py'):
        (workspace/path).parent.mkdir(parents=True, exist_ok=True); (workspace/path).write_text('X = 3')
        assert plan() == seen[0] and (plan('.') == seen[1]) == path.startswith('runs')      # a folder that holds the runs counts without them
    seen.append(plan('.'))
    for path, text in (('data/1.png', '22'), ('pack/deep.py', 'X = 2'), ('lib/far.py', 'X = 2'), ('toyrooms_sweep.py', ROOMS + 'X = 1'), ('settings.ini', '[gates]\nmin_per_class = 51\n')):
        (workspace/path).write_text(text)
        assert (name := plan()) not in seen, path
        seen.append(name)
    monkeypatch.setattr(package, '__file__', str(workspace/'own/edgenb/__init__.py'))
    seen.append(plan())
    (workspace/'own/edgenb/devices.toml').write_text('a = 2')
    assert plan() not in seen
    (workspace/'own/edgenb/__init__.py').write_text("LIBRARIES = ('numpy',)")
    seen.append(plan())
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0' if name == 'numpy' else real(name))
    assert plan() not in seen


def test_a_recipe_that_is_edited_while_a_sweep_runs_is_run_as_it_was_planned(workspace):
    write = lambda what: notebook(workspace/'wrote.ipynb', f"open(f'{{output_dir}}/n.txt', 'w').write('{what}')")
    write('old')
    plan = plan_sweep('wrote.ipynb', {'n': [1, 2]})
    write('newer')
    done = sweep(plan, workers=1, said=lambda line: None)
    assert done.failed == 0 and [(plan.folder/n/'n.txt').read_text() for n in plan.names] == ['old']*2 and (plan.folder/plan.names[0]/'wrote.ipynb').is_file()
    assert standing(plan_sweep('wrote.ipynb', {'n': [1, 2]})) == ['new']*2


@pytest.fixture
def at_once(monkeypatch):
    "An executor that leaves the card of a room that nothing here knows, and starts no kernel."
    from edgenb import executors
    from edgenb.core import Card, digest_of, write_json
    seen = []
    def runs(jobs, workers):
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            Card('mine', digest_of(job.values), {}, {}, {}, {'square': {'of': job.values['n']**2}, 'flat': 1}, 'synthetic', '2026-01-01T00:00:00+00:00', 0.1, {}, '0').save(job.folder/'02-mine.json')
            record = {'status': 'done', 'recipe': 'toy', 'values': job.values, 'seconds': 0.1, 'wrote': {}}
            write_json(job.folder/'job.json', record)
            seen.append(job)
            yield job, record
    monkeypatch.setitem(executors.EXECUTORS, 'at once', runs)
    return seen


def test_a_search_is_led_by_what_a_room_of_ones_own_found(workspace, at_once):
    from edgenb.sweep import Span, search_sweep
    far = lambda found: [abs(r['values']['n']) for r in found.records]
    said = []
    found = [search_sweep('toy.ipynb', {'n': Span(-500, 500)}, {}, 30, 'mine.square.of', maximize, workers=1, where='at once', said=said.append) for maximize in (False, True)]
    assert not any('does not count' in line for line in said)
    assert min(far(found[0])) < 20 and max(far(found[1])) > 480 and sum(far(found[0])[15:]) < sum(far(found[1])[15:])/2      # the later ones follow the goal
    with pytest.raises(EdgenbError, match='none of .* has a number mine.flt.*Did you mean mine.flat'): search_sweep('toy.ipynb', {'n': Span(-500, 500)}, {}, 2, 'mine.flt', True, workers=1, where='at once', said=said.append)
    shown = call('compare', 'runs/toy', '--columns', 'run,mine.square.of', cwd=workspace)
    assert shown.returncode == 0 and len(shown.stdout.splitlines()[1].split()) == 2


@pytest.fixture
def elsewhere(workspace, tmp_path_factory, monkeypatch):
    "Does a job here as a worker that sees another disk would."
    import tempfile
    from edgenb import executors
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path_factory.mktemp('elsewhere')))
    def at(notebook, values, code=None, files={}):
        job = executors.Job(workspace/notebook, values, workspace/'runs'/Path(notebook).stem/'point-x')
        return executors.work({k: str(v) if isinstance(v, Path) else v for k, v in vars(job).items()}, job.notebook.read_text(), (str(workspace/'no-such-mark'), 'x'), code or executors.code_of_edgenb(), files)
    yield at
    for z, _ in executors._ZYGOTES.values(): z.close()
    executors._ZYGOTES.clear()


def test_a_worker_with_other_code_does_nothing_also_if_it_joins_late_or_has_not_been_restarted(workspace, elsewhere, monkeypatch):
    from edgenb import executors
    with pytest.raises(EdgenbError, match='restart the worker'): elsewhere('toy.ipynb', {'n': 1}, code='another')
    monkeypatch.setattr(executors, 'code_of_edgenb', lambda: 'edited')                     # on the disk, after this process loaded it
    with pytest.raises(EdgenbError, match='restart the worker'): elsewhere('toy.ipynb', {'n': 1})
    assert executors.about_worker()[1] != 'edited' and not list(workspace.glob('tally'))


def test_a_path_that_names_other_data_on_a_worker_is_refused(workspace, elsewhere, monkeypatch, tmp_path_factory):
    from edgenb import executors
    notebook(workspace/'reads.ipynb', "open(f'{output_dir}/n.txt', 'w').write(open(f'{source}/a.txt').read())", choices="output_dir: str = ''\nsource: str = 'photos'\nn: int = 0")
    (workspace/'photos').mkdir(); (workspace/'photos'/'a.txt').write_text('ours')
    files = executors.contents(executors.Job(workspace/'reads.ipynb', {'n': 1}, workspace/'runs'/'reads'/'point-x'))
    assert list(files) == ['photos']
    other = tmp_path_factory.mktemp('other')
    monkeypatch.chdir(other)
    with pytest.raises(EdgenbError, match='photos is not on'): elsewhere('reads.ipynb', {'n': 1}, files=files)
    (other/'photos').mkdir(); (other/'photos'/'a.txt').write_text('hers')
    with pytest.raises(EdgenbError, match='other data'): elsewhere('reads.ipynb', {'n': 1}, files=files)
    (other/'photos'/'a.txt').write_text('ours')
    assert elsewhere('reads.ipynb', {'n': 1}, files=files)['status'] == 'done'


def test_a_worker_keeps_one_zygote(workspace, elsewhere):
    from edgenb import executors
    for n in (1, 2):
        notebook(workspace/'small.ipynb', f'print({n})')
        assert elsewhere('small.ipynb', {'n': n})['status'] == 'done'
    with executors._zygote(workspace/'small.ipynb') as used, executors._zygote(workspace/'toy.ipynb') as other:
        assert used.process.poll() is None and used is not other                           # one that is in use stays
    with executors._zygote(workspace/'toy.ipynb') as again: assert again is other and used.process.poll() is not None and len(executors._ZYGOTES) == 1


def test_runs_at_once_go_by_the_most_threads_any_of_them_asks_for(monkeypatch):
    from edgenb.sweep import _at_once
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    known = {'num_threads': Parameter('num_threads', 'int', 1)}
    at_once = lambda where='local', options={}, workers=None: _at_once(workers, where, options, known, [{'num_threads': 2}, {'num_threads': 4}, {}])
    assert (at_once(), at_once(workers=3), at_once('dask'), at_once('dask', {'scheduler': 'tcp://x:1'}), at_once('dask', {'scheduler': 'tcp://x:1'}, 3)) == (2, 3, 2, None, 3)


def test_a_cluster_does_as_many_runs_at_once_as_asked(workspace, cluster):
    code = f"import os, time\nopen(f'{workspace}/busy-{{n}}', 'w').close(); time.sleep(0.3)\nprint(len([p for p in os.listdir({str(workspace)!r}) if p.startswith('busy-')]), file=open(f'{workspace}/seen-{{n}}', 'w'))\nos.unlink(f'{workspace}/busy-{{n}}')"
    notebook(workspace/'busy.ipynb', code)
    told = last_json(call('sweep', 'busy.ipynb', '-g', 'n=1,2,3', '--workers', '1', '--scheduler', cluster.scheduler_address, '--json', cwd=workspace))
    assert told['done'] == 3 and [p.read_text().strip() for p in sorted(workspace.glob('seen-*'))] == ['1']*3


def test_a_path_with_dots_is_no_range_and_near_ranges_are_two(workspace):
    from edgenb.sweep import Span
    known = {'source': Parameter('source', 'str', ''), 'n': Parameter('n', 'int', 0)}
    assert axis('source=../../photos', known) == ('source', ['../../photos']) and axis('n=1..3', known) == ('n', Span(1, 3))
    with pytest.raises(EdgenbError, match='whole number'): axis('n=1..x', known)
    assert str(Span(1000000, 2000001)) != str(Span(1000000, 2000000))


def test_a_parameter_that_is_called_as_a_column_is_keeps_its_own(workspace, at_once):
    from edgenb.sweep import sweep_table
    notebook(workspace/'odd.ipynb', '1', choices='n: int = 0\nvalue: int = 0')
    table = sweep_table(sweep(plan_sweep('odd.ipynb', {'value': [41, 42]}, common={'n': 1}), where='at once', said=lambda line: None))
    assert 'parameter value' in table.splitlines()[0] and '42' in table.splitlines()[2].split()


def test_a_search_says_what_it_would_do_as_json_and_counts_what_finished_before(workspace, at_once):
    from edgenb.sweep import search_sweep
    ask = lambda trials, said: search_sweep('toy.ipynb', {'n': list(range(100))}, {}, trials, 'mine.flat', True, workers=1, where='at once', said=said.append)
    ask(3, []); ask(5, said := [])
    assert said[0] == '3 of 5 runs finished before' and [line.split()[0] for line in said[1:]] == ['1/2', '2/2']
    told = json.loads(call('sweep', 'toy.ipynb', '-g', f"n={','.join(map(str, range(100)))}", '--search', '9', '--maximize', 'mine.flat', '--dry-run', '--json', cwd=workspace).stdout)
    assert (told['trials'], told['proposed'], told['finished']) == (9, 5, 5)
    refused(call('sweep', 'toy.ipynb', '-g', 'n=1', '--dask', 'local', '--scheduler', 'tcp://127.0.0.1:9', cwd=workspace), 'give one of them')


def test_a_broken_package_with_an_executor_breaks_no_other(monkeypatch):
    import importlib.metadata
    from edgenb.executors import executor
    monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: [importlib.metadata.EntryPoint('slurm', 'no_such_module:run', group)])
    assert executor('local') and executor('dask')
    with pytest.raises(EdgenbError, match='executor slurm .* cannot be loaded'): executor('slurm')
    with pytest.raises(EdgenbError, match='Did you mean slurm'): executor('slrum')
