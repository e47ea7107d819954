"""Metrics that sum over ranks before they divide."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp of the mean negative log-likelihood over all tokens of all ranks.

    torchmetrics' own Perplexity wants logits [B, T, V]; this one takes the sums the chunked head yields.
    """

    full_state_update = False

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
    """Sums of statistics over their counts.

    Args:
        per: each statistic -> which count it is a mean over.
    """

    full_state_update = False

    def __init__(self, per: Mapping[str, str]) -> None:
        super().__init__()
        self.per = dict(per)
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(len(self.per), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """Add the sums, and what they are divided by, of a batch."""
        self.sums += torch.stack([sums[name].detach().double() for name in self.per])
        self.counts += torch.stack([counts[count].double() for count in self.per.values()])

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.per, self.sums / self.counts.clamp(min=1)))
