"What tests of language models share."
from pathlib import Path
import numpy as np

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def tiny_llama(folder, texts, pieces, **config) -> Path:
    "A folder with a random Llama of two layers, and a tokenizer made from `texts`."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=pieces, special_tokens=['<|im_start|>', '<|im_end|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1)
    LlamaForCausalLM(LlamaConfig(vocab_size=bpe.get_vocab_size(), **shape | config)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<|im_end|>', pad_token='<|im_end|>', chat_template=CHATML).save_pretrained(folder)
    return folder


def rewritten(path, to, weights={}, **fields) -> Path:
    "A GGUF file with other metadata (`fields`: texts, by key with __ for a dot), or other weights (by name: a function of the array)."
    from edgenb.gguf import TEXT, raw_bytes, read_header, save_gguf
    h = read_header(path)
    made = [(t.name, t.shape, t.type, lambda t=t: weights.get(t.name, np.copy)(raw_bytes(h, t))) for t in h.tensors]
    return save_gguf(to, h.fields | {k.replace('__', '.'): (TEXT, None, v) for k, v in fields.items()}, made, 'writing')
