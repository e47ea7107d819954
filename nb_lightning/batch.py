"""What travels from a loader to a stage: plain tensors with a shape and a dtype on every field.

B rows, T tokens per row, S documents. Labels are already shifted: `labels[b, t]` is the token after `input_ids[b, t]`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


class _Movable:
    """`.to` and `.pin_memory` over every tensor field, lists included: what Lightning and the DataLoader call."""

    def _map(self, move: Any) -> Any:
        return replace(self, **{f.name: _apply(getattr(self, f.name), move) for f in fields(self)})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        def move(x: Any) -> Any:
            # Pinned memory goes to a GPU while the host works on; from a GPU it must have arrived before it is read.
            extra = {"non_blocking": True} if isinstance(x, Tensor) and not x.is_cuda else {}
            return x.to(*args, **{**extra, **kwargs})

        return self._map(move)

    def pin_memory(self) -> Any:
        return self._map(lambda x: x.pin_memory())


def _apply(value: Any, move: Any) -> Any:
    if isinstance(value, list):
        return [_apply(item, move) for item in value]
    return move(value) if isinstance(value, Tensor | _Movable) else value


@dataclass
class PackedBatch(_Movable):
    """Rows of one forward. Several documents may share a row; no document spans two rows.

    Attributes:
        input_ids: [B, T] int64.
        labels: [B, T] int64, already shifted, `IGNORE` (-100) where nothing is trained.
        position_ids: [B, T] int64, restarting at each document; None means 0..T-1 in every row.
        cu_seqlens: [S + 1] int32 document boundaries over the B * T flattened tokens; None means one document a row.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def counts(self) -> dict[str, Tensor]:
        """`tokens`: the number of labels that count, a 0-d int64 tensor."""
        return {"tokens": (self.labels != IGNORE).sum()}

    @classmethod
    def from_rows(cls, rows: Tensor, eos_id: int | None) -> PackedBatch:
        """Split rows of T + 1 tokens into inputs and labels.

        Args:
            rows: [B, T + 1] int64 tokens.
            eos_id: the token that ends a document. When given, attention and positions restart after each one, and
                a new row is a new document; when None, every row is one document.
        """
        # Copies: of one row, `contiguous` would give two views of the same tokens, and labels are written to.
        input_ids, labels = rows[:, :-1].clone(), rows[:, 1:].clone()
        if eos_id is None:
            return cls(input_ids, labels)
        B, T = input_ids.shape
        first = torch.zeros_like(input_ids, dtype=torch.bool)
        first[:, 0] = True
        first[:, 1:] = input_ids[:, :-1] == eos_id
        starts = first.flatten().nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([B * T]))
        position_ids = (torch.arange(B * T) - starts.repeat_interleave(lengths)).view(B, T)
        cu_seqlens = torch.cat([starts, torch.tensor([B * T])]).int()
        return cls(input_ids, labels, position_ids, cu_seqlens)


@dataclass
class StepBatch(_Movable):
    """All the rows this rank contributes to one optimizer step, as micro-batches.

    Attributes:
        micro_batches: what is run forward and backward one after the other.
        tokens: tokens of the whole step over all ranks; the clock moves by this.
        sample_ids: [n] int64, this rank's positions in the run's one global order of rows.
    """

    micro_batches: list[PackedBatch]
    tokens: int
    sample_ids: Tensor
