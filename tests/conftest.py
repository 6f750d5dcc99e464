"""Small images and one finished run that the tests share."""
import numpy as np
import pytest
from PIL import Image, ImageDraw


FAST_FIRST = ['test_core', 'test_cli', 'test_doctor', 'test_card', 'test_mill', 'test_sweep', 'test_ledger', 'test_device', 'test_measure', 'test_runtimes_openvino_litert', 'test_runtimes_other', 'test_gate', 'test_drift', 'test_notes', 'test_coder', 'test_llama', 'test_lm', 'test_gguf', 'test_deidentify', 'test_mentions', 'test_records', 'test_bad_input', 'test_notebooks', 'test_tune', 'test_lab', 'test_book', 'test_device_environment', 'test_recipes', 'test_browser']


def pytest_collection_modifyitems(items): items.sort(key=lambda i: FAST_FIRST.index(i.path.stem) if i.path.stem in FAST_FIRST else 0)


def toy_image(rng, scratched: bool) -> Image.Image:
    "A noisy grey surface, 64 x 64, with or without a bright line across it."
    slope = np.add.outer(np.linspace(-1, 1, 64)*rng.uniform(-20, 20), np.linspace(-1, 1, 64)*rng.uniform(-20, 20))
    image = Image.fromarray(np.clip(110 + slope + rng.normal(0, 12, (64, 64)), 0, 255).astype(np.uint8))
    if scratched:
        (a, b), (c, d) = rng.integers(4, 60, 2), rng.integers(4, 60, 2)
        ImageDraw.Draw(image).line([(0, int(a)), (int(c), int(b)), (63, int(d))], fill=185, width=2)
    return image


@pytest.fixture(scope='session')
def toy_images(tmp_path_factory):
    "A folder with 60 clean and 60 scratched images."
    root, rng = tmp_path_factory.mktemp('toy')/'images', np.random.default_rng(7)
    for name in ('clean', 'scratch'):
        (root/name).mkdir(parents=True)
        for n in range(60): toy_image(rng, name == 'scratch').save(root/name/f'{n:02}.png')
    return root


@pytest.fixture(scope='session')
def toy_run(toy_images, tmp_path_factory):
    "The whole loop, data to learn, done on `toy_images`."
    from edgenb.core import EdgenbError, Run
    from edgenb.weights import fetch
    try: fetch('bundled:efficientnet-lite0')
    except EdgenbError as e: pytest.skip(f'no pretrained weights: {e}')
    from edgenb.compile import compile
    from edgenb.data import data
    from edgenb.learn import learn
    from edgenb.ship import ship
    from edgenb.squeeze import squeeze
    from edgenb.tune import tune
    from edgenb.verify import verify
    from edgenb.watch import watch
    run = Run.start('toy', tmp_path_factory.mktemp('runs'))
    failing = [g['gate'] for g in data(run, source=str(toy_images), kind='synthetic', field=0.1).result['certificate']['gates'] if not g['passed']]
    tune(run, method='head', size=64, num_train_epochs=2, head_learning_rate=0.004, accept_gates=failing)
    squeeze(run, precisions=['fp32'], calibration_images=16)
    compile(run)
    verify(run, tolerance=0.5, latency_budget_ms=10_000, timing_runs=10)
    ship(run, accept=['undecided'])
    watch(run, window=30)
    learn(run, budget=5)
    return run
