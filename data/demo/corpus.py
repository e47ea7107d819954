"""Build the demo sources from the Python installation itself (PSF licence); nothing is fetched and nothing is run.

| source | grade | what |
|---|---|---|
| docs | high | the language reference's topics; docstrings of the standard library over 200 characters |
| code | medium | source files of the standard library |
| tests | low | its tests, idlelib and lib2to3; where they are not installed, code with its lines shuffled |
| arithmetic | synthetic | sums worked out in words |
"""

from __future__ import annotations

import ast
import fcntl
import os
import random
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from data.source import MANIFEST, SourceManifest, SourceWriter
from data.tokenizer import load_tokenizer

LOW_GRADE = ("test", "idlelib", "lib2to3", "tests")
CODE_CHARACTERS = 5_000_000
TESTS_CHARACTERS = 1_500_000
SUMS = 12_000
HELD_OUT_EVERY = 24  # documents; the first of them is held out


def build_demo_corpus(sources: dict[str, Path]) -> None:
    """Build each source that is missing, one process at a time.

    Args:
        sources: name of a demo source -> its folder.

    Raises:
        ValueError: a name that the demo corpus does not have.
    """
    for name in sources:
        if name not in _TEXTS:
            raise ValueError(f"data.sources.{name}: the demo corpus has {', '.join(_TEXTS)} (data.demo_corpus=true)")
    missing = {name: folder for name, folder in sources.items() if not _is_built(folder)}
    if not missing:
        return
    root = Path(os.path.commonpath([folder.parent for folder in missing.values()]))
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here and then finds everything built
        for name, folder in tqdm(missing.items(), desc="building the demo corpus", unit="source"):
            if not _is_built(folder):
                _build(_TEXTS[name](), folder)


def _is_built(folder: Path) -> bool:
    return all((folder / split / MANIFEST).is_file() for split in ("train", "val"))


def _build(texts: Iterator[str], folder: Path) -> None:
    """Tokenize into a folder beside the place, then rename: an interrupted build leaves nothing under the name."""
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    for path in (unfinished, folder):
        shutil.rmtree(path, ignore_errors=True)
    tokenizer = load_tokenizer("bytes")
    writers = {
        split: SourceWriter(
            unfinished / split, SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id)
        )
        for split in ("train", "val")
    }
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            writers["train"].manifest.dropped["duplicate"] = writers["train"].manifest.dropped.get("duplicate", 0) + 1
            continue
        writers["val" if len(seen) % HELD_OUT_EVERY == 0 else "train"].add(tokenizer.encode([text])[0])
        seen.add(text)
    for writer in writers.values():
        writer.close()
    unfinished.rename(folder)


def _docs() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for file in _library(low_grade=False):
        for node in ast.walk(ast.parse(_read(file) or "")):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield text


def _code() -> Iterator[str]:
    yield from _some(_library(low_grade=False), CODE_CHARACTERS)


def _tests() -> Iterator[str]:
    files = _library(low_grade=True)
    if len(files) > 20:
        yield from _some(files, TESTS_CHARACTERS)
        return
    # Some distributions leave the tests out. Code without order is low quality too.
    for text in _some(_library(low_grade=False), TESTS_CHARACTERS):
        lines = text.splitlines(keepends=True)
        random.Random(len(text)).shuffle(lines)
        yield "".join(lines)


def _arithmetic() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(SUMS):
        a, b, c = (rng.randrange(1, 100) for _ in range(3))
        first, last = a + b, a + b - c
        yield (
            f"Question: what is {a} + {b} - {c}?\n"
            f"First {a} + {b} = {first}. Then {first} - {c} = {last}.\n"
            f"Answer: {last}\n"
        )


_TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    "docs": _docs,
    "code": _code,
    "tests": _tests,
    "arithmetic": _arithmetic,
}


def _library(low_grade: bool) -> list[Path]:
    """Source files of the standard library, of the one grade or the other, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if "site-packages" not in parts and any(part in LOW_GRADE for part in parts) == low_grade:
            files.append(file)
    return files


def _some(files: list[Path], characters: int) -> Iterator[str]:
    """Texts of files in a fixed random order, until `characters` are reached."""
    for file in random.Random(0).sample(files, len(files)):
        text = _read(file)
        if text and text.strip() and len(text) <= characters:
            characters -= len(text)
            yield text


def _read(file: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 (a few tests are so on purpose)."""
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
