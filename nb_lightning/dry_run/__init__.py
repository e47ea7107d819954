"""`dry_run=true`: describe a run without running it: plan, parameters, FLOPs, memory per device, missing files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from nb_lightning.checkpoints.pretrained import Origin, find_origin
from nb_lightning.config.compose import builds_demo_data, phases_of, plan_of
from nb_lightning.config.schema import ChatDataConfig, Config, DPDConfig, RLConfig
from nb_lightning.dry_run.memory import kv_cache_bytes, memory_per_device
from nb_lightning.model.adapters import count_trained_parameters
from nb_lightning.model.transformer import ModelShape, Transformer

GIB = 2**30
LARGE_GPU = 80 * GIB  # above this the report says what takes less


def describe(cfg: Config) -> str:
    """Write the report. The model is built on `meta`, so that its parameters are counted and not allocated."""
    planned, plan = plan_of(cfg.stage), plan_of(cfg.stage).in_whole_steps()
    shape = ModelShape(**asdict(cfg.model))
    with torch.device("meta"):
        number = sum(p.numel() for p in Transformer(shape).parameters())
    embeddings = shape.vocab_size * shape.d_model * (1 if shape.tie_embeddings else 2)
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    adapted, trained = cfg.stage.adapter.name != "none", count_trained_parameters(shape, cfg.stage.adapter)
    lines = [
        f"stage {cfg.stage.name}, {ranks} device(s), {cfg.trainer.strategy}, {cfg.trainer.precision}",
        f"model       {number:,} parameters ({number - embeddings:,} without embeddings)",
        *([f"adapters    {trained:,} parameters train ({100 * trained / number:.2g} %)"] if adapted else []),
        "",
        f"{'phase':<28}{'tokens planned':>20}{'as run':>22}{'steps':>12}{'seq_len':>9}{'RoPE base':>12}{'lr':>22}",
    ]
    frozen = frozen_models(cfg, shape)
    flops = 0.0
    for before, phase in zip(planned.phases, plan.phases):
        flops += phase.tokens * shape.flops_per_token(phase.seq_len, frozen=adapted)
        if "teacher" in frozen:  # a forward is a third of forward and backward
            flops += phase.tokens * frozen["teacher"].flops_per_token(phase.seq_len) / 3
        rate = f"{phase.lr.start:g}" if phase.lr.end is None else f"{phase.lr.start:g} to {phase.lr.end:g}"
        lines.append(
            f"{phase.name:<28}{before.tokens:>20,}{phase.tokens:>22,}{phase.steps:>12,}{phase.seq_len:>9}"
            f"{phase.rope_theta:>12g}{rate:>22}"
        )
        lines.append("  " + ", ".join(f"{name} {weight:.4g}" for name, weight in phase.mixture.items()))
    rollouts = isinstance(cfg.stage, RLConfig)
    lines += [
        f"{'all':<28}{planned.total_tokens:>20,}{plan.total_tokens:>22,}{plan.total_steps:>12,}",
        "",
        f"compute     {flops:.3g} FLOP forward and backward{', the teacher forward' if 'teacher' in frozen else ''} "
        "(causal attention, nothing recomputed)",
        *(["            at most: completions as long as they may be; sampling them comes on top"] if rollouts else []),
        "memory per device, estimated, at the largest micro-batch:",
    ]
    micro_tokens = max(phase.seq_len * phase.micro_batch_size for phase in plan.phases)
    memory = memory_per_device(cfg, shape, micro_tokens, frozen)
    lines += [f"  {name:<18}{size / GIB:>10.2f} GiB" for name, size in memory.items()]
    lines.append(f"  {'all':<18}{sum(memory.values()) / GIB:>10.2f} GiB")
    if sum(memory.values()) > LARGE_GPU:
        lines.append(f"  more than a GPU of {LARGE_GPU // GIB} GiB holds; less with")
        lines += [f"    {option}" for option in _smaller(cfg, memory)]
    if cfg.stage.optim.name.startswith("paged"):
        lines.append(f"  and the optimizer's state, {2 * trained / GIB:.2f} GiB, in the host's memory (paged)")
    if isinstance(cfg.stage, RLConfig):
        cache = kv_cache_bytes(cfg.stage, cfg.trainer, shape)
        lines.append(f"  and keys and values of the completions being sampled, at most {cache / GIB:.2f} GiB")
    absent = missing(cfg)
    if absent:
        lines.append("not there yet:")
    width = max(map(len, absent), default=0)
    for key, path in absent.items():
        counted = ", counted as large as the model" if key in ("stage.teacher", "stage.reward_model") else ""
        lines.append(f"  {key:<{width}}  {path}{counted}")
    return "\n".join(lines)


def _smaller(cfg: Config, memory: Mapping[str, float]) -> list[str]:
    """List the options that the run does not use and that take less memory, the largest saving first."""
    state = sum(memory.get(name, 0.0) for name in ("weights", "gradients", "optimizer"))
    options = {}
    if not cfg.trainer.activation_checkpointing:
        options["trainer.activation_checkpointing=true keeps the input of each layer alone"] = memory["activations"]
    if cfg.trainer.strategy != "fsdp":
        options["trainer=fsdp shards weights, gradients and optimizer over the devices"] = state
    if cfg.stage.adapter.name == "none":
        options["stage.adapter.name=qlora trains adapters beside frozen weights in 4 bits"] = state
    return sorted(options, key=lambda option: -options[option])


def frozen_models(cfg: Config, shape: ModelShape) -> dict[str, ModelShape]:
    """Return the shapes of the frozen models that a stage holds, by their names in the table.

    Args:
        shape: of the model that trains; a frozen model that is not there yet counts as large.
    """
    shapes = {}
    for key, path in _model_paths(cfg).items():
        if path:
            origin = _find_origin_or_none(path)
            shapes[key.replace("_", " ")] = origin.shape if origin else shape
    if isinstance(cfg.stage, RLConfig) and cfg.stage.kl_weight:
        shapes["reference"] = shape
    return shapes


def _model_paths(cfg: Config) -> dict[str, str | None]:
    """Return the paths of the models that a stage reads beside `init_from`, by their keys under `stage:`."""
    if isinstance(cfg.stage, DPDConfig):
        return {"teacher": cfg.stage.teacher}
    if isinstance(cfg.stage, RLConfig):
        return {"reward_model": cfg.stage.reward_model}
    return {}


def missing(cfg: Config) -> dict[str, str]:
    """Return what the run reads and is not there yet: YAML key -> path.

    Demo data, which the run builds, and s3:// addresses are left out.
    """
    data = cfg.data
    models = {"init_from": cfg.init_from, **{f"stage.{key}": path for key, path in _model_paths(cfg).items()}}
    files: dict[str, str | None] = {}
    if isinstance(data, ChatDataConfig):
        files["data.template"] = data.template
    if data.tokenizer != "bytes":
        files["data.tokenizer"] = data.tokenizer
    if not builds_demo_data(data):
        drawn = {name for phase in phases_of(cfg.stage).values() for name, weight in phase.mixture.items() if weight}
        files |= {f"data.sources.{name}": path for name, path in data.sources.items() if name in drawn}
        tasks = data.tasks if isinstance(data, ChatDataConfig) else []
        files |= {f"data.tasks[{i}]": path for i, path in enumerate(tasks)}
    return {
        **{key: path for key, path in models.items() if path and not _find_origin_or_none(path)},
        **{key: path for key, path in files.items() if path and "://" not in path and not Path(path).exists()},
    }


def _find_origin_or_none(path: str) -> Origin | None:
    try:
        return find_origin(path, verify=False)
    except ValueError:
        return None
