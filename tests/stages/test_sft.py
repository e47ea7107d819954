"""`train.py stage=sft` from end to end: however its steps are cut up, stopped or shared, the same losses and rows."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from tests.harness import ROOT, environment, read_trace
from tests.sft_harness import TRACE, make_sources, overrides, run_sft

pytestmark = pytest.mark.runs

ONE_ROW = ("stage.micro_batch_size=1", "stage.phases.overall.micro_batch_size=1")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def unbroken(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    root = tmp_path_factory.mktemp("unbroken")
    run_sft(chats, root, *TRACE)
    run = root / "runs/sft"
    assert load_tokenizer(str(run / "tokenizer")).chat_template == (ROOT / "nb_lightning/text/chatml.jinja").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] and set(manifest["data"]) >= {"maths_sort", "tools_calls"}
    return read_trace(run)


def losses(trace: dict[int, dict]) -> list[float]:
    return [float.fromhex(trace[step]["loss"]) for step in sorted(trace)]


def test_it_learns_and_accumulation_changes_nothing(chats: Path, tmp_path: Path, unbroken: dict[int, dict]) -> None:
    assert len(unbroken) == 12 and losses(unbroken)[-1] < 0.85 * losses(unbroken)[0]
    assert [unbroken[step]["shape"] for step in (0, 5, 6, 11)] == [[4, 128], [4, 128], [2, 256], [2, 256]]
    run_sft(chats, tmp_path, *TRACE, *ONE_ROW)  # rows have different numbers of trained tokens
    cut_up = read_trace(tmp_path / "runs/sft")
    assert losses(cut_up) == pytest.approx(losses(unbroken), rel=2e-5)
    assert [cut_up[s]["sample_ids"] for s in range(12)] == [unbroken[s]["sample_ids"] for s in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed(chats: Path, tmp_path: Path, unbroken: dict[int, dict], workers: int) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *overrides(chats, tmp_path, *TRACE, f"data.workers={workers}")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    trace = tmp_path / "runs/sft/trace.jsonl"
    while process.poll() is None and not (trace.exists() and trace.read_text().count("\n") > 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert len(read_trace(tmp_path / "runs/sft")) < 12
    refused = run_sft(chats, tmp_path, *TRACE, "resume=true", "data.over_long=truncate", check=False)
    assert "holds other data than" in refused.stderr
    run_sft(chats, tmp_path, *TRACE, "resume=true", f"data.workers={2 - workers}")
    assert read_trace(tmp_path / "runs/sft") == unbroken


@pytest.mark.slow
def test_two_processes(chats: Path, tmp_path: Path, unbroken: dict[int, dict]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    words = ("trainer.strategy=ddp", "trainer.devices=2", *ONE_ROW)
    command += [str(ROOT / "train.py"), *overrides(chats, tmp_path, *TRACE, *words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [read_trace(tmp_path / "runs/sft", rank) for rank in range(2)]
    assert losses(ranks[0]) == losses(ranks[1]) == pytest.approx(losses(unbroken), rel=1e-4)
    for step in range(12):
        assert ranks[0][step]["sample_ids"] + ranks[1][step]["sample_ids"] == unbroken[step]["sample_ids"]
