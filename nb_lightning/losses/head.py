"""The chunked head: losses and statistics of `hidden @ head_weight.T` without ever holding [tokens, vocabulary].

At 64 K tokens x 166 144 words that tensor is 44 GB in float32; here it is [chunk_size, V] for any number of tokens.

    grpo_loss, dpd_loss    a loss as a function of log p(label): objective(logprobs [n], chunk) -> 0-d
        v
    chunked_loss           makes the callback: weigh_tokens(logprobs [n], chunk) -> d objective / d logprobs [n]
        v
    weighted_sum           sum of token_weights * logprobs + divergence_token_weights * divergence
        v                  (cross_entropy: token_weights = -1)
    Walk.run (chunks.py)   for each chunk of n trained tokens:
                               logits [n, V] = hidden [n, D] @ head_weight.T
                               logprobs [n] of the labels -> weigh_tokens, the callback -> token_weights [n]
                               gradient [n, V], written over the logits tile by tile (of a divergence: divergence.py)
                               grad_hidden [n, D] = gradient @ head_weight
                               grad_head_weight [V, D] += gradient.T @ hidden

Matrix products of N tokens with the [V, D] weight, forward and backward. Tokens with an ignored label are left out.

    weighted_sum           3: logits, and both gradients in the same pass; backward only scales them
    chunked_loss           3: as weighted_sum; 4 where a token's weight depends on tokens of another chunk
    token_statistics       4: the weights arrive only in backward, so the logits are made again there
    with a whole teacher   1 more (token_statistics: 2 more) for its logits; none with a cached one

Shapes: N tokens (rows flattened), n tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nb_lightning.losses.chunks import (
    StatisticsGradient,
    TokenStatistics,
    TokenWeigher,
    Walk,
    split_between_groups,
    split_tokens,
    statistics_dtype,
)
from nb_lightning.losses.divergence import FORWARD_KL, Chunk, Divergence, TeacherOutputs, TopKTeacherOutputs

CHUNK_SIZE = 512  # tokens; 1,024 took 5 % less time and 60 % more memory (docs/performance.md)
ALL_TOKENS = slice(None)

# A loss, 0-d, of log p(label) [n] of some tokens, and which tokens these are.
Objective = Callable[[Tensor, Chunk], Tensor]


def cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Sum -log p(label) over the tokens, in nats.

    Args:
        hidden: [..., D]; the products run in its dtype (or autocast's), the softmax in float32.
        head_weight: [V, D].
        labels: [...] int64, already shifted; `IGNORE` (-100) counts nothing.
        chunk_size: tokens of logits held at a time.

    Returns:
        0-d float32 sum (float64 for float64 input). Divide by the *global* number of trained tokens.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    token_weights = torch.full(labels.shape, -1.0, dtype=statistics_dtype(hidden.dtype), device=labels.device)
    return weighted_sum(hidden, head_weight, labels, token_weights, chunk_size=chunk_size, with_entropy=False)[0]


def token_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Return log p(label) of every token: [N] float32 nats, 0 where the label is `IGNORE`.

    Args:
        hidden: [N, D].
        labels: [N].

    The other arguments are as in `cross_entropy`.
    """
    return token_statistics(hidden, head_weight, labels, chunk_size=chunk_size, with_entropy=False).logprobs


def token_statistics(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherOutputs | TopKTeacherOutputs | None = None,
    divergence: Divergence = FORWARD_KL,
    chunk_size: int = CHUNK_SIZE,
    chunks: Sequence[Chunk] | None = None,
    with_entropy: bool = True,
) -> TokenStatistics:
    """Return statistics of every token, differentiable in `hidden` and `head_weight`.

    Args:
        teacher: of the same N tokens; gets no gradient.
        divergence: of teacher and model.
        chunks: by default `split_tokens(labels, chunk_size)`.
        with_entropy: whether to compute it.

    The other arguments are as in `token_logprobs`.

    Raises:
        ValueError: the teacher has another vocabulary.
    """
    chunks = split_tokens(labels, chunk_size) if chunks is None else chunks
    walk = Walk(labels, teacher, divergence, chunks, with_entropy)
    return TokenStatistics(*_TokenStatistics.apply(*_in_compute_dtype(hidden, head_weight), walk))


def weighted_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | TokenWeigher,
    teacher: TeacherOutputs | TopKTeacherOutputs | None = None,
    divergence: Divergence = FORWARD_KL,
    divergence_token_weights: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    chunks: Sequence[Chunk] | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, TokenStatistics]:
    """Sum token_weights * log p(label) + divergence_token_weights * divergence over the tokens.

    Its backward scales the gradients, which are formed in forward, in place; so it runs once.

    Args:
        token_weights: [N]; or a function that returns those of a chunk, see `TokenWeigher`. No gradient flows into
            them.
        divergence_token_weights: [N]; None without a teacher.

    The other arguments are as in `token_statistics`.

    Returns:
        The sum, 0-d, differentiable in `hidden` and `head_weight`; and the statistics, which are not. Where no
        gradient is needed, a `TokenWeigher` is not called and the weights count as 0.
    """
    assert (teacher is None) == (divergence_token_weights is None)
    chunks = split_tokens(labels, chunk_size) if chunks is None else chunks
    walk = Walk(labels, teacher, divergence, chunks, with_entropy)
    inputs = _in_compute_dtype(hidden, head_weight)
    total, *statistics = _WeightedSum.apply(*inputs, walk, token_weights, divergence_token_weights)
    return total, TokenStatistics(*statistics)


def chunked_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    objective: Objective | None,
    groups: Tensor | None = None,
    teacher: TeacherOutputs | TopKTeacherOutputs | None = None,
    divergence: Divergence = FORWARD_KL,
    divergence_token_weights: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, TokenStatistics]:
    """Return objective(logprobs) + the sum of divergence_token_weights * divergence, and the tokens' statistics.

    What is computed when:

        forward, only if a group of tokens does not fit in a chunk, without gradients:
            every chunk:    logits -> logprobs
            all tokens:     logprobs -> objective -> d objective / d logprobs = token_weights
        forward:
            every chunk:    logits -> logprobs -> objective -> d objective / d logprobs = token_weights
                            -> gradients of hidden and head_weight, and the statistics
            all tokens:     logprobs -> objective, the value
        backward:           scale the two gradients; nothing is computed again

    Args:
        objective: called with the log-probabilities of all tokens, or of some groups only. Of these its gradient must
            be the same. None is 0.
        groups: [N] integer, which group a token belongs to; None: each token is its own group.
        divergence_token_weights: [N]; None without a teacher.

    The other arguments are as in `token_statistics`.

    Returns:
        The loss, 0-d, differentiable in `hidden` and `head_weight`, once; and the statistics, which are not.
    """
    chunks = split_tokens(labels, chunk_size) if groups is None else split_between_groups(labels, groups, chunk_size)
    dtype = statistics_dtype(hidden.dtype)
    token_weights: Tensor | TokenWeigher = torch.zeros((), dtype=dtype, device=hidden.device).expand(labels.shape)
    if objective is not None and torch.is_grad_enabled():
        token_weights = partial(_gradient, objective)
        if chunks is None:
            with torch.no_grad():
                logprobs = token_logprobs(hidden, head_weight, labels, chunk_size)
            token_weights = token_weights(logprobs, ALL_TOKENS)
    total, statistics = weighted_sum(
        hidden, head_weight, labels, token_weights, teacher, divergence, divergence_token_weights, chunk_size, chunks
    )
    value = total.new_zeros(())
    if divergence_token_weights is not None:
        assert statistics.divergence is not None
        value = value + (divergence_token_weights * statistics.divergence).sum()
    if objective is not None:
        value = value + objective(statistics.logprobs, ALL_TOKENS)
    return value + (total - total.detach()), statistics  # the loss's value, the weighted sum's gradient


def _gradient(objective: Objective, logprobs: Tensor, chunk: Chunk) -> Tensor:
    """Return d objective / d logprobs, [n]."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf, chunk), leaf)[0]


def _in_compute_dtype(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast to the dtype of the products; detach under `no_grad`, where `needs_input_grad` would still say yes."""
    if not torch.is_grad_enabled():
        hidden, head_weight = hidden.detach(), head_weight.detach()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), head_weight.to(dtype)


class _TokenStatistics(torch.autograd.Function):
    """Statistics whose gradients arrive in backward; the logits are made again there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, walk: Walk) -> TokenStatistics:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head_weight)
        ctx.walk = walk
        return walk.run(hidden, head_weight)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head_weight = ctx.saved_tensors
        gradient = StatisticsGradient(*upstream)
        walk = replace(
            ctx.walk,
            with_entropy=gradient.entropy is not None,
            teacher=None if gradient.divergence is None else ctx.walk.teacher,
        )
        _, grad_hidden, grad_head_weight = walk.run(hidden, head_weight, gradient, ctx.needs_input_grad[:2])
        if grad_head_weight is not None:
            grad_head_weight = grad_head_weight.to(head_weight.dtype)
        return grad_hidden, grad_head_weight, None


class _WeightedSum(torch.autograd.Function):
    """A weighted sum of the statistics, with its gradients formed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        walk: Walk,
        token_weights: Tensor | TokenWeigher,
        divergence_token_weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        weigh_tokens = None
        if not isinstance(token_weights, Tensor):
            weigh_tokens = token_weights
            dtype = statistics_dtype(hidden.dtype)
            token_weights = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)  # [N]
        needs_gradient, upstream = ctx.needs_input_grad[:2], None
        if any(needs_gradient):
            upstream = StatisticsGradient(token_weights, None, divergence_token_weights)
        statistics, *ctx.gradients = walk.run(
            hidden, head_weight, upstream, needs_gradient, weigh_tokens if upstream else None
        )
        ctx.head_weight_dtype = head_weight.dtype
        ctx.mark_non_differentiable(*(x for x in statistics if x is not None))
        total = (token_weights * statistics.logprobs).sum()
        if divergence_token_weights is not None:
            assert statistics.divergence is not None
            total = total + (divergence_token_weights * statistics.divergence).sum()
        return total, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of head.weighted_sum were scaled in place: its backward runs only once")
        (grad_hidden, grad_head_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total.to(grad_hidden.dtype))
        if grad_head_weight is not None:
            grad_head_weight = grad_head_weight.mul_(grad_total).to(ctx.head_weight_dtype)
        return grad_hidden, grad_head_weight, None, None, None
