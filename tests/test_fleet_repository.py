"The update repository, as an independent client of The Update Framework sees it."
import datetime, json, os, shutil
from pathlib import Path
import pytest
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface
from edgenb.core import EdgenbError, digest, digest_of, write_json
from edgenb.fleet.keys import ceremony, unlock
from edgenb.fleet.repository import Repository, create, describe_staged, merge_staged, sign_staged

SECRET = lambda folder: b'five random words are enough'


class Folder(FetcherInterface):
    "Fetches from a folder, and counts what it gives out."
    def __init__(self): self.bytes, self.names = 0, []
    def _fetch(self, url):
        path = Path(url.removeprefix('file://'))
        if not path.is_file(): raise DownloadHTTPError(f'{path} not found', 404)
        data = path.read_bytes()
        self.bytes += len(data); self.names.append(path.name)
        yield data


class Device:
    "A python-tuf client with a memory."
    def __init__(self, folder, repository):
        self.folder, self.root = folder, (Path(repository)/'metadata/1.root.json').read_bytes()
        (folder/'metadata').mkdir(parents=True); (folder/'targets').mkdir()
    def updater(self, repository):
        self.fetcher = Folder()
        return Updater(str(self.folder/'metadata'), f'file://{repository}/metadata/', str(self.folder/'targets'), f'file://{repository}/targets/', fetcher=self.fetcher, bootstrap=self.root)
    def get(self, repository, path):
        u = self.updater(Path(repository))
        u.refresh()
        if (info := u.get_targetinfo(path)) is None: return None
        return json.loads(Path(u.download_target(info)).read_text())
    def campaigns(self, repository): return self.get(repository, 'campaigns/campaigns.json')


def toy_bundle(folder, weights='weights', name='toy'):
    folder.mkdir(parents=True)
    for n, text in {'pipeline.json': '{}', 'reference.sketch': '', 'model.bin': weights, 'card.json': '{"lineage": []}'}.items(): (folder/n).write_text(text)
    manifest = {'edgenb_bundle': 1, 'name': name, 'runtime': 'onnxruntime', 'model': 'model.bin', 'warnings': [], 'files': {p.name: digest(p) for p in sorted(folder.iterdir())}}
    write_json(folder/'manifest.json', manifest | {'digest': digest_of(manifest)})
    return folder


def digest_in(bundle): return json.loads((bundle/'manifest.json').read_text())['digest']


@pytest.fixture(scope='module')
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('keys')/'keys'
    return folder, ceremony(folder, SECRET), unlock(folder, passphrase=SECRET)


def by(keys, *names): return [s for s in keys[2] if s.public_key.unrecognized_fields['x-edgenb-name'] in names]
def online(keys): return by(keys, 'campaign-1', 'snapshot-1', 'timestamp-1')


@pytest.fixture
def repository(tmp_path, keys): return create(tmp_path/'repository', keys[1], keys[2], bins=4)


def test_a_client_finds_what_was_published_and_nothing_else(tmp_path, keys, repository):
    device, bundle = Device(tmp_path/'device', repository.path), toy_bundle(tmp_path/'bundle')
    sha = digest_in(bundle)
    assert device.get(repository.path, f'releases/{sha}.json') is None and device.campaigns(repository.path)['campaigns'] == []
    repository.publish(bundle, signers=keys[2])
    release = device.get(repository.path, f'releases/{sha}.json')
    assert (release['name'], release['version'], release['bundle']) == ('toy', 1, sha)
    for f in release['files']:
        for c in f['chunks']: assert digest(repository.path/'blobs'/c['stored'][:2]/c['stored']) == c['stored']
    repository.set_campaigns({'campaigns': [{'id': 'a', 'name': 'toy', 'release': sha, 'replaces': None, 'state': 'running'}]}, online(keys))
    assert device.campaigns(repository.path)['campaigns'][0]['id'] == 'a'


def test_a_release_signed_by_one_models_key_of_two_is_not_published_and_a_client_would_refuse_it(tmp_path, keys, repository):
    said = repository.publish(toy_bundle(tmp_path/'bundle'), signers=by(keys, 'models-1') + online(keys))
    assert not said.done and 'models-2, models-3' in str(said)
    device, sha = Device(tmp_path/'device', repository.path), digest_in(tmp_path/'bundle')
    assert device.get(repository.path, f'releases/{sha}.json') is None
    role, = repository.staged['metadata']
    monkey = repository.staged['metadata'][role]   # somebody puts it out all the same, with the online keys
    from tuf.api.metadata import MetaFile
    (repository.path/f'metadata/{monkey.signed.version}.{role}.json').write_bytes(monkey.to_bytes())
    for m in (repository.snapshot, repository.timestamp): m.signed.version += 1; m.signatures.clear()
    repository.snapshot.signed.meta[f'{role}.json'] = MetaFile(monkey.signed.version)
    repository.timestamp.signed.snapshot_meta = MetaFile(repository.snapshot.signed.version)
    for m, name in ((repository.snapshot, f'{repository.snapshot.signed.version}.snapshot'), (repository.timestamp, 'timestamp')):
        for s in online(keys): m.sign(s, append=True)
        (repository.path/f'metadata/{name}.json').write_bytes(m.to_bytes())
    with pytest.raises(RepositoryError, match='signed by 1/2'): device.get(repository.path, f'releases/{sha}.json')


def test_holders_sign_copies_of_the_staged_file_without_the_repository(tmp_path, keys, repository):
    repository.publish(toy_bundle(tmp_path/'bundle'))
    for n in (1, 2):
        shutil.copy(repository.path/'staged.json', tmp_path/f'stick-{n}.json')
        assert sign_staged(tmp_path/f'stick-{n}.json', by(keys, f'models-{n}', 'root-1', 'timestamp-1'))[0][1] == f'models-{n}'    # no other key signs
        merge_staged(repository, tmp_path/f'stick-{n}.json')
    assert not repository.commit([]).done                        # the timestamp is missing
    assert repository.commit(online(keys)).done and not (repository.path/'staged.json').exists()
    repository.publish(toy_bundle(tmp_path/'second', 'other weights'))
    with pytest.raises(EdgenbError, match='another state'): merge_staged(repository, tmp_path/'stick-1.json')


def test_a_signature_by_a_key_without_the_role_counts_for_nothing(tmp_path, keys, repository):
    repository.publish(toy_bundle(tmp_path/'bundle'))
    staged = json.loads((repository.path/'staged.json').read_text())
    role, = staged['metadata']
    staged['keys'][role] = [s.public_key.keyid for s in keys[2]]          # the file is carried about: it may say anything
    write_json(repository.path/'staged.json', staged)
    sign_staged(repository.path/'staged.json', by(keys, 'root-1', 'root-2', 'targets-1', 'targets-2', 'usb-1'))
    assert not repository.commit(online(keys)).done


def test_a_holder_is_shown_what_the_metadata_says_and_signs_only_with_the_keys_of_that_role(tmp_path, keys, repository):
    sha, evil = digest_in(toy_bundle(tmp_path/'bundle')), f"releases/{'e'*64}.json"
    repository.publish(tmp_path/'bundle')
    staged, file, holder = json.loads((repository.path/'staged.json').read_text()), tmp_path/'stick.json', by(keys, 'root-1', 'targets-1', 'models-1')
    role, = staged['metadata']
    write_json(file, staged | {'why': ['nothing of importance']})
    assert any(sha in line for line in describe_staged(file, holder))
    signed = staged['metadata'][role]['signed']
    def carried(change): write_json(file, staged | {'metadata': {role: {'signatures': [], 'signed': signed | change}}, 'keys': {role: [s.public_key.keyid for s in keys[2]]}})
    path, target = next(iter(signed['targets'].items()))
    for also in ({evil: target}, {path: target | {'custom': {'name': 'toy', 'version': 7}}}, {path: target | {'hashes': {'sha256': 'e'*64}}}):    # another bundle under an honest name, another version, another document
        carried({'targets': signed['targets'] | also})
        with pytest.raises(EdgenbError, match='do not sign'): describe_staged(file, holder)
    targets = repository.published('targets').to_dict()['signed']                     # a file that calls the top-level targets a bin
    carried({'delegations': targets['delegations']})
    assert [name for _, name in sign_staged(file, holder)] == ['models-1'] and any('keys of models' in line for line in describe_staged(file, holder))


def test_a_version_is_never_given_to_other_content(tmp_path, keys, repository):
    one, two = toy_bundle(tmp_path/'one'), toy_bundle(tmp_path/'two', 'other weights')
    repository.publish(one, version=3, signers=keys[2])
    with pytest.raises(EdgenbError, match='toy:3 is released already, with other content'): repository.publish(two, version=3, signers=keys[2])
    with pytest.raises(EdgenbError, match='a version is never changed'): repository.publish(one, version=4, signers=keys[2])
    before = dict(repository.versions)
    assert repository.publish(one, signers=keys[2]).done and repository.versions == before          # the same again is nothing
    assert repository.publish(two, signers=keys[2]).done and repository.releases()[digest_in(two)]['version'] == 4


def test_pausing_touches_no_model_key_and_waits_for_no_staged_release(tmp_path, keys, repository):
    repository.publish(toy_bundle(tmp_path/'one'), signers=keys[2])
    repository.publish(toy_bundle(tmp_path/'two', 'other weights'))         # waits for two holders
    device, sha, before = Device(tmp_path/'device', repository.path), digest_in(tmp_path/'one'), dict(repository.versions)
    device.campaigns(repository.path)
    campaign = {'id': 'a', 'name': 'toy', 'release': sha, 'replaces': None, 'state': 'running'}
    repository.set_campaigns({'campaigns': [campaign]}, online(keys))
    assert {r for r in before if before[r] != repository.versions[r]} == {'campaign'}
    assert device.campaigns(repository.path)['campaigns'][0]['state'] == 'running'
    assert sorted(n.split('.', 1)[-1] if n[0].isdigit() else n for n in device.fetcher.names if 'root' not in n and 'campaigns' not in n) == ['campaign.json', 'snapshot.json', 'timestamp.json']
    stale = repository.campaigns()
    repository.set_campaigns({'campaigns': [campaign | {'state': 'paused'}]}, online(keys))
    with pytest.raises(EdgenbError, match='changed meanwhile'): repository.set_campaigns(stale, online(keys))
    with pytest.raises(EdgenbError, match='publish it first'): repository.set_campaigns({'campaigns': [campaign | {'release': digest_in(tmp_path/'two')}]}, online(keys))
    with pytest.raises(EdgenbError, match='not signed'): repository.set_campaigns({'campaigns': []}, by(keys, 'models-1', 'root-1'))
    assert device.campaigns(repository.path)['campaigns'][0]['state'] == 'paused'


@pytest.mark.parametrize('role', ['root', 'targets', 'models', 'campaign', 'snapshot', 'timestamp', 'usb'])
def test_a_device_of_the_old_root_follows_the_rotation_of_every_role(tmp_path, keys, repository, role):
    from edgenb.fleet.keys import new_key
    repository.publish(toy_bundle(tmp_path/'one'), signers=keys[2])
    known, unborn = Device(tmp_path/'known', repository.path), Device(tmp_path/'unborn', repository.path)
    known.get(repository.path, f"releases/{digest_in(tmp_path/'one')}.json")
    new_key(tmp_path/'keys', f'{role}-9', SECRET(None))
    new = unlock(tmp_path/'keys', passphrase=SECRET)
    gone = [s for s in keys[2] if s not in by(keys, f'{role}-1')]
    assert repository.rotate(role, [new[0].public_key], [f'{role}-1'], gone + new).done
    repository.publish(toy_bundle(tmp_path/'two', 'other weights'), signers=gone + new)         # all goes on without the old key
    for device in (known, unborn): assert device.get(repository.path, f"releases/{digest_in(tmp_path/'two')}.json")['version'] == 2
    assert all(f.ok for f in repository.check()) and (role == 'usb' or f'{role}-1' not in str(repository.published({'models': 'targets', 'campaign': 'targets'}.get(role, 'root')).to_dict()))
    if role == 'root': assert device.updater(repository.path)._trusted_set.root.version == 1         # followed from the first root, not given the second


def test_while_both_keys_of_a_role_sign_a_device_sees_no_gap_in_a_rotation(tmp_path, keys, repository, monkeypatch):
    from edgenb.fleet.keys import new_key
    new_key(tmp_path/'keys', 'timestamp-9', SECRET(None))
    new, device, seen = unlock(tmp_path/'keys', passphrase=SECRET), Device(tmp_path/'device', repository.path), []
    replace = os.replace
    def watched(a, b):
        replace(a, b)
        if 'metadata' in str(b) and str(repository.path) in str(b): device.campaigns(repository.path); seen.append(Path(b).name)
    monkeypatch.setattr(os, 'replace', watched)
    assert repository.rotate('timestamp', [new[0].public_key], ['timestamp-1'], keys[2] + new).done
    assert seen[-2:] == ['timestamp.json', '2.root.json']


class PowerCut(BaseException): "Nothing catches it, as nothing catches the real one."


def cut_everywhere(monkeypatch, work):
    "Run `work` again and again, the power failing at the first, second, ... operation that reaches the disk; yields after each failure, until one run gets through."
    real, count, at = {n: getattr(os, n) for n in ('replace', 'fsync', 'unlink')}, [0], 0
    def failing(name):
        def call(*args, **kw):
            count[0] += 1
            if count[0] > at: raise PowerCut   # and from then on everything: a dead machine tidies nothing up
            return real[name](*args, **kw)
        return call
    while True:
        count[0] = 0
        for n in real: monkeypatch.setattr(os, n, failing(n))
        try: work(); done = True
        except PowerCut: done = False
        finally:
            for n in real: monkeypatch.setattr(os, n, real[n])
        yield at, done
        if done: return
        at += 1


def test_power_that_fails_at_any_write_of_a_publication_leaves_the_old_state_or_the_new_and_the_next_one_goes_on(tmp_path, keys, repository, monkeypatch):
    one, two = toy_bundle(tmp_path/'one'), toy_bundle(tmp_path/'two', 'other weights')
    repository.publish(one, signers=keys[2])
    device = Device(tmp_path/'device', repository.path)
    device.campaigns(repository.path)
    shutil.copytree(repository.path, tmp_path/'before'); shutil.copytree(device.folder, tmp_path/'device before', symlinks=True)
    def again():
        shutil.rmtree(repository.path); shutil.copytree(tmp_path/'before', repository.path)
    states = []
    for at, done in cut_everywhere(monkeypatch, lambda: Repository(repository.path).publish(two, signers=keys[2])):
        shutil.rmtree(device.folder); shutil.copytree(tmp_path/'device before', device.folder, symlinks=True)
        release = device.get(repository.path, f'releases/{digest_in(two)}.json')
        assert device.get(repository.path, f'releases/{digest_in(one)}.json')['version'] == 1
        states.append(release is not None)
        if release:
            for f in release['files']:
                for c in f['chunks']: assert digest(repository.path/'blobs'/c['stored'][:2]/c['stored']) == c['stored']
        assert Repository(repository.path).publish(two, signers=keys[2]).done                 # goes on from whatever was left
        assert device.get(repository.path, f'releases/{digest_in(two)}.json')['version'] == 2 and all(f.ok for f in Repository(repository.path).check())
        again()
    assert len(states) > 20 and states[0] is False and states[-1] is True and states == sorted(states)


@pytest.mark.parametrize('role', ['root', 'targets', 'models'])
def test_power_that_fails_at_any_write_of_a_rotation_leaves_something_that_can_be_finished(tmp_path, keys, monkeypatch, role):
    from edgenb.fleet.keys import new_key
    repository = create(tmp_path/'repository', keys[1], keys[2], bins=2)
    new_key(tmp_path/'keys', f'{role}-9', SECRET(None))
    new = unlock(tmp_path/'keys', passphrase=SECRET)
    signers = [s for s in keys[2] if s not in by(keys, f'{role}-1')] + new
    device = Device(tmp_path/'device', repository.path)
    device.campaigns(repository.path)
    shutil.copytree(repository.path, tmp_path/'before'); shutil.copytree(device.folder, tmp_path/'device before', symlinks=True)
    for at, done in cut_everywhere(monkeypatch, lambda: Repository(repository.path).rotate(role, [new[0].public_key], [f'{role}-1'], signers)):
        there = Repository(repository.path)
        if not done: there.commit(signers) if there.staged['metadata'] else there.rotate(role, [new[0].public_key], [f'{role}-1'], signers) if f'{role}-9' not in str([there.published(r).to_dict() for r in ('root', 'targets')]) else there.refresh(signers)
        assert device.campaigns(repository.path)['campaigns'] == [] and f'{role}-9' in str([there.published(r).to_dict() for r in ('root', 'targets')])
        for folder, before in ((repository.path, tmp_path/'before'), (device.folder, tmp_path/'device before')): shutil.rmtree(folder); shutil.copytree(before, folder, symlinks=True)


def test_a_creation_that_was_cut_short_can_be_begun_again_or_finished(tmp_path, keys, monkeypatch):
    path = tmp_path/'repository'
    for at, done in cut_everywhere(monkeypatch, lambda: create(path, keys[1], keys[2], bins=2)):
        if not done:
            if (path/'staged.json').exists(): assert Repository(path).commit(keys[2]).done
            else: create(path, keys[1], keys[2], bins=2)
        assert all(f.ok for f in Repository(path).check())
        shutil.rmtree(path)


def test_a_publisher_does_not_countersign_what_somebody_put_into_the_web_folder(tmp_path, keys, repository):
    repository.publish(toy_bundle(tmp_path/'one'), signers=keys[2])
    role = next(r for r in repository.versions if r.startswith('releases-') and repository.published(r).signed.targets)
    path = repository.path/f'metadata/{repository.versions[role]}.{role}.json'
    path.write_text(path.read_text().replace('"version":1}', '"version":9}'))
    with pytest.raises(EdgenbError, match='not signed by the keys of its role'): Repository(repository.path).publish(toy_bundle(tmp_path/'two', 'other'), signers=keys[2])
    stamp = repository.path/'metadata/timestamp.json'
    stamp.write_text(stamp.read_text().replace(repository.timestamp.signed.expires.strftime('%Y'), '2099'))
    with pytest.raises(EdgenbError, match='somebody changed it'): Repository(repository.path)


def test_a_stick_is_valid_for_as_long_as_it_says_and_the_web_goes_on_after_it(tmp_path, keys, repository):
    one, two = toy_bundle(tmp_path/'one'), toy_bundle(tmp_path/'two', 'other weights')
    for b in (one, two): repository.publish(b, signers=keys[2])
    assert repository.export_usb(tmp_path/'stick', 60, by(keys, 'usb-1'), only=['toy:2']).done
    device = Device(tmp_path/'device', repository.path)
    path = f'releases/{digest_in(two)}.json'
    def at(days, folder, target):
        u = device.updater(folder)
        u._trusted_set.reference_time = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
        u.refresh()
        return u.download_target(u.get_targetinfo(target))
    release = json.loads(Path(at(59, tmp_path/'stick', path)).read_text())
    for f in release['files']:
        for c in f['chunks']: assert digest(tmp_path/'stick/blobs'/c['stored'][:2]/c['stored']) == c['stored']
    with pytest.raises(RepositoryError, match='expired'): at(61, tmp_path/'stick', path)
    with pytest.raises(RepositoryError): device.campaigns(repository.path)          # the web is older than the stick, until it is refreshed
    repository.refresh(online(keys))
    assert device.campaigns(repository.path)['serial'] == 0
    repository.set_campaigns({'campaigns': []}, online(keys))
    with pytest.raises(RepositoryError): device.campaigns(tmp_path/'stick')                # and then the stick is the older one
    assert device.campaigns(repository.path)['serial'] == 1


def test_a_stick_cannot_promise_more_than_the_offline_roles_can_keep(tmp_path, keys, repository):
    with pytest.raises(EdgenbError, match='targets expires on .* before the 400 days'): repository.export_usb(tmp_path/'stick', 400, by(keys, 'usb-1'))
    assert repository.export_usb(tmp_path/'stick', 30, keys[2]).done
    root = json.loads((tmp_path/'stick/metadata/timestamp.json').read_text())
    assert [s['keyid'] for s in root['signatures']] == [by(keys, 'usb-1')[0].public_key.keyid]     # although the online keys were at hand


def test_expired_roles_are_found_ahead_and_renewed(tmp_path, keys, repository):
    later = Repository(repository.path, lambda: datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0) + datetime.timedelta(days=350))
    assert {f.what for f in later.check() if not f.ok} >= {'targets', 'models', 'timestamp'}
    for role in ('targets', 'models'): assert later.renew(role, keys[2]).done
    assert all(f.ok for f in later.check())


def test_the_commands_lead_from_a_ceremony_to_a_stick(tmp_path, monkeypatch, capsys):
    from edgenb.cli import main
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('EDGENB_PASSPHRASE', 'five random words are enough')
    def run(line, code=0):
        assert main(line.split()) == code, (line, capsys.readouterr())
        return capsys.readouterr().out
    toy_bundle(tmp_path/'bundle'); toy_bundle(tmp_path/'second', 'other weights')
    assert 'models: 2 of 3 must sign' in run('keys ceremony KEYS')
    assert all(r['private'] for r in json.loads(run('keys list KEYS --json')))
    assert run('registry add bundle') == 'toy:1\n' == run('registry add bundle')
    run('registry add second'); run('registry promote toy:1 champion --why first')
    assert [r['aliases'] for r in json.loads(run('registry list --json'))] == [['champion'], []]
    run('repository create REPO --keys KEYS --bins 2')
    assert '2 more of models-1, models-2, models-3' in run('repository publish REPO toy@champion --keys KEYS/online', 3)
    run('repository check REPO', 1)
    shutil.copy('REPO/staged.json', 'stick.json')
    run('keys sign stick.json --keys KEYS/holder-1', 2)                                  # nobody there who has read it
    assert digest_in(tmp_path/'bundle') in run('keys sign stick.json --keys KEYS/holder-1 --yes')
    run('keys sign REPO/staged.json --keys KEYS/holder-3 --yes')
    assert run('repository publish REPO --signed stick.json --keys KEYS/online') == 'published\n'
    assert run('repository publish REPO toy:2 --from toy:1 --keys KEYS') == 'published\n'
    run('repository check REPO')
    run('repository export-usb REPO STICK --days 30 --only toy:1 --keys KEYS/online', 3)
    run('keys sign STICK --keys KEYS/usb --yes')
    run('repository refresh REPO --keys KEYS/online')
    assert Device(tmp_path/'device', 'STICK').campaigns(tmp_path/'STICK')['serial'] == 0
    run('keys rotate models --repository REPO --keys KEYS --add models-4 --remove models-1')
    assert [f['ok'] for f in json.loads(run('repository check REPO --json'))].count(False) == 0
    assert run('keys sign bundle --keys KEYS/holder-2 --yes').endswith('signed by models-2\n')
    assert main('keys rotate models --repository REPO --keys KEYS --remove models-7'.split()) == 2 and 'Did you mean models-4' in capsys.readouterr().err


def test_a_campaign_cannot_be_published_for_a_release_of_another_model(tmp_path, keys, repository):
    from tinyfleet import tiny_bundle
    digests = {n: tiny_bundle(tmp_path/n, n, name=n) for n in ('toy', 'other')}
    for n in digests: assert repository.publish(tmp_path/n, signers=keys[2]).done
    c = {'id': 'c1', 'name': 'toy', 'release': digests['toy'], 'replaces': digests['other'], 'state': 'running'}
    with pytest.raises(EdgenbError, match='is about toy, but .* is other:1'): repository.set_campaigns({'campaigns': [c]}, keys[2])
    assert repository.set_campaigns({'campaigns': [c | {'replaces': None}]}, keys[2]).done


def test_a_device_that_is_enrolled_knows_that_it_is_no_earlier_than_its_root(tmp_path, keys, repository):
    from edgenb.agent.service import enrol
    from edgenb.agent.storage import Store
    enrol(tmp_path/'device', repository.path/'metadata/1.root.json', str(repository.path), 'plant-3', 'orin')
    assert abs(Store(tmp_path/'device').load().floor - repository.clock().timestamp()) < 3600


def test_who_signs_a_stick_is_shown_what_it_will_make_devices_do(tmp_path, keys, repository):
    from edgenb.fleet.stick import describe_export, export_usb
    from tinyfleet import tiny_bundle
    d = tiny_bundle(tmp_path/'toy', 'toy'); assert repository.publish(tmp_path/'toy', signers=keys[2]).done
    repository.set_campaigns({'campaigns': [{'id': 'c1', 'name': 'toy', 'release': d, 'replaces': None, 'state': 'running'}]}, keys[2])
    export_usb(repository, tmp_path/'stick', valid_days=30)
    said = '\n'.join(describe_export(tmp_path/'stick'))
    assert all(w in said for w in ('timestamp, version', 'valid until', 'serial 1', f'c1: toy, {d[:16]} in place of nothing, running')), said
    document = next((tmp_path/'stick/targets/campaigns').glob('*.json'))
    document.write_text(document.read_text().replace('running', 'aborted'))
    with pytest.raises(EdgenbError, match='do not sign'): describe_export(tmp_path/'stick')


def test_a_key_or_a_file_that_is_not_there_is_called_so(tmp_path, capsys):
    from edgenb.cli import main
    assert main(['keys', 'sign', str(tmp_path/'staged.json'), '--keys', str(tmp_path)]) == 2 and 'there is no' in capsys.readouterr().err
    assert main(['keys', 'drill', '--lost', 'root-9']) == 2
    said = capsys.readouterr().err
    assert 'knows no key root-9' in said and '/' not in said


def test_a_stick_that_is_not_mounted_is_not_made_on_the_systems_disk(tmp_path, repository):
    from edgenb.core import stick_folder
    media = tmp_path/'media'; (media/'user').mkdir(parents=True)
    for folder in (media/'stick', media/'stick/edgenb', media/'user', media/'user/stick', media/'user/stick/edgenb'):
        with pytest.raises(EdgenbError, match='not on a mounted stick: plug it in'): stick_folder(folder, (media,))
        assert not folder.exists() or folder == media/'user'
    assert stick_folder(media/'user/stick') and stick_folder(tmp_path/'new', (tmp_path/'nosuch', '/')) == tmp_path/'new'
    with pytest.raises(EdgenbError, match='stick is not there'): repository.export_usb(tmp_path/'stick/edgenb', 30)
    assert not (tmp_path/'stick').exists()


def test_a_stick_takes_along_what_its_campaigns_name_and_says_when_it_waits_for_its_signature(tmp_path, keys, repository, monkeypatch, capsys):
    from edgenb.agent.trust import FolderSource, Refused, look
    from edgenb.agent.storage import Store
    from edgenb.cli import main
    from tinyfleet import tiny_bundle
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'five random words are enough')
    d = [tiny_bundle(tmp_path/f'toy-{i}', f'weights {i}', name='toy') for i in range(3)]
    for i in range(3): assert repository.publish(tmp_path/f'toy-{i}', signers=keys[2]).done
    repository.set_campaigns({'campaigns': [{'id': 'c1', 'name': 'toy', 'release': d[1], 'replaces': d[0], 'state': 'running'}]}, keys[2])
    stick, root, now = tmp_path/'stick', (repository.path/'metadata/1.root.json').read_bytes(), repository.clock().timestamp()
    assert main(f'repository export-usb {repository.path} {stick} --days 30 --only toy:2'.split()) == 3
    assert 'taken along, because a campaign names them: toy:1\n' in capsys.readouterr().out
    assert main(f'repository check {stick}'.split()) == 2 and f'is not signed yet: edgenb keys sign {stick}' in capsys.readouterr().err
    with pytest.raises(Refused, match='stick that waits for its signature'): look(Store(tmp_path/'d').open(), FolderSource(stick), root, now)
    assert main(f'keys sign {stick} --keys {keys[0]}/usb --yes'.split()) == 0
    capsys.readouterr()
    assert main(f'repository check {stick}'.split()) == 0 and 'is not on this stick, and no campaign names it' in capsys.readouterr().out   # toy:3
    store = Store(tmp_path/'device').open()
    old = tmp_path/'old'; shutil.copytree(stick, old)
    repository.refresh(online(keys)); repository.export_usb(stick, 30, keys[2])
    assert look(store, FolderSource(stick), root, now).release(d[0])
    with pytest.raises(Refused, match=r'is older than what this device has read before \(timestamp version \d+; version \d+ is known\): take a newer stick'): look(store, FolderSource(old), root, now)
    document = next((stick/'targets/campaigns').glob('*.json')); document.write_text(document.read_text().replace('running', 'aborted'))
    with pytest.raises(Refused, match=f'{document.name} is damaged or is not what was signed'): look(store, FolderSource(stick), root, now)
    assert main(f'repository check {stick}'.split()) == 1 and f'{document.name} is damaged' in capsys.readouterr().out


def test_what_is_not_there_to_sign_and_who_could_is_said(tmp_path, keys, repository, monkeypatch, capsys):
    from edgenb.cli import main
    monkeypatch.setenv('EDGENB_PASSPHRASE', 'five random words are enough')
    toy_bundle(tmp_path/'one'); toy_bundle(tmp_path/'two', 'other weights')
    repo = repository.path
    assert main(f'repository publish {repo}'.split()) == 0 and capsys.readouterr().out.startswith('nothing is staged')
    for given in ('', f'--keys {keys[0]}/holder-1'):
        assert main(f'repository refresh {repo} {given}'.split()) == 2
        assert 'timestamp needs 1 of timestamp-1, usb-1; pass --keys FOLDER' in capsys.readouterr().err
    assert main(f'repository publish {repo} {tmp_path}/one --keys {keys[0]}/holder-1 --keys {keys[0]}/holder-2'.split()) == 3
    said = capsys.readouterr().out
    assert 'staged, not published' in said and '--keys FOLDER' in said and 'staged.json' not in said
    assert main(f'repository publish {repo} --keys {keys[0]}'.split()) == 0
    for _ in range(2): assert main(f'repository publish {repo} {tmp_path}/two --keys {keys[0]}'.split()) == 0
    assert '--from' not in capsys.readouterr().out
    assert main(f'repository publish {repo} {tmp_path}/two --keys {keys[0]} --from {tmp_path}/one'.split()) == 0
    assert f'toy:2 was released before: --from {tmp_path}/one was not used' in capsys.readouterr().out


def test_a_device_is_enrolled_only_with_a_root_of_trust_and_a_repository_that_can_be_meant(tmp_path, repository):
    from edgenb.agent.service import enrol
    metadata = repository.path/'metadata'
    (tmp_path/'other.txt').write_text('hello')
    root = json.loads((metadata/'1.root.json').read_text())
    write_json(tmp_path/'unsigned.json', root | {'signatures': root['signatures'][:1]})
    for file, words in ((metadata/'timestamp.json', 'is the timestamp of a repository, not its root'), (tmp_path/'other.txt', 'is not a root of trust, or it is damaged'), (tmp_path/'unsigned.json', 'its own keys have not signed it .*1/2 keys')):
        with pytest.raises(EdgenbError, match=f'{words}.*metadata/1.root.json'): enrol(tmp_path/'device', file, str(repository.path), 'plant-3', 'orin')
    for place in ('127.0.0.1:8899', 'updates.example.org/fleet', 'localhost:80'):
        with pytest.raises(EdgenbError, match=f'no folder {place}.*http://{place}'): enrol(tmp_path/'device', metadata/'1.root.json', place, 'plant-3', 'orin')
    with pytest.raises(EdgenbError, match='no folder nosuch: make it, or mount it'): enrol(tmp_path/'device', metadata/'1.root.json', 'nosuch', 'plant-3', 'orin')
    assert not (tmp_path/'device').exists()


def test_an_address_where_nobody_listens_is_said_in_words(tmp_path):
    import socket
    from edgenb.agent.trust import HttpSource, Unreachable
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    with pytest.raises(Unreachable) as e: HttpSource(f'http://127.0.0.1:{port}').pieces(f'http://127.0.0.1:{port}/metadata/timestamp.json', 0)
    assert str(e.value).endswith('timestamp.json cannot be reached: connection refused')


def test_every_command_that_a_message_or_a_page_names_exists():
    import re
    import edgenb
    from edgenb.cli import COMMANDS, GROUPS
    package = Path(edgenb.__file__).parent
    named = {f'{g} {a}' for p in [*package.rglob('*.py'), *package.parent.glob('docs/howto/*.md')] for g, a in re.findall(rf"\bedgenb ({'|'.join(GROUPS)}) ([a-z][a-z-]+)", p.read_text(encoding='utf-8'))}
    assert len(named) > 20 and named <= set(COMMANDS), named - set(COMMANDS)
