"""Causal attention inside documents: one contract, several backends.

    attend(q [B, T, H, E], k [B, T, K, E], v [B, T, K, E], mask) -> [B, T, H, E]

A token sees itself and the tokens before it in the same document. Without document boundaries every row is one
document. The boundaries are the `cu_seqlens` of `PackedBatch`; `AttentionMask` turns them once per forward into the
form that the backend reads, so all layers share that work.

Shapes: B rows, T tokens per row, n = B * T, H query heads, K key-value heads, E head dimension, Q blocks of queries.

| backend  | where           | packed documents                                                |
|----------|-----------------|-----------------------------------------------------------------|
| sdpa     | CPU, CUDA       | one `scaled_dot_product_attention` a document: no wasted blocks |
| flex     | CUDA (CPU: forward only, torch has no CPU backward) | block mask, compiled        |
| xformers | CUDA            | `BlockDiagonalCausalMask`                                       |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLEX_BLOCK = 128  # rows and columns of flex's block mask
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
BACKENDS = ("auto", "sdpa", "flex", "xformers")


class AttentionMask:
    """Document boundaries of one forward, and which backend reads them.

    Args:
        backend: "sdpa", "flex" or "xformers" (already resolved, see `resolve_backend`).
        cu_seqlens: [S + 1] int32 boundaries over the B * T flattened tokens, or None for one document a row.
    """

    longest: int | None = None  # see `transformer.Mask`

    def __init__(self, backend: str, cu_seqlens: Tensor | None = None) -> None:
        self.attend: Attend = _ATTEND[backend]
        self.cu_seqlens = cu_seqlens

    @cached_property
    def lengths(self) -> list[int]:
        """Count the tokens of each document."""
        assert self.cu_seqlens is not None
        return torch.diff(self.cu_seqlens).tolist()

    @cached_property
    def flex_mask(self) -> Any:
        """List the blocks of 128 x 128 to compute, from the documents at the blocks' edges.

        `create_block_mask` would first form [n, n] tensors: 40 GB at 64 K tokens unless it is compiled.
        """
        from torch.nn.attention.flex_attention import BlockMask

        cu = self.cu_seqlens
        assert cu is not None
        doc = torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), torch.diff(cu))  # [n]
        n = len(doc)

        def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (doc[i] == doc[j])

        edges = torch.arange(0, n, FLEX_BLOCK, device=cu.device)  # [Q]
        first, last = doc[edges], doc[(edges + FLEX_BLOCK - 1).clamp(max=n - 1)]  # [Q] documents at a block's ends
        is_before = edges[:, None] > edges[None, :]  # [Q, Q] the key block ends before the query block begins
        is_full = is_before & (first[None, :] == last[:, None])  # documents only grow: equal ends mean one document
        is_partial = (is_before & (last[None, :] >= first[:, None]) & ~is_full) | (edges[:, None] == edges[None, :])
        return BlockMask.from_kv_blocks(
            *_key_blocks(is_partial),
            *_key_blocks(is_full),
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=same_document,
            seq_lengths=(n, n),
        )

    @cached_property
    def xformers_bias(self) -> Any:
        """Build xformers' own description of the boundaries."""
        bias = _xformers().attn_bias.BlockDiagonalCausalMask
        return bias.from_seqlens(self.lengths)


def _key_blocks(is_chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return flex's list of `is_chosen` [Q, Q] (query block, key block).

    Returns:
        [1, 1, Q] int32, how many key blocks are chosen for each query block; and [1, 1, Q, Q] int32, which ones: all,
        with the chosen ones first.
    """
    order = torch.argsort(is_chosen.int(), dim=-1, descending=True, stable=True).int()
    return is_chosen.sum(-1, dtype=torch.int32)[None, None], order[None, None].contiguous()


def resolve_backend(name: str, device: torch.device, packed: bool) -> str:
    """Choose the backend for `auto`; check any other name.

    Args:
        name: the setting `trainer.attention`.
        packed: whether rows hold several documents.

    Raises:
        ValueError: an unknown name, or a backend that cannot train on this device, with the reason.
    """
    if name not in BACKENDS:
        raise ValueError(f"trainer.attention is {name!r}; allowed: {', '.join(BACKENDS)}")
    if name == "auto":
        return "flex" if packed and device.type == "cuda" else "sdpa"
    if name in ("flex", "xformers") and device.type != "cuda":
        raise ValueError(
            f"trainer.attention={name} needs a CUDA device, this run is on {device.type}; use auto or sdpa"
        )
    if name == "xformers":
        _probe_xformers(device)
    return name


def _not_compiled(attend: Attend) -> Attend:
    """Keep `torch.compile` out of a function."""
    wrapped: Any = torch.compiler.disable(attend)  # its annotations allow several other returns
    return wrapped


@_not_compiled  # a loop over ragged documents would be compiled anew for each batch
def _per_document(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    B, T, H, E = q.shape
    # `split`, because its backward is one `cat`; the backward of a slice fills a tensor of all tokens per document.
    documents = zip(*(x.reshape(1, B * T, x.shape[2], E).split(mask.lengths, dim=1) for x in (q, k, v)))
    return torch.cat([_causal(*document) for document in documents], dim=1).view(B, T, H, E)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    if mask.cu_seqlens is None:
        return _causal(q, k, v)
    return _per_document(q, k, v, mask)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


_compiled_flex: Callable[..., Tensor] | None = None


@_not_compiled  # flex_attention is compiled separately below
def _flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    if mask.cu_seqlens is None:
        return _causal(q, k, v)
    global _compiled_flex
    from torch.nn.attention.flex_attention import flex_attention

    if q.is_cuda:
        _compiled_flex = _compiled_flex or torch.compile(flex_attention, dynamic=False)
        run = _compiled_flex
    else:  # eager and forward only: tests compare it with the other backends
        run = flex_attention
    B, T, H, E = q.shape
    q, k, v = (x.reshape(1, B * T, x.shape[2], E).transpose(1, 2) for x in (q, k, v))
    out = run(q, k, v, block_mask=mask.flex_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(B, T, H, E)


def _xformers() -> Any:
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ValueError(
            f"trainer.attention=xformers, but xformers does not import ({error}); pip install 'nb_lightning[xformers]'"
        ) from error
    return fmha


def _probe_xformers(device: torch.device) -> None:
    """Run a tiny forward and backward: the extension may import and still lack a kernel for this device."""
    q = torch.zeros(1, 16, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    mask = AttentionMask("xformers", torch.tensor([0, 7, 16], dtype=torch.int32, device=device))
    try:
        mask.attend(q, q, q, mask).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"trainer.attention=xformers does not work on {device}: {error}") from error


@_not_compiled
def _memory_efficient(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    fmha = _xformers()
    B, T, H, E = q.shape
    groups = H // k.shape[2]
    # xformers needs equal head counts: keys and values are copied for each group.
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, groups, -1).reshape(B, T, H, E) for x in (k, v))
    if mask.cu_seqlens is None:
        return fmha.memory_efficient_attention(q, k, v, attn_bias=fmha.attn_bias.LowerTriangularMask())
    q, k, v = (x.reshape(1, B * T, H, E) for x in (q, k, v))
    return fmha.memory_efficient_attention(q, k, v, attn_bias=mask.xformers_bias).view(B, T, H, E)


_ATTEND: dict[str, Attend] = {
    "sdpa": _sdpa,
    "flex": _flex,
    "xformers": _memory_efficient,
}
