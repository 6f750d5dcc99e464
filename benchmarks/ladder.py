"""The full ladder for two networks that are no image classifiers: a 1-D convolution autoencoder on sensor windows (synthetic) and the MiniLM text encoder.

`python benchmarks/ladder.py [sensor] [text] [--threads 1]`. Texts are the first sentences of the docstrings of Python's standard library (real, and on every machine);
what must hold is that the nearest neighbour of a text stays the nearest. The search chooses on other texts and windows than the ones that judge.
For images: `edgenb run wafer -p all_variants true -y 'runtimes: [onnxruntime, openvino, litert, executorch, coreml]'`.
"""
import argparse, ast, os, sys, tempfile
from pathlib import Path
import numpy as np
from edgenb.ladder import ladder, ladder_table
from edgenb.measure import measure_all
from edgenb.runtime import Network, runtimes

TOLERANCE = {'sensor': 0.02, 'text': 0.086}   # of the AUC; of the share of texts whose nearest neighbour stays: half of it is 0.05 less one standard error on 1,000 validation texts


def here(*names): return [n for n in names if not runtimes()[n].missing(build=True)]


def sensor(threads, folder):
    sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
    from nets import sensor_windows, trained_autoencoder
    net = trained_autoencoder()
    def examples(seed):
        x, y = sensor_windows(250, seed)
        return [{'window': w[None]} for w in x], y
    def answer(model, examples):
        score = np.array([np.mean((model(e)['rebuilt'] - e['window'])**2) for e in examples])
        return {'score': score, 'label': (score > 0.1).astype(int)}
    calibration = [{'window': w[None]} for w in sensor_windows(100, 2)[0][:100]]
    return ladder(Network(net, {'window': calibration[0]['window']}, ('rebuilt',)), here('onnxruntime', 'openvino', 'litert', 'executorch', 'tflm', 'coreml'), ['fp32', 'fp16', 'int8'],
                  calibration, answer, examples(3), examples(4), 'auc', TOLERANCE['sensor'], folder, num_threads=threads)


def sentences(n: int) -> list:
    "Short real texts that every machine has."
    library, found = Path(os.__file__).parent, {}
    for path in sorted([*library.glob('*.py'), *library.glob('*/*.py')]):
        if {'test', 'tests', 'site-packages', 'idlelib'} & set(path.parts): continue
        try: tree = ast.parse(path.read_text(encoding='utf-8'))
        except (SyntaxError, UnicodeDecodeError): continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                first = ' '.join(text.split('\n\n')[0].split())
                if 20 < len(first) < 200: found[first] = None
    texts = list(found)
    np.random.default_rng(0).shuffle(texts)
    return texts[:n]


def encoder(length: int | None):
    "The MiniLM encoder as a `Network`, and a function from texts to its inputs; with `length` every text has so many tokens."
    import torch
    from transformers import AutoModel, AutoTokenizer
    from edgenb.weights import fetch
    folder = fetch('bundled:minilm-l6')
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModel.from_pretrained(folder)
        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden*weight).sum(1)/weight.sum(1).clamp(min=1e-9), dim=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fixed = dict(padding='max_length', max_length=length) if length else dict(max_length=128)
    def read(text): return {k: np.array(v, np.int64)[None] for k, v in tokenizer(text, truncation=True, **fixed).items() if k != 'token_type_ids'}
    free = {} if length else {k: {1: 'tokens'} for k in ('input_ids', 'attention_mask')}
    return Network(Encoder().eval(), read('An example.'), ('embedding',), free), read


def nearest(model, examples):
    "Of every text: which is its nearest neighbour, and how near."
    e = np.concatenate([model(x)['embedding'] for x in examples])
    near = e @ e.T
    np.fill_diagonal(near, -2)
    return {'label': near.argmax(1), 'score': near.max(1)}


def text(threads, folder):
    from edgenb.ladder import eager
    results, texts = [], sentences(2100)
    for length, names in ((None, here('onnxruntime', 'openvino')), (48, here('litert', 'executorch', 'coreml'))):
        network, read = encoder(length)
        examples = [read(t) for t in texts]
        calibration, held, test = examples[:100], examples[100:1100], examples[1100:]
        truth = lambda some: nearest(eager(network), some)['label']   # what must stay as it is
        results.append(ladder(network, names, ['fp32', 'fp16', 'int8', 'int4'] if length is None else ['fp32', 'int8'], calibration, nearest, (held, truth(held)), (test, truth(test)), 'accuracy', TOLERANCE['text'],
                              folder/f'{length}', num_threads=threads))
        if length is None: print(against_default(results[0], folder, test, truth(test), threads))
    return {'rows': [r for found in results for r in found['rows']], 'tried': [t for found in results for t in found['tried']], 'choice': results[0]['choice']}


def against_default(found, folder, test, y, threads):
    "The chosen 8-bit encoder beside what ONNX Runtime's `quantize_dynamic` gives with its defaults, in one run."
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from edgenb.runtime import runtime
    from edgenb.runtimes.onnx import quiet
    small = next((t for t in sorted(found['tried'], key=lambda t: t.variant != 'int8-mixed') if t.runtime == 'onnxruntime' and t.precision == 'int8' and t.holds), None)
    if small is None: return 'No 8-bit encoder of ONNX Runtime holds.'
    model = onnx.load(str(folder/'None'/'onnxruntime-fp32.onnx'))
    del model.graph.value_info[:]
    onnx.save(model, str(folder/'bare.onnx'))
    with quiet(): quantize_dynamic(str(folder/'bare.onnx'), str(folder/'default.onnx'))
    length = max(lengths := [e['input_ids'].shape[1] for e in test], key=lengths.count)
    some = [e for e in test if e['input_ids'].shape[1] == length][:40]
    np.savez(folder/'some.npz', **{k: np.concatenate([e[k] for e in some]) for k in some[0]})
    files = {'FP32': folder/'None'/'onnxruntime-fp32.onnx', 'quantize_dynamic, defaults': folder/'default.onnx', f'edgenb ({small.why.split(":")[0]})': small.path}
    rows = measure_all([{'artifact': n, 'runtime': 'onnxruntime', 'file': f, 'pipeline': None, 'inputs': folder/'some.npz'} for n, f in files.items()], runs=400, num_threads=threads, batches=())
    out = ['| encoder | nearest neighbour kept | p50 ms | of the default\'s time | MB |', '|---|---|---|---|---|']
    for r, f in zip(rows, files.values()):
        kept = np.mean(nearest(runtime('onnxruntime').load(f), test)['label'] == y)
        out.append(f"| {r['artifact']} | {kept:.3f} | {r['p50_ms']:.2f} | {r['p50_ms']/rows[1]['p50_ms']:.2f} | {f.stat().st_size/1e6:.1f} |")
    return f'Texts of {length} tokens are timed; {len(test)} texts are judged.\n\n' + '\n'.join(out) + '\n'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('which', nargs='*', default=['sensor', 'text'], metavar='which', help='sensor, text (default: both)'); p.add_argument('--threads', type=int, default=1)
    args = p.parse_args()
    import torch
    torch.set_num_threads(args.threads)
    for name in args.which:
        with tempfile.TemporaryDirectory() as folder:
            found = {'sensor': sensor, 'text': text}[name](args.threads, Path(folder))
            print(f"\n### {name} ({'synthetic windows' if name == 'sensor' else 'real texts'}; tolerance {TOLERANCE[name]})\n\n{ladder_table(found)}\n\n{found['choice'].artifact}: {found['choice'].why}.", flush=True)


if __name__ == '__main__': main()
