"""From the trainer's config to Lightning's strategy, and how a model is laid out under it.

* single: one process.
* ddp: a whole model on every device.
* fsdp: parameters, gradients and optimizer state sharded (FSDP2) through Lightning's `ModelParallelStrategy`.

All three run on CPU (gloo) as on CUDA (nccl). The model is built on `meta`, laid out, and filled one parameter at a
time, so that no device ever holds more than its shard and one whole parameter.
"""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from nb_lightning.config.schema import TrainerConfig


def resolve_accelerator(cfg: TrainerConfig) -> str:
    """ "cpu" or "cuda".

    Raises:
        ValueError: CUDA asked for and not there, or fewer GPUs than `devices`.
    """
    found = torch.cuda.device_count()
    if cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not found):
        return "cpu"
    if not found:
        raise ValueError(
            "trainer.accelerator=cuda, but torch sees no GPU here; "
            "use trainer.accelerator=cpu (works for every strategy) or a machine with one"
        )
    if cfg.devices > found:
        raise ValueError(f"trainer.devices is {cfg.devices}, but torch sees {found} GPU(s) here")
    return "cuda"


def build_strategy(cfg: TrainerConfig) -> Strategy | str:
    if cfg.strategy == "ddp":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if cfg.strategy == "fsdp":
        ranks = cfg.devices * cfg.num_nodes
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    return "auto"


def lightning_precision(cfg: TrainerConfig) -> str:
    """The precision plugin. Under FSDP2 mixed precision is the sharding's own policy, not autocast's."""
    if cfg.strategy == "fsdp" and cfg.precision == "bf16-mixed":
        return "32-true"
    return cfg.precision
