"""A tiny update repository and a tiny device, made with python-tuf alone, so that tests can sign what no honest publisher would."""
import datetime, hashlib, json, shutil
from pathlib import Path
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Role, Snapshot, SuccinctRoles, TargetFile, Targets, Timestamp
from edgenb.agent.machine import Machine, Proof
from edgenb.agent.serve import Server
from edgenb.agent.storage import Device, Store
from edgenb.core import digest, digest_of, json_text
from edgenb.fleet.delta import chunk_files

EPOCH = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.timezone.utc)
NOW = EPOCH.timestamp()
DAY = datetime.timedelta(days=1)


def tiny_bundle(folder: Path, say: str = 'v1', name: str = 'toy', **files) -> str:   # its digest
    "A bundle that passes `check_bundle`; its model is a word. 'sick' fails the health check, 'crash' fails in use."
    folder.mkdir(parents=True)
    for n, content in {'pipeline.json': b'{}', 'reference.sketch': b'sketch', 'model.txt': say.encode(), **files}.items():
        (folder/n).parent.mkdir(parents=True, exist_ok=True); (folder/n).write_bytes(content)
    manifest = {'edgenb_bundle': 1, 'edgenb': '0.1.0', 'name': name, 'artifact': say, 'runtime': 'word', 'model': 'model.txt', 'warnings': [],
                'files': {p.relative_to(folder).as_posix(): digest(p) for p in sorted(folder.rglob('*')) if p.is_file()}}
    manifest['digest'] = digest_of(manifest)
    (folder/'manifest.json').write_text(json_text(manifest), encoding='utf-8')
    return manifest['digest']


class Word:
    "A model that says its word."
    def __init__(self, folder): self.word = (folder/'model.txt').read_text()
    def predict(self, inputs):
        if 'crash' in self.word: raise RuntimeError('the model is broken')
        return [{'decision': 'accept', 'label': self.word, 'score': 0.25} for _ in inputs]


def prove_word(folder, deadline, memory_mb=0):
    word = (folder/'model.txt').read_text()
    return Proof('sick' not in word, 'it is sick' if 'sick' in word else 'as on the workstation')


class Plant:
    "A repository whose keys lie open."
    def __init__(self, path: Path, now: datetime.datetime = EPOCH):
        self.path, self.now, self.documents, self.releases = path, now, {}, {}
        for n in ('metadata', 'targets', 'blobs'): (path/n).mkdir(parents=True, exist_ok=True)
        self.keys = {n: [CryptoSigner.generate_ed25519() for _ in range(k)] for n, k in {'root': 3, 'targets': 3, 'models': 3, 'campaign': 1, 'online': 1, 'stranger': 2}.items()}
        self.threshold = {'root': 2, 'targets': 2, 'models': 2, 'campaign': 1, 'snapshot': 1, 'timestamp': 1}
        self.signers = {'root': self.keys['root'][:2], 'targets': self.keys['targets'][:2], 'models': self.keys['models'][:2], 'campaign': self.keys['campaign'], 'snapshot': self.keys['online'], 'timestamp': self.keys['online']}
        self.version = {n: 0 for n in ('root', 'targets', 'models', 'campaign', 'snapshot', 'timestamp')}
        self.days = {'root': 3650, 'targets': 365, 'models': 365, 'campaign': 2, 'snapshot': 7, 'timestamp': 1}
        self.serial, self.list = 0, []
        self.bins = SuccinctRoles([k.public_key.keyid for k in self.keys['models']], 2, 1, 'models')
        self.write_root(); self.publish()

    def lasts(self, role): return self.now + self.days[role]*DAY

    def sign(self, signed, role, signers=None) -> bytes:
        md = Metadata(signed)
        for s in self.signers[role] if signers is None else signers: md.sign(s, append=True)
        return md.to_bytes()

    def put(self, name, data): (self.path/'metadata'/name).write_bytes(data); return data

    def write_root(self, signers=None, keys=None):
        keys = keys or self.keys
        self.version['root'] += 1
        of = {'root': 'root', 'targets': 'targets', 'snapshot': 'online', 'timestamp': 'online'}
        root = Root(version=self.version['root'], expires=self.lasts('root'), consistent_snapshot=True, keys={k.public_key.keyid: k.public_key for n in set(of.values()) for k in keys[n]},
                    roles={r: Role([k.public_key.keyid for k in keys[n]], self.threshold[r]) for r, n in of.items()})
        return self.put(f"{self.version['root']}.root.json", self.sign(root, 'root', signers))

    @property
    def root(self) -> bytes: return (self.path/'metadata/1.root.json').read_bytes()

    def target(self, path: str, data: bytes) -> TargetFile:
        info = TargetFile.from_data(path, data, ['sha256'])
        file = self.path/'targets'/info.get_prefixed_paths()[0]
        file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(data)
        return info

    def release(self, folder: Path, number: int = 1, **change) -> str:   # digest
        "Add a release; `change` replaces fields of its document."
        manifest = json.loads((folder/'manifest.json').read_text())
        files = chunk_files(folder, self.path/'blobs')
        doc = {'edgenb_release': 1, 'bundle': manifest['digest'], 'name': manifest['name'], 'version': number, 'agent': '0.1.0', 'total_bytes': sum(f['length'] for f in files), 'chunk_bytes': 1 << 20, 'files': files, 'deltas': []} | change
        self.releases[manifest['digest']] = doc
        return manifest['digest']

    def campaign(self, release, replaces=None, state='running', id='c1', name='toy', cutoff='f'*64, **more):
        "Set the campaigns to this one (after those that are there, if `after`)."
        self.list = (self.list if more.pop('after', False) else []) + [{'id': id, 'name': name, 'release': release, 'replaces': replaces, 'state': state, 'stage': 0, 'stages': [5, 25, 50, 100], 'seed': 'ab', 'strata': ['site', 'hardware'], 'cutoffs': {'*': cutoff}, 'agent': '0.1.0', 'windows': [], 'reason': ''} | more]
        self.publish()

    def publish(self, models_signers=None, skip=()):
        "Sign everything anew, as it is now."
        self.serial += 1
        for r in ('targets', 'models', 'campaign', 'snapshot', 'timestamp'): self.version[r] += 1
        keys = lambda *names: {k.public_key.keyid: k.public_key for n in names for k in self.keys[n]}
        roles = {r: DelegatedRole(r, [k.public_key.keyid for k in self.keys[r]], self.threshold[r], True, paths=[p]) for r, p in (('models', 'releases/*'), ('campaign', 'campaigns/*'))}
        targets = Targets(self.version['targets'], expires=self.lasts('targets'), delegations=Delegations(keys('models', 'campaign'), roles=roles))
        models = Targets(self.version['models'], expires=self.lasts('models'), delegations=Delegations(keys('models'), succinct_roles=self.bins))
        bins = {b: Targets(self.version['models'], expires=self.lasts('models')) for b in self.bins.get_roles()}
        for d, doc in self.releases.items():
            path = f'releases/{d}.json'
            bins[self.bins.get_role_for_target(path)].targets[path] = self.target(path, json_text(doc).encode())
        document = {'edgenb_campaigns': 1, 'serial': self.serial, 'issued': f'{self.now:%Y-%m-%dT%H:%M:%SZ}', 'campaigns': self.list}
        campaign = Targets(self.version['campaign'], expires=self.lasts('campaign'), targets={'campaigns/campaigns.json': self.target('campaigns/campaigns.json', json_text(document).encode())})
        meta = {}
        for role, signed, by in [('targets', targets, 'targets'), ('models', models, 'models'), ('campaign', campaign, 'campaign'), *((b, s, 'models') for b, s in bins.items())]:
            self.put(f'{signed.version}.{role}.json', self.sign(signed, by, models_signers if by == 'models' else None))
            meta[f'{role}.json'] = MetaFile(signed.version)
        self.seal(meta)

    def seal(self, meta, signers=None):
        "Snapshot and timestamp over this."
        self.meta = meta
        data = self.put(f"{self.version['snapshot']}.snapshot.json", self.sign(Snapshot(self.version['snapshot'], expires=self.lasts('snapshot'), meta=meta), 'snapshot', signers))
        stamp = Timestamp(self.version['timestamp'], expires=self.lasts('timestamp'), snapshot_meta=MetaFile(self.version['snapshot'], len(data), {'sha256': hashlib.sha256(data).hexdigest()}))
        self.put('timestamp.json', self.sign(stamp, 'timestamp', signers))


class Clock:
    "A clock that a test turns."
    def __init__(self, now=NOW): self.now, self.steady_now = now, 0.0
    def __call__(self): return self.now
    def steady(self): return self.steady_now
    def go(self, seconds): self.now += seconds; self.steady_now += seconds


def device_of(plant_path, **more) -> Device:
    return Device(id='0'*32, site='plant-3', hardware='orin', repository=str(plant_path), **{'trial_s': 600, 'tries': 3, 'reserve_mb': 0} | more)


def machine_of(root: Path, plant: Plant, clock=None, server=None, source=None, device=None, disk=None, prove=prove_word, **more) -> Machine:
    "A machine in a folder, with a server of words."
    clock = clock or Clock()
    return Machine(Store(root, disk), device or device_of(plant.path), plant.root, server or Server(Word, available=lambda: 1e9), prove, source, clock, clock.steady, **more)


def live(machine: Machine, clock: Clock, seconds: float = 3600, until=None, most: int = 3000) -> Machine:
    "Let a machine work for so long, by its own clock."
    end = clock.steady_now + seconds
    for _ in range(most):
        machine.step()
        if machine.state == 'TRIAL': use(machine)
        if until and until(machine): return machine
        if rest := machine.rest():
            if clock.steady_now + rest > end: clock.go(max(0, end - clock.steady_now)); return machine
            clock.go(rest + 0.001 if machine.state != 'TRIAL' else 30)
    raise AssertionError(f'stuck: {machine.state}, {machine.why}, {machine.last}')


def settled(machine) -> bool: return machine.state == 'IDLE' and machine.checked > 0 and not machine.journal.trial


def use(machine):
    "Ask the model that serves for something; what it answers does not matter."
    try: return machine.server.predict([b'x'])[0]['label']
    except Exception as e: return type(e).__name__
