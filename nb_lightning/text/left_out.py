"""Find what a template left out of a conversation: tool calls, content beside calls, and tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nb_lightning.text.messages import INLINE_THOUGHT, ChatError, Message


def check_tools_written(tools: Sequence[Any] | None, text: str) -> None:
    """Check that a rendered text names each of the tools.

    Raises:
        ChatError: the template leaves out the tools.
    """
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and not _occurrences(name, text):
            raise ChatError("the template leaves out the tools", detail=f": {name[:40]!r} is not in its text")


def check_calls_written(message: Message, index: int, written: str) -> None:
    """Check that the text of an assistant turn has each of its calls, and the content beside them.

    Raises:
        ChatError: the template leaves out a tool call, or the content beside it.
    """
    calls = message.get("tool_calls") or []
    names = [call.get("function", call)["name"] for call in calls]  # `call` may be the inner object alone
    for name, count in Counter(names).items():
        if _occurrences(name, written) < count:
            raise ChatError("the template leaves out a tool call", f"message {index}", f": {name[:40]!r}")
    if calls and _squeezed(INLINE_THOUGHT.sub("", message.get("content") or "")) not in _squeezed(written):
        raise ChatError("the template leaves out the content beside a tool call", f"message {index}")


def _occurrences(name: str, text: str) -> int:
    return max(text.count(form) for form in {name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]})


def _squeezed(text: str) -> str:
    """Leave out white space, which templates change."""
    return "".join(text.split())
