"Rooms under edits, damage, kills and full disks: what is returned is always what a fresh computation gives."
import hashlib, itertools, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path
import filelock, pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
import edgenb.core as core
from toyrooms import TOY, VALUES, Child, Fault, enter, note, seen, toy_rooms, write_package, write_toy

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
pytestmark = forks

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
    inputs: tuple      # outcomes of the rooms it needs
    files: tuple       # (name, content)
    result: str        # JSON

def outcome(name, values, choices, inputs):
    choices = DEFAULTS[name] | choices
    files, result = fresh(name, values, choices, {o.room: dict(o.files) for o in inputs})
    return Outcome(name, tuple(values[v] for v in ('deep', 'step', 'scale')), json.dumps(choices), tuple(inputs),
                   tuple(sorted(files.items())), json.dumps(result))

def contents(o): return o.files, o.result

def sha(data): return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()

@dataclass
class Left:
    "What is on disk of a room."
    outcome: Outcome       # what its card stands for
    bytes: bytes           # the card as the room wrote it
    card: str = 'good'     # 'good', 'damaged' or 'absent'
    intact: bool = True    # its files are what it wrote

# The state machine

CHOICES = {'first': [{}, {'upto': 3}, {'upto': 2}, {'swap': True}], 'second': [{}, {'times': 5}], 'third': [{}, {'word': 'b'}], 'fourth': [{}]}
ENTRY = st.sampled_from([(name, c) for name, cs in CHOICES.items() for c in cs])
WALK = st.tuples(*(st.sampled_from(cs) for cs in CHOICES.values())).map(lambda cs: list(zip(NEEDS, cs)))
PLACES = st.sampled_from(['pool/a', 'pool/b', 'alone'])
ERRORS = {'ENOSPC': 'the disk is full', 'EROFS': 'read-only file system'}
STRIKES = st.one_of(st.builds(Fault, st.just('kill'), st.integers(1, 60)), st.builds(Fault, st.just('cut'), st.integers(1, 9)),
                    st.builds(Fault, st.sampled_from([*ERRORS]), st.integers(1, 40), st.booleans()))

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
        left, soft = self.left[place], set()
        for n in NEEDS[name]:
            if n not in left or left[n].card != 'good': return {n}, False
        for n in self.earlier(name):
            if n not in left or left[n].card != 'good': soft |= {n}; continue
            sources = [s for s in NEEDS[n] if s in left and left[s].card == 'good']
            if any(contents(left[s].outcome) != contents(i) for s in sources for i in left[n].outcome.inputs if i.room == s): return {n}, False
        return soft, True

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
        ended = enter(self.folder, *((self.path(place), n, c) for n, c in entries), fault=fault, tally=self.tally)
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
        if self.trouble(place, name)[0] and any(n not in self.left[place] for n in NEEDS[name]): return
        o = outcome(name, self.values, choices, self.inputs(place, name))
        if begun: self.tried.add((self.pool(place), o)); self.at.pop((self.pool(place), o), None)
        if not card.exists(): return
        data = card.read_bytes()
        if was and (was.bytes == data or was.card == 'damaged' and data == was.damage):
            if was.card == 'good' and was.outcome != o: assert self.whole(place, name) == was.intact, 'the old files are gone, the old card is not'
            if was.outcome == o: old.pop((place, name), None)   # its damaged files may have been removed
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
                if old and (place, name) in old: assert (left.card, left.intact) >= old[place, name] or (left.card, left.intact) == ('good', True)

    def tidy(self, place, name, said):
        "Nothing but the card and its files is left of a room that has been entered."
        stem, values = f'{NUMBERS[name]:02}-{name}', json.loads(self.left[place][name].bytes)
        mine = {p.relative_to(self.path(place)).as_posix() for pattern in (f'{stem}*', f'.{stem}*') for p in self.path(place).glob(pattern)}
        assert mine == {f'{stem}.json', *(p.split('/')[0] for p in values['wrote'])}, 'left behind in the run'
        inside = {p.relative_to(self.path(place)).as_posix() for d in self.path(place).glob(f'{stem}.*/') for p in d.rglob('*') if p.is_file()}
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

    @rule()
    def enters_again(self):
        if self.again: self.enter(*self.again)

    @rule(name=st.sampled_from(['deep', 'step', 'scale']), value=st.integers(0, 2))
    def helper_is_edited(self, name, value):
        self.values[name] = value
        write_toy(self.folder, **self.values)

    @rule(word=st.sampled_from(['words', 'other words', 'more\nwords of 2 lines']), number=st.integers(0, 3))
    def words_and_strangers_are_edited(self, word, number):
        self.values |= {'words': word if number % 2 else word.split('\n')[0], 'unrelated': number}
        self.values['words'] = self.values['words'].replace('\n', ' ')
        write_toy(self.folder, **self.values)

    @rule(place=PLACES, name=st.sampled_from([*NEEDS]), which=st.integers(0, 1), how=st.sampled_from(['change', 'replace', 'truncate', 'delete']))
    def file_is_damaged(self, place, name, which, how):
        if name not in self.left[place]: return
        files = sorted(json.loads(self.left[place][name].bytes)['wrote'])
        self.damage(self.path(place)/files[which % len(files)], how)

    @rule(place=PLACES, name=st.sampled_from([*NEEDS]), how=st.sampled_from(['change', 'truncate', 'delete', 'empty', 'result', 'read', 'wrote']))
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
        deadline=None, derandomize=True, database=None, max_examples=30, stateful_step_count=30, suppress_health_check=list(HealthCheck)))
