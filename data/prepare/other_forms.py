"""Records in the forms of other programs and of public sets, as messages.

| form | fields |
|---|---|
| ShareGPT | `conversations`: a list of {from, value}; the value of `function_call` is a call, several, or their JSON |
| Alpaca | `instruction`, `input` (after it, on a line of its own), `output`; `history`: earlier [question, answer] |
| hh-rlhf | `chosen` and `rejected`: texts of turns that begin with "Human:" and "Assistant:" after an empty line |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from nb_lightning.text.messages import ChatError

SHAREGPT = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}
SHAREGPT_CALLS = ("function_call", "tool_call")
ALPACA = ("instruction", "input", "output", "history")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def from_sharegpt(turns: Any) -> Any:
    """Read ShareGPT's list of {from, value}; what is not in this form is passed on to the checks of messages."""
    if not isinstance(turns, list):
        return turns  # `check_messages` raises
    messages = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            role = turn["from"]
            rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
            if role in SHAREGPT_CALLS:
                turn = {**rest, "role": "assistant", "tool_calls": _calls_of(turn.get("value"))}
            else:
                role = SHAREGPT.get(role, role) if isinstance(role, str) else role
                turn = {**rest, "role": role, "content": turn.get("value")}
        messages.append(turn)
    return messages


def _calls_of(value: Any) -> list[Any]:
    """Read the value of ShareGPT's `function_call`: a call or a list of calls, or their JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ChatError("a function_call is not JSON") from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise ChatError("a function_call is empty")
    return calls


def alpaca_prompt(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read Alpaca's `history`, and `instruction` with `input`, as messages."""
    messages: list[dict[str, Any]] = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise ChatError("history is not a list of pairs of texts")
    for exchange in history:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise ChatError("history is not a list of pairs of texts")
        messages += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    texts = [fields.get(name, "") for name in ("instruction", "input")]
    for name, text in zip(("instruction", "input"), texts):
        if not isinstance(text, str):
            raise ChatError(f"{name} is not a text")
    return [*messages, {"role": "user", "content": "\n".join(text for text in texts if text.strip())}]


def is_transcript(value: Any) -> TypeGuard[str]:
    """Whether a value is a text of turns as in hh-rlhf."""
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None


def from_transcript(text: str) -> list[dict[str, Any]]:
    """Read the turns of such a text, without white space around them."""
    _, *pieces = _SPEAKER.split(text)
    return [
        {"role": SPEAKERS[speaker], "content": content.strip()} for speaker, content in zip(pieces[::2], pieces[1::2])
    ]
