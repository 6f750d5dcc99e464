"""ExecuTorch, Core ML, TensorRT and optimum: what they build answers as the network does, or is refused with the reason.

Core ML packages cannot run here, nor TensorRT engines: packages are opened and their weights compared; TensorRT's Python interface is played by
`fake_tensorrt`, which follows its documentation, insists on its order of calls and computes with ONNX Runtime. It proves the calls, not the engine."""
import contextlib, ctypes, enum, importlib.machinery, importlib.metadata, json, logging, os, platform, subprocess, sys, types, warnings
from collections import OrderedDict
from pathlib import Path
import numpy as np
import pytest
torch = pytest.importorskip('torch')
from edgenb.core import EdgenbError
from edgenb.runtime import Network, size_mb
from edgenb.runtimes import coreml, optimum, tensorrt
from edgenb.runtimes.common import native_output, replacing
from edgenb.runtimes.coreml import CoreML
from edgenb.runtimes.executorch import ExecuTorch, facts
from edgenb.runtimes.onnx import OnnxRuntime, export_onnx
from edgenb.runtimes.optimum import Optimum
from edgenb.runtimes.tensorrt import TensorRT, check_quantization, onnx_for

needs_executorch = pytest.mark.skipif(bool(ExecuTorch.missing(build=True)), reason=ExecuTorch.missing(build=True) or 'there')
needs_coreml = pytest.mark.skipif(bool(CoreML.missing(build=True)), reason=CoreML.missing(build=True) or 'there')


class Defects(torch.nn.Module):
    "Two convolutions, then what the defect is and where it lies; with another `head`, an operation that some engine lacks."
    def __init__(self, head=None):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.ReLU())
        self.classes, self.head = torch.nn.Linear(32, 4), head or torch.nn.Identity()
    def forward(self, image):
        pooled = torch.nn.functional.adaptive_avg_pool2d(self.body(image), 1).flatten(1)
        return self.classes(pooled), self.head(pooled)

class Histogram(torch.nn.Module):
    def forward(self, x): return torch.histc(x, 8)

class Words(torch.nn.Module):
    "A text encoder of one layer."
    def __init__(self):
        super().__init__()
        self.words, self.linear, self.out = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 16)
    def forward(self, input_ids, attention_mask):
        weight = attention_mask[:, :, None].float()
        return (self.out(torch.relu(self.linear(self.words(input_ids))))*weight).sum(1)/weight.sum(1)


def defects(head=None):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = [{'image': rng.normal(size=(1, 3, 32, 32)).astype(np.float32)} for _ in range(20)]
    return Network(Defects(head).eval(), {'image': images[0]['image']}, ('logits', 'embedding')), images

def words():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    texts = [{'input_ids': rng.integers(0, 50, (1, n)), 'attention_mask': np.ones((1, n), np.int64)} for n in (12, 5, 30, 9, 40, 17, 8, 21)]
    free = {1: 'sequence'}
    return Network(Words().eval(), texts[0], ('embedding',), {'input_ids': free, 'attention_mask': free}), texts

def reference(network, examples):
    with torch.inference_mode(): rows = [network.net(*(torch.from_numpy(x[n]) for n in network.inputs)) for x in examples]
    rows = [r if isinstance(r, tuple) else (r,) for r in rows]
    return {n: np.concatenate([r[k].numpy() for r in rows]) for k, n in enumerate(network.outputs)}

def together(examples): return {n: np.concatenate([e[n] for e in examples]) for n in examples[0]}
def cosine(a, b): return float((a*b).sum()/np.sqrt((a*a).sum()*(b*b).sum()))
def refusal(what):
    with pytest.raises(EdgenbError) as e: what()
    return str(e.value)


def test_facts_of_all_four_are_read_without_importing_an_engine():
    code = ("import sys\nfrom edgenb.runtimes import coreml, executorch, optimum, tensorrt\nfrom edgenb.runtime import RUNTIMES\n"
            "assert {'coreml', 'executorch', 'optimum', 'tensorrt'} <= set(RUNTIMES)\n"
            "for r in RUNTIMES.values(): r.missing(), r.missing(build=True), [v.what for v in r.variants.values()]\n"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'executorch', 'coremltools', 'transformers'} & set(sys.modules)\nassert not heavy, heavy")
    subprocess.run([sys.executable, '-c', code], check=True)

@pytest.mark.parametrize('runtime,variant', [(ExecuTorch, 'int8'), (TensorRT, 'int8')])
def test_one_example_cannot_set_the_ranges(runtime, variant, tmp_path):
    network, images = defects()
    build = onnx_for if runtime is TensorRT else runtime.build
    if runtime is ExecuTorch and ExecuTorch.missing(build=True): pytest.skip(ExecuTorch.missing(build=True))
    assert 'needs at least 8 calibration examples, got 1' in refusal(lambda: build(network, variant, images[:1], tmp_path/'x'))
    assert not list(tmp_path.iterdir())


# Files that are whole

REPLACED = """
import os, sys
from pathlib import Path
from edgenb.runtimes.common import native_output, replacing
real, names = os.replace, []
def replace(a, b):
    names.append(a)
    if len(names) == int(sys.argv[2]): HARM
    real(a, b)
os.replace = replace
with replacing(Path(sys.argv[1])) as whole:
    whole.mkdir()
    (whole/'weights').write_text('new')
"""

@pytest.fixture
def older(tmp_path):
    (tmp_path/'a.executorch').mkdir()
    (tmp_path/'a.executorch'/'weights').write_text('old')
    return tmp_path/'a.executorch'

def test_a_folder_takes_the_place_of_another_and_leaves_nothing_beside_it(older):
    with replacing(older) as whole:
        whole.mkdir()
        (whole/'weights').write_text('new')
        (whole.parent/'scratch').write_text('of the tool')
    assert (older/'weights').read_text() == 'new' and [p.name for p in older.parent.iterdir()] == ['a.executorch']
    with replacing(older) as whole: whole.write_text('a file')
    assert older.read_text() == 'a file' and [p.name for p in older.parent.iterdir()] == ['a.executorch']

@pytest.mark.parametrize('rename', [1, 2])
def test_a_rename_that_fails_leaves_the_older_folder_in_its_place(rename, older):
    done = subprocess.run([sys.executable, '-c', REPLACED.replace('HARM', "raise OSError('no space left')"), str(older), str(rename)], capture_output=True, text=True)
    assert 'no space left' in done.stderr and (older/'weights').read_text() == 'old' and [p.name for p in older.parent.iterdir()] == ['a.executorch']

@pytest.mark.parametrize('rename', [1, 2])
def test_power_loss_between_the_renames_loses_neither_folder(rename, older):
    done = subprocess.run([sys.executable, '-c', REPLACED.replace('HARM', 'os._exit(9)'), str(older), str(rename)])
    assert done.returncode == 9 and sorted(p.read_text() for p in older.parent.rglob('weights')) == ['new', 'old']

def test_what_cannot_be_put_back_is_not_deleted_either(older, monkeypatch):
    real, calls = os.replace, []
    def replace(a, b):
        calls.append(a)
        if len(calls) > 1: raise OSError('the disk is gone')
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(OSError), replacing(older) as whole: whole.mkdir()
    assert [p.read_text() for p in older.parent.rglob('weights')] == ['old']


# ExecuTorch

@pytest.fixture(scope='module')
def program(tmp_path_factory):
    "An FP32 ExecuTorch artifact, its network and examples."
    if why := ExecuTorch.missing(build=True): pytest.skip(why)
    network, images = defects()
    return ExecuTorch.build(network, 'fp32', [], tmp_path_factory.mktemp('executorch')/'fp32.executorch'), network, images

def test_executorch_fp32_answers_as_torch_does_for_any_number_of_examples(program):
    path, network, images = program
    found, wanted = ExecuTorch.load(path)(together(images)), reference(network, images)
    assert list(found) == ['logits', 'embedding']
    for name in wanted: assert found[name].shape == wanted[name].shape and np.abs(found[name] - wanted[name]).max() < 1e-4
    assert facts(path)['delegated'] > 5 and not facts(path)['portable']

@needs_executorch
@pytest.mark.parametrize('variant', ['int8', 'int8-histogram'])
def test_executorch_int8_is_close_and_smaller(variant, program, tmp_path):
    fp32, network, images = program
    path = ExecuTorch.build(network, variant, images, tmp_path/'int8.executorch')
    found, wanted = ExecuTorch.load(path)(together(images)), reference(network, images)
    assert cosine(found['logits'], wanted['logits']) > 0.99 and cosine(found['embedding'], wanted['embedding']) > 0.99
    assert 1e-6 < np.abs(found['logits'] - wanted['logits']).max()   # it is quantized
    assert (path/'model.pte').stat().st_size < 0.6*(fp32/'model.pte').stat().st_size

@needs_executorch
def test_executorch_holds_texts_of_any_length_and_says_what_stays_on_slow_kernels(tmp_path):
    network, texts = words()
    path = ExecuTorch.build(network, 'int8-dynamic', [], tmp_path/'text.executorch')
    run = ExecuTorch.load(path)
    found, wanted = np.concatenate([run(t)['embedding'] for t in texts]), reference(network, texts)['embedding']
    assert cosine(found, wanted) > 0.99 and 1e-6 < np.abs(found - wanted).max()
    assert 'embedding in words (Embedding)' in facts(path)['portable'] and facts(path)['delegated'] > 2

@needs_executorch
def test_executorch_refuses_a_softplus_after_a_convolution_in_8_bit_by_name_and_builds_it_in_fp32(tmp_path):
    "The head of many detectors: box sizes made positive inside the network."
    torch.manual_seed(0)
    images = defects()[1]
    layers = {'body': torch.nn.Conv2d(3, 8, 3), 'act': torch.nn.ReLU(), 'boxes': torch.nn.Conv2d(8, 4, 1), 'head': torch.nn.Softplus()}
    network = Network(torch.nn.Sequential(OrderedDict(layers)).eval(), images[0], ('sizes',))
    said = refusal(lambda: ExecuTorch.build(network, 'int8', images, tmp_path/'a.executorch'))
    assert 'softplus in head (Softplus)' in said and 'on the host' in said and 'build fp32' in said
    assert not list(tmp_path.iterdir())
    path = ExecuTorch.build(network, 'fp32', [], tmp_path/'a.executorch')
    assert np.abs(ExecuTorch.load(path)(images[0])['sizes'] - reference(network, images[:1])['sizes']).max() < 1e-4
    assert list(facts(path)['portable']) == ['softplus in head (Softplus)']

@needs_executorch
def test_executorch_names_an_operation_it_lacks_and_keeps_the_artifact_that_was_there(program, tmp_path):
    path, network, images = program
    there = ExecuTorch.build(network, 'fp32', [], tmp_path/'kept.executorch')
    before = facts(there)
    assert 'histc in head (Histogram)' in refusal(lambda: ExecuTorch.build(defects(Histogram())[0], 'fp32', [], there))
    assert facts(there) == before and [p.name for p in tmp_path.iterdir()] == ['kept.executorch']

@needs_executorch
def test_executorch_dynamic_needs_a_linear_layer(tmp_path):
    network = Network(torch.nn.Conv2d(3, 4, 3).eval(), {'image': np.zeros((1, 3, 8, 8), np.float32)}, ('map',))
    assert 'no linear layer' in refusal(lambda: ExecuTorch.build(network, 'int8-dynamic', [], tmp_path/'a.executorch'))

def test_executorch_refuses_a_program_that_only_fails_on_its_first_input(program, tmp_path, monkeypatch):
    path, network, images = program
    said = 'Failed to execute method forward, error: 0x10'
    class Method:
        def execute(self, inputs): raise RuntimeError(said)
    from executorch.runtime import Program
    monkeypatch.setattr(Program, 'load_method', lambda self, name: Method())
    message = refusal(lambda: ExecuTorch.build(network, 'fp32', [], tmp_path/'a.executorch'))
    assert '0x10' in message and not list(tmp_path.iterdir())

def test_executorch_says_that_an_input_has_the_wrong_shape(program):
    path, network, images = program
    said = refusal(lambda: ExecuTorch.load(path)(np.zeros((1, 3, 16, 16), np.float32)))
    assert path.name in said and '(1, 3, 16, 16)' in said

def test_executorch_sets_the_number_of_threads(program):
    from executorch.extension.pybindings import portable_lib
    for n in (2, 1):
        ExecuTorch.load(program[0], num_threads=n)
        assert portable_lib._threadpool_get_thread_count() == n

@pytest.mark.parametrize('damage', ['one byte', 'cut', 'no io', 'not json', 'wrong program'])
def test_executorch_refuses_a_damaged_artifact_by_name(damage, program, tmp_path):
    import shutil
    path = tmp_path/'damaged.executorch'
    shutil.copytree(program[0], path)
    data = bytearray((path/'model.pte').read_bytes())
    if damage == 'one byte': data[len(data)//2] ^= 1
    if damage == 'cut': data = data[:len(data)//2]
    if damage == 'no io': (path/'io.json').unlink()
    if damage == 'not json': (path/'io.json').write_text('{')
    if damage == 'wrong program': data = bytearray(b'not a program'*100)
    (path/'model.pte').write_bytes(data)
    if damage == 'wrong program':
        import hashlib
        (path/'io.json').write_text(json.dumps(json.loads((path/'io.json').read_text()) | {'sha256': hashlib.sha256(data).hexdigest()}))
    assert 'damaged.executorch' in refusal(lambda: ExecuTorch.load(path))

def test_what_engines_print_stays_off_the_terminal_but_can_be_read(capfd, recwarn):
    def logger(name):
        log = logging.getLogger(name)
        log.handlers, log.propagate, log.level = [logging.StreamHandler()], False, logging.WARNING     # it holds the stream that is there now
        return log
    ours = logger('ours')
    with native_output() as heard:
        theirs = logger('theirs')
        os.write(1, b'from C'); os.write(2, b'++')
        print('progress'); warnings.warn('advice'); ours.warning('more advice')
        said = heard()
    assert said == 'from C++' and capfd.readouterr() == ('', '') and 'advice' not in [str(w.message) for w in recwarn]
    ours.warning('what we say'); theirs.error('what nobody asked for')
    assert capfd.readouterr() == ('', 'what we say\n')
    for log in (ours, theirs): log.handlers = []


# Core ML

@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    "Core ML packages of all variants, by variant; their network."
    if why := CoreML.missing(build=True): pytest.skip(why)
    folder, (network, _) = tmp_path_factory.mktemp('coreml'), defects()
    return {v: CoreML.build(network, v, [], folder/f'{v}.mlpackage') for v in CoreML.variants}, network

def weights_in(path, folder):
    "Weight tensors of a package as floating-point numbers, decompressed."
    with native_output():
        import coremltools as ct
        model = ct.models.MLModel(str(path), skip_model_load=True)
        whole = ct.optimize.coreml.decompress_weights(model)
        found = ct.optimize.coreml.get_weights_metadata(whole, weight_threshold=500)
    return [np.asarray(m.val, np.float32).ravel() for m in found.values()]

@pytest.mark.parametrize('variant,error', [('fp32', 1e-6), ('fp16', 1e-3), ('int8', 0.01), ('int4-palettized', 0.2)])
def test_coreml_packages_hold_the_weights_of_the_network(variant, error, packages, tmp_path):
    made, network = packages
    wanted = [p.detach().numpy().ravel() for p in network.net.parameters() if p.numel() > 1000]
    found = weights_in(made[variant], tmp_path)
    assert wanted
    for w in wanted:
        best = min(np.linalg.norm(f - w)/np.linalg.norm(w) for f in found if f.shape == w.shape)
        assert best <= error
        if variant in ('int8', 'int4-palettized'): assert best > 1e-4   # it was compressed

def test_coreml_packages_have_the_names_the_shapes_and_the_size(packages):
    made, network = packages
    for path in made.values(): assert coreml.io_of(path)['inputs'] == {'image': (1, 3, 32, 32)} and list(coreml.io_of(path)['outputs']) == ['logits', 'embedding']
    assert size_mb(made['fp32']) > size_mb(made['fp16']) > size_mb(made['int8']) > size_mb(made['int4-palettized'])
    assert 'or not compressed' in refusal(lambda: coreml.check(network, made['fp16'], bits=8))
    assert 'lost something' in refusal(lambda: coreml.check(Network(network.net, {'picture': network.inputs['image']}, network.outputs), made['fp16'], bits=16))

@needs_coreml
def test_coreml_keeps_free_dimensions_and_integer_inputs(tmp_path):
    network, texts = words()
    path = CoreML.build(network, 'fp16', [], tmp_path/'text.mlpackage')
    import coremltools as ct
    with native_output(): spec = ct.utils.load_spec(str(path))
    ids = spec.description.input[0]
    assert ids.name == 'input_ids' and ids.type.multiArrayType.dataType == ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32
    sizes = ids.type.multiArrayType.shapeRange.sizeRanges
    assert [(s.lowerBound, s.upperBound) for s in sizes] == [(1, 1), (2, 512)]

@pytest.mark.skipif(platform.system() == 'Darwin', reason='this is a Mac: Core ML runs here')
def test_coreml_is_built_here_and_says_that_it_is_not_run(packages):
    assert CoreML.missing(build=True) == '' and 'needs macOS' in CoreML.missing()
    said = refusal(lambda: CoreML.load(packages[0]['fp16']))
    assert 'fp16.mlpackage' in said and 'Copy it to a Mac' in said

def test_coreml_on_a_mac_gets_32_bit_inputs_by_name(packages, monkeypatch):
    "With macOS and its engine played: what a Mac would be asked."
    import coremltools as ct
    asked = []
    class Engine:
        def __init__(self, path): pass
        def predict(self, x):
            asked.append({n: v.dtype for n, v in x.items()})
            return {'logits': np.zeros((1, 4), np.float32)}
    monkeypatch.setattr(platform, 'system', lambda: 'Darwin')
    monkeypatch.setattr(ct.models, 'MLModel', Engine)
    assert CoreML.load(packages[0]['int8'])(np.zeros((3, 3, 32, 32)))['logits'].shape == (3, 4)
    assert asked == [{'image': np.float32}]*3

@needs_coreml
def test_coreml_names_an_operation_it_lacks_and_leaves_nothing(tmp_path):
    assert 'histc in head (Histogram)' in refusal(lambda: CoreML.build(defects(Histogram())[0], 'fp16', [], tmp_path/'a.mlpackage'))
    tiny = Network(torch.nn.Linear(4, 2).eval(), {'features': np.zeros((1, 4), np.float32)}, ('score',))
    assert 'nothing would become smaller' in refusal(lambda: CoreML.build(tiny, 'int8', [], tmp_path/'a.mlpackage'))
    (tmp_path/'b.mlpackage').mkdir()
    assert 'b.mlpackage is not a Core ML package' in refusal(lambda: coreml.io_of(tmp_path/'b.mlpackage'))
    assert [p.name for p in tmp_path.iterdir()] == ['b.mlpackage']


# TensorRT

def fake_tensorrt(calls: list, fail: str = ''):
    "The part of TensorRT's documented Python interface that edgenb uses; engines are ONNX files, run by ONNX Runtime on the addresses that were set."
    trt = types.ModuleType('tensorrt')
    trt.__version__, trt.__spec__ = '11.0.0', importlib.machinery.ModuleSpec('tensorrt', None)
    trt.NetworkDefinitionCreationFlag = enum.IntEnum('NetworkDefinitionCreationFlag', {'EXPLICIT_BATCH': 0, 'STRONGLY_TYPED': 1})
    trt.MemoryPoolType, trt.BuilderFlag = enum.Enum('MemoryPoolType', 'WORKSPACE'), enum.Enum('BuilderFlag', 'TF32')   # 11 has no FP16, no INT8
    trt.TensorIOMode, trt.nptype = enum.Enum('TensorIOMode', 'NONE INPUT OUTPUT'), lambda kind: kind
    class ILogger:
        Severity = enum.Enum('Severity', 'INTERNAL_ERROR ERROR WARNING INFO VERBOSE')
        def __init__(self): calls.append('logger')
    class ParserError:
        def node_name(self): return 'node_Col2Im_7'
        def node(self): return 7
        def node_operator(self): return 'Col2Im'
        def desc(self): return 'no importer\n registered'
        def code(self): return 8
    class OnnxParser:
        num_errors = 1
        def __init__(self, network, logger): self.network = network
        def parse_from_file(self, path):
            assert isinstance(path, str)
            calls.append('parse'); self.network['onnx'] = Path(path).read_bytes()
            return fail != 'parse'
        def get_error(self, index): return ParserError()
    class Profile:
        def __init__(self): self.shapes = {}
        def set_shape(self, input, min, opt, max): self.shapes[input] = (min, opt, max)
    class Cache:
        def serialize(self): return memoryview(b'timings')
    class Config:
        profiles, cache = (), None
        def set_memory_pool_limit(self, pool, size): calls.append(('workspace', size))
        def clear_flag(self, flag): calls.append(('clear', flag.name))
        def add_optimization_profile(self, profile): self.profiles = (*self.profiles, profile); calls.append(('profile', profile.shapes)); return 0
        def create_timing_cache(self, serialized): calls.append(('timing cache', bytes(serialized))); return Cache()
        def set_timing_cache(self, cache, ignore_mismatch): self.cache = cache; return True
        def get_timing_cache(self): return self.cache
    class Builder:
        def __init__(self, logger): self.logger = logger
        def create_network(self, flags): calls.append(('network', flags)); return {}
        def create_builder_config(self): return Config()
        def create_optimization_profile(self): return Profile()
        def build_serialized_network(self, network, config):
            assert network['onnx'] and config.profiles and config.cache, 'built too early'
            calls.append('build')
            if fail == 'build': self.logger.log(ILogger.Severity.ERROR, 'out of memory'); return None
            return memoryview(network['onnx'])
    class Context:
        def __init__(self, session): self.session, self.shapes, self.addresses = session, {}, {}
        def set_input_shape(self, name, shape):
            if shape[0] > 16 or fail == 'shape': return False
            self.shapes[name] = shape
            return True
        def get_tensor_shape(self, name):
            assert len(self.shapes) == len(self.session.get_inputs()), 'output shapes are known once all input shapes are'
            return next([self.shapes[self.session.get_inputs()[0].name][0], *o.shape[1:]] for o in self.session.get_outputs() if o.name == name)
        def set_tensor_address(self, name, address): self.addresses[name] = address; return True
        def execute_async_v3(self, stream_handle):
            calls.append(('execute', stream_handle))
            kinds = {'tensor(float)': np.float32, 'tensor(int64)': np.int64}
            def at(name, shape, kind): return np.frombuffer((ctypes.c_byte*(int(np.prod(shape))*np.dtype(kind).itemsize)).from_address(self.addresses[name]), kind).reshape(shape)
            given = {i.name: at(i.name, self.shapes[i.name], kinds[i.type]) for i in self.session.get_inputs()}
            for o, value in zip(self.session.get_outputs(), self.session.run(None, given)):
                ctypes.memmove(self.addresses[o.name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
            return fail != 'execute'
    class Engine:
        def __init__(self, data):
            import onnxruntime
            self.session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
            self.tensors = [(t, mode) for mode, ts in ((trt.TensorIOMode.INPUT, self.session.get_inputs()), (trt.TensorIOMode.OUTPUT, self.session.get_outputs())) for t in ts]
            self.num_io_tensors = len(self.tensors)
        def get_tensor_name(self, i): return self.tensors[i][0].name
        def get_tensor_mode(self, name): return next(m for t, m in self.tensors if t.name == name)
        def get_tensor_dtype(self, name): return np.float32
        def create_execution_context(self): return Context(self.session)
    class Runtime:
        def __init__(self, logger): self.logger = logger
        def deserialize_cuda_engine(self, data):
            if data.startswith(b'not'): self.logger.log(ILogger.Severity.ERROR, 'magicTag == rt::kPLAN_MAGIC_TAG failed'); return None
            return Engine(data)
    trt.ILogger, trt.OnnxParser, trt.Builder, trt.Runtime = ILogger, OnnxParser, Builder, Runtime
    return trt

@pytest.fixture
def played(monkeypatch, tmp_path):
    "Plays TensorRT and a GPU; gives a function that starts the play and returns the list of calls."
    def start(fail=''):
        calls = []
        monkeypatch.setitem(sys.modules, 'tensorrt', fake_tensorrt(calls, fail))
        monkeypatch.setattr(tensorrt, 'no_gpu', lambda: '')
        monkeypatch.setattr(tensorrt, 'DEVICE', 'cpu')
        monkeypatch.setenv('EDGENB_CACHE', str(tmp_path/'cache'))
        monkeypatch.setattr(tensorrt, 'gpu_stream', lambda: types.SimpleNamespace(cuda_stream=7, synchronize=lambda: calls.append('synchronize')))
        monkeypatch.setattr(torch.cuda, 'stream', contextlib.nullcontext)
        return calls
    return start

def test_tensorrt_says_what_is_missing_here(monkeypatch):
    monkeypatch.setattr(os.path, 'exists', lambda p: False)
    monkeypatch.setattr('shutil.which', lambda name: None)
    assert 'no NVIDIA GPU was found' in TensorRT.missing() and 'no NVIDIA GPU' in refusal(lambda: TensorRT.build(*defects()[:1], 'fp16', [], Path('x')))
    monkeypatch.setattr(os.path, 'exists', lambda p: p == '/dev/nvhost-gpu')   # a Jetson
    assert tensorrt.no_gpu() == '' and 'GPU' not in TensorRT.missing()

@pytest.mark.parametrize('variant', list(TensorRT.variants))
def test_tensorrt_calls_are_in_order_and_the_answers_come_back(variant, played, tmp_path):
    network, images = defects()
    calls = played()
    path = TensorRT.build(network, variant, images, tmp_path/'a.engine')
    shape = (3, 32, 32)
    wanted = ['logger', ('network', 1 << 1), 'parse', ('workspace', 1 << 30), ('clear', 'TF32'), ('profile', {'image': ((1, *shape), (1, *shape), (16, *shape))}), ('timing cache', b''), 'build']
    assert calls == wanted
    run, answers = TensorRT.load(path, num_threads=4), reference(network, images)
    assert cosine(run(together(images))['logits'], answers['logits']) > 0.99
    whole = run(together(images), whole=True)   # 20 examples in calls of at most 16
    assert cosine(whole['embedding'], answers['embedding']) > 0.99 and whole['embedding'].shape == (20, 32)
    assert calls[-4:] == [('execute', 7), 'synchronize']*2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.engine', 'cache']

def test_tensorrt_reuses_the_timings_of_the_last_build_and_serves_free_dimensions(played, tmp_path):
    network, texts = words()
    played(); TensorRT.build(network, 'fp32', [], tmp_path/'a.engine')
    calls = played(); path = TensorRT.build(network, 'fp32', [], tmp_path/'a.engine')
    assert ('timing cache', b'timings') in calls and ('profile', {n: ((1, 2), (1, 12), (16, 512)) for n in network.inputs}) in calls
    run, wanted = TensorRT.load(path), reference(network, texts)['embedding']
    assert np.abs(np.concatenate([run(t)['embedding'] for t in texts]) - wanted).max() < 1e-4

@pytest.mark.parametrize('fail,said', [('parse', 'cannot hold Col2Im (node node_Col2Im_7): no importer registered'), ('build', 'out of memory'),
                                       ('shape', 'does not take image of the shape (1, 3, 32, 32)'), ('execute', 'failed on the GPU'), ('load', 'magicTag')])
def test_tensorrt_failures_are_refusals_with_the_reason(fail, said, played, tmp_path):
    network, images = defects()
    played(fail)
    def attempt():
        path = TensorRT.build(network, 'fp32', [], tmp_path/'a.engine')
        if fail == 'load': path.write_bytes(b'not an engine')
        TensorRT.load(path)(images[0])
    assert said in refusal(attempt)
    if fail in ('parse', 'build'): assert not (tmp_path/'a.engine').exists()

def test_tensorrt_graphs_are_signed_symmetric_and_without_integer_biases(tmp_path):
    import onnx
    network, images = defects()
    path = onnx_for(network, 'int8', images, tmp_path/'int8.onnx')
    model = onnx.load(str(path))
    weighted = [n for n in model.graph.node if n.op_type in tensorrt.WEIGHTED]
    by_output = {o: n.op_type for n in model.graph.node for o in n.output}
    assert len(weighted) == 3 and check_quantization(path) == 6
    for n in weighted:
        assert [by_output[i] for i in n.input[:2]] == ['DequantizeLinear']*2       # the input and the weights
        assert len(n.input) < 3 or n.input[2] not in by_output                       # the bias as it is
    assert not any(i.data_type == onnx.TensorProto.INT32 for i in model.graph.initializer)
    assert cosine(OnnxRuntime.load(path)(together(images))['logits'], reference(network, images)['logits']) > 0.99

def test_tensorrt_refuses_unsigned_and_asymmetric_quantization_by_node(tmp_path):
    network, images = defects()
    unsigned = OnnxRuntime.build(network, 'int8', images, tmp_path/'unsigned.onnx')
    assert 'is uint8' in refusal(lambda: check_quantization(unsigned)) and 'QuantizeLinear image_' in refusal(lambda: check_quantization(unsigned))
    import onnx
    model = onnx.load(str(onnx_for(network, 'int8', images, tmp_path/'int8.onnx')))
    zero = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8)
    zero.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(zero) + np.int8(3), zero.name))
    onnx.save(model, tmp_path/'askew.onnx')
    assert 'zero point other than 0' in refusal(lambda: check_quantization(tmp_path/'askew.onnx'))

def test_tensorrt_on_a_gpu_answers_as_torch_does(tmp_path):
    if why := TensorRT.missing(build=True): pytest.skip(why)
    network, images = defects()
    wanted = reference(network, images)['logits']
    for variant, least in (('fp32', 0.999999), ('fp16', 0.9999), ('int8', 0.99)):
        path = TensorRT.build(network, variant, images, tmp_path/f'{variant}.engine')
        assert cosine(TensorRT.load(path)(together(images))['logits'], wanted) > least


# optimum

@pytest.mark.parametrize('transformers,theirs,said', [('5.23.0', '', 'not installed here; it works with transformers below 4.58, here is 5.23.0'), ('5.23.0', '0.1.0', 'optimum-onnx 0.1.0 works with transformers below 4.58, here is 5.23.0'),
                                                      ('4.57.6', '', 'needs optimum-onnx, not installed here: make'), ('', '0.1.0', 'here is none'), ('4.57.6', '0.1.0', '')])
def test_optimum_names_the_versions_that_do_not_go_together(transformers, theirs, said, monkeypatch):
    def version(package):
        found = {'transformers': transformers, 'optimum-onnx': theirs}[package]
        if not found: raise importlib.metadata.PackageNotFoundError(package)
        return found
    monkeypatch.setattr(importlib.metadata, 'version', version)
    why = optimum.conflict()
    assert said in why and bool(said) == bool(why) and (not why or 'environment of its own' in why)

def test_optimum_runs_what_it_built_without_optimum(tmp_path):
    network, images = defects()
    path = export_onnx(network, tmp_path/'a.onnx')
    assert Optimum.missing() == OnnxRuntime.missing()
    assert np.abs(Optimum.load(path)(together(images))['logits'] - reference(network, images)['logits']).max() < 1e-4
    (tmp_path/'b.onnx').write_bytes(b'not a model')
    assert 'b.onnx' in refusal(lambda: Optimum.load(tmp_path/'b.onnx'))

BOTH_ROUTES = '''
import json, sys, tempfile
from pathlib import Path
import numpy as np, torch
from transformers import BertConfig, BertModel, __version__
from edgenb.core import EdgenbError
from edgenb.runtime import Network
from edgenb.runtimes.onnx import OnnxRuntime, export_onnx
from edgenb.runtimes.optimum import Optimum
torch.manual_seed(0)
class Encoder(torch.nn.Module):
    def __init__(self, factor=1):
        super().__init__()
        self.factor, self.encoder = factor, BertModel(BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, _attn_implementation='eager'))
    def forward(self, input_ids, attention_mask, token_type_ids): return self.factor*self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
rng = np.random.default_rng(0)
def text(n): return {'input_ids': rng.integers(0, 100, (1, n)), 'attention_mask': np.ones((1, n), np.int64), 'token_type_ids': np.zeros((1, n), np.int64)}
network = Network(Encoder().eval(), text(12), ('hidden',), {n: {1: 'sequence'} for n in text(2)})
assert not Optimum.missing(build=True), Optimum.missing(build=True)
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    theirs, ours = Optimum.build(network, 'fp32', [], folder/'theirs.onnx'), export_onnx(network, folder/'ours.onnx')
    small = Optimum.build(network, 'int8-dynamic', [], folder/'small.onnx')
    try: Optimum.build(Network(Encoder(2).eval(), network.inputs, network.outputs, network.dynamic), 'fp32', [], folder/'x.onnx'); lost = ''
    except EdgenbError as e: lost = str(e)
    rows = []
    for x in map(text, (5, 12, 40)):
        a, b, c = (OnnxRuntime.load(f)(x)['hidden'] for f in (theirs, ours, small))
        with torch.inference_mode(): w = network.net(*map(torch.from_numpy, x.values())).numpy()
        rows.append({'routes': float(np.abs(a - b).max()), 'torch': float(np.abs(a - w).max()), 'int8': float((c*w).sum()/np.sqrt((c*c).sum()*(w*w).sum()))})
    print(json.dumps({'transformers': __version__, 'rows': rows, 'lost': lost, 'sizes': [theirs.stat().st_size, small.stat().st_size]}))
'''

@pytest.mark.skipif(os.environ.get('EDGENB_SLOW') != '1', reason='makes an environment of its own with optimum-onnx and an older transformers (minutes, some GB): set EDGENB_SLOW=1')
def test_optimum_and_edgenb_export_the_same_encoder_in_an_environment_of_their_own(tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'env'], check=True)
    python = next(p for p in (tmp_path/'env'/'bin'/'python', tmp_path/'env'/'Scripts'/'python.exe') if p.exists())
    wanted = ['optimum-onnx[onnxruntime]==0.1.0', f"torch=={torch.__version__.split('+')[0]}", 'onnxscript', 'pillow']
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *wanted], check=True)
    root = str(Path(__file__).parents[1])
    done = subprocess.run([python, '-c', BOTH_ROUTES], env=os.environ | {'PYTHONPATH': root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert all(r['routes'] < 1e-4 and r['torch'] < 1e-4 and r['int8'] > 0.99 for r in found['rows'])
    assert found['sizes'][1] < 0.8*found['sizes'][0] and 'computes more' in found['lost']
