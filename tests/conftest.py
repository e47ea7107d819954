"""The tiers of the tests, a tiny corpus of real litdata chunks, and `train.py` run as a user runs it."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare.source_writer import SourceWriter
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.token_source import SourceManifest
from tests.harness import SOURCES, Train, run_train

# Tiers --------------------------------------------------------------------------------------------------------------


def tier_of(item: pytest.Item) -> str:
    """Return "slow" or "runs" if the test is marked so, else "unit". A test that asks for a corpus trains: "runs"."""
    if item.get_closest_marker("slow"):
        return "slow"
    trains = "corpus" in getattr(item, "fixturenames", ())
    return "runs" if trains or item.get_closest_marker("runs") else "unit"


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier, and run the tiers one after the other."""
    for item in items:
        item.add_marker(tier_of(item))
    items.sort(key=lambda item: ("unit", "runs", "slow").index(tier_of(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Stop after the unit tests if one of them failed: what builds on them would fail for the same reason."""
    result = yield
    if nextitem is not None and tier_of(item) == "unit" != tier_of(nextitem):
        if item.session.testsfailed:
            item.session.shouldfail = "a unit test failed; the other tests were not started (-m runs starts them)"
    return result


# Fixtures -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a `paths.data_root` with four small sources of pseudo-words, each in several chunks."""
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
    """Return a function that runs `train.py` on the tiny plan with more overrides, in `tmp_path / "runs/pretrain"`."""

    return partial(run_train, corpus, tmp_path)
