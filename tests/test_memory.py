"""The estimate of a run's memory beside what its steps really hold: every tensor counted, and the process measured."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nb_lightning.batch import PreferenceBatch
from nb_lightning.checkpoints.pretrained import GGUFOrigin
from nb_lightning.config.schema import AdapterConfig, Config, DPDConfig, OptimConfig, StageConfig, TrainerConfig
from nb_lightning.dry_run import memory_per_device
from nb_lightning.losses.dpd import dpd_loss
from nb_lightning.losses.head import cross_entropy
from nb_lightning.model import adapters
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.model.weights import Stored, Weights
from nb_lightning.stages.frozen import FrozenModel
from nb_lightning.stages.optim import build_optimizer
from tests.harness import ROOT
from tests.model.harness import ids


class Peak(TorchDispatchMode):
    """Bytes of all storages that are made and still there, at most; not of those that were there before, as weights."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, new=True)
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, values: Any, new: bool) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                size = storage.nbytes() if new else 0
                self.known.add(storage._cdata)
                self.live += size
                weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size


class Random(Weights):
    """Weights of any size, made when they are read."""

    def __init__(self, shape: ModelShape) -> None:
        with torch.device("meta"):
            names = {name: tuple(p.shape) for name, p in Transformer(shape).named_parameters()}
        super().__init__("random", {name: Stored(name, dims) for name, dims in names.items()}, torch.bfloat16)

    def read(self, name: str) -> Tensor:
        return torch.randn(self.stored[name].shape, dtype=torch.bfloat16) * 0.02


def config(adapter: str, precision: str, checkpointing: bool, optimizer: str = "adamw", chunk: int = 128) -> Config:
    stage = StageConfig("pretrain", adapter=AdapterConfig(adapter, rank=8), head_chunk=chunk)
    stage.optim = OptimConfig(optimizer)
    return Config(
        stage=stage, trainer=TrainerConfig("cpu", precision=precision, activation_checkpointing=checkpointing)
    )


def build(cfg: Config, shape: ModelShape) -> Transformer:
    adapter, precision = cfg.stage.adapter, cfg.trainer.precision
    adapted = adapter.name != "none"
    attach = partial(adapters.attach, cfg=adapter, precision=precision) if adapted else None
    model = build_model(shape, cfg.trainer, "sdpa", torch.device("cpu"), None, None if adapted else 0, attach)
    if adapted:
        adapters.fill(model, Random(shape), seed=0)
    return model


def step(model: Transformer, cfg: Config, tokens: int) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """One optimizer step of two micro-batches, so that the second runs while all gradients are there."""
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


@pytest.mark.parametrize(
    "adapter, precision, checkpointing",
    [
        ("none", "32-true", False),
        ("none", "bf16-mixed", True),
        ("none", "bf16-true", False),
        ("lora", "32-true", True),
        ("lora", "bf16-mixed", False),
        ("qlora", "bf16-mixed", True),
    ],
)
def test_the_estimate_is_what_a_step_holds(adapter: str, precision: str, checkpointing: bool) -> None:
    shape, tokens = ModelShape(384, 128, 3, 4, 2, 32, 384), 768
    cfg = config(adapter, precision, checkpointing)
    estimate = memory_per_device(cfg, shape, tokens)
    weights = sum(estimate.pop(key, 0.0) for key in ("weights", "frozen weights", "adapters"))
    model = build(cfg, shape)
    found = sum(p.untyped_storage().nbytes() for p in model.parameters())
    if adapter == "qlora":  # the scales of the blocks are not parameters
        states = [p.quant_state for p in model.parameters() if p.dtype == torch.uint8]
        found += sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    assert weights == pytest.approx(found, rel=1e-3)
    run, optimizer = step(model, cfg, tokens)
    run()  # the first one makes the optimizer's state
    state = sum(leaf.nbytes for leaf in tree_leaves(optimizer.state_dict()["state"]) if isinstance(leaf, Tensor))
    assert estimate.pop("optimizer") == pytest.approx(state, rel=1e-2)
    with Peak() as peak:
        run()
    assert 0.88 < sum(estimate.values()) / peak.peak < 1.2  # what comes and goes
    assert 0.9 < (sum(estimate.values()) + weights + state) / (peak.peak + found + state) < 1.15


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_teacher_of_another_shape_is_counted(precision: str) -> None:
    shape, other, tokens = ModelShape(384, 128, 3, 4, 2, 32, 384), ModelShape(384, 192, 4, 4, 2, 32, 512), 768
    cfg = config("none", precision, False)
    cfg.stage = DPDConfig("dpd", head_chunk=128, teacher="somewhere")
    estimate = memory_per_device(cfg, shape, tokens, {"teacher": other})
    model = build(cfg, shape)
    origin = GGUFOrigin(Path(), other, None, Random(other))  # any that opens these weights
    teacher = FrozenModel(origin, cfg.trainer, "sdpa", torch.device("cpu"), None)
    assert estimate["teacher"] == sum(p.untyped_storage().nbytes() for p in teacher.model.parameters())
    responses = ids(1, tokens, shape.vocab_size).view(4, 2, 96).tolist()
    batch = PreferenceBatch.from_pairs([([1], *pair) for pair in responses], ref_logprobs=torch.zeros(4, 2))
    assert batch.input_ids.numel() == tokens
    mixed = precision == "bf16-mixed"

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
            known = teacher(batch)
            head = partial(dpd_loss, batch=batch, counts=batch.counts, teacher=known, chunk_size=cfg.stage.head_chunk)
            loss, _ = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)
        loss.backward()

    with Peak() as peak:
        run(), run()  # in the second all gradients are there
    coming = sum(estimate[key] for key in ("gradients", "activations", "layer in hand", "head"))
    assert 0.95 < coming / peak.peak < 1.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options", [("none", "32-true", False), ("none", "bf16-mixed", True), ("qlora", "bf16-mixed", True)]
)
def test_the_estimate_is_what_the_process_takes(options: tuple[Any, ...]) -> None:
    """Resident memory at its peak, beyond that of a process that has imported all and trained a tiny model."""
    code = f"""
import re
from pathlib import Path
from tests.test_memory import *
def resident(what): return 1024 * int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
shape, cfg = ModelShape(8192, 512, 4, 8, 2, 64, 1536), config(*{options!r}, chunk=512)
run, _ = step(build(cfg, ModelShape(64, 64, 1, 2, 1, 32, 64)), cfg, 64)
run()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far, some of it the parent's, is forgotten
before = resident("VmRSS")
run, _ = step(build(cfg, shape), cfg, 2048)
run(), run()
print(resident("VmHWM") - before, sum(memory_per_device(cfg, shape, 2048).values()))
"""
    # With a fixed threshold glibc gives back what is freed.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    found, estimate = map(float, done.stdout.split())
    assert 0.8 < estimate / found < 1.25
