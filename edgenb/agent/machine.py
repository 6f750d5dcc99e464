"""The agent's state machine: one table says what every state does, how long it may take, and what comes after. Written by hand, not exported.

Nothing here decides what is trusted (`trust`), what is wanted (`decide`) or how a file gets to the disk (`storage`). A state ends in one of four ways,
and the table names the next one for each; an exception nobody foresaw is a failure. So there is no way for the agent to hang, and none to stop.
"""
import contextlib, datetime, hashlib, json, os, signal, subprocess, sys, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from edgenb.core import EdgenbError
from edgenb.fleet.windows import until_open, window_open, windows_text
from .decide import Decision, decide, given_up, version_tuple
from .serve import available_mb
from .storage import Device, Held, Journal, REFUSED_KEPT, Store, told
from .trust import Deadline, OutOfTime, Source, Unreachable, look, now_trusted, source_of

MB = 1_000_000


@dataclass(frozen=True)
class State:
    "A row of the table."
    does: str            # in words
    timeout_s: float     # after which it is over
    success: str         # next state
    nothing: str         # next state where there was nothing to do
    failure: str
    timeout: str


STATES = {
    'START':     State('reads the journal and loads the slot in use',                        300,    'TRIAL', 'IDLE',     'ROLL_BACK', 'ROLL_BACK'),
    'IDLE':      State('serves, and waits for the next look at the repository',              7*86400, 'CHECK', 'START',   'CHECK',     'CHECK'),
    'CHECK':     State('refreshes the signed metadata and reads what the campaigns ask',     600,    'FETCH', 'IDLE',     'BACK_OFF',  'BACK_OFF'),
    'FETCH':     State('fetches the blobs that are missing, goes on where it was broken off', 4*3600, 'STAGE', 'IDLE',    'BACK_OFF',  'BACK_OFF'),
    'STAGE':     State('puts the new bundle together in the other slot and checks every file', 3600, 'PROVE', 'IDLE',     'BACK_OFF',  'BACK_OFF'),
    'PROVE':     State('runs the health check of the new slot in a process of its own',      900,    'SWITCH', 'CHECK',   'BACK_OFF',  'BACK_OFF'),
    'SWITCH':    State('names the new slot in the journal and serves from it',               300,    'TRIAL', 'IDLE',     'ROLL_BACK', 'ROLL_BACK'),
    'TRIAL':     State('serves from the new slot and watches it',                            7*86400, 'COMMIT', 'IDLE',   'ROLL_BACK', 'ROLL_BACK'),
    'COMMIT':    State('keeps the new slot and tidies up',                                   300,    'IDLE',  'IDLE',     'BACK_OFF',  'BACK_OFF'),
    'ROLL_BACK': State('goes back to the slot before and remembers why',                     300,    'BACK_OFF', 'BACK_OFF', 'BACK_OFF', 'BACK_OFF'),
    'BACK_OFF':  State('serves, and waits before it tries again',                            6*3600, 'IDLE',  'IDLE',     'IDLE',      'IDLE'),
}
SETTLED_S = 60           # of serving after which a start no longer counts against the model
BY_HAND = 'rolled back by hand'
RECHECK_S = 900          # a decision older than that is made again before a switch
STARTS = 5               # starts without settling after which a committed model is given up for the one before


def table() -> str:
    "The state machine as a Markdown table."
    span = lambda s: f'{s/86400:g} d' if s >= 86400 else f'{s/3600:g} h' if s >= 3600 else f'{s/60:g} min'
    return '\n'.join(['| state | what it does | at most | success | nothing to do | failure | timeout |', '|---|---|---|---|---|---|---|',
                      *(f'| {n} | {s.does} | {span(s.timeout_s)} | {s.success} | {s.nothing} | {s.failure} | {s.timeout} |' for n, s in STATES.items())])


# -- the health check, in a process of its own
@dataclass(frozen=True)
class Proof:
    "What a health check said."
    ok: bool
    reason: str
    rss_mb: float = 0.0


def prove(folder: Path, deadline: Deadline, memory_mb: int = 0) -> Proof:
    "Run `python -m edgenb.golden FOLDER` where it can hurt nobody: watched for time and memory, first to be killed when memory runs out."
    memory_mb = memory_mb or int(0.8*min(available_mb(), 1 << 30))
    child = subprocess.Popen([sys.executable, '-m', 'edgenb.golden', str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | {'PYTHONDONTWRITEBYTECODE': '1'})
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, child.pid, 10)
        Path(f'/proc/{child.pid}/oom_score_adj').write_text('1000')
    most, why = 0.0, ''
    try:
        while True:
            try: out, err = child.communicate(timeout=0.05); break
            except subprocess.TimeoutExpired: pass
            most = max(most, _rss_mb(child.pid))
            if most > memory_mb: why = f'the health check took {most:.0f} MB, at most {memory_mb} are allowed'
            try: deadline.check()
            except OutOfTime as e: why = f'the health check: {e}'
            if why: os.killpg(child.pid, signal.SIGKILL); out, err = child.communicate(); break
    except BaseException: os.killpg(child.pid, signal.SIGKILL); child.wait(); raise
    if why: return Proof(False, why, most)
    try: answer = json.loads(out.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = err.decode(errors='replace').strip().splitlines()
        return Proof(False, f"the health check died ({signal.Signals(-child.returncode).name if child.returncode < 0 else f'exit {child.returncode}'}{': ' + last[-1][:200] if last else ''})", most)
    return Proof(bool(answer.get('ok')) and child.returncode == 0, str(answer.get('reason', ''))[:500], max(most, float(answer.get('rss_mb') or 0)))


def _rss_mb(pid) -> float:
    try: return int(Path(f'/proc/{pid}/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/MB
    except (OSError, IndexError, ValueError): return 0.0


# -- the machine
@dataclass
class Nobody:
    "Serves nothing: for `edgenb agent poll`, where no process of the agent stays."
    slot: str = ''
    def serve(self, folder, digest, need_mb=0): self.slot = folder.name
    def drop(self, why=''): self.slot = ''
    def trouble(self): return ''
    def fresh(self): pass


class Machine:
    "The agent, without a loop of its own: `step()` does what the state asks and goes on to the next."
    def __init__(self, store: Store, device: Device, root: bytes, server=None,
                 prove=prove,              # (folder, deadline, memory_mb) -> Proof
                 source: Source | None = None,   # default: the device's repository
                 clock=time.time, steady=time.monotonic,
                 stopped=lambda: False,    # asked between pieces of work
                 observe=lambda name, value, model='': None):
        self.store, self.device, self.root, self.server = store, device, root, server or Nobody()
        self.prover, self.source, self.clock, self.steady, self.stopped, self.observe = prove, source, clock, steady, stopped, observe
        self.state, self.before, self.why, self.since, self.entered = 'START', '', 'the agent starts', clock(), steady()
        self.journal, self.failures, self.due = Journal(), 0, 0.0
        self.decision: Decision | None = None
        self.plan = self.view = self.release = None
        self.need_mb = 0.0
        self.started = self.settled = False
        self.checked, self.trial_began, self.asked = -1e9, None, False
        self.last = {}          # state -> why it ended as it did, for `status`

    # -- one step
    def step(self) -> str:
        "Do what the state asks; returns the next state, or the same one while it waits."
        row, before = STATES[self.state], self.state
        deadline = Deadline(row.timeout_s, self.stopped, self.steady)
        try: outcome, why = getattr(self, f'_{self.state.lower()}')(deadline)
        except OutOfTime as e: outcome, why = 'timeout', told(e)
        except Exception as e: outcome, why = 'failure', told(e)   # whatever it was, there is a state for it
        if outcome == 'wait': self.why = why; return self.state
        self.last[before] = why
        if outcome in ('failure', 'timeout') and before != 'IDLE': self.failures += 1
        if before == 'ROLL_BACK': self.observe('edgenb.update.fallback.count', 1)
        self.go(getattr(row, outcome), why)
        return self.state

    def go(self, state: str, why: str):
        self.before, self.state, self.why, self.since = self.state, state, why, self.clock()
        self.entered = self.steady()
        if state == 'IDLE' and self.before not in ('BACK_OFF', 'START'): self.failures = 0   # it looked, and nothing failed on the way
        try: self.due = self.entered + (self._pause() if state == 'BACK_OFF' else self._until_poll() if state == 'IDLE' else 0)
        except Exception as e: self.due = self.entered + 60; self.last['due'] = told(e)   # such as a damaged journal: not a reason to stop serving
        self.tell()

    def rest(self) -> float:
        "Seconds until the next step is due."
        if self.state == 'IDLE' and self._doubtful(): return 0
        if self.state in ('IDLE', 'BACK_OFF'): return 0 if self.asked or self.state == 'IDLE' and self._unserved() else max(0.0, self.due - self.steady())
        return 1.0 if self.state == 'TRIAL' and self.trial_began is not None else 0.0

    def poll(self):
        "Look at the repository as soon as nothing else is at work."
        self.asked = True

    def run_once(self) -> str:
        "From where it is until it rests; returns the words."
        self.asked = True
        for _ in range(200):
            self.step()
            if self.state in ('IDLE', 'BACK_OFF') and not self.asked or self.stopped(): break
            if self.state == 'TRIAL' and self.rest(): break
        return self.why

    def _pause(self) -> float:
        "How long to wait after failures: a minute, doubled each time up to the timeout of BACK_OFF, spread over the fleet by the device's name."
        wait = min(60*2**min(max(self.failures - 1, 0), 12), STATES['BACK_OFF'].timeout_s if self._served() or not self.journal.active else 240)*self._spread()
        if (plan := self.journal.plan) and plan['windows'] and not window_open(plan['windows'], self._local()): wait = min(wait, until_open(plan['windows'], self._local()) + 1)
        return min(wait, STATES['BACK_OFF'].timeout_s)

    def _spread(self) -> float: return 0.75 + int(hashlib.sha256(self.device.id.encode()).hexdigest()[:4], 16)/0xffff/2

    def _until_poll(self) -> float:
        if not self.started or not self.journal.active and self.checked < 0: return 0
        wait = self.device.poll_s*self._spread()
        if self.checked < 0: wait = min(wait, 120*(self._spread() - 0.75))   # after a start soon, but not the whole plant at once when the mains come back
        if self.decision and not self.decision.now and self.decision.release: wait = min(wait, until_open(list(self.decision.windows), self._local()) + 1)
        return min(wait, STATES['IDLE'].timeout_s)

    def _local(self): return datetime.datetime.fromtimestamp(now_trusted(self.journal.floor, self.clock()))

    def save(self, **changes):
        "Change the journal on the disk, then here."
        self.journal = self.store.save(replace(self.journal, **changes))

    def _served(self) -> bool: return bool(self.journal.active) and self.server.slot == self.journal.active
    def _unserved(self) -> bool: return not self.started or bool(self.journal.active) and not self._served() or self.journal.trial and self.trial_began is None

    # -- the states
    def _start(self, deadline):
        if not self.started:
            self.store.open()
            self.journal, self.started = self.store.load(), True
            if self.journal.active:
                try: self.save(starts=self.journal.starts + 1)
                except OSError as e: self.last['START'] = told(e)   # serve all the same
        self.trial_began = None
        held, active = self.journal.serving(), self.journal.active
        if held is None: return 'nothing', 'no model is installed yet'
        if why := self._doubtful(): return 'failure', f'release {held.digest[:12]}… in use: {why}'
        limit = max(1, self.device.tries) if self.journal.trial else STARTS
        if self.journal.starts > limit and self._fallback(): return 'failure', f'the agent ended {self.journal.starts - 1} times before release {held.digest[:12]}… had served for {SETTLED_S} s'
        if self.store.holds(active) is None: return 'failure', f'slot {active} is damaged: its files are not what the manifest says'   # a slow disk is no reason not to serve what is whole
        if not self._served(): self.server.serve(self.store.slot(active), held.digest)
        return ('success', f'serves {held.digest[:12]}… from slot {active}, on trial') if self.journal.trial else ('nothing', f'serves {held.digest[:12]}… from slot {active}')

    def _fallback(self) -> str:
        "A slot that could serve instead of the active one."
        other = self.journal.back if self.journal.trial else self.journal.other()
        held = self.journal.held(other) if other else None
        return other if held and held.good and other != self.journal.active else ''

    def _doubtful(self) -> str:
        "What speaks against a model that is in use, where another one could take over."
        return self.server.trouble() if self.started and not self.journal.trial and self._served() and self._fallback() else ''

    def _settle(self):
        "A model that has served for a while has not taken the process down."
        if not self.settled and self._served() and self.journal.starts and self.steady() - self.entered >= SETTLED_S:
            self.settled = True
            with contextlib.suppress(OSError): self.save(starts=0)

    def _idle(self, deadline):
        if self._unserved(): return 'nothing', 'what the journal names is not what is served'
        if not self.journal.trial: self._settle()
        if self._doubtful(): return 'nothing', 'the model in use fails'
        if not self.asked and self.steady() < self.due: return 'wait', self.why
        self.asked = False
        if self.device.connect and not self._stick() and not window_open(self.device.connect, self._local()):
            self.due = self.steady() + until_open(self.device.connect, self._local()) + 1
            return 'wait', f'uses the network only {windows_text(self.device.connect)}'
        return 'success', 'time to look'

    def _stick(self) -> bool: return bool(self.source and not self.source.base.startswith('http')) or not self.device.repository.startswith('http')

    def _check(self, deadline):
        source = self._source(deadline)
        try: view = look(self.store, source, self.root, now_trusted(self.journal.floor, self.clock()))
        except Unreachable as e: return self._offline(e)
        now, document = now_trusted(self.journal.floor, self.clock()), view.campaigns
        serial = document.get('serial', 0)
        if not isinstance(serial, int) or serial < self.journal.serial and view.root <= self.journal.root: raise EdgenbError(f'the campaigns have serial {serial}, this device has acted on {self.journal.serial}: refused')
        floor = max(self.journal.floor, min(view.issued, view.expires), min(now, view.expires))   # the clock is believed as far as unexpired signatures reach
        decision = decide(document, self.device, self.journal, self._local())
        plan = {'release': decision.release, 'campaign': decision.campaign, 'windows': list(decision.windows), 'expires': view.expires, 'why': decision.why} if decision.release else None
        if (serial, view.root, plan) != (self.journal.serial, self.journal.root, self.journal.plan) or floor - self.journal.floor > 3600:   # not at every look: flash wears out
            self.save(serial=serial, root=view.root, floor=floor, plan=plan)
        self.decision, self.view, self.checked = decision, view, self.steady()
        if decision.named and (held := self.journal.serving()).campaign != decision.campaign: self.save(slots=self.journal.with_slot(self.journal.active, replace(held, campaign=decision.campaign)).slots)   # the one for which it would be given up
        if not self.journal.trial: self.server.fresh()
        if decision.release is None:
            self._tidy()
            return 'nothing', decision.why
        return 'success', decision.why

    def _source(self, deadline) -> Source:
        if self.source is None: self.source = source_of(self.device.repository)
        self.source.deadline = deadline
        return self.source

    def _offline(self, error):
        "No network: what was decided while it was there still holds, until the signatures expire."
        plan, now = self.journal.plan, now_trusted(self.journal.floor, self.clock())
        other = self.journal.held(self.journal.other())
        if not plan or now >= plan['expires'] or not other or other.digest != plan['release']: raise error
        if why := given_up(self.journal, plan['release'], plan['campaign']): raise Unreachable(f'{why} ({told(error)})')
        open_ = window_open(plan['windows'], self._local())
        self.decision, self.view, self.checked = Decision(plan['release'], plan['why'], plan['campaign'], open_, tuple(plan['windows'])), None, self.steady()
        if not open_: raise error
        return 'success', f"{plan['why']} (read earlier; now {told(error)})"

    def _fetch(self, deadline):
        from edgenb.fleet.delta import plan, slot_files
        d, other = self.decision, self.journal.other()
        if self._ready(other, d.release): return 'success', 'the other slot holds it already'
        if self.view is None: raise EdgenbError('nothing was read from the repository')
        release = self.view.release(d.release)
        if d.name and release['name'] != d.name: raise EdgenbError(f"campaign {d.campaign} is about {d.name}, but release {d.release[:12]}… is {release['name']}: refused")   # who has the online key chooses among the releases of a model, not among models
        if version_tuple(release.get('agent', '0')) > version_tuple(_agent_version()): return 'nothing', f"release {d.release[:12]}… needs agent {release['agent']}, this is {_agent_version()}: install a newer edgenb"
        held = self.journal.serving()
        active = self.store.slot(self.journal.active) if held else None
        self.plan = p = plan(release, slot_files(active) if active and active.is_dir() else {}, held.digest if held else '')
        self.release = release
        self.store.keep_blobs(p.blobs)
        missing = {sha: n for sha, n in p.blobs.items() if not self.store.has(sha, n)}
        self.store.room(p.total_bytes + sum(missing.values()), self.device.limit_mb and self.device.limit_mb*MB, self.device.reserve_mb*MB)
        for sha, n in missing.items(): self._blob(sha, n, deadline)
        self.store.disk.sync_folder(self.store.blobs)
        return 'success', f'fetched {sum(missing.values())/MB:.2f} of {p.bytes/MB:.2f} MB ({p.kind})'

    def _ready(self, slot, digest) -> bool:
        "A slot holds a release whole: the journal says so, and the files do."
        held = self.journal.held(slot)
        found = self.store.holds(slot) if held and held.digest == digest else None
        return found is not None and found.digest == digest

    def _blob(self, sha, length, deadline):
        "Fetch a blob, from where it was broken off where the source can do that; never more than was signed."
        part = self.store.part(sha)
        at = part.stat().st_size if part.is_file() and not part.is_symlink() else 0
        if part.is_symlink() or at > length: self.store.disk.remove(part); at = 0
        if at < length:
            begins, pieces = self._source(deadline).blob(sha, at)
            append = begins == at and at > 0
            got = at if append else 0
            if not append: self.store.disk.write(part, b'')
            for piece in pieces:
                got += len(piece)
                if got > length: self.store.disk.remove(part); raise EdgenbError(f'blob {sha[:12]}… is longer than the {length:,} bytes that were signed: thrown away')
                self.store.disk.write(part, piece, append=True)
                deadline.check()
            if got < length: raise Unreachable(f'blob {sha[:12]}… broke off after {got:,} of {length:,} bytes: goes on from there')
        self.store.finish(sha)
        self.failures = 0   # a bad line that gets something through is worth another try soon

    def _stage(self, deadline):
        from edgenb.fleet.delta import assemble
        d, other = self.decision, self.journal.other()
        if not self._ready(other, d.release):
            if self.journal.held(other): self.save(slots=self.journal.with_slot(other, None).slots)   # before the slot is touched
            folder = self.store.slot(other)
            self._empty(folder)
            def get(sha, length):
                deadline.check()
                path = self.store.blob(sha)
                if path.is_file(): yield path.read_bytes(); return
                yield from self._source(deadline).blob(sha, 0)[1]   # a part of the old slot could not be read: in full, then
            try: assemble(self.plan, get, folder)
            except (EdgenbError, OSError):
                self.store.drop_damaged(self.plan.blobs)
                raise
            self.store.seal(folder)
            self.store.disk.sync_folder(self.store.slots)
            found = self.store.holds(other)
            if found is None or found.digest != d.release: raise EdgenbError(f'what was put together is not the bundle {d.release[:12]}… that was signed: thrown away')
            self.save(slots=self.journal.with_slot(other, Held(d.release, self.release['name'], self.release['version'], d.campaign)).slots)
            self.store.keep_blobs(())
        if not d.now: return 'nothing', f'release {d.release[:12]}… lies ready in slot {other} and waits for its window: {windows_text(d.windows)}'
        return 'success', f'slot {other} holds release {d.release[:12]}…, whole'

    def _empty(self, folder):
        "Make room in a slot. What an interrupted attempt at the same release left is kept: `assemble` goes on from it."
        wanted = {folder/s.path for s in self.plan.steps}
        inside = {q for p in wanted for q in p.parents}
        wanted |= {p.with_name(p.name + '.part') for p in wanted}
        strange = [p for p in folder.rglob('*') if p.is_symlink() or p not in (inside if p.is_dir() else wanted)] if folder.is_dir() else []
        if strange or folder.is_symlink() or folder.is_file(): self.store.clear(folder)

    def _prove(self, deadline):
        d, other = self.decision, self.journal.other()
        if self.steady() - self.checked > RECHECK_S: return 'nothing', 'the campaigns were read too long ago: read again before anything is switched'
        held = self.journal.held(other)
        if not held.proven:
            tries = self.journal.tries
            self._count(d.release, d.campaign, 'it took the device down during its health check')   # before: a crash must count
            proof = self.prover(self.store.slot(other), deadline, self.device.memory_mb)
            if not proof.ok and self.stopped(): self.save(tries=tries); deadline.check()   # a service that is stopped is nobody's failure
            self.observe('edgenb.agent.health', float(proof.ok))
            if not proof.ok:
                self._reason(d.release, proof.reason)
                return 'failure', f'release {d.release[:12]}… failed its health check: {proof.reason}'
            self.save(slots=self.journal.with_slot(other, replace(held, proven=True)).slots)
            self.need_mb = proof.rss_mb
            return 'success', f'healthy: {proof.reason}' if proof.reason else 'healthy'
        return 'success', 'has passed its health check'

    def _count(self, digest, campaign, reason):
        "Count an attempt at a release before it is made; after so many it is left alone."
        was = self.journal.tries.get(digest, {'count': 0})
        n = was['count'] + 1 if was.get('campaign') == campaign else 1
        tries = {k: v for k, v in self.journal.tries.items() if k != digest} | {digest: {'count': n, 'campaign': campaign, 'reason': reason, 'quarantined': n >= self.device.tries}}
        self.save(tries=dict(list(tries.items())[-REFUSED_KEPT:]))

    def _reason(self, digest, reason, final=False):
        if t := self.journal.tries.get(digest): self.save(tries=self.journal.tries | {digest: t | {'reason': reason, 'quarantined': t['quarantined'] or final}})

    def _switch(self, deadline):
        other = self.journal.other()
        held, back = self.journal.held(other), self.journal.active if self.journal.serving() and self.journal.serving().good else ''
        if held is None or not self._ready(other, held.digest): raise EdgenbError(f'slot {other} holds nothing that could serve')
        t = self.journal.tries.get(held.digest)
        if self.stopped(): deadline.check()   # not by the clock: reading a large slot again may take long, and says nothing about the model
        self.save(active=other, trial=True, back=back, starts=0, tries=self.journal.tries | ({held.digest: t | {'reason': 'it took the agent down on trial'}} if t else {}))
        self.trial_began, self.settled = None, False
        self.server.serve(self.store.slot(other), held.digest, self.need_mb)
        return 'success', f'serves {held.digest[:12]}… from slot {other}, on trial for {self.device.trial_s} s'

    def _trial(self, deadline):
        held = self.journal.serving()
        if not self.journal.trial or held is None: return 'nothing', self.why
        if self.trial_began is None:
            if held.digest not in self.journal.tries: self._count(held.digest, held.campaign, 'it did not pass its trial')
            self.trial_began = self.steady()
            self.server.fresh()
        if why := self.server.trouble(): return 'failure', f'release {held.digest[:12]}… on trial: {why}'
        if isinstance(self.server, Nobody):   # nobody asks it here: its health check, from the place where it will serve
            proof = self.prover(self.store.slot(self.journal.active), deadline, self.device.memory_mb)
            return ('success', 'its trial: healthy where it serves') if proof.ok else ('failure', f'its trial: {proof.reason}')
        left = self.trial_began + self.device.trial_s - self.steady()
        if left > 0: return 'wait', f'release {held.digest[:12]}… is on trial for another {left:.0f} s'
        return 'success', f'release {held.digest[:12]}… has passed its trial of {self.device.trial_s} s'

    def _commit(self, deadline):
        active, held = self.journal.active, self.journal.serving()
        self.trial_began = None    # if this fails, the trial is held again
        self.save(slots=self.journal.with_slot(active, replace(held, proven=True, good=True)).slots, trial=False, back='', starts=0, tries={k: v for k, v in self.journal.tries.items() if k != held.digest}, plan=None)
        self.failures = 0
        self._tidy()
        return 'success', f'release {held.digest[:12]}… ({held.name} {held.version}) is in use'

    def _roll_back(self, deadline):
        why, held, active = self.why, self.journal.serving(), self.journal.active
        if self.before == 'SWITCH' and not self.journal.trial: return 'success', f'{why}; nothing was switched'
        to = self._fallback()
        if held is None: return 'success', why
        whole = self.store.holds(active) is not None
        if not to and not self.journal.trial and whole: return 'success', f'{why}; there is no other slot to go back to, it is tried again'
        self.trial_began = None    # if this fails, START and TRIAL come to it again
        if to and self.server.slot != to: self.server.serve(self.store.slot(to), self.journal.held(to).digest)   # first: if that fails too, it is not the model's fault
        if whole:   # one that was committed has had all its chances
            if held.digest not in self.journal.tries: self._count(held.digest, held.campaign, why)
            self._reason(held.digest, why, final=not self.journal.trial)
        slots = {s: h for s, h in self.journal.slots.items() if s != active} | ({active: replace(held, good=False, proven=False)} if whole else {})   # damaged: fetched again
        self.save(active=to, slots=slots, trial=False, back='', starts=0, plan=None)
        self.trial_began, self.settled = None, False
        self.server.fresh()
        if not to: self.server.drop(why); return 'success', f'{why}; there is nothing to go back to, nothing is served'
        return 'success', f'{why}; back on {self.journal.serving().digest[:12]}… in slot {to}'

    def _back_off(self, deadline):
        if not self.journal.trial: self._settle()
        if not self.asked and self.steady() < self.due: return 'wait', self.why
        self.asked = True     # then look at once
        return 'success', self.why

    # -- by hand
    def roll_back_by_hand(self) -> str:
        "Go back to the slot before; the release that is left is not taken again until another campaign names it."
        held, other = self.journal.serving(), self.journal.other()
        before = self.journal.held(other)
        if held is None or before is None or not before.good or not self._ready(other, before.digest): raise EdgenbError('there is no earlier model to go back to')
        if self.state not in ('IDLE', 'BACK_OFF', 'TRIAL'): raise EdgenbError(f'the agent is at {self.state}: try again when it rests')
        tries = self.journal.tries | {held.digest: {'count': self.device.tries, 'campaign': held.campaign, 'reason': BY_HAND, 'quarantined': True}}
        self.server.serve(self.store.slot(other), before.digest)   # first: if it cannot be loaded, nothing has changed
        self.save(active=other, trial=False, back='', starts=0, tries=tries, plan=None)
        self.trial_began = None
        self.go('IDLE', f'rolled back by hand to {before.digest[:12]}… in slot {other}')
        return self.why

    def _tidy(self):
        "Nothing is under way: blobs are of no more use."
        self.store.keep_blobs(())

    # -- in words
    def status(self) -> dict:
        j = self.journal
        held = j.serving()
        return {'edgenb_agent': _agent_version(), 'device': self.device.id, 'state': self.state, 'does': STATES[self.state].does, 'why': self.why,
                'since': datetime.datetime.fromtimestamp(self.since, datetime.timezone.utc).isoformat(timespec='seconds'), 'serving': asdict(held) | {'slot': j.active, 'trial': j.trial} if held else None,
                'other': asdict(o) | {'slot': j.other()} if (o := j.held(j.other())) else None, 'failed_here': self._failed(), 'serial': j.serial, 'last': self.last, 'process': os.getpid()}

    def _failed(self) -> dict:
        "Tries that have failed: without the one under way, which is counted before it is made."
        j, d = self.journal, self.decision
        under_way = j.serving().digest if j.trial and j.serving() else d.release if d and self.state == 'SWITCH' else None
        t = j.tries.get(under_way)
        if not t: return j.tries
        earlier = {under_way: t | {'count': t['count'] - 1, 'reason': 'it failed before and is tried again', 'quarantined': False}} if t['count'] > 1 else {}
        return {k: v for k, v in j.tries.items() if k != under_way} | earlier

    def tell(self): self.store.tell(self.status())


def _agent_version() -> str:
    import edgenb
    return edgenb.__version__
