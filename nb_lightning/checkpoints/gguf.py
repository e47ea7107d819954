"""GGUF, llama.cpp's one-file format: weights and metadata of a Llama model, in and out.

llama.cpp rotates the components 2e and 2e + 1 of a head together, our RoPE e and e + E / 2, so the rows of q_proj and
k_proj are permuted in both directions. Quantized tensors are read as the float32 values that they encode. Tokenizers
are read and written by gguf_tokenizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nb_lightning.checkpoints.hf_config import MAX_LOOPS, MAX_SIZE
from nb_lightning.model.transformer import ModelShape
from nb_lightning.model.weights import StoredTensor, Weights, parameter_shapes

MARK = "nb_lightning.version"  # a key in the metadata of the files that `save_gguf` wrote
ARCHITECTURES = ("llama", "nanbeige")
TYPES = ("float32", "float16", "bfloat16", "q8_0")

_TOP = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
_LAYER = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.q_proj.weight": "attn_q.weight",
    "attention.k_proj.weight": "attn_k.weight",
    "attention.v_proj.weight": "attn_v.weight",
    "attention.o_proj.weight": "attn_output.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_OURS = {theirs: ours for ours, theirs in (_TOP | _LAYER).items()}


def require_package() -> Any:
    """Import the package `gguf`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: pip install 'nb_lightning[gguf]'") from error
    return gguf


class GGUFWeights(Weights):
    """A GGUF file of a Llama model.

    Attributes:
        metadata: key -> value; a value may be a list.
        shape: of the model.
        context: tokens a row that the model was made for; None if the file does not say.

    Raises:
        ValueError: not a GGUF file, another architecture, or one whose positions the backbone does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.metadata, self._tensors = _read(path)
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        if "rope_freqs.weight" in shapes:
            raise ValueError(
                f"{path}: rope_freqs.weight scales the positions; only plain rotary positions are supported"
            )
        stored = {}
        for name, dims in shapes.items():
            ours = from_gguf(name)
            if ours is None:
                raise ValueError(f"{path}: tensor {name} is not part of a Llama model")
            stored[ours] = StoredTensor(name, dims)
        super().__init__(path, stored, torch.float32)
        self.shape = _shape(self.metadata, stored, path)
        self.context: int | None = self.metadata.get(f"{self.metadata['general.architecture']}.context_length")

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[self.stored[name].spelling]
        try:
            weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except NotImplementedError as error:
            raise ValueError(f"{self.origin}: tensor {tensor.name} is {tensor.tensor_type.name}: {error}") from error
        heads = _rotated_heads(name, self.shape)
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape) if heads else weight

    def spell(self, name: str) -> str:
        return to_gguf(name)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the keys and values of a GGUF file.

    Raises:
        ValueError: it is not a readable GGUF file.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    gguf = require_package()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # a damaged file can raise any error of numpy and struct
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable GGUF file: {reason}") from error


def to_gguf(name: str) -> str:
    """Translate the name of a `Transformer` parameter into llama.cpp's name."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{_LAYER[part]}"


def from_gguf(name: str) -> str | None:
    """Invert `to_gguf`. Returns None for a name that a Llama model does not have."""
    match name.split(".", 2):
        case ["blk", layer, part] if part in _OURS and part not in _TOP.values():
            return f"layers.{layer}.{_OURS[part]}"
    return _OURS[name] if name in _TOP.values() else None


def _rotated_heads(name: str, shape: ModelShape) -> int:
    """Count the heads of q_proj or k_proj, whose rows are permuted; 0 for other parameters."""
    if name.endswith("q_proj.weight"):
        return shape.n_heads
    return shape.n_kv_heads if name.endswith("k_proj.weight") else 0


def _shape(metadata: Mapping[str, Any], stored: Mapping[str, StoredTensor], path: Path) -> ModelShape:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        allowed = " and ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"{path}: general.architecture is {architecture!r}; only {allowed} are supported")

    def size(key: str, default: int | None = None, largest: int = MAX_SIZE) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        if not isinstance(value, int) or not 0 < value <= largest:
            name = f"{architecture}.{key}"
            raise ValueError(f"{path}: {name} is {value!r}; it must be a whole number from 1 to {largest:,}")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{architecture}.{key}", default)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{path}: {architecture}.{key} is {value!r}; it must be a positive number")
        return float(str(np.float32(value)))  # a float32: 1e-05 reads as 9.999999747378752e-06

    scaling, experts = (metadata.get(f"{architecture}.{key}") for key in ("rope.scaling.type", "expert_count"))
    if scaling not in (None, "none"):
        raise ValueError(
            f"{path}: {architecture}.rope.scaling.type is {scaling!r}; only plain rotary positions are supported"
        )
    if experts:
        raise ValueError(f"{path}: {architecture}.expert_count is {experts}; the backbone has no experts")
    if "embedding.weight" not in stored:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    d_model, n_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise ValueError(f"{path}: {architecture}.{key} is {size(key)}, but a head has {head_dim} components")
    n_kv_heads = size("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        raise ValueError(f"{path}: {n_heads} heads of {head_dim} components share {n_kv_heads} key-value heads")
    return ModelShape(
        vocab_size=stored["embedding.weight"].shape[0],
        d_model=d_model,
        n_layers=size("block_count"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_mlp=size("feed_forward_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10_000.0),
        tie_embeddings="head.weight" not in stored,
        n_loops=size("num_loops", 1, MAX_LOOPS),
        norm_every_loop=not metadata.get(f"{architecture}.skip_loop_final_norm", False),
    )


def save_gguf(
    weights: Weights, shape: ModelShape, file: Path, kind: str, context: int, metadata: Mapping[str, Any], version: str
) -> None:
    """Write a GGUF file, one tensor at a time.

    Args:
        kind: one of `TYPES`, for the matrices. Norms stay float32; with q8_0, matrices whose row length is not a
            multiple of 32 become float16.
        context: tokens a row that the model was made for (context_length).
        metadata: more keys and values (the tokenizer's); a list holds strings, integers or numbers.
        version: of nb_lightning, which marks the file as ours.

    Raises:
        ValueError: see `Weights.require`.
    """
    gguf = require_package()
    weights.require(shape)
    types = gguf.GGMLQuantizationType
    matrix_type = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16, "q8_0": types.Q8_0}[kind]
    file_types = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}  # llama.cpp's llama_ftype
    architecture = "llama" if shape.n_loops == 1 else "nanbeige"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string(MARK, version)
    writer.add_file_type(file_types[kind])
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_mlp)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    if architecture == "nanbeige":  # llama.cpp reads these keys since b10159
        writer.add_uint32("nanbeige.num_loops", shape.n_loops)
        writer.add_bool("nanbeige.skip_loop_final_norm", not shape.norm_every_loop)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    type_of = {}
    for name, dims in parameter_shapes(shape).items():
        type_of[name] = types.F32 if len(dims) == 1 else matrix_type
        if matrix_type == types.Q8_0 and len(dims) > 1 and dims[-1] % 32:
            type_of[name] = types.F16
        size = math.prod(gguf.quant_shape_to_byte_shape(dims, type_of[name]))
        writer.add_tensor_info(to_gguf(name), dims, np.dtype(np.float32), size, type_of[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor_type in type_of.items():
        weight = weights.read(name).float()
        heads = _rotated_heads(name, shape)
        if heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        writer.write_tensor_data(gguf.quants.quantize(weight.contiguous().numpy(), tensor_type))
    writer.close()


def is_ours(path: Path) -> bool:
    """Whether `save_gguf` wrote this file; False for what is no GGUF file at all."""
    try:
        return MARK in require_package().GGUFReader(path).fields
    except Exception:  # a damaged file can raise any error
        return False
