"""Find and read tokenizers: "bytes", a tokenizer.json, SentencePiece's tokenizer.model, or a .gguf file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nb_lightning.checkpoints import sentencepiece
from nb_lightning.files import read_json
from nb_lightning.run_folder import TOKENIZER
from nb_lightning.text.tokenizer import (
    SPECIAL,
    TextTokenizer,
    begin_with,
    byte_tokenizer,
    special_tokens,
    text_tokenizer,
)

CONFIG = "tokenizer_config.json"
LLAMA_TOKENIZER = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}  # its defaults


def load_tokenizer(spec: str, eos_token: str | None = None) -> TextTokenizer:
    """Load the tokenizer that `spec` names.

    Args:
        spec: "bytes", a tokenizer.json or SentencePiece's tokenizer.model, a folder that holds one, a run or one of its
            checkpoints, or a .gguf file.
        eos_token: the token that ends a document; by default the first of `EOS_CANDIDATES` in the vocabulary.

    Raises:
        ValueError: nothing is there, the file is not readable, or the tokenizer has no end token.
    """
    config: dict[str, Any] = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[3]}
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
        config, template = _read_config(path.parent)
        if path.suffix == ".model":
            config = {**LLAMA_TOKENIZER, **config}
            tokenizer = _read_sentencepiece(path, config)
        else:
            tokenizer = _read_json_tokenizer(path)
    return text_tokenizer(tokenizer, config, template, spec, eos_token)


def tokenizer_file(path: Path) -> Path:
    """Find the tokenizer's file. `path` is the file, its folder, a run, or one of its checkpoints."""
    if not path.is_dir():
        return path
    folders = [path, path / TOKENIZER, path.parent.parent / TOKENIZER]
    files = [folder / name for folder in folders for name in ("tokenizer.json", "tokenizer.model")]
    return next((file for file in files if file.is_file()), files[0])


def _read_json_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_sentencepiece(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Read a tokenizer.model and the added tokens of a tokenizer_config.json, as transformers' LlamaTokenizer does."""
    pieces = sentencepiece.follow_config(sentencepiece.read_pieces(path), config)
    try:
        entries = config.get("added_tokens_decoder", {})
        added = {int(id): (token["content"], token["special"]) for id, token in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.parent / CONFIG}: added_tokens_decoder is damaged") from error
    if config.get("add_eos_token"):
        raise ValueError(f"{path.parent / CONFIG}: add_eos_token is set, which is not supported")
    tokenizer = sentencepiece.build_tokenizer(pieces, added, path)
    bos = special_tokens(config, tokenizer).get("bos_token")
    if config["add_bos_token"] and bos is not None:
        begin_with(tokenizer, bos)
    return tokenizer


def _read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Read the tokenizer_config.json and the chat template in a tokenizer's folder; both may be missing."""
    config = read_json(folder / CONFIG, {})
    path = folder / "chat_template.jinja"
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    if isinstance(template, list):  # several, each with a name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return config, template if isinstance(template, str) else None
