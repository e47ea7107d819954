"""Context extension by ABF: set the RoPE base at a phase boundary, and check the length of the rows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nb_lightning.batch import StepBatch
from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase


class ContextExtension(PhaseCallback):
    """Sets the model's RoPE base to the phase's, and checks that the rows have the phase's length.

    It does not set that length, which is a function of the row's number (data/mixture.py).
    """

    def on_phase_start(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        if phase.rope_theta != module.model.rope.theta:
            module.print(f"phase {phase.name}: {phase.seq_len} tokens a row, RoPE base {phase.rope_theta:g}")
        module.model.rope.theta = phase.rope_theta

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if isinstance(batch, StepBatch):  # RL's batches hold prompts; their rows are not sampled yet
            seq_len = batch.micro_batches[0].input_ids.shape[1]
            assert seq_len == module.phase.seq_len, f"rows of {seq_len} tokens in a phase of {module.phase.seq_len}"
