"""CPU-seconds and peak memory of the head's cross-entropy, forward and backward: chunked beside naive.

    python benchmarks/head.py [--vocab 32768] [--tokens 2048,4096,8192] [--chunks 256,512,1024] [--dtype fp32]

Each case is a process of its own, so that its peak is its own. Peak: MiB beyond hidden states, weight and their two
gradients, which every head needs. The naive head is left out where its logits alone would pass --naive-gib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import MARK, append_jsonl, environment, memory_mb, reset_peak, table


def case(tokens: int, vocab: int, dim: int, chunk: int | None, dtype: str, rounds: int) -> dict[str, float]:
    """One case in this process; `chunk` None is the naive head."""
    import torch
    import torch.nn.functional as F

    from nb_lightning.losses import head

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim).to(kind).requires_grad_()
    weight = (torch.randn(vocab, dim) * 0.02).to(kind).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))

    def naive() -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    loss: Callable[[], torch.Tensor] = (
        naive if chunk is None else partial(head.cross_entropy, hidden, weight, labels, chunk)
    )
    small = partial(head.cross_entropy, hidden[:8], weight, labels[:8], 8)
    small().backward()  # the gradients exist from here on: what is measured is beyond them
    reset_peak()
    base, seconds = memory_mb("VmRSS"), []
    for _ in range(rounds):
        start = time.process_time()
        value = loss()
        value.backward()
        seconds.append(time.process_time() - start)
    return {"cpu": statistics.median(seconds), "peak_mb": memory_mb("VmHWM") - base, "loss": float(value) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", default="2048,4096,8192")
    parser.add_argument("--chunks", default="256,512,1024")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naive-gib", type=float, default=4.0)
    parser.add_argument("--out", help="append one JSON line a case to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        tokens, chunk = json.loads(a.case)
        print(MARK + json.dumps(case(tokens, a.vocab, a.dim, chunk, a.dtype, a.rounds)))
        return
    records = []
    for tokens in map(int, a.tokens.split(",")):
        for chunk in (None, *map(int, a.chunks.split(","))):
            logits = tokens * a.vocab * 4 / 2**30
            if chunk is None and logits > a.naive_gib:
                print(f"naive head at {tokens:,} tokens: left out, its logits alone are {logits:.1f} GiB")
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps([tokens, chunk])]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"case {tokens}, {chunk} failed:\n{done.stderr[-3000:]}")
            found = json.loads(done.stdout.rpartition(MARK)[2])
            records.append({"tokens": tokens, "chunk": chunk, "dtype": a.dtype, **found})
    append_jsonl(a.out, records)
    print(f"\nvocabulary {a.vocab:,}, width {a.dim}, {a.dtype}; medians of {a.rounds}\n")
    rows = [
        [
            f"{r['tokens']:,}",
            "naive" if r["chunk"] is None else f"chunk {r['chunk']}",
            r["cpu"],
            r["peak_mb"],
            r["loss"],
        ]
        for r in records
    ]
    print(table(["tokens", "head", "CPU-s", "peak MiB", "loss"], rows))


if __name__ == "__main__":
    main()
