"""Find and read tokenizer files: "bytes", tokenizer.json, SentencePiece's tokenizer.model, a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nb_lightning.checkpoints import sentencepiece
from nb_lightning.run_folder import TOKENIZER
from nb_lightning.text.tokenizer import (
    SPECIAL,
    TextTokenizer,
    begin_with,
    byte_tokenizer,
    special_tokens,
    text_tokenizer,
)

LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}  # LlamaTokenizer's own


def load_tokenizer(spec: str, eos_token: str | None = None) -> TextTokenizer:
    """Load the tokenizer that `spec` names.

    Args:
        spec: "bytes", a tokenizer.json or SentencePiece's tokenizer.model, a folder that holds one, a run or one of its
            checkpoints, or a .gguf file.
        eos_token: the token that ends a document; by default the first of `EOS_CANDIDATES` in the vocabulary.

    Raises:
        ValueError: nothing there, an unreadable file, or no end token.
    """
    beside: dict[str, Any] = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[3]}
    template: str | None = None
    if spec == "bytes":
        tokenizer = byte_tokenizer()
    else:
        path = tokenizer_file(Path(spec))
        if not path.is_file():
            raise ValueError(
                f"no tokenizer at {spec!r}: there is no {path}; "
                "give 'bytes', a tokenizer.json, its folder, a run or a .gguf file"
            )
        if path.suffix == ".gguf":
            from nb_lightning.checkpoints.gguf import read_metadata
            from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_from_gguf

            return tokenizer_from_gguf(read_metadata(path), path)
        beside, template = _beside(path.parent)
        if path.suffix == ".model":
            beside = {**LLAMA, **beside}
            tokenizer = _sentencepiece(path, beside)
        else:
            tokenizer = _json(path)
    return text_tokenizer(tokenizer, beside, template, spec, eos_token)


def tokenizer_file(path: Path) -> Path:
    """Where the tokenizer is that `path` means: a file, its folder, a run, or one of its checkpoints."""
    if not path.is_dir():
        return path
    near = [path, path / TOKENIZER, path.parent.parent / TOKENIZER]
    files = [folder / name for folder in near for name in ("tokenizer.json", "tokenizer.model")]
    return next((file for file in files if file.is_file()), files[0])


def _json(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _sentencepiece(path: Path, beside: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer.model and the tokenizer_config.json's added tokens, as transformers' LlamaTokenizer reads them."""
    pieces = sentencepiece.read_pieces(path)
    if beside.get("add_prefix_space") is False:
        pieces = replace(pieces, add_dummy_prefix=False)
    try:
        more = beside.get("added_tokens_decoder", {})
        added = {int(id): (token["content"], token["special"]) for id, token in more.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is damaged") from error
    if beside.get("add_eos_token"):
        raise ValueError(f"{path.parent / 'tokenizer_config.json'}: add_eos_token is set, which is not supported")
    tokenizer = sentencepiece.build_tokenizer(pieces, added, path)
    bos = special_tokens(beside, tokenizer).get("bos_token")
    if beside["add_bos_token"] and bos is not None:
        begin_with(tokenizer, bos)
    return tokenizer


def _beside(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The tokenizer_config.json and the chat template in a tokenizer's folder."""
    try:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    if isinstance(template, list):  # named ones
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return config, template if isinstance(template, str) else None
