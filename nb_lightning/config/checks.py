"""What cannot work, said before anything is built: one error that names the YAML key and what is allowed.

Like the schema (nb_lightning/config/schema.py) this imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.config.compose import plan_of
from nb_lightning.config.schema import LINEARS, Config

# `_target_` runs code. Only these places may be named; a `pkg://` entry of hydra.searchpath adds its own package.
TRUSTED_TARGETS = ("callbacks.", "nb_lightning.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")
# As in nb_lightning/losses/dpd.py and divergence.py, which import torch.
DPO_VARIANTS = ("sigmoid", "hinge", "ipo")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
NORMALISATIONS = ("token", "sequence", "constant")
REWARD_LOSSES = ("bradley_terry", "cross_entropy")


def check(cfg: Config, trusted_packages: Iterable[str] = ()) -> None:
    """Raise one `ValueError` that names the key and what is allowed, for the first thing that cannot work.

    Checks only; nothing is rewritten.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        _, _, by_resolver = reason.partition("raised while resolving interpolation: ")
        raise ValueError(by_resolver or f"{error.full_key}: {reason}") from error
    _one_of("trainer.accelerator", cfg.trainer.accelerator, ("auto", "cpu", "cuda"))
    _one_of("trainer.strategy", cfg.trainer.strategy, ("single", "ddp", "fsdp"))
    _one_of("trainer.precision", cfg.trainer.precision, ("32-true", "bf16-mixed", "bf16-true"))
    _one_of("trainer.attention", cfg.trainer.attention, ("auto", "sdpa", "flex", "xformers"))
    _one_of("stage.optim.name", cfg.stage.optim.name, ("adamw", "adamw8bit", "paged_adamw8bit"))
    for key in ("devices", "num_nodes", "log_every_n_steps", "val_every_n_steps", "save_every_n_steps", "keep_last"):
        _positive(f"trainer.{key}", getattr(cfg.trainer, key))
    for key in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "rope_theta"):
        _positive(f"model.{key}", getattr(cfg.model, key))
    _positive("stage.head_chunk", cfg.stage.head_chunk)
    _positive("stage.optim.clip_norm", cfg.stage.optim.clip_norm)
    _positive("data.val_rows", cfg.data.val_rows)
    if cfg.data.workers < 0:
        raise ValueError(f"data.workers is {cfg.data.workers}; it must not be negative")
    if cfg.stage.total_tokens is not None:
        _positive("stage.total_tokens", cfg.stage.total_tokens)
    if cfg.model.n_heads % cfg.model.n_kv_heads:
        raise ValueError(f"model.n_heads {cfg.model.n_heads} is not a multiple of n_kv_heads {cfg.model.n_kv_heads}")
    if cfg.model.head_dim % 2:
        raise ValueError(f"model.head_dim is {cfg.model.head_dim}; rotary positions need an even one")
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    if cfg.trainer.strategy == "single" and ranks > 1:
        raise ValueError(
            f"trainer.strategy=single runs one process, but devices x num_nodes is {ranks}; use ddp or fsdp"
        )
    if cfg.stage.optim.name != "adamw" and cfg.trainer.strategy == "fsdp":
        raise ValueError(f"stage.optim.name={cfg.stage.optim.name} does not work with trainer.strategy=fsdp; use adamw")
    _check_adapter(cfg)
    if cfg.stage.name == "dpd":
        _check_dpd(cfg)
    if cfg.stage.name == "rl":
        _check_rl(cfg, ranks)
    if cfg.stage.name == "reward_model":
        _check_reward_model(cfg)
    if cfg.ckpt_path and cfg.init_from and cfg.stage.adapter.name == "none":
        raise ValueError(
            "ckpt_path and init_from are both set: ckpt_path (or resume=true) continues this very run with its "
            "optimizer and position, init_from starts a new run from another one's weights; choose one"
        )
    if not cfg.run_name or os.sep in cfg.run_name or cfg.run_name.startswith("."):
        raise ValueError(f"run_name is {cfg.run_name!r}; it names a folder below paths.runs, without '{os.sep}'")
    packed = cfg.stage.name == "rl"  # completions, as they come
    plan_of(cfg.stage).validate("stage.phases", cfg.data.sources, ranks, whole_rows=not packed)
    check_targets({"callbacks": cfg.callbacks, "logger": cfg.logger}, trusted_packages)


def _check_adapter(cfg: Config) -> None:
    adapter, key = cfg.stage.adapter, "stage.adapter"
    _one_of(f"{key}.name", adapter.name, ("none", "lora", "qlora"))
    if adapter.name == "none":
        return
    _positive(f"{key}.rank", adapter.rank)
    _positive(f"{key}.alpha", adapter.alpha)
    if not 0 <= adapter.dropout < 1:
        raise ValueError(f"{key}.dropout is {adapter.dropout}; it must be from 0 to below 1")
    if not adapter.targets:
        raise ValueError(f"{key}.targets is empty; allowed: {', '.join(LINEARS)}")
    for i, target in enumerate(adapter.targets):
        _one_of(f"{key}.targets[{i}]", target, LINEARS)
    for i, name in enumerate(adapter.also_train):
        _one_of(f"{key}.also_train[{i}]", name, ("embedding", "head"))
    _one_of(f"{key}.compute_dtype", adapter.compute_dtype, ("auto", "float32", "bfloat16"))
    if adapter.name == "qlora" and cfg.trainer.strategy == "fsdp":
        raise ValueError(
            f"{key}.name=qlora does not work with trainer.strategy=fsdp (4-bit weights cannot be sharded); use lora, "
            "or trainer.strategy=single or ddp"
        )
    if not cfg.init_from and not cfg.dry_run:
        raise ValueError(
            f"{key}.name={adapter.name} needs init_from, with resume=true too: adapters train on a base that stays as "
            "it is, and their checkpoints do not hold it"
        )


def _check_dpd(cfg: Config) -> None:
    s: Any = cfg.stage
    weights = {key: getattr(s, key) for key in ("dpo_weight", "lambda_plus", "lambda_minus")}
    for key, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"stage.{key} is {value}; it must be finite and not negative")
    if not any(weights.values()):
        raise ValueError(f"stage.{', '.join(weights)} are all 0: nothing is trained")
    cached = getattr(cfg.data, "cached_teacher", False)
    if (s.lambda_plus or s.lambda_minus) and not (s.teacher or cached):
        raise ValueError(
            "stage.lambda_plus and lambda_minus weigh distances to a teacher: name it with stage.teacher=, set "
            "data.cached_teacher=true where its log-probabilities are beside the samples, or set both to 0"
        )
    if s.teacher and cached:
        raise ValueError("stage.teacher and data.cached_teacher=true are two teachers; choose one (stage.teacher=null)")
    _positive("stage.beta", s.beta)
    _one_of("stage.variant", s.variant, DPO_VARIANTS)
    if not 0 <= s.label_smoothing < 0.5 or (s.label_smoothing and s.variant != "sigmoid"):
        raise ValueError(
            f"stage.label_smoothing is {s.label_smoothing}; it must be from 0 to below 0.5, and 0 unless "
            "stage.variant=sigmoid"
        )
    _one_of("stage.divergence", s.divergence, DIVERGENCES)
    if not 0 < s.jsd_beta < 1:
        raise ValueError(f"stage.jsd_beta is {s.jsd_beta}; it must lie between 0 and 1")
    if not 0 < s.temperature < math.inf:
        raise ValueError(f"stage.temperature is {s.temperature}; it must be a positive number")
    if s.teacher_nf4 and cfg.trainer.strategy == "fsdp":
        raise ValueError(
            "stage.teacher_nf4=true does not work with trainer.strategy=fsdp (4-bit weights cannot be sharded); "
            "without it the teacher is sharded"
        )
    bases = {name: phase.rope_theta for name, phase in s.phases.items()}
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"{name} {base:g}" for name, base in bases.items())
        raise ValueError(
            f"stage.phases have different rope_theta ({listed}): the reference's log-probabilities are computed once, "
            "with one"
        )
    if not (cfg.init_from or cfg.resume or cfg.ckpt_path or cfg.dry_run):
        raise ValueError(
            "stage=dpd needs init_from: the model it begins with, after SFT, is its reference (resume=true continues a "
            "run without it)"
        )


def _check_rl(cfg: Config, ranks: int) -> None:
    s: Any = cfg.stage
    for key in ("group_size", "max_new_tokens", "max_batch", "updates_per_rollout"):
        _positive(f"stage.{key}", getattr(s, key))
    if s.group_size < 2:
        raise ValueError(
            "stage.group_size is 1; a reward is compared with those of the group, so it must be at least 2"
        )
    for key in ("clip_low", "clip_high", "kl_weight", "extra_rounds"):
        if not 0 <= getattr(s, key) < math.inf:
            raise ValueError(f"stage.{key} is {getattr(s, key)}; it must be finite and not negative")
    if s.clip_low >= 1:
        raise ValueError(f"stage.clip_low is {s.clip_low}; a ratio is positive, so it must be below 1")
    _one_of("stage.normalisation", s.normalisation, NORMALISATIONS)
    for name, phase in s.phases.items():
        for key in ("steps", "prompts"):
            _positive(f"stage.phases.{name}.{key}", getattr(phase, key))
        if phase.prompts % ranks:
            raise ValueError(
                f"stage.phases.{name}.prompts is {phase.prompts}; a prompt's group stays on one rank, so it must be a "
                f"multiple of {ranks} data-parallel rank(s)"
            )
        if phase.seq_len <= s.max_new_tokens:
            raise ValueError(
                f"stage.phases.{name}.seq_len is {phase.seq_len}: with stage.max_new_tokens={s.max_new_tokens} it "
                "leaves no room for a prompt"
            )
    if not (cfg.init_from or cfg.resume or cfg.ckpt_path or cfg.dry_run):
        raise ValueError("stage=rl needs init_from: the model it begins with, after SFT or DPD")
    if s.kl_weight and not (cfg.init_from or cfg.dry_run):
        raise ValueError("stage.kl_weight needs init_from, with resume=true too: the weights there are its reference")


def _check_reward_model(cfg: Config) -> None:
    stage: Any = cfg.stage
    _one_of("stage.loss", stage.loss, REWARD_LOSSES)
    if getattr(cfg.data, "tasks", None):
        raise ValueError("data.tasks are answered, and a reward model only compares answers; set data.tasks=[]")


def check_targets(nodes: Any, trusted_packages: Iterable[str] = (), path: str = "") -> None:
    """Refuse any `_target_` outside `TRUSTED_TARGETS` and the packages the user named on the command line."""
    allowed = (*TRUSTED_TARGETS, *(f"{package}." for package in trusted_packages))
    if OmegaConf.is_config(nodes):
        nodes = OmegaConf.to_container(nodes, resolve=True)
    if isinstance(nodes, dict):
        target = nodes.get("_target_")
        if target is not None and not (isinstance(target, str) and target.startswith(allowed)):
            raise ValueError(
                f"{path}._target_ is {target!r}; allowed prefixes: {', '.join(allowed)} "
                "(an extension's package is added by 'hydra.searchpath=[pkg://its_package.conf]')"
            )
        for key, value in nodes.items():
            check_targets(value, trusted_packages, f"{path}.{key}" if path else str(key))
    elif isinstance(nodes, list):
        for i, value in enumerate(nodes):
            check_targets(value, trusted_packages, f"{path}[{i}]")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def _positive(key: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{key} is {value}; it must be positive")
