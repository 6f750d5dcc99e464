"Sequential tests and guards: against independent implementations, and their error rates by simulation (all data here are simulated)."
import importlib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad
from scipy.special import betaln
from scipy.stats import binom, norm
from edgenb.core import EdgenbError
from edgenb.fleet.guards import GUARDS, RATIO, default_guards, judge, judge_labels, judge_share, over_share, parse_guards, shares, uncertainty
from edgenb.fleet.sequential import CANARY, CONTROL, NEITHER, Evidence, compare, compare_kinds, drift_boundary, drift_evidence, outcomes_needed, share_evidence, spread

ARM = np.r_[np.full(17, CANARY), np.full(323, CONTROL)]


# ---- against independent implementations

@pytest.mark.parametrize('u, info, scale', [(3.0, 4.0, 1.0), (250.0, 1e4, 0.01), (-30.0, 100.0, 0.5), (0.0, 1e6, 0.01), (9000.0, 1e6, 0.01)])
def test_the_evidence_of_a_drift_is_the_integral_over_a_half_normal_prior(u, info, scale):
    mode = min(max(0, u/(info + 1/scale**2)), 40*scale)
    mixed, _ = quad(lambda d: 2*norm.pdf(d, scale=scale)*np.exp(d*u - d*d*info/2), 0, 40*scale, points=[mode], limit=400, epsabs=0, epsrel=1e-10)
    assert drift_evidence(u, info, scale) == pytest.approx(mixed, rel=1e-6)


@pytest.mark.parametrize('k, j, share', [(0, 0, 0.05), (3, 0, 0.05), (3, 40, 0.05), (20, 980, 0.01), (0, 30, 0.3)])
def test_the_evidence_of_a_share_is_the_integral_over_larger_shares(k, j, share):
    mixed, _ = quad(lambda q: q**k*(1 - q)**j/(share**k*(1 - share)**j)/(1 - share), share, 1, points=[min(max(k/max(k + j, 1), share + 1e-6), 1 - 1e-6)], limit=400, epsabs=0, epsrel=1e-10)
    assert share_evidence(k, j, share) == pytest.approx(mixed, rel=1e-5)


def test_boundary_and_share_agree_with_ville():
    pytest.importorskip('ville', reason='pip install ville==0.1.0 to compare with it')
    boundaries, proportions = importlib.import_module('ville._boundaries'), importlib.import_module('ville.proportions')
    info = np.geomspace(1, 1e7, 50)
    for scale, alpha in ((0.01, 0.05), (1.0, 0.001)): assert np.allclose(drift_boundary(info, scale, alpha), boundaries.normal_mixture(info, alpha, scale**-2, one_sided=True), rtol=1e-9)
    x = (np.random.default_rng(0).random(300) < 0.1).astype(float)
    test = proportions.BernoulliTest(0.05, prior=(1, 1))
    two_sided, t, k = test._process(x), np.arange(1, 301), np.cumsum(x)
    assert np.allclose(two_sided, betaln(1 + k, 1 + t - k) - k*np.log(0.05) - (t - k)*np.log(0.95))
    above = np.log(share_evidence(k, t - k, 0.05)) + np.log(0.95)                                    # ours is the part of that integral above the share
    assert (above <= two_sided + 1e-9).all() and abs(above[-1] - two_sided[-1]) < 0.05


def test_the_difference_is_that_of_generalised_least_squares():
    "A mixed model with two outcomes a device, solved as one linear system with its full covariance."
    rng, d = np.random.default_rng(5), 60
    arm = np.r_[np.full(12, CANARY), np.full(48, CONTROL)]
    n0, n1 = rng.integers(150, 900, d), rng.integers(100, 700, d)
    rate = np.clip(0.05 + 0.02*rng.normal(size=d), 0.002, 1)
    e0, e1 = rng.binomial(n0, rate), rng.binomial(n1, np.clip(rate + 0.01*(arm == CANARY), 0, 1))
    found = compare(n0, e0, n1, e1, arm)
    old = (e0.sum() + e1[arm == CONTROL].sum() + .5)/(n0.sum() + n1[arm == CONTROL].sum() + 1)
    own = max(old, e1[arm == CANARY].sum()/n1[arm == CANARY].sum())
    v, vc = old*(1 - old), (old + own)/2*(1 - (old + own)/2)
    level = spread(e0/n0, v/n0, [np.ones(d, bool)])
    past = level/(level + v/n0)
    y = e1/n1 - past*(e0/n0 - e0.sum()/n0.sum())
    change = spread(y, v/n1 + level*(1 - past), [arm == CANARY, arm == CONTROL])
    cov = np.zeros((2*d, 2*d))
    for i in range(d):
        cov[2*i:2*i + 2, 2*i:2*i + 2] = level
        cov[2*i, 2*i] += v/n0[i]; cov[2*i + 1, 2*i + 1] += (vc if arm[i] == CANARY else v)/n1[i] + change
    design = np.zeros((2*d, 3)); design[::2, 0] = 1; design[1::2, 1] = 1; design[1::2, 2] = arm == CANARY
    inverse = np.linalg.inv(cov)
    covariance = np.linalg.inv(design.T @ inverse @ design)
    best = covariance @ design.T @ inverse @ np.ravel(np.column_stack([e0/n0, e1/n1]))
    assert found.difference == pytest.approx(best[2], abs=0.1*covariance[2, 2]**0.5) and 1/found.info == pytest.approx(covariance[2, 2], rel=0.03)


# ---- error rates

def looks(p=0.03, worse=0.0, reps=150, looks=120, per=10, season=0.0, device=0.0, change=0.0, arm=ARM, base=400, seed=0):
    "Evidence against 'no worse' and against 'worse by the margin', (looks, reps): an outcome after the other from each device."
    rng, d = np.random.default_rng(seed), len(arm)
    own = np.clip(p + device*rng.normal(size=(reps, d)), 0.0005, 0.95)
    before, errors_before = np.full((reps, d), base), rng.binomial(base, own)
    now, n, errors, out = np.clip(own + change*rng.normal(size=(reps, d)) + worse*(arm == CANARY), 0.0002, 0.95), 0, np.zeros((reps, d), int), []
    for t in range(1, looks + 1):
        n += per; errors += rng.binomial(per, np.clip(now + season*np.sin(t/20), 0.0002, 0.95))
        c = compare(before, errors_before, np.full((reps, d), n), errors, arm)
        out.append((c.worse, c.within))
    return np.swapaxes(out, 0, 1)


@pytest.mark.parametrize('how', [{}, {'season': 0.01}, {'device': 0.01}, {'device': 0.01, 'change': 0.005}, {'p': 0.002, 'per': 2}, {'p': 0.1}, {'per': 1}])
def test_a_release_that_is_no_worse_is_hardly_ever_sent_back(how):
    worse, _ = looks(**how)
    assert (worse >= 20).any(0).sum() <= binom.ppf(0.995, 150, 0.05)


@pytest.mark.parametrize('how', [{'reps': 400, 'arm': np.r_[[CANARY]*k, [CONTROL]*m], 'per': 40, 'device': s, 'looks': 60} for k, m in ((2, 8), (4, 16)) for s in (0.0, 0.02)])
def test_a_handful_of_devices_does_not_make_the_test_bold(how):
    assert (looks(**how)[0] >= 20).any(0).mean() <= 0.05


def test_a_release_worse_by_the_margin_hardly_ever_passes():
    _, within = looks(worse=0.01)
    assert (within >= 20).any(0).sum() <= binom.ppf(0.995, 150, 0.05)


def test_one_point_more_errors_is_found_within_a_few_thousand_outcomes():
    worse, _ = looks(worse=0.01, device=0.01, looks=80)
    first = np.where((worse >= 20).any(0), (worse >= 20).argmax(0) + 1, np.inf)*10*17
    assert np.median(first) < 4500


def test_a_good_release_goes_on_after_about_as_many_outcomes_as_the_plan_says():
    _, within = looks(looks=80)
    first = np.where((within >= 20).any(0), (within >= 20).argmax(0) + 1, np.inf)*10*17
    assert 0.6 < np.median(first)/outcomes_needed(0.03, 0.01, 0.05) < 1.6


def test_a_peeked_z_test_does_send_good_releases_back_so_this_simulation_can_tell():
    rng, reps = np.random.default_rng(1), 300
    canary, control = np.cumsum(rng.binomial(170, 0.03, (120, reps)), 0), np.cumsum(rng.binomial(3230, 0.03, (120, reps)), 0)
    n, m = 170*np.arange(1, 121)[:, None], 3230*np.arange(1, 121)[:, None]
    pooled = (canary + control)/(n + m)
    assert ((canary/n - control/m)/np.sqrt(pooled*(1 - pooled)*(1/n + 1/m)) > 1.645).any(0).mean() > 0.25


def test_one_bad_kind_of_hardware_sends_the_release_back_and_is_named():
    rng = np.random.default_rng(2)
    kind, n = np.array(['orin', 'orin', 'pi', 'orin', 'orin'])[np.arange(340) % 5], np.full(340, 300)
    e = evidence(n=n, errors=rng.binomial(n, np.where((ARM == CANARY) & (kind == 'pi'), 0.13, 0.03)), errors_before=rng.binomial(400, 0.03, 340), stratum=[f'plant/{k}' for k in kind])
    v, allowed = judge_labels(0.01, e, 0.025, 0.05)
    assert v.holds is False and 'most on pi' in v.said and not allowed


def test_a_kind_that_was_hardly_seen_holds_up_the_rest():
    rng, kind = np.random.default_rng(3), np.where(np.arange(340) % 9 == 0, 'rare', 'orin')
    n = np.where(kind == 'rare', 2, 400)
    e = evidence(n=n, errors=rng.binomial(n, 0.03), errors_before=rng.binomial(400, 0.03, 340), stratum=[f'plant/{k}' for k in kind])
    v, allowed = judge_labels(0.01, e, 0.025, 0.05)
    assert v.holds and not allowed and 'rare' in v.said


def test_kinds_with_one_canary_and_one_control_do_not_make_the_test_bold():
    "Ten devices of five kinds, at the stage of a half; devices differ by a point. Each pair by itself took that for the release: 6 % were sent back at alpha 5 %, 9.5 % where devices also move by themselves."
    arm, kind, reps = np.r_[[CANARY]*5, [CONTROL]*5, NEITHER], np.array(list('abcdeabcdea')), 300
    rng = np.random.default_rng(0)
    own = np.clip(0.03 + 0.01*rng.normal(size=(reps, 11)), 0.0005, 1)
    before, now, n, errors, sent = rng.binomial(400, own), np.clip(own + 0.005*rng.normal(size=own.shape), 0.0005, 1), np.zeros((reps, 11), int), np.zeros((reps, 11), int), np.zeros(reps, bool)
    n_before = np.full((reps, 11), 400); n_before[:, 10] = before[:, 10] = 0
    for _ in range(60):
        n[:, :10] += 40; errors[:, :10] += rng.binomial(40, now[:, :10])
        _, parts, worse, within = compare_kinds(n_before, before, n, errors, arm, kind)
        assert np.isfinite(worse).all() and np.isfinite(within).all()
        sent |= worse >= 20
    assert len(parts) == 5 and sent.mean() <= 0.06


def test_without_controls_or_without_labels_nothing_is_claimed():
    c = compare([400]*3, [12]*3, [100]*3, [50]*3, [CANARY]*3)
    assert c.worse == c.within == 1 and c.bounds(0.05) == (-np.inf, np.inf)
    v, allowed = judge_labels(0.01, evidence(), 0.05, 0.05)
    assert v.holds is None and not allowed


def test_a_device_without_a_past_takes_part_all_the_same():
    n = np.full(340, 300); rng = np.random.default_rng(4); e = rng.binomial(n, np.where(ARM == CANARY, 0.06, 0.03))
    assert compare(np.zeros(340), np.zeros(340), n, e, ARM).worse > 1000 and compare(np.where(np.arange(340) % 2, 400, 0), np.where(np.arange(340) % 2, 12, 0), n, e, ARM).worse > 1000


def test_many_simulations_at_once_are_the_same_as_one_by_one():
    rng = np.random.default_rng(6)
    args = [rng.integers(50, 500, (4, 3, 340)) for _ in range(2)]
    errors = [rng.binomial(a, 0.03) for a in args]
    many = compare(args[0], errors[0], args[1], errors[1], ARM)
    assert all(np.isclose(compare(args[0][i, j], errors[0][i, j], args[1][i, j], errors[1][i, j], ARM).worse, many.worse[i, j]) for i in range(4) for j in range(3))
    kind = np.array(['a', 'b'])[np.arange(340) % 2]
    assert compare_kinds(args[0], errors[0], args[1], errors[1], ARM, kind)[2].shape == (4, 3)


# ---- guards

def evidence(**kw):
    given = dict(since=29_500_000, at=29_500_000 + 600, stratum=[f'plant-{i % 12}/{"pi" if i % 3 else "orin"}' for i in range(340)], arm=ARM, cohort=ARM == CANARY, n_before=[400]*340, errors_before=[12]*340,
                 n=[0]*340, errors=[0]*340, last_seen=[29_500_590]*340)
    return Evidence(**given | kw)


def some(canaries, controls): return np.r_[np.arange(17) < canaries, np.arange(323) < controls]


@pytest.mark.parametrize('name, field, bad, fine, limit', [('crashes', 'crashes', 1, 0, 0), ('memory', 'rss_mb', 400.0, 200.0, 300), ('drift', 'drift', 3, 2, 2)])
def test_a_guard_rings_when_canaries_go_bad_and_controls_do_not(name, field, bad, fine, limit):
    for canaries, controls, holds in ((0, 0, True), (1, 0, True), (4, 0, False), (4, 80, True), (0, 80, True)):
        v = judge_share(name, limit, evidence(**{field: np.where(some(canaries, controls), bad, fine)}), 0.005)
        assert v.holds is holds and v.said.startswith(f'{canaries} of 17 canaries') and f'{controls} of 323' in v.said


def test_one_device_that_crashes_all_the_time_is_one_bad_device():
    assert judge_share('crashes', 0, evidence(crashes=np.where(some(1, 0), 10_000, 0)), 0.05).holds


def test_the_latency_guard_counts_devices_whose_99th_percentile_is_above_the_limit():
    edges, fast, slow = [16, 32, 64], [500, 498, 2, 0], [500, 400, 70, 30]
    def at(limit, canaries): return judge_share('latency_p99', limit, evidence(latency=np.where(some(canaries, 0)[:, None], slow, fast), latency_edges=edges), 0.005)
    assert at(64, 5).holds is False and at(64, 0).holds and at(100, 5).holds                    # above all edges nothing is certain
    assert at(50, 5).holds is False                                                               # inside a bin: judged at its upper edge, where 3 % still are
    assert over_share(np.array([slow]), edges, 32)[0].tolist() == [100.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(0.2, 3), st.integers(0, 2**32 - 1))
def test_what_counts_as_slow_is_never_more_than_what_was_slow(limit, spread_, seed):
    rng = np.random.default_rng(seed)
    values, edges = rng.lognormal(3, spread_, 500), np.array([10., 20, 40, 80, 160])
    counts = np.bincount(np.searchsorted(edges, values, side='left'), minlength=6)
    assert over_share(counts[None], edges, limit)[0][0] <= (values > limit).sum()


def test_the_confidence_guard_compares_each_device_with_its_own_past():
    before, shifted = np.tile([100, 900], (340, 1)), np.where(some(6, 0)[:, None], [600, 400], [100, 900])
    assert judge_share('confidence', 0.1, evidence(confidence=shifted, confidence_before=before, confidence_edges=[.5]), 0.005).holds is False
    assert judge_share('confidence', 0.1, evidence(confidence=shifted//20, confidence_before=before//20, confidence_edges=[.5]), 0.005).holds       # 50 decisions show little
    odd = np.where(np.arange(340)[:, None] % 2, [500, 500], [100, 900])
    assert judge_share('confidence', 0.1, evidence(confidence=odd, confidence_before=odd, confidence_edges=[.5]), 0.005).holds
    assert judge_share('confidence', 0.1, evidence(confidence=odd, confidence_edges=[.5]), 0.005).holds is None


def test_a_distribution_stays_within_its_uncertainty_at_all_looks_together():
    rng = np.random.default_rng(8)
    draws, grid = rng.random((300, 2000)), np.linspace(0.02, 0.98, 49)
    n, out = np.arange(1, 2001), np.zeros(300, bool)
    for q in grid: out |= (np.abs(np.cumsum(draws <= q, 1)/n - q) > uncertainty(n, 0.05)).any(1)
    assert out.mean() <= 0.05


def test_devices_that_the_release_silenced_are_found_and_a_plant_on_holiday_is_not():
    seen = np.full(340, 29_500_000 + 2990)
    dead = np.where(some(5, 0), 29_500_030, seen)
    assert judge_share('silent', 24, evidence(at=29_503_000, last_seen=dead, arm=np.where(some(5, 0), NEITHER, ARM)), 0.005).holds is False
    holiday = np.where(np.arange(340) % 12 < 6, 29_500_030, seen)
    assert judge_share('silent', 24, evidence(at=29_503_000, last_seen=holiday), 0.005).holds
    long_gone = np.where(some(9, 0), 29_400_000, seen)
    v = judge_share('silent', 24, evidence(at=29_503_000, last_seen=long_gone), 0.005)
    assert v.holds and v.said.startswith('0 of 8 ')


def test_failed_installs_ring_without_controls():
    arm = np.where(some(8, 0), NEITHER, ARM)
    assert judge_share('failed', 10, evidence(failed=some(8, 0), arm=arm), 0.005).holds is False
    assert judge_share('failed', 10, evidence(failed=some(1, 0)), 0.005).holds and judge_share('failed', 10, evidence(failed=some(0, 0), arm=np.full(340, NEITHER)), 0.005).holds is None


def test_the_budget_of_errors_adds_up_and_is_kept():
    part = shares(['labels', *default_guards()], 0.05)
    assert sum(part.values()) == pytest.approx(0.05) and part['labels'] == 0.025
    rang = 0
    for s in range(150):                                   # crashes, drift and silence that have nothing to do with the release, ten looks
        rng = np.random.default_rng(s)
        arm, crash, alarm = rng.permutation(ARM), np.where(np.arange(340) % 12 == 0, 0.2, 0.01), 0.03
        at = [rng.binomial(1, np.broadcast_to(p, (10, 340))).cumsum(0) for p in (crash, alarm)]
        rang += any(v.holds is False for look in range(10) for v in judge(evidence(arm=arm, cohort=arm == CANARY, crashes=at[0][look], drift=at[1][look]), {'crashes': 0, 'drift': 0}, 0.05)[0])
    assert rang <= 7


def test_a_fleet_that_differs_less_than_the_ratio_does_not_ring_however_large():
    value = share_evidence(120, 1000, RATIO*1/(RATIO*1 + 10))          # 12 % of a thousand canaries, 10 % of ten thousand controls
    assert value < 1


@pytest.mark.parametrize('text', ['latency=50', 'latency_p99', 'latency_p99=', 'latency_p99=-1ms', 'memory=nan', 'failed=100%', 'confidence=1', 'labels=0.01', 'crashes=1e400', '=3', 'crashes=0x10'])
def test_a_guard_that_makes_no_sense_is_refused(text):
    with pytest.raises(EdgenbError): parse_guards([text])


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_text_makes_the_parser_of_guards_fail_otherwise(text):
    try: assert set(parse_guards([text])) <= set(GUARDS)
    except EdgenbError: pass


# ---- evidence

def test_evidence_is_the_same_after_it_was_saved():
    e = evidence(crashes=np.arange(340), latency=np.ones((340, 4), int), latency_edges=[1, 2, 3])
    assert Evidence.from_bytes(e.to_bytes()).to_bytes() == e.to_bytes()


@pytest.mark.parametrize('wrong', [{'n': [1]*340, 'errors': [2]*340}, {'crashes': [0]*339}, {'latency': np.ones((340, 4), int), 'latency_edges': [1, 2]}, {'latency': np.ones((340, 4), int)}, {'arm': [1]}])
def test_evidence_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(EdgenbError): evidence(**wrong)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000))
def test_bytes_that_are_no_evidence_are_refused_in_words(junk, at):
    data = evidence().to_bytes()
    for broken in (junk, data[:at], data[:at] + junk + data[at + len(junk):]):
        try: Evidence.from_bytes(broken)
        except EdgenbError: pass
