"""The verifier "ifeval": whether a response follows instructions that a program can check.

Reference: {"instructions": [{"name": "words", "at_least": 10, "at_most": 50}, {"name": "no_commas"}, ...]}.
The reward is 1 when all are followed. What follows `</think>` is the response. Every check is one pass over the text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from nb_lightning.rewards.extract import after_thinking, fold
from nb_lightning.rewards.verifier import Score

CHECKS: dict[str, Callable[..., bool]] = {}
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def _check(function: Callable[..., bool]) -> Callable[..., bool]:
    CHECKS[function.__name__] = function
    return function


@_check
def words(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """The number of words."""
    return _within(len(_WORD.findall(text)), at_least, at_most)


@_check
def sentences(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """The number of sentences: what ends with one or more of . ! ? (or the text's end) and has a letter or digit."""
    return _within(sum(bool(_WORD.search(part)) for part in re.split(r"[.!?]+(?:\s|$)", text)), at_least, at_most)


@_check
def paragraphs(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """The number of paragraphs, with blank lines between them."""
    blocks = "\n".join(line.rstrip() for line in text.split("\n")).split("\n\n")
    return _within(sum(bool(block.strip()) for block in blocks), at_least, at_most)


@_check
def bullets(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """The number of lines that begin with "* " or "- "."""
    return _within(sum(line.lstrip().startswith(("* ", "- ")) for line in text.split("\n")), at_least, at_most)


@_check
def headings(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """The number of Markdown headings ("# Title", any level)."""
    found = sum(bool(re.match(r"#{1,6} +\S", line)) for line in text.split("\n"))
    return _within(found, at_least, at_most)


@_check
def placeholders(text: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """The number of [placeholders] in square brackets."""
    return _within(len(re.findall(r"\[[^\[\]\n]+\]", text)), at_least, at_most)


@_check
def keyword(text: str, word: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """How often a word or phrase occurs, as whole words, in any case. `at_most` 0 forbids it."""
    wanted = [part.casefold() for part in _WORD.findall(word)]
    found = [part.casefold() for part in _WORD.findall(text)]
    times = sum(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))
    return _within(times, at_least, at_most)


@_check
def letter(text: str, letter: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """How often a letter occurs, in any case."""
    return _within(text.casefold().count(letter.casefold()), at_least, at_most)


@_check
def no_commas(text: str) -> bool:
    """No comma, the Chinese ones included."""
    return not any(comma in text for comma in ",，、")


@_check
def lowercase(text: str) -> bool:
    """No capital letter, and some letter."""
    return text == text.lower() and any(map(str.isalpha, text))


@_check
def uppercase(text: str) -> bool:
    """Capital letters only."""
    return text == text.upper() and any(map(str.isalpha, text))


@_check
def capital_words(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """The number of words all in capitals."""
    return _within(sum(word.isupper() for word in _WORD.findall(text)), at_least, at_most)


@_check
def json_only(text: str) -> bool:
    """The whole response is one JSON value; it may stand in one ``` block."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[:-3].partition("\n")[2]
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@_check
def starts_with(text: str, phrase: str) -> bool:
    """The first words."""
    return fold(text).startswith(fold(phrase))


@_check
def ends_with(text: str, phrase: str) -> bool:
    """The last words, with nothing after them."""
    return fold(text).endswith(fold(phrase))


@_check
def in_quotes(text: str) -> bool:
    """The whole response stands in double quotes."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_check
def title(text: str) -> bool:
    """There is a title in <<double angular brackets>>."""
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text))


@_check
def one_of(text: str, options: list[str]) -> bool:
    """The response is one of these, and nothing else."""
    return fold(text) in map(fold, options)


class IFEval:
    """Reference and reward as the module says; `info["failed"]` has the names of the instructions not followed."""

    def check(self, reference: Any) -> None:
        instructions = reference.get("instructions") if isinstance(reference, dict) else None
        if not isinstance(instructions, list) or not instructions:
            raise ValueError("the reference of 'ifeval' needs a list 'instructions' with at least one instruction")
        for i, instruction in enumerate(instructions):
            place = f"instructions[{i}] of an 'ifeval' reference"
            name = instruction.get("name") if isinstance(instruction, dict) else None
            if not isinstance(name, str) or name not in CHECKS:
                raise ValueError(f"{place} is {instruction!r:.80}; there are: {', '.join(CHECKS)}")
            _check_arguments(place, name, _arguments(instruction))

    def score(self, prompt: str, completions: Sequence[str], reference: dict[str, Any]) -> list[Score]:
        return [_score(after_thinking(completion), reference["instructions"]) for completion in completions]


def _score(text: str, instructions: list[dict[str, Any]]) -> Score:
    if not text.strip():
        return Score(0.0, {"status": "no_answer"})
    failed = [each["name"] for each in instructions if not CHECKS[each["name"]](text, **_arguments(each))]
    return Score(float(not failed), {"status": "wrong" if failed else "correct", "failed": failed})


def _arguments(instruction: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in instruction.items() if key != "name"}


def _check_arguments(place: str, name: str, given: dict[str, Any]) -> None:
    """Raise ValueError unless the check `name` can be called with the arguments `given`."""
    known = {key: value for key, value in inspect.signature(CHECKS[name]).parameters.items() if key != "text"}
    for key in given:
        if key not in known:
            raise ValueError(f"{place}: {name!r} has no {key!r}; it has: {', '.join(known) or 'nothing'}")
    for key, parameter in known.items():
        if key not in given and parameter.default is parameter.empty:
            raise ValueError(f"{place}: {name!r} needs {key!r}")
    for key, value in given.items():
        kind = known[key].annotation.partition("[")[0].partition(" ")[0]
        if type(value).__name__ != kind or value in ("", []):
            raise ValueError(f"{place}: {key!r} of {name!r} is {value!r}, not {known[key].annotation}")


def _within(count: int, at_least: int, at_most: int | None) -> bool:
    return count >= at_least and (at_most is None or count <= at_most)
