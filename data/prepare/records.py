"""Read the records of a part, each with its file and line. data/prepare/parts.py lists the kinds of input.

A bad record is a `Record` that says what is wrong. A file that cannot be read to its end (a truncated archive, a
damaged table) is an error, because the number of its records is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.prepare.archives import unpack
from data.prepare.parts import Part
from data.prepare.tables import Table, read_errors_of

# Only strings are wanted: as floats, numbers of thousands of digits do not fail (Python refuses such integers).
_STRINGS = json.JSONDecoder(parse_int=float)
_OBJECTS = json.JSONDecoder()


@dataclass(frozen=True)
class Record:
    """One record, or the reason why it is bad.

    Attributes:
        file: where it lies.
        line: counts from 1 within the part: lines, items of an array, or rows of a table; always 1 for text files.
        value: the text or the object; None in a bad record.
        bad: the reason by which bad records are counted; None in a good one.
        detail: more about this one bad record.
    """

    file: str
    line: int
    value: Any
    bad: str | None = None
    detail: str | None = None


def read_texts(part: Part, field: str) -> Iterator[Record]:
    """Read the texts of a part, bad records included.

    Args:
        field: field or column that holds the text; unused for text files.

    Raises:
        ValueError: a file cannot be read to its end, or a table has no column `field` of strings.
    """
    if part.kind == "text":
        for file in part.files:
            with read_errors_of(file):
                raw = Path(file).read_bytes()
            yield _decode(file, 1, raw)
        return
    name = part.files[0]
    if part.kind in ("parquet", "dataset"):
        for number, value in enumerate(_table_of(part).texts(field), start=1):
            yield (
                _decode(name, number, value) if isinstance(value, bytes) else _check_text(name, number, value, field)
            )
        return
    for record in _read_json(part, _STRINGS):
        if record.bad:
            yield record
        elif field not in record.value:
            yield Record(name, record.line, None, f"no field {field!r}")
        else:
            yield _check_text(name, record.line, record.value[field], field)


def read_objects(part: Part, fields: Sequence[str]) -> Iterator[Record]:
    """Read the JSON objects or table rows of a part, bad records included.

    Args:
        fields: columns to read of a table; of JSON, objects come with all their fields.

    Raises:
        ValueError: a file cannot be read to its end, or a table has none of the columns.
    """
    if part.kind in ("parquet", "dataset"):
        for number, row in enumerate(_table_of(part).rows(fields), start=1):
            yield Record(part.files[0], number, row, None if row is not None else "not UTF-8")
    else:
        yield from _read_json(part, _OBJECTS)


def _read_json(part: Part, decoder: json.JSONDecoder) -> Iterator[Record]:
    if part.kind == "json":
        yield from _read_array(part.files[0], decoder)
        return
    for number, line in enumerate(_read_lines(part), start=1):
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


def _read_array(name: str, decoder: json.JSONDecoder) -> Iterator[Record]:
    """Read the items of a file that is one JSON array. A fault anywhere in it makes all of it unreadable."""
    with read_errors_of(name):
        items = decoder.decode(b"".join(unpack(name)).decode("utf-8-sig"))
    for number, item in enumerate(items, start=1):
        is_object = isinstance(item, dict)
        yield Record(name, number, item if is_object else None, None if is_object else "not a JSON object")


def _read_lines(part: Part) -> Iterator[bytes]:
    name = part.files[0]
    with read_errors_of(name), open(name, "rb") as file:
        if part.kind == "jsonl":
            file.seek(part.start)
            left = part.stop - part.start
            while left > 0:
                line = file.readline()
                if not line:
                    raise EOFError(f"it became {left} bytes shorter while it was read")
                left -= len(line)
                yield line
        else:
            rest: list[bytes] = []
            for block in unpack(name):
                first, *lines = block.split(b"\n")
                rest.append(first)
                if lines:
                    yield b"".join(rest)
                    yield from lines[:-1]
                    rest = lines[-1:]
            if any(rest):
                yield b"".join(rest)


def _decode(file: str, line: int, raw: bytes) -> Record:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Record(file, line, None, "not UTF-8")
    return Record(file, line, text) if text.strip() else Record(file, line, None, "empty text")


def _check_text(file: str, line: int, value: Any, field: str) -> Record:
    if not isinstance(value, str):
        return Record(file, line, None, f"field {field!r} is not a string")
    try:
        value.encode("utf-8")  # JSON can hold half a surrogate pair
    except UnicodeEncodeError:
        return Record(file, line, None, "not UTF-8")
    return Record(file, line, value) if value.strip() else Record(file, line, None, "empty text")


def _table_of(part: Part) -> Table:
    return Table(part.kind, part.files[0], part.split, part.start, part.stop)
