"""The config.json and generation_config.json of a Hugging Face folder, in and out: `ModelShape`, dtypes, decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nb_lightning.files import read_json
from nb_lightning.model.transformer import ModelShape

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SIZE = 10_000_000  # of any size in a config; a larger one is from a damaged or hostile file

# `ModelShape`'s field -> config.json's key
_SIZES = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
          "d_mlp": "intermediate_size"}  # fmt: skip
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "nanbeige": "NanbeigeForCausalLM"}  # by model_type
MAX_LOOPS = 64

# Switches of Nanbeige4.2's modelling code that the released weights leave off. The backbone computes none of them.
_SWITCHES = ("loop_loss_weights", "loop_middle_layers", "emb_neighbor_num", "emb_split_num", "insert_ngram_layer_idx",
             "ngram_vocab_size_ratio")  # fmt: skip
_SWITCH_PREFIXES = ("enable_", "loop_", "ngram_", "qk_")  # of boolean ones


def shape_from_config(config: Mapping[str, Any], origin: str | Path = CONFIG) -> ModelShape:
    """Read the shape from a config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
        ValueError: names the key whose value is damaged, or which asks for something the backbone does not compute.
    """

    def refuse(key: str, allowed: str) -> ValueError:
        return ValueError(f"{origin}: {key} is {config.get(key)!r}; {allowed}")

    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise refuse("model_type", "only 'llama' and 'nanbeige' are supported")
    if config.get("architectures") not in (None, [_ARCHITECTURES[kind]]):
        raise refuse("architectures", f"only ['{_ARCHITECTURES[kind]}'] is supported")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise refuse(key, "the backbone has no biases")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "only 'silu' is supported")
    if config.get("quantization_config"):
        raise ValueError(f"{origin}: quantization_config is set; export the weights in bfloat16 or float32 first")
    sizes: dict[str, int] = {}
    for ours, theirs in _SIZES.items():
        value = config.get(theirs)
        if value is None and theirs == "num_key_value_heads":
            value = sizes["n_heads"]
        if value is None and theirs == "head_dim":
            value = sizes["d_model"] // sizes["n_heads"]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
            raise refuse(theirs, f"it must be a whole number from 1 to {MAX_SIZE:,}")
        sizes[ours] = value
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        raise refuse("num_key_value_heads", f"num_attention_heads is {sizes['n_heads']}, not a multiple of it")
    if sizes["head_dim"] % 2:
        raise refuse("head_dim", "rotary positions need an even one")
    return ModelShape(
        **sizes,
        norm_eps=_positive(config.get("rms_norm_eps", 1e-6), f"{origin}: rms_norm_eps"),
        rope_theta=_rope_theta(config, origin),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **(_loops(config, refuse) if kind == "nanbeige" else {}),
    )


def _loops(config: Mapping[str, Any], refuse: Callable[[str, str], ValueError]) -> dict[str, Any]:
    """Read `n_loops` and `norm_every_loop` of a looped transformer; every other switch of its code must be off."""
    for key, value in config.items():
        if value and (key in _SWITCHES or (value is True and key.startswith(_SWITCH_PREFIXES))):
            raise refuse(key, "the backbone supports only num_loops and skip_loop_final_norm of Nanbeige's switches")
    loops = config.get("num_loops", 1)
    if not isinstance(loops, int) or isinstance(loops, bool) or not 0 < loops <= MAX_LOOPS:
        raise refuse("num_loops", f"it must be a whole number from 1 to {MAX_LOOPS}")
    return {"n_loops": loops, "norm_every_loop": not config.get("skip_loop_final_norm", False)}


def _rope_theta(config: Mapping[str, Any], origin: str | Path) -> float:
    """Read the RoPE base from each place that may name it; they must agree. Scaled positions are refused."""
    bases = []
    if config.get("rope_theta") is not None:
        bases.append(_positive(config["rope_theta"], f"{origin}: rope_theta"))
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default" or not isinstance(rope, Mapping):
            raise ValueError(f"{origin}: {key} asks for {kind!r}; only plain rotary positions are supported")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{origin}: {key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, not 1")
        if "rope_theta" in rope:
            bases.append(_positive(rope["rope_theta"], f"{origin}: {key}.rope_theta"))
    if len(set(bases)) > 1:
        raise ValueError(f"{origin}: rope_theta is given as {' and as '.join(f'{base:g}' for base in bases)}")
    return bases[0] if bases else 10_000.0


def _positive(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def config_from_shape(shape: ModelShape, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    """Write the config.json of a shape, for transformers 4 and 5. `more` is added (token ids, context length)."""
    kind = "llama" if shape.n_loops == 1 else "nanbeige"
    loops = {"num_loops": shape.n_loops, "skip_loop_final_norm": not shape.norm_every_loop, "loop_loss_weights": []}
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **(loops if kind == "nanbeige" else {}),
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
    """Name a dtype as a config.json does."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read how the makers of a model sample from it, in transformers' words; {} without such a file.

    Raises:
        ValueError: see `read_json`.
    """
    return read_json(folder / GENERATION_CONFIG, {})
