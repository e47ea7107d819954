"""Turn texts into documents: `data.prepare` without --chat and --pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.prepare.parts import Part
from data.prepare.records import Record, read_texts
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SourceWriter
from nb_lightning.token_source import SourceManifest

ENCODE_CHARACTERS = 2**20  # keeps the tokenizer's threads busy, at a few MB of memory


class Documents:
    """A form of records: each text becomes its tokens and the end token. See data/prepare/forms.py."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.tokenizer = settings, settings.load_tokenizer()

    def open_writer(self, folder: Path) -> SourceWriter:
        tokenizer = self.tokenizer
        manifest = SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id)
        return SourceWriter(folder, manifest, self.settings.chunk_tokens)

    def read(self, part: Part) -> Iterator[Record]:
        return read_texts(part, self.settings.field)

    def encode(self, values: Iterator[str]) -> Iterator[tuple[bool, list[list[int]]]]:
        for texts in _batches(values):
            for text, ids in zip(texts, self.tokenizer.encode(texts)):
                yield self.settings.is_held_out(text), [ids]


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 100
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
