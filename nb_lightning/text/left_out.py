"""Find what a template left out of a conversation: turns, calls, content beside calls or thoughts, and tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nb_lightning.text.messages import ChatError, Message
from nb_lightning.text.thoughts import END_OF_THINK, split_thought

# Words in a message that a template may obey instead of writing them (SmolLM3, Nemotron Nano 2).
SWITCHES = re.compile(r"(?<!<)/(?:no_)?think\b|/system_override\b")


def missing_tool(tools: Sequence[Any] | None, text: str) -> ChatError | None:
    """Find a tool that a rendered text does not name."""
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and not _occurrences(name, text):
            return ChatError("the template leaves out the tools", detail=f": {name[:40]!r} is not in its text")
    return None


def compare_turn(
    message: Message, index: int, written: str, prompt_opens: bool = False
) -> tuple[bool, ChatError | None]:
    """Compare an assistant's message with the text of its turn.

    Each text takes a place of its own: the name of a function in the content is no call of it, and an answer that
    repeats the thought is not the thought.

    Args:
        prompt_opens: see `split_thought`.

    Returns:
        Whether the turn has the thought (True without one), and what it does not have of content and calls.
    """
    turn = split_thought(message, prompt_opens)
    calls, content = turn.get("tool_calls") or [], str(turn.get("content") or "")
    names = [call.get("function", call)["name"] for call in calls]  # `call` may be the inner object alone
    answer, written = [content, *names], _without_space(written)
    missing = _without_place([*answer, turn.get("reasoning_content") or ""], written)
    has_thought = missing != len(answer)
    if not has_thought:
        missing = _without_place(answer, written)
    if missing is None:
        return has_thought, None
    if missing > 0:
        detail = f": {answer[missing][:40]!r}"
        return has_thought, ChatError("the template leaves out a tool call", f"message {index}", detail)
    beside = " beside a tool call" if calls else " beside a </think>" if END_OF_THINK in content else ""
    return has_thought, ChatError(f"the template leaves out the content{beside}", f"message {index}")


def _occurrences(name: str, text: str) -> int:
    return max(text.count(form) for form in {name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]})


def _without_space(text: str) -> str:
    """Leave out white space, which templates change, and `SWITCHES`."""
    return "".join(SWITCHES.sub("", text).split())


def missing_part(
    messages: Sequence[Message], tools: Sequence[Any] | None, text: str, spans: Mapping[int, tuple[int, int]]
) -> ChatError | None:
    """Find the content of another's turn, an argument of a call or a part of a tool that a text does not have.

    Args:
        spans: index of each assistant turn -> its characters [start, end).
    """
    ends = [0, *(end for span in sorted(spans.values()) for end in span), len(text)]
    context = "\0".join(text[start:end] for start, end in zip(ends[::2], ends[1::2]))
    missing = (
        missing_tool(tools, context)
        or _missing_turn(messages, _without_space(context))
        or _missing_tool_part(tools, _without_space(context))
    )
    for index, (start, end) in spans.items():
        missing = missing or _missing_argument(messages[index], index, _without_space(text[start:end]))
    return missing


def _missing_turn(messages: Sequence[Message], context: str) -> ChatError | None:
    """Find a system, user or tool turn whose content is not in the context."""
    others = [(i, m["role"], str(m.get("content") or "")) for i, m in enumerate(messages) if m["role"] != "assistant"]
    missing = _without_place([content for _, _, content in others], context)
    if missing is None:
        return None
    index, role, _ = others[missing]
    return ChatError(f"the template leaves out the content of a {role} turn", f"message {index}")


def _without_place(parts: Sequence[str], written: str) -> int | None:
    """Return the number of a part that has no place of its own in a text without white space; None if all have one.

    Of two equal parts, the first one takes the first place. Long parts come before short ones, which may be in them.
    """
    for number, part in sorted(enumerate(parts), key=lambda item: -len(_without_space(item[1]))):
        place = next((form for form in _spellings(part) if form in written), None)
        if place is None:
            return number
        written = written.replace(place, "\0", 1)
    return None


def _missing_tool_part(tools: Sequence[Any] | None, context: str) -> ChatError | None:
    """Find a description or a parameter of the tools that is not in the context."""
    for part in _tool_parts(list(tools or [])):
        if not any(form in context for form in _spellings(part)):
            return ChatError("the template leaves out a part of the tools", detail=f": {part[:40]!r}")
    return None


def _tool_parts(value: Any) -> Iterator[str]:
    """Yield the descriptions and the names of parameters in tools."""
    if isinstance(value, list):
        for item in value:
            yield from _tool_parts(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key == "description" and isinstance(item, str):
                yield item
            elif key == "properties" and isinstance(item, Mapping):
                yield from item
                yield from _tool_parts(list(item.values()))
            else:
                yield from _tool_parts(item)


def _missing_argument(message: Message, index: int, written: str) -> ChatError | None:
    for call in message.get("tool_calls") or []:
        for part in _leaves(call.get("function", call).get("arguments")):
            if not any(form in written for form in _spellings(part)):
                detail = f": {part!r:.40}"
                return ChatError("the template leaves out an argument of a tool call", f"message {index}", detail)
    return None


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys, texts and numbers of a JSON value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _spellings(value: Any) -> list[str]:
    """Return how templates write a value: as text, in JSON, in JSON in a string, as Python does."""
    if not isinstance(value, str):
        return [json.dumps(value), str(value)]
    forms = [value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]]
    forms += [json.dumps(form, ensure_ascii=False)[1:-1] for form in forms[1:3]]
    return [_without_space(form) for form in dict.fromkeys(forms)]
