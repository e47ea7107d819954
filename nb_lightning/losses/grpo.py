"""GRPO: advantages against the group, and the clipped policy gradient (report, section on RL).

Shapes: P prompts, G completions per prompt, C completions of a batch, N tokens (rows flattened), n of these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nb_lightning.batch import RolloutBatch
from nb_lightning.losses import head
from nb_lightning.losses.chunks import statistics_dtype
from nb_lightning.losses.divergence import Chunk
from nb_lightning.losses.segments import segment_sum

NORMALISATIONS = ("token", "sequence", "constant")
# The logged sums, and which count of the step each is divided by.
GRPO_PER: dict[str, str] = dict.fromkeys(("entropy", "clipped_low", "clipped_high", "ref_kl", "rollout_gap"), "tokens")


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-4) -> tuple[Tensor, int]:
    """Compare rewards with those of their group (Shao et al. 2024).

    Args:
        rewards: [P, G], the G completions of each prompt.
        scale: divide by the group's standard deviation (G - 1 in its denominator) plus `eps`; Dr.GRPO does not.

    Returns:
        [P, G] advantages, exactly 0 in a group whose rewards are all equal; and the number of such groups.
    """
    rewards = rewards.to(torch.float64)
    is_constant = (rewards == rewards[:, :1]).all(1, keepdim=True)  # [P, 1]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale and rewards.shape[1] > 1:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    return advantages.masked_fill(is_constant, 0).float(), int(is_constant.sum())


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
        head_weight: [V, D].
        counts: `batch.counts` of the whole optimizer step.
        normalisation: "token" is the mean over tokens (DAPO), "sequence" the mean over completions of the mean over
            their tokens (GRPO), "constant" the mean over completions of the sum over `max_tokens` (Dr.GRPO).
        kl_weight: needs `batch.ref_logprobs`.
        chunk_size: tokens of logits held at a time.

    Returns:
        This batch's part of the loss, 0-d; and the sums of `GRPO_PER`, detached: entropy, how often the ratio was
        clipped on each side, k3, and |log pi - log pi_rollout|. Sums that lack their log-probabilities are 0.
    """
    assert normalisation in NORMALISATIONS
    labels, completion = batch.labels.flatten(), batch.completion_index.flatten()  # [N]
    is_masked = completion < 0  # [N]
    advantages = batch.advantages[completion.clamp(min=0).long()]  # [N]
    old_logprobs, ref_logprobs = _flat(batch.old_logprobs), _flat(batch.ref_logprobs)  # [N]
    token_weights = _token_shares(completion, len(batch.advantages), normalisation, max_tokens)  # [N]
    token_weights = token_weights.to(statistics_dtype(hidden.dtype))
    token_weights = token_weights / counts["tokens" if normalisation == "token" else "completions"].clamp(min=1)
    assert not kl_weight or ref_logprobs is not None

    # Of `tokens`, some or all of the N: logprobs are [n], and so is what the first two return.

    def policy_ratio(logprobs: Tensor, tokens: Chunk) -> Tensor:
        old = logprobs.detach() if old_logprobs is None else old_logprobs[tokens]
        return (logprobs - old).masked_fill(is_masked[tokens], 0).exp()

    def reference_kl(logprobs: Tensor, tokens: Chunk) -> Tensor:
        assert ref_logprobs is not None
        difference = (ref_logprobs[tokens] - logprobs).masked_fill(is_masked[tokens], 0)
        return difference.exp() - difference - 1

    def policy_loss(logprobs: Tensor, tokens: Chunk) -> Tensor:
        ratio, advantage = policy_ratio(logprobs, tokens), advantages[tokens]
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if kl_weight:
            token_loss = token_loss + kl_weight * reference_kl(logprobs, tokens)
        return (token_weights[tokens] * token_loss).sum()

    loss, statistics = head.chunked_loss(hidden.flatten(0, 1), head_weight, labels, policy_loss, chunk_size=chunk_size)

    sums = dict.fromkeys(GRPO_PER, statistics.logprobs.new_zeros(()))
    ratio = policy_ratio(statistics.logprobs, head.ALL_TOKENS)
    sums["clipped_low"] = ((ratio < 1 - clip_low) & (advantages < 0)).to(ratio.dtype).sum()
    sums["clipped_high"] = ((ratio > 1 + clip_high) & (advantages > 0)).to(ratio.dtype).sum()
    if statistics.entropy is not None:
        sums["entropy"] = statistics.entropy.sum()
    if ref_logprobs is not None:
        sums["ref_kl"] = reference_kl(statistics.logprobs, head.ALL_TOKENS).sum()
    if batch.rollout_logprobs is not None:
        gap = statistics.logprobs - batch.rollout_logprobs.flatten()
        sums["rollout_gap"] = gap.masked_fill(is_masked, 0).abs().sum()
    return loss, sums


def _flat(logprobs: Tensor | None) -> Tensor | None:
    return None if logprobs is None else logprobs.flatten()


def _token_shares(completion: Tensor, completions: int, normalisation: str, max_tokens: int | None) -> Tensor:
    """Return how much each token counts in the loss's numerator, [N] float64; 0 where it is masked.

    Args:
        completion: [N], the completion of each token, -1 where it is masked.
        completions: their number C.
    """
    is_trained = (completion >= 0).double()
    if normalisation == "token":
        return is_trained
    if normalisation == "constant":
        assert max_tokens is not None
        return is_trained / max_tokens
    lengths = segment_sum(is_trained, completion, completions)  # [C]
    return is_trained / lengths[completion.clamp(min=0).long()].clamp(min=1)
