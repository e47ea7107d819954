"""The paper's run on paper: sizes, steps and FLOPs against hand counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nb_lightning.checkpoints.hf_config import config_from_shape
from nb_lightning.config.compose import plan_of
from nb_lightning.dry_run import GIB, describe, frozen_models, memory_per_device, missing
from nb_lightning.model.transformer import ModelShape
from tests.config.harness import composed
from tests.harness import ROOT


def test_the_paper_run() -> None:
    text = describe(composed("model=nanbeige4_3b", "trainer=fsdp"))
    assert "3,933,637,120 parameters (3,082,979,840 without embeddings)" in text
    assert "12,400,000,000,000" in text and "65536" in text
    flops = 19e12 * 23.0621184e9 + 4e12 * 53.2611072e9
    assert f"{flops:.3g} FLOP" in text


@pytest.mark.parametrize(
    "overrides, weights, optimizer",
    [
        ((), 3933637120 * 4, 3933637120 * 8),
        (("trainer.precision=bf16-true", "stage.optim.name=adamw8bit"), 3933637120 * 2, 3933637120 * 2 * (1 + 4 / 256)),
        (("trainer.strategy=fsdp", "trainer.devices=8"), 3933637120 * 4 / 8, 3933637120 * 8 / 8),
    ],
)
def test_memory_of_weights_and_optimizer(overrides: tuple[str, ...], weights: float, optimizer: float) -> None:
    cfg = composed("model=nanbeige4_3b", *overrides)
    memory = memory_per_device(cfg, ModelShape(**asdict(cfg.model)), micro_tokens=65536)
    assert memory["weights"] == memory["gradients"] == pytest.approx(weights)
    assert memory["optimizer"] == pytest.approx(optimizer)
    assert memory["head"] / GIB < 3


def test_a_run_too_large_for_a_gpu_names_what_takes_less() -> None:
    text = describe(composed("stage=sft", "model=nanbeige4_2_3b"))
    options = ["trainer.activation_checkpointing=true", "trainer=fsdp", "stage.adapter.name=qlora"]
    positions = [text.index(option) for option in options]
    assert positions == sorted(positions)  # the largest saving first: a row of 64 K tokens has the most in activations
    text = describe(composed("stage=sft", "model=nanbeige4_2_3b", "trainer=fsdp"))
    assert "trainer.activation_checkpointing=true" not in text and "trainer=fsdp" not in text
    assert "holds; less with" not in describe(composed("stage=sft"))


@pytest.mark.runs
def test_a_dry_run_draws_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    overrides = ["model=nanbeige4_3b", "trainer=fsdp", "dry_run=true", f"paths.root={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "memory per device" in done.stdout
    assert (tmp_path / "runs/pretrain/plan.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "runs/pretrain/checkpoints").exists()


def test_a_teacher_is_counted(tmp_path: Path) -> None:
    """As large as the model where it is not there; else by its own shape."""
    words = ("stage=dpd", "model=nanbeige4_3b", "trainer=fsdp", f"paths.root={tmp_path}")
    cfg = composed(*words)
    shape = ModelShape(**asdict(cfg.model))
    embeddings = 2 * 166144 * 2560
    assert frozen_models(cfg, shape) == {"teacher": shape}
    memory = memory_per_device(cfg, shape, 65536, frozen_models(cfg, shape))
    assert memory["teacher"] == 3933637120 * 2 / 8 + embeddings * 2  # what FSDP2's root has stays gathered
    text = describe(cfg)
    assert re.search(rf"stage.teacher +{tmp_path}/data/teacher, counted as large as the model\n", text)
    assert re.search(rf"init_from +{tmp_path}/runs/sft\n", text) and "data.sources.agent" in text
    tokens = plan_of(cfg.stage).in_whole_steps().total_tokens
    assert f"{tokens * shape.flops_per_token(65536) * 4 / 3:.3g} FLOP" in text

    small = replace(shape, n_layers=2)
    (tmp_path / "data/teacher").mkdir(parents=True)
    (tmp_path / "data/teacher/config.json").write_text(json.dumps(config_from_shape(small, torch.bfloat16)))
    assert {**asdict(frozen_models(cfg, shape)["teacher"]), "init_std": 0} == {**asdict(small), "init_std": 0}
    assert "stage.teacher " not in describe(cfg)
    for nf4, size in ((False, 2), (True, 1 / 2 + 1 / 64 + 4 / 64 / 256)):
        one = composed(*words, "trainer.strategy=single", "trainer.devices=1", f"stage.teacher_nf4={nf4}")
        linears = 2 * (2560 * 128 * (2 * 20 + 2 * 4) + 3 * 2560 * 10496)
        whole = memory_per_device(one, shape, 65536, {"teacher": small})["teacher"]
        assert whole == pytest.approx(linears * size + (small.count_parameters() - linears) * 2)


def test_what_rl_holds_beside_the_policy_is_counted(tmp_path: Path) -> None:
    words = ("stage=rl", "model=nanbeige4_3b", "trainer=fsdp", f"paths.root={tmp_path}")
    cfg, parameters = composed(*words, "stage.kl_weight=0.1"), 3933637120
    shape = ModelShape(**asdict(cfg.model))
    memory = memory_per_device(cfg, shape, 36864, frozen_models(cfg, shape))
    assert memory["reward model"] == parameters * 2  # whole on every device
    assert memory["reference"] == parameters * 2 / 8 + 2 * 166144 * 2560 * 2
    text = describe(composed(*words))
    assert "\n  reward model " in text and "\n  reference " not in text
    assert "\n  reward model " not in describe(composed(*words, "stage.reward_model=null"))


def test_what_is_not_there_yet(tmp_path: Path) -> None:
    """Only what the plan reads and does not make itself."""
    demo = composed("stage=sft", f"paths.root={tmp_path}")
    assert missing(demo) == {"init_from": f"{tmp_path}/runs/pretrain"}
    (tmp_path / "runs/pretrain").mkdir(parents=True)  # a folder alone is no run
    assert missing(demo) == {"init_from": f"{tmp_path}/runs/pretrain"}
    words = ("stage=sft", "model=nanbeige4_3b", f"paths.root={tmp_path}", "data.tasks=[held_out.jsonl]")
    cfg = composed(*words, "data.sources.code=s3://bucket/code", "stage.phases.overall.mixture.agent=0")
    (tmp_path / "data/sft/maths").mkdir(parents=True)
    assert sorted(missing(cfg)) == [
        "data.sources.general", "data.sources.reasoning", "data.sources.science", "data.tasks[0]", "data.tokenizer",
        "init_from",
    ]  # fmt: skip


def test_qlora_of_the_3b_at_64k_fits_one_gpu() -> None:
    cfg = composed("experiment=qlora_3b")
    shape = ModelShape(**asdict(cfg.model))
    linears = 32 * (2560 * 128 * (2 * 20 + 2 * 4) + 3 * 2560 * 10496)
    adapters = 32 * 32 * (2 * (2560 + 2560) + 2 * (2560 + 512) + 3 * (2560 + 10496))
    memory = memory_per_device(cfg, shape, micro_tokens=65536)
    assert memory["adapters"] == memory["gradients"] == adapters * 4
    # 4 bits, an 8-bit scale for each 64 weights, and a float32 scale for each 256 of those; the rest in bfloat16
    frozen = linears * (1 / 2 + 1 / 64 + 4 / 64 / 256) + (shape.count_parameters() - linears) * 2
    assert memory["frozen weights"] == pytest.approx(frozen)
    assert memory["optimizer"] == 0  # paged
    assert memory["layer inputs"] == 65536 * 32 * 2560 * 2
    assert 25 * GIB < sum(memory.values()) < 30 * GIB
    text = describe(cfg)
    assert f"{adapters:,} parameters train" in text and "host's memory" in text
    phases = plan_of(cfg.stage).in_whole_steps().phases
    frozen, full = (sum(p.tokens * shape.flops_per_token(p.seq_len, frozen=x) for p in phases) for x in (True, False))
    assert f"{frozen:.3g} FLOP" in text and frozen < 0.85 * full
