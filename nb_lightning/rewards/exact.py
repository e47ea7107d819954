"""The verifier "exact": the answer equals the reference, letter for letter, up to white space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nb_lightning.rewards.extract import after_mark, after_thinking, fold
from nb_lightning.rewards.verifier import Score


class Exact:
    """Compares the text after the last "Answer:", or all of the text without one, with the reference.

    Reasoning, up to a `</think>`, is left out. Runs of white space count as one space.

    Reference: a string.
    """

    def check(self, reference: Any) -> None:
        if not isinstance(reference, str) or not reference.strip():
            raise ValueError(f"the reference of 'exact' is {reference!r}; give a string that is not blank")

    def score(self, prompt: str, completions: Sequence[str], reference: str) -> list[Score]:
        wanted = fold(reference)
        return [_score(final_answer(completion), wanted) for completion in completions]


def final_answer(completion: str) -> str:
    """Extract what "exact" compares, before white space is folded."""
    response = after_thinking(completion)
    answer = after_mark(response)
    return response if answer is None else answer


def _score(answer: str, wanted: str) -> Score:
    folded = fold(answer)
    status = "correct" if folded == wanted else "wrong" if folded else "no_answer"
    return Score(float(folded == wanted), {"status": status, "answer": folded[:200]})
