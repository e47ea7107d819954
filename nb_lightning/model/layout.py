"""Build a `Transformer` on `meta`, shard it (FSDP2), and allocate it: no device ever holds more than its shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nb_lightning.model.transformer import ModelShape, Transformer

if TYPE_CHECKING:  # the schema imports OmegaConf
    from nb_lightning.config.schema import TrainerConfig


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
