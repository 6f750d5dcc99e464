"""Update bytes: any pair of bundles comes through, whatever breaks on the way; what is forged, cut short or out of its folder is refused."""
import copy, hashlib, json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings, strategies as st
from edgenb.core import EdgenbError, digest, json_text
from edgenb.fleet.delta import CHUNK, PART, apply_record, assemble, chunk_files, from_folder, inflate, make_delta, plan, records, release_blobs, safe_paths, slot_files, store_blob
from edgenb.fleet.layout import layout, spans

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def write(folder, files):
    for name, data in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
    return folder


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def release_of(folder, blobs, old=None):
    files = chunk_files(folder, blobs)
    delta = make_delta(old, folder, blobs, files) if old else None
    return {'edgenb_release': 1, 'bundle': hashlib.sha256(json_text(files).encode()).hexdigest(), 'name': 'm', 'version': 1, 'agent': '0.1.0', 'total_bytes': sum(f['length'] for f in files), 'chunk_bytes': CHUNK,
            'files': files, 'deltas': [delta] if delta else []}


class Counted:
    "A source that counts, and breaks when told."
    def __init__(self, blobs): self.get, self.asked, self.wrong = from_folder(blobs), [], {}
    def __call__(self, sha, length):
        self.asked.append((sha, length))
        return self.wrong[sha]() if sha in self.wrong else self.get(sha, length)
    @property
    def bytes(self): return sum(n for _, n in self.asked)


def refused(call, *words):
    with pytest.raises(EdgenbError) as e: call()
    assert all(w in str(e.value) for w in words), str(e.value)


# Any pair of folders --------------------------------------------------------------------------------------------------

names = st.sampled_from(['manifest.json', 'model.tflite', 'model.onnx', 'model.safetensors', 'model.gguf', 'model/a.bin', 'model/b.bin', 'golden/0.png', 'ü.txt'])
seeds = st.integers(0, 3)
sizes = st.sampled_from([0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2*CHUNK + 12345])
kinds = st.sampled_from(['noise', 'text', 'zeros'])
folders = st.dictionaries(names, st.tuples(seeds, sizes, kinds, st.integers(0, 5)), min_size=1, max_size=5)


def content(seed, size, kind, edits):
    rng = np.random.default_rng(seed)
    data = {'noise': lambda: rng.integers(0, 256, size, np.uint8), 'text': lambda: rng.integers(97, 101, size).astype(np.uint8), 'zeros': lambda: np.zeros(size, np.uint8)}[kind]()
    for n in range(edits if size else 0): data[np.random.default_rng([seed, n, edits]).integers(0, size)] ^= 255
    return data.tobytes()


@quick
@given(folders, folders)
@example({'model.tflite': (0, CHUNK + 1, 'noise', 0)}, {'model.tflite': (0, CHUNK + 1, 'noise', 3)})
def test_any_bundle_comes_out_of_any_other_bit_for_bit_and_never_for_more_bytes_than_in_full(tmp_path_factory, before, after):
    at = tmp_path_factory.mktemp('pair')
    old, new = (write(at/n, {k: content(*v) for k, v in files.items()}) for n, files in (('old', before), ('new', after)))
    release = release_of(new, at/'blobs', old)
    for have in ({}, slot_files(old)):
        source, p = Counted(at/'blobs'), plan(release, have)
        slot = assemble(p, source, at/f'slot{len(have) > 0}')
        assert tree(slot) == tree(new) and source.bytes == p.bytes and set(source.asked) == set(p.blobs.items()) and set(p.blobs) <= set(release_blobs(release))
    assert p.bytes <= plan(release).bytes
    assert all(s.how == 'kept' for s in p.steps if s.sha256 in {digest(old/f) for f in before})


def safetensors(**arrays):
    head, at = {}, 0
    for name, x in arrays.items(): head[name] = {'dtype': 'I8', 'shape': list(x.shape), 'data_offsets': [at, at + x.nbytes]}; at += x.nbytes
    raw = json.dumps(head).encode()
    return len(raw).to_bytes(8, 'little') + raw + b''.join(x.tobytes() for x in arrays.values())


def onnx_of(**arrays):
    import onnx
    from onnx import helper, numpy_helper
    tensors = [numpy_helper.from_array(x, name) for name, x in arrays.items()]
    return helper.make_model(helper.make_graph([helper.make_node('Identity', ['x'], ['y'])], 'g', [helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])], [helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])], tensors)).SerializeToString()


def gguf_of(path, text, **arrays):
    from edgenb.gguf import TEXT, save_gguf
    return save_gguf(path, {'general.architecture': (TEXT, None, 'llama'), 'general.name': (TEXT, None, text)}, [(n, x.shape, 'I8', lambda x=x: x) for n, x in arrays.items()], 'test').read_bytes()


@pytest.mark.parametrize('kind', ['safetensors', 'onnx', 'gguf'])
def test_tensors_that_have_moved_are_subtracted_from_where_they_were(kind, tmp_path):
    rng = np.random.default_rng(0)
    a, b = (np.clip(rng.normal(0, 25, (1500, 800)), -127, 127).astype(np.int8) for _ in range(2))
    moved = lambda x: (x + (rng.random(x.shape) < 0.04)).astype(np.int8)
    first, then = dict(a=a, b=b), dict(extra=np.ones((77, 32), np.int8), b=moved(b), a=moved(a))
    make = {'safetensors': lambda p, t, **k: safetensors(**k), 'onnx': lambda p, t, **k: onnx_of(**k), 'gguf': gguf_of}[kind]
    old = write(tmp_path/'old', {f'model.{kind}': make(tmp_path/'x.gguf', 'one', **first)})
    new = write(tmp_path/'new', {f'model.{kind}': make(tmp_path/'y.gguf', 'another, longer name', **then)})
    release = release_of(new, tmp_path/'blobs', old)
    p = plan(release, slot_files(old))
    assert p.kind == 'delta' and p.bytes < 0.3*plan(release).bytes
    assert tree(assemble(p, from_folder(tmp_path/'blobs'), tmp_path/'slot')) == tree(new)
    cut = spans(old/f'model.{kind}', new/f'model.{kind}')
    assert sum(n for n, *_ in cut) == (new/f'model.{kind}').stat().st_size and sum(where >= 0 for _, where, _ in cut) >= 2


def test_weights_that_onnx_keeps_in_a_file_of_their_own_are_paired_too(tmp_path):
    import onnx
    rng = np.random.default_rng(0)
    def model(folder, **arrays):
        folder.mkdir()
        onnx.save_model(onnx.load_from_string(onnx_of(**arrays)), str(folder/'model.onnx'), save_as_external_data=True, location='weights.data', size_threshold=0)
        return folder
    a, b = rng.integers(-100, 100, (2, 500, 700)).astype(np.int8)
    old, new = model(tmp_path/'old', a=a, b=b), model(tmp_path/'new', extra=a[:3], b=b + np.int8(1), a=a)
    assert set(layout(new/'weights.data')) == {b'extra', b'b', b'a'}
    p = plan(release_of(new, tmp_path/'blobs', old), slot_files(old))
    assert p.bytes < 0.05*plan(release_of(new, tmp_path/'blobs')).bytes and tree(assemble(p, from_folder(tmp_path/'blobs'), tmp_path/'slot')) == tree(new)


@quick
@given(st.binary(max_size=400), st.sampled_from(['.onnx', '.gguf', '.safetensors', '.bin']), st.binary(max_size=400))
def test_files_that_are_not_what_their_name_says_are_still_delivered(tmp_path_factory, a, suffix, b):
    at = tmp_path_factory.mktemp('odd')
    head = {'.gguf': b'GGUF\x03\0\0\0', '.safetensors': (8).to_bytes(8, 'little') + b'{"a": 1}', '.onnx': b'\x3a\xff\xff'}.get(suffix, b'')
    old, new = write(at/'old', {f'model{suffix}': head + a}), write(at/'new', {f'model{suffix}': head + b})
    p = plan(release_of(new, at/'blobs', old), slot_files(old))
    assert tree(assemble(p, from_folder(at/'blobs'), at/'slot')) == tree(new)


def test_an_adapter_beside_its_base_travels_alone(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, 3*CHUNK, np.uint8).tobytes()
    one = write(tmp_path/'1', {'model/base.gguf': base, 'model/adapter.gguf': rng.bytes(50_000), 'manifest.json': b'{"n": 1}'})
    two = write(tmp_path/'2', {'model/base.gguf': base, 'model/adapter.gguf': rng.bytes(50_000), 'manifest.json': b'{"n": 2}'})
    source, p = Counted(tmp_path/'blobs'), plan(release_of(two, tmp_path/'blobs', one), slot_files(one))
    assemble(p, source, tmp_path/'slot')
    assert p.kind == 'kept' and source.bytes < 51_000 and tree(tmp_path/'slot') == tree(two)


def test_a_difference_larger_than_the_whole_is_not_taken_and_of_two_the_smaller_is(pair):
    old, new, release, _ = pair
    have, heavy = slot_files(old), copy.deepcopy(release['deltas'][0])
    for f in heavy['files']:
        for b in f['blobs']: b['length'] = 4*CHUNK
    assert plan(release | {'deltas': [heavy]}, have).kind == 'full'
    assert plan(release | {'deltas': [heavy, *release['deltas']]}, have) == plan(release, have)


# Breaks ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def published(tmp_path_factory):
    at, rng = tmp_path_factory.mktemp('published'), np.random.default_rng(1)
    weights = np.clip(rng.normal(0, 20, 5*CHUNK + 4321), -127, 127).astype(np.int8)
    old = write(at/'old', {'model.tflite': weights.tobytes(), 'manifest.json': b'{"digest": "old"}', 'golden/0.png': b'same'})
    new = write(at/'new', {'model.tflite': (weights + rng.integers(-3, 4, len(weights))).astype(np.int8).tobytes(), 'manifest.json': b'{"digest": "new"}', 'golden/0.png': b'same'})
    return old, new, release_of(new, at/'blobs', old), at/'blobs'


@pytest.fixture
def pair(published, tmp_path):
    "(old bundle, a copy that a test may damage; new bundle; release; blobs)."
    return Path(shutil.copytree(published[0], tmp_path/'old')), *published[1:]


@pytest.mark.parametrize('from_old', [False, True])
def test_a_line_that_breaks_everywhere_costs_at_most_one_blob_a_break(pair, tmp_path, from_old):
    old, new, release, blobs = pair
    p = plan(release, slot_files(old) if from_old else {})
    assert p.kind == ('delta' if from_old else 'full')
    source, calls, given_ = from_folder(blobs), 0, 0
    def breaking(sha, length):
        nonlocal calls, given_
        calls += 1
        for n, piece in enumerate(source(sha, length)):
            if calls % 2 == 0 and n == 1: raise ConnectionError('reset by peer')
            given_ += len(piece)
            yield piece
    breaks = 0
    while True:
        try: assemble(p, breaking, tmp_path/'slot'); break
        except ConnectionError: breaks += 1
    assert breaks >= 2 and tree(tmp_path/'slot') == tree(new) and given_ <= p.bytes + breaks*2**20
    assert not list((tmp_path/'slot').rglob(f'*{PART}'))


def test_what_was_written_and_then_damaged_is_written_again_from_there(pair, tmp_path):
    old, new, release, blobs = pair
    p, source = plan(release), Counted(blobs)
    whole = (new/'model.tflite').read_bytes()
    torn = bytearray(whole[:3*CHUNK + 500]); torn[CHUNK + 7] ^= 1
    write(tmp_path/'slot', {'model.tflite' + PART: bytes(torn), 'golden/0.png': b'SAME'})
    assemble(p, source, tmp_path/'slot')
    model = next(f for f in release['files'] if f['path'] == 'model.tflite')
    assert tree(tmp_path/'slot') == tree(new) and model['chunks'][0]['stored'] not in dict(source.asked) and model['chunks'][1]['stored'] in dict(source.asked)


def test_what_an_earlier_attempt_wrote_beyond_the_end_is_cut_off(pair, tmp_path):
    old, new, release, blobs = pair
    write(tmp_path/'slot', {'model.tflite' + PART: (new/'model.tflite').read_bytes() + b'more', 'manifest.json' + PART: b'x'*500})
    assert tree(assemble(plan(release), from_folder(blobs), tmp_path/'slot')) == tree(new)


def test_a_bad_sector_of_the_old_slot_costs_one_mebibyte_and_nothing_else(pair, tmp_path):
    old, new, release, blobs = pair
    p, source = plan(release, slot_files(old)), Counted(blobs)
    raw = bytearray((old/'model.tflite').read_bytes()); raw[2*CHUNK + 9] ^= 4
    (old/'model.tflite').write_bytes(raw)
    (old/'golden/0.png').write_bytes(b's')                            # and a file that was to be kept is cut short
    assemble(p, source, tmp_path/'slot')
    files = {f['path']: f for f in release['files']}
    assert tree(tmp_path/'slot') == tree(new) and source.bytes == p.bytes + files['model.tflite']['chunks'][2]['stored_length'] + files['golden/0.png']['chunks'][0]['stored_length']


def test_an_old_slot_that_is_gone_meanwhile_is_done_without(pair, tmp_path):
    old, new, release, blobs = pair
    p = plan(release, slot_files(old))
    shutil.rmtree(old)
    assert tree(assemble(p, from_folder(blobs), tmp_path/'slot')) == tree(new)


def test_a_blob_damaged_once_is_fetched_again_and_a_difference_damaged_for_good_is_made_up_for_in_full(pair, tmp_path):
    old, new, release, blobs = pair
    p, source = plan(release, slot_files(old)), Counted(blobs)
    sha = p.steps[-1].delta[0][0]
    good, turns = b''.join(from_folder(blobs)(sha, 0)), []
    def once(): turns.append(1); return [good if len(turns) > 1 else good[:-1] + bytes([good[-1] ^ 1])]
    source.wrong[sha] = once
    assemble(p, source, tmp_path/'once')
    assert len(turns) == 2 and tree(tmp_path/'once') == tree(new)
    source.wrong[sha] = lambda: [good[:50]]
    assemble(p, source, tmp_path/'never')
    assert tree(tmp_path/'never') == tree(new)


# Forgeries ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('what', ['truncated', 'altered', 'other', 'empty', 'endless'])
def test_a_blob_that_is_not_what_the_release_says_is_refused_and_no_file_appears(what, pair, tmp_path):
    old, new, release, blobs = pair
    p, source = plan(release), Counted(blobs)
    model = next(f for f in release['files'] if f['path'] == 'model.tflite')
    sha = model['chunks'][2]['stored']
    good, given_ = b''.join(from_folder(blobs)(sha, 0)), [0]
    def endless():
        while given_[0] < 2**26: given_[0] += 2**16; yield bytes(2**16)   # as good as endless, and harmless should nobody stop it
    source.wrong[sha] = {'truncated': lambda: [good[:-1]], 'altered': lambda: [good[:100] + bytes([good[100] ^ 1]) + good[101:]], 'other': lambda: from_folder(blobs)(model['chunks'][1]['stored'], 0), 'empty': lambda: [], 'endless': endless}[what]
    refused(lambda: assemble(p, source, tmp_path/'slot'), sha[:16], 'twice')
    assert not (tmp_path/'slot'/'model.tflite').exists() and given_[0] <= 2*(model['chunks'][2]['stored_length'] + 2*2**16)
    source.wrong.clear()
    assert tree(assemble(p, source, tmp_path/'slot')) == tree(new)


def forged(pair, change):
    "A release with a lie in it, and nothing else that could be the reason to refuse it."
    release = copy.deepcopy(pair[2]) | {'deltas': []}
    change(next(f for f in release['files'] if f['path'] == 'model.tflite'))
    return release


BOMB = zstandard.ZstdCompressor(level=3).compress(bytes(2**30))       # a gibibyte of zeros


def test_a_bomb_is_not_unpacked_beyond_the_length_declared(pair, tmp_path):
    assert len(BOMB) < 2**16
    sha = store_blob(pair[3], BOMB)
    release = forged(pair, lambda f: f['chunks'][0].update(stored=sha, stored_length=len(BOMB)))
    code = f"""import json, resource, sys
from edgenb.core import EdgenbError
from edgenb.fleet.delta import assemble, from_folder, plan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: assemble(plan(json.load(open(sys.argv[1]))), from_folder({str(pair[3])!r}), {str(tmp_path/'slot')!r})
except EdgenbError as e: print(e, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024)"""
    (tmp_path/'r.json').write_text(json.dumps(release))
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'r.json')], capture_output=True, text=True)
    assert 'more than the 1,048,576 bytes declared' in done.stdout and int(done.stdout.split()[-1]) < 64, done
    assert not (tmp_path/'slot'/'model.tflite').exists()


def test_a_frame_that_wants_a_large_window_is_refused():
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(3, window_log=27)).compressobj()
    refused(lambda: inflate(wide.compress(os.urandom(100)) + wide.flush(), 100), 'cannot be decompressed')


@quick
@given(st.data())
def test_records_that_are_damaged_end_in_an_error_or_in_a_chunk_of_the_right_length(tmp_path_factory, data):
    from edgenb.fleet.delta import make_record
    at = tmp_path_factory.mktemp('records')
    old = np.random.default_rng(0).integers(0, 9, 3000).astype(np.uint8)
    (at/'old').write_bytes(old.tobytes())
    with open(at/'old', 'rb') as f:
        blob = bytearray(make_record((old[:2000] + 1).astype(np.uint8).tobytes(), f, [(1000, 0, 1), (500, -1, 1), (490, 1500, 7), (10, 1990, 1)], 3000))
        for _ in range(data.draw(st.integers(1, 4))): blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(blob[:data.draw(st.integers(0, len(blob)))])
        for b in (bytes(blob), cut):
            try: made = apply_record(records(b, 1)[0], f, 2000)
            except EdgenbError: continue
            assert len(made) == 2000


LIES = [lambda f: f.update(path='../escape'), lambda f: f.update(path='/etc/cron.d/x'), lambda f: f.update(path='a\\..\\..\\b'), lambda f: f.update(path='C:model'), lambda f: f.update(path='con'), lambda f: f.update(path='MANIFEST.json'),
        lambda f: f.update(path='manifest.json/x'), lambda f: f.update(path='golden'), lambda f: f.update(path='x.part'), lambda f: f.update(path=None), lambda f: f.update(path='a\0b'), lambda f: f.update(path='\ud800'),
        lambda f: f.update(length=-1), lambda f: f.update(length=2**60), lambda f: f.update(length=True), lambda f: f.update(length='9'), lambda f: f.update(sha256='0'), lambda f: f.update(sha256=['a']), lambda f: f.update(chunks=None),
        lambda f: f.update(chunks=f['chunks'][:-1]), lambda f: f['chunks'][0].update(length=2**40), lambda f: f['chunks'][0].update(stored_length=2**40), lambda f: f['chunks'][0].update(stored='../x'), lambda f: f['chunks'][0].pop('sha256'),
        lambda f: f['chunks'][0].update(length=5), lambda f: f['chunks'].reverse(), lambda f: f['chunks'][0].update(stored_length=0), lambda f: f['chunks'][0].update(stored_length=1.5)]


@pytest.mark.parametrize('n', range(len(LIES)))
def test_a_release_that_lies_is_refused_before_anything_is_written(n, pair): refused(lambda: plan(forged(pair, LIES[n])))


@pytest.mark.parametrize('change', [lambda f: f.update(path='other'), lambda f: f.update(sha256='0'*64), lambda f: f.update(blobs=f['blobs'][:-1]), lambda f: f['blobs'][0].update(length=2**33), lambda f: f.update(blobs=7), lambda f: f.update(from_sha256='x')])
def test_a_difference_that_lies_is_refused_too(change, pair):
    release = copy.deepcopy(pair[2])
    change(max(release['deltas'][0]['files'], key=lambda f: f['length']))
    refused(lambda: plan(release, slot_files(pair[0])))


@quick
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(['edgenb_release', 'files', 'bundle', 'total_bytes', 'deltas', 'path', 'length', 'sha256', 'chunks']), x, max_size=6), max_leaves=12))
def test_anything_at_all_as_a_release_is_an_error_in_words(junk): refused(lambda: plan(junk))


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
@example('..')
@example('a/./b')
@example('aux.txt')
@example('a/')
@example('COM¹')
@example('x:y')
def test_a_name_that_is_taken_lies_below_the_folder(name):
    try: safe_paths([name])
    except EdgenbError: return
    below = os.path.normpath(os.path.join('/slot', name))
    assert below == f'/slot/{name}' and name.isprintable() and not set(name) & set('\\:*?"<>|')


def test_a_link_in_the_slot_is_not_followed_and_a_stray_file_is_not_taken_along(pair, tmp_path):
    old, new, release, blobs = pair
    p, outside = plan(release), tmp_path/'outside'
    outside.mkdir()
    for place, target in (('golden', outside), ('model.tflite' + PART, outside/'victim'), ('manifest.json', outside/'victim')):
        slot = tmp_path/f'slot-{place}'
        slot.mkdir(); (slot/place).symlink_to(target)
        refused(lambda: assemble(p, from_folder(blobs), slot), str(slot/place))
    assert not any(outside.iterdir())
    (tmp_path/'slot').symlink_to(outside)
    refused(lambda: assemble(p, from_folder(blobs), tmp_path/'slot'), 'link')
    write(tmp_path/'full', {'notes.txt': b'mine'})
    refused(lambda: assemble(p, from_folder(blobs), tmp_path/'full'), 'notes.txt', 'does not belong')
    assert (tmp_path/'full'/'notes.txt').read_bytes() == b'mine' and not any(outside.iterdir())


def test_a_bundle_with_a_link_in_it_is_not_published(tmp_path):
    write(tmp_path/'b', {'a': b'1'}); (tmp_path/'b'/'l').symlink_to('/etc/passwd')
    refused(lambda: chunk_files(tmp_path/'b', tmp_path/'blobs'), 'link')


def test_a_full_disk_is_said_in_words(pair, tmp_path, monkeypatch):
    def full(fd, data): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'write', full)
    refused(lambda: assemble(plan(pair[2]), from_folder(pair[3]), tmp_path/'slot'), 'disk is full')


def test_every_file_is_forced_to_the_disk_before_it_gets_its_name_and_its_folder_after(pair, tmp_path, monkeypatch):
    log, real = [], {n: getattr(os, n) for n in ('open', 'fsync', 'replace')}
    opened = {}
    def open_(path, *a, **k): fd = real['open'](path, *a, **k); opened[fd] = str(path); return fd
    monkeypatch.setattr(os, 'open', open_)
    monkeypatch.setattr(os, 'fsync', lambda fd: (log.append(('fsync', opened[fd])), real['fsync'](fd))[1])
    monkeypatch.setattr(os, 'replace', lambda a, b: (log.append(('replace', str(a), str(b))), real['replace'](a, b))[1])
    assemble(plan(pair[2]), from_folder(pair[3]), tmp_path/'slot')
    named = [n for n, e in enumerate(log) if e[0] == 'replace']
    assert len(named) == 3
    for n in named: assert log[n - 1] == ('fsync', log[n][1]) and log[n + 1] == ('fsync', str(Path(log[n][2]).parent))


def test_memory_stays_bounded_whatever_the_size_of_the_model(tmp_path):
    rng = np.random.default_rng(0)
    big = np.clip(rng.normal(0, 20, 48*CHUNK), -127, 127).astype(np.int8)
    old = write(tmp_path/'old', {'model.tflite': big.tobytes()})
    big[::37] += 1
    new = write(tmp_path/'new', {'model.tflite': big.tobytes()})
    (tmp_path/'r.json').write_text(json.dumps(release_of(new, tmp_path/'blobs', old)))
    code = f"""import json, resource
from edgenb.fleet.delta import assemble, from_folder, plan, slot_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
p = plan(json.load(open({str(tmp_path/'r.json')!r})), slot_files({str(old)!r}))
assemble(p, from_folder({str(tmp_path/'blobs')!r}), {str(tmp_path/'slot')!r})
print(p.kind, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert done[0] == 'delta' and int(done[1]) < 32 and digest(tmp_path/'slot'/'model.tflite') == digest(new/'model.tflite')


def test_a_device_needs_numpy_and_zstandard_alone():
    code = "import edgenb.fleet.delta, sys; print([m for m in ('torch', 'onnx', 'tuf', 'cryptography', 'edgenb.gguf', 'tqdm', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
