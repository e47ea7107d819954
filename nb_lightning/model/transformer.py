"""The backbone: a plain Llama-style decoder (Nanbeige4-3B report, section "Architecture").

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
    """What a layer attends through; see `attention` for the contract of `attend`.

    `longest` bounds the positions of the forward from above; None stands for the rows' length.
    """

    longest: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor: ...


@torch.no_grad()
def copy_into(parameter: Tensor, whole: Tensor) -> None:
    """Fill a parameter, sharded or not, from the whole tensor that every rank holds; nothing is communicated."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes the parameters of a `Transformer`.

    `d_model` D, `d_mlp` F, `head_dim` E; `rope_theta` is the base the run starts with (a phase may raise it).
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

    def parameters(self) -> int:
        """Number of parameters."""
        D, E = self.d_model, self.head_dim
        layer = D * E * (2 * self.n_heads + 2 * self.n_kv_heads) + 3 * D * self.d_mlp + 2 * D
        return self.n_layers * layer + D + self.vocab_size * D * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, seq_len: int, causal: bool = True, frozen: bool = False) -> float:
        """Floating-point operations per trained token, forward and backward, without recomputation.

        Six per weight of a matrix multiplication (the embedding look-up is none), four where the weights are frozen;
        plus attention's two products of `seq_len` x H x E; `causal` counts the half of them that a causal kernel does.
        """
        matmul = self.parameters() - self.d_model * (2 * self.n_layers + 1)
        if not self.tie_embeddings:
            matmul -= self.vocab_size * self.d_model
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return (4.0 if frozen else 6.0) * matmul + attention * (0.5 if causal else 1.0)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RoPE:
    """Rotary positions with a base that can change while training (ABF); holds no parameter and no buffer.

    The table is float32 and grows when longer rows come; `theta` may be set at any time.
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
        """Cosines and sines for `x` [B, T, D], each [1 or B, T, 1, E / 2] in the dtype of `x`.

        Positions are below `longest`, by default T: those of packed rows never pass the row's length.
        """
        T = x.shape[1]
        longest = longest or T
        table = self._table
        if table is None or table.shape[0] < longest or table.device != x.device:
            # torch.compile'd or meta callers see plain tensor ops only: the table is built outside the layers.
            with torch.inference_mode(False):  # else one made while generating could not serve training
                # Doubled: rows that grow token by token would build it anew for each.
                size = longest if table is None or table.device != x.device else max(longest, 2 * table.shape[0])
                half = torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim
                angles = torch.outer(torch.arange(size, device=x.device).float(), 1.0 / self._theta**half)
                table = self._table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        rows = table[:T].unsqueeze(0) if position_ids is None else table[position_ids]
        cos, sin = rows.unsqueeze(2).to(x.dtype).chunk(2, dim=-1)
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [B, T, H, E]: component e pairs with e + E / 2, as in released Llama weights.

    The result has the dtype of `x`: under autocast the angles are wider, and backends want q, k and v alike.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
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
    def __init__(self, s: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.d_model, s.d_mlp, bias=False)
        self.up_proj = nn.Linear(s.d_model, s.d_mlp, bias=False)
        self.down_proj = nn.Linear(s.d_mlp, s.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
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
    """Token ids in; whatever `head` makes of the last hidden states and the head's weight out.

    The head runs inside `forward` because under FSDP2 the weight is a whole tensor only there.
    """

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
        self.draws = False  # random numbers in a forward: recomputing it has to draw the same ones
        if not self.embedding.weight.is_meta:
            self.init_weights()

    def tie(self) -> None:
        """Make the head's weight the embedding's, if the shape says so; `to_empty` gives each a tensor of its own."""
        if self.shape.tie_embeddings:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Normal(0, init_std); what writes into the residual stream is scaled by 1 / sqrt(2 n_layers) (GPT-2).

        Each parameter draws from a generator of its own, so the weights depend on `seed` alone and not on the order,
        the device or the sharding: a sharded parameter keeps its part of the same whole.
        """
        std = self.shape.init_std
        residual = std / (2 * self.shape.n_layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            # The seed is hashed in: a CPU generator reads only the low 32 bits of what it is given.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else std
            whole = torch.empty(p.shape, dtype=torch.float32).normal_(std=scale, generator=generator)
            copy_into(p, whole)

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
            mask: what the layers attend through; by default made from `cu_seqlens`. A KV cache brings its own.
        """
        x = self.embedding(input_ids)
        mask = mask or AttentionMask(self.attention_backend, cu_seqlens)
        cos, sin = self.rope(x, position_ids, mask.longest)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=self.draws)
            else:
                x = layer(x, cos, sin, mask)
        return head(self.norm(x), self.head.weight)
