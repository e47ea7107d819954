"""The keys and values of rows that are being generated, and attention to them.

The cache holds one tensor of keys and one of values a layer, [slots, K, capacity, E], which grow with the longest row.
A forward of the model gets a `Prefill` or `Decode` in place of its `AttentionMask`. Each layer in turn calls its
`attend`, which writes the layer's k and v to the cache before it attends.

B rows, N tokens of all prompts, H query heads, K key-value heads, E head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nb_lightning.model.attention import AttentionMask

MIN_CAPACITY = 64  # tokens a row, of a new cache


class KVCache:
    """The keys and values of up to `slots` rows; the tokens of a row are at 0, 1, 2, ... of its slot."""

    def __init__(self, slots: int) -> None:
        self.slots, self.capacity = slots, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens, and keep the tokens that are there."""
        if tokens <= self.capacity:
            return
        self.capacity = max(MIN_CAPACITY, self.capacity)
        while self.capacity < tokens:
            self.capacity *= 2
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._empty(old)
                tensors[layer][:, :, : old.shape[2]] = old

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer; its first use makes them with dtype and device of `like` [.., K, .., E].

        Returns:
            Two tensors [slots, K, capacity, E].
        """
        if index == len(self.keys):
            self.keys.append(self._empty(like))
            self.values.append(self._empty(like))
        return self.keys[index], self.values[index]

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: masked values are multiplied by a weight of 0, and 0 x NaN is NaN.
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3])

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a slot to another slot."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :tokens] = tensor[source, :, :tokens]


class Prefill:
    """Attention of complete prompts, packed one after the other in one row; prompt i goes to slot `slots[i]`."""

    def __init__(self, cache: KVCache, backend: str, cu_seqlens: Tensor, slots: list[int]) -> None:
        self.cache, self.slots = cache, slots
        self.packed = AttentionMask(backend, cu_seqlens)
        self.longest = max(self.packed.lengths)
        self._layer = 0

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Prefill) -> Tensor:
        """Attend within each prompt: q [1, N, H, E], k and v [1, N, K, E] -> [1, N, H, E]."""
        keys, values = self.cache.layer(self._layer, k.transpose(1, 2))
        self._layer += 1
        for tensor, new in ((keys, k), (values, v)):
            for slot, prompt in zip(self.slots, new[0].split(self.packed.lengths)):  # [tokens, K, E]
                tensor[slot, :, : len(prompt)] = prompt.transpose(0, 1)
        return self.packed.attend(q, k, v, self.packed)


class Decode:
    """Attention of the next token of the rows in slots 0 .. B - 1; that of row b is at position `lengths[b]`."""

    def __init__(self, cache: KVCache, lengths: list[int], device: torch.device) -> None:
        self.cache, self.longest = cache, max(lengths) + 1
        self.rows = torch.arange(len(lengths), device=device)
        self.positions = torch.tensor(lengths, device=device)
        self._equal_lengths = min(lengths) == max(lengths)
        self._bias: Tensor | None = None
        self._layer = 0

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Decode) -> Tensor:
        """Attend to the cache: q [B, 1, H, E], k and v [B, 1, K, E] -> [B, 1, H, E]."""
        keys, values = self.cache.layer(self._layer, k.transpose(1, 2))
        self._layer += 1
        keys[self.rows, :, self.positions] = k[:, 0]
        values[self.rows, :, self.positions] = v[:, 0]
        B, _, H, E = q.shape
        # The query heads that share a key-value head become the tokens of its query, so no key is copied for them.
        q = q.view(B, k.shape[2], H // k.shape[2], E)  # [B, K, H / K, E]
        keys, values = keys[:B, :, : self.longest], values[:B, :, : self.longest]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask(q)).reshape(B, 1, H, E)

    def _mask(self, q: Tensor) -> Tensor | None:
        """Return 0 where a row has a token, else -inf: [B, 1, 1, longest]; None if all rows are equally long."""
        if self._bias is None and not self._equal_lengths:
            beyond = torch.arange(self.longest, device=q.device) > self.positions[:, None]
            self._bias = q.new_zeros(beyond.shape).masked_fill_(beyond, float("-inf"))[:, None, None]
        return self._bias
