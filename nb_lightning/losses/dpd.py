"""DPO and dual-level preference distillation (report, section on DPD).

Like every loss over packed rows it is called as the model's `head`: `model(..., head=partial(dpd_loss, batch=batch,
...))`. It takes the step's global counts (`BaseStage.loss`) and divides each of its sums by one of them: what it
returns for all micro-batches and ranks adds up to the loss. It also returns sums to be logged; `DPD_PER` names them and
which of the counts each is divided by.

Shapes: N tokens (rows flattened), n of these, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import PreferenceBatch
from nb_lightning.losses import head
from nb_lightning.losses.chunks import split_between_groups, statistics_dtype
from nb_lightning.losses.divergence import FORWARD_KL, Chunk, Divergence, TeacherOutputs, TopKTeacherOutputs
from nb_lightning.losses.segments import segment_sum

DPO_VARIANTS = ("sigmoid", "hinge", "ipo")
DPD_PER = {
    **dict.fromkeys(("dpo", "chosen_reward", "rejected_reward", "margin", "accuracy"), "pairs"),
    **{f"{side}_{name}": f"{side}_tokens" for name in ("divergence", "entropy") for side in ("chosen", "rejected")},
}


def dpo_loss(logratios: Tensor, beta: float, variant: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Return the DPO loss of each pair, [P].

    Args:
        logratios: [P, 2] nats, log pi(y) - log pi_ref(y) of the chosen and the rejected response: *sums* over tokens
            for "sigmoid" (Rafailov et al. 2023, eq. 7) and "hinge" (Zhao et al. 2023), *means* for "ipo" (Azar et al.
            2024, eq. 17, whose tau is beta).
        label_smoothing: of "sigmoid": the probability that a pair is the wrong way round.
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
    """Return log pi(y) of each response, summed over its tokens: [P, 2] nats (chosen, rejected).

    It works in the chunks of `dpd_loss`, so from equal hidden states both compute the same to the last bit. The
    arguments are as there.
    """
    labels, response = batch.labels.flatten(), batch.response_index.flatten()  # [N]
    chunks = split_between_groups(labels, response // 2, chunk_size)
    statistics = head.token_statistics(
        hidden.flatten(0, 1), head_weight, labels, chunk_size=chunk_size, chunks=chunks, with_entropy=False
    )
    return segment_sum(statistics.logprobs, response, 2 * batch.pairs).view(batch.pairs, 2)


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
        dpo_weight, lambda_plus, lambda_minus: 0 leaves a term out; without a teacher the last two do not matter.
        chunk_size: tokens of logits held at a time.

    Returns:
        This batch's part of the loss, 0-d; and the sums of `DPD_PER`, detached: the DPO loss, the rewards
        beta log(pi / pi_ref) of both sides, their difference (margin) and how often it is positive (accuracy),
        divergence and entropy of both sides. Sums without a reference or a teacher are 0.
    """
    labels, response = batch.labels.flatten(), batch.response_index.flatten()  # [N]
    hidden = hidden.flatten(0, 1)  # [N, D]
    zero = torch.zeros((), dtype=statistics_dtype(hidden.dtype), device=hidden.device)
    names = ("pairs", "chosen_tokens", "rejected_tokens")
    pairs, chosen_tokens, rejected_tokens = (counts[name].clamp(min=1).to(zero) for name in names)
    if teacher is None:
        teacher = _cached_teacher(batch)
    assert not dpo_weight or batch.ref_logprobs is not None

    # Of `tokens`, whole pairs or all of the N: logprobs are [n]. A pair that is not among them has log pi(y) = 0; its
    # DPO loss means nothing then, and gives no gradient.

    def logratios(logprobs: Tensor, tokens: Chunk) -> Tensor:  # [P, 2]
        assert batch.ref_logprobs is not None
        policy_logprobs = segment_sum(logprobs, response[tokens], 2 * batch.pairs).view(batch.pairs, 2)
        return policy_logprobs - batch.ref_logprobs.to(logprobs.dtype)

    def pair_losses(logratios: Tensor) -> Tensor:  # [P]
        if variant == "ipo":
            logratios = logratios / _response_lengths(response, batch.pairs).to(logratios.dtype)
        return dpo_loss(logratios, beta, variant, label_smoothing)

    def preference_loss(logprobs: Tensor, tokens: Chunk) -> Tensor:  # 0-d
        return dpo_weight / pairs * pair_losses(logratios(logprobs, tokens)).sum()

    token_lambdas = None  # [N], the divergence's weight at each token
    if teacher is not None:
        token_lambdas = torch.stack([zero, lambda_plus / chosen_tokens, lambda_minus / rejected_tokens])
        token_lambdas = token_lambdas[_side(response)]
    loss, statistics = head.chunked_loss(
        hidden,
        head_weight,
        labels,
        preference_loss if dpo_weight else None,
        groups=response // 2,
        teacher=teacher,
        divergence=divergence,
        divergence_token_weights=token_lambdas,
        chunk_size=chunk_size,
    )

    sums = dict.fromkeys(DPD_PER, zero)
    if statistics.entropy is not None:
        sums |= _by_side("entropy", statistics.entropy, response)
    if statistics.divergence is not None:
        sums |= _by_side("divergence", statistics.divergence, response)
    if batch.ref_logprobs is not None:
        ratios = logratios(statistics.logprobs, head.ALL_TOKENS)
        chosen_reward, rejected_reward = (beta * ratios).unbind(1)  # [P]
        margin = chosen_reward - rejected_reward
        sums |= {"chosen_reward": chosen_reward.sum(), "rejected_reward": rejected_reward.sum()}
        sums |= {"margin": margin.sum(), "accuracy": (margin > 0).to(margin.dtype).sum()}
        sums["dpo"] = pair_losses(ratios).sum()
    return loss, sums


def _cached_teacher(batch: PreferenceBatch) -> TopKTeacherOutputs | None:
    if batch.teacher_ids is None or batch.teacher_logprobs is None:
        return None
    return TopKTeacherOutputs(batch.teacher_ids.flatten(0, 1), batch.teacher_logprobs.flatten(0, 1))


def _response_lengths(response: Tensor, pairs: int) -> Tensor:
    """Return the trained tokens of each response, at least 1: [P, 2] float64."""
    return segment_sum((response >= 0).double(), response, 2 * pairs).view(pairs, 2).clamp(min=1)


def _side(response: Tensor) -> Tensor:
    """Return [N] 0 for tokens of no response, 1 of a chosen, 2 of a rejected one."""
    return torch.where(response < 0, 0, 1 + response % 2)


def _by_side(name: str, values: Tensor, response: Tensor) -> dict[str, Tensor]:
    """Sum `values` [N] over the tokens of all chosen, and of all rejected responses."""
    _, chosen, rejected = segment_sum(values, _side(response), 3)
    return {f"chosen_{name}": chosen, f"rejected_{name}": rejected}
