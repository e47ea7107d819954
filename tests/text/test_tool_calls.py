"""Tool calls are parsed: a closing tag inside a string is text, and each form gives the same call."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nb_lightning.text.tool_calls import CLOSE, CallEnd, parse_call, split_calls

CALL = {"name": "write", "arguments": {"text": "close it with </tool_call> please", "n": 2}}
XML = """
<function=search>
<parameter=query>
two lines,
"quoted" {and} braced
</parameter>
<parameter=limit>
3
</parameter>
<parameter=tags>
["a", "b"]
</parameter>
</function>
"""


def test_a_closing_tag_inside_a_string_is_text() -> None:
    text = f"first <tool_call>\n{json.dumps(CALL)}\n</tool_call> then <tool_call>{json.dumps(CALL)}</tool_call>"
    assert [parse_call(call) for call in split_calls(text)] == [CALL, CALL]


def test_an_escaped_quote_does_not_end_a_string() -> None:
    call = {"name": "f", "arguments": {"s": 'say "</tool_call>" and \\'}}
    assert [parse_call(c) for c in split_calls(f"<tool_call>{json.dumps(call)}</tool_call>")] == [call]


def test_a_call_that_is_not_closed_is_none() -> None:
    assert split_calls(f"<tool_call>{json.dumps(CALL)}") == []
    assert CallEnd().find('{"name": "f", "arguments": {"s": "</tool_call>', is_complete=False) == -1


@pytest.mark.timeout(60)
def test_hostile_text_costs_little() -> None:
    """A second; hours, were each call to cost a walk to the end of the text."""
    for text in (
        "<tool_call>",
        '<tool_call>"',
        '<tool_call>"</tool_call>',
        "<tool_call><</tool_call>",
        '<tool_call>\\"',
        '<tool_call>"\\"</tool_call>',  # no string ends where its call does
        "<tool_call><parameter=</tool_call>",
    ):
        split_calls(text * 50_000)
    call_end, text = CallEnd(), ""
    for _ in range(20_000):  # a token at a time
        text += '"\\" x'
        assert call_end.find(text, is_complete=False) == -1


def test_a_string_that_never_ends_stops_at_the_next_tag() -> None:
    first, second = split_calls('<tool_call>{"name": "f</tool_call> <tool_call>{"name": "g"}</tool_call>')
    assert parse_call(first) is None and parse_call(second) == {"name": "g", "arguments": {}}


@pytest.mark.parametrize(
    "arguments, parsed",
    [
        ({"a": 1}, {"a": 1}),
        ('{"a": 1}', {"a": 1}),  # OpenAI's form: the JSON of an object, as a string
        ("", {}),
        ("[1]", None),
        ("not JSON", None),
        ([1], None),
        (None, None),
    ],
)
def test_arguments_are_an_object_or_its_json(arguments: Any, parsed: dict[str, Any] | None) -> None:
    call = parse_call(json.dumps({"name": "f", "arguments": arguments}))
    assert call == (None if parsed is None else {"name": "f", "arguments": parsed})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"f"', '{"name": 1}', '{"arguments": {}}', '{"name": "f", "args": {}}', "[" * 100_000,
             '{"name": "f", "arguments": {"x": NaN}}', "<function=f>"]
)  # fmt: skip
def test_what_is_no_call_is_none(text: str) -> None:
    assert parse_call(text) is None


def test_the_xml_form_gives_text_and_json_values() -> None:
    arguments = {"query": 'two lines,\n"quoted" {and} braced', "limit": 3, "tags": ["a", "b"]}
    assert [parse_call(call) for call in split_calls(f"<tool_call>{XML}</tool_call>")] == [
        {"name": "search", "arguments": arguments}
    ]


def test_a_quote_in_the_xml_form_hides_no_closing_tag() -> None:
    call = '<function=f>\n<parameter=s>\nan "open quote\n</parameter>\n</function>'
    assert len(split_calls(f"<tool_call>{call}</tool_call><tool_call>{call}</tool_call>")) == 2


def test_a_closing_tag_inside_the_value_of_a_parameter_is_text() -> None:
    call = "<function=f><parameter=s>write </tool_call> here</parameter></function>"
    assert [parse_call(c) for c in split_calls(f"<tool_call>{call}</tool_call>")] == [
        {"name": "f", "arguments": {"s": "write </tool_call> here"}}
    ]


@pytest.mark.parametrize("call", [json.dumps(CALL), XML, f"  \n{json.dumps(CALL)}", '{"s": "\\\\"}'])
def test_the_end_is_the_same_however_the_text_comes(call: str) -> None:
    text = f"{call}{CLOSE} and more"
    for first in range(len(text) + 1):
        call_end = CallEnd()
        ends = [call_end.find(text[:end], is_complete=False) for end in (first, *range(first, len(text) + 1))]
        assert {end for end in ends if end >= 0} == {len(call)}
        assert all(end < 0 for end, length in zip(ends, (first, *range(first, len(text)))) if length < len(call))


def test_what_only_a_lenient_reader_takes_for_a_call() -> None:
    for text, arguments in (('{"name": "f", "id": 1}', {}), ('{"name": "f", "arguments": [1]}', [1])):
        assert parse_call(text) is None
        assert parse_call(text, strict=False) == {"name": "f", "arguments": arguments}
