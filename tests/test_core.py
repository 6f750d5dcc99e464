"Rooms under edits, damage, kills and full disks: what is returned is always what a fresh computation gives."
import hashlib, itertools, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path
import filelock   # here, so that a child which has become nobody need not find it
import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
import edgenb.core as core
from toyrooms import TOY, VALUES, Child, Fault, enter, note, seen, toy_rooms, write_package, write_toy

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

@pytest.fixture(scope='module', autouse=True)
def parsed():
    "edgenb's own source, parsed once: the children inherit the cache."
    core.code_digest(note)

# A model of the toy rooms

NEEDS = {'first': (), 'second': ('first',), 'third': ('second',), 'fourth': ('third', 'first')}
DEFAULTS = {'first': {'upto': 3, 'swap': False}, 'second': {'times': 2}, 'third': {'word': 'a'}, 'fourth': {}}
NUMBERS = {name: i for i, name in enumerate(NEEDS, 1)}

def fresh(name, values, choices, files):
    "(files, result) that room `name` must give; `files` are those of the rooms it needs."
    add = lambda n: n + values['step'] + values['deep']
    sides = [files['first'][f'{side}/n.json'] for side in ('left', 'right')] if 'first' in files else None
    if name == 'first':
        left, right = [add(n) for n in range(choices['upto'])], [add(-n) for n in range(choices['upto'])]
        if choices['swap']: left, right = right, left
        return {'left/n.json': json.dumps(left), 'right/n.json': json.dumps(right)}, {'n': choices['upto']}
    if name == 'second':
        both = [[n*values['scale']*choices['times'] for n in json.loads(s)] for s in sides]
        return {'both.json': json.dumps(both)}, {'sums': [sum(b) for b in both]}
    if name == 'third':
        left, right = json.loads(files['second']['both.json'])
        return {'word.txt': choices['word']*len(left) + str(left[-1] - right[-1])}, {}
    text = files['third']['word.txt'] + ''.join(sides)
    return {'all.txt': text}, {'size': len(text)}

@dataclass(frozen=True)
class Outcome:
    "What a fresh computation gives, and all that it depends on."
    room: str
    code: tuple        # the values in the source
    asked: str         # JSON
    inputs: tuple      # (room, files, result) of the rooms it needs
    files: tuple       # (name, content)
    result: str        # JSON

def outcome(name, values, choices, inputs):
    choices = DEFAULTS[name] | choices
    files, result = fresh(name, values, choices, {o.room: dict(o.files) for o in inputs})
    return Outcome(name, tuple(values[v] for v in ('deep', 'step', 'scale')), json.dumps(choices),
                   tuple((i.room, i.files, i.result) for i in inputs),
                   tuple(sorted(files.items())), json.dumps(result))

def sha(data): return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()

@dataclass
class Left:
    "What is on disk of a room."
    outcome: Outcome       # what its card stands for
    bytes: bytes           # the card as the room wrote it
    card: str = 'good'     # 'good', 'damaged' or 'absent'
    intact: bool = True    # its files are what it wrote

# The state machine

CHOICES = {'first': [{}, {'upto': 3}, {'upto': 2}, {'swap': True}],
           'second': [{}, {'times': 5}], 'third': [{}, {'word': 'b'}], 'fourth': [{}]}
ENTRY = st.sampled_from([(name, c) for name, cs in CHOICES.items() for c in cs])
WALK = st.tuples(*(st.sampled_from(cs) for cs in CHOICES.values())).map(lambda cs: list(zip(NEEDS, cs)))
PLACES = st.sampled_from(['pool/a', 'pool/b', 'alone'])
ERRORS = {'ENOSPC': 'the disk is full', 'EROFS': 'read-only file system'}
STRIKES = st.one_of(st.builds(Fault, st.just('kill'), st.integers(1, 60)), st.builds(Fault, st.just('cut'), st.integers(1, 9)),
                    st.builds(Fault, st.sampled_from([*ERRORS]), st.integers(1, 40), st.booleans()))

DAMAGE = st.sampled_from(['change', 'replace', 'truncate', 'delete'])
CARD_DAMAGE = ['change', 'truncate', 'delete', 'empty', 'result', 'read', 'wrote']
NEVER = Fault('kill', 1 << 30)

class House(RuleBasedStateMachine):
    "Two sibling runs and one that is alone, entered, edited, damaged and killed at random."
    base = None   # where everything is written

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.base))
        self.tally = self.folder/'tally'
        self.values = dict(VALUES)
        self.left = {place: {} for place in ('pool/a', 'pool/b', 'alone')}
        self.keys = {}        # key -> outcome it stands for
        self.tried = set()    # (pool, outcome) that some run has begun
        self.at = {}          # (pool, outcome) -> run that committed it last, where no crash makes that uncertain
        self.again = None
        (self.folder/'pool/.rooms').mkdir(parents=True)
        write_toy(self.folder)

    def teardown(self): shutil.rmtree(self.folder)

    def path(self, place): return self.folder/place
    def card_path(self, place, name): return self.path(place)/f'{NUMBERS[name]:02}-{name}.json'
    def pool(self, place): return self.folder/'pool/.rooms' if place.startswith('pool') else self.path(place)/'.rooms'

    # what must happen

    def inputs(self, place, name): return [self.left[place][n].outcome for n in NEEDS[name]]

    def earlier(self, name): return {m for n in NEEDS[name] for m in (n, *self.earlier(n))}

    def trouble(self, place, name):
        "Why `name` cannot be entered: (rooms one of which the error must name, whether it may be entered all the same)."
        left = self.left[place]
        lost = {n for n in self.earlier(name) if n not in left or left[n].card != 'good'}
        stale = {n for n in self.earlier(name) - lost for s, *was in left[n].outcome.inputs
                 if s not in lost and was != [left[s].outcome.files, left[s].outcome.result]}
        return lost | stale, not (stale or lost & {*NEEDS[name]})

    def own(self, place, o):
        "Whether the run itself has `o`, whole."
        left = self.left[place].get(o.room)
        return bool(left) and left.outcome == o and left.card == 'good' and left.intact

    def sibling(self, place, o):
        at = self.at.get((self.pool(place), o))
        return at is not None and at != place and self.own(at, o)

    def check(self, place, name, choices, said, fault):
        "Compare what one entry gave with what it must give."
        unsound, passable = self.trouble(place, name)
        if 'crashed' in said: raise AssertionError(f'{name} ended in a traceback\n' + said['crashed'])
        message = said.get('refused')
        if fault and fault.kind in ERRORS and message and ERRORS[fault.kind] in message: return
        if unsound:
            assert passable or message, f'{name} was entered although {unsound} must come first'
            if message:
                around = unsound | {d for u in unsound for d in self.earlier(name) if u in self.earlier(d)}
                assert any(f'un {n}(run)' in message or (f'{n}.json is not a card' in message) for n in around), message
                return
        o = outcome(name, self.values, choices, self.inputs(place, name))
        gone = {n for n in NEEDS[name] if not self.left[place][n].intact}
        if message:
            assert gone and not self.own(place, o) and not self.sibling(place, o), message
            assert any(f'enter {n} again' in message for n in gone), message
            return
        assert said['files'] == dict(o.files) and said['result'] == json.loads(o.result) and said['asked'] == json.loads(o.asked)
        assert self.keys.setdefault(said['key'], o) == o, 'one key for two computations'
        if self.own(place, o) or (not fault and self.sibling(place, o)): assert said['skipped'], f'{name} was done twice'
        if (self.pool(place), o) not in self.tried: assert not said['skipped'], f'{name} was skipped, and never done'

    def enter(self, place, entries, fault=None):
        before = self.tally.read_text().count('\n') if self.tally.exists() else 0
        old = {(p, n): (l.card, l.intact) for p in self.left for n, l in self.left[p].items()}
        ended = enter(self.folder, *((self.path(place), n, c) for n, c in entries), fault=fault or NEVER, tally=self.tally)
        assert ended.signal in (0, signal.SIGKILL) and (fault or not ended.signal)
        for (name, choices), said in itertools.zip_longest(entries, ended.said):
            if said is None:   # killed in this one, or never got there
                self.settle(place, name, choices, old, begun=bool(ended.signal))
                break
            self.check(place, name, choices, said, fault)
            if 'refused' in said:
                self.settle(place, name, choices, old, begun=True)
                break
            o, card = outcome(name, self.values, choices, self.inputs(place, name)), self.card_path(place, name)
            was = self.left[place].get(name)
            owned = self.own(place, o)
            self.left[place][name] = Left(o, card.read_bytes())
            self.verify_card(place, name, said['key'])
            self.tried.add((self.pool(place), o))
            if not owned: self.at[self.pool(place), o] = place
            if was and owned: assert was.bytes == self.left[place][name].bytes
            if not fault: self.tidy(place, name, said)
        if not fault:
            after = self.tally.read_text().count('\n') if self.tally.exists() else 0
            assert after - before == sum(s.get('skipped') is False for s in ended.said), 'skipped says what happened'
        self.look(old)
        if fault and fault.kind == 'ENOSPC': assert not [p for p in self.folder.rglob('*.tmp') if f'.{ended.pid}.' in p.name]

    def verify_card(self, place, name, key=None):
        "The card on disk stands for what the model says it does."
        values, o = json.loads(self.left[place][name].bytes), self.left[place][name].outcome
        assert values['room'] == name and values['asked'] == json.loads(o.asked) and values['result'] == json.loads(o.result)
        assert {p.split('/', 1)[1]: d for p, d in values['wrote'].items()} == {f: sha(text) for f, text in o.files}
        assert set(values['read']) == set(NEEDS[name]) and self.keys.setdefault(values['key'], o) == o
        if key: assert values['key'] == key

    def settle(self, place, name, choices, old, begun):
        "After a crash or an error: the room is as it was, or done."
        card, was = self.card_path(place, name), self.left[place].get(name)
        if was and not (was.card == 'good' and was.intact): old.pop((place, name), None)   # what was damaged may have been removed
        if self.trouble(place, name)[0] and any(n not in self.left[place] for n in NEEDS[name]): return
        o = outcome(name, self.values, choices, self.inputs(place, name))
        if begun: self.tried.add((self.pool(place), o)); self.at.pop((self.pool(place), o), None)
        if not card.exists(): return
        data = card.read_bytes()
        if was and (was.bytes == data or was.card == 'damaged' and data == was.damage):
            if was.card == 'good' and was.outcome != o:
                assert self.whole(place, name) == was.intact, 'the old files are gone, the old card is not'
            return
        self.left[place][name] = Left(o, data)
        self.verify_card(place, name)
        assert self.whole(place, name), 'a card came before its files'

    def whole(self, place, name):
        "Whether the files of a room's good card are what it stands for."
        wrote = json.loads(self.left[place][name].bytes)['wrote']
        return all((f := self.path(place)/p).is_file() and sha(f.read_bytes()) == d for p, d in wrote.items())

    def look(self, old=None):
        "See what is on disk; with `old`, nothing but the room just entered may have changed."
        for place, rooms in self.left.items():
            for name, left in rooms.items():
                card = self.card_path(place, name)
                data = card.read_bytes() if card.exists() else None
                left.card = 'absent' if data is None else 'good' if data == left.bytes else 'damaged'
                left.damage = data
                left.intact = self.whole(place, name)
                now = left.card, left.intact
                if old and (place, name) in old: assert now in (old[place, name], ('good', True))

    def tidy(self, place, name, said):
        "Nothing but the card and its files is left of a room that has been entered."
        stem, values = f'{NUMBERS[name]:02}-{name}', json.loads(self.left[place][name].bytes)
        mine = {p.relative_to(self.path(place)).as_posix() for pattern in (f'{stem}*', f'.{stem}*') for p in self.path(place).glob(pattern)}
        assert mine == {f'{stem}.json', *(p.split('/')[0] for p in values['wrote'])}, 'left behind in the run'
        inside = {p.relative_to(self.path(place)).as_posix() for p in self.path(place).glob(f'{stem}.*/**/*') if p.is_file()}
        assert inside == set(values['wrote'])
        pooled = [p.name for p in self.pool(place).iterdir() if said['key'][:16] in p.name and stem in p.name]
        assert not [p for p in pooled if p.endswith(('.tmp', '.work'))], f'left behind in the pool: {pooled}'

    # what can happen

    @initialize(place=PLACES, walk=WALK)
    def start(self, place, walk): self.enter(place, walk)

    @rule(place=PLACES, entry=ENTRY)
    def enters(self, place, entry): self.enter(place, [entry])

    @rule(place=PLACES, walk=WALK)
    def walks(self, place, walk): self.enter(place, walk)

    @rule(place=PLACES, entry=ENTRY, fault=STRIKES)
    def is_struck(self, place, entry, fault):
        self.again = place, [entry]
        self.enter(place, [entry], fault)

    @rule(place=PLACES, entry=ENTRY, fault=STRIKES)
    def is_struck_and_enters_again(self, place, entry, fault):
        self.enter(place, [entry], fault)
        self.enter(place, [entry])

    @rule(place=PLACES, walk=WALK, kind=st.sampled_from(['kill', 'cut', *ERRORS]), at=st.integers(1, 180))
    def walk_is_struck(self, place, walk, kind, at):
        self.again = place, walk
        self.enter(place, walk, Fault(kind, at//6 + 1 if kind == 'cut' else at))

    @rule(place=PLACES, choices=st.sampled_from(CHOICES['first']), later=st.sampled_from(['third', 'fourth']))
    def a_room_is_jumped_over(self, place, choices, later):
        self.enter(place, [('first', choices)])
        self.enter(place, [(later, {})])

    @rule(walk=WALK, which=st.integers(0, 3), how=DAMAGE)
    def a_sibling_is_damaged_and_asked_to_share(self, walk, which, how):
        self.enter('pool/a', walk)
        if (name := walk[which][0]) in self.left['pool/a']: self.file_is_damaged('pool/a', name, 0, how)
        self.enter('pool/b', walk)

    @rule()
    def enters_again(self):
        if self.again: self.enter(*self.again)

    @rule(name=st.sampled_from(['deep', 'step', 'scale']), value=st.integers(0, 2))
    def helper_is_edited(self, name, value):
        self.values[name] = value
        write_toy(self.folder, **self.values)

    @rule(words=st.sampled_from(['words', 'other words']), number=st.integers(0, 3))
    def words_and_an_unrelated_module_are_edited(self, words, number):
        self.values |= {'words': words, 'unrelated': number}
        write_toy(self.folder, **self.values)

    @rule(place=PLACES, name=st.sampled_from([*NEEDS]), which=st.integers(0, 1), how=DAMAGE)
    def file_is_damaged(self, place, name, which, how):
        if name not in self.left[place]: return
        files = sorted(json.loads(self.left[place][name].bytes)['wrote'])
        self.damage(self.path(place)/files[which % len(files)], how)

    @rule(place=PLACES, name=st.sampled_from([*NEEDS]), how=st.sampled_from(CARD_DAMAGE))
    def card_is_damaged(self, place, name, how):
        if not (card := self.card_path(place, name)).exists(): return
        if how not in ('result', 'read', 'wrote'): return self.damage(card, how)
        try: values = json.loads(card.read_text())
        except ValueError: return
        if how == 'result': values['result']['more'] = 1
        else: values[how] = {p: sha('') for p in values[how]}
        card.write_text(json.dumps(values, indent=1, ensure_ascii=False) + '\n')
        self.look()

    @rule(how=st.sampled_from(['change', 'truncate', 'delete']))
    def pool_is_damaged(self, how):
        for p in [p for p in self.folder.rglob('*.at')]: self.damage(p, how)
        self.at.clear()

    def damage(self, path, how):
        if not path.is_file(): return
        data = path.read_bytes()
        if how == 'change': path.write_bytes(data[:-1] + b'\xff')
        if how == 'replace': path.unlink(); path.write_bytes(b'[9]')
        if how == 'truncate': path.write_bytes(data[:len(data)//2])
        if how == 'empty': path.write_bytes(b'')
        if how == 'delete': path.unlink()
        self.look()

def test_whatever_happens_a_room_gives_what_a_fresh_computation_gives(tmp_path):
    machine = type('House', (House,), {'base': tmp_path})
    run_state_machine_as_test(machine, settings=settings(
        deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate),
        max_examples=18, stateful_step_count=18, suppress_health_check=list(HealthCheck)))

# What changes a room's key

@pytest.fixture
def toy(tmp_path):
    write_toy(tmp_path)
    return tmp_path

def computes(folder, name, before=None, **choices):
    "Enter a room of `toy` again; whether it was computed."
    said = enter(folder, (folder/'run', name, choices), before=before).last
    assert 'skipped' in said, said
    return not said['skipped']

def walk(folder, run='run', **kwargs): return enter(folder, *((folder/run, n, {}) for n in NEEDS), **kwargs)

@pytest.mark.parametrize('module', ['helper', 'deep', 'lazy', 'rooms'])
def test_a_change_in_code_that_a_room_can_reach_makes_it_run_again(toy, module):
    assert computes(toy, 'first') and not computes(toy, 'first')
    write_package(toy, {module: TOY[module].format(**VALUES) + '\nMORE = 1\n'})
    assert computes(toy, 'first') and not computes(toy, 'first')

@pytest.mark.parametrize('style', ['import toy.aside', 'from toy import aside', 'from . import aside', 'from .aside import value',
                                   'from .aside import *'])
@pytest.mark.parametrize('lazily', [False, True])
def test_a_change_in_a_module_counts_however_it_is_imported(tmp_path, style, lazily):
    if lazily and '*' in style: pytest.skip('no * inside a function')
    use = style.split()[-1].replace('*', 'value')
    use = use if use == 'value' else f'{use}.value'
    room = 'from edgenb.core import room\n{}\n@room(1)\ndef only(run):\n    {}\n    return {{"v": {}()}}\n'
    room = room.format(*(('', style) if lazily else (style, '')), use)
    write_package(tmp_path, {'__init__': '', 'aside': 'def value(): return 1\n', 'rooms': room})
    assert computes(tmp_path, 'only') and not computes(tmp_path, 'only')
    write_package(tmp_path, {'aside': 'def value(): return 2\n'})
    assert enter(tmp_path, (tmp_path/'run', 'only', {})).last['result'] == {'v': 2}

def test_a_change_in_the_package_itself_counts_for_who_imports_a_module_of_it(tmp_path):
    room = 'import toy.aside\nfrom edgenb.core import room\n@room(1)\ndef only(run): return {"v": toy.STEP}\n'
    write_package(tmp_path, {'__init__': 'STEP = 1\n', 'aside': '', 'rooms': room})
    assert computes(tmp_path, 'only')
    write_package(tmp_path, {'__init__': 'STEP = 2\n'})
    assert enter(tmp_path, (tmp_path/'run', 'only', {})).last['result'] == {'v': 2}

@pytest.mark.parametrize('change', [{'words': 'other words'}, {'unrelated': 7}], ids=['a docstring and comments', 'an unrelated module'])
def test_a_change_that_cannot_matter_does_not_make_a_room_run_again(toy, change):
    walk(toy)
    write_toy(toy, **change)
    assert [s['skipped'] for s in walk(toy).said] == [True]*4

VERSIONED = """from edgenb.core import room, digest
def outside(path, **_): return {'table': digest(path)}
@room(1, libraries=('numpy',))
def counts(run): return {}
@room(2, reads=outside)
def looks(run, path): return {'text': open(path).read()}
"""

def test_another_version_of_a_library_makes_a_room_run_again(tmp_path):
    write_package(tmp_path, {'__init__': '', 'rooms': VERSIONED})
    def other(version): return lambda: setattr(core.importlib.metadata, 'version', lambda _: version)
    assert computes(tmp_path, 'counts', before=other('1.0')) and not computes(tmp_path, 'counts', before=other('1.0'))
    assert computes(tmp_path, 'counts', before=other('1.1'))

def test_a_change_in_what_is_read_from_outside_makes_a_room_run_again(tmp_path):
    write_package(tmp_path, {'__init__': '', 'rooms': VERSIONED})
    table = tmp_path/'table.csv'
    table.write_text('1')
    assert computes(tmp_path, 'looks', path=str(table)) and not computes(tmp_path, 'looks', path=str(table))
    table.write_text('2')
    assert enter(tmp_path, (tmp_path/'run', 'looks', {'path': str(table)})).last['result'] == {'text': '2'}

def test_files_that_change_places_make_later_rooms_run_again(toy):
    walk(toy)
    swapped = enter(toy, (toy/'run', 'first', {'swap': True}), (toy/'run', 'second', {}))
    assert not swapped.last['skipped'] and swapped.last['result'] == {'sums': [0, 24]}

def test_a_default_given_explicitly_is_the_same_choice(toy):
    assert computes(toy, 'first') and not computes(toy, 'first', upto=3, swap=False)
    assert computes(toy, 'first', upto=4)

@pytest.mark.parametrize('choices, says', [({'uptoo': 4}, 'Did you mean upto?'), ({'upto': float('nan')}, 'must be numbers'),
                                           ({'upto': {1, 2}}, 'must be numbers'), ({'upto': object()}, 'must be numbers')])
def test_a_choice_that_is_unknown_or_not_plain_is_refused(toy, choices, says):
    refused = enter(toy, (toy/'run', 'first', choices)).last['refused']
    assert says in refused and refused.startswith('first') and not (toy/'run/01-first.json').exists()

NOTEBOOK = """from edgenb.core import Run, room
{}
@room(1)
def only(run): return {{'v': value()}}
print(only(Run('run')).result['v'])
"""
@pytest.mark.parametrize('cell', ['def value(): return {}', 'STEP = {}\ndef value(): return STEP',
                                  'STEPS = [{}]\ndef value(): return STEPS[0]',
                                  'STEPS = {{"a": {}}}\ndef value(): return STEPS["a"]',
                                  'class Steps:\n    def one(self): return {}\ndef value(): return Steps().one()',
                                  'def make(n):\n    def value(): return n\n    return value\nvalue = make({})'],
                         ids=['function', 'number', 'list', 'dictionary', 'class', 'closure'])
def test_a_change_in_what_a_notebook_defines_makes_its_room_run_again(tmp_path, cell):
    for n in (1, 2):
        (tmp_path/'cells.py').write_text(NOTEBOOK.format(cell.format(n)))
        done = subprocess.run([sys.executable, 'cells.py'], cwd=tmp_path, capture_output=True, text=True, env=environment(), check=True)
        assert done.stdout.splitlines()[-1] == str(n)

def environment(): return os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(core.__file__).parents[1]), str(Path(__file__).parent)])}

# A long-lived kernel

@pytest.mark.parametrize('was, now', [('return n*STEP*k', 'return n*STEP*k + 1'),
                                      ('STEP = 1', 'STEP = 2'), ('k=1', 'k=2'), ('by = 1', 'by = 2')],
                         ids=['a function', 'a constant', 'a default', 'a class attribute'])
@pytest.mark.parametrize('entered', [True, False], ids=['after a room', 'before any room'])
def test_a_kernel_that_holds_older_code_than_the_file_says_is_refused(tmp_path, was, now, entered):
    helper = 'STEP = 1\nclass C:\n    by = 1\ndef value(n, k=1): return n*STEP*k\n'
    room = 'from edgenb.core import room\nfrom .aside import C, value\n@room(1)\ndef only(run): return {"v": value(3)*C.by}\n'
    write_package(tmp_path, {'__init__': '', 'aside': helper, 'rooms': room})
    def work(report):
        rooms = toy_rooms(tmp_path)
        if entered: rooms.only(core.Run(tmp_path/'run'))
        write_package(tmp_path, {'aside': helper.replace(was, now)})
        report(seen(run := core.Run(tmp_path/'run'), rooms.only(run)))
    said = Child(work).end().last
    assert 'restart the kernel' in said.get('refused', ''), said

def test_a_kernel_need_not_restart_for_a_comment(tmp_path):
    room = 'from edgenb.core import room\n@room(1)\ndef only(run): return {}\n'
    write_package(tmp_path, {'__init__': '', 'rooms': room})
    def work(report):
        rooms = toy_rooms(tmp_path)
        report(seen(run := core.Run(tmp_path/'run'), rooms.only(run)))
        write_package(tmp_path, {'rooms': '# why\n' + room})
        report(seen(run, rooms.only(run)))
    assert Child(work).end().last.get('skipped') is True

def test_code_edited_while_a_room_is_at_work_is_not_taken_for_what_ran(tmp_path):
    room = """import pathlib
from edgenb.core import room
@room(1)
def only(run):
    here = pathlib.Path(__file__).parent
    if (here/'edit').exists(): (here/'aside.py').write_text('def value(): return 2')
    import toy.aside
    return {'v': toy.aside.value()}
"""
    write_package(tmp_path, {'__init__': '', 'rooms': room, 'aside': 'def value(): return 1'})
    (tmp_path/'toy/edit').touch()
    enter(tmp_path, (tmp_path/'run', 'only', {}))
    (tmp_path/'toy/edit').unlink()
    write_package(tmp_path, {'aside': 'def value(): return 1'})
    assert enter(tmp_path, (tmp_path/'run', 'only', {})).last['result'] == {'v': 1}

# The order of rooms

def test_a_room_entered_too_early_names_the_room_to_run_first(toy):
    assert 'run first(run) first' in enter(toy, (toy/'run', 'second', {})).last['refused']
    assert 'run third(run) first' in enter(toy, (toy/'run', 'first', {}), (toy/'run', 'fourth', {})).last['refused']

def test_a_room_whose_earlier_room_is_out_of_date_is_refused(toy):
    walk(toy)
    said = enter(toy, (toy/'run', 'first', {'upto': 2}), (toy/'run', 'third', {})).last
    assert 'Run second(run) again' in said.get('refused', ''), said

def test_a_room_is_refused_when_something_two_rooms_back_has_changed(tmp_path):
    rooms = 'from edgenb.core import room\n@room(1)\ndef a(run, n=1): return {"n": n}\n' + ''.join(
        f'@room({i}, needs=("{m}",))\ndef {n}(run): return run.card("{m}").result\n' for i, (m, n) in enumerate(('ab', 'bc', 'cd'), 2))
    write_package(tmp_path, {'__init__': '', 'rooms': rooms})
    enter(tmp_path, *((tmp_path/'run', n, {}) for n in 'abcd'))
    said = enter(tmp_path, (tmp_path/'run', 'a', {'n': 2}), (tmp_path/'run', 'd', {})).last
    assert 'un b(run)' in said.get('refused', ''), said

# Damage

@pytest.mark.parametrize('damage', [lambda p: p.write_text('[9]'), lambda p: p.write_bytes(p.read_bytes()[:2]), Path.unlink],
                         ids=['changed', 'truncated', 'deleted'])
def test_a_damaged_file_is_never_read_and_entering_again_repairs_it(toy, damage):
    walk(toy)
    damage(next((toy/'run').glob('01-first.*/left/n.json')))
    assert 'enter first again' in enter(toy, (toy/'run', 'second', {'times': 5})).last['refused']
    assert computes(toy, 'first') and not computes(toy, 'first')

def test_a_card_that_was_edited_is_not_believed(toy):
    walk(toy)
    card = toy/'run/01-first.json'
    card.write_text(card.read_text().replace('"n": 3', '"n": 4'))
    assert enter(toy, (toy/'run', 'first', {})).last['result'] == {'n': 3}

def test_a_sibling_whose_files_were_damaged_is_not_taken_over(toy):
    (toy/'runs/.rooms').mkdir(parents=True)
    walk(toy, 'runs/a')
    next((toy/'runs/a').glob('02-second.*/both.json')).write_text('[[9], [9]]')
    said = walk(toy, 'runs/b').said
    assert [s['skipped'] for s in said] == [True, False, True, True] and said[1]['files'] == {'both.json': '[[4, 8, 12], [4, 0, -4]]'}

def test_a_sibling_that_is_entered_anew_while_it_is_taken_over_costs_a_computation_and_no_more(toy):
    (toy/'runs/.rooms').mkdir(parents=True)
    enter(toy, (toy/'runs/a', 'first', {}))
    def work(report):
        rooms, real = toy_rooms(toy), os.link
        def link(a, b):
            shutil.rmtree(next((toy/'runs/a').glob('01-first.*/')), ignore_errors=True)
            real(a, b)
        os.link = link
        report(seen(run := core.Run(toy/'runs/b'), rooms.first(run)))
    said = Child(work).end().last
    assert said.get('skipped') is False and said['files'] == {'left/n.json': '[1, 2, 3]', 'right/n.json': '[1, 0, -1]'}, said

def test_runs_of_one_recipe_share_a_pool(tmp_path):
    first, second = core.Run.start('demo', tmp_path), core.Run.start('demo', tmp_path)
    assert first.path != second.path and first.pool == second.pool == core.Run(first.path).pool
    write_toy(tmp_path)
    assert enter(tmp_path, (first.path, 'first', {})).last['skipped'] is False
    assert enter(tmp_path, (second.path, 'first', {})).last['skipped'] is True

# Crashes

def test_everything_is_on_the_disk_before_the_card_that_vouches_for_it(toy):
    def work(report):
        rooms, real, replace = toy_rooms(toy), os.fsync, os.replace
        def fsync(fd): report(['sync', os.readlink(f'/proc/self/fd/{fd}')]); real(fd)
        def replaced(a, b): report(['card', str(b)]); replace(a, b)
        os.fsync, os.replace = fsync, replaced
        rooms.first(core.Run(toy/'run'))
    if not Path('/proc/self/fd').is_dir(): pytest.skip('needs /proc')
    said = Child(work).end().said
    card = said.index(['card', str(toy/'run/01-first.json')])
    before = [Path(p).relative_to(toy/'run').as_posix() for what, p in said[:card] if what == 'sync']
    synced = {p.partition('/')[2] or p.split('.')[0] for p in before}
    assert synced >= {'left/n.json', 'right/n.json', 'left', 'right', '01-first'}
    assert any(p.startswith('.01-first.json') for p in before), 'the card itself'
    assert ['sync', str(toy/'run')] in said[card:], 'the name of the card'

def strikes(kind, n): return [Fault(kind, at) for at in range(1, n)]

@pytest.mark.parametrize('kind', ['kill', 'cut', 'ENOSPC', 'EROFS'])
def test_a_room_struck_at_any_point_leaves_the_old_or_the_new_and_no_litter(toy, kind):
    want = {n: enter(toy, (toy/'want', 'first', {'upto': n})).last['files'] for n in (2, 3)}
    for fault in strikes(kind, 60):
        run = toy/f'run{fault.at}'
        enter(toy, (run, 'first', {'upto': 2}), fault=NEVER)
        struck = enter(toy, (run, 'first', {'upto': 3}), fault=fault)
        if struck.said: assert 'files' in struck.last or ERRORS[kind] in struck.last['refused'], struck.last
        card = json.loads((run/'01-first.json').read_text())
        assert {p.split('/', 1)[1]: (run/p).read_text() for p in card['wrote']} == want[card['asked']['upto']]
        again = enter(toy, (run, 'first', {'upto': 3}), fault=NEVER).last
        assert again['files'] == want[3] and again['skipped'] == (card['asked']['upto'] == 3)
        left = sorted(p.name for p in run.iterdir())
        assert left == ['.lock', '.rooms', f'01-first.{again["key"][:8]}', '01-first.json'], (fault, left)
        litter = [p.name for p in (run/'.rooms').iterdir() if p.suffix in ('.tmp', '.work')]
        assert not litter, (fault, litter)
        if not struck.signal and struck.last.get('skipped') is False: break   # it was not struck any more
    else: raise AssertionError('more operations than were tried')

def test_a_room_killed_half_way_goes_on_from_what_it_saved(tmp_path):
    room = """import os
from edgenb.core import room
@room(1)
def trains(run, epochs=3):
    saved = run.work/'epoch'
    begin = int(saved.read_text()) if saved.exists() else 0
    for epoch in range(begin, epochs):
        os.write(int(os.environ['TALLY']), f'{epoch}\\n'.encode())
        if epoch == 1 and begin == 0: os.kill(os.getpid(), 9)
        saved.write_text(str(epoch + 1))
    run.new('weights').write_text(saved.read_text())
    return {'began': begin}
"""
    write_package(tmp_path, {'__init__': '', 'rooms': room})
    tally = tmp_path/'tally'
    assert enter(tmp_path, (tmp_path/'run', 'trains', {}), tally=tally).signal == signal.SIGKILL
    done = enter(tmp_path, (tmp_path/'run', 'trains', {}), tally=tally).last
    assert done['result'] == {'began': 1} and done['files'] == {'weights': '3'} and tally.read_text().split() == ['0', '1', '1', '2']
    assert enter(tmp_path, (tmp_path/'run', 'trains', {'epochs': 4})).signal, 'other choices begin anew'

@pytest.mark.parametrize('second', ['runs/a', 'runs/b'], ids=['the same run', 'a sibling run'])
def test_two_processes_that_enter_a_room_at_once_compute_it_once(tmp_path, second):
    room = """import os, time
from edgenb.core import room
@room(1)
def slow(run):
    os.write(int(os.environ['TALLY']), b'slow\\n')
    time.sleep(0.4)
    run.new('a.txt').write_text('a')
"""
    write_package(tmp_path, {'__init__': '', 'rooms': room})
    (tmp_path/'runs/.rooms').mkdir(parents=True)
    def work(path): return lambda report: report(seen(run := core.Run(path), toy_rooms(tmp_path, tmp_path/'tally').slow(run)))
    children = [Child(work(tmp_path/p)) for p in ('runs/a', second)]
    said = [c.end().last for c in children]
    assert sorted(s['skipped'] for s in said) == [False, True] and all(s['files'] == {'a.txt': 'a'} for s in said), said
    assert (tmp_path/'tally').read_text() == 'slow\n'

def test_a_room_that_waits_for_an_earlier_one_at_work_uses_what_that_leaves(tmp_path):
    rooms = """import pathlib, time
from edgenb.core import room
@room(1)
def source(run, n=1, wait=False):
    here = pathlib.Path(__file__).parent
    if wait: (here/'begun').touch()
    while wait and not (here/'go').exists(): time.sleep(0.01)
    run.new('n.txt').write_text(str(n))
    return {}
@room(2, needs=('source',))
def reader(run): return {'n': run.file('source', 'n.txt').read_text()}
"""
    write_package(tmp_path, {'__init__': '', 'rooms': rooms})
    (tmp_path/'runs/.rooms').mkdir(parents=True)
    enter(tmp_path, (tmp_path/'runs/a', 'source', {}))
    def work(name, **choices):
        run = core.Run(tmp_path/'runs/a')
        return lambda report: report(seen(run, getattr(toy_rooms(tmp_path), name)(run, **choices)))
    writes = Child(work('source', n=2, wait=True))
    while not (tmp_path/'toy/begun').exists(): time.sleep(0.01)
    reads = Child(work('reader'))
    time.sleep(0.5)
    (tmp_path/'toy/go').touch()
    wrote, read = writes.end().last, reads.end().last
    if 'refused' not in read: assert read['result'] == {'n': '2'}
    said = enter(tmp_path, (tmp_path/'runs/b', 'source', {}), (tmp_path/'runs/b', 'reader', {})).last
    assert said['result'] == {'n': '1'}, 'what another run left under this key was made from something else'

# Folders and disks that refuse

def test_a_run_in_a_folder_one_may_not_use_is_one_line_of_advice(tmp_path):
    if os.getuid() != 0: pytest.skip('needs root, to become somebody else')
    closed = tmp_path/'closed'
    closed.mkdir(mode=0o700)
    def work(path, first):
        def as_nobody(report):
            os.setgid(65534); os.setuid(65534)
            if not os.access(note.__globals__['__file__'], os.R_OK) or not os.access(core.__file__, os.R_OK): report({'skip': 1})
            elif first: note(core.Run(path))
            else: core.ROOMS['reread'] = 2; core.room(2, needs=('note',))(reread)(core.Run(path))
        return as_nobody
    for first in (True, False):
        for path in (closed/'run', closed/'deeper/run'):
            said = Child(work(path, first)).end().last
            if 'skip' in said: pytest.skip('the code itself is out of reach for others')
            assert 'refused' in said, said
            assert '\n' not in said['refused'] and 'you may not' in said['refused'] and str(closed) in said['refused']

def reread(run): return {}

@pytest.fixture
def small_disk(tmp_path):
    "Mount a file system of 200 kB; skips where that is not allowed."
    disk = tmp_path/'disk'
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('may not mount a file system')
    yield disk
    subprocess.run(['umount', disk], check=True)

def state(folder):
    "Every file and its content."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix != '.lock'}

def test_a_full_disk_costs_nothing_that_was_finished(toy, small_disk):
    run = small_disk/'run'
    enter(toy, (run, 'first', {}), (run, 'second', {}))
    (small_disk/'ballast').write_bytes(b'0'*100_000)
    before, ballast = state(run), open(small_disk/'ballast', 'ab', buffering=0)
    with ballast, pytest.raises(OSError):
        while True: ballast.write(b'0'*1000)
    for name, choices in (('third', {}), ('second', {'times': 5}), ('first', {'upto': 5})):
        assert 'the disk is full' in enter(toy, (run, name, choices)).last['refused']
        assert state(run) == before and not list(run.rglob('*.tmp'))
    (small_disk/'ballast').unlink()
    said = enter(toy, (run, 'second', {}), (run, 'third', {}), (run, 'second', {'times': 5})).said
    assert [s['skipped'] for s in said] == [True, False, False]

def test_a_read_only_disk_is_one_line_of_advice_and_can_still_be_read(toy, small_disk):
    run = small_disk/'run'
    enter(toy, (run, 'first', {}))
    subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
    assert 'read-only file system' in enter(toy, (run, 'first', {'upto': 2})).last['refused']
    assert 'read-only file system' in enter(toy, (run, 'second', {})).last['refused']
    def work(report): toy_rooms(toy); report(core.Run(run).file('first', 'left/n.json').read_text())
    assert Child(work).end().last == '[1, 2, 3]'

@pytest.mark.parametrize('kind', [*ERRORS])
@pytest.mark.parametrize('at', [4, 8, 12, 16, 20, 24])
def test_a_disk_that_starts_to_refuse_and_goes_on_refusing_costs_nothing_that_was_finished(toy, kind, at):
    enter(toy, (toy/'run', 'first', {}), (toy/'run', 'second', {}))
    before = {p: d for p, d in state(toy/'run').items() if p.startswith('0')}
    said = enter(toy, (toy/'run', 'second', {'times': 5}), fault=Fault(kind, at, lasting=True)).last
    assert ERRORS[kind] in said['refused'] and '\n' not in said['refused']
    assert before.items() <= state(toy/'run').items()
    assert [s['skipped'] for s in enter(toy, (toy/'run', 'second', {}), (toy/'run', 'second', {'times': 5})).said] == [True, False]

# A real process, killed at real times

SCRIPT = """import sys, time
from pathlib import Path
from edgenb.core import Run
from toyrooms import toy_rooms
rooms, run = toy_rooms(Path(sys.argv[1])), Run(sys.argv[2])
print('ready', flush=True)
for upto, times in ((2, 2), (3, 2), (3, 5), (4, 5)):
    rooms.first(run, upto=upto); rooms.second(run, times=times); rooms.third(run); rooms.fourth(run)
"""

def test_a_process_killed_again_and_again_ends_where_an_uninterrupted_one_does(toy):
    def start(run):
        process = subprocess.Popen([sys.executable, '-c', SCRIPT, toy, toy/run], stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout.readline() == 'ready\n'
        return process
    def finish(process):
        with process.stdout: process.stdout.read()
        return process.wait()
    began = [time.perf_counter(), start('whole'), time.perf_counter()]
    assert finish(began[1]) == 0
    took, chance, killed = time.perf_counter() - began[2], random.Random(0), 0
    for _ in range(15):
        process = start('killed')
        time.sleep(chance.uniform(0, took))
        process.kill()
        killed += finish(process) == -signal.SIGKILL
    assert killed and finish(start('killed')) == 0
    def outcome(run):
        cards = {p.name: json.loads(p.read_text()) for p in (toy/run).glob('*.json')}
        return {n: {k: c[k] for k in ('key', 'asked', 'read', 'wrote', 'result')} for n, c in cards.items()}, \
            {p.relative_to(toy/run).as_posix(): p.read_bytes() for p in (toy/run).glob('0*/**/*') if p.is_file()}
    assert outcome('killed') == outcome('whole') and len(outcome('whole')[0]) == 4
