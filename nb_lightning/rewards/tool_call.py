"""The verifier "tool_call": a completion makes exactly the expected calls.

Reference: `{"name": "weather", "arguments": {"city": "Rome"}}`, or a list of such objects, in order. Calls are read
from `<tool_call>` blocks in the JSON or the XML form (nb_lightning/text/tool_calls.py). Text around the blocks is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nb_lightning.rewards.extract import after_thinking
from nb_lightning.rewards.verifier import Score
from nb_lightning.text.tool_calls import parse_call, split_calls


class ToolCall:
    """Gives reward 1 for exactly the expected calls with equal arguments; numbers are compared as numbers."""

    def check(self, reference: Any) -> None:
        calls = reference if isinstance(reference, list) else [reference]
        if not calls or not all(map(_is_call, calls)):
            form = "{'name': ..., 'arguments': {...}} or a list of them"
            raise ValueError(f"the reference of 'tool_call' is {reference!r:.80}; give {form}")

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
        wanted = reference if isinstance(reference, list) else [reference]
        return [_score(calls_of(completion), wanted) for completion in completions]


def calls_of(completion: str) -> list[Any]:
    """Parse the call in each closed block; None for a block that holds no call."""
    return [parse_call(text) for text in split_calls(after_thinking(completion))]


def _score(calls: list[Any], wanted: list[Any]) -> Score:
    if not calls:
        return Score(0.0, {"status": "no_answer"})
    right = _same(calls, wanted)
    return Score(float(right), {"status": "correct" if right else "wrong", "calls": calls})


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], dict)
    )


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal as JSON: True is not 1, 2 is 2.0."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
