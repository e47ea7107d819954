"""Inputs of the chunked head, and naive float64 statistics to compare it with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.batch import IGNORE
from nb_lightning.losses.divergence import Divergence, TeacherOutputs, TopKTeacherOutputs

N, D, V = 23, 6, 37
CHUNKS = [1, 7, 23, 512]


def inputs(dtype: torch.dtype = torch.float64, n: int = N, d: int = D, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hidden states, head weight and labels.

    About a third of the labels is ignored, the first and the last among them.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    head_weight = torch.randn(v, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::3] = IGNORE
    labels[-1] = IGNORE
    return hidden, head_weight, labels


def naive_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """Return log p(label) [N] in float64 from all logits at once, 0 where ignored."""
    logprobs = torch.log_softmax(hidden.double() @ head_weight.double().T, dim=-1)
    return torch.stack([row[y] if y != IGNORE else row.new_zeros(()) for row, y in zip(logprobs, labels.tolist())])


def per_token_weights(n: int = N) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def most_likely(teacher: TeacherOutputs, k: int, temperature: float = 1.0) -> TopKTeacherOutputs:
    logprobs = torch.log_softmax(teacher.hidden.double() @ teacher.head_weight.double().T / temperature, -1)
    top_logprobs, ids = logprobs.topk(k)
    return TopKTeacherOutputs(ids.int(), top_logprobs)


def naive_divergence(divergence: Divergence, s: Tensor, t: Tensor) -> Tensor:
    """Return the divergence [N] of logits [N, V] with torch's own kl_div."""
    s, t = (torch.log_softmax(x.double() / divergence.temperature, -1) for x in (s, t))

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if divergence.kind == "forward_kl":
        return kl(t, s)
    if divergence.kind == "reverse_kl":
        return kl(s, t)
    beta = divergence.beta
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * kl(t, m) + (1 - beta) * kl(s, m)
