"Fine-tuning: every method, any network, the same result twice, and after an interruption."
import shutil
import numpy as np
import pytest
from edgenb.core import EdgenbError, Run
from edgenb.tune import tune, tuned

SMALL = dict(size=64, num_train_epochs=2, num_threads=1)


@pytest.fixture
def fresh(toy_run, tmp_path):
    "A run that holds only what `data` left, with rooms of its own."
    run = Run(tmp_path/'run')
    run.path.mkdir()
    shutil.copy(toy_run.path/'01-data.json', run.path)
    for p in toy_run.path.glob('01-data.*/'):
        if p.is_dir(): shutil.copytree(p, run.path/p.name)
    return run


def gates(run): return [g['gate'] for g in run.card('data').result['certificate']['gates'] if not g['passed']]


def same(a, b): return all(np.array_equal(x.numpy(), y.numpy()) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize('method', ['full', 'lora', 'head'])
def test_each_method_changes_what_it_says_and_leaves_a_plain_network(fresh, method):
    from edgenb.vision import lite0
    card = tune(fresh, method=method, accept_gates=gates(fresh), lora_r=4, **SMALL)
    net, base = tuned(fresh)[0].state_dict(), lite0().state_dict()
    assert set(net) == set(base) and card.result['parameters'] == sum(v.numel() for k, v in net.items() if 'running' not in k and 'num_batches' not in k)
    moved = {k for k in net if k.split('.')[0] != 'head' and not np.array_equal(net[k].numpy(), base[k].numpy())}
    if method == 'head': assert not moved
    if method == 'lora': assert moved and all(k.endswith('conv.weight') and net[k].shape[-1] == 1 for k in moved)   # 1 x 1 convolutions only
    if method == 'full': assert any('norm' in k for k in moved) and not any(k.startswith(('stem.', 'blocks.0.', 'blocks.2.')) for k in moved)


def test_the_same_seed_gives_the_same_network_and_another_seed_another(fresh, tmp_path):
    first = tune(fresh, method='head', accept_gates=gates(fresh), seed=3, **SMALL)
    again = Run(tmp_path/'again'); shutil.copytree(fresh.path, again.path, ignore=shutil.ignore_patterns('02-*', '.rooms', '.lock'))
    second = tune(again, method='head', accept_gates=gates(fresh), seed=3, **SMALL)
    assert not second.skipped and first.output == second.output
    assert tune(again, method='head', accept_gates=gates(fresh), seed=4, **SMALL).output != first.output


def test_an_interrupted_training_goes_on_to_the_result_of_an_uninterrupted_one(fresh, tmp_path, monkeypatch):
    import edgenb.tune as module
    given = dict(method='full', accept_gates=gates(fresh), size=64, num_train_epochs=3, num_threads=1)
    other = Run(tmp_path/'other'); shutil.copytree(fresh.path, other.path, ignore=shutil.ignore_patterns('.rooms', '.lock'))
    whole = tune(other, **given)
    save, saved = module._checkpoint, []
    def once(*args):
        save(*args); saved.append(1)
        if len(saved) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(module, '_checkpoint', once)
    with pytest.raises(KeyboardInterrupt): tune(fresh, **given)
    assert not list(fresh.path.glob('02-tune*'))          # nothing half-done
    resumed = tune(fresh, **given)
    assert len(saved) == 3 and resumed.output == whole.output   # one epoch was left to do


def test_any_image_model_of_transformers_goes_through_the_loop_from_a_folder(fresh, tmp_path):
    from transformers import MobileViTConfig, MobileViTForImageClassification, MobileViTImageProcessor
    from edgenb.compile import compile
    from edgenb.squeeze import squeeze
    from edgenb.verify import verify
    config = MobileViTConfig(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32], num_labels=5, image_size=64)
    MobileViTForImageClassification(config).save_pretrained(tmp_path/'net')
    MobileViTImageProcessor(size={'shortest_edge': 64}, crop_size={'height': 64, 'width': 64}).save_pretrained(tmp_path/'net')
    card = tune(fresh, model_name_or_path=str(tmp_path/'net'), method='full', accept_gates=gates(fresh), **SMALL)
    assert 'base' in card.read                            # other weights in the folder would be another key
    squeeze(fresh, precisions=['fp32']); compile(fresh)
    rows = verify(fresh, tolerance=0.5, latency_budget_ms=10_000, timing_runs=5).result['rows']
    assert [r['artifact'] for r in rows] == ['reference', 'squeezed', 'onnxruntime-fp32'] and rows[2]['flipped'] == []


def test_a_hub_id_without_a_network_says_what_to_pass_instead(fresh, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)   # read from the environment at import, which may have been: it would try for minutes
    with pytest.raises(EdgenbError, match='pass a local folder or bundled:efficientnet-lite0'):
        tune(fresh, model_name_or_path='nobody/no-such-model', accept_gates=gates(fresh), **SMALL)


def test_training_never_reads_a_test_image(fresh):
    from edgenb.data import Example, examples_of
    read, original = [], Example.read
    try:
        Example.read = lambda self: (read.append(self.split), original(self))[1]
        tune(fresh, method='head', accept_gates=gates(fresh), **SMALL)
    finally: Example.read = original
    assert set(read) == {'train', 'validation'}
