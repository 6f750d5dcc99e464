"""The wafer recipe's network and training on ELPV over several seeds, beside the published figures: reference, FP32 ONNX and INT8 ONNX.

No image is held back for the field here, so 8 % more are trained on than in the recipe. The settings were chosen on random splits of the same images with
other seeds; the test images of the splits below were not looked at for that, but the splits overlap.

`python benchmarks/elpv.py [--seeds 10 11 12] [--split published together] [--threads 2]`. `published` is the random 75/25 split of the published results, in which near-duplicates
may lie across splits; `together` keeps them in one split. Every seed is a split and a training of its own. Rooms are kept in runs/elpv-benchmark, so it can be interrupted.
"""
import argparse
import numpy as np
from scipy.stats import t
from edgenb.compile import compile
from edgenb.core import Run, settings
from edgenb.data import data
from edgenb.squeeze import squeeze
from edgenb.tune import tune
from edgenb.verify import verify

GATES = ['label accuracy', 'leakage']
METRICS = {'accuracy': 'accuracy', 'auc': 'AUC', 'detection rate': 'detection', 'false-positive rate': 'false positives'}


def one(split, seed, threads):
    run = Run(settings().runs/'elpv-benchmark'/f'{split}-{seed}')
    data(run, source='bundled:elpv', negative='functional', keep_together=split == 'together', seed=seed)
    certificate = run.card('data').result['certificate']
    tune(run, size=224, early_size=160, early_epochs=7, num_train_epochs=12, accept_gates=[g for g in GATES if not next(x for x in certificate['gates'] if x['gate'] == g)['passed']],
         num_threads=threads, seed=seed)
    squeeze(run, seed=seed); compile(run)
    return run, verify(run, latency_budget_ms=50, seed=seed)


def main():
    p = argparse.ArgumentParser(); p.add_argument('--seeds', type=int, nargs='+', default=[10, 11, 12]); p.add_argument('--split', nargs='+', default=['published', 'together']); p.add_argument('--threads', type=int, default=2)
    args = p.parse_args()
    for split in args.split:
        found = {}
        print(f'\n### Split: {split} (real images)\n\n| seed | artifact | accuracy | AUC | detection rate | false-positive rate | difference | mono | poly | verdict |\n|---|---|---|---|---|---|---|---|---|---|')
        for seed in args.seeds:
            run, card = one(split, seed, args.threads)
            for r in card.result['rows']:
                rates = [f"{r['also'][m]['value']:.3f} [{r['also'][m]['low']:.3f}, {r['also'][m]['high']:.3f}]" for m in METRICS]
                groups = [f"{card.result['by_group'][r['artifact']][g]['value']:.3f}" for g in ('mono', 'poly')]
                found.setdefault(r['artifact'], []).append([r['also'][m]['value'] for m in METRICS])
                print(f"| {seed} | {r['artifact']} | {' | '.join(rates)} | {r['delta']:+.4f} [{r['delta_low']:+.4f}, {r['delta_high']:+.4f}] | {' | '.join(groups)} | {r['verdict']} |", flush=True)
        print('\n| mean over seeds, 95 % t-interval (splits overlap) | ' + ' | '.join(METRICS.values()) + ' |\n|---|' + '---|'*len(METRICS))
        for name, values in found.items():
            mean, n = np.mean(values, 0), len(values)
            half = t.ppf(0.975, n - 1)*np.std(values, 0, ddof=1)/np.sqrt(n) if n > 1 else np.full(len(METRICS), np.nan)
            print(f'| {name} | ' + ' | '.join(f'{m:.4f} [{m - h:.4f}, {m + h:.4f}]' for m, h in zip(mean, half)) + ' |')
    print('\nPublished, random split (Deitsch et al. 2019): CNN 0.8842 accuracy, SVM 0.8244.')


if __name__ == '__main__': main()
