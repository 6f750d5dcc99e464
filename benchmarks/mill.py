"""Runs of many notebooks against papermill, in one go. `python benchmarks/mill.py trivial | sweep | resume | typo | dask [--help]`"""
import argparse, collections, json, os, random, resource, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
KERNEL = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python 3'}}
ENV = os.environ | {'PYTHONPATH': str(ROOT)}


def notebook(path, *cells, choices="output_dir: str = ''\nn: int = 0"):
    tagged = nbformat.v4.new_code_cell(choices, metadata={'tags': ['parameters']})
    nbformat.write(nbformat.v4.new_notebook(cells=[tagged, *map(nbformat.v4.new_code_cell, cells)], metadata=KERNEL), path)
    return path


def workspace(folder):
    (folder/'settings.ini').write_text((ROOT/'settings.ini').read_text())
    return folder


def timed(*command, cwd, check=True, **kw):
    t = time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=ENV, capture_output=True, text=True, **kw)
    if check and done.returncode: sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - t, done


def cpu():
    "Seconds of the processor that ended children and theirs have used; forked kernels among them, since whoever forked them waited for them."
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime


def load(): return ' '.join(f'{x:.1f}' for x in os.getloadavg())


def trivial(args):
    "Trivial notebooks: papermill one after the other, `edgenb sweep` with forked kernels; rounds in turn."
    with tempfile.TemporaryDirectory() as folder:
        folder = workspace(Path(folder))
        book, rounds, used = notebook(folder/'trivial.ipynb', 'print(n)'), collections.defaultdict(list), collections.defaultdict(list)
        def add(way, seconds, before): rounds[way].append(seconds); used[way].append(cpu() - before)
        points = ','.join(map(str, range(args.n)))
        for _ in range(args.rounds):
            if args.each:
                t, c = time.perf_counter(), cpu()
                for n in range(args.n): timed(BIN/'papermill', book, folder/f'out-{n}.ipynb', '-p', 'n', n, '--no-progress-bar', cwd=folder)
                add('papermill, a command each', time.perf_counter() - t, c)
            code, c = f"import papermill\nfor n in range({args.n}): papermill.execute_notebook('trivial.ipynb', f'out-{{n}}.ipynb', dict(n=n), progress_bar=False)", cpu()
            add('papermill, one process', timed(sys.executable, '-c', code, cwd=folder)[0], c)
            for workers in (1, 2, 4):
                shutil.rmtree(folder/'runs', ignore_errors=True)
                c = cpu()
                add(f'edgenb sweep, forked kernels, workers: {workers}', timed(BIN/'edgenb', 'sweep', book, '-g', f'n={points}', '--workers', workers, cwd=folder)[0], c)
            c = cpu()
            add('edgenb sweep again (all finished)', timed(BIN/'edgenb', 'sweep', book, '-g', f'n={points}', cwd=folder)[0], c)
        base = min(rounds['papermill, one process'])
        print(f'{args.n} trivial notebooks, best of {args.rounds}; load {load()}\n\n| way | seconds | of the processor | papermill in one process / this |\n|---|---|---|---|')
        for way, seconds in rounds.items(): print(f'| {way} | {min(seconds):.2f} | {min(used[way]):.2f} | {base/min(seconds):.1f} |')


def sweep(args):
    "A precision x pruning sweep of wafer in smoke size, one training, against papermill runs without a common pool."
    with tempfile.TemporaryDirectory() as folder:
        folder = workspace(Path(folder))
        (folder/'nbs').symlink_to(ROOT/'nbs')
        common = ['-p', 'smoke', 'true', '-p', 'second_turn', 'false']
        precisions, prunes = ['fp32', 'fp16', 'int8'], [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
        points = [(p, q) for p in precisions for q in prunes][:args.runs]
        (folder/'points.yaml').write_text(json.dumps([{'precisions': [p], 'prune': q} for p, q in points]))
        before = cpu()
        seconds, done = timed(BIN/'edgenb', 'sweep', 'wafer', '-f', 'points.yaml', *common, '--json', *(['--workers', args.workers] if args.workers else []), cwd=folder, check=False)
        told, ours = json.loads(done.stdout.splitlines()[-1]), cpu() - before
        computed = collections.Counter(json.loads(p.read_text())['room'] for run in (folder/'runs'/'wafer').glob('point-*') for p in run.glob('0?-*.json') if f"{p.name[:-5]}: done in" in (run/'wafer.ipynb').read_text())
        print(f"edgenb sweep: {told['done']} of {len(points)} done, {told['failed']} failed, {seconds:.1f} s ({ours:.0f} s of the processor); rooms computed: {dict(computed)}; load {load()}", flush=True)
        alone, before = [], cpu()
        for n, (p, q) in list(enumerate(points))[::max(1, len(points)//args.papermill)][:args.papermill]:
            out = folder/'papermill'/str(n)/'run'   # no .rooms beside it: nothing is shared
            out.mkdir(parents=True)
            given = ['-y', json.dumps({'smoke': True, 'second_turn': False, 'precisions': [p], 'prune': q, 'output_dir': str(out)})]
            s, ended = timed(BIN/'papermill', ROOT/'nbs'/'recipes'/'wafer.ipynb', out/'wafer.ipynb', *given, '--no-progress-bar', cwd=folder, check=False)
            alone.append(s)
            print(f'papermill {p} {q}: {s:.1f} s{"" if ended.returncode == 0 else " FAILED"}', flush=True)
        whole, theirs = sum(alone)/len(alone)*len(points), (cpu() - before)/len(alone)*len(points)
        print(f"papermill, run by run: {sum(alone)/len(alone):.1f} s a run over {len(alone)} runs" + (f', {whole:.0f} s for {len(points)} (multiplied, not measured)' if len(alone) < len(points) else f', {whole:.0f} s in all') + f'; ratio {whole/seconds:.1f} (of processor time {theirs/ours:.1f}); load {load()}')


ROOMS = '''import os, time
from edgenb.core import room
def tally(name): fd = os.open(os.environ['TALLY'], os.O_WRONLY | os.O_APPEND | os.O_CREAT); os.write(fd, (name + '\\n').encode()); os.close(fd)
@room(1)
def shared(run, kind='a'):
    time.sleep(0.3); run.new('x.txt').write_text(kind); tally(f'shared {kind}'); return {'data': 'synthetic'}
@room(2, needs=('shared',))
def own(run, n=0):
    time.sleep(0.2); run.new('y.txt').write_text(f'{n}'); tally(f'own {n}'); return {}
'''   # a room tells the tally as its last act; between that and its card a kill may fall, and then it is done again


def resume(args):
    "Kill a sweep with all its processes at random moments, start it again, until it ends; count what was computed."
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = workspace(Path(folder))
        (folder/'toyrooms_mill.py').write_text(ROOMS)
        book = notebook(folder/'toy.ipynb', 'import sys; sys.path.insert(0, "."); from toyrooms_mill import own, shared', 'shared(output_dir, kind="ab"[n % 2]); own(output_dir, n=n)')
        go = [BIN/'edgenb', 'sweep', book, '-g', f"n={','.join(map(str, range(args.n)))}", '--workers', '2', '--json']
        env, kills, finished_at_kill = ENV | {'TALLY': str(folder/'tally')}, 0, []
        while True:
            process = subprocess.Popen(list(map(str, go)), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if kills == args.kills: break
            try: process.wait(rng.uniform(0.1, 4)); break
            except subprocess.TimeoutExpired: pass
            process.kill(); process.communicate(); kills += 1
            finished_at_kill.append({p.parent.name: json.loads(p.read_text())['started'] for p in (folder/'runs'/'toy').glob('point-*/job.json') if json.loads(p.read_text())['status'] == 'done'})
        out, _ = process.communicate()
        told = json.loads(out.splitlines()[-1])
        last = {r['run']: json.loads((folder/'runs'/'toy'/r['run']/'job.json').read_text())['started'] for r in told['runs']}
        redone = sum(last[run] != started for seen in finished_at_kill for run, started in seen.items())
        counts = collections.Counter((folder/'tally').read_text().split('\n')[:-1])
        time.sleep(1.5)
        left = [p for p in Path('/proc').glob('[0-9]*/environ') if str(folder).encode() in _read(p)]
        print(f"{kills} kills, {told['done']} of {args.n} runs done, {told['failed']} failed; finished runs that were done again: {redone}; rooms computed {sum(counts.values())} times for {len(counts)} (at least {args.n + 2}), "
              f"twice: {({k: v for k, v in counts.items() if v > 1})}; finished at the kills: {[len(f) for f in finished_at_kill]}; processes left: {len(left)}; load {load()}")


def _read(path):
    try: return path.read_bytes()
    except OSError: return b''


def typo(args):
    "What a typo costs."
    with tempfile.TemporaryDirectory() as folder:
        folder = workspace(Path(folder))
        (folder/'nbs').symlink_to(ROOT/'nbs')
        for way, command in (('edgenb sweep wafer -g sed=1,2', ['sweep', 'wafer', '-g', 'sed=1,2']), ('edgenb run wafer -p sed 1', ['run', 'wafer', '-p', 'sed', '1'])):
            seconds = [timed(BIN/'edgenb', *command, cwd=folder, check=False) for _ in range(10)]
            assert all(d.returncode == 2 and 'Did you mean seed' in d.stderr for _, d in seconds)
            print(f'{way}: refused in {min(s for s, _ in seconds):.2f} s (best of 10; worst {max(s for s, _ in seconds):.2f} s); load {load()}')


def dask(args):
    "Queued trivial runs on a Dask cluster of this machine; two workers are killed on the way."
    with tempfile.TemporaryDirectory() as folder:
        folder = workspace(Path(folder))
        book = notebook(folder/'trivial.ipynb', 'print(n)')
        (folder/'points.yaml').write_text(json.dumps([{'n': n} for n in range(args.n)]))
        t = time.perf_counter()
        process = subprocess.Popen(list(map(str, [BIN/'edgenb', 'sweep', book, '-f', 'points.yaml', '--dask', 'local', '--workers', args.workers, '--json'])), cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        killed = []
        while process.poll() is None and len(killed) < 2:
            time.sleep(0.5)
            done = sum(1 for _ in (folder/'runs').glob('trivial/point-*/job.json'))
            if done > args.n*(len(killed) + 1)//3 and (pid := next((p for p in _descendants(process.pid) if _is_worker(p) and p not in killed), None)): os.kill(pid, signal.SIGKILL); killed.append(pid)
        out, err = process.communicate()
        told = json.loads(out.splitlines()[-1])
        seconds = time.perf_counter() - t
        records = [json.loads(p.read_text()) for p in (folder/'runs').glob('trivial/point-*/job.json')]
        print(f"{args.n} runs on {args.workers} Dask workers, {len(killed)} killed: {told['done']} done, {told['failed']} failed, {len(records)} records, {seconds:.1f} s ({seconds/args.n:.3f} s a run); load {load()}")
        if told['failed']: print(collections.Counter(r['reason'] for r in told['runs'] if r['status'] != 'done'))


def _descendants(pid):
    children = collections.defaultdict(list)
    for p in Path('/proc').glob('[0-9]*/stat'):
        with_name = _read(p).rpartition(b') ')[2].split()
        if with_name: children[int(with_name[1])].append(int(p.parent.name))
    todo = [pid]
    while todo:
        for c in children[todo.pop()]: yield c; todo.append(c)


def _is_worker(pid): return b'spawn_main' in _read(Path(f'/proc/{pid}/cmdline'))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    commands = p.add_subparsers(required=True)
    for function, options in ((trivial, {'n': 8, 'rounds': 3, 'each': 1}), (sweep, {'runs': 24, 'papermill': 3, 'workers': 0}), (resume, {'n': 24, 'kills': 20, 'seed': 0}), (typo, {}), (dask, {'n': 1000, 'workers': 2})):
        c = commands.add_parser(function.__name__, help=function.__doc__)
        c.set_defaults(function=function)
        for name, default in options.items(): c.add_argument(f'--{name}', type=int, default=default)
    given = p.parse_args()
    given.function(given)
