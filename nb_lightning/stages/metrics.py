"""Validation metrics: they sum over all batches and ranks before they divide."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp of the mean negative log-likelihood over all tokens of all ranks.

    torchmetrics' own Perplexity needs logits [B, T, V]; this one takes the sums that the chunked head computes.
    """

    full_state_update = False
    nll: Tensor  # 0-d float64 nats
    tokens: Tensor  # 0-d int64

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add the summed negative log-likelihood (nats) of `tokens` tokens."""
        self.nll += nll.detach().double()
        self.tokens += tokens

    def compute(self) -> Tensor:
        return (self.nll / self.tokens).exp()


class Means(Metric):
    """Means of several statistics over all batches of all ranks.

    Args:
        per: each statistic -> the count that it is a mean over.
    """

    full_state_update = False
    sums: Tensor  # [statistics] float64
    counts: Tensor  # [statistics] float64

    def __init__(self, per: Mapping[str, str]) -> None:
        super().__init__()
        self.per = dict(per)
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(len(self.per), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """Add the sums and counts of a batch, 0-d each."""
        self.sums += torch.stack([sums[name].detach().double() for name in self.per])
        self.counts += torch.stack([counts[count].double() for count in self.per.values()])

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.per, self.sums / self.counts.clamp(min=1)))
