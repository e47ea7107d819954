"""Random pairs of responses, and a count of matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

V, D, TEACHER_D = 29, 6, 9
# (prompt, chosen, rejected) lengths: ragged, a response of one token, an empty one on either side
LENGTHS = [(3, 5, 2), (1, 1, 7), (4, 3, 1), (2, 0, 4), (5, 6, 0), (1, 0, 0)]


def random_pairs(lengths: Sequence[tuple[int, int, int]] = LENGTHS, seed: int = 0) -> list[tuple[list[int], ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, V, (n,), generator=generator).tolist() for n in pair) for pair in lengths]


class Products(TorchDispatchMode):
    """Multiplications in matrix products of the head: those with the vocabulary as one of the three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            if V in (*a.shape, *b.shape):
                self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
