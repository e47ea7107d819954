"""The tensors of a checkpoint under the `Transformer`'s names, whatever format the file has.

`Weights` are read one tensor at a time, so loading takes the model's memory and one tensor more, sharded or not. Each
format is a subclass in checkpoints/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nb_lightning.model.transformer import ModelShape, Transformer, copy_into


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name there, and its shape."""

    spelling: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a checkpoint under the `Transformer`'s names.

    Attributes:
        origin: the file or folder, for error messages.
        stored: the tensors by the `Transformer`'s name.
        dtype: of the file.
    """

    def __init__(self, origin: str | Path, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
        self.origin, self.stored, self.dtype = str(origin), dict(stored), dtype

    def read(self, name: str) -> Tensor:
        """Read the whole tensor to the CPU."""
        raise NotImplementedError

    def digest(self, name: str) -> str:
        """Hash a tensor: SHA-256 of its dtype, shape and bytes, the same in every format."""
        tensor = self.read(name)
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def require(self, shape: ModelShape) -> None:
        """Check that the tensors are those of a `Transformer` of this shape, before any is read.

        Raises:
            ValueError: names a missing, additional or differently shaped tensor.
        """
        if shape.n_layers > len(self.stored):
            raise ValueError(f"{self.origin}: {len(self.stored)} tensors are too few for {shape.n_layers} layers")
        unmatched = dict(self.stored)
        for name, expected in parameter_shapes(shape).items():
            if name not in unmatched:
                raise ValueError(f"{self.origin}: tensor {self.spell(name)} is missing")
            tensor = unmatched.pop(name)
            if tensor.shape != expected:
                raise ValueError(
                    f"{self.origin}: tensor {tensor.spelling} is {list(tensor.shape)}, the model's is {list(expected)}"
                )
        if shape.tie_embeddings and "head.weight" in unmatched:
            head = unmatched.pop("head.weight")
            # Loading and saving leave it out: a head that differs would be lost.
            if not torch.equal(self.read("head.weight"), self.read("embedding.weight")):
                raise ValueError(
                    f"{self.origin}: tensor {head.spelling} differs from the embedding, to which the config ties it"
                )
        for tensor in unmatched.values():
            raise ValueError(f"{self.origin}: tensor {tensor.spelling} is not part of the model")

    def spell(self, name: str) -> str:
        """Return the file format's spelling of a name of the `Transformer`."""
        return name


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each parameter, a tied one once."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(shape).named_parameters()}


def load_weights(model: Transformer, weights: Weights) -> None:
    """Copy every tensor into the model's parameters, sharded or not, in their dtype.

    Raises:
        ValueError: see `Weights.require`.
    """
    weights.require(model.shape)
    for name, parameter in model.named_parameters():
        copy_into(parameter, weights.read(name))
