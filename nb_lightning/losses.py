"""Losses over packed rows. Each returns a *sum* over trained tokens; the stage divides once, by the global count."""

from __future__ import annotations

from torch import Tensor

from nb_lightning import head


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = head.CHUNK) -> Tensor:
    """Next-token cross-entropy of rows.

    Args:
        hidden: [B, T, D] last hidden states.
        weight: [V, D] of the head.
        labels: [B, T] int64, already shifted; -100 is not trained.

    Returns:
        0-d float32: the sum of -log p(label) in nats over the trained tokens of these rows.
    """
    return head.cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), chunk)
