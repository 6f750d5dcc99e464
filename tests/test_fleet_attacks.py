"""Every attack that the TUF specification lists (section 1.5.2), and what a device meets besides, against the agent: it keeps the model it has, says why, and takes the next honest update.

"Extraneous dependencies" has no counterpart: a bundle is data and names no package that the agent would install; `test_a_release_cannot_make_the_agent_install_or_run_anything` holds that.
"""
import copy, datetime, errno, gzip, hashlib, http.server, json, os, re, shutil, socket, tempfile, threading, time
from pathlib import Path
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Targets
from tuf.ngclient import Updater
from tinyfleet import DAY, EPOCH, NOW, Clock, Plant, Word, device_of, live, machine_of, prove_word, settled, tiny_bundle, use
from edgenb.agent.storage import Disk, Store
from edgenb.agent.trust import FolderSource, HttpSource, Patience, Refused, Unreachable, look, source_of
from edgenb.core import EdgenbError, json_text

QUICK = Patience(connect_s=2, silence_s=1, window_s=0.3, bytes_per_s=1000, total_s=5)


class World:
    "A plant, two bundles, and a device that runs the first."
    def __init__(self, here):
        self.here, self.plant, self.clock = here, Plant(here/'repo'), Clock()
        self.v1, self.v2 = tiny_bundle(here/'v1', 'v1'), tiny_bundle(here/'v2', 'v2', weights=os.urandom(3000))
        self.plant.release(here/'v1', 1); self.plant.campaign(self.v1, state='complete')
        self.m = machine_of(here/'device', self.plant, self.clock)
        live(self.m, self.clock, 10**6, settled)
        assert use(self.m) == 'v1'

    def offer(self, **kw): self.plant.release(self.here/'v2', 2, **kw); self.plant.campaign(self.v2, self.v1, id='c2')

    def stays(self, *words):
        "Look once: the old model serves, the words say why, and no slot of the journal holds anything else."
        why = self.m.run_once()
        assert self.m.state == 'BACK_OFF', (self.m.state, why)
        for w in words: assert re.search(w, why), why
        assert use(self.m) == 'v1' and [h.digest for h in self.m.journal.slots.values() if h.proven] == [self.v1]
        return why

    def takes(self):
        "The honest update goes through."
        self.m.failures = 0
        live(self.m, self.clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == self.v2)
        assert use(self.m) == 'v2'


@pytest.fixture
def world():
    with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as folder: yield World(Path(folder))


def rewrite(plant, role, change, signers=()):
    "Change a metadata file that is published, signed by these, snapshot and timestamp by the honest keys (who compromised a mirror has not got those) or left."
    path = plant.path/'metadata'/f'{plant.version[role]}.{role}.json' if role != 'timestamp' else plant.path/'metadata/timestamp.json'
    md = Metadata.from_bytes(path.read_bytes())
    change(md.signed)
    md.signatures.clear()
    for s in signers: md.sign(s, append=True)
    path.write_bytes(md.to_bytes())


# ---- the list of the specification
def test_arbitrary_software_signed_by_strangers_is_refused(world):
    world.plant.release(world.here/'v2', 2)
    world.plant.list = [{**world.plant.list[0], 'id': 'c2', 'release': world.v2}]
    world.plant.publish(models_signers=world.plant.keys['stranger'])
    world.stays('refused', 'models')
    world.plant.publish(); world.takes()


def test_arbitrary_software_in_the_place_of_a_blob_is_refused(world):
    world.offer()
    blobs = {p: p.read_bytes() for p in (world.plant.path/'blobs').rglob('*/*')}
    for p, data in blobs.items(): p.write_bytes(bytes(len(data)))
    world.stays('damaged or is not what was signed')
    for p, data in blobs.items(): p.write_bytes(data)
    world.takes()


@pytest.mark.parametrize('role', ['timestamp', 'snapshot', 'targets', 'models', 'campaign'])
def test_metadata_of_any_role_that_was_changed_by_a_byte_is_refused(role, world):
    world.offer()
    path = world.plant.path/'metadata'/('timestamp.json' if role == 'timestamp' else f'{world.plant.version[role]}.{role}.json')
    good = path.read_bytes()
    path.write_bytes(re.sub(rb'"expires": ?"202', b'"expires":"203', good))
    world.stays('refused')
    path.write_bytes(good); world.takes()


def test_a_rollback_to_older_metadata_is_refused_whatever_the_clock_says(world):
    old = world.here/'old'
    shutil.copytree(world.plant.path, old)
    world.offer(); world.takes()
    shutil.rmtree(world.plant.path); shutil.copytree(old, world.plant.path)
    for jump in (0, -10*365*86400):
        world.clock.now = NOW + 3600 + jump
        why = world.m.run_once()
        assert 'refused' in why and use(world.m) == 'v2' and world.m.state == 'BACK_OFF'


def test_a_campaign_document_with_an_older_serial_is_refused_even_if_its_metadata_is_new(world):
    world.plant.serial = -5
    world.plant.publish()
    world.stays('serial')


def test_a_downgrade_happens_only_because_a_signed_campaign_asks_for_it(world):
    world.offer(); world.takes()
    world.plant.campaign(world.v2, world.v1, id='c2', state='rolled-back', reason='slower on orin')
    live(world.m, world.clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == world.v1)
    assert use(world.m) == 'v1' and 'slower on orin' in str(world.m.last)


def test_a_freeze_is_noticed_when_the_timestamp_expires_and_the_model_goes_on_serving(world):
    world.clock.go(1.5*86400)   # a mirror shows the same for ever
    world.stays('expired')
    world.plant.now += 1.5*DAY; world.offer(); world.takes()


def test_a_mix_of_old_and_new_metadata_is_refused(world):
    "An old models role beside a new snapshot."
    shutil.copy(world.plant.path/'metadata'/f"{world.plant.version['models']}.models.json", world.here/'old')
    world.offer()
    shutil.copy(world.here/'old', world.plant.path/'metadata'/f"{world.plant.version['models']}.models.json")
    world.stays('refused.*models')


def test_a_snapshot_that_forgets_a_role_or_takes_its_version_back_is_refused(world):
    for meta in (lambda m: {k: v for k, v in m.items() if k != 'models.json'}, lambda m: m | {'models.json': MetaFile(1)}):
        good = dict(world.plant.meta)
        for r in ('snapshot', 'timestamp'): world.plant.version[r] += 1
        world.plant.seal(meta(good))
        world.stays('refused')
        for r in ('snapshot', 'timestamp'): world.plant.version[r] += 1
        world.plant.seal(good)


def test_wrong_software_a_release_of_another_bundle_under_the_name_that_was_asked_is_refused(world):
    world.offer(bundle=world.v1)
    world.stays('describes another bundle')


def test_a_release_of_another_model_is_refused_although_every_signature_is_good(world):
    "Who has the online key alone chooses among the releases of a model, not among models."
    from tinyfleet import tiny_bundle
    other = tiny_bundle(world.here/'other', 'other', name='another model'); world.plant.release(world.here/'other', 3)
    world.plant.campaign(other, world.v1, id='c2')
    world.stays('c2 is about toy', 'is another model')


def test_wrong_software_files_of_another_bundle_in_a_signed_release_are_thrown_away(world):
    other = tiny_bundle(world.here/'v9', 'v9')
    world.plant.release(world.here/'v9', 9)
    doc = world.plant.releases.pop(other)
    world.plant.release(world.here/'v2', 2); world.plant.releases[world.v2] = doc | {'bundle': world.v2}
    world.plant.campaign(world.v2, world.v1, id='c2')
    world.stays('not the bundle .* that was signed')


def test_a_release_cannot_make_the_agent_install_or_run_anything(world, monkeypatch):
    import subprocess
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a process was started'))
    monkeypatch.setattr(os, 'system', lambda *a: pytest.fail('a shell was started'))
    (world.here/'v2'/'requirements.txt').write_text('evil')   # not in the manifest: check_bundle refuses it
    (world.here/'v2'/'setup.py').write_text('raise SystemExit')
    world.offer(requires=['evil'], scripts={'post': 'rm -rf /'})
    world.stays('not the bundle')
    assert not any(p.stat().st_mode & 0o111 for p in (world.here/'device').rglob('*') if p.is_file())


def test_fewer_keys_than_the_threshold_are_not_enough(world):
    world.plant.release(world.here/'v2', 2)
    world.plant.list = [{**world.plant.list[0], 'id': 'c2', 'release': world.v2}]
    world.plant.publish(models_signers=world.plant.keys['models'][:1])   # one of three, two are needed
    world.stays('refused', '1/2 keys')
    world.plant.publish(models_signers=[world.plant.keys['models'][0]]*2)   # the same one twice is one
    world.stays('1/2 keys')


def test_who_has_the_online_keys_can_neither_make_a_model_nor_a_root(world):
    "Campaign, snapshot and timestamp are lost: only releases that the model keys signed can be named, and a new root is refused."
    world.plant.list = [{**world.plant.list[0], 'id': 'evil', 'release': 'e'*64}]
    world.plant.publish()
    world.stays('no releases/e')
    thief = {k: [CryptoSigner.generate_ed25519() for _ in v] for k, v in world.plant.keys.items()}
    world.plant.write_root(signers=thief['root'][:2] + world.plant.keys['root'][:1], keys=thief)
    world.stays('refused', 'root')


def test_after_a_stolen_online_key_was_rotated_by_the_root_the_device_goes_on(world):
    "Fast-forward: the thief had set the versions so high that nobody could follow; the rotation makes them count from anew (section 5.3.11)."
    for r in ('snapshot', 'timestamp', 'campaign'): world.plant.version[r] = 10**9
    world.plant.serial = 10**9
    world.plant.publish(); world.m.run_once()
    assert world.m.journal.serial > 10**8
    world.plant.keys['online'], world.plant.keys['campaign'] = [CryptoSigner.generate_ed25519()], [CryptoSigner.generate_ed25519()]
    world.plant.signers |= {'snapshot': world.plant.keys['online'], 'timestamp': world.plant.keys['online'], 'campaign': world.plant.keys['campaign']}
    world.plant.version |= {'snapshot': 50, 'timestamp': 50, 'campaign': 50}; world.plant.serial = 50
    world.plant.write_root()
    world.offer(); world.takes()


def test_a_root_that_expired_and_was_renewed_is_followed_through_every_version(world):
    for _ in range(5): world.plant.write_root()
    world.offer(); world.takes()
    assert world.m.journal.root == 6


# ---- servers that mean ill
class Mirror:
    "An HTTP server over the repository that does what a test says."
    def __init__(self, folder, mischief=lambda handler, path, data: None, ranges=True):
        outer = self
        self.asked = []
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_GET(self):
                path = self.path.lstrip('/')
                outer.asked.append((path, self.headers.get('Range')))
                try: data = (folder/path).read_bytes()
                except OSError: data = None
                try:
                    if mischief(self, path, data): return
                    if data is None: return self.send_error(404)
                    start = int(self.headers['Range'][6:].rstrip('-')) if ranges and self.headers.get('Range') else 0
                    self.send_response(206 if start else 200)
                    if start: self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
                    self.send_header('Content-Length', str(len(data) - start)); self.end_headers()
                    self.wfile.write(data[start:])
                except (BrokenPipeError, ConnectionResetError): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
    def source(self, patience=QUICK): return HttpSource(f'http://127.0.0.1:{self.server.server_address[1]}', patience)
    def __enter__(self): return self
    def __exit__(self, *a): self.server.shutdown(); self.server.server_close()


def flood(handler, n=None):
    handler.send_response(200); handler.end_headers()
    piece, sent = b'x'*65536, 0
    while n is None or sent < n: handler.wfile.write(piece); sent += len(piece)
    return True


@pytest.mark.parametrize('path', ['metadata/timestamp.json', 'snapshot.json', 'models.json', 'campaigns/', 'blobs/'])
def test_endless_data_stops_at_the_signed_or_agreed_length(path, world):
    world.offer()
    sent = []
    def endless(h, p, data):
        if path in p:
            sent.append(0)
            h.send_response(200); h.end_headers()
            while True: h.wfile.write(b'x'*65536); sent[-1] += 65536
    with Mirror(world.plant.path, endless) as mirror:
        world.m.source = mirror.source()
        world.stays()
    assert sent and sum(sent) < 40_000_000 and sum(p.stat().st_size for p in (world.here/'device').rglob('*') if p.is_file()) < 200_000
    world.m.source = None; world.takes()


@pytest.mark.parametrize('path', ['metadata/timestamp.json', 'blobs/'])
@pytest.mark.parametrize('way', ['silence', 'drip'])
def test_slow_retrieval_is_given_up(path, way, world):
    world.offer()
    let_go = threading.Event()
    def slow(h, p, data):
        if path not in p: return
        h.send_response(200); h.send_header('Content-Length', str(len(data))); h.end_headers()
        while not let_go.wait(0.05 if way == 'drip' else 20): h.wfile.write(data[:1]); h.wfile.flush()
        return True
    with Mirror(world.plant.path, slow) as mirror:
        world.m.source = mirror.source()
        start = time.monotonic()
        world.stays('bytes a second|broke off|took longer')
        let_go.set()
        assert time.monotonic() - start < 60
    world.m.source = None; world.takes()


def test_a_malicious_mirror_can_keep_an_update_away_but_not_the_model(world):
    "Errors of every kind from a server: each is a reason in words, none ends the agent, and another source brings the update."
    world.offer()
    def answer(code, headers={}, body=b''):
        def do(h, p, d):
            h.send_response(code)
            for k, v in ({'Content-Length': len(body)} | headers).items(): h.send_header(k, str(v))
            h.end_headers(); h.wfile.write(body)
            return True
        return do
    def garbage(h, p, d): h.wfile.write(b'\0\xff not HTTP at all\r\n\r\n'); return True
    def hang_up(h, p, d): h.connection.shutdown(socket.SHUT_RDWR); return True
    def half(h, p, d): h.send_response(200); h.send_header('Content-Length', str(len(d or b'') + 1000)); h.end_headers(); h.wfile.write((d or b'')[:50]); return True
    def bad_chunks(h, p, d): h.send_response(200); h.send_header('Transfer-Encoding', 'chunked'); h.end_headers(); h.wfile.write(b'ZZ\r\nxx\r\n'); return True
    bomb = gzip.compress(bytes(20_000_000))
    for mischief in (*(answer(c) for c in (302, 401, 403, 404, 500, 503)), answer(302, {'Location': 'file:///etc/passwd'}), answer(206, {'Content-Range': 'bytes 0-1/9'}), garbage, hang_up, half, bad_chunks, answer(200, {'Content-Encoding': 'gzip'}, bomb), answer(200, {}, b'[]'), answer(200, {}, b'{"signed": ' + b'['*100_000)):
        with Mirror(world.plant.path, mischief) as mirror:
            world.m.source = mirror.source()
            world.stays()
    world.m.source = HttpSource('http://127.0.0.1:1', QUICK)
    world.stays('cannot be reached')
    world.m.source = HttpSource('http://no-such-host.invalid', QUICK)
    world.stays('cannot be reached')
    world.m.source = None; world.takes()


def test_a_connection_that_breaks_goes_on_where_it_was(world):
    big = tiny_bundle(world.here/'big', 'big', weights=os.urandom(900_000))
    world.plant.release(world.here/'big', 3); world.plant.campaign(big, world.v1, id='c3')
    def breaks(h, p, d):
        if 'blobs/' not in p or len(d) < 100_000: return
        start = int((h.headers.get('Range') or 'bytes=0-')[6:-1])
        h.send_response(206 if start else 200)
        if start: h.send_header('Content-Range', f'bytes {start}-{len(d) - 1}/{len(d)}')
        h.send_header('Content-Length', str(len(d) - start)); h.end_headers()
        h.wfile.write(d[start:start + 250_000])
        h.wfile.flush(); h.connection.shutdown(socket.SHUT_RDWR)
        return True
    with Mirror(world.plant.path, breaks) as mirror:
        world.m.source = mirror.source()
        for _ in range(8):
            world.m.run_once()
            if world.m.state == 'TRIAL': break
            world.m.go('IDLE', 'again')
        assert world.m.state == 'TRIAL', world.m.why
        asked = [r for p, r in mirror.asked if 'blobs/' in p and r]
        assert len(asked) >= 3 and int(asked[-1][6:-1]) > 500_000   # each goes on from where the one before ended


def test_a_server_without_ranges_gives_the_whole_blob_again(world):
    world.offer()
    sha, = [c['stored'] for f in world.plant.releases[world.v2]['files'] if f['path'] == 'weights' for c in f['chunks']]
    world.m.store.part(sha).write_bytes(b'the beginning of something else')
    with Mirror(world.plant.path, ranges=False) as mirror:
        world.m.source = mirror.source()
        world.takes()


# ---- clocks
def test_a_clock_in_the_past_does_not_revive_metadata_that_has_expired(world):
    old = world.here/'old'
    shutil.copytree(world.plant.path, old)
    world.clock.go(3*86400); world.plant.now += 3*DAY
    world.plant.publish(); world.m.run_once()                  # now the device knows that it is the fourth of June
    assert world.m.journal.floor >= NOW + 3*86400
    world.clock.now = 0.0                                      # a dead battery
    world.plant.now += 0.5*DAY; world.offer()                  # honest and fresh: taken in spite of the clock
    world.takes()
    fresh = machine_of(world.here/'device', world.plant, Clock(0.0))
    fresh.step()
    shutil.rmtree(world.here/'device'/'metadata')              # even if every version that was seen is forgotten
    (world.here/'device'/'metadata').mkdir()
    fresh.source = FolderSource(old)
    assert 'expired' in fresh.run_once() and use(fresh) == 'v2'


def test_a_clock_in_the_future_stops_updates_only_as_long_as_it_is_wrong(world):
    world.offer()
    right = world.clock.now
    world.clock.now = right + 40*365*86400
    world.stays('expired')
    world.clock.now = right
    world.takes()


def test_the_reference_time_of_python_tuf_is_what_the_agent_sets(world):
    "It is not part of python-tuf's public interface: this fails on the day it goes."
    source = source_of(str(world.plant.path))
    with pytest.raises(Refused, match='expired'): look(Store(world.here/'t').open(), source, world.plant.root, NOW + 2*86400)
    assert look(Store(world.here/'t2').open(), source, world.plant.root, NOW).campaigns['serial'] == world.plant.serial
    assert all(hasattr(Updater, n) for n in ('_persist_file', '_update_root_symlink'))


def test_what_python_tuf_keeps_is_forced_to_the_disk_and_written_only_when_it_changed(world):
    done = []
    class Told(Disk):
        def sync(self, path): done.append(path.name); super().sync(path)
    store = Store(world.here/'fresh', Told()).open()
    look(store, source_of(str(world.plant.path)), world.plant.root, NOW)
    assert {'.timestamp.json.tmp', '.snapshot.json.tmp', '.1.root.json.tmp', '.campaign.json.tmp', 'metadata', 'root_history'} <= set(done)
    done.clear()
    look(store, source_of(str(world.plant.path)), world.plant.root, NOW)
    assert not done   # flash wears out


# ---- releases that mean ill although they are signed
def with_file(world, **entry):
    world.plant.release(world.here/'v2', 2)
    doc = copy.deepcopy(world.plant.releases[world.v2])
    doc['files'][-1] |= entry
    world.plant.releases[world.v2] = doc
    world.plant.campaign(world.v2, world.v1, id='c2')


@pytest.mark.parametrize('path', ['../../evil', '/etc/evil', 'a/../../evil', 'a//b', '.', '..', '', 'a\\..\\evil', 'C:evil', 'nul\0byte', 'x'*300, 'model.txt/evil', 'MODEL.TXT', 'evil\n', 'manifest.json/x'])
def test_a_path_that_leaves_the_slot_or_clashes_is_refused(path, world):
    with_file(world, path=path)
    before = {p for p in world.here.rglob('*') if 'device' not in p.parts and 'repo' not in p.parts}
    world.stays('release|manifest')
    assert {p for p in world.here.rglob('*') if 'device' not in p.parts and 'repo' not in p.parts} == before and not Path('/etc/evil').exists()


def test_a_zip_bomb_stops_at_the_declared_length(world):
    import zstandard
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(200_000_000))
    assert len(bomb) < 30_000
    sha = hashlib.sha256(bomb).hexdigest()
    (world.plant.path/'blobs'/sha[:2]).mkdir(exist_ok=True); (world.plant.path/'blobs'/sha[:2]/sha).write_bytes(bomb)
    small = hashlib.sha256(bytes(1000)).hexdigest()
    world.plant.release(world.here/'v2', 2)
    total = world.plant.releases[world.v2]['total_bytes'] - world.plant.releases[world.v2]['files'][-1]['length'] + 1000
    with_file(world, length=1000, sha256=small, chunks=[{'sha256': small, 'length': 1000, 'stored': sha, 'stored_length': len(bomb)}])
    world.plant.releases[world.v2]['total_bytes'] = total; world.plant.publish()
    world.stays('decompresses to more')
    assert sum(p.stat().st_size for p in (world.here/'device').rglob('*') if p.is_file()) < 300_000


@pytest.mark.parametrize('lie', [{'total_bytes': 5}, {'files': []}, {'files': 'x'}, {'files': [None]}, {'version': 'two'}, {'edgenb_release': 2}, {'deltas': [{}]}, {'deltas': 7}, {'name': None}, {'files': [{'path': 'manifest.json', 'length': -1, 'sha256': 'x', 'chunks': []}]}])
def test_a_malformed_release_is_refused_in_words(lie, world):
    world.offer(**lie)
    assert not re.match(r'\w+Error', world.stays('release'))


def test_a_symlink_in_the_slot_or_among_the_blobs_is_never_written_through(world):
    world.offer()
    target = world.here/'precious'
    target.write_text('precious')
    other = world.m.store.slot(world.m.journal.other())
    other.symlink_to(world.here)                                    # the slot itself
    for sha in {c['stored'] for f in world.plant.releases[world.v2]['files'] for c in f['chunks']}: world.m.store.part(sha).symlink_to(target)
    world.takes()
    assert target.read_text() == 'precious' and (world.here/'v1').is_dir() and not other.is_symlink()


def test_a_symlink_on_a_stick_leads_nowhere(world):
    world.offer()
    stick = world.here/'stick'
    shutil.copytree(world.plant.path, stick)
    secret = world.here/'secret'
    secret.write_bytes((stick/'metadata/timestamp.json').read_bytes())
    (stick/'metadata/timestamp.json').unlink(); (stick/'metadata/timestamp.json').symlink_to(secret)
    world.m.source = FolderSource(stick)
    world.stays('not there')
    (stick/'metadata/timestamp.json').unlink(); os.mkfifo(stick/'metadata/timestamp.json')
    world.stays('not there')
    world.m.source = FolderSource(world.here/'unplugged')
    world.stays('plugged in')
    (stick/'metadata/timestamp.json').unlink(); shutil.copy(secret, stick/'metadata/timestamp.json')
    world.m.source = FolderSource(stick)
    world.takes()


def test_a_blob_that_is_cut_short_or_missing_is_fetched_again_later(world):
    world.offer()
    blob = max((world.plant.path/'blobs').rglob('*/*'), key=lambda p: p.stat().st_size)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1])
    world.stays('broke off')
    blob.unlink()
    world.stays('not there')
    blob.write_bytes(data)
    world.takes()


# ---- disks
class Refusing(Disk):
    "A disk that stops taking anything when told to."
    def __init__(self): self.code, self.after, self.room = 0, 0, 10**12
    def _maybe(self):
        if not self.code: return
        self.after -= 1
        if self.after < 0: raise OSError(self.code, os.strerror(self.code))
    def write(self, *a, **kw): self._maybe(); super().write(*a, **kw)
    def rename(self, *a): self._maybe(); super().rename(*a)
    def make_folder(self, *a): self._maybe(); super().make_folder(*a)
    def free(self, path): return self.room


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_is_full_read_only_or_broken_stops_the_update_and_not_the_model(code, world):
    "At every operation of the update in turn."
    disk = Refusing()
    world.plant.days |= dict.fromkeys(world.plant.days, 365)
    world.offer()
    for after in range(0, 60, 3):
        root = world.here/f'device{after}'
        shutil.copytree(world.here/'device', root)
        clock = Clock(NOW + 3600)
        m = machine_of(root, world.plant, clock, disk=disk)
        disk.code = 0
        m.step()
        disk.code, disk.after = code, after
        for _ in range(40):
            m.step(); assert use(m) in ('v1', 'v2')
            clock.go(m.rest() + 0.1)
        disk.code = 0
        live(m, clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == world.v2)
        assert use(m) == 'v2'
        again = machine_of(root, world.plant, Clock(NOW + 9000)); again.step()
        assert use(again) == 'v2'


def test_an_agent_starts_and_serves_from_a_disk_that_is_read_only(world):
    disk = Refusing()
    disk.code = errno.EROFS
    m = machine_of(world.here/'device', world.plant, Clock(), disk=disk)
    m.step()
    assert use(m) == 'v1'
    m.run_once()
    assert use(m) == 'v1'


def test_an_update_that_does_not_fit_is_refused_before_a_byte_is_fetched(world):
    world.offer()
    disk = Refusing(); disk.room = 1000
    for m in (machine_of(world.here/'device', world.plant, world.clock, disk=disk), machine_of(world.here/'device', world.plant, world.clock, device=device_of(world.plant.path, limit_mb=0.001 or 1))):
        why = m.run_once()
        assert m.state == 'BACK_OFF' and re.search('needs .* MB', why), why
        assert not any((world.here/'device/blobs').iterdir()) and use(m) == 'v1'


def test_a_switch_that_the_disk_refuses_blames_no_model(world):
    "The other slot holds a good model, and the journal cannot be written at just that moment."
    world.offer(); world.takes()
    world.plant.campaign(world.v2, world.v1, id='c2', state='rolled-back')
    disk = Refusing()
    m = machine_of(world.here/'device', world.plant, world.clock, disk=disk)
    live(m, world.clock, 10**6, lambda m: m.state == 'SWITCH')
    disk.code = errno.ENOSPC
    for _ in range(3): m.step()
    assert use(m) == 'v2' and m.journal.serving().good and not m.journal.tries and m.store.load() == m.journal
    disk.code = 0
    live(m, world.clock, 10**6, lambda m: settled(m) and m.journal.serving().digest == world.v1)
