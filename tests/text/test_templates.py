"""A table of templates and situations: text and tokens are those of transformers' `apply_chat_template`."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError, outcome
from nb_lightning.text.tokenizer import TextTokenizer, begin_with, byte_tokenizer, text_tokenizer
from tests.harness import ROOT

KINDS = ("chatml", "llama31", "qwen3", "deepseek_v3", "r1_distill", "nemotron", "nanbeige42")
BOS, EOS = "<s>", "</s>"
CONTROL = (
    f"{BOS} {EOS} <|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <｜User｜> <｜Assistant｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> "
    "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> "
    "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12>"
).split()

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
ASK, MORE = {"role": "user", "content": "1+1?"}, {"role": "user", "content": "And 2+2?"}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


def says(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


REASONED = [ASK, says("2", reasoning_content="Add."), MORE, says("4", reasoning_content="Sum.")]
CALLED = [ASK, says("", reasoning_content="Call.", tool_calls=[call(a=1, b="é<\n")]), result("2"), says("2.")]
SITUATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, dict[str, Any]]] = {
    "plain": ([ASK, says("2")], None, {}),
    "system": ([{"role": "system", "content": "Be exact."}, ASK, says("2")], None, {}),
    "turns": ([ASK, says("2"), MORE, says("4")], None, {}),
    "reasoning": (REASONED, None, {}),
    "inline think": ([ASK, says("<think>\nAdd.\n</think>\n\n2"), MORE, says("<think>\nSum.\n</think>\n\n4")], None, {}),
    "tools": (CALLED, [TOOL], {}),
    "system and tools": ([{"role": "system", "content": "Be exact."}, *CALLED], [TOOL], {}),
    "parallel calls": ([ASK, says("", tool_calls=[call(a=1), call(a=2)]), result("1"), result("2"), says("3")],
                       [TOOL], {}),
    "content beside calls": ([ASK, says("Look.", tool_calls=[call(a=[1, None])]), result("x"), says("y")], [TOOL], {}),
    "empty content": ([ASK, says(""), MORE, says("4")], None, {}),
    "no thinking": ([ASK, says("2")], None, {"enable_thinking": False}),
    "thinking": (REASONED, None, {"enable_thinking": True}),
    "history without thoughts": (REASONED, None, {"preserve_thinking": False}),
    "history without thoughts of calls": ([*CALLED, *REASONED], [TOOL], {"preserve_thinking": False}),
    "JSON calls": (CALLED, [TOOL], {"tool_call_format": "json"}),
    "another variable": ([ASK, says("2")], None, {"date_string": "1 May 2030", "other": [{"x": None}]}),
}  # fmt: skip


# The one call that Llama 3.1 allows; DeepSeek-V3 writes no header before an answer that follows a tool's.
NO_HEADER = "the template does not write this assistant turn between its generation prompt and its end of turn"
AFTER_TOOLS = ("tools", "system and tools", "parallel calls", "content beside calls", "JSON calls",
               "history without thoughts of calls")  # fmt: skip
REFUSED = {
    "llama31": {"parallel calls": "the template raised"},
    "deepseek_v3": dict.fromkeys(AFTER_TOOLS, NO_HEADER),
}


def source(kind: str) -> str:
    file = ROOT / f"tests/text/templates/{kind}.jinja"
    return ChatTemplate.chatml().source if kind == "chatml" else file.read_text("utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Bytes, control tokens, and `<think>` as a token that is not special; a text begins with BOS, as Nanbeige's do."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool_call>")])
    begin_with(tokenizer, BOS)
    return text_tokenizer(tokenizer, {"bos_token": BOS, "eos_token": EOS}, None, "test")


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_tokens_are_those_of_transformers(kind: str, tokenizer: TextTokenizer) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer, bos_token=BOS, eos_token=EOS, chat_template=source(kind)
    )
    plain = ChatTokenizer.of(tokenizer, source(kind))
    refused, bos = set(), tokenizer.tokenizer.token_to_id(BOS)
    assert bos is not None
    for name, (messages, tools, variables) in SITUATIONS.items():
        chat = plain.with_variables(variables)
        for n in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            if (prompt := asked(theirs, messages[:n], tools, True, variables)) is None:
                with pytest.raises(ChatError, match="the template raised"):
                    chat.prompt(messages[:n], tools)
                continue
            assert (chat.template.render(messages[:n], tools, True), chat.prompt(messages[:n], tools)) == prompt, name
        written = asked(theirs, messages, tools, False, variables)
        tokens = outcome(chat.encode, messages, tools)
        if isinstance(tokens, ChatError):  # a bad record with its reason
            refused.add((name, tokens.kind))
            assert written is None or chat.template.render(messages, tools) == written[0]
        else:
            assert written is not None and (chat.template.render(messages, tools), tokens.ids) == written, name
            assert written[1].count(bos) == written[0].count(BOS) <= 1
    assert refused == set(REFUSED.get(kind, {}).items())


def asked(theirs: Any, messages: list[Any], tools: Any, prompt: bool, variables: Any) -> tuple[str, list[int]] | None:
    """What transformers makes of a conversation: text and ids; None if the template refuses it."""
    how = {"tools": tools, "add_generation_prompt": prompt, **variables}
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, **how)
    except TemplateError:
        return None
    return text, theirs.apply_chat_template(messages, return_dict=False, **how)
