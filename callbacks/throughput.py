"""Measure tokens per second and model FLOP utilisation over a sliding window of steps."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch

from nb_lightning.phase_callback import StageModule

# Dense bfloat16 peaks in FLOP/s. Lightning's table has sparse peaks for some of these GPUs and lacks others.
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a GPU in FLOP/s, or None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


class Throughput(pl.Callback):
    """Logs `perf/tokens_per_sec` over all ranks, `perf/step_sec`, and on known GPUs `perf/mfu` and `perf/mfu_full`.

    `perf/mfu` counts the half of attention that a causal kernel computes; `perf/mfu_full` counts all of it, as many
    papers do. The time includes waiting for data, but not validation and saving.

    Args:
        window: steps averaged over.
        available_flops: peak of one device in FLOP/s; None looks it up.
    """

    def __init__(self, window: int = 20, available_flops: float | None = None) -> None:
        self.available_flops = available_flops
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=window)  # seconds, tokens, seq_len of each step

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        self._peak = self.available_flops or peak_flops(module.device)
        self._step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The stage has read the loss on the host, so the GPU has finished this step.
        seconds = time.perf_counter() - self._step_started
        self._recent.append((seconds, batch.tokens, batch.micro_batches[0].input_ids.shape[1]))
        if (batch_idx + 1) % module.cfg.trainer.log_every_n_steps == 0:
            module.log_dict(self.metrics(trainer, module), batch_size=1)
        self._step_started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: StageModule) -> None:
        self._step_started = time.perf_counter()

    def metrics(self, trainer: pl.Trainer, module: StageModule) -> dict[str, float]:
        seconds = sum(step[0] for step in self._recent)
        metrics = {
            "perf/tokens_per_sec": sum(step[1] for step in self._recent) / seconds,
            "perf/step_sec": seconds / len(self._recent),
        }
        if self._peak:
            for name, causal in (("perf/mfu", True), ("perf/mfu_full", False)):
                flops = sum(tokens * module.flops_per_token(seq_len, causal) for _, tokens, seq_len in self._recent)
                metrics[name] = flops / seconds / (self._peak * trainer.world_size)
        return metrics
