"""Build the demo corpus from the Python installation (PSF licence); nothing is downloaded or executed.

| source | grade | documents |
|---|---|---|
| docs | high | the language reference's topics; docstrings of the standard library over 200 characters |
| code | medium | source files of the standard library |
| tests | low | its tests, idlelib and lib2to3; where they are not installed, code with its words shuffled |
| arithmetic | synthetic | sums and equations worked out in words |

One file in `HELD_OUT_EVERY` is held out, with all documents made from it: a held-out docstring of `docs` is in no
trained file of `code`. A text that repeats an earlier one is left out, and counted in the manifest.
"""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from data.prepare.source_writer import SourceWriter, is_source, locked, remove_source
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.token_source import SPLITS, SourceManifest

LOW_GRADE = {"test", "tests", "idlelib", "lib2to3"}
NOT_PYTHONS_OWN = {"site-packages", "dist-packages", "__pycache__"}
CODE_CHARACTERS = 5_000_000
TESTS_CHARACTERS = 1_500_000
ARITHMETIC_DOCUMENTS = 12_000
LONG_DOCSTRING = 200
FEWEST_LOW_GRADE_FILES = 20
HELD_OUT_EVERY = 32
Document = tuple[str, bool]  # text, and whether it is held out


def build_demo_corpus(sources: dict[str, Path], progress: bool = True) -> None:
    """Build each source that is missing or unfinished. Only one process builds at a time.

    Args:
        sources: name of a demo source -> its folder.

    Raises:
        ValueError: the demo corpus has no source of a name, or a folder holds something else.
    """
    for name in sources:
        if name not in _DOCUMENTS:
            raise ValueError(
                f"data.sources.{name}: the demo corpus has {', '.join(_DOCUMENTS)} (data.demo_corpus=true)"
            )
    missing = {name: folder for name, folder in sources.items() if not is_source(str(folder))}
    bar = tqdm(missing.items(), desc="building the demo corpus", unit="source", disable=not progress or not missing)
    for name, folder in bar:
        with locked(folder.parent, wait=True):  # a second process waits here, and then has nothing to build
            if not is_source(str(folder)):
                report = f"demo corpus, {name}: {_build(_DOCUMENTS[name](), folder)}"
                if progress:
                    bar.write(report)


def _build(documents: Iterator[Document], folder: Path) -> str:
    """Tokenize the documents into a source; return a line of counts.

    The work is done beside `folder` and renamed, so that an interrupted build leaves nothing under the name.
    """
    if folder.exists():
        remove_source(folder)
        if other_files := os.listdir(folder):
            raise ValueError(f"the demo corpus is to be built in {folder}, but that holds {other_files[0]}")
        folder.rmdir()
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = load_tokenizer("bytes")
    manifests = [SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id) for _ in SPLITS]
    train, val = (SourceWriter(unfinished / split, manifest) for split, manifest in zip(SPLITS, manifests))
    seen: set[str] = set()
    duplicates = 0
    for text, is_held_out in documents:
        if text in seen:
            duplicates += 1
            continue
        (val if is_held_out else train).add(tokenizer.encode([text])[0])
        seen.add(text)
    if duplicates:
        train.manifest.dropped["duplicate"] = duplicates
    trained, held_out = train.close(), val.close()
    if not (trained.tokens and held_out.tokens):
        raise ValueError(f"{folder.name}: this Python has no source files in {sysconfig.get_path('stdlib')}")
    unfinished.rename(folder)
    return (
        f"{trained.documents:,} documents, {trained.tokens / 1e6:.2f} M tokens; held out {held_out.documents:,} "
        f"documents, {held_out.tokens / 1e6:.2f} M tokens; {duplicates:,} duplicates left out"
    )


def _docs() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for number, text in enumerate(topics.values()):
        yield text, number % HELD_OUT_EVERY == 0
    for file, held_out in _library(low_grade=False):
        for node in ast.walk(ast.parse(_read(file))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > LONG_DOCSTRING:
                    yield text, held_out


def _code() -> Iterator[Document]:
    yield from _read_up_to(CODE_CHARACTERS, _library(low_grade=False))


def _tests() -> Iterator[Document]:
    files = _library(low_grade=True)
    if len(files) >= FEWEST_LOW_GRADE_FILES:
        yield from _read_up_to(TESTS_CHARACTERS, files)
        return
    tqdm.write("demo corpus, tests: Python's tests are not installed here; shuffling the words of its code instead")
    for text, held_out in _read_up_to(TESTS_CHARACTERS, _library(low_grade=False)):
        words = re.findall(r"\S+\s*", text)
        random.Random(len(text)).shuffle(words)
        yield "".join(words), held_out


def _arithmetic() -> Iterator[Document]:
    rng = random.Random(0)
    for number in range(ARITHMETIC_DOCUMENTS):
        a, b, c = (rng.randrange(2, 100) for _ in range(3))
        if number % 2:
            first, last = a + b, a + b - c
            text = (
                f"Question: what is {a} + {b} - {c}?\n"
                f"First {a} + {b} = {first}. Then {first} - {c} = {last}.\n"
                f"Answer: {last}\n"
            )
        else:
            total, product = a * b + c, a * b
            text = (
                f"Question: {a}x + {c} = {total}. What is x?\n"
                f"{a}x = {total} - {c} = {product}. x = {product} / {a} = {b}.\n"
                f"Answer: {b}\n"
            )
        yield text, number // 2 % HELD_OUT_EVERY == 0


_DOCUMENTS: dict[str, Callable[[], Iterator[Document]]] = {
    "docs": _docs,
    "code": _code,
    "tests": _tests,
    "arithmetic": _arithmetic,
}


def _library(low_grade: bool) -> list[tuple[Path, bool]]:
    """List the standard library's source files of one grade, in a fixed random order: (file, is held out).

    The few files that are not UTF-8 are left out.
    """
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_PYTHONS_OWN]  # os.walk skips these
        if LOW_GRADE.isdisjoint(Path(folder).relative_to(root).parts) != low_grade:
            files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [file for file in sorted(files) if _read(file).strip()]
    random.Random(0).shuffle(files)
    return [(file, place % HELD_OUT_EVERY == 0) for place, file in enumerate(files)]


def _read_up_to(characters: int, files: list[tuple[Path, bool]]) -> Iterator[Document]:
    """Read files while they fit into `characters`; skip those of more than a fiftieth of it."""
    longest = characters // 50
    for file, held_out in files:
        text = _read(file)
        if len(text) <= min(longest, characters):
            characters -= len(text)
            yield text, held_out


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
