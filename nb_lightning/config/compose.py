"""Compose the YAML files under conf/ into one `Config`; with `data/` and `train.py` the only place that knows Hydra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.config.composition_errors import explain, require_known_keys
from nb_lightning.config.schema import (
    AnyPhaseConfig,
    ChatDataConfig,
    Config,
    DataConfig,
    DPDConfig,
    ModelConfig,
    PhaseConfig,
    PreferenceDataConfig,
    PretrainConfig,
    PromptDataConfig,
    RewardModelConfig,
    RLConfig,
    RLPhaseConfig,
    SFTConfig,
    SFTDataConfig,
    StageConfig,
    TokensConfig,
    TrainerConfig,
)
from nb_lightning.phases import LearningRate, Phase, PhasePlan

# stage=NAME -> the schemas of `stage:` and `data:`; all other values are in conf/plan/NAME/.
STAGES: Mapping[str, tuple[type[StageConfig], type[DataConfig]]] = {
    "pretrain": (PretrainConfig, DataConfig),
    "sft": (SFTConfig, SFTDataConfig),
    "dpd": (DPDConfig, PreferenceDataConfig),
    "reward_model": (RewardModelConfig, ChatDataConfig),
    "rl": (RLConfig, PromptDataConfig),
}


def register(shape_of: Callable[[str | None], Mapping[str, Any]] | None = None) -> None:
    """Put the schemas where Hydra finds them: `stage=`, `data=` and `trainer=auto`, and what the YAML files build on.

    Args:
        shape_of: From `init_from` to the values of `ModelConfig`; `model=from_hf` calls it.
    """
    if shape_of is not None:
        OmegaConf.register_new_resolver("shape_of", lambda path, key: shape_of(path)[key], replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="trainer", name="auto", node=TrainerConfig)
    for name, (stage, data) in STAGES.items():
        store.store(group="stage", name=name, node=stage)
        store.store(group="data", name=name, node=data)


def compose(conf: Path, overrides: Sequence[str]) -> Config:
    """Compose what `python train.py *overrides` would run with; `register` comes first.

    Raises:
        ValueError: An override does not fit, or a value is missing.
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            composed = hydra.compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, conf)) from error
    return resolve(composed)


def resolve(composed: DictConfig) -> Config:
    """Return the dataclasses of a composed config, every interpolation replaced by its value.

    Raises:
        ValueError: A value is missing, an interpolation fails, or a key is not of the schema; names the key.
    """
    try:
        OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # its errors are shorter than to_object's
        cfg = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        _, _, by_resolver = reason.partition("raised while resolving interpolation: ")
        raise ValueError(by_resolver or f"{error.full_key}: {reason}") from error
    require_known_keys(cfg)
    return cfg


def plan_of(stage: StageConfig) -> PhasePlan:
    """Return the phases of a stage as written, or scaled to `stage.total_tokens`."""
    phases = []
    for name, phase in phases_of(stage).items():
        tokens, step_tokens = _lengths(stage, phase)
        phases.append(
            Phase(
                name=name,
                tokens=tokens,
                lr=LearningRate(phase.lr.start, phase.lr.end, phase.lr.shape),
                mixture=dict(phase.mixture),
                seq_len=phase.seq_len,
                rope_theta=phase.rope_theta,
                global_batch_tokens=step_tokens,
                micro_batch_size=_or_default(phase.micro_batch_size, stage.micro_batch_size),
            )
        )
    plan = PhasePlan(tuple(phases))
    return plan.scaled(stage.total_tokens) if stage.total_tokens else plan


def phases_of(stage: StageConfig) -> Mapping[str, AnyPhaseConfig]:
    """Return the phases of a stage by name, in their order."""
    assert isinstance(stage, TokensConfig | RLConfig)
    return stage.phases


def builds_demo_data(data: DataConfig) -> bool:
    """Whether the run builds its sources where they are missing."""
    return data.demo_corpus or (isinstance(data, SFTDataConfig | PromptDataConfig) and data.demo_tasks)


def _lengths(stage: StageConfig, phase: AnyPhaseConfig) -> tuple[int, int]:
    """Return the tokens of a phase and of one of its steps."""
    if isinstance(phase, RLPhaseConfig):
        assert isinstance(stage, RLConfig)
        step = phase.prompts * stage.group_size * phase.seq_len
        return phase.steps * step, step
    assert isinstance(stage, TokensConfig) and isinstance(phase, PhaseConfig)
    return phase.tokens, _or_default(phase.global_batch_tokens, stage.global_batch_tokens)


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


def run_dir(cfg: Config) -> Path:
    """Return the folder of this run: fixed by `run_name`, the same in every process and after every restart."""
    return Path(cfg.paths.runs) / cfg.run_name
