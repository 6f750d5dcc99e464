"""The gate: what answers otherwise than the network that was tuned is caught, named, and never ships; what ships is the best of what passed. All data here is synthetic."""
import copy, errno, json, os, shutil, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from edgenb.bisect import culprit, first_step, in_words, layer_errors
from edgenb.choice import AXES, choose, dominates, front_figure, pareto, within_budget
from edgenb.compile import compile
from edgenb.core import EdgenbError, Run, write_json
from edgenb.device import device as find_device
from edgenb.ranking import expected_calibration_error
from edgenb.pipeline import image_pipeline
from edgenb.runtime import RUNTIMES, Network, Variant, runtime, size_mb
from edgenb.runtimes.onnx import OnnxRuntime, export_onnx
from edgenb.search import Judgement, answers_of, distance, search
from edgenb.ship import bundle_of, load_bundle, ship, shippable
from edgenb.size import find_model
from edgenb.squeeze import squeeze
from edgenb.verify import agreement, parity, per_class, verify
from nets import sensor_windows, trained_autoencoder

properties = hypothesis_settings(derandomize=True, deadline=None, database=None, max_examples=80)


def refused(call, *words):
    "The message `call` is refused with: one line that holds all the words."
    with pytest.raises(EdgenbError) as caught: call()
    message = str(caught.value)
    assert '\n' not in message and 'Traceback' not in message
    for word in words: assert word in message, message
    return message


def skip_without(*names):
    for n in names:
        if why := runtime(n).missing(build=True): pytest.skip(why)


# A package that is not edgenb's ---------------------------------------------------------------------------------------

ODD = '''
"Runtimes of another package: ONNX Runtime, whose 8-bit files are wrong on purpose."
import onnx
from onnx import numpy_helper
from edgenb.core import EdgenbError
from edgenb.runtime import Variant
from edgenb.runtimes.onnx import OnnxRuntime, export_onnx

def exchanged(path, node, axis=0):
    "Reverse the order of a layer's outputs: its weights and its bias."
    model = onnx.load(str(path))
    layer = next(n for n in model.graph.node if node(n))
    for i in model.graph.initializer:
        if i.name in layer.input[1:]: i.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(i)[::-1].copy(), i.name))
    onnx.save(model, str(path))
    return path

class Odd(OnnxRuntime):
    name = 'odd'
    variants = {'fp32': Variant('fp32', 'as it should be'), 'int8': Variant('int8', 'each class gets the score of the other'),
                'int8-middle': Variant('int8', 'the channels of a layer in the middle are exchanged'),
                'int8-mute': Variant('int8', 'cannot be loaded'), 'int8-crash': Variant('int8', 'raises what it likes at the thirteenth image: there are twelve for validation')}
    exported = {}   # network's weights -> file's content: exporting takes seconds

    @classmethod
    def build(cls, network, variant, calibration, path):
        weights = tuple(float(p.detach().sum()) for p in network.net.parameters())
        if weights not in cls.exported: cls.exported[weights] = export_onnx(network, path).read_bytes()
        path.write_bytes(cls.exported[weights])
        if variant == 'int8': exchanged(path, lambda n: 'logits' in n.output)
        if variant == 'int8-middle': exchanged(path, lambda n: n.op_type == 'Conv' and 'blocks.6' in str(n.metadata_props))
        return path

    @classmethod
    def load(cls, path, num_threads=1):
        if 'mute' in str(path): raise EdgenbError(f'{path} cannot be loaded')
        model = super().load(path, num_threads)
        return (lambda x, whole=False: model(x) if len(x) < 13 else [][0]) if 'crash' in str(path) else model

class Elsewhere(Odd):
    "Built here, run elsewhere."
    name, variants = 'elsewhere', {'fp32': Odd.variants['fp32']}
    @classmethod
    def missing(cls, build=False): return '' if build else 'elsewhere needs a chip that is not in this machine'
'''


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "An installed package with two runtimes, for this process and those it starts."
    from edgenb import device, runtime as module
    folder, patch = tmp_path_factory.mktemp('package'), pytest.MonkeyPatch()
    (folder/'odd.py').write_text(ODD)
    about = folder/'odd-1.0.dist-info'
    about.mkdir()
    (about/'METADATA').write_text('Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n')
    (about/'entry_points.txt').write_text('[edgenb.runtimes]\nodd = odd:Odd\nelsewhere = odd:Elsewhere\n')
    patch.syspath_prepend(folder)
    patch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(folder), str(Path(module.__file__).parents[1]), os.environ.get('PYTHONPATH')])))
    for known in (module._others, device._runtimes_here): known.cache_clear()
    yield folder
    patch.undo()
    for name in ('odd', 'elsewhere'): RUNTIMES.pop(name, None)
    sys.modules.pop('odd', None)
    for known in (module._others, device._runtimes_here): known.cache_clear()


FIGURES = {'p50_ms': 3.0, 'p95_ms': 4.0, 'p99_ms': 5.0, 'model_p50_ms': 2.0, 'rss_mb': 80.0, 'error': None}


@pytest.fixture(scope='module')
def gated(toy_run, odd, tmp_path_factory):
    "The finished run again, with every artifact the odd runtimes build, wrong ones included, judged at a tolerance its 24 test images can decide."
    shutil.copytree(toy_run.path, (folder := tmp_path_factory.mktemp('gated'))/'run', copy_function=os.link)
    run = Run(folder/'run')
    squeeze(run, precisions=['fp32', 'int8'], calibration_images=16)
    compile(run, runtimes=['odd', 'elsewhere'], full=True)
    verify(run, tolerance=0.2, latency_budget_ms=10_000, timing_runs=5)
    return run


@pytest.fixture
def copied(gated, tmp_path):
    "A copy of the judged run. Its files are links: replace them, never write into them."
    shutil.copytree(gated.path, tmp_path/'run', copy_function=os.link)
    return Run(tmp_path/'run')


@pytest.fixture
def unmeasured(monkeypatch):
    "Figures that are given and not measured: those tests are about the verdict."
    monkeypatch.setattr('edgenb.verify.measured', lambda candidates, *a, **k: {c['artifact']: dict(FIGURES) for c in candidates})


def only(run, *artifacts, **also):
    "As if compile had built no others; `also` is written into their rows."
    card = run.card('compile')
    replace(card, result=card.result | {'artifacts': [a | also for a in card.result['artifacts'] if a['artifact'] in artifacts]}).save(run._card_path('compile'))


def row(run, artifact): return next(r for r in run.card('verify').result['rows'] if r['artifact'] == artifact)
def bundled(run): return list(run.path.glob('06-ship*/bundle'))


@pytest.mark.parametrize('artifact,named', [('odd-int8', 'logits (Gemm in head)'), ('odd-int8-middle', 'blocks.6')])
def test_an_artifact_that_computes_something_else_fails_and_the_layer_is_named(artifact, named, gated):
    found = row(gated, artifact)
    assert found['verdict'] == 'fail' and found['delta_high'] < -0.2 and found['flipped']
    assert named in found['reason'].split('the first layer out of tolerance is ')[1].split(';')[0]
    assert found['per_class'][0]['delta'] == min(c['delta'] for c in found['per_class']) < -0.2


def test_an_artifact_that_cannot_be_loaded_or_crashes_fails_and_the_others_are_judged(gated):
    for artifact, why in (('odd-int8-mute', 'cannot be loaded'), ('odd-int8-crash', 'IndexError')):
        assert row(gated, artifact)['verdict'] == 'fail' and why in row(gated, artifact)['reason']
    assert row(gated, 'odd-fp32')['verdict'] == 'pass' and row(gated, 'odd-fp32')['p95_ms'] > 0 and row(gated, 'odd-fp32')['delta'] == 0


def test_a_runtime_that_is_not_installed_is_built_for_and_not_judged(gated):
    found = row(gated, 'elsewhere-fp32')
    assert found['verdict'] == 'not run here' and 'chip' in found['reason'] and found['value'] is None and found['p95_ms'] is None
    refused(lambda: ship(gated, artifact='elsewhere-fp32'), "'not run here'", 'accept=')


def test_the_one_that_holds_is_chosen_and_every_other_has_its_reason(gated):
    result = gated.card('verify').result
    assert result['chosen'] == 'odd-fp32' and set(result['why_not']) == {'odd-int8', 'odd-int8-middle', 'odd-int8-mute', 'odd-int8-crash', 'elsewhere-fp32'}
    assert all(result['why_not'].values()) and 'logits' in result['why_not']['odd-int8'] and result['front'] == ['odd-fp32']


# What failed does not ship --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('artifact', ['odd-int8', 'odd-int8-middle', 'odd-int8-mute', 'odd-int8-crash'])
@pytest.mark.parametrize('accept', [[], ['undecided', 'not run here'], ['fail'], ['undecided', 'fail']], ids=str)
def test_no_choice_ships_an_artifact_that_failed(artifact, accept, copied):
    for file in bundled(copied): shutil.rmtree(file)
    refused(lambda: ship(copied, artifact=artifact, accept=accept), 'cannot be accepted' if 'fail' in accept else "'fail'")
    assert not bundled(copied)


def test_what_passed_ships_and_says_which_it_is(copied):
    ship(copied)
    manifest = load_bundle(bundle_of(copied)).manifest
    assert (manifest['artifact'], manifest['verdict']) == ('odd-fp32', 'pass')


@pytest.mark.parametrize('change', [lambda r: next(x for x in r['rows'] if x['artifact'] == 'odd-int8').update(verdict='pass'), lambda r: r.update(chosen='odd-int8')], ids=['verdict', 'chosen'])
def test_a_verdict_that_was_edited_by_hand_is_refused(change, copied):
    card = json.loads((path := copied._card_path('verify')).read_text())
    change(card['result'])
    write_json(path, card)                                              # a new file: the one it was linked to stays
    refused(lambda: ship(copied, artifact='odd-int8'), '05-verify.json', 'changed after it was written')


@pytest.mark.parametrize('room,file', [('verify', 'parity.json'), ('compile', 'odd-fp32.onnx')])
def test_a_file_that_was_exchanged_after_the_verdict_is_refused(room, file, copied):
    path, wrong = copied.file(room, file), copied.file('compile', 'odd-int8.onnx').read_bytes()
    path.unlink()
    path.write_bytes(wrong)
    refused(lambda: ship(copied), file, 'digest differs')


def test_a_bundle_whose_parity_report_was_edited_is_refused(copied):
    ship(copied)
    bundle = Path(shutil.copytree(bundle_of(copied), copied.path.parent/'bundle'))
    for name, old, new in (('parity.json', '"fail"', '"pass"'), ('manifest.json', '"verdict": "pass"', '"verdict": "safe"')):
        whole = (bundle/name).read_text()
        assert old in whole
        (bundle/name).write_text(whole.replace(old, new))
        refused(lambda: load_bundle(bundle), name, 'changed after')
        (bundle/name).write_text(whole)
    load_bundle(bundle)


RECIPE = [('markdown', '# Gate\n\n> Builds again and ships.', []), ('code', "output_dir: str = ''  # the run\nartifact: str = ''  # to ship\naccept_verdicts: list = []  # besides pass\nagain: bool = False  # compile first", ['parameters']),
          ('code', "from edgenb.compile import compile\nfrom edgenb.ship import ship\nif again: compile(output_dir, runtimes=['odd'])\nship(output_dir, artifact=artifact, accept=accept_verdicts)", [])]


@pytest.fixture
def recipe(tmp_path):
    import nbformat
    cells = [getattr(nbformat.v4, f'new_{kind}_cell')(text, metadata={'tags': tags} if tags else {}) for kind, text, tags in RECIPE]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}}), tmp_path/'gate.ipynb')
    return tmp_path/'gate.ipynb'


def edgenb_run(recipe, run, *arguments):
    command = [sys.executable, '-c', 'import sys; from edgenb.cli import main; sys.exit(main())', 'run', recipe, '--no-progress', '-p', 'output_dir', run.path, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=recipe.parent)


def test_the_command_line_ships_nothing_that_failed(recipe, copied):
    for file in bundled(copied): shutil.rmtree(file)
    done = edgenb_run(recipe, copied, '-p', 'artifact', 'odd-int8', '-y', "accept_verdicts: ['undecided', 'not run here']")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("edgenb: ship: odd-int8 is 'fail'") and not bundled(copied)


def test_a_recipe_compiles_with_the_runtime_of_another_package_and_then_refuses_the_old_verdict(recipe, copied):
    for file in bundled(copied): shutil.rmtree(file)
    done = edgenb_run(recipe, copied, '-p', 'again', 'true')
    assert done.returncode == 2 and 'verify is out of date: compile has changed since' in done.stderr.splitlines()[-1] and not bundled(copied)
    result, left = copied.card('compile').result, sorted(p.name for p in copied.path.glob('04-compile.*/*'))
    assert left == ['odd-fp32.onnx', 'odd-int8-crash.onnx'] == [a['file'] for a in result['artifacts']]     # what was refused is not there to be shipped; that one crashes on test images only
    told = {t['artifact']: t for t in result['tried']}
    assert [n for n, t in told.items() if not t['holds']] == ['odd-int8', 'odd-int8-middle', 'odd-int8-mute'] and told['odd-int8']['loss'] > 0.2 and 'cannot be loaded' in told['odd-int8-mute']['why']
    for artifact in ('', 'odd-fp32', 'odd-int8'): refused(lambda: ship(copied, artifact=artifact, accept=['undecided']), 'out of date')


# Budgets --------------------------------------------------------------------------------------------------------------

def test_a_budget_that_nothing_meets_names_the_tightest_bound_and_what_would_do(copied, unmeasured):
    only(copied, 'odd-fp32', 'odd-int8')
    asked = dict(tolerance=0.2, timing_runs=5)
    result = verify(copied, latency_budget_ms=3.0, size_budget_mb=1.0, **asked).result
    assert result['chosen'] is None and 'moving one bound alone' in result['why'] and 'latency p95, ms: 4, the budget is 3' in result['why']
    result = verify(copied, latency_budget_ms=50.0, size_budget_mb=1.0, **asked).result
    assert result['chosen'] is None and set(result['why_not']) == {r['artifact'] for r in result['rows'] if r['runtime'] != 'torch'}
    assert 'the tightest bound is size on disk, MB: odd-fp32 needs ' in result['why']
    refused(lambda: ship(copied), 'no artifact may ship', 'size on disk', 'odd-int8')
    enough = float(result['why'].rsplit('MB ', 1)[1].split()[0])
    assert verify(copied, latency_budget_ms=50.0, size_budget_mb=enough, **asked).result['chosen'] == 'odd-fp32'
    assert verify(copied, latency_budget_ms=50.0, size_budget_mb=enough - 0.02, **asked).result['chosen'] is None


def test_what_cannot_run_here_has_to_meet_the_bounds_that_are_known_without_running(copied, unmeasured):
    only(copied, 'elsewhere-fp32')
    asked = dict(tolerance=0.2, latency_budget_ms=50.0, timing_runs=5)
    assert verify(copied, size_budget_mb=1.0, **asked).result['chosen'] is None
    assert 'size on disk' in row(copied, 'elsewhere-fp32')['reason']
    refused(lambda: ship(copied, artifact='elsewhere-fp32', accept=['not run here']), "'fail'")
    assert verify(copied, device='jetson-orin-nano', **asked).result['chosen'] is None and 'jetson-orin-nano does not run elsewhere' in row(copied, 'elsewhere-fp32')['reason']
    assert verify(copied, size_budget_mb=100.0, **asked).result['chosen'] == 'elsewhere-fp32' and row(copied, 'elsewhere-fp32')['verdict'] == 'not run here'


def test_the_loss_that_keeps_an_artifact_out_is_told_with_the_tolerance_that_would_let_it_in(copied, unmeasured):
    only(copied, 'odd-int8')
    refused = verify(copied, tolerance=1.0, latency_budget_ms=50.0, timing_runs=5).result
    assert refused['chosen'] is None and 'refused on validation examples' in refused['why']    # no tolerance on test images brings back what validation refused
    only(copied, 'odd-int8', refused='')   # as if validation images had not shown it
    said = verify(copied, tolerance=0.2, latency_budget_ms=50.0, timing_runs=5).result['why']
    assert 'the tightest bound is loss of accuracy: odd-int8 needs ' in said and 'the budget is 0.2;' in said
    enough = float(said.split('needs ')[1].split(',')[0])
    assert verify(copied, tolerance=min(enough, 1), latency_budget_ms=50.0, timing_runs=5).result['chosen'] == 'odd-int8'


def test_an_artifact_whose_scores_are_no_numbers_is_no_choice_and_no_crash(copied, unmeasured, monkeypatch):
    monkeypatch.setattr(runtime('odd'), 'load', classmethod(lambda cls, path, num_threads=1: lambda x, whole=False: {'logits': np.full((len(x), 2), np.nan)}))
    result = verify(copied, tolerance=0.2, latency_budget_ms=50.0, timing_runs=5).result
    assert result['chosen'] == 'elsewhere-fp32' and 'finite' in result['why_not']['odd-fp32']
    only(copied, 'odd-fp32')
    result = verify(copied, tolerance=0.2, latency_budget_ms=50.0, timing_runs=5).result
    assert result['chosen'] is None and 'moving one bound alone would let nothing ship' in result['why']


@pytest.mark.parametrize('metric, always, named', [('detection rate', 1, 'false-positive rate'), ('false-positive rate', 0, 'detection rate')])
def test_what_always_rings_or_never_does_not_pass_by_one_rate(metric, always, named, copied, unmeasured, monkeypatch):
    only(copied, 'odd-fp32')
    monkeypatch.setattr(runtime('odd'), 'load', classmethod(lambda cls, path, num_threads=1: lambda x, whole=False: {'logits': np.where(np.arange(2) == always, 9.0, -9.0) + np.zeros((len(x), 1))}))
    result = verify(copied, metric=metric, tolerance=0.2, other_tolerance=0.2, latency_budget_ms=50.0, timing_runs=5).result
    found = row(copied, 'odd-fp32')
    assert result['chosen'] is None and found['verdict'] == 'fail' and named in found['reason'] and found['over'][f'loss of {named}'][1] == 0.2
    refused(lambda: ship(copied), 'no artifact may ship')


@pytest.mark.parametrize('arena, fits', [(200_000, True), (90_000_000, False)])
def test_on_a_microcontroller_the_arena_that_was_measured_decides(arena, fits, copied, unmeasured, monkeypatch):
    only(copied, 'odd-fp32')
    monkeypatch.setattr(runtime('odd'), 'footprint', classmethod(lambda cls, path: {'flash_bytes': 300_000, 'arena_bytes': arena}))
    verify(copied, device='esp32-s3', tolerance=0.2, latency_budget_ms=50.0, timing_runs=5)
    found, size = row(copied, 'odd-fp32'), find_model(str(copied.path))
    assert found['arena_bytes'] == arena and 'does not run odd' in found['reason'] and ('measured for esp32-s3' in found['reason']) is not fits
    assert found['over'].keys() == {'runtime'} | (set() if fits else {'memory'})
    told = find_device('esp32-s3').fit(size[0], measurements=size[1])
    assert next(r for r in told.rows if r.precision == 'fp32').activations_mb == pytest.approx(arena/2**20)


def test_an_artifact_tied_to_this_machine_passes_for_no_other(copied, unmeasured, monkeypatch):
    only(copied, 'odd-fp32')
    monkeypatch.setattr(runtime('odd'), 'tied', 'an odd engine runs only where it was built')
    assert verify(copied, tolerance=0.2, latency_budget_ms=50.0, timing_runs=5).result['chosen'] == 'odd-fp32'
    assert verify(copied, device='jetson-orin-nano', tolerance=0.2, latency_budget_ms=50.0, timing_runs=5).result['chosen'] is None
    assert 'only where it was built: build it on jetson-orin-nano' in row(copied, 'odd-fp32')['reason']


@pytest.mark.parametrize('p95, verdict, code', [(9.0, 'pass', 0), (20_000.0, 'fail', 1)])
def test_a_device_is_held_to_the_budgets_of_the_run_and_its_figures_are_kept(p95, verdict, code, copied, monkeypatch, capsys):
    from edgenb import remote
    from edgenb.cli import main
    ship(copied, artifact='odd-fp32')
    def there(target, bundle, images, python, keep, **choices):
        found = remote.local_measure(bundle, images, runs=2, warm_up=1, batches=())
        return found | {'rows': [found['rows'][0] | {'p50_ms': p95/2, 'model_p50_ms': p95/3, 'p95_ms': p95}]}
    monkeypatch.setattr(remote, 'remote_measure', there)
    assert main(['verify', str(copied.path), '--on', 'ssh://pi@shelf-7:2222']) == code
    said = capsys.readouterr().out
    assert f'verdict    {verdict}: ' in said and ('latency p95, ms: 2e+04, the budget is 1e+04' in said) is (code == 1) and 'measured-pi-shelf-7-2222.json' in said
    kept = find_model(str(copied.path))[1][-1]
    assert (kept['measured_on'], kept['verdict'], kept['precision'], kept['p95_ms']) == ('ssh://pi@shelf-7:2222', verdict, 'fp32', p95)


def test_no_bundle_is_packed_of_what_failed(tmp_path):
    from edgenb.ship import pack
    refused(lambda: pack(tmp_path/'bundle', 'model', {'artifact': 'odd-int8', 'verdict': 'fail', 'reason': 'loses 0.3'}, *[None]*6), 'odd-int8', 'loses 0.3')
    assert not (tmp_path/'bundle').exists()


# 8 bits that break, and 8 bits that hold --------------------------------------------------------------------------------

def by_name(found): return {t.artifact: t for t in found}


def held_again(tried, judge):
    "The artifact on disk is the one that was judged."
    return tried.path.exists() and judge(runtime(tried.runtime).load(tried.path)).loss == pytest.approx(tried.loss, abs=1e-6)


def panels(n, seed):
    "Synthetic grey panels, (n, 1, 24, 24): dark, bright, or dark with a faint spot of one pixel."
    rng, y = np.random.default_rng(seed), np.arange(n) % 3
    x = rng.uniform(0.2, 0.4, n)[:, None, None] + 0.5*(y == 1)[:, None, None] + rng.normal(0, 0.003, (n, 24, 24))
    x[y == 2, 3 + rng.integers(0, 18, (y == 2).sum()), 3 + rng.integers(0, 18, (y == 2).sum())] += 0.1
    return x[:, None].astype(np.float32), y


def spot_finder():
    "A convolutional net for `panels`. Its first filter has large weights that cancel, as filters have after batch-norm was folded into them; the others are small."
    import torch
    from torch import nn
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad(): net[0].weight[0, 0] = 40*torch.tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0.]]); net[0].bias.zero_()
    x, y = map(torch.from_numpy, panels(600, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(600).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            net[0].weight.grad[0] = 0
            optimizer.step()
    return Network(net.eval(), {'image': x[:1].numpy()}, ('logits',))


def test_dynamic_int8_of_a_convolutional_net_is_refused_and_an_int8_that_holds_is_found(tmp_path, monkeypatch):
    skip_without('onnxruntime')
    monkeypatch.setattr(OnnxRuntime, 'variants', {v: OnnxRuntime.variants[v] for v in ('int8-dynamic', 'int8-tensor', 'int8')})   # the breaking ones first
    x, y = panels(300, 2)
    def judge(model):
        right = float((model(x)['logits'].argmax(1) == y).mean())
        return Judgement(1 - right, right > 0.98, f'{right:.1%} right')
    found = by_name(search(spot_finder(), ['onnxruntime'], ['int8'], [{'image': i[None]} for i in panels(64, 3)[0]], judge, tmp_path))
    for name in ('onnxruntime-int8-dynamic', 'onnxruntime-int8-tensor'): assert found[name].loss > 0.25 and not found[name].holds   # dark and bright have become one
    assert found['onnxruntime-int8'].holds and held_again(found['onnxruntime-int8'], judge) and 'onnxruntime-int8-mixed' not in found


@pytest.mark.parametrize('engine,broken', [('openvino', 'openvino-int8-mean'), ('litert', 'litert-int8-moving-average')])
def test_default_ranges_blind_an_anomaly_detector_and_the_search_refuses_exactly_those(engine, broken, detector, tmp_path):
    skip_without(engine)
    network, calibration, judge, exact = detector
    assert exact > 0.95
    found = by_name(search(network, [engine], ['int8'], calibration[:60], judge, tmp_path, full=True))
    assert [n for n, t in found.items() if not t.holds] == [broken] and found[broken].loss > 0.1 and len(found) > 2
    assert all(held_again(t, judge) for t in found.values())


def test_a_search_leaves_out_traps_and_stops_a_branch_at_the_first_that_holds(tmp_path, monkeypatch):
    built = []
    class Noting(OnnxRuntime):
        name, variants = 'noting', {'fp32': Variant('fp32', ''), 'bad': Variant('int8', ''), 'trap': Variant('int8', '', trap='it breaks'), 'good': Variant('int8', ''), 'late': Variant('int8', '')}
        missing = classmethod(lambda cls, build=False: '')
        load = classmethod(lambda cls, path, num_threads=1: path.stem)
        @classmethod
        def build(cls, network, variant, calibration, path): built.append(variant); path.write_bytes(b''); return path
    monkeypatch.setitem(RUNTIMES, 'noting', Noting)
    def judge(model): return Judgement(0.0, not model.endswith(('bad', 'trap')), 'judged')
    found = by_name(search(None, ['noting'], ['fp32', 'int8'], [], judge, tmp_path))
    assert built == ['fp32', 'bad', 'good'] and [n for n, t in found.items() if t.holds] == ['noting-fp32', 'noting-good']
    assert 'it breaks' in found['noting-trap'].why and 'noting-good holds already' in found['noting-late'].why
    built.clear()
    found = by_name(search(None, ['noting'], ['int8'], [], judge, tmp_path, full=True))
    assert built == ['bad', 'trap', 'good', 'late'] and [n for n, t in found.items() if not t.holds] == ['noting-bad', 'noting-trap']


@pytest.fixture(scope='module')
def detector():
    "An anomaly detector on synthetic sensor windows: network, calibration, judge by AUC, and the AUC of torch."
    import torch
    network = Network(trained_autoencoder(), {'window': np.zeros((1, 8, 64), np.float32)}, ('rebuilt',))
    x, y = sensor_windows(150, 2)
    def auc(rebuilt):
        score = ((x - rebuilt)**2).mean((1, 2))
        return float((score[y == 1][:, None] > score[y == 0]).mean())
    with torch.no_grad(): exact = auc(network.net(torch.from_numpy(x)).numpy())
    def judge(model):
        loss = exact - auc(model({'window': x})['rebuilt'])
        return Judgement(loss, loss <= 0.01, f'loses {loss:.3f} AUC')
    return network, [{'window': w[None]} for w in sensor_windows(100, 3)[0][:100]], judge, exact


def outlier_encoder():
    "An encoder of one attention block whose norms make one channel 200 times louder than the others, as those of large language models do; the layers that read it expect that."
    import torch
    from torch import nn
    torch.manual_seed(0)
    torch.set_num_threads(1)
    class Encoder(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out, self.up, self.down = nn.Linear(width, 3*width), nn.Linear(width, width), nn.Linear(width, 2*width), nn.Linear(2*width, width)
            with torch.no_grad():
                for norm, reader in ((self.before, self.qkv), (self.after, self.up)): norm.weight[3] *= 200; reader.weight[:, 3] /= 200
        def forward(self, x):
            q, k, v = self.qkv(self.before(x)).chunk(3, -1)
            x = x + self.out((q @ k.transpose(-1, -2)/x.shape[-1]**0.5).softmax(-1) @ v)
            return (x + self.down(torch.relu(self.up(self.after(x))))).mean(1)
    return Encoder().eval()


@pytest.mark.parametrize('limit,layers', [(0.05, False), (0.006, True)], ids=['smoothing is enough', 'layers stay in FP32'])
def test_outlier_channels_break_every_plain_int8_and_the_search_finds_one_that_holds(limit, layers, tmp_path, monkeypatch):
    import torch
    skip_without('onnxruntime')
    monkeypatch.setattr(OnnxRuntime, 'variants', {n: v for n, v in OnnxRuntime.variants.items() if n != 'int8-entropy' and (n == 'int8' or not layers)})   # histograms for entropy take minutes
    net, rng = outlier_encoder(), np.random.default_rng(0)
    examples = [{'x': rng.normal(size=(1, 10, 32)).astype(np.float32)} for _ in range(64)]
    with torch.no_grad(): reference = {'pooled': np.concatenate([net(torch.from_numpy(e['x'])).numpy() for e in examples[16:]])}
    def judge(model):
        moved = distance(reference, answers_of(model, examples[16:]))
        return Judgement(moved, moved < limit, f'outputs move by {moved:.1%}')
    found = by_name(search(Network(net, {'x': examples[0]['x']}, ('pooled',)), ['onnxruntime'], ['int8'], examples[:16], judge, tmp_path, full=True))
    mixed = found.pop('onnxruntime-int8-mixed')
    assert len(found) == (1 if layers else 5) and not any(t.holds for t in found.values()) and min(t.loss for t in found.values()) > 0.2
    assert mixed.holds and mixed.loss < limit and held_again(mixed, judge) and 'smoothed' in mixed.why and (0 < len(mixed.keep) < 5) == layers
    if not layers: assert mixed.size_mb < 0.8*size_mb(OnnxRuntime.build(Network(net, {'x': examples[0]['x']}, ('pooled',)), 'fp32', [], tmp_path/'fp32.onnx'))


# Parity ---------------------------------------------------------------------------------------------------------------

def decided(y, wrong=(), scores=None):
    label = y.copy()
    label[list(wrong)] = 1 - label[list(wrong)]
    return {'label': label, 'score': label*0.8 + 0.1 if scores is None else scores, 'negative': 0}


@pytest.mark.parametrize('n,wrong,tolerance,verdict', [(60, 1, 0.02, 'undecided'),     # loses 1.7 points: inside, and nobody can be sure
                                                       (60, 2, 0.02, 'undecided'),     # loses 3.3 points: outside, and nobody can be sure
                                                       (60, 0, 0.02, 'undecided'), (60, 1, 0.10, 'pass'), (3000, 30, 0.02, 'pass'), (3000, 150, 0.02, 'fail')])
def test_the_bound_of_the_loss_decides_and_not_the_loss_that_was_seen(n, wrong, tolerance, verdict):
    y = np.arange(n) % 2
    found = parity(decided(y), decided(y, range(wrong)), (None, y), 'accuracy', tolerance)
    assert (found.verdict, found.delta) == (verdict, pytest.approx(-wrong/n)) and (found.verdict == 'pass') == (found.delta_low >= -tolerance)
    entry = {'artifact': 'a', 'runtime': 'onnxruntime', 'verdict': found.verdict, 'reason': found.reason}
    if verdict == 'pass': assert shippable([entry], 'a', []) is entry
    else: refused(lambda: shippable([entry], 'a', []), f"'{verdict}'")


@properties
@given(st.data())
def test_classes_come_worst_first_with_the_shares_that_counting_gives(data):
    n = data.draw(st.integers(1, 60))
    y, before, after = (np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) for _ in range(3))
    found = per_class(y, {'label': before}, {'label': after}, 'abcd')
    assert sorted(f['class'] for f in found) == ['abcd'[k] for k in sorted(set(y.tolist()))]
    for f in found:
        mine = [i for i in range(n) if 'abcd'[y[i]] == f['class']]
        counted = [sum(bool(l[i] == y[i]) for i in mine)/len(mine) for l in (before, after)]
        assert f['n'] == len(mine) and [f['before'], f['after']] == pytest.approx(counted) and f['delta'] == pytest.approx(counted[1] - counted[0])
        assert -1 <= f['delta_low'] <= f['delta'] + 1e-9 and f['delta'] - 1e-9 <= f['delta_high'] <= 1
    assert [f['delta'] for f in found] == sorted(f['delta'] for f in found)


def test_agreement_is_what_changed_and_nothing_for_an_equal_answer():
    rng = np.random.default_rng(0)
    y = (rng.random(2000) < 0.5).astype(int)
    honest = np.clip(np.where(y, rng.beta(3, 2, 2000), rng.beta(2, 3, 2000)), 0.01, 0.99)
    sure = honest**4/(honest**4 + (1 - honest)**4)                       # the same order, far too sure of itself
    a, b = ({'label': (s > 0.5).astype(int), 'score': s, 'negative': 0} for s in (honest, sure))
    same, changed = agreement(y, a, a), agreement(y, a, b)
    assert same['flipped'] == same['score_mean_difference'] == same['score_largest_difference'] == same['calibration_change'] == 0 and same['score_correlation'] == pytest.approx(1)
    assert changed['flipped'] == 0 and changed['score_largest_difference'] == pytest.approx(np.abs(honest - sure).max())
    def tenths(score):   # the calibration error, counted plainly
        order = np.argsort(score, kind='stable')
        return sum(len(part)/2000*abs(y[part].mean() - score[part].mean()) for part in np.array_split(order, 10))
    assert changed['calibration_change'] == pytest.approx(tenths(sure) - tenths(honest), abs=0.01) and changed['calibration_change'] > 0.1
    assert changed['calibration_error'] == pytest.approx(expected_calibration_error(y == 1, sure))


# The choice -----------------------------------------------------------------------------------------------------------

maybe = lambda values: st.one_of(st.none(), values)
few = st.integers(1, 4).map(float)          # so that ties are common


@st.composite
def reports(draw):
    "Rows of a parity report with torch's own, figures missing here and there."
    rows = [{'artifact': f'a{i}', 'runtime': draw(st.sampled_from(['torch', 'onnxruntime', 'openvino'])), 'verdict': draw(st.sampled_from(['pass', 'fail', 'undecided', 'not run here'])), 'reason': f'because {i}',
             'metric': 'accuracy', 'value': draw(few), 'p95_ms': draw(maybe(few)), 'size_mb': draw(few), 'rss_mb': draw(maybe(few)), 'energy_mj': draw(maybe(few)), 'over': {}} for i in range(draw(st.integers(1, 7)))]
    for r in rows:
        r |= {'low': r['value'] - 0.1, 'high': r['value'] + 0.1}
        if r['verdict'] == 'fail': r['over'] = {b: [draw(st.floats(0.001, 1e4)), 1.0] for b in draw(st.lists(st.sampled_from(['latency', 'size', 'loss']), min_size=1, max_size=2, unique=True))}
    return rows


@properties
@given(reports())
def test_what_is_chosen_passed_best_and_is_the_fastest_and_nothing_beats_it(rows):
    choice, others = choose(rows), [r for r in rows if r['runtime'] != 'torch']
    best = next((v for v in ('pass', 'undecided', 'not run here') if any(r['verdict'] == v for r in others)), None)
    assert set(choice.why_not) == {r['artifact'] for r in others} - {choice.artifact} and all(choice.why_not.values()) and choice.why
    if best is None:
        assert choice.artifact is None and choice.front == []
        return
    chosen = next(r for r in rows if r['artifact'] == choice.artifact)
    may = [r for r in others if r['verdict'] == best]
    assert chosen['runtime'] != 'torch' and chosen['verdict'] == best
    assert all(r['p95_ms'] is None or (chosen['p95_ms'] is not None and chosen['p95_ms'] <= r['p95_ms']) for r in may)
    assert choice.artifact in choice.front and not any(dominates(r, chosen) for r in may)
    for r in others:
        if r['verdict'] != best: assert r['reason'] in choice.why_not[r['artifact']]


def beats(a, b):
    "Counted plainly: `a` has every figure that `b` has, none worse and one better."
    signs = {'value': 1, 'p95_ms': -1, 'size_mb': -1, 'rss_mb': -1, 'energy_mj': -1}
    both = [s*(a[k] - b[k]) if a[k] is not None else None for k, s in signs.items() if b[k] is not None]
    return None not in both and min(both) >= 0 and max(both) > 0


@properties
@given(reports())
def test_the_front_is_what_no_other_beats_and_all_else_is_beaten_by_one_on_it(rows):
    assert set(AXES) == {'value', 'p95_ms', 'size_mb', 'rss_mb', 'energy_mj'}
    named, front = {r['artifact']: r for r in rows}, pareto(rows)
    assert front and front == [n for n, r in named.items() if not any(beats(o, r) for o in rows)]
    for n, r in named.items():
        if n in front: assert not any(beats(named[f], r) for f in front)
        else: assert any(beats(named[f], r) for f in front)


@properties
@given(reports(), st.lists(st.floats(0, 6), min_size=2, max_size=5))
def test_a_larger_budget_never_allows_a_worse_verdict_nor_of_the_same_a_worse_metric(rows, budgets):
    allowed = [within_budget(rows, b) for b in sorted(budgets)]
    for b, r in zip(sorted(budgets), allowed): assert r is None or (r['runtime'] != 'torch' and r['verdict'] != 'fail' and r['p95_ms'] <= b)
    order = ['fail', 'not run here', 'undecided', 'pass']
    worth = [(-1, -1) if r is None else (order.index(r['verdict']), r['value']) for r in allowed]
    assert worth == sorted(worth)
    may = [r for r in rows if r['runtime'] != 'torch' and r['verdict'] != 'fail' and r['p95_ms'] is not None and r['p95_ms'] <= max(budgets)]
    assert worth[-1] == max(((order.index(r['verdict']), r['value']) for r in may), default=(-1, -1))


@hypothesis_settings(properties, max_examples=30)
@given(reports(), st.floats(1e-3, 0.999))
def test_the_slider_reaches_every_artifact_on_the_front_and_never_goes_backwards(rows, unit):
    pytest.importorskip('plotly')
    rows = [r | {'p95_ms': None if r['p95_ms'] is None else r['p95_ms']*unit} for r in rows]
    if not any(r['p95_ms'] is not None for r in rows):
        refused(lambda: front_figure(rows), 'no row was measured')
        return
    figure = front_figure(rows)
    titles = [s['args'][0]['title.text'] for s in figure.layout.sliders[0].steps]
    shown = [t.split(' has ')[1].split(' (')[0] for t in titles]
    named = {r['artifact']: r for r in rows}
    order = ['fail', 'not run here', 'undecided', 'pass']
    values = [(order.index(named[s]['verdict']), named[s]['value']) if s in named else (-1, -1) for s in shown]
    assert values == sorted(values) and figure.layout.title.text == titles[-1]
    may = [r for r in rows if r['runtime'] != 'torch' and r['verdict'] != 'fail' and r['p95_ms'] is not None]
    for r in may:
        if not any(o['p95_ms'] <= r['p95_ms'] + 2e-3 and o is not r for o in may): assert r['artifact'] in shown     # the fastest by a distance


@properties
@given(st.lists(st.tuples(st.sampled_from(['latency', 'size']), st.floats(1.0001, 1e4)), min_size=1, max_size=5))
def test_the_tightest_bound_is_the_one_to_move_least_and_its_number_is_enough(exceeded):
    rows = [{'artifact': f'a{i}', 'runtime': 'x', 'verdict': 'fail', 'reason': 'over', 'over': {bound: [figure, 1.0]}} for i, (bound, figure) in enumerate(exceeded)]
    choice, least = choose(rows), min(f for _, f in exceeded)
    told = choice.why.rsplit('with ', 1)[1].split()
    assert choice.artifact is None and least <= float(told[1]) <= least*1.002 and (told[0], least) in exceeded


# Where it went wrong --------------------------------------------------------------------------------------------------

PHOTO = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
CLASSES = ['good', 'bad']


@pytest.mark.parametrize('step,changes', [('resize', {'filter': 'nearest'}), ('resize', {'filter': 'bicubic'}), ('resize', {'width': 33}), ('to_tensor', {'mean': [0.4]}), ('to_tensor', {'std': [0.25]}), ('decode', {'mode': 'RGB'})], ids=str)
def test_the_step_that_differs_is_found_with_what_differs(step, changes):
    trained = image_pipeline(CLASSES, size=32, filter='bilinear')
    found = first_step(trained, trained.with_step(step, **changes), [PHOTO])
    assert found['step'] == step and found['error'] > 1e-3 and found['parameters'][0] != found['parameters'][1]
    assert all(found['parameters'][1][k] == v for k, v in changes.items())
    assert first_step(trained, trained, [PHOTO]) is None


def test_of_two_steps_that_differ_the_first_is_named_and_what_follows_the_model_is_no_step_before_it():
    trained = image_pipeline(CLASSES, size=32)
    assert first_step(trained, trained.with_step('to_tensor', std=[0.25]).with_step('resize', filter='nearest'), [PHOTO])['step'] == 'resize'
    assert first_step(trained, trained.with_step('decide', threshold=0.9), [PHOTO]) is None


LAYERS = {0: ('0', '1'), 4: ('4',), 9: ('9',)}     # where the damage is -> modules that may be named: a layer, or the ReLU that is fused with it


def damaged(network, at):
    "A copy whose layer `at` gives its channels in reverse."
    import torch
    net = copy.deepcopy(network.net)
    with torch.no_grad(): net[at].weight.copy_(net[at].weight.flip(1 if at in (7, 9) else 0))
    return replace(network, net=net)


def blame(engine, network, calibration, layers, folder):
    r = runtime(engine)
    fp32 = r.build(network, 'fp32', [], folder/f'fp32{r.suffix}')
    def named(built):
        errors = layer_errors(engine, fp32, built, calibration[:3])
        return culprit(errors), [e['layer'] for e in errors]
    if len(layers) > 1: assert named(r.build(network, 'int8', calibration, folder/f'sound{r.suffix}'))[0] is None
    return {at: named(r.build(damaged(network, at), 'int8', calibration, folder/f'int8{r.suffix}')) for at in layers}


def test_bisection_names_the_damaged_layer_of_an_onnx_file(detector, tmp_path):
    network, calibration, _, _ = detector
    for at, (found, _) in blame('onnxruntime', network, calibration[:16], LAYERS, tmp_path).items():
        assert found['first'].endswith(tuple(f' in {m})' for m in LAYERS[at])), (at, found)
        assert 'the first layer out of tolerance is' in in_words(found)


@pytest.mark.parametrize('engine,marks', [('openvino', {4: '4/'}), ('litert', {4: 'Conv1d_4'})])
def test_bisection_names_the_damaged_layer_on_other_runtimes(engine, marks, detector, tmp_path):
    skip_without(engine)
    network, calibration, _, _ = detector
    for at, (found, layers) in blame(engine, network, calibration[:16], marks, tmp_path).items(): assert found['first'].startswith(marks[at]) and found['first'] != layers[0], (at, found)


def test_bisection_names_a_layer_whose_integers_were_changed_in_the_file(detector, tmp_path):
    import onnx
    from onnx import numpy_helper
    network, calibration, _, _ = detector
    fp32, int8 = (OnnxRuntime.build(network, v, calibration[:16], tmp_path/f'{v}.onnx') for v in ('fp32', 'int8'))
    model = onnx.load(str(int8))
    weights = next(i for i in model.graph.initializer if i.name == '5.weight_quantized')
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights)[::-1].copy(), weights.name))
    onnx.save(model, str(int8))
    assert culprit(layer_errors('onnxruntime', fp32, int8, calibration[:3]))['first'].endswith((' in 5)', ' in 6)'))


# Bad input ------------------------------------------------------------------------------------------------------------

ENGINES = ['onnxruntime', 'openvino', 'litert']


@pytest.fixture(scope='module')
def tiny():
    "A network, and examples of its input."
    import torch
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(32, 1, 8)).astype(np.float32)
    return Network(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval(), {'x': x[0]}, ('y',)), [{'x': v} for v in x]


@pytest.fixture(scope='module')
def tiny_file(tiny, tmp_path_factory): return export_onnx(tiny[0], tmp_path_factory.mktemp('tiny')/'fp32.onnx')


@pytest.mark.parametrize('engine', ENGINES)
def test_a_damaged_artifact_is_refused_by_its_name_on_every_runtime(engine, tiny, tmp_path):
    skip_without(engine)
    r = runtime(engine)
    whole = r.build(tiny[0], 'fp32', [], tmp_path/f'model{r.suffix}')
    r.load(whole)
    for harm in (lambda b: b'', lambda b: b'not a model at all', lambda b: b[:len(b)//2]):
        path = tmp_path/f'damaged{r.suffix}'
        (shutil.copytree if whole.is_dir() else shutil.copyfile)(whole, path)
        for p in ([path] if path.is_file() else path.glob('*.xml')): p.write_bytes(harm(p.read_bytes()))
        refused(lambda: r.load(path), 'damaged')
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@pytest.mark.parametrize('field,value,words', [('opset', 9999, ('opset', 'newer onnxruntime')), ('ir', 9999, ('IR version', 'newer onnxruntime')), ('opset', 5, ())], ids=str)
def test_an_onnx_file_of_another_time_says_what_to_install_or_export(field, value, words, tiny_file, tmp_path):
    import onnx
    model = onnx.load(str(tiny_file))
    if field == 'opset': model.opset_import[0].version = value
    else: model.ir_version = value
    (tmp_path/'other.onnx').write_bytes(model.SerializeToString())
    refused(lambda: OnnxRuntime.load(tmp_path/'other.onnx'), 'other.onnx', *words)


def test_an_openvino_file_of_another_version_is_refused(tiny, tmp_path):
    skip_without('openvino')
    path = runtime('openvino').build(tiny[0], 'fp32', [], tmp_path/'model.openvino')
    (path/'model.xml').write_text((path/'model.xml').read_text().replace('version="11"', 'version="9999"', 1))
    refused(lambda: runtime('openvino').load(path), 'model.openvino', 'build it again')


@pytest.mark.parametrize('engine', ENGINES)
def test_one_image_cannot_set_the_ranges_and_the_search_says_so_for_every_variant(engine, tiny, tmp_path):
    skip_without(engine)
    network, examples = tiny
    refused(lambda: runtime(engine).build(network, 'int8', examples[:1], tmp_path/'x'), 'at least 8 calibration examples, got 1')
    for calibration in (examples[:1], []):
        found = search(network, [engine], ['int8'], calibration, lambda model: Judgement(1.0, False, 'judged'), tmp_path, full=True)
        for t in found: assert not t.holds and ('at least 8 calibration examples' in t.why or not runtime(engine).variants.get(t.variant, Variant('int8', '')).calibrated), t
        assert sum('at least 8' in t.why for t in found if t.variant != 'int8-mixed') == sum(v.calibrated for v in runtime(engine).variants.values() if v.precision == 'int8')
    assert not list(tmp_path.glob('*.tmp'))


def test_names_that_do_not_exist_are_answered_with_those_that_do(tiny, tmp_path):
    network, examples = tiny
    refused(lambda: runtime('onxruntime'), 'Did you mean onnxruntime?')
    refused(lambda: search(network, ['openvion'], ['int8'], examples, None, tmp_path), 'Did you mean openvino?')
    refused(lambda: OnnxRuntime.build(network, 'int9', examples, tmp_path/'x.onnx'), 'no variant int9', 'Did you mean')
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_not_installed_is_named_with_what_installs_it(tiny, tmp_path, monkeypatch, copied):
    monkeypatch.setattr('edgenb.runtime._present', lambda module: module != 'openvino')
    for call in (lambda: search(tiny[0], ['openvino'], ['int8'], tiny[1], None, tmp_path), lambda: compile(copied, runtimes=['openvino'])):
        refused(call, 'openvino', 'not installed here', "pip install 'edgenb[openvino]'")
    monkeypatch.setattr('edgenb.runtime._present', lambda module: module != 'onnxruntime')
    refused(lambda: OnnxRuntime.load(tmp_path/'x.onnx'), "pip install 'edgenb[onnxruntime]'")
    refused(lambda: load_bundle(bundle_of(copied)), 'onnxruntime', 'not installed')


def full_disk(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('where,variant', [('os.replace', 'fp32'), ('os.fsync', 'fp32'), ('os.replace', 'int8'), ('onnx.save', 'int8'), ('onnx.save', 'int8-dynamic'), ('onnx.save', 'fp16')])
def test_a_disk_that_is_full_leaves_no_half_an_artifact(where, variant, tiny, tiny_file, tmp_path, monkeypatch):
    _, examples = tiny
    fp32 = Path(shutil.copyfile(tiny_file, tmp_path/'fp32.onnx'))
    before = OnnxRuntime.derive(fp32, variant, examples, tmp_path/'model.onnx').read_bytes()
    def half(model, path, *a, **k):
        if not str(path).startswith(str(tmp_path)): return saved(model, path, *a, **k)
        Path(path).write_bytes(model.SerializeToString()[:100])
        full_disk()
    import onnx
    saved = onnx.save
    monkeypatch.setattr(where, half if where == 'onnx.save' else full_disk)
    with pytest.raises((OSError, EdgenbError)) as caught: OnnxRuntime.derive(fp32, variant, examples, tmp_path/'model.onnx')
    assert 'another variant' not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['fp32.onnx', 'model.onnx'] and (tmp_path/'model.onnx').read_bytes() == before


@pytest.mark.parametrize('engine', ENGINES)
def test_a_build_that_ends_when_its_file_takes_its_place_leaves_nothing(engine, tiny, tmp_path, monkeypatch):
    skip_without(engine)
    monkeypatch.setattr('os.replace', full_disk)
    with pytest.raises((OSError, EdgenbError)): runtime(engine).build(tiny[0], 'fp32', [], tmp_path/f'model{runtime(engine).suffix}')
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_building_is_told_as_such_and_keeps_the_run_as_it_was(copied, monkeypatch):
    skip_without('onnxruntime')
    def shown(): return {p.relative_to(copied.path).as_posix(): p.stat().st_ino for p in copied.path.rglob('[!.]*') if p.is_file() and '.rooms' not in p.parts}
    before = shown()
    monkeypatch.setattr('edgenb.runtimes.onnx.export_onnx', full_disk)
    refused(lambda: compile(copied, runtimes=['onnxruntime']), 'the disk is full')
    assert shown() == before
    assert ship(copied).result['artifact'] == 'odd-fp32'


KILLED = '''
import os, signal, sys
import edgenb.search
from edgenb.compile import compile
built = edgenb.search._try
def once(*given):
    tried = built(*given)
    if tried.artifact == 'odd-int8': os.kill(os.getpid(), signal.SIGKILL)
    return tried
edgenb.search._try = once
compile(sys.argv[1], runtimes=['odd'], tolerance=0.1)
'''


def test_a_compile_that_is_killed_leaves_the_finished_one_and_the_next_clears_its_remains(copied):
    done = subprocess.run([sys.executable, '-c', KILLED, str(copied.path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list(copied.path.glob('04-compile.*/'))
    assert len([f for f in left if f.is_dir()]) == 2 and copied.card('compile').asked['full']                 # the remains, and what the card stands for
    assert ship(copied).result['artifact'] == 'odd-fp32'
    compile(copied, runtimes=['odd'], tolerance=0.1)
    assert sorted(p.name for p in copied.path.glob('04-compile.*/*')) == ['odd-fp32.onnx', 'odd-int8-crash.onnx']
