"""Conversations and chat templates in several styles."""

from __future__ import annotations

from nb_lightning.text.chat_template import ChatTemplate
from tests.harness import ROOT

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<"}}}

TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.", "reasoning_content": "Greet."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Add."},
]
AGENT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+é?"},
    {"role": "assistant", "content": "", "reasoning_content": "Call.", "tool_calls": [CALL]},
    {"role": "tool", "content": "error"},
    {"role": "assistant", "content": "No.", "reasoning_content": "Failed."},
]


def style(name: str) -> ChatTemplate:
    return ChatTemplate((ROOT / f"tests/templates/{name}_style.jinja").read_text(), TOKENS)
