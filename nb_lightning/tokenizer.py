"""Tokenizers: bytes for the demo, or a Hugging Face `tokenizer.json` (or `tokenizer.model`) and what lies beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from nb_lightning import spm

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END_OF_TURN = "<|im_end|>"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}  # LlamaTokenizer's own
EOS_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers.Tokenizer` and the token that ends a document.

    Attributes:
        digest: names the vocabulary: sources tokenized with another one are refused.
        special: the tokens of tokenizer_config.json by their role: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
        chat_template: Jinja source that lay beside the tokenizer, as untrusted as the file; None without one.
    """

    tokenizer: Tokenizer
    eos_id: int
    digest: str
    special: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

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

    def save(self, folder: Path, chat_template: str | None = None, **more: Any) -> None:
        """Write what `load_tokenizer(folder)` and transformers' AutoTokenizer read.

        Args:
            chat_template: instead of the tokenizer's own.
            more: for tokenizer_config.json.
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
            from nb_lightning.gguf_file import read_metadata
            from nb_lightning.gguf_tokenizer import tokenizer_from_gguf

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
    near = [path, path / "tokenizer", path.parent.parent / "tokenizer"]
    files = [folder / name for folder in near for name in ("tokenizer.json", "tokenizer.model")]
    return next((file for file in files if file.is_file()), files[0])


def begin_with(tokenizer: Tokenizer, token: str) -> None:
    """Make `token` the first of every text that is encoded with special tokens."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, tokenizer.token_to_id(token))]
    )


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
    pieces = spm.read_model(path)
    if beside.get("add_prefix_space") is False:
        pieces = replace(pieces, prefix=False)
    try:
        more = beside.get("added_tokens_decoder", {})
        added = {int(id): (token["content"], token["special"]) for id, token in more.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is damaged") from error
    if beside.get("add_eos_token"):
        raise ValueError(f"{path.parent / 'tokenizer_config.json'}: add_eos_token is set, which is not supported")
    tokenizer = spm.build(pieces, added, path)
    bos = special_tokens(beside, tokenizer).get("bos_token")
    if beside["add_bos_token"] and bos is not None:
        begin_with(tokenizer, bos)
    return tokenizer


def text_tokenizer(
    tokenizer: Tokenizer, beside: Mapping[str, Any], template: str | None, origin: str, eos_token: str | None = None
) -> TextTokenizer:
    """A `TextTokenizer` of a tokenizer and the content of its tokenizer_config.json.

    Raises:
        ValueError: no end token.
    """
    special = special_tokens(beside, tokenizer)
    # An end of turn is often called eos_token; what ends a document comes first.
    names = (eos_token,) if eos_token else (*EOS_CANDIDATES, *filter(None, [special.get("eos_token")]))
    eos_id = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if eos_id is None:
        raise ValueError(f"tokenizer {origin!r} has none of the end tokens {', '.join(names)}; name its own (--eos)")
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return TextTokenizer(tokenizer, eos_id, digest, special, template)


def special_tokens(beside: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names by their role, as far as the tokenizer has them."""
    special = {}
    for role in ROLES:
        token = beside.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            special[role] = token
    return special


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
