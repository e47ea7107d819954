"""What a run would be, without running it: plan, parameters, FLOPs, memory per device."""

from __future__ import annotations

import torch

from nb_lightning.config import Config, plain, plan_of
from nb_lightning.model import ModelShape, Transformer

GIB = 2**30


def memory_per_device(cfg: Config, shape: ModelShape, micro_tokens: int) -> dict[str, float]:
    """Bytes on each device by use, an estimate to about 10-20 %.

    Weights, gradients and AdamW's two moments follow from the precision and the sharding. Activations count what
    autograd keeps of one micro-batch: with activation checkpointing each layer's input and one layer's inside, else
    every layer's inside.
    """
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes if cfg.trainer.strategy == "fsdp" else 1
    number = shape.parameters()
    weight = 2 if cfg.trainer.precision == "bf16-true" else 4
    moment = {"adamw": weight, "adamw8bit": 1, "paged_adamw8bit": 0}[cfg.stage.optim.name]
    compute = 4 if cfg.trainer.precision == "32-true" else 2
    D, F, E = shape.d_model, shape.d_mlp, shape.head_dim
    inside = compute * (4 * D + E * (2 * shape.n_heads + 2 * shape.n_kv_heads) + E * shape.n_heads + 4 * F)
    if cfg.trainer.activation_checkpointing:
        activations = micro_tokens * (shape.n_layers * compute * D + inside)
    else:
        activations = micro_tokens * shape.n_layers * inside
    head = cfg.stage.head_chunk * shape.vocab_size * 4 * 2 + shape.vocab_size * D * 4
    layer = (number - shape.vocab_size * D * 2) / max(shape.n_layers, 1)
    gathered = (layer + shape.vocab_size * D * 2) * compute if cfg.trainer.strategy == "fsdp" else 0
    return {
        "weights": number * weight / ranks,
        "gradients": number * weight / ranks,
        "optimizer": number * 2 * moment / ranks,
        "gathered layers": gathered,
        "activations": activations,
        "head": head,
    }


def describe(cfg: Config) -> str:
    """A readable report. The model is built on `meta`: its parameters are counted, not computed."""
    planned, plan = plan_of(cfg.stage), plan_of(cfg.stage).in_whole_steps()
    shape = ModelShape(**plain(cfg.model))
    with torch.device("meta"):
        number = sum(p.numel() for p in Transformer(shape).parameters())
    embeddings = shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    lines = [
        f"stage {cfg.stage.name}, {ranks} device(s), {cfg.trainer.strategy}, {cfg.trainer.precision}",
        f"model       {number:,} parameters ({number - embeddings:,} without embeddings)",
        "",
        f"{'phase':<28}{'tokens planned':>20}{'as run':>22}{'steps':>12}{'seq_len':>9}{'RoPE base':>12}{'lr':>22}",
    ]
    flops = 0.0
    for before, phase in zip(planned.phases, plan.phases):
        flops += phase.tokens * shape.flops_per_token(phase.seq_len)
        rate = f"{phase.lr.start:g}" if phase.lr.end is None else f"{phase.lr.start:g} to {phase.lr.end:g}"
        lines.append(
            f"{phase.name:<28}{before.tokens:>20,}{phase.tokens:>22,}{phase.steps:>12,}{phase.seq_len:>9}"
            f"{phase.rope_theta:>12g}{rate:>22}"
        )
        lines.append("  " + ", ".join(f"{name} {weight:.4g}" for name, weight in phase.mixture.items()))
    lines += [
        f"{'all':<28}{planned.total_tokens:>20,}{plan.total_tokens:>22,}{plan.total_steps:>12,}",
        "",
        f"compute     {flops:.3g} FLOP forward and backward (causal attention, nothing recomputed)",
        "memory per device, estimated, at the largest micro-batch:",
    ]
    micro_tokens = max(phase.seq_len * phase.micro_batch_size for phase in plan.phases)
    memory = memory_per_device(cfg, shape, micro_tokens)
    lines += [f"  {name:<18}{size / GIB:>10.2f} GiB" for name, size in memory.items()]
    lines.append(f"  {'all':<18}{sum(memory.values()) / GIB:>10.2f} GiB")
    return "\n".join(lines)
