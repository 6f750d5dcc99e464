"The recipes as a user runs them: through the command line, interrupted, again, and compared."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest

root = Path(__file__).parents[1]
edgenb = Path(sys.executable).parent/'edgenb'


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    "A workspace of its own, so that nothing is taken over from earlier runs; skipped where the sample data cannot be had."
    from edgenb.core import EdgenbError
    from edgenb.weights import fetch
    try: fetch('elpv'); fetch('efficientnet-lite0')
    except EdgenbError as e: pytest.skip(str(e))
    folder = tmp_path_factory.mktemp('workspace')
    (folder/'settings.ini').write_text((root/'settings.ini').read_text())
    (folder/'nbs').symlink_to(root/'nbs')
    return folder


def start(workspace, *args): return subprocess.Popen([edgenb, 'run', 'wafer', '-p', 'smoke', 'true', '--no-progress', '--json', *args], cwd=workspace, stdout=subprocess.PIPE,
                                                     stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope='module')
def killed_then_finished(workspace):
    "A smoke run that is killed with all its processes once `tune` has left its card, and the run that follows."
    first = start(workspace)
    for _ in range(1200):
        if list(workspace.glob('runs/wafer/*/02-tune.json')): break
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL); first.communicate()
    return finish(start(workspace))


def card(row, name): return json.loads(next(Path(row['path']).glob(f'0?-{name}.json')).read_text())


def test_wafer_goes_round_the_whole_loop(killed_then_finished):
    row = killed_then_finished
    assert row['reached'] == 'learn' and row['data'] == 'real' and Path(row['bundle']).is_dir()
    rows = card(row, 'verify')['result']['rows']
    assert [r['artifact'] for r in rows] == ['reference', 'squeezed', 'onnxruntime-fp32', 'onnxruntime-int8']
    named = 'artifact runtime precision device metric value low high delta delta_low delta_high p50_ms p95_ms p99_ms size_mb rss_mb verdict reason'.split()
    assert all(set(named) <= set(r) for r in rows) and card(row, 'verify')['result']['chosen'] in [r['artifact'] for r in rows[2:]]
    assert rows[2]['delta'] == 0 and rows[2]['flipped'] == []                    # FP32 through ONNX Runtime decides as torch does
    assert set(card(row, 'tune')) == set('edgenb room key data started seconds asked read wrote result environment seal'.split())


def test_a_killed_run_goes_on_without_training_again(killed_then_finished):
    notebook = (Path(killed_then_finished['path'])/'wafer.ipynb').read_text()
    assert '01-data: taken over from a run that did the same' in notebook and '02-tune: taken over' in notebook


def test_the_executed_notebook_shows_its_plots_without_javascript(killed_then_finished):
    cells = json.loads((Path(killed_then_finished['path'])/'wafer.ipynb').read_text())['cells']
    data = [o['data'] for c in cells for o in c.get('outputs', []) if 'data' in o]
    plots = [d for d in data if 'application/vnd.plotly.v1+json' in d]
    assert len(plots) >= 4 and all('image/png' in d for d in plots)
    assert not any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))


def test_a_repeated_run_skips_every_room_and_a_changed_choice_only_what_depends_on_it(workspace, killed_then_finished):
    again = finish(start(workspace))
    assert again['path'] != killed_then_finished['path'] and again['digest'] == killed_then_finished['digest']
    assert ': done in' not in (Path(again['path'])/'wafer.ipynb').read_text()
    other = finish(start(workspace, '-p', 'device', 'intel-nuc-arc', '-p', 'second_turn', 'false'))
    text = (Path(other['path'])/'wafer.ipynb').read_text()
    assert '04-compile: taken over' in text and '05-verify: done in' in text and other['verdict'] == 'not run here'
    manifest = json.loads((Path(other['bundle'])/'manifest.json').read_text())
    assert any('not on intel-nuc-arc' in w for w in manifest['warnings'])          # nobody measured there, and the bundle says so


def test_compare_shows_all_runs_in_one_table(workspace, killed_then_finished):
    done = subprocess.run([edgenb, 'compare'], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0 and Path(killed_then_finished['path']).name in done.stdout and 'label accuracy' in done.stdout
    rows = json.loads(subprocess.run([edgenb, 'compare', '--json'], cwd=workspace, capture_output=True, text=True).stdout)
    assert any(r.get('digest') == killed_then_finished['digest'] for r in rows)


def test_an_interrupt_ends_with_one_line_and_exit_code_130(workspace):
    before = set(workspace.glob('runs/wafer/*'))
    process = start(workspace, '-p', 'seed', '5')
    while not any((p/'.lock').exists() for p in set(workspace.glob('runs/wafer/*')) - before): assert process.poll() is None; time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and 'interrupted' in err.splitlines()[-1] and 'Traceback' not in err.splitlines()[-1]


def test_substation_goes_round_the_whole_loop_and_a_second_run_skips_every_room(tmp_path):
    "Without sample data: the fleet is simulated, and everything that comes of it says so."
    (tmp_path/'settings.ini').write_text((root/'settings.ini').read_text())
    (tmp_path/'nbs').symlink_to(root/'nbs')
    go = [edgenb, 'run', 'substation', '-p', 'smoke', 'true', '-p', 'num_threads', '1', '-p', 'runtimes', '["onnxruntime"]', '--no-progress', '--json']
    row, again = (finish(subprocess.Popen(go, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) for _ in range(2))
    assert row['reached'] == again['reached'] == 'learn' and row['data'] == 'synthetic' and all(json.loads(c.read_text())['data'] == 'synthetic' for c in Path(row['path']).glob('0?-*.json'))
    manifest = json.loads((Path(row['bundle'])/'manifest.json').read_text())
    checked = subprocess.run([sys.executable, '-m', 'edgenb.golden', row['bundle']], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(checked.stdout)['worst'] < 0.01 and 'golden/0.npy' in manifest['files'], checked.stdout + checked.stderr
    assert manifest['data'] == 'synthetic' and 'made from synthetic data' in manifest['warnings'] and len(manifest['warnings']) >= 2
    np.save(tmp_path/'window.npy', np.load(next(Path(row['path']).glob('08-learn.*/new.npy')))[0])
    done = subprocess.run([edgenb, 'predict', row['bundle'], 'window.npy', '--json'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer['label'] in card(row, 'data')['result']['classes'] and answer['decision'] in ('accept', 'reject') and 0 <= answer['score'] <= 1 and 'synthetic' in done.stderr
    assert again['path'] != row['path'] and again['digest'] == row['digest']
    text = (Path(again['path'])/'substation.ipynb').read_text()
    assert ': done in' not in text and all(f'0{n}-{r}: taken over' in text for n, r in enumerate('data tune squeeze compile verify ship watch learn'.split(), 1))


OFFLINE = """import ctypes, fcntl, os, socket, struct, sys
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
uid, gid = os.getuid(), os.getgid()
if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET): sys.exit(77)
for name, line in (('setgroups', 'deny'), ('uid_map', f'0 {uid} 1'), ('gid_map', f'0 {gid} 1')): open(f'/proc/self/{name}', 'w').write(line)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 1))   # SIOCSIFFLAGS, IFF_UP: a notebook's kernel listens on the loopback, there is no other interface
os.execv(sys.argv[1], sys.argv[1:])
"""   # a network namespace of its own, as `unshare -rn` makes one


@pytest.fixture(scope='module')
def icd(tmp_path_factory):
    "A smoke run of the ICD recipe without any network; skipped where the weights cannot be had."
    from edgenb.core import EdgenbError
    from edgenb.lm import base_folder
    from edgenb.runtime import runtime
    from edgenb.weights import fetch
    if why := runtime('gguf').missing(): pytest.skip(why)
    try: base_folder('bundled:smollm2-135m'); fetch('minilm-l6')
    except EdgenbError as e: pytest.skip(str(e))
    workspace = tmp_path_factory.mktemp('clinic')
    (workspace/'settings.ini').write_text((root/'settings.ini').read_text())
    (workspace/'nbs').symlink_to(root/'nbs')
    go = [sys.executable, '-c', OFFLINE, str(edgenb), 'run', 'icd', '-p', 'smoke', 'true', '-p', 'num_threads', '1', '--no-progress', '--json']
    done = subprocess.run(go, cwd=workspace, capture_output=True, text=True, timeout=1200)   # ends it, too
    if done.returncode == 77: pytest.skip('this system allows no network namespaces')
    assert done.returncode == 0, done.stderr
    return workspace, json.loads(done.stdout.splitlines()[-1])


def test_icd_goes_round_the_whole_loop_without_a_network(icd):
    workspace, row = icd
    assert row['reached'] == 'learn' and row['data'] == 'synthetic'
    rows = {r['artifact']: r for r in card(row, 'verify')['result']['rows']}
    assert {'reference', 'squeezed', 'gguf-f16', 'gguf-q4_k_m', 'gguf-base'} <= set(rows) and rows['gguf-f16']['language']['kl_mean'] < 0.01 < rows['gguf-base']['language']['kl_mean']
    assert rows['gguf-q4_k_m']['size_mb'] < 120 < rows['gguf-f16']['size_mb'] and 'made from synthetic data' in json.loads((Path(row['bundle'])/'manifest.json').read_text())['warnings']
    (workspace/'visit.txt').write_text('CC: dysuria\nHPI: urgency x2d, no fever\nA/P: UTI. nitrofurantoin 100 mg BID x5d')
    done = subprocess.run([edgenb, 'predict', row['bundle'], 'visit.txt', '--json'], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)['codes']) == 5, done.stderr


def test_no_name_of_a_patient_is_left_in_anything_the_icd_recipe_wrote(icd):
    "The invented notes lie beside the runs as they were written; everything in a run is made of de-identified ones."
    workspace, row = icd
    source, = (workspace/'runs'/'icd'/'synthetic').glob('*.jsonl')
    patients = {json.loads(l)['patient'] for l in source.read_text().splitlines()}
    written = {p: p.read_bytes() for p in Path(row['path']).rglob('*') if p.is_file() and p.suffix in ('.json', '.jsonl', '.ipynb', '.txt', '.md', '')}
    assert len(written) > 40 and not [p for p, content in written.items() for name in patients if name.encode() in content]
    numbers = {n for l in source.read_text().splitlines() for n in re.findall(r'MRN (\d{7})', json.loads(l)['text'])}
    found = {n for n in numbers if any(n.encode() in content for content in written.values())}
    assert len(numbers) > 20 and not found
