"What hash bins save, and what a pause costs: invented releases (metadata only), measured with a python-tuf client over a folder."
import shutil, statistics, sys, tempfile, time
from pathlib import Path
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface
from edgenb.fleet.keys import ceremony, unlock
from edgenb.fleet.repository import create

SECRET = lambda folder: b'five random words are enough'


class Counting(FetcherInterface):
    def __init__(self): self.bytes = self.files = 0
    def _fetch(self, url):
        if not Path(url).is_file(): raise DownloadHTTPError('not there', 404)
        data = Path(url).read_bytes()
        self.bytes += len(data); self.files += 1
        yield data


def look(repository, memory, path):
    "Bytes, requests and CPU of a device that looks for its campaigns and for one release."
    for n in ('metadata', 'targets'): (memory/n).mkdir(parents=True, exist_ok=True)
    counting, t = Counting(), time.process_time()
    u = Updater(str(memory/'metadata'), f'{repository.path}/metadata/', str(memory/'targets'), f'{repository.path}/targets/', fetcher=counting, bootstrap=(repository.path/'metadata/1.root.json').read_bytes())
    u.refresh()
    found = u.get_targetinfo('campaigns/campaigns.json')
    if not u.find_cached_target(found): u.download_target(found)
    assert u.get_targetinfo(path) is not None
    return counting.bytes, counting.files, (time.process_time() - t)*1e3


def build(folder, ring, signers, count, bins):
    "A repository with `count` invented releases; bins = 1: flat, all in the metadata of `models`."
    repository = create(folder, ring, signers, max(bins, 2))
    models = repository.published('models').signed.delegations.succinct_roles
    changed = {r: repository._next(r) for r in (models.get_roles() if bins > 1 else ['models'])}
    for n in range(count):
        t = TargetFile(2000, {'sha256': f'{n:064x}'}, f'releases/{n*7919:064x}.json')
        t.unrecognized_fields['custom'] = {'name': f'model-{n%20}', 'version': n//20 + 1}
        changed[models.get_role_for_target(t.path) if bins > 1 else 'models'].signed.targets[t.path] = t
    repository._stage(changed, {}, 'invented')
    assert repository.commit(signers).done
    return repository, t.path, models.get_role_for_target(t.path) if bins > 1 else 'models'


def main(counts=(100, 1000, 10_000), every=(1, 4, 16, 64, 256)):
    folder = Path(tempfile.mkdtemp())
    ring, online = ceremony(folder/'keys', SECRET), None
    signers = unlock(folder/'keys', passphrase=SECRET)
    online = [s for s in signers if s.public_key.unrecognized_fields['x-edgenb-name'] in ('campaign-1', 'snapshot-1', 'timestamp-1')]
    print('| releases | bins | metadata kB | first look kB (requests) | a look without news kB | a pause kB (requests) | a release more kB | publish CPU ms | first look CPU ms |\n|---|---|---|---|---|---|---|---|---|')
    for count in counts:
        for bins in every:
            repository, path, role = build(folder/f'{count}-{bins}', ring, signers, count, bins)
            total = sum(p.stat().st_size for p in (repository.path/'metadata').iterdir())
            first = look(repository, folder/f'd{count}-{bins}', path)
            cpu = min(look(repository, folder/f'd{count}-{bins}-{i}', path)[2] for i in range(3))
            quiet = look(repository, folder/f'd{count}-{bins}', path)
            campaign = {'id': 'c1', 'name': 'model-1', 'release': '', 'replaces': '', 'digests': 'a'*128, 'state': 'paused', 'stage': 1, 'stages': [5, 25, 50, 100], 'seed': 'a'*32, 'strata': ['site', 'hardware'],
                        'cutoffs': {f'plant-{s}/hw-{h}': 'a'*64 for s in range(12) for h in range(2)}, 'agent': '0.1.0', 'windows': [], 'reason': 'paused by hand'}
            repository.set_campaigns({'campaigns': [campaign | {'state': 'running'}]}, online); look(repository, folder/f'd{count}-{bins}', path)
            repository.set_campaigns({'campaigns': [campaign]}, online)
            pause = look(repository, folder/f'd{count}-{bins}', path)
            t = time.process_time()
            m = repository._next(role)
            m.signed.targets['releases/new.json'] = TargetFile(2000, {'sha256': 'a'*64}, 'releases/new.json')
            repository._stage({role: m}, {}, 'one more'); repository.commit(signers)
            publish = (time.process_time() - t)*1e3
            more = look(repository, folder/f'd{count}-{bins}', path)
            print(f'| {count:,} | {bins if bins > 1 else "flat"} | {total/1e3:,.0f} | {first[0]/1e3:,.1f} ({first[1]}) | {quiet[0]/1e3:,.1f} | {pause[0]/1e3:,.1f} ({pause[1]}) | {more[0]/1e3:,.1f} | {publish:,.0f} | {cpu:,.0f} |', flush=True)
    shutil.rmtree(folder)


if __name__ == '__main__': main(*([tuple(map(int, sys.argv[1:]))] if len(sys.argv) > 1 else []))
