"""The three forms of records that `data.prepare` takes: documents, conversations (--chat) and pairs (--pairs)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data.prepare.chats import Chats
from data.prepare.documents import Documents
from data.prepare.pairs import Pairs
from data.prepare.parts import Part
from data.prepare.records import Record
from data.prepare.settings import SourceSettings
from data.prepare.source_writer import SourceWriter


class Form(Protocol):
    """Turns the records of a part into token sequences: documents, or samples of marked tokens.

    Attributes:
        spelled: number of documents read so far that spell a special token, which is text in them.
    """

    spelled: int

    def open_writer(self, folder: Path) -> SourceWriter:
        """Open an empty split of this form in `folder`."""
        ...

    def read(self, part: Part) -> Iterator[Record]:
        """Read and check the records of a part, bad ones included."""
        ...

    def encode(self, values: Iterator[Any]) -> Iterator[tuple[bool, list[list[int]]]]:
        """For the value of each good record, yield whether it is held out, and the token sequences to write."""
        ...


def form_of(settings: SourceSettings) -> Form:
    """Build the form that the settings ask for.

    Raises:
        ValueError: the tokenizer, the template or the date cannot be used.
    """
    if settings.pairs:
        return Pairs(settings)
    return Chats(settings) if settings.chat else Documents(settings)
