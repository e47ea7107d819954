"""Byte-level BPE tokenizers in the metadata of a GGUF file, in and out.

llama.cpp does not store how text is split before merging but a name for it; `SPLITS` has those we know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from nb_lightning.tokenizer import END_OF_TURN, ROLES, TextTokenizer, text_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
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


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: Path) -> TextTokenizer:
    """The tokenizer and chat template of a GGUF file.

    Raises:
        ValueError: none there, damaged, or not byte-level BPE with a split that we know.
    """
    kind, split = metadata.get(KEY + "model"), metadata.get(KEY + "pre")
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"{origin}: its tokenizer is {kind!r} with {KEY}pre {split!r}; only byte-level BPE ('gpt2') with "
            f"{', '.join(SPLITS)} can be read. Use a Hugging Face folder, which has a tokenizer.json"
        )
    tokens, merges, types = (metadata.get(KEY + name) for name in ("tokens", "merges", "token_type"))
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges if merge != NO_MERGES]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens) or len(types) != len(tokens):
            raise ValueError("a token is there twice, or has no type")
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split in WHOLE_WORDS)
    except Exception as error:  # the Rust side raises bare Exception
        reason = str(error).splitlines()[0]
        raise ValueError(f"{origin}: {KEY}tokens, merges and token_type are no tokenizer: {reason}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, type) for token, type in zip(tokens, types) if type in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=type == CONTROL, normalized=False) for token, type in added])
    beside = {}
    for role, key in _IDS.items():
        id = metadata.get(KEY + key)
        if isinstance(id, int) and 0 <= id < len(tokens):
            beside[role] = tokens[id]
    if metadata.get(KEY + "add_bos_token") and "bos_token" in beside:
        bos = beside["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    template = metadata.get(TEMPLATE)
    return text_tokenizer(tokenizer, beside, template if isinstance(template, str) else None, str(origin))


def tokenizer_to_gguf(tokenizer: TextTokenizer, vocab_size: int) -> dict[str, Any]:
    """Metadata that makes llama.cpp tokenize as `tokenizer` does.

    Args:
        vocab_size: of the model; ids that the tokenizer does not have are filled up with unused tokens.

    Raises:
        ValueError: llama.cpp has no name for how this tokenizer splits text, or it is not byte-level BPE.
    """
    content = json.loads(tokenizer.tokenizer.to_str())
    model = content["model"]
    known = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    tokens = {id: token for token, id in known.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    if not merges and model["type"] == "BPE":
        split = "gpt-2"  # single bytes are single bytes however the text is split
        merges = [NO_MERGES]
    else:
        split = _split_of(content)
    types = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    metadata = {
        KEY + "model": "gpt2",
        KEY + "pre": split,
        KEY + "tokens": [tokens.get(id, f"[UNUSED{id}]") for id in range(vocab_size)],
        KEY + "token_type": [types.get(id, NORMAL if id in tokens else UNUSED) for id in range(vocab_size)],
        KEY + "merges": merges,
        KEY + "add_bos_token": _adds_bos(tokenizer),
        KEY + "add_space_prefix": False,
    }
    special = {"eos_token": tokenizer.tokenizer.id_to_token(tokenizer.eos_id), **tokenizer.special}
    for role in ROLES:
        if role in special:
            metadata[KEY + _IDS[role]] = known[special[role]]
    if END_OF_TURN in known:
        metadata[KEY + "eot_token_id"] = known[END_OF_TURN]
    if tokenizer.chat_template is not None:
        metadata[TEMPLATE] = _without_generation_blocks(tokenizer.chat_template)
    return metadata


def _without_generation_blocks(template: str) -> str:
    """llama.cpp does not know the tag that marks what the assistant wrote."""
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def _split_of(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text."""
    model, decoder = content["model"], content.get("decoder") or {}
    if model["type"] != "BPE" or model.get("byte_fallback") or decoder.get("type") != "ByteLevel":
        raise ValueError("the tokenizer is not byte-level BPE: GGUF files can be written for no other kind")
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
