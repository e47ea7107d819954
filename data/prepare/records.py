"""Records from files, each with where it came from; and how a set of files is cut into parts of work.

| input | one record is | cut at |
|---|---|---|
| `.jsonl` | a line, or one field of it | lines, every 64 MiB |
| `.jsonl.gz`, `.jsonl.zst` | a line, or one field of it | files |
| `.parquet` | a row, or one field of it | row groups |
| a folder of `datasets.save_to_disk` | a row, or one field of it | every 10,000 rows |
| `.txt`, `.md` and any suffix given as text | a file | files, every 64 MiB |

A bad record is a `Record` that says what is wrong. A file that cannot be read to its end (a truncated archive, a
damaged table) is an error: nobody knows how many records it should have had.
"""

from __future__ import annotations

import gzip
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from data.prepare.tables import Table, naming, open_dataset, open_parquet

PART_BYTES = 2**26
PART_ROWS = 10_000
TEXT_SUFFIXES = (".txt", ".md")
KINDS = {".jsonl": "jsonl", ".jsonl.gz": "gzip", ".jsonl.zst": "zstd", ".parquet": "parquet"}
ARCHIVES = ("gzip", "zstd")

# Only strings are wanted: as floats, numbers of thousands of digits do not fail (Python refuses such integers).
_JSON = json.JSONDecoder(parse_int=float)
_OBJECTS = json.JSONDecoder()


@dataclass(frozen=True)
class Part:
    """A piece of the input that one worker reads: `files` from `start` to `stop` (bytes, row groups or rows)."""

    kind: str  # jsonl | gzip | zstd | parquet | dataset | text
    files: tuple[str, ...]
    start: int = 0
    stop: int = 0
    split: str | None = None  # of a dataset
    bytes: int = 0  # roughly what is to be read, for progress and disk space
    held_out: bool = False  # all of it


@dataclass(frozen=True)
class Record:
    """What was read, or why there is nothing.

    `line` counts from 1 within the part (rows for tables, always 1 for text files). `bad` is what is counted; `detail`
    says more of this very record.
    """

    file: str
    line: int
    value: Any  # None in a bad record
    bad: str | None = None
    detail: str | None = None


def cut(
    inputs: Sequence[str], text_suffixes: Iterable[str] | None = (), split: str | None = None
) -> tuple[list[Part], Counter[str]]:
    """The parts of all inputs, in an order that depends on nothing but the inputs; and files left alone, by suffix.

    Args:
        text_suffixes: besides `TEXT_SUFFIXES`, of files that are one record each; None for no such files at all.

    Raises:
        ValueError: an input that is missing, of an unknown kind, given twice, or unreadable as a table.
    """
    suffixes: tuple[str, ...] = ()
    if text_suffixes is not None:
        suffixes = (*TEXT_SUFFIXES, *(s if s.startswith(".") else f".{s}" for s in text_suffixes))
    parts: list[Part] = []
    texts: list[Path] = []
    ignored: Counter[str] = Counter()
    seen: set[Path] = set()
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise ValueError(f"--input {given}: no such file or folder")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            _once(path, seen)
            parts += _cut_dataset(path, split)
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        kinds = {file: _kind(file, suffixes) for file in files}
        if not any(kinds.values()):
            more = " (--text-suffix adds to them)" if suffixes else ""
            raise ValueError(f"--input {given}: nothing to read; known are {', '.join((*KINDS, *suffixes))}{more}")
        for file, kind in kinds.items():
            if kind is None:
                ignored[file.suffix or "no suffix"] += 1
                continue
            _once(file, seen)
            if kind == "text":
                texts.append(file)
            elif kind == "jsonl":
                parts += _cut_lines(file)
            elif kind == "parquet":
                groups, size = open_parquet(str(file)).num_row_groups, file.stat().st_size
                parts += [Part("parquet", (str(file),), g, g + 1, bytes=size // groups) for g in range(groups)]
            else:
                parts.append(Part(kind, (str(file),), bytes=file.stat().st_size))
    parts += _cut_texts(texts)
    if not parts:
        raise ValueError(f"--input {', '.join(map(str, inputs))}: the tables have no rows")
    return parts, ignored


def read(part: Part, field: str) -> Iterator[Record]:
    """The records of a part, the bad ones too.

    Raises:
        ValueError: a file that cannot be read to its end, or a table without a column `field` of strings.
    """
    if part.kind == "text":
        for file in part.files:
            with naming(file):
                raw = Path(file).read_bytes()
            yield _decoded(file, 1, raw)
        return
    name = part.files[0]
    if part.kind in ("parquet", "dataset"):
        for number, value in enumerate(_table(part).texts(field), start=1):
            yield _decoded(name, number, value) if isinstance(value, bytes) else _checked(name, number, value, field)
    else:
        for record in _objects(part, _JSON):
            if record.bad:
                yield record
            elif field not in record.value:
                yield Record(name, record.line, None, f"no field {field!r}")
            else:
                yield _checked(name, record.line, record.value[field], field)


def read_objects(part: Part, fields: Sequence[str]) -> Iterator[Record]:
    """The records of a part, the bad ones too; a value is an object of strings, numbers, lists and objects.

    Args:
        fields: those that are wanted; of a table no others are read.

    Raises:
        ValueError: a file that cannot be read to its end, or a table without any of the columns.
    """
    if part.kind in ("parquet", "dataset"):
        for number, row in enumerate(_table(part).rows(fields), start=1):
            yield Record(part.files[0], number, row, None if row is not None else "not UTF-8")
    else:
        yield from _objects(part, _OBJECTS)


def log_dropped(log: TextIO, record: Record) -> None:
    """A line of `dropped.jsonl`; to be opened with errors="backslashreplace": file names may be any bytes."""
    detail = {"detail": record.detail} if record.detail else {}
    entry = {"reason": record.bad, **detail, "file": record.file, "line": record.line}
    log.write(json.dumps(entry, ensure_ascii=False) + "\n")


def merge_dropped(logs: Iterable[tuple[Path, Part, int]], target: Path, shown: int = 3) -> dict[str, list[str]]:
    """One log for all parts, with line numbers of the files; none where nothing was dropped.

    Args:
        logs: the log of each part in order, and how many lines or rows the part has.

    Returns:
        reason -> its first `shown` origins, as file:line.
    """
    origins: dict[str, list[str]] = {}
    before: Counter[tuple[str, ...]] = Counter()  # a file's parts follow one another
    with open(target, "w", encoding="utf-8", errors="backslashreplace") as out:
        for path, part, lines in logs:
            with open(path, encoding="utf-8", newline="\n") as log:
                for entry in map(json.loads, log):
                    line, reason = before[part.files] + entry["line"], entry["reason"]
                    record = Record(entry["file"], line, None, reason, entry.get("detail"))
                    log_dropped(out, record)
                    if len(first := origins.setdefault(entry["reason"], [])) < shown:
                        first.append(f"{record.file}:{record.line}")
            if part.kind != "text":  # each text file is a record of its own, on line 1
                before[part.files] += lines
    if not origins:
        target.unlink()
    return origins


def lines_before(part: Part) -> int:
    """How many lines or rows of the file lie before the part: what its own line numbers start from."""
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


def _kind(file: Path, text_suffixes: tuple[str, ...]) -> str | None:
    for suffix, kind in KINDS.items():
        if file.name.endswith(suffix):
            return kind
    return "text" if file.suffix in text_suffixes else None


def _once(path: Path, seen: set[Path]) -> None:
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
    data = open_dataset(str(path), split)
    bounds = [*range(0, len(data), PART_ROWS), len(data)]
    return [
        Part("dataset", (str(path),), a, b, split, bytes=data.data.nbytes * (b - a) // len(data))
        for a, b in pairwise(bounds)
    ]


def _lines(part: Part) -> Iterator[bytes]:
    name = part.files[0]
    with naming(name), open(name, "rb") as file:
        if part.kind == "jsonl":
            file.seek(part.start)
            left = part.stop - part.start
            while left > 0:
                line = file.readline()
                if not line:
                    raise EOFError(f"it became {left} bytes shorter while it was read")
                left -= len(line)
                yield line
        elif not part.bytes:
            raise EOFError("it is empty, and no archive")
        elif part.kind == "gzip":
            with gzip.open(file) as lines:
                yield from lines
        else:
            rest = b""
            for block in _zstd_blocks(file):
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
            if rest:
                yield rest


def _zstd_blocks(file: Any) -> Iterator[bytes]:
    """The text of all frames. By hand, because the library's own reader takes a truncated frame for the end."""
    zstandard = importlib.import_module("zstandard")
    frame = None
    while block := file.read(2**16):
        while block:
            # Large windows are what `zstd --long` makes; without the knob such files are refused.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(block)
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("its last frame has no end")


def _objects(part: Part, decoder: json.JSONDecoder) -> Iterator[Record]:
    for number, line in enumerate(_lines(part), start=1):
        value, bad = None, "empty line"
        if line.strip():
            try:
                value = decoder.decode(line.decode("utf-8-sig"))
                bad = None if isinstance(value, dict) else "not a JSON object"
            except UnicodeDecodeError:
                bad = "not UTF-8"
            except (ValueError, RecursionError):  # also a number that Python refuses
                bad = "invalid JSON"
        yield Record(part.files[0], number, value if bad is None else None, bad)


def _decoded(file: str, line: int, raw: bytes) -> Record:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Record(file, line, None, "not UTF-8")
    return Record(file, line, text) if text.strip() else Record(file, line, None, "empty text")


def _checked(file: str, line: int, value: Any, field: str) -> Record:
    if not isinstance(value, str):
        return Record(file, line, None, f"field {field!r} is not a string")
    try:
        value.encode("utf-8")  # JSON may smuggle in half a surrogate pair
    except UnicodeEncodeError:
        return Record(file, line, None, "not UTF-8")
    return Record(file, line, value) if value.strip() else Record(file, line, None, "empty text")


def _table(part: Part) -> Table:
    return Table(part.kind, part.files[0], part.split, part.start, part.stop)
