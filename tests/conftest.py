"""A tiny corpus of real litdata chunks, and `train.py` run as a user runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare.source_writer import SourceWriter
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.token_source import SourceManifest
from tests.harness import SOURCES, Train, run_train


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


@pytest.fixture
def train(corpus: Path, tmp_path: Path) -> Train:
    """Run `python train.py` on the tiny plan with further overrides; the run is in `tmp_path / "runs/pretrain"`."""

    def run(*overrides: str, **options: object) -> object:
        return run_train(corpus, tmp_path, *overrides, **options)

    return run
