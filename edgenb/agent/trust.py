"""What the agent believes: TUF metadata, verified by python-tuf, over HTTP or from a folder; and what time it is. Written by hand, not exported.

python-tuf decides what is signed by whom, in which version, until when (https://theupdateframework.github.io/specification/latest/, section 5). It
does not touch a model: blobs are fetched here, by the length and SHA-256 that a signed release names, so that a fetch can be resumed and bounded.
"""
import datetime, json, os, posixpath, re, stat, time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote
import urllib3
from tuf.api import exceptions as tuf_errors
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig
from edgenb.core import EdgenbError
from .storage import Store, told

CAMPAIGNS = 'campaigns/campaigns.json'
DOCUMENT_MAX = 32_000_000    # bytes of a release or of the campaigns: a release of 40 GB has 12 MB
PIECE = 1 << 16


class Refused(EdgenbError):
    "The repository said something that is not vouched for: a bad signature, an old version, metadata that has expired."


class Unreachable(EdgenbError):
    "The repository cannot be read now."


class OutOfTime(EdgenbError):
    "A state of the agent's machine has used up its time."


@dataclass
class Deadline:
    "When a state must be over, and whether the agent was asked to stop."
    seconds: float
    stopped: object = None        # callable -> bool
    clock: object = time.monotonic
    def __post_init__(self): self.end = self.clock() + self.seconds
    def left(self) -> float: return self.end - self.clock()
    def check(self):
        if self.stopped and self.stopped(): raise OutOfTime('the agent was asked to stop')
        if self.left() <= 0: raise OutOfTime(f'it took longer than {self.seconds:g} s')


# -- time
def now_trusted(floor: float,       # trusted time so far, seconds since 1970
                clock: float        # what the device's clock says
               ) -> float:
    "The time by which expiry is judged: the clock, but never earlier than what was proven before. A dead battery does not revive old metadata."
    return max(floor, clock)


def seconds_of(time_text) -> float:
    "Seconds since 1970 from `2026-12-01T00:00:00Z`; 0 where it is not such a time."
    try: return datetime.datetime.fromisoformat(str(time_text).replace('Z', '+00:00')).astimezone(datetime.timezone.utc).timestamp()
    except (ValueError, OverflowError): return 0.0


# -- where a repository lies
class Source(FetcherInterface):
    "A repository that can be read: its address, and the two ways of reading from it."
    base: str
    deadline: Deadline | None = None
    last = ''        # what python-tuf asked for last: its errors do not name the file

    def url(self, path: str) -> str: return f'{self.base}/{path}'

    def _check(self):
        if self.deadline: self.deadline.check()

    def blob(self, sha256: str, offset: int):   # -> (offset at which the answer begins, iterator of bytes)
        "A content-addressed blob, from `offset` on where the source can do that."
        return self.pieces(self.url(f'blobs/{sha256[:2]}/{sha256}'), offset)

    def _fetch(self, url): self.last = url; return self.pieces(url, 0)[1]


class FolderSource(Source):
    "A repository in a folder: a USB stick, a mounted share."
    def __init__(self, folder: str | Path): self.base = str(Path(folder).absolute())

    def pieces(self, url, offset):
        path = posixpath.normpath(self.base + unquote(url.removeprefix(self.base)))   # the folder's own name may hold a %
        if not path.startswith(self.base + '/'): raise tuf_errors.DownloadHTTPError(f'{path} lies outside {self.base}', 404)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)   # a pipe must not hold the agent up
            if not stat.S_ISREG(os.fstat(fd).st_mode): os.close(fd); raise FileNotFoundError
            if not os.path.realpath(path).startswith(os.path.realpath(self.base) + os.sep): os.close(fd); raise FileNotFoundError   # a link out of the stick
        except FileNotFoundError:
            if not os.path.isdir(self.base): raise Unreachable(f'{self.base} is not there: is the stick plugged in and mounted?') from None
            raise tuf_errors.DownloadHTTPError(f'{path} is not there', 404) from None
        except OSError as e: raise Unreachable(f'{path} cannot be read: {e.strerror}') from None
        return offset, self._read(fd, offset)

    def _read(self, fd, offset):
        with os.fdopen(fd, 'rb') as f:
            f.seek(offset)
            while piece := f.read(PIECE):
                self._check()
                yield piece


@dataclass
class Patience:
    "How long the agent waits for a server (TUF: slow retrieval attack)."
    connect_s: float = 10
    silence_s: float = 20        # without a byte
    window_s: float = 30         # over which the rate is judged
    bytes_per_s: float = 256     # below that it is not worth waiting
    total_s: float = 120         # for one piece of metadata


class HttpSource(Source):
    "A repository on a web server or an object store that serves files. Redirects are not followed; the system's certificates count."
    def __init__(self, address: str, patience: Patience | None = None):
        self.base, self.patience = address.rstrip('/'), patience or Patience()
        proxies = {k: v for k in ('http', 'https') if (v := os.environ.get(f'{k}_proxy') or os.environ.get(f'{k.upper()}_PROXY'))}
        proxy = proxies.get(self.base.split(':')[0])
        common = dict(retries=False, num_pools=2, headers={'User-Agent': 'edgenb-agent', 'Accept-Encoding': 'identity'})
        self.http = urllib3.ProxyManager(proxy, **common) if proxy and not self._direct() else urllib3.PoolManager(**common)

    def _direct(self) -> bool:
        from urllib.request import proxy_bypass_environment
        return bool(proxy_bypass_environment(urllib3.util.parse_url(self.base).host or ''))

    def pieces(self, url, offset):
        p, headers = self.patience, dict(self.http.headers) | ({'Range': f'bytes={offset}-'} if offset else {})
        silence = min(p.silence_s, max(0.1, self.deadline.left())) if self.deadline else p.silence_s
        try: answer = self.http.request('GET', url, headers=headers, preload_content=False, redirect=False, timeout=urllib3.Timeout(connect=p.connect_s, read=silence))
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as e: raise Unreachable(f'{url} cannot be reached: {_plain(e)}') from None
        if answer.status not in (200, 206):
            answer.close()
            raise tuf_errors.DownloadHTTPError(f'{url}: the server answered {answer.status}', answer.status)
        begins = offset if answer.status == 206 and answer.headers.get('Content-Range', '').startswith(f'bytes {offset}-') else 0
        if answer.status == 206 and begins != offset: answer.close(); raise Unreachable(f'{url}: the server answered with another part than asked for')
        return begins, self._stream(answer, url)

    def _stream(self, answer, url):
        p, t = self.patience, time.monotonic
        start = mark = t(); got = marked = 0
        try:
            while piece := answer.read1(PIECE, decode_content=False):
                got += len(piece)
                now = t()
                if now - mark >= p.window_s:
                    if (got - marked)/(now - mark) < p.bytes_per_s: raise tuf_errors.SlowRetrievalError(f'{url} comes at less than {p.bytes_per_s:g} bytes a second')
                    mark, marked = now, got
                if self.deadline is None and now - start > p.total_s: raise tuf_errors.SlowRetrievalError(f'{url} took longer than {p.total_s:g} s')
                self._check()
                yield piece
            wanted = answer.headers.get('Content-Length', '')
            if wanted.isdigit() and got < int(wanted): raise Unreachable(f'{url}: the connection broke off after {got} of {wanted} bytes')
        except (urllib3.exceptions.HTTPError, OSError) as e: raise Unreachable(f'{url}: the connection broke off ({_plain(e)})') from None
        finally: answer.close()


def _plain(e) -> str:
    "A network error without what urllib3 puts around it: objects, addresses, numbers."
    text = re.sub(r'<[^>]*>[,:]? ?|\(?object at 0x[0-9a-f]+\)?|HTTPS?Connection(Pool)?\([^)]*\): ?|Failed to establish a new connection: ?|\[Errno -?\d+\] ?', '', str(getattr(e, 'reason', None) or e)).strip(' :')
    return text[:1].lower() + text[1:] if re.match('[A-Z][a-z]', text) else text or type(e).__name__


def in_words(e, file: str) -> str:
    "What python-tuf refuses, for people; `file` is what was read last."
    text, file = str(e), file or 'root.json of this device'
    if isinstance(e, tuf_errors.LengthOrHashMismatchError): return f'{file} is damaged or is not what was signed: copy the repository there again'
    if isinstance(e, DeserializationError): return f'{file} is damaged: it is not signed metadata; copy the repository there again'
    if m := re.fullmatch(r'New (\w+) version (?:(\d+) )?must be >= (\d+)(?:, got version (\d+))?', text):
        return f'it is older than what this device has read before ({m[1]} version {m[2] or m[4]}; version {m[3]} is known): take a newer stick, or have the repository refreshed'
    if isinstance(e, tuf_errors.UnsignedMetadataError) and text.startswith('timestamp was signed by 0/'): return f'{text}: a stick that waits for its signature (edgenb keys sign), or a repository of other keys'
    return text


def source_of(repository: str) -> Source:
    "A repository by its address or folder."
    if re.match(r'https?://', repository): return HttpSource(repository)
    if re.match(r'[a-z]+://', repository): raise EdgenbError(f'{repository}: a repository is an http(s) address or a folder')
    return FolderSource(repository)


# -- metadata
class _Updater(Updater):
    """python-tuf's client, which verifies; what it keeps is written so that it outlives a loss of power, and only if it changed.
    (`_persist_file`, `_update_root_symlink` and `_trusted_set.reference_time` are not its public interface: tests/test_fleet_attacks.py pins what is used.)"""
    def __init__(self, store: Store, now: float, source: Source, root: bytes):
        self._store = store
        super().__init__(str(store.metadata), source.url('metadata/'), fetcher=source, config=UpdaterConfig(), bootstrap=root)
        self._trusted_set.reference_time = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)

    def _persist_file(self, filename, data):
        path = Path(filename)
        try: same = path.read_bytes() == data
        except OSError: same = False
        if not same: self._store.put(path, data)

    def _update_root_symlink(self): pass   # the pinned root.json is the anchor, every time


@dataclass
class View:
    "A repository at one moment, verified."
    updater: Updater
    source: Source
    campaigns: dict
    issued: float         # when the campaigns were signed
    expires: float        # when the first of the roles that vouch for them does
    root: int             # version of the root

    def release(self, digest: str) -> dict:
        "The release of a bundle, checked for shape."
        return checked_release(_document(self.updater, self.source, f'releases/{digest}.json'), digest)


def look(store: Store, source: Source, root: bytes, now: float) -> View:
    "Refresh the metadata and read the campaigns. `Refused` if they are not vouched for, `Unreachable` if they cannot be had."
    try:
        (store.metadata/'root_history').is_dir() or store.disk.make_folder(store.metadata/'root_history')
        updater = _Updater(store, now, source, root)
        updater.refresh()
        document = _document(updater, source, CAMPAIGNS)
        trusted = updater._trusted_set
        expires = min(trusted[r].expires for r in ('root', 'timestamp', 'snapshot', 'targets', 'campaign') if trusted.get(r))
        return View(updater, source, document, seconds_of(document.get('issued')), expires.timestamp(), trusted.root.version)
    except tuf_errors.RepositoryError as e: raise Refused(f'{source.base} is refused: {in_words(e, source.last)}' + (f' (the time here is {datetime.datetime.fromtimestamp(now, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC)' if isinstance(e, tuf_errors.ExpiredMetadataError) else '')) from None
    except tuf_errors.DownloadError as e:
        if isinstance(e.__cause__, EdgenbError): raise e.__cause__ from None
        kind = Unreachable if isinstance(e, (tuf_errors.DownloadHTTPError, tuf_errors.SlowRetrievalError)) else Refused
        raise kind(f'{source.base}: {e}') from None


def _document(updater, source, target: str) -> dict:
    "A small JSON target, verified by length and hash."
    try:
        info = updater.get_targetinfo(target)
        if info is None: raise Refused(f'{source.base} has no {target} that is vouched for')
        if info.length > DOCUMENT_MAX: raise Refused(f'{source.base}: {target} would have {info.length:,} bytes, at most {DOCUMENT_MAX:,} are taken')
        folder, name = posixpath.split(target)
        data = source.download_bytes(source.url(f'targets/{folder}/{next(iter(info.hashes.values()))}.{name}'), info.length)
        info.verify_length_and_hashes(data)
    except tuf_errors.RepositoryError as e: raise Refused(f'{source.base} is refused: {in_words(e, source.last)}') from None
    except tuf_errors.DownloadError as e:
        if isinstance(e.__cause__, EdgenbError): raise e.__cause__ from None
        raise Unreachable(f'{source.base}: {e}') from None
    try: value = json.loads(data)
    except (ValueError, RecursionError): raise Refused(f'{source.base}: {target} is not JSON') from None
    if not isinstance(value, dict): raise Refused(f'{source.base}: {target} is not a JSON object')
    return value


def checked_release(doc: dict, digest: str) -> dict:
    "A release that describes the bundle which was asked for. (`edgenb.fleet.delta.plan` checks every file, path and length: what is signed is trusted to be a model, not to be harmless.)"
    def bad(why): return Refused(f'release {digest[:12]}…: {why}')
    if doc.get('edgenb_release') != 1: raise bad('is of a format that this agent does not know: install a newer edgenb')
    if doc.get('bundle') != digest: raise bad('describes another bundle')
    if not (isinstance(doc.get('name'), str) and isinstance(doc.get('version'), int) and isinstance(doc.get('files'), list)): raise bad('lacks a field')
    if not any(isinstance(f, dict) and f.get('path') == 'manifest.json' for f in doc['files']): raise bad('has no manifest.json')
    return doc
