"""The verifier "ifeval": a response follows instructions that a program can check (after IFEval, Zhou et al. 2023).

Reference: {"instructions": [{"name": "words", "at_least": 10, "at_most": 50}, {"name": "no_commas"}, ...]}.
The reward is 1 if all are followed. The response is the text after `</think>`. Every check is one pass over the text.

A check is a function of the text and the instruction's other fields; its name is the instruction's name.
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
    """Check the number of words."""
    return _within(len(_WORD.findall(text)), at_least, at_most)


@_check
def sentences(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Check the number of sentences: parts that end with . ! ? (or the text) and have a letter or digit."""
    return _within(sum(bool(_WORD.search(part)) for part in re.split(r"[.!?]+(?:\s|$)", text)), at_least, at_most)


@_check
def paragraphs(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Check the number of paragraphs, with blank lines between them."""
    blocks = "\n".join(line.rstrip() for line in text.split("\n")).split("\n\n")
    return _within(sum(bool(block.strip()) for block in blocks), at_least, at_most)


@_check
def bullets(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Check the number of lines that begin with "* " or "- "."""
    return _within(sum(line.lstrip().startswith(("* ", "- ")) for line in text.split("\n")), at_least, at_most)


@_check
def headings(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Check the number of Markdown headings ("# Title", any level)."""
    return _within(sum(bool(re.match(r"#{1,6} +\S", line)) for line in text.split("\n")), at_least, at_most)


@_check
def placeholders(text: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """Check the number of [placeholders] in square brackets."""
    return _within(len(re.findall(r"\[[^\[\]\n]+\]", text)), at_least, at_most)


@_check
def keyword(text: str, word: str, at_least: int = 1, at_most: int | None = None) -> bool:
    """Check how often a word or phrase occurs, as whole words, in any case. `at_most` 0 forbids it."""
    phrase = [part.casefold() for part in _WORD.findall(word)]
    text_words = [part.casefold() for part in _WORD.findall(text)]
    times = sum(text_words[i : i + len(phrase)] == phrase for i in range(len(text_words) - len(phrase) + 1))
    return _within(times, at_least, at_most)


@_check
def letter(text: str, letter: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Check how often a letter occurs, in any case."""
    return _within(text.casefold().count(letter.casefold()), at_least, at_most)


@_check
def no_commas(text: str) -> bool:
    """Check that there is no comma, Chinese commas included."""
    return not any(comma in text for comma in ",，、")


@_check
def lowercase(text: str) -> bool:
    """Check that there are letters, and none is a capital."""
    return text == text.lower() and any(map(str.isalpha, text))


@_check
def uppercase(text: str) -> bool:
    """Check that there are letters, and all are capitals."""
    return text == text.upper() and any(map(str.isalpha, text))


@_check
def capital_words(text: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Check the number of words all in capitals."""
    return _within(sum(word.isupper() for word in _WORD.findall(text)), at_least, at_most)


@_check
def json_only(text: str) -> bool:
    """Check that the whole response is one JSON value, which may stand in one ``` block."""
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
    """Check the first words."""
    return fold(text).startswith(fold(phrase))


@_check
def ends_with(text: str, phrase: str) -> bool:
    """Check the last words; nothing may follow them."""
    return fold(text).endswith(fold(phrase))


@_check
def in_quotes(text: str) -> bool:
    """Check that the whole response stands in double quotes."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_check
def title(text: str) -> bool:
    """Check that there is a title in <<double angular brackets>>."""
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text))


@_check
def one_of(text: str, options: list[str]) -> bool:
    """Check that the response is one of `options`, and nothing else."""
    return fold(text) in map(fold, options)


class IFEval:
    """Checks every instruction; `info["failed"]` has the names of those that were not followed."""

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
    failed = [i["name"] for i in instructions if not CHECKS[i["name"]](text, **_arguments(i))]
    return Score(float(not failed), {"status": "wrong" if failed else "correct", "failed": failed})


def _arguments(instruction: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in instruction.items() if key != "name"}


def _check_arguments(place: str, name: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError unless the check `name` can be called with these arguments."""
    parameters = {key: value for key, value in inspect.signature(CHECKS[name]).parameters.items() if key != "text"}
    for key in arguments:
        if key not in parameters:
            raise ValueError(f"{place}: {name!r} has no {key!r}; it has: {', '.join(parameters) or 'nothing'}")
    for key, parameter in parameters.items():
        if key not in arguments and parameter.default is parameter.empty:
            raise ValueError(f"{place}: {name!r} needs {key!r}")
    for key, value in arguments.items():
        kind = parameters[key].annotation.partition("[")[0].partition(" ")[0]
        if type(value).__name__ != kind or value in ("", []):
            raise ValueError(f"{place}: {key!r} of {name!r} is {value!r}, not {parameters[key].annotation}")


def _within(count: int, at_least: int, at_most: int | None) -> bool:
    return count >= at_least and (at_most is None or count <= at_most)
