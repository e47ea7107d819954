"""Sums over the responses or completions that share a packed row."""

from __future__ import annotations

from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sum `values` over each segment.

    Args:
        values: [N].
        index: [N] integer, the segment of each token; -1 is none.
        segments: their number S.

    Returns:
        [S] in the dtype of `values`; 0 for a segment without tokens.
    """
    return values.new_zeros(segments + 1).index_add(0, index.long() + 1, values)[1:]
