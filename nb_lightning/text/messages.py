"""The messages of a conversation, checked before a template sees them.

A message is {"role": "system|user|assistant|tool", "content": str}. An assistant's may also have `reasoning_content`
(its thinking), `tool_calls` (as in OpenAI's API) and `train: false` (not to be trained on). Other fields are passed on.

These spellings of other programs are read too:

| spelling | is |
|---|---|
| the roles `developer` and `function` | `system` and `tool` |
| content that is a list of parts of type text | the joined texts |
| `thinking`, `reasoning` | `reasoning_content` |
| `function_call` | one of `tool_calls` |
| `loss: false`, `weight: 0` | `train: false` |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "function": "tool"}
REASONING = ("reasoning_content", "thinking", "reasoning")
MARKS = {  # fields that say whether to train on a turn -> their values, "yes" first
    "train": ((True, False), "train is neither true nor false"),
    "loss": ((True, False), "loss is neither true nor false"),
    "weight": ((1, 0), "weight is neither 0 nor 1"),
}
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


def assistant_message(content: str, reasoning: str = "") -> dict[str, Any]:
    """Return an assistant's message, with its reasoning if there is any."""
    return {"role": "assistant", **({"reasoning_content": reasoning} if reasoning else {}), "content": content}


def check_messages(messages: Any, strict: bool = False) -> list[dict[str, Any]]:
    """Check messages, and return them as templates expect them.

    Null fields and `train` are left out; the arguments of calls are objects.

    Args:
        strict: refuse what another spelling says but nothing can be made of, as records to train on need it. Otherwise
            such a field is passed on.

    Raises:
        ChatError: names the first invalid message, and why.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ChatError("messages are not a list")
    if not messages:
        raise ChatError("no messages")
    checked = [_check_message(message, f"message {number}", strict) for number, message in enumerate(messages)]
    check_json(checked, "messages")
    return checked


def check_json(value: Any, name: str) -> None:
    """Check that a value can be written as JSON in UTF-8: no half surrogate pairs, no NaN, no endless nesting.

    Raises:
        ChatError: it cannot; the reason names the value by `name`.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ChatError("not UTF-8") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{name} are not JSON", detail=f": {error}") from None


def is_trained(message: Message) -> bool:
    """Whether no mark of a message (`train`, `loss`, `weight`) says not to train on it."""
    return all(message.get(key) is None or bool(message[key]) for key in MARKS)


def _check_message(message: Any, where: str, strict: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError("not an object", where)
    out = {key: value for key, value in message.items() if value is not None}
    try:
        out = _unify_spellings(out, where)
    except ChatError:
        if strict:
            raise
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


def _unify_spellings(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Write a message, which has no null fields, in the one spelling that the rest of the code knows."""
    out = dict(message)
    role = out.get("role")
    if isinstance(role, str):
        out["role"] = OTHER_ROLES.get(role, role)
    if isinstance(content := out.get("content"), list):
        parts = (part for part in content if isinstance(part, Mapping) and part.get("type") == "text")
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        if len(texts) < len(content):
            raise ChatError("content has parts that are not text", where)
        out["content"] = "".join(texts)
    if thoughts := {key: out.pop(key) for key in REASONING if out.get(key)}:
        for key, thought in thoughts.items():
            if not isinstance(thought, str):
                raise ChatError(f"{key} is not a string", where)
            if role != "assistant":
                raise ChatError(f"{key} outside an assistant turn", where)
        if len(set(thoughts.values())) > 1:
            raise ChatError(f"{' and '.join(thoughts)} differ", where)
        out["reasoning_content"] = next(iter(thoughts.values()))
    if call := out.pop("function_call", None):
        if role != "assistant":
            raise ChatError("function_call outside an assistant turn", where)
        if out.get("tool_calls"):
            raise ChatError("both function_call and tool_calls", where)
        out["tool_calls"] = [_check_call(call, f"{where}, function_call")]
    for key, (values, problem) in MARKS.items():
        if key in out and out[key] not in values:
            raise ChatError(problem, where)
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
        except (ValueError, RecursionError):
            raise ChatError("arguments are not JSON", where) from None
    if not isinstance(arguments, Mapping | None):
        raise ChatError("arguments are not an object", where)
    rest = {} if function is outer else {k: v for k, v in outer.items() if v is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": dict(arguments or {})}}
