"""Make the environment in .venv/ and do something with it: `python3 bootstrap.py wafer` or `python3 bootstrap.py test`.

Needs Python 3.11 or newer and nothing else. Safe to interrupt and to run again: what is installed is kept, and a second run starts at once.
"""
import hashlib, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT/'.venv'
MARK = VENV/'.made-by-edgenb'
BIN = VENV/('Scripts' if os.name == 'nt' else 'bin')
JOBS = {'env': ('lab,dev,runtimes,text', None), 'wafer': ('lab', ['edgenb', 'run', 'wafer']), 'test': ('lab,dev,runtimes,text', ['python', '-m', 'pytest']), 'docs': ('lab,dev,runtimes,text', ['python', 'docs/book.py'])}


def stop(message): sys.exit(f'edgenb: {message}')


def call(*command, **kw):
    try: done = subprocess.run([str(c) for c in command], cwd=ROOT, **kw).returncode
    except KeyboardInterrupt: stop('interrupted; what is installed is kept, run the same command again')
    if done: stop(f"'{' '.join(Path(str(c)).name for c in command[:4])} ...' failed with exit code {done}; its message is above")


def installed(extras):
    "The stamp that says this exact set is installed."
    what = [(ROOT/f).read_bytes() for f in ('pyproject.toml', 'constraints.txt')] + [sys.version.encode(), extras.encode(), str(ROOT).encode()]
    return VENV/f".installed-{extras.replace(',', '-')}", hashlib.sha256(b'\0'.join(what)).hexdigest()


def environment(extras):
    "Create .venv/ and install edgenb with `extras` into it, unless that has been done."
    done = [installed(e) for e in ('lab,dev,runtimes,text', extras)]   # the larger set holds the smaller
    if any(stamp.exists() and stamp.read_text() == key for stamp, key in done): return
    stamp, key = installed(extras)
    healthy = (BIN/'python').exists() and not subprocess.run([str(BIN/'python'), '-m', 'pip', '--version'], capture_output=True).returncode
    if VENV.exists() and not healthy and not MARK.exists(): stop('.venv exists, has no pip and was not made by this script: move it away, then run the same command again')
    if not healthy:
        print('edgenb: creating .venv', flush=True)
        try: import ensurepip, venv  # noqa: F401
        except ImportError: stop('this Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv')
        VENV.mkdir(exist_ok=True); MARK.touch()
        call(sys.executable, '-m', 'venv', '--clear', VENV); MARK.touch()
    print(f'edgenb: installing edgenb[{extras}] into .venv (once; some minutes)', flush=True)
    call(BIN/'python', '-m', 'pip', 'install', '--disable-pip-version-check', '-c', ROOT/'constraints.txt', '-e', f'{ROOT}[{extras}]')
    if 'dev' in extras and (ROOT/'.git').exists() and (BIN/'nbdev-install-hooks').exists(): call(BIN/'nbdev-install-hooks', stdout=subprocess.DEVNULL)
    stamp.write_text(key)


def main(job='', *more):
    if sys.version_info < (3, 11): stop(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try PYTHON=python3.12 make {job or 'wafer'}")
    if job not in JOBS: stop(f"what shall be done? one of: {', '.join(JOBS)}")
    extras, command = JOBS[job]
    environment(extras)
    if not command: return
    os.environ['PATH'] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ['VIRTUAL_ENV'] = str(VENV)
    try: sys.exit(subprocess.run([str(BIN/command[0]), *command[1:], *more], cwd=ROOT).returncode)
    except KeyboardInterrupt: sys.exit(130)


if __name__ == '__main__': main(*sys.argv[1:])
