"""`PhaseCallback`: the extension point. Subclass it, name it under `callbacks:`, and act at phase boundaries."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nb_lightning.config.schema import Config
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.phases import Phase, PhasePlan


class StageModule(pl.LightningModule):
    """A stage as callbacks see it: config, plan, clock and model. `stages.base.BaseStage` is one.

    Attributes:
        tokens_seen: the clock: tokens over all ranks whose step is done.
        skipped_steps: steps whose update was left out because the loss or gradient was not finite.
    """

    cfg: Config
    plan: PhasePlan
    shape: ModelShape
    model: Transformer
    tokens_seen: int
    skipped_steps: int

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.plan.phase_at(self.tokens_seen)

    @property
    def data(self) -> Any:
        """The run's data, a class of `data/`, which the library does not import."""
        # Lightning sets this attribute without declaring it.
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says about the run, as plain values."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Return the floating-point operations per trained token, see `ModelShape.flops_per_token`."""
        raise NotImplementedError


class PhaseCallback(pl.Callback):
    """A Lightning callback that is also told about phase boundaries.

    All other hooks of Lightning work as usual. A subclass that overrides `on_train_batch_start` or
    `on_train_batch_end` calls its `super()`.
    """

    _entered: str | None = None  # name of the phase whose start was reported last

    def on_phase_start(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        """Run before the first step of `phase`, and again before the first step after a resume inside it."""

    def on_phase_end(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        """Run after the last step of `phase`: its weights are final, the next phase has not begun."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, batch: Any, batch_idx: int) -> None:
        phase = module.phase
        if phase.name != self._entered:
            self._entered = phase.name
            self.on_phase_start(trainer, module, phase)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.tokens_seen in module.plan.ends:
            self.on_phase_end(trainer, module, module.plan.phases[module.plan.ends.index(module.tokens_seen)])
