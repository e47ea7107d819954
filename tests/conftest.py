"""A tiny corpus of real litdata chunks, and `train.py` run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.source import SourceManifest, SourceWriter
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SOURCES = ("docs", "code", "tests", "arithmetic")

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
    "trainer.log_every_n_steps=1 trainer.val_every_n_steps=100 trainer.save_every_n_steps=5"
).split()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`paths.data_root` with four small sources of pseudo-words, each in several chunks."""
    root = tmp_path_factory.mktemp("data")
    tokenizer = load_tokenizer("bytes")
    for number, name in enumerate(SOURCES):
        words = np.random.RandomState(number).randint(0, 256, size=(50, 5))
        for split, documents in (("train", 120), ("val", 30)):
            rng = np.random.RandomState(100 * number + len(split))
            manifest = SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id)
            writer = SourceWriter(root / "demo" / name / split, manifest, chunk_tokens=2048)
            for _ in range(documents):
                chosen = words[rng.randint(0, 50, size=rng.randint(1, 20))]
                writer.add([*chosen.flatten().tolist(), tokenizer.eos_id])
            writer.close()
    return root


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(corpus: Path, tmp_path: Path) -> Train:
    """Run `python train.py` on the tiny plan with further overrides; runs go below `tmp_path / "runs"`."""

    def run(*overrides: str, check: bool = True, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(corpus, tmp_path, *overrides),
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"train.py exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done

    return run


def command(corpus: Path, root: Path, *overrides: str) -> list[str]:
    paths = [f"paths.root={root}", f"paths.data_root={corpus}"]
    return [sys.executable, str(ROOT / "train.py"), *TINY, *paths, *overrides]
