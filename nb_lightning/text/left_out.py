"""Find what a template left out of a conversation: tool calls, content beside calls, and tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nb_lightning.text.messages import INLINE_THOUGHT, ChatError, Message


def missing_tool(tools: Sequence[Any] | None, text: str) -> ChatError | None:
    """Find a tool that a rendered text does not name."""
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and not _occurrences(name, text):
            return ChatError("the template leaves out the tools", detail=f": {name[:40]!r} is not in its text")
    return None


def missing_call(message: Message, index: int, written: str) -> ChatError | None:
    """Find a call of an assistant turn, or content beside its calls, that the turn's text does not have."""
    calls = message.get("tool_calls") or []
    names = [call.get("function", call)["name"] for call in calls]  # `call` may be the inner object alone
    for name, count in Counter(names).items():
        if _occurrences(name, written) < count:
            return ChatError("the template leaves out a tool call", f"message {index}", f": {name[:40]!r}")
    content = INLINE_THOUGHT.sub("", message.get("content") or "") if calls else ""
    if _without_space(content) not in _without_space(written):
        return ChatError("the template leaves out the content beside a tool call", f"message {index}")
    return None


def _occurrences(name: str, text: str) -> int:
    return max(text.count(form) for form in {name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]})


def _without_space(text: str) -> str:
    """Leave out white space, which templates change."""
    return "".join(text.split())
