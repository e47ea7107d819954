"""What all kinds of jobs share: reading the task, reporting results, and the limits of one item of many."""

from __future__ import annotations

import json
import os
import signal
from typing import Any


def task() -> dict[str, Any]:
    """Read the job's task."""
    with open(4, "rb") as file:
        return json.loads(file.read())


def report(message: dict[str, Any]) -> None:
    """Write one line to the trainer's side at once, so that it is not lost if the job is killed later."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(3, data) :]


def arm(job: dict[str, Any]) -> None:
    """Start the limits of an item: after "cpu" or "wall" seconds the kernel ends the process.

    The limits of the whole job are set elsewhere; code in the job cannot change them.
    """
    signal.setitimer(signal.ITIMER_PROF, job["cpu"])
    signal.setitimer(signal.ITIMER_REAL, job["wall"])


def out_of_memory() -> int:
    """Report a MemoryError and return the exit code that ends the job.

    The job must end: the memory may still be held somewhere, and later items would lack it.
    """
    report({"error": "MemoryError"})
    return 1
