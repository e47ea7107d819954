"""The mixture as it was realised: share of each source in what was trained, and how often a source was repeated."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nb_lightning.phase_callback import PhaseCallback
from nb_lightning.phases import Phase


class DataMixtureShift(PhaseCallback):
    """Announces each shift and logs `data/share/<source>` and `data/repeats/<source>`.

    The shift itself needs no switch to be thrown: which source a row comes from is a function of the row's number
    (data/mixture.py), so it happens at its exact row, whatever the loader has prefetched.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Shares are of all steps since the last line: a few rows of one step, at a fixed interval, would alias. A run
        # that resumes between two lines goes on with the steps since the one before.
        done = module.plan.step_at(module.tokens_seen)
        self._logged_at = module.plan.tokens_at(done - done % trainer.log_every_n_steps)

    def on_phase_start(self, trainer: pl.Trainer, module: pl.LightningModule, phase: Phase) -> None:
        shares = ", ".join(f"{name} {weight:.0%}" for name, weight in phase.mixture.items())
        module.print(f"phase {phase.name} at {module.tokens_seen:,} tokens: {shares}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if (batch_idx + 1) % trainer.log_every_n_steps:
            return
        order = module.data.order
        taken, before = order.consumed(module.tokens_seen), order.consumed(self._logged_at)
        values = {f"data/repeats/{name}": times for name, times in order.repeats(module.tokens_seen).items()}
        for name, tokens in taken.items():
            values[f"data/share/{name}"] = (tokens - before[name]) / (module.tokens_seen - self._logged_at)
        module.log_dict(values, batch_size=1)
        self._logged_at = module.tokens_seen
