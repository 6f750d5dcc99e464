"A model card says what the run measured, as the hub reads it, and nothing of it leaves this machine unasked."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from edgenb.card import card_text, facts, push, write_card
from edgenb.core import EdgenbError, Run
from edgenb.ship import bundle_of, check_bundle

edgenb = Path(sys.executable).parent/'edgenb'


def checked_card(run, tmp_path, task):
    "The card of a run, read back by huggingface_hub and held against the cards of the run."
    from huggingface_hub import ModelCard, metadata_load
    path = write_card(run, tmp_path/'README.md', license='apache-2.0')
    data, text, verify, ship = ModelCard.load(path).data, path.read_text(encoding='utf-8'), run.card('verify').result, run.card('ship').result
    row = next(r for r in verify['rows'] if r['artifact'] == ship['artifact'])
    assert metadata_load(path) == data.to_dict()
    assert data.license == 'apache-2.0' and data.library_name == 'edgenb' and data.pipeline_tag == task and {'edgenb', row['runtime'], row['precision']} <= set(data.tags)
    result, = data.eval_results
    assert result.metric_value == round(row['value'], 4) and result.dataset_split == 'test' and f"{row['low']:.4f}" in result.metric_name and ship['artifact'] in result.metric_name
    assert ('synthetic-data' in data.tags) == (run.card('data').data != 'real') == ('synthetic' in result.dataset_name)
    for r in verify['rows']: assert f"| {r['artifact']} |" in text
    for g in run.card('data').result['certificate']['gates']: assert f"| {g['gate']} | {'pass' if g['passed'] else '**not met**'}" in text
    for g in verify['overridden_gates']: assert f'*{g}* was not met and was overridden' in text
    assert ('unproven' in data.tags) == (row['verdict'] != 'pass') == ('It was shipped although the verdict' in text)
    assert run.card('verify').started in text and run.card('verify').environment['python'] in text and ship['digest'][:16] in text
    assert str(run.path) not in text and str(Path.home()) not in text
    return text


def test_the_card_of_images_says_what_was_measured(toy_run, tmp_path):
    text = checked_card(toy_run, tmp_path, 'image-classification')
    assert '**synthetic**' in text and 'clean, scratch' in text and 'edgenb predict bundle/ image.png' in text and "edgenb[onnxruntime]" in text


def test_a_licence_is_not_guessed_and_the_data_set_is_not_named_after_a_folder(toy_run, toy_images):
    from edgenb.card import front_matter
    f = facts(toy_run)
    assert front_matter(f).license == 'unknown' and str(toy_images) not in card_text(f) and 'images/' not in card_text(f).split('## Data')[1]
    assert front_matter(f, dataset='scratches').eval_results[0].dataset_name == 'scratches (synthetic)'


def test_a_run_that_has_not_shipped_is_told_which_room_to_enter(toy_run, tmp_path):
    copy = tmp_path/'run'
    shutil.copytree(toy_run.path, copy, copy_function=os.link)
    for card, said in (('06-ship', 'enter ship'), ('05-verify', 'enter verify, then ship'), ('02-tune', 'enter tune, then ship')):
        next(copy.glob(f'{card}.json')).unlink()
        with pytest.raises(EdgenbError, match=said): write_card(Run(copy))
        assert not (copy/'README.md').exists()
    with pytest.raises(EdgenbError, match='not the folder of a run'): write_card(Run(tmp_path))
    with pytest.raises(EdgenbError, match='does not exist'): write_card(Run(tmp_path/'nowhere'))


def test_a_recipe_that_shipped_a_run_inside_it_says_which(toy_run, tmp_path):
    shutil.copytree(toy_run.path, tmp_path/'run'/'encoder', copy_function=os.link)
    shutil.copy(next(toy_run.path.glob('01-data.json')), tmp_path/'run')
    with pytest.raises(EdgenbError, match='encoder in it has'): write_card(Run(tmp_path/'run'))


def test_a_card_never_goes_into_a_bundle(toy_run):
    with pytest.raises(EdgenbError, match='is a bundle'): write_card(toy_run, bundle_of(toy_run))
    with pytest.raises(EdgenbError, match='pass the run'): write_card(Run(bundle_of(toy_run)))
    check_bundle(bundle_of(toy_run))


def test_a_bundle_that_was_changed_gets_no_card(toy_run, tmp_path):
    shutil.copytree(toy_run.path, tmp_path/'run')
    manifest = next((tmp_path/'run').glob('06-ship*/bundle/manifest.json'))
    manifest.write_text(manifest.read_text().replace('"real"', '"synthetic"').replace('"synthetic"', '"real"', 1))
    with pytest.raises(EdgenbError, match='is not what ship wrote'): write_card(Run(tmp_path/'run'))


class Hub:
    "Remembers what would have been sent."
    def __init__(self): self.made, self.commits = [], []
    def create_repo(self, repo, **kw): self.made.append((repo, kw))
    def create_commit(self, repo, operations, commit_message): self.commits.append((repo, {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations})); return type('Done', (), {'commit_url': f'https://hub/{repo}/1'})()


def test_a_push_is_one_commit_of_card_and_bundle_into_a_private_repository(toy_run, tmp_path):
    hub, path = Hub(), write_card(toy_run, tmp_path/'card.md')
    assert push(toy_run, 'me/toy', path, hub) == 'https://hub/me/toy/1' and hub.made == [('me/toy', {'private': True, 'exist_ok': True})]
    (repo, files), = hub.commits
    assert files.pop('README.md') == path.read_bytes()
    for name, content in files.items(): (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_bytes(content)
    assert check_bundle(tmp_path/'bundle')['digest'] == toy_run.card('ship').result['digest']       # what arrives is a bundle that loads


def test_neither_who_decided_about_labels_nor_a_file_of_theirs_is_in_what_is_pushed(toy_run, tmp_path):
    from dataclasses import replace
    from edgenb.ship import load_bundle, pack
    from edgenb.labels import apply_decisions, mark
    from edgenb.data import examples_of
    from edgenb.decisions import Decisions
    record, some = Decisions(tmp_path/'Adas labels.jsonl'), examples_of(toy_run, 'all')
    some = [replace(e, id=f'Marlowe-{n}.png') for n, e in enumerate(some)]
    record.add(mark(some[0]), 'Ada Sorensen', 'reject', (some[0].label, 0.1), model='data:x', seconds=1.0)
    card = toy_run.card('data')
    told = apply_decisions(some, record.path, card.result['classes'])[3]
    assert told['actions'][0]['who'] == 'Ada Sorensen' and 'Marlowe-0.png' in told['actions'][0]['note']       # the run's own card has it all
    card = replace(card, asked=card.asked | {'source': 'Marlowe', 'extra': ['Marlowe'], 'decisions': 'Adas labels.jsonl'}, read=card.read | {'source 1': 'e'*64, 'decisions': 'd'*64},
                   result=card.result | {'decisions': told, 'certificate': card.result['certificate'] | {'suspects': [some[1].id]}})
    made = bundle_of(toy_run)
    old = check_bundle(made)
    row = next(r for r in toy_run.card('verify').result['rows'] if r['artifact'] == old['artifact'])
    pack(tmp_path/'bundle', 'toy', row, made/old['model'], made/'pipeline.json', toy_run.file('verify', 'parity.json'), load_bundle(made).sketch, [card], [])
    sent = b''.join(p.read_bytes() for p in (tmp_path/'bundle').rglob('*') if p.is_file()) + card_text(facts(toy_run) | {'certificate': card.result['certificate']}).encode()
    assert not any(word in sent for word in (b'Ada', b'Marlowe', b'labels.jsonl'))
    left = json.loads((tmp_path/'bundle'/'card.json').read_text())['lineage'][0]
    assert left['result']['decisions'] == {'kept': 0, 'relabelled': 0, 'left out': 1, 'not among these': 0, 'actions': 1} and left['asked']['decisions'] == 'digest ' + 'd'*64 == f"digest {left['read']['decisions']}"


def test_a_class_called_like_a_tag_is_words_in_the_card(toy_run):
    text = card_text(facts(toy_run) | {'classes': ['clean', '<img src=x>|']})
    assert r'clean, \<img src=x>\|' in text


@pytest.mark.parametrize('read, base', [({'base': 'd'*64}, ('a local folder', None, '')), ({}, ('models/my-vit', 'models/my-vit', ''))])
def test_a_folder_of_weights_is_no_hub_id_wherever_the_card_is_made(read, base, tmp_path, monkeypatch):
    from edgenb.card import _base
    monkeypatch.chdir(tmp_path)                                  # where there is no such folder
    assert _base({'model_name_or_path': 'models/my-vit'}, read | {'data': 'e'*64}) == base
    (tmp_path/'models'/'my-vit').mkdir(parents=True)             # nor does one that is there now change what was done
    assert _base({'model_name_or_path': 'models/my-vit'}, read | {'data': 'e'*64}) == base


@pytest.mark.parametrize('name', ['toy', 'a/b/c', 'https://hub/me', 'me/to y', ''])
def test_a_push_to_what_is_no_repository_sends_nothing(name, toy_run, tmp_path):
    hub = Hub()
    with pytest.raises(EdgenbError, match='NAME/MODEL'): push(toy_run, name, write_card(toy_run, tmp_path), hub)
    assert not hub.made


def test_a_smoke_run_is_called_one_and_is_not_pushed(toy_run, monkeypatch, tmp_path):
    import edgenb.mill
    assert 'smoke run' not in card_text(facts(toy_run))
    monkeypatch.setattr(edgenb.mill, 'smoked', lambda run: run.path == toy_run.path)
    text = card_text(facts(toy_run))
    assert '- smoke-run' in text and '**A smoke run: its figures mean nothing.**' in text
    with pytest.raises(EdgenbError, match='is a smoke run'): push(toy_run, 'me/x', tmp_path/'README.md', api=object())


def test_a_push_that_fails_is_one_clear_line_and_keeps_the_card(toy_run, tmp_path):
    class Offline(Hub):
        def create_repo(self, repo, **kw): raise ConnectionError('no route\nto host')
    path = write_card(toy_run, tmp_path)
    with pytest.raises(EdgenbError, match='nothing was put on the hub as me/toy .ConnectionError: no route.') as e: push(toy_run, 'me/toy', path, Offline())
    assert '\n' not in str(e.value) and path.is_file()


def test_the_command_writes_the_card_and_prints_where(toy_run, tmp_path):
    done = subprocess.run([edgenb, 'card', toy_run.path, '--out', tmp_path/'out', '--license', 'mit'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path/'out'/'README.md') and '\nlicense: mit\n' in (tmp_path/'out'/'README.md').read_text()
    refused = subprocess.run([edgenb, 'card', tmp_path], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith('edgenb: ') and refused.stderr.count('\n') == 1
