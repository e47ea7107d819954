"""Validate at the end of every phase, besides the trainer's regular interval."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase


class PhaseValidation(PhaseCallback):
    """Validates after the last step of a phase, through the interval that Lightning looks at after every step."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        trainer.val_check_batch = trainer.val_check_interval

    def on_phase_end(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        trainer.val_check_batch = 1  # after this hook, Lightning validates if batch_idx + 1 is a multiple of it
