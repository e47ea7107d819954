"""Losses over packed rows, called as the model's `head`: `model(..., head=partial(dpd_loss, batch=batch, ...))`.

All take the step's global counts (`BaseStage.loss`) and divide each of their sums by
its own: what they return for all micro-batches and ranks adds up to the loss. They also return sums to be logged; the
`..._PER` tables name them and say which of the counts each is a mean over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import PreferenceBatch
from nb_lightning.losses import head
from nb_lightning.losses.chunks import _gradient, segment_sum, whole_groups, wide
from nb_lightning.losses.divergence import FORWARD_KL, Divergence, Part, TeacherOutputs, TopKTeacherOutputs

DPO_VARIANTS = ("sigmoid", "hinge", "ipo")
DPD_PER = {
    **dict.fromkeys(("dpo", "chosen_reward", "rejected_reward", "margin", "accuracy"), "pairs"),
    **{f"{side}_{name}": f"{side}_tokens" for name in ("divergence", "entropy") for side in ("chosen", "rejected")},
}


# Preference: DPO and distillation (report, section on DPD) ----------------------------------------------------------


def dpo_loss(logratios: Tensor, beta: float, variant: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """DPO of each pair.

    Args:
        logratios: [P, 2] nats, log pi(y) - log pi_ref(y) of the chosen and the rejected response: *sums* over tokens
            for "sigmoid" (Rafailov et al. 2023, eq. 7) and "hinge" (Zhao et al. 2023), *means* for "ipo" (Azar et al.
            2024, eq. 17, whose tau is beta).
        label_smoothing: of "sigmoid": the probability that a pair is the wrong way round.

    Returns:
        [P] losses.
    """
    margin = logratios[:, 0] - logratios[:, 1]
    if variant == "sigmoid":
        # With s the smoothing: -(1 - s) logsigmoid(x) - s logsigmoid(-x), and logsigmoid(-x) = logsigmoid(x) - x.
        return label_smoothing * beta * margin - F.logsigmoid(beta * margin)
    if variant == "hinge":
        return (1 - beta * margin).relu()
    assert variant == "ipo"
    return (margin - 1 / (2 * beta)).square()


def response_logprobs(
    hidden: Tensor, head_weight: Tensor, batch: PreferenceBatch, chunk_size: int = head.CHUNK_SIZE
) -> Tensor:
    """log pi(y), summed over each response: [P, 2] nats (chosen, rejected). Arguments as `dpd_loss`.

    In the chunks of `dpd_loss`: of equal hidden states both compute the same to the last bit.
    """
    labels, index = batch.labels.flatten(), batch.response_index.flatten()
    parts = whole_groups(labels, index // 2, chunk_size)
    found = head.token_statistics(
        hidden.flatten(0, 1), head_weight, labels, chunk_size=chunk_size, parts=parts, entropy=False
    )
    return segment_sum(found.logprobs, index, 2 * batch.pairs).view(batch.pairs, 2)


def dpd_loss(
    hidden: Tensor,
    head_weight: Tensor,
    batch: PreferenceBatch,
    counts: Mapping[str, Tensor],
    teacher: TeacherOutputs | TopKTeacherOutputs | None = None,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    dpo_weight: float = 1.0,
    lambda_plus: float = 1.0,
    lambda_minus: float = 1.0,
    divergence: Divergence = FORWARD_KL,
    chunk_size: int = head.CHUNK_SIZE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dual-level preference distillation: DPO between responses, distillation at each of their tokens.

        dpo_weight * mean over pairs of DPO + lambda_plus * mean over chosen tokens of D(teacher, student)
                                            + lambda_minus * mean over rejected tokens of D(teacher, student)

    Args:
        hidden: [B, T, D] last hidden states of the policy.
        head_weight: [V, D] of its head.
        counts: `batch.counts` of the whole optimizer step.
        teacher: of the same tokens, flattened to [B * T, ...]; None takes the batch's cached one, where it has one.
        beta, variant, label_smoothing: see `dpo_loss`. DPO needs `batch.ref_logprobs`.
        dpo_weight, lambda_plus, lambda_minus: 0 leaves a term out; without a teacher the last two are not looked at.

    Returns:
        This batch's part of the loss, 0-d; and the sums of `DPD_PER`, detached: the DPO loss, the rewards
        beta log(pi / pi_ref) of both sides, their difference (margin) and how often it is positive (accuracy),
        divergence and entropy of both sides. What there is nothing for (no reference, no teacher) is 0.
    """
    labels, index, segments = batch.labels.flatten(), batch.response_index.flatten(), 2 * batch.pairs
    if teacher is None and batch.teacher_ids is not None:
        teacher = TopKTeacherOutputs(batch.teacher_ids.flatten(0, 1), batch.teacher_logprobs.flatten(0, 1))
    assert not dpo_weight or batch.ref_logprobs is not None

    def logratios(logprobs: Tensor, index: Tensor) -> Tensor:
        return segment_sum(logprobs, index, segments).view(batch.pairs, 2) - batch.ref_logprobs.to(logprobs.dtype)

    def dpo(ratios: Tensor, index: Tensor) -> Tensor:
        if variant == "ipo":
            lengths = segment_sum((index >= 0).to(ratios.dtype), index, segments).view(batch.pairs, 2)
            ratios = ratios / lengths.clamp(min=1)
        return dpo_loss(ratios, beta, variant, label_smoothing)

    hidden = hidden.flatten(0, 1)
    zero = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
    names = ("pairs", "chosen_tokens", "rejected_tokens")
    pairs, chosen, rejected = (counts[name].clamp(min=1).to(zero) for name in names)

    def weigh(part: Part, logprobs: Tensor) -> Tensor:
        """d DPO / d logprobs of tokens that are whole pairs; what the other pairs have does not matter to it."""
        own = index[part]
        return _gradient(lambda x: dpo_weight / pairs * dpo(logratios(x, own), own).sum(), logprobs)

    weights, parts = zero.expand(labels.shape), whole_groups(labels, index // 2, chunk_size)
    if dpo_weight and torch.is_grad_enabled():
        weights = weigh
        if parts is None:  # a pair is longer than a chunk
            with torch.no_grad():
                weights = weigh(slice(None), head.token_logprobs(hidden, head_weight, labels, chunk_size))
    of_divergence = None
    if teacher is not None:
        of_divergence = torch.stack([zero, lambda_plus / chosen, lambda_minus / rejected])[_side(index)]
    total, found = head.weighted_sum(
        hidden, head_weight, labels, weights, teacher, divergence, of_divergence, chunk_size, parts
    )

    sums = dict.fromkeys(DPD_PER, zero) | _by_side("entropy", found.entropy, index)
    value = zero
    if teacher is not None:
        sums |= _by_side("divergence", found.divergence, index)
        value = value + (of_divergence * found.divergence).sum()
    if batch.ref_logprobs is not None:
        ratios = logratios(found.logprobs, index)
        losses, rewards = dpo(ratios, index), beta * ratios
        margin = rewards[:, 0] - rewards[:, 1]
        sums |= {"dpo": losses.sum(), "chosen_reward": rewards[:, 0].sum(), "rejected_reward": rewards[:, 1].sum()}
        sums |= {"margin": margin.sum(), "accuracy": (margin > 0).to(margin.dtype).sum()}
        value = value + dpo_weight / pairs * losses.sum()
    return value + (total - total.detach()), sums


def _side(index: Tensor) -> Tensor:
    """0 for tokens of no response, 1 of a chosen, 2 of a rejected one."""
    return torch.where(index < 0, 0, 1 + index % 2)


def _by_side(name: str, values: Tensor, index: Tensor) -> dict[str, Tensor]:
    _, chosen, rejected = segment_sum(values, _side(index), 3)
    return {f"chosen_{name}": chosen, f"rejected_{name}": rejected}
