"""The progress bar: one line with phase, tokens, learning rate, loss and speed."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from nb_lightning.phase_callback import StageModule


def human(count: float) -> str:
    """12_400_000_000_000 -> "12.4T"."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


class PhaseProgressBar(TQDMProgressBar):
    """Lightning's progress bar over the steps of the whole plan."""

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        # Validation is short and frequent: a second bar would only flicker.
        return Tqdm(disable=True, file=sys.stdout)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        super().on_train_epoch_start(trainer, module)
        self.train_progress_bar.initial = module.plan.step_at(module.tokens_seen)

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, batch: Any, batch_idx: int) -> None:
        self.train_progress_bar.set_description_str(module.phase.name.replace("_", " "), refresh=False)

    def get_metrics(self, trainer: pl.Trainer, module: StageModule) -> dict[str, Any]:
        logged = trainer.callback_metrics
        shown: dict[str, Any] = {"tokens": f"{human(module.tokens_seen)}/{human(module.plan.total_tokens)}"}
        for label, key, form in (
            ("lr", "optim/lr", ".2e"),
            ("loss", "train/loss", ".3f"),
            ("reward", "rl/reward", ".3f"),
            ("tok/s", "perf/tokens_per_sec", None),
        ):
            if key in logged:
                value = float(logged[key])
                shown[label] = human(value) if form is None else format(value, form)
        if module.skipped_steps:
            shown["skipped"] = module.skipped_steps
        return shown
