"""Tests of a canary side by side: how often they send back a good model, how soon they find a bad one. All data are simulated.

`python benchmarks/rollout.py [tests] [promotion] [small] [kinds] [guards] [cohorts] [--quick]`. 17 canaries, 323 controls, an outcome at a time from each device, a look every 170 outcomes of canaries, 68,000 at most, alpha 5 %, 1,000 simulations. Every
device has 400 labelled outcomes from before. "season": all devices err a point more and less in turn; "devices differ": a standard deviation of one point between devices, the same before and since; "by themselves": half a point more that each device's own rate has moved since.
"""
import argparse, time
import numpy as np
from scipy.special import xlogy
from edgenb.fleet.sequential import CANARY, CONTROL, compare, compare_kinds, drift_evidence, outcomes_needed, share_evidence

ALPHA, MARGIN, PER, LOOKS, BASE = 0.05, 0.01, 10, 400, 400
ARM = np.r_[np.full(17, CANARY), np.full(323, CONTROL)]


# ---- the peers, on sums over each arm --------------------------------------------------------------------------------

def z_test(k, n, j, m, state):
    p = (k + j)/(n + m)
    return (k/n - j/m)/np.sqrt(np.maximum(p*(1 - p), 1e-12)*(1/n + 1/m)) > 1.645

def mixture_two_samples(k, n, j, m, state):
    "mSPRT on two groups of independent outcomes (Johari et al. 2022), one-sided as ours is."
    p = (k + j + .5)/(n + m + 1)
    info = 1/(p*(1 - p)*(1/n + 1/m))
    return drift_evidence((k/n - j/m)*info, info, MARGIN) >= 1/ALPHA

def two_sample_e(k, n, j, m, state):
    "The exact e-process for two Bernoulli streams (Turner, Ly & Grünwald 2024): each block is bet on with the rates known before it, canaries at least as high."
    k0, n0, j0, m0, log = state.get('two', (np.zeros(len(k)), 0, np.zeros(len(k)), 0, np.zeros(len(k))))
    a, b = (k0 + 0.18)/(n0 + 6 if n0 else 6), (j0 + 0.18)/(m0 + 6 if m0 else 6)
    a = np.maximum(a, b)
    dk, dn, dj, dm = k - k0, n - n0, j - j0, m - m0
    null = (dn*a + dm*b)/(dn + dm)
    log = log + sum(xlogy(x, p/q) + xlogy(y - x, (1 - p)/(1 - q)) for x, y, p, q in ((dk, dn, a, null), (dj, dm, b, null)))
    state['two'] = k.copy(), n, j.copy(), m, log
    return log >= np.log(1/ALPHA)

def fixed_sprt(k, n, j, m, state):
    "Wald's test of the canaries alone: the rate known beforehand against one point more."
    p = state['p']
    return xlogy(k, (p + MARGIN)/p) + xlogy(n - k, (1 - p - MARGIN)/(1 - p)) >= np.log(1/ALPHA)

PEERS = {'z-test, peeked at': z_test, 'SPRT of canaries, rates known': fixed_sprt, 'mSPRT, two groups': mixture_two_samples, 'exact two-sample e-process': two_sample_e}


# ---- simulated rollouts -----------------------------------------------------------------------------------------------

def outcomes(reps, looks, p=0.03, worse=0.0, season=0.0, device=0.0, change=0.0, arm=ARM, per=PER, seed=0):
    "Yields, look by look, (n_before, errors_before, n, errors), each (reps, devices) or a number."
    rng, d = np.random.default_rng(seed), len(arm)
    own = np.clip(p + device*rng.normal(size=(reps, d)), 0.001, 0.95)
    errors_before, now, errors = rng.binomial(BASE, own), np.clip(own + change*rng.normal(size=(reps, d)) + worse*(arm == CANARY), 0.0005, 0.95), np.zeros((reps, d), int)
    for t in range(1, looks + 1):
        errors += rng.binomial(per, np.clip(now + season*np.sin(2*np.pi*t/120), 0.0005, 0.95))
        yield t*per, np.full((reps, d), BASE), errors_before, np.full((reps, d), t*per), errors

def run(reps, looks, arm=ARM, peers=True, **how):
    "Look at which each test first fires (-1: never): {test: (reps,)}."
    fired, state = {n: np.full(reps, -1) for n in (*(PEERS if peers else ()), 'ours: worse', 'ours: within the margin')}, {'p': how.get('p', 0.03)}
    for t, (each, n0, e0, n1, e1) in enumerate(outcomes(reps, looks, arm=arm, **how)):
        c = compare(n0, e0, n1, e1, arm, MARGIN)
        canary = arm == CANARY
        k, j, n, m = e1[:, canary].sum(1).astype(float), e1[:, ~canary].sum(1).astype(float), each*canary.sum(), each*(~canary).sum()
        for name, now in (*((n_, f(k, n, j, m, state)) for n_, f in (PEERS.items() if peers else ())), ('ours: worse', c.worse >= 1/ALPHA), ('ours: within the margin', c.within >= 1/ALPHA)):
            fired[name] = np.where((fired[name] < 0) & now, t, fired[name])
    return fired

def outcomes_text(fired):
    at = np.where(fired >= 0, (fired + 1)*PER*17.0, np.inf)
    def q(p): return f'{v:,.0f}' if np.isfinite(v := np.quantile(at, p, method='inverted_cdf')) else '–'
    return f'{(fired >= 0).mean():.3f}' + (f', {q(0.5)} / {q(0.9)}' if (fired >= 0).mean() >= 0.6 else '')

CASES = {'3 %, no worse': {}, '3 → 4 %': {'worse': 0.01}, '3 → 6 %': {'worse': 0.03}, 'no worse, season': {'season': 0.01}, 'no worse, devices differ': {'device': 0.01}, 'no worse, differ and move by themselves': {'device': 0.01, 'change': 0.005},
         '3 → 4 %, devices differ': {'worse': 0.01, 'device': 0.01}, '10 → 11 %': {'p': 0.1, 'worse': 0.01}}

def tests(quick):
    reps = 100 if quick else 1000
    print(f'\n### Sent back: share of {reps:,} simulated rollouts, and outcomes of canaries until then (median / 90 %)\n\n| test | {" | ".join(CASES)} |\n|' + '---|'*(len(CASES) + 1))
    t = time.process_time()
    found = {c: run(reps, LOOKS, **how) for c, how in CASES.items()}
    for name in [*PEERS, 'ours: worse']: print(f"| {'**mixture SPRT on the difference in differences**' if name == 'ours: worse' else name} | {' | '.join(outcomes_text(found[c][name]) for c in CASES)} |")
    print(f'\nCPU {time.process_time() - t:.0f} s for {len(CASES)*reps*LOOKS:,} looks at 340 devices, peers included')
    return found

def promotion(quick):
    reps = 100 if quick else 1000
    print(f'\n### Goes on (upper bound of the difference below one point): share of {reps:,}, outcomes of canaries (median / 90 %); whichever came first\n\n| case | goes on ever | sent back first | goes on first | the plan says |\n|---|---|---|---|---|')
    for c, how in ({k: CASES[k] for k in ('3 %, no worse', 'no worse, devices differ', 'no worse, season', '3 → 4 %', '3 → 6 %')} | {'10 %, no worse': {'p': 0.1}, '0.3 %, no worse': {'p': 0.003}}).items():
        f = run(reps, LOOKS, peers=False, **how)
        w, g = (np.where(v < 0, 10**9, v) for v in (f['ours: worse'], f['ours: within the margin']))
        print(f"| {c} | {outcomes_text(f['ours: within the margin'])} | {(w < g).mean():.3f} | {(g < w).mean():.3f} | " + (f"{outcomes_needed(how.get('p', .03), MARGIN, ALPHA):,.0f}" if not how.get('worse') else '–') + ' |', flush=True)

def small(quick):
    reps = 200 if quick else 2000
    print(f'\n### Small fleets, {LOOKS//2} looks of 40 outcomes a device: sent back, share of {reps:,}\n\n| canaries, controls | no worse, alike | no worse, differ by 1 | by 2 points | differ by 1, move by 0.5 | 1 point worse | 3 points worse |\n|---|---|---|---|---|---|---|')
    for k, m in ((1, 9), (2, 8), (4, 16), (4, 76)):
        arm = np.r_[np.full(k, CANARY), np.full(m, CONTROL)]
        print(f'| {k}, {m} | ' + ' | '.join(f"{(run(reps, LOOKS//2, arm=arm, peers=False, per=40, **how)['ours: worse'] >= 0).mean():.3f}" for how in ({}, {'device': .01}, {'device': .02}, {'device': .01, 'change': .005}, {'device': .01, 'worse': .01}, {'device': .01, 'worse': .03})) + ' |', flush=True)

def kinds(quick):
    reps, looks = 100 if quick else 1000, 150
    kind = np.array(['orin', 'orin', 'orin', 'pi', 'nano'])[np.arange(340) % 5]
    print(f'\n### Worse on one kind of hardware of three (a fifth of devices): share of {reps:,} within {looks*170:,} outcomes\n\n| worse there by | all together only: sent back | goes on | with kinds: sent back | goes on |\n|---|---|---|---|---|')
    for worse in (0, 0.03, 0.05):
        rng, n = np.random.default_rng(9), np.zeros(340, int)
        before, errors, fired = rng.binomial(BASE, 0.03, (reps, 340)), np.zeros((reps, 340), int), {k: np.full(reps, 10**9) for k in ('back', 'on', 'kinds back', 'kinds on')}
        for t in range(looks):
            n += PER; errors += rng.binomial(PER, 0.03 + worse*((kind == 'pi') & (ARM == CANARY)), (reps, 340))
            whole, _, e_worse, e_within = compare_kinds(np.full((reps, 340), BASE), before, np.broadcast_to(n, (reps, 340)), errors, ARM, kind, MARGIN)
            for name, e in (('back', whole.worse), ('on', whole.within), ('kinds back', e_worse), ('kinds on', e_within)): fired[name] = np.where((fired[name] == 10**9) & (e >= 1/ALPHA), t, fired[name])
        def share(a, b): return f'{(fired[a] < fired[b]).mean():.3f}'
        print(f"| {100*worse:g} points | {share('back', 'on')} | {share('on', 'back')} | {share('kinds back', 'kinds on')} | {share('kinds on', 'kinds back')} |", flush=True)

def guards(quick):
    from edgenb.fleet.guards import RATIO
    reps = 1000 if quick else 20_000
    limit = 1/(0.05/2/2/5)                                          # what one of five guards has at the first of four stages
    print(f'\n### Bad devices among 17 canaries and 323 controls, looked at 200 times; one of five guards at the first stage, rings at {limit:.0f}: share of {reps:,}\n\n| going bad, per look | rings | median look |\n|---|---|---|')
    for name, canary, control, site in (('0.1 % of all', .001, .001, 0), ('0.5 % of all', .005, .005, 0), ('0.1 % of all, 20 % in one plant of twelve', .001, .001, .2), ('canaries 1 %, controls 0.1 %', .01, .001, 0), ('canaries 5 %, controls 0.1 %', .05, .001, 0), ('canaries 20 %, controls none', .2, 0, 0)):
        rng, rang, k, j = np.random.default_rng(11), np.full(reps, -1), np.zeros(reps, int), np.zeros(reps, int)
        hot = rng.hypergeometric(28, 312, 17, reps) if site else np.zeros(reps, int)
        hot_k, hot_j, cool_k, cool_j = hot, (28 if site else 0) - hot, 17 - hot, 323 - (28 if site else 0) + hot
        for t in range(200):
            a, b, c, d = rng.binomial(hot_k, site), rng.binomial(hot_j, site), rng.binomial(cool_k, canary), rng.binomial(cool_j, control)
            hot_k, hot_j, cool_k, cool_j, k, j = hot_k - a, hot_j - b, cool_k - c, cool_j - d, k + a + c, j + b + d
            rang = np.where((rang < 0) & (share_evidence(k, j, RATIO*17/(RATIO*17 + 323)) >= limit), t + 1, rang)
        print(f"| {name} | {(rang >= 0).mean():.4f} | {f'{np.median(rang[rang >= 0]):.0f}' if (rang >= 0).mean() > 0.5 else '–'} |", flush=True)

def cohorts(quick):
    from edgenb.fleet.cohorts import cohort, cutoffs, rank
    devices = [{'id': f'cam-{i:04}', 'site': f'plant-{i % 12}', 'hardware': 'rare' if i < 20 else 'usual'} for i in range(340)]
    site, rare = np.array([int(d['site'][6:]) for d in devices]), np.array([d['hardware'] == 'rare' for d in devices])
    seeds = [f'{s:06x}' for s in range(100 if quick else 2000)]
    def lot(s): return cohort(devices, {'seed': s, 'strata': ['site', 'hardware'], 'cutoffs': cutoffs(devices, s, 5)})
    def bucket(s): return np.array([int(rank(s, d['id'])[:8], 16) % 100 < 5 for d in devices])
    print(f'\n### 5 % of 340 devices in 12 plants, 20 of a rare kind: {len(seeds):,} seeds\n\n| cohort | devices | least, most | a plant without | the rare kind without |\n|---|---|---|---|---|')
    for name, f in (('hash bucket', bucket), ('lot within strata', lot)):
        c = np.array([f(s) for s in seeds]); n = c.sum(1)
        print(f'| {name} | {n.mean():.1f} ± {n.std():.1f} | {n.min()}, {n.max()} | {np.mean([len(set(site[v])) < 12 for v in c]):.1%} | {np.mean([not v[rare].any() for v in c]):.1%} |', flush=True)


if __name__ == '__main__':
    parts = {f.__name__: f for f in (tests, promotion, small, kinds, guards, cohorts)}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('which', nargs='*', default=list(parts), metavar='which', help=f"{', '.join(parts)} (default: all)"); p.add_argument('--quick', action='store_true', help='fewer repetitions')
    args = p.parse_args()
    for name in args.which: parts[name](args.quick)
