"""The verifier "exact": the answer is the reference, letter for letter, up to white space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nb_lightning.rewards.extract import after_mark, after_thinking, fold
from nb_lightning.rewards.verifier import Score


class Exact:
    """The text after the last "Answer:" (all of it where there is none) equals the reference. Reasoning, up to a
    `</think>`, does not count; runs of white space count as one space.

    Reference: a string.
    """

    def check(self, reference: Any) -> None:
        if not isinstance(reference, str) or not reference.strip():
            raise ValueError(f"the reference of 'exact' is {reference!r}; give a string that is not blank")

    def score(self, prompt: str, completions: Sequence[str], reference: str) -> list[Score]:
        wanted = fold(reference)
        return [_score(final_answer(completion), wanted) for completion in completions]


def final_answer(completion: str) -> str:
    """What "exact" compares, before white space is folded."""
    said = after_thinking(completion)
    answer = after_mark(said)
    return said if answer is None else answer


def _score(answer: str, wanted: str) -> Score:
    folded = fold(answer)
    status = "correct" if folded == wanted else "wrong" if folded else "no_answer"
    return Score(float(folded == wanted), {"status": status, "answer": folded[:200]})
