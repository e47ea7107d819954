"""SentencePiece tokenizers (byte-fallback BPE), as Llama 2 and Nanbeige4 have them, as a `tokenizers.Tokenizer`.

Their pieces come from a `tokenizer.model`, a protocol buffer that is read here without its library, or from the
metadata of a GGUF file. A text begins with a space that was not there, and so does what follows a special token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, in llama.cpp too
SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """A vocabulary in the order of its ids.

    Attributes:
        scores: of two pieces that can be made at a place, the one with the higher score is made.
        prefix: a text begins with a space that was not there.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    prefix: bool


def read_model(path: Path) -> Pieces:
    """The pieces of a `tokenizer.model`.

    Raises:
        ValueError: it is damaged, or not byte-fallback BPE over text as it is.
    """
    try:
        model = path.read_bytes()
        pieces = [dict(_fields(value)) for number, value in _fields(model) if number == 1]
        trainer, normalizer = ({k: v for n, value in _fields(model) if n == part for k, v in _fields(value)}
                               for part in (2, 3))  # fmt: skip
        tokens = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is not a readable SentencePiece model: {error}") from error
    if trainer.get(3, 1) != 2 or not trainer.get(35, 0):
        raise ValueError(f"{path} is not byte-fallback BPE, the one kind of SentencePiece model that is read")
    if normalizer.get(2) or normalizer.get(4, 1) or trainer.get(24, 0):
        raise ValueError(f"{path} changes the text before it is split (normalizer {normalizer.get(1, b'')!r})")
    return Pieces(tokens, scores, [piece.get(3, NORMAL) for piece in pieces], bool(normalizer.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer: an integer, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("it ends in the middle of a number")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"a field has the unknown type {key & 7}")
        size = {1: 8, 5: 4}.get(key & 7) or (varint() if key & 7 == 2 else 0)
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def build(pieces: Pieces, added: Mapping[int, tuple[str, bool]], origin: str | Path) -> Tokenizer:
    """A tokenizer that gives the ids that SentencePiece gives.

    Args:
        added: id -> (token, special) of more tokens, which are found in a text before it is split. Their ids go on
            where the pieces end, or are pieces' own.

    Raises:
        ValueError: no vocabulary, or ids of added tokens that leave a gap.
    """
    vocabulary = {token: id for id, token in enumerate(pieces.tokens)}
    if not len(vocabulary) == len(pieces.tokens) == len(pieces.scores) == len(pieces.types):
        raise ValueError(f"{origin}: a token is there twice, or has no score or type")
    unknown = next((token for token, type in zip(pieces.tokens, pieces.types) if type == UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary, merges=_merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.decoder = normalizer(pieces.prefix), _decoder(pieces.prefix)
    marked = {i: (token, type != USER_DEFINED) for i, (token, type) in enumerate(zip(pieces.tokens, pieces.types))
              if type in (CONTROL, UNKNOWN, USER_DEFINED)}  # fmt: skip
    for id, (token, special) in sorted({**marked, **added}.items()):
        # Not "normalized": else the space that normalizing puts in front would become part of the token.
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
        found = tokenizer.token_to_id(token)
        if found != id:
            raise ValueError(f"{origin}: the added token {token!r} has id {id}, but {found} is the next free one")
    return tokenizer


def normalizer(prefix: bool) -> Any:
    """Spaces become `SPACE`, with one in front."""
    spaces = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces


def _decoder(prefix: bool) -> Any:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _merges(pieces: Pieces, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to make a piece of two, the piece with the highest score first.

    SentencePiece takes the leftmost of equal scores (runs of spaces have them): a longer left part, made of what lies
    further left, comes first.
    """
    usable = {token for token, type in zip(pieces.tokens, pieces.types) if type in (NORMAL, USER_DEFINED, UNUSED)}
    found = []
    for token in usable:
        score = pieces.scores[vocabulary[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                found.append((-score, -len(left), -len(right), vocabulary[left], (left, right)))
    return [pair for *_, pair in sorted(found)]
