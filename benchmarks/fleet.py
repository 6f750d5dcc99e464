"""A thousand rehearsals of a campaign, beside what people have otherwise; and what large fleets cost to simulate.

`python benchmarks/fleet.py [rates] [people] [size] [speed] [--seeds 1000] [--workers 2] [--folder rehearsals] [--scheduler ADDRESS]`. Everything is simulated: what is assumed of the fleets is `edgenb.fleet.world.World` with its
defaults (340 devices in 12 plants, 3 % wrong decisions, one in twenty labelled after 6 hours, a fifth behind poor links, ...). Seeds start at 1,000,000; none of them was looked at while the simulator or the controller was made. Results are
kept in the folder, and an interrupted run goes on.

`rates`: a good model, models that are wrong in 6 % and in 4 % instead of 3 %, and one that is so on one of three hardware classes (a fifth of the fleet), each judged by `decide`, by a gate on installs and by a z-test looked at every hour.
`people`: what becomes of a good model when the controller cannot decide in time and asks: somebody answers, nobody does, or nobody does and a stage may last three days only, not ten. `size`: the same at 10,000 devices. `speed`: CPU seconds of one campaign of 10,000 and of 1,000,000 devices.
"""
import argparse, resource, time
from dataclasses import replace
from edgenb.fleet.campaign import decide, policy
from edgenb.fleet.simulate import installs, peeked, rehearse, rehearse_many, summary
from edgenb.fleet.world import World

FIRST = 1_000_000
WORLDS = {'good': World(), '3 -> 6 %': World(change=0.03), '3 -> 4 %': World(change=0.01), '3 -> 6 % on rb5': World(change=0.03, worse_on=('rb5',))}
JUDGES = {'decide': decide, 'installs': installs, 'peeked z': peeked}
SHORT = {'deadline_hours': 72.0}


def share(s): return f"{s['share']:7.1%} [{s['low']:.1%}, {s['high']:.1%}]"
def middle(m, form='{:,.0f}'): return '-' if m is None else form.format(m['median']) + ' (' + form.format(m['p90']) + ')'

HEAD = f"{'world':18}{'judge':26}{'sent back':>24}{'reached <= 6 % of fleet':>26}{'ever ran it':>18}{'device-hours':>20}{'found after, h':>16}{'decided after, h':>18}{'all there, h':>14}{'asked':>7}{'stuck':>6}"

def line(world, judge, rows):
    s = summary(rows)
    print(f"{world:18}{judge:26}{share(s['rolled-back']):>24}{share(s['within']):>26}{middle(s['exposed_share'], '{:.1%}'):>18}{middle(s['exposed_device_h']):>20}{middle(s['detected_h']):>16}{middle(s['hours']):>18}{middle(s['all_there_h']):>14}"
          f"{middle(s['asked_a_person'], '{:.0f}'):>7}{s['stuck'] + s['still_new'] + s['running']['count'] + s['paused']['count']:>6}", flush=True)


def rates(a):
    print(f'{a.seeds} seeds each, 340 devices in 12 plants, simulated; shares with 95 % intervals, else median (90 % quantile). stuck: devices or campaigns without an end, or devices on a model that was sent back\n{HEAD}')
    for w, world in WORLDS.items():
        for j, judge in JUDGES.items(): line(w, j, rehearse_many(world, range(FIRST, FIRST + a.seeds), judge, **a.how))

def people(a):
    print(f'{a.seeds} seeds each, 340 devices, simulated\n{HEAD}')
    for w, world in list(WORLDS.items())[:2]:
        line(w, 'somebody answers', rehearse_many(world, range(FIRST, FIRST + a.seeds), **a.how))
        line(w, 'nobody answers', rehearse_many(world, range(FIRST, FIRST + a.seeds), person_h=None, **a.how))
        line(w, 'three days, nobody', rehearse_many(world, range(FIRST, FIRST + a.seeds), person_h=None, policy=replace(policy(340), **SHORT), **a.how))

def size(a):
    few = max(1, a.seeds//5)
    print(f'{few} seeds each, 10,000 devices in 100 plants, simulated\n{HEAD}')
    for w, world in WORLDS.items(): line(w, 'decide', rehearse_many(replace(world, devices=10_000, plants=100), range(FIRST, FIRST + few), **a.how))

def speed(a):
    print('one campaign of a good model, looked at every hour, until two weeks after its end; one process\n   devices  CPU s  wall s  peak MB    events  ended        after, h')
    for devices in (10_000, 1_000_000):
        t, cpu = time.perf_counter(), time.process_time()
        o = rehearse(World(devices=devices, plants=devices//100), FIRST, pictures=False).outcome
        print(f"{devices:10,} {time.process_time() - cpu:6.1f} {time.perf_counter() - t:7.1f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:8,.0f} {o['events']:9,}  {o['ended']:12} {o['hours']:.0f}", flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['rates', 'people', 'size', 'speed'])
    parser.add_argument('--seeds', type=int, default=1000); parser.add_argument('--workers', type=int, default=2); parser.add_argument('--folder', default='rehearsals'); parser.add_argument('--scheduler', default='')
    a = parser.parse_args()
    a.how = {'workers': a.workers, 'folder': a.folder, 'scheduler': a.scheduler}
    for what in a.what: {'rates': rates, 'people': people, 'size': size, 'speed': speed}[what](a)
