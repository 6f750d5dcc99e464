"Single runs as jobs, and the kernels they run in."
import json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat
import pytest
from edgenb.core import EdgenbError, Run
from edgenb.mill import parameters, recipes, record_of, run_recipe, summary

root = Path(__file__).parents[1]
edgenb = Path(sys.executable).parent/'edgenb'
linux = pytest.mark.skipif(sys.platform != 'linux', reason='kernels are forked on Linux only')


def notebook(path, *cells, choices="output_dir: str = ''\nn: int = 0"):
    tagged = [nbformat.v4.new_code_cell(choices, metadata={'tags': ['parameters']})] if choices is not None else []
    nbformat.write(nbformat.v4.new_notebook(cells=[*tagged, *map(nbformat.v4.new_code_cell, cells)], metadata={'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python 3'}}), path)
    return path


def call(*args, cwd): return subprocess.run([edgenb, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def refused(done, *says):
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and all(s in done.stderr for s in says), done.stderr


def said(path): return [''.join(o.get('text', '')) for c in nbformat.read(path, 4).cells for o in c.get('outputs', [])]


def test_parameters_are_read_as_papermill_reads_them():
    import ast
    from papermill.inspection import inspect_notebook
    for path in recipes(root).values():
        theirs = inspect_notebook(str(path))
        assert {n: (p.type, p.default, p.help) for n, p in parameters(path).items()} == {n: (p['inferred_type_name'], ast.literal_eval(p['default']), p['help']) for n, p in theirs.items()}


def test_a_typo_loads_no_heavy_library(tmp_path):
    code = "import sys; from edgenb.cli import main; main(['sweep', 'wafer', '-g', 'sed=1,2']); print([m for m in ('papermill', 'nbformat', 'numpy', 'torch', 'jupyter_client', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert 'Did you mean seed' in done.stderr and done.stdout.strip() == '[]'


@pytest.mark.parametrize('command', ['run', 'sweep'])
def test_a_recipe_without_a_parameters_cell_is_refused_before_anything_starts(tmp_path, command):
    notebook(tmp_path/'bare.ipynb', '1', choices=None)
    refused(call(command, tmp_path/'bare.ipynb', cwd=tmp_path), 'no cell tagged parameters')
    assert not (tmp_path/'runs').exists()


@pytest.mark.parametrize('choices, says', [('n: int = f(1)', 'not a plain value'), ('n: int = = 1', 'cannot be read')])
def test_a_parameters_cell_that_cannot_be_read_is_refused(tmp_path, choices, says):
    refused(call('run', notebook(tmp_path/'odd.ipynb', '1', choices=choices), cwd=tmp_path), says)


def test_a_key_that_is_there_twice_in_yaml_is_refused(tmp_path):
    notebook(tmp_path/'toy.ipynb', '1')
    (tmp_path/'twice.yaml').write_text('n: 1\nn: 2\n')
    refused(call('run', 'toy.ipynb', '-f', 'twice.yaml', cwd=tmp_path), 'twice.yaml: n is given twice, the second time in line 2')
    refused(call('sweep', 'toy.ipynb', '-f', 'twice.yaml', cwd=tmp_path), 'n is given twice')


def test_a_notebook_that_never_ends_is_ended_with_everything_it_started(tmp_path):
    notebook(tmp_path/'endless.ipynb', 'import subprocess, time', f"p = subprocess.Popen(['sleep', '1234']); print(open({str(tmp_path/'pid')!r}, 'w').write(str(p.pid)))", 'while True: time.sleep(1)')
    refused(call('run', 'endless.ipynb', '--timeout', '5', '--no-progress', cwd=tmp_path), 'did not end within 5 s (cell [5])')
    record = record_of(next((tmp_path/'runs'/'endless').glob('2*')))
    assert record['status'] == 'failed' and record['cell'] == 5
    pid = int((tmp_path/'pid').read_text())
    assert not Path(f'/proc/{pid}').exists() or 'Z' in Path(f'/proc/{pid}/stat').read_text().split()[2]


def test_a_kernel_that_dies_is_told_with_its_cell_and_keeps_the_notebook(tmp_path):
    notebook(tmp_path/'dies.ipynb', 'print("before")', 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)')
    with pytest.raises(EdgenbError, match=r'killed by SIGSEGV.*cell \[4\]'): run_recipe(str(tmp_path/'dies.ipynb'), {'output_dir': str(tmp_path/'run')}, progress=False)
    assert 'before\n' in said(tmp_path/'run'/'dies.ipynb') and 'SIGSEGV' in summary(Run(tmp_path/'run'))['reason']


@pytest.fixture(scope='module')
def zygote():
    from edgenb.kernels import Zygote
    with Zygote(['numpy', 'pandas', 'plotly.graph_objects', 'matplotlib', 'torch']) as z: yield z


def through(path, zygote=None, **kw):
    from edgenb.kernels import engine
    from papermill import execute_notebook
    out = path.with_name('out.ipynb')
    execute_notebook(str(path), str(out), engine_name=engine(), progress_bar=False, zygote=zygote, **kw)
    return said(out)


@linux
def test_what_a_run_changes_does_not_reach_the_next(tmp_path, zygote):
    change = notebook(tmp_path/'change.ipynb', '''import os, random, sys, threading, time
import numpy, torch
os.environ['LEFT'] = '1'; os.chdir('/'); numpy.left = 1; sys.modules['left'] = sys; sys.path.insert(0, '/left')
random.seed(1); numpy.random.seed(1); torch.manual_seed(1); torch.set_num_threads(1); torch.rand(500, 500) @ torch.rand(500, 500)
threading.Thread(target=time.sleep, args=(1000,), daemon=True, name='left').start()
print(os.getppid())''')
    look = notebook(tmp_path/'look.ipynb', '''import os, random, sys, threading
import numpy, torch
print('LEFT' in os.environ, os.getcwd() == '/', hasattr(numpy, 'left'), 'left' in sys.modules, '/left' in sys.path, any(t.name == 'left' for t in threading.enumerate()), torch.initial_seed() == 1)
print(random.random(), numpy.random.rand())''')
    assert through(change, zygote)[-1].strip() == str(zygote.process.pid) and zygote.threads == 1
    first, second = (through(look, zygote)[-1].splitlines() for _ in range(2))
    assert first[0] == second[0] == ' '.join(['False']*7) and first[1] != second[1]     # and no two runs draw the same numbers


@linux
def test_a_forked_kernel_is_what_an_ordinary_one_is(tmp_path, zygote):
    probe = notebook(tmp_path/'probe.ipynb', '''import os, sys, threading
import matplotlib, numpy, pandas, plotly.io, torch, tqdm.auto
strip = lambda e: {k: v for k, v in e.items() if k not in ('JPY_PARENT_PID', 'JPY_SESSION_NAME', 'GOMP_SPINCOUNT')}
print(plotly.io.renderers.default, tqdm.auto.tqdm.__mro__[1].__module__, matplotlib.get_backend(), pandas.options.display.max_columns, sys.path, __name__, sorted(strip(os.environ).items()), os.getcwd(), os.getsid(0) == os.getpid(), get_ipython().__class__.__name__, torch.get_num_threads())
''')
    assert through(probe, zygote) == through(probe)


@linux
def test_torch_and_blas_compute_in_parallel_after_a_fork(tmp_path, zygote):
    work = notebook(tmp_path/'work.ipynb', "import numpy as np, torch\ntorch.set_num_threads(2)\na = torch.ones(600, 600)\nprint(float((a @ a).sum()) == 600**3, (np.ones((600, 600)) @ np.ones((600, 600))).sum() == 600**3, float(torch.nn.functional.conv2d(torch.ones(8, 3, 64, 64), torch.ones(4, 3, 3, 3)).sum()) > 0)")
    assert [through(work, zygote)[-1].split() for _ in range(2)] == [['True']*3]*2


@linux
def test_no_kernel_outlives_a_parent_that_is_killed_and_no_socket(tmp_path, monkeypatch):
    short = Path(tempfile.mkdtemp(dir='/tmp'))      # a socket's path must be short
    monkeypatch.setenv('TMPDIR', str(short))
    notebook(tmp_path/'sleeps.ipynb', f"import os, subprocess, time\np = subprocess.Popen(['sleep', '1000'])\nopen(f'{tmp_path}/pids-{{n}}', 'w').write(f'{{os.getpid()}} {{os.getppid()}} {{p.pid}}')\ntime.sleep(1000)")
    process = subprocess.Popen([edgenb, 'sweep', 'sleeps.ipynb', '-g', 'n=1,2', '--workers', '2'], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while len(found := list(tmp_path.glob('pids-*'))) < 2 or not all(f.read_text() for f in found): assert process.poll() is None; time.sleep(0.05)
    pids = {int(p) for f in found for p in f.read_text().split()}
    os.kill(process.pid, signal.SIGKILL); process.wait()
    alive = lambda: [p for p in pids if Path(f'/proc/{p}').exists() and Path(f'/proc/{p}/stat').read_text().rpartition(') ')[2][0] != 'Z']
    for _ in range(100):
        if not alive(): break
        time.sleep(0.1)
    assert not alive() and len(pids) == 5      # two kernels, two children of theirs, one zygote
    assert not list(short.rglob('*'))
    short.rmdir()


def test_a_kernel_that_is_not_installed_is_a_line_and_a_failed_run(tmp_path):
    path = notebook(tmp_path/'toy.ipynb', '1')
    nb = nbformat.read(path, 4); nb.metadata['kernelspec']['name'] = 'nowhere'; nbformat.write(nb, path)
    refused(call('run', 'toy.ipynb', '--no-progress', cwd=tmp_path), 'asks for the kernel nowhere', 'install')
    assert record_of(next((tmp_path/'runs'/'toy').glob('2*')))['status'] == 'failed'
    told = json.loads(call('sweep', 'toy.ipynb', '-g', 'n=1', '--json', cwd=tmp_path).stdout.splitlines()[-1])
    assert told['runs'][0]['status'] == 'failed' and 'nowhere' in told['runs'][0]['reason'] and record_of(tmp_path/'runs'/'toy'/told['runs'][0]['run'])['status'] == 'failed'


def test_a_run_that_ends_in_any_way_is_not_left_as_running(tmp_path, monkeypatch):
    from filelock import FileLock
    from edgenb import mill
    from edgenb.executors import Job, do
    path = notebook(tmp_path/'toy.ipynb', '1')
    for ends, why in ((KeyboardInterrupt(), 'it was interrupted'), (RuntimeError('odd'), 'RuntimeError: odd')):
        with monkeypatch.context() as m:
            m.setattr(mill, '_executed', lambda *_, **__: (_ for _ in ()).throw(ends))
            with pytest.raises(type(ends)): run_recipe(str(path), {'output_dir': str(tmp_path/'run')}, progress=False)
        assert (record_of(tmp_path/'run')['status'], record_of(tmp_path/'run')['error']) == ('failed', why)
    (tmp_path/'run'/'job.json').write_text('{"status": "running"}')
    bad = Job(notebook(tmp_path/'bad.ipynb', '1', choices='n: int = f(1)'), {}, tmp_path/'run')
    from edgenb.kernels import Stop
    stop = Stop(); stop.now('enough')
    with FileLock(tmp_path/'run'/'.job.lock'): assert do(bad, stop=stop)['error'] == 'enough' and record_of(tmp_path/'run')['status'] == 'running'    # it is another's
    assert 'not a plain value' in do(bad)['error'] and record_of(tmp_path/'run')['status'] == 'failed'


def test_a_parameter_that_may_be_none_has_the_other_type_and_other_kinds_are_refused(tmp_path):
    from edgenb.mill import check_parameters
    known = parameters(notebook(tmp_path/'toy.ipynb', choices='m: int | None = None\nr: Optional[float] = None\ns: "str | None" = "a"\nd: dict[str, int | None] = {}\nt: tuple = (1,)\ne: int | str = 0\nu = None\nl: list[int | None] = [1]\nf: float = 0'))
    given = check_parameters(known, {'m': '5', 'r': '1', 's': None, 'l': ['x']})
    assert given == {'m': 5, 'r': 1.0, 's': None, 'l': ['x']} and [type(v) for v in given.values()] == [int, float, type(None), list]
    assert type(known['f'].default) is float                                # given as 0 and not given are the same run
    with pytest.raises(EdgenbError, match='whole number'): check_parameters(known, {'m': 'five'})
    for name in 'dteu':
        with pytest.raises(EdgenbError, match=f'{name} is declared as .* cannot be set'): check_parameters(known, {name: '5'})


def test_a_name_in_yaml_that_is_no_text_is_a_line(tmp_path):
    notebook(tmp_path/'toy.ipynb', '1')
    for text in ('1: 2', 'on: x'): refused(call('run', 'toy.ipynb', '-y', text, cwd=tmp_path), 'there is no parameter')


@linux
def test_a_time_limit_holds_also_while_the_zygote_hangs_and_a_late_kernel_is_ended(tmp_path):
    from edgenb.kernels import KernelDied, Stop, Zygote
    path = notebook(tmp_path/'toy.ipynb', 'print(1)')
    with Zygote() as zygote:
        os.kill(zygote.process.pid, signal.SIGSTOP)
        with pytest.raises(KernelDied, match='did not end within 1 s'): through(path, zygote, stop=Stop(1))
        assert len(zygote._unwanted) == 1
        os.kill(zygote.process.pid, signal.SIGCONT)
        while zygote._unwanted or zygote._children: time.sleep(0.05)
        assert through(path, zygote)[-1] == '1\n'


def test_what_a_room_wrote_is_listed_whatever_it_is_called(tmp_path):
    from edgenb.mill import manifest
    listed = ['01-data.0123abcd/.hidden/x', '01-data.0123abcd/job.json', 'toy.ipynb', 'turn-1/02-tune.0123abcd/.y']
    for path in [*listed, 'job.json', '.lock', '.rooms/x', 'turn-1/.lock', '.status']: (tmp_path/path).parent.mkdir(parents=True, exist_ok=True); (tmp_path/path).write_text('')
    assert sorted(manifest(tmp_path)) == listed


def test_two_writers_of_the_same_file_do_not_meet(tmp_path, monkeypatch):
    from edgenb.core import write_atomic
    real, once = os.replace, [True]
    def replace(source, target):
        if once: once.clear(); write_atomic(tmp_path/'x', 'another thread')
        real(source, target)
    monkeypatch.setattr(os, 'replace', replace)
    write_atomic(tmp_path/'x', 'mine')
    assert (tmp_path/'x').read_text() == 'mine' and not list(tmp_path.glob('.*'))


def test_a_kernels_end_is_no_error_in_a_sweeps_lines():
    import logging
    from edgenb.kernels import _worth_saying
    record = lambda text, error=None: logging.LogRecord('IPKernelApp', logging.ERROR, '', 0, text, (), (type(error), error, None) if error else None)
    assert not _worth_saying(record('KeyboardInterrupt caught in kernel.')) and not _worth_saying(record('Uncaught exception in zmqstream callback', KeyboardInterrupt()))
    assert _worth_saying(record('Uncaught exception in zmqstream callback', ValueError())) and _worth_saying(record('anything else'))
