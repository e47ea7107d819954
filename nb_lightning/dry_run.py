"""What a run would be, without running it: plan, parameters, FLOPs, memory per device."""

from __future__ import annotations

from pathlib import Path

import torch

from nb_lightning.adapters import trained_parameters
from nb_lightning.config import Config, plain, plan_of
from nb_lightning.memory import memory_per_device
from nb_lightning.model import ModelShape, Transformer
from nb_lightning.pretrained import Origin, find

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
    frozen = beside(cfg, shape)
    flops = 0.0
    for before, phase in zip(planned.phases, plan.phases):
        flops += phase.tokens * shape.flops_per_token(phase.seq_len, frozen=adapted)
        if "teacher" in frozen:  # its forward
            flops += phase.tokens * frozen["teacher"].flops_per_token(phase.seq_len) / 3
        rate = f"{phase.lr.start:g}" if phase.lr.end is None else f"{phase.lr.start:g} to {phase.lr.end:g}"
        lines.append(
            f"{phase.name:<28}{before.tokens:>20,}{phase.tokens:>22,}{phase.steps:>12,}{phase.seq_len:>9}"
            f"{phase.rope_theta:>12g}{rate:>22}"
        )
        lines.append("  " + ", ".join(f"{name} {weight:.4g}" for name, weight in phase.mixture.items()))
    samples = cfg.stage.name == "rl"
    lines += [
        f"{'all':<28}{planned.total_tokens:>20,}{plan.total_tokens:>22,}{plan.total_steps:>12,}",
        "",
        f"compute     {flops:.3g} FLOP forward and backward{', the teacher forward' if 'teacher' in frozen else ''} "
        "(causal attention, nothing recomputed)",
        *(["            at most: completions as long as they may be; sampling them comes on top"] if samples else []),
        "memory per device, estimated, at the largest micro-batch:",
    ]
    micro_tokens = max(phase.seq_len * phase.micro_batch_size for phase in plan.phases)
    memory = memory_per_device(cfg, shape, micro_tokens, frozen)
    lines += [f"  {name:<18}{size / GIB:>10.2f} GiB" for name, size in memory.items()]
    lines.append(f"  {'all':<18}{sum(memory.values()) / GIB:>10.2f} GiB")
    if cfg.stage.optim.name.startswith("paged"):
        lines.append(f"  and the optimizer's state, {2 * trained / GIB:.2f} GiB, in the host's memory (paged)")
    if samples:
        lines.append(
            f"  and keys and values of the completions being sampled, at most {_cache(cfg, shape) / GIB:.2f} GiB"
        )
    absent = missing(cfg)
    if absent:
        lines.append("not there yet:")
    width = max(map(len, absent), default=0)
    for key, path in absent.items():
        counted = ", counted as large as the model" if key in ("stage.teacher", "stage.reward_model") else ""
        lines.append(f"  {key:<{width}}  {path}{counted}")
    return "\n".join(lines)


def beside(cfg: Config, shape: ModelShape) -> dict[str, ModelShape]:
    """The frozen models that a stage holds, by their names in the table.

    Args:
        shape: of the model that trains, and of what is not there yet.
    """
    found = {}
    for key, name in (("teacher", "teacher"), ("reward_model", "reward model")):
        path = getattr(cfg.stage, key, None)
        if path:
            origin = _model_at(path)
            found[name] = origin.shape if origin else shape
    if getattr(cfg.stage, "kl_weight", 0):
        found["reference"] = shape
    return found


def missing(cfg: Config) -> dict[str, str]:
    """What the run reads and is not there yet: YAML key -> path. Not what it makes by itself; no s3:// is asked."""
    stage, data = cfg.stage, cfg.data
    models = {"init_from": cfg.init_from}
    models |= {f"stage.{key}": getattr(stage, key, None) for key in ("teacher", "reward_model")}
    files = {"data.template": getattr(data, "template", None)}
    if data.tokenizer != "bytes":
        files["data.tokenizer"] = data.tokenizer
    if not (getattr(data, "demo_corpus", False) or getattr(data, "demo_tasks", False)):
        drawn = {name for phase in stage.phases.values() for name, weight in phase.mixture.items() if weight}
        files |= {f"data.sources.{name}": path for name, path in data.sources.items() if name in drawn}
        files |= {f"data.tasks[{i}]": path for i, path in enumerate(getattr(data, "tasks", []))}
    return {
        **{key: path for key, path in models.items() if path and not _model_at(path)},
        **{key: path for key, path in files.items() if path and "://" not in path and not Path(path).exists()},
    }


def _model_at(path: str) -> Origin | None:
    try:
        return find(path, verify=False)
    except ValueError:
        return None


def _cache(cfg: Config, shape: ModelShape) -> float:
    """Bytes of the KV cache with `stage.max_batch` rows of the longest phase."""
    longest = max(phase.seq_len for phase in cfg.stage.phases.values())
    width = 4 if cfg.trainer.precision == "32-true" else 2
    return 2 * width * cfg.stage.max_batch * longest * shape.n_layers * shape.n_kv_heads * shape.head_dim
