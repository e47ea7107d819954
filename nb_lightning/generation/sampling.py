"""How the next token is chosen: temperature, top-k, top-p, and the draw itself. V vocabulary, B rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS = 128  # most likely tokens looked at first under top-p and top-k; more only if they fall short
BLOCK = 512  # weights that are summed before they are searched
PAPER_DECODING = {"temperature": 0.6, "top_p": 0.95}  # Nanbeige4-3B report, section "Evaluation"
COLDEST = 1e-30  # a temperature below it would be 0 in float32


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The defaults sample from the model's own distribution.

    Attributes:
        max_new_tokens: a row that has this many and no stop token ends with "length".
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: of those, keep the fewest whose probabilities sum to at least p (nucleus sampling).
        stop_ids: a row ends with the first of these, which is its last token.
        top_logprobs: also report this many most likely tokens a step.

    Raises:
        ValueError: a value out of its range, by name.
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
    """Draw one token a row by inverting the distribution function at `uniforms`.

    A row's token depends on its own logits, sampling and uniform alone, whatever the other rows want.

    Args:
        logits: [B, V] float32.
        samplings: of each row.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    sampled = [i for i, s in enumerate(samplings) if s.temperature > 0]
    cut = [i for i in sampled if samplings[i].top_p < 1 or samplings[i].top_k]
    whole = [i for i in sampled if not (samplings[i].top_p < 1 or samplings[i].top_k)]
    for rows, draw in ((whole, _from_all), (cut, _from_most_likely)):
        if len(rows) == len(samplings):
            return draw(_scaled(logits, samplings), samplings, uniforms)
    ids = logits.argmax(-1)
    for rows, draw in ((whole, _from_all), (cut, _from_most_likely)):
        if rows:
            chosen = [samplings[i] for i in rows]
            ids[rows] = draw(_scaled(logits[rows], chosen), chosen, uniforms[rows])
    return ids


def _scaled(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Logits below the row's largest, over the temperature: at most 0, so that no temperature overflows."""
    temperatures = _column([max(s.temperature, COLDEST) for s in samplings], logits).float()
    return (logits - logits.amax(-1, keepdim=True)).div_(temperatures)


def _from_all(scaled: Tensor, samplings: Sequence[Sampling], uniforms: Tensor) -> Tensor:
    return _invert(scaled.exp_(), uniforms)


def _from_most_likely(scaled: Tensor, samplings: Sequence[Sampling], uniforms: Tensor, width: int = NUCLEUS) -> Tensor:
    """Draw from what top-k, then top-p keep; of equal logits the smaller id comes first.

    Only the `width` most likely tokens are sorted, and more where they do not reach far enough.
    """
    V = scaled.shape[1]
    width = min(V, max(width, *(s.top_k + 1 for s in samplings)))
    values, order = _most_likely(scaled, width)
    weights = values.exp().double()
    top_k = _column([s.top_k or V for s in samplings], scaled)
    weights = weights.masked_fill(torch.arange(width, device=scaled.device) >= top_k, 0.0)
    total = torch.where(top_k < V, weights.sum(-1, keepdim=True), scaled.exp().sum(-1, keepdim=True).double())
    below = weights.cumsum(-1)
    beyond = (below - weights >= _column([s.top_p for s in samplings], scaled) * total) | (weights == 0)
    last = values.gather(1, (~beyond).sum(-1, keepdim=True) - 1)
    if width < V and bool((last <= values[:, -1:]).any()):
        return _from_most_likely(scaled, samplings, uniforms, 8 * width)
    return order.gather(1, _invert(weights.masked_fill(beyond, 0.0), uniforms)[:, None])[:, 0]


def _most_likely(scaled: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row and their ids, [B, width]: largest first, of equal ones the smaller id first."""
    if width == scaled.shape[1]:
        return scaled.sort(dim=-1, descending=True, stable=True)
    values, order = scaled.topk(width)
    if bool((values[:, 1:] == values[:, :-1]).any()):  # common in bfloat16; topk leaves their order open
        order, by_id = order.sort(dim=-1)
        values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
        order = order.gather(1, by_value)
    return values, order


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place in each row of `weights` [B, n] where their running sum passes `uniforms` of the whole: [B].

    In a long row first the block, then the place in it: running sums would be as large as the vocabulary, in float64.
    """
    n = weights.shape[1]
    if n <= 4 * BLOCK:
        below = weights.cumsum(-1, dtype=torch.float64)
        found = torch.searchsorted(below, uniforms[:, None] * below[:, -1:], right=True)
        return found[:, 0].clamp(max=n - 1)
    tail = n % BLOCK
    sums = weights[:, : n - tail].unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    if tail:
        sums = torch.cat((sums, weights[:, n - tail :].sum(-1, keepdim=True, dtype=torch.float64)), dim=1)
    ends = sums.cumsum(-1)
    wanted = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, wanted, right=True).clamp(max=sums.shape[1] - 1)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, places.clamp(max=n - 1)).double()  # what is repeated past the end is never reached
    begun = ends.gather(1, block) - sums.gather(1, block)
    found = torch.searchsorted(inside.cumsum(-1), wanted - begun, right=True)
    return (block * BLOCK + found)[:, 0].clamp(max=n - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
