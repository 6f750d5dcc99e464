"""What people get wrong, what disks damage, and what a second opinion says: every mistake is one clear line, and nothing is lost."""
import io, json, os, shutil, struct, zlib
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from edgenb.certificate import near_duplicates, thumbnail
from edgenb.core import EdgenbError, Run, digest, digest_of, write_json
from edgenb.data import data, examples_of, load_examples, read_coco, read_source, read_yolo, split
from edgenb.pipeline import FILTERS, Pipeline, decode, image_pipeline, resize, to_tensor
from edgenb.ship import bundle_of, load_bundle, ship, shippable
from edgenb.tune import decision_costs, tune
from edgenb.verify import METRICS, auc, paired_interval, parity, rate_interval, verify
from edgenb.watch import Sketch, mmd_test, watch
from edgenb.learn import learn
from edgenb.squeeze import squeeze
from edgenb.compile import compile

ROOMS = {f.__name__: f for f in (data, tune, squeeze, compile, verify, ship, watch, learn)}
properties = hypothesis_settings(derandomize=True, deadline=None, database=None, max_examples=40)


def refused(call, *words):
    "The message `call` is refused with: one line that holds all the words."
    with pytest.raises(EdgenbError) as caught: call()
    message = str(caught.value)
    assert message and '\n' not in message and 'Traceback' not in message
    for word in words: assert word in message
    return message


def visible(folder):
    "Digests of all that a run's folder shows (locks and the pool are hidden), empty folders included."
    shown = [p for p in sorted(Path(folder).rglob('*')) if not any(part.startswith('.') for part in p.relative_to(folder).parts)]
    return {p.relative_to(folder).as_posix(): digest(p) if p.is_file() else 'folder' for p in shown}


def data_refused(tmp_path, source, *words, **choices):
    run = Run(tmp_path/'run')
    message = refused(lambda: data(run, source=str(source), **choices), *words)
    assert visible(run.path) == {} and run.cards() == []
    return message


def surface(rng): return rng.integers(60, 180, (32, 32)).astype(np.uint8)


def save_images(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for n in names:
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(surface(rng)).save(folder/n)
    return folder


def image_folder(root, clean=9, crack=11):
    "Noise in two class folders: enough for the data room, too few to have the labels judged by a network."
    return save_images(root, [f'clean/{n:02}.png' for n in range(clean)] + [f'crack/{n:02}.png' for n in range(crack)])


@pytest.fixture
def frozen(tmp_path):
    "A run that has passed the data room, with nine and eleven images of its own."
    run = Run(tmp_path/'run')
    data(run, source=str(image_folder(tmp_path/'images')))
    return run


@pytest.fixture
def finished(toy_run, tmp_path):
    "A copy of the finished run. Its files are links: replace them, never write into them."
    shutil.copytree(toy_run.path, tmp_path/'run', copy_function=os.link)
    return Run(tmp_path/'run')


# Images -------------------------------------------------------------------------------------------------------------

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def huge_png(side):
    "A few bytes that claim to be side x side pixels."
    header = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')


def as_bytes(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


GREY = surface(np.random.default_rng(1))
UNREADABLE = {'truncated.png': as_bytes(Image.fromarray(GREY), 'PNG')[:400], 'truncated.jpg': as_bytes(Image.fromarray(GREY), 'JPEG')[:300],
              'empty.png': b'', 'text.png': b'this is not an image\n'*20,
              'float.tif': as_bytes(Image.fromarray(GREY/np.float32(255)), 'TIFF'),
              'bomb.png': huge_png(40_000), 'small-bomb.png': huge_png(10_000),
              'wide.tif': as_bytes(Image.fromarray(GREY.astype(np.int32)*70_000), 'TIFF')}


@pytest.mark.parametrize('name', UNREADABLE)
def test_an_image_that_cannot_be_read_is_refused_by_name(name, tmp_path):
    assert len(UNREADABLE[name]) < 10_000
    why = 'more pixels than is safe' if 'bomb' in name else ''
    root = image_folder(tmp_path/'images')
    (root/'clean'/name).write_bytes(UNREADABLE[name])
    refused(lambda: decode(root/'clean'/name), name, why)
    refused(lambda: decode(UNREADABLE[name]), why)
    data_refused(tmp_path, root, f'clean/{name}', why)


def test_all_images_that_cannot_be_read_are_reported_at_once(tmp_path):
    root = image_folder(tmp_path/'images')
    for name in ('empty.png', 'text.png'): (root/'clean'/name).write_bytes(UNREADABLE[name])
    data_refused(tmp_path, root, '2 image(s)', 'empty.png', 'text.png')


def over_black(grey, alpha):
    image = Image.merge('RGBA', [Image.fromarray(grey)]*3 + [Image.fromarray(alpha)])
    return np.asarray(Image.alpha_composite(Image.new('RGBA', (32, 32), 'black'), image).convert('L'))


def odd_images():
    "Name, image and the grey pixels it should be read as."
    grey, alpha = Image.fromarray(GREY), np.where(np.indices((32, 32)).sum(0) % 3, 255, 0).astype(np.uint8)
    paletted = Image.fromarray(np.where(alpha == 0, 0, np.maximum(GREY, 1)).astype(np.uint8), 'L').convert('P')
    wide = (GREY.astype(int)*257 + np.where(alpha, 100, -100)).astype(np.uint16)     # rounds to GREY
    return {'16bit.png': (Image.fromarray(wide), {}, GREY), '16bit.tif': (Image.fromarray(wide), {}, GREY),
            'opaque.png': (Image.merge('RGBA', [grey]*3 + [Image.new('L', (32, 32), 255)]), {}, GREY),
            'rgba.png': (Image.merge('RGBA', [grey]*3 + [Image.fromarray(alpha)]), {}, np.where(alpha, GREY, 0)),
            'la.png': (Image.merge('LA', [grey, Image.fromarray(alpha)]), {}, np.where(alpha, GREY, 0)),
            'palette.png': (paletted, {'transparency': 0}, np.where(alpha, GREY, 0)),
            'cmyk.tif': (Image.merge('CMYK', [Image.new('L', (32, 32), 0)]*3 + [Image.fromarray(255 - GREY)]), {}, GREY),
            'onebit.png': (Image.fromarray(GREY > 120), {}, np.where(GREY > 120, 255, 0)), 'rgb.bmp': (grey.convert('RGB'), {}, GREY)}


@pytest.mark.parametrize('name', odd_images())
def test_unusual_kinds_of_pixels_are_read_as_what_they_show(name, tmp_path):
    image, options, expected = odd_images()[name]
    image.save(tmp_path/name, **options)
    assert np.array_equal(decode(tmp_path/name), expected)
    assert np.array_equal(decode((tmp_path/name).read_bytes()), expected)
    colour = decode(tmp_path/name, 'RGB')
    assert colour.dtype == np.uint8 and colour.shape == (32, 32, 3) and np.array_equal(colour[..., 0], expected)


def test_unusual_kinds_of_pixels_pass_the_data_room(tmp_path):
    root = image_folder(tmp_path/'images')
    for n, (name, (image, options, _)) in enumerate(odd_images().items()):
        image = image.rotate(90*(n % 4)) if n % 2 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(root/('clean', 'crack')[n % 2]/name, **options)
    assert data(Run(tmp_path/'run'), source=str(root), label_accuracy=0.0).result['certificate']['examples'] == 29


def test_half_transparent_pixels_are_laid_over_black():
    alpha = np.full((32, 32), 128, np.uint8)
    assert np.array_equal(decode(Image.merge('RGBA', [Image.fromarray(GREY)]*3 + [Image.fromarray(alpha)])), over_black(GREY, alpha))
    assert np.abs(over_black(GREY, alpha) - GREY*(128/255)).max() <= 1


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP'])
def test_a_damaged_image_file_is_an_image_or_a_clear_error(form):
    whole, rng = as_bytes(Image.fromarray(GREY), form), np.random.default_rng(3)
    errors = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 200 if rng.random() < 0.5 else len(whole)), 3): damaged[at] = rng.integers(256)
        if form == 'TIFF' and rng.random() < 0.5: damaged[-int(rng.integers(1, 100))] = rng.integers(256)   # its directory is at the end
        try: assert decode(bytes(damaged)).dtype == np.uint8
        except EdgenbError as e: assert '\n' not in str(e); errors += 1
    assert form == 'BMP' or errors > 0


# Label files --------------------------------------------------------------------------------------------------------

def coco_source(root, change=lambda coco: None):
    "24 images, every second one with a box."
    names = [f'{n:02}.png' for n in range(24)]
    save_images(root/'images', names)
    coco = {'images': [{'id': n, 'file_name': f, 'width': 32, 'height': 32} for n, f in enumerate(names)],
            'categories': [{'id': 1, 'name': 'crack'}],
            'annotations': [{'id': n, 'image_id': n, 'category_id': 1, 'bbox': [1, 2, 3, 4]} for n in range(0, 24, 2)]}
    replacement = change(coco)
    (root/'labels.json').write_bytes(replacement if isinstance(replacement, bytes) else json.dumps(coco).encode())
    return root


def yolo_source(root, files=None):
    "The same as YOLO; `files` replaces or adds files."
    save_images(root/'images', [f'{n:02}.png' for n in range(24)])
    written = {'data.yaml': b'names: [crack]\n', **{f'labels/{n:02}.txt': b'0 0.5 0.5 0.25 0.25\n' for n in range(0, 24, 2)},
               **(files or {})}
    (root/'labels').mkdir()
    for name, content in written.items(): (root/name).write_bytes(content)
    return root


def elpv_source(root, extra=b''):
    "The same as ELPV; `extra` may speak of one image more, 24.png."
    save_images(root/'images', [f'{n:02}.png' for n in range(25)])
    (root/'labels.csv').write_bytes(b''.join(b'images/%02d.png %s mono\n' % (n, b'1.0' if n % 2 else b'0.0') for n in range(24)) + extra)
    return root


def examples_source(root, extra=b''):
    "The same as examples.jsonl, likewise."
    save_images(root, [f'{n:02}.png' for n in range(25)])
    rows = [{'id': f'{n:02}', 'path': f'{n:02}.png', 'label': 'crack' if n % 2 else 'clean'} for n in range(24)]
    (root/'examples.jsonl').write_bytes('\n'.join(map(json.dumps, rows)).encode() + b'\n' + extra)
    return root


def set_in(coco, kind, n, **values): coco[kind][n].update(values)


BAD_COCO = {
    'an image that does not exist': (lambda c: c['images'].append({'id': 99, 'file_name': 'gone.png'}), 'gone.png'),
    'a file listed twice': (lambda c: c['images'].append({'id': 99, 'file_name': '00.png'}), '00'),
    'an image number used twice': (lambda c: set_in(c, 'images', 1, id=0), 'labels.json'),
    'an annotation of an unlisted image': (lambda c: set_in(c, 'annotations', 0, image_id=77), '77'),
    'an annotation of an unlisted category': (lambda c: set_in(c, 'annotations', 0, category_id=8), 'category 8'),
    'an image without a number': (lambda c: c['images'][0].pop('id') and None, 'labels.json'),
    'an image without a name': (lambda c: c['images'][0].pop('file_name') and None, 'labels.json'),
    'an annotation that is text': (lambda c: c['annotations'].append('crack'), 'labels.json'),
    'a box of three numbers': (lambda c: set_in(c, 'annotations', 0, bbox=[1, 2, 3]), 'labels.json'),
    'a box of text': (lambda c: set_in(c, 'annotations', 0, bbox=['1', '2', '3', '4']), 'labels.json'),
    'a box of NaN': (lambda c: set_in(c, 'annotations', 0, bbox=[1, 2, float('nan'), 4]), 'labels.json'),
    'a box outside the image': (lambda c: set_in(c, 'annotations', 0, bbox=[30, 2, 30, 4]), '00.png', 'outside'),
    'a category without a name': (lambda c: c['categories'].append({'id': 2}), 'labels.json'),
    'half a file': (lambda c: json.dumps(c).encode()[:300], 'labels.json'),
    'no JSON': (lambda c: b'image,label\n', 'labels.json'),
    'an empty file': (lambda c: b'', 'labels.json'),
    'bytes': (lambda c: bytes(range(256)), 'labels.json'),
    'a list': (lambda c: b'[1, 2]', 'labels.json'),
    'brackets without end': (lambda c: b'['*100_000, 'labels.json')}


@pytest.mark.parametrize('mistake', BAD_COCO)
def test_a_mistake_in_a_coco_file_is_named(mistake, tmp_path):
    change, *words = BAD_COCO[mistake]
    data_refused(tmp_path, coco_source(tmp_path/'images', change), *words)


BAD_YOLO = {
    'a label without an image': ({'labels/extra.txt': b'0 0.5 0.5 0.1 0.1\n'}, 'extra.txt'),
    'a row of junk': ({'labels/00.txt': b'0 0.5 0.5 0.1 0.1\ncrack at the left\n'}, '00.txt', 'line 2'),
    'a short row': ({'labels/00.txt': b'0 0.5 0.5\n'}, '00.txt', 'line 1'),
    'a value above one': ({'labels/00.txt': b'0 5 5 1 1\n'}, '00.txt', 'line 1'),
    'NaN': ({'labels/00.txt': b'0 nan 0.5 0.1 0.1\n'}, '00.txt', 'line 1'),
    'an unknown class': ({'labels/00.txt': b'7 0.5 0.5 0.1 0.1\n'}, '00.txt', 'line 1'),
    'a class between two': ({'labels/00.txt': b'0.7 0.5 0.5 0.1 0.1\n'}, '00.txt', 'line 1'),
    'an infinite class': ({'labels/00.txt': b'inf 0.5 0.5 0.1 0.1\n'}, '00.txt', 'line 1'),
    'bytes': ({'labels/00.txt': bytes(range(128, 256))}, '00.txt'),
    'no class names': ({'data.yaml': b'nc: 1\n'}, 'data.yaml'),
    'one number as class names': ({'data.yaml': b'names: 1\n'}, 'data.yaml'),
    'a broken data.yaml': ({'data.yaml': b'names: [crack\n'}, 'data.yaml'),
    'a data.yaml of bytes': ({'data.yaml': bytes(range(128, 256))}, 'data.yaml'),
    'an empty image': ({'images/00.png': b''}, '00.png'),
    'a text as an image': ({'images/00.png': UNREADABLE['text.png']}, '00.png'),
    'a bomb': ({'images/00.png': UNREADABLE['bomb.png']}, '00.png')}


@pytest.mark.parametrize('mistake', BAD_YOLO)
def test_a_mistake_in_a_yolo_folder_is_named(mistake, tmp_path):
    files, *words = BAD_YOLO[mistake]
    data_refused(tmp_path, yolo_source(tmp_path/'images', files), *words)


BAD_EXAMPLES = {
    'half a line': (b'{"id": "x", "path": \n', 'line 25'), 'a line that is a list': (b'[1, 2]\n', 'line 25'),
    'a missing field': (b'{"id": "x", "path": "24.png"}\n', 'line 25', 'label'),
    'an unknown field': (b'{"id": "x", "path": "24.png", "label": "clean", "colour": 1}\n', 'line 25', 'colour'),
    'an image that does not exist': (b'{"id": "x", "path": "gone.png", "label": "clean"}\n', 'gone.png'),
    'a name used twice': (b'{"id": "00", "path": "01.png", "label": "clean"}\n', '00'),
    'a path that is a number': (b'{"id": "x", "path": 7, "label": "clean"}\n', 'examples.jsonl'),
    'a label that is a number': (b'{"id": "x", "path": "24.png", "label": 7}\n', 'examples.jsonl'),
    'boxes that are a number': (b'{"id": "x", "path": "24.png", "label": "clean", "boxes": 7}\n', 'examples.jsonl'),
    'bytes': (bytes(range(128, 256)) + b'\n', 'examples.jsonl')}
BAD_ELPV = {
    'an image that does not exist': (b'images/gone.png 1.0 mono\n', 'gone.png'),
    'a row that is too short': (b'images/24.png 1.0\n', 'labels.csv', '25'),
    'a row that is too long': (b'images/24.png 1.0 mono 3\n', 'labels.csv', '25'),
    'a probability in words': (b'images/24.png high mono\n', 'labels.csv', '25'),
    'a probability above one': (b'images/24.png 1.7 mono\n', 'labels.csv', '25'),
    'a probability that is NaN': (b'images/24.png nan mono\n', 'labels.csv', '25'),
    'bytes': (bytes(range(128, 256)) + b'\n', 'labels.csv')}


@pytest.mark.parametrize('source,mistakes,mistake', [(examples_source, BAD_EXAMPLES, m) for m in BAD_EXAMPLES] + [(elpv_source, BAD_ELPV,
    m) for m in BAD_ELPV],
                         ids=[f'examples-{m}' for m in BAD_EXAMPLES] + [f'elpv-{m}' for m in BAD_ELPV])
def test_a_mistake_in_a_list_of_images_is_named(source, mistakes, mistake, tmp_path):
    extra, *words = mistakes[mistake]
    data_refused(tmp_path, source(tmp_path/'images', extra), *words, negative='functional' if source is elpv_source else 'clean')


@pytest.mark.parametrize('source', [coco_source, yolo_source, elpv_source, examples_source])
def test_the_same_sources_without_the_mistake_are_read(source, tmp_path):
    found, _ = read_source(str(source(tmp_path/'images')))
    assert sorted(Counter(e.label for e in found).values()) == [12, 12] and all(Path(e.path).is_file() for e in found)


def test_sources_that_are_too_little_are_refused(tmp_path):
    (tmp_path/'empty').mkdir()
    data_refused(tmp_path, tmp_path/'empty', 'no images')
    data_refused(tmp_path, tmp_path/'nowhere', 'nowhere', 'does not exist')
    data_refused(tmp_path, image_folder(tmp_path/'one', clean=30, crack=0), 'one class only')
    data_refused(tmp_path, image_folder(tmp_path/'ten', clean=5, crack=5), '10 images')
    data_refused(tmp_path, image_folder(tmp_path/'rare', clean=30, crack=2), 'crack', 'collect')
    data_refused(tmp_path, save_images(tmp_path/'flat', [f'{n}.png' for n in range(30)]), 'class folders')
    (tmp_path/'file.txt').write_text('clean')
    data_refused(tmp_path, tmp_path/'file.txt', 'file.txt')
    data_refused(tmp_path, 'bundled:elvp', 'Did you mean elpv?')


def test_two_images_of_one_name_are_refused(tmp_path):
    root = image_folder(tmp_path/'images')
    Image.fromarray(GREY).save(root/'clean'/'00.jpg')
    data_refused(tmp_path, root, 'clean/00', 'rename')


@pytest.mark.parametrize('choices,words', [({'negative': 'claen'}, ['Did you mean clean?']),
                                           ({'negativ': 'clean'}, ['Did you mean negative?']),
    ({'labels': 'ani'}, ['any']), ({'limit': 1}, ['limit']), ({'limit': -3}, ['limit']), ({'test': 1.5}, ['test']),
    ({'test': -0.1}, ['test']),
    ({'validation': 'some'}, ['validation']), ({'test': 0.9, 'validation': 0.9}, ['train']), ({'extra': ['nowhere']}, ['nowhere'])],
    ids=str)
def test_a_wrong_choice_in_the_data_room_is_named(choices, words, tmp_path):
    data_refused(tmp_path, coco_source(tmp_path/'images') if 'labels' in choices else image_folder(tmp_path/'images'), *words, **choices)


@pytest.mark.parametrize('harm,word', [(lambda p: Image.fromarray(GREY).save(p), 'has changed'), (Path.unlink, 'is gone')],
                         ids=['changed', 'gone'])
def test_an_image_that_is_not_the_frozen_one_is_refused(harm, word, frozen):
    harm(Path(examples_of(frozen, 'train')[3].path))
    before = visible(frozen.path)
    refused(lambda: tune(frozen, num_train_epochs=1, method='head', size=32, accept_gates=['class floor', 'label accuracy']), word,
            'data again')
    assert visible(frozen.path) == before


def test_a_failed_data_room_keeps_what_an_earlier_entry_found(frozen):
    before = visible(frozen.path)
    source = Path(frozen.card('data').asked['source'])
    (source/'clean'/'new.png').write_bytes(b'')
    refused(lambda: data(frozen, source=str(source)), 'new.png')
    assert visible(frozen.path) == before and len(examples_of(frozen, 'all')) == 20


# Choices ------------------------------------------------------------------------------------------------------------

WRONG_NAMES = [
    ('tune', {'method': 'haed'}, 'Did you mean head?'), ('tune', {'methd': 'head'}, 'Did you mean method'),
    ('tune', {'augmentations': ['filp']}, 'Did you mean flip?'),
    ('tune', {'model_name_or_path': 'bundled:efficientnet-lite'}, 'bundled:efficientnet-lite0'),
    ('tune', {'accept_gates': ['label acuracy']}, 'label accuracy'),
    ('squeeze', {'precisions': ['int9']}, 'Did you mean int8 or int4?'), ('squeeze', {'precisions': []}, 'at least one precision'),
    ('compile', {'runtimes': ['onxruntime']}, 'Did you mean onnxruntime?'), ('compile', {'runtimes': []}, 'runtime'),
    ('compile', {'runtimes': 3}, 'runtimes'),
    ('verify', {'metric': 'acuracy'}, 'Did you mean accuracy'), ('verify', {'device': 'jetson-orin'}, 'Did you mean jetson-agx-orin or jetson-orin-nano?'),
    ('ship', {'artifact': 'onnxruntime-fp23'}, 'onnxruntime-fp32'), ('ship', {'artifact': 'reference'}, 'onnxruntime-fp32'),
    ('ship', {'accept': ['fail']}, 'cannot be accepted'),
    ('watch', {'shifts': ['blured']}, 'Did you mean blurred?'), ('watch', {'groups': ['polly']}, 'polly'),
    ('learn', {'shift': 'darkend'}, 'Did you mean darkened?')]
OUT_OF_RANGE = [
    ('tune', {'num_train_epochs': 0}), ('tune', {'num_train_epochs': 'two'}), ('tune', {'batch_size': 0}),
    ('tune', {'size': -64}), ('tune', {'num_threads': 0}),
    ('tune', {'method': 'lora', 'lora_r': 0}), ('tune', {'head_learning_rate': -1.0}), ('tune', {'start_from': 'nowhere.safetensors'}),
    ('squeeze', {'precisions': ['fp32'], 'calibration_images': 0}), ('squeeze', {'precisions': ['int8'], 'calibration_images': 4}),
    ('verify', {'timing_runs': 0}), ('verify', {'confidence': 1.5}), ('watch', {'window': 0}), ('watch', {'window': 1}),
    ('learn', {'budget': 0})]


@pytest.mark.parametrize('room,choices,words', WRONG_NAMES, ids=lambda v: str(v))
def test_a_wrong_name_is_answered_with_the_right_one(room, choices, words, finished):
    before = visible(finished.path)
    refused(lambda: ROOMS[room](finished, **choices), words)
    assert visible(finished.path) == before


@pytest.mark.parametrize('room,choices', OUT_OF_RANGE, ids=lambda v: str(v))
def test_a_value_out_of_range_is_refused_by_the_name_of_its_choice(room, choices, finished):
    small = {'tune': {'method': 'head', 'size': 32, 'num_train_epochs': 1}, 'verify': {'timing_runs': 2}}.get(room, {})
    before = visible(finished.path)
    refused(lambda: ROOMS[room](finished, **(small | choices)), list(choices)[-1])
    assert visible(finished.path) == before


@pytest.mark.parametrize('costs', [{'cost_miss': 0}, {'cost_false_alarm': -1.0}], ids=str)
def test_impossible_costs_are_refused_before_anything_is_trained(costs, finished, monkeypatch):
    def trained(*a, **k): raise AssertionError('it was trained first')
    monkeypatch.setattr('edgenb.tune.fit', trained)
    before = visible(finished.path)
    refused(lambda: tune(finished, method='head', size=32, **costs), 'above 0')
    assert visible(finished.path) == before
    for miss, false_alarm in [(0, 1), (1, 0), (-1, 1)]: refused(lambda: decision_costs(miss, false_alarm), 'above 0')


def test_training_without_a_certificate_is_refused_and_names_the_gate(frozen):
    before = visible(frozen.path)
    refused(lambda: tune(frozen), 'class floor', "accept_gates=['class floor']")
    refused(lambda: tune(frozen, accept_gates=['class floor']), 'label accuracy')
    assert visible(frozen.path) == before


def test_a_room_entered_too_early_says_which_comes_first(frozen, tmp_path):
    for room, first in [(tune, 'data'), (learn, 'data')]: refused(lambda: room(Run(tmp_path/'new')), f'run {first}(run) first')
    for room in (squeeze, compile, verify, ship): refused(lambda: room(frozen), 'run tune(run) first')
    for room in (watch, learn): refused(lambda: room(frozen), 'run ship(run) first')


@pytest.mark.parametrize('choices,words', [({}, 'no artifact may ship'), ({'artifact': 'onnxruntime-fp32'}, "'fail'"),
    ({'artifact': 'onnxruntime-fp32', 'accept': ['undecided', 'not run here']}, "'fail'"),
    ({'artifact': 'onnxruntime-fp32', 'accept': ['fail']}, 'cannot be accepted')], ids=str)
def test_an_artifact_that_failed_does_not_ship_whatever_is_accepted(choices, words, finished):
    card = finished.card('verify')
    failed = {'verdict': 'fail', 'reason': 'loses at least 0.200 accuracy'}
    rows = [r | failed if r['artifact'] != 'reference' else r for r in card.result['rows']]
    replace(card, result=card.result | {'rows': rows, 'chosen': None}).save(finished._card_path('verify'))
    before = visible(finished.path)
    refused(lambda: ship(finished, **choices), words)
    assert visible(finished.path) == before
    with pytest.raises(EdgenbError): shippable(rows, 'onnxruntime-fp32', ['undecided', 'not run here'])


def test_learning_without_images_of_the_field_says_how_to_hold_some_back(frozen, toy_run):
    for name in ('tune', 'ship'): replace(toy_run.card(name), read={}).save(frozen._card_path(name))
    before = visible(frozen.path)
    refused(lambda: learn(frozen), 'field=0.1')
    assert visible(frozen.path) == before


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_no_numbers_are_refused(bad):
    x = np.random.default_rng(0).normal(size=(20, 3))
    broken = x.copy(); broken[4, 1] = bad
    for call in (lambda: mmd_test(x, broken), lambda: mmd_test(broken, x), lambda: Sketch.fit(broken), lambda: Sketch.fit(x).update(broken),
                 lambda: Sketch.fit(x).update(broken[4])):
        refused(call, 'NaN')
    known = Sketch.fit(x)
    total = known.total.copy()
    refused(lambda: known.update(broken))
    assert known.count == 20 and np.array_equal(known.total, total)


@pytest.mark.parametrize('x,y', [((5, 3), (5, 4)), ((5,), (5, 3)), ((1, 3), (5, 3)), ((5, 3), (0, 3))], ids=str)
def test_embeddings_of_the_wrong_shape_are_refused(x, y):
    refused(lambda: mmd_test(np.ones(x), np.ones(y)))
    if x != (5, 3): refused(lambda: Sketch.fit(np.ones(x)))
    elif len(y) == 2 and y[1] != 3: refused(lambda: Sketch.fit(np.random.default_rng(0).normal(size=x)).update(np.ones(y)))


# Bundles ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def bundle(toy_run, tmp_path): return Path(shutil.copytree(bundle_of(toy_run), tmp_path/'bundle'))


def resealed(bundle, **changes):
    "Change the manifest and give it the right digests, as a newer edgenb or a careful forger would."
    manifest = json.loads((bundle/'manifest.json').read_text(encoding='utf-8'))
    manifest |= {'files': {p.relative_to(bundle).as_posix(): digest(p) for p in sorted(bundle.rglob('*')) if p.is_file() and p.name != 'manifest.json'}} | changes
    manifest = {k: v for k, v in manifest.items() if v is not None and k != 'digest'}
    write_json(bundle/'manifest.json', manifest | {'digest': digest_of(manifest)})
    return bundle


FILES = ['manifest.json', 'model.onnx', 'pipeline.json', 'parity.json', 'reference.sketch', 'card.json', 'golden.json', *(f'golden/{n}.png' for n in range(4))]


def test_a_whole_bundle_is_loaded_and_holds_the_files_tested_here(bundle):
    assert load_bundle(bundle).manifest['artifact'] == 'onnxruntime-fp32' and load_bundle(resealed(bundle)).manifest['files']
    assert sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob('*') if p.is_file()) == sorted(FILES)


@pytest.mark.parametrize('name', FILES)
def test_one_changed_byte_anywhere_in_a_bundle_is_refused(name, bundle):
    whole, rng = (bundle/name).read_bytes(), np.random.default_rng(FILES.index(name))
    offsets = range(len(whole)) if name == 'manifest.json' else [0, len(whole) - 1, *rng.integers(0, len(whole), 6)]
    for at in offsets:
        with open(bundle/name, 'r+b') as f: f.seek(int(at)); f.write(bytes([whole[at] ^ int(rng.integers(1, 256))]))
        refused(lambda: load_bundle(bundle), name)
        with open(bundle/name, 'r+b') as f: f.seek(int(at)); f.write(whole[at:at+1])
    assert load_bundle(bundle).manifest['name'] == 'model'


def test_a_manifest_of_which_only_the_layout_changed_is_refused_too(bundle):
    whole = (bundle/'manifest.json').read_bytes()
    (bundle/'manifest.json').write_bytes(whole.replace(b'\n', b' ', 1))
    refused(lambda: load_bundle(bundle), 'manifest.json')


@pytest.mark.parametrize('name', FILES)
def test_a_missing_or_shortened_file_is_named(name, bundle):
    whole = (bundle/name).read_bytes()
    (bundle/name).write_bytes(whole[:-7])
    refused(lambda: load_bundle(bundle), name)
    (bundle/name).unlink()
    refused(lambda: load_bundle(bundle), name)


@pytest.mark.parametrize('name', ['extra.txt', 'model.fp32.onnx', 'inner/code.py', '.hidden'])
def test_a_file_that_does_not_belong_to_a_bundle_is_named(name, bundle):
    (bundle/name).parent.mkdir(exist_ok=True)
    (bundle/name).write_bytes(b'')
    refused(lambda: load_bundle(bundle), name, 'not part of the bundle')


def test_what_is_newer_than_this_edgenb_asks_for_a_newer_one(bundle):
    refused(lambda: load_bundle(resealed(bundle, edgenb_bundle=2)), 'format 2', 'install')
    resealed(bundle, edgenb_bundle=1)
    pipeline = json.loads((bundle/'pipeline.json').read_text())
    for newer, words in [(pipeline | {'edgenb_pipeline': 2}, ['format 2', 'install a newer edgenb']),
                         (pipeline | {'steps': [pipeline['steps'][0] | {'version': 2}, *pipeline['steps'][1:]]},
                          ['step decode', 'version 2', 'install a newer edgenb']),
                         (pipeline | {'steps': [{'step': 'denoise', 'version': 1}, *pipeline['steps']]}, ['denoise', 'newer edgenb'])]:
        write_json(bundle/'pipeline.json', newer)
        refused(lambda: load_bundle(resealed(bundle)), *words)


def test_a_sketch_newer_than_this_edgenb_asks_for_a_newer_one(bundle):
    parts = dict(np.load(bundle/'reference.sketch'))
    np.savez(bundle/'new.npz', **(parts | {'format': 2}))
    os.replace(bundle/'new.npz', bundle/'reference.sketch')
    refused(lambda: load_bundle(resealed(bundle)), 'format 2', 'install a newer edgenb')


NO_MANIFEST = [b'', b'not JSON', b'[]', b'{}', b'null', b'7', b'\xff\xfe\x00', b'{"edgenb_bundle": 1}',
               b'{"edgenb_bundle": "1", "files": {}}', b'{"edgenb_bundle": null, "files": {}}',
               b'{"edgenb_bundle": 1, "files": 3}', b'['*100_000]


@pytest.mark.parametrize('content', NO_MANIFEST, ids=lambda c: repr(c[:40]))
def test_a_manifest_that_is_none_is_refused(content, bundle):
    (bundle/'manifest.json').write_bytes(content)
    refused(lambda: load_bundle(bundle), 'manifest.json')


@pytest.mark.parametrize('changes', [{'runtime': None}, {'model': None}, {'runtime': 'onxruntime'}, {'runtime': 7},
                                     {'model': 'absent.onnx'}, {'model': '../outside.onnx'}, {'files': 3}, {'files': None}], ids=str)
def test_a_manifest_that_contradicts_itself_is_refused_although_its_digest_is_right(changes, bundle):
    shutil.copyfile(bundle/'model.onnx', bundle.parent/'outside.onnx')
    refused(lambda: load_bundle(resealed(bundle, **changes)))


@pytest.mark.parametrize('name,content', [('model.onnx', b'no model'), ('model.onnx', b''), ('reference.sketch', b'no sketch'),
                                          ('pipeline.json', b'{}'), ('pipeline.json', b'\xff'),
    ('pipeline.json', b'{"edgenb_pipeline": 1}'), ('pipeline.json',
                                                   b'{"edgenb_pipeline": 1, "classes": ["a", "b"], "steps": [{"step": "model"}]}'),
    ('pipeline.json', b'{"edgenb_pipeline": "1", "classes": ["a", "b"], "steps": []}')], ids=str)
def test_a_file_that_was_bad_when_it_was_packed_is_refused(name, content, bundle):
    (bundle/name).write_bytes(content)
    refused(lambda: load_bundle(resealed(bundle)))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path, toy_images):
    for folder in (tmp_path, tmp_path/'nowhere', toy_images): refused(lambda: load_bundle(folder), 'is not a bundle')


def test_a_bundle_refuses_an_unreadable_image_and_goes_on_deciding(bundle, toy_images):
    loaded, good = load_bundle(bundle), sorted(toy_images.rglob('*.png'))[0]
    for content in UNREADABLE.values(): refused(lambda: loaded.predict([content]))
    refused(lambda: loaded.predict([toy_images/'gone.png']), 'gone.png')
    assert loaded.predict([good]) == loaded.predict([good.read_bytes()])


# Properties ---------------------------------------------------------------------------------------------------------

@st.composite
def boxed_images(draw):
    "Sizes of images, and boxes inside them with one of three classes."
    found = []
    for _ in range(draw(st.integers(1, 4))):
        w, h = draw(st.integers(1, 300)), draw(st.integers(1, 300))
        edges = st.tuples(st.integers(0, w), st.integers(0, w), st.integers(0, h), st.integers(0, h), st.integers(0, 2))
        found.append(((w, h), [(min(a, b), min(c, d), abs(a - b), abs(c - d), k) for a, b, c, d, k in draw(st.lists(edges, max_size=4))]))
    return found


@properties
@given(images=boxed_images(), labels=st.sampled_from(['any', 'category']))
def test_boxes_come_out_of_coco_and_yolo_as_they_went_in(images, labels, tmp_path_factory):
    root, names = tmp_path_factory.mktemp('boxes'), ['crack', 'dent', 'spot']
    for folder in ('images', 'labels'): (root/folder).mkdir()
    coco = {'images': [], 'annotations': [], 'categories': [{'id': k + 10, 'name': n} for k, n in enumerate(names)]}
    (root/'data.yaml').write_text(f'names: {json.dumps(names)}')
    for n, ((w, h), boxes) in enumerate(images):
        Image.new('1', (w, h)).save(root/'images'/f'{n}.png')
        coco['images'].append({'id': n, 'file_name': f'{n}.png', 'width': w, 'height': h})
        coco['annotations'] += [{'id': n*10 + i, 'image_id': n, 'category_id': b[4] + 10, 'bbox': b[:4]} for i, b in enumerate(boxes)]
        rows = [f'{k} {(x + bw/2)/w:.8f} {(y + bh/2)/h:.8f} {bw/w:.8f} {bh/h:.8f}\n' for x, y, bw, bh, k in boxes]
        (root/'labels'/f'{n}.txt').write_text(''.join(rows))
    (root/'coco.json').write_text(json.dumps(coco))
    mixed = labels == 'category' and any(len({b[4] for b in boxes}) > 1 for _, boxes in images)
    if mixed:
        refused(lambda: read_coco(root/'coco.json', labels=labels), 'several classes')
        refused(lambda: read_yolo(root, labels=labels), 'several classes')
        return
    for found in (read_coco(root/'coco.json', labels=labels), read_yolo(root, labels=labels)):
        assert [e.id for e in found] == [str(n) for n in range(len(images))]
        for e, (_, boxes) in zip(found, images):
            assert [b[4] for b in e.boxes] == [names[b[4]] for b in boxes]
            assert np.allclose([b[:4] for b in e.boxes], [b[:4] for b in boxes], atol=1e-4)
            assert e.label == ('clean' if not boxes else 'defective' if labels == 'any' else names[boxes[0][4]])


strata_and_clusters = st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 12)), min_size=1, max_size=80)
shares = st.tuples(*[st.floats(0, 0.33)]*3).map(lambda s: dict(zip(('test', 'validation', 'field'), s)))


@properties
@given(rows=strata_and_clusters, fractions=shares, seed=st.integers(0, 99))
def test_a_split_never_divides_a_cluster_and_repeats_by_seed(rows, fractions, seed):
    strata, clusters = [s for s, _ in rows], np.array([c for _, c in rows])
    parts = split(strata, clusters, fractions, seed)
    assert len(parts) == len(rows) and set(parts) <= {'train', *fractions}
    for c in set(clusters.tolist()): assert len({p for p, k in zip(parts, clusters) if k == c}) == 1
    assert parts == split(strata, clusters, fractions, seed)


@properties
@given(strata=st.lists(st.sampled_from('abc'), min_size=1, max_size=120), fractions=shares, seed=st.integers(0, 99))
def test_a_split_takes_its_share_of_every_stratum(strata, fractions, seed):
    parts = split(strata, np.arange(len(strata)), fractions, seed)
    for s in set(strata):
        for name, share in fractions.items():
            assert abs(sum(p == name and k == s for p, k in zip(parts, strata)) - strata.count(s)*share) <= 1


def test_another_seed_gives_another_split():
    assert len({tuple(split(['a']*40, np.arange(40), {'test': 0.5}, seed)) for seed in range(5)}) == 5


finite = st.floats(-10, 10, allow_nan=False)


@properties
@given(classes=st.lists(st.text(max_size=8), min_size=2, max_size=4, unique=True), size=st.integers(1, 512),
       mode=st.sampled_from(['L', 'RGB']),
       mean=st.lists(finite, min_size=1, max_size=3), filter=st.sampled_from(sorted(FILTERS)), temperature=st.floats(0.1, 10),
       bias=st.none() | st.lists(finite, min_size=2, max_size=2),
       threshold=st.floats(0, 1), review=st.none() | st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_a_pipeline_is_read_as_it_was_written(tmp_path_factory, classes, size, mode, mean, filter, temperature, bias, threshold, review):
    p = image_pipeline(classes, size, mode, mean, [1.0]*len(mean), filter, negative=len(classes) - 1)
    p = p.with_step('softmax', temperature=temperature, bias=bias).with_step('decide', threshold=threshold, review=review)
    assert Pipeline.load(p.save(tmp_path_factory.mktemp('pipeline')/'pipeline.json')) == p


def facts(s): return s.dimensions, s.bandwidth, s.features, s.seed, s.count
def same(a, b): return facts(a) == facts(b) and np.array_equal(a.total, b.total)
def close(a, b): return a.count == b.count and np.allclose(a.total, b.total, rtol=1e-9, atol=1e-9)


@properties
@given(seed=st.integers(0, 999), sizes=st.tuples(*[st.integers(0, 9)]*3), scale=st.floats(1e-3, 1e3))
def test_sketches_merge_in_any_order_and_grouping(seed, sizes, scale):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20 + sum(sizes), 4))*scale
    reference = Sketch.fit(x[:20], features=16)
    a, b, c = (reference.empty().update(part) if len(part) else reference.empty() for part in np.split(x[20:], np.cumsum(sizes)[:2]))
    whole = reference.empty()
    for i in 20 + rng.permutation(sum(sizes)): whole.update(x[i])
    assert close(a.merge(b), b.merge(a)) and close(a.merge(b).merge(c), a.merge(b.merge(c))) and close(a.merge(b).merge(c), whole)
    for s in (a, whole): assert same(Sketch.from_bytes(s.to_bytes()), s) and Sketch.from_bytes(s.to_bytes()).to_bytes() == s.to_bytes()


SMALL = Sketch.fit(np.random.default_rng(0).normal(size=(30, 3)), features=8)


def survives(damaged):
    try: return same(Sketch.from_bytes(damaged), SMALL)
    except EdgenbError: return True


def test_a_sketch_with_one_damaged_byte_is_refused_or_unharmed():
    whole, rng = SMALL.to_bytes(), np.random.default_rng(0)
    for at in range(len(whole)): assert survives(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at+1:]), at


@properties
@given(changes=st.lists(st.tuples(st.integers(0, len(SMALL.to_bytes()) - 1), st.integers(0, 255)), max_size=6),
       end=st.integers(0, len(SMALL.to_bytes())))
def test_a_sketch_that_is_cut_or_damaged_is_refused_or_unharmed(changes, end):
    damaged = bytearray(SMALL.to_bytes())
    for at, value in changes: damaged[at] = value
    assert survives(bytes(damaged)) and survives(bytes(damaged[:end]))


@pytest.mark.parametrize('changes', [{'seed': None}, {'total': None}, {'total': np.zeros(3)}, {'total': np.full(8, np.nan)},
                                     {'total': np.array(['a']*8)}, {'features': 7}, {'features': 0},
    {'count': -5}, {'bandwidth': np.nan}, {'bandwidth': 0.0}, {'seed': -1}, {'seed': 'x'}, {'dimensions': -2}, {'format': 'x'}], ids=str)
def test_a_sketch_whose_parts_do_not_fit_is_refused(changes):
    parts, out = dict(np.load(io.BytesIO(SMALL.to_bytes()))) | changes, io.BytesIO()
    np.savez(out, **{k: v for k, v in parts.items() if v is not None})
    refused(lambda: Sketch.from_bytes(out.getvalue()))


ORDER = {'fail': 0, 'undecided': 1, 'pass': 2}


@st.composite
def two_answers(draw):
    "Truth with both classes, and two models' scores on it, with ties."
    n = draw(st.integers(2, 40))
    y = np.array([0, 1] + draw(st.lists(st.integers(0, 1), min_size=n - 2, max_size=n - 2)))
    a, b = (np.array(draw(st.lists(st.sampled_from([0.1, 0.4, 0.5, 0.6, 0.9]), min_size=n, max_size=n))) for _ in range(2))
    return y, *({'label': (s >= 0.5).astype(int), 'score': s, 'negative': 0} for s in (a, b))


@properties
@given(case=two_answers(), metric=st.sampled_from(sorted(METRICS)), tolerance=st.floats(0, 1))
def test_a_candidate_that_is_its_own_reference_never_fails(case, metric, tolerance):
    y, a, _ = case
    p = parity(a, a, (None, y), metric, tolerance, resamples=100)
    assert p.verdict in ('pass', 'undecided') and p.delta == 0 and p.flipped == []


@properties
@given(case=two_answers(), metric=st.sampled_from(sorted(METRICS)), tolerances=st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_a_larger_tolerance_never_makes_a_verdict_worse(case, metric, tolerances):
    y, a, b = case
    verdicts = [ORDER[parity(a, b, (None, y), metric, t, resamples=100).verdict] for t in sorted(tolerances)]
    assert verdicts == sorted(verdicts)


@pytest.mark.parametrize('lost,n', [(1, 10), (2, 20), (3, 30), (1, 5), (3, 10), (1, 100)])
def test_a_loss_of_exactly_the_tolerance_is_decided_or_left_undecided(lost, n):
    y = np.arange(n) % 2
    wrong = np.where(np.arange(n) < lost, 1 - y, y)
    a, b = ({'label': l, 'score': l.astype(float), 'negative': 0} for l in (y, wrong))
    assert parity(a, b, (None, y), 'accuracy', lost/n, resamples=200).verdict == 'undecided'


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('y', [[0, 0, 0, 0], [1, 1, 1, 1], []], ids=str)
def test_parity_on_images_that_cannot_tell_is_undecided_or_a_clear_error(metric, y):
    a, b = ({'label': np.array(l[:len(y)]), 'score': np.array(l[:len(y)])*0.8 + 0.1, 'negative': 0} for l in ([0, 1, 0, 1], [0, 1, 1, 1]))
    for candidate in (a, b):
        try: found = parity(a, candidate, (None, y), metric, 0.02, resamples=50)
        except EdgenbError as e: assert '\n' not in str(e)
        else: assert found.verdict in ORDER and (found.verdict == 'undecided' or np.isfinite([found.value, found.delta]).all())


# Second opinions ----------------------------------------------------------------------------------------------------

def plain_mmd2(x, y, bandwidth):
    def k(a, b): return np.exp(-sum((p - q)**2 for p, q in zip(a, b))/(2*bandwidth**2))
    def within(s): return sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j)/(len(s)*(len(s) - 1))
    return within(x) + within(y) - 2*sum(k(a, b) for a in x for b in y)/(len(x)*len(y))


@pytest.mark.parametrize('n,m,d,shift', [(2, 2, 1, 0), (9, 14, 3, 0), (15, 6, 5, 1.5)])
def test_mmd_equals_a_plain_double_loop(n, m, d, shift):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + shift
    for bandwidth in (0.7, None):
        found = mmd_test(x, y, permutations=50, bandwidth=bandwidth)
        assert found.statistic == pytest.approx(plain_mmd2(x, y, bandwidth or found.bandwidth), abs=1e-10)
    z = np.concatenate([x, y])
    assert found.bandwidth == pytest.approx(np.median([np.linalg.norm(a - b) for a, b in combinations(z, 2)]))


@pytest.mark.parametrize('shift', [0.0, 1.0, 5.0])
def test_the_p_value_of_mmd_is_that_of_all_the_ways_to_divide_the_sample(shift):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(4, 2)), rng.normal(size=(4, 2)) + shift
    z, found = np.concatenate([x, y]), mmd_test(x, y, permutations=6000, bandwidth=2.0)
    ways = [plain_mmd2(z[list(c)], z[[i for i in range(8) if i not in c]], 2.0) for c in combinations(range(8), 4)]
    exact = np.mean(np.array(ways) >= plain_mmd2(x, y, 2.0) - 1e-12)
    assert found.p_value == pytest.approx(exact, abs=4*np.sqrt(exact*(1 - exact)/6000) + 2e-4)


@pytest.mark.parametrize('levels', [2, 5, 1000])
def test_auc_equals_that_of_scikit_learn_with_ties(levels):
    from sklearn.metrics import roc_auc_score
    for seed in range(10):
        rng = np.random.default_rng(seed)
        y, score = rng.permutation(np.arange(50) % 3 > 0).astype(int), rng.integers(0, levels, 50)/levels
        assert auc(y, {'score': score, 'negative': 0}) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
        assert auc(y, {'score': score, 'negative': 1}) == pytest.approx(roc_auc_score(1 - y, score), abs=1e-12)


@pytest.mark.parametrize('hits,n', [(0, 1), (0, 30), (7, 10), (95, 100), (100, 100), (655, 656)])
@pytest.mark.parametrize('confidence,z', [(0.95, 1.959963984540054), (0.9, 1.6448536269514722), (0.99, 2.5758293035489004)])
def test_the_interval_of_a_rate_is_wilsons(hits, n, confidence, z):
    middle, half = hits/n + z*z/(2*n), z*np.sqrt(hits/n*(1 - hits/n)/n + z*z/(4*n*n))
    assert rate_interval(hits, n, confidence) == pytest.approx(((middle - half)/(1 + z*z/n), (middle + half)/(1 + z*z/n)), abs=1e-12)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('filter', sorted(FILTERS))
def test_preprocessing_equals_pillow_and_numpy_step_by_step(mode, filter):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70) if mode == 'L' else (50, 70, 3)).astype(np.uint8)
    mean, std = ([0.5], [0.25]) if mode == 'L' else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    small = np.asarray(Image.fromarray(pixels, mode).resize((24, 16), getattr(Image.Resampling, filter.upper())))
    assert np.array_equal(resize(pixels, 16, 24, filter), small)
    x = to_tensor(small, mean, std)
    assert x.shape == (3, 16, 24) and x.dtype == np.float32 and x.flags.c_contiguous
    for c in range(3):
        plane = small if mode == 'L' else small[..., c]
        assert np.allclose(x[c], (plane/255 - mean[c % len(mean)])/std[c % len(std)], atol=1e-6)


def test_the_bundle_scores_every_image_as_the_network_that_was_tuned(toy_run, toy_images):
    import torch
    from edgenb.tune import tuned
    net, pipeline = tuned(toy_run)
    images = sorted(toy_images.rglob('*.png'))
    with torch.inference_mode(): logits = net(torch.from_numpy(np.stack([pipeline.before(i) for i in images])))[0].double()
    step = pipeline.step('softmax')
    expected = (logits/step['temperature'] + torch.tensor(step['bias'])).softmax(-1)[:, 1].numpy()
    answer = load_bundle(bundle_of(toy_run)).answer(images)
    assert np.abs(answer['score'] - expected).max() <= 1e-4
    assert ((0.02 < expected) & (expected < 0.98)).sum() >= 20       # else agreement would say little
    truth = np.array([i.parent.name == 'scratch' for i in images])
    assert (answer['label'] == truth).mean() > 0.9 and ((answer['decision'] == 'reject') == (answer['score'] >= 0.5)).all()


def texture(rng, size=128):
    "A random surface with structure of all sizes."
    def layer(k): return np.asarray(Image.fromarray(rng.normal(size=(k, k)).astype(np.float32)).resize((size, size),
        Image.Resampling.BICUBIC))
    return np.clip(110 + 12*layer(4) + 12*layer(12) + 10*layer(40) + rng.normal(0, 4, (size, size)), 0, 255).astype(np.uint8)


def again(pixels, quality, brightness):
    "A second photograph."
    return decode(as_bytes(Image.fromarray((pixels*brightness + 10).astype(np.uint8)), 'JPEG', quality=quality))


@pytest.mark.parametrize('make', [lambda rng: rng.integers(60, 180, (64, 64)).astype(np.uint8), texture], ids=['noise', 'texture'])
@pytest.mark.parametrize('copies', [1, 3, 20])
def test_planted_near_duplicates_are_found_and_nothing_else(make, copies):
    rng = np.random.default_rng(5)
    images, shows = [make(rng) for _ in range(80)], list(range(80))
    for i in (3, 17, 40, 71):
        images += [again(images[i], 96 - n % 4*2, 1 - n/100) for n in range(copies)] + [(images[i]*0.7 + 20).astype(np.uint8), images[i]]
        shows += [i]*(copies + 2)
    thumbs = np.stack([thumbnail(i) for i in images])
    alike, found = np.corrcoef(thumbs.reshape(len(thumbs), -1)), near_duplicates(thumbs)
    expected = {(i, j) for i, j in combinations(range(len(images)), 2) if shows[i] == shows[j]}
    assert min(alike[i, j] for i, j in expected) > 0.97        # as they are, they are hard to tell apart
    assert {(i, j) for i, j, _ in found.pairs} == expected
    assert len(set(zip(found.clusters.tolist(), shows))) == 80 == len(set(found.clusters.tolist()))


@pytest.mark.parametrize('make', [lambda rng: rng.integers(0, 256, (64, 64)), lambda rng: texture(rng),
                                  lambda rng: np.clip(rng.normal(128, 2, (64, 64)), 0, 255)], ids=['noise', 'texture', 'faint'])
def test_independent_images_are_not_paired(make):
    rng = np.random.default_rng(6)
    found = near_duplicates(np.stack([thumbnail(make(rng).astype(np.uint8)) for _ in range(150)]))
    assert found.pairs == [] and len(set(found.clusters.tolist())) == 150


def test_an_artifact_whose_scores_are_no_numbers_fails_and_is_reported():
    y = np.array([0, 1]*20)
    good = {'label': y, 'score': y.astype(float)}
    broken = parity(good, {'label': y, 'score': np.full(40, np.nan)}, (None, y))
    assert broken.verdict == 'fail' and 'finite' in broken.reason


@pytest.mark.parametrize('n,losses', [(20, 0), (20, 1), (300, 1), (656, 3)])
def test_more_losses_never_look_safer(n, losses):
    assert paired_interval(0, losses + 1, n)[0] < paired_interval(0, losses, n)[0] < 0


def test_flips_outside_the_metrics_denominator_prove_nothing():
    y = np.array([0]*50 + [1]*10)
    reference, candidate = y.copy(), y.copy()
    candidate[:10] = 1                                # ten false alarms, and ten defective images say nothing about 2 points
    found = parity({'label': reference, 'score': reference*1.0}, {'label': candidate, 'score': candidate*1.0}, (None, y), metric='detection rate')
    assert found.verdict == 'undecided' and found.delta_low < -0.1


def test_the_paired_interval_keeps_its_promise():
    drawn = np.random.default_rng(0).multinomial(300, [0.01, 0.03, 0.96], size=800)
    low = np.array([paired_interval(gains, losses, 300)[0] for gains, losses, _ in drawn])
    assert 0.005 < (low >= -0.02).mean() < 0.04       # a true loss of exactly the tolerance passes in 2.5 % of draws


def test_weights_that_saw_a_test_image_are_not_taken_up_again(toy_run, tmp_path):
    run = Run(tmp_path/'run')
    failing = [g['gate'] for g in data(run, source=toy_run.card('data').asked['source'], seed=1).result['certificate']['gates'] if not g['passed']]
    refused(lambda: tune(run, accept_gates=failing, start_from=toy_run.file('tune', 'model.safetensors')), 'now in validation or test')


def test_new_examples_are_copied_into_the_run_and_those_that_look_like_test_images_left_out(toy_run, tmp_path):
    asked = toy_run.card('data').asked
    secret, other = examples_of(toy_run, 'test')[0], examples_of(toy_run, 'train')[0]
    for n, e in (('leak', secret), ('fine', other)):
        (tmp_path/'more'/e.label).mkdir(parents=True, exist_ok=True)
        shutil.copy(e.path, tmp_path/'more'/e.label/f'{n}.png')
    run = Run(tmp_path/'run')
    data(run, source=asked['source'], kind='synthetic', field=asked['field'], extra=[tmp_path/'more'])
    shutil.rmtree(tmp_path/'more')
    added = [e for e in examples_of(run, 'train') if 'fine' in e.id]
    assert added[0].read() and not any('leak' in e.id for e in examples_of(run, 'all'))
    assert any('left out' in line for line in run.file('data', 'problems.jsonl').read_text().splitlines())


def test_synthetic_images_are_called_synthetic_to_the_end(toy_run):
    from edgenb.mill import summary
    manifest = load_bundle(bundle_of(toy_run)).manifest
    assert {c.data for c in toy_run.cards()} == {'synthetic'} == {manifest['data'], summary(toy_run)['data']}
    assert any('synthetic' in w for w in manifest['warnings'])
