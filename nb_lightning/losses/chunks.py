"""The way over the tokens under `head.py`: chunks of logits, and tiles of a few rows inside each.

A chunk [n, V] is as large as a matrix product wants it. The softmax and what follows it run over tiles of rows that
stay in the processor's cache, and write the gradient over the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nb_lightning.batch import IGNORE
from nb_lightning.losses.divergence import Divergence, Part, Scratch, TeacherOutputs, TopKTeacherOutputs, exp

Weigh = Callable[[Part, Tensor], Tensor]  # of a part and its log p(label) [n]: the weights [n] of these
# The gradient of a loss with respect to each statistic, in the order of `TokenStatistics`, [N] each; None is 0.
Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]

CPU_TILE = 2**18  # elements of a tile for each thread: 1 MiB of float32 stays in cache
GPU_TILE = 2**25  # 128 MiB: enough to fill a GPU, which has no such cache and would wait for many small kernels


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics of products in `dtype` are in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parts_of(labels: Tensor, chunk_size: int) -> list[Part]:
    """The trained tokens in chunks of nearly equal size: slices where all tokens are trained, positions otherwise."""
    kept = (labels != IGNORE).nonzero().squeeze(1)
    pieces = -(-kept.numel() // chunk_size)
    return _cut(kept, labels.numel(), [i * kept.numel() // pieces for i in range(pieces + 1)] if pieces else [])


def whole_groups(labels: Tensor, groups: Tensor, chunk_size: int) -> list[Part] | None:
    """The same, but no chunk ends inside a group. None where a group is longer than a chunk or lies in several places.

    Args:
        groups: [N] integer, which group each token belongs to.
    """
    kept = (labels != IGNORE).nonzero().squeeze(1)
    if not kept.numel():
        return []
    own = groups[kept]
    ends = [0, *((own.diff() != 0).nonzero().squeeze(1) + 1).tolist(), kept.numel()]
    if max(b - a for a, b in pairwise(ends)) > chunk_size or len(ends) - 1 > own.unique().numel():
        return None
    cuts = [0]
    for end, after in pairwise(ends[1:]):
        if after - cuts[-1] > chunk_size:
            cuts.append(end)
    return _cut(kept, labels.numel(), [*cuts, kept.numel()])


def _cut(kept: Tensor, n: int, cuts: list[int]) -> list[Part]:
    return [slice(a, b) if kept.numel() == n else kept[a:b] for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Walk:
    """The way over the tokens: chunks, and tiles of a few rows inside each."""

    labels: Tensor
    teacher: TeacherOutputs | TopKTeacherOutputs | None
    divergence: Divergence
    parts: Sequence[Part]
    entropy: bool

    def run(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        upstream: Upstream | None = None,
        needed: tuple[bool, bool] = (True, True),
        weigh: Weigh | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
        """The statistics; and with `upstream` the gradients of `hidden` and `head_weight`, as far as `needed`.

        `weigh` fills in the first of `upstream`, part by part.
        """
        (N, _), V, dtype, device, sums = (
            hidden.shape,
            head_weight.shape[0],
            hidden.dtype,
            hidden.device,
            wide(hidden.dtype),
        )
        lengths = [part.stop - part.start if isinstance(part, slice) else part.numel() for part in self.parts]
        size = max(lengths, default=0)
        teacher = self.teacher and self.teacher.prepare(N, V, dtype)
        buffer = torch.empty(size, V, dtype=dtype, device=device)
        teacher_buffer = torch.empty_like(buffer) if isinstance(teacher, TeacherOutputs) else buffer
        tile = CPU_TILE * torch.get_num_threads() if device.type == "cpu" else GPU_TILE
        rows = max(1, min(size, tile // V))
        scratch = Scratch(rows, V, sums, device)
        present = (True, self.entropy, teacher is not None)
        found = [torch.zeros(N, dtype=sums, device=device) if x else None for x in present]
        grad_hidden = torch.zeros_like(hidden) if upstream and needed[0] else None
        grad_weight = torch.zeros_like(head_weight, dtype=sums) if upstream and needed[1] else None
        factors = [x if x is None else x.to(sums).unsqueeze(1) for x in upstream or ()]  # what `weigh` fills: a view
        with torch.autocast(device.type, enabled=False):
            for part, n in zip(self.parts, lengths):
                h, label = hidden[part], self.labels[part].unsqueeze(1)
                logits = torch.mm(h, head_weight.T, out=buffer[:n])
                tiles = [slice(start, start + rows) for start in range(0, n, rows)]
                if weigh is not None:
                    logprobs = torch.cat([_logprobs(logits[tile], label[tile], scratch)[1] for tile in tiles])
                    upstream[0][part] = weigh(part, logprobs)
                opened = teacher.open(part, teacher_buffer[:n]) if teacher else ()
                of_part = (logits, label, opened, _at(part, factors))
                values = [self._tile(*_at(tile, of_part), scratch) for tile in tiles]
                for whole, pieces in zip(found, zip(*values)):
                    if whole is not None:
                        whole[part] = torch.cat(pieces)
                if grad_hidden is not None:
                    grad_hidden[part] = logits @ head_weight
                if grad_weight is not None:
                    _accumulate(grad_weight, logits.T, h)
        return found, grad_hidden, grad_weight

    def _tile(
        self, logits: Tensor, label: Tensor, opened: list[Tensor], factors: list[Tensor | None], scratch: Scratch
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Statistics [R] of a few rows. With `factors` [R, 1] the gradient is written over their `logits` [R, V]."""
        s, logprobs = _logprobs(logits, label, scratch)
        entropy, divergence, towards = None, None, None
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


def _logprobs(logits: Tensor, label: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Log-softmax of a tile [R, V], and of that the labels' [R]."""
    scratch.rows = logits.shape[0]
    s = torch.log_softmax(logits, -1, dtype=scratch.dtype, out=scratch("s"))
    return s, s.gather(1, label).squeeze(1)


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


# Sums over segments -------------------------------------------------------------------------------------------------


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sum of `values` [N] over each segment: [segments]. `index` [N] says which segment a token is of, -1 none."""
    return values.new_zeros(segments + 1).index_add(0, index.long() + 1, values)[1:]


def _gradient(loss: Callable[[Tensor], Tensor], logprobs: Tensor) -> Tensor:
    """d loss / d logprobs, [N]."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]
