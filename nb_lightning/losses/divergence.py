"""Divergences between a teacher's and a student's next-token distributions, with their gradients, tile by tile.

Shapes: N tokens, n tokens of a chunk, R tokens of a tile, V vocabulary, Dt width of the teacher, k cached tokens.

A tile is [R, V] log-probabilities in float32 or wider. Each divergence returns its value [R] in nats and its gradient
[R, V] with respect to the student's logits; the walk over the tokens (chunks.py) multiplies that by the token's weight.

The teacher is given in full (`TeacherOutputs`) or as the cached k most likely tokens of each position
(`TopKTeacherOutputs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd")
LOG2_E = 1.4426950408889634
Chunk = slice | Tensor  # some of the N tokens: a slice, or their positions [n] int64


@dataclass(frozen=True)
class Divergence:
    """Which divergence, between distributions softmax(logits / temperature).

    Attributes:
        kind: "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher), or "jsd", the generalised
            Jensen-Shannon divergence beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
            m = beta teacher + (1 - beta) student (Agarwal et al. 2024, eq. 1).
        beta: of "jsd" only; towards 0 it is beta times the forward KL, towards 1 (1 - beta) times the reverse KL.
        temperature: divides both logits. The value is *not* multiplied by temperature squared.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"divergence is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(
                f"divergence beta is {self.beta}; jsd takes 0 < beta < 1; its ends are forward_kl, reverse_kl"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a positive number")

    def __call__(self, s: Tensor, p: Tensor, t: Tensor, scratch: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """Return value [R] and gradient [R, V] of one tile.

        Args:
            s: [R, V] the student's log-probabilities, and p = e^s; neither is changed.
            t: [R, V] the teacher's log-probabilities; overwritten.
            scratch: returns a tile by name; the gradient is one of them.
        """
        q = scratch("q")  # [R, V], e^t
        if self.kind == "forward_kl":  # value: sum q (t - s); gradient: p - q
            exp(t, out=q)
            value = t.sub_(s).mul_(q).sum(1)
            return value, torch.sub(p, q, out=q)
        if self.kind == "reverse_kl":  # value: sum p (s - t); gradient: p (s - t - value)
            value = torch.mul(p, t.neg_().add_(s), out=q).sum(1)
            return value, q.addcmul_(p, value.unsqueeze(1), value=-1)
        exp(t, out=q)
        m = torch.mul(q, self.beta, out=scratch("m")).add_(p, alpha=1 - self.beta)
        m.clamp_(min=torch.finfo(m.dtype).tiny).log_()  # where both are 0, so are the products below
        teacher_kl = t.sub_(m).mul_(q).sum(1)  # [R], KL(teacher || m)
        m.neg_().add_(s).mul_(p)  # [R, V], p (s - m)
        student_kl = m.sum(1)  # [R], KL(student || m)
        gradient = m.addcmul_(p, student_kl.unsqueeze(1), value=-1).mul_(1 - self.beta)
        return self.beta * teacher_kl + (1 - self.beta) * student_kl, gradient


FORWARD_KL = Divergence()


# What is known of the teacher ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherOutputs:
    """The whole distribution of a teacher at each token, as what makes its logits.

    Attributes:
        hidden: [N, Dt] its last hidden states, of any width.
        head_weight: [V, Dt] of its head, over the student's vocabulary.
    """

    hidden: Tensor
    head_weight: Tensor

    def prepare(self, n_tokens: int, vocab_size: int, dtype: torch.dtype) -> TeacherOutputs:
        """Detach, and cast to the dtype of the matrix products.

        Raises:
            ValueError: the vocabularies differ.
        """
        if self.head_weight.shape[0] != vocab_size:
            raise ValueError(
                f"the teacher's vocabulary has {self.head_weight.shape[0]:,} tokens and the student's {vocab_size:,}: "
                "their distributions are compared token by token, so both need the same tokenizer"
            )
        assert self.hidden.shape == (n_tokens, self.head_weight.shape[1])
        return TeacherOutputs(self.hidden.detach().to(dtype), self.head_weight.detach().to(dtype))

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> tuple[Tensor, ...]:
        """Return what `compare_tile` needs of a chunk: its logits, written into `buffer` [n, V]."""
        return (torch.mm(self.hidden[chunk], self.head_weight.T, out=buffer),)

    @staticmethod
    def compare_tile(
        divergence: Divergence, s: Tensor, p: Tensor, scratch: Callable[[str], Tensor], logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return value [R] and gradient [R, V] of one tile.

        Args:
            s: [R, V] the student's log-probabilities at the divergence's temperature, and p = e^s.
            logits: [R, V] rows of what `read_chunk` returned.
        """
        t = scratch("t")
        if divergence.temperature == 1:
            torch.log_softmax(logits, -1, dtype=t.dtype, out=t)
        else:
            torch.log_softmax(t.copy_(logits).div_(divergence.temperature), -1, out=t)
        return divergence(s, p, t, scratch)


@dataclass(frozen=True)
class TopKTeacherOutputs:
    """The k most likely tokens of a teacher at each position.

    All other tokens are one bucket, for teacher and student alike, and the divergence is that of the k + 1 buckets.
    Merging tokens can only lower a divergence (log-sum inequality), so this is a lower bound of the divergence from the
    whole distribution. Both are equal at k = V, and where the student spreads the rest over its tokens as the teacher
    does.

    Attributes:
        ids: [N, k] integer, distinct within a row.
        logprobs: [N, k] nats, at the temperature of the divergence: it cannot be changed afterwards. Rows whose
            probabilities sum to more than 1, as rounding makes them, are normalised. Keep them in float32.
    """

    ids: Tensor
    logprobs: Tensor

    def prepare(self, n_tokens: int, vocab_size: int, dtype: torch.dtype) -> TopKTeacherOutputs:
        """Check the shapes; ids are not compared with the vocabulary."""
        assert self.ids.shape == self.logprobs.shape and self.ids.shape[0] == n_tokens
        assert self.ids.shape[1] <= vocab_size
        return self

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> tuple[Tensor, ...]:
        """Return what `compare_tile` needs of a chunk: ids and log-probabilities, [n, k] each."""
        return self.ids[chunk].long(), self.logprobs[chunk]

    @staticmethod
    def compare_tile(
        divergence: Divergence, s: Tensor, p: Tensor, scratch: Callable[[str], Tensor], ids: Tensor, logprobs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TeacherOutputs.compare_tile`, of `ids` and `logprobs` [R, k]."""
        limits = torch.finfo(s.dtype)
        t = logprobs.double().clamp(min=math.log(limits.tiny))  # [R, k]
        mass = t.logsumexp(1, keepdim=True)  # [R, 1], log of the teacher's probability of these k
        t = t - mass.clamp(min=0)
        s_buckets = s.gather(1, ids)  # [R, k], later [R, k + 1]
        rest = None  # [R, 1], the student's probability of all other tokens
        if ids.shape[1] < s.shape[1]:
            # Summed up, not 1 minus the others: that would lose all digits of a small rest.
            rest = scratch("q").copy_(p).scatter_(1, ids, 0).sum(1, keepdim=True).clamp(min=limits.tiny)
            s_buckets = torch.cat([s_buckets, rest.log()], 1)
            # The teacher's is known by subtraction only; below one rounding it is not known at all.
            t = torch.cat([t, mass.clamp(max=0).expm1().neg().clamp(min=limits.eps).log()], 1)
        t = t.to(s.dtype)
        value, bucket_gradient = divergence(s_buckets, s_buckets.exp(), t, lambda _: torch.empty_like(t))
        gradient = scratch("q")  # [R, V]
        if rest is not None:  # a token of the rest moves its bucket by its share of it
            torch.mul(p, bucket_gradient[:, -1:] / rest, out=gradient)
        return value, gradient.scatter_(1, ids, bucket_gradient[:, : ids.shape[1]])


# Tiles --------------------------------------------------------------------------------------------------------------


class Scratch:
    """Named tiles [R, V], allocated once and used for all rows: fresh ones would cost page faults on a CPU.

    Attributes:
        rows: R; may be lowered for a shorter tile.
        dtype: of the tiles.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.dtype = rows, dtype
        self._allocate = lambda: torch.empty(rows, width, dtype=dtype, device=device)
        self._tiles: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Return the tile of this name; it holds what was written last."""
        if name not in self._tiles:
            self._tiles[name] = self._allocate()
        return self._tiles[name][: self.rows]


def exp(x: Tensor, out: Tensor) -> Tensor:
    """Write e^x into `out`.

    Through exp2: `torch.exp` on a CPU takes 3 times as long, and 30 times where results underflow.
    """
    return torch.mul(x, LOG2_E, out=out).exp2_()
