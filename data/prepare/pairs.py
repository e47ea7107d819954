"""Turn preference pairs into samples of marked tokens: `data.prepare --pairs`.

A record has the prompt, as `messages`, `prompt` or `question` (a list of messages, or a text) or in a form of
data/prepare/other_forms.py, and two responses, `chosen` and `rejected`. `messages` that equal `chosen`, as in
UltraFeedback, are not the prompt. A response is

* a text: what the assistant wrote after the prompt, letter for letter, as `python -m data.pairs` writes it. The end of
  turn is added, unless `chosen_finish` or `rejected_finish` is "length"; or
* one message, or a list of messages that begins with the assistant's. The prompt may stand before them; a record whose
  two responses both begin with it needs no `messages` and no `prompt`; or
* a text of turns, prompt included, as in hh-rlhf.

A record may have `tools`, `system` and `chat_template_kwargs`, as conversations do. A pair becomes two samples, the
chosen one first. Each holds prompt and response, and trains on the response, without turns that are marked
`train: false`. `--no-think` takes the reasoning out of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.prepare.chats import Chats
from data.prepare.conversations import (
    TOOLS,
    VARIABLES,
    Chat,
    messages_of,
    question_of,
    tools_of,
    variables_of,
    with_system,
)
from data.prepare.other_forms import alpaca_prompt, from_sharegpt, from_transcript, is_transcript
from data.prepare.samples import Parsed, SampleBuilder, mark_trained
from data.prepare.source_writer import SampleWriter
from nb_lightning.text.messages import ChatError, check_json, check_messages, is_trained, outcome
from nb_lightning.text.thoughts import THINK, without_thought
from nb_lightning.token_source import TRAINED

SIDES = ("chosen", "rejected")
PROMPTS = ("messages", "prompt", "question", "conversations", "instruction")  # the first one that a record has
FINISHES = ("stop", "length")
SPEAKS = {"role": "assistant", "content": ""}  # the end of a transcript that the assistant is to go on with


class Pairs(Chats):
    """A form of records: a pair becomes two samples. See data/prepare/forms.py."""

    fields = (*PROMPTS, "input", "history", *TOOLS, "system", VARIABLES, *SIDES)
    fields += tuple(f"{side}_finish" for side in SIDES)

    def open_writer(self, folder: Path) -> SampleWriter:
        writer = super().open_writer(folder)
        writer.manifest.pairs = True
        return writer

    def parse_many(self, records: list[Mapping[str, Any]]) -> list[Parsed | ChatError]:
        """Parse records; a bad one gives its error."""
        return [outcome(self.parse, record) for record in records]

    def parse(self, record: Mapping[str, Any]) -> Parsed:
        """Build the chosen and the rejected sample of a record.

        Raises:
            ChatError: a field is missing or is no conversation, a response is empty, or both are the same.
        """
        fields = {key: value for key, value in record.items() if value is not None}
        for side in SIDES:
            if side not in fields:
                raise ChatError(f"no {side}", detail=f": it has {', '.join(map(str, fields)) or 'nothing'}")
        fields |= _responses_of(fields)
        if _are_chosen(fields):
            del fields["messages"]
        builder = self.builder(variables_of(fields))
        prompt, tools = _without_thoughts(builder, _prompt_of(fields)), tools_of(fields)
        chosen, rejected = (_sample(builder, prompt, fields, side, tools) for side in SIDES)
        if chosen == rejected:
            raise ChatError("chosen equals rejected")
        return question_of(prompt, tools), [chosen, rejected]


def _sample(
    builder: SampleBuilder, prompt: list[dict[str, Any]], fields: Mapping[str, Any], side: str, tools: list[Any] | None
) -> list[int]:
    """Build the marked tokens of one response of a record."""
    response = fields[side]
    if isinstance(response, str):
        finish = fields.get(f"{side}_finish", "stop")
        if finish not in FINISHES:
            raise ChatError(f"{side}_finish is neither {' nor '.join(FINISHES)}")
        check_json(response, side)
        response = _without_thought(builder, response, side)
        tokens = builder.encoder.answered(prompt, response, finish == "stop", tools)
        turns = tokens.turns
    else:
        messages = _response_messages(builder, prompt, response, side)
        marks = response[len(response) - len(messages) :]
        trained = frozenset(
            len(prompt) + i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and is_trained(marks[i])
        )
        if not trained:
            raise ChatError("every assistant turn is marked train: false", side)
        (chat,) = builder.spell_thoughts([Chat([*prompt, *messages], tools, trained, len(prompt))])
        tokens = builder.encoder.encode(chat.messages, tools)
        turns = [turn for turn in tokens.turns if turn.index in trained]
        if not all(turn.thought for turn in turns):
            raise ChatError("the template leaves out the reasoning", side)
    if tokens.left_out is not None:
        raise tokens.left_out
    marked = mark_trained(tokens, turns)
    if not any(token & TRAINED for token in marked):
        raise ChatError("an empty response", side)
    return marked


def _response_messages(
    builder: SampleBuilder, prompt: list[dict[str, Any]], response: Any, side: str
) -> list[dict[str, Any]]:
    """Check the messages of a response, and remove the prompt before them."""
    if not isinstance(response, list):
        raise ChatError(f"{side} is neither a text nor a list of messages")
    with_thoughts = check_messages(response, strict=True)
    messages = _without_thoughts(builder, with_thoughts)
    without_system = [message for message in prompt if message["role"] != "system"]
    for beginning in (prompt, without_system):
        if messages[: len(beginning)] == beginning:
            messages = messages[len(beginning) :]
    if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise ChatError("a response is not from the assistant's turn to the assistant's", side)
    for before, after in zip(with_thoughts[-len(messages) :], messages):
        if before != after and not (after["content"].strip() or after.get("tool_calls")):
            raise ChatError("an assistant turn is a thought alone", side)
    return messages


def _without_thoughts(builder: SampleBuilder, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the reasoning out of messages, if the settings say so."""
    opens = not builder.think and builder.encoder.template.opens_thought
    return messages if builder.think else [without_thought(message, opens) for message in messages]


def _without_thought(builder: SampleBuilder, response: str, side: str) -> str:
    """Take the reasoning out of the text of a response, if the settings say so."""
    (message,) = _without_thoughts(builder, [{"role": "assistant", "content": response}])
    text = message["content"]
    if not builder.think and (text.lstrip().startswith(THINK) or (response.strip() and not text.strip())):
        raise ChatError("an assistant turn is a thought alone", side)
    return text


def _responses_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read both responses, each a text or a list of messages; texts of turns (hh-rlhf) are lists of messages.

    Where the prompt is a text of several turns too, return it as well. It may stand before the responses.
    """
    responses = {side: fields[side] for side in SIDES}
    if not any(name in fields for name in PROMPTS) and all(map(is_transcript, responses.values())):
        return {side: from_transcript(response) for side, response in responses.items()}
    lists = {side: [value] if isinstance(value, Mapping) else value for side, value in responses.items()}
    read = {side: from_sharegpt(value) for side, value in lists.items()}
    if is_transcript(prompt := fields.get("prompt")) and len(messages := from_transcript(prompt)) > 1:
        for side, response in read.items():
            if isinstance(response, str):
                text = response.strip().removeprefix(prompt.strip()).strip()
                read[side] = text if messages[-1] == SPEAKS else text.removeprefix("Assistant:").strip()
        read["prompt"] = messages[:-1] if messages[-1] == SPEAKS else messages
    return read


def _are_chosen(fields: Mapping[str, Any]) -> bool:
    """Whether `messages` is the chosen conversation, beside two responses that are lists of messages."""
    messages, (chosen, rejected) = fields.get("messages"), (fields[side] for side in SIDES)
    if not all(isinstance(value, list) and value for value in (messages, chosen, rejected)):
        return False
    return check_messages(messages, strict=True) == check_messages(chosen, strict=True)


def _prompt_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check the prompt of a record; without one, take the messages with which both responses begin."""
    name = next((name for name in PROMPTS if name in fields), None)
    if name == "messages":
        messages = fields["messages"]
    elif name == "conversations":
        messages = from_sharegpt(fields["conversations"])
    elif name == "instruction":
        messages = alpaca_prompt(fields)
    elif name is not None:
        messages = messages_of(fields[name], "user", name)
    else:
        responses = [fields[side] for side in SIDES]
        if not all(isinstance(response, list) for response in responses):
            raise ChatError("neither messages nor prompt")
        equal = [a == b for a, b in zip(*responses)]
        messages = responses[0][: [*equal, False].index(False)]
        if not messages:
            raise ChatError("neither messages nor prompt, and the responses do not begin alike")
    checked = check_messages(messages, strict=True)
    if fields.get("system"):
        checked = check_messages(with_system(checked, checked, fields["system"]), strict=True)
    if checked[-1]["role"] == "assistant":
        raise ChatError("the prompt ends with the assistant")
    return checked
