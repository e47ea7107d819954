"""Inputs of the chunked head, and naive statistics to compare it with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nb_lightning.batch import IGNORE
from nb_lightning.losses.divergence import Divergence, TeacherOutputs, TopKTeacherOutputs

N, D, V = 23, 6, 37
CHUNKS = [1, 7, 23, 512]


def inputs(dtype: torch.dtype = torch.float64, n: int = N, d: int = D, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head_weight, labels; about a third of the labels is ignored, so are the first and the last."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    head_weight = torch.randn(v, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::3] = IGNORE
    labels[-1] = IGNORE
    return hidden, head_weight, labels


def naive_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """float64, all logits at once, 0 where ignored."""
    logprobs = torch.log_softmax(hidden.double() @ head_weight.double().T, dim=-1)
    return torch.stack([row[y] if y != IGNORE else row.new_zeros(()) for row, y in zip(logprobs, labels.tolist())])


def per_token_weights(n: int = N) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# Memory -------------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor made, and the most elements alive at once, among those made under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                reference = StorageWeakRef(x.untyped_storage())
                self.alive[reference.cdata] = (reference, x.untyped_storage().nbytes() // x.element_size())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def top_k(teacher: TeacherOutputs, k: int, temperature: float = 1.0) -> TopKTeacherOutputs:
    logprobs = torch.log_softmax(teacher.hidden.double() @ teacher.head_weight.double().T / temperature, -1)
    values, ids = logprobs.topk(k)
    return TopKTeacherOutputs(ids.int(), values)


def naive_of(divergence: Divergence, s: Tensor, t: Tensor) -> Tensor:
    """[N] of logits [N, V], written with torch's own kl_div."""
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
