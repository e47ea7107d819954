"""The messages of a conversation, checked before a template sees them.

A message is {"role": "system|user|assistant|tool", "content": str}. An assistant's may also have `reasoning_content`
(its thinking), `tool_calls` (as in OpenAI's API) and `train: false` (not to be trained on). Other fields are passed on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

THINK, END_OF_THINK = "<think>", "</think>"
ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
T = TypeVar("T")


class ChatError(ValueError):
    """Invalid messages, or a template that raises, hangs or does not show the assistant's turns.

    `kind` is the reason without the details of one record, so that equal kinds can be counted.
    """

    def __init__(self, kind: str, where: str = "", detail: str = "") -> None:
        super().__init__(f"{where}: {kind}{detail}" if where else f"{kind}{detail}")
        self.kind = kind


def outcome(function: Callable[..., T], *arguments: Any) -> T | ChatError:
    """Call a function, and return a `ChatError` that it raises instead of raising it."""
    try:
        return function(*arguments)
    except ChatError as error:
        return error


def or_raise(result: T | ChatError) -> T:
    """Raise the error that `outcome` returned, or return the result."""
    if isinstance(result, ChatError):
        raise result
    return result


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Check messages, and return them as templates expect them.

    Null fields and `train` are left out; the arguments of calls are objects.

    Raises:
        ChatError: names the first invalid message, and why.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ChatError("messages are not a list")
    if not messages:
        raise ChatError("no messages")
    checked = [_check_message(message, f"message {number}") for number, message in enumerate(messages)]
    try:
        json.dumps(checked, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ChatError("not UTF-8") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError("messages are not JSON", detail=f": {error}") from None
    return checked


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError("not an object", where)
    out = {key: value for key, value in message.items() if value is not None}
    if "role" not in out:
        raise ChatError("no role", where)
    if out["role"] not in ROLES:
        raise ChatError("unknown role", where, f" {str(out['role'])[:40]!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(out.pop("train", True), bool):
        raise ChatError("train is neither true nor false", where)
    for key in ("reasoning_content", "tool_calls"):
        if not out.get(key, True):  # an empty value means the same as none
            del out[key]
        if key in out and out["role"] != "assistant":
            raise ChatError(f"{key} outside an assistant turn", where)
    if "tool_calls" in out:
        calls = out["tool_calls"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ChatError("tool_calls are not a list", where)
        out["tool_calls"] = [_check_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls)]
        out.setdefault("content", "")
    if "content" not in out:
        raise ChatError("no content", where)
    for key in ("content", "reasoning_content"):
        if not isinstance(out.get(key, ""), str):
            raise ChatError(f"{key} is not a string", where)
    return out


def _check_call(call: Any, where: str) -> dict[str, Any]:
    """Return `{"type": "function", "function": {"name", "arguments"}}`; `call` may be the inner object alone."""
    outer = call if isinstance(call, Mapping) else {}
    function = outer.get("function", outer)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError("no function name", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # JSON, as OpenAI's API sends them
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ChatError("arguments are not JSON", where) from None
    if not isinstance(arguments, Mapping | None):
        raise ChatError("arguments are not an object", where)
    rest = {} if function is outer else {k: v for k, v in outer.items() if v is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": dict(arguments or {})}}
