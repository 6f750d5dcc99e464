"A simulated fleet: each device in one state, the same fate whatever the order, nobody stuck."
import heapq, math
import numpy as np
import pytest
from edgenb.fleet.world import BACK, FETCHING, INSTALLING, NEW, OFF, OLD, READY, REFUSED, STATES, Devices, World, advance, make_fleet, publish, stream

ROUGH = World(devices=120, plants=4, poor_links=0.4, silent=0.05, power_loss=0.1, bad_disks=0.1, skewed=0.2, unhealthy=0.1, worse_on=('rb5',), fetch_h=0.5)   # more goes wrong than in a real fleet


class Slow:
    "The same fleet, one device and one event at a time, written without arrays."
    def __init__(self, fleet): self.f, self.now, self.things, self.events, self.mode, self.asked, self.order = fleet, 0.0, [Thing(fleet, i) for i in range(len(fleet))], [], 'running', [False]*len(fleet), 0
    def push(self, x):
        self.order += 1
        if x.due < math.inf: heapq.heappush(self.events, (x.due, self.order, x.i))
    def publish(self, asked, mode):
        self.asked, self.mode = list(asked), mode
        for x in self.things:
            if x.due == math.inf and self.f.up_rate[x.i] > 0 and ((x.state == 'old' and asked[x.i] and mode == 'running') or (x.state == 'new' and mode == 'rolled-back')):
                x.due = self.now + x.draw()*self.f.world.poll_h
                self.push(x)
    def advance(self, until):
        while self.events and self.events[0][0] < until:
            t, _, i = heapq.heappop(self.events)
            x = self.things[i]
            getattr(x, x.state)(t, self.asked[i] and self.mode == 'running', self.mode == 'rolled-back')
            self.push(x)
        self.now = until


class Thing:
    def __init__(self, fleet, i): self.f, self.w, self.i, self.state, self.due, self.n, self.tries, self.link_at, self.link, self.since, self.left, self.seen = fleet, fleet.world, i, 'old', math.inf, 0, 0, -1e9, True, math.inf, math.inf, -math.inf
    def draw(self):
        self.n += 1
        return float(stream(self.f.seed, self.i, self.n - 1))
    def wait(self, rate): return -math.log(self.draw())/rate if rate > 0 else self.draw()*math.inf
    def up(self, t):
        a, b = self.f.up_rate[self.i], self.f.down_rate[self.i]
        self.link = self.draw() < a/(a + b) + (self.link - a/(a + b))*math.exp(-(a + b)*(t - self.link_at))
        self.link_at = t
        return self.link
    def dark(self, t):
        self.due = t + self.wait(self.f.up_rate[self.i])
        self.link_at, self.link = (self.due, True) if self.due < math.inf else (t, False)
    def opens(self, t):
        w = (self.f.midnight[self.i] + 22) % 24
        return t if not self.f.windowed[self.i] or (t - w) % 24 < 6 else t + 24 - (t - w) % 24
    def fetch_on(self, t):
        lasts = self.wait(self.f.down_rate[self.i])
        if lasts >= self.rest: self.due, self.rest = t + self.rest, 0.0; self.link_at, self.link = self.due, True
        else: self.rest -= lasts; self.dark(t + lasts)
    def old(self, t, wanted, back):
        if not self.up(t): return self.dark(t)
        if self.f.clock_ok[self.i] > t: self.due = min(self.f.clock_ok[self.i], t + 24); return
        self.seen = t
        if not wanted: self.due = math.inf; return
        self.state, self.rest = 'fetching', self.w.fetch_h
        self.fetch_on(t)
    def fetching(self, t, wanted, back):
        self.seen = t
        if not wanted: self.state, self.due = 'old', math.inf
        elif self.rest <= 0: self.state, self.due = 'ready', self.opens(t)
        else: self.fetch_on(t)
    def ready(self, t, wanted, back):
        if self.opens(t) > t: self.due = self.opens(t); return
        if self.up(t):
            self.seen = t
            if not wanted: self.state, self.due = 'old', math.inf; return
        elif t - self.seen > self.w.recheck_h: return self.dark(t)
        self.state, self.due = 'installing', t + self.w.install_h
    def installing(self, t, wanted, back):
        u, v = self.draw(), self.draw()
        if u < self.w.power_loss: self.tries += 1; self.state, self.due = 'off', t + self.wait(1/self.w.outage_h); return
        if self.f.bad_disk[self.i] and v < 0.8:
            self.tries += 1
            self.state, self.due = ('refused', math.inf) if self.tries >= self.w.tries else ('old', t + self.tries)
        elif self.f.unhealthy[self.i]: self.state, self.due = 'refused', math.inf
        else: self.state, self.since, self.due = 'new', t, t + self.draw()*self.w.poll_h if back else math.inf
    def off(self, t, wanted, back): self.state, self.due = ('refused', math.inf) if self.tries >= self.w.tries else ('old', t + self.w.poll_h)
    def new(self, t, wanted, back):
        if not self.up(t): return self.dark(t)
        self.seen, self.due = t, math.inf
        if back: self.state, self.left = 'back', t


STORY = ((0, 0.2, 'running'), (30, 0.2, 'paused'), (40, 0.6, 'running'), (70, 1.0, 'running'), (75, 1.0, 'rolled-back'), (200, 1.0, 'rolled-back'))

@pytest.mark.parametrize('seed', range(5))
def test_all_devices_at_once_meet_the_same_fate_as_one_by_one(seed):
    fleet = make_fleet(ROUGH, seed)
    fast, slow, rank = Devices(fleet), Slow(fleet), np.random.default_rng(seed).random(len(fleet))
    for n, (at, share, mode) in enumerate(STORY):
        for d, go in ((fast, publish), (slow, Slow.publish)): go(d, rank <= share, mode)
        until = STORY[n + 1][0] if n + 1 < len(STORY) else 400
        advance(fast, until); slow.advance(until)
        assert [STATES[s] for s in fast.state] == [x.state for x in slow.things]
        for name in ('due', 'since', 'left', 'seen'): np.testing.assert_allclose(getattr(fast, name), [getattr(x, name) for x in slow.things], rtol=1e-9)
        assert fast.drawn.tolist() == [x.n for x in slow.things]
    assert {STATES[s] for s in fast.state} >= {'old', 'back', 'refused'}


@pytest.mark.parametrize('seed', range(40))
def test_nobody_is_ever_between_two_states_or_stuck_in_one(seed):
    fleet, rng = make_fleet(ROUGH, seed), np.random.default_rng(seed)
    d, rank = Devices(fleet), rng.random(len(fleet))
    for _ in range(12):
        publish(d, rank <= rng.random(), str(rng.choice(['running', 'running', 'paused', 'rolled-back'])))
        advance(d, d.now + float(rng.exponential(20)))
        assert sum(d.counts().values()) == len(fleet)
        on_the_way = np.isin(d.state, (FETCHING, READY, INSTALLING, OFF))
        assert (np.isfinite(d.due) | ~on_the_way).all(), 'somebody is on the way and nothing will ever happen to him'
        assert (d.due >= d.now).all() and (d.tries <= fleet.world.tries).all()
        assert (np.isfinite(d.since) == np.isin(d.state, (NEW, BACK))).all() and (np.isfinite(d.left) == (d.state == BACK)).all()
    publish(d, np.ones(len(fleet), bool), 'rolled-back')
    advance(d, d.now + 24*90)
    assert set(d.state) <= {OLD, BACK, REFUSED} and (d.due == math.inf).all()      # three months later nobody runs the bad model who can be reached


def test_a_power_loss_leaves_the_old_model_and_another_try():
    fleet = make_fleet(World(devices=2000, plants=4, power_loss=0.5, bad_disks=0, silent=0, skewed=0, windowed=0, poor_links=0), 1)
    d = Devices(fleet)
    publish(d, np.ones(2000, bool))
    advance(d, 24*30)
    assert set(d.state) == {NEW, REFUSED} and 0.09 < (d.state == REFUSED).mean() < 0.16      # three losses in a row: one in eight
    assert d.losses == d.tries.sum() and (d.tries[d.state == REFUSED] == 3).all()


def test_a_clock_that_runs_ahead_delays_an_update_and_does_not_prevent_it():
    fleet = make_fleet(World(devices=2000, plants=4, skewed=1.0, bad_disks=0, silent=0, windowed=0, poor_links=0, power_loss=0), 1)
    d, ahead = Devices(fleet), fleet.clock_ok > 24
    publish(d, np.ones(2000, bool))
    advance(d, 24)
    assert ahead.sum() > 400 and not (d.state[ahead] == NEW).any() and (d.state[fleet.clock_ok == 0] == NEW).all()
    advance(d, 24*60)
    assert (d.state == NEW).mean() > 0.999


def test_a_paused_campaign_installs_nothing_more_where_the_link_is_up():
    fleet = make_fleet(World(devices=500, plants=4, poor_links=0, down_h=1e-3, windowed=0.5), 1)
    d = Devices(fleet)
    publish(d, np.ones(500, bool)); advance(d, 2)
    publish(d, np.ones(500, bool), 'paused')
    advance(d, 3); there = d.counts()['new']; advance(d, 100)
    assert d.counts()['new'] == there > 100 and d.counts()['ready'] == 0
    publish(d, np.ones(500, bool)); advance(d, 200)
    assert d.counts()['new'] > 480


# ---- campaigns

from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from edgenb.fleet.campaign import policy  # noqa: E402
from edgenb.fleet.simulate import installs, peeked, rehearse, rehearse_many, summary  # noqa: E402

SMALL = World(devices=80, plants=4)


def test_a_seed_gives_the_same_campaign_and_another_seed_another():
    a, b, c = rehearse(SMALL, 5), rehearse(SMALL, 5), rehearse(SMALL, 6)
    assert a.outcome == b.outcome and a.log == b.log and (a.grid == b.grid).all() and a.looks == b.looks
    assert a.outcome != c.outcome


@pytest.mark.parametrize('judge', [installs, peeked])
def test_every_look_counts_every_device_once_and_exposure_never_shrinks(judge):
    r = rehearse(ROUGH, 2, judge)
    assert (r.grid.sum((1, 2, 3)) == ROUGH.devices).all() and len(r.grid) == len(r.looks) and (np.diff([l['exposed'] for l in r.looks]) >= 0).all()


def test_only_devices_that_are_asked_ever_run_the_new_model():
    from edgenb.fleet.cohorts import cohort
    from edgenb.fleet.simulate import begin
    r = rehearse(World(change=0.1), 3)
    assert r.campaign.state == 'rolled-back' and r.campaign.stage == 0
    _, _, c, inventory = begin(r.world, 3, policy(340))
    assert cohort(inventory, c.to_dict()).sum() == 17 >= r.outcome['exposed'] and c.cutoffs == r.campaign.cutoffs


@pytest.mark.parametrize('seed', range(12))
def test_no_campaign_hangs_even_if_nobody_ever_answers_and_everything_goes_wrong(seed):
    rough = replace(ROUGH, labelled=(0.0, 0.05)[seed % 2], change=(0.0, 0.03)[seed//2 % 2], silent=0.3, poor_links=0.7)
    r = rehearse(rough, seed, person_h=None, every_h=6.0)
    assert r.campaign.over and r.outcome['stuck'] == 0, r.log
    if r.campaign.state == 'rolled-back': assert r.outcome['still_new'] == 0


def test_a_model_that_is_worse_on_one_kind_of_hardware_is_found_although_the_others_are_fine():
    r = rehearse(World(change=0.1, worse_on=('rb5',)), 4)
    assert r.campaign.state == 'rolled-back' and r.outcome['exposed_share'] <= 0.06 and 'rb5' in r.campaign.reason


def test_a_guard_without_labels_stops_what_no_label_would_have_shown_in_time():
    r = rehearse(World(labelled=0.0, unsure_change=0.5), 4)
    assert r.campaign.state == 'rolled-back' and r.campaign.reason.startswith('confidence') and r.outcome['hours'] <= 3


def test_the_gate_of_peers_ships_a_model_that_is_twice_as_wrong():
    rows = rehearse_many(World(change=0.03), range(5), installs)
    assert all(r['ended'] == 'complete' and r['exposed_share'] > 0.9 for r in rows)


def test_a_bad_model_reaches_few_and_a_good_one_arrives():     # 1,000 seeds of each: benchmarks/fleet.py
    bad, good = (summary(rehearse_many(World(change=c), range(2000, 2012), policy=policy(340))) for c in (0.03, 0.0))
    assert bad['within']['count'] == bad['rolled-back']['count'] == 12 and bad['stuck'] == bad['still_new'] == 0
    assert good['complete']['count'] >= 11 and good['exposed_share']['median'] > 0.95


def test_interrupted_rehearsals_go_on_where_they_were(tmp_path, monkeypatch):
    import edgenb.fleet.simulate as simulate
    whole, true, calls = rehearse_many(SMALL, range(6), installs), simulate.rehearse, []
    def pieces(world, seeds, *a):
        for s in seeds:
            calls.append(s)
            if len(calls) == 4: raise KeyboardInterrupt
            yield [{'seed': s} | true(world, s, installs, pictures=False).outcome]
    monkeypatch.setattr(simulate, '_pieces', pieces)
    with pytest.raises(KeyboardInterrupt): rehearse_many(SMALL, range(6), installs, folder=tmp_path)
    file, = tmp_path.iterdir()
    assert calls == [0, 1, 2, 3] and len(file.read_text().splitlines()) == 3
    with open(file, 'a') as f: f.write('{"seed": 3, "ended": "comp')      # killed while it wrote
    assert rehearse_many(SMALL, range(6), installs, folder=tmp_path) == whole and calls == [0, 1, 2, 3, 3, 4, 5]
    assert rehearse_many(SMALL, range(6), installs, folder=tmp_path) == whole and len(calls) == 7


def test_other_worlds_judges_and_policies_are_kept_apart(tmp_path):
    for world in (SMALL, World(devices=80, plants=5)):
        for judge in (installs, partial(installs, soak_h=2.0)): rehearse_many(world, [0], judge, folder=tmp_path)
    rehearse_many(SMALL, [0], installs, folder=tmp_path, policy=replace(policy(80), margin=0.02))
    assert len(list(tmp_path.iterdir())) == 5


def test_processes_give_what_one_process_gives():
    assert rehearse_many(SMALL, range(4), installs, workers=2) == rehearse_many(SMALL, range(4), installs)


def test_dask_gives_what_one_process_gives():
    pytest.importorskip('distributed')
    assert rehearse_many(SMALL, range(4), installs, workers=1, scheduler='local') == rehearse_many(SMALL, range(4), installs)
