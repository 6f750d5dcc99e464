"""OpenVINO, LiteRT and TensorFlow Lite Micro: what they build computes what torch computes, and what is known to break does break, and is caught."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from edgenb.core import EdgenbError
from edgenb.runtime import Network, size_mb
from nets import sensor_windows, trained_autoencoder

from edgenb.runtimes.litert import LiteRT, convert, layers, quantize
from edgenb.runtimes.openvino import OpenVINO, convert as convert_openvino, quantize as quantize_openvino
from edgenb.runtimes.tflm import TFLiteMicro, allocated, arena_kb, c_array, external_buffers, fits_microcontroller, inlined, interpreter_for, proven, steps_apart, vela_report

WHERE = Path(__file__).parent
BUILT = {OpenVINO: ['fp32', 'fp16', 'int8', 'int8-mean'], LiteRT: ['fp32', 'int8-dynamic', 'int8', 'int8-moving-average'], TFLiteMicro: ['int8']}
if why := '; '.join(filter(None, (r.missing(build=True) for r in BUILT))): pytest.skip(why, allow_module_level=True)   # importing openvino to find out would report it


@pytest.fixture(scope='module')
def sensors(tmp_path_factory):
    "The autoencoder of `nets`, its artifacts by (runtime, variant), and 500 windows to judge them by."
    import torch
    torch.set_num_threads(1)
    network = Network(trained_autoencoder(), {'window': np.zeros((1, 8, 64), np.float32)}, ('rebuilt',))
    calibration = [{'window': w[None]} for w in sensor_windows(100, 3)[0][:100]]
    folder = tmp_path_factory.mktemp('artifacts')
    paths = {(r.name, v): r.build(network, v, calibration, folder/f'{r.name}-{v}{r.suffix}') for r, variants in BUILT.items() for v in variants}
    x, y = sensor_windows(250, 2)
    with torch.no_grad(): reference = network.net(torch.from_numpy(x)).numpy()
    return {'network': network, 'calibration': calibration, 'paths': paths, 'x': x, 'y': y, 'reference': reference}


def rebuilt(sensors, runtime, variant): return runtime.load(sensors['paths'][runtime.name, variant])(sensors['x'])['rebuilt']


def judged(sensors, output):
    "AUC of the reconstruction error: how often a window with a fault scores above one without."
    score = ((sensors['x'] - output)**2).mean((1, 2))
    return float((score[sensors['y'] == 1][:, None] > score[sensors['y'] == 0]).mean())


def small(*layers, width=16, seed=0):
    "A network of these layers on `width` readings."
    import torch
    torch.manual_seed(seed)
    net = torch.nn.Sequential(*layers).eval()
    for module in net.modules(): getattr(module, 'reset_parameters', lambda: None)()   # as the seed says
    return Network(net, {'x': np.zeros((1, width), np.float32)}, ('y',))


def readings(n, width=16, seed=0): return [{'x': x[None]} for x in np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)]


def refused(call, *words):
    with pytest.raises(EdgenbError) as caught: call()
    message = str(caught.value)
    for word in words: assert word in message, message
    assert '\n' not in message and 'Traceback' not in message
    return message


# The same answers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('runtime', [OpenVINO, LiteRT])
def test_fp32_computes_what_torch_computes(sensors, runtime):
    assert np.abs(rebuilt(sensors, runtime, 'fp32') - sensors['reference']).max() < 1e-4


@pytest.mark.parametrize('runtime, variant', [(OpenVINO, 'fp16'), (OpenVINO, 'int8'), (LiteRT, 'int8-dynamic'), (LiteRT, 'int8'), (TFLiteMicro, 'int8')])
def test_small_weights_stay_close_and_keep_the_anomalies_apart(sensors, runtime, variant):
    output = rebuilt(sensors, runtime, variant)
    assert np.sqrt(((output - sensors['reference'])**2).mean()/(sensors['reference']**2).mean()) < 0.06
    assert judged(sensors, output) > judged(sensors, sensors['reference']) - 0.01
    assert size_mb(sensors['paths'][runtime.name, variant]) < 0.9*size_mb(sensors['paths'][runtime.name if runtime is OpenVINO else 'litert', 'fp32'])


@pytest.mark.parametrize('runtime, trap', [(OpenVINO, 'int8-mean'), (LiteRT, 'int8-moving-average')])
def test_the_quantizers_default_ranges_blind_an_anomaly_detector(sensors, runtime, trap):
    "The reason these variants are traps: the tools say nothing, and the AUC falls from 0.98 to about 0.8."
    assert runtime.variants[trap].trap
    assert judged(sensors, sensors['reference']) > 0.96
    assert judged(sensors, rebuilt(sensors, runtime, trap)) < 0.90


def test_int8_with_accuracy_control_keeps_99_percent_of_the_variance_or_is_refused(sensors, tmp_path):
    calibration = sensors['calibration'][:24]
    path = OpenVINO.build(sensors['network'], 'int8-accuracy', calibration, tmp_path/'ae.openvino')
    x = np.concatenate([c['window'] for c in calibration])
    output, exact = (OpenVINO.load(p)(x)['rebuilt'] for p in (path, sensors['paths']['openvino', 'fp32']))
    assert 0 < np.mean([((o - e)**2).sum()/(e**2).sum() for o, e in zip(output, exact)]) < 0.01
    assert size_mb(path) < size_mb(sensors['paths']['openvino', 'fp32'])
    refused(lambda: quantize_openvino(convert_openvino(sensors['network']), calibration, agreement=0.9999999), 'no layer', 'fp32')


def test_a_softplus_inside_the_graph_ruins_litert_int8_and_on_the_host_it_does_not(tmp_path):
    import torch
    inside, outside = (small(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4), *last, width=8) for last in ([torch.nn.Softplus()], []))
    for network in (inside, outside): network.net[2].weight.data *= 10
    examples = [{'x': 3*e['x']} for e in readings(64, 8)]
    x = np.concatenate([e['x'] for e in examples])
    with torch.no_grad(): wanted = inside.net(torch.from_numpy(x)).numpy()
    def int8(network, path):
        path.write_bytes(quantize(convert(network), examples))
        return LiteRT.load(path)(x)['y']
    broken, sound = int8(inside, tmp_path/'inside.tflite'), np.logaddexp(0, int8(outside, tmp_path/'outside.tflite'))
    assert np.abs(broken - wanted).mean() > 0.3*wanted.mean()
    assert np.abs(sound - wanted).mean() < 0.03*wanted.mean()
    exact, rounded = (LiteRT.trace(p, examples[0]) for p in (LiteRT.build(inside, 'fp32', [], tmp_path/'exact.tflite'), tmp_path/'inside.tflite'))
    assert list(exact) == list(rounded)
    assert next(n for n in exact if np.linalg.norm(exact[n] - rounded[n]) > 0.2*np.linalg.norm(exact[n])).startswith('Softplus_3')


def test_two_inputs_and_two_outputs_keep_their_names(tmp_path):
    import torch
    class Pair(torch.nn.Module):
        def __init__(self): super().__init__(); self.embed, self.mix = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 3)
        def forward(self, token, scale):
            e = self.embed(token)*scale
            return self.mix(e), e
    torch.manual_seed(0)
    network = Network(Pair().eval(), {'token': np.array([[1, 2, 3]]), 'scale': np.ones((1, 3, 1), np.float32)}, ('score', 'embedding'))
    given = {'token': np.array([[4, 5, 6], [9, 0, 1]]), 'scale': np.array([[[1.], [2], [3]], [[4], [5], [6]]], np.float32)}
    with torch.no_grad(): wanted = dict(zip(network.outputs, (t.numpy() for t in network.net(torch.from_numpy(given['token']), torch.from_numpy(given['scale'])))))
    for runtime in (OpenVINO, LiteRT):
        found = runtime.load(runtime.build(network, 'fp32', [], tmp_path/f'pair{runtime.suffix}'))(given)
        assert list(found) == ['score', 'embedding']
        for name in wanted: assert np.abs(found[name] - wanted[name]).max() < 1e-4


def test_attention_over_texts_of_any_length_holds_in_int8(tmp_path):
    import torch
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q, self.k, self.v, self.norm = torch.nn.Embedding(50, 32), *(torch.nn.Linear(32, 32) for _ in 'qkv'), torch.nn.LayerNorm(32)
        def forward(self, ids):
            h = self.embed(ids)
            return self.norm(h + torch.softmax(self.q(h)@self.k(h).transpose(1, 2)/32**0.5, -1)@self.v(h)).mean(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    def text(length): return {'ids': rng.integers(0, 50, (1, length))}
    network = Network(Encoder().eval(), text(12), ('embedding',), {'ids': {1: 'length'}})
    def off(runtime, calibration, given):
        found = runtime.load(runtime.build(network, 'int8', calibration, tmp_path/f'encoder{runtime.suffix}'))(given)['embedding']
        with torch.no_grad(): return np.abs(found - network.net(torch.from_numpy(given['ids'])).numpy()).max()
    assert off(OpenVINO, [text(n) for n in rng.integers(4, 20, 16)], text(17)) < 0.05
    assert off(LiteRT, [text(12) for _ in range(16)], text(12)) < 0.1
    refused(lambda: LiteRT.load(tmp_path/'encoder.tflite')(text(13)), '(1, 13)', '(1, 12)')
    refused(lambda: LiteRT.build(network, 'int8', [text(13)]*8, tmp_path/'encoder.tflite'), '(1, 13)', '(1, 12)')


def test_openvino_takes_batches_and_litert_says_it_does_not(sensors):
    paths = sensors['paths']
    assert np.abs(OpenVINO.load(paths['openvino', 'int8'])(sensors['x'][:4], whole=True)['rebuilt'] - rebuilt(sensors, OpenVINO, 'int8')[:4]).max() < 1e-4
    for runtime in (LiteRT, TFLiteMicro): refused(lambda: runtime.load(paths[runtime.name, 'int8'])(sensors['x'][:4], whole=True), 'one example a call')


@pytest.mark.parametrize('runtime', [OpenVINO, LiteRT, TFLiteMicro])
def test_an_input_of_another_shape_is_refused(sensors, runtime):
    refused(lambda: runtime.load(sensors['paths'][runtime.name, 'int8'])(np.zeros((1, 7, 64), np.float32)), runtime.suffix, '(1, 7, 64)')


# Layer by layer ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('runtime, trap', [(OpenVINO, 'int8-mean'), (LiteRT, 'int8-moving-average')])
def test_a_trace_shows_the_layers_of_all_variants_under_the_same_names(sensors, runtime, trap):
    loudest = {'window': sensors['x'][np.abs(sensors['x']).max((1, 2)).argmax()][None]}
    exact, sound, clipped = (runtime.trace(sensors['paths'][runtime.name, v], loudest) for v in ('fp32', 'int8', trap))
    assert list(exact) == list(sound) == list(clipped) and len(exact) >= 8 and list(exact)[-1] == 'rebuilt'
    assert any('onv' in name for name in exact)
    def off(trace): return {n: np.linalg.norm(trace[n] - exact[n])/np.linalg.norm(exact[n]) for n in exact}
    assert max(off(sound).values()) < 0.05 < off(clipped)[next(iter(exact))]
    last = runtime.load(sensors['paths'][runtime.name, trap])(loudest)['rebuilt']
    assert np.linalg.norm(clipped['rebuilt'] - last) < 0.02*np.linalg.norm(last)


def test_a_trace_of_the_microcontroller_has_the_names_of_litert(sensors):
    window = {'window': sensors['x'][:1]}
    exact, micro = LiteRT.trace(sensors['paths']['litert', 'fp32'], window), TFLiteMicro.trace(sensors['paths']['tflm', 'int8'], window)
    assert list(exact) == list(micro)
    for name in exact: assert np.linalg.norm(exact[name] - micro[name]) < 0.1*np.linalg.norm(exact[name])


# Microcontrollers ----------------------------------------------------------------------------------------------------

def test_the_microcontroller_computes_the_integers_of_litert(sensors):
    content = sensors['paths']['tflm', 'int8'].read_bytes()
    assert steps_apart(content, sensors['calibration'][:8]) <= 2.01


@pytest.fixture(scope='module')
def wide():
    "An 8-bit file whose weights exceed 256 KiB, as the quantizer writes it, and examples."
    from torch.nn import Linear, ReLU
    return quantize(convert(small(Linear(16, 560), ReLU(), Linear(560, 560), ReLU(), Linear(560, 4))), readings(16)), readings(16)


def test_weights_in_external_buffers_compute_garbage_and_are_caught(wide, tmp_path):
    content, examples = wide
    assert external_buffers(content) and steps_apart(content, examples[:4]) > 20
    refused(lambda: proven(content, examples[:4]), 'external buffers', 'inlined')
    (tmp_path/'outside.tflite').write_bytes(content)
    refused(lambda: TFLiteMicro.load(tmp_path/'outside.tflite'), 'outside.tflite', 'external buffers')


def test_a_file_with_small_weights_has_no_external_buffers():
    from torch.nn import Linear, ReLU
    assert not external_buffers(quantize(convert(small(Linear(16, 440), ReLU(), Linear(440, 440), ReLU(), Linear(440, 4))), readings(16)))


def test_repacked_weights_lie_inside_and_aligned_and_compute_the_same(wide):
    from ai_edge_litert import schema_py_generated as schema
    content = inlined(wide[0])
    assert not external_buffers(content) and steps_apart(content, wide[1]) <= 2.01
    model = schema.Model.GetRootAsModel(content, 0)
    base = np.frombuffer(content, np.uint8).ctypes.data
    starts = [model.Buffers(n).DataAsNumpy().ctypes.data - base for n in range(model.BuffersLength()) if model.Buffers(n).DataLength()]
    assert starts and all(s % 16 == 0 for s in starts)


def test_the_measured_arena_is_enough_and_less_is_not(sensors):
    path = sensors['paths']['tflm', 'int8']
    content, kb = path.read_bytes(), arena_kb(path)
    assert allocated(content, kb) and not allocated(content, kb - 0.3)
    from edgenb.runtimes.tflm import _function
    tight, roomy = (_function(i, content, path)[0]({'window': sensors['x'][:1]})['rebuilt'] for i in (allocated(content, kb), interpreter_for(content)))
    assert (tight == roomy).all()


def test_what_does_not_fit_a_microcontroller_is_told_what_to_do(sensors, wide, tmp_path):
    fits, why = fits_microcontroller(sensors['paths']['tflm', 'int8'])
    assert fits and 'arena' in why
    (tmp_path/'wide.tflite').write_bytes(inlined(wide[0]))
    fits, why = fits_microcontroller(tmp_path/'wide.tflite', limit_kb=300)
    assert not fits and 'prune' in why and 'arena' not in why


@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
def test_the_c_array_compiles_to_the_bytes_of_the_artifact(sensors, tmp_path):
    path = sensors['paths']['tflm', 'int8']
    header, source = c_array(path, tmp_path/'c', 'sensors')
    (tmp_path/'c'/'main.cc').write_text('#include "sensors.h"\n#include <cstdio>\n#include <cstdint>\nint main() {\n'
                                        '  if (reinterpret_cast<uintptr_t>(sensors) % 16 || SENSORS_ARENA_BYTES % 16) return 1;\n'
                                        '  return fwrite(sensors, 1, sensors_length, stdout) != sensors_length;\n}\n')
    subprocess.run(['c++', '-std=c++17', '-Wall', '-Werror', 'main.cc', 'sensors.cc', '-o', 'main'], cwd=tmp_path/'c', check=True)
    assert subprocess.run([tmp_path/'c'/'main'], stdout=subprocess.PIPE, check=True).stdout == path.read_bytes()
    text = header.read_text()
    assert all(word in text for word in ('AddConv2D', 'AddTransposeConv', 'input window (1, 8, 64) int8', 'output rebuilt'))
    refused(lambda: c_array(path, tmp_path, '2nd'), '2nd', 'identifier')
    TFLiteMicro.sources(path, tmp_path/'bundle')
    assert (tmp_path/'bundle'/'model.cc').read_text().count('0x') == path.stat().st_size


@pytest.mark.skipif(not shutil.which('vela', path=str(Path(sys.executable).parent)), reason='no Vela')
def test_vela_says_how_much_runs_on_the_accelerator(sensors):
    report = vela_report(sensors['paths']['tflm', 'int8'])
    assert report['on_npu'] > 0.9 and 0 < report['sram_kb'] < 50 and 0 < report['flash_kb'] < 50


# What a runtime cannot hold, and mistakes ----------------------------------------------------------------------------

def act(name, call):
    "A module of its own class that applies `call`."
    import torch
    return type(name, (torch.nn.Module,), {'forward': lambda self, x: call(x)})()


def test_an_operation_a_runtime_lacks_is_named_with_its_place(tmp_path):
    import torch
    linear = torch.nn.Linear
    digamma = small(linear(16, 16), torch.nn.Sequential(linear(16, 16), act('Digamma', torch.digamma)))
    refused(lambda: LiteRT.build(digamma, 'fp32', [], tmp_path/'a.tflite'), 'digamma', '1.1 (Digamma)', 'replace')
    det = small(linear(16, 16), torch.nn.Sequential(act('Det', lambda x: torch.det(x.reshape(-1, 4, 4)))))
    refused(lambda: OpenVINO.build(det, 'fp32', [], tmp_path/'b.openvino'), 'Det at 1/0/det', 'replace')
    gelu = small(linear(16, 8), torch.nn.GELU(), linear(8, 2))
    refused(lambda: TFLiteMicro.build(gelu, 'int8', readings(16), tmp_path/'c.tflite'), 'GELU', 'at GELU_1', 'replace')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('runtime', [OpenVINO, LiteRT, TFLiteMicro])
def test_calibration_needs_enough_examples_of_the_right_shape(runtime, tmp_path):
    import torch
    network = small(torch.nn.Linear(16, 2))
    for n in (0, 1): refused(lambda: runtime.build(network, 'int8', readings(n), tmp_path/'a'), 'at least 8', f'got {n}')
    refused(lambda: runtime.build(network, 'int8', readings(8, 15), tmp_path/'a'), 'example 0', '(1, 15)', '(1, 16)')
    refused(lambda: runtime.build(network, 'int8', [{'z': np.zeros((1, 16))}]*8, tmp_path/'a'), 'no input x')
    refused(lambda: runtime.build(network, 'int9', readings(8), tmp_path/'a'), 'int9', 'int8')
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_is_refused_by_name(sensors, tmp_path):
    paths = sensors['paths']
    for runtime in (LiteRT, TFLiteMicro):
        content = paths[runtime.name, 'int8'].read_bytes()
        for k, damaged in enumerate((b'', b'nonsense', content[:len(content)//2], bytes(len(content)))):
            (tmp_path/f'{k}.tflite').write_bytes(damaged)
            refused(lambda: runtime.load(tmp_path/f'{k}.tflite'), f'{k}.tflite')
        refused(lambda: runtime.load(tmp_path/'gone.tflite'), 'gone.tflite')
    for k, spoil in enumerate((lambda f: (f/'model.xml').write_text('<net'), lambda f: (f/'model.bin').unlink(), lambda f: (f/'model.bin').write_bytes(b'short'))):
        folder = Path(shutil.copytree(paths['openvino', 'int8'], tmp_path/f'{k}.openvino'))
        spoil(folder)
        refused(lambda: OpenVINO.load(folder), f'{k}.openvino')


def test_a_build_replaces_an_older_artifact_whole(tmp_path):
    import torch
    for seed in (0, 1):
        network = small(torch.nn.Linear(16, 2), seed=seed)
        for runtime in (OpenVINO, LiteRT): runtime.build(network, 'fp32', [], tmp_path/f'a{runtime.suffix}')
    x = readings(1)[0]['x']
    for runtime in (OpenVINO, LiteRT):
        with torch.no_grad(): assert np.abs(runtime.load(tmp_path/f'a{runtime.suffix}')(x)['y'] - network.net(torch.from_numpy(x)).numpy()).max() < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.openvino', 'a.tflite']


# No word to anybody --------------------------------------------------------------------------------------------------

SILENT = '''
import json, os, socket, sys, threading
reached, forks = [], []
os.register_at_fork(before=lambda: forks.append(1))
def refuse(self, address): reached.append(str(address)); raise OSError('no network here')
socket.socket.connect = socket.socket.connect_ex = refuse
def lookup(host, *rest, **kw): reached.append(str(host)); raise OSError('no network here')
socket.getaddrinfo = lookup
import numpy as np, torch
from pathlib import Path
from edgenb.runtime import Network
from edgenb.runtimes.litert import LiteRT
from edgenb.runtimes.openvino import OpenVINO, convert as convert_openvino, quantize as quantize_openvino
network = Network(torch.nn.Linear(4, 2).eval(), {'x': np.zeros((1, 4), np.float32)}, ('y',))
examples = [{'x': x[None]} for x in np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)]
for runtime in (OpenVINO, LiteRT):
    path = runtime.build(network, 'int8', examples, Path(sys.argv[1])/f'a{runtime.suffix}')
    runtime.load(path)(np.ones((2, 4), np.float32))
from nncf.telemetry import wrapper
from openvino.tools.ovc import telemetry_utils
print(json.dumps({'reached': reached, 'forks': len(forks), 'sender': type(wrapper.telemetry).__name__, 'stub': telemetry_utils.tm.__name__,
                  'threads': [t.name for t in threading.enumerate()],
                  'loaded': [m for m, v in sys.modules.items() if m.startswith('openvino_telemetry') and v is not None], 'pytest': 'pytest' in sys.modules}))
'''


def child(code, tmp_path, *args, **more):
    "Run Python code with an empty home; returns the JSON of its last line, and the files it left in the home."
    home = tmp_path/'home'
    home.mkdir()
    outside = {k: v for k, v in os.environ.items() if k not in ('CI', 'NNCF_CI', 'NNCF_DEV') and 'XDG' not in k}
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], env=outside | {'HOME': str(home), 'USERPROFILE': str(home)} | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), sorted(p.relative_to(home).as_posix() for p in home.rglob('*') if p.is_file())


def test_nothing_is_reported_to_anybody(tmp_path):
    told, left = child(SILENT, tmp_path, tmp_path)
    assert not told['pytest']   # under pytest NNCF is silent by itself
    assert told['reached'] == [] and told['forks'] == 0 and told['loaded'] == [] and told['sender'] == 'MagicMock'
    assert told['stub'].endswith('telemetry_stub')
    assert set(told['threads']) <= {'MainThread', 'tqdm_monitor'}
    assert not [f for f in left if 'intel' in f.lower() or 'telemetry' in f.lower() or 'openvino' in f.lower()], left


LATE = """
import json, sys, openvino, openvino_telemetry
from openvino_telemetry.utils.sender import TelemetrySender
sent = []
TelemetrySender.send = lambda self, *rest, **kw: sent.append(1)
telemetry = openvino_telemetry.Telemetry()
telemetry.consent = True
telemetry.send_event('a', 'b', 'c')
before = len(sent)
from edgenb.runtimes.openvino import openvino
openvino()
telemetry.send_event('a', 'b', 'c'); telemetry.start_session('a'); telemetry.end_session('a')
print(json.dumps([before, len(sent)]))
"""


def test_a_sender_that_is_already_loaded_is_silenced(tmp_path):
    "Also the control of the test above: without care, openvino sends."
    assert child(LATE, tmp_path, CI='true')[0] == [1, 1]
