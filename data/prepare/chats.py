"""Turn conversations into samples of marked tokens: `data.prepare --chat`.

The forms of records are in data/prepare/conversations.py. Only the assistant's turns are trained on, end of turn
included, and of `prompt` and `completion` only those of the completion. A sample ends with its last trained token,
because nothing learns from what follows (data/prepare/samples.py).

A record whose reasoning, tool calls or tools the template does not write is bad: nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from data.prepare.conversations import FIELDS, Chat, chat_of
from data.prepare.parts import Part
from data.prepare.records import Record, read_objects
from data.prepare.samples import Parsed, SampleBuilder
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SampleWriter
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.messages import ChatError, outcome
from nb_lightning.text.variables import Variables
from nb_lightning.token_source import SourceManifest

RENDER_BATCH = 64  # conversations rendered at a time


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
        encoder = ChatTokenizer.of(self.tokenizer, self.chat.template, self.chat.date)
        self.encoder = encoder.with_variables(self.chat.template_kwargs)

    def open_writer(self, folder: Path) -> SampleWriter:
        t, template = self.tokenizer, self.encoder.template
        manifest = SourceManifest(
            t.digest, t.vocab_size, t.eos_id, template=template_digest(template), template_kwargs=template.variables
        )
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
        """Parse records; a bad one gives its error. Those with the same variables are rendered at once."""
        parsed: list[Any] = [outcome(chat_of, fields) for fields in records]
        alike: dict[str, dict[int, Chat]] = {}  # variables -> number of the record -> conversation
        for number, chat in enumerate(parsed):
            if isinstance(chat, Chat):
                alike.setdefault(json.dumps(chat.variables, sort_keys=True), {})[number] = chat
        for chats in alike.values():
            for number, samples in zip(chats, self._build_alike(list(chats.values()))):
                parsed[number] = samples
        return parsed

    def _build_alike(self, chats: list[Chat]) -> list[Parsed | ChatError]:
        """Build the samples of conversations with the same variables."""
        builder = outcome(self.builder, chats[0].variables)
        return [builder] * len(chats) if isinstance(builder, ChatError) else builder.build_many(chats)

    def builder(self, variables: Variables) -> SampleBuilder:
        """Return the builder for conversations with variables of their own."""
        return SampleBuilder(self.encoder.with_variables(variables), self.chat.think, self.chat.history)

    def encode(self, values: Iterator[Parsed]) -> Iterator[tuple[bool, list[list[int]]]]:
        """Hold out by the question, the messages before the first answer to a user: its answers share a split."""
        for question, samples in values:
            yield self.settings.is_held_out(question), samples


def template_digest(template: ChatTemplate) -> str:
    """Hash the template and the special tokens that it names.

    With the tokenizer, they decide into which tokens a conversation turns.
    """
    special = {key: token for key, token in template.special.items() if key in template.source}
    return hashlib.sha256(json.dumps([template.source, special], sort_keys=True).encode()).hexdigest()
