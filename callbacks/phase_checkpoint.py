"""Checkpoints: one at each phase boundary, which is kept; the newest few in between; one more when asked to stop.

Each is written whole or not at all (nb_lightning/checkpoints/folders.py). SIGTERM and Ctrl-C end the current step,
save, and exit with 128 + the signal's number, so that a scheduler sees that the run did not finish.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from nb_lightning.checkpoints import folders
from nb_lightning.errors import RunStopped
from nb_lightning.phase_callback import PhaseCallback
from nb_lightning.phases import Phase

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PhaseCheckpoint(PhaseCallback, Checkpoint):
    """Args:
    save_every_n_steps: optimizer steps between two checkpoints.
    keep_last: how many of the newest ones to keep besides those at phase boundaries.
    """

    def __init__(self, save_every_n_steps: int, keep_last: int) -> None:
        self.save_every_n_steps, self.keep_last = save_every_n_steps, keep_last
        self._stop: int | None = None
        self._saved_at = -1
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning's own SIGTERM handler saves nothing, exits with 0, and talks to other ranks from inside a handler.
        self._stop = signal.SIGTERM if trainer.received_sigterm else None
        self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = number
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(number, signal.default_int_handler)

    def on_phase_end(self, trainer: pl.Trainer, module: pl.LightningModule, phase: Phase) -> None:
        self._save(trainer, module, f"-end-of-{phase.name}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        stop = self._stop is not None
        if trainer.world_size > 1:  # the ranks need not have heard the signal at the same step
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or module.plan.step_at(module.tokens_seen) % self.save_every_n_steps == 0:
            self._save(trainer, module)
        if stop:
            number = self._stop or signal.SIGTERM
            module.print(
                f"stopped by {signal.Signals(number).name} at {module.tokens_seen:,} tokens; go on with resume=true"
            )
            raise SystemExit(128 + number)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, suffix: str = "") -> None:
        if self._saved_at == module.tokens_seen:
            return
        step = module.plan.step_at(module.tokens_seen)
        folder = Path(trainer.default_root_dir) / "checkpoints"
        final = folder / f"step-{step:08d}{suffix}"
        temporary = folder / f".writing-{final.name}"
        try:
            if trainer.is_global_zero:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            trainer.strategy.barrier("checkpoint")
            trainer.save_checkpoint(temporary / folders.STATE)
            if trainer.is_global_zero:
                folders.commit(temporary, final, module.state())
                self._drop_old(folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunStopped(
                f"could not save {final}: {error}. Earlier checkpoints are whole; make room, then resume=true"
            ) from error
        trainer.strategy.barrier("checkpoint")
        self._saved_at = module.tokens_seen

    def _drop_old(self, folder: Path) -> None:
        passing = [path for path in folders.all_checkpoints(folder.parent) if "-end-of-" not in path.name]
        for path in passing[: -self.keep_last]:
            gone = path.with_name(f".dropping-{path.name}")  # never half there under its name
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
