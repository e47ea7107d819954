"""Conversations into samples: what `data.prepare --chat` makes of its input.

| a record has | which is |
|---|---|
| `messages` | a list of {role, content, ...} (nb_lightning/text/messages.py) |
| `conversations` | ShareGPT's list of {from, value} |
| `prompt` and `completion` | two texts (a user's and an assistant's turn), or two lists of messages |

and may have `tools` (a list, or its JSON) and `system` (a text). Only what the assistant wrote is trained on, its end
of turn included. What comes after the last trained token is left away: nothing learns from it.
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

from data.prepare.records import Part, Record, read_objects
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SampleWriter
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer, ChatTokens, TurnTokens
from nb_lightning.text.messages import ChatError, check_messages, outcome
from nb_lightning.token_source import TRAINED, SourceManifest

FIELDS = ("messages", "conversations", "prompt", "completion", "tools", "system")
BATCH = 64  # conversations rendered at a time
HISTORY = ("expand", "mask", "keep")
SHAREGPT = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}


@dataclass(frozen=True)
class Chat:
    """A conversation, checked."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    trained: frozenset[int]  # messages to train on


class Chats:
    """A conversation becomes one sample, or with `history="expand"` sometimes several."""

    unit = "samples"
    fields = FIELDS

    def __init__(self, settings: SourceSettings) -> None:
        assert settings.chat is not None
        try:
            datetime.fromisoformat(settings.chat.date)
        except ValueError:
            raise ValueError(f"--date is {settings.chat.date!r}; give it as 2025-01-31") from None
        self.settings, self.chat, self.tokenizer = settings, settings.chat, settings.load_tokenizer()
        self.encoder = ChatTokenizer.of(self.tokenizer, self.chat.template, self.chat.date)

    def writer(self, folder: Path) -> SampleWriter:
        t = self.tokenizer
        manifest = SourceManifest(t.digest, t.vocab_size, t.eos_id, template=template_digest(self.encoder.template))
        return SampleWriter(folder, manifest, self.settings.chunk_tokens)

    def read(self, part: Part) -> Iterator[Record]:
        batch: list[Record] = []
        for record in read_objects(part, self.fields):
            batch.append(record)
            if len(batch) == BATCH:
                yield from self._parsed(batch)
                batch = []
        yield from self._parsed(batch)

    def _parsed(self, batch: list[Record]) -> Iterator[Record]:
        outcomes = iter(self.parse_many([record.value for record in batch if record.bad is None]))
        for record in batch:
            found = next(outcomes) if record.bad is None else None
            if isinstance(found, ChatError):
                yield Record(record.file, record.line, None, found.kind, str(found))
            else:
                yield record if found is None else replace(record, value=found)

    def parse_many(self, records: list[Mapping[str, Any]]) -> list[tuple[str, list[list[int]]] | ChatError]:
        """Of each record the question and the words of its samples, or what is wrong with it.

        All are rendered at once, which is faster than one by one.
        """
        chats = [outcome(chat_of, fields) for fields in records]
        good = [chat for chat in chats if not isinstance(chat, ChatError)]
        wholes = iter(self.encoder.encode_many([(self._messages(chat), chat.tools) for chat in good]))
        found: list[Any] = []
        for chat in chats:
            whole = chat if isinstance(chat, ChatError) else next(wholes)
            found.append(whole if isinstance(whole, ChatError) else outcome(self._parse, chat, whole))
        return found

    def _parse(self, chat: Chat, whole: ChatTokens) -> tuple[str, list[list[int]]]:
        first = next(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
        return question(chat.messages[:first], chat.tools), self._samples(chat, whole)

    def encode(self, values: Iterator[Any]) -> Iterator[tuple[bool, list[list[int]]]]:
        """Of each good record: whether it is held out, and the words to write.

        By the question, the messages before the first answer: all answers to it fall on one side.
        """
        for question, samples in values:
            yield self.settings.is_held_out(question), samples

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        return chat.messages if self.chat.think else [_without_thought(message) for message in chat.messages]

    def _samples(self, chat: Chat, whole: ChatTokens) -> list[list[int]]:
        """The words of a conversation's samples.

        Many templates leave the reasoning out of turns before the last question. To train on such a turn would teach
        to answer without thinking. `history` says what becomes of it: "expand" gives it a sample of its own that ends
        with it, where it is the last turn; "mask" does not train on it; "keep" trains on it as it stands.

        Raises:
            ChatError: a conversation that the template or the tokenizer cannot write, or with nothing to train on.
        """
        turns = [turn for turn in whole.turns if turn.index in chat.trained]
        lost = [] if self.chat.history == "keep" else [turn for turn in turns if not turn.thought]
        samples = []
        if self.chat.history == "expand":
            for turn in lost:
                part = self.encoder.encode(self._messages(chat)[: turn.index + 1], chat.tools)
                if not part.turns[-1].thought:
                    raise ChatError("the template leaves out the reasoning", f"message {turn.index}")
                samples.append(words_of(part, part.turns[-1:]))
        if kept := [turn for turn in turns if turn not in lost]:
            samples.append(words_of(whole, kept))
        if not samples:
            raise ChatError("the template leaves out the reasoning of every turn to train on")
        return samples


def chat_of(fields: Mapping[str, Any]) -> Chat:
    """The conversation of a record.

    Raises:
        ChatError: it has none, or a bad one.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    if "messages" in given:
        messages = given["messages"]
    elif "conversations" in given:
        messages = _from_sharegpt(given["conversations"])
    elif "prompt" in given and "completion" in given:
        messages = [*side(given["prompt"], "user", "prompt"), *side(given["completion"], "assistant", "completion")]
    else:
        raise ChatError("no messages", detail=f": it has {', '.join(map(str, given)) or 'nothing'}")
    checked = check_messages(messages)
    if given.get("system"):
        if checked[0]["role"] == "system":
            raise ChatError("two system prompts")
        messages = [{"role": "system", "content": given["system"]}, *messages]
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
    return Chat(checked, tools_of(given.get("tools")), trained)


def template_digest(template: ChatTemplate) -> str:
    """What a source of conversations is made with, besides its tokenizer: the template, and the tokens it asks for."""
    asked = {key: token for key, token in template.special.items() if key in template.source}
    return hashlib.sha256(json.dumps([template.source, asked], sort_keys=True).encode()).hexdigest()


def _from_sharegpt(turns: Any) -> Any:
    if not isinstance(turns, list):
        return turns  # no list: `check_messages` says so
    out = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            role = turn["from"]
            role = SHAREGPT.get(role, role) if isinstance(role, str) else role
            turn = {
                **{k: v for k, v in turn.items() if k not in ("from", "value")},
                "role": role,
                "content": turn.get("value"),
            }
        out.append(turn)
    return out


def side(value: Any, role: str, name: str) -> list[Any]:
    """A list of messages, or a text as the one of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ChatError(f"{name} is neither a text nor a list of messages")
    return value


def tools_of(value: Any) -> list[Any] | None:
    """A list of tools, given as it is or as its JSON."""
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


def question(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """What is asked, as one text."""
    return json.dumps([messages, tools], ensure_ascii=False, sort_keys=True)


def _without_thought(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": re.sub(r"\A\s*<think>.*?</think>\s*", "", message["content"], flags=re.DOTALL)}


def words_of(tokens: ChatTokens, turns: list[TurnTokens]) -> list[int]:
    """The words of a sample that trains on `turns` and ends with the last of them."""
    words = tokens.ids[: turns[-1].stop]
    for turn in turns:
        for place in range(max(turn.start, 1), turn.stop):  # nothing comes before the first token that could predict it
            words[place] |= TRAINED
    return words
