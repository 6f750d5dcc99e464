"""The check on the device: what it lets pass, and what it does not."""
import json, subprocess, sys
from dataclasses import asdict
from pathlib import Path
import numpy as np
import pytest
from edgenb.core import EdgenbError, digest, digest_of, write_json
from edgenb.golden import COUNT, Health, check_golden, compared, golden_inputs, main, make_golden, read_golden
from edgenb.pipeline import Pipeline, image_pipeline, text_pipeline
from edgenb.ship import check_bundle, load_bundle
from edgenb.watch import Sketch


def window_pipeline():
    return Pipeline(({'step': 'window', 'version': 1, 'channels': ['a', 'b', 'c'], 'steps': 32, 'limit': 8.0}, {'step': 'model', 'version': 1}, {'step': 'softmax', 'version': 1, 'temperature': 1.0, 'bias': None},
                     {'step': 'decide', 'version': 1, 'negative': 0, 'threshold': 0.5, 'review': None}), ('fine', 'fault', 'off'))


def onnx_model(path, shape, classes, seed=0, change=0.0, op='Gemm'):
    "A linear network, written by hand: flattened input to 'logits' and 'embedding'."
    import onnx
    from onnx import helper, numpy_helper
    size, rng = int(np.prod(shape)), np.random.default_rng(seed)
    w = rng.normal(size=(size, classes)).astype(np.float32)/np.float32(np.sqrt(size))
    w = w + np.float32(change)*np.random.default_rng(99).normal(size=w.shape).astype(np.float32)*w.std()
    nodes = [helper.make_node('Flatten', ['x'], ['embedding']), helper.make_node('MatMul', ['embedding', 'w'], ['logits'])]
    values = lambda n, s: helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
    graph = helper.make_graph(nodes, 'g', [values('x', ['n', *shape])], [values('logits', ['n', classes]), values('embedding', ['n', size])], [numpy_helper.from_array(w, 'w')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


def seal(folder, **changes):
    "A manifest with the right digests."
    manifest = {'edgenb_bundle': 1, 'edgenb': '0', 'name': 'm', 'artifact': 'a', 'runtime': 'onnxruntime', 'precision': 'fp32', 'model': 'model.onnx', 'warnings': [], **changes,
                'files': {p.relative_to(folder).as_posix(): digest(p) for p in sorted(folder.rglob('*')) if p.is_file() and p.name != 'manifest.json'}}
    write_json(folder/'manifest.json', manifest | {'digest': digest_of(manifest)})
    return folder


@pytest.fixture(params=['image', 'window'])
def pipeline(request): return image_pipeline(['good', 'bad'], size=24) if request.param == 'image' else window_pipeline()


@pytest.fixture
def bundle(pipeline, tmp_path): return make_bundle(tmp_path/'bundle', pipeline)


def make_bundle(folder, pipeline, latency_ms=10_000, memory_mb=0, **model):
    from edgenb.runtime import ready
    folder.mkdir()
    onnx_model(folder/'model.onnx', pipeline.shape, len(pipeline.classes), **model)
    pipeline.save(folder/'pipeline.json')
    (folder/'reference.sketch').write_bytes(Sketch(4, 1.0).to_bytes())
    for name, content in make_golden(pipeline, ready('onnxruntime').load(folder/'model.onnx'), 'fp32', latency_ms=latency_ms, memory_mb=memory_mb).items():
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_bytes(content)
    return seal(folder)


def refused(bundle, *words):
    health = check_golden(bundle)
    assert not health.ok and all(w in health.reason for w in words), health
    return health


def test_a_bundle_that_arrived_whole_is_healthy_and_says_how_fast_and_large_it_is(bundle):
    health = check_golden(bundle)
    assert health.ok and health.reason == 'as on the workstation' and health.worst < 0.01 and 0 < health.p50_ms <= health.p99_ms and health.rss_mb > 20
    done = subprocess.run([sys.executable, '-m', 'edgenb.golden', str(bundle)], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.count('\n') == 1 and set(told) == set(asdict(health)) and told['ok'] and done.stderr == ''


def test_a_flipped_bit_in_any_file_is_found_before_anything_runs(bundle):
    for name in ('model.onnx', 'golden.json', 'golden/0.png' if (bundle/'golden/0.png').exists() else 'golden/0.npy', 'pipeline.json'):
        whole = (bundle/name).read_bytes()
        (bundle/name).write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
        refused(bundle, name, 'changed')
        (bundle/name).write_bytes(whole)
    assert check_golden(bundle).ok


def test_another_model_under_a_right_digest_is_found_by_its_answers(bundle, pipeline):
    for model in ({'seed': 1}, {'change': 0.05}):
        onnx_model(bundle/'model.onnx', pipeline.shape, len(pipeline.classes), **model)
        assert refused(seal(bundle), 'differ from those on the workstation', 'times the tolerance').worst > 1
    raw = (bundle/'model.onnx').read_bytes()
    onnx_model(bundle/'model.onnx', pipeline.shape, len(pipeline.classes))
    assert check_golden(seal(bundle)).ok and (bundle/'model.onnx').read_bytes() != raw


def test_a_high_bit_of_one_weight_in_the_memory_of_a_device_is_found_by_the_answers(bundle, pipeline):
    raw = bytearray((bundle/'model.onnx').read_bytes())
    at = raw.index(np.float32(np.random.default_rng(0).normal(size=(int(np.prod(pipeline.shape)), len(pipeline.classes))).astype(np.float32)/np.float32(np.sqrt(np.prod(pipeline.shape))))[3].tobytes()[:4])
    raw[at + 3] ^= 0x40                                                        # the exponent's highest bit
    (bundle/'model.onnx').write_bytes(raw)
    refused(seal(bundle))


def test_another_scaling_of_the_input_is_found(bundle, pipeline):
    other = pipeline.with_step('to_tensor', mean=[0.45]) if pipeline.input == 'image' else pipeline.with_step('window', limit=1.0)
    other.save(bundle/'pipeline.json')
    refused(seal(bundle), 'differ')
    pipeline.with_step('softmax', temperature=1.5).save(bundle/'pipeline.json')
    refused(seal(bundle), 'differ')


def test_rounding_on_another_processor_passes(bundle):
    "Measured between arm64 and x86-64: 5e-10 to 1e-5; fifty times that on every answer here."
    told = read_golden(bundle)
    rng = np.random.default_rng(0)
    for size in (5e-10, 1e-5, 1e-4): assert compared(told, {k: v*(1 + size*rng.choice([-1, 1], v.shape)) for k, v in told['wanted'].items()}) < 1


def test_a_model_that_gives_no_numbers_or_too_few_answers_is_refused(bundle):
    told = read_golden(bundle)
    wanted = told['wanted']
    assert compared(told, wanted) == 0
    assert compared(told, wanted | {'logits': wanted['logits'][:, :-1]}) == compared(told, wanted | {'score': np.full_like(wanted['score'], np.nan)}) == np.inf


def test_a_device_that_is_too_slow_or_too_small_is_told_so(tmp_path):
    p = image_pipeline(['good', 'bad'], size=24)
    refused(make_bundle(tmp_path/'slow', p, latency_ms=1e-6), 'a decision takes', 'the budget is 1e-06 ms')
    refused(make_bundle(tmp_path/'large', p, memory_mb=3), 'MB of memory here', 'budget is 3 MB')
    assert check_golden(make_bundle(tmp_path/'free', p, latency_ms=0, memory_mb=0)).ok


def test_an_older_bundle_is_checked_by_loading_alone_and_says_so(bundle):
    for p in [*bundle.glob('golden/*'), bundle/'golden.json']: p.unlink()
    health = check_golden(seal(bundle))
    assert health.ok and 'no golden check' in health.reason
    (bundle/'model.onnx').write_bytes(b'no model')
    refused(seal(bundle))


def test_an_engine_that_cannot_run_here_or_fails_is_a_verdict_and_no_traceback(bundle, capsys):
    refused(seal(bundle, runtime='nonesuch'), 'nonesuch')
    refused(seal(bundle, runtime='tensorrt', model='model.onnx'), 'tensorrt')
    seal(bundle)
    golden = json.loads((bundle/'golden.json').read_text())
    for damage in ({'tolerance': None}, {'inputs': []}, {'tolerance': {'logits': 0, 'score': 1}}, {'tolerance': {'logits': float('inf'), 'score': 1}}, {'edgenb_golden': 99}, {'inputs': [golden['inputs'][0] | {'file': '../../etc/passwd'}]}, {'budget': {}}):
        (bundle/'golden.json').write_text(json.dumps(golden | damage))
        refused(seal(bundle), 'golden.json')
    assert main([str(bundle)]) == 1 and json.loads(capsys.readouterr().out)['ok'] is False
    assert main([]) == 2


def test_the_inputs_are_the_same_everywhere_and_hold_nothing_but_the_size_of_real_ones():
    from PIL import Image
    import io
    p = image_pipeline(['good', 'bad'], size=24)
    def png(seed, mode, size):
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(out, 'PNG')
        return out.getvalue()
    one, other = (golden_inputs(p, [png(s, 'L', (90, 120))]) for s in (0, 1))
    assert one == other and len(one) == COUNT and sum(map(len, one.values())) < 50_000
    assert max(Image.open(io.BytesIO(x)).size for x in golden_inputs(p, [png(0, 'L', (3000, 4000))]).values()) == (640, 480)
    notes = golden_inputs(text_pipeline(['a', 'b']), [b'Jane Roe, MRN 4711, was seen on 3 May. ' * 10])
    text = b' '.join(notes.values()).decode()
    assert 'Roe' not in text and '4711' not in text and all(300 < len(n) < 600 for n in notes.values()) and len(set(notes.values())) == COUNT
    assert all(p.before(x).shape == p.shape for p in (window_pipeline(),) for x in golden_inputs(p).values())


def test_a_runtime_that_cannot_run_on_the_workstation_leaves_a_wider_tolerance_and_says_so(tmp_path):
    p = window_pipeline()
    model = lambda x: {'logits': np.asarray(x, np.float64).reshape(len(x), -1)[:, :3]}
    narrow, wide = (json.loads(make_golden(p, model, 'int8', stand_in=s)['golden.json']) for s in (False, True))
    assert wide['tolerance']['logits'] > 5*narrow['tolerance']['logits'] and 'squeezed' in wide['outputs_of'] and narrow['outputs_of'] == 'the artifact' and narrow['data'] == 'synthetic'


def test_the_ship_room_leaves_the_check_with_the_budgets_that_verify_was_asked(toy_run):
    from edgenb.ship import bundle_of
    bundle = bundle_of(toy_run)
    told, manifest = json.loads((bundle/'golden.json').read_text()), check_bundle(bundle)
    assert told['budget'] == {'latency_ms': 10_000.0, 'memory_mb': None} and {f'golden/{n}.png' for n in range(COUNT)} | {'golden.json'} <= set(manifest['files'])
    health = check_golden(bundle)
    assert health.ok and health.worst < 0.01 and load_bundle(bundle).predict([bundle/'golden'/'0.png'])
