"""What an update of a model costs on the line: from one trained version to the next, by adapter, by difference and in full.

`python benchmarks/update_bytes.py [vision] [encoder] [language] [synthetic] [--threads 2] [--keep FOLDER]`. Each case trains two versions for a few steps (so that the weights move as training moves them; nobody should use these models),
quantizes both as `compile` does, and goes from the first to the second. vision: EfficientNet-Lite0, LoRA on 400 ELPV images (real), INT8; the second version goes on from the first. encoder: MiniLM, LoRA of all linear layers on synthetic notes, INT8.
language: SmolLM2-135M-Instruct, LoRA r = 16 on synthetic notes, merged, Q4_K_M; both encoder and language are trained anew from the base, on more notes. synthetic: SmolLM2 with *made-up* low-rank updates of a stated size.

Bytes are those on the line; % of the new file. full: mebibytes by zstd (`chunk_files`); patch-from: zstd with the whole old file as dictionary, long matching, level 10; delta: `make_delta`; bsdiff4: where it is installed.
adapter, language: a bundle that keeps base and adapter apart (level `q4_k_m+adapter`), through the same `plan`; else the low-rank weights (and a new head) in 16 bits, by arithmetic: no runtime for those applies one. CPU is the processor's seconds on one thread.
"""
import argparse, math, shutil, tempfile, time
from pathlib import Path
import numpy as np
import zstandard
from edgenb.core import Run, digest
from edgenb.fleet.delta import CHUNK, LEVEL, assemble, chunk_files, from_folder, make_delta, plan, slot_files

NOTES = {'encoder': (160, 320), 'language': (32, 64)}   # of the first version, of the second


def cpu(call):
    "(result, processor seconds)."
    start = time.process_time()
    return call(), time.process_time() - start


def moved(old: dict, new: dict) -> float:
    "Median over matrices of the size of the change against the size of the weights (Frobenius)."
    return float(np.median([np.linalg.norm(new[n] - w)/np.linalg.norm(w) for n, w in old.items() if w.ndim > 1 and new[n].shape == w.shape]))


def vision(work: Path, threads: int):
    from edgenb.compile import compile
    from edgenb.data import data
    from edgenb.squeeze import squeeze
    from edgenb.tune import tune
    from safetensors.numpy import load_file
    runs, options = [Run(work/'one'), Run(work/'two')], {}
    for run in runs:
        gates = [g['gate'] for g in data(run, source='bundled:elpv', negative='functional', limit=400).result['certificate']['gates'] if not g['passed']]
        tune(run, method='lora', size=128, num_train_epochs=2, accept_gates=gates, num_threads=threads, **options)
        squeeze(run, precisions=['int8'])
        compile(run)
        options = {'start_from': str(runs[0].file('tune', 'model.safetensors')), 'learning_rate': 2e-4, 'head_learning_rate': 5e-4}
    files = [run.file('compile', next(a['file'] for a in run.card('compile').result['artifacts'] if a['precision'] == 'int8')) for run in runs]
    weights = [load_file(run.file('squeeze', 'squeezed.safetensors')) for run in runs]
    adapter = sum(2*(16*(w.shape[0] + math.prod(w.shape[1:])) if w.shape[0] > 2 else w.size) for w in weights[0].values() if w.ndim > 1)   # r = 16, convolutions as matrices; the head whole
    return 'EfficientNet-Lite0 INT8 ONNX (ELPV, real)', *files, moved(*weights), adapter


def encoder(work: Path, threads: int):
    import torch
    from edgenb.clinic import generate
    from edgenb.compile import network_of
    from edgenb.encoder import code_targets, load_encoder, train
    from edgenb.pipeline import text_pipeline
    from edgenb.runtime import runtime
    torch.set_num_threads(threads)
    notes = generate(NOTES['encoder'][1])
    held = generate(40, split='validation')
    classes = sorted({n.codes[0].code for n in notes})
    files, weights = [], []
    for seed, n in enumerate(NOTES['encoder']):
        torch.manual_seed(0)
        net, tokenizer = load_encoder('bundled:minilm-l6', len(classes))
        pipeline = text_pipeline(classes, tokenizer, 96, several=True).with_step('tokens', pad=net.pad)
        def read(some):
            some = [s for s in some if s.codes[0].code in classes]
            y = np.array([classes.index(s.codes[0].code) for s in some])
            return np.stack([pipeline.before(s.text.encode()) for s in some]), y, code_targets(y, [{classes.index(c.code) for c in s.codes if c.code in classes} for s in some], len(classes))
        net, history = train(net, read(notes[:n]), read(held), 3, 8, 2e-3, 16, 16, 3, seed)
        path = work/f'minilm-{n}.onnx'
        runtime('onnxruntime').build(network_of(net, pipeline), 'int8-dynamic', [], path)
        files.append(path); weights.append({k: v.float().numpy() for k, v in net.state_dict().items()})
    linear = [w for k, w in weights[0].items() if w.ndim == 2 and 'embed' not in k and 'head' not in k and 'pooler' not in k]
    return 'MiniLM-L6 INT8 ONNX (synthetic notes)', *files, moved(*({k: v for k, v in w.items() if 'embed' not in k and 'head' not in k and 'pooler' not in k} for w in weights)), sum(2*16*sum(w.shape) for w in linear) + 2*weights[0]['head.weight'].size


def gguf_of(folder: Path, path: Path, prompt=None) -> Path:
    from edgenb.gguf import write_gguf
    from edgenb.kquants import quantize
    f16 = write_gguf(folder, path.with_suffix('.f16'), prompt)
    quantize(f16, path, 'q4_k_m')
    f16.unlink()
    return path


def safetensors_of(folder: Path) -> dict:
    from edgenb.gguf import _safetensors
    return {n: read() for n, (_, read) in _safetensors(folder).items()}


def language(work: Path, threads: int):
    from edgenb.clinic import generate
    from edgenb.codes import lookup
    from edgenb.gguf import write_adapter
    from edgenb.language import ASKED, wordings
    from edgenb.lm import base_folder, load_tokenizer, make_prompt
    from edgenb.lora import merge, train
    from edgenb.runtimes.gguf import ADAPTER, BASE
    notes, held = generate(NOTES['language'][1]), generate(8, split='validation')
    classes = sorted({n.codes[0].code for n in (*notes, *held)})
    base = base_folder('bundled:smollm2-135m')
    prompt = make_prompt(load_tokenizer(base), ASKED['description'], classes, wordings=wordings(classes, {c: lookup(c).description for c in classes}))
    files, weights, apart = [], [], []
    for seed, n in enumerate(NOTES['language']):
        pairs = lambda some: ([s.text for s in some], [s.codes[0].code for s in some])
        train('bundled:smollm2-135m', prompt, pairs(notes[:n]), pairs(held), work/f'adapter-{n}', work/f'work-{n}', num_train_epochs=1, num_threads=threads, seed=seed)
        merge(work/f'adapter-{n}', work/f'merged-{n}')
        files.append(gguf_of(work/f'merged-{n}', work/f'smollm2-{n}.gguf', prompt))
        apart.append(work/f'apart-{n}')
        apart[-1].mkdir()
        gguf_of(base, apart[-1]/BASE, prompt)
        write_adapter(work/f'adapter-{n}', base, apart[-1]/ADAPTER)
        weights.append({k: v for k, v in safetensors_of(work/f'merged-{n}').items() if '_proj' in k})
        shutil.rmtree(work/f'merged-{n}')
    return 'SmolLM2-135M Q4_K_M (synthetic notes)', *files, moved(*weights), by_adapter(*apart, work)


def by_adapter(old: Path, new: Path, work: Path) -> int:
    "Bytes to fetch where base and adapter are apart."
    files = chunk_files(new, work/'apart-blobs')
    delta = make_delta(old, new, work/'apart-blobs', files)
    release = {'edgenb_release': 1, 'bundle': '0'*64, 'total_bytes': sum(f['length'] for f in files), 'files': files, 'deltas': [delta] if delta else []}
    found = plan(release, slot_files(old))
    assert found.kind == 'kept'
    return found.bytes


def synthetic(work: Path, threads: int, size: float):
    "A made-up update: random matrices of rank 16, scaled so that each changes its matrix by `size` of its norm."
    from edgenb.lm import base_folder
    from safetensors.numpy import save_file
    base, rng = base_folder('bundled:smollm2-135m'), np.random.default_rng(0)
    weights, new, adapter = safetensors_of(base), {}, 0
    for name, w in weights.items():
        new[name] = w
        if '_proj' not in name: continue
        update = rng.normal(size=(w.shape[0], 16)).astype(np.float32) @ rng.normal(size=(16, w.shape[1])).astype(np.float32)
        new[name] = w + update*np.float32(size*np.linalg.norm(w)/np.linalg.norm(update))
        adapter += 2*16*sum(w.shape)
    folder = work/f'synthetic-{size}'
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns('*.safetensors'))
    save_file(new, folder/'model.safetensors')
    one = work/'base.gguf'
    if not one.exists(): gguf_of(base, one)
    return f'SmolLM2-135M Q4_K_M (made-up update of {size:.0%})', one, gguf_of(folder, work/f'synthetic-{size}.gguf'), moved({k: v for k, v in weights.items() if '_proj' in k}, new), adapter


def patch_from(old: bytes, new: bytes):
    "zstd with the old file as its dictionary and long matching, as `zstd --patch-from`."
    window = max(20, math.ceil(math.log2(len(old) + len(new))))
    options = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=window, enable_ldm=True)
    patch, made = cpu(lambda: zstandard.ZstdCompressor(compression_params=options, dict_data=zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)).compress(new))
    again, applied = cpu(lambda: zstandard.ZstdDecompressor(max_window_size=2**(window + 1), dict_data=zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)).decompress(patch))
    assert again == new
    return len(patch), made, applied


def bsdiff(old: bytes, new: bytes):
    try: import bsdiff4
    except ImportError: return None
    patch, made = cpu(lambda: bsdiff4.diff(old, new))
    again, applied = cpu(lambda: bsdiff4.patch(old, patch))
    assert again == new
    return len(patch), made, applied


def compare(name: str, old: Path, new: Path, change: float, adapter: int, work: Path, with_bsdiff: bool) -> list:
    "Rows of the table."
    slots = []
    for n, path in enumerate((old, new)):
        slots.append(work/'slots'/str(n))
        shutil.rmtree(slots[-1], ignore_errors=True)
        slots[-1].mkdir(parents=True)
        shutil.copyfile(path, slots[-1]/f'model{path.suffix}')
    blobs, size = work/'blobs', new.stat().st_size
    shutil.rmtree(blobs, ignore_errors=True)
    files, cut = cpu(lambda: chunk_files(slots[1], blobs))
    delta, made = cpu(lambda: make_delta(*slots, blobs, files))
    release = {'edgenb_release': 1, 'bundle': '0'*64, 'total_bytes': size, 'files': files, 'deltas': [delta] if delta else []}
    def applied(p):
        shutil.rmtree(work/'slots'/'new', ignore_errors=True)
        _, seconds = cpu(lambda: assemble(p, from_folder(blobs), work/'slots'/'new'))
        assert digest(work/'slots'/'new'/f'model{new.suffix}') == digest(new)
        return seconds
    full, by_delta = plan(release), plan(release, slot_files(slots[0]))
    rows = [('adapter, 16 bits', adapter, None, None), (f'delta ({by_delta.kind})', by_delta.bytes, made, applied(by_delta)), ('full', full.bytes, cut, applied(full)), ('zstd --patch-from', *patch_from(old.read_bytes(), new.read_bytes()))]
    same = sum(a == b for a, b in zip(*({n: f.read(CHUNK) for n in range(-(-size//CHUNK))}.values() for f in (open(old, 'rb'), open(new, 'rb')))))
    if with_bsdiff and (found := bsdiff(old.read_bytes(), new.read_bytes())): rows.append(('bsdiff4', *found))
    print(f'\n**{name}**: {size/1e6:.1f} MB, weights moved by {change:.2%}, {same} of {-(-size//CHUNK)} mebibytes unchanged\n\n| | MB | % | CPU s to make | to apply |\n|---|---|---|---|---|')
    for what, n, made, applied in rows: print(f"| {what} | {n/1e6:.2f} | {n/size:.1%} | {'' if made is None else f'{made:.2f}'} | {'' if applied is None else f'{applied:.2f}'} |")
    print(flush=True)
    return rows


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cases', nargs='*', default=['vision', 'encoder', 'language', 'synthetic'])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--bsdiff', action='store_true', help='also bsdiff4, which takes minutes')
    parser.add_argument('--keep', help='leave the trained models here')
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(given.keep or scratch).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for case in given.cases:
            for found in ([synthetic(work, given.threads, s) for s in (0.01, 0.05)] if case == 'synthetic' else [{'vision': vision, 'encoder': encoder, 'language': language}[case](work, given.threads)]):
                compare(*found, work, given.bsdiff)
