"""The chunked head: statistics of `hidden @ weight.T` without ever holding [tokens, vocabulary].

At 64 K tokens x 166 144 words that tensor is 43 GB in float32. Both functions below walk over the tokens in chunks,
hold one chunk of logits at a time, and so need [chunk, V] memory whatever the number of tokens is:

* `cross_entropy`: the weight of each token is known beforehand (1 or 0), so its gradients are formed in the same pass
  as the logits: three matrix products, like the naive head.
* `token_logprobs`: the gradient of each token arrives only in backward (DPO, GRPO), so logits are computed again there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nb_lightning.batch import IGNORE

CHUNK = 512


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
    return _CrossEntropy.apply(*_in_compute_dtype(hidden, weight), labels, chunk)


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(label) of every token: [N] float32 nats, 0 where the label is `IGNORE`. Arguments as `cross_entropy`."""
    return _TokenLogprobs.apply(*_in_compute_dtype(hidden, weight), labels, chunk)


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():  # inside a Function `needs_input_grad` would still say yes
        hidden, weight = hidden.detach(), weight.detach()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _log_softmax_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Any:
    """Yield (slice, kept, log-probabilities [n, V], label index [n, 1]) over the tokens, in at least float32."""
    wide = _accumulator(hidden.dtype)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        kept = labels[part] != IGNORE
        index = labels[part].where(kept, 0).unsqueeze(1)
        logits = (hidden[part] @ weight.T).to(wide)
        yield part, kept, torch.log_softmax(logits, dim=-1), index


def _grad_of_chunk(logprobs: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """d(sum scale * log p(label)) / d logits = scale * (onehot - p), written over `logprobs` [n, V]."""
    grad = logprobs.exp_().neg_()
    grad.scatter_add_(1, index, torch.ones_like(index, dtype=grad.dtype))
    return grad.mul_(scale.unsqueeze(1))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        wide = _accumulator(hidden.dtype)
        total = hidden.new_zeros((), dtype=wide)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part, kept, logprobs, index in _log_softmax_chunks(hidden, weight, labels, chunk):
                kept = kept.to(wide)
                total -= (logprobs.gather(1, index).squeeze(1) * kept).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad = _grad_of_chunk(logprobs, index, -kept).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    _accumulate(grad_weight, grad.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        out = hidden.new_zeros(hidden.shape[0], dtype=_accumulator(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, kept, logprobs, index in _log_softmax_chunks(hidden, weight, labels, chunk):
                out[part] = logprobs.gather(1, index).squeeze(1) * kept
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_accumulator(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, kept, logprobs, index in _log_softmax_chunks(hidden, weight, labels, ctx.chunk):
                grad = _grad_of_chunk(logprobs, index, grad_out[part] * kept).to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[part])
                _accumulate(grad_weight, grad.T, hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one fused call where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
