"""Start `train.py` as a user does: a plan of 20 steps over the tiny corpus of conftest.py."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("docs", "code", "tests", "arithmetic")
Train = Callable[..., subprocess.CompletedProcess[str]]

# The demo plan in 20 steps: 6, 6, 4 and 4 steps, the last phase with rows four times as long.
TINY = (
    "stage=pretrain model=demo trainer=cpu data.demo_corpus=false trainer.threads=1 trainer.progress_bar=false "
    "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.head_dim=16 model.d_mlp=64 "
    "stage.total_tokens=null stage.global_batch_tokens=512 stage.micro_batch_size=8 "
    "stage.phases.warmup.tokens=3072 stage.phases.diversity_enriched_stable.tokens=3072 "
    "stage.phases.high_quality_stable.tokens=2048 stage.phases.decay.tokens=2048 "
    "stage.phases.warmup.seq_len=32 stage.phases.diversity_enriched_stable.seq_len=32 "
    "stage.phases.high_quality_stable.seq_len=32 stage.phases.decay.seq_len=128 "
    "stage.phases.decay.micro_batch_size=2 data.val_rows=4 "
    "callbacks.plots=null callbacks.samples=null "  # tested on their own; here they would only cost time
    "trainer.log_every_n_steps=1 trainer.val_every_n_steps=100 trainer.save_every_n_steps=5"
).split()

# The example extension's callback: every step's loss to the last bit, its rows, and a hash of its tokens.
TRACE = ("callbacks=[pretrain,trace]", "hydra.searchpath=[pkg://nb_trace.conf]")


def command(corpus: Path, root: Path, *overrides: str) -> list[str]:
    paths = [f"paths.root={root}", f"paths.data_root={corpus}"]
    return [sys.executable, str(ROOT / "train.py"), *TINY, *paths, *overrides]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "docs/examples/nb_trace"), **extra}


def run_train(
    corpus: Path, root: Path, *overrides: str, check: bool = True, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; with `check`, an exit code other than 0 fails the test with the run's output."""
    done = subprocess.run(
        command(corpus, root, *overrides),
        cwd=root,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        raise AssertionError(f"train.py exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def read_trace(run: Path, rank: int | None = None) -> dict[int, dict]:
    """Return the last line of each step (a resumed run repeats the steps after its checkpoint)."""
    text = (run / ("trace.jsonl" if rank is None else f"trace.jsonl.{rank}")).read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return {line["step"]: line for line in lines}


def logged(run: Path, version: int = 0) -> list[dict[str, float]]:
    """Return the metrics, a row per step or validation."""
    with open(run / f"metrics/version_{version}/metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def curve(run: Path, name: str, version: int = 0) -> list[float]:
    return [row[name] for row in logged(run, version) if name in row]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
