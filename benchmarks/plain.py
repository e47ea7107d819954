"""The floor: a Llama and a training loop as one would write them by hand, with torch alone.

Same maths as nb_lightning.model.transformer.Transformer: SDPA, fused AdamW, q, k and v from one matrix product. Gate
and up stay two products: one was no faster, compiled or not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import ADAM_EPS, BETAS, CLIP, LR, Shape


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads = (s.heads, s.kv_heads, s.head_dim)
        self.norm_1, self.norm_2 = Norm(s.dim, s.eps), Norm(s.dim, s.eps)
        self.qkv = nn.Linear(s.dim, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.dim, bias=False)
        self.gate, self.up = nn.Linear(s.dim, s.mlp, bias=False), nn.Linear(s.dim, s.mlp, bias=False)
        self.down = nn.Linear(s.mlp, s.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int] | None = None) -> Tensor:
        B, T, _ = x.shape
        H, K, E = self.heads
        qk, v = self.qkv(self.norm_1(x)).view(B, T, H + 2 * K, E).split((H + K, K), 2)
        q, k = rotate(qk, cos, sin).split((H, K), 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if lengths is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            documents = zip(*(t.split(lengths, 2) for t in (q, k, v)))
            a = torch.cat([F.scaled_dot_product_attention(*d, is_causal=True, enable_gqa=True) for d in documents], 2)
        x = x + self.out(a.transpose(1, 2).reshape(B, T, H * E))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, s: Shape, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.dim)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = Norm(s.dim, s.eps)
        self.head = nn.Linear(s.dim, s.vocab, bias=False)
        angles = torch.outer(torch.arange(seq_len).float(), s.theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim))
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None], persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy; both [B, T] int64."""
        return F.cross_entropy(self.head(self.hidden(input_ids)).flatten(0, 1).float(), labels.flatten())

    def hidden(self, input_ids: Tensor, positions: Tensor | None = None, lengths: list[int] | None = None) -> Tensor:
        """[B, T, D] after the last norm; with `lengths`, of the documents of one flat row, at `positions` [T]."""
        x = self.embedding(input_ids)
        cos, sin = (t.to(x.dtype) for t in (self.cos, self.sin))
        if positions is not None:
            cos, sin = cos[:, positions], sin[:, positions]
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.norm(x)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a `Transformer` of the same shape."""
        self.embedding.weight.copy_(weights["embedding.weight"])
        self.norm.weight.copy_(weights["norm.weight"])
        self.head.weight.copy_(weights["head.weight"])
        for i, block in enumerate(self.blocks):
            for mine, theirs in BLOCK_WEIGHTS.items():
                parts = [weights[f"layers.{i}.{name}.weight"] for name in theirs]
                block.get_submodule(mine).weight.copy_(torch.cat(parts))


BLOCK_WEIGHTS = {
    "norm_1": ("attention_norm",),
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "out": ("attention.o_proj",),
    "norm_2": ("mlp_norm",),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
