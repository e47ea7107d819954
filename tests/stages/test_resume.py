"""Stopped anywhere, by anything, a run goes on to the same losses and the same rows, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.files import read_json
from nb_lightning.run_folder import read_metrics
from tests.harness import SOURCES, TRACE, Train, command, curve, environment, read_trace, run_train

pytestmark = pytest.mark.runs


@pytest.fixture(scope="session")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    root = tmp_path_factory.mktemp("unbroken")
    run_train(corpus, root, *TRACE)
    trace = read_trace(root / "runs/pretrain")
    assert sorted(trace) == list(range(20))
    return trace


def start(corpus: Path, root: Path, *overrides: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(corpus, root, *TRACE, *overrides),
        cwd=root,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_step(root: Path, process: subprocess.Popen[bytes], step: int) -> None:
    trace = root / "runs/pretrain/trace.jsonl"
    while process.poll() is None:
        if trace.exists() and trace.read_text().count("\n") > step:
            return
        time.sleep(0.002)


def finish(corpus: Path, root: Path, *overrides: str) -> dict[int, dict]:
    run_train(corpus, root, *TRACE, "resume=true", *overrides)
    return read_trace(root / "runs/pretrain")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 5, 11])  # inside a phase, at a regular save, at a phase boundary
def test_sigterm(corpus: Path, tmp_path: Path, unbroken: dict[int, dict], step: int, workers: int) -> None:
    process = start(corpus, tmp_path, f"data.workers={workers}")
    wait_for_step(tmp_path, process, step)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    stopped_at = len(read_trace(tmp_path / "runs/pretrain"))
    trace = finish(corpus, tmp_path, f"data.workers={2 - workers}")
    assert trace == unbroken
    # The stop saved the step in hand: none was run twice.
    lines = (tmp_path / "runs/pretrain/trace.jsonl").read_text().splitlines()
    assert len(lines) == 20 and stopped_at < 20


def test_sigterm_to_every_process_loader_workers_too(corpus: Path, tmp_path: Path, unbroken: dict[int, dict]) -> None:
    process = subprocess.Popen(
        command(corpus, tmp_path, *TRACE, "data.workers=2"), cwd=tmp_path, env=environment(), start_new_session=True
    )
    wait_for_step(tmp_path, process, 3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert finish(corpus, tmp_path) == unbroken
    starts = json.loads((tmp_path / "runs/pretrain/manifest.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["tokens_seen"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_random_places(corpus: Path, tmp_path: Path, unbroken: dict[int, dict], seed: int) -> None:
    rng = random.Random(seed)
    for round_ in range(3):  # three kills in one run
        process = start(corpus, tmp_path, "resume=true", "data.workers=0")
        wait_for_step(tmp_path, process, 4 + 5 * round_)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
    assert finish(corpus, tmp_path) == unbroken


@pytest.fixture(params=["the system's temporary folder", "another file system"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param.startswith("the system"):
        yield tmp_path
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_sigkill_inside_a_save(corpus: Path, root: Path, unbroken: dict[int, dict]) -> None:
    """Killed while a checkpoint is being written: it does not count, the one before does."""
    folder = root / "runs/pretrain/checkpoints"
    for _ in range(4):  # a kill may come just after the save: then the next one is tried
        process = start(corpus, root, "resume=true")
        while not list(folder.glob(".writing-*")):
            assert process.poll() is None
        process.kill()
        process.wait()
        if list(folder.glob(".writing-*")):
            break
    assert list(folder.glob(".writing-*")), "no kill came inside a save; the test proves nothing"
    assert finish(corpus, root) == unbroken


def test_killed_after_the_last_step(corpus: Path, tmp_path: Path, unbroken: dict[int, dict]) -> None:
    """The last steps come again, to the same weights and numbers, and after them what had been missing."""
    run, sample = tmp_path / "runs/pretrain", "{_target_: callbacks.samples.TextSample, prompt: a, max_new_tokens: 3}"
    words = ("trainer.log_every_n_steps=3", f"callbacks.samples={sample}")
    process = start(corpus, tmp_path, *words)
    while not list((run / "checkpoints").glob("step-00000020*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    weights = find_origin(str(run)).digest()
    assert not read_json(run / "manifest.json")["finished"], "the kill came too late; the test proves nothing"
    assert finish(corpus, tmp_path, *words) == unbroken
    assert find_origin(str(run)).digest() == weights
    manifest = read_json(run / "manifest.json")
    assert manifest["finished"] and [entry["tokens_seen"] for entry in manifest["starts"]] == [0, 16 * 512]
    for name in SOURCES:
        validated = read_metrics(run)[f"val/perplexity/{name}"]
        assert validated[-1].tolist() == [20 * 512, manifest["metrics"][f"val/perplexity/{name}"]]
        share = f"data/share/{name}"  # of steps 15 to 17, though it went on with 16
        assert curve(run, share, version=1) == curve(run, share)[-1:]
    assert (run / "samples.txt").read_text().count("=== end of ") == 4


def test_damaged_newest_checkpoint_is_named_and_the_previous_one_used(
    corpus: Path, tmp_path: Path, unbroken: dict[int, dict]
) -> None:
    process = start(corpus, tmp_path)
    wait_for_step(tmp_path, process, 13)
    process.kill()
    process.wait()
    newest = sorted((tmp_path / "runs/pretrain/checkpoints").glob("step-*"))[-1] / "state"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run_train(corpus, tmp_path, *TRACE, "resume=true")
    assert f"{newest.relative_to(tmp_path)} is damaged" in done.stderr
    assert read_trace(tmp_path / "runs/pretrain") == unbroken


def test_a_finished_run_resumes_to_nothing(corpus: Path, tmp_path: Path, train: Train) -> None:
    train()
    checkpoints = sorted((tmp_path / "runs/pretrain/checkpoints").iterdir())
    train("resume=true")
    assert sorted((tmp_path / "runs/pretrain/checkpoints").iterdir()) == checkpoints


def test_a_second_start_without_resume_is_refused(train: Train) -> None:
    train()
    again = train(check=False)
    assert again.returncode == 1
    assert "holds a run already: continue it with resume=true, or choose another run_name" in again.stderr


@pytest.mark.parametrize("before, after", [("single", "fsdp"), ("fsdp", "ddp")])
def test_shards_and_whole_files_are_not_mixed(train: Train, before: str, after: str) -> None:
    train(f"trainer.strategy={before}", "stage.total_tokens=2048")
    error = train(f"trainer.strategy={after}", "resume=true", check=False).stderr
    assert f"error: trainer.strategy is {after}, but " in error and f"was saved by {before}" in error
    assert "Traceback" not in error
