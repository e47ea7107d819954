"""What `python -m nb_lightning.submit` would send, that it runs, and that lightning_sdk takes it.

The tests of the real SDK are skipped where it is not installed (`./run setup dev,studio`); of it only the call that
reaches the service is replaced.
"""

from __future__ import annotations

import inspect
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nb_lightning.submit import gpus, main
from tests.harness import ROOT, TRACE, command, environment, free_port, read_trace

CLUSTER = "stage=pretrain model=nanbeige4_3b trainer=fsdp paths.root=/teamspace/shared".split()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # submit adds to it


@pytest.fixture
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_sdk", None)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    main(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {key: value for key, value in (line.split(maxsplit=1) for line in lines)}


def test_one_machine_resumes_on_its_gpus(no_sdk: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = printed(capsys, "--dry-run", "--machine", "H100", "--studio", "mine", "stage=sft", "data.template='a b'")
    assert job["machine"] == "H100" and job["num_machines"] == "1" and job["studio"] == "mine"
    overrides = shlex.split(job["command"].removeprefix("exec python train.py "))
    assert overrides == ["resume=true", "trainer.devices=1", "trainer.num_nodes=1", "stage=sft", "data.template='a b'"]
    assert job["name"].startswith("sft-")


def test_the_job_has_the_root_that_was_checked(
    no_sdk: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NB_ROOT", "/teamspace/mine")
    job = printed(capsys, "--dry-run", "--machine", "H100", "--studio", "mine", "stage=sft")
    assert "/teamspace/mine" in job["env"]


def test_several_machines_start_torchrun(no_sdk: None, capsys: pytest.CaptureFixture[str]) -> None:
    job = printed(capsys, "--dry-run", "--machine", "H100_X_8", "--machines", "4", "--checkout", "/my code", *CLUSTER)
    assert job["command"].startswith("cd '/my code' && exec python -m torch.distributed.run --nnodes=4 ")
    assert "--nproc-per-node=8" in job["command"] and '--node-rank="$NODE_RANK"' in job["command"]
    assert "trainer.devices=8 trainer.num_nodes=4" in job["command"]


def test_secrets_are_not_shown(
    no_sdk: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INNOCENT", "from here")
    env = ["--env", "HF_TOKEN=abc", "--env", "INNOCENT", "--env", "NCCL_DEBUG=INFO"]
    job = printed(capsys, "--dry-run", "--machine", "CPU", *env, "stage=pretrain")
    assert job["env"] == "HF_TOKEN=(hidden) INNOCENT=(hidden) NCCL_DEBUG=INFO"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--machine CPU stage=pretrain trainer.devics=2", "trainer.devics"),
        ("--machine CPU stage=pretrian", "pretrian"),
        ("--machine CPU stage=pretrain trainer.strategy=dpp", "trainer.strategy is 'dpp'; allowed: single, ddp, fsdp"),
        ("--machine H100_X_8 stage=pretrain", "trainer.strategy=single runs one process"),
        ("--machine H100 stage=pretrain trainer=fsdp trainer.devices=8", "a machine H100 has 1 GPU(s)"),
        ("--machine CPU stage=pretrain trainer=gpu", "trainer.accelerator=cuda does not go with --machine CPU"),
        ("--machine H100 stage=pretrain trainer=cpu", "trainer.accelerator=cpu does not go with --machine H100"),
        ("--machine L4 --machines 2 stage=pretrain trainer.strategy=ddp", "paths.root is 'outputs'"),
        ("--machine L4 --attempts 2 stage=pretrain", "paths.root is 'outputs'"),
        ("--machine L4 --machines 2 stage=pretrain trainer.strategy=ddp trainer.num_nodes=3", "--machines is 2"),
        ("--machine L4 --machines 0 stage=pretrain", "--machines is 0"),
        ("--machine L4 --image a --studio b stage=pretrain", "choose one"),
        ("--machine L4 --env NOT_SET_ANYWHERE stage=pretrain", "NOT_SET_ANYWHERE is not set here"),
        ("--machine L4 --image a --path-mapping /data stage=pretrain", "--path-mapping /data"),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_machine(no_sdk: None, arguments: str, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--dry-run", *arguments.split()])
    assert words in str(stopped.value) and "\n" not in str(stopped.value)


def test_without_the_sdk_nothing_is_submitted(no_sdk: None) -> None:
    with pytest.raises(SystemExit, match=r"pip install 'nb_lightning\[studio\]'"):
        main(["--machine", "L4", "stage=pretrain"])


def test_a_trusted_package_may_be_named(no_sdk: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "callbacks=[pretrain,trace]" in printed(capsys, "--dry-run", "--machine", "CPU", *TRACE)["command"]


@pytest.mark.slow
def test_the_command_of_two_machines_trains(
    no_sdk: None, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = command(corpus, tmp_path, *TRACE, "trainer.strategy=ddp", "stage.phases.decay.micro_batch_size=1")[2:]
    where = ["--checkout", str(ROOT), "--python", sys.executable]
    job = printed(capsys, "--dry-run", "--machine", "CPU", "--machines", "2", *where, *overrides)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    machines = [
        subprocess.Popen(["sh", "-c", job["command"]], env=environment(NODE_RANK=str(rank), **address))
        for rank in range(2)
    ]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    assert sorted(read_trace(tmp_path / "runs/pretrain", 1)) == list(range(20))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches `lightning_sdk.Job.run`, held against its signature."""
    sdk = pytest.importorskip("lightning_sdk")
    signature, calls = inspect.signature(sdk.Job.run), []

    def run(*args: Any, **kwargs: Any) -> SimpleNamespace:
        calls.append(signature.bind(*args, **kwargs).arguments)  # TypeError: an argument that it does not have
        return SimpleNamespace(name=kwargs["name"], link="https://example.org/job")

    monkeypatch.setattr(sdk.Job, "run", run)
    return calls


def test_the_sdk_accepts_the_job(sent: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_sdk import Machine

    where = ["--image", "an/image", "--path-mapping", "/teamspace/shared=bucket:runs", "--teamspace", "me/mine"]
    more = ["--env", "HF_TOKEN=abc", "--interruptible", "--attempts", "3", "--name", "mine"]
    main(["--machine", "H100_X_8", "--machines", "4", *where, *more, *CLUSTER])
    assert "submitted mine: https://example.org/job" in capsys.readouterr().out
    (job,) = sent
    assert job["machine"] is Machine.H100_X_8 and job["num_machines"] == 4 and job["max_run_attempts"] == 3
    assert job["path_mappings"] == {"/teamspace/shared": "bucket:runs"} and job["env"] == {"HF_TOKEN": "abc"}
    assert job["interruptible"] is True and job["teamspace"] == "me/mine" and "torch.distributed.run" in job["command"]


def test_a_machine_that_the_sdk_does_not_have(sent: list[dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="--machine is 'H1000'; lightning_sdk has A100, "):
        main(["--machine", "H1000", "stage=pretrain"])
    assert sent == []


def test_gpus_of_every_machine() -> None:
    machine = pytest.importorskip("lightning_sdk").Machine
    known = {name: value for name, value in vars(machine).items() if isinstance(value, machine)}
    assert len(known) > 40
    for name, value in known.items():
        assert gpus(name) == (0 if value.family in ("CPU", "DATA-PREP") else value.accelerator_count), name
