"""The interface of a verifier: it scores the completions of a prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Score:
    """The worth of one completion.

    `info` says at least "status": "correct", "wrong", "no_answer", "timeout", "memory", "flood", "crash" or
    "verifier_error"; of "preference" also "compared", "alone", "too_long" or "unreadable". And whatever else helps to
    see why. Its values are plain data.
    """

    reward: float  # in [0, 1]
    info: Mapping[str, Any]


class Verifier(Protocol):
    """Scores completions of one prompt. Called from any thread, from several at once.

    Optional beside `score`: `check(reference)`, which raises ValueError when the reference is not of the form this
    verifier reads, so that a bad data set is refused before training. And for verifiers of other packages, which run
    in a process of their own (isolated.py): `in_process = True` to run in this one instead (it needs the GPU, say), or
    `limits`, a `sandbox.Limits`.
    """

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]: ...


class Guarded:
    """A verifier whose failures are rewards of 0 with the status "verifier_error".

    Only a bad reference is raised (ValueError, from a built-in verifier's `check`): that is a mistake in the data.
    """

    def __init__(self, name: str, verifier: Verifier) -> None:
        self.name, self.verifier = name, verifier

    def check(self, reference: Any) -> None:
        """Raise ValueError when `reference` is not of the form this verifier reads."""
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


def statuses(scores: Iterable[Score]) -> dict[str, int]:
    """How many scores have each status: the counters to log."""
    return dict(Counter(score.info["status"] for score in scores))
