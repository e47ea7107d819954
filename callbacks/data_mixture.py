"""Report the data mixture: each source's share of the tokens, and how often it was repeated."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase


class DataMixtureShift(PhaseCallback):
    """Prints the mixture at the start of each phase, and logs `data/share/<source>` and `data/repeats/<source>`.

    It reports the shift and does not cause it. The source of a row is a function of the row's number
    (data/mixture.py), so the mixture changes at the exact row, whatever the loader has prefetched. A run without this
    callback trains on the same rows.
    """

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        # A share is over all steps since the last logged one: with the few rows of a single step it would alias. A run
        # that resumes between two logged steps counts from the first of them.
        done = module.plan.step_at(module.tokens_seen)
        self._logged_at = module.plan.tokens_at(done - done % module.cfg.trainer.log_every_n_steps)

    def on_phase_start(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        shares = ", ".join(f"{source} {weight:.0%}" for source, weight in phase.mixture.items())
        module.print(f"phase {phase.name} at {module.tokens_seen:,} tokens: {shares}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if (batch_idx + 1) % module.cfg.trainer.log_every_n_steps:
            return
        order = module.data.order
        consumed, consumed_before = order.consumed(module.tokens_seen), order.consumed(self._logged_at)
        metrics = {f"data/repeats/{source}": times for source, times in order.repeats(module.tokens_seen).items()}
        for source, tokens in consumed.items():
            share = (tokens - consumed_before[source]) / (module.tokens_seen - self._logged_at)
            metrics[f"data/share/{source}"] = share
        module.log_dict(metrics, batch_size=1)
        self._logged_at = module.tokens_seen
