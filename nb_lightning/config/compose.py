"""Compose the YAML files under conf/ into one `Config`; with `data/` and `train.py` the only place that knows Hydra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.config.schema import (
    ChatDataConfig,
    Config,
    DataConfig,
    DPDConfig,
    ModelConfig,
    PathsConfig,
    PreferenceDataConfig,
    PretrainConfig,
    PromptDataConfig,
    RewardModelConfig,
    RLConfig,
    SFTConfig,
    SFTDataConfig,
    StageConfig,
    TrainerConfig,
)
from nb_lightning.phases import LearningRate, Phase, PhasePlan


def register(shape_of: Callable[[str | None], dict[str, Any]] | None = None) -> None:
    """Put the schemas where the YAML files' defaults lists find them.

    Args:
        shape_of: `ModelConfig`'s values of the weights at `init_from`; what `model=from_hf` looks them up with.
    """
    if shape_of is not None:
        OmegaConf.register_new_resolver("shape_of", lambda path, key: shape_of(path)[key], replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, node in (("model", ModelConfig), ("trainer", TrainerConfig), ("paths", PathsConfig)):
        store.store(group=group, name="schema", node=node)
    store.store(group="stage", name="pretrain_schema", node=PretrainConfig)
    store.store(group="data", name="pretrain_schema", node=DataConfig)
    store.store(group="stage", name="sft_schema", node=SFTConfig)
    store.store(group="data", name="sft_schema", node=SFTDataConfig)
    store.store(group="stage", name="dpd_schema", node=DPDConfig)
    store.store(group="data", name="dpd_schema", node=PreferenceDataConfig)
    store.store(group="stage", name="reward_model_schema", node=RewardModelConfig)
    store.store(group="data", name="reward_model_schema", node=ChatDataConfig)
    store.store(group="stage", name="rl_schema", node=RLConfig)
    store.store(group="data", name="rl_schema", node=PromptDataConfig)


def compose(conf: Path, overrides: Sequence[str]) -> Config:
    """What `python train.py *overrides` would run with, without running it; `register` comes first.

    Raises:
        ValueError: an override that does not fit, in Hydra's words.
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return hydra.compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def plan_of(stage: StageConfig) -> PhasePlan:
    """The phases of a stage as written, or scaled to `stage.total_tokens`."""
    phases = []
    for name, p in stage.phases.items():
        tokens, step_tokens = _lengths(stage, p)
        phases.append(
            Phase(
                name=str(name),
                tokens=tokens,
                lr=LearningRate(p.lr.start, p.lr.end, p.lr.shape),
                mixture=dict(p.mixture),
                seq_len=p.seq_len,
                rope_theta=p.rope_theta,
                global_batch_tokens=step_tokens,
                micro_batch_size=_first_given(p.micro_batch_size, stage.micro_batch_size),
            )
        )
    plan = PhasePlan(tuple(phases))
    return plan.scaled(stage.total_tokens) if stage.total_tokens else plan


def _lengths(stage: Any, phase: Any) -> tuple[int, int]:
    """Tokens of a phase and of one of its steps."""
    if "prompts" in phase:
        step = phase.prompts * stage.group_size * phase.seq_len
        return phase.steps * step, step
    return phase.tokens, _first_given(phase.global_batch_tokens, stage.global_batch_tokens)


def _first_given(own: int | None, of_the_stage: int) -> int:
    return of_the_stage if own is None else own


def run_dir(cfg: Config) -> Path:
    """The folder of this run: fixed by `run_name`, the same in every process and after every restart."""
    return Path(cfg.paths.runs) / cfg.run_name
