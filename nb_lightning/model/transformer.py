"""The backbone: a Llama-style decoder (Nanbeige4-3B report, section "Architecture").

Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases, untied head. Dimensions in comments:
B rows, T tokens per row, D model, H query heads, K key-value heads, E head dimension, F MLP, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from nb_lightning.model.attention import AttentionMask

R = TypeVar("R")


class Mask(Protocol):
    """How the layers of one forward attend: `attention.AttentionMask`, or a key-value cache.

    Attributes:
        longest: upper bound of the positions of this forward; None is the rows' length.
    """

    longest: int | None

    @property
    def attend(self) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        """Return the function that attention.py describes; it is called with the mask as last argument."""
        ...


@torch.no_grad()
def copy_into(parameter: Tensor, full: Tensor) -> None:
    """Copy the full tensor, which every rank holds, into a parameter, sharded or not; nothing is communicated."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


@dataclass(frozen=True)
class ModelShape:
    """Everything that determines the parameters of a `Transformer`.

    Attributes:
        d_model, d_mlp, head_dim: D, F and E.
        rope_theta: the base that the run starts with; a phase may raise it.
        init_std: standard deviation of the initial weights, see `Transformer.init_weights`.
        n_loops: passes through the stack of layers, with the same weights (Nanbeige4.2, arXiv 2607.22083).
        norm_every_loop: the final norm follows every pass; otherwise only the last one.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False
    init_std: float = 0.02
    n_loops: int = 1
    norm_every_loop: bool = True

    @property
    def depth(self) -> int:
        """Layers that a token passes. Each has its own keys and values, in each pass."""
        return self.n_layers * self.n_loops

    def count_parameters(self) -> int:
        """Count the parameters, tied ones once."""
        D, E = self.d_model, self.head_dim
        layer = D * E * (2 * self.n_heads + 2 * self.n_kv_heads) + 3 * D * self.d_mlp + 2 * D
        return self.n_layers * layer + D + self.vocab_size * D * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, seq_len: int, causal: bool = True, frozen: bool = False) -> float:
        """Count the floating-point operations per trained token, forward and backward, without recomputation.

        Six per weight of a matrix multiplication (the embedding look-up is none), four where the weights are frozen;
        plus attention's two products of `seq_len` x H x E.

        Args:
            causal: count only the half of attention's products that a causal kernel computes.
            frozen: no weight gets a gradient.
        """
        D, E = self.d_model, self.head_dim
        layer = D * E * (2 * self.n_heads + 2 * self.n_kv_heads) + 3 * D * self.d_mlp
        matmul = self.depth * layer + self.vocab_size * D
        attention = 12 * self.depth * self.n_heads * E * seq_len
        return (4.0 if frozen else 6.0) * matmul + attention * (0.5 if causal else 1.0)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, then scale (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RoPE:
    """Rotary positions with a base that can change during training (ABF); holds no parameter and no buffer.

    The table of cosines and sines is float32 and grows with the longest row. `theta` may be set at any time.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim = head_dim
        self._theta = theta
        self._table: Tensor | None = None

    @property
    def theta(self) -> float:
        return self._theta

    @theta.setter
    def theta(self, theta: float) -> None:
        if theta != self._theta:
            self._theta, self._table = theta, None

    def __call__(self, x: Tensor, position_ids: Tensor | None, longest: int | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for `x` [B, T, D], each [1 or B, T, 1, E / 2] in the dtype of `x`.

        Args:
            position_ids: [B, T] int64; None is 0..T-1 in every row.
            longest: upper bound of the positions, by default T: those of packed rows stay below the row's length.
        """
        T = x.shape[1]
        longest = longest or T
        table = self._table
        if table is None or table.shape[0] < longest or table.device != x.device:
            # Built outside the layers, so compiled and meta callers see plain tensor operations only.
            with torch.inference_mode(False):  # a table made during generation must serve training too
                # At least doubled: rows that grow token by token would otherwise rebuild it each time.
                size = longest if table is None or table.device != x.device else max(longest, 2 * table.shape[0])
                exponents = torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim  # [E / 2]
                angles = torch.outer(torch.arange(size, device=x.device).float(), 1.0 / self._theta**exponents)
                table = self._table = torch.cat((angles.cos(), angles.sin()), dim=-1)  # [size, E]
        rows = table[:T].unsqueeze(0) if position_ids is None else table[position_ids]
        cos, sin = rows.unsqueeze(2).to(x.dtype).chunk(2, dim=-1)
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [B, T, H, E]: component e pairs with e + E / 2, as in released Llama weights.

    The result has the dtype of `x`: under autocast the angles are wider, and backends need one dtype for q, k and v.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.head_dim = s.head_dim
        self.q_proj = nn.Linear(s.d_model, s.n_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.d_model, s.n_kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.d_model, s.n_kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.n_heads * s.head_dim, s.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = mask.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        return self.o_proj(out.reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.d_model, s.d_mlp, bias=False)
        self.up_proj = nn.Linear(s.d_model, s.d_mlp, bias=False)
        self.down_proj = nn.Linear(s.d_mlp, s.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual connection."""

    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(s.d_model, s.norm_eps)
        self.attention = Attention(s)
        self.mlp_norm = RMSNorm(s.d_model, s.norm_eps)
        self.mlp = SwiGLU(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The decoder: `forward` calls a `head` with the last hidden states and the head's weight.

    The head runs inside `forward` because under FSDP2 the weight is a full tensor only there.

    Attributes:
        attention_backend: see `attention.resolve_backend`.
        activation_checkpointing: recompute each layer in backward, in training mode.
        is_stochastic: a forward draws random numbers (dropout), so recomputing it has to draw the same ones.
        is_loaded_in_4bit: peft reads it.
    """

    is_loaded_in_4bit: bool = False

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        self.tie()
        self.rope = RoPE(shape.head_dim, shape.rope_theta)
        self.attention_backend = "sdpa"
        self.activation_checkpointing = False
        self.is_stochastic = False
        if not self.embedding.weight.is_meta:
            self.init_weights()

    def tie(self) -> None:
        """Make the head's weight the embedding's, if the shape ties them; needed again after `to_empty`."""
        if self.shape.tie_embeddings:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Draw from Normal(0, init_std); scale what writes into the residual stream by 1 / sqrt(2 depth) (GPT-2).

        Each parameter has a generator, so the weights depend on `seed` alone and not on the order, the device or the
        sharding: a sharded parameter keeps its part of the same full tensor.
        """
        std = self.shape.init_std
        residual_std = std / (2 * self.shape.depth) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            # The seed is hashed in: a CPU generator reads only the low 32 bits of its seed.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            std_of_p = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else std
            copy_into(p, torch.empty(p.shape, dtype=torch.float32).normal_(std=std_of_p, generator=generator))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        head: Callable[[Tensor, Tensor], R] = F.linear,  # type: ignore[assignment]
        mask: Mask | None = None,
    ) -> R:
        """Run the decoder.

        Args:
            input_ids: [B, T] int64.
            position_ids: [B, T] int64 or None for 0..T-1.
            cu_seqlens: [S + 1] int32 document boundaries over B * T tokens, or None.
            head: called with the hidden states [B, T, D] and the head's weight [V, D]; by default the logits.
            mask: how the layers attend; by default made from `cu_seqlens`. A key-value cache passes another.
        """
        x = self.embedding(input_ids)
        mask = mask or AttentionMask(self.attention_backend, cu_seqlens)
        cos, sin = self.rope(x, position_ids, mask.longest)
        for loop in range(self.shape.n_loops):
            if loop and self.shape.norm_every_loop:
                x = self.norm(x)
            for layer in self.layers:
                if self.activation_checkpointing and self.training:
                    x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=self.is_stochastic)
                else:
                    x = layer(x, cos, sin, mask)
        return head(self.norm(x), self.head.weight)
