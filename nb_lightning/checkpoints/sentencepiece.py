"""SentencePiece tokenizers (byte-fallback BPE, as in Llama 2 and Nanbeige4) as a `tokenizers.Tokenizer`.

The pieces come from a `tokenizer.model`, read with the model class of the package `sentencepiece`, or from the metadata
of a GGUF file. Most of these models put a space in front of a text. SentencePiece itself, and transformers with
`legacy: true`, also put one in front of what follows an added token; with `legacy: false` transformers does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces; llama.cpp has the same numbers
SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """A vocabulary in the order of its ids.

    Attributes:
        tokens: the text of each piece, with `SPACE` for a space.
        scores: BPE merges the pair whose result has the highest score.
        types: `NORMAL`, `UNKNOWN`, ... of each piece.
        add_dummy_prefix: put a space in front of every text.
        prefix_after_added: put that space also in front of the text after an added token.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_dummy_prefix: bool
    prefix_after_added: bool = True


def read_pieces(path: Path) -> Pieces:
    """Read the vocabulary of a `tokenizer.model`.

    Raises:
        ValueError: the file is damaged, or its model is not byte-fallback BPE over unchanged text.
    """
    # Imported here: few tokenizers need it. The generated module defines its classes at run time.
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    try:
        model = ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"{path} is not a readable SentencePiece model: {error}") from error
    tokens = [piece.piece for piece in model.pieces]
    if not all(isinstance(token, str) and token for token in tokens):  # protobuf returns bytes if it is not UTF-8
        raise ValueError(f"{path} is not a readable SentencePiece model: a piece is empty or not UTF-8")
    trainer, rules = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        raise ValueError(f"{path} is not byte-fallback BPE, the one kind of SentencePiece model that is read")
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
        raise ValueError(f"{path} changes the text before it is split (normalizer {rules.name!r})")
    scores, types = [piece.score for piece in model.pieces], [piece.type for piece in model.pieces]
    return Pieces(tokens, scores, types, rules.add_dummy_prefix)


def follow_config(pieces: Pieces, config: Mapping[str, Any]) -> Pieces:
    """Choose where a space is put in front of a text, as transformers' LlamaTokenizer reads a tokenizer_config.json.

    With `legacy: true` the model's `add_dummy_prefix` holds, and every text between two added tokens gets the space.
    With `legacy: false` the space is put in front of the first text only, whatever the model says.
    `add_prefix_space: false` removes it in both. transformers 5 takes a missing `legacy` for false; a config that does
    not name a `tokenizer_class` is not transformers', and SentencePiece's own rule, `legacy: true`, holds.
    """
    is_legacy = bool(config.get("legacy", "tokenizer_class" not in config))
    add_prefix = config.get("add_prefix_space") is not False and (pieces.add_dummy_prefix or not is_legacy)
    return replace(pieces, add_dummy_prefix=add_prefix, prefix_after_added=is_legacy)


def build_tokenizer(pieces: Pieces, added: Mapping[int, AddedToken], origin: str | Path) -> Tokenizer:
    """Build a tokenizer that gives the same ids as SentencePiece.

    Args:
        added: id -> further token, which is matched before a text is split. An id is that of a piece, or the next one
            after the pieces.
        origin: where the vocabulary is from, for errors.

    Raises:
        ValueError: the vocabulary is not consistent, or the ids of the added tokens leave a gap.
    """
    vocabulary = {token: id for id, token in enumerate(pieces.tokens)}
    if not len(vocabulary) == len(pieces.tokens) == len(pieces.scores) == len(pieces.types):
        raise ValueError(f"{origin}: a token is there twice, or has no score or type")
    unknown = next((token for token, type in zip(pieces.tokens, pieces.types) if type == UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary, merges=_merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    if pieces.add_dummy_prefix and not pieces.prefix_after_added:
        # As in transformers: a text that already begins with a space gets no second one.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = space_normalizer(pieces.add_dummy_prefix)
    tokenizer.decoder = _decoder(pieces.add_dummy_prefix)
    marked = {
        id: AddedToken(token, special=type != USER_DEFINED)
        for id, (token, type) in enumerate(zip(pieces.tokens, pieces.types))
        if type in (CONTROL, UNKNOWN, USER_DEFINED)
    }
    tokens = {**marked, **added}
    for id in sorted(tokens):
        token = tokens[id]
        flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
        # Not "normalized": the space that the normalizer puts in front would become part of the token.
        tokenizer.add_tokens([AddedToken(token.content, special=token.special, normalized=False, **flags)])
        assigned = tokenizer.token_to_id(token.content)
        if assigned != id:
            raise ValueError(
                f"{origin}: the added token {token.content!r} has id {id}, but {assigned} is the next free one"
            )
    return tokenizer


def space_normalizer(add_dummy_prefix: bool) -> Any:
    """Replace spaces by `SPACE`; with `add_dummy_prefix`, put one in front of the text."""
    spaces = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if add_dummy_prefix else spaces


def _decoder(add_dummy_prefix: bool) -> Any:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_dummy_prefix else steps)


def _merges(pieces: Pieces, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """List all pairs of pieces that form a piece, sorted by its score, the highest first.

    SentencePiece merges the leftmost of pairs with equal scores (runs of spaces have them), so of these the pair with
    the longer left part comes first.
    """
    usable = {token for token, type in zip(pieces.tokens, pieces.types) if type in (NORMAL, USER_DEFINED, UNUSED)}
    ranked = []
    for token in usable:
        score = pieces.scores[vocabulary[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                ranked.append((-score, -len(left), -len(right), vocabulary[left], (left, right)))
    return [pair for *_, pair in sorted(ranked)]
