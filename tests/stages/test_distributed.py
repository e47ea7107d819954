"""One process, accumulation, and two processes (ddp and fsdp over gloo) are the same training."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness import TRACE, command, environment, read_trace, run_train
from tests.stages.distributed_harness import assert_same_training, losses, torchrun

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    root = tmp_path_factory.mktemp("single")
    run_train(corpus, root, *TRACE)
    return read_trace(root / "runs/pretrain")


def test_accumulation(corpus: Path, tmp_path: Path, single: dict[int, dict]) -> None:
    run_train(corpus, tmp_path, *TRACE, "stage.micro_batch_size=2", "stage.phases.decay.micro_batch_size=1")
    trace = read_trace(tmp_path / "runs/pretrain")
    assert_same_training(losses(single), losses(trace))
    assert [line["tokens"] for line in trace.values()] == [line["tokens"] for line in single.values()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch_size", [8, 2])  # without and with accumulation
def test_two_processes(
    corpus: Path, tmp_path: Path, single: dict[int, dict], strategy: str, micro_batch_size: int
) -> None:
    torchrun(
        corpus,
        tmp_path,
        f"trainer.strategy={strategy}",
        f"stage.micro_batch_size={micro_batch_size}",
        "stage.phases.decay.micro_batch_size=1",
    )
    ranks = [read_trace(tmp_path / "runs/pretrain", rank) for rank in range(2)]
    for trace in ranks:
        assert_same_training(losses(single), losses(trace))
        grad_norms = [(float.fromhex(trace[i]["grad_norm"]), float.fromhex(single[i]["grad_norm"])) for i in range(20)]
        assert max(abs(a - b) / b for a, b in grad_norms) < 1e-3
    # Both ranks together see exactly the rows of the single process, in its order.
    for step in range(20):
        assert ranks[0][step]["sample_ids"] + ranks[1][step]["sample_ids"] == single[step]["sample_ids"]


def test_sigterm_to_one_of_two_processes_stops_and_saves_both(
    corpus: Path, tmp_path: Path, single: dict[int, dict]
) -> None:
    """`python train.py trainer=ddp` starts its second process itself; a scheduler signals only the first."""
    overrides = [*TRACE, "trainer=ddp", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.progress_bar=false"]
    overrides.append("stage.phases.decay.micro_batch_size=1")
    process = subprocess.Popen(
        command(corpus, tmp_path, *overrides), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    trace = tmp_path / "runs/pretrain/trace.jsonl.0"
    while not (trace.exists() and trace.read_text().count("\n") > 6):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    before = [read_trace(tmp_path / "runs/pretrain", rank) for rank in range(2)]
    assert before[0].keys() == before[1].keys()  # both stopped after the same step
    run_train(corpus, tmp_path, *TRACE, "resume=true")  # one process goes on where two stopped
    after = read_trace(tmp_path / "runs/pretrain")
    assert sorted([*before[0], *after]) == list(range(20))
    for step, line in after.items():
        assert line["sample_ids"] == single[step]["sample_ids"]
        assert float.fromhex(line["loss"]) == pytest.approx(float.fromhex(single[step]["loss"]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resume_with_another_world_size(corpus: Path, tmp_path: Path, single: dict[int, dict], strategy: str) -> None:
    torchrun(corpus, tmp_path, f"trainer.strategy={strategy}", "stage.phases.decay.micro_batch_size=1")
    checkpoints = tmp_path / "runs/pretrain/checkpoints"
    for path in checkpoints.iterdir():  # go back to step 12
        if path.name > "step-00000013":
            shutil.rmtree(path)
    overrides = [f"trainer.strategy={strategy}", "stage.phases.decay.micro_batch_size=1", "resume=true"]
    torchrun(corpus, tmp_path, *overrides, ranks=1)
    resumed = read_trace(tmp_path / "runs/pretrain")
    assert sorted(resumed) == list(range(12, 20))
    for step, line in resumed.items():
        assert line["sample_ids"] == single[step]["sample_ids"]
        assert abs(float.fromhex(line["loss"]) / float.fromhex(single[step]["loss"]) - 1) < 1e-4


def test_tied_embeddings_stay_tied_under_fsdp(corpus: Path, tmp_path: Path) -> None:
    run_train(corpus, tmp_path, *TRACE, "model.tie_embeddings=true")
    single = read_trace(tmp_path / "runs/pretrain")
    torchrun(
        corpus,
        tmp_path,
        "trainer.strategy=fsdp",
        "model.tie_embeddings=true",
        "stage.phases.decay.micro_batch_size=1",
        "run_name=sharded",
    )
    assert_same_training(losses(single), losses(read_trace(tmp_path / "runs/sharded", 0)))
