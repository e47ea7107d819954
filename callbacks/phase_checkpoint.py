"""Save checkpoints: one at each phase boundary, which stays; the newest few in between; one when asked to stop.

Each is written atomically (nb_lightning/checkpoints/folders.py). After SIGTERM or Ctrl-C the current step is finished
and saved, and the exit status is 128 + the signal's number, so that a scheduler sees that the run did not finish.
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
from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase
from nb_lightning.run_folder import CHECKPOINTS

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PhaseCheckpoint(PhaseCallback, Checkpoint):
    """Saves checkpoints and stops on a signal.

    Args:
        save_every_n_steps: optimizer steps between two checkpoints.
        keep_last: number of newest checkpoints that are kept besides those at phase boundaries.
    """

    def __init__(self, save_every_n_steps: int, keep_last: int) -> None:
        self.save_every_n_steps, self.keep_last = save_every_n_steps, keep_last
        self._received_signal: int | None = None
        self._saved_at = -1
        self._earlier_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        # Lightning's SIGTERM handler saves nothing, exits with 0, and communicates with other ranks inside a handler.
        self._received_signal = signal.SIGTERM if trainer.received_sigterm else None
        self._earlier_handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def teardown(self, trainer: pl.Trainer, module: StageModule, stage: str) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        self._earlier_handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received_signal = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the run at once
            signal.signal(number, signal.default_int_handler)

    def on_phase_end(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        self._save(trainer, module, f"-end-of-{phase.name}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        stops = self._received_signal is not None
        if trainer.world_size > 1:  # the signal may reach the ranks in different steps
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if stops or module.plan.step_at(module.tokens_seen) % self.save_every_n_steps == 0:
            self._save(trainer, module)
        if stops:
            number = self._received_signal or signal.SIGTERM
            module.print(
                f"stopped by {signal.Signals(number).name} at {module.tokens_seen:,} tokens; go on with resume=true"
            )
            raise SystemExit(128 + number)

    def _save(self, trainer: pl.Trainer, module: StageModule, suffix: str = "") -> None:
        if self._saved_at == module.tokens_seen:
            return
        step = module.plan.step_at(module.tokens_seen)
        folder = Path(trainer.default_root_dir) / CHECKPOINTS
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
                self._delete_old(folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunStopped(
                f"could not save {final}: {error}. Earlier checkpoints are whole; make room, then resume=true"
            ) from error
        trainer.strategy.barrier("checkpoint")
        self._saved_at = module.tokens_seen

    def _delete_old(self, folder: Path) -> None:
        between_boundaries = [path for path in folders.all_checkpoints(folder.parent) if "-end-of-" not in path.name]
        for path in between_boundaries[: -self.keep_last]:
            renamed = path.with_name(f".dropping-{path.name}")  # a half-deleted checkpoint must not keep its name
            path.rename(renamed)
            shutil.rmtree(renamed, ignore_errors=True)
