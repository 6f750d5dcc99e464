"""The agent as a program: enrolled, asked once, or running; and in the program of a user, `Agent`. Written by hand, not exported."""
import contextlib, json, os, re, secrets, signal, sys, threading, time
from pathlib import Path
from edgenb.core import EdgenbError, json_text
from edgenb.fleet.windows import days_of, minute_of
from .machine import BY_HAND, Machine, STATES, prove
from .serve import Server, http_server
from .storage import Device, Store, load_device, told
from .trust import FolderSource, seconds_of, source_of

ROOT = '/var/lib/edgenb'
WAKE_S = 60.0    # the longest sleep: a clock that jumps, a request that got lost


def place(root: str | None) -> Path:
    "The agent's folder: as given, else $EDGENB_AGENT, else /var/lib/edgenb."
    return Path(root or os.environ.get('EDGENB_AGENT') or ROOT)


def enrol(root: Path, root_json: Path, repository: str, site: str, hardware: str, id: str = '', model: str = '', connect: list = (), **more) -> Device:
    "Make a folder for an agent: who the device is, and the root of trust, which came another way than the repository."
    from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
    from tuf.api.metadata import Metadata, Root
    root = Path(root)
    if (root/'device.json').exists(): raise EdgenbError(f'{root} is enrolled already, as {load_device(root).id}: remove the folder to enrol the device anew')
    for name, text in (('site', site), ('hardware', hardware)):
        if not re.fullmatch(r'[A-Za-z0-9._-]{1,64}', text): raise EdgenbError(f"enrol: {name} '{text}' may have letters, digits, dots and dashes, at most 64")
    id = id or secrets.token_hex(16)
    if not re.fullmatch(r'[0-9a-f]{32}', id): raise EdgenbError(f"enrol: id '{id}' must be 32 hex digits; without --id one is drawn")
    source_of(repository)
    if not re.match(r'https?://', repository):
        if not Path(repository).is_absolute() and not Path(repository).is_dir(): raise EdgenbError(f'enrol: there is no folder {repository}' + (f'; an address begins with https:// or http://, such as http://{repository}' if re.match(r'(\[[0-9a-fA-F:]+\]|localhost|[\w-]+(\.[\w-]+)*:\d+|[\w-]+(\.[\w-]+)+)(:\d+)?(/|$)', repository) else ': make it, or mount it, first'))
        repository = str(Path(repository).absolute())   # a stick need not be there yet
    for w in connect: days_of(w['days']), minute_of(w['from']), minute_of(w['to'])
    try: data = Path(root_json).read_bytes()
    except OSError as e: raise EdgenbError(f'{root_json} cannot be read ({e.strerror}): take the root.json of the key ceremony') from None
    take = 'take the root.json of the key ceremony (metadata/1.root.json in the repository)'
    try:
        metadata = Metadata[Root].from_bytes(data)
        if metadata.signed.type != 'root': raise EdgenbError(f'{root_json} is the {metadata.signed.type} of a repository, not its root of trust: {take}')
        metadata.signed.verify_delegate('root', metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError as e: raise EdgenbError(f'{root_json} is not a root of trust, its own keys have not signed it ({e}): {take}') from None
    except (RepositoryError, ValueError, KeyError, TypeError, AttributeError): raise EdgenbError(f'{root_json} is not a root of trust, or it is damaged: {take}') from None
    store = Store(root).open()
    device = Device(id, site, hardware, repository, model, list(connect), **more)
    store.put(store.root/'root.json', data)
    made = seconds_of(metadata.signed.unrecognized_fields.get('x-edgenb-issued'))
    if made: from dataclasses import replace; store.save(replace(store.load(), floor=made))
    store.put(store.root/'device.json', json_text({'edgenb_device': 1} | vars(device)))   # last: without it the folder is not enrolled
    return device


class Agent:
    "The agent of a device, in this process."
    def __init__(self, root: str | Path | None = None,   # its folder
                 observe=None,            # (name, value, model): telemetry, such as `Outbox.observe`
                 load=None, prove=prove,  # for tests
                 clock=time.time, steady=time.monotonic):
        self.root = place(root)
        self.device = load_device(self.root)
        observe = observe or (lambda name, value, model='': None)
        self.store = Store(self.root).open()
        self.store.lock()
        self.server = Server(load, observe)
        with contextlib.suppress(OSError): self.server.known |= {h.digest for h in self.store.load().slots.values()}   # labels come late, also for what decided before a restart
        self.stopping, self.woken = threading.Event(), threading.Event()
        self.machine = Machine(self.store, self.device, (self.root/'root.json').read_bytes(), self.server, prove, clock=clock, steady=steady, stopped=self.stopping.is_set, observe=observe)
        self.http = None

    def predict(self, inputs: list) -> list:
        "Decide with the model that serves."
        if self.machine.state == 'START': self.machine.step()
        return self.server.predict(inputs)

    def outcome(self, correct: bool, model: str = ''):   # digest of the bundle that decided; '' for the one that serves
        "Say whether a decision was right, when somebody knows."
        self.server.outcome(correct, model or self.server.digest)

    def poll(self, usb: str | Path | None = None) -> str:
        "Look at the repository once (or at a stick) and do what it asks; returns the reason in words."
        own, self.machine.source = self.machine.source, FolderSource(usb) if usb else self.machine.source
        try: return self.machine.run_once()
        finally: self.machine.source = own

    def status(self) -> dict: return self.machine.status() | {'exchange': self.server.how, 'queue': self.server._waiting}

    def listen(self, port: int | None = None) -> int:   # the port
        "Answer on the loopback too."
        self.http = http_server(self.server, self.device.port if port is None else port, self.model)
        threading.Thread(target=self.http.serve_forever, name='http', daemon=True, kwargs={'poll_interval': 0.1}).start()
        return self.http.server_address[1]

    def model(self) -> dict:
        "What serves, for /v1/model."
        held = self.machine.journal.serving()
        return {'model': self.server.digest, 'name': held.name if held else '', 'version': held.version if held else 0, 'slot': self.server.slot, 'trial': self.machine.journal.trial, 'state': self.machine.state, 'why': self.machine.why}

    def run(self):
        "Work until `stop`."
        while not self.stopping.is_set():
            self.machine.step()
            self.asked()
            self.woken.wait(min(self.machine.rest(), WAKE_S))
            self.woken.clear()

    def asked(self):
        "Do what `edgenb agent poll` or `rollback` left for a running agent."
        path = self.root/'request.json'
        if not path.exists() or self.machine.state not in ('IDLE', 'BACK_OFF', 'TRIAL'): return
        try: want = json.loads(path.read_bytes())
        except (OSError, ValueError): want = {}
        if self.machine.state == 'TRIAL' and want.get('do') == 'poll': return   # a stick is read when the trial is over
        with contextlib.suppress(OSError): path.unlink()
        try:
            if want.get('do') == 'rollback': self.machine.roll_back_by_hand()
            elif want.get('do') == 'poll' and want.get('usb'): self.poll(want['usb'])
            elif want.get('do') == 'poll': self.machine.poll()
        except Exception as e: self.machine.why = told(e); self.machine.tell()   # a full disk, a model that does not load: what serves goes on

    def wake(self, poll: bool = False):
        if poll: self.machine.poll()
        self.woken.set()

    def stop(self):
        self.stopping.set(); self.woken.set()

    def close(self):
        "Answer nobody any more and let go of the folder."
        self.stop()
        if self.http: self.http.shutdown(); self.http.server_close()
        with contextlib.suppress(OSError):
            if self.machine.started and self.machine.journal.starts and self.server.slot and not self.machine.journal.trial: self.machine.save(starts=0)   # it did not end by crashing
        self.machine.why = f'stopped; {self.machine.why}'
        self.machine.tell()
        self.store.unlock()

    def __enter__(self): return self
    def __exit__(self, *a): self.close()


# -- the commands
def run(root: Path, port: int | None = None):
    "`edgenb agent run`: SIGTERM and SIGINT end it cleanly, SIGHUP makes it look now."
    from edgenb.fleet.reporter import Reporter, outbox_at, setup_of
    device = load_device(root)
    try: box = outbox_at(root, device.id)
    except EdgenbError as e: box = print(f'edgenb agent: it decides, and reports nothing until its next start: {e}', file=sys.stderr, flush=True)   # never a reason not to decide
    def observe(name, value, model=''): box.set_model(agent.server.digest or None); box.observe(name, value, model or agent.server.digest or None)
    with Agent(root, observe=box and observe) as agent, contextlib.ExitStack() as beside:
        for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda *a: agent.stop())
        signal.signal(signal.SIGHUP, lambda *a: agent.wake(poll=not (agent.root/'request.json').exists()))
        crashed = beside.enter_context(_running(agent.root))
        if box and crashed: _tell_crash(box, agent.store.load().serving())
        agent.machine.step()   # serve first
        if box: beside.callback(Reporter(box, root, setup_of(root), lambda: _told(agent.machine)).start().stop)
        print(f'edgenb agent: device {agent.device.id}, http://127.0.0.1:{agent.listen(port)}, {agent.machine.why}', flush=True)
        agent.run()
    print('edgenb agent: stopped', flush=True)


@contextlib.contextmanager
def _running(root):
    "Whether the process before this one crashed: its mark is still there, and the machine was not started since (a loss of power is no crash)."
    mark, start = Path(root)/'running', ''
    with contextlib.suppress(OSError): start = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    try: crashed = start != '' and mark.read_text() == start
    except OSError: crashed = False
    with contextlib.suppress(OSError): mark.write_text(start)
    yield crashed
    with contextlib.suppress(OSError): mark.unlink()     # an exception does not come here: it is a crash too


def _tell_crash(box, held):
    "On the disk at once: a model that crashes every half hour would never come to close a row of its own."
    model = held.digest if held else None
    try: box.set_model(model); box.observe('edgenb.process.crash.count', 1, model); box.close()
    except EdgenbError as e: print(f'edgenb agent: telemetry: {e}', file=sys.stderr, flush=True)


def _told(machine) -> dict:
    "What telemetry says of the machine."
    return {'model': machine.server.digest or None, 'state': machine.state}


def hand_over(root: Path, request: dict) -> int | None:   # the process
    "Ask the agent that runs in `root`; None if none does."
    store = Store(root)
    if (owner := store.owner()) is None: return None
    try:
        store.put(store.root/'request.json', json_text(request))
        os.kill(owner, signal.SIGHUP)
    except PermissionError: raise EdgenbError(f'{root} belongs to another user: run this as the user who runs the agent (process {owner})') from None
    return owner


def poll(root: Path, usb: str | None = None) -> str:
    "`edgenb agent poll`."
    load_device(root)
    if usb and not Path(usb).is_dir(): raise EdgenbError(f'{usb} is not a folder: is the stick plugged in and mounted?')
    if owner := hand_over(root, {'do': 'poll', 'usb': str(Path(usb).absolute()) if usb else None}): return f'the running agent (process {owner}) looks now; edgenb agent status says what it found'
    with _alone(root) as machine:
        machine.source = FolderSource(usb) if usb else None
        why = machine.run_once()
        if machine.state == 'BACK_OFF': raise EdgenbError(why)
        return f'{why}\n{in_use(machine.status())}'


def roll_back(root: Path) -> str:
    "`edgenb agent rollback`."
    load_device(root)
    if owner := hand_over(root, {'do': 'rollback'}): return f'the running agent (process {owner}) goes back; edgenb agent status says whether it could'
    with _alone(root) as machine:
        machine.step()
        if machine.state not in ('IDLE', 'BACK_OFF', 'TRIAL'): machine.step()
        return machine.roll_back_by_hand()


@contextlib.contextmanager
def _alone(root):
    "A machine that serves nobody, for one command."
    store, device = Store(root).open(), load_device(root)
    store.lock()
    try:
        machine = Machine(store, device, (Path(root)/'root.json').read_bytes())
        yield machine
        machine.tell()
    finally: store.unlock()


def status(root: Path) -> dict:
    "What the agent did last and why, whether it runs now or not."
    device, store = load_device(root), Store(root)
    try: told_ = json.loads((store.root/'status.json').read_bytes())
    except (OSError, ValueError): told_ = {'state': 'START', 'does': STATES['START'].does, 'why': 'the agent has not run yet', 'serving': None, 'other': None, 'failed_here': {}, 'last': {}}
    return told_ | {'device': device.id, 'site': device.site, 'hardware': device.hardware, 'repository': device.repository, 'running': store.owner() is not None}


def in_use(s: dict) -> str:
    h = s.get('serving')
    return f"in use: {h['name'] or 'model'} {h['version']} ({h['digest'][:12]}…) in slot {h['slot']}{', on trial' if h['trial'] else ''}" if h else 'in use: nothing'


def status_text(s: dict) -> str:
    "The status in words."
    lines = [f"device {s['device']} ({s['site']}/{s['hardware']}), repository {s['repository']}", in_use(s), f"state: {s['state']} ({s['does']}){'' if s['running'] else '; the agent does not run now'}", f"why: {s['why']}"]
    if o := s.get('other'):
        by_hand = s.get('failed_here', {}).get(o['digest'], {}).get('reason') == BY_HAND
        lines.append(f"other slot: {o['name'] or 'model'} {o['version']} ({o['digest'][:12]}…), {BY_HAND if by_hand else 'good' if o['good'] else 'proven, not yet used' if o['proven'] else 'not proven'}{': edgenb agent rollback goes back to it' if o['good'] else ''}")
    for digest, t in s.get('failed_here', {}).items():
        if t['quarantined']: lines.append(f"not taken: {digest[:12]}… ({t['reason']})")
    return '\n'.join(lines)
