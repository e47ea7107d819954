"""Build a `Transformer` on `meta`, shard it (FSDP2), then allocate it: no device ever holds more than its shard."""

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
    modify: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """Build a `Transformer` on `device`, sharded over `mesh` where there is one.

    Args:
        backend: of attention, see `attention.resolve_backend`.
        seed: initialise the weights; None leaves them uninitialised for a later `load_weights`.
        modify: called with the model while it is on `meta`: it attaches adapters, or freezes.
    """
    dtype = torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32
    with torch.device("meta"):
        model = Transformer(shape).to(dtype)
    model.attention_backend = backend
    model.activation_checkpointing = cfg.activation_checkpointing
    if modify is not None:
        modify(model)
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
    """Shard with FSDP2: each layer is a unit; the embedding, the last norm and the head belong to the root."""
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"] if "data_parallel" in (mesh.mesh_dim_names or ()) else mesh
    }
    if precision == "bf16-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
