from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.demo import build_demo_corpus, corpus
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.token_source import Source, SourceManifest
from tests.data.prepare.harness import everything
from tests.harness import ROOT, environment

NAMES = ("docs", "code", "tests", "arithmetic")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of the first 60 files of each grade."""
    root = tmp_path_factory.mktemp("demo")
    found = corpus._library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_library", lambda low_grade: found(low_grade)[:60])
        patch.setattr(corpus, "ARITHMETIC_DOCUMENTS", 600)
        build_demo_corpus({name: root / name for name in NAMES}, progress=False)
    return root


def documents(folder: Path, split: str) -> list[str]:
    text = load_tokenizer("bytes").decode(everything(Source(f"{folder}/{split}")).tolist())
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.runs
def test_held_out_documents_are_not_trained_on(built: Path) -> None:
    for name in NAMES:
        train, val = (documents(built / name, split) for split in ("train", "val"))
        assert train and val and set(train).isdisjoint(val), name
        assert len(set(train)) == len(train), name
    held_out = [text for text in documents(built / "docs", "val") if "\\" not in text]
    trained = "\n".join(documents(built / "code", "train"))
    assert not [text for text in held_out if text.splitlines()[0] in trained and text.splitlines()[-1] in trained]


def test_what_is_there_is_left_alone_and_the_half_built_is_built_again(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "ARITHMETIC_DOCUMENTS", 600)
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.bin")}
    whole = SourceManifest.read(f"{built}/arithmetic/train")
    (built / "arithmetic/val/source.json").unlink()
    (built / ".unfinished-arithmetic/train").mkdir(parents=True)
    (built / ".unfinished-arithmetic/train/chunk-0-0.bin").write_text("left over")
    build_demo_corpus({name: built / name for name in NAMES}, progress=False)
    after = {path: path.stat().st_mtime_ns for path in built.rglob("*.bin")}
    assert {path.parent.parent.name for path in before if before[path] != after[path]} == {"arithmetic"}
    assert SourceManifest.read(f"{built}/arithmetic/train") == whole  # the same every time
    assert {path.name for path in built.iterdir()} == set(NAMES)


@pytest.mark.slow
def test_two_processes_build_it_once(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from data.demo import build_demo_corpus
build_demo_corpus({{'arithmetic': Path({str(tmp_path)!r}) / 'arithmetic'}})
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(outputs).count("demo corpus, arithmetic: ") == 1
    assert len(documents(tmp_path / "arithmetic", "val")) > 100


def test_a_folder_of_something_else_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/thesis.pdf").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.pdf").touch()
    for folder, words in ((tmp_path, "train holds thesis.pdf"), (tmp_path / "other", "but that holds thesis.pdf")):
        with pytest.raises(ValueError, match=words):
            build_demo_corpus({"arithmetic": folder}, progress=False)
    assert len(list(tmp_path.rglob("thesis.pdf"))) == 2


def test_without_an_installed_test_suite_there_is_still_low_quality_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = corpus._library(low_grade=False)[:40]
    monkeypatch.setattr(corpus, "_library", lambda low_grade: [] if low_grade else files)
    shuffled, again = list(corpus._tests()), list(corpus._tests())
    assert sum(len(text) for text, _ in shuffled) > 10_000 and shuffled == again
    assert "Python's tests are not installed here" in capsys.readouterr().out
    for (text, held_out), (original, with_original) in zip(
        shuffled, corpus._read_up_to(corpus.TESTS_CHARACTERS, files)
    ):
        assert text != original and held_out == with_original
        assert sorted("".join(text.split())) == sorted("".join(original.split()))  # not a letter is lost


def test_an_unknown_demo_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.web: the demo corpus has docs, code, tests, arithmetic"):
        build_demo_corpus({"web": tmp_path / "web"})
