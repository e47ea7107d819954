"""Find what a template left out of a conversation: turns, calls, content beside calls or thoughts, and tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nb_lightning.text.messages import ChatError, Message
from nb_lightning.text.thoughts import END_OF_THINK, without_thought


def missing_tool(tools: Sequence[Any] | None, text: str) -> ChatError | None:
    """Find a tool that a rendered text does not name."""
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and not _occurrences(name, text):
            return ChatError("the template leaves out the tools", detail=f": {name[:40]!r} is not in its text")
    return None


def missing_content(message: Message, index: int, written: str, prompt_opens: bool = False) -> ChatError | None:
    """Find a call of an assistant turn, or content beside calls or a `</think>`, that the turn's text does not have.

    Args:
        prompt_opens: see `split_thought`.
    """
    calls = message.get("tool_calls") or []
    names = [call.get("function", call)["name"] for call in calls]  # `call` may be the inner object alone
    for name, count in Counter(names).items():
        if _occurrences(name, written) < count:
            return ChatError("the template leaves out a tool call", f"message {index}", f": {name[:40]!r}")
    if calls or END_OF_THINK in (message.get("content") or ""):
        content = without_thought(message, prompt_opens).get("content") or ""
        if _without_space(content) not in _without_space(written):
            beside = "a tool call" if calls else "a </think>"
            return ChatError(f"the template leaves out the content beside {beside}", f"message {index}")
    return None


def _occurrences(name: str, text: str) -> int:
    return max(text.count(form) for form in {name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]})


def _without_space(text: str) -> str:
    """Leave out white space, which templates change."""
    return "".join(text.split())


def missing_part(
    messages: Sequence[Message], tools: Sequence[Any] | None, text: str, spans: Mapping[int, tuple[int, int]]
) -> ChatError | None:
    """Find the content of another's turn, an argument of a call or a part of a tool that a text does not have.

    Args:
        spans: index of each assistant turn -> its characters [start, end).
    """
    ends = [0, *(end for span in sorted(spans.values()) for end in span), len(text)]
    context = "\0".join(text[start:end] for start, end in zip(ends[::2], ends[1::2]))
    missing = _missing_turn(messages, _without_space(context)) or _missing_tool_part(tools, _without_space(context))
    for index, (start, end) in spans.items():
        missing = missing or _missing_argument(messages[index], index, _without_space(text[start:end]))
    return missing


def _missing_turn(messages: Sequence[Message], context: str) -> ChatError | None:
    """Find a system, user or tool turn whose content is not in the context: each takes a place of its own."""
    others = [(i, m, str(m.get("content") or "")) for i, m in enumerate(messages) if m["role"] != "assistant"]
    for index, message, content in sorted(others, key=lambda other: -len(other[2])):
        written = next((form for form in _spellings(content) if form in context), None)
        if written is None:
            return ChatError(f"the template leaves out the content of a {message['role']} turn", f"message {index}")
        context = context.replace(written, "\0", 1)
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
