"""The verifier "exact": the answer is the reference, letter for letter, up to white space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nb_lightning.rewards import Score

MARK = "Answer:"


class Exact:
    """The text after the last "Answer:" (the whole completion where there is none) equals the reference.

    Runs of white space count as one space. Reference: a string.
    """

    def check(self, reference: Any) -> None:
        if not isinstance(reference, str) or not reference.strip():
            raise ValueError(f"the reference of 'exact' is {reference!r}; give a string that is not blank")

    def score(self, prompt: str, completions: Sequence[str], reference: str) -> list[Score]:
        wanted = fold(reference)
        answers = [fold(completion.rpartition(MARK)[2]) for completion in completions]
        return [
            Score(float(answer == wanted), {
                "status": "correct" if answer == wanted else "wrong" if answer else "no_answer", "answer": answer,
            })
            for answer in answers
        ]  # fmt: skip


def fold(text: str) -> str:
    """`text` with each run of white space as one space, none at the ends."""
    return " ".join(text.split())
