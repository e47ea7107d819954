"""Adapters on a small model in memory: made, trained, merged."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nb_lightning.checkpoints.hf_config import config_from_shape
from nb_lightning.checkpoints.hf_weights import save_hf
from nb_lightning.config.schema import AdapterConfig, TrainerConfig
from nb_lightning.losses.head import cross_entropy
from nb_lightning.model import adapters
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.model.weights import StoredTensor, Weights, load_weights
from nb_lightning.stages.optim import build_optimizer
from tests.model.harness import ids

SHAPE = ModelShape(260, 64, 2, 2, 1, 32, 128, init_std=0.1)


class InMemory(Weights):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        super().__init__(
            "memory", {name: StoredTensor(name, tuple(t.shape)) for name, t in tensors.items()}, torch.float32
        )

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def base_weights(shape: ModelShape = SHAPE) -> InMemory:
    return InMemory({name: p.detach() for name, p in Transformer(shape).named_parameters()})


def adapted(cfg: AdapterConfig, weights: Weights, shape: ModelShape = SHAPE, precision: str = "32-true") -> Transformer:
    attach = partial(adapters.attach, cfg=cfg, precision=precision)
    trainer = TrainerConfig(precision=precision)
    model = build_model(shape, trainer, "sdpa", torch.device("cpu"), None, None, attach)
    adapters.load_base(model, weights, seed=0)
    return model


def loss_of(model: Transformer) -> Tensor:
    tokens = ids(2, 24, 260)
    return model(tokens, head=partial(cross_entropy, labels=tokens.roll(-1, 1))) / tokens.numel()


def train(model: Transformer, steps: int, mixed: bool = False) -> list[float]:
    optimizer = build_optimizer(model, "adamw", (0.9, 0.95), 1e-8, 0.0)
    optimizer.param_groups[0]["lr"] = 1e-2
    values = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def trained(model: Transformer) -> InMemory:
    """What a checkpoint would hold."""
    return InMemory({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})


def trained_parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dequantised(model: Transformer) -> InMemory:
    """The base that a QLoRA model computes with."""
    import bitsandbytes.functional as F

    tensors = {}
    for key, p in model.named_parameters():
        if p.dtype == torch.uint8:
            tensors[adapters.base_name(key)] = F.dequantize_4bit(p.data, p.quant_state)
        elif not p.requires_grad:
            tensors[key] = p.detach()
    return InMemory(tensors)


def merged(model: Transformer, cfg: AdapterConfig, base: Weights, shape: ModelShape = SHAPE) -> Transformer:
    tensors = {name: base.digest(name) for name in base.stored}
    saved = {"alpha": cfg.alpha, "rank": cfg.rank, "base": {"path": "memory", "tensors": tensors}}
    plain = Transformer(shape)
    load_weights(plain, adapters.MergedWeights(base, trained(model), saved))
    return plain


def write_hf(folder: Path, weights: Weights, shape: ModelShape) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_hf(weights, shape, folder, torch.float32, 10**9)
    (folder / "config.json").write_text(json.dumps(config_from_shape(shape, torch.float32)))
    return folder
