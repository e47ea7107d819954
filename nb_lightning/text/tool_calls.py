"""Tool calls in the text that a model writes: where a call ends, and what it says.

Two forms, both between `<tool_call>` tags: one JSON object (ChatML, Hermes, Qwen 2.5), and XML (Nanbeige 4.2, Qwen 3
Coder):

    <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>
    <tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>

A call is parsed, not searched: a closing tag inside a JSON string is text.
"""

from __future__ import annotations

import json
import re
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


def find_close(text: str, start: int = 0, is_complete: bool = True) -> int:
    """Find the tag that closes the call whose text begins at `start`. Return its position, or -1 without one.

    Args:
        is_complete: no more text comes. Then a JSON string that never ends hides no tag.
    """
    if text[start : start + 100].lstrip().startswith("<"):
        return text.find(CLOSE, start)
    in_string = is_escaped = False
    for position in range(start, len(text)):
        character = text[position]
        if is_escaped:
            is_escaped = False
        elif in_string:
            is_escaped, in_string = character == "\\", character != '"'
        elif character == '"':
            in_string = True
        elif character == "<" and text.startswith(CLOSE, position):
            return position
    return text.find(CLOSE, start) if in_string and is_complete else -1


def split_calls(text: str) -> list[str]:
    """Return the text of each closed call, in order."""
    calls: list[str] = []
    position = 0
    while (opening := text.find(OPEN, position)) >= 0:
        start = opening + len(OPEN)
        end = find_close(text, start)
        if end < 0:
            break
        calls.append(text[start:end])
        position = end + len(CLOSE)
    return calls


def parse_call(text: str) -> dict[str, Any] | None:
    """Parse the text between the tags into {"name": str, "arguments": dict}; None if it is no call.

    Arguments may be an object, or the JSON of one as a string (OpenAI's form). In the XML form a value that is JSON
    other than a string is read as JSON.
    """
    if text.lstrip().startswith("<"):
        return _parse_xml(text)
    call = _parse_json(text)
    if not isinstance(call, dict) or not {"name"} <= call.keys() <= {"name", "arguments"}:
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}")
    if not isinstance(call["name"], str) or not isinstance(arguments, dict):
        return None
    return {"name": call["name"], "arguments": arguments}


def _parse_json(text: str) -> Any:
    """Parse JSON; None if it is not JSON. NaN and infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_xml(text: str) -> dict[str, Any] | None:
    function = _FUNCTION.fullmatch(text.strip())
    if function is None:
        return None
    arguments: dict[str, Any] = {}
    for name, value in _PARAMETER.findall(function[2]):
        value = value.removeprefix("\n").removesuffix("\n")
        parsed = _parse_json(value)
        is_text = isinstance(parsed, str) or (parsed is None and value != "null")
        arguments[name.strip()] = value if is_text else parsed
    return {"name": function[1].strip(), "arguments": arguments}
