"""Find and read tokenizers: "bytes", a tokenizer.json, SentencePiece's tokenizer.model, or a .gguf file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from nb_lightning.checkpoints import sentencepiece
from nb_lightning.files import read_json
from nb_lightning.run_folder import TOKENIZER
from nb_lightning.text.chat_template import choose_by_tools, refusing_template
from nb_lightning.text.tokenizer import (
    ROLES,
    SPECIAL,
    TextTokenizer,
    begin_with,
    byte_tokenizer,
    special_tokens,
    text_tokenizer,
)

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"  # of older folders
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
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
            _follow_added_tokens(tokenizer, path.parent, config)
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
    if config.get("add_eos_token"):
        raise ValueError(f"{path.parent / CONFIG}: add_eos_token is set, which is not supported")
    tokenizer = sentencepiece.build_tokenizer(pieces, _added_tokens(config, path.parent), path)
    bos = special_tokens(config, tokenizer).get("bos_token")
    if config["add_bos_token"] and bos is not None:
        begin_with(tokenizer, bos)
    return tokenizer


def _read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Read the tokenizer_config.json and the chat template in a tokenizer's folder, as transformers does.

    A tokenizer_config.json without `added_tokens_decoder` is an older one: special_tokens_map.json then names the
    special tokens, and added_tokens.json the added ones. All files may be missing.
    """
    config = read_json(folder / CONFIG, {})
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / SPECIAL_TOKENS_MAP, {})
        if added := read_json(folder / ADDED_TOKENS, {}):
            special = _special_contents(config)
            config["added_tokens_decoder"] = {
                id: {"content": token, "special": token in special} for token, id in added.items()
            }
    return config, _read_template(folder, config.get("chat_template"))


def _special_contents(config: Mapping[str, Any]) -> set[str]:
    """Collect the text of every special token that a tokenizer's config names."""
    tokens = [config.get(role) for role in (*ROLES, "sep_token", "cls_token", "mask_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        tokens += more.values() if isinstance(more, dict) else more
    contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return {content for content in contents if isinstance(content, str)}


def _added_tokens(config: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """Read `added_tokens_decoder`: id -> token, with its flags as transformers takes them."""
    tokens = {}
    try:
        for id, entry in config.get("added_tokens_decoder", {}).items():
            flags = {flag: entry[flag] for flag in _FLAGS if flag in entry}
            tokens[int(id)] = AddedToken(entry["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: added_tokens_decoder is damaged") from error
    return tokens


def _follow_added_tokens(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks, and give those it has the config's flags.

    Of an older folder (added_tokens.json), tokenizer.json's own tokens keep their flags, as in transformers. A word of
    the vocabulary that the config names as a special token becomes one. (transformers also invents ids for named
    tokens that are nowhere; here such a role stays empty.)

    Raises:
        ValueError: an id is not the next free one, so that the token cannot get it.
    """
    is_older = "added_tokens_decoder" not in read_json(folder / CONFIG, {})
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    roles = _special_contents({key: value for key, value in config.items() if key.endswith("_token")})
    added = _added_tokens(config, folder)
    for id in sorted(added):
        token = added[id]
        if token.content in present and (is_older or repr(present[token.content]) == repr(token)):
            continue
        token.special = token.special or token.content in roles
        before = tokenizer.token_to_id(token.content)
        tokenizer.add_tokens([token])
        present[token.content] = token
        if (assigned := tokenizer.token_to_id(token.content)) != id:
            reason = f"the next free one is {assigned}" if before is None else f"in tokenizer.json it has {before}"
            file = ADDED_TOKENS if is_older else CONFIG
            raise ValueError(f"{folder / file} gives {token.content!r} the id {id}; {reason}")
    for content in sorted(_special_contents(config) - present.keys()):
        if tokenizer.token_to_id(content) is not None:
            tokenizer.add_tokens([AddedToken(content, special=True)])


def _read_template(folder: Path, in_config: Any) -> str | None:
    """Read the chat template: from files, else from the config. Several have names, as in transformers.

    With tools, a conversation is written by the template `tool_use`, else by `default`.
    """
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    templates: dict[str, Any] = {}
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not readable: {error}") from error
    if not templates:
        if isinstance(in_config, str) or in_config is None:
            return in_config
        try:
            templates = {entry["name"]: entry["template"] for entry in in_config}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG}: chat_template is neither a text nor a list of named ones") from error
    default = templates.get("default")
    if default is None:
        names = ", ".join(sorted(templates)) or "none"
        default = refusing_template(f"{folder} has several chat templates ({names}), but none is named default")
    return choose_by_tools(default, templates["tool_use"]) if "tool_use" in templates else default
