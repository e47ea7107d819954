"""Turn conversations into samples of marked tokens: `data.prepare --chat`.

| a record has | which is |
|---|---|
| `messages` | a list of {role, content, ...} (nb_lightning/text/messages.py) |
| `conversations` | ShareGPT's list of {from, value} |
| `prompt` and `completion` | two texts (a user's and an assistant's turn), or two lists of messages |
| `instruction` and `output` | Alpaca's texts (data/prepare/other_forms.py) |

and may have `tools` (a list, or its JSON) and `system` (a text). Only the assistant's turns are trained on, end of turn
included, and of `prompt` and `completion` only those of the completion. A sample ends with its last trained token,
because nothing learns from what follows.

A record whose reasoning, tool calls or tools the template does not write is bad: nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from data.prepare.other_forms import ALPACA, alpaca_prompt, from_sharegpt
from data.prepare.parts import Part
from data.prepare.records import Record, read_objects
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SampleWriter
from nb_lightning.text.chat_template import ChatTemplate, Turn
from nb_lightning.text.chat_tokens import ChatTokenizer, ChatTokens, TurnTokens
from nb_lightning.text.messages import (
    END_OF_THINK,
    ChatError,
    check_json,
    check_messages,
    is_trained,
    outcome,
    split_thought,
    thought_of,
    without_thought,
)
from nb_lightning.token_source import TRAINED, SourceManifest

FIELDS = ("messages", "conversations", "prompt", "completion", *ALPACA, "tools", "system")
RENDER_BATCH = 64  # conversations rendered at a time
HISTORY = ("expand", "mask", "keep")  # see `Chats._samples`
Parsed = tuple[str, list[list[int]]]  # of a record: its question, and the marked tokens of each of its samples
Rendered = tuple[str, list[Turn]]


@dataclass(frozen=True)
class Chat:
    """A checked conversation.

    Attributes:
        trained: indices of the messages to train on.
        question: number of messages before the first answer to a user, by which conversations are held out.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    trained: frozenset[int]
    question: int


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
        chats = [outcome(chat_of, fields, self.chat.think) for fields in records]
        good = [chat for chat in chats if not isinstance(chat, ChatError)]
        spelled = iter(self._spell_thoughts(good))
        chats = [chat if isinstance(chat, ChatError) else next(spelled) for chat in chats]
        good = [chat for chat in chats if not isinstance(chat, ChatError)]
        encodings = iter(self.encoder.encode_many([(chat.messages, chat.tools) for chat in good]))
        parsed: list[Parsed | ChatError] = []
        for chat in chats:
            if isinstance(chat, ChatError):
                parsed.append(chat)
                continue
            tokens = next(encodings)
            parsed.append(tokens if isinstance(tokens, ChatError) else outcome(self._parse, chat, tokens))
        return parsed

    def _parse(self, chat: Chat, tokens: ChatTokens) -> Parsed:
        if tokens.left_out is not None:
            raise tokens.left_out
        return question_of(chat.messages[: chat.question], chat.tools), self._samples(chat, tokens)

    def encode(self, values: Iterator[Parsed]) -> Iterator[tuple[bool, list[list[int]]]]:
        """Hold out by the question, the messages before the first answer to a user: its answers share a split."""
        for question, samples in values:
            yield self.settings.is_held_out(question), samples

    def _spell_thoughts(self, chats: list[Chat]) -> list[Chat]:
        """Move thoughts in the content to `reasoning_content` where the template does not write them as they stand.

        A template may leave such a thought out, or write an empty one before it. Where it does not know
        `reasoning_content`, they stay. What it does shows in the conversation up to the last thought.
        """
        spelled = list(chats)
        inline = [
            i
            for i, chat in enumerate(chats)
            if any(END_OF_THINK in message["content"] and thought_of(message) for message in chat.messages)
        ]
        texts = self._render([chats[i] for i in inline])
        changed = [i for i, text in zip(inline, texts) if not _writes_as_it_stands(chats[i], text)]
        split = [replace(chats[i], messages=[split_thought(message) for message in chats[i].messages]) for i in changed]
        stands, moved = (self._render([_up_to_last_thought(chat) for chat in side])
                         for side in ([chats[i] for i in changed], split))  # fmt: skip
        for i, chat, stand, move in zip(changed, split, stands, moved):
            if _writes_last_thought(chat, move) or not _writes_last_thought(chats[i], stand):
                spelled[i] = chat
        return spelled

    def _render(self, chats: list[Chat]) -> list[Rendered | ChatError]:
        return self.encoder.template.render_many([(chat.messages, chat.tools) for chat in chats])

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
                beginning = self.encoder.encode(chat.messages[: turn.index + 1], chat.tools)
                if not beginning.turns[-1].thought:
                    raise ChatError("the template leaves out the reasoning", f"message {turn.index}")
                samples.append(mark_trained(beginning, beginning.turns[-1:]))
        if trained := [turn for turn in turns if turn not in without_reasoning]:
            samples.append(mark_trained(tokens, trained))
        if not samples:
            raise ChatError("the template leaves out the reasoning of every turn to train on")
        return samples


def chat_of(record: Mapping[str, Any], think: bool = True) -> Chat:
    """Check a record's conversation.

    Args:
        think: False takes the reasoning out.

    Raises:
        ChatError: the record has no conversation, or a bad one.
    """
    fields = {key: value for key, value in record.items() if value is not None}
    context = 0  # number of messages before the completion
    if "messages" in fields:
        messages = fields["messages"]
    elif "conversations" in fields:
        messages = from_sharegpt(fields["conversations"])
    elif "prompt" in fields and "completion" in fields:
        prompt = messages_of(fields["prompt"], "user", "prompt")
        messages = [*prompt, *messages_of(fields["completion"], "assistant", "completion")]
        context = len(prompt)
    elif "instruction" in fields and "output" in fields:
        messages = [*alpaca_prompt(fields), {"role": "assistant", "content": fields["output"]}]
    else:
        raise ChatError("no messages", detail=f": it has {', '.join(map(str, fields)) or 'nothing'}")
    checked = check_messages(messages, strict=True)
    if fields.get("system"):
        if checked[0]["role"] == "system":
            raise ChatError("two system prompts")
        messages = [{"role": "system", "content": fields["system"]}, *messages]
        checked = check_messages(messages, strict=True)
        context += 1
    if not think:
        checked = [without_thought(message) for message in checked]
    roles = [message["role"] for message in checked]
    assistant = [i for i, role in enumerate(roles) if role == "assistant" and i >= context]
    if not assistant:
        raise ChatError("no assistant turn")
    trained = frozenset(i for i in assistant if is_trained(messages[i]))
    if not trained:
        raise ChatError("every assistant turn is marked train: false")
    for i in trained:
        if not any(checked[i].get(key) for key in ("content", "reasoning_content", "tool_calls")):
            raise ChatError("an empty assistant turn", f"message {i}")
    answers = [i for i in assistant if "user" in roles[:i]] or assistant
    return Chat(checked, tools_of(fields.get("tools")), trained, answers[0])


def _last_thought(chat: Chat) -> int:
    return max(i for i, message in enumerate(chat.messages) if thought_of(message))


def _up_to_last_thought(chat: Chat) -> Chat:
    return replace(chat, messages=chat.messages[: _last_thought(chat) + 1])


def _writes_last_thought(chat: Chat, rendered: Rendered | ChatError) -> bool:
    """Whether the text of a conversation up to its last thought has that thought."""
    if isinstance(rendered, ChatError):
        return False
    text, turns = rendered
    return thought_of(chat.messages[turns[-1].index]) in text[turns[-1].start : turns[-1].end]


def _writes_as_it_stands(chat: Chat, rendered: Rendered | ChatError) -> bool:
    """Whether a text has each content that begins with a thought, and no other thought beside it."""
    if isinstance(rendered, ChatError):
        return True  # encoding it raises the error
    text, turns = rendered
    for turn in turns:
        message, written = chat.messages[turn.index], text[turn.start : turn.end]
        content = message["content"].strip()
        is_inline = END_OF_THINK in content and not message.get("reasoning_content") and thought_of(message)
        if is_inline and (content not in written or written.count(END_OF_THINK) > content.count(END_OF_THINK)):
            return False
    return True


def template_digest(template: ChatTemplate) -> str:
    """Hash the template and the special tokens that it names.

    With the tokenizer, they decide into which tokens a conversation turns.
    """
    special = {key: token for key, token in template.special.items() if key in template.source}
    return hashlib.sha256(json.dumps([template.source, special], sort_keys=True).encode()).hexdigest()


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
        except (ValueError, RecursionError):
            raise ChatError("tools are not JSON") from None
    if value is None or value == "":
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ChatError("tools are not a list of objects")
    check_json(value, "tools")
    return value


def question_of(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """Write the messages before the first answer, and the tools, as one text."""
    return json.dumps([messages, tools], ensure_ascii=False, sort_keys=True)


def mark_trained(tokens: ChatTokens, turns: list[TurnTokens]) -> list[int]:
    """Build the marked tokens of a sample that trains on `turns` and ends with the last of them."""
    marked = tokens.ids[: turns[-1].stop]
    for turn in turns:
        for place in range(max(turn.start, 1), turn.stop):  # no token precedes the first one to predict it
            marked[place] |= TRAINED
    return marked
