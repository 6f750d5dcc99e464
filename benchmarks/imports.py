"What `import edgenb` and `edgenb --help` cost, against bare Python: interleaved, so that a busy machine slows all alike."
import statistics, subprocess, sys, time
from pathlib import Path

EDGENB = str(Path(sys.executable).parent/'edgenb')
COMMANDS = {'python -c pass': [sys.executable, '-c', 'pass'], 'python -c "import edgenb"': [sys.executable, '-c', 'import edgenb'],
            'python -c "import edgenb.ship" (a device)': [sys.executable, '-c', 'import edgenb.ship'], 'edgenb --help': [EDGENB, '--help'], 'edgenb recipes': [EDGENB, 'recipes']}


def main(rounds=21):
    seconds = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            t = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - t)
    bare = statistics.median(seconds['python -c pass'])
    print('| command | median ms | fastest ms | times bare Python |\n|---|---|---|---|')
    for name, s in seconds.items(): print(f'| `{name}` | {statistics.median(s)*1e3:.0f} | {min(s)*1e3:.0f} | {statistics.median(s)/bare:.1f} |')


if __name__ == '__main__': main()
