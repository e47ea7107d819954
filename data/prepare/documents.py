"""Turn texts into documents: `data.prepare` without --chat and --pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.prepare.parts import Part
from data.prepare.records import Record, read_texts
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SourceWriter
from nb_lightning.text.messages import ChatError, outcome
from nb_lightning.token_source import SourceManifest

ENCODE_CHARACTERS = 2**20  # keeps the tokenizer's threads busy, at a few MB of memory


class Documents:
    """A form of records: each text becomes its tokens and the end token. See data/prepare/forms.py.

    Attributes:
        spelled: number of documents read so far that spell a special token, which is text in them.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.tokenizer, self.spelled = settings, settings.load_tokenizer(), 0

    def open_writer(self, folder: Path) -> SourceWriter:
        tokenizer = self.tokenizer
        manifest = SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id)
        return SourceWriter(folder, manifest, self.settings.chunk_tokens)

    def read(self, part: Part) -> Iterator[Record]:
        """Read and tokenize the texts of a part; the value of a good record is its text and its tokens."""
        for batch in _batches(read_texts(part, self.settings.field)):
            encoded = iter(self.tokenizer.encode([record.value for record in batch if record.bad is None]))
            for record in batch:
                yield record if record.bad is not None else self._tokenized(record, next(encoded))

    def _tokenized(self, record: Record, ids: list[int]) -> Record:
        if self.settings.special_tokens == "text" and not self.tokenizer.special_ids.isdisjoint(ids[:-1]):
            literal = outcome(self.tokenizer.encode_literally, record.value)
            if isinstance(literal, ChatError):
                return replace(record, value=None, bad=literal.kind)
            self.spelled += literal != ids
            ids = literal
        return replace(record, value=(record.value, ids))

    def encode(self, values: Iterator[tuple[str, list[int]]]) -> Iterator[tuple[bool, list[list[int]]]]:
        for text, ids in values:
            yield self.settings.is_held_out(text), [ids]


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.value or "") + 100
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
