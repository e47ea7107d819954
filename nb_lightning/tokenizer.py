"""Tokenizers: bytes for the demo, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOS_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers.Tokenizer` and the token that ends a document.

    `digest` names the vocabulary: sources tokenized with another one are refused.
    """

    tokenizer: Tokenizer
    eos_id: int
    digest: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id (ids may have gaps, so this is not the number of tokens)."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, its end token appended."""
        batch = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[*encoding.ids, self.eos_id] for encoding in batch]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def byte_tokenizer() -> Tokenizer:
    """One token a byte (ids 0-255 in the byte-level alphabet's order), then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def load_tokenizer(spec: str, eos_token: str | None = None) -> TextTokenizer:
    """Load the tokenizer that `spec` names.

    Args:
        spec: "bytes", a path of a tokenizer.json, or a folder that holds one.
        eos_token: the token that ends a document; by default the first of `EOS_CANDIDATES` in the vocabulary.

    Raises:
        ValueError: nothing there, an unreadable file, or no end token.
    """
    if spec == "bytes":
        tokenizer = byte_tokenizer()
    else:
        path = Path(spec)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"data.tokenizer is {spec!r}, but there is no {path}; give 'bytes', a tokenizer.json or its folder"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
    names = (eos_token,) if eos_token else EOS_CANDIDATES
    eos_id = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if eos_id is None:
        raise ValueError(f"tokenizer {spec!r} has none of the end tokens {', '.join(names)}; name its own (--eos)")
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return TextTokenizer(tokenizer, eos_id, digest)
