"""The coder of mentions on CodiEsp, as fitted and as shipped, beside a word baseline fitted in the same run, GPT-4's published codes and published figures.

`EDGENB_SHARED_DATA=... python benchmarks/codiesp.py [es] [en] [--part dev] [--seed 0] [--no-baseline]`. The files are not part of the repository; where they come from is in nbs/51_codiesp.ipynb.
`--part dev` fits on the training part and scores the development part: choices are made there. The test part is for the end.
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from edgenb.codiesp import codiesp_case, codiesp_folder, codiesp_table
from edgenb.ranking import review_effort
from edgenb.runtime import size_mb

ALONE = '''
import json, os, sys, time
from edgenb.measure import peak_memory_mb
from edgenb.mentions import Coder
from edgenb.notes import read_notes
notes, start = read_notes(sys.argv[2], sys.argv[3]), time.process_time()
coder = Coder.load(sys.argv[1])
loaded, start = time.process_time() - start, time.process_time()
for n in notes: coder.rank(n)
print(json.dumps({'load': loaded, 'ms': 1000*(time.process_time() - start)/len(notes), 'mb': peak_memory_mb(os.getpid())}))
'''


def alone(coder, folder, language):
    "What the shipped coder takes in a process of its own, on development notes: no torch there."
    with tempfile.TemporaryDirectory() as scratch:
        path = coder.save(f'{scratch}/coder')
        found = json.loads(subprocess.run([sys.executable, '-c', ALONE, str(path), str(folder/'dev'), language], check=True, capture_output=True, text=True).stdout)
        return f"shipped: {size_mb(path):.2f} MB on disk, {found['load']:.2f} s of processor time to load, {found['ms']:.1f} ms of it a note, {found['mb']:.0f} MB of memory at most"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('languages', nargs='*', default=['es', 'en'], metavar='language', help='es, en (default: both)'); p.add_argument('--part', default='test', choices=('dev', 'test'))
    p.add_argument('--seed', type=int, default=0); p.add_argument('--no-baseline', action='store_true')
    args = p.parse_args()
    folder = codiesp_folder()
    if not folder.is_dir(): raise SystemExit(f'CodiEsp is not at {folder}: set EDGENB_SHARED_DATA')
    for language in args.languages:
        start = time.perf_counter()
        found = codiesp_case(folder, language, part=args.part, seed=args.seed, baseline=not args.no_baseline)
        print(f'\n### {language}, {args.part}, seed {args.seed} ({time.perf_counter() - start:.0f} s, peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MB)\n\n{codiesp_table(found)}', flush=True)
        for system, rows in found['rows'].items():
            print(f'\n{system}, {found["coders"][system].how}\n{alone(found["shipped"][system], folder, language)}')
            for r in rows:
                costs = ''.join(f', {name} {r[key]:.1f}' for key, name in (('seconds', 'seconds to fit'), ('network_kb', 'network kB'), ('lexicon_terms', 'terms')) if key in r)
                checked = f", of what it suggests {r['right'].mean():.3f} is right, and {review_effort(r['confidence'], r['right'], 0.2):.3f} once the least sure fifth is checked (if the checker is right)" if r['calibration_error'] is not None else ''
                less = f", F1 of the first less its own {r['behind_fp32']['difference']:+.3f} ({r['behind_fp32']['interval'][0]:+.3f} to {r['behind_fp32']['interval'][1]:+.3f})" if 'behind_fp32' in r else ''
                print(f"- {r['system']}: unseen codes {r['unseen']['codes']}, of which found {r['unseen']['recall']:.3f}{less}{checked}{costs}")


if __name__ == '__main__': main()
