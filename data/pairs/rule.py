"""Which responses of teacher and student become a pair: only those where the teacher's is clearly better."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from data.pairs.responses import Response

BY = ("verifier", "judge", "both")
# Why a prompt gives no pair.
NEVER_RIGHT = "the teacher is never right"
CUT_OFF = "the teacher is right only where it was cut off"
NEVER_WRONG = "the student is never so much worse"
EQUAL = "all responses are equal"
FAILED = "the verifier failed on all responses"
NOT_PREFERRED = "the judge does not prefer the teacher"


@dataclass(frozen=True)
class Rule:
    """When a pair is kept.

    Attributes:
        by: verifier: the rewards decide; judge: any finished response of the teacher, and the judge decides; both: the
            rewards, then the judge.
        least: reward of a chosen response at least.
        margin: by how much the rejected one's is lower.
        preference: of the judge at least.
        pairs: of a prompt at most. No rejected response is in two, and a chosen one only where there are fewer.
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
    def rewards_count(self) -> bool:
        return self.by != "judge"

    def good(self, teacher: Sequence[Response]) -> list[Response] | str:
        """The responses that may be chosen, or why there is none."""
        known = self._known(teacher)
        right = [r for r in known if not self.rewards_count or r.reward >= self.least]
        finished = [r for r in right if r.finish == "stop"]
        return _different(finished) or (CUT_OFF if right else NEVER_RIGHT if known else FAILED)

    def candidates(
        self, teacher: Sequence[Response], student: Sequence[Response], seed: str
    ) -> list[tuple[Response, Response]] | str:
        """(chosen, rejected), as many as are wanted, which a judge may still refuse; or why there is none.

        Args:
            seed: decides which of several are taken.
        """
        good, bad = self.good(teacher), _different(self._known(student))
        if isinstance(good, str):
            return good
        random.Random(f"chosen {seed}").shuffle(good)
        random.Random(f"rejected {seed}").shuffle(bad)
        found: list[tuple[Response, Response]] = []
        equal = False
        for chosen in islice(cycle(good), self.pairs):
            worse = [r for r in bad if not self.rewards_count or r.reward <= chosen.reward - self.margin]
            other = [r for r in worse if r.text != chosen.text]
            equal |= len(other) < len(worse)
            if other:
                found.append((chosen, other[0]))
                bad.remove(other[0])
        return found or (EQUAL if equal else NEVER_WRONG if bad else FAILED)

    def _known(self, responses: Sequence[Response]) -> list[Response]:
        """Those that the verifier could judge."""
        return [r for r in responses if not self.rewards_count or r.status != "verifier_error"]


def _different(responses: Sequence[Response]) -> list[Response]:
    """One of each text."""
    return list({r.text: r for r in reversed(responses)}.values())[::-1]
