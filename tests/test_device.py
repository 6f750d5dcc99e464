"The catalogue of devices, the roofline, and the counting of models."
import json, math, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper, numpy_helper
from edgenb.cli import main
from edgenb.core import Card, EdgenbError, Run
from edgenb.device import FIGURES, PRECISIONS, Device, ModelSize, check_7b_table, device, devices, fit, kv_cache_mb, peak, read_catalogue, roofline, sustained_share
from edgenb.size import LITE0_STAGES, find_model, safetensors_shapes, size_of_lite0, size_of_onnx, size_of_recipe, size_of_run, size_of_transformers

root = Path(__file__).parents[1]
PLANNED = 'local jetson-orin-nano jetson-agx-orin intel-nuc-arc snapdragon-x-elite apple-m-series hailo-8l hailo-8 coral-edge-tpu qualcomm-rb5 raspberry-pi-5 cortex-m55 cortex-m85 nrf9160 esp32-s3 l4 l40s mi300x'.split()
RUNTIMES = {'torch', 'onnxruntime', 'openvino', 'litert', 'tflm', 'executorch', 'coreml', 'tensorrt', 'gguf'}
LLAMA = {'parameters': 6_738_415_616, 'layers': 32, 'kv_heads': 32, 'head_dim': 128, 'context': 4096}
SMALL = {'parameters': 3.4e6, 'macs': 386e6, 'activations_mb': 5.7}
every = pytest.mark.parametrize('name', PLANNED)


def by_precision(f): return {r.precision: r for r in f.rows}


# the catalogue

def test_every_planned_device_is_there(): assert set(PLANNED) <= set(devices())


@every
def test_every_figure_of_a_device_says_where_it_comes_from(name):
    d = device(name)
    for figure in FIGURES:
        stated = getattr(d, figure) not in (None, ())
        assert stated == (figure in d.source), figure
        if stated: assert len(d.source[figure]) > 10


@every
def test_a_device_names_only_known_precisions_and_runtimes(name):
    d = device(name)
    assert d.tier in ('microcontroller', 'accelerator', 'server') and d.precisions and set(d.precisions) <= set(PRECISIONS)
    assert name == 'local' or set(d.runtimes) <= RUNTIMES
    assert name == 'local' or d.runtimes or d.compiler, 'nothing gets a model there'


@every
def test_figures_of_a_device_are_consistent(name):
    d = device(name)
    for low, high in (pair for pair in (d.power_w, d.price_usd, d.temperature_c, (d.memory_mb, d.memory_max_mb)) if pair):
        assert None in (low, high) or low <= high
    peaks = [speed for p in ('fp32', 'fp16', 'int8') if (speed := peak(d, p)[0])]
    assert peaks == sorted(peaks), 'narrower numbers are never computed with more slowly'
    assert d.tier != 'microcontroller' or d.model_mb


@pytest.mark.parametrize('row, says', [
    ('int8_tops = 26', 'int8_tops without a source'), ('int8_topps = 26', 'Did you mean int8_tops'), ('name = "y"', 'there is no figure name'), ('power_w = [1, 2', 'cannot be read')])
def test_a_bad_row_is_refused(row, says):
    with pytest.raises(EdgenbError, match=says): read_catalogue(f'[x]\nwhat = "x"\ntier = "server"\n{row}\n')


def test_a_row_without_tier_is_refused():
    with pytest.raises(EdgenbError, match='tier is missing'): read_catalogue('[x]\nwhat = "x"\n')


def test_an_unknown_device_is_refused():
    with pytest.raises(EdgenbError, match='Did you mean raspberry-pi-5'): device('raspberry-pi5')


# memory

def test_the_cache_of_llama_2_7b_at_4096_tokens_is_2_gib():
    assert kv_cache_mb(32, 32, 128, 4096)*2**20 == 2_147_483_648
    assert kv_cache_mb(32, 8, 128, 4096) == 512   # grouped-query attention with 8 heads
    row = by_precision(fit(LLAMA, device('l4')))['fp16']
    assert row.kv_mb == 2048 and row.weights_mb == pytest.approx(6_738_415_616*2/2**20)
    assert row.needed_mb == pytest.approx(row.weights_mb + row.kv_mb + row.runtime_mb)


def test_a_7b_model_fits_an_orin_nano_in_4_bits_only():
    f = fit(LLAMA, device('jetson-orin-nano'))
    assert {p: r.fits for p, r in by_precision(f).items()} == {'fp32': False, 'fp16': False, 'int8': False, 'int4': True}
    assert f.precision == 'int4' and f.fits and 0 < f.headroom_mb < 8192


def test_one_artifact_is_answered_for_at_its_own_precision():
    nano = device('jetson-orin-nano')
    assert fit({'parameters': 7e9, 'bytes_per_weight': 4}, nano).precision == 'fp32'
    assert fit({'parameters': 7e9, 'bytes_per_weight': 4.84/8}, nano).needed_mb == pytest.approx(7e9*4.84/8/2**20 + 63)
    assert not fit({'parameters': 7e9, 'bytes_per_weight': 4}, nano).fits and fit({'parameters': 3e6, 'bytes_per_weight': 1}, nano).fits


def test_a_microcontroller_has_a_limit_for_weights_and_one_for_activations():
    nrf = device('nrf9160')
    assert nrf.fit({'parameters': 2e5, 'activations_mb': 0.5, 'precision': 'int8'}).fits           # 0.19 MB of flash, 0.125 MB of memory
    assert nrf.fit({'parameters': 2e5, 'activations_mb': 1.5, 'precision': 'int8'}).fits is False  # 0.375 MB of 0.25
    assert nrf.fit({'parameters': 6e5, 'activations_mb': 0.1, 'precision': 'int8'}).fits is False  # 0.57 MB, planned with 500 KB
    assert nrf.fit({'parameters': 2e5, 'precision': 'int8'}).fits is None                          # activations not known
    assert device('cortex-m55').fit({'parameters': 2e5, 'activations_mb': 0.1, 'precision': 'int8'}).fits is None   # memory not known


def test_unknown_memory_is_answered_not_known():
    f = fit(SMALL, device('hailo-8'))
    assert f.fits is None and 'not known' in f.reason and f.precision == 'int8'


def test_a_vision_accelerator_refuses_language_models():
    f = device('hailo-8l').fit(LLAMA)
    assert f.fits is False and 'vision only' in f.reason and not any(r.runs for r in f.rows)


def test_a_precision_that_a_device_does_not_compute_in_is_refused():
    f = device('coral-edge-tpu').fit(SMALL | {'precision': 'fp32'})
    assert f.fits is False and 'only in int8' in f.reason
    assert device('coral-edge-tpu').fit(SMALL).precision == 'int8'


# latency, energy, heat

def test_the_roofline_is_the_larger_of_arithmetic_and_bandwidth():
    d = Device('x', 'x', 'server', int8_tops=1, bandwidth_gb_s=1)
    assert roofline(5e8, 0, d, 'int8') == (1.0, 'compute')
    ms, binds = roofline(5e8, 2e6/2**20, d, 'int8')
    assert ms == pytest.approx(2.0) and binds == 'bandwidth'


def test_a_side_of_the_roofline_that_is_not_known_is_said():
    assert roofline(1e9, 1, Device('x', 'x', 'server'), 'int8') == (None, 'not known')
    assert 'bandwidth not known' in roofline(1e9, 1, device('hailo-8'), 'int8')[1]
    assert roofline(1e9, 0, device('raspberry-pi-5'), 'int8')[1] == 'compute' and roofline(1e9, 0, device('jetson-orin-nano'), 'fp16')[1] == 'compute (at its fp32 peak)'
    assert 'operations not known' in roofline(None, 1, device('l4'), 'int8')[1]
    assert fit({'parameters': 1e6}, Device('x', 'x', 'server', memory_mb=100)).row.latency_is == 'not known'


def test_tokens_a_second_are_bandwidth_over_bytes():
    row = by_precision(fit(LLAMA, device('l4')))['fp16']
    assert row.tokens_s == pytest.approx(300e9/(6_738_415_616*2 + 2**31)) and row.binds == 'bandwidth'


def test_energy_is_power_times_latency():
    row = by_precision(fit(SMALL, device('raspberry-pi-5')))['int8']
    assert row.energy_mj == pytest.approx(12*row.latency_ms)
    assert by_precision(fit(SMALL, device('qualcomm-rb5')))['int8'].energy_mj is None   # its power is not known


def test_hot_air_slows_a_device_with_a_documented_throttling_point():
    pi = device('raspberry-pi-5')
    cool, hot = fit(SMALL, pi).row, fit(SMALL, pi, ambient_c=50).row
    assert cool.sustained_ms == cool.latency_ms and hot.sustained_ms == pytest.approx(hot.latency_ms*(80 - 25)/(80 - 50))
    assert fit(SMALL, pi, ambient_c=80).row.sustained_ms is None and fit(SMALL, pi, ambient_c=80).warnings
    assert fit(SMALL, pi, ambient_c=50, rated_c=50).row.sustained_ms == hot.latency_ms


def test_without_a_documented_throttling_point_heat_is_not_known():
    f = fit(SMALL, device('jetson-orin-nano'), ambient_c=60)
    assert f.share is None and f.row.sustained_ms is None and 'not known' in f.warnings[0]


def test_air_outside_what_a_device_is_made_for_is_said():
    assert any('outside' in w for w in fit(SMALL, device('apple-m-series'), ambient_c=55).warnings)


def test_measured_beats_estimated_on_the_device_where_it_was_measured():
    rows = [{'artifact': 'reference', 'precision': 'fp32', 'device': 'local', 'p50_ms': 1.0, 'rss_mb': 300.0, 'verdict': 'pass'},
            {'artifact': 'slow', 'precision': 'int8', 'device': 'local', 'p50_ms': 9.0, 'rss_mb': 95.0, 'verdict': 'pass'},
            {'artifact': 'broken', 'precision': 'int8', 'device': 'local', 'p50_ms': 0.1, 'rss_mb': 50.0, 'verdict': 'fail'},
            {'artifact': 'fast', 'precision': 'int8', 'device': 'local', 'p50_ms': 5.0, 'model_p50_ms': 3.0, 'rss_mb': 90.0, 'verdict': 'pass'}]
    here = by_precision(fit(SMALL, device('local'), measurements=rows))
    assert (here['int8'].latency_ms, here['int8'].latency_is, here['int8'].binds, here['int8'].needed_mb) == (3.0, 'measured', 'p50 of fast', 90.0)
    assert here['fp32'].latency_is != 'measured'   # the reference never ships
    judged = [r | {'device': 'jetson-orin-nano', 'verdict': 'not run here'} for r in rows]   # judged for the board, measured here
    assert all(r.latency_is == 'estimate' for r in fit(SMALL, device('jetson-orin-nano'), measurements=judged).rows)
    assert not any(r.latency_is == 'measured' for r in fit(SMALL, device('local'), measurements=[r | {'emulated': 'twice as slow'} for r in rows]).rows)
    counted = rows + [rows[-1] | {'artifact': 'counted', 'model_p50_ms': 2.0, 'energy_mj': 7.0, 'energy_how': 'measured: RAPL package'}]
    assert (by_precision(fit(SMALL, device('local'), measurements=counted))['int8'].energy_mj, here['int8'].energy_is) == (7.0, 'not known')
    there = [{'precision': 'int8', 'device': 'jetson-orin-nano', 'p50_ms': 1.5}]
    assert by_precision(fit(SMALL, device('jetson-orin-nano'), measurements=there))['int8'].latency_ms == 1.5


sizes = st.builds(ModelSize, parameters=st.floats(1, 1e12), macs=st.floats(0, 1e13), activations_mb=st.floats(0, 1e5))
boards = st.builds(Device, name=st.just('x'), what=st.just('x'), tier=st.sampled_from(['accelerator', 'server', 'microcontroller']), memory_mb=st.floats(0.1, 1e6), flash_mb=st.floats(0.1, 1e4),
                   int8_tops=st.floats(1e-4, 1e4), fp16_gflops=st.floats(0.1, 1e6), fp32_gflops=st.floats(0.1, 1e6), bandwidth_gb_s=st.floats(0.01, 1e4))


@settings(max_examples=80, deadline=None)
@given(sizes, boards, st.floats(1, 100))
def test_a_better_device_is_never_slower_and_holds_no_less(m, d, times):
    before = fit(m, d)
    for better in (replace(d, bandwidth_gb_s=d.bandwidth_gb_s*times), replace(d, int8_tops=d.int8_tops*times, fp16_gflops=d.fp16_gflops*times, fp32_gflops=d.fp32_gflops*times)):
        assert all(b.latency_ms <= a.latency_ms for a, b in zip(before.rows, fit(m, better).rows))
    assert all(b.fits >= a.fits and b.headroom_mb >= a.headroom_mb for a, b in zip(before.rows, fit(m, replace(d, memory_mb=d.memory_mb*times, flash_mb=d.flash_mb*times)).rows))


@settings(max_examples=80, deadline=None)
@given(sizes, boards, st.floats(1, 10))
def test_lower_precision_needs_no_more_memory_and_a_larger_model_no_less(m, d, times):
    rows, larger = by_precision(fit(m, d)), fit(replace(m, parameters=m.parameters*times), d).rows
    assert rows['fp32'].needed_mb >= rows['fp16'].needed_mb >= rows['int8'].needed_mb
    assert rows['int8'].weights_mb >= rows['int4'].weights_mb and rows['fp16'].needed_mb >= rows['int4'].needed_mb
    assert all(b.needed_mb >= a.needed_mb and b.latency_ms >= a.latency_ms for a, b in zip(fit(m, d).rows, larger))
    assert all(math.isclose(r.needed_mb, r.weights_mb + r.kv_mb + r.activations_mb + r.runtime_mb) for r in rows.values())


@settings(max_examples=60, deadline=None)
@given(st.floats(-50, 140), st.floats(0, 30))
def test_hotter_air_never_makes_a_device_faster(ambient, more):
    pi = device('raspberry-pi-5')
    assert 0 <= sustained_share(pi, min(ambient + more, 150)) <= sustained_share(pi, ambient) <= 1


# figures commonly stated

def test_the_table_of_a_7b_model_is_checked_cell_by_cell():
    cells = {(r['model'], r['figure']): r for r in check_7b_table()}
    assert len(cells) == 20
    assert cells['7 B Q4_K_M', 'size']['computed'] == '4.08 GB' and cells['7 B Q4_K_M', 'memory']['verdict'].startswith('agrees')
    assert cells['7 B Q5_K_M', 'speed vs FP16']['verdict'].startswith('off') and cells['13 B at 4 bits', 'memory']['verdict'].startswith('off')
    assert cells['INT8', 'weights vs FP32']['verdict'].startswith('agrees')


# counting

def write_onnx(path, nodes, weights, inputs, outputs, **opsets):
    graph = helper.make_graph(nodes, 'g', [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
                              [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()], [numpy_helper.from_array(v, k) for k, v in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18), *(helper.make_opsetid(k, v) for k, v in opsets.items())], ir_version=10), path)
    return path


def count_with_hooks(net, *inputs):
    "Parameters and multiply-accumulates by running the network."
    import torch
    from torch import nn
    macs = []
    def hook(module, given, out):
        if isinstance(module, nn.Conv2d): macs.append(out.numel()*module.weight[0].numel())
        elif isinstance(module, nn.ConvTranspose2d): macs.append(given[0].numel()*module.weight[0].numel())
        elif isinstance(module, nn.Linear): macs.append(out.numel()*module.in_features)
    handles = [m.register_forward_hook(hook) for m in net.modules()]
    with torch.inference_mode(): net.eval()(*inputs)
    for h in handles: h.remove()
    return sum(p.numel() for p in net.parameters()), sum(macs)


def test_counts_of_an_exported_network_are_those_of_running_it(tmp_path):
    torch = pytest.importorskip('torch')
    from torch import nn
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.ReLU6(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.ConvTranspose2d(12, 6, 2, 2), nn.Flatten(), nn.Linear(6*32*32, 5)).eval()
    torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), str(tmp_path/'net.onnx'), dynamo=True, external_data=False, verbose=False)
    m = size_of_onnx(tmp_path/'net.onnx')
    assert (m.parameters, m.macs) == count_with_hooks(net, torch.zeros(1, 3, 32, 32))


def test_counts_of_efficientnet_lite0_are_those_of_running_it():
    torch = pytest.importorskip('torch')
    from edgenb.vision import STAGES, EfficientNetLite0
    assert STAGES == LITE0_STAGES
    torch.set_num_threads(1)
    net, m = EfficientNetLite0(classes=5), size_of_lite0(96, 5)
    parameters, macs = count_with_hooks(net, torch.zeros(1, 3, 96, 96))
    norms = sum(p.numel() for n, p in net.named_parameters() if '.norm.' in n)
    assert m.macs == macs and m.parameters == parameters - norms//2   # folding leaves one bias of the two numbers a channel


def test_open_dimensions_are_one_example_and_said(tmp_path):
    path = write_onnx(tmp_path/'m.onnx', [helper.make_node('MatMul', ['x', 'w'], ['y'])], {'w': np.zeros((64, 16), 'f')}, {'x': ['batch', 'tokens', 64]}, {'y': ['batch', 'tokens', 16]})
    m = size_of_onnx(path, length=10)
    assert m.parameters == 1024 and m.macs == 10*64*16 and 'tokens taken as 10' in m.note and 'batch' not in m.note


def test_a_quantized_file_has_the_counts_of_its_float_one_and_its_precision(tmp_path):
    scale = {'s': np.float32(0.1), 'z': np.int8(0), 'sw': np.full(4, 0.1, 'f'), 'zw': np.zeros(4, np.int8), 'sb': np.full(4, 0.01, 'f'), 'zb': np.zeros(4, np.int32)}
    nodes = [helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['q']), helper.make_node('DequantizeLinear', ['q', 's', 'z'], ['d']),
             helper.make_node('DequantizeLinear', ['w', 'sw', 'zw'], ['dw'], axis=0), helper.make_node('DequantizeLinear', ['b', 'sb', 'zb'], ['db'], axis=0), helper.make_node('Conv', ['d', 'dw', 'db'], ['y'])]
    path = write_onnx(tmp_path/'q.onnx', nodes, scale | {'w': np.zeros((4, 3, 3, 3), np.int8), 'b': np.zeros(4, np.int32)}, {'x': [1, 3, 8, 8]}, {'y': [1, 4, 6, 6]})
    m = size_of_onnx(path)
    assert (m.parameters, m.macs, m.precision) == (4*27 + 4, 6*6*4*27, 'int8')
    assert m.activations_mb == (3*64 + 4*36)*4/2**20


def test_4_bit_products_of_onnx_runtime_are_counted(tmp_path):
    node = helper.make_node('MatMulNBits', ['x', 'w', 's'], ['y'], domain='com.microsoft', K=64, N=16, bits=4, block_size=32)
    path = write_onnx(tmp_path/'n.onnx', [node], {'w': np.zeros((16, 2, 16), np.uint8), 's': np.zeros(32, 'f')}, {'x': [1, 64]}, {'y': [1, 16]}, **{'com.microsoft': 1})
    m = size_of_onnx(path)
    assert (m.parameters, m.macs, m.precision) == (1024, 1024, 'int4')


def test_operations_that_are_not_counted_are_named(tmp_path):
    node = helper.make_node('LSTM', ['x', 'w', 'r'], ['', 'y'], hidden_size=4)
    path = write_onnx(tmp_path/'l.onnx', [node], {'w': np.zeros((1, 16, 8), 'f'), 'r': np.zeros((1, 16, 4), 'f')}, {'x': [5, 1, 8]}, {'y': [1, 1, 4]})
    assert 'LSTM not counted' in size_of_onnx(path).note


CONFIG = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 128,
          'num_hidden_layers': 3, 'vocab_size': 100, 'max_position_embeddings': 512, 'tie_word_embeddings': True}


def test_a_decoder_is_counted_from_its_configuration_as_transformers_builds_it(tmp_path):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('torch')
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ('model_type', 'architectures')}))
    (tmp_path/'config.json').write_text(json.dumps(CONFIG))
    m = size_of_transformers(tmp_path)
    assert m.parameters == sum(p.numel() for p in net.parameters())
    assert (m.layers, m.kv_heads, m.head_dim, m.context, m.language_model) == (3, 2, 16, 512, True) and 'configuration' in m.note


def test_weights_beside_a_configuration_are_counted_from_their_header(tmp_path):
    from safetensors.numpy import save_file
    (tmp_path/'config.json').write_text(json.dumps(CONFIG))
    save_file({'a': np.zeros((10, 20), np.float16), 'b': np.zeros(7, 'f')}, tmp_path/'model-1.safetensors')
    save_file({'c': np.zeros((3, 3), 'f')}, tmp_path/'model-2.safetensors')
    assert size_of_transformers(tmp_path).parameters == 216 and safetensors_shapes(tmp_path/'model-2.safetensors') == {'c': (3, 3)}


def test_an_encoder_is_counted_for_a_number_of_tokens(tmp_path):
    from safetensors.numpy import save_file
    (tmp_path/'config.json').write_text(json.dumps({'model_type': 'bert', 'architectures': ['BertModel'], 'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'vocab_size': 10}))
    save_file({'embeddings': np.zeros((10, 8), 'f'), 'layer': np.zeros((8, 8), 'f')}, tmp_path/'model.safetensors')
    m = size_of_transformers(tmp_path, length=16)
    assert m.parameters == 144 and m.macs == 64*16 + 2*16**2*8 and not m.language_model


# runs and recipes

@pytest.fixture
def workspace(tmp_path):
    "A workspace with a recipe and a run of it that went as far as `verify`."
    (tmp_path/'settings.ini').write_text('[runs]\nfolder = runs\n')
    (tmp_path/'nbs'/'recipes').mkdir(parents=True)
    cells = [{'cell_type': 'markdown', 'metadata': {}, 'source': '# Toy\n\n> A toy.'},
             {'cell_type': 'code', 'metadata': {'tags': ['parameters']}, 'source': "model_name_or_path: str = 'bundled:efficientnet-lite0'  # model\nsize: int = 96  # pixels\naccept: list = []\n", 'outputs': [], 'execution_count': None}]
    (tmp_path/'nbs'/'recipes'/'toy.ipynb').write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    return tmp_path


def finish_run(workspace, when, p50=3.0):
    run = workspace/'runs'/'toy'/when
    (run/'04-compile.x').mkdir(parents=True)
    write_onnx(run/'04-compile.x'/'onnxruntime-fp32.onnx', [helper.make_node('Gemm', ['x', 'w'], ['y'])], {'w': np.zeros((32, 4), 'f')}, {'x': [1, 32]}, {'y': [1, 4]})
    rows = [{'artifact': 'onnxruntime-int8', 'runtime': 'onnxruntime', 'precision': 'int8', 'device': 'local', 'p50_ms': p50, 'model_p50_ms': p50, 'rss_mb': 80.0, 'verdict': 'pass'}]
    for n, room, wrote, result in [(3, 'squeeze', {}, {'parameters': 128}), (4, 'compile', {'04-compile.x/onnxruntime-fp32.onnx': '0'}, {}), (5, 'verify', {}, {'rows': rows})]:
        Card(room=room, key='k', asked={}, read={}, wrote=wrote, result=result, data='synthetic', started='', seconds=0.0, environment={}, edgenb='0').save(run/f'{n:02}-{room}.json')
    return run


def test_a_run_is_counted_in_its_files_and_brings_its_measurements(workspace):
    m, rows = size_of_run(Run(finish_run(workspace, '2026-01-01')))
    assert (m.parameters, m.macs) == (128, 128) and rows[0]['p50_ms'] == 3.0 and 'counted in onnxruntime-fp32.onnx' in m.note


def test_a_recipe_is_its_last_run_or_the_model_it_starts_from(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    before, rows = size_of_recipe('toy')
    assert before.macs == size_of_lite0(96).macs and rows == []
    finish_run(workspace, '2026-01-01'); finish_run(workspace, '2026-01-02', p50=2.0)
    after, rows = size_of_recipe('toy')
    assert after.parameters == 128 and rows[0]['p50_ms'] == 2.0


def test_fit_shows_the_measured_latency_of_a_run(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    finish_run(workspace, '2026-01-01')
    assert main(['fit', 'toy', '--device', 'local']) == 0
    lines = {l.split()[2]: l for l in capsys.readouterr().out.splitlines() if l.startswith('local ')}
    assert '3 ms measured' in lines['int8'] and 'estimate' in lines['fp32'] and 'measured' not in lines['fp32']


# the command

def test_fit_without_a_device_has_a_line_for_each(capsys):
    assert main(['fit', '135M']) == 0
    out = capsys.readouterr().out
    assert {l.split()[0] for l in out.splitlines()[2:-1]} == set(devices()) and 'measured' not in ''.join(l for l in out.splitlines() if l.startswith('l4 '))


def test_fit_as_json_can_be_read_back(capsys):
    assert main(['fit', '7B', '--device', 'jetson-orin-nano', '--ambient', '40', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['model']['parameters'] == 7e9 and [r['precision'] for r in found['fits'][0]['rows']] == list(PRECISIONS) and found['fits'][0]['share'] is None


def test_fit_loads_no_framework():
    code = "import sys; from edgenb.cli import main; main(['fit', '7B']); print([m for m in ('torch', 'transformers', 'papermill', 'pandas', 'onnxruntime', 'sklearn') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stderr.strip() == '[]', done.stderr


@pytest.mark.parametrize('args, says', [
    (['7B', '--device', 'jetson-orin-nona'], 'Did you mean jetson-orin-nano'), (['wafre'], 'Did you mean wafer'), (['-1B'], None), (['no-such.onnx'], 'does not exist'),
    (['7B', '--ambient', '900'], 'between -60 and 150'), (['7B', '--ambient', 'nan'], 'between -60 and 150')])
def test_what_fit_cannot_answer_is_one_line(args, says, capsys, monkeypatch):
    monkeypatch.chdir(root)
    try: code = main(['fit', *args])
    except SystemExit as e: code = e.code   # argparse takes -1B for an option
    err = capsys.readouterr().err
    assert code == 2 and 'Traceback' not in err
    if says: assert says in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize('name, content, says', [
    ('garbage.onnx', b'\x00garbage', 'cannot be read as ONNX'), ('empty.onnx', b'', 'cannot be read as ONNX'), ('text.txt', b'7B', 'cannot be counted')])
def test_a_file_that_is_no_model_is_refused(tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(EdgenbError, match=says): find_model(str(tmp_path/name))


def test_an_onnx_file_without_weights_is_refused(tmp_path):
    with pytest.raises(EdgenbError, match='holds no weights'): size_of_onnx(write_onnx(tmp_path/'r.onnx', [helper.make_node('Relu', ['x'], ['y'])], {}, {'x': [1]}, {'y': [1]}))


@pytest.mark.parametrize('config, says', [
    ('not json', 'cannot be read as JSON'), ('[]', 'must hold a JSON object'), ('{}', 'holds no safetensors'), ('{"model_type": "llama"}', 'describes no model'),
    ('{"model_type": "llama", "hidden_size": "big", "num_attention_heads": 2, "intermediate_size": 2, "vocab_size": 1}', 'describes no model')])
def test_a_folder_that_is_no_model_is_refused(tmp_path, config, says):
    (tmp_path/'config.json').write_text(config)
    with pytest.raises(EdgenbError, match=says): find_model(str(tmp_path))


def test_an_empty_folder_and_a_torn_safetensors_file_are_refused(tmp_path):
    with pytest.raises(EdgenbError, match='neither the folder of a run'): find_model(str(tmp_path))
    (tmp_path/'config.json').write_text(json.dumps(CONFIG))
    (tmp_path/'model.safetensors').write_bytes((200).to_bytes(8, 'little') + b'{"a": ')
    with pytest.raises(EdgenbError, match='not a safetensors file'): find_model(str(tmp_path))


def test_a_run_without_a_squeezed_network_says_so(workspace):
    run = finish_run(workspace, '2026-01-01')
    (run/'03-squeeze.json').unlink()
    with pytest.raises(EdgenbError, match='no squeezed network yet'): find_model(str(run))


@pytest.mark.parametrize('model, says', [
    ({'parameters': -5}, 'parameters = -5'), ({'parameters': 0}, 'at least 1'), ({'parameters': float('nan')}, 'out of range'), ({'parameters': '7B'}, 'out of range'), ({}, "needs 'parameters'"),
    ({'parametres': 5}, 'Did you mean parameters'), ({'parameters': 5, 'macs': -1}, 'macs = -1'), ({'parameters': 5, 'bytes_per_weight': 0}, 'bytes_per_weight = 0'),
    ({'parameters': 5, 'precision': 'int9'}, 'Did you mean int8'), ('7B', 'ModelSize or a dict')])
def test_a_model_that_cannot_be_is_refused(model, says):
    with pytest.raises(EdgenbError, match=says): fit(model, device('l4'))
