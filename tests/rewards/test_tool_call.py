from __future__ import annotations

import json
from typing import Any

import pytest

from nb_lightning.rewards import get_verifier
from nb_lightning.rewards.tool_call import calls_of
from nb_lightning.text.chat_template import ChatTemplate

ROME = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
ADD = {"name": "add", "arguments": {"a": [1, {"b": None}]}}


def block(call: Any) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def status(completion: str, reference: Any = ROME) -> str:
    (score,) = get_verifier("tool_call").score("?", [completion], reference)
    assert score.reward == (score.info["status"] == "correct")
    return score.info["status"]


@pytest.mark.parametrize(
    "completion, expected",
    [
        (block(ROME), "correct"),
        (f"I will look.\n{block(ROME)} One moment.", "correct"),
        (f"<think>\nRome or {block(ADD)}?\n</think>\n\n{block(ROME)}", "correct"),
        ('<tool_call>{"arguments": {"days": 2.0, "city": "Rome"}, "name": "weather"}</tool_call>', "correct"),
        (block({**ROME, "arguments": {"city": "Rom", "days": 2}}), "wrong"),
        (block({**ROME, "arguments": {"city": "Rome"}}), "wrong"),
        (block({**ROME, "arguments": {"city": "Rome", "days": 2, "more": 1}}), "wrong"),
        (block({**ROME, "arguments": {"city": "Rome", "days": "2"}}), "wrong"),
        (block({**ROME, "id": 3}), "wrong"),
        (block({**ROME, "name": "weathers"}), "wrong"),
        (block(ROME) * 2, "wrong"),
        (block(ROME) + block(ADD), "wrong"),
        ("<tool_call>{oops}</tool_call>", "wrong"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "wrong"),
        (json.dumps(ROME), "no_answer"),
        (block(ROME).removesuffix("</tool_call>"), "no_answer"),
        (f"<think>{block(ROME)}", "no_answer"),
        ("", "no_answer"),
        (
            '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 2}"}</tool_call>',
            "correct",
        ),
        (
            "<tool_call><function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function></tool_call>",
            "correct",
        ),
    ],
)
def test_one_call_is_compared(completion: str, expected: str) -> None:
    assert status(completion) == expected


def test_a_closing_tag_inside_an_argument_is_text() -> None:
    call = {"name": "write", "arguments": {"text": "close it with </tool_call> please"}}
    assert status(block(call), call) == "correct" and status(block(call) + block(ROME), [call, ROME]) == "correct"


def test_several_calls_are_compared_in_order() -> None:
    assert status(block(ROME) + "\n" + block(ADD), [ROME, ADD]) == "correct"
    assert status(block(ADD) + block(ROME), [ROME, ADD]) == "wrong"
    assert status(block(ROME), [ROME, ADD]) == "wrong"


def test_a_truth_value_is_no_number() -> None:
    call = {"name": "set", "arguments": {"on": True, "level": 0}}
    assert status(block(call), call) == "correct"
    assert status(block({"name": "set", "arguments": {"on": 1, "level": 0}}), call) == "wrong"
    assert status(block({"name": "set", "arguments": {"on": True, "level": False}}), call) == "wrong"


def test_what_our_template_writes_is_read() -> None:
    calls = [{"type": "function", "function": call} for call in (ROME, ADD)]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes.", "tool_calls": calls}]
    text = ChatTemplate.chatml().render(messages)
    assert calls_of(text.rpartition("assistant\n")[2]) == [ROME, ADD]


@pytest.mark.parametrize("reference", [None, "weather", [], [ROME, 3], {"name": "x"}, {**ROME, "arguments": "{}"}])
def test_a_bad_reference_is_refused(reference: Any) -> None:
    with pytest.raises(ValueError, match="the reference of 'tool_call' is"):
        get_verifier("tool_call").check(reference)
