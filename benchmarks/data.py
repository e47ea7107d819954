"""Measure the loader: tokens per second from litdata chunks on disk.

    python benchmarks/data.py [--tokens 2000000] [--steps 100]

It reads the mixture's rows, packed and masked by document, as train.py does. It measures wall time, because workers are
other processes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not this file

from benchmarks.common import append_jsonl, table

CASES = [(seq_len, workers) for seq_len in (256, 4096) for workers in (0, 2)]


def measure(root: Path, seq_len: int, workers: int, steps: int, rows: int) -> float:
    """Return the tokens per second over `steps` steps, after five that do not count."""
    from benchmarks.corpus import composed, overrides
    from data.pretrain import PretrainData
    from data.steps import StepLoader
    from nb_lightning.config.compose import plan_of

    arguments = overrides(root, steps + 5, seq_len=seq_len, rows=rows, packed=True)
    cfg = composed([*arguments, f"data.workers={workers}"])
    plan = plan_of(cfg.stage).in_whole_steps()
    data = PretrainData(cfg, plan)
    data.open_sources()
    loader = iter(StepLoader(data.steps(), 0, num_workers=workers))
    for _ in range(5):
        next(loader)
    start = time.perf_counter()
    for _ in range(steps):
        next(loader)
    return steps * rows * seq_len / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of each of four sources")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--out", help="append one JSON line a case to this file")
    a = parser.parse_args()
    from benchmarks.corpus import write_corpus

    records = []
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), a.tokens)
        for seq_len, workers in CASES:
            rate = measure(Path(name), seq_len, workers, a.steps, a.rows)
            records.append({"seq_len": seq_len, "workers": workers, "tokens_per_s": rate})
    append_jsonl(a.out, records)
    print(table(["tokens a row", "workers", "tokens per second"], [list(r.values()) for r in records]))


if __name__ == "__main__":
    main()
