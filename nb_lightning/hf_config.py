"""Hugging Face's config.json <-> `ModelShape`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nb_lightning.model import ModelShape

CONFIG = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 10_000_000  # of any size in a config: beyond is a damaged or hostile file

# `ModelShape`'s fields and theirs.
_SIZES = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
          "d_mlp": "intermediate_size"}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


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
