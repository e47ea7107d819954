"""What a run would be, without running it: plan, parameters, FLOPs, memory per device."""

from __future__ import annotations

import torch

from nb_lightning.adapters import trained_parameters
from nb_lightning.config import Config, plain, plan_of
from nb_lightning.memory import memory_per_device
from nb_lightning.model import ModelShape, Transformer

GIB = 2**30


def describe(cfg: Config) -> str:
    """A readable report. The model is built on `meta`: its parameters are counted, not computed."""
    planned, plan = plan_of(cfg.stage), plan_of(cfg.stage).in_whole_steps()
    shape = ModelShape(**plain(cfg.model))
    with torch.device("meta"):
        number = sum(p.numel() for p in Transformer(shape).parameters())
    embeddings = shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    adapted, trained = cfg.stage.adapter.name != "none", trained_parameters(shape, cfg.stage.adapter)
    lines = [
        f"stage {cfg.stage.name}, {ranks} device(s), {cfg.trainer.strategy}, {cfg.trainer.precision}",
        f"model       {number:,} parameters ({number - embeddings:,} without embeddings)",
        *([f"adapters    {trained:,} parameters train ({100 * trained / number:.2g} %)"] if adapted else []),
        "",
        f"{'phase':<28}{'tokens planned':>20}{'as run':>22}{'steps':>12}{'seq_len':>9}{'RoPE base':>12}{'lr':>22}",
    ]
    flops = 0.0
    for before, phase in zip(planned.phases, plan.phases):
        flops += phase.tokens * shape.flops_per_token(phase.seq_len, frozen=adapted)
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
    if cfg.stage.optim.name.startswith("paged"):
        lines.append(f"  and the optimizer's state, {2 * trained / GIB:.2f} GiB, in the host's memory (paged)")
    if cfg.stage.name == "rl":
        lines.insert(
            -len(memory) - 2, "            at most: completions as long as they may be; sampling them comes on top"
        )
        lines.append(
            f"  and keys and values of the completions being sampled, at most {_cache(cfg, shape) / GIB:.2f} GiB"
        )
    if getattr(cfg.stage, "teacher", None):
        lines.append("  and the weights of stage.teacher with a chunk of its logits: not counted")
    return "\n".join(lines)


def _cache(cfg: Config, shape: ModelShape) -> float:
    """Bytes of the KV cache with `stage.max_batch` rows of the longest phase."""
    longest = max(phase.seq_len for phase in cfg.stage.phases.values())
    width = 4 if cfg.trainer.precision == "32-true" else 2
    return 2 * width * cfg.stage.max_batch * longest * shape.n_layers * shape.n_kv_heads * shape.head_dim
