"""The sandbox for model-written code: runs per second, CPU time per run, and how late a kill comes.

    python benchmarks/sandbox.py [--runs 2000] [--workers 2]

A run is one job: a fork that locks itself in and does the work, until its output was read and compared. Runs a second
are those of this machine now, busy or not; the last column is what the CPU time of a run leaves room for.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import table
from nb_lightning.rewards import get_verifier
from nb_lightning.rewards.code import SETUP
from nb_lightning.rewards.sandbox.pool import Limits, Sandbox, describe

FUNCTION = {"entry": "f", "tests": [{"args": [i], "expect": i * i} for i in range(5)]}
PROGRAM = {"tests": [{"stdin": "3 4\n", "expect": "7\n"}]}
SOLUTIONS = {
    "a function, 5 tests": (FUNCTION, "def f(x): return x * x"),
    "a program, 1 test": (PROGRAM, "print(sum(map(int, input().split())))"),
    "a program that imports": (PROGRAM, "import re, heapq, collections\nprint(sum(map(int, input().split())))"),
}


def cpu_seconds(pids: list[int]) -> float:
    """Of this process and of `pids` with all their children that were waited for."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / ticks
    return total


def throughput(name: str, work: Callable[[int], object], sandbox: Sandbox, runs: int) -> list[object]:
    work(20)
    pids = [worker.pid for worker in sandbox._running]
    cpu, wall = cpu_seconds(pids), time.perf_counter()
    work(runs)
    cpu, wall = cpu_seconds(pids) - cpu, time.perf_counter() - wall
    return [name, runs / wall, 1000 * cpu / runs, len(pids) * runs / cpu]


def lateness(sandbox: Sandbox, code: str, limits: Limits, clock: str, times: int = 20) -> list[object]:
    outcomes = sandbox.map([({"code": code}, b"", limits)] * times)
    assert {outcome.status for outcome in outcomes} == {"timeout"}
    late = [getattr(outcome, f"{clock}_seconds") - getattr(limits, f"{clock}_seconds") for outcome in outcomes]
    return [f"{code.strip().splitlines()[-1]} ({clock} limit)", 1000 * statistics.median(late), 1000 * max(late)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    began = time.perf_counter()
    sandbox = Sandbox(SETUP, workers=options.workers)
    started = time.perf_counter() - began
    print(f"{describe(next(iter(sandbox._running)).hello)}; first zygote and self-test: {started:.2f} s\n")

    code = get_verifier("code")
    code.verifier.sandbox = sandbox
    rows = []
    for name, (reference, solution) in SOLUTIONS.items():

        def work(runs: int, reference: dict = reference, solution: str = solution) -> None:
            scores = code.score("", [f"```python\n{solution}\n```"] * runs, reference)
            assert all(score.reward == 1 for score in scores), scores[0]

        rows.append(throughput(name, work, sandbox, options.runs))
    try:
        maths = get_verifier("math")
    except ValueError as error:
        print(error)
    else:

        def work(runs: int) -> None:
            for i in range(0, runs, 16):
                maths.score("", [f"\\boxed{{\\frac{{{i + j}}}{{7}}}}" for j in range(16)], "3/7")

        rows.append(throughput("an answer to math, 16 a job", work, maths.verifier.sandbox, options.runs // 4))
    print(table(["run", "runs/s", "CPU ms", f"runs/s on {options.workers} idle cores, from CPU"], rows), "\n")

    late = [
        lateness(sandbox, "while True: pass", Limits(cpu_seconds=0.3, wall_seconds=60), "cpu"),
        lateness(sandbox, "import time\ntime.sleep(60)", Limits(wall_seconds=0.3), "wall"),
        lateness(sandbox, "import re\nre.match('(a*)*b', 'a' * 60)", Limits(cpu_seconds=0.3, wall_seconds=60), "cpu"),
        lateness(sandbox, "x = bytearray(400 << 20)\nwhile True: pass", Limits(wall_seconds=0.3), "wall"),
    ]
    print(table(["job", "killed late by ms, median", "most"], late))
    sandbox.close()


if __name__ == "__main__":
    main()
