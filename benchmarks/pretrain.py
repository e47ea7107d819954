"""CPU-seconds and peak memory of one optimizer step of pretraining, beside a hand-written loop and other trainers.

    python benchmarks/pretrain.py [--rounds 3] [--steps 8] [--vocab 4096] [--peers litgpt,hf]
        [--litgpt-python PATH] [--hf-python PATH]

Every trainer is a process of its own; they take turns step by step. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder: `data` is not our data.py

from benchmarks.common import Child, append_jsonl, table, take_turns

WARMUP = 2  # steps that are not counted: caches fill, compilers run
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2}
PEERS = ("litgpt", "litgpt-eager", "hf")


def kinds(a: argparse.Namespace) -> dict[str, str]:
    """Map each trainer that runs to its Python."""
    chosen = ["plain", "ours", "ours-bare", *(["plain-compiled", "ours-compiled"] if a.compile else [])]
    pythons = dict.fromkeys(chosen, sys.executable)
    for peer in filter(None, a.peers.split(",")):
        if peer not in PEERS:
            sys.exit(f"--peers names {peer!r}; allowed: {', '.join(PEERS)}")
        option, python = ("--hf-python", a.hf_python) if peer == "hf" else ("--litgpt-python", a.litgpt_python)
        if python:
            pythons[peer] = python
        else:
            print(f"{peer}: left out, no {option} (benchmarks/README.md says how to make its environment)")
    return pythons


def one_round(a: argparse.Namespace, folder: Path, number: int) -> list[dict]:
    """Start every trainer, then let each do one step per turn; return a record per step."""
    steps = a.steps + WARMUP
    script = str(Path(__file__).with_name("peers.py"))
    arguments = [str(folder), str(steps), "--vocab", str(a.vocab), "--precision", a.precision]
    if number == 0:
        Child.run("prepare", [sys.executable, script, "prepare", *arguments], folder)
    commands = {kind: [python, script, kind, *arguments] for kind, python in kinds(a).items()}
    return take_turns(commands, folder, steps, round=number)


def check_losses(records: list[dict], tolerance: float) -> float:
    """Check that the losses agree, as only then is the comparison fair; return the largest difference of ours to plain.

    Ours and plain agree over all steps; the others, whose schedules differ, on the first step.
    """
    losses = {(r["kind"], r["step"]): r["loss"] for r in records}
    worst = 0.0
    for (kind, step), loss in losses.items():
        difference = abs(loss - losses["plain", step])
        if kind == "ours":
            worst = max(worst, difference)
        if kind == "ours" or step == 0:
            assert difference < tolerance, f"step {step}: {kind} has loss {loss}, plain {losses['plain', step]}"
    return worst


def summary(records: list[dict]) -> list[list]:
    """Medians by kind; a ratio is the median over the ratios of single turns."""
    timed = [r for r in records if r["step"] >= WARMUP]
    cpu = {(r["kind"], r["round"], r["step"]): r["cpu"] for r in timed}
    turns = sorted({(r["round"], r["step"]) for r in timed})
    rows = []
    for kind in dict.fromkeys(r["kind"] for r in timed):
        ratios = []
        for base in ("plain", "plain-compiled", "litgpt"):
            pairs = [cpu[kind, *turn] / cpu[base, *turn] for turn in turns if (base, *turn) in cpu]
            ratios.append(statistics.median(pairs) if pairs else None)
        mine = [cpu[kind, *turn] for turn in turns]
        memory = [r["peak_mb"] for r in timed if r["kind"] == kind and r["step"] == turns[-1][1]]
        rows.append([kind, statistics.median(mine), min(mine), *ratios, statistics.median(memory)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often every process is started anew")
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps a round, after {WARMUP} that are not")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--precision", default="32-true", choices=TOLERANCE)
    parser.add_argument("--compile", action="store_true", help="also plain and ours under torch.compile")
    parser.add_argument("--peers", default="litgpt,hf", help=f"any of {','.join(PEERS)}, or an empty string")
    parser.add_argument("--litgpt-python", help="the Python of litgpt's environment")
    parser.add_argument("--hf-python", help="the Python of transformers' environment")
    parser.add_argument("--out", help="append one JSON line a step to this file")
    a = parser.parse_args()
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(a.rounds):
            records += one_round(a, Path(folder), number)
            worst = check_losses(records, TOLERANCE[a.precision])
    append_jsonl(a.out, records)
    header = ["one step", "CPU-s", "least", "to plain", "to plain-compiled", "to litgpt", "peak MiB beyond start"]
    print(f"\nrows 8 x 512, vocabulary {a.vocab}, {a.precision}, one thread; {a.rounds} x {a.steps} steps\n")
    print(table(header, summary(records)))
    print(f"\nours and plain: the same loss to {worst:.1e} on the same weights and tokens, every step")


if __name__ == "__main__":
    main()
