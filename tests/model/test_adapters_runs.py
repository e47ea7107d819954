"""Runs of adapters: checkpoints, exact resume, later stages, two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nb_lightning.checkpoints import folders
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.config.schema import AdapterConfig
from nb_lightning.model import adapters
from nb_lightning.model.transformer import Transformer
from nb_lightning.model.weights import load_weights
from tests.dpd_harness import train_here
from tests.harness import TINY, read_trace
from tests.model.adapters_harness import SHAPE, base_weights, write_hf
from tests.model.harness import ids
from tests.stages.distributed_harness import assert_same_training, losses, torchrun

pytestmark = pytest.mark.runs

WIDE = ("model.d_model=64", "model.head_dim=32", "model.d_mlp=128")  # harness.TINY in this shape


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("base"), base_weights(), SHAPE)


def fit(corpus: Path, root: Path, *overrides: str) -> Path:
    """`train.py` in this process, which has imported peft already; returns the run."""
    paths = [f"paths.root={root}", f"paths.data_root={corpus}"]
    return train_here([*TINY, *WIDE, *paths, "+callbacks.trace={_target_: nb_trace.StepTrace}", *overrides])


LORA = ("stage.adapter.name=lora", "stage.adapter.rank=4")
QLORA = ("stage.adapter.name=qlora", "stage.adapter.rank=4", "stage.adapter.dropout=0.1")


@pytest.fixture(scope="module")
def unbroken(corpus: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("unbroken"), *QLORA, f"init_from={base}")


@pytest.fixture(scope="module")
def lora(corpus: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("lora"), *LORA, f"init_from={base}")


def cut(run: Path, root: Path, steps: str = "step-00000010") -> Path:
    """A copy of a run that was stopped after its tenth step."""
    shutil.copytree(run, root / "runs" / run.name)
    for path in (root / "runs" / run.name / "checkpoints").iterdir():
        if path.name > steps:
            shutil.rmtree(path)
    for trace in (root / "runs" / run.name).glob("trace.jsonl*"):
        trace.unlink()
    return root / "runs" / run.name


def test_a_checkpoint_holds_what_trains_and_names_its_base(unbroken: Path, base: Path) -> None:
    (folder,) = (unbroken / "checkpoints").glob("*end-of-decay")
    state = torch.load(folder / folders.STATE, weights_only=True)
    assert len(state["state_dict"]) == 28 and all("lora_" in name for name in state["state_dict"])
    assert len(state["optimizer_states"][0]["state"]) == 28
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["trained_parameters"] == adapters.count_trained_parameters(SHAPE, AdapterConfig("qlora", rank=4))
    saved = folders.read_info(folder)["adapter"]
    assert saved["base"]["path"] == str(base.resolve())
    assert saved["base"]["tensors"].keys() == base_weights().stored.keys()
    assert saved["base"]["tensors"]["norm.weight"] == base_weights().digest("norm.weight")


def test_resume_is_exact(unbroken: Path, corpus: Path, base: Path, tmp_path: Path) -> None:
    """With QLoRA and dropout, to the last bit of loss, gradients and weights."""
    run = cut(unbroken, tmp_path)
    fit(corpus, tmp_path, *QLORA, f"init_from={base}", "resume=true")
    whole, resumed = read_trace(unbroken), read_trace(run)
    assert sorted(resumed) == list(range(10, 20))
    assert all(resumed[step] == whole[step] for step in resumed)
    states = [
        torch.load(next((folder / "checkpoints").glob("*end-of-decay")) / folders.STATE, weights_only=True)
        for folder in (unbroken, run)
    ]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init_from={other}"], "init_from={other} is not the base that the adapters were trained on ({base}, as"),
        (["init_from={base}", "stage.adapter.rank=8"], "stage.adapter.rank is 8, but "),
        (["init_from={base}", "stage.adapter.name=none"], "stage.adapter.name is none, but "),
    ],
)
def test_resume_refuses_another_base_or_other_adapters(
    unbroken: Path, corpus: Path, base: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    cut(unbroken, tmp_path)
    other = base_weights()
    other.tensors["layers.0.mlp.up_proj.weight"][3, 4] += 1e-3
    names = {"base": str(base), "other": str(write_hf(tmp_path / "other", other, SHAPE))}
    given = [override.format(**names) for override in overrides]
    with pytest.raises(ValueError) as caught:
        fit(corpus, tmp_path, *QLORA, "resume=true", *given)
    assert str(caught.value).startswith(message.format(**names))


def test_a_later_stage_begins_with_base_and_adapters_merged(
    lora: Path, corpus: Path, base: Path, tmp_path: Path
) -> None:
    origin = find_origin(str(lora))
    expected = Transformer(SHAPE)
    load_weights(expected, origin.open())
    run = fit(corpus, tmp_path, f"init_from={lora}", "stage.phases.warmup.lr.end=0", "trainer.save_every_n_steps=1",
              "trainer.keep_last=99", "stage.total_tokens=5120")  # fmt: skip
    first = torch.load(run / "checkpoints/step-00000001/state", weights_only=True)["state_dict"]
    for name, p in expected.named_parameters():
        assert torch.equal(first[f"model.{name}"], p)
    assert not torch.equal(expected.layers[0].mlp.up_proj.weight, base_weights().tensors["layers.0.mlp.up_proj.weight"])


def test_exported_adapters_load_in_peft_on_the_same_base(lora: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from nb_lightning import export

    export.run(export.parser().parse_args(["--from", str(lora), "--adapter", f"{tmp_path}/adapter"]))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ours = Transformer(SHAPE)
    load_weights(ours, find_origin(str(lora)).open())
    tokens = ids(2, 24, 260)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"exported from a run, and no model; name that run, or export it whole"):
        find_origin(f"{tmp_path}/adapter")
    with pytest.raises(ValueError, match="is no run of adapters"):
        export.run(export.parser().parse_args(["--from", str(base), "--adapter", f"{tmp_path}/other"]))


def test_adapters_train_on_a_base_that_has_adapters(lora: Path, corpus: Path, tmp_path: Path) -> None:
    run = fit(corpus, tmp_path, *QLORA, f"init_from={lora}", "run_name=second")
    weights = find_origin(str(run)).open()
    assert isinstance(weights, adapters.MergedWeights) and isinstance(weights.base, adapters.MergedWeights)
    weights.require(SHAPE)
    assert torch.isfinite(weights.read("layers.0.mlp.up_proj.weight")).all()


def test_a_base_that_is_gone_is_named(lora: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    for path in (run / "checkpoints").glob("*/checkpoint.json"):
        path.write_text(path.read_text().replace('"path": "', '"path": "/nowhere'))
    with pytest.raises(ValueError, match=r"holds adapters only, and their base is gone: .*/nowhere"):
        find_origin(str(run)).open()


def test_accumulation_changes_no_loss(lora: Path, corpus: Path, base: Path, tmp_path: Path) -> None:
    run = fit(corpus, tmp_path, *LORA, f"init_from={base}", "stage.micro_batch_size=2",
              "stage.phases.decay.micro_batch_size=1", "trainer.activation_checkpointing=true")  # fmt: skip
    assert_same_training(losses(read_trace(lora)), losses(read_trace(run)))


@pytest.mark.parametrize("strategy, adapter", [("ddp", "qlora"), pytest.param("fsdp", "lora", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(
    request: pytest.FixtureRequest, corpus: Path, base: Path, tmp_path: Path, strategy: str, adapter: str
) -> None:
    options = ["stage.adapter.rank=4", f"init_from={base}", f"stage.adapter.name={adapter}"]
    single = request.getfixturevalue("lora") if adapter == "lora" else fit(corpus, tmp_path / "single", *options)
    two = ["stage.phases.decay.micro_batch_size=1", f"trainer.strategy={strategy}"]
    torchrun(corpus, tmp_path, *WIDE, *options, *two)
    run = tmp_path / "runs/pretrain"
    for rank in range(2):
        assert_same_training(losses(read_trace(single)), losses(read_trace(run, rank)))
    one, other = find_origin(str(single)).open(), find_origin(str(run)).open()
    for name in one.stored:
        torch.testing.assert_close(one.read(name), other.read(name), rtol=0, atol=1e-5)
    if strategy == "fsdp":  # its checkpoint is in shards: that resumes too
        cut(run, tmp_path / "again")
        torchrun(corpus, tmp_path / "again", *WIDE, *options, *two, "resume=true")
        assert_same_training(
            losses(read_trace(single))[10:],
            [float.fromhex(line["loss"]) for line in read_trace(tmp_path / "again/runs/pretrain", 0).values()],
        )
