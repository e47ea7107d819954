"""Tokenizers in the metadata of a GGUF file, in and out: byte-level BPE and SentencePiece.

Of byte-level BPE llama.cpp does not store how text is split before merging but a name; `SPLITS` has those we know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from nb_lightning.checkpoints import sentencepiece
from nb_lightning.text.tokenizer import END_OF_TURN, ROLES, TextTokenizer, begin_with, text_tokenizer

NO_MERGES = "<none> <none>"  # llama.cpp wants at least one; nothing ever makes the left side of this one
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


# llama.cpp's name -> how text is split. llama-bpe also takes a whole word that is a token without merging it.
SPLITS = {
    "gpt-2": _byte_level(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _by_regex(_WORDS % "{1,3}"),
    "qwen2": _by_regex(_WORDS % ""),
}
WHOLE_WORDS = ("llama-bpe",)
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: Path) -> TextTokenizer:
    """The tokenizer and chat template of a GGUF file.

    Raises:
        ValueError: none there, damaged, or of a kind that we do not know.
    """
    kind, split = metadata.get(KEY + "model"), metadata.get(KEY + "pre")
    tokens, types = metadata.get(KEY + "tokens"), metadata.get(KEY + "token_type")
    if not (kind == "llama" or (kind == "gpt2" and split in SPLITS)):
        raise ValueError(
            f"{origin}: its tokenizer is {kind!r} with {KEY}pre {split!r}; only SentencePiece ('llama') and byte-level "
            f"BPE ('gpt2') with {', '.join(SPLITS)} can be read. Use a folder with a tokenizer.json"
        )
    try:
        if kind == "llama":
            prefix = metadata.get(KEY + "add_space_prefix", True)
            tokenizer = sentencepiece.build_tokenizer(
                sentencepiece.Pieces(tokens, metadata.get(KEY + "scores"), types, prefix), {}, origin
            )
        else:
            tokenizer = _byte_level_bpe(tokens, types, metadata.get(KEY + "merges"), split)
    except Exception as error:  # the Rust side raises bare Exception
        reason = str(error).splitlines()[0]
        raise ValueError(f"{origin}: what its metadata says under {KEY} is no tokenizer: {reason}") from error
    beside = {}
    for role, key in _IDS.items():
        id = metadata.get(KEY + key)
        if isinstance(id, int) and 0 <= id < len(tokens):
            beside[role] = tokens[id]
    if metadata.get(KEY + "add_bos_token", kind == "llama") and "bos_token" in beside:
        begin_with(tokenizer, beside["bos_token"])
    template = metadata.get(TEMPLATE)
    return text_tokenizer(tokenizer, beside, template if isinstance(template, str) else None, str(origin))


def _byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], split: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ValueError("a token is there twice, or has no type")
    pairs = [tuple(merge.split(" ")) for merge in merges if merge != NO_MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split in WHOLE_WORDS))
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        (token, type)
        for token, type in zip(tokens, types)
        if type in (sentencepiece.CONTROL, sentencepiece.USER_DEFINED)
    ]
    tokenizer.add_tokens(
        [AddedToken(token, special=type == sentencepiece.CONTROL, normalized=False) for token, type in added]
    )
    return tokenizer


def tokenizer_to_gguf(tokenizer: TextTokenizer, vocab_size: int) -> dict[str, Any]:
    """Metadata that makes llama.cpp tokenize as `tokenizer` does.

    Args:
        vocab_size: of the model; ids that the tokenizer does not have are filled up with unused tokens.

    Raises:
        ValueError: llama.cpp has no tokenizer like this one, or no name that we know for how it splits text.
    """
    content = json.loads(tokenizer.tokenizer.to_str())
    model = content["model"]
    known = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    tokens = {id: token for token, id in known.items()}
    added = {
        token["id"]: sentencepiece.CONTROL if token["special"] else sentencepiece.USER_DEFINED
        for token in content["added_tokens"]
    }
    types = [added.get(id, sentencepiece.NORMAL if id in tokens else sentencepiece.UNUSED) for id in range(vocab_size)]
    listed = [tokens.get(id, f"[UNUSED{id}]") for id in range(vocab_size)]
    metadata = {
        KEY + "tokens": listed,
        KEY + "token_type": types,
        KEY + "add_bos_token": _adds_bos(tokenizer),
        KEY + "add_space_prefix": False,
    }
    if model["type"] == "BPE" and model["byte_fallback"]:
        pieces = _pieces(content, listed, types)
        metadata |= {KEY + "model": "llama", KEY + "pre": "default", KEY + "scores": list(pieces.scores),
                     KEY + "token_type": list(pieces.types), KEY + "add_space_prefix": pieces.add_dummy_prefix}  # fmt: skip
    else:
        metadata |= {KEY + "model": "gpt2", KEY + "pre": _split_of(content), KEY + "merges": _merges(model)}
    special = {"eos_token": tokenizer.tokenizer.id_to_token(tokenizer.eos_id), **tokenizer.special}
    for role in ROLES:
        if role in special:
            metadata[KEY + _IDS[role]] = known[special[role]]
    if END_OF_TURN in known:
        metadata[KEY + "eot_token_id"] = known[END_OF_TURN]
    if tokenizer.chat_template is not None:
        metadata[TEMPLATE] = _without_generation_blocks(tokenizer.chat_template)
    return metadata


def _merges(model: Mapping[str, Any]) -> list[str]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return merges or [NO_MERGES]


def _pieces(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> sentencepiece.Pieces:
    """SentencePiece's view of a byte-fallback BPE that was made from it: scores in the order of the merges."""
    model = content["model"]
    prefix = next((known for known in (True, False) if _normalizer(known) == content["normalizer"]), None)
    if prefix is None or content["pre_tokenizer"] is not None:
        raise ValueError("the tokenizer is byte-fallback BPE, but does not treat spaces as SentencePiece does")
    first: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        first.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), float(-rank))
    scores = [first.get(token, float(-len(model["merges"]))) for token in tokens]
    types = [
        sentencepiece.UNKNOWN if token == model["unk_token"] else sentencepiece.BYTE if _BYTE.fullmatch(token) else type
        for token, type in zip(tokens, types)
    ]
    return sentencepiece.Pieces(tokens, scores, types, prefix)


def _normalizer(prefix: bool) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = sentencepiece.space_normalizer(prefix)
    return json.loads(tokenizer.to_str())["normalizer"]


def _without_generation_blocks(template: str) -> str:
    """llama.cpp does not know the tag that marks what the assistant wrote."""
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def _split_of(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text."""
    model, decoder = content["model"], content["decoder"] or {}
    if model["type"] != "BPE" or decoder.get("type") != "ByteLevel":
        raise ValueError("the tokenizer is neither byte-level BPE nor SentencePiece's: GGUF has no place for it")
    if not model["merges"]:
        return "gpt-2"  # single bytes are single bytes however the text is split
    if content["normalizer"] not in (None, {"type": "NFC"}):  # of the latter llama.cpp takes no notice
        raise ValueError(f"llama.cpp has no name for this tokenizer's normalizer: {json.dumps(content['normalizer'])}")
    found = _comparable(content["pre_tokenizer"])
    for name, split in SPLITS.items():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = split
        if _comparable(json.loads(made.to_str())["pre_tokenizer"]) == found:
            if bool(model.get("ignore_merges")) == (name in WHOLE_WORDS):
                return name
    raise ValueError(f"llama.cpp has no name that we know for this tokenizer's pre_tokenizer: {json.dumps(found)}")


def _comparable(node: Any) -> Any:
    """Without what changes no token: where offsets point."""
    if isinstance(node, dict):
        return {key: _comparable(value) for key, value in node.items() if key != "trim_offsets"}
    return [_comparable(value) for value in node] if isinstance(node, list) else node


def _adds_bos(tokenizer: TextTokenizer) -> bool:
    plain = tokenizer.tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.tokenizer.encode("a", add_special_tokens=True).ids
    if full == plain:
        return False
    if full[1:] == plain and tokenizer.tokenizer.id_to_token(full[0]) == tokenizer.special.get("bos_token"):
        return True
    raise ValueError("the tokenizer adds other special tokens than a bos_token in front; GGUF cannot say so")
