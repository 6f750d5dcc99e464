"""What edgenb ships by default beside what Microsoft Olive and ONNX Runtime's own quantizer ship by default: one trained network, one FP32 ONNX file, one set of calibration images.

`python benchmarks/peers.py [--run FOLDER] [--olive-python PATH] [--timing-runs 300]`. FOLDER is a run with the rooms data and tune (the wafer recipe leaves one), which is only read;
without it the network is trained as `elpv.py` does. PATH is the Python of an environment that holds Olive; without it one is made in runs/peers-benchmark (needs pip's index).

Every file is judged by edgenb's parity gate (accuracy, tolerance 0.02) on the same frozen test images and timed in one interleaved run on one thread, behind the same pipeline.
edgenb's choice is by the code that `verify` uses, without budgets: once of onnxruntime, its default, and once of all runtimes for machines like this one. Olive has a search too,
over the options of its passes; it wants an evaluator and goals from its user, so it is not what one gets by default, and is not in the table. Of its commands for a whole model,
`optimize` leaves FP32 unless told otherwise, and for 8 bits it calibrates on WikiText, whatever the network; `quantize` is for 4-bit weights unless `--implementation ort` is given.
"""
import argparse, hashlib, json, os, shutil, subprocess, sys
from importlib.metadata import version
from pathlib import Path
import numpy as np
from edgenb.choice import choose
from edgenb.compile import compile, network_of
from edgenb.core import EdgenbError, Run, progress, settings
from edgenb.data import data, examples_of
from edgenb.measure import machine, measure_all
from edgenb.runtime import runtime, runtimes, size_mb
from edgenb.runtimes.onnx import export_onnx, quiet
from edgenb.squeeze import squeeze, squeezed
from edgenb.tune import tune, tuned
from edgenb.verify import answers, interval, parity

OLIVE, METRIC, TOLERANCE = '0.13.0', 'accuracy', 0.02
GATES = ['label accuracy', 'leakage']   # of the data certificate, which the benchmark accepts as `elpv.py` does


def trained(folder, given):
    "A run with data, tune and squeeze in `folder`: copied from `given`, or made."
    run = Run(folder/'run')
    if given:
        for room in ('data', 'tune'): Run(given).card(room)   # says what is missing
        run.path.mkdir(parents=True, exist_ok=True)
        for source in (p for n in ('01', '02', '03') for p in Path(given).glob(f'{n}-*')):
            shutil.copytree(source, run.path/source.name, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, run.path)
        if not (Path(given)/'03-squeeze.json').exists(): squeeze(run)
        return run
    try: card = data(run, source='bundled:elpv', negative='functional')
    except EdgenbError as e:
        print(f'skipped, the images are not here: {e}')
        sys.exit()
    gates = {g['gate']: g['passed'] for g in card.result['certificate']['gates']}
    tune(run, size=224, early_size=160, early_epochs=7, num_train_epochs=12, accept_gates=[g for g in GATES if not gates[g]])
    squeeze(run)
    return run


def olive_python(folder, given):
    "Path of a Python that has Olive; its environment is made where none is given."
    packages = [f'olive-ai=={OLIVE}', f"onnxruntime=={version('onnxruntime')}", 'requests']   # Olive imports requests without declaring it
    python = Path(given) if given else folder/'olive-environment'/('Scripts' if os.name == 'nt' else 'bin')/'python'
    by_hand = f"make an environment by hand (python -m venv FOLDER; FOLDER/bin/pip install {' '.join(packages)}) and pass --olive-python FOLDER/bin/python"
    def has():
        try: return subprocess.run([python, '-c', 'import requests, onnxruntime, olive; print(olive.__version__, onnxruntime.__version__)'], capture_output=True, text=True, env=alone(), timeout=300)
        except OSError as e: return subprocess.CompletedProcess([], 1, '', str(e))
    found = has()
    if found.returncode and not given:
        for command in ([sys.executable, '-m', 'venv', '--clear', folder/'olive-environment'], [python, '-m', 'pip', 'install', '--quiet', *packages]):
            try: done = subprocess.run(command, capture_output=True, text=True, env=alone())
            except OSError as e: done = subprocess.CompletedProcess(command, 1, '', str(e))
            if done.returncode:
                shutil.rmtree(folder/'olive-environment', ignore_errors=True)
                raise EdgenbError(f"peers: the environment for Olive could not be made in {folder/'olive-environment'} ({last_line(done)}): {by_hand}")
        found = has()
    if found.returncode: raise EdgenbError(f'peers: {python} does not run Olive ({last_line(found)}): {by_hand}')
    wanted = [OLIVE, version('onnxruntime')]
    if found.stdout.split()[-2:] != wanted: print(f"Note: {python} has Olive and onnxruntime {' and '.join(found.stdout.split()[-2:])}, this benchmark was written for {' and '.join(wanted)}.")
    return python


def last_line(done): return ((done.stderr or done.stdout).strip().splitlines() or ['it said nothing'])[-1][:300]

def alone():
    "The environment of a process that shall see neither edgenb nor the network."
    return {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OLIVE_DISABLE_TELEMETRY': '1', 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}


def by_olive(python, fp32, calibration, folder):
    "({name: file that Olive wrote}, {name: why it wrote none}): its two 8-bit passes, then its commands for a whole model, everything at its defaults."
    folder.mkdir(exist_ok=True)
    raw = folder/'calibration'/'image'   # Olive's RawDataContainer: a folder an input, a file an example
    shutil.rmtree(raw.parent, ignore_errors=True); raw.mkdir(parents=True)
    for i, x in enumerate(calibration): x['image'].tofile(raw/f'{i:04}.bin')
    images = {'data_config': {'name': 'calibration', 'type': 'RawDataContainer', 'load_dataset_config': {
        'data_dir': str(raw.parent), 'input_names': ['image'], 'input_shapes': [list(calibration[0]['image'].shape)]}}}
    ways = {'OnnxStaticQuantization': ['run-pass', '--pass-name', 'OnnxStaticQuantization', '--pass-config', json.dumps(images)],
            'OnnxDynamicQuantization': ['run-pass', '--pass-name', 'OnnxDynamicQuantization'],
            'quantize --implementation ort': ['quantize', '--implementation', 'ort'],
            'auto-opt --precision int8': ['auto-opt', '--precision', 'int8'],
            'optimize': ['optimize'], 'optimize --precision int8': ['optimize', '--precision', 'int8'], 'quantize': ['quantize']}
    made, refused = {}, {}
    for name, way in progress(ways.items(), desc='Olive', unit='command'):
        out = folder/name.replace(' ', '_')
        shutil.rmtree(out, ignore_errors=True); out.mkdir()
        done = subprocess.run([python, '-m', 'olive', *way, '-m', fp32, '-o', out/'out'], cwd=out, env=alone(), capture_output=True, text=True)
        (out/'log.txt').write_text(done.stdout + done.stderr, encoding='utf-8')
        files = sorted((out/'out').rglob('*.onnx'))
        if done.returncode or len(files) != 1: refused[name] = last_line(done) if done.returncode else f'it left {len(files)} ONNX files'
        else: made[name] = files[0]
    return made, refused


def by_onnxruntime(fp32, calibration, path):
    "`quantize_static` with nothing but what it insists on."
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    class Images(CalibrationDataReader):
        rows = iter(calibration)
        def get_next(self): return next(self.rows, None)
    with quiet(): quantize_static(str(fp32), str(path), Images())
    return path


def same_files(peers):
    "{name of all that are the same file, byte by byte: path}."
    found = {}
    for name, path in peers.items(): found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append((name, path))
    return {' = '.join(n for n, _ in group): group[0][1] for group in found.values()}


def loaded(name, path):
    "The model, or one that says why it cannot be loaded whenever it is asked."
    try: return runtime(name).load(path)
    except EdgenbError as e:
        why = e
        def model(x): raise why
        return model


def judged(run, candidates, timing_runs):
    "A row of the parity report for each of `candidates` (artifact, runtime, path), the first being the reference."
    (_, pipeline), tests = tuned(run), examples_of(run, 'test')
    y, negative = np.array([pipeline.classes.index(e.label) for e in tests]), pipeline.step('decide')['negative']
    kept = answers({name: loaded(r, path) for name, r, path in candidates}, pipeline, tests, negative)
    figures = measure_all([{'artifact': name, 'runtime': r, 'file': path, 'pipeline': run.file('tune', 'pipeline.json'), 'inputs': [e.path for e in tests[:50]]} for name, r, path in candidates],
                          runs=timing_runs, num_threads=1, batches=(), bar=progress)
    rows = []
    for (name, r, path), figure in zip(candidates, figures):
        row = {'artifact': name, 'runtime': r, 'size_mb': size_mb(path), **{k: figure[k] for k in ('p50_ms', 'p95_ms', 'model_p50_ms', 'model_p95_ms', 'rss_mb', 'energy_mj', 'cpu_ms', 'spread')}}
        why = figure['error'] or (kept[name] if isinstance(kept[name], EdgenbError) else '')
        if why: rows.append(row | {'value': None, 'verdict': 'fail', 'reason': f'it cannot decide: {why}', 'over': {}}); continue
        p = parity(next(iter(kept.values())), kept[name], (None, y), METRIC, TOLERANCE)
        rows.append(row | {k: getattr(p, k) for k in ('value', 'low', 'high', 'delta', 'delta_low', 'delta_high', 'verdict', 'reason')} | {'over': {}, 'auc': interval(y, kept[name], 'auc')})
    return rows, len(tests)


def table(rows, chosen):
    "Markdown; the ratios are of the model alone, and in brackets from the file's bytes to the decision; CPU time is of the latter, and the figure to trust where the machine was busy."
    by_name = {r['artifact']: r for r in rows}
    def ratio(r, c): return '–' if not c or None in (r['p50_ms'], by_name[c]['p50_ms']) else f"{by_name[c]['model_p50_ms']/r['model_p50_ms']:.2f} ({by_name[c]['p50_ms']/r['p50_ms']:.2f})"
    ships = {'pass': 'yes', 'undecided': 'only if accepted by name', 'fail': '**no**'}
    heads = [f'{c or "nothing"} / this' for c in chosen]
    out = [f"| artifact | MB | {METRIC} | AUC | difference | model p50 / p95 ms | whole p50 / p95 ms | CPU ms | {' | '.join(heads)} | would edgenb let it ship? |", '|' + '---|'*(9 + len(heads))]
    for i, r in enumerate(rows):
        said = 'the reference' if i == 0 else f"{ships[r['verdict']]}: {r['reason']}"
        quality = ['–']*3 if r['value'] is None else [f"{r['value']:.4f} [{r['low']:.4f}, {r['high']:.4f}]", '{:.4f} [{:.4f}, {:.4f}]'.format(*r['auc']),
                                                      f"{r['delta']:+.4f} [{r['delta_low']:+.4f}, {r['delta_high']:+.4f}]" if i else '']
        times = ['–']*3 if r['p50_ms'] is None else [f"{r['model_p50_ms']:.2f} / {r['model_p95_ms']:.2f}", f"{r['p50_ms']:.2f} / {r['p95_ms']:.2f}", f"{r['cpu_ms']:.2f}"]
        name = f"**{r['artifact']}**" if r['artifact'] in chosen else r['artifact']
        out.append(' | '.join([f"| {name} | {r['size_mb']:.2f}", *quality, *times, *(ratio(r, c) for c in chosen), f'{said} |']))
    return '\n'.join(out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', help='a run with data and tune; default: one is made'); p.add_argument('--olive-python', help='of an environment with Olive; default: one is made')
    p.add_argument('--timing-runs', type=int, default=300); args = p.parse_args()
    folder = (settings().runs/'peers-benchmark').absolute()
    folder.mkdir(parents=True, exist_ok=True)
    python = olive_python(folder, args.olive_python and Path(args.olive_python).absolute())   # before anything that takes long
    run = trained(folder, args.run)
    net, pipeline = squeezed(run)
    fp32 = export_onnx(network_of(net, pipeline), folder/'fp32.onnx')
    ids = next(c['calibration'] for c in json.loads(run.file('squeeze', 'candidates.json').read_text(encoding='utf-8')) if c['precision'] == 'int8')
    held = {e.id: e for e in examples_of(run, 'validation')}
    calibration = [{'image': pipeline.before(held[i].read())[None]} for i in ids]
    made, refused = by_olive(python, fp32, calibration, folder/'olive')
    peers = same_files({f'Olive {n}': path for n, path in made.items()} | {'onnxruntime quantize_static': by_onnxruntime(fp32, calibration, folder/'quantize_static.onnx')})
    wanted = [n for n, r in runtimes().items() if r.variants and 'server' in r.tiers and not r.missing() and not r.missing(build=True)]
    compiled = compile(run, runtimes=wanted, metric=METRIC, tolerance=TOLERANCE).result
    ours = [(a['artifact'], a['runtime'], run.file('compile', a['file'])) for a in compiled['artifacts']]
    rows, n = judged(run, [('tuned network', 'torch', run.file('tune', 'model.safetensors')), *((f'edgenb {name}', r, path) for name, r, path in ours), *((name, 'onnxruntime', path) for name, path in peers.items())], args.timing_runs)
    own = [r for r in rows if r['artifact'].startswith('edgenb ')]
    picks = [choose([r for r in own if r['runtime'] == 'onnxruntime']), choose(own)]
    here = machine()
    print(f"\n{run.card('data').data} images, {n} of them for the test, {len(calibration)} for calibration; edgenb {here['edgenb']}, Olive {OLIVE}, onnxruntime {version('onnxruntime')}; {here['processor']}, "
          f"1 thread, load {here['load']} on {here['cores']} cores; {args.timing_runs} decisions each, medians of blocks of 10 differ by up to {max(r['spread'] or 1 for r in rows):.2f} times\n")
    print(table(rows, list(dict.fromkeys(c.artifact for c in picks))))
    for what, c in zip(('onnxruntime, the default', f"all of {', '.join(wanted)}"), picks): print(f'\nedgenb ships, of {what}: {c.artifact}; {c.why}.')
    spent = {r: sum(t['seconds'] for t in compiled['tried'] if t['runtime'] == r) for r in wanted}
    print(f"\nedgenb built and screened {', '.join(f'{r} in {s:.0f} s' for r, s in spent.items())}.")
    for name, why in refused.items(): print(f'\n`olive {name}` made nothing: {why}')


if __name__ == '__main__':
    try: main()
    except EdgenbError as e: sys.exit(str(e))
