"""Metrics that sum over ranks before they divide."""

from __future__ import annotations

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
