"""The pairwise reward model's loss (report, section on human preference)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import IGNORE
from nb_lightning.losses import head
from nb_lightning.losses.chunks import statistics_dtype

REWARD_LOSSES = ("bradley_terry", "cross_entropy")
REWARD_PER = {"accuracy": "tokens"}  # the logged sum, and which count of the step it is divided by


def answer_logits(hidden: Tensor, head_weight: Tensor, labels: Tensor, answers: tuple[int, int]) -> Tensor:
    """Return the logits of the two tokens `answers` at the C positions that have a label: [C, 2].

    The arguments are as in `pairwise_reward_loss`.
    """
    dtype = statistics_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden[labels != IGNORE].to(dtype) @ head_weight[list(answers)].to(dtype).T


def pairwise_reward_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    counts: Mapping[str, Tensor],
    answers: tuple[int, int],
    *,
    kind: str = "bradley_terry",
    chunk_size: int = head.CHUNK_SIZE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a reward model that names the better of two responses with one token.

    Args:
        hidden: [B, T, D] last hidden states.
        head_weight: [V, D].
        labels: [B, T] int64: the right one of `answers` at the position that answers, -100 elsewhere.
        counts: `PackedBatch.counts` of the whole optimizer step; its tokens are comparisons.
        answers: ids of the two tokens.
        kind: "bradley_terry" -log sigmoid(z_right - z_wrong) of the two tokens' logits; "cross_entropy"
            -log p(right) over the whole vocabulary, which also teaches to answer with one of the two.
        chunk_size: tokens of logits held at a time, in "cross_entropy".

    Returns:
        This batch's part of the mean over comparisons, 0-d; and the sum of `REWARD_PER`: those with z_right > z_wrong.
    """
    assert kind in REWARD_LOSSES
    right_answers = labels[labels != IGNORE]  # [C]
    is_second = right_answers == answers[1]
    assert bool((is_second | (right_answers == answers[0])).all())
    logits = answer_logits(hidden, head_weight, labels, answers)  # [C, 2]
    margin = torch.where(is_second, -1, 1) * (logits[:, 0] - logits[:, 1])  # z_right - z_wrong
    if kind == "bradley_terry":
        loss = -F.logsigmoid(margin).sum()
    else:
        loss = head.cross_entropy(hidden, head_weight, labels, chunk_size)
    return loss / counts["tokens"].clamp(min=1), {"accuracy": (margin > 0).to(margin.dtype).sum()}
