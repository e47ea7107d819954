"""What a template leaves out of a conversation is named, and what it writes in another spelling is not."""

from __future__ import annotations

from typing import Any

import pytest

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_tokens import ChatTokenizer

TURN = "<|im_start|>{{ m.role }}\nCONTENT<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(content: str = "{{ m.content }}", roles: str = "system user assistant tool", tools: str = "") -> str:
    turns = f"{{% for m in messages if m.role in {roles.split()} %}}{TURN.replace('CONTENT', content)}{{% endfor %}}"
    return "{% if tools %}" + tools + "\n{% endif %}" + turns + PROMPT


def left_out(messages: list[dict[str, Any]], source: str, tools: list[Any] | None = None) -> str:
    return str(ChatTokenizer.of(load_tokenizer("bytes"), source).encode(messages, tools).left_out)


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


ASKED = chat(("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))


@pytest.mark.parametrize("role, index", [("system", 0), ("user", 1), ("tool", 3)])
def test_a_role_that_the_template_does_not_know_is_named(role: str, index: int) -> None:
    messages = [*ASKED, {"role": "tool", "content": "three"}, {"role": "assistant", "content": "3"}]
    known = " ".join({"system", "user", "assistant", "tool"} - {role})
    assert left_out(messages, template()) == "None"
    expected = f"message {index}: the template leaves out the content of a {role} turn"
    assert left_out(messages, template(roles=known)) == expected


def test_each_turn_needs_a_place_of_its_own() -> None:
    """A text that another turn has too, or as a part of its own, is not counted twice."""
    source = template(content="{{ m.content if m.role == 'assistant' or loop.index0 == 2 else '' }}")
    for again, index in (("more", 2), ("one more time", 0)):
        messages = chat(("user", "more"), ("assistant", "x"), ("user", again), ("assistant", "more"))
        assert left_out(messages, template()) == "None"
        assert left_out(messages, source) == f"message {index}: the template leaves out the content of a user turn"


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content | trim }}",
        "{{ m.content | tojson if m.role == 'tool' else m.content }}",
        "{{ m.content | tojson(ensure_ascii=true) if m.role != 'assistant' else m.content }}",
        "{{ {'result': m.content} if m.role == 'tool' else m.content }}",
        "{{ ({'result': m.content | tojson} | tojson) if m.role == 'tool' else m.content }}",
    ],
)
def test_content_in_another_spelling_is_not_missing(content: str) -> None:
    odd = ' "Zürich"\t{"a": \'b\'}\n\n<|im_end|> back\\slash '
    messages = chat(("system", odd), ("user", odd), ("assistant", "x"), ("tool", odd), ("assistant", "y"))
    assert left_out(messages, template(content)) == "None"


def test_a_system_turn_that_is_written_inside_the_first_question_is_not_missing() -> None:
    source = template("{{ messages[0].content + ' ' if loop.first }}{{ m.content }}", roles="user assistant")
    assert left_out(ASKED, source) == "None"


def test_a_switch_that_the_template_obeys_instead_of_writing_it_is_not_missing() -> None:
    messages = chat(("system", "Be brief. /no_think"), ("user", "1 + 1? /think"), ("assistant", "2"))
    for content in ("{{ m.content }}", "{{ m.content.replace('/no_think', '').replace('/think', '') }}"):
        assert left_out(messages, template(content)) == "None"
    assert "of a system turn" in left_out(messages, template("{{ m.content.replace('Be', '') }}"))


def test_each_text_of_an_assistant_turn_needs_a_place_of_its_own() -> None:
    call = {"type": "function", "function": {"name": "move", "arguments": {}}}
    named = {"role": "assistant", "content": "I move it.", "tool_calls": [call]}
    assert left_out([*ASKED[:2], named], template()) == "message 2: the template leaves out a tool call: 'move'"
    twice = {"role": "assistant", "content": "move", "tool_calls": [call, call]}
    once = template("{{ m.content }}{% if m.tool_calls %} {{ m.tool_calls[0].function.name }}{% endif %}")
    assert left_out([*ASKED[:2], twice], once) == "message 2: the template leaves out a tool call: 'move'"
    for content in ("4", " 4", "It is 4."):
        thought = {"role": "assistant", "content": content, "reasoning_content": "\n4\n"}
        for source, written in ((template(), False), (template("{{ m.reasoning_content }} {{ m.content }}"), True)):
            encoder = ChatTokenizer.of(load_tokenizer("bytes"), source)
            assert [turn.thought for turn in encoder.encode([*ASKED[:2], thought]).turns] == [written]


CALL = {"name": "move", "arguments": {"to": 'a "b"\nc', "by": 2.5, "deep": [{"fast": True, "note": None}], "none": {}}}
CALLING = [*ASKED[:2], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}]
EACH = "{{ m.content }}{% for c in m.tool_calls or [] %}CALL{% endfor %}"


@pytest.mark.parametrize(
    "arguments, missing",
    [
        ("", "'to'"),
        ("{{ f.arguments.keys() | list | tojson }}", "'a \"b\"\\nc'"),
        ("{{ f.arguments.values() | list | tojson }}", "'to'"),
        ("{% for k, v in f.arguments.items() if v is not number %}{{ k }}={{ v | tojson }}{% endfor %}", "'by'"),
    ],
)
def test_arguments_that_the_template_drops_are_named(arguments: str, missing: str) -> None:
    source = template(EACH.replace("CALL", "{% set f = c.function %}{{ f.name }} " + arguments))
    expected = f"message 2: the template leaves out an argument of a tool call: {missing}"
    assert left_out(CALLING, source) == expected


@pytest.mark.parametrize(
    "call",
    [
        "{{ c | tojson }}",
        "{{ c.function.name }}({{ c.function.arguments | tojson(indent=2) }})",
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson | tojson }}}',
        "{{ c.function }}",  # as Python writes it
        "<function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>{% endfor %}</function>",
    ],
)
def test_arguments_in_another_spelling_are_not_missing(call: str) -> None:
    assert left_out(CALLING, template(EACH.replace("CALL", call))) == "None"


TOOL = {
    "type": "function",
    "function": {
        "name": "move",
        "description": 'Go to "a place".',
        "parameters": {"type": "object", "properties": {"goal": {"type": "string", "description": "its name"}}},
    },
}


@pytest.mark.parametrize(
    "written, missing",
    [
        ("{{ tools | tojson }}", None),
        ("{{ tools | map(attribute='function') | list | tojson(indent=4) }}", None),
        ("{% for t in tools %}// {{ t.function.description }}\n{{ t.function.name }}: {% for k, p in "
         "t.function.parameters.properties.items() %}{{ k }}: // {{ p.description }}{% endfor %}{% endfor %}",
         None),
        ("{{ tools[0].function.name }}", "'Go to \"a place\".'"),
        ("{{ tools[0].function.name }} {{ tools[0].function.description }}", "'goal'"),
        ("{{ tools[0].function.name }} {{ tools[0].function.description }} goal", "'its name'"),
    ],
)  # fmt: skip
def test_parts_of_the_tools_that_the_template_drops_are_named(written: str, missing: str | None) -> None:
    expected = "None" if missing is None else f"the template leaves out a part of the tools: {missing}"
    assert left_out(ASKED, template(tools=written), [TOOL]) == expected


def test_the_call_of_a_tool_is_not_the_tool() -> None:
    messages = [
        *chat(("user", "1 + 1?")),
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]},
    ]
    source = template("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}")
    missing = "the template leaves out the tools: 'add' is not in its text"
    assert left_out(messages, source, [{"name": "add"}]) == missing
    assert left_out(messages, "{{ tools | tojson if tools else '' }}" + source, [{"name": "add"}]) == "None"


def test_what_was_asked_before_an_answer_is_checked_too() -> None:
    encoder = ChatTokenizer.of(load_tokenizer("bytes"), template(roles="user assistant"))
    error = encoder.answered(ASKED[:2], "2").left_out
    assert str(error) == "message 0: the template leaves out the content of a system turn"
