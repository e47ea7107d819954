"""Optimizers: AdamW (fused), and bitsandbytes' 8-bit and paged AdamW; which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nb_lightning.model import bnb

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices decay, norm weights (1-d) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, name: str, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build the optimizer `name` over `model`; the learning rate is 0 until the `FGWSD` callback sets it.

    Raises:
        ValueError: unknown name, bitsandbytes missing, or bitsandbytes asked for on sharded (FSDP2) parameters.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"stage.optim.name is {name!r}; allowed: {', '.join(OPTIMIZERS)}")
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(
            f"stage.optim.name={name} does not work on parameters sharded by trainer.strategy=fsdp "
            "(bitsandbytes cannot read DTensors); use adamw, or trainer.strategy=single or ddp"
        )
    kinds = bnb.import_bitsandbytes(f"stage.optim.name={name}").optim
    kind = {"adamw8bit": kinds.AdamW8bit, "paged_adamw8bit": kinds.PagedAdamW8bit}[name]
    return kind(groups, lr=0.0, betas=betas, eps=eps)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together so that their norm is at most `max_norm`.

    Under FSDP2 the norm is over all shards. Parameters on different device meshes (FSDP beside tensor parallel) are
    reduced mesh by mesh; `torch.nn.utils.clip_grad_norm_` refuses to mix meshes.

    Returns:
        The norm before scaling, 0-d float32.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(group) for group in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms)).float()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for group in by_mesh.values():
        torch._foreach_mul_(group, scale)  # pyright: ignore[reportPrivateImportUsage]  # torch has no public name for it
    return total
