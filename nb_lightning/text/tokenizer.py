"""A tokenizer with its end token, special tokens and chat template, and the byte-level tokenizer of the demo.

Tokenizers are read from files by nb_lightning/checkpoints/tokenizer_files.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from nb_lightning.text.messages import ChatError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END_OF_TURN = "<|im_end|>"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
EOS_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers.Tokenizer` and the token that ends a document.

    Attributes:
        eos_id: the token that ends a document, not a turn.
        digest: SHA-256 of the tokenizer; sources that were tokenized with another one are refused.
        special: role -> token, as in tokenizer_config.json: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
        chat_template: Jinja source from the tokenizer's folder, not trusted; None if there is none.
    """

    tokenizer: Tokenizer
    eos_id: int
    digest: str
    special: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one (ids may have gaps, so this is not the number of tokens)."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenize each text, and append the end token."""
        batch = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[*encoding.ids, self.eos_id] for encoding in batch]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens of the tokenizer that are special: text must not contain them."""
        return frozenset(id for id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    def encode_literally(self, text: str) -> list[int]:
        """Tokenize a text as `encode` does, but the special tokens that it spells as text.

        Raises:
            ChatError: the tokenizer has no other tokens for such a text.
        """
        ids = self._literal.encode(text, add_special_tokens=False).ids
        added = self.tokenizer.get_added_tokens_decoder()
        for token in (added[id].content for id in self.special_ids.intersection(ids)):
            # The unknown token also stands for characters that are not in the vocabulary.
            if token != self.special.get("unk_token") and token in text:
                raise ChatError("a text spells a special token that this tokenizer cannot write as text")
        return [*ids, self.eos_id]

    @cached_property
    def _literal(self) -> Tokenizer:
        """A copy of the tokenizer that does not look for special tokens in a text."""
        literal = Tokenizer.from_str(self.tokenizer.to_str())
        literal.encode_special_tokens = True
        return literal

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path, chat_template: str | None = None, **more: Any) -> None:
        """Write the files that `load_tokenizer(folder)` and transformers' AutoTokenizer read.

        Args:
            chat_template: replaces the tokenizer's.
            more: further entries of tokenizer_config.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self.tokenizer.id_to_token(self.eos_id),
            **self.special,
            **more,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        template = chat_template or self.chat_template
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer with one token a byte (ids 0-255 in the byte-level alphabet's order) and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Make `token` the first of every text that is encoded with special tokens."""
    id = tokenizer.token_to_id(token)
    assert id is not None, token
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, id)]
    )


def text_tokenizer(
    tokenizer: Tokenizer, config: Mapping[str, Any], template: str | None, origin: str, eos_token: str | None = None
) -> TextTokenizer:
    """Make a `TextTokenizer` from a tokenizer and the content of its tokenizer_config.json.

    Args:
        origin: where the tokenizer is from, for errors.
        eos_token: the token that ends a document; by default the first of `EOS_CANDIDATES` in the vocabulary, else the
            config's `eos_token`.

    Raises:
        ValueError: the vocabulary has no end token.
    """
    special = special_tokens(config, tokenizer)
    # The config's eos_token comes last: in chat models it often ends a turn, not a document.
    names = (eos_token,) if eos_token else (*EOS_CANDIDATES, *filter(None, [special.get("eos_token")]))
    eos_id = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if eos_id is None:
        raise ValueError(f"tokenizer {origin!r} has none of the end tokens {', '.join(names)}; name its own (--eos)")
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return TextTokenizer(tokenizer, eos_id, digest, special, template)


def special_tokens(config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Map each role to the token that a tokenizer_config.json names for it, if the tokenizer has this token."""
    special = {}
    for role in ROLES:
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            special[role] = token
    return special
