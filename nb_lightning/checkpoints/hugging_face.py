"""Hugging Face's config.json <-> `ModelShape`."""

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
from nb_lightning.model.weights import Stored, Weights, parameter_shapes

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 10_000_000  # of any size in a config: beyond is a damaged or hostile file

# `ModelShape`'s fields and theirs.
_SIZES = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
          "d_mlp": "intermediate_size"}  # fmt: skip


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read how a model's makers sample from it, in transformers' words; empty where they do not say.

    Raises:
        ValueError: see `read_json`.
    """
    return read_json(folder / GENERATION_CONFIG, {})


def shape_from_config(config: Mapping[str, Any], origin: str | Path = CONFIG) -> ModelShape:
    """The shape that a config.json describes, in the spelling of transformers 4 (`rope_theta`) or 5
    (`rope_parameters`).

    Raises:
        ValueError: names the key, for what the backbone does not compute or a value that cannot be.
    """

    def refuse(key: str, allowed: str) -> ValueError:
        return ValueError(f"{origin}: {key} is {config.get(key)!r}; {allowed}")

    if config.get("model_type") != "llama":
        raise refuse("model_type", "only 'llama' is supported")
    if config.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise refuse("architectures", "only ['LlamaForCausalLM'] is supported")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise refuse(key, "the backbone has no biases")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "only 'silu' is supported")
    if config.get("quantization_config"):
        raise ValueError(f"{origin}: quantization_config is set; export the weights in bfloat16 or float32 first")
    sizes: dict[str, int] = {}
    optional = {"num_key_value_heads": "num_attention_heads", "head_dim": None}
    for ours, theirs in _SIZES.items():
        value = config.get(theirs)
        if value is None and theirs in optional:
            heads = sizes["n_heads"]
            value = heads if theirs == "num_key_value_heads" else sizes["d_model"] // heads
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise refuse(theirs, f"it must be a whole number from 1 to {LARGEST:,}")
        sizes[ours] = value
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        raise refuse("num_key_value_heads", f"num_attention_heads is {sizes['n_heads']}, not a multiple of it")
    if sizes["head_dim"] % 2:
        raise refuse("head_dim", "rotary positions need an even one")
    return ModelShape(
        **sizes,
        norm_eps=_number(config.get("rms_norm_eps", 1e-6), f"{origin}: rms_norm_eps"),
        rope_theta=_rope_theta(config, origin),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _rope_theta(config: Mapping[str, Any], origin: str | Path) -> float:
    bases = []
    if config.get("rope_theta") is not None:
        bases.append(_number(config["rope_theta"], f"{origin}: rope_theta"))
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            raise ValueError(f"{origin}: {key} asks for {kind!r}; only plain rotary positions are supported")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{origin}: {key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, not 1")
        if "rope_theta" in rope:
            bases.append(_number(rope["rope_theta"], f"{origin}: {key}.rope_theta"))
    if len(set(bases)) > 1:
        raise ValueError(f"{origin}: rope_theta is given as {' and as '.join(f'{base:g}' for base in bases)}")
    return bases[0] if bases else 10_000.0


def _number(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def config_from_shape(shape: ModelShape, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    """config.json for a shape, readable by transformers 4 and 5; `more` is added (token ids, context length)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(shape, ours) for ours, theirs in _SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": shape.init_std,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_embeddings,
        "torch_dtype": dtype_name(dtype),
        "dtype": dtype_name(dtype),
        **more,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """As in a config.json."""
    return next(name for name, known in DTYPES.items() if known == dtype)


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
        write_json(folder / INDEX, index)


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


# peft's format ------------------------------------------------------------------------------------------------------


def save_peft(trained: Weights, cfg: AdapterConfig, base_path: str, tie_embeddings: bool, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `PeftModel.from_pretrained` loads on the base.

    Parts that were trained whole become peft's `modules_to_save`.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name in trained.stored:
        spelling = to_hf(name).replace(".default.", ".")
        tensors[f"base_model.model.{spelling}"] = trained.read(name).contiguous()
    whole = [to_hf(f"{name}.weight").split(".")[-2] for name in cfg.also_train]
    if whole and tie_embeddings:  # it copies what it trains: both ends of the tie need the same
        whole = ["embed_tokens", "lm_head"]
        (embedding,) = (value for name, value in tensors.items() if "embed_tokens" in name)
        tensors["base_model.model.lm_head.weight"] = embedding.clone()
    config = peft_config(cfg, modules_to_save=whole or None, base_model_name_or_path=base_path, inference_mode=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
