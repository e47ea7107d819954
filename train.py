"""Train: `python train.py stage=pretrain|sft|dpd|reward_model|rl model=... trainer=... key=value`.

The one composition root: check the config, build stage, data, callbacks and trainer, and fit.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.checkout import CHECKOUT, CONF, read_shape
from nb_lightning.config.checks import check
from nb_lightning.config.compose import phases_of, plan_of, register, resolve, run_dir
from nb_lightning.config.composition_errors import explain
from nb_lightning.config.schema import Config, DPDConfig, PretrainConfig, RewardModelConfig, RLConfig, SFTConfig
from nb_lightning.errors import RunStopped
from nb_lightning.phases import PhasePlan

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from data.base import PlannedData
    from nb_lightning.stages.base import BaseStage

# A thread of OpenMP that waits for others spins by default. Beside any other busy program that makes two threads up to
# ten times slower than one (docs/performance.md); read when torch is imported, so set before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Importing creates millions of long-lived objects; collecting among them costs a fifth of the start-up
# (docs/performance.md).
gc.disable()

log = logging.getLogger("train")
# Set to 1, errors keep their tracebacks. `command_line` sets it for Hydra while it composes.
FULL_ERROR = "HYDRA_FULL_ERROR"
WANTS_TRACEBACK = os.environ.get(FULL_ERROR) == "1"

register(read_shape)


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    os.environ[FULL_ERROR] = str(int(WANTS_TRACEBACK))
    try:
        cfg = resolve(composed)
        check(cfg, trusted_packages())
        run(cfg)
    except (ValueError, RunStopped) as error:  # a mistake or a fault outside the program: one line, no traceback
        if WANTS_TRACEBACK:
            raise
        # A loader worker hands over its whole traceback; its last line is the error.
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")


def command_line() -> None:
    """Run `main`; a config that does not compose ends the process with one line."""
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors, and does not print them
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if WANTS_TRACEBACK:
            raise
        sys.exit(f"error: {explain(error, CHECKOUT / CONF)}")


def trusted_packages() -> list[str]:
    """Return the packages that the user trusts by naming them in `hydra.searchpath=[pkg://...]`."""
    return [
        source.path.removeprefix("pkg://").split(".")[0]
        for source in HydraConfig.get().runtime.config_sources
        if source.provider.startswith("hydra.searchpath") and source.schema == "pkg"
    ]


def run(cfg: Config) -> None:
    """Train, or with `dry_run` describe the run. Heavy imports come here, so that a wrong key fails at once."""
    import lightning.pytorch as pl
    import torch

    from nb_lightning import dry_run
    from nb_lightning.checkpoints import folders
    from nb_lightning.checkpoints.pretrained import find_origin
    from nb_lightning.model.adapters import count_trained_parameters
    from nb_lightning.stages.strategies import resolve_accelerator

    folder = run_dir(cfg)
    if cfg.dry_run:
        from callbacks.plots import plot_plan
        from nb_lightning.run_folder import PLAN_PICTURE

        print(dry_run.describe(cfg))
        plot_plan(plan_of(cfg.stage).in_whole_steps(), folder / PLAN_PICTURE)
        print(f"picture: {folder / 'plan.png'}")
        return
    accelerator = resolve_accelerator(cfg.trainer)
    plan = plan_of(cfg.stage).in_whole_steps()
    checkpoint = starting_point(cfg, folder, plan.total_tokens)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    quieten()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    module, data = build_stage(cfg, plan)
    if cfg.init_from and (checkpoint is None or module.adapted):
        module.begin_from(find_origin(cfg.init_from))
    module.check_data(data)
    data.open_sources()
    if checkpoint is not None:
        require_same_run(checkpoint, module, data)
        if folders.read_info(checkpoint)["tokens_seen"] == plan.total_tokens:
            log.info("nothing left to do: %s is the end of the plan", checkpoint)
            return
    require_room(cfg, count_trained_parameters(module.shape, cfg.stage.adapter), folder)
    trainer = build_trainer(cfg, accelerator, folder)
    state = checkpoint / folders.STATE if checkpoint else None
    gc.freeze()
    gc.enable()
    trainer.fit(module, datamodule=data, ckpt_path=state, weights_only=True)
    if trainer.is_global_zero:
        log.info("finished: %s tokens; everything is in %s", f"{module.tokens_seen:,}", folder)


def build_stage(cfg: Config, plan: PhasePlan) -> tuple[BaseStage[Any], PlannedData[Any]]:
    """Build the stage and its data."""
    stage = cfg.stage
    if isinstance(stage, PretrainConfig):
        from data.pretrain import PretrainData
        from nb_lightning.stages.next_token import NextTokenStage

        return NextTokenStage(cfg, plan), PretrainData(cfg, plan)
    if isinstance(stage, SFTConfig):
        from data.sft import SFTData
        from nb_lightning.stages.next_token import NextTokenStage

        return NextTokenStage(cfg, plan), SFTData(cfg, plan)
    if isinstance(stage, DPDConfig):
        from data.preference import PreferenceData
        from nb_lightning.stages.dpd import DPDStage

        return DPDStage(cfg, plan), PreferenceData(cfg, plan)
    if isinstance(stage, RLConfig):
        from data.prompts import PromptData
        from nb_lightning.stages.rl import RLStage

        return RLStage(cfg, plan), PromptData(cfg, plan)
    assert isinstance(stage, RewardModelConfig)
    from data.reward import RewardData
    from nb_lightning.stages.reward_model import RewardModelStage

    return RewardModelStage(cfg, plan), RewardData(cfg, plan)


def build_trainer(cfg: Config, accelerator: str, folder: Path) -> pl.Trainer:
    """Build Lightning's Trainer with the config's callbacks and loggers."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from nb_lightning.stages.strategies import build_strategy, lightning_precision

    t = cfg.trainer
    callbacks = [hydra.utils.instantiate(node) for node in cfg.callbacks.values() if node is not None]
    if not t.progress_bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    return pl.Trainer(
        accelerator=accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=build_strategy(t),
        precision=lightning_precision(t),
        default_root_dir=folder,
        callbacks=callbacks,
        logger=[hydra.utils.instantiate(node) for node in cfg.logger.values() if node is not None],
        max_epochs=1,  # the whole plan is one epoch: a phase an epoch loses steps on resume
        val_check_interval=t.val_every_n_steps,
        check_val_every_n_epoch=None,
        log_every_n_steps=t.log_every_n_steps,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=t.progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data deals its own shares
        inference_mode=False,  # FSDP2 gathers parameters in no_grad, not in inference mode
    )


def starting_point(cfg: Config, folder: Path, end: int) -> Path | None:
    """Return the checkpoint to continue from, checked to be complete, or None to begin.

    Args:
        end: tokens of the whole plan. A run that was killed after the last step, before everything was measured and
            drawn, takes its last steps again.
    """
    from nb_lightning.checkpoints import folders
    from nb_lightning.files import read_json
    from nb_lightning.run_folder import MANIFEST

    if cfg.ckpt_path:
        return folders.resolve(cfg.ckpt_path)
    if cfg.resume:
        finished = read_json(folder / MANIFEST, {}).get("finished", True)  # where there is one at all
        found, problems = folders.newest(folder, but=None if finished else end)
        for problem in problems:
            log.warning("left aside: %s", problem)
        if found is None and problems:
            raise ValueError(f"no checkpoint in {folder} is whole; begin again with another run_name")
        log.info("resuming from %s" if found else "nothing to resume in %s yet: beginning", found or folder)
        return found
    if folders.all_checkpoints(folder):
        raise ValueError(f"{folder} holds a run already: continue it with resume=true, or choose another run_name")
    if cfg.init_from and not Path(cfg.init_from).exists():
        raise ValueError(
            f"init_from={cfg.init_from} is not there: run the stage before this one, name other weights, or begin with "
            "fresh ones (init_from=null)"
        )
    if cfg.init_from and Path(cfg.init_from).resolve() == folder.resolve():
        raise ValueError(f"init_from={cfg.init_from} is this very run; continue it with resume=true")
    return None


def require_same_run(checkpoint: Path, module: BaseStage[Any], data: PlannedData[Any]) -> None:
    """Refuse to continue a checkpoint with another layout, model, past, seed or data than it was trained with."""
    from nb_lightning.checkpoints import folders

    saved = folders.read_info(checkpoint)
    sharded, strategy = (checkpoint / folders.STATE).is_dir(), module.cfg.trainer.strategy
    if sharded != (strategy == "fsdp"):
        raise ValueError(
            f"trainer.strategy is {strategy}, but {checkpoint} was saved by {'fsdp' if sharded else 'single or ddp'}: "
            "continue it with that, on any number of devices, or begin a new run from its weights with init_from="
        )
    module.plan.require_same_past(saved["plan"], saved["tokens_seen"])
    made_with = asdict(folders.read_shape(checkpoint))  # a key that an older checkpoint lacks has its default
    for key, value in asdict(module.shape).items():
        if key != "rope_theta" and made_with[key] != value:
            raise ValueError(f"model.{key} is {value}, but {checkpoint} has {made_with[key]}")
    for key, value in asdict(module.cfg.stage.adapter).items():
        before = (saved.get("adapter") or {"name": "none"}).get(key)
        if value != before and (key == "name" or module.adapted):
            raise ValueError(f"stage.adapter.{key} is {value}, but {checkpoint} was trained with {before}")
    if saved["seed"] != module.cfg.seed:
        raise ValueError(f"seed is {module.cfg.seed}, but {checkpoint} was trained with {saved['seed']}")
    for name, digest in data.digests.items():
        if name in saved["sources"] and saved["sources"][name] != digest:
            written = " or other data.template_kwargs" if isinstance(module.cfg.stage, RLConfig) else ""
            raise ValueError(f"data.sources.{name} holds other data{written} than {checkpoint} was trained on")


def require_room(cfg: Config, parameters: int, folder: Path) -> None:
    """Refuse to begin where the disk has no room for the checkpoints: weights and two moments, each."""
    size = parameters * (6 if cfg.trainer.precision == "bf16-true" else 12)
    needed = size * (len(phases_of(cfg.stage)) + cfg.trainer.keep_last + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"paths.runs: {folder} has {free / 1e9:.1f} GB free; the checkpoints of this run need about "
            f"{needed / 1e9:.1f} GB (lower trainer.keep_last, or move paths.root)"
        )


def quieten() -> None:
    """Hide the libraries' hints; errors and our own lines stay."""
    for name, level in (("lightning", "WARNING"), ("lightning.pytorch", "WARNING"), ("litdata", "ERROR")):
        logging.getLogger(name).setLevel(level)
    for text in (
        ".*does not have many workers.*",
        ".*`isinstance.treespec, LeafSpec.`.*",
        ".*have no `validation_step`.*",  # RL measures on held-out tasks
        ".*Checkpoint directory.*",
        ".*buffer is not writable.*",
        ".*It is recommended to use `self.log.*",  # what is logged here has been summed over the ranks
    ):
        warnings.filterwarnings("ignore", text)


if __name__ == "__main__":
    command_line()
