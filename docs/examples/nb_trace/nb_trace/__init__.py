"""Two callbacks that use only nb_lightning's public extension point, `PhaseCallback`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase


class StepTrace(PhaseCallback):
    """Appends a JSON line per step to `file_name` in the run folder: loss to the last bit, rows, hash of the tokens.

    Two equal runs write equal lines, however often one of them was stopped and resumed.
    """

    def __init__(self, file_name: str = "trace.jsonl") -> None:
        self.file_name = file_name

    def on_phase_start(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        module.print(f"trace: {phase.name} from {module.tokens_seen} tokens")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        tokens = hashlib.sha256()
        for micro in batch.micro_batches:
            tokens.update(micro.input_ids.cpu().numpy().tobytes())
        line = {
            "step": batch_idx,
            "tokens_seen": module.tokens_seen,
            "loss": float(outputs["train/loss"]).hex(),
            "grad_norm": float(outputs["optim/grad_norm"]).hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "rope_theta": module.model.rope.theta,
            "shape": list(batch.micro_batches[0].input_ids.shape),
            "sample_ids": batch.sample_ids.tolist(),
            "tokens": tokens.hexdigest(),
        }
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        with open(Path(trainer.default_root_dir) / (self.file_name + suffix), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class AnnouncePhases(PhaseCallback):
    """Writes each phase boundary as a line to the file that NB_TRACE_ANNOUNCE names."""

    def on_phase_start(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        self._write(f"start {phase.name} {module.tokens_seen}")

    def on_phase_end(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        self._write(f"end {phase.name} {module.tokens_seen}")

    def _write(self, line: str) -> None:
        with open(os.environ["NB_TRACE_ANNOUNCE"], "a", encoding="utf-8") as file:
            file.write(line + "\n")


def announce_phases() -> list[pl.Callback]:
    """Return the callbacks of the entry point: none unless NB_TRACE_ANNOUNCE is set."""
    return [AnnouncePhases()] if "NB_TRACE_ANNOUNCE" in os.environ else []
