"""The chunked head: statistics of `hidden @ head_weight.T` without ever holding [tokens, vocabulary].

At 64 K tokens x 166 144 words that tensor is 43 GB in float32. All functions below walk over the trained tokens in
chunks and hold one chunk of logits (two with a whole teacher), so they need [chunk, V] memory whatever the number of
tokens is. Tokens whose label is ignored are not projected at all.

* `weighted_sum`, and `cross_entropy` as its special case: each token's weight is known while its chunk is there, so
  gradients are formed in the pass that makes the logits: three matrix products (logits, two gradients), four with a
  teacher.
* `token_logprobs`, `token_statistics`: the gradient of each token arrives only in backward, so logits are made again
  there: four products, six with a teacher.

In a DPO loss a token's weight depends on all tokens of its pair. Pairs that fit in a chunk are kept whole
(`whole_groups`); for longer ones a pass without gradients goes before the `weighted_sum`: one product more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nb_lightning.losses.chunks import Walk, Weigh, parts_of, wide
from nb_lightning.losses.divergence import FORWARD_KL, Divergence, Part, TeacherOutputs, TopKTeacherOutputs

CHUNK_SIZE = 512


@dataclass(frozen=True)
class TokenStatistics:
    """Per token, [N] in nats, float32 (float64 for float64 input); 0 where the label is `IGNORE`.

    Attributes:
        logprobs: log p(label).
        entropy: of the model's distribution; None where it was not asked for.
        divergence: from the teacher; None without one.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    divergence: Tensor | None = None


def cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """Sum over tokens of -log p(label), in nats.

    Args:
        hidden: [..., D]; the products run in its dtype (or autocast's), the softmax in float32.
        head_weight: [V, D] of the head.
        labels: [...] int64, already shifted; `IGNORE` (-100) counts nothing.
        chunk_size: tokens of logits held at a time.

    Returns:
        0-d float32 sum (float64 for float64 input). Divide by the *global* number of trained tokens.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    minus = torch.full(labels.shape, -1.0, dtype=wide(hidden.dtype), device=labels.device)
    return weighted_sum(hidden, head_weight, labels, minus, chunk_size=chunk_size, entropy=False)[0]


def token_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """log p(label) of every token: [N] float32 nats, 0 where the label is `IGNORE`. Arguments as `cross_entropy`."""
    return token_statistics(hidden, head_weight, labels, chunk_size=chunk_size, entropy=False).logprobs


def token_statistics(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    teacher: TeacherOutputs | TopKTeacherOutputs | None = None,
    divergence: Divergence = FORWARD_KL,
    chunk_size: int = CHUNK_SIZE,
    parts: Sequence[Part] | None = None,
    entropy: bool = True,
) -> TokenStatistics:
    """What is known of every token, differentiable in `hidden` and `head_weight`.

    Args:
        teacher: of the same N tokens; gets no gradient.
        parts: the chunks; by default `parts_of(labels, chunk_size)`.
        entropy: whether to compute it.

    The other arguments are as in `cross_entropy`.

    Raises:
        ValueError: the teacher has another vocabulary.
    """
    parts = parts_of(labels, chunk_size) if parts is None else parts
    walk = Walk(labels, teacher, divergence, parts, entropy)
    return TokenStatistics(*_TokenStatistics.apply(*_in_compute_dtype(hidden, head_weight), walk))


def weighted_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor | Weigh,
    teacher: TeacherOutputs | TopKTeacherOutputs | None = None,
    divergence: Divergence = FORWARD_KL,
    divergence_weights: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    parts: Sequence[Part] | None = None,
    entropy: bool = True,
) -> tuple[Tensor, TokenStatistics]:
    """Sum over tokens of weights * log p(label) + divergence_weights * divergence, its gradients formed on the way.

    Its backward scales these gradients in place, so it runs once.

    Args:
        weights: [N]; or what gives those [n] of one part when it is told which tokens these are, a slice or positions,
            and their log p(label) [n]. No gradient flows into them.
        divergence_weights: [N]; None without a teacher.

    The other arguments are as in `token_statistics`.

    Returns:
        The sum, 0-d, differentiable; and the statistics, which are not. Where no gradient is
        needed, weights that are to be asked for are not, and count as 0.
    """
    assert (teacher is None) == (divergence_weights is None)
    parts = parts_of(labels, chunk_size) if parts is None else parts
    walk = Walk(labels, teacher, divergence, parts, entropy)
    total, *found = _WeightedSum.apply(*_in_compute_dtype(hidden, head_weight), walk, weights, divergence_weights)
    return total, TokenStatistics(*found)


def _in_compute_dtype(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():  # inside a Function `needs_input_grad` would still say yes
        hidden, head_weight = hidden.detach(), head_weight.detach()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), head_weight.to(dtype)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, walk: Walk) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head_weight)
        ctx.walk = walk
        return tuple(walk.run(hidden, head_weight)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, head_weight = ctx.saved_tensors
        walk = replace(
            ctx.walk,
            entropy=upstream[1] is not None,
            teacher=None if upstream[2] is None else ctx.walk.teacher,
        )
        _, grad_hidden, grad_weight = walk.run(hidden, head_weight, upstream, ctx.needs_input_grad[:2])
        return grad_hidden, None if grad_weight is None else grad_weight.to(head_weight.dtype), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        walk: Walk,
        weights: Tensor | Weigh,
        divergence_weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        needed, weigh = ctx.needs_input_grad[:2], None
        if not isinstance(weights, Tensor):
            weigh, weights = weights, torch.zeros(hidden.shape[0], dtype=wide(hidden.dtype), device=hidden.device)
        upstream = (weights, None, divergence_weights) if any(needed) else None
        found, *ctx.gradients = walk.run(hidden, head_weight, upstream, needed, weigh if upstream else None)
        ctx.weight_dtype = head_weight.dtype
        ctx.mark_non_differentiable(*(x for x in found if x is not None))
        total = (weights * found[0]).sum()
        if divergence_weights is not None:
            total = total + (divergence_weights * found[2]).sum()
        return total, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of head.weighted_sum were scaled in place: its backward runs only once")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
