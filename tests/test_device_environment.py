"""A device has Python, numpy, Pillow and a runtime, and decides there exactly as the workstation does."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from edgenb.ship import bundle_of, load_bundle

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ['torch', 'scipy', 'sklearn', 'pandas', 'transformers']
PREDICT = '''
import importlib.metadata, json, sys
from edgenb.ship import load_bundle
bundle, *images = sys.argv[1:]
loaded = load_bundle(bundle)
answer = loaded.answer(images)
print(json.dumps({'predictions': loaded.predict(images), 'scores': answer['score'].tolist(), 'embeddings': answer['embedding'].tolist(),
                  'loaded': sorted(sys.modules),
                  'versions': {p: importlib.metadata.version(p) for p in ('numpy', 'pillow', 'onnxruntime')}}))
'''


def run_in(python, *arguments, **options):
    "Run Python without this repository, this folder or this user's packages on its path."
    clean = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    return subprocess.run([str(python), '-I', *map(str, arguments)], capture_output=True, text=True, env=clean, **options)


@pytest.fixture(scope='module')
def device(tmp_path_factory):
    "A fresh environment with what a device needs, no more: its folder."
    folder = tmp_path_factory.mktemp('device')
    subprocess.run([sys.executable, '-m', 'venv', str(folder/'venv')], check=True)
    python = folder/'venv'/'bin'/'python'
    pins = ['-c', str(ROOT/'constraints.txt')] if (ROOT/'constraints.txt').is_file() else []
    quiet = ['-m', 'pip', '--disable-pip-version-check', '--quiet']
    done = run_in(python, *quiet, 'install', *pins, f'{ROOT}[onnxruntime]', cwd=folder)
    if done.returncode:
        if run_in(python, *quiet, 'download', '--no-deps', '--only-binary=:all:', '-d', folder/'reachable', 'filelock').returncode:
            pytest.skip(f'pip reaches no package registry: {done.stderr.strip().splitlines()[-1]}')
        pytest.fail(f'the project cannot be installed: {done.stderr[-2000:]}')
    return folder


@pytest.fixture(scope='module')
def shipped(device, toy_run, toy_images):
    "Copies on the device: (bundle, images)."
    bundle, images = device/'bundle', device/'images'
    shutil.copytree(bundle_of(toy_run), bundle)
    shutil.copytree(toy_images, images)
    return bundle, sorted(images.rglob('*.png'))


@pytest.mark.parametrize('name', HEAVY)
def test_a_device_has_no_workstation_package(name, device):
    done = run_in(device/'venv'/'bin'/'python', '-c', f'import {name}', cwd=device)
    assert done.returncode == 1 and f"No module named '{name}'" in done.stderr


def test_a_device_runs_the_installed_edgenb_and_not_this_repository(device):
    done = run_in(device/'venv'/'bin'/'python', '-c', 'import edgenb; print(edgenb.__file__)', cwd=device)
    assert Path(done.stdout.strip()).is_relative_to(device/'venv')


def test_a_device_decides_exactly_as_the_workstation(device, shipped):
    import importlib.metadata
    bundle, images = shipped
    done = run_in(device/'venv'/'bin'/'python', '-c', PREDICT, bundle, *images, cwd=device)
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), load_bundle(bundle)
    answer = here.answer(images)
    assert there['predictions'] == here.predict(images) and {p['label'] for p in there['predictions']} == {'clean', 'scratch'}
    if all(importlib.metadata.version(p) == v for p, v in there['versions'].items()):
        assert there['scores'] == answer['score'].tolist() and there['embeddings'] == answer['embedding'].tolist()
    else: assert there['scores'] == pytest.approx(answer['score'].tolist(), abs=1e-5)
    assert not set(there['loaded']) & set(HEAVY)


@pytest.mark.parametrize('module', ['edgenb', 'edgenb.ship', 'edgenb.watch', 'edgenb.pipeline', 'edgenb.compile'])
def test_importing_what_a_device_uses_loads_no_workstation_package(module):
    for heavy in HEAVY: pytest.importorskip(heavy)   # where they are missing, not loading them proves nothing
    code = f'import {module}, json, sys; print(json.dumps(sorted(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert module in json.loads(done.stdout) and not set(json.loads(done.stdout)) & set(HEAVY)


def test_the_command_line_decides_line_by_line_and_names_what_it_cannot_decide(device, shipped):
    bundle, images = shipped
    command, some = device/'venv'/'bin'/'edgenb', images[:2] + images[-2:]
    def predict(bundle, *images):
        return subprocess.run([str(command), 'predict', str(bundle), *map(str, images), '--json'], capture_output=True, text=True,
                              cwd=device)
    done = predict(bundle, *some)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert all(set(r) == {'image', 'decision', 'label', 'score'} for r in rows) and [r['image'] for r in rows] == [str(i) for i in some]
    assert [{k: r[k] for k in ('decision', 'label', 'score')} for r in rows] == load_bundle(bundle).predict(some)

    broken = device/'broken.png'
    broken.write_bytes(some[0].read_bytes()[:100])
    done = predict(bundle, some[0], broken, some[1])
    assert done.returncode == 2 and [json.loads(line)['image'] for line in done.stdout.splitlines()] == [str(i) for i in some[:2]]
    note, error = done.stderr.strip().splitlines()
    assert note == 'note: made from synthetic data' and error.startswith('edgenb: ') and 'broken.png' in error

    damaged = device/'damaged'
    shutil.copytree(bundle, damaged)
    whole = (damaged/'model.onnx').read_bytes()
    (damaged/'model.onnx').write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    done = predict(damaged, *some)
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.strip().splitlines()) == 1 and 'model.onnx' in done.stderr


def test_a_device_measures_and_questions_a_bundle_with_the_base_install(device, shipped):
    bundle, images = shipped
    def verify(*arguments):
        return subprocess.run([str(device/'venv'/'bin'/'edgenb'), 'verify', *map(str, arguments)], capture_output=True, text=True, cwd=device)
    done = verify(bundle, '--images', *images[:3], images[-1].parent, '--runs', 5, '--json')
    assert done.returncode == 0, done.stderr
    found, here = json.loads(done.stdout), load_bundle(bundle)
    asked = [*images[:3], *sorted(images[-1].parent.iterdir())]
    assert found['images'] == [str(i) for i in asked] and found['answers']['score'] == pytest.approx(here.answer(asked)['score'].tolist(), abs=1e-5)
    row, = found['rows']
    assert (row['artifact'], row['runs'], row['error']) == (here.manifest['artifact'], 5, '') and 0 < row['p50_ms'] <= row['p95_ms'] and row['rss_mb'] > 0

    done = verify(bundle, '--images', images[0], '--runs', 5)
    assert done.returncode == 0 and 'decision   p50' in done.stdout and 'verdict' not in done.stdout      # nobody told it what is right
    for arguments, words in [((bundle,), 'pass image files'), ((bundle, '--images', device/'nowhere.png'), 'nowhere.png does not exist'), ((images[0].parent, '--images', images[0]), 'is not a bundle')]:
        done = verify(*arguments)
        assert done.returncode == 2 and done.stdout == '' and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_bare_install_says_what_it_has_and_the_command_that_adds_the_rest(device):
    done = run_in(device/'venv'/'bin'/'python', device/'venv'/'bin'/'edgenb', 'doctor', '--json', cwd=device)
    assert done.returncode == 0, done.stderr
    parts = {p['extra']: p for p in json.loads(done.stdout)['parts']}
    assert {parts[e]['state'] for e in ('', 'onnxruntime')} == {'ready'} and parts['lab']['state'] == 'missing'
    assert 'torch' in parts['lab']['missing'] and 'pip install' in parts['lab']['command'] and parts['lab']['command'].endswith("[lab]'")
