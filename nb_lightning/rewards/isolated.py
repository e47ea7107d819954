"""Verifiers of other packages: each call runs in a process that can be killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from nb_lightning.rewards.sandbox.pool import Limits, Outcome, Setup, shared
from nb_lightning.rewards.verifier import Score

LIMITS = Limits(cpu_seconds=30.0, wall_seconds=60.0, memory_mb=4096, threads=256)
FAILED = ("timeout", "flood", "crash", "verifier_error")


class Isolated:
    """Calls the verifier of an entry point in a fork of a process that has imported and constructed it.

    One call scores all completions of a prompt. If it hangs, crashes or is killed, each completion is scored by a
    separate call, so that only the completion at fault loses its reward.
    """

    slow_check = True

    def __init__(self, entry: EntryPoint, limits: Limits | None = None) -> None:
        self.limits = limits or LIMITS
        path = tuple(str(Path(folder).resolve()) for folder in sys.path)
        self.sandbox = shared(Setup("run_verifier", path=path, jail=False, argument=entry.value))

    def check(self, reference: Any) -> None:
        outcome = self.sandbox.run({"reference": reference}, b"", self.limits)
        result = outcome.report[0] if outcome.report else {}
        if not result.get("valid"):
            raise ValueError(result.get("error") or f"its check of a reference failed: {outcome.reason}")

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
        def call(completions: Sequence[str]) -> list[Score]:
            job = {"prompt": prompt, "reference": reference, "completions": [*completions]}
            return _scores(self.sandbox.run(job, b"", self.limits), len(completions))

        scores = call(completions)
        if len(completions) == 1 or all(score.info.get("status") not in FAILED for score in scores):
            return scores
        one_by_one = self.sandbox.threads.map(call, [[completion] for completion in completions])
        return [score for [score] in one_by_one]


def _scores(outcome: Outcome, count: int) -> list[Score]:
    """Return the scores that the job reported, or `count` failures."""
    lines = [line for line in outcome.report if isinstance(line, dict)]
    errors = [str(line["error"]) for line in lines if "error" in line]
    if not errors and outcome.status == "ok" and len(lines) == count:
        return [Score(line["reward"], line["info"]) for line in lines]
    status = outcome.status if outcome.status in ("timeout", "flood", "crash") else "verifier_error"
    why = errors[0] if errors else outcome.reason or f"{len(lines)} scores for {count} completions"
    return [Score(0.0, {"status": status, "why": why})] * count
