"""Messages in every spelling: what they become, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.messages import ChatError, check_messages, is_trained

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def assistant(content: Any = "4", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    "message, is_read_as",
    [
        (assistant(thinking="sum"), assistant(reasoning_content="sum")),
        (assistant(reasoning="sum"), assistant(reasoning_content="sum")),
        (assistant(reasoning="sum", reasoning_content="sum"), assistant(reasoning_content="sum")),
        (assistant(thinking=None, reasoning=None), assistant()),
        (assistant(function_call={"name": "add", "arguments": '{"a": 1}'}), assistant(tool_calls=[CALL])),
        (assistant(None, function_call={"name": "add", "arguments": {"a": 1}}), assistant("", tool_calls=[CALL])),
        (assistant(None, tool_calls=[CALL]), assistant("", tool_calls=[CALL])),
        (assistant(function_call=None), assistant()),
        (assistant([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("ab")),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "function", "name": "add", "content": "4"}, {"role": "tool", "name": "add", "content": "4"}),
    ],
)  # fmt: skip
def test_other_spellings_are_read(message: dict[str, Any], is_read_as: dict[str, Any]) -> None:
    for strict in (True, False):
        assert check_messages([message], strict) == [is_read_as]
    assert check_messages(check_messages([message], strict=True)) == [is_read_as]


@pytest.mark.parametrize(
    "message, problem",
    [
        (assistant(thinking="a", reasoning="b"), "message 0: thinking and reasoning differ"),
        (assistant(thinking="a", reasoning_content="b"), "reasoning_content and thinking differ"),
        (assistant(thinking=["a"]), "thinking is not a string"),
        ({"role": "user", "content": "x", "reasoning": "a"}, "reasoning outside an assistant turn"),
        (assistant(function_call={"arguments": "{}"}), "message 0, function_call: no function name"),
        (assistant(function_call={"name": "f", "arguments": "{"}), "arguments are not JSON"),
        (assistant(function_call={"name": "f", "arguments": "[" * 100_000}), "arguments are not JSON"),
        (assistant(function_call={"name": "f"}, tool_calls=[CALL]), "both function_call and tool_calls"),
        ({"role": "user", "content": "x", "function_call": {"name": "f"}}, "function_call outside an assistant turn"),
        (assistant([{"type": "image_url", "image_url": {}}]), "content has parts that are not text"),
        (assistant([{"type": "text", "text": 3}]), "content has parts that are not text"),
        (assistant(weight=0.5), "weight is neither 0 nor 1"),
        (assistant(weight="0"), "weight is neither 0 nor 1"),
        (assistant(loss="no"), "loss is neither true nor false"),
        (assistant(train="no"), "train is neither true nor false"),
    ],
)  # fmt: skip
def test_records_with_what_cannot_be_read_are_refused_by_name(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(ChatError, match=problem):
        check_messages([message], strict=True)


@pytest.mark.parametrize("field", [{"weight": 0.5}, {"reasoning": {"effort": "low"}}, {"function_call": "auto"}])
def test_a_request_with_such_a_field_is_still_accepted(field: dict[str, Any]) -> None:
    assert check_messages([assistant(**field)]) == [assistant(**field)]


@pytest.mark.parametrize(
    "marks, trained",
    [({}, True), ({"weight": 1}, True), ({"weight": 0}, False), ({"weight": 0.0}, False), ({"loss": False}, False),
     ({"loss": True, "weight": 0}, False), ({"train": False}, False), ({"train": None, "loss": None}, True)],
)  # fmt: skip
def test_marks(marks: dict[str, Any], trained: bool) -> None:
    message = assistant(**marks)
    assert is_trained(message) == trained
    _, spans = ChatTemplate.chatml().render_with_spans([{"role": "user", "content": "2+2?"}, message])
    assert len(spans) == trained
