"""What the agent keeps on disk: two slots, fetched blobs, and a journal that names the slot in use. Written by hand, not exported.

The only module of the agent that changes the disk. One rule makes it survive a loss of power at any moment: write under another name, force the content
to the disk, rename, force the folder to the disk. A slot is never changed while it is in use, and one small file, the journal, says which one is.

    device.json   who this device is            root.json     the key ceremony's root, pinned when the device was enrolled
    metadata/     what TUF has verified         state.json    the journal
    blobs/        fetched, by SHA-256           slots/a, b    a bundle each
    status.json   what the agent is doing (lost with the power, and it does not matter)
"""
import contextlib, fcntl, json, os, shutil, stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from edgenb.core import EdgenbError, FILE_ADVICE, digest, json_text
from edgenb.fleet.windows import days_of, minute_of

SLOTS = ('a', 'b')
REFUSED_KEPT = 32   # failed releases that the journal remembers


class Disk:
    "The operations of the operating system by which the agent changes its disk, and nothing else."
    def write(self, path: Path, data: bytes, append: bool = False):
        "Write without forcing it to the disk. Never through a link."
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if append else os.O_TRUNC), 0o644)
        with os.fdopen(fd, 'wb') as f: f.write(data)

    def sync(self, path: Path):
        "Force a file's content to the disk."
        fd = os.open(path, os.O_RDONLY)
        try: os.fsync(fd)
        finally: os.close(fd)

    def sync_folder(self, path: Path):
        "Force a folder's entries to the disk."
        self.sync(path)

    def rename(self, old: Path, new: Path): os.replace(old, new)
    def remove(self, path: Path): os.unlink(path)
    def make_folder(self, path: Path): os.mkdir(path)
    def remove_folder(self, path: Path): os.rmdir(path)
    def free(self, path: Path) -> int: return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Held:
    "What a slot holds."
    digest: str             # of the bundle's manifest
    name: str = ''
    version: int = 0
    campaign: str = ''      # that brought it, or that named it since
    proven: bool = False    # it has passed the health check on this device
    good: bool = False      # it has passed its trial as well


@dataclass(frozen=True)
class Journal:
    "Everything that must outlive a loss of power. Replaced as a whole, never edited."
    active: str = ''        # the slot in use; '' while there is none
    slots: dict = field(default_factory=dict)   # slot -> Held
    trial: bool = False     # the active slot has not passed its trial
    back: str = ''          # the slot to go back to if the trial fails; '' if there is none
    starts: int = 0         # of the agent since the active slot last served for a while: a model that takes the process down counts itself here
    tries: dict = field(default_factory=dict)   # digest -> {'count', 'campaign', 'reason'} of releases that failed here
    serial: int = 0         # of the newest campaigns document acted upon
    root: int = 0           # version of the TUF root that vouched for it
    floor: float = 0.0      # trusted time, seconds since 1970: never earlier than this
    plan: dict | None = None    # the last decision that was verified, for a device that is offline when its window opens

    def held(self, slot: str) -> Held | None: return self.slots.get(slot)
    def other(self) -> str: return 'b' if self.active == 'a' else 'a'
    def serving(self) -> Held | None: return self.slots.get(self.active)
    def with_slot(self, slot: str, held: Held | None) -> 'Journal':
        return replace(self, slots={k: v for k, v in self.slots.items() if k != slot} | ({slot: held} if held else {}))


def read_journal(text: bytes) -> Journal:
    "A journal from its JSON; ValueError, KeyError or TypeError if it is damaged."
    v = json.loads(text)
    if v.pop('edgenb_agent') != 1: raise ValueError('another format')
    if v['active'] and v['active'] not in v['slots']: raise ValueError('an active slot that holds nothing')
    return Journal(**v | {'slots': {s: Held(**h) for s, h in v['slots'].items() if s in SLOTS}})


def told(error: Exception) -> str:
    "An error in words, with what to do where the operating system refused."
    if isinstance(error, OSError) and error.errno in FILE_ADVICE: return f'the disk refused ({error.strerror}): {FILE_ADVICE[error.errno]}'
    return f'{error}' if isinstance(error, EdgenbError) else f'{type(error).__name__}: {error}'


class Store:
    "The agent's folder."
    def __init__(self, root: str | Path, disk: Disk | None = None):
        self.root, self.disk = Path(root).absolute(), disk or Disk()
        self.metadata, self.blobs, self.slots = (self.root/n for n in ('metadata', 'blobs', 'slots'))
        self._lock = None

    # -- folders and whole files
    def open(self) -> 'Store':
        "Make what is missing."
        for folder in (self.root, self.metadata, self.blobs, self.slots):
            if not folder.is_dir():
                if folder == self.root: folder.parent.mkdir(parents=True, exist_ok=True)
                self.disk.make_folder(folder)
                self.disk.sync_folder(folder.parent)
        return self

    def put(self, path: Path, data: bytes | str):
        "Replace a file: after a loss of power it is the old one or the new one."
        temporary = path.with_name(f'.{path.name}.tmp')
        self.disk.write(temporary, data.encode() if isinstance(data, str) else data)
        self.disk.sync(temporary)
        self.disk.rename(temporary, path)
        self.disk.sync_folder(path.parent)

    def lock(self):
        "Hold the folder for this process; the operating system lets go when the process ends. EdgenbError if another one holds it."
        try: self._lock = open(self.root/'lock', 'a+')
        except OSError:
            try: self._lock = open(self.root/'lock')   # the disk is read-only; what was installed serves all the same
            except FileNotFoundError: return   # nor can anybody else work in it
            except OSError as e: raise EdgenbError(f'{self.root}/lock cannot be opened ({e.strerror}): run this as the user who runs the agent') from None
        try: fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0); owner = self._lock.read().strip(); self._lock.close(); self._lock = None
            raise EdgenbError(f'another agent (process {owner or "unknown"}) works in {self.root}: stop it first, or ask it with `edgenb agent poll`') from None
        with contextlib.suppress(OSError):   # a full disk must not keep the agent from serving
            self._lock.truncate(0); self._lock.write(f'{os.getpid()}\n'); self._lock.flush()

    def unlock(self):
        if self._lock: self._lock.close(); self._lock = None

    def owner(self) -> int | None:
        "The process that holds the folder; None if nobody does."
        try: f = open(self.root/'lock')
        except OSError: return None
        with f:
            try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError: return int(f.read().strip() or 0) or None
        return None

    # -- the journal
    def load(self) -> Journal:
        "The journal; where it is missing or damaged, what the slots themselves say."
        try: return read_journal((self.root/'state.json').read_bytes())
        except FileNotFoundError: return Journal() if not any(self.slots.glob('*/manifest.json')) else self.rebuilt()
        except (ValueError, KeyError, TypeError, AttributeError): return self.rebuilt()

    def rebuilt(self) -> Journal:
        "A journal from the slots that pass every check: the one that was written first served longest, and is taken, on trial."
        held = {s: h for s in SLOTS if (h := self.holds(s))}
        first = min(held, key=lambda s: (self.slots/s/'manifest.json').stat().st_mtime, default='')
        return Journal(active=first, slots=held, trial=bool(first))

    def save(self, journal: Journal) -> Journal:
        "Make a journal the one that counts."
        self.put(self.root/'state.json', json_text({'edgenb_agent': 1} | asdict(journal)))
        return journal

    def tell(self, status: dict):
        "Say what the agent does. Not forced to the disk: after a loss of power it is out of date anyway."
        with contextlib.suppress(OSError):
            self.disk.write(self.root/'.status.json.tmp', json_text(status).encode())
            self.disk.rename(self.root/'.status.json.tmp', self.root/'status.json')

    # -- slots
    def slot(self, slot: str) -> Path: return self.slots/slot

    def holds(self, slot: str) -> Held | None:
        "What a slot holds, every file checked; None if that is not a whole bundle."
        from edgenb.ship import check_bundle
        try: m = check_bundle(self.slot(slot))
        except (EdgenbError, OSError): return None
        return Held(m['digest'], str(m.get('name', '')))

    def clear(self, folder: Path):
        "Remove a folder and what is in it, links as links."
        if folder.is_symlink() or folder.is_file(): return self.disk.remove(folder)
        if not folder.is_dir(): return
        for p in sorted(folder.iterdir()): self.clear(p)
        self.disk.remove_folder(folder)

    def seal(self, folder: Path):
        "Force everything below a folder to the disk; refuses what is neither file nor folder."
        for p in sorted(folder.iterdir()):
            kind = p.lstat().st_mode
            if stat.S_ISDIR(kind): self.seal(p)
            elif stat.S_ISREG(kind): self.disk.sync(p)
            else: raise EdgenbError(f'{p} is neither a file nor a folder: refused')
        self.disk.sync_folder(folder)

    def size(self, folder: Path) -> int:
        return sum(p.lstat().st_size for p in folder.rglob('*') if not p.is_dir()) if folder.is_dir() else 0

    # -- blobs
    def blob(self, sha256: str) -> Path: return self.blobs/sha256

    def has(self, sha256: str, length: int) -> bool:
        "A whole blob is here. (Its content was checked when it came, and is again when it is used.)"
        try: return self.blob(sha256).stat().st_size == length
        except OSError: return False

    def part(self, sha256: str) -> Path: return self.blobs/f'{sha256}.part'

    def finish(self, sha256: str):
        "A `.part` becomes a blob, if it is what its name says; else it is removed, and EdgenbError."
        part = self.part(sha256)
        if digest(part) != sha256:
            self.disk.remove(part)
            raise EdgenbError(f'blob {sha256[:12]}… arrived damaged or is not what was signed: it is thrown away')
        self.disk.sync(part)
        self.disk.rename(part, self.blob(sha256))

    def keep_blobs(self, wanted):
        "Remove blobs and parts that nobody needs, and temporary files that a loss of power left."
        keep = {n for sha in wanted for n in (sha, f'{sha}.part')}
        for p in sorted(self.blobs.iterdir()):
            if p.name not in keep: self.disk.remove(p)
        for p in sorted(self.metadata.glob('tmp*')): self.disk.remove(p)

    def drop_damaged(self, wanted) -> int:
        "Remove blobs whose content is no longer what their name says; how many."
        bad = [sha for sha in wanted if self.blob(sha).is_file() and digest(self.blob(sha)) != sha]
        for sha in bad: self.disk.remove(self.blob(sha))
        return len(bad)

    def room(self, need: int,        # bytes that will be written
             limit: int | None,      # bytes that all of the agent's folder may take
             reserve: int            # bytes that must stay free on the disk
            ):
        "Refuse what does not fit, before anything is fetched. What the inactive slot holds makes room."
        journal = self.load()
        inactive = self.size(self.slot(journal.other()))
        free, used = self.disk.free(self.root) + inactive, self.size(self.root) - inactive
        mb = lambda n: f'{n/1e6:,.1f} MB'
        if need + reserve > free: raise EdgenbError(f'the update needs {mb(need)} and {mb(reserve)} must stay free, the disk has {mb(free)}: free some space')
        if limit is not None and used + need > limit: raise EdgenbError(f'the update needs {mb(need)}, the agent may use {mb(limit)} and uses {mb(used)} besides: raise the limit (`limit_mb` in device.json)')


# -- who this device is
@dataclass(frozen=True)
class Device:
    "device.json: written when the device is enrolled."
    id: str
    site: str
    hardware: str
    repository: str             # address, or folder
    model: str = ''             # name of the model it runs; '' where campaigns name one only
    connect: list = field(default_factory=list)   # windows in which it may use the network; [] = any time
    poll_s: int = 900           # between two looks at the repository
    trial_s: int = 600          # how long a new model serves on trial
    tries: int = 3              # a release that failed this often is not tried again
    limit_mb: int | None = None     # that all of the agent's folder may take
    reserve_mb: int = 64        # that stay free on the disk
    memory_mb: int = 0          # that the health check may take; 0: what the bundle's budget says
    port: int = 8770            # of the inference API, on the loopback only

    @property
    def stratum(self) -> str: return f'{self.site}/{self.hardware}'


def checked_device(d: Device, path: Path) -> Device:
    "Refuse what a hand has mistyped, before it stops an agent in the field."
    for name, low in dict(poll_s=1, trial_s=0, tries=1, limit_mb=0, reserve_mb=0, memory_mb=0, port=0).items():
        v = getattr(d, name)
        if not (v is None and name == 'limit_mb') and (isinstance(v, bool) or not isinstance(v, (int, float)) or not low <= v < 2**31): raise EdgenbError(f'{path}: {name} = {v!r} must be a number, {low} or more')
    for name in ('id', 'site', 'hardware', 'repository', 'model'):
        if not isinstance(getattr(d, name), str): raise EdgenbError(f'{path}: {name} = {getattr(d, name)!r} must be text')
    try:
        for w in d.connect: days_of(w['days']), minute_of(w['from']), minute_of(w['to'])
    except (KeyError, TypeError): raise EdgenbError(f"{path}: connect must be a list of windows such as {{'days': 'mon-fri', 'from': '08:00', 'to': '18:00'}}") from None
    return d


def load_device(root: Path) -> Device:
    "device.json, checked."
    path = Path(root)/'device.json'
    try: values = json.loads(path.read_text(encoding='utf-8'))
    except PermissionError: raise EdgenbError(f'{path} may not be read: run this as the user who runs the agent') from None
    except FileNotFoundError: raise EdgenbError(f'{root} is not enrolled: edgenb agent enrol --help says how') from None
    except ValueError: raise EdgenbError(f'{path} is damaged: enrol the device again') from None
    try: return checked_device(Device(**{k: v for k, v in values.items() if k != 'edgenb_device'}), path)
    except TypeError as e: raise EdgenbError(f'{path}: {str(e).split(") ", 1)[-1].split("() ", 1)[-1]}; enrol the device again') from None
