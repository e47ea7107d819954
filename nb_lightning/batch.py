"""What travels from a loader to a stage: plain tensors with a shape and a dtype on every field.

B rows, T tokens per row, S documents. Labels are already shifted: `labels[b, t]` is the token after `input_ids[b, t]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class _Movable:
    """`.to` and `.pin_memory` over every tensor field, lists included: what Lightning and the DataLoader call."""

    def _map(self, move: Any) -> Any:
        return replace(self, **{f.name: _apply(getattr(self, f.name), move) for f in fields(self)})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        def move(x: Any) -> Any:
            # Copies from pinned memory to a GPU overlap with the host; copies from a GPU must end before they are read.
            extra = {"non_blocking": True} if isinstance(x, Tensor) and not x.is_cuda else {}
            return x.to(*args, **{**extra, **kwargs})

        return self._map(move)

    def pin_memory(self) -> Any:
        return self._map(lambda x: x.pin_memory())


def _apply(value: Any, move: Any) -> Any:
    if isinstance(value, list):
        return [_apply(item, move) for item in value]
    return move(value) if isinstance(value, Tensor | _Movable) else value


@dataclass
class PackedBatch(_Movable):
    """Rows of one forward. Several documents may share a row; no document spans two rows.

    Attributes:
        input_ids: [B, T] int64.
        labels: [B, T] int64, already shifted, `IGNORE` (-100) where nothing is trained.
        position_ids: [B, T] int64, restarting at each document; None means 0..T-1 in every row.
        cu_seqlens: [S + 1] int32 document boundaries over the B * T flattened tokens; None means one document a row.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def counts(self) -> dict[str, Tensor]:
        """`tokens`: the number of labels that count, a 0-d int64 tensor."""
        return {"tokens": (self.labels != IGNORE).sum()}

    def silenced(self) -> Any:
        """Return the same rows with nothing trained: a forward that counts nothing."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))

    @classmethod
    def from_rows(cls, rows: Tensor, eos_id: int | None) -> PackedBatch:
        """Split rows of T + 1 tokens into inputs and labels.

        Args:
            rows: [B, T + 1] int64 tokens.
            eos_id: the token that ends a document. When given, attention and positions restart after each one, and
                a new row is a new document; when None, every row is one document.
        """
        # Copies: of one row, `contiguous` would give two views of the same tokens, and labels are written to.
        input_ids, labels = rows[:, :-1].clone(), rows[:, 1:].clone()
        if eos_id is None:
            return cls(input_ids, labels)
        B, T = input_ids.shape
        first = torch.zeros_like(input_ids, dtype=torch.bool)
        first[:, 0] = True
        first[:, 1:] = input_ids[:, :-1] == eos_id
        starts = first.flatten().nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([B * T]))
        position_ids = (torch.arange(B * T) - starts.repeat_interleave(lengths)).view(B, T)
        cu_seqlens = torch.cat([starts, torch.tensor([B * T])]).int()
        return cls(input_ids, labels, position_ids, cu_seqlens)


def pack_responses(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Put documents behind each other into one row, without padding. Only the responses are trained.

    Args:
        prompts: token ids, at least one each.
        responses: as many; may be empty. The last token of a document is predicted but not read.

    Returns:
        The fields of a `PackedBatch` with B = 1, and [1, T] int32: for each label the index of its response, else -1.
    """
    inputs, labels, positions, index, lengths = [], [], [], [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        tokens = [*prompt, *response]
        n = max(1, len(tokens) - 1)  # a document of one token keeps it, so that no document is empty
        inputs += tokens[:n]
        labels += [IGNORE] * (n - len(response)) + list(response)
        index += [-1] * (n - len(response)) + [i] * len(response)
        positions += range(n)
        lengths.append(n)
    packed = {
        "input_ids": torch.tensor([inputs]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
    }
    return packed, torch.tensor([index], dtype=torch.int32)


@dataclass(kw_only=True)
class PreferenceBatch(PackedBatch):
    """Pairs of responses. Both of a pair lie in the same batch, each a document of its own: prompt, then response.

    A response is trained exactly where its tokens have labels; the prompt's labels are `IGNORE`.

    Attributes:
        pairs: number of pairs P, those with an empty response included.
        response_index: [B, T] int32: 2 * pair where the label belongs to the chosen response, 2 * pair + 1 to the
            rejected one, -1 where the label is `IGNORE`.
        pair_ids: [P] int64 number of each pair in the run's data.
        ref_logprobs: [P, 2] float32 nats of the frozen reference, summed over chosen and rejected response.
        teacher_ids, teacher_logprobs: [B, T, k] int32 and float32 nats: the cached teacher's k most likely tokens where
            there is a label, anything elsewhere.
    """

    pairs: int
    response_index: Tensor
    pair_ids: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None

    @property
    def counts(self) -> dict[str, Tensor]:
        """`pairs`, and `chosen_tokens` and `rejected_tokens` that are trained; 0-d int64 tensors."""
        index = self.response_index
        pairs = torch.tensor(self.pairs, device=index.device)
        chosen, rejected = (((index >= 0) & (index % 2 == side)).sum() for side in (0, 1))
        return {"pairs": pairs, "chosen_tokens": chosen, "rejected_tokens": rejected}

    def silenced(self) -> PreferenceBatch:
        none = None if self.pair_ids is None else self.pair_ids[:0]
        index = torch.full_like(self.response_index, -1)
        return replace(super().silenced(), pairs=0, response_index=index, pair_ids=none)


@dataclass(kw_only=True)
class RolloutBatch(PackedBatch):
    """Sampled completions with their advantages; each is a document of its own: prompt, then completion.

    What is masked (prompts, truncated completions) has label `IGNORE` and index -1: numerators and denominators see the
    same tokens.

    Attributes:
        completion_index: [B, T] int32: which completion the label belongs to, -1 where the label is `IGNORE`.
        advantages: [C] float32, of the completions of this batch.
        rollout_logprobs: [B, T] float32 nats, the sampler's; only compared with, never trained on.
        old_logprobs: [B, T] float32 nats at the weights that sampled; None where these are the weights being trained.
        ref_logprobs: [B, T] float32 nats of a frozen reference, for a KL term.
    """

    completion_index: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    @classmethod
    def from_completions(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        advantages: Tensor,
        logprobs: Sequence[Sequence[float]],
        masked: Sequence[bool],
    ) -> RolloutBatch:
        """Pack prompts and completions, token ids, into one row, see `pack_responses`.

        Args:
            advantages: [C] float32.
            logprobs: the sampler's, of each completion's tokens.
            masked: completions that are read and not trained.
        """
        packed, index = pack_responses(prompts, completions)
        rollout_logprobs = torch.zeros(index.shape)
        rollout_logprobs[index >= 0] = torch.tensor([value for row in logprobs for value in row])
        hidden = torch.tensor([*masked, False])[index]  # -1, of prompts, is the last
        packed["labels"] = packed["labels"].masked_fill(hidden, IGNORE)
        return cls(
            **packed,
            completion_index=index.masked_fill(hidden, -1),
            advantages=advantages,
            rollout_logprobs=rollout_logprobs,
        )

    @property
    def counts(self) -> dict[str, Tensor]:
        """`tokens` that are trained, and `completions` that have any; 0-d int64 tensors."""
        index = self.completion_index.flatten()
        index = index[index >= 0]
        return {
            "tokens": torch.tensor(index.numel(), device=index.device),
            "completions": torch.tensor(index.unique().numel(), device=index.device),
        }

    def silenced(self) -> RolloutBatch:
        return replace(super().silenced(), completion_index=torch.full_like(self.completion_index, -1))


@dataclass
class StepBatch(_Movable):
    """All the rows this rank contributes to one optimizer step, as micro-batches.

    Attributes:
        micro_batches: what is run forward and backward one after the other.
        tokens: tokens of the whole step over all ranks; the clock moves by this.
        sample_ids: [n] int64, this rank's positions in the run's one global order of rows.
    """

    micro_batches: list[PackedBatch]
    tokens: int
    sample_ids: Tensor


@dataclass
class RolloutStep(_Movable):
    """What the loader of RL hands out: the number of an optimizer step. Prompts are looked up when it begins, as they
    depend on what the policy can do by then.

    Attributes:
        number: of the step, from 0.
        tokens: the clock moves by this.
    """

    number: int
    tokens: int
