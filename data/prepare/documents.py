"""Texts into documents, what `data.prepare` makes of its input without --chat; and the settings of all forms."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.prepare.records import Part, Record, read
from data.prepare.source_writer import CHUNK_TOKENS, SourceWriter
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.token_source import SourceManifest

ENCODE_CHARACTERS = 2**20


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are written; see data/prepare/chats.py."""

    template: str | None = None  # Jinja source; None is the tokenizer's own, or ChatML
    think: bool = True  # train on reasoning; False takes it out of the conversations
    history: str = "expand"  # expand | mask | keep: turns whose reasoning the template leaves out
    date: str = "2025-01-01"  # for templates that write it


@dataclass(frozen=True)
class Settings:
    """What the result depends on besides the input."""

    tokenizer: str = "bytes"
    eos: str | None = None
    field: str = "text"
    val_fraction: float = 0.005  # of the records, chosen by a hash of their text (of conversations: of the question)
    seed: int = 0  # another seed holds out other records
    chunk_tokens: int = CHUNK_TOKENS
    chat: ChatSettings | None = None
    pairs: bool = False  # two responses to each prompt, with `chat`; see data/prepare/pairs.py

    def load_tokenizer(self) -> TextTokenizer:
        return load_tokenizer(self.tokenizer, self.eos)

    def is_held_out(self, text: str) -> bool:
        """By the text alone: equal texts fall on one side, in whatever order and wherever they come."""
        digest = hashlib.blake2b(f"{self.seed} {text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.val_fraction * 2**64


class Documents:
    """A text becomes its tokens and the end token."""

    unit = "documents"

    def __init__(self, settings: Settings) -> None:
        self.settings, self.tokenizer = settings, settings.load_tokenizer()

    def writer(self, folder: Path) -> SourceWriter:
        tokenizer = self.tokenizer
        manifest = SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id)
        return SourceWriter(folder, manifest, self.settings.chunk_tokens)

    def read(self, part: Part) -> Iterator[Record]:
        return read(part, self.settings.field)

    def encode(self, values: Iterator[Any]) -> Iterator[tuple[bool, list[list[int]]]]:
        """Of each good record: whether it is held out, and the words to write."""
        for texts in _batches(values):
            for text, ids in zip(texts, self.tokenizer.encode(texts)):
                yield self.settings.is_held_out(text), [ids]


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Enough texts at a time to keep the tokenizer busy, few enough to bound the memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 100
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
