"Forked children, injected faults and a small package of rooms, for test_core."
import builtins, errno, importlib, io, json, os, signal, sys, traceback
from dataclasses import dataclass
from pathlib import Path
from edgenb.core import EdgenbError, Run, room

TOY = {'__init__': '',
       'deep': 'def offset(): return {deep}\n',
       'helper': 'from .deep import offset\nSTEP = {step}\ndef add(n): return n + STEP + offset()\n',
       'lazy': 'def scale(n, by={scale}): return n*by\n',
       'unrelated': 'def nothing(): return {unrelated}\n',
       'rooms': '''"{words}"
import json, os
from edgenb.core import room, write_json
from .helper import add
# {words}
def done(name): os.write(int(os.environ['TALLY']), (name + '\\n').encode())

@room(1)
def first(run, upto=3, swap=False):
    "Left and right. {words}"
    left, right = [add(n) for n in range(upto)], [add(-n) for n in range(upto)]
    run.new('left/n.json').write_text(json.dumps(right if swap else left))
    run.new('right/n.json').write_text(json.dumps(left if swap else right))
    done('first')
    return {{'n': upto}}

@room(2, needs=('first',))
def second(run, times=2):
    from . import lazy
    for side in ('left', 'right'):   # {words}
        saved = run.work/f'{{side}}.json'
        if not saved.exists():
            write_json(saved, [lazy.scale(n)*times for n in json.loads(run.file('first', f'{{side}}/n.json').read_text())])
    run.new('both.json').write_text(json.dumps([json.loads((run.work/f'{{side}}.json').read_text()) for side in ('left', 'right')]))
    done('second')
    return {{'sums': [sum(json.loads((run.work/f'{{side}}.json').read_text())) for side in ('left', 'right')]}}

@room(3, needs=('second',))
def third(run, word='a'):
    left, right = json.loads(run.file('second', 'both.json').read_text())
    run.new('word.txt').write_text(word*len(left) + str(left[-1] - right[-1]))
    done('third')
    return {{}}

@room(4, needs=('third', 'first'))
def fourth(run):
    text = run.file('third', 'word.txt').read_text() + ''.join(run.file('first', f'{{s}}/n.json').read_text() for s in ('left', 'right'))
    run.new('all.txt').write_text(text)
    done('fourth')
    return {{'size': len(text)}}
'''}
VALUES = dict(deep=0, step=1, scale=2, unrelated=0, words='words')

def write_toy(folder: Path, **values):
    "The four-room chain as package `toy` in `folder`."
    write_package(folder, {n: text.format(**VALUES | values) for n, text in TOY.items()})

def write_package(folder: Path, modules: dict):
    (folder/'toy').mkdir(parents=True, exist_ok=True)
    for name, text in modules.items(): (folder/'toy'/f'{name}.py').write_text(text)

@room(1)
def note(run, text='hello'):
    "A room that is importable by any user."
    run.new('note.txt').write_text(text)
    return {}

@dataclass(frozen=True)
class Fault:
    "What befalls a child at its n-th write operation."
    kind: str              # 'kill' before it, 'cut' a write in the middle and kill, or the errno it fails with ('ENOSPC', 'EROFS')
    at: int                # 1 is the first
    lasting: bool = False  # an error that stays

def _die(): os.kill(os.getpid(), signal.SIGKILL)

def arm(fault: Fault):
    "Count this process's operations that change a file system, and strike at the n-th. fsync is counted, not done."
    seen, real_open = 0, io.open
    def strike(what, path=None):
        nonlocal seen
        if fault.kind == 'cut' and what != 'write': return False
        if fault.kind == 'ENOSPC' and what in ('unlink', 'rmdir'): return False
        seen += 1
        if seen < fault.at or (seen > fault.at and not fault.lasting): return False
        if fault.kind == 'kill': _die()
        if fault.kind != 'cut': raise OSError(number := getattr(errno, fault.kind), os.strerror(number), path)
        return True

    class Written:
        def __init__(self, f): self.f = f
        def __getattr__(self, name): return getattr(self.f, name)
        def __enter__(self): return self
        def __exit__(self, *_): self.f.close()
        def write(self, data):
            if strike('write'): self.f.write(data[:len(data)//2]); self.f.flush(); _die()
            return self.f.write(data)

    def counted(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            if name != 'open' or fault.kind == 'kill' or args[1] & os.O_CREAT: strike(name, args[0])
            return None if name == 'fsync' else real(*args, **kwargs)
        return call
    def open(file, mode='r', *args, **kwargs):
        if not set('wax+') & set(mode): return real_open(file, mode, *args, **kwargs)
        strike('open', file)
        return Written(real_open(file, mode, *args, **kwargs))
    for name in ('replace', 'fsync', 'link', 'mkdir', 'unlink', 'rmdir', 'open'): setattr(os, name, counted(name))
    builtins.open = io.open = open

@dataclass(frozen=True)
class Ended:
    "What a child said, and how it ended."
    said: list           # what it reported, in order
    signal: int          # 0, or the signal that killed it
    pid: int
    @property
    def last(self): return self.said[-1]

class Child:
    "A forked process that calls `work(report)`; an error ends it and is reported as {'refused': ...} or {'crashed': ...}."
    def __init__(self, work):
        self.read, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        os.close(self.read)
        send = lambda value, real=os.write: real(write, json.dumps(value).encode() + b'\n')
        try:
            sys.stdout = io.open(os.devnull, 'w')
            sys.dont_write_bytecode = True
            work(send)
        except EdgenbError as e: send({'refused': str(e)})
        except BaseException: send({'crashed': traceback.format_exc()})
        finally: os._exit(0)

    def end(self) -> Ended:
        with open(self.read, 'rb') as f: said = [json.loads(line) for line in f.read().split(b'\n') if line]
        return Ended(said, os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(self.pid, 0)[1]) else 0, self.pid)

def toy_rooms(folder: Path, tally: Path | None = None):
    "The package's rooms, freshly imported (for use in a child); each room that is computed adds a line to `tally`."
    os.environ['TALLY'] = str(os.open(tally or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module('toy.rooms')

def seen(run, card) -> dict:
    "What a caller can see of a room, its files read through `run.file`."
    files = sorted(p.split('/', 1)[1] for p in card.wrote)
    return {'skipped': card.skipped, 'result': card.result, 'asked': card.asked, 'read': card.read, 'key': card.key,
            'files': {f: run.file(card.room, f).read_text() for f in files}}

def enter(folder: Path,               # holds the package
          *entries,                   # (run's folder, room's name, choices)
          fault: Fault | None = None, # what befalls the child
          tally: Path | None = None,  # counts what is computed
          before=None                 # called in the child first
         ) -> Ended:
    "Enter rooms one after the other in a fresh process."
    def work(report):
        rooms = toy_rooms(folder, tally)
        if before: before()
        if fault: arm(fault)
        for path, name, choices in entries:
            run = Run(path)
            report(seen(run, getattr(rooms, name)(run, **choices)))
    return Child(work).end()
