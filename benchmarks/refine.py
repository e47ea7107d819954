"""What data.refine costs this machine beside its models: CPU time a call, and memory.

    python benchmarks/refine.py [--tasks 10000]

An engine that answers at once makes every task take nine calls: four wrong candidates, a critique, two revisions, a
skeleton and a chain. Verifiers, prompts, parsing, journal, checks and files are all that is left.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import memory_mb, table
from data.calls.call import Call, Reply
from data.calls.caller import Caller
from data.calls.engine import OnReply
from data.refine.asking import Asker
from data.refine.loop import Refinement
from data.refine.make import refine_tasks
from data.refine.plan import read_plan
from data.refine.prompts import read_prompts
from data.refine.reconstruct import Reconstruction
from data.refine.work import Engines
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.tasks import Task

CALLS = 9  # of a task


class AtOnce:
    """An engine that answers at once: wrong at first, and right when it is told so."""

    def about(self) -> dict[str, Any]:
        return {"name": "at once"}

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        for number, call in enumerate(calls):
            message = {"role": "assistant", "content": self.say(call.messages[-1]["content"])}
            on_reply(number, Reply(message, "stop", 40, 30))

    def say(self, prompt: str) -> str:
        kind, *words = prompt.split()  # "Sort abc", or "Check Sort abc" and a draft
        if kind == "Outline":
            return "w w x6"
        letters = words[0 if kind == "Sort" else 1]
        if kind == "Check":
            return f"{prompt.splitlines()[1].split()[0]} -"
        return solve(letters, wrong=kind == "Sort")


def solve(letters: str, wrong: bool) -> str:
    """Sort letters as the demo's worked answers do, or backwards."""
    left, lines = letters, []
    for letter in sorted(letters, reverse=wrong):
        left = left.replace(letter, "", 1)
        lines.append(f"{letter} {left}".strip())
    answer = "".join(line[0] for line in lines)
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n\nAnswer: {answer}"


def make_tasks(number: int) -> list[Task]:
    rng, tasks = random.Random(0), []
    for n in range(number):
        letters = "".join(rng.sample("abcdefghijklmnopqrstuvwxyz", 7))
        messages = [{"role": "user", "content": f"Sort {letters}"}]
        tasks.append(Task(f"{n}", "maths_sort", messages, "exact", "".join(sorted(letters))))
    return tasks


def measure(number: int, folder: Path) -> dict[str, float]:
    """Refine tasks; return CPU milliseconds a call, and the resident MiB before and after."""
    tasks, engine, plan = make_tasks(number), AtOnce(), read_plan("demo")
    prompts, verifiers = read_prompts(plan.language, critiques=plan.critiques), get_verifiers(tasks)
    caller = Caller(folder / "calls")
    asker = Asker(caller, seed=0)
    (folder / "calls").mkdir()
    engines = Engines({"student": engine}, engine, engine)
    refinement = Refinement(plan, prompts, engines, asker, verifiers)
    reconstruction = Reconstruction(plan, prompts, engines, asker, verifiers)
    before, start = memory_mb("VmRSS"), time.process_time()
    report = refine_tasks(tasks, refinement, reconstruction, caller, {}, folder, batch=512)
    seconds = time.process_time() - start
    assert report["kept"] == number and report["calls"]["calls"] == CALLS * number, report
    return {"ms": 1e3 * seconds / (CALLS * number), "before": before, "after": memory_mb("VmRSS")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", type=int, default=10_000)
    a = p.parse_args()
    rows = []
    for number in (a.tasks // 10, a.tasks):
        with tempfile.TemporaryDirectory() as folder:
            m = measure(number, Path(folder))
        rows.append([f"{number:,}", f"{m['ms']:.3f}", f"{m['before']:.0f}", f"{m['after']:.0f}"])
    print(table(["tasks", "CPU-ms a call", "MiB before", "after"], rows))


if __name__ == "__main__":
    main()
