"""The launch files of docs/examples/launch, run as they are: torchrun on one and on two machines, and SLURM.

The machines are processes of this one, the network is loopback, and SLURM is two small programs that do what `srun`
and `scontrol` do here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import ROOT, TRACE, command, environment, free_port, read_trace, run_train

pytestmark = pytest.mark.runs

LAUNCH = ROOT / "docs/examples/launch"

SRUN = """#!/usr/bin/env bash
# srun [options] command: the tasks of a job of two nodes, with the variables that SLURM gives them.
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM   # SLURM itself signals the tasks; here by way of this
pids=()
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_NODEID=$((rank / SLURM_NTASKS_PER_NODE)) SLURM_LOCALID=$((rank % SLURM_NTASKS_PER_NODE)) \\
    "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid"; got=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; got=$?; done   # a trapped signal ends `wait` early
  [ "$got" -gt "$status" ] && status=$got
done
exit "$status"
"""


def overrides(corpus: Path, root: Path, strategy: str) -> list[str]:
    own = [*TRACE, f"trainer.strategy={strategy}", "stage.phases.decay.micro_batch_size=1"]
    return command(corpus, root, *own)[2:]


def start(script: str, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(LAUNCH / script), *args],
        env=environment(PYTHON=sys.executable, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-4000:]
    return outputs


def wait_for_step(root: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    trace = root / "runs/pretrain/trace.jsonl.0"
    while not (trace.exists() and trace.read_text().count("\n") > step):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def single(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    root = tmp_path_factory.mktemp("single")
    run_train(corpus, root, *TRACE)
    return read_trace(root / "runs/pretrain")


def assert_is_the_run_of_one_process(root: Path, single: dict[int, dict]) -> None:
    """Both ranks together took its rows in its order and got its losses."""
    ranks = [read_trace(root / "runs/pretrain", rank) for rank in range(2)]
    for step in range(20):
        assert ranks[0][step]["sample_ids"] + ranks[1][step]["sample_ids"] == single[step]["sample_ids"]
        assert float.fromhex(ranks[0][step]["loss"]) == pytest.approx(float.fromhex(single[step]["loss"]), rel=1e-4)


@pytest.mark.slow
def test_one_machine_goes_on_after_sigterm(corpus: Path, tmp_path: Path, single: dict[int, dict]) -> None:
    process = start("torchrun.sh", *overrides(corpus, tmp_path, "ddp"), GPUS="2")
    wait_for_step(tmp_path, 6, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "stopped by SIGTERM" in output
    stopped_at = len(read_trace(tmp_path / "runs/pretrain", 0))
    assert 6 < stopped_at < 20
    finish(start("torchrun.sh", *overrides(corpus, tmp_path, "ddp"), GPUS="2"))
    assert_is_the_run_of_one_process(tmp_path, single)
    lines = (tmp_path / "runs/pretrain/trace.jsonl.0").read_text().splitlines()
    assert len(lines) == 20  # no step was run twice


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_one_machine_starts_again_when_a_process_dies(corpus: Path, tmp_path: Path, single: dict[int, dict]) -> None:
    process = start("torchrun.sh", *overrides(corpus, tmp_path, "ddp"), GPUS="2", MAX_RESTARTS="1")
    wait_for_step(tmp_path, 12, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    (output,) = finish(process)
    assert "resuming from" in output
    assert_is_the_run_of_one_process(tmp_path, single)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_machines(corpus: Path, tmp_path: Path, single: dict[int, dict], strategy: str) -> None:
    env = {"GPUS": "1", "NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    args = overrides(corpus, tmp_path, strategy)
    finish(*(start("torchrun_nodes.sh", *args, NODE_RANK=str(rank), **env) for rank in range(2)))
    assert_is_the_run_of_one_process(tmp_path, single)


@pytest.mark.slow
def test_one_machine_goes_on_where_two_stopped(corpus: Path, tmp_path: Path, single: dict[int, dict]) -> None:
    env = {"GPUS": "1", "NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    args = overrides(corpus, tmp_path, "fsdp")
    nodes = [start("torchrun_nodes.sh", *args, NODE_RANK=str(rank), **env) for rank in range(2)]
    wait_for_step(tmp_path, 6, *nodes)
    nodes[1].send_signal(signal.SIGTERM)  # one machine hears of it; both must stop after the same step
    for node in nodes:
        node.communicate(timeout=300)
        assert node.returncode != 0
    before = [read_trace(tmp_path / "runs/pretrain", rank) for rank in range(2)]
    assert before[0].keys() == before[1].keys() and 6 < len(before[0]) < 20
    finish(start("torchrun.sh", *args, GPUS="1"))
    after = read_trace(tmp_path / "runs/pretrain")
    assert sorted([*before[0], *after]) == list(range(20))
    for step, line in after.items():
        assert line["sample_ids"] == single[step]["sample_ids"]
        assert float.fromhex(line["loss"]) == pytest.approx(float.fromhex(single[step]["loss"]), rel=1e-4)


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start slurm.sbatch as a job of two nodes with one task each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/scontrol\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NAME": "nb_lightning", "JOB_NUM_NODES": "2", "NNODES": "2", "NTASKS": "2"}
    job |= {"NTASKS_PER_NODE": "1", "NODELIST": "127.0.0.1", "SUBMIT_DIR": str(ROOT)}
    env = {f"SLURM_{name}": value for name, value in job.items()}
    env |= {"PATH": f"{programs}:{os.environ['PATH']}", "MASTER_PORT": free_port()}
    return lambda *args: start("slurm.sbatch", *args, **env)


def test_slurm_requeues_a_job_that_was_stopped(
    corpus: Path, tmp_path: Path, single: dict[int, dict], slurm: Callable[..., subprocess.Popen[str]]
) -> None:
    process = slurm(*overrides(corpus, tmp_path, "fsdp"))
    wait_for_step(tmp_path, 6, process)
    (srun,) = children(process.pid)
    os.kill(srun, signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "4711"]
    finish(slurm(*overrides(corpus, tmp_path, "fsdp")))
    assert_is_the_run_of_one_process(tmp_path, single)
    assert len((tmp_path / "scontrol").read_text().splitlines()) == 1  # a finished job is not put back


def test_slurm_does_not_requeue_a_mistake(
    corpus: Path, tmp_path: Path, slurm: Callable[..., subprocess.Popen[str]]
) -> None:
    process = slurm(*overrides(corpus, tmp_path, "fsdp"), "trainer.strategy=fdsp")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "trainer.strategy is 'fdsp'" in output
    assert not (tmp_path / "scontrol").exists()
