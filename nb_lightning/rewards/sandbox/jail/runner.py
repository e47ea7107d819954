"""What the jobs of all kinds share: reading the task, telling results, limits of one item of many."""

from __future__ import annotations

import json
import os
import signal
from typing import Any


def task() -> dict[str, Any]:
    with open(4, "rb") as file:
        return json.loads(file.read())


def report(message: dict[str, Any]) -> None:
    """One line for the other side, at once: what was told stays told if the job is killed later."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(3, data) :]


def arm(job: dict[str, Any]) -> None:
    """Limits from here on: after "cpu" or "wall" seconds the kernel ends the process. (The job as a whole has limits
    that no one in it can change.)"""
    signal.setitimer(signal.ITIMER_PROF, job["cpu"])
    signal.setitimer(signal.ITIMER_REAL, job["wall"])


def out_of_memory() -> int:
    """The exit code of a job that ends with an item: what it filled may be kept somewhere, at the later ones' cost."""
    report({"error": "MemoryError"})
    return 1
