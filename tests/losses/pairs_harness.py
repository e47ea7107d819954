"""Random preference pairs, packed into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nb_lightning.batch import PreferenceBatch, pack_responses

V, D, TEACHER_D = 29, 6, 9
# (prompt, chosen, rejected) lengths: ragged, a response of one token, an empty one on either side
LENGTHS = [(3, 5, 2), (1, 1, 7), (4, 3, 1), (2, 0, 4), (5, 6, 0), (1, 0, 0)]


def random_pairs(lengths: Sequence[tuple[int, int, int]] = LENGTHS, seed: int = 0) -> list[tuple[list[int], ...]]:
    """Draw token ids below V: (prompt, chosen, rejected) of each pair."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, V, (n,), generator=generator).tolist() for n in pair) for pair in lengths]


def pack_pairs(pairs: Sequence[Sequence[Sequence[int]]], **optional: Any) -> PreferenceBatch:
    """Pack (prompt, chosen, rejected) token ids into one row; `optional` are further fields of the batch."""
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    packed, index = pack_responses(prompts, [response for pair in pairs for response in pair[1:]])
    return PreferenceBatch(**packed, pairs=len(pairs), response_index=index, **optional)
