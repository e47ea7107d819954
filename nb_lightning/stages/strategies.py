"""Turn the trainer's config into Lightning's accelerator, strategy and precision.

* single: one process.
* ddp: a whole model on every device.
* fsdp: parameters, gradients and optimizer state sharded (FSDP2) through Lightning's `ModelParallelStrategy`.

All three run on CPU (gloo) as on CUDA (nccl). The model is built on `meta`, laid out, and filled one parameter at a
time, so that no device ever holds more than its shard and one whole parameter.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from nb_lightning.config.schema import TrainerConfig


def resolve_accelerator(cfg: TrainerConfig) -> str:
    """Return "cpu" or "cuda".

    Raises:
        ValueError: the config asks for CUDA where there is none, or for more GPUs than there are.
    """
    n_gpus = torch.cuda.device_count()
    if cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not n_gpus):
        return "cpu"
    if not n_gpus:
        raise ValueError(
            "trainer.accelerator=cuda, but torch sees no GPU here; "
            "use trainer.accelerator=cpu (works for every strategy) or a machine with one"
        )
    if cfg.devices > n_gpus:
        raise ValueError(f"trainer.devices is {cfg.devices}, but torch sees {n_gpus} GPU(s) here")
    return "cuda"


def build_strategy(cfg: TrainerConfig) -> Strategy | str:
    """Build the strategy that `trainer.strategy` names; Lightning's default for a single process."""
    if cfg.strategy == "ddp":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if cfg.strategy == "fsdp":
        ranks = cfg.devices * cfg.num_nodes
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    return "auto"


def lightning_precision(cfg: TrainerConfig) -> Literal["32-true", "bf16-mixed", "bf16-true"]:
    """Return Lightning's precision. Under FSDP2 the sharding policy mixes precisions, not autocast."""
    if cfg.strategy == "fsdp" and cfg.precision == "bf16-mixed":
        return "32-true"
    assert cfg.precision in ("32-true", "bf16-mixed", "bf16-true")  # bounded in config/schema.py
    return cfg.precision
