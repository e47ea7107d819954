"""GRPO: advantages against the group, and the clipped policy gradient (report, section on RL)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nb_lightning.batch import RolloutBatch
from nb_lightning.losses import head
from nb_lightning.losses.chunks import _gradient, segment_sum, wide
from nb_lightning.losses.divergence import Part

NORMALISATIONS = ("token", "sequence", "constant")
GRPO_PER = dict.fromkeys(("entropy", "clipped_low", "clipped_high", "ref_kl", "rollout_gap"), "tokens")


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
    head_weight: Tensor,
    batch: RolloutBatch,
    counts: Mapping[str, Tensor],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalisation: str = "token",
    max_tokens: int | None = None,
    kl_weight: float = 0.0,
    chunk_size: int = head.CHUNK_SIZE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient with one advantage for all tokens of a completion.

    A token's loss is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old, plus kl_weight times the
    estimator exp(d) - d - 1 with d = log pi_ref - log pi (k3, Schulman 2020) of KL(pi || pi_ref).

    Args:
        hidden: [B, T, D] last hidden states.
        head_weight: [V, D] of the head.
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

    total, found = head.weighted_sum(hidden, head_weight, labels, weigh, chunk_size=chunk_size)

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
