"""What a prepared source depends on besides its input."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from data.prepare.source_writer import CHUNK_TOKENS
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.text.variables import Variables


@dataclass(frozen=True)
class ChatSettings:
    """How `data.prepare --chat` and `--pairs` write conversations (data/prepare/chats.py).

    Attributes:
        template: Jinja source of the chat template; None takes the tokenizer's own, or ChatML.
        think: train on the assistant's reasoning; False removes it from the conversations.
        history: "expand", "mask" or "keep": what happens to turns whose reasoning the template leaves out.
        date: today's date for templates that write it, as 2025-01-31.
        template_kwargs: variables of the template; those of a record win (nb_lightning/text/variables.py).
    """

    template: str | None = None
    think: bool = True
    history: str = "expand"
    date: str = "2025-01-01"
    template_kwargs: Variables = field(default_factory=dict)


@dataclass(frozen=True)
class SourceSettings:
    """All that decides what a source holds, besides the input.

    A staging folder's claim records it: with other settings, unfinished work is not resumed.

    Attributes:
        tokenizer: "bytes", a tokenizer.json, or a folder that holds one.
        eos: token that ends a document; None takes the tokenizer's usual one.
        field: field or column that holds the text; unused for conversations.
        val_fraction: share of the records to hold out, from 0 to 1; see `is_held_out`.
        seed: another seed holds out other records.
        chunk_tokens: tokens in a chunk of the source.
        chat: how conversations are written; None prepares documents.
        special_tokens: "text" or "control": what a special token becomes that a document spells.
        pairs: with `chat`, each record has two responses to one prompt (data/prepare/pairs.py).
    """

    tokenizer: str = "bytes"
    eos: str | None = None
    field: str = "text"
    val_fraction: float = 0.005
    seed: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    chat: ChatSettings | None = None
    pairs: bool = False
    special_tokens: str = "text"

    def load_tokenizer(self) -> TextTokenizer:
        """Load the tokenizer with the end token `eos`."""
        return load_tokenizer(self.tokenizer, self.eos)

    def is_held_out(self, text: str) -> bool:
        """Decide by a hash of the text alone, so that equal texts always fall into the same split.

        Args:
            text: the whole document; of a conversation or a pair, only the question.
        """
        digest = hashlib.blake2b(f"{self.seed} {text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.val_fraction * 2**64
