"""The chunked head: statistics of `hidden @ weight.T` without ever holding [tokens, vocabulary].

At 64 K tokens x 166 144 words that tensor is 43 GB in float32. All functions below walk over the trained tokens in
chunks and hold one chunk of logits (two with a whole teacher), so they need [chunk, V] memory whatever the number of
tokens is. Tokens whose label is ignored are not projected at all.

* `weighted_sum`, and `cross_entropy` as its special case: each token's weight is known beforehand, so gradients are
  formed in the pass that makes the logits: three matrix products (logits, two gradients), four with a teacher.
* `token_logprobs`, `token_statistics`: the gradient of each token arrives only in backward, so logits are made again
  there: four products, six with a teacher.

Where a loss needs log-probabilities before it knows the weights (DPO, GRPO) one pass without gradients and then a
`weighted_sum` take four products, five with a teacher, whose logits are made once: `losses.py` does that.

Inside a chunk the softmax and what follows it run over a few rows at a time that stay in the processor's cache, and
write the gradient over the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nb_lightning.batch import IGNORE
from nb_lightning.divergence import FORWARD_KL, Divergence, Part, Scratch, Teacher, TopKTeacher, exp

CHUNK = 512
CPU_TILE = 2**18  # elements of a tile for each thread: 1 MiB of float32 stays in cache
GPU_TILE = 2**25  # 128 MiB: enough to fill a GPU, which has no such cache and would wait for many small kernels


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


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum over tokens of -log p(label), in nats.

    Args:
        hidden: [N, D]; the products run in its dtype (or autocast's), the softmax in float32.
        weight: [V, D] of the head.
        labels: [N] int64; `IGNORE` (-100) counts nothing.
        chunk: tokens of logits held at a time.

    Returns:
        0-d float32 sum (float64 for float64 input). Divide by the *global* number of trained tokens.
    """
    minus = torch.full(labels.shape, -1.0, dtype=wide(hidden.dtype), device=labels.device)
    return weighted_sum(hidden, weight, labels, minus, chunk=chunk, entropy=False)[0]


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(label) of every token: [N] float32 nats, 0 where the label is `IGNORE`. Arguments as `cross_entropy`."""
    return token_statistics(hidden, weight, labels, chunk=chunk, entropy=False).logprobs


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher | TopKTeacher | None = None,
    divergence: Divergence = FORWARD_KL,
    chunk: int = CHUNK,
    entropy: bool = True,
) -> TokenStatistics:
    """What is known of every token, differentiable in `hidden` and `weight`.

    Args:
        teacher: of the same N tokens; gets no gradient.
        entropy: whether to compute it.

    The other arguments are as in `cross_entropy`.

    Raises:
        ValueError: the teacher has another vocabulary.
    """
    walk = _Walk(labels, teacher, divergence, chunk, entropy)
    return TokenStatistics(*_TokenStatistics.apply(*_in_compute_dtype(hidden, weight), walk))


def weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    teacher: Teacher | TopKTeacher | None = None,
    divergence: Divergence = FORWARD_KL,
    divergence_weights: Tensor | None = None,
    chunk: int = CHUNK,
    entropy: bool = True,
) -> tuple[Tensor, TokenStatistics]:
    """Sum over tokens of weights * log p(label) + divergence_weights * divergence, its gradients formed on the way.

    Its backward scales these gradients in place, so it runs once.

    Args:
        weights: [N]; no gradient flows into them.
        divergence_weights: [N]; None without a teacher.

    The other arguments are as in `token_statistics`.

    Returns:
        The sum, 0-d, differentiable in `hidden` and `weight`; and the statistics, which are not.
    """
    assert (teacher is None) == (divergence_weights is None)
    walk = _Walk(labels, teacher, divergence, chunk, entropy)
    total, *found = _WeightedSum.apply(*_in_compute_dtype(hidden, weight), walk, weights, divergence_weights)
    return total, TokenStatistics(*found)


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():  # inside a Function `needs_input_grad` would still say yes
        hidden, weight = hidden.detach(), weight.detach()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics of products in `dtype` are in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The gradient of a loss with respect to each statistic, in the order of `TokenStatistics`, [N] each; None is 0.
_Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Walk:
    """The way over the tokens: chunks, and tiles of a few rows inside each."""

    labels: Tensor
    teacher: Teacher | TopKTeacher | None
    divergence: Divergence
    chunk: int
    entropy: bool

    def parts(self) -> Iterator[Part]:
        """The trained tokens in chunks of nearly equal size; slices where all tokens are trained, else positions."""
        kept = (self.labels != IGNORE).nonzero().squeeze(1)
        n = kept.numel()
        pieces = -(-n // self.chunk)
        for i in range(pieces):
            part = slice(i * n // pieces, (i + 1) * n // pieces)
            yield part if n == self.labels.numel() else kept[part]

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        upstream: _Upstream | None = None,
        needed: tuple[bool, bool] = (True, True),
    ) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
        """The statistics; and with `upstream` the gradients of `hidden` and `weight`, as far as `needed`."""
        (N, _), V, dtype, device, sums = hidden.shape, weight.shape[0], hidden.dtype, hidden.device, wide(hidden.dtype)
        size = min(self.chunk, N)
        teacher = self.teacher and self.teacher.prepare(N, V, dtype)
        buffer = torch.empty(size, V, dtype=dtype, device=device)
        teacher_buffer = torch.empty_like(buffer) if isinstance(teacher, Teacher) else buffer
        tile = CPU_TILE * torch.get_num_threads() if device.type == "cpu" else GPU_TILE
        rows = max(1, min(size, tile // V))
        scratch = Scratch(rows, V, sums, device)
        present = (True, self.entropy, teacher is not None)
        found = [torch.zeros(N, dtype=sums, device=device) if x else None for x in present]
        grad_hidden = torch.zeros_like(hidden) if upstream and needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if upstream and needed[1] else None
        factors = [x if x is None else x.to(sums).unsqueeze(1) for x in upstream or ()]
        with torch.autocast(device.type, enabled=False):
            for part in self.parts():
                h, label = hidden[part], self.labels[part].unsqueeze(1)
                n = h.shape[0]
                logits = torch.mm(h, weight.T, out=buffer[:n])
                opened = teacher.open(part, teacher_buffer[:n]) if teacher else ()
                of_part = (logits, label, opened, _at(part, factors))
                tiles = (slice(start, start + rows) for start in range(0, n, rows))
                values = [self._tile(*_at(tile, of_part), scratch) for tile in tiles]
                for whole, pieces in zip(found, zip(*values)):
                    if whole is not None:
                        whole[part] = torch.cat(pieces)
                if grad_hidden is not None:
                    grad_hidden[part] = logits @ weight
                if grad_weight is not None:
                    _accumulate(grad_weight, logits.T, h)
        return found, grad_hidden, grad_weight

    def _tile(
        self, logits: Tensor, label: Tensor, opened: list[Tensor], factors: list[Tensor | None], scratch: Scratch
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Statistics [R] of a few rows. With `factors` [R, 1] the gradient is written over their `logits` [R, V]."""
        scratch.rows = logits.shape[0]
        s = torch.log_softmax(logits, -1, dtype=scratch.dtype, out=scratch("s"))
        logprobs, entropy, divergence, towards = s.gather(1, label).squeeze(1), None, None, None
        if not (self.entropy or self.teacher or factors):
            return logprobs, None, None
        p = exp(s, out=logits if factors and logits.dtype == s.dtype else scratch("p"))
        if self.teacher is not None:
            temperature, tempered = self.divergence.temperature, (s, p)
            if temperature != 1:
                s_t = torch.div(s, temperature, out=scratch("s_t"))
                torch.log_softmax(s_t, -1, out=s_t)
                tempered = s_t, exp(s_t, out=scratch("p_t"))
            divergence, towards = self.teacher.tile(self.divergence, *tempered, scratch, *opened)
        if self.entropy:
            entropy = s.mul_(p).sum(1).neg_()
        if factors:
            of_logprob, of_entropy, of_divergence = factors
            # d log p(y) = onehot(y) - p;  d entropy = -p (log p + entropy);  d divergence = towards / temperature
            scale = torch.zeros_like(logprobs).unsqueeze(1) if of_logprob is None else -of_logprob
            if of_entropy is not None:
                scale = scale - of_entropy * entropy.unsqueeze(1)
            gradient = p.mul_(scale)
            if of_entropy is not None:
                gradient.addcmul_(s, of_entropy, value=-1)  # s is p log p by now
            if of_divergence is not None:
                gradient.addcmul_(towards, of_divergence / temperature)
            if of_logprob is not None:
                gradient.scatter_add_(1, label, of_logprob)
            if gradient.dtype != logits.dtype:
                logits.copy_(gradient)
        return logprobs, entropy, divergence


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, walk: _Walk) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        ctx.walk = walk
        return tuple(walk.run(hidden, weight)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        walk = replace(
            ctx.walk,
            entropy=upstream[1] is not None,
            teacher=None if upstream[2] is None else ctx.walk.teacher,
        )
        _, grad_hidden, grad_weight = walk.run(hidden, weight, upstream, ctx.needs_input_grad[:2])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, walk: _Walk, weights: Tensor, divergence_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        upstream = (weights, None, divergence_weights) if any(needed) else None
        found, *ctx.gradients = walk.run(hidden, weight, upstream, needed)
        ctx.weight_dtype = weight.dtype
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


def _at(part: Part, tensors: Any) -> Any:
    """`part` of each tensor in a nested list; None stays None."""
    if isinstance(tensors, list | tuple):
        return [_at(part, x) for x in tensors]
    return None if tensors is None else tensors[part]


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one fused call where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
