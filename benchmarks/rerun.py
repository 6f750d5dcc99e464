"What a second, unchanged run of the wafer recipe costs: seconds of both, in a workspace of its own. `python benchmarks/rerun.py [-p NAME VALUE ...]`"
import subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(*given):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder)/'settings.ini').write_text((ROOT/'settings.ini').read_text())
        (Path(folder)/'nbs').symlink_to(ROOT/'nbs')
        seconds = []
        for _ in range(3):
            t = time.perf_counter()
            subprocess.run([str(Path(sys.executable).parent/'edgenb'), 'run', 'wafer', '--no-progress', *given], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - t)
    print('| run | seconds | share of the first |\n|---|---|---|')
    for name, s in zip(('first', 'second, all rooms skipped', 'third, all rooms skipped'), seconds): print(f'| {name} | {s:.1f} | {s/seconds[0]:.3f} |')


if __name__ == '__main__': main(*sys.argv[1:])
