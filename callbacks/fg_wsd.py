"""FG-WSD's learning rate (or any other plan's): set before every step from the tokens seen."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from nb_lightning.phase_callback import PhaseCallback, StageModule


class FGWSD(PhaseCallback):
    """Sets the learning rate of every parameter group to the plan's, and logs it as `optim/lr`.

    FG-WSD's other half, the mixture of each phase, is not set here: see `DataMixtureShift`.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        lr = module.plan.lr_of_step(module.tokens_seen)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = lr
        module.log("optim/lr", torch.tensor(lr, dtype=torch.float64), batch_size=1)
