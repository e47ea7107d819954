"""Counts of what a loss allocates and multiplies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor made under this mode, and the most elements alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                reference = StorageWeakRef(x.untyped_storage())
                self.alive[reference.cdata] = (reference, x.untyped_storage().nbytes() // x.element_size())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class HeadProducts(TorchDispatchMode):
    """Multiplications in the head's matrix products: those with the vocabulary as one of the three sizes."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.multiplications = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            if self.vocab_size in (*a.shape, *b.shape):
                self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
