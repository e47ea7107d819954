"""The weights of a Hugging Face folder, in and out: safetensors in Llama's spelling, and adapters in peft's format.

No pickle is opened: a folder that holds one in place of safetensors is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nb_lightning.config.schema import AdapterConfig
from nb_lightning.files import read_json, write_json
from nb_lightning.model.adapters import peft_config
from nb_lightning.model.transformer import ModelShape
from nb_lightning.model.weights import StoredTensor, Weights, parameter_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PEFT_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# `Transformer`'s name -> transformers' name. The rest of a layer's name (q_proj.weight, ...) is the same in both.
_TOP = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight"}  # fmt: skip
_LAYER = {"attention_norm": "input_layernorm", "attention": "self_attn",
          "mlp_norm": "post_attention_layernorm", "mlp": "mlp"}  # fmt: skip
_OURS = {theirs: ours for ours, theirs in (_TOP | _LAYER).items()}
_BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # in old files; computed from the RoPE base


class HFWeights(Weights):
    """The tensors in `model.safetensors` of a folder, or in the files that its index names.

    Raises:
        ValueError: no such files, pickles in their place, an index that names files outside the folder, a damaged
            file, or a dtype that is not a plain float.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}  # transformers' name -> file
        stored, dtypes = {}, set()
        for file in _weight_files(folder):
            with self._open(file) as tensors:
                for name in tensors.keys():
                    if name in self._file_of:
                        raise ValueError(f"{folder}: tensor {name} is in {self._file_of[name]} and again in {file}")
                    self._file_of[name] = file
                    if _BUFFER.fullmatch(name):
                        continue
                    tensor, ours = tensors.get_slice(name), from_hf(name)
                    if ours is None:
                        raise ValueError(f"{folder / file}: tensor {name} is not part of a Llama model")
                    if tensor.get_dtype() not in _STORED_DTYPES:
                        allowed = ", ".join(_STORED_DTYPES)
                        raise ValueError(f"{folder / file}: tensor {name} is {tensor.get_dtype()}; allowed: {allowed}")
                    dtypes.add(tensor.get_dtype())
                    stored[ours] = StoredTensor(name, tuple(tensor.get_shape()))
        dtype = _STORED_DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
        super().__init__(folder, stored, dtype)

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file} is not a readable safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        spelling = self.stored[name].spelling
        # Opened again for each tensor: closing unmaps the pages that were read, so they leave the process's memory.
        with self._open(self._file_of[spelling]) as tensors:
            return tensors.get_tensor(spelling)

    def spell(self, name: str) -> str:
        return to_hf(name)


def to_hf(name: str) -> str:
    """Translate the name of a `Transformer` parameter into transformers' name."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part, *rest = name.split(".")
    return ".".join(("model.layers", layer, _LAYER[part], *rest))


def from_hf(name: str) -> str | None:
    """Invert `to_hf`. Returns None for a name that a Llama model does not have."""
    if name in _OURS:
        return _OURS[name]
    match name.split("."):
        case ["model", "layers", layer, part, *rest] if part in _OURS:
            return ".".join(("layers", layer, _OURS[part], *rest))
    return None


def _weight_files(folder: Path) -> list[str]:
    """List the names of a folder's safetensors files; an index may only name files beside it."""
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
    """Write safetensors files of at most `shard_bytes` into `folder`; a larger tensor gets a file of its own.

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
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files readable by their owner only
        files.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(folder / INDEX, index)


def _split(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the tensors of each shard. `sizes` are in bytes."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def save_peft(trained: Weights, cfg: AdapterConfig, base_path: str, tie_embeddings: bool, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` loads them.

    Modules that were trained in full (`also_train`) become peft's `modules_to_save`.

    Args:
        trained: the adapters and the fully trained parameters.
        base_path: the model that the adapters belong to, as adapter_config.json names it.
    """
    tensors = {}
    for name in trained.stored:
        spelling = to_hf(name).replace(".default.", ".")
        tensors[f"base_model.model.{spelling}"] = trained.read(name).contiguous()
    modules = [to_hf(f"{name}.weight").split(".")[-2] for name in cfg.also_train]
    if modules and tie_embeddings:  # peft copies what it trains, which breaks the tie: both ends get the same weights
        modules = ["embed_tokens", "lm_head"]
        (embedding,) = (tensor for name, tensor in tensors.items() if "embed_tokens" in name)
        tensors["base_model.model.lm_head.weight"] = embedding.clone()
    config = peft_config(cfg, modules_to_save=modules or None, base_model_name_or_path=base_path, inference_mode=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
