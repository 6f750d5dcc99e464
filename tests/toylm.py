"What tests of language models share."
from pathlib import Path
import numpy as np


def rewritten(path, to, weights={}, **fields) -> Path:
    "A GGUF file with other metadata (`fields`: texts, by key with __ for a dot), or other weights (by name: a function of the array)."
    from edgenb.gguf import TEXT, raw_bytes, read_header, save_gguf
    h = read_header(path)
    made = [(t.name, t.shape, t.type, lambda t=t: weights.get(t.name, np.copy)(raw_bytes(h, t))) for t in h.tensors]
    return save_gguf(to, h.fields | {k.replace('__', '.'): (TEXT, None, v) for k, v in fields.items()}, made, 'writing')
