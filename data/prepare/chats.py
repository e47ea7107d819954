"""Turn conversations into samples of marked tokens: `data.prepare --chat`.

| a record has | which is |
|---|---|
| `messages` | a list of {role, content, ...} (nb_lightning/text/messages.py) |
| `conversations` | ShareGPT's list of {from, value} |
| `prompt` and `completion` | two texts (a user's and an assistant's turn), or two lists of messages |

and may have `tools` (a list, or its JSON) and `system` (a text). Only the assistant's turns are trained on, end of turn
included. A sample ends with its last trained token, because nothing learns from what follows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from data.prepare.parts import Part
from data.prepare.records import Record, read_objects
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SampleWriter
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer, ChatTokens, TurnTokens
from nb_lightning.text.messages import ChatError, check_messages, outcome
from nb_lightning.token_source import TRAINED, SourceManifest

FIELDS = ("messages", "conversations", "prompt", "completion", "tools", "system")
RENDER_BATCH = 64  # conversations rendered at a time
HISTORY = ("expand", "mask", "keep")  # see `Chats._samples`
SHAREGPT = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}


Parsed = tuple[str, list[list[int]]]  # of a record: its question, and the marked tokens of each of its samples


@dataclass(frozen=True)
class Chat:
    """A checked conversation."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    trained: frozenset[int]  # indices of the messages to train on


class Chats:
    """A form of records: a conversation becomes one sample, or with `history="expand"` sometimes several.

    See data/prepare/forms.py.
    """

    fields = FIELDS
    spelled = 0  # counted in documents only

    def __init__(self, settings: SourceSettings) -> None:
        assert settings.chat is not None
        try:
            datetime.fromisoformat(settings.chat.date)
        except ValueError:
            raise ValueError(f"--date is {settings.chat.date!r}; give it as 2025-01-31") from None
        self.settings, self.chat, self.tokenizer = settings, settings.chat, settings.load_tokenizer()
        self.encoder = ChatTokenizer.of(self.tokenizer, self.chat.template, self.chat.date)

    def open_writer(self, folder: Path) -> SampleWriter:
        t = self.tokenizer
        manifest = SourceManifest(t.digest, t.vocab_size, t.eos_id, template=template_digest(self.encoder.template))
        return SampleWriter(folder, manifest, self.settings.chunk_tokens)

    def read(self, part: Part) -> Iterator[Record]:
        batch: list[Record] = []
        for record in read_objects(part, self.fields):
            batch.append(record)
            if len(batch) == RENDER_BATCH:
                yield from self._parse_batch(batch)
                batch = []
        yield from self._parse_batch(batch)

    def _parse_batch(self, batch: list[Record]) -> Iterator[Record]:
        outcomes = iter(self.parse_many([record.value for record in batch if record.bad is None]))
        for record in batch:
            if record.bad is not None:
                yield record
                continue
            parsed = next(outcomes)
            if isinstance(parsed, ChatError):
                yield Record(record.file, record.line, None, parsed.kind, str(parsed))
            else:
                yield replace(record, value=parsed)

    def parse_many(self, records: list[Mapping[str, Any]]) -> list[Parsed | ChatError]:
        """Parse records; a bad one gives its error. All are rendered at once, which is faster than one by one."""
        chats = [outcome(chat_of, fields) for fields in records]
        good = [chat for chat in chats if not isinstance(chat, ChatError)]
        encodings = iter(self.encoder.encode_many([(self._messages(chat), chat.tools) for chat in good]))
        parsed: list[Parsed | ChatError] = []
        for chat in chats:
            if isinstance(chat, ChatError):
                parsed.append(chat)
                continue
            tokens = next(encodings)
            parsed.append(tokens if isinstance(tokens, ChatError) else outcome(self._parse, chat, tokens))
        return parsed

    def _parse(self, chat: Chat, tokens: ChatTokens) -> Parsed:
        first = next(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
        return question_of(chat.messages[:first], chat.tools), self._samples(chat, tokens)

    def encode(self, values: Iterator[Parsed]) -> Iterator[tuple[bool, list[list[int]]]]:
        """Hold out by the question, the messages before the first answer: all answers to it share a split."""
        for question, samples in values:
            yield self.settings.is_held_out(question), samples

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        return chat.messages if self.chat.think else [_without_reasoning(message) for message in chat.messages]

    def _samples(self, chat: Chat, tokens: ChatTokens) -> list[list[int]]:
        """Build the samples of a conversation.

        Many templates leave the reasoning out of turns before the last question. To train on such a turn would teach
        the model to answer without thinking. `history` decides what happens to it:

        * "expand" gives it a sample that ends with it, where it is the last turn and keeps its reasoning;
        * "mask" does not train on it;
        * "keep" trains on it without its reasoning.

        Args:
            tokens: of the whole conversation.

        Raises:
            ChatError: the template or the tokenizer cannot write the conversation, or no turn is left to train on.
        """
        turns = [turn for turn in tokens.turns if turn.index in chat.trained]
        without_reasoning = [] if self.chat.history == "keep" else [turn for turn in turns if not turn.thought]
        samples = []
        if self.chat.history == "expand":
            for turn in without_reasoning:
                beginning = self.encoder.encode(self._messages(chat)[: turn.index + 1], chat.tools)
                if not beginning.turns[-1].thought:
                    raise ChatError("the template leaves out the reasoning", f"message {turn.index}")
                samples.append(mark_trained(beginning, beginning.turns[-1:]))
        if trained := [turn for turn in turns if turn not in without_reasoning]:
            samples.append(mark_trained(tokens, trained))
        if not samples:
            raise ChatError("the template leaves out the reasoning of every turn to train on")
        return samples


def chat_of(record: Mapping[str, Any]) -> Chat:
    """Check a record's conversation.

    Raises:
        ChatError: the record has no conversation, or a bad one.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    if "messages" in fields:
        messages = fields["messages"]
    elif "conversations" in fields:
        messages = _from_sharegpt(fields["conversations"])
    elif "prompt" in fields and "completion" in fields:
        prompt = messages_of(fields["prompt"], "user", "prompt")
        messages = [*prompt, *messages_of(fields["completion"], "assistant", "completion")]
    else:
        raise ChatError("no messages", detail=f": it has {', '.join(map(str, fields)) or 'nothing'}")
    checked = check_messages(messages)
    if fields.get("system"):
        if checked[0]["role"] == "system":
            raise ChatError("two system prompts")
        messages = [{"role": "system", "content": fields["system"]}, *messages]
        checked = check_messages(messages)
    assistant = [i for i, message in enumerate(checked) if message["role"] == "assistant"]
    if not assistant:
        raise ChatError("no assistant turn")
    trained = frozenset(i for i in assistant if messages[i].get("train") is not False)
    if not trained:
        raise ChatError("every assistant turn is marked train: false")
    for i in trained:
        if not any(checked[i].get(key) for key in ("content", "reasoning_content", "tool_calls")):
            raise ChatError("an empty assistant turn", f"message {i}")
    return Chat(checked, tools_of(fields.get("tools")), trained)


def template_digest(template: ChatTemplate) -> str:
    """Hash the template and the special tokens that it names.

    With the tokenizer, they decide into which tokens a conversation turns.
    """
    special = {key: token for key, token in template.special.items() if key in template.source}
    return hashlib.sha256(json.dumps([template.source, special], sort_keys=True).encode()).hexdigest()


def _from_sharegpt(turns: Any) -> Any:
    if not isinstance(turns, list):
        return turns  # `check_messages` raises
    messages = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            role = turn["from"]
            role = SHAREGPT.get(role, role) if isinstance(role, str) else role
            turn = {
                **{k: v for k, v in turn.items() if k not in ("from", "value")},
                "role": role,
                "content": turn.get("value"),
            }
        messages.append(turn)
    return messages


def messages_of(value: Any, role: str, name: str) -> list[Any]:
    """Read the field `name`: a list of messages, or a text, which becomes one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ChatError(f"{name} is neither a text nor a list of messages")
    return value


def tools_of(value: Any) -> list[Any] | None:
    """Read the field `tools`: a list, or its JSON."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise ChatError("tools are not JSON") from None
    if value is None or value == "":
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ChatError("tools are not a list of objects")
    return value


def question_of(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """Write the messages before the first answer, and the tools, as one text."""
    return json.dumps([messages, tools], ensure_ascii=False, sort_keys=True)


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": re.sub(r"\A\s*<think>.*?</think>\s*", "", message["content"], flags=re.DOTALL)}


def mark_trained(tokens: ChatTokens, turns: list[TurnTokens]) -> list[int]:
    """Build the marked tokens of a sample that trains on `turns` and ends with the last of them."""
    marked = tokens.ids[: turns[-1].stop]
    for turn in turns:
        for place in range(max(turn.start, 1), turn.stop):  # no token precedes the first one to predict it
            marked[place] |= TRAINED
    return marked
