from __future__ import annotations

from pathlib import Path

import pytest

from data.demo import build_demo_corpus, corpus
from data.source import Source
from data.tokenizer import load_tokenizer
from tests.data.test_source import everything


def test_the_demo_corpus_is_built_once_and_held_out_documents_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CODE_CHARACTERS", 300_000)
    monkeypatch.setattr(corpus, "TESTS_CHARACTERS", 300_000)
    monkeypatch.setattr(corpus, "SUMS", 300)
    folders = {name: tmp_path / name for name in ("docs", "code", "tests", "arithmetic")}
    build_demo_corpus(folders)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    (tmp_path / "tests/val/source.json").unlink()  # a half-built source is built again, the others are left alone
    build_demo_corpus(folders)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.bin")}
    assert {path.parent.parent.name for path in written if written[path] != again[path]} <= {"tests"}
    tokenizer = load_tokenizer("bytes")
    for name, folder in folders.items():
        documents = [
            set(tokenizer.decode(everything(Source(f"{folder}/{split}")).tolist()).split("<|endoftext|>")[:-1])
            for split in ("train", "val")
        ]
        assert documents[0] and documents[1] and documents[0].isdisjoint(documents[1]), name


def test_without_an_installed_test_suite_there_is_still_low_quality_text(monkeypatch: pytest.MonkeyPatch) -> None:
    found = corpus._library
    monkeypatch.setattr(corpus, "_library", lambda low_grade: [] if low_grade else found(False)[:40])
    assert sum(map(len, corpus._tests())) > 10_000


def test_an_unknown_demo_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.web: the demo corpus has docs, code, tests, arithmetic"):
        build_demo_corpus({"web": tmp_path / "web"})
