"""Losses over packed rows, called as the model's `head`: `model(..., head=partial(dpd_loss, batch=batch, ...))`.

All take the step's global counts (`BaseStage.loss`) and divide each of their sums by
its own: what they return for all micro-batches and ranks adds up to the loss. They also return sums to be logged; the
`..._PER` tables name them and say which of the counts each is a mean over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning import head
from nb_lightning.batch import IGNORE, PreferenceBatch, RolloutBatch
from nb_lightning.divergence import FORWARD_KL, Divergence, Part, Teacher, TopKTeacher
from nb_lightning.token_walk import whole_groups, wide

DPO_VARIANTS = ("sigmoid", "hinge", "ipo")
NORMALISATIONS = ("token", "sequence", "constant")
REWARD_LOSSES = ("bradley_terry", "cross_entropy")
DPD_PER = {
    **dict.fromkeys(("dpo", "chosen_reward", "rejected_reward", "margin", "accuracy"), "pairs"),
    **{f"{side}_{name}": f"{side}_tokens" for name in ("divergence", "entropy") for side in ("chosen", "rejected")},
}
GRPO_PER = dict.fromkeys(("entropy", "clipped_low", "clipped_high", "ref_kl", "rollout_gap"), "tokens")
REWARD_PER = {"accuracy": "tokens"}


# Sums over segments -------------------------------------------------------------------------------------------------


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sum of `values` [N] over each segment: [segments]. `index` [N] says which segment a token is of, -1 none."""
    return values.new_zeros(segments + 1).index_add(0, index.long() + 1, values)[1:]


def _gradient(loss: Callable[[Tensor], Tensor], logprobs: Tensor) -> Tensor:
    """d loss / d logprobs, [N]."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


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


def response_logprobs(hidden: Tensor, weight: Tensor, batch: PreferenceBatch, chunk: int = head.CHUNK) -> Tensor:
    """log pi(y), summed over each response: [P, 2] nats (chosen, rejected). Arguments as `dpd_loss`.

    In the chunks of `dpd_loss`: of equal hidden states both compute the same to the last bit.
    """
    labels, index = batch.labels.flatten(), batch.response_index.flatten()
    parts = whole_groups(labels, index // 2, chunk)
    found = head.token_statistics(hidden.flatten(0, 1), weight, labels, chunk=chunk, parts=parts, entropy=False)
    return segment_sum(found.logprobs, index, 2 * batch.pairs).view(batch.pairs, 2)


def dpd_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: PreferenceBatch,
    counts: Mapping[str, Tensor],
    teacher: Teacher | TopKTeacher | None = None,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    dpo_weight: float = 1.0,
    lambda_plus: float = 1.0,
    lambda_minus: float = 1.0,
    divergence: Divergence = FORWARD_KL,
    chunk: int = head.CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dual-level preference distillation: DPO between responses, distillation at each of their tokens.

        dpo_weight * mean over pairs of DPO + lambda_plus * mean over chosen tokens of D(teacher, student)
                                            + lambda_minus * mean over rejected tokens of D(teacher, student)

    Args:
        hidden: [B, T, D] last hidden states of the policy.
        weight: [V, D] of its head.
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
        teacher = TopKTeacher(batch.teacher_ids.flatten(0, 1), batch.teacher_logprobs.flatten(0, 1))
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

    weights, parts = zero.expand(labels.shape), whole_groups(labels, index // 2, chunk)
    if dpo_weight and torch.is_grad_enabled():
        weights = weigh
        if parts is None:  # a pair is longer than a chunk
            with torch.no_grad():
                weights = weigh(slice(None), head.token_logprobs(hidden, weight, labels, chunk))
    of_divergence = None
    if teacher is not None:
        of_divergence = torch.stack([zero, lambda_plus / chosen, lambda_minus / rejected])[_side(index)]
    total, found = head.weighted_sum(hidden, weight, labels, weights, teacher, divergence, of_divergence, chunk, parts)

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


# Policy gradient: GRPO (report, section on RL) ----------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-4) -> tuple[Tensor, int]:
    """Rewards against their group (Shao et al. 2024).

    Args:
        rewards: [P, G], the G completions of each prompt.
        scale: divide by the group's standard deviation (G - 1 in its denominator) plus `eps`; Dr.GRPO does not.

    Returns:
        [P, G] advantages, exactly 0 in a group whose rewards are all equal; and the number of such groups.
    """
    rewards = rewards.to(torch.float64)
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale and rewards.shape[1] > 1:
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return centred.masked_fill(constant, 0).float(), int(constant.sum())


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: RolloutBatch,
    counts: Mapping[str, Tensor],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalisation: str = "token",
    max_tokens: int | None = None,
    kl_weight: float = 0.0,
    chunk: int = head.CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient with one advantage for all tokens of a completion.

    A token's loss is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old, plus kl_weight times the
    estimator exp(d) - d - 1 with d = log pi_ref - log pi (k3, Schulman 2020) of KL(pi || pi_ref).

    Args:
        hidden: [B, T, D] last hidden states.
        weight: [V, D] of the head.
        counts: `batch.counts` of the whole optimizer step.
        normalisation: "token" is the mean over tokens (DAPO), "sequence" the mean over completions of the mean over
            their tokens (GRPO), "constant" the mean over completions of the sum over `max_tokens` (Dr.GRPO).
        kl_weight: needs `batch.ref_logprobs`.

    Returns:
        This batch's part of the loss, 0-d; and the sums of `GRPO_PER`, detached: entropy, how often the ratio was
        clipped on each side, k3, and |log pi - log pi_rollout|. What there is nothing to compare with is 0.
    """
    assert normalisation in NORMALISATIONS
    labels, index = batch.labels.flatten(), batch.completion_index.flatten()
    trained, completions, hidden = index >= 0, len(batch.advantages), hidden.flatten(0, 1)
    advantages = batch.advantages[index.clamp(min=0).long()]
    old, ref = (x if x is None else x.flatten() for x in (batch.old_logprobs, batch.ref_logprobs))
    assert not kl_weight or ref is not None

    per_token = _share_of_tokens(index, completions, normalisation, max_tokens).to(wide(hidden.dtype))
    per_token = per_token / counts["tokens" if normalisation == "token" else "completions"].clamp(min=1)

    def ratio(logprobs: Tensor, part: Part) -> Tensor:
        return (logprobs - (logprobs.detach() if old is None else old[part])).masked_fill(~trained[part], 0).exp()

    def ref_kl(logprobs: Tensor, part: Part) -> Tensor:
        d = (ref[part] - logprobs).masked_fill(~trained[part], 0)
        return d.exp() - d - 1

    def objective(logprobs: Tensor, part: Part) -> Tensor:
        r, a = ratio(logprobs, part), advantages[part]
        loss = -torch.minimum(r * a, r.clamp(1 - clip_low, 1 + clip_high) * a)
        if kl_weight:
            loss = loss + kl_weight * ref_kl(logprobs, part)
        return (per_token[part] * loss).sum()

    def weigh(part: Part, logprobs: Tensor) -> Tensor:
        return _gradient(lambda x: objective(x, part), logprobs)

    total, found = head.weighted_sum(hidden, weight, labels, weigh, chunk=chunk)

    everything = slice(None)
    r, sums = ratio(found.logprobs, everything), dict.fromkeys(GRPO_PER, total.new_zeros(()))
    sums["entropy"] = found.entropy.sum()
    sums["clipped_low"] = ((r < 1 - clip_low) & (advantages < 0)).to(r.dtype).sum()
    sums["clipped_high"] = ((r > 1 + clip_high) & (advantages > 0)).to(r.dtype).sum()
    if ref is not None:
        sums["ref_kl"] = ref_kl(found.logprobs, everything).sum()
    if batch.rollout_logprobs is not None:
        gap = found.logprobs - batch.rollout_logprobs.flatten()
        sums["rollout_gap"] = gap.masked_fill(~trained, 0).abs().sum()
    return objective(found.logprobs, everything) + (total - total.detach()), sums


def _share_of_tokens(index: Tensor, completions: int, normalisation: str, max_tokens: int | None) -> Tensor:
    """What a token counts in its sum, [N]; 0 where it is masked."""
    trained = (index >= 0).double()
    if normalisation == "token":
        return trained
    if normalisation == "constant":
        return trained / max_tokens
    lengths = segment_sum(trained, index, completions)
    return trained / lengths[index.clamp(min=0).long()].clamp(min=1)


# Reward model -------------------------------------------------------------------------------------------------------


def answer_logits(hidden: Tensor, weight: Tensor, labels: Tensor, answers: tuple[int, int]) -> Tensor:
    """[n, 2] logits of the two tokens `answers` at the n positions that have a label. Arguments as below."""
    dtype = wide(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden[labels != IGNORE].to(dtype) @ weight[list(answers)].to(dtype).T


def pairwise_reward_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    counts: Mapping[str, Tensor],
    answers: tuple[int, int],
    *,
    kind: str = "bradley_terry",
    chunk: int = head.CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a reward model that names the better of two responses with one token.

    Args:
        hidden: [B, T, D] last hidden states.
        weight: [V, D] of the head.
        labels: [B, T] int64: the right one of `answers` at the position that answers, -100 elsewhere.
        counts: `PackedBatch.counts` of the whole optimizer step; its tokens are comparisons.
        answers: ids of the two tokens.
        kind: "bradley_terry" -log sigmoid(z_right - z_wrong) of the two tokens' logits; "cross_entropy"
            -log p(right) over the whole vocabulary, which also teaches to answer with one of the two.

    Returns:
        This batch's part of the mean over comparisons, 0-d; and the sum of `REWARD_PER`: those with z_right > z_wrong.
    """
    assert kind in REWARD_LOSSES
    asked = labels != IGNORE
    right = labels[asked]
    second = right == answers[1]
    assert bool((second | (right == answers[0])).all())
    logits = answer_logits(hidden, weight, labels, answers)
    margin = torch.where(second, -1, 1) * (logits[:, 0] - logits[:, 1])
    if kind == "bradley_terry":
        loss = -F.logsigmoid(margin).sum()
    else:
        loss = head.cross_entropy(hidden, weight, labels, chunk)
    return loss / counts["tokens"].clamp(min=1), {"accuracy": (margin > 0).to(margin.dtype).sum()}
