"""Pairs into samples: what `data.prepare --pairs` makes of its input.

A record has what was asked, as `messages` or `prompt` (a list of messages, or a text), and two responses, `chosen` and
`rejected`. Each is

* a text: what the assistant wrote after the prompt, letter for letter, as `python -m data.pairs` keeps it. The end of
  turn is added, unless `chosen_finish` or `rejected_finish` is "length"; or
* a list of messages, the assistant's first. The prompt may stand before them; if it does so in both responses it need
  not be given apart.

and may have `tools` and `system`, as conversations do. A pair becomes two samples, chosen and rejected, one after the
other: prompt and response, of which the response is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.prepare.chats import Chats, question, side, tools_of, words_of
from data.prepare.source_writer import SampleWriter
from nb_lightning.text.messages import ChatError, check_messages, outcome
from nb_lightning.token_source import TRAINED

SIDES = ("chosen", "rejected")
FINISHES = ("stop", "length")


class Pairs(Chats):
    """A pair becomes two samples."""

    unit = "pairs"
    fields = ("messages", "prompt", "tools", "system", *SIDES, *(f"{name}_finish" for name in SIDES))

    def writer(self, folder: Path) -> SampleWriter:
        writer = super().writer(folder)
        writer.manifest.pairs = True
        return writer

    def parse_many(self, records: list[Mapping[str, Any]]) -> list[tuple[str, list[list[int]]] | ChatError]:
        return [outcome(self.parse, fields) for fields in records]

    def parse(self, fields: Mapping[str, Any]) -> tuple[str, list[list[int]]]:
        """What was asked, and the words of the chosen and the rejected sample.

        Raises:
            ChatError: something is missing or no conversation, a response is empty, or both are the same.
        """
        given = {key: value for key, value in fields.items() if value is not None}
        for name in SIDES:
            if name not in given:
                raise ChatError(f"no {name}", detail=f": it has {', '.join(map(str, given)) or 'nothing'}")
        prompt, tools = _prompt(given), tools_of(given.get("tools"))
        chosen, rejected = (self._words(prompt, given, name, tools) for name in SIDES)
        if chosen == rejected:
            raise ChatError("chosen equals rejected")
        return question(prompt, tools), [chosen, rejected]

    def _words(self, prompt: list[dict[str, Any]], given: Mapping[str, Any], name: str, tools: Any) -> list[int]:
        response = given[name]
        if isinstance(response, str):
            finish = given.get(f"{name}_finish", "stop")
            if finish not in FINISHES:
                raise ChatError(f"{name}_finish is neither {' nor '.join(FINISHES)}")
            tokens = self.encoder.answered(prompt, response, finish == "stop", tools)
            turns = tokens.turns
        else:
            messages = _after_prompt(prompt, response, name)
            tokens = self.encoder.encode([*prompt, *messages], tools)
            turns = [turn for turn in tokens.turns if turn.index >= len(prompt)]
            if not all(turn.thought for turn in turns):
                raise ChatError("the template leaves out the reasoning", name)
        words = words_of(tokens, turns)
        if not any(word & TRAINED for word in words):
            raise ChatError("an empty response", name)
        return words


def _prompt(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked."""
    if "messages" in given or "prompt" in given:
        messages = given["messages"] if "messages" in given else side(given["prompt"], "user", "prompt")
    else:
        both = [given[name] for name in SIDES]
        if not all(isinstance(response, list) for response in both):
            raise ChatError("neither messages nor prompt")
        same = [a == b for a, b in zip(*both)]
        messages = both[0][: [*same, False].index(False)]
        if not messages:
            raise ChatError("neither messages nor prompt, and the responses do not begin alike")
    checked = check_messages(messages)
    if given.get("system"):
        if checked[0]["role"] == "system":
            raise ChatError("two system prompts")
        checked = check_messages([{"role": "system", "content": given["system"]}, *checked])
    if checked[-1]["role"] == "assistant":
        raise ChatError("the prompt ends with the assistant")
    return checked


def _after_prompt(prompt: list[dict[str, Any]], response: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a response, without the prompt before them."""
    if not isinstance(response, list):
        raise ChatError(f"{name} is neither a text nor a list of messages")
    messages = check_messages(response)
    asked = [message for message in prompt if message["role"] != "system"]
    for before in (prompt, asked):
        if messages[: len(before)] == before:
            messages = messages[len(before) :]
    if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise ChatError("a response is not from the assistant's turn to the assistant's", name)
    return messages
