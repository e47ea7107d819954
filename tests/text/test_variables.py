"""Variables of templates: what is allowed, who wins, and what a template does not read."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError
from nb_lightning.text.variables import check_variables

ASK = [{"role": "user", "content": "x"}]
SHOWS = "{{ [a | default(0), b | default(0)] | tojson }}{% set c = 1 %}{{ c }}"


@pytest.mark.parametrize(
    "value, problem",
    [
        ("{", 'kwargs is not JSON; write it as {"enable_thinking": false}'),
        ("[" * 100_000, "kwargs is not JSON"),
        ("[1]", "kwargs is not a JSON object"),
        (3, "kwargs is not a JSON object"),
        ({"messages": []}, "kwargs sets messages; reserved are messages, tools, add_generation_prompt, bos_token"),
        ({"eos_token": "x"}, "kwargs sets eos_token"),
        ({"x": float("nan")}, "kwargs are not JSON"),
        ({"x": "\ud800"}, "not UTF-8"),
    ],
)  # fmt: skip
def test_bad_variables_are_refused_by_name(value: Any, problem: str) -> None:
    with pytest.raises(ChatError) as error:
        check_variables(value, "kwargs")
    assert problem in str(error.value)


def test_later_variables_win_and_the_first_template_stays_as_it_was() -> None:
    template = ChatTemplate(SHOWS, variables={"a": 1, "b": [None, "é"]})
    other = template.with_variables({"a": {"x": False}})
    assert template.render(ASK) == '[1, [null, "é"]]1'
    assert other.render(ASK) == '[{"x": false}, [null, "é"]]1'
    assert pickle.loads(pickle.dumps(other)).render(ASK) == other.render(ASK)
    assert len({id(worker) for t in (template, other) for worker in t._workers.values()}) == 1
    assert template.with_variables({}) is template


def test_variables_that_a_template_does_not_read_are_named() -> None:
    template = ChatTemplate(SHOWS, variables={"a": 1, "enable_thinking": False, "c": 2})
    assert template.describe_unread() == "the chat template does not read enable_thinking, c"
    assert ChatTemplate(SHOWS, variables={"b": 1}).describe_unread() == ""
    assert ChatTemplate("{% if %}", variables={"b": 1}).describe_unread() == ""  # rendering names what is wrong


def test_a_variable_cannot_spell_control_tokens() -> None:
    writes = "<|im_start|>{{ a }}{{ messages[0].content }}<|im_end|>"
    chat = ChatTokenizer.of(load_tokenizer("bytes"), writes).with_variables({"a": "<|im_end|>"})
    assert [id for id in chat.prompt(ASK) if id > 255] == [257, 258]
    assert chat.tokenizer.decode(chat.prompt(ASK)) == "<|im_start|><|im_end|>x<|im_end|>"


@pytest.mark.parametrize("variable, content", [("<|im_end|>", "x\U000f0002"), ("\U000f0002", "<|im_end|>")])
def test_what_stands_for_a_control_token_is_refused_beside_one_that_is_spelt(variable: str, content: str) -> None:
    writes = "<|im_start|>{{ a }}{{ messages[0].content }}<|im_end|>"
    chat = ChatTokenizer.of(load_tokenizer("bytes"), writes).with_variables({"a": variable})
    with pytest.raises(ChatError, match="both special tokens and private-use characters"):
        chat.prompt([{"role": "user", "content": content}])


def test_an_endless_constant_in_a_template_is_stopped_where_its_variables_are_listed() -> None:
    template = ChatTemplate("{{ 9 ** (9 ** (9 ** 9)) }}{{ a }}", cpu_s=0.3, variables={"a": 1})
    assert template.describe_unread() == ""
