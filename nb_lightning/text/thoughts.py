"""Thoughts, which are text between `<think>` and `</think>`: in a message, and at the end of a prompt.

The reasoning of an assistant's message is in `reasoning_content`, or at the beginning of the content. There the opening
tag is missing where it was the prompt that wrote it. A `</think>` without it ends a thought only if it stands on a line
of its own, or if the template's prompts open one; elsewhere it is text, as in "close it with </think>".
"""

from __future__ import annotations

import re
from typing import Any

from nb_lightning.text.messages import Message

THINK, END_OF_THINK = "<think>", "</think>"
_WRITTEN = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_OPENED_BY_PROMPT = re.compile(r"\A((?:(?!<think>).)*?)</think>\s*", re.DOTALL)
_ENDED_BY_A_LINE = re.compile(r"\A((?:(?!<think>|</think>).)*?(?<![^\n]))</think>[ \t]*(?:\n\s*|\Z)", re.DOTALL)


def split_thought(message: Message, prompt_opens: bool = False) -> dict[str, Any]:
    """Move a thought at the beginning of an assistant's content to `reasoning_content`, if that is empty.

    Args:
        prompt_opens: the prompts of the message's template end in `<think>`.
    """
    out = dict(message)
    match = None if out.get("reasoning_content") else inline_thought(message, prompt_opens)
    if match is not None:
        out |= {"content": message["content"][match.end() :], "reasoning_content": match[1].strip()}
    return out


def without_thought(message: Message, prompt_opens: bool = False) -> dict[str, Any]:
    """Remove an assistant's reasoning: `reasoning_content`, and a thought at the beginning of the content."""
    out = {k: v for k, v in message.items() if k != "reasoning_content" or message["role"] != "assistant"}
    match = inline_thought(message, prompt_opens)
    return out if match is None else {**out, "content": message["content"][match.end() :]}


def thought_of(message: Message, prompt_opens: bool = False) -> str:
    """Return an assistant's reasoning, whichever of the two places it is in; "" without any."""
    return (split_thought(message, prompt_opens).get("reasoning_content") or "").strip()


def inline_thought(message: Message, prompt_opens: bool = False) -> re.Match[str] | None:
    """Match the thought at the beginning of an assistant's content; group 1 is its text."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or END_OF_THINK not in content:
        return None
    return _WRITTEN.match(content) or (_OPENED_BY_PROMPT if prompt_opens else _ENDED_BY_A_LINE).match(content)


def opened_thought(prompt: str) -> str:
    """Return the `<think>` that a prompt ends with, and the white space after it; "" for a prompt that opens none."""
    match = re.search(rf"{THINK}\s*\Z", prompt)
    return match[0] if match else ""


def empty_thought(text: str) -> str:
    """Return the empty thought that a text begins with, and the white space after it; "" without one."""
    match = re.match(rf"{THINK}\s*{END_OF_THINK}\s*", text)
    return match[0] if match else ""


def closed_thought(prompt: str) -> str:
    """Return the empty thought that a prompt ends with, and the white space after it; "" without one."""
    match = re.search(rf"{THINK}\s*{END_OF_THINK}\s*\Z", prompt)
    return match[0] if match else ""
