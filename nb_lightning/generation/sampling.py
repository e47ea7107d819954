"""Choose the next token: temperature, top-k, top-p, and the draw itself. B rows, V vocabulary, n candidates.

A row's token is a function of its own logits, sampling and uniform number, so it does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS = 128  # tokens that are sorted at first under top-p and top-k; more only if these are too few
BLOCK = 512  # weights that are summed to one number before a long row is searched
PAPER_DECODING = {"temperature": 0.6, "top_p": 0.95}  # Nanbeige4-3B report, section "Evaluation"
MIN_TEMPERATURE = 1e-30  # lower ones would be 0 in float32


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The defaults sample from the model's own distribution.

    Attributes:
        max_new_tokens: a row with this many tokens and no stop token ends with "length".
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: of those, keep the fewest whose probabilities sum to at least p (nucleus sampling).
        stop_ids: a row ends with the first of these, which is its last token.
        top_logprobs: report this many most likely tokens for each drawn one.

    Raises:
        ValueError: names the value that is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be positive, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; it must not be negative")


def choose(logits: Tensor, samplings: Sequence[Sampling], uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at `uniforms`.

    Args:
        logits: [B, V] float32.
        samplings: of each row.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    sampled = [i for i, s in enumerate(samplings) if s.temperature > 0]
    truncated = [i for i in sampled if samplings[i].top_p < 1 or samplings[i].top_k]
    full = [i for i in sampled if not (samplings[i].top_p < 1 or samplings[i].top_k)]
    for rows, draw in ((full, _draw_from_all), (truncated, _draw_from_most_likely)):
        if len(rows) == len(samplings):  # all rows alike: nothing is copied
            return draw(_scale(logits, samplings), samplings, uniforms)
    ids = logits.argmax(-1)
    for rows, draw in ((full, _draw_from_all), (truncated, _draw_from_most_likely)):
        if rows:
            row_samplings = [samplings[i] for i in rows]
            ids[rows] = draw(_scale(logits[rows], row_samplings), row_samplings, uniforms[rows])
    return ids


def _scale(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Divide logits by the temperature, less the row's largest: [B, V], at most 0, so that nothing overflows."""
    temperatures = _column([max(s.temperature, MIN_TEMPERATURE) for s in samplings], logits).float()
    return (logits - logits.amax(-1, keepdim=True)).div_(temperatures)


def _draw_from_all(scaled: Tensor, samplings: Sequence[Sampling], uniforms: Tensor) -> Tensor:
    return _invert(scaled.exp_(), uniforms)


def _draw_from_most_likely(scaled: Tensor, samplings: Sequence[Sampling], uniforms: Tensor, n: int = NUCLEUS) -> Tensor:
    """Draw from the tokens that top-k, then top-p keep; of equal logits the smaller id comes first.

    The `n` most likely tokens are sorted; if a row may keep more than these, again with eight times as many.
    """
    V = scaled.shape[1]
    n = min(V, max(n, *(s.top_k + 1 for s in samplings)))
    logits, ids = _most_likely(scaled, n)  # [B, n]
    weights = logits.exp().double()  # [B, n], not normalized
    top_k = _column([s.top_k or V for s in samplings], scaled)  # [B, 1]
    weights = weights.masked_fill(torch.arange(n, device=scaled.device) >= top_k, 0.0)
    total = torch.where(top_k < V, weights.sum(-1, keepdim=True), scaled.exp().sum(-1, keepdim=True).double())
    above = weights.cumsum(-1) - weights  # [B, n]: the weight of all more likely tokens
    dropped = (above >= _column([s.top_p for s in samplings], scaled) * total) | (weights == 0)  # [B, n]
    last_kept = logits.gather(1, (~dropped).sum(-1, keepdim=True) - 1)  # [B, 1]
    if n < V and bool((last_kept <= logits[:, -1:]).any()):
        return _draw_from_most_likely(scaled, samplings, uniforms, 8 * n)
    return ids.gather(1, _invert(weights.masked_fill(dropped, 0.0), uniforms)[:, None])[:, 0]


def _most_likely(scaled: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Sort the `n` largest of each row: their values and ids, [B, n]; of equal values the smaller id comes first."""
    if n == scaled.shape[1]:
        return scaled.sort(dim=-1, descending=True, stable=True)
    values, ids = scaled.topk(n)
    if bool((values[:, 1:] == values[:, :-1]).any()):  # common in bfloat16; topk does not define their order
        ids, by_id = ids.sort(dim=-1)
        values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, by_value)
    return values, ids


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Find where the running sum of each row first exceeds `uniforms` times the row's sum.

    A long row is searched in two steps, its blocks first: running sums in float64 would be as large as the vocabulary.

    Args:
        weights: [B, n], not negative.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64, positions in the rows.
    """
    n = weights.shape[1]
    if n <= 4 * BLOCK:
        sums = weights.cumsum(-1, dtype=torch.float64)
        position = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)
        return position[:, 0].clamp(max=n - 1)
    tail = n % BLOCK
    block_sums = weights[:, : n - tail].unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.float64)  # [B, blocks]
    if tail:
        block_sums = torch.cat((block_sums, weights[:, n - tail :].sum(-1, keepdim=True, dtype=torch.float64)), dim=1)
    ends = block_sums.cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]  # [B, 1]
    block = torch.searchsorted(ends, target, right=True).clamp(max=block_sums.shape[1] - 1)  # [B, 1]
    positions = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # [B, BLOCK]
    inside = weights.gather(1, positions.clamp(max=n - 1)).double()  # repeats of the last weight are never reached
    start = ends.gather(1, block) - block_sums.gather(1, block)
    offset = torch.searchsorted(inside.cumsum(-1), target - start, right=True)
    return (block * BLOCK + offset)[:, 0].clamp(max=n - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a [B, 1] float64 tensor on the device of `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
