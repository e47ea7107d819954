"""Cut the input into parts of work: the first step of `python -m data.prepare`.

| input | one record is | cut at |
|---|---|---|
| `.jsonl`, `.ndjson` | a line, or one field of it | lines, every 64 MiB |
| `.jsonl.gz`, `.ndjson.zst` and the like, also `.xz` | a line, or one field of it | files |
| `.json`, `.json.gz` and the like | an item of the array, or one field of it; without an array, as `.jsonl` | files |
| `.parquet` | a row, or one field of it | row groups |
| a folder of `datasets.save_to_disk` | a row, or one field of it | every 10,000 rows |
| `.txt`, `.md` and any suffix passed as text | a file | files, every 64 MiB |

data/prepare/records.py reads the records of a part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data.prepare.archives import UNPACKED, unpack
from data.prepare.tables import open_dataset, open_parquet, read_errors_of

PART_BYTES = 2**26
PART_ROWS = 10_000
TEXT_SUFFIXES = (".txt", ".md")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
KINDS |= {f"{suffix}{ending}": kind for suffix, kind in KINDS.items() if kind != "parquet" for ending in UNPACKED}
KNOWN = f".jsonl, .ndjson or .json, also with {', '.join(UNPACKED)}; .parquet"


@dataclass(frozen=True)
class Part:
    """A piece of the input that one worker tokenizes.

    Attributes:
        kind: jsonl, archive (lines), json, parquet, dataset or text.
        files: the file or dataset folder to read; of text, all files of the part.
        start, stop: range to read, in bytes (jsonl), row groups (parquet) or rows (dataset).
        split: of a dataset that has several.
        bytes: approximate size, for progress and disk space.
        held_out: every record of the part is held out.
    """

    kind: str
    files: tuple[str, ...]
    start: int = 0
    stop: int = 0
    split: str | None = None
    bytes: int = 0
    held_out: bool = False


def cut_inputs(
    inputs: Sequence[str], text_suffixes: Iterable[str] | None = (), split: str | None = None
) -> tuple[list[Part], Counter[str]]:
    """Cut all inputs into parts, in an order that depends on the inputs alone.

    Args:
        inputs: files and folders.
        text_suffixes: suffixes, besides `TEXT_SUFFIXES`, of files that are one record each; None reads no such files.
        split: of a dataset that has several.

    Returns:
        The parts, and suffix -> number of files in input folders that are not read.

    Raises:
        ValueError: an input is missing, of an unknown kind, given twice, or unreadable as a table.
    """
    suffixes: tuple[str, ...] = ()
    if text_suffixes is not None:
        suffixes = (*TEXT_SUFFIXES, *(s if s.startswith(".") else f".{s}" for s in text_suffixes))
    parts: list[Part] = []
    text_files: list[Path] = []
    ignored: Counter[str] = Counter()
    seen: set[Path] = set()
    for name in inputs:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"--input {name}: no such file or folder")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            _require_new(path, seen)
            parts += _cut_dataset(path, split)
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        kinds = {file: _kind_of(file, suffixes) for file in files}
        if path.is_dir():  # other .json files there are mostly no records: settings, or what a download is
            kinds = {file: None if kind == "json" and not _holds_array(file) else kind for file, kind in kinds.items()}
        if not any(kinds.values()):
            more = " (--text-suffix adds to them)" if suffixes else ""
            raise ValueError(f"--input {name}: nothing to read; known are {', '.join((KNOWN, *suffixes))}{more}")
        for file, kind in kinds.items():
            if kind is None:
                ignored[file.suffix or "no suffix"] += 1
                continue
            _require_new(file, seen)
            if kind == "text":
                text_files.append(file)
            elif kind == "jsonl" or (kind == "json" and not _holds_array(file)):
                parts += [_whole("archive", file)] if file.suffix in UNPACKED else _cut_lines(file)
            elif kind == "parquet":
                parts += _cut_row_groups(file)
            else:
                parts.append(_whole(kind, file))
    parts += _cut_texts(text_files)
    if not parts:
        raise ValueError(f"--input {', '.join(map(str, inputs))}: the tables have no rows")
    return parts, ignored


def count_lines_before(part: Part) -> int:
    """Count the lines or rows of the file before the part: the offset of the part's line numbers."""
    if part.kind == "jsonl":
        with open(part.files[0], "rb") as file:
            count, left = 0, part.start
            while left and (block := file.read(min(left, 2**22))):
                count, left = count + block.count(b"\n"), left - len(block)
            return count
    if part.kind == "parquet":
        metadata = open_parquet(part.files[0]).metadata
        return sum(metadata.row_group(g).num_rows for g in range(part.start))
    return part.start if part.kind == "dataset" else 0


def _kind_of(file: Path, text_suffixes: tuple[str, ...]) -> str | None:
    for suffix, kind in KINDS.items():
        if file.name.endswith(suffix):
            return kind
    return "text" if file.suffix in text_suffixes else None


def _holds_array(file: Path) -> bool:
    with read_errors_of(str(file)):
        first = next(filter(None, unpack(str(file))), b"")  # of an archive, a block may unpack to nothing
        return first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _whole(kind: str, file: Path) -> Part:
    return Part(kind, (str(file),), bytes=file.stat().st_size)


def _require_new(path: Path, seen: set[Path]) -> None:
    if path.resolve() in seen:
        raise ValueError(f"--input {path} is given twice; its text would count twice")
    seen.add(path.resolve())


def _cut_lines(file: Path) -> list[Part]:
    size = file.stat().st_size
    bounds = [0]
    with open(file, "rb") as stream:
        while bounds[-1] + PART_BYTES < size:
            stream.seek(bounds[-1] + PART_BYTES)
            stream.readline()  # on to the end of the line
            if stream.tell() >= size:
                break
            bounds.append(stream.tell())
    return [Part("jsonl", (str(file),), a, b, bytes=b - a) for a, b in zip(bounds, [*bounds[1:], size])]


def _cut_row_groups(file: Path) -> list[Part]:
    groups, size = open_parquet(str(file)).num_row_groups, file.stat().st_size
    return [Part("parquet", (str(file),), g, g + 1, bytes=size // groups) for g in range(groups)]


def _cut_texts(files: list[Path]) -> list[Part]:
    parts: list[Part] = []
    batch: list[str] = []
    size = 0
    for file in files:
        batch.append(str(file))
        size += file.stat().st_size
        if size >= PART_BYTES:
            parts.append(Part("text", tuple(batch), bytes=size))
            batch, size = [], 0
    return [*parts, Part("text", tuple(batch), bytes=size)] if batch else parts


def _cut_dataset(path: Path, split: str | None) -> list[Part]:
    dataset = open_dataset(str(path), split)
    bounds = [*range(0, len(dataset), PART_ROWS), len(dataset)]
    return [
        Part("dataset", (str(path),), a, b, split, bytes=dataset.data.nbytes * (b - a) // len(dataset))
        for a, b in pairwise(bounds)
    ]
