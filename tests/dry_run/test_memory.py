"""The estimate of a run's memory beside what its steps really hold: every tensor counted, and the process measured."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nb_lightning.checkpoints.pretrained import GGUFOrigin
from nb_lightning.config.schema import DPDConfig
from nb_lightning.dry_run.memory import memory_per_device
from nb_lightning.losses.dpd import dpd_loss
from nb_lightning.model.transformer import ModelShape
from nb_lightning.stages.frozen import FrozenModel
from tests.harness import ROOT
from tests.losses.pairs_harness import pack_pairs
from tests.memory_harness import RandomWeights, StoragePeak, build_config, build_on_cpu, build_step
from tests.model.harness import ids

pytestmark = pytest.mark.runs


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
    cfg = build_config(adapter, precision, checkpointing)
    estimate = memory_per_device(cfg, shape, tokens)
    weights = sum(estimate.pop(key, 0.0) for key in ("weights", "frozen weights", "adapters"))
    model = build_on_cpu(cfg, shape)
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    if adapter == "qlora":  # the scales of the blocks are not parameters
        states = [p.quant_state for p in model.parameters() if p.dtype == torch.uint8]
        held += sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    assert weights == pytest.approx(held, rel=1e-3)
    run, optimizer = build_step(model, cfg, tokens)
    run()  # the first one makes the optimizer's state
    state = sum(leaf.nbytes for leaf in tree_leaves(optimizer.state_dict()["state"]) if isinstance(leaf, Tensor))
    assert estimate.pop("optimizer") == pytest.approx(state, rel=1e-2)
    with StoragePeak() as peak:
        run()
    assert 0.88 < sum(estimate.values()) / peak.peak < 1.2  # what comes and goes
    assert 0.9 < (sum(estimate.values()) + weights + state) / (peak.peak + held + state) < 1.15


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_teacher_of_another_shape_is_counted(precision: str) -> None:
    shape, other, tokens = ModelShape(384, 128, 3, 4, 2, 32, 384), ModelShape(384, 192, 4, 4, 2, 32, 512), 768
    cfg = build_config("none", precision, False)
    cfg.stage = DPDConfig("dpd", head_chunk=128, teacher="somewhere")
    estimate = memory_per_device(cfg, shape, tokens, {"teacher": other})
    model = build_on_cpu(cfg, shape)
    origin = GGUFOrigin(Path(), other, None, RandomWeights(other))  # any that opens these weights
    teacher = FrozenModel(origin, cfg.trainer, "sdpa", torch.device("cpu"), None)
    assert estimate["teacher"] == sum(p.untyped_storage().nbytes() for p in teacher.model.parameters())
    responses = ids(1, tokens, shape.vocab_size).view(4, 2, 96).tolist()
    batch = pack_pairs([([1], *pair) for pair in responses], ref_logprobs=torch.zeros(4, 2))
    assert batch.input_ids.numel() == tokens
    mixed = precision == "bf16-mixed"

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
            outputs = teacher(batch)
            head = partial(dpd_loss, batch=batch, counts=batch.counts, teacher=outputs, chunk_size=cfg.stage.head_chunk)
            loss, _ = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)
        loss.backward()

    with StoragePeak() as peak:
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
import torch
from nb_lightning.dry_run.memory import memory_per_device
from nb_lightning.model.transformer import ModelShape
from tests.memory_harness import build_config, build_on_cpu, build_step
def resident(what): return 1024 * int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
shape, cfg = ModelShape(8192, 512, 4, 8, 2, 64, 1536), build_config(*{options!r}, head_chunk=512)
run, _ = build_step(build_on_cpu(cfg, ModelShape(64, 64, 1, 2, 1, 32, 64)), cfg, 64)
run()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far, some of it the parent's, is forgotten
before = resident("VmRSS")
run, _ = build_step(build_on_cpu(cfg, shape), cfg, 2048)
run(), run()
print(resident("VmHWM") - before, sum(memory_per_device(cfg, shape, 2048).values()))
"""
    # With a fixed threshold glibc gives back what is freed.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    resident, estimate = map(float, done.stdout.split())
    assert 0.8 < estimate / resident < 1.25
