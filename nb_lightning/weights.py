"""The tensors of a checkpoint under the `Transformer`'s names, and Hugging Face's safetensors in and out.

`Weights` are read one at a time, so that filling a model takes its own memory and one tensor more, sharded or not.
Files are data: nothing is unpickled, and no name in them leads out of their folder. Only this file and hf_config.py
know Hugging Face's spellings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nb_lightning.hf_config import read_json
from nb_lightning.model import ModelShape, Transformer, copy_into

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# `Transformer`'s names and theirs. What follows the second part (q_proj.weight, ...) is spelled alike.
_TOP = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight"}  # fmt: skip
_LAYER = {"attention_norm": "input_layernorm", "attention": "self_attn",
          "mlp_norm": "post_attention_layernorm", "mlp": "mlp"}  # fmt: skip
_OURS = {theirs: ours for ours, theirs in (_TOP | _LAYER).items()}
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in old files; follows from the base


# Weights: one tensor at a time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, and its shape."""

    spelling: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a checkpoint under the `Transformer`'s names.

    Attributes:
        origin: the file or folder, for errors.
        stored: what there is.
        dtype: of the file, where it has one.
    """

    def __init__(self, origin: str | Path, stored: Mapping[str, Stored], dtype: torch.dtype) -> None:
        self.origin, self.stored, self.dtype = str(origin), dict(stored), dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        raise NotImplementedError

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor: its dtype, shape and bytes, whatever file it is in."""
        tensor = self.read(name)
        found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy())
        return found.hexdigest()

    def require(self, shape: ModelShape) -> None:
        """Refuse what does not fit a `Transformer` of this shape, before any tensor is read.

        Raises:
            ValueError: names a missing, additional or differently shaped tensor.
        """
        if shape.n_layers > len(self.stored):
            raise ValueError(f"{self.origin}: {len(self.stored)} tensors are too few for {shape.n_layers} layers")
        left = dict(self.stored)
        for name, expected in parameter_shapes(shape).items():
            if name not in left:
                raise ValueError(f"{self.origin}: tensor {self.spell(name)} is missing")
            found = left.pop(name)
            if found.shape != expected:
                raise ValueError(
                    f"{self.origin}: tensor {found.spelling} is {list(found.shape)}, the model's is {list(expected)}"
                )
        if shape.tie_embeddings and "head.weight" in left:
            head = left.pop("head.weight")
            # `fill` and `save` leave it out; a head of its own would be lost.
            if not torch.equal(self.read("head.weight"), self.read("embedding.weight")):
                raise ValueError(
                    f"{self.origin}: tensor {head.spelling} differs from the embedding, to which the config ties it"
                )
        for found in left.values():
            raise ValueError(f"{self.origin}: tensor {found.spelling} is not part of the model")

    def spell(self, name: str) -> str:
        """How the file's format spells a name of the `Transformer`."""
        return name


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter, a tied one once."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(shape).named_parameters()}


def fill(model: Transformer, weights: Weights) -> None:
    """Copy every tensor into the model's parameters, sharded or not, in their dtype.

    Raises:
        ValueError: see `Weights.require`.
    """
    weights.require(model.shape)
    for name, parameter in model.named_parameters():
        copy_into(parameter, weights.read(name))


# safetensors --------------------------------------------------------------------------------------------------------


class HFWeights(Weights):
    """`model.safetensors` of a folder, or the files that its index names.

    Raises:
        ValueError: no such files, pickles in their place, an index that leads elsewhere, a damaged file, or a dtype
            that is not a plain float.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}  # by the file's spelling
        stored, dtypes = {}, set()
        for file in _weight_files(folder):
            with self._open(file) as opened:
                for name in opened.keys():
                    if name in self._file_of:
                        raise ValueError(f"{folder}: tensor {name} is in {self._file_of[name]} and again in {file}")
                    self._file_of[name] = file
                    if _BUFFER.fullmatch(name):
                        continue
                    part, ours = opened.get_slice(name), from_hf(name)
                    if ours is None:
                        raise ValueError(f"{folder / file}: tensor {name} is not part of a Llama model")
                    if part.get_dtype() not in _STORED_DTYPES:
                        allowed = ", ".join(_STORED_DTYPES)
                        raise ValueError(f"{folder / file}: tensor {name} is {part.get_dtype()}; allowed: {allowed}")
                    dtypes.add(part.get_dtype())
                    stored[ours] = Stored(name, tuple(part.get_shape()))
        dtype = _STORED_DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
        super().__init__(folder, stored, dtype)

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file} is not a readable safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        spelling = self.stored[name].spelling
        # Opened anew: the mapped pages of what was read before do not count as the process's memory any more.
        with self._open(self._file_of[spelling]) as opened:
            return opened.get_tensor(spelling)

    def spell(self, name: str) -> str:
        return to_hf(name)


def to_hf(name: str) -> str:
    """`Transformer`'s name of a parameter in their spelling."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part, *rest = name.split(".")
    return ".".join(("model.layers", layer, _LAYER[part], *rest))


def from_hf(name: str) -> str | None:
    """The inverse of `to_hf`; None for a name that is not one of theirs."""
    if name in _OURS:
        return _OURS[name]
    match name.split("."):
        case ["model", "layers", layer, part, *rest] if part in _OURS:
            return ".".join(("layers", layer, _OURS[part], *rest))
    return None


def _weight_files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES) if folder.is_dir() else []
        if pickles:
            raise ValueError(
                f"{folder} holds {pickles[0]}, a pickle, which can run code when it is opened; "
                "convert it to safetensors where you trust it"
            )
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    files = sorted({str(name) for name in names.values()})
    for file in files:
        if not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise ValueError(f"{folder / INDEX} names {file!r}; only .safetensors files beside it are opened")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX} names {file}, which is not there")
    return files


def save_hf(weights: Weights, shape: ModelShape, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write safetensors into `folder`, in files of at most `shard_bytes` (a larger tensor has one to itself).

    Raises:
        ValueError: see `Weights.require`.
    """
    weights.require(shape)
    sizes = {name: torch.Size(dims).numel() * dtype.itemsize for name, dims in parameter_shapes(shape).items()}
    shards = list(_split(sizes, shard_bytes))
    files = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {to_hf(name): weights.read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors keeps its files to their owner
        files.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _split(sizes: Mapping[str, int], largest: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > largest:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names
