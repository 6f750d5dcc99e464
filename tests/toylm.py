"What tests of language models share."
from pathlib import Path


def rewritten(path, to, **fields) -> Path:
    "A GGUF file with the same weights and other metadata: `fields` are texts, by key with __ for a dot."
    from edgenb.gguf import TEXT, raw_bytes, read_header, save_gguf
    h = read_header(path)
    made = [(t.name, t.shape, t.type, lambda t=t: raw_bytes(h, t).copy()) for t in h.tensors]
    return save_gguf(to, h.fields | {k.replace('__', '.'): (TEXT, None, v) for k, v in fields.items()}, made, 'writing')
