"""`PhaseCallback`: the extension point. Subclass it, name it under `callbacks:`, and act at phase boundaries."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nb_lightning.phases import Phase


class PhaseCallback(pl.Callback):
    """A Lightning callback that also hears of phase boundaries.

    `module` has the clock and the plan: `module.tokens_seen`, `module.plan`, `module.phase`, `module.model`.
    Any other Lightning hook may be overridden too; one that is used here calls its `super()`.
    """

    _entered: str | None = None

    def on_phase_start(self, trainer: pl.Trainer, module: pl.LightningModule, phase: Phase) -> None:
        """Before the first step of `phase`, and again before the first step after a resume inside it."""

    def on_phase_end(self, trainer: pl.Trainer, module: pl.LightningModule, phase: Phase) -> None:
        """After the last step of `phase`: its weights are final, the next phase has not begun."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        phase = module.phase
        if phase.name != self._entered:
            self._entered = phase.name
            self.on_phase_start(trainer, module, phase)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.tokens_seen in module.plan.ends:
            self.on_phase_end(trainer, module, module.plan.phases[module.plan.ends.index(module.tokens_seen)])
