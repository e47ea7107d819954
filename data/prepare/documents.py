"""Texts into documents, what `data.prepare` makes of its input without --chat; and the settings of all forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.prepare.records import Part, Record, read
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SourceWriter
from nb_lightning.token_source import SourceManifest

ENCODE_CHARACTERS = 2**20


class Documents:
    """A text becomes its tokens and the end token."""

    unit = "documents"

    def __init__(self, settings: SourceSettings) -> None:
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
