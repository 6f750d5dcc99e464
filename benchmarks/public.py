"""The networks of these notebooks on public data (C-MAPSS FD001, SKAB, dissolved gases), with the settings of the functions, beside published figures.

`EDGENB_SHARED_DATA=... python benchmarks/public.py [cmapss] [skab] [dga] [--seeds 0 1 2] [--each]`. The files are not part of the repository; where they come from is in nbs/34_public.ipynb.
A seed is another split of the training engines, another training. `--each` builds 8 bits for each of SKAB's 34 networks as well, which takes minutes. Settings were chosen on training engines and rows alone.
"""
import argparse, time
from edgenb.public import cmapss, dga, public_folder, public_table, skab

FOLDERS = {'cmapss': 'cmapss_fd001', 'skab': 'skab', 'dga': 'dga_faults'}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('which', nargs='*', default=list(FOLDERS), metavar='which', help=f"{', '.join(FOLDERS)} (default: all)"); p.add_argument('--seeds', type=int, nargs='+', default=[0]); p.add_argument('--each', action='store_true')
    args = p.parse_args()
    import torch
    torch.set_num_threads(1)
    for name in args.which:
        folder = public_folder(FOLDERS[name])
        if not folder.is_dir(): print(f'\n{name} is not at {folder}: set EDGENB_SHARED_DATA'); continue
        for seed in args.seeds:
            start = time.perf_counter()
            found = skab(folder, seed=seed, each_runtimes=('onnxruntime', 'litert') if args.each else ()) if name == 'skab' else {'cmapss': cmapss, 'dga': dga}[name](folder, seed=seed)
            print(f'\n### {name}, seed {seed} ({time.perf_counter() - start:.0f} s)\n\n{public_table(found["rows"] + found.get("per_fault", []))}', flush=True)
            if 'repeats' in found: print(f'\n{found["repeats"]}')


if __name__ == '__main__': main()
