"""Read what models answer: strictly, and never by a guess. Pure functions of a reply.

Each returns what the reply says, or raises `Unreadable`, whose message is counted in the report. A reply that was cut
off by its length is never read. Words may stand around what was asked for, such as a preamble or the fence of a code
block; but it must be there once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from data.calls.call import Reply
from data.refine.drafts import Critique, Draft
from nb_lightning.text.messages import ChatError, check_messages
from nb_lightning.text.thoughts import END_OF_THINK, THINK, split_thought
from nb_lightning.text.tool_calls import CLOSE, OPEN

LONGEST_LIST = 50  # items of a checklist, problems of a critique
NO_JSON = "not one JSON object"


class Unreadable(ValueError):
    """A reply that is not in the form that was asked for."""


def thought_and_answer(reply: Reply) -> tuple[str, str]:
    """Split a reply into its thought and its answer; the reply may be cut off.

    A reply that was cut off inside its thought has no answer. Calls of tools become text in the answer, in the form
    that the verifier `tool_call` reads.

    Raises:
        Unreadable: the message is none, such as one that is not UTF-8.
    """
    message = {**reply.message, "role": "assistant", "content": reply.message.get("content") or ""}
    try:
        (message,) = check_messages([message])
    except ChatError as error:
        raise Unreadable(error.kind) from None
    message = split_thought(message)
    content, thought = message["content"], message.get("reasoning_content") or ""
    if not thought and content.lstrip().startswith(THINK) and END_OF_THINK not in content:
        return content.lstrip().removeprefix(THINK).strip(), ""
    calls = [_call_text(call["function"]) for call in message.get("tool_calls", ())]
    return thought.strip(), "\n".join([content, *calls]).strip()


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}"


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
    """Read a candidate or a revision, which may be cut off."""
    reasoning, content = thought_and_answer(reply)
    return Draft(name, reasoning, content, reply.finish if reply.is_cut else "stop")


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
    numbers = {name: _whole(scores[name]) for name in dimensions}
    if any(number is None or not 0 <= number <= 10 for number in numbers.values()):
        raise Unreadable("a score that is no whole number from 0 to 10")
    return {name: (number or 0) / 10 for name, number in numbers.items()}


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
    item = None if problem["item"] is None else _whole(problem["item"])
    if problem["item"] is not None and (item is None or not 1 <= item <= items):
        raise Unreadable("a problem whose item is not in the checklist")
    where = "" if problem["where"] in ("", None) else _text(problem["where"], "where")
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


def read_same(reply: Reply) -> bool:
    """Read {"same": true} or {"same": false}."""
    same = _object(finished_answer(reply), {"same"})["same"]
    if not isinstance(same, bool):
        raise Unreadable("same is neither true nor false")
    return same


def read_tagged(reply: Reply, tags: Sequence[str]) -> dict[str, str]:
    """Read <tag>...</tag> for each tag, once and in this order; text before, between and after them is left out.

    A part may hold any tags, also its own if they are balanced: a task may ask for its answer in <answer> tags.
    """
    text, position, parts = finished_answer(reply), 0, {}
    for tag in tags:
        blocks = list(_outermost(text, tag, position))
        if len(blocks) != 1:
            raise Unreadable(f"not exactly one <{tag}>...</{tag}>")
        start, stop = blocks[0]
        parts[tag] = text[start:stop].strip()
        position = stop + len(f"</{tag}>")
        if not parts[tag]:
            raise Unreadable(f"an empty <{tag}>")
    return parts


def _outermost(text: str, tag: str, position: int) -> Iterator[tuple[int, int]]:
    """Yield where each outermost <tag>...</tag> from `position` on begins and ends inside.

    Raises:
        Unreadable: tags are not balanced.
    """
    depth = start = 0
    for match in re.compile(f"<(/?){tag}>").finditer(text, position):
        depth += -1 if match[1] else 1
        if depth < 0:
            break
        if depth == 1 and not match[1]:
            start = match.end()
        if depth == 0:
            yield start, match.start()
    if depth:
        raise Unreadable(f"not exactly one <{tag}>...</{tag}>")


def read_thought_chain(reply: Reply) -> dict[str, str]:
    """Read the reply's thought as the chain, and its answer."""
    answer = finished_answer(reply)
    thought = thought_and_answer(reply)[0]
    if not thought:
        raise Unreadable("no thought")
    return {"chain": thought, "answer": answer}


# JSON ----------------------------------------------------------------------------------------------------------------


def _object(text: str, keys: set[str]) -> dict[str, Any]:
    """Read the one JSON object with exactly these keys; words, fences and other objects may stand around it."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    objects, position = [], text.find("{")
    while position >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
            objects.append(value)
        except Unreadable:
            raise
        except (ValueError, RecursionError):
            position += 1
        position = text.find("{", position)
    fitting = [value for value in objects if value.keys() == keys]
    if len(fitting) != 1:
        raise Unreadable(NO_JSON if not objects else f"not one object with exactly {', '.join(sorted(keys))}")
    return fitting[0]


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


def _whole(value: Any) -> int | None:
    """Return a whole number, also of 8.0 or "8", which can mean nothing else; None for anything else."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,2}", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)
