"""Read what models answer: strictly, and never by a guess. Pure functions of a reply.

Each returns what the reply says, or raises `Unreadable`, whose message is counted in the report. A reply that was cut
off by its length is never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from data.calls.call import Reply
from data.refine.drafts import Critique, Draft
from nb_lightning.text.thoughts import END_OF_THINK, THINK, split_thought

LONGEST_LIST = 50  # items of a checklist, problems of a critique
FENCE = re.compile(r"^[ \t]*```[ \t]*(?:json)?[ \t]*\n(.*?)\n[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


class Unreadable(ValueError):
    """A reply that is not in the form that was asked for."""


def thought_and_answer(reply: Reply) -> tuple[str, str]:
    """Split a reply into its thought and its answer; the reply may be cut off.

    A reply that was cut off inside its thought has no answer.
    """
    message = {**reply.message, "role": "assistant", "content": reply.message.get("content") or ""}
    if "reasoning" in message and not message.get("reasoning_content"):
        message["reasoning_content"] = message["reasoning"]
    message = split_thought(message)
    content, thought = message["content"], message.get("reasoning_content") or ""
    if not thought and content.lstrip().startswith(THINK) and END_OF_THINK not in content:
        return content.lstrip().removeprefix(THINK).strip(), ""
    return thought.strip(), content.strip()


def finished_answer(reply: Reply) -> str:
    """Return the answer of a reply that is not cut off.

    Raises:
        Unreadable: it is cut off, or empty.
    """
    if reply.is_cut:
        raise Unreadable("cut off")
    answer = thought_and_answer(reply)[1]
    if not answer:
        raise Unreadable("empty")
    return answer


def read_draft(reply: Reply, name: str) -> Draft:
    """Read a candidate or a revision; one that is cut off has finish "length"."""
    reasoning, content = thought_and_answer(reply)
    return Draft(name, reasoning, content, "length" if reply.is_cut else "stop")


def read_checklist(reply: Reply) -> list[str]:
    """Read {"items": ["...", ...]}."""
    items = _object(finished_answer(reply), {"items"})["items"]
    if not isinstance(items, list) or not items or len(items) > LONGEST_LIST:
        raise Unreadable(f"items are no list of 1 to {LONGEST_LIST}")
    return [_text(item, "an item") for item in items]


def read_scores(reply: Reply, dimensions: Sequence[str]) -> dict[str, float]:
    """Read {"scores": {dimension: 0 ... 10}}, with exactly these dimensions; return them from 0 to 1."""
    scores = _object(finished_answer(reply), {"scores"})["scores"]
    if not isinstance(scores, dict) or scores.keys() != set(dimensions):
        raise Unreadable("scores of other dimensions than asked")
    for score in scores.values():
        if isinstance(score, bool) or not isinstance(score, int) or not 0 <= score <= 10:
            raise Unreadable("a score that is no whole number from 0 to 10")
    return {name: scores[name] / 10 for name in dimensions}


def read_critiques(reply: Reply, draft: Draft, items: int) -> list[Critique]:
    """Read {"problems": [{"item", "where", "problem", "fix"}, ...]}; an empty list approves of the draft.

    Args:
        items: length of the checklist.
    """
    problems = _object(finished_answer(reply), {"problems"})["problems"]
    if not isinstance(problems, list) or len(problems) > LONGEST_LIST:
        raise Unreadable(f"problems are no list of at most {LONGEST_LIST}")
    return [_critique(problem, items) for problem in problems]


def _critique(problem: Any, items: int) -> Critique:
    if not isinstance(problem, dict) or problem.keys() != {"item", "where", "problem", "fix"}:
        raise Unreadable("a problem with other fields than item, where, problem, fix")
    item = problem["item"]
    if item is not None and (isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= items):
        raise Unreadable("a problem whose item is not in the checklist")
    where = problem["where"] if problem["where"] == "" else _text(problem["where"], "where")
    return Critique(item, where, _text(problem["problem"], "problem"), _text(problem["fix"], "fix"))


def read_line_critiques(reply: Reply, draft: Draft, items: int) -> list[Critique]:
    """Read one sign for each line of the draft, "+" or "-", up to the first wrong line: the form for small models.

    Each line of the reply is the first word of the draft's line, a space and the sign.
    """
    lines = draft.lines
    verdicts = finished_answer(reply).splitlines()
    for number, verdict in enumerate(verdicts):
        if number == len(lines):
            raise Unreadable("more lines than the draft has")
        word, _, sign = verdict.rpartition(" ")
        if word != first_word(lines[number]) or sign not in ("+", "-"):
            raise Unreadable("a line that is no word of the draft and + or -")
        if sign == "-":
            if number + 1 < len(verdicts):
                raise Unreadable("lines after the first wrong one")
            return [Critique(None, f"line {number + 1}", "wrong", "write it again")]
    if len(verdicts) < len(lines):
        raise Unreadable("fewer lines than the draft has")
    return []


def write_line_critiques(draft: Draft, first_wrong: int | None) -> str:
    """Write what `read_line_critiques` reads; `first_wrong` counts from 0, None approves."""
    upto = len(draft.lines) if first_wrong is None else first_wrong + 1
    return "\n".join(
        f"{first_word(line)} {'-' if number == first_wrong else '+'}" for number, line in enumerate(draft.lines[:upto])
    )


def first_word(line: str) -> str:
    return line.split()[0]


def read_tagged(reply: Reply, tags: Sequence[str]) -> dict[str, str]:
    """Read <tag>...</tag> for each tag, once and in this order; text before, between and after them is left out."""
    text, position, found = finished_answer(reply), 0, {}
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise Unreadable(f"not exactly one <{tag}>...</{tag}>")
        start, stop = text.index(opening), text.index(closing)
        if not position <= start < stop:
            raise Unreadable(f"<{tag}> in the wrong place")
        found[tag] = text[start + len(opening) : stop].strip()
        position = stop + len(closing)
        if not found[tag]:
            raise Unreadable(f"an empty <{tag}>")
    return found


def read_thought_chain(reply: Reply) -> dict[str, str]:
    """Read the reply's thought as the chain, and its answer."""
    answer = finished_answer(reply)
    thought = thought_and_answer(reply)[0]
    if not thought:
        raise Unreadable("no thought")
    return {"chain": thought, "answer": answer}


# JSON ----------------------------------------------------------------------------------------------------------------


def _object(text: str, keys: set[str]) -> dict[str, Any]:
    """Read the one JSON object of an answer: alone, in one fenced block, or after words; nothing may follow it."""
    fenced = FENCE.findall(text)
    if len(fenced) > 1:
        raise Unreadable("more than one fenced block")
    source = fenced[0].strip() if fenced else text[max(text.find("{"), 0) :].strip()
    try:
        value = json.loads(source, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError):
        raise Unreadable("not one JSON object") from None
    if not isinstance(value, dict) or value.keys() != keys:
        raise Unreadable(f"not an object with exactly {', '.join(sorted(keys))}")
    return value


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Unreadable("a key that is there twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise Unreadable(f"{name}, which is not JSON")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"{name} is no text")
    return value.strip()
