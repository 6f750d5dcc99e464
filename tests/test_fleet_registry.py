"The registry keeps what it was given, whatever happens to the machine, and so do the copies it hands out."
import json, os, shutil, sqlite3, threading
import pytest
from edgenb.core import EdgenbError, digest, write_json
from edgenb.fleet.exchange import export_mlflow, export_oci, import_oci
from edgenb.fleet.keys import ceremony, sign_bundle, unlock, verify_bundle
from edgenb.fleet.registry import Registry, add, checkout, history, lineage, listing, open_registry, promote, resolve, rollback, verify
from test_fleet_repository import SECRET, PowerCut, cut_everywhere, toy_bundle


@pytest.fixture
def registry(tmp_path): return open_registry(tmp_path/'registry', create=True)


def test_power_that_fails_at_any_write_of_an_addition_leaves_no_version_or_a_whole_one(tmp_path, monkeypatch):
    bundle, seen = toy_bundle(tmp_path/'bundle'), []
    for at, done in cut_everywhere(monkeypatch, lambda: add(open_registry(tmp_path/'registry', create=True), bundle)):
        registry = open_registry(tmp_path/'registry', create=True)
        assert all(ok for _, ok, _ in verify(registry))
        seen.append(len(listing(registry)))
        assert add(registry, bundle) == ('toy', 1) and all(ok for _, ok, _ in verify(registry))
        assert (checkout(registry, 'toy:1', tmp_path/f'out {at}')/'model.bin').read_text() == 'weights'
        shutil.rmtree(tmp_path/'registry')
    assert len(seen) > 10 and seen == sorted(seen) and (seen[0], seen[-1]) == (0, 1)


def test_a_killed_transaction_leaves_neither_version_nor_alias(tmp_path, registry):
    import subprocess, sys
    add(registry, toy_bundle(tmp_path/'one')); add(registry, toy_bundle(tmp_path/'two', 'other')); promote(registry, 'toy:1', 'champion', 'first')
    code = ("import os, signal; from pathlib import Path; from edgenb.fleet.registry import Registry\n"
            f"with Registry(Path({str(registry.path)!r})).database(write=True) as db:\n"
            "    db.execute(\"INSERT INTO alias_log (at, who, name, alias, was, became, kind, why) VALUES ('', '', 'toy', 'champion', 1, 2, 'promote', 'half')\")\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert resolve(registry, 'toy@champion')['version'] == 1 and len(history(registry, 'toy')) == 1


def test_a_version_cannot_be_changed_not_even_in_the_database(tmp_path, registry):
    one, two = toy_bundle(tmp_path/'one'), toy_bundle(tmp_path/'two', 'other weights')
    add(registry, one)
    with pytest.raises(EdgenbError, match='toy:1 exists with other content'): add(registry, two, version=1)
    with pytest.raises(EdgenbError, match='a version is never changed'): add(registry, one, version=2)
    promote(registry, 'toy:1', 'champion', 'first')
    with sqlite3.connect(registry.path/'registry.sqlite') as db:
        for table in ('version', 'file', 'alias_log'):
            for sql in (f'DELETE FROM {table}', f'UPDATE {table} SET at = ""'):
                with pytest.raises(sqlite3.IntegrityError, match='keeps what was written'): db.execute(sql)
        with pytest.raises(sqlite3.IntegrityError): db.execute('INSERT OR ABORT INTO version SELECT * FROM version')
    db.close()
    (one/'model.bin').write_text('changed after it was made')
    with pytest.raises(EdgenbError, match='was changed after the bundle was made'): add(registry, one)


def test_every_move_of_an_alias_says_who_when_from_to_and_why(tmp_path, registry):
    for n in range(3): add(registry, toy_bundle(tmp_path/str(n), f'weights {n}'))
    for n in (1, 2, 3): promote(registry, f'toy:{n}', 'champion', f'reason {n}', who='ana')
    for why in ('bad', 'worse'): rollback(registry, 'toy', 'champion', why, who='ben')
    promote(registry, 'toy:3', 'champion', 'mended', who='ana')
    rollback(registry, 'toy', 'champion', 'not mended', who='ben')
    assert [(h['who'], h['was'], h['became'], h['kind']) for h in history(registry, 'toy', 'champion')] == [
        ('ana', None, 1, 'promote'), ('ana', 1, 2, 'promote'), ('ana', 2, 3, 'promote'), ('ben', 3, 2, 'rollback'), ('ben', 2, 1, 'rollback'), ('ana', 1, 3, 'promote'), ('ben', 3, 1, 'rollback')]
    assert [r['aliases'] for r in listing(registry)] == [['champion'], [], []]
    rollback(registry, 'toy', 'champion', 'nothing is good', who='ben')
    with pytest.raises(EdgenbError, match='there is no toy@champion'): resolve(registry, 'toy@champion')
    with pytest.raises(EdgenbError, match='nothing to roll back'): rollback(registry, 'toy', 'champion', 'still not')
    with pytest.raises(EdgenbError, match='say why'): promote(registry, 'toy:1', 'champion', ' ')
    with pytest.raises(EdgenbError, match='cannot be an alias'): promote(registry, 'toy:1', 'Line 4', 'because')


def test_versions_added_and_promoted_at_once_are_all_kept(tmp_path, registry):
    bundles = [toy_bundle(tmp_path/str(n), f'weights {n}') for n in range(6)]
    errors = []
    def work(b):
        try: name, version = add(registry, b); promote(registry, f'{name}:{version}', 'canary', 'at once')
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=[b]) for b in bundles]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and sorted(r['version'] for r in listing(registry)) == [1, 2, 3, 4, 5, 6] and len(history(registry, 'toy', 'canary')) == 6
    moves = history(registry, 'toy', 'canary')
    assert [m['was'] for m in moves[1:]] == [m['became'] for m in moves[:-1]]


def test_a_signature_made_later_is_kept_and_handed_out(tmp_path, registry):
    ring = ceremony(tmp_path/'keys', SECRET)
    bundle = toy_bundle(tmp_path/'bundle')
    add(registry, bundle)
    sign_bundle(bundle, unlock(tmp_path/'keys', {ring.keys['models-1'].keyid}, SECRET)[0])
    assert add(registry, bundle) == ('toy', 1)
    sign_bundle(bundle, unlock(tmp_path/'keys', {ring.keys['models-2'].keyid}, SECRET)[0])
    assert add(registry, bundle) == ('toy', 1)
    verify_bundle(checkout(registry, 'toy:1', tmp_path/'out'), ring.of('models'), threshold=2)
    assert all(ok for _, ok, _ in verify(registry))


def test_a_damaged_store_is_found_and_mended_by_adding_again(tmp_path, registry):
    bundle = toy_bundle(tmp_path/'bundle')
    add(registry, bundle); add(registry, toy_bundle(tmp_path/'other', 'other'))
    registry.blob(digest(bundle/'model.bin')).write_text('weightz')
    assert [w for w, ok, _ in verify(registry) if not ok] == ['toy:1']
    with pytest.raises(EdgenbError): checkout(registry, 'toy:1', tmp_path/'out')
    with pytest.raises(EdgenbError, match='damaged'): export_oci(registry, 'toy:1', tmp_path/'layout')
    add(registry, bundle)
    assert all(ok for _, ok, _ in verify(registry))
    registry.blob(digest(bundle/'manifest.json')).unlink()
    assert [w for w, ok, _ in verify(registry) if not ok] == ['toy:1']


def test_an_oci_layout_goes_out_and_comes_back_and_an_independent_reader_takes_it(tmp_path, registry):
    layout = pytest.importorskip('oras.layout')
    for n in range(2): add(registry, toy_bundle(tmp_path/str(n), f'weights {n}'))
    assert [export_oci(registry, f'toy:{n}', tmp_path/'layout') for n in (1, 2, 1)] == ['toy-1', 'toy-2', 'toy-1']
    there = layout.NewLayout(str(tmp_path/'layout'))
    assert all(len(there.get_ordered_blobs(t)) == 6 for t in ('toy-1', 'toy-2'))     # the manifest and 5 files; pipeline.json is as empty as the configuration
    other = open_registry(tmp_path/'other', create=True)
    assert import_oci(other, tmp_path/'layout') == [('toy', 2), ('toy', 1)] and {r['digest'] for r in listing(other)} == {r['digest'] for r in listing(registry)}


@pytest.mark.parametrize('name', ['../outside', '/etc/outside', 'a/../../outside', 'a\\..\\outside', 'c:outside', ''])
def test_an_oci_layout_cannot_write_outside_the_bundle(tmp_path, registry, name):
    import hashlib
    add(registry, toy_bundle(tmp_path/'bundle')); export_oci(registry, 'toy:1', tmp_path/'layout')
    index = json.loads((tmp_path/'layout/index.json').read_text())
    blobs = tmp_path/'layout/blobs/sha256'
    manifest = json.loads((blobs/index['manifests'][0]['digest'][7:]).read_text())
    manifest['layers'][0]['annotations']['org.opencontainers.image.title'] = name
    data = json.dumps(manifest).encode()
    (blobs/hashlib.sha256(data).hexdigest()).write_bytes(data)
    index['manifests'][0] |= {'digest': f'sha256:{hashlib.sha256(data).hexdigest()}', 'size': len(data)}
    write_json(tmp_path/'layout/index.json', index)
    with pytest.raises(EdgenbError, match='leaves the folder'): import_oci(open_registry(tmp_path/'other', create=True), tmp_path/'layout')
    assert not any('outside' in p.name for p in tmp_path.rglob('*'))


def test_mlflow_holds_each_version_once_with_its_digest_and_aliases(tmp_path, registry):
    pytest.importorskip('mlflow'); pytest.importorskip('sqlalchemy')
    for n in range(2): add(registry, toy_bundle(tmp_path/str(n), f'weights {n}'))
    promote(registry, 'toy:2', 'champion', 'first')
    where = f'sqlite:///{tmp_path}/mlflow.db'
    assert [export_mlflow(registry, f'toy:{n}', where) for n in (1, 2, 2)] == [('toy', 1), ('toy', 2), ('toy', 2)]
    from mlflow import MlflowClient
    assert MlflowClient(where, registry_uri=where).get_model_version_by_alias('toy', 'champion').tags['edgenb.digest'] == resolve(registry, 'toy:2')['digest']
