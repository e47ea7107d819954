"""Conversations become samples: every form of record, every bad one by name, every knob."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.prepare.conversations import chat_of
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.messages import ChatError
from tests.data.prepare.chat_harness import (
    ANSWER,
    ASK,
    CALL,
    DROPS_THOUGHTS,
    INLINE,
    ONLY_CONTENT,
    PAIR,
    TWO,
    USER2,
    assistant,
    everything,
    qwen3,
    samples,
    samples_of,
    trained,
)
from tests.harness import ROOT


def test_only_what_the_assistant_wrote_is_trained_and_nothing_follows_it() -> None:
    (marked,) = samples_of({"messages": TWO})
    assert trained(marked) == "[<think>\nAdd.\n</think>\n\n2<|im_end|>][<think>\nSum.\n</think>\n\n4<|im_end|>]"
    assert everything(marked) == ChatTemplate.chatml().render(TWO).removesuffix("\n")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PAIR},
        {"messages": PAIR, "tools": None, "id": 7},
        {"messages": PAIR, "tools": "", "system": ""},
        {"conversations": [{"from": "human", "value": "1+1?"}, {**ANSWER, "from": "gpt", "value": "2"}]},
        {"conversations": PAIR, "messages": None},
        {"prompt": "1+1?", "completion": "<think>\nAdd.\n</think>\n\n2"},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"instruction": "1+1?", "output": "<think>\nAdd.\n</think>\n\n2"},
        {"instruction": "1+1?", "input": "", "output": "<think>\nAdd.\n</think>\n\n2", "history": [], "system": ""},
    ],
)  # fmt: skip
def test_forms_of_records(record: dict) -> None:
    assert samples(record) == ["[<think>\nAdd.\n</think>\n\n2<|im_end|>]"]


def test_alpaca_records() -> None:
    record = {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be exact.",
              "history": [["Hi", "Hello"], ["Ready?", "Yes"]]}  # fmt: skip
    (marked,) = samples_of(record)
    messages = [("system", "Be exact."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Ready?"),
                ("assistant", "Yes"), ("user", "Add.\n1 and 1"), ("assistant", "2")]  # fmt: skip
    as_messages = {"messages": [{"role": role, "content": content} for role, content in messages]}
    assert marked == samples_of(as_messages)[0]
    assert trained(marked) == "[Hello<|im_end|>][Yes<|im_end|>][2<|im_end|>]"


def test_functions_are_tools_in_an_earlier_form() -> None:
    function = {"name": "get_weather", "parameters": {"type": "object"}}
    (old,) = samples_of({"messages": PAIR, "functions": [function]})
    (new,) = samples_of({"messages": PAIR, "tools": [{"type": "function", "function": function}]})
    assert old == new and "get_weather" in everything(old)


def test_system_and_tools_are_written() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    for tools in ([tool], json.dumps([tool])):
        (marked,) = samples_of({"messages": PAIR, "tools": tools, "system": "Be exact."})
        text = everything(marked)
        assert text.startswith("<|im_start|>system\nBe exact.\n\n# Tools") and '"add"' in text


@pytest.mark.parametrize(
    "record, reason",
    [
        ({}, "no messages: it has nothing"),
        ({"text": "x", "prompt": "y"}, "no messages: it has text, prompt"),
        ({"messages": None, "id": 1}, "no messages: it has id"),
        ({"instruction": "x"}, "no messages: it has instruction"),
        ({"instruction": "x", "output": ""}, "message 1: an empty assistant turn"),
        ({"instruction": ["x"], "output": "y"}, "instruction is not a text"),
        ({"instruction": "x", "input": 3, "output": "y"}, "input is not a text"),
        ({"instruction": "x", "input": 0, "output": "y"}, "input is not a text"),
        ({"instruction": "x", "output": "y", "chat_template_kwargs": []}, "chat_template_kwargs is not a JSON object; "
         'write it as {"enable_thinking": false}'),
        ({"instruction": "x", "output": {"a": 1}}, "message 1: content is not a string"),
        ({"instruction": "x", "output": "y", "history": "z"}, "history is not a list of pairs of texts"),
        ({"instruction": "x", "output": "y", "history": [["z"]]}, "history is not a list of pairs of texts"),
        ({"messages": "x"}, "messages are not a list"),
        ({"messages": []}, "no messages"),
        ({"messages": [ASK]}, "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0: unknown role 'bot'"),
        ({"messages": [ASK, {**ANSWER, "train": False}]}, "every assistant turn is marked train: false"),
        ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "message 1: an empty assistant turn"),
        ({"conversations": "x"}, "messages are not a list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 0: unknown role 'alien'"),
        ({"conversations": [{"from": "human"}]}, "message 0: no content"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown role"),
        ({"prompt": 1, "completion": "x"}, "prompt is neither a text nor a list of messages"),
        ({"prompt": "x", "completion": {}}, "completion is neither a text nor a list of messages"),
        ({"messages": PAIR, "tools": "{"}, "tools are not JSON"),
        ({"messages": PAIR, "tools": [1]}, "tools are not a list of objects"),
        ({"messages": PAIR, "functions": [1]}, "functions are not a list of objects"),
        ({"messages": PAIR, "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "both tools and functions"),
        ({"messages": PAIR, "system": 3}, "message 0: content is not a string"),
        ({"messages": [{"role": "system", "content": "x"}, *PAIR], "system": "y"}, "two system prompts"),
    ],
)  # fmt: skip
def test_bad_records(record: dict, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        chat_of(record)


def test_train_false() -> None:
    first, second = "[<think>\nAdd.\n</think>\n\n2<|im_end|>]", "[<think>\nSum.\n</think>\n\n4<|im_end|>]"
    assert samples({"messages": [*TWO[:3], {**TWO[3], "train": False}]}) == [first]
    assert samples({"messages": [ASK, {**ANSWER, "train": False}, *TWO[2:]]}) == [second]
    assert samples({"messages": [ASK, {**ANSWER, "train": None}, *TWO[2:]]}) == [first + second]


def test_think_by_knob() -> None:
    assert samples({"messages": TWO}, think=False) == ["[2<|im_end|>][4<|im_end|>]"]
    inline = {"prompt": "<think>", "completion": " <think>a\nb</think>\n c</think>"}
    assert samples(inline, think=False) == ["[c</think><|im_end|>]"]
    assert samples(inline) == ["[ <think>a\nb</think>\n c</think><|im_end|>]"]


def test_history_whose_reasoning_the_template_leaves_out() -> None:
    first, last = "[<think>\nAdd.\n</think>\n\n2<|im_end|>]", "[<think>\nSum.\n</think>\n\n4<|im_end|>]"
    assert samples({"messages": TWO}, template=qwen3()) == [first, last]  # two samples
    assert samples({"messages": TWO}, template=qwen3(), history="mask") == [last]
    assert samples({"messages": TWO}, template=qwen3(), history="keep") == ["[2<|im_end|>]" + last]
    assert samples({"messages": [*TWO[:3], {**TWO[3], "train": False}]}, template=qwen3()) == [first]
    plain = [ASK, {"role": "assistant", "content": "2"}, *TWO[2:]]  # without reasoning there is nothing to lose
    assert samples({"messages": plain}, template=qwen3()) == ["[2<|im_end|>]" + last]
    silent = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    silent += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(ChatError, match="message 1: the template leaves out the reasoning"):
        samples({"messages": PAIR}, template=silent)
    with pytest.raises(ChatError, match="the reasoning of every turn to train on"):
        samples({"messages": PAIR}, template=silent, history="mask")
    assert samples({"messages": PAIR}, template=silent, think=False) == ["[2<|im_end|>]"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_in_any_field_is_trained_on(key: str) -> None:
    assert samples({"messages": [ASK, assistant("2", **{key: "Add."})]}) == [f"[{INLINE}<|im_end|>]"]


def test_a_thought_in_the_content_that_the_template_drops_is_no_silent_loss() -> None:
    for written in (INLINE, "Add.\n</think>\n\n2"):
        with pytest.raises(ChatError, match="message 1: the template leaves out the reasoning"):
            samples({"messages": [ASK, assistant(written)]}, template=DROPS_THOUGHTS)
    assert samples({"messages": [ASK, assistant(INLINE)]}, template=DROPS_THOUGHTS, think=False) == ["[2<|im_end|>]"]
    only_last = DROPS_THOUGHTS.replace("m.role == 'assistant'", "m.role == 'assistant' and not loop.last")
    both = [ASK, assistant(INLINE), USER2, assistant("4")]  # knows no reasoning_content
    assert samples({"messages": both}, template=only_last) == [f"[{INLINE}<|im_end|>]", "[4<|im_end|>]"]


@pytest.mark.parametrize("style", ["qwen3", "nanbeige"])
def test_a_thought_in_the_content_is_written_as_in_its_own_field(style: str) -> None:
    template = (ROOT / f"tests/templates/{style}_style.jinja").read_text()
    for first in (assistant("2"), assistant(INLINE)):
        records = [
            {"messages": [ASK, first, USER2, last]}
            for last in (assistant("<think>Sum.</think>4"), assistant("4", reasoning_content="Sum."))
        ]
        if first["content"] == INLINE:
            records[1]["messages"][1] = ANSWER
        inline, field = (samples_of(record, template=template) for record in records)
        assert inline == field


def test_templates_that_leave_out_calls_or_tools_are_named() -> None:
    tool = {"type": "function", "function": {"name": "get_weather"}}
    messages = [ASK, assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("4")]
    with pytest.raises(ChatError, match="message 1: the template leaves out a tool call: 'get_weather'"):
        samples({"messages": messages}, template=ONLY_CONTENT)
    with pytest.raises(ChatError, match="the template leaves out the tools: 'get_weather'"):
        samples({"messages": [ASK, assistant("2")], "tools": [tool]}, template=ONLY_CONTENT)
    first_call = ONLY_CONTENT.replace("{{ m.content", "{{ m.tool_calls[0] | tojson if m.tool_calls else m.content")
    for calls, beside in (([CALL, CALL], ""), ([CALL], "Let me look.")):
        with pytest.raises(ChatError, match=r"message 1: the template leaves out (a tool call|the content beside)"):
            samples({"messages": [ASK, assistant(beside, tool_calls=calls)]}, template=first_call)
    assert len(samples({"messages": messages, "tools": [tool]}, template=None)) == 1


def test_calls_in_every_spelling_are_trained_on() -> None:
    written = '[<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>]'
    inner = CALL["function"]
    for value in (inner, [inner], json.dumps(inner), json.dumps([inner])):
        turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
        assert samples({"conversations": [*turns, {"from": "observation", "value": "4"}]}) == [written]
    assert samples({"messages": [ASK, assistant(None, function_call=inner)]}) == [written]
    assert samples({"messages": [ASK, assistant("Look.", function_call=inner)]}) == ["[Look.\n" + written[1:]]
    for value, problem in (("look", "is not JSON"), ([], "is empty"), ("[" * 100_000, "is not JSON")):
        with pytest.raises(ChatError, match=f"a function_call {problem}"):
            chat_of({"conversations": [{"from": "function_call", "value": value}]})


def test_without_thoughts_nothing_of_a_thought_is_trained_on() -> None:
    assert samples({"messages": [ASK, assistant("Add.\n</think>\n\n2")]}, think=False) == ["[2<|im_end|>]"]
    for turn in (
        assistant("<think>only</think>"),
        assistant("only\n</think>"),
        assistant("", reasoning_content="only"),
    ):
        with pytest.raises(ChatError, match="message 1: an empty assistant turn"):
            samples({"messages": [ASK, turn]}, think=False)
        assert "only" in samples({"messages": [ASK, turn]})[0]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_marked_turns_are_not_trained_on(mark: dict[str, Any]) -> None:
    assert samples({"messages": [ASK, assistant("5", **mark), USER2, assistant("4")]}) == ["[4<|im_end|>]"]
    shared = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", **mark}]}
    with pytest.raises(ChatError, match="every assistant turn is marked train: false"):
        samples(shared)


def test_examples_in_a_prompt_are_not_trained_on() -> None:
    prompt = [ASK, assistant("2"), USER2]
    for extra in ({}, {"system": "Be brief."}):
        assert samples({"prompt": prompt, "completion": "4", **extra}) == ["[4<|im_end|>]"]
        assert samples({"prompt": prompt, "completion": [assistant("4")], **extra}) == ["[4<|im_end|>]"]
    with pytest.raises(ChatError, match="no assistant turn"):
        samples({"prompt": prompt, "completion": [USER2]})


@pytest.mark.parametrize(
    "tools, problem",
    [
        ([{"name": "f", "description": "\ud83d"}], "not UTF-8"),
        ([{"name": "f", "limit": float("nan")}], "tools are not JSON"),
        ('[{"name": "f", "limit": Infinity}]', "tools are not JSON"),
        ("[" * 100_000, "tools are not JSON"),
    ],
)  # fmt: skip
def test_tools_are_checked_as_messages_are(tools: Any, problem: str) -> None:
    with pytest.raises(ChatError, match=problem):
        samples({"messages": PAIR, "tools": tools})


def test_conversations_that_begin_with_a_greeting_are_held_out_by_their_question() -> None:
    greeting = assistant("Hi!")
    chats = [chat_of({"messages": [greeting, {"role": "user", "content": q}, assistant(a)]}) for q, a in ("xy", "xz")]
    assert [chat.question for chat in chats] == [2, 2] and chats[0].messages[:2] == chats[1].messages[:2]
    assert chat_of({"messages": [{"role": "system", "content": "s"}, *PAIR]}).question == 2
    assert chat_of({"messages": [greeting]}).question == 0
    assert chat_of({"prompt": [ASK, assistant("2"), USER2], "completion": "4"}).question == 3


def test_a_plain_answer_that_mentions_the_tag_is_no_thought() -> None:
    plain = "Close it with the </think> tag."
    for think in (True, False):
        assert samples({"messages": [ASK, assistant(plain)]}, think=think) == [f"[{plain}<|im_end|>]"]
    splits = DROPS_THOUGHTS.replace("[-1]", "[-1 if loop.last else 0]")
    with pytest.raises(ChatError, match="message 1: the template leaves out the content beside a </think>"):
        samples({"messages": [ASK, assistant(plain)]}, template=splits)
