"""From the trainer's config to Lightning's strategy, and how a model is laid out under it.

* single: one process.
* ddp: a whole model on every device.
* fsdp: parameters, gradients and optimizer state sharded (FSDP2) through Lightning's `ModelParallelStrategy`.

All three run on CPU (gloo) as on CUDA (nccl). The model is built on `meta`, laid out, and filled one parameter at a
time, so that no device ever holds more than its shard and one whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nb_lightning.config.schema import TrainerConfig
from nb_lightning.model import ModelShape, Transformer


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


def build_model(
    shape: ModelShape,
    cfg: TrainerConfig,
    backend: str,
    device: torch.device,
    mesh: DeviceMesh | None,
    seed: int | None,
    change: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """A `Transformer` on `device`, sharded over `mesh` when there is one.

    Its weights are fresh ones of `seed`; without a seed they hold anything, for whoever fills them next. `change` is
    applied while the model is on `meta`: adapters.
    """
    dtype = torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32
    with torch.device("meta"):
        model = Transformer(shape).to(dtype)
    model.attention_backend = backend
    model.activation_checkpointing = cfg.activation_checkpointing
    if change is not None:
        change(model)
    if mesh is not None:
        shard(model, mesh, cfg.precision)
    model.to_empty(device=device)
    model.tie()
    if seed is not None:
        model.init_weights(seed)
    if cfg.compile:
        for layer in model.layers:
            layer.compile()
    return model


def shard(model: Transformer, mesh: DeviceMesh, precision: str) -> None:
    """FSDP2: each layer is gathered on its own, the embedding, last norm and head with the root."""
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"] if "data_parallel" in (mesh.mesh_dim_names or ()) else mesh
    }
    if precision == "bf16-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
