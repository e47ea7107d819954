"""The interface of a verifier: it scores the completions of a prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nb_lightning.rewards.tasks import Task

SCORING_THREADS = 4  # that score at the same time; most of their time they wait for a verifier's process


@dataclass(frozen=True)
class Score:
    """The reward of one completion, and why.

    Attributes:
        reward: in [0, 1].
        info: plain data. It has at least "status": "correct", "wrong", "no_answer", "timeout", "memory", "flood",
            "crash" or "verifier_error"; for "preference" also "compared", "alone", "too_long" or "unreadable".
    """

    reward: float
    info: Mapping[str, Any]


class Verifier(Protocol):
    """Scores the completions of one prompt. It is called from several threads at once.

    Optional beside `score`:
        `check(reference)` raises ValueError for a reference that this verifier cannot read, so that a bad data set is
        refused before training.

        Verifiers of other packages run in a separate process (isolated.py). `in_process = True` runs one in this
        process instead, for example because it needs the GPU. `limits`, a `sandbox.Limits`, replaces the default.
    """

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]: ...


class Guarded:
    """A verifier whose failures become rewards of 0 with the status "verifier_error".

    Only the ValueError of a built-in verifier's `check` is raised: a bad reference is a mistake in the data.
    """

    def __init__(self, name: str, verifier: Verifier) -> None:
        self.name, self.verifier = name, verifier

    def check(self, reference: Any) -> None:
        """Raise ValueError for a reference that this verifier cannot read."""
        check = getattr(self.verifier, "check", None)
        if check is not None:
            check(reference)

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
        if not getattr(self.verifier, "slow_check", False):
            self.check(reference)
        try:
            scores = list(self.verifier.score(prompt, completions, reference))
            if len(scores) != len(completions):
                raise ValueError(f"{len(scores)} scores for {len(completions)} completions")
            return [self._checked(score) for score in scores]
        except (Exception, SystemExit) as error:
            why = f"{self.name}: {type(error).__name__}: {error}"
            return [Score(0.0, {"status": "verifier_error", "why": why})] * len(completions)

    def _checked(self, score: Score) -> Score:
        reward = float(score.reward)
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            why = f"{self.name}: a reward of {reward} is not in [0, 1]"
            return Score(0.0, {"status": "verifier_error", "why": why})
        return Score(reward, {"status": "correct" if reward == 1 else "wrong", **score.info})


def score_texts(verifiers: Mapping[str, Verifier], task: Task, texts: Sequence[str]) -> list[Score]:
    """Score answers to a task by the verifier that it names."""
    return verifiers[task.verifier].score(task.question, texts, task.reference)


def statuses(scores: Iterable[Score]) -> dict[str, int]:
    """Count the scores of each status, for the log."""
    return dict(Counter(score.info["status"] for score in scores))
