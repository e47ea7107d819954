"""Tokenizers in the metadata of a GGUF file, in and out: byte-level BPE and SentencePiece.

For byte-level BPE a GGUF file does not store how text is split before merging, only llama.cpp's name for the rule.
`SPLITS` holds the rules that we know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from nb_lightning.checkpoints import sentencepiece
from nb_lightning.text.chat_tokens import ends_of_turn
from nb_lightning.text.tokenizer import END_OF_TURN, ROLES, TextTokenizer, begin_with, text_tokenizer

NO_MERGES = "<none> <none>"  # llama.cpp wants at least one merge; no text ever contains the left side of this one
KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
        "unk_token": "unknown_token_id"}  # fmt: skip
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_regex(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# llama.cpp's name -> how text is split. llama-bpe also looks up each word before merging (`ignore_merges`).
SPLITS = {
    "gpt-2": _byte_level(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _by_regex(_WORDS % "{1,3}"),
    "qwen2": _by_regex(_WORDS % ""),
}
IGNORES_MERGES = ("llama-bpe",)
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: Path) -> TextTokenizer:
    """Read the tokenizer and the chat template of a GGUF file.

    Raises:
        ValueError: the file has no tokenizer, or a damaged one, or one of a kind that we do not know.
    """
    kind, split = metadata.get(KEY + "model"), metadata.get(KEY + "pre")
    tokens: Any = metadata.get(KEY + "tokens")  # nothing is known of what a file holds: the `try` below finds out
    types: Any = metadata.get(KEY + "token_type")
    if not (kind == "llama" or (kind == "gpt2" and split in SPLITS)):
        raise ValueError(
            f"{origin}: its tokenizer is {kind!r} with {KEY}pre {split!r}; only SentencePiece ('llama') and byte-level "
            f"BPE ('gpt2') with {', '.join(SPLITS)} can be read. Use a folder with a tokenizer.json"
        )
    try:
        if kind == "llama":
            scores: Any = metadata.get(KEY + "scores")
            pieces = sentencepiece.Pieces(tokens, scores, types, metadata.get(KEY + "add_space_prefix", True))
            tokenizer = sentencepiece.build_tokenizer(pieces, {}, origin)
        else:
            tokenizer = _byte_level_bpe(tokens, types, metadata[KEY + "merges"], str(split))
    except Exception as error:  # the Rust side raises bare Exception
        reason = str(error).splitlines()[0]
        raise ValueError(f"{origin}: what its metadata says under {KEY} is no tokenizer: {reason}") from error
    config = {}  # as in a tokenizer_config.json
    for role, key in _IDS.items():
        id = metadata.get(KEY + key)
        if isinstance(id, int) and 0 <= id < len(tokens):
            config[role] = tokens[id]
    if metadata.get(KEY + "add_bos_token", kind == "llama") and "bos_token" in config:
        begin_with(tokenizer, config["bos_token"])
    template = metadata.get(TEMPLATE)
    return text_tokenizer(tokenizer, config, template if isinstance(template, str) else None, str(origin))


def _byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], split: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ValueError("a token is there twice, or has no type")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges if merge != NO_MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split in IGNORES_MERGES))
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type == sentencepiece.CONTROL, normalized=False)
            for token, type in zip(tokens, types)
            if type in (sentencepiece.CONTROL, sentencepiece.USER_DEFINED)
        ]
    )
    return tokenizer


def tokenizer_to_gguf(tokenizer: TextTokenizer, vocab_size: int) -> dict[str, Any]:
    """Write the metadata that makes llama.cpp tokenize as `tokenizer` does.

    Args:
        vocab_size: of the model; ids that the tokenizer does not have get placeholder tokens of the type `UNUSED`.

    Raises:
        ValueError: llama.cpp has no such kind of tokenizer, or no name that we know for how it splits text.
    """
    content = json.loads(tokenizer.tokenizer.to_str())
    model = content["model"]
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    token_of = {id: token for token, id in vocabulary.items()}
    type_of = {
        token["id"]: sentencepiece.CONTROL if token["special"] else sentencepiece.USER_DEFINED
        for token in content["added_tokens"]
    }
    types = [
        type_of.get(id, sentencepiece.NORMAL if id in token_of else sentencepiece.UNUSED) for id in range(vocab_size)
    ]
    tokens = [token_of.get(id, f"[UNUSED{id}]") for id in range(vocab_size)]
    metadata = {
        KEY + "tokens": tokens,
        KEY + "token_type": types,
        KEY + "add_bos_token": _adds_bos(tokenizer),
        KEY + "add_space_prefix": False,
    }
    if model["type"] == "BPE" and model["byte_fallback"]:
        pieces = _pieces(content, tokens, types)
        metadata |= {
            KEY + "model": "llama",
            KEY + "pre": "default",
            KEY + "scores": list(pieces.scores),
            KEY + "token_type": list(pieces.types),
            KEY + "add_space_prefix": pieces.add_dummy_prefix,
        }
    else:
        metadata |= {KEY + "model": "gpt2", KEY + "pre": _split_name(content), KEY + "merges": _merges(model)}
    special = {"eos_token": tokenizer.tokenizer.id_to_token(tokenizer.eos_id), **tokenizer.special}
    for role in ROLES:
        if role in special:
            metadata[KEY + _IDS[role]] = vocabulary[special[role]]
    end = next(iter(ends_of_turn(tokenizer)), vocabulary.get(END_OF_TURN))
    if end is not None:
        metadata[KEY + "eot_token_id"] = end
    if tokenizer.chat_template is not None:
        metadata[TEMPLATE] = _without_generation_blocks(tokenizer.chat_template)
    return metadata


def _merges(model: Mapping[str, Any]) -> list[str]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return merges or [NO_MERGES]


def _pieces(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> sentencepiece.Pieces:
    """Turn a byte-fallback BPE back into SentencePiece's pieces: scores fall in the order of the merges."""
    model = content["model"]
    spaces = (content["normalizer"], content["pre_tokenizer"])
    prefix = next((prefix for prefix in (True, False) if spaces == (_space_normalizer(prefix), None)), None)
    if spaces == (None, _metaspace_first()):
        # llama.cpp puts a space in front of every part of a text or of none. None: a chat begins with a special token.
        prefix = False
    if prefix is None:
        raise ValueError("the tokenizer is byte-fallback BPE, but does not treat spaces as SentencePiece does")
    score_of: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        score_of.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), float(-rank))
    scores = [score_of.get(token, float(-len(model["merges"]))) for token in tokens]
    types = [
        sentencepiece.UNKNOWN if token == model["unk_token"] else sentencepiece.BYTE if _BYTE.fullmatch(token) else type
        for token, type in zip(tokens, types)
    ]
    return sentencepiece.Pieces(tokens, scores, types, prefix)


def _space_normalizer(add_dummy_prefix: bool) -> Any:
    """As a tokenizer.json spells it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = sentencepiece.space_normalizer(add_dummy_prefix)
    return json.loads(tokenizer.to_str())["normalizer"]


def _metaspace_first() -> Any:
    """As a tokenizer.json spells it: a space in front of a text, and none after its added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(sentencepiece.SPACE, prepend_scheme="first", split=False)
    return json.loads(tokenizer.to_str())["pre_tokenizer"]


def _without_generation_blocks(template: str) -> str:
    """Replace the tag that marks what the assistant wrote, which llama.cpp does not know."""
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def _split_name(content: Mapping[str, Any]) -> str:
    """Find llama.cpp's name for how a tokenizer.json splits text."""
    model, decoder = content["model"], content["decoder"] or {}
    if model["type"] != "BPE" or decoder.get("type") != "ByteLevel":
        raise ValueError("the tokenizer is neither byte-level BPE nor SentencePiece's: GGUF has no place for it")
    if not model["merges"]:
        return "gpt-2"  # without merges every split gives single bytes
    if content["normalizer"] not in (None, {"type": "NFC"}):  # llama.cpp does not normalize; NFC is tolerated
        raise ValueError(f"llama.cpp has no name for this tokenizer's normalizer: {json.dumps(content['normalizer'])}")
    rule = _comparable(content["pre_tokenizer"])
    for name, split in SPLITS.items():
        candidate = Tokenizer(models.BPE())
        candidate.pre_tokenizer = split
        if _comparable(json.loads(candidate.to_str())["pre_tokenizer"]) == rule:
            if bool(model.get("ignore_merges")) == (name in IGNORES_MERGES):
                return name
    raise ValueError(f"llama.cpp has no name that we know for this tokenizer's pre_tokenizer: {json.dumps(rule)}")


def _comparable(node: Any) -> Any:
    """Drop `trim_offsets`, which changes no token."""
    if isinstance(node, dict):
        return {key: _comparable(value) for key, value in node.items() if key != "trim_offsets"}
    return [_comparable(value) for value in node] if isinstance(node, list) else node


def _adds_bos(tokenizer: TextTokenizer) -> bool:
    """Whether encoding with special tokens puts the bos_token in front; other additions are refused."""
    plain = tokenizer.tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.tokenizer.encode("a", add_special_tokens=True).ids
    if full == plain:
        return False
    if full[1:] == plain and tokenizer.tokenizer.id_to_token(full[0]) == tokenizer.special.get("bos_token"):
        return True
    raise ValueError("the tokenizer adds other special tokens than a bos_token in front; GGUF cannot say so")
