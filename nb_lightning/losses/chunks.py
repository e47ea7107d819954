"""The walk over the tokens under `head.py`: chunks of tokens, and tiles of a few rows inside each chunk.

Shapes: N tokens, D width, V vocabulary, n tokens of a chunk, R tokens of a tile. See `head.py` for the picture.

A chunk's logits [n, V] are as large as a matrix product wants. The softmax and what follows run over tiles [R, V] that
stay in the processor's cache, and write the gradient over the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nb_lightning.batch import IGNORE
from nb_lightning.losses.divergence import Chunk, Divergence, Scratch, TeacherOutputs, TopKTeacherOutputs, exp

# Called with log p(label) [n] of a chunk's tokens, and which tokens these are; returns their weights [n] in the loss.
TokenWeigher = Callable[[Tensor, Chunk], Tensor]

CPU_TILE = 2**18  # elements of a tile for each thread: 1 MiB of float32 stays in cache
GPU_TILE = 2**25  # 128 MiB: enough to fill a GPU, which has no such cache and would wait for many small kernels


class TokenStatistics(NamedTuple):
    """Statistics of each token, [N] in nats, float32 (float64 for float64 input); 0 where the label is `IGNORE`.

    Attributes:
        logprobs: log p(label).
        entropy: of the model's distribution; None where it was not asked for.
        divergence: from the teacher; None without one.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    divergence: Tensor | None = None


class StatisticsGradient(NamedTuple):
    """d loss / d statistic of each token, [N]; None is 0."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None

    def rows(self, tokens: Chunk) -> StatisticsGradient:
        """Return the gradients of some tokens."""
        return StatisticsGradient(*(None if x is None else x[tokens] for x in self))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums where the products are in `dtype`: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Chunks -------------------------------------------------------------------------------------------------------------


def split_tokens(labels: Tensor, chunk_size: int) -> list[Chunk]:
    """Split the trained tokens into chunks of nearly equal size.

    Args:
        labels: [N] int64; tokens with `IGNORE` are in no chunk.
        chunk_size: most tokens of a chunk.

    Returns:
        Slices where all tokens are trained, positions otherwise.
    """
    trained = (labels != IGNORE).nonzero().squeeze(1)  # positions
    n_chunks = -(-trained.numel() // chunk_size)
    cuts = [i * trained.numel() // n_chunks for i in range(n_chunks + 1)] if n_chunks else []
    return _cut(trained, labels.numel(), cuts)


def split_between_groups(labels: Tensor, groups: Tensor, chunk_size: int) -> list[Chunk] | None:
    """Split the trained tokens into chunks of which none ends inside a group.

    Args:
        labels, chunk_size: see `split_tokens`.
        groups: [N] integer, which group each token belongs to.

    Returns:
        As `split_tokens`; None where a group is longer than a chunk or lies in several places.
    """
    trained = (labels != IGNORE).nonzero().squeeze(1)
    if not trained.numel():
        return []
    trained_groups = groups[trained]
    starts = (trained_groups.diff() != 0).nonzero().squeeze(1) + 1
    edges = [0, *starts.tolist(), trained.numel()]
    n_groups = len(edges) - 1
    if max(b - a for a, b in pairwise(edges)) > chunk_size or n_groups > trained_groups.unique().numel():
        return None
    cuts = [0]
    for end, next_end in pairwise(edges[1:]):
        if next_end - cuts[-1] > chunk_size:
            cuts.append(end)
    return _cut(trained, labels.numel(), [*cuts, trained.numel()])


def _cut(trained: Tensor, n_tokens: int, cuts: list[int]) -> list[Chunk]:
    """Cut the positions of the trained tokens; slices if these are all tokens."""
    return [slice(a, b) if trained.numel() == n_tokens else trained[a:b] for a, b in pairwise(cuts)]


def _length(chunk: Chunk) -> int:
    return chunk.stop - chunk.start if isinstance(chunk, slice) else chunk.numel()


# The walk -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """One pass over the trained tokens, chunk by chunk: their statistics and, on demand, the gradients.

    Attributes:
        labels: [N] int64.
        teacher: of the same N tokens.
        divergence: of the teacher and the model.
        chunks: of the trained tokens.
        with_entropy: whether to compute the entropy.
    """

    labels: Tensor
    teacher: TeacherOutputs | TopKTeacherOutputs | None
    divergence: Divergence
    chunks: Sequence[Chunk]
    with_entropy: bool

    def run(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        upstream: StatisticsGradient | None = None,
        needs_gradient: tuple[bool, bool] = (True, True),
        weigh_tokens: TokenWeigher | None = None,
    ) -> tuple[TokenStatistics, Tensor | None, Tensor | None]:
        """Compute the statistics and, with `upstream`, the gradients.

        Args:
            hidden: [N, D], in the dtype of the products.
            head_weight: [V, D], in the same dtype.
            upstream: the gradients of the loss with respect to the statistics.
            needs_gradient: of `hidden` and of `head_weight`.
            weigh_tokens: its weights are written into `upstream.logprobs`, chunk by chunk.

        Returns:
            The statistics; the gradient of `hidden` [N, D] in its dtype; that of `head_weight` [V, D], summed over
            the chunks in the dtype of the statistics. A gradient that is not needed is None.
        """
        N, V, device, dtype = hidden.shape[0], head_weight.shape[0], hidden.device, statistics_dtype(hidden.dtype)
        longest = max(map(_length, self.chunks), default=0)
        teacher = None if self.teacher is None else self.teacher.prepare(N, V, hidden.dtype)
        logits_buffer = torch.empty(longest, V, dtype=hidden.dtype, device=device)
        teacher_buffer = torch.empty_like(logits_buffer) if isinstance(teacher, TeacherOutputs) else logits_buffer
        tile_rows = _tile_rows(longest, V, device)
        scratch = Scratch(tile_rows, V, dtype, device)

        is_present = (True, self.with_entropy, teacher is not None)
        statistics = [torch.zeros(N, dtype=dtype, device=device) if present else None for present in is_present]
        grad_hidden = torch.zeros_like(hidden) if upstream and needs_gradient[0] else None
        grad_head_weight = torch.zeros_like(head_weight, dtype=dtype) if upstream and needs_gradient[1] else None
        token_weights = upstream.logprobs if upstream else None  # [N]
        if upstream:  # [N, 1] each; views where the dtype fits: what `weigh_tokens` writes is seen here
            upstream = StatisticsGradient(*(None if x is None else x.to(dtype).unsqueeze(1) for x in upstream))

        with torch.autocast(device.type, enabled=False):
            for chunk in self.chunks:
                n = _length(chunk)
                chunk_hidden, label = hidden[chunk], self.labels[chunk].unsqueeze(1)  # [n, D], [n, 1]
                logits = torch.mm(chunk_hidden, head_weight.T, out=logits_buffer[:n])  # [n, V], later their gradient
                tiles = [slice(start, start + tile_rows) for start in range(0, n, tile_rows)]
                if weigh_tokens is not None:
                    assert token_weights is not None
                    logprobs = torch.cat([_log_softmax(logits[tile], label[tile], scratch)[1] for tile in tiles])
                    token_weights[chunk] = weigh_tokens(logprobs, chunk)
                teacher_chunk = teacher.read_chunk(chunk, teacher_buffer[:n]) if teacher else ()
                chunk_upstream = upstream.rows(chunk) if upstream else None  # [n, 1] each

                tile_statistics = [
                    self._process_tile(
                        logits[tile],
                        label[tile],
                        [x[tile] for x in teacher_chunk],
                        chunk_upstream.rows(tile) if chunk_upstream else None,
                        scratch,
                    )
                    for tile in tiles
                ]
                for statistic, of_tiles in zip(statistics, zip(*tile_statistics)):
                    if statistic is not None:
                        statistic[chunk] = torch.cat(of_tiles)
                if grad_hidden is not None:
                    grad_hidden[chunk] = logits @ head_weight
                if grad_head_weight is not None:
                    _accumulate(grad_head_weight, logits.T, chunk_hidden)
        logprobs, entropy, divergence = statistics
        assert logprobs is not None
        return TokenStatistics(logprobs, entropy, divergence), grad_hidden, grad_head_weight

    def _process_tile(
        self,
        logits: Tensor,
        label: Tensor,
        teacher_tile: list[Tensor],
        upstream: StatisticsGradient | None,
        scratch: Scratch,
    ) -> TokenStatistics:
        """Compute statistics [R] of a tile; with `upstream` [R, 1] write the gradient over its `logits` [R, V]."""
        s, logprobs = _log_softmax(logits, label, scratch)  # [R, V], [R]
        if not (self.with_entropy or self.teacher or upstream):
            return TokenStatistics(logprobs)
        entropy, divergence, divergence_gradient = None, None, None
        p = exp(s, out=logits if upstream and logits.dtype == s.dtype else scratch("p"))  # [R, V]
        if self.teacher is not None:
            s_tempered, p_tempered = s, p
            if self.divergence.temperature != 1:
                s_tempered = torch.div(s, self.divergence.temperature, out=scratch("s_tempered"))
                torch.log_softmax(s_tempered, -1, out=s_tempered)
                p_tempered = exp(s_tempered, out=scratch("p_tempered"))
            divergence, divergence_gradient = self.teacher.compare_tile(
                self.divergence, s_tempered, p_tempered, scratch, *teacher_tile
            )
        if self.with_entropy:
            entropy = s.mul_(p).sum(1).neg_()  # s is p log p from here on
        statistics = TokenStatistics(logprobs, entropy, divergence)
        if upstream:
            gradient = self._logits_gradient(p, s, label, statistics, divergence_gradient, upstream)
            if gradient.dtype != logits.dtype:
                logits.copy_(gradient)
        return statistics

    def _logits_gradient(
        self,
        p: Tensor,
        p_log_p: Tensor,
        label: Tensor,
        statistics: TokenStatistics,
        divergence_gradient: Tensor | None,
        upstream: StatisticsGradient,
    ) -> Tensor:
        """Write d loss / d logits [R, V] over `p`.

        Of one token's logits: d log p(y) = onehot(y) - p; d entropy = -p (log p + entropy);
        d divergence = divergence_gradient / temperature.
        """
        if upstream.logprobs is None:
            scale = torch.zeros_like(statistics.logprobs).unsqueeze(1)  # [R, 1], the factor of p
        else:
            scale = -upstream.logprobs
        if upstream.entropy is not None:
            assert statistics.entropy is not None
            scale = scale - upstream.entropy * statistics.entropy.unsqueeze(1)
        gradient = p.mul_(scale)
        if upstream.entropy is not None:
            gradient.addcmul_(p_log_p, upstream.entropy, value=-1)
        if upstream.divergence is not None:
            assert divergence_gradient is not None
            gradient.addcmul_(divergence_gradient, upstream.divergence / self.divergence.temperature)
        if upstream.logprobs is not None:
            gradient.scatter_add_(1, label, upstream.logprobs)
        return gradient


def _tile_rows(longest: int, vocab_size: int, device: torch.device) -> int:
    """Return the rows of a tile: as many as the cache holds, at least 1, at most a chunk's."""
    elements = CPU_TILE * torch.get_num_threads() if device.type == "cpu" else GPU_TILE
    return max(1, min(longest, elements // vocab_size))


def _log_softmax(logits: Tensor, label: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of a tile [R, V], and of its labels [R]."""
    scratch.rows = logits.shape[0]
    s = torch.log_softmax(logits, -1, dtype=scratch.dtype, out=scratch("s"))
    return s, s.gather(1, label).squeeze(1)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in one fused call where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
