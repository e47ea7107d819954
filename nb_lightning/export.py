"""Export a model: `python -m nb_lightning.export --from RUN --to FOLDER [--gguf FILE]`.

It writes a Hugging Face folder that plain `transformers` loads, a GGUF file that llama.cpp runs, or an adapter in
peft's format; each beside its place and renamed there when it is complete. docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nb_lightning import __version__
from nb_lightning.checkpoints import folders, gguf, hf_config, hf_weights
from nb_lightning.checkpoints.gguf_tokenizer import tokenizer_to_gguf
from nb_lightning.checkpoints.model_card import model_card
from nb_lightning.checkpoints.pretrained import EXPORT, AdapterOrigin, Origin, find_origin
from nb_lightning.config.schema import AdapterConfig
from nb_lightning.errors import one_line_errors
from nb_lightning.generation.sampling import PAPER_DECODING
from nb_lightning.model import weights
from nb_lightning.text.chat_template import read_template
from nb_lightning.text.tokenizer import TextTokenizer

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
DEFAULT_CONTEXT = 2048  # tokens, where the origin does not say: transformers' default for Llama


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    with one_line_errors():
        run(a)


def parser() -> argparse.ArgumentParser:
    description = "Export a model for transformers, llama.cpp or peft."
    p = argparse.ArgumentParser(prog="python -m nb_lightning.export", description=description)
    p.add_argument("--from", dest="origin", required=True, metavar="PATH",
                   help="a run, a checkpoint, a Hugging Face folder or a .gguf file")  # fmt: skip
    p.add_argument("--to", metavar="FOLDER", help="the Hugging Face folder to write")
    p.add_argument("--gguf", metavar="FILE", help="the .gguf file to write")
    p.add_argument("--adapter", metavar="FOLDER", help="the folder to write for an adapter run, in peft's format")
    p.add_argument("--dtype", default="auto", choices=["auto", *hf_config.DTYPES], help="auto: as it is stored")
    p.add_argument("--gguf-type", default="auto", choices=["auto", *gguf.TYPES], help="auto: as --dtype")
    p.add_argument("--chat-template", metavar="FILE", help="instead of the model's own; 'chatml' is ours")
    p.add_argument("--shard-size", default="4GB", help="largest safetensors file: a number with KB, MB or GB")
    p.add_argument("--name", help="the model's name in its card; by default the folder's")
    return p


def run(a: argparse.Namespace) -> None:
    """Export in the formats that the arguments name.

    Raises:
        ValueError: there is nothing to export, or the target holds something else than an earlier export.
    """
    if not (a.to or a.gguf or a.adapter):
        raise ValueError("nothing to write: give --to, --gguf or --adapter")
    shard_bytes = _parse_bytes(a.shard_size)
    origin = find_origin(a.origin)
    targets = {"--to": a.to, "--gguf": a.gguf, "--adapter": a.adapter}
    for flag, target in targets.items():
        if target:
            check = _require_file if flag == "--gguf" else _require_folder
            check(flag, Path(target), origin.path)
    if a.adapter:
        export_adapter(origin, Path(a.adapter))
    if not (a.to or a.gguf):
        return
    tensors, tokenizer = origin.open(), origin.tokenizer()
    tensors.require(origin.shape)
    if a.chat_template:
        source = read_template(a.chat_template, f"--chat-template {a.chat_template}")
        tokenizer = replace(tokenizer, chat_template=source)
    dtype = tensors.dtype if a.dtype == "auto" else hf_config.DTYPES[a.dtype]
    if a.to:
        export_hf(origin, tensors, tokenizer, Path(a.to), dtype, shard_bytes, a.name or Path(a.to).absolute().name)
    if a.gguf:
        kind = a.gguf_type if a.gguf_type != "auto" else hf_config.dtype_name(dtype)
        export_gguf(origin, tensors, tokenizer, Path(a.gguf), kind, a.name or Path(a.gguf).stem)


def export_hf(
    origin: Origin,
    tensors: weights.Weights,
    tokenizer: TextTokenizer,
    target: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    name: str,
) -> None:
    """Write a Hugging Face folder: weights, config, generation config, tokenizer and model card."""
    context, kind = origin.context or DEFAULT_CONTEXT, hf_config.dtype_name(dtype)
    special = {"eos_token": tokenizer.tokenizer.id_to_token(tokenizer.eos_id), **tokenizer.special}
    ids: dict[str, Any] = {  # null where there is no such token: else transformers has defaults
        f"{role}_id": tokenizer.tokenizer.token_to_id(special[role]) if role in special else None
        for role in ("bos_token", "eos_token", "pad_token")
    }
    generation = {**ids, "eos_token_id": list(origin.stop_ids(tokenizer))}
    generation |= origin.decoding() or ({"do_sample": True, **PAPER_DECODING} if tokenizer.chat_template else {})
    temporary = _beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        hf_weights.save_hf(tensors, origin.shape, temporary, dtype, shard_bytes)
        config = hf_config.config_from_shape(origin.shape, dtype, max_position_embeddings=context, **ids)
        _write_json(temporary / hf_config.CONFIG, config)
        _write_json(temporary / hf_config.GENERATION_CONFIG, {k: v for k, v in generation.items() if v is not None})
        tokenizer.save(temporary, model_max_length=context)
        card = model_card(name, origin, kind, chat=tokenizer.chat_template is not None)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        info: dict[str, Any] = {"version": __version__, "from": origin.path.name, "dtype": kind}
        if origin.comparison():
            info["comparison"] = {"digest": origin.comparison()}
        folders.commit(temporary, target, info, EXPORT)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size / 1e6:,.1f} MB, {kind}; AutoModelForCausalLM.from_pretrained takes it")


def export_gguf(
    origin: Origin, tensors: weights.Weights, tokenizer: TextTokenizer, target: Path, kind: str, name: str
) -> None:
    """Write a GGUF file: weights, tokenizer and metadata."""
    metadata = {"general.name": name, **tokenizer_to_gguf(tokenizer, origin.shape.vocab_size)}
    temporary = _beside(target)
    context = origin.context or DEFAULT_CONTEXT
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        gguf.save_gguf(tensors, origin.shape, temporary, kind, context, metadata, __version__)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {kind}; llama-server -m takes it")


def export_adapter(origin: Origin, target: Path) -> None:
    """Write the weights that an adapter run trained, as `PeftModel.from_pretrained(base, target)` loads them."""
    if not isinstance(origin, AdapterOrigin):
        raise ValueError(f"--adapter: {origin.path} is no run of adapters (stage.adapter.name=lora or qlora)")
    settings = dict(folders.read_info(origin.path)["adapter"])
    base = settings.pop("base")["path"]
    temporary = _beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        trained, shape = folders.CheckpointWeights(origin.path), origin.shape
        hf_weights.save_peft(trained, AdapterConfig(**settings), base, shape.tie_embeddings, temporary)
        folders.commit(temporary, target, {"version": __version__, "from": origin.path.name}, EXPORT)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{target}: PeftModel.from_pretrained(model, ...) takes it, with the model of {base}")


def _beside(target: Path) -> Path:
    """Name the path that is written first."""
    return target.absolute().with_name(f".writing-{target.absolute().name}")


def _require_folder(flag: str, target: Path, origin: Path) -> None:
    """Refuse a folder that holds anything but an earlier export."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{flag} {target} is a file or a link, not a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if target.resolve() in (origin.resolve(), *origin.resolve().parents):
        raise ValueError(f"{flag} {target} is where the weights come from")
    try:
        exported = folders.read_info(target, EXPORT)["files"]
    except folders.DamagedCheckpoint as error:
        raise ValueError(
            f"{flag} {target} holds something that is not an earlier export; name another folder"
        ) from error
    for path in target.iterdir():
        if path.name not in exported and path.name != EXPORT:
            raise ValueError(f"{flag} {target} is an earlier export, but {path.name} is not of it; name another folder")


def _require_file(flag: str, target: Path, origin: Path) -> None:
    """Refuse a path that holds anything but the file of an earlier export."""
    if target.suffix != ".gguf":
        raise ValueError(f"{flag} {target} does not end in .gguf")
    if target.resolve() == origin.resolve():
        raise ValueError(f"{flag} {target} is where the weights come from")
    gguf.require_package()
    if (target.exists() or target.is_symlink()) and not (target.is_file() and gguf.is_ours(target)):
        raise ValueError(f"{flag} {target} is something else than an earlier export; name another file")


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None or not int(match[1]):
        raise ValueError(f"--shard-size is {text!r}; give a whole number with KB, MB or GB, as in 4GB")
    return int(match[1]) * UNITS[match[2]]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
