"""Power may fail at any moment: every state that the disk may then be in leads back to a model that serves, and on to the one that was asked for."""
import json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import pytest
from crashfs import Recorder, lay_out, states
from tinyfleet import NOW, Clock, Plant, live, machine_of, settled, tiny_bundle, use
from edgenb.agent.storage import Disk, Store, read_journal

FAST = Path('/dev/shm') if Path('/dev/shm').is_dir() else None   # thousands of small folders


class Story:
    "A device before something happens to it, and what must come of it however often the power fails."
    def __init__(self, name: str, here: Path):
        self.name, self.here, self.plant = name, here, Plant(here/'repo')
        self.v1, self.v2, self.sick, self.crash = (tiny_bundle(here/n, n) for n in ('v1', 'v2', 'sick', 'crash'))
        for i, n in enumerate(('v1', 'v2', 'sick', 'crash'), 1): self.plant.release(here/n, i)
        self.before, self.end = (self.v1,), self.v2
        self.clock = Clock()
        def have(digest, **kw): self.plant.campaign(digest, state='complete', **kw); live(machine_of(self.device, self.plant, self.clock), self.clock, 10**6, lambda m: self.arrived(m, digest))
        if name == 'install': self.before = (None,); Store(self.device).open(); self.plant.campaign(self.v2, id='c2')
        else: have(self.v1)
        if name == 'update': self.plant.campaign(self.v2, self.v1, id='c2')
        if name == 'sick': self.end = self.v1; self.plant.campaign(self.sick, self.v1, id='c2')
        if name == 'crash on trial': self.end = self.v1; self.plant.campaign(self.crash, self.v1, id='c2')
        if name == 'third':           # both slots hold something that is true: one of them must be forgotten before it is emptied
            have(self.v2, id='c2', replaces=self.v1)
            self.v3 = tiny_bundle(here/'v3', 'v3'); self.plant.release(here/'v3', 5)
            self.before, self.end = (self.v2,), self.v3
            self.plant.campaign(self.v3, self.v2, id='c3')
        if name == 'rolled back':
            have(self.v2, id='c2', replaces=self.v1)
            self.before, self.end = (self.v2,), self.v1
            self.plant.campaign(self.v2, self.v1, id='c2', state='rolled-back', reason='worse on site 3')
    @property
    def device(self): return self.here/'device'

    def allowed(self): return {*self.before, self.end, *([self.crash] if self.name == 'crash on trial' else [])}

    def arrived(self, m, digest):
        held = m.journal.serving()
        return settled(m) and held is not None and held.digest == digest and held.good

    def over(self, m):
        if self.end == self.v1 and self.name in ('sick', 'crash on trial') and not any(t['quarantined'] for t in m.journal.tries.values()): return False
        return self.arrived(m, self.end)

    def work(self, root, clock): return live(machine_of(root, self.plant, clock), clock, 10**6, self.over)


STORIES = ('install', 'update', 'sick', 'crash on trial', 'rolled back', 'third')


def lies(root: Path) -> str:
    "What the disk says that is not so: '' where the journal and the metadata are whole and true."
    store = Store(root)
    for p in [root/'state.json', *root.glob('metadata/*.json'), *root.glob('metadata/*/*.json')]:
        try: json.loads(p.read_bytes()) if p.exists() else None
        except ValueError: return f'{p.name} is torn'
    if (root/'state.json').exists():
        for slot, held in read_journal((root/'state.json').read_bytes()).slots.items():
            found = store.holds(slot)
            if found is None or found.digest != held.digest: return f'slot {slot} does not hold what the journal says'
    return ''


def survives(story: Story, state: dict, root: Path, recorder=None) -> str:
    "Lay the state out, let the agent start and work; '' or what went wrong."
    shutil.rmtree(root, ignore_errors=True)
    lay_out(state, root)
    if why := lies(root): return why
    clock = Clock(NOW + 7200)
    m = machine_of(root, story.plant, clock)
    m.step()
    served = m.server.digest or None
    if served not in story.allowed(): return f'after the start {served} serves ({m.state}: {m.why})'
    if served and use(m) not in ('v1', 'v2', 'v3', 'crash', 'Failed'): return 'it does not answer'
    try: live(m, clock, 10**6, story.over)
    except AssertionError as e: return str(e)
    if not story.over(m): return f'it ended as {m.journal}'
    m.run_once()   # and tidies up
    left = sorted(p.name for p in [*root.glob('blobs/*'), *root.glob('metadata/tmp*'), *root.rglob('*.part')])
    return f'left behind: {left}' if left else ''


def record(story, deaf_to='', root=None, state=None):
    "The operations of a story, from its beginning or from a state that a crash left."
    root = root or story.here/'recorded'
    shutil.rmtree(root, ignore_errors=True)
    if state is None: shutil.copytree(story.device, root, symlinks=True)
    else: lay_out(state, root)
    with Recorder(root, deaf_to) as r: story.work(root, Clock(NOW + 7200))
    return r.log


def key(state: dict) -> int: return hash(frozenset((p, c if not isinstance(c, str) else c.encode()) for p, c in state.items()))


def explore(story: Story, first: int, second: int, seed: int = 0, seen: set | None = None):
    "Try up to `first` distinct states of one crash, and of `second` more a second crash while the agent recovers; returns (tried, problems)."
    rng, seen, problems = random.Random(seed), set() if seen is None else seen, []
    def fresh(log):
        for k, s in states(log, rng):
            if key(s) not in seen: seen.add(key(s)); yield k, s
    every = list(fresh(record(story)))
    tried = 0
    for k, s in every if len(every) <= first else rng.sample(every, first):
        tried += 1
        if why := survives(story, s, story.here/'try'): problems.append(f'{story.name}, crash after operation {k}: {why}')
    while second > 0:
        k, s = rng.choice(every)
        again = list(fresh(record(story, state=s)))
        again = again if len(again) <= 60 else rng.sample(again, 60)
        if not again: second -= 1
        for k2, s2 in again:
            tried += 1; second -= 1
            if why := survives(story, s2, story.here/'try'): problems.append(f'{story.name}, crash after operation {k}, and after {k2} of the recovery: {why}')
    return tried, problems


@pytest.fixture
def here():
    with tempfile.TemporaryDirectory(dir=FAST) as folder: yield Path(folder)


@pytest.mark.parametrize('name', STORIES)
def test_a_loss_of_power_at_any_moment_leaves_a_model_that_serves_and_an_agent_that_arrives(name, here):
    tried, problems = explore(Story(name, here), 120, 60)   # benchmarks/crash.py: all
    assert not problems, f'{len(problems)} of {tried}: {problems[:3]}'
    assert tried >= 150


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_the_enumeration_finds_a_sync_that_was_left_out(kind, here):
    story = Story('update', here)
    found = [why for k, s in random.Random(0).sample(list(states(record(story, deaf_to=kind), random.Random(0))), 400) if (lay_out(s, here/'look'), why := lies(here/'look'), shutil.rmtree(here/'look'))[1]]
    assert len(found) > 10, 'the code without this sync looks as safe as the code with it: the enumeration is blind'


def test_one_sync_left_out_of_the_journal_is_found(here, monkeypatch):
    "Not all of them: just the one that makes a new journal durable before it replaces the old one."
    story, real = Story('update', here), Store.put
    def careless(self, path, data):
        if path.name != 'state.json': return real(self, path, data)
        self.disk.write(path.with_name('.t'), data.encode()); self.disk.rename(path.with_name('.t'), path); self.disk.sync_folder(path.parent)
    monkeypatch.setattr(Store, 'put', careless)
    log = record(story)
    monkeypatch.undo()
    why = [survives(story, s, here/'try') for _, s in random.Random(0).sample(list(states(log, random.Random(0))), 300)]
    assert any('state.json is torn' in w for w in why)


def test_the_sync_that_makes_a_slot_forgotten_before_it_is_emptied_is_missed_when_it_is_left_out(here, monkeypatch):
    story, real = Story('third', here), Disk.sync_folder
    monkeypatch.setattr(Disk, 'sync_folder', lambda self, path: None if path == here/'recorded' else real(self, path))   # where the journal lies
    log = record(story)
    monkeypatch.undo()
    why = [survives(story, s, here/'try') for _, s in random.Random(1).sample(list(states(log, random.Random(0))), 300)]
    assert any('does not hold what the journal says' in w for w in why)


def test_a_journal_that_is_lost_or_damaged_is_made_again_from_the_slots(here):
    story = Story('update', here)
    for damage in (b'', b'{"edgenb_agent": 1', b'\0'*300, b'[]', b'{"edgenb_agent": 2}', None):
        root = here/'damaged'
        shutil.rmtree(root, ignore_errors=True); shutil.copytree(story.device, root)
        (root/'state.json').unlink() if damage is None else (root/'state.json').write_bytes(damage)
        clock = Clock(NOW + 7200)
        m = machine_of(root, story.plant, clock)
        m.step()
        assert use(m) == 'v1', damage
        live(m, clock, 10**6, story.over)


def test_a_slot_that_rots_is_noticed_and_fetched_again(here):
    story = Story('rolled back', here)   # both slots are good, the campaign wants v1
    (story.device/'slots'/Store(story.device).load().active/'model.txt').write_text('rot')
    clock = Clock(NOW + 7200)
    m = machine_of(story.device, story.plant, clock)
    for _ in range(3): m.step()
    assert use(m) == 'v1'
    story.plant.campaign(story.v2, story.v1, id='c2', state='complete')
    live(m, clock, 10**6, lambda m: story.arrived(m, story.v2))
    assert use(m) == 'v2'
