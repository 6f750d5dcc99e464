"""Cases leave a device while somebody agrees, and no longer; whatever a stick holds, an import takes what is in order and goes on."""
import datetime, json, os, secrets
import pytest
from edgenb.core import EdgenbError, digest_of
from edgenb.data import load_examples
from edgenb.fleet import feedback
from edgenb.fleet.envelope import new_key, seal, signer_of
from edgenb.fleet.schema import compact

WHEN, WORDS, ID = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC), 'five random words here', '5f'*16

def days(n): return WHEN + datetime.timedelta(days=n)

class Site:
    "A device, those who label, and a stick between them."
    def __init__(self, folder):
        self.folder, self.box, self.stick, self.home = folder, folder/'box', folder/'stick', folder/'home'
        self.devices = {ID: new_key(folder/'device.key')}
        self.private, public = feedback.keygen(folder/'reviewers', WORDS)
        self.public = feedback.public_key(public)
        self.signer = signer_of(folder/'device.key')
    def agree(self, day=0, scope=('corrections',), who='A. Berg', lasts=30): return feedback.consent(self.box, who, list(scope), lasts, self.public, days(day))
    def keep(self, data=b'die 1', day=0, **kw): return feedback.keep(self.box, self.signer, ID, **{'data': data, 'media': 'image/png', 'model': 'ab'*32, 'suggested': 'none', 'confidence': 0.6, 'label': 'scratch', 'who': 'C. Oduya', 'now': days(day)} | kw)
    def export(self, day=0): return feedback.export(self.box, self.stick, days(day))
    def home_with(self): return feedback.import_cases(self.stick, self.home, self.private, WORDS, self.devices)
    def examples(self): return {e.read(): e.label for e in load_examples(self.home/'examples.jsonl')}
    def hostile(self, held, **kw):
        "A case that a device with its key, but not with our program, has made."
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        import base64, hashlib
        case = {'edgenb_case': 1, 'device': ID, 'media': 'image/png', 'model': 'ab'*32, 'suggested': 'none', 'confidence': 0.6, 'label': 'x', 'who': 'C', 'when': held['when'], 'consent': held, 'input': base64.b64encode(b'evil').decode()} | kw
        case = {k: v for k, v in case.items() if v is not ...}
        sealed = feedback._suite().encrypt(json.dumps(case).encode(), X25519PublicKey.from_public_bytes(bytes.fromhex(self.public)), feedback._info(ID, digest_of(held)))
        name = secrets.token_hex(16); self.stick.mkdir(exist_ok=True)
        (self.stick/f'{name}.case').write_bytes(sealed)
        (self.stick/f'{name}.case.json').write_bytes(seal({'edgenb_case': 1, 'device': ID, 'consent': digest_of(held), 'sha256': hashlib.sha256(sealed).hexdigest()}, feedback.CASE, self.signer))

def test_withdrawal_reaches_what_left_under_a_consent_that_was_renewed_since(tmp_path):
    site = Site(tmp_path)
    site.agree(); site.keep(b'die 1'); site.export(); site.home_with()
    site.agree(20); site.keep(b'die 2', 21); site.export(21); site.home_with()
    assert set(site.examples()) == {b'die 1', b'die 2'}
    feedback.withdraw(site.box, 'A. Berg', days(22)); site.export(22)
    assert site.home_with()['deleted'] == 2 and site.examples() == {} and not list(site.home.glob('*.png'))

def test_a_consent_given_after_a_withdrawal_is_not_taken_back_with_it(tmp_path):
    site = Site(tmp_path)
    site.agree(); site.keep(b'die 1'); site.export(); feedback.withdraw(site.box, 'A. Berg', days(0)); site.agree(0)      # within the same second
    site.keep(b'die 2'); site.export()
    assert site.home_with()['corrections'] == 1 and set(site.examples()) == {b'die 2'}

def test_no_case_leaves_after_its_consent_has_expired(tmp_path):
    site = Site(tmp_path)
    site.agree(lasts=30); site.keep(day=29)
    with pytest.raises(EdgenbError, match='1 stay.*expired'): site.export(31)
    assert not list(site.stick.glob('*.case*')) and len(list(site.box.glob('*.case'))) == 1
    site.agree(32); site.keep(b'die 2', 33)                        # a new one covers what is kept from now on
    with pytest.raises(EdgenbError, match='1 cases were exported; 1 stay'): site.export(34)
    assert site.home_with()['corrections'] == 1 and set(site.examples()) == {b'die 2'}

def test_a_case_that_was_being_kept_while_somebody_withdrew_does_not_leave(tmp_path):
    site = Site(tmp_path)
    site.agree(); site.keep(); late = {p: p.read_bytes() for p in site.box.glob('*.case*')}
    feedback.withdraw(site.box, 'A. Berg', days(1))
    for p, data in late.items(): p.write_bytes(data)
    assert site.export(1) == 0 and not list(site.stick.glob('*.case*')) and not list(site.box.glob('*.case*'))

def test_nobody_else_can_withdraw_by_a_file_on_a_stick(tmp_path):
    site = Site(tmp_path)
    held = site.agree(); site.keep(); site.export()
    for content in (b'', b'0'*32, digest_of(held).encode(), b'x'*10**6): 
        (site.stick/f'{digest_of(held)}.withdrawn').write_bytes(content)
        told = site.home_with()
        assert told['deleted'] == 0 and told['corrections'] == 1 and site.examples() == {b'die 1': 'scratch'}

@pytest.mark.parametrize('wrong', [{'confidence': float('nan')}, {'confidence': 'high'}, {'confidence': 10**400}, {'when': 5}, {'who': ...}, {'who': {'a': 1}}, {'who': ''}, {'suggested': 'x'*10**5}, {'model': '../../etc'}, {'model': ...}, {'input': 5}, {'input': '!!'}, {'media': ['image/png']}, {'media': '../../x'},
                                   {'label': 5}, {'label': ['a']}, {'label': 'a\nb'}, {'label': ' '}, {'device': '00'*16}, {'note': 'x'}, {'consent': 5}, {'consent': None}], ids=str)
def test_a_case_that_a_hostile_device_made_is_refused_and_the_others_count(tmp_path, wrong):
    site = Site(tmp_path)
    held = site.agree(); site.keep(); site.keep(b'die 2'); site.export()
    site.hostile(held); assert site.home_with()['corrections'] == 3                          # in order, as it is made here
    site.hostile(held, **wrong)
    told = site.home_with()
    assert told['corrections'] == 3 and sum(told['refused'].values()) == 1
    assert {p.parent for p in tmp_path.rglob('*.png')} == {site.home}

def test_what_is_no_file_on_a_stick_holds_up_no_import(tmp_path):
    site = Site(tmp_path)
    site.agree(); site.keep(); site.keep(b'die 2'); site.export()
    one = sorted(site.stick.glob('*.case'))[0]
    one.unlink(); one.symlink_to('/dev/zero')
    os.mkfifo(site.stick/'00.case.json'); (site.stick/'01.case.json').mkdir(); (site.stick/'02.case.json').symlink_to('/dev/zero'); os.mkfifo(site.stick/'03.withdrawn')
    told = site.home_with()
    assert told['corrections'] == 1 and told['refused'] == {'it is damaged': 4}

def test_json_files_of_ones_own_beside_the_cases_are_left_alone(tmp_path):
    site = Site(tmp_path)
    site.agree(); site.keep(); site.export()
    site.home.mkdir(); (site.home/'mine.json').write_text('[1, 2]'); (site.home/'half.json').write_text('{')
    assert site.home_with()['corrections'] == 1 and (site.home/'mine.json').is_file()

@pytest.mark.parametrize('wrong', [{'confidence': float('nan')}, {'model': 'v1'}, {'suggested': 'x'*300}, {'label': 'a\nb'}])
def test_a_case_that_could_not_be_imported_is_not_kept(tmp_path, wrong):
    site = Site(tmp_path); site.agree()
    with pytest.raises(EdgenbError, match='a case needs'): site.keep(**wrong)
    assert not list(site.box.glob('*.case*'))

def test_a_passphrase_is_asked_for_twice_when_a_key_is_made(tmp_path, monkeypatch, capsys):
    from edgenb.cli import main
    said = iter([WORDS, 'five random words hare'])
    monkeypatch.delenv('EDGENB_PASSPHRASE', raising=False)
    monkeypatch.setattr('edgenb.fleet.keys.getpass.getpass', lambda *a: next(said)); monkeypatch.setattr('sys.stdin.isatty', lambda: True, raising=False)
    assert main(['feedback', 'keygen', str(tmp_path/'reviewers')]) == 2 and not list(tmp_path.iterdir()) and 'differ' in capsys.readouterr().err
    (tmp_path/'words').write_text(WORDS + '\n')
    assert main(['feedback', 'keygen', str(tmp_path/'reviewers'), '--passphrase-file', str(tmp_path/'words')]) == 0 and (tmp_path/'reviewers.key').stat().st_mode & 0o777 == 0o600
