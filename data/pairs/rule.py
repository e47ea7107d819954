"""The rule by which responses become pairs: only where the teacher's response is clearly better than the student's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from data.pairs.responses import Response

BY = ("verifier", "judge", "both")
Pair = tuple[Response, Response]  # chosen, rejected
Reason = str  # why a task gives no pair: one of these

NEVER_RIGHT: Reason = "the teacher is never right"
CUT_OFF: Reason = "the teacher is right only where it was cut off"
NEVER_WRONG: Reason = "the student is never so much worse"
EQUAL: Reason = "all responses are equal"
FAILED: Reason = "the verifier failed on all responses"
UNANSWERED: Reason = "no reply came that is a response"
UNJUDGED: Reason = "no reply of the judge came"
NOT_PREFERRED: Reason = "the judge does not prefer the teacher"


@dataclass(frozen=True)
class Rule:
    """Which responses become a pair.

    Attributes:
        by: "verifier": the rewards decide. "judge": any finished response of the teacher may be chosen, and the judge
            decides. "both": the rewards, then the judge.
        least: lowest reward of a chosen response.
        margin: by how much the rejected response's reward is lower, at least.
        preference: lowest preference of the judge for the chosen response, from 0 to 1.
        pairs: largest number of pairs of a task. A rejected response is in one pair only; a chosen one is in several
            only where there are fewer chosen responses than pairs.
    """

    by: str = "verifier"
    least: float = 1.0
    margin: float = 1.0
    preference: float = 0.75
    pairs: int = 1

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"--by is {self.by!r}; allowed: {', '.join(BY)}")
        for name, value in (("chosen-reward", self.least), ("margin", self.margin), ("preference", self.preference)):
            if not 0 < value <= 1:
                raise ValueError(f"--{name} is {value}; it must be above 0 and at most 1")
        if self.pairs < 1:
            raise ValueError(f"--pairs-per-prompt is {self.pairs}; it must be at least 1")

    @property
    def uses_rewards(self) -> bool:
        return self.by != "judge"

    def choosable(self, teacher: Sequence[Response]) -> list[Response] | Reason:
        """List the different responses of the teacher that may be chosen; if there are none, say why."""
        scored = self._scored(teacher)
        right = [r for r in scored if not self.uses_rewards or r.reward >= self.least]
        finished = [r for r in right if r.finish == "stop"]
        if not teacher:
            return UNANSWERED
        return _without_repeats(finished) or (CUT_OFF if right else NEVER_RIGHT if scored else FAILED)

    def choose_pairs(self, teacher: Sequence[Response], student: Sequence[Response], seed: str) -> list[Pair] | Reason:
        """Choose up to `pairs` pairs, which a judge may still refuse; if there are none, say why.

        Args:
            seed: decides which responses are taken where there are more than needed.
        """
        choosable, rejectable = self.choosable(teacher), _without_repeats(self._scored(student))
        if isinstance(choosable, str):
            return choosable
        random.Random(f"chosen {seed}").shuffle(choosable)
        random.Random(f"rejected {seed}").shuffle(rejectable)
        pairs: list[Pair] = []
        has_equal_texts = False
        for chosen in islice(cycle(choosable), self.pairs):
            worse = [r for r in rejectable if not self.uses_rewards or r.reward <= chosen.reward - self.margin]
            different = [r for r in worse if r.text != chosen.text]
            has_equal_texts |= len(different) < len(worse)
            if different:
                pairs.append((chosen, different[0]))
                rejectable.remove(different[0])
        if not student:
            return UNANSWERED
        return pairs or (EQUAL if has_equal_texts else NEVER_WRONG if rejectable else FAILED)

    def _scored(self, responses: Sequence[Response]) -> list[Response]:
        """Leave out responses on which the verifier failed, where rewards count."""
        return [r for r in responses if not self.uses_rewards or r.status != "verifier_error"]


def _without_repeats(responses: Sequence[Response]) -> list[Response]:
    """Leave one response of each text: the first."""
    return list({r.text: r for r in reversed(responses)}.values())[::-1]
