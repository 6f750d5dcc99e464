"""The exact test beside alibi-detect's, and the detector's false alarms beside its promise.

`python benchmarks/drift.py [mmd] [power] [promise] [delay] [cost] [--alibi-python PATH] [--quick]`. PATH is the Python of an environment that holds alibi-detect and torch
(python -m venv FOLDER; FOLDER/bin/pip install alibi-detect==0.13.0 torch); it cannot share edgenb's, since it wants numpy below 2. Without it our side is measured alone.

Each figure of `mmd` comes from a process of its own, in turns, on one thread: CPU seconds of one call (the smaller of two after a small call to warm up) and peak resident memory. The data are
x ~ N(0, 1), y ~ N(0.02, 1), float32, 100 permutations. Statistics are with alibi-detect's bandwidth, and
its own is also taken in float64, since in float32 it keeps two or three digits only. alibi-detect's p-value is the share of permutations,
ours counts the observed division among them (so it is never 0): with 100, p <= 0.05 is one permutation more for alibi-detect. `promise` fits detectors to many references and counts alarms on windows without drift;
the interval is over references. All data here are synthetic.
"""
import argparse, json, os, resource, subprocess, sys, time
from dataclasses import replace
import numpy as np

ALIBI, PERMUTATIONS = '0.13.0', 100
MONTH, WINDOW = 720, 50


# The exact test ------------------------------------------------------------------------------------------------------

def alibi(x, y, seed=0, permutations=PERMUTATIONS):
    import torch
    from alibi_detect.cd import MMDDrift
    torch.manual_seed(seed)
    detector = MMDDrift(x, backend='pytorch', n_permutations=permutations, device='cpu')
    found = detector.predict(y)['data']
    return float(found['distance']), float(found['p_val']), float(detector._detector.kernel.sigma[0])

def ours(x, y, seed=0, bandwidth=None):
    from edgenb.watch import mmd_test
    found = mmd_test(x, y, permutations=PERMUTATIONS, seed=seed, bandwidth=bandwidth)
    return found.statistic, found.p_value, found.bandwidth

def median_as_alibi(x):
    "alibi-detect's bandwidth: the root of half the median of all squared distances in the reference but those of a row to itself."
    half = (x**2).sum(1)/2
    d = half[:, None] + half - x @ x.T
    np.fill_diagonal(d, -1)
    return float(np.sqrt(np.partition(d.ravel(), k := len(x) + (d.size - len(x))//2 - 1)[k]))

def pair(n, dimensions, seed=0, shift=0.02):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, dimensions), dtype=np.float32), rng.standard_normal((n, dimensions), dtype=np.float32) + np.float32(shift)

def child_mmd(who, n, dimensions, bandwidth, repeats):
    call, (x, y), small = {'alibi': alibi, 'ours': ours}[who], pair(n, dimensions), pair(50, dimensions)
    call(*small)
    seconds = []
    for _ in range(repeats):
        t = time.process_time()
        statistic, p, found = call(x, y)
        seconds.append(time.process_time() - t)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    out = {'cpu_s': min(seconds), 'rss_mb': peak, 'statistic': statistic, 'p_value': p, 'bandwidth': found}
    if who == 'alibi': out['double'], _, out['bandwidth'] = alibi(x.astype(float), y.astype(float), permutations=2)
    if who == 'ours' and bandwidth:
        out['statistic'] = ours(x, y, bandwidth=bandwidth)[0]
        out['as_alibi'] = median_as_alibi(x.astype(float))
    return out

SHIFTS = {'nothing': {}, 'all moved by 0.1': {'shift': 0.1}, '12 % of a new kind': {'new': 0.12}, 'spread 1.05': {'wider': 1.05}}

def things(n, rng, new=0.0, shift=0.0, wider=1.0, dimensions=32):
    "Embeddings of eight kinds of things, a share `new` of a ninth, all moved and stretched."
    centres = np.random.default_rng(7).normal(size=(9, dimensions))
    return centres[np.where(rng.random(n) < new, 8, rng.integers(8, size=n))] + rng.normal(size=(n, dimensions))*wider + shift

def child_power(who, reps):
    call, out = {'alibi': alibi, 'ours': ours}[who], {}
    for name, change in SHIFTS.items():
        pairs = ((things(200, rng := np.random.default_rng(1000 + r)).astype(np.float32), things(200, rng, **change).astype(np.float32)) for r in range(reps))
        out[name] = [call(x, y, seed=r)[1] for r, (x, y) in enumerate(pairs)]
    return out

def child(python, *what):
    "What this script says in a process of its own, on one thread."
    own = python == sys.executable
    environment = {k: v for k, v in os.environ.items() if own or k != 'PYTHONPATH'} | {k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')} | {'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([python, __file__, '--child', json.dumps(what)], capture_output=True, text=True, env=environment)
    if done.returncode: raise SystemExit(f'{python}: {(done.stderr.strip().splitlines() or ["it said nothing"])[-1]}')
    return json.loads(done.stdout.strip().splitlines()[-1])

def mmd(python, quick):
    print(f'\n### Exact MMD², {PERMUTATIONS} permutations, float32\n\n| n = m | columns | alibi-detect {ALIBI} CPU s | edgenb CPU s | ratio | alibi-detect MB | edgenb MB | MMD² alibi-detect in float64 | edgenb in float32 | alibi-detect in float32 | bandwidth alibi-detect | the same by numpy |\n|' + '---|'*12)
    for dimensions in (50, 384):
        for n in (500, 2000) if quick else (500, 1000, 2000, 5000, 10000, 20000):
            theirs = child(python, 'mmd', 'alibi', n, dimensions, None, 2 if n <= 2000 else 1) if python and n <= 5000 else None
            own = child(sys.executable, 'mmd', 'ours', n, dimensions, theirs and theirs['bandwidth'], 3 if n <= 5000 else 1)
            def cell(key, form): return format(theirs[key], form) if theirs else '–'
            ratio = f"**{theirs['cpu_s']/own['cpu_s']:.0f}**" if theirs else '–'
            print(f"| {n:,} | {dimensions} | {cell('cpu_s', '.2f')} | {own['cpu_s']:.3f} | {ratio} | {cell('rss_mb', '.0f')} | {own['rss_mb']:.0f} | {cell('double', '.5e')} | {own['statistic']:.5e} | "
                  f"{cell('statistic', '.5e')} | {cell('bandwidth', '.6f')} | " + (f"{own['as_alibi']:.6f}" if 'as_alibi' in own else '–') + ' |', flush=True)

def power(python, quick):
    from edgenb.measure import machine   # a line for who reads the table later
    reps = 60 if quick else 300
    own, theirs = child(sys.executable, 'power', 'ours', reps), child(python, 'power', 'alibi', reps) if python else None
    print(f'\n### Share of {reps} tests with p ≤ 0.05, n = m = 200, 32 columns ({machine()["processor"]})\n\n| what changed | alibi-detect | edgenb | only alibi-detect | only edgenb |\n|---|---|---|---|---|')
    for name in SHIFTS:
        a = np.array(own[name]) <= 0.05
        b = np.array(theirs[name]) <= 0.05 if theirs else a
        print(f"| {name} | {b.mean():.3f} | {a.mean():.3f} | {(b & ~a).sum()} | {(a & ~b).sum()} |" if theirs else f'| {name} | – | {a.mean():.3f} | – | – |', flush=True)


# The detector --------------------------------------------------------------------------------------------------------

KINDS = {'eight kinds': things, 'one direction': lambda n, rng: rng.normal(size=(n, 32))*np.r_[5, np.full(31, 0.1)],
         'one row in 100 far out': lambda n, rng: rng.normal(size=(n, 32))*0.3 + 3*(rng.random((n, 1)) < 0.01)}

def window_sums(detector, kind, windows, rng, **change):
    "Feature sums of windows, many at a time; on a device `update` makes them row by row."
    from edgenb.drift import fourier
    blocks = [min(400, windows - at) for at in range(0, windows, 400)]
    directions = detector.directions.astype(np.float32)
    return np.concatenate([fourier(kind(WINDOW*b, rng, **change).astype(np.float32), directions).reshape(b, WINDOW, -1).sum(1) for b in blocks])

def alarms(detector, sums):
    "bool (windows,) for each scale: what `update` would ring, without its rounding."
    from edgenb.drift import distance, merged
    r, out = detector.regimes[''], []
    for k, limit in zip(detector.scales, r.limits):
        rang = np.zeros(len(sums), bool)
        rang[k-1:len(sums)//k*k:k] = distance(merged(sums, k), k*WINDOW, r.mean) > limit
        out.append(rang)
    return np.array(out)

def promise(python, quick):
    from edgenb.core import EdgenbError
    from edgenb.drift import Detector
    references, windows = (6, 3200) if quick else (20, 10240)
    print(f'\n### False alarms a month ({MONTH} windows of {WINDOW} rows), {windows:,} windows without drift for each reference\n\n| rows | reference | promised | references | realised / promised, over references | worst reference | by scale | refused | self-check: realised / promised | its interval covers | fit CPU s |\n|' + '---|'*11)
    for name, kind in KINDS.items():
        for n in (500, 2000, 8000):
            fitted = {1.0: [], 0.1: []} if kind is things else {1.0: []}
            for s in range(references if kind is things else references//2):
                rng, sums, reference = np.random.default_rng([s, n]), None, kind(n, np.random.default_rng([s, n, 1]))
                for target in fitted:
                    if target < 1 and s >= references//4: continue      # takes ten times as long
                    t = time.process_time()
                    try: d = Detector.fit(reference, window=WINDOW, windows_per_month=MONTH, false_alarms_per_month=target, seed=s)
                    except EdgenbError as e: fitted[target].append(str(e)); continue
                    t = time.process_time() - t
                    if sums is None: sums = window_sums(d, kind, windows, rng)
                    a = alarms(d, sums).sum(1)*MONTH/windows/target
                    check = d.check['']
                    true = sum(v for v, k in zip(a, d.scales) if k in check['scales_checked'])*target
                    fitted[target].append((a, check['realised']/check['promised'], check['low'] <= true + 1.5*MONTH/windows and true <= check['high'] + 1.5*MONTH/windows, t))
            for target, found in fitted.items():
                good, refused = [f for f in found if not isinstance(f, str)], [f for f in found if isinstance(f, str)]
                if not good: print(f'| {name} | {n:,} | {target} | {len(found)} | – | – | – | {len(refused)} | {refused[0]} | – | – |', flush=True); continue
                total = np.array([f[0].sum() for f in good])
                boot = total[np.random.default_rng(0).integers(len(total), size=(2000, len(total)))].mean(1)
                print(f"| {name} | {n:,} | {target} | {len(found)} | **{total.mean():.2f}** [{np.quantile(boot, .025):.2f}, {np.quantile(boot, .975):.2f}] | {total.max():.2f} | {' / '.join(f'{v:.2f}' for v in np.mean([f[0] for f in good], 0))} | {len(refused)} | "
                      f"{np.mean([f[1] for f in good]):.2f} | {np.mean([f[2] for f in good]):.0%} | {np.mean([f[3] for f in good]):.1f} |", flush=True)

def delay(python, quick):
    from edgenb.drift import Detector
    streams, longest = (8, 256) if quick else (30, 512)
    modes = {'scales 1, 4, 16, 64': {}, 'scale 1 alone': {'scales': (1,)}, 'guaranteed': {'mode': 'guaranteed'}}
    changes = {'12 % of a new kind': {'new': 0.12}, 'all moved by 0.1': {'shift': 0.1}, 'spread 1.1': {'wider': 1.1}}
    print(f"\n### Windows until the first alarm: median of {streams} streams, in brackets the share found within {longest} windows; promised: one false alarm in {MONTH} windows\n\n| reference | what changed | {' | '.join(modes)} |\n|" + '---|'*5)
    for n in (2000, 8000):
        first = {(c, m): [] for c in changes for m in modes}
        for s in range(streams):
            for m, given in modes.items():
                fitted = Detector.fit(things(n, np.random.default_rng([s, 2])), window=WINDOW, windows_per_month=MONTH, seed=s, **given)
                for c, change in changes.items():
                    sums = window_sums(fitted, things, longest, np.random.default_rng([s, 3]), **change)
                    if m == 'guaranteed':
                        d = Detector.from_bytes(fitted.to_bytes())
                        rang = [w for w, total in enumerate(sums) if d.update_merged(replace(d.sketch(), count=WINDOW, total=total/np.sqrt(d.features/2))).alarms][:1]
                    else: rang = np.flatnonzero(alarms(fitted, sums).any(0))
                    first[c, m].append(rang[0] + 1 if len(rang) else np.inf)
        for c in changes: print(f'| {n:,} | {c} | ' + ' | '.join(f"{np.median(v):.0f} ({np.isfinite(v).mean():.0%})" if np.isfinite(np.median(v)) else f'– ({np.isfinite(v).mean():.0%})' for v in (first[c, m] for m in modes)) + ' |', flush=True)

def cost(python, quick):
    from edgenb.drift import Detector
    print('\n### On the device\n\n| columns | µs for a window of 50 rows | bytes | save µs |\n|---|---|---|---|')
    for dimensions in (32, 384, 1280):
        rng = np.random.default_rng(0)
        d = Detector.fit(things(2000, rng, dimensions=dimensions), window=WINDOW, windows_per_month=MONTH)
        rows = things(WINDOW*100, rng, dimensions=dimensions)
        quick_sums = window_sums(d, lambda n, _: rows[:n], 100, rng)
        t = time.process_time(); seen = d.update(rows); spent = time.process_time() - t
        assert len(seen.alarms) == alarms(Detector.from_bytes(d.to_bytes()), quick_sums).sum()      # the fast way of this script rings as the device does
        t = time.process_time(); size = [len(d.to_bytes()) for _ in range(50)][0]; saving = (time.process_time() - t)/50
        print(f'| {dimensions} | {spent/100*1e6:.0f} | {size:,} | {saving*1e6:.0f} |', flush=True)


def main():
    parts = {f.__name__: f for f in (mmd, power, promise, delay, cost)}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('which', nargs='*', default=list(parts), metavar='which', help=f"{', '.join(parts)} (default: all)"); p.add_argument('--alibi-python'); p.add_argument('--quick', action='store_true', help='fewer repetitions')
    p.add_argument('--child', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        what, *rest = json.loads(args.child)
        print(json.dumps({'mmd': child_mmd, 'power': child_power}[what](*rest)))
    else:
        for name in args.which: parts[name](args.alibi_python, args.quick)


if __name__ == '__main__': main()
