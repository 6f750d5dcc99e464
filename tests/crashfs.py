"""What a disk may hold after a loss of power: records every operation on a folder and enumerates the states that a POSIX file system allows afterwards.

The model is the pessimistic one: content that was not forced to the disk may be lost, torn, zeros or kept, file by file; entries of a folder that was not
forced may be lost or kept, one by one, in any combination (a rename within a folder is one entry operation, as every journalling file system makes it).
`Recorder` sees the operations at Python's own calls (`os.open`, `open`, `os.fsync`, `os.replace`, ...), so nothing that the code under test does bypasses it.
"""
import builtins, io, itertools, os, random
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Node:
    kind: str                    # 'folder', 'file' or a link's target as 'link:…'
    content: bytes = b''         # as last seen by the recorder


@dataclass
class Log:
    "Operations in order, after a state that was wholly on the disk."
    nodes: dict = field(default_factory=dict)      # number -> Node
    start: dict = field(default_factory=dict)      # folder number -> {name: number}
    content: dict = field(default_factory=dict)    # file number -> bytes, at the start
    ops: list = field(default_factory=list)        # ('entry', group, [(folder, name, number or None)]), ('data', file, bytes), ('sync', number)
    root: int = 0


class Recorder:
    "Records what happens below a folder while it is entered."
    def __init__(self, root: Path, deaf_to: str = ''):   # 'file' or 'folder': a sync of such a thing goes unheard, as if the code had left it out
        self.root, self.deaf_to, self.log, self.at, self.dirty = str(Path(root).absolute()), deaf_to, Log(), {}, {}
        self._scan(self.root)

    def _number(self, kind, content=b''):
        n = len(self.log.nodes)
        self.log.nodes[n] = Node(kind, content)
        return n

    def _scan(self, path):
        if os.path.islink(path): n = self._number('link:' + os.readlink(path))
        elif os.path.isdir(path):
            n = self._number('folder'); self.log.start[n] = {}
            for name in sorted(os.listdir(path)): self.log.start[n][name] = self._scan(f'{path}/{name}')
        else:
            with open(path, 'rb') as f: data = f.read()
            n = self._number('file', data); self.log.content[n] = data
        self.at[path] = n
        return n

    # -- seen by every operation
    def mine(self, path): return isinstance(path, (str, os.PathLike)) and (str(path) == self.root or str(path).startswith(self.root + '/'))

    def entry(self, *changes):   # (path, number or None)
        self.log.ops.append(('entry', [(self.at[os.path.dirname(p)], os.path.basename(p), n) for p, n in changes]))

    def catch_up(self):
        "What was written since the last operation, file by file."
        for n, path in list(self.dirty.items()):
            try:
                with self.real['open'](path, 'rb') as f: data = f.read()
            except OSError: continue
            if self.at.get(path) != n: continue
            if data != self.log.nodes[n].content:
                self.log.nodes[n].content = data
                self.log.ops.append(('data', n, data))

    def opened(self, path):
        path = str(path)
        if path not in self.at:
            self.catch_up()
            n = self._number('file'); self.log.content[n] = b''
            self.entry((path, n)); self.at[path] = n
        self.dirty[self.at[path]] = path

    def synced(self, fd):
        path = os.readlink(f'/proc/self/fd/{fd}').removesuffix(' (deleted)')
        if not self.mine(path) or path not in self.at: return
        self.catch_up()
        n = self.at[path]
        if self.log.nodes[n].kind.split(':')[0] != self.deaf_to: self.log.ops.append(('sync', n))

    def renamed(self, old, new):
        old, new = str(old), str(new)
        n = self.at.pop(old)
        self.dirty.pop(self.at.get(new), None)   # what was there before has no name any more
        self.log.ops.append(('entry', [(self.at[os.path.dirname(old)], os.path.basename(old), None), (self.at[os.path.dirname(new)], os.path.basename(new), n)]))
        self.at[new] = n
        if n in self.dirty: self.dirty[n] = new

    def removed(self, path):
        path = str(path)
        self.entry((path, None))
        n = self.at.pop(path); self.dirty.pop(n, None)

    def made(self, path, kind='folder'):
        path = str(path)
        n = self._number(kind)
        if kind == 'folder': self.log.start[n] = {}
        self.entry((path, n)); self.at[path] = n

    # -- the calls
    def __enter__(self):
        self.real = real = {'open': builtins.open, 'os.open': os.open, 'fsync': os.fsync, 'replace': os.replace, 'rename': os.rename, 'unlink': os.unlink, 'remove': os.remove, 'mkdir': os.mkdir, 'rmdir': os.rmdir, 'symlink': os.symlink}
        def open_(file, mode='r', *a, **kw):
            f = real['open'](file, mode, *a, **kw)
            if self.mine(file) and set(mode) & set('wax+'): self.opened(file)
            return f
        def os_open(path, flags, *a, **kw):
            fd = real['os.open'](path, flags, *a, **kw)
            if self.mine(path) and flags & (os.O_WRONLY | os.O_RDWR): self.opened(path)
            return fd
        def fsync(fd): real['fsync'](fd); self.synced(fd if isinstance(fd, int) else fd.fileno())
        def after(name, tell):
            def call(*a, **kw):
                self.catch_up()
                real[name](*a, **kw)
                if self.mine(a[-1] if name in ('replace', 'rename', 'symlink') else a[0]): tell(*a)
            return call
        builtins.open = io.open = open_
        os.open, os.fsync = os_open, fsync
        os.replace = os.rename = after('replace', self.renamed)
        os.unlink = os.remove = after('unlink', self.removed)
        os.rmdir, os.mkdir = after('rmdir', self.removed), after('mkdir', lambda p, *m: self.made(p))
        os.symlink = after('symlink', lambda target, p: self.made(p, f'link:{target}'))
        return self

    def __exit__(self, *a):
        builtins.open = io.open = self.real['open']
        for k in ('fsync', 'replace', 'rename', 'unlink', 'remove', 'mkdir', 'rmdir', 'symlink'): setattr(os, k, self.real[k])
        os.open = self.real['os.open']
        self.catch_up()


DATA = ('lost', 'torn', 'zeros', 'kept')


def pending(log: Log, k: int):   # ({folder: {name: number}} on the disk, [entry ops that are not], {file: bytes} on the disk, {file: bytes not})
    "What is certain after the first `k` operations, and what is not."
    waiting, on_disk, unsynced = [], dict(log.content), {}
    folders = {n: dict(e) for n, e in log.start.items()}
    for op in log.ops[:k]:
        if op[0] == 'entry': waiting.append(op[1])
        elif op[0] == 'data': unsynced[op[1]] = op[2]
        elif op[1] in folders:
            rest = []
            for group in waiting:
                if any(folder == op[1] for folder, _, _ in group): apply(folders, group)
                else: rest.append(group)
            waiting = rest
        elif op[1] in unsynced: on_disk[op[1]] = unsynced.pop(op[1])
    return folders, waiting, on_disk, unsynced


def apply(folders, group):
    for folder, name, n in group:
        if n is None: folders[folder].pop(name, None)
        else: folders[folder][name] = n


def torn(old: bytes, new: bytes, how: str) -> bytes:
    if how == 'kept': return new
    if how == 'lost': return old
    if how == 'zeros': return bytes(len(new))
    return new[:len(new)//2] + old[len(new)//2:len(new)] if len(old) >= len(new) else new[:len(new)//2]


def states(log: Log, rng: random.Random, most: int = 24):   # of (k, {path: bytes, None for a folder, or 'link:…'})
    "Disks that a crash after each operation may leave; at most so many after one."
    for k in range(len(log.ops) + 1):
        folders, waiting, on_disk, unsynced = pending(log, k)
        n = len(waiting)
        if n <= 4: kept = [[bool(m >> i & 1) for i in range(n)] for m in range(1 << n)]
        else: kept = [[i < m for i in range(n)] for m in range(n + 1)] + [[i != m for i in range(n)] for m in range(n)] + [[rng.random() < 0.5 for _ in range(n)] for _ in range(n)]
        how = [dict.fromkeys(unsynced, h) for h in (DATA if unsynced else DATA[:1])] + ([{f: rng.choice(DATA) for f in unsynced} for _ in range(2)] if len(unsynced) > 1 else [])
        every = list(itertools.product(kept, how))
        ends = [(kept[0], how[0]), (kept[-1], how[-1])]
        for keep, data in (every if len(every) <= most else ends + rng.sample(every, most - 2)):
            made = {f: dict(e) for f, e in folders.items()}
            for group, yes in zip(waiting, keep):
                if yes: apply(made, group)
            content = on_disk | {f: torn(on_disk.get(f, b''), new, data[f]) for f, new in unsynced.items()}
            yield k, tree(log, made, content, log.root, '')


def tree(log, folders, content, number, path):
    found = {}
    for name, n in sorted(folders[number].items()):
        here, kind = f'{path}/{name}'.lstrip('/'), log.nodes[n].kind
        if kind == 'folder': found[here] = None; found |= tree(log, folders, content, n, here)
        elif kind == 'file': found[here] = content.get(n, b'')
        else: found[here] = kind
    return found


def lay_out(state: dict, root: Path):
    "Make a folder that looks like this."
    os.makedirs(root)
    for path, content in state.items():
        if content is None: os.mkdir(f'{root}/{path}')
        elif isinstance(content, str): os.symlink(content[5:], f'{root}/{path}')
        else:
            with open(f'{root}/{path}', 'wb') as f: f.write(content)
