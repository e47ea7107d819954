"""The verifier "palindrome": the response reads the same backwards and contains a given word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nb_lightning.rewards import Score


class Palindrome:
    """Reference: {"word": "level"}."""

    def check(self, reference: Any) -> None:
        if not isinstance(reference, dict) or not isinstance(reference.get("word"), str):
            raise ValueError("the reference of 'palindrome' needs a text 'word'")

    def score(self, prompt: str, completions: Sequence[str], reference: dict[str, Any]) -> list[Score]:
        return [self._one(completion, reference["word"]) for completion in completions]

    def _one(self, completion: str, word: str) -> Score:
        letters = [letter for letter in completion.casefold() if letter.isalnum()]
        right = bool(letters) and letters == letters[::-1] and word.casefold() in completion.casefold()
        return Score(float(right), {"status": "correct" if right else "wrong", "letters": len(letters)})
