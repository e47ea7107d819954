"""The tensors of a checkpoint under the `Transformer`'s names, and Hugging Face's safetensors in and out.

`Weights` are read one at a time, so that filling a model takes its own memory and one tensor more, sharded or not.
Files are data: nothing is unpickled, and no name in them leads out of their folder. Only this file and hf_config.py
know Hugging Face's spellings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nb_lightning.model.transformer import ModelShape, Transformer, copy_into

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
