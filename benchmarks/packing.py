"""Measure how full data/bin_packing.py makes rows, and how long it takes: `python -m benchmarks.packing`.

The table of docs/sft_data.md; CPU-seconds on one thread.
"""

from __future__ import annotations

import time

import numpy as np

from data.bin_packing import best_fit, pack_samples

CASES = {
    "1,000,000 log-normal, median 400": (lambda rng: rng.lognormal(np.log(400), 1.0, 1_000_000), 4096),
    "8,000,000 log-normal, median 6,600": (lambda rng: rng.lognormal(np.log(6600), 0.8, 8_000_000), 32768),
    "300,000 uniform 1 to 4,096": (lambda rng: rng.randint(1, 4097, 300_000), 4096),
    "1,000,000 uniform 712 to 1,572": (lambda rng: rng.randint(712, 1573, 1_000_000), 4096),
    "8,000 uniform 70 to 105": (lambda rng: rng.randint(70, 106, 8000), 512),
}


def main() -> None:
    print(f"{'lengths':<40}{'row':>8}{'dropped':>10}{'fill':>10}{'best fit':>10}{'CPU-s':>8}")
    for name, (draw, seq_len) in CASES.items():
        lengths = np.maximum(draw(np.random.RandomState(0)).astype(np.int64), 2)
        samples = np.stack([lengths + 1, np.ones_like(lengths)], axis=1).astype(np.int32)
        start = time.process_time()
        packing = pack_samples(samples, seq_len)
        seconds = time.process_time() - start
        fitting = np.sort(lengths[lengths <= seq_len])[::-1]
        best_fit_fill = fitting.sum() / (seq_len * (best_fit(fitting, seq_len).max() + 1))
        dropped = packing.pieces.dropped
        print(f"{name:<40}{seq_len:>8,}{dropped:>10,}{packing.fill:>10.2%}{best_fit_fill:>10.2%}{seconds:>8.1f}")


if __name__ == "__main__":
    main()
