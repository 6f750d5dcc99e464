"Power lost at every operation of an install, and again during recovery; and real kills. `python benchmarks/crash.py [STATES [KILLS]]` (default 12000 states, 100 kills)"
import sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from test_fleet_agent import kills
from test_fleet_crash import FAST, STORIES, Story, explore, lies, record, states
from crashfs import lay_out
import random, shutil


def main(wanted=12_000, rounds=100):
    print('| story | operations | distinct states tried | not servable, not whole or not arriving | CPU s |\n|---|---|---|---|---|')
    total = bad = 0
    for name in STORIES:
        with tempfile.TemporaryDirectory(dir=FAST) as here:
            story, t, share = Story(name, Path(here)), time.process_time(), wanted//len(STORIES) + 1
            operations = len(record(story).ops)
            first, problems = explore(story, 10**6, 0)                        # every state of one crash
            seen = set()
            second, more = explore(story, 0, max(0, share - first), seed=1, seen=seen)     # a second crash while it recovers
            total, bad = total + first + second, bad + len(problems) + len(more)
            print(f'| {name} | {operations} | {first:,} + {second:,} | {len(problems) + len(more)} | {time.process_time() - t:.0f} |', flush=True)
            for p in [*problems, *more][:3]: print('   ', p)
    print(f'\n{total:,} states in all, {bad} bad')
    for kind in ('file', 'folder'):
        with tempfile.TemporaryDirectory(dir=FAST) as here:
            story, found, n = Story('update', Path(here)), 0, 0
            for _, s in states(record(story, deaf_to=kind), random.Random(0)):
                n += 1
                lay_out(s, Path(here)/'look'); found += bool(lies(Path(here)/'look')); shutil.rmtree(Path(here)/'look')
            print(f'the same update without its syncs of a {kind}: the journal or the metadata are wrong in {found:,} of {n:,} states')
    if rounds:
        with tempfile.TemporaryDirectory(dir=FAST) as here: print(f'{kills(Path(here), rounds//2, seed=1)} SIGKILLs of a running agent over two installs: 0 journals that lie, both arrived')


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
