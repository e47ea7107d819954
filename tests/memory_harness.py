"""Training steps whose memory is measured: a count of all live storages, and models of random weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nb_lightning.config.schema import AdapterConfig, Config, OptimConfig, StageConfig, TrainerConfig
from nb_lightning.losses.head import cross_entropy
from nb_lightning.model import adapters
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.model.weights import StoredTensor, Weights
from nb_lightning.stages.optim import build_optimizer
from tests.model.harness import ids


class StoragePeak(TorchDispatchMode):
    """The peak, in bytes, of the storages that were created under this mode; older ones, as weights, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._track((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self._track(out, new=True)
        self.peak = max(self.peak, self.live)
        return out

    def _track(self, tree: Any, new: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.storages:
                storage = leaf.untyped_storage()
                size = storage.nbytes() if new else 0
                self.storages.add(storage._cdata)
                self.live += size
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.live -= size


class RandomWeights(Weights):
    """Weights of any shape, drawn when they are read."""

    def __init__(self, shape: ModelShape) -> None:
        with torch.device("meta"):
            names = {name: tuple(p.shape) for name, p in Transformer(shape).named_parameters()}
        super().__init__("random", {name: StoredTensor(name, dims) for name, dims in names.items()}, torch.bfloat16)

    def read(self, name: str) -> Tensor:
        return torch.randn(self.stored[name].shape, dtype=torch.bfloat16) * 0.02


def build_config(
    adapter: str, precision: str, checkpointing: bool, optimizer: str = "adamw", head_chunk: int = 128
) -> Config:
    stage = StageConfig("pretrain", adapter=AdapterConfig(adapter, rank=8), head_chunk=head_chunk)
    stage.optim = OptimConfig(optimizer)
    return Config(
        stage=stage, trainer=TrainerConfig("cpu", precision=precision, activation_checkpointing=checkpointing)
    )


def build_on_cpu(cfg: Config, shape: ModelShape) -> Transformer:
    adapter, precision = cfg.stage.adapter, cfg.trainer.precision
    adapted = adapter.name != "none"
    attach = partial(adapters.attach, cfg=adapter, precision=precision) if adapted else None
    model = build_model(shape, cfg.trainer, "sdpa", torch.device("cpu"), None, None if adapted else 0, attach)
    if adapted:
        adapters.load_base(model, RandomWeights(shape), seed=0)
    return model


def build_step(model: Transformer, cfg: Config, tokens: int) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return an optimizer step of two micro-batches (the second runs while all gradients exist), and its optimizer."""
    optimizer = build_optimizer(model, cfg.stage.optim.name, (0.9, 0.95), 1e-8, 0.1)
    x = ids(1, tokens, model.shape.vocab_size)
    mixed = cfg.trainer.precision == "bf16-mixed"

    def run() -> None:
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
                head = partial(cross_entropy, labels=x.roll(-1, 1), chunk_size=cfg.stage.head_chunk)
                loss = model(x, head=head)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, optimizer
