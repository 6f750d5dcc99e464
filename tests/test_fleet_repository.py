"The update repository, as an independent client of The Update Framework sees it."
import json, os, shutil
from pathlib import Path
import pytest
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface
from edgenb.core import EdgenbError, digest, digest_of, write_json
from edgenb.fleet.keys import ceremony, unlock
from edgenb.fleet.repository import Repository, create, merge_staged, sign_staged

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
def repository(tmp_path, keys): return create(tmp_path/'repository', keys[1], keys[2])


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
