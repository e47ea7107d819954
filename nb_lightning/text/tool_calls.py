"""Tool calls in the text that a model writes: where a call ends, and what it says.

Two forms, both between `<tool_call>` tags: one JSON object (ChatML, Hermes, Qwen 2.5), and XML (Nanbeige 4.2, Qwen 3
Coder):

    <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>
    <tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>

A call is parsed, not searched: a closing tag inside a JSON string or a parameter's value is text.
"""

from __future__ import annotations

import json
import re
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_NOT_SPACE = re.compile(r"\S")
# What to look for outside and inside a string, in which a closing tag is text: the value of a parameter in XML.
_JSON_QUOTES = re.compile(f'"|{CLOSE}'), re.compile(r'"|\\.', re.DOTALL)
_XML_QUOTES = re.compile(f"<parameter=|{CLOSE}"), re.compile("</parameter>")
_LONGEST = len(CLOSE)  # of what these match


class CallEnd:
    """Finds the tag that closes a call, in text that may come in pieces; reads each character about once.

    After a call whose string never ends, tags are searched: no later call costs another walk to the end of the text.
    """

    def __init__(self) -> None:
        self._position = self._start = 0
        self._quotes: tuple[re.Pattern[str], re.Pattern[str]] | None = None  # of the call's form, once that is known
        self._in_string = self._only_searches = False

    def begin(self, start: int = 0) -> None:
        """Begin with the call whose text begins at `start`."""
        self._position = self._start = start
        self._quotes, self._in_string = None, False

    def find(self, text: str, is_complete: bool = True) -> int:
        """Find the closing tag. Return its position, or -1 without one.

        Args:
            text: what the last `find` since `begin` was given, and perhaps more.
            is_complete: no more text comes. Then a string that never ends hides no tag.
        """
        if self._only_searches:
            return text.find(CLOSE, self._start)
        if self._quotes is None:
            if (first := _NOT_SPACE.search(text, self._start)) is None:
                return -1
            self._quotes = _XML_QUOTES if first[0] == "<" else _JSON_QUOTES
        while match := self._quotes[self._in_string].search(text, self._position):
            if match[0] == CLOSE:
                return match.start()
            self._position = match.end()
            if not match[0].startswith("\\"):
                self._in_string = not self._in_string
        # What may begin a match is read again with the text that follows.
        self._position = max(self._position, len(text) - _LONGEST)
        if is_complete and self._in_string:
            self._only_searches = True
            return text.find(CLOSE, self._start)
        return -1


def split_calls(text: str) -> list[str]:
    """Return the text of each closed call, in order."""
    calls: list[str] = []
    call_end, position = CallEnd(), 0
    while (opening := text.find(OPEN, position)) >= 0:
        start = opening + len(OPEN)
        call_end.begin(start)
        end = call_end.find(text)
        if end < 0:
            break
        calls.append(text[start:end])
        position = end + len(CLOSE)
    return calls


def parse_call(text: str, strict: bool = True) -> dict[str, Any] | None:
    """Parse the text between the tags into {"name": str, "arguments": dict}; None if it is no call.

    Arguments may be an object, or the JSON of one as a string (OpenAI's form). In the XML form a value that is JSON
    other than a string is read as JSON.

    Args:
        strict: refuse other keys, and arguments that are no object, as a verifier must. Otherwise other keys are
            ignored, and arguments may be any value: a client can tell the model what is wrong with them.
    """
    if text.lstrip().startswith("<"):
        return _parse_xml(text)
    call = _parse_json(text, strict)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        parsed = _parse_json(arguments or "{}", strict)
        arguments = parsed if isinstance(parsed, dict) else arguments
    if strict and not (isinstance(arguments, dict) and call.keys() <= {"name", "arguments"}):
        return None
    return {"name": call["name"], "arguments": arguments}


def _parse_json(text: str, strict: bool = True) -> Any:
    """Parse JSON; None if it is not JSON. NaN and infinity are not, if `strict`."""
    try:
        return json.loads(text, parse_constant=_refuse_constant if strict else None)
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
