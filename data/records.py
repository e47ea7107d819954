"""Text records from files, each with where it came from; and how a set of files is cut into parts of work.

| input | one record is | cut at |
|---|---|---|
| `.jsonl` | a line's field | lines, every 64 MiB |
| `.jsonl.gz`, `.jsonl.zst` | a line's field | files |
| `.parquet` | a row's field | row groups |
| a folder of `datasets.save_to_disk` | a row's field | every 10,000 rows |
| `.txt`, `.md` and any suffix given as text | a file | files, every 64 MiB |
"""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PART_BYTES = 2**26
PART_ROWS = 10_000
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Part:
    """A piece of the input that one worker reads: `files` from `start` to `stop` (bytes, row groups or rows)."""

    kind: str  # jsonl | gzip | zstd | parquet | dataset | text
    files: tuple[str, ...]
    start: int = 0
    stop: int = 0
    split: str | None = None  # of a dataset
    bytes: int = 0  # roughly what is to be read, for progress


@dataclass(frozen=True)
class Record:
    """A text, or why there is none. `line` counts from 1 within the part (rows for tables, always 1 for text files)."""

    file: str
    line: int
    text: str | None
    bad: str | None = None


def cut(inputs: Iterable[str], text_suffixes: Iterable[str] = (), split: str | None = None) -> list[Part]:
    """The parts of all inputs, in an order that depends on nothing but the inputs.

    Raises:
        ValueError: an input that is missing, of an unknown kind, or unreadable as a table.
    """
    suffixes = (*TEXT_SUFFIXES, *(s if s.startswith(".") else f".{s}" for s in text_suffixes))
    parts: list[Part] = []
    texts: list[Path] = []
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise ValueError(f"--input {given}: no such file or folder")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            parts += _cut_dataset(path, split)
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        known = [file for file in files if _kind(file, suffixes)]
        if not known:
            allowed = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, " + ", ".join(suffixes)
            raise ValueError(f"--input {given}: nothing to read; known are {allowed} (--text-suffix adds to them)")
        for file in known:
            kind = _kind(file, suffixes)
            if kind == "text":
                texts.append(file)
            elif kind == "jsonl":
                parts += _cut_lines(file)
            elif kind == "parquet":
                groups, size = _open_parquet(str(file)).num_row_groups, file.stat().st_size
                parts += [Part("parquet", (str(file),), g, g + 1, bytes=size // groups) for g in range(groups)]
            else:
                parts.append(Part(kind, (str(file),), bytes=file.stat().st_size))
    return parts + _cut_texts(texts)


def read(part: Part, field: str) -> Iterator[Record]:
    """The records of a part, the bad ones too.

    Raises:
        ValueError: a file that cannot be read on (truncated archive, damaged table, no such column).
    """
    if part.kind == "text":
        for file in part.files:
            yield _decoded(file, 1, Path(file).read_bytes())
    elif part.kind in ("jsonl", "gzip", "zstd"):
        for number, line in enumerate(_lines(part), start=1):
            yield _from_json(part.files[0], number, line, field)
    else:
        rows = _parquet_rows(part, field) if part.kind == "parquet" else _dataset_rows(part, field)
        for number, value in enumerate(rows, start=1):
            yield _checked(part.files[0], number, value, field)


def lines_before(part: Part) -> int:
    """How many lines or rows of the file lie before the part: what its own line numbers start from."""
    if part.kind == "jsonl":
        with open(part.files[0], "rb") as file:
            count, left = 0, part.start
            while left:
                block = file.read(min(left, 2**22))
                count, left = count + block.count(b"\n"), left - len(block)
            return count
    if part.kind == "parquet":
        metadata = _open_parquet(part.files[0]).metadata
        return sum(metadata.row_group(g).num_rows for g in range(part.start))
    return part.start if part.kind == "dataset" else 0


def _kind(file: Path, text_suffixes: tuple[str, ...]) -> str | None:
    for suffix, kind in ((".jsonl", "jsonl"), (".jsonl.gz", "gzip"), (".jsonl.zst", "zstd"), (".parquet", "parquet")):
        if file.name.endswith(suffix):
            return kind
    return "text" if file.suffix in text_suffixes else None


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
    rows = len(_open_dataset(str(path), split))
    starts = range(0, rows, PART_ROWS)
    return [Part("dataset", (str(path),), a, min(a + PART_ROWS, rows), split, PART_ROWS) for a in starts]


def _lines(part: Part) -> Iterator[bytes]:
    name = part.files[0]
    try:
        if part.kind == "jsonl":
            with open(name, "rb") as file:
                file.seek(part.start)
                while file.tell() < part.stop:
                    yield file.readline()
        elif part.kind == "gzip":
            with gzip.open(name, "rb") as file:
                yield from file
        else:
            zstandard = _extra("zstandard", name)
            with open(name, "rb") as raw:
                frames = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield from _unfinished_last_line(frames)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{name} cannot be read to its end: {error}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its class is only there where the extra is installed
            raise
        raise ValueError(f"{name} cannot be read to its end: {error}") from error


def _unfinished_last_line(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(2**20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _from_json(file: str, line: int, raw: bytes, field: str) -> Record:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Record(file, line, None, "not UTF-8")
    except (json.JSONDecodeError, RecursionError):
        return Record(file, line, None, "invalid JSON" if raw.strip() else "empty line")
    if not isinstance(value, dict):
        return Record(file, line, None, "not a JSON object")
    if field not in value:
        return Record(file, line, None, f"no field {field!r}")
    return _checked(file, line, value[field], field)


def _decoded(file: str, line: int, raw: bytes) -> Record:
    try:
        return _checked(file, line, raw.decode("utf-8"), "text")
    except UnicodeDecodeError:
        return Record(file, line, None, "not UTF-8")


def _checked(file: str, line: int, value: Any, field: str) -> Record:
    if not isinstance(value, str):
        return Record(file, line, None, f"field {field!r} is not a string")
    try:
        value.encode("utf-8")  # JSON may smuggle in half a surrogate pair
    except UnicodeEncodeError:
        return Record(file, line, None, "not UTF-8")
    return Record(file, line, value) if value.strip() else Record(file, line, None, "empty text")


def _open_parquet(name: str) -> Any:
    parquet = _extra("pyarrow.parquet", name)
    try:
        return parquet.ParquetFile(name)
    except Exception as error:
        raise ValueError(f"{name} is not a readable parquet file: {error}") from error


def _parquet_rows(part: Part, field: str) -> Iterator[Any]:
    table = _open_parquet(part.files[0])
    if field not in table.schema_arrow.names:
        raise ValueError(f"{part.files[0]} has no column {field!r}; it has: {', '.join(table.schema_arrow.names)}")
    try:
        for batch in table.iter_batches(columns=[field], row_groups=list(range(part.start, part.stop))):
            yield from batch.column(0).to_pylist()
    except OSError as error:
        raise ValueError(f"{part.files[0]} cannot be read to its end: {error}") from error


def _open_dataset(name: str, split: str | None) -> Any:
    datasets = _extra("datasets", name)
    try:
        data = datasets.load_from_disk(name)
    except Exception as error:
        raise ValueError(f"{name} is not a readable datasets folder: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name} has the splits {', '.join(data)}; choose one with --split")
        return data[split]
    return data


def _dataset_rows(part: Part, field: str) -> Iterator[Any]:
    data = _open_dataset(part.files[0], part.split)
    if field not in data.column_names:
        raise ValueError(f"{part.files[0]} has no column {field!r}; it has: {', '.join(data.column_names)}")
    yield from data.select_columns([field]).select(range(part.start, part.stop))[field]


def _extra(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name} needs {module.partition('.')[0]}: pip install 'nb_lightning[data]'") from error
