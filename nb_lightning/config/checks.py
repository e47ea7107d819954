"""Check a config before anything is built. Each error names the YAML key and the allowed values.

The bounds of single values stand beside the fields in nb_lightning/config/schema.py; here are the conditions on several
values together. Like the schema this imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from nb_lightning.config.bounds import check_bounds, one_of
from nb_lightning.config.compose import plan_of
from nb_lightning.config.schema import (
    LINEARS,
    ChatDataConfig,
    Config,
    DPDConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    RLConfig,
)

# `_target_` runs code. Only these places may be named; a `pkg://` entry of hydra.searchpath adds its own package.
TRUSTED_TARGETS = ("callbacks.", "nb_lightning.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")


def check(cfg: Config, trusted_packages: Iterable[str] = ()) -> None:
    """Check that a config can work; nothing is rewritten.

    Args:
        cfg: The whole config, as `compose` or `resolve` return it.
        trusted_packages: Packages that a `_target_` may name beside `TRUSTED_TARGETS`.

    Raises:
        ValueError: The first mistake; names the key and what is allowed.
    """
    stage, trainer = cfg.stage, cfg.trainer
    check_bounds(trainer, "trainer")
    check_bounds(cfg.model, "model")
    check_bounds(stage, "stage")
    check_bounds(stage.optim, "stage.optim")
    check_bounds(cfg.data, "data")
    if cfg.model.n_heads % cfg.model.n_kv_heads:
        raise ValueError(f"model.n_heads {cfg.model.n_heads} is not a multiple of n_kv_heads {cfg.model.n_kv_heads}")
    if cfg.model.head_dim % 2:
        raise ValueError(f"model.head_dim is {cfg.model.head_dim}; rotary positions need an even one")
    ranks = trainer.devices * trainer.num_nodes
    if trainer.strategy == "single" and ranks > 1:
        raise ValueError(
            f"trainer.strategy=single runs one process, but devices x num_nodes is {ranks}; use ddp or fsdp"
        )
    if stage.optim.name != "adamw" and trainer.strategy == "fsdp":
        raise ValueError(f"stage.optim.name={stage.optim.name} does not work with trainer.strategy=fsdp; use adamw")
    _check_adapter(cfg)
    if isinstance(stage, DPDConfig):
        _check_dpd(cfg, stage)
    if isinstance(stage, RLConfig):
        _check_rl(cfg, stage, ranks)
    if isinstance(stage, RewardModelConfig):
        _check_reward_model(cfg)
    if cfg.ckpt_path and cfg.init_from and stage.adapter.name == "none":
        raise ValueError(
            "ckpt_path and init_from are both set: ckpt_path (or resume=true) continues this very run with its "
            "optimizer and position, init_from starts a new run from another one's weights; choose one"
        )
    if not cfg.run_name or os.sep in cfg.run_name or cfg.run_name.startswith("."):
        raise ValueError(f"run_name is {cfg.run_name!r}; it names a folder below paths.runs, without '{os.sep}'")
    in_whole_rows = not isinstance(stage, RLConfig)  # a rollout's completions fill as many rows as they need
    plan_of(stage).validate("stage.phases", cfg.data.sources, ranks, whole_rows=in_whole_rows)
    check_targets({"callbacks": cfg.callbacks, "logger": cfg.logger}, trusted_packages)


def _check_adapter(cfg: Config) -> None:
    adapter, key = cfg.stage.adapter, "stage.adapter"
    if adapter.name == "none":
        return
    check_bounds(adapter, key)
    if not adapter.targets:
        raise ValueError(f"{key}.targets is empty; allowed: {', '.join(LINEARS)}")
    for i, target in enumerate(adapter.targets):
        one_of(*LINEARS).require(f"{key}.targets[{i}]", target)
    for i, name in enumerate(adapter.also_train):
        one_of("embedding", "head").require(f"{key}.also_train[{i}]", name)
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


def _check_dpd(cfg: Config, stage: DPDConfig) -> None:
    if not (stage.dpo_weight or stage.lambda_plus or stage.lambda_minus):
        raise ValueError("stage.dpo_weight, lambda_plus, lambda_minus are all 0: nothing is trained")
    cached = isinstance(cfg.data, PreferenceDataConfig) and cfg.data.cached_teacher
    if (stage.lambda_plus or stage.lambda_minus) and not (stage.teacher or cached):
        raise ValueError(
            "stage.lambda_plus and lambda_minus weigh distances to a teacher: name it with stage.teacher=, set "
            "data.cached_teacher=true where its log-probabilities are beside the samples, or set both to 0"
        )
    if stage.teacher and cached:
        raise ValueError("stage.teacher and data.cached_teacher=true are two teachers; choose one (stage.teacher=null)")
    if not 0 <= stage.label_smoothing < 0.5 or (stage.label_smoothing and stage.variant != "sigmoid"):
        raise ValueError(
            f"stage.label_smoothing is {stage.label_smoothing}; it must be from 0 to below 0.5, and 0 unless "
            "stage.variant=sigmoid"
        )
    if stage.teacher_nf4 and cfg.trainer.strategy == "fsdp":
        raise ValueError(
            "stage.teacher_nf4=true does not work with trainer.strategy=fsdp (4-bit weights cannot be sharded); "
            "without it the teacher is sharded"
        )
    bases = {name: phase.rope_theta for name, phase in stage.phases.items()}
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


def _check_rl(cfg: Config, stage: RLConfig, ranks: int) -> None:
    if stage.group_size < 2:
        raise ValueError(
            "stage.group_size is 1; a reward is compared with those of the group, so it must be at least 2"
        )
    if stage.clip_low >= 1:
        raise ValueError(f"stage.clip_low is {stage.clip_low}; a ratio is positive, so it must be below 1")
    for name, phase in stage.phases.items():
        key = f"stage.phases.{name}"
        check_bounds(phase, key)
        if phase.prompts % ranks:
            raise ValueError(
                f"{key}.prompts is {phase.prompts}; a prompt's group stays on one rank, so it must be a "
                f"multiple of {ranks} data-parallel rank(s)"
            )
        if phase.seq_len <= stage.max_new_tokens:
            raise ValueError(
                f"{key}.seq_len is {phase.seq_len}: with stage.max_new_tokens={stage.max_new_tokens} it "
                "leaves no room for a prompt"
            )
    if not (cfg.init_from or cfg.resume or cfg.ckpt_path or cfg.dry_run):
        raise ValueError("stage=rl needs init_from: the model it begins with, after SFT or DPD")
    if stage.kl_weight and not (cfg.init_from or cfg.dry_run):
        raise ValueError("stage.kl_weight needs init_from, with resume=true too: the weights there are its reference")


def _check_reward_model(cfg: Config) -> None:
    if isinstance(cfg.data, ChatDataConfig) and cfg.data.tasks:
        raise ValueError("data.tasks are answered, and a reward model only compares answers; set data.tasks=[]")


def check_targets(node: Any, trusted_packages: Iterable[str] = (), path: str = "") -> None:
    """Refuse any `_target_` outside `TRUSTED_TARGETS` and the packages the user named on the command line.

    Args:
        node: Plain dicts and lists.
        trusted_packages: See `check`.
        path: The node's YAML key, for the error message.
    """
    allowed = (*TRUSTED_TARGETS, *(f"{package}." for package in trusted_packages))
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not (isinstance(target, str) and target.startswith(allowed)):
            raise ValueError(
                f"{path}._target_ is {target!r}; allowed prefixes: {', '.join(allowed)} "
                "(an extension's package is added by 'hydra.searchpath=[pkg://its_package.conf]')"
            )
        for key, value in node.items():
            check_targets(value, trusted_packages, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_targets(value, trusted_packages, f"{path}[{i}]")
