"""Read tables of records: parquet files and folders of `datasets.save_to_disk`. Their libraries are imported on use."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_errors_of(file: str) -> Iterator[None]:
    """Turn a reader's error into one line that names the file; each library raises other classes."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{file} needs {(error.name or '').partition('.')[0]}: pip install 'nb_lightning[data]'"
        ) from error
    except Exception as error:
        raise ValueError(f"{file} cannot be read to its end: {error}") from error


def open_parquet(name: str) -> Any:
    with read_errors_of(name):
        return importlib.import_module("pyarrow.parquet").ParquetFile(name)


def open_dataset(name: str, split: str | None) -> Any:
    with read_errors_of(name):
        datasets = importlib.import_module("datasets")
        data = datasets.load_from_disk(name)
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name} has the splits {', '.join(data)}; choose one with --hf-split")
        return data[split]
    return data


class Table:
    """Rows [start, stop) of a dataset, or row groups [start, stop) of a parquet file.

    Raises:
        ValueError: the file cannot be read to its end.
    """

    def __init__(self, kind: str, name: str, split: str | None, start: int, stop: int) -> None:
        self.kind, self.name, self.start, self.stop = kind, name, start, stop
        self._table = open_parquet(name) if kind == "parquet" else open_dataset(name, split)
        self.schema = self._table.schema_arrow if kind == "parquet" else self._table.features.arrow_schema

    def texts(self, column: str) -> Iterator[Any]:
        """Read a column of strings as bytes: a single one that is not UTF-8 would fail the decoding of its batch."""
        if column not in self.schema.names:
            raise ValueError(f"{self.name} has no column {column!r}; it has: {', '.join(self.schema.names)}")
        kind = self.schema.field(column).type
        if not re.match(r"(dictionary<values=)?(large_)?string\b", str(kind)):
            raise ValueError(f"{self.name}: column {column!r} is of type {kind}, not string")
        return self._batches([column], lambda batch: batch.column(column).cast("large_binary").to_pylist())

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any] | None]:
        """Read the fields of each row among `columns`, as they were written; see `_as_written`.

        None stands for a row with a string that is not UTF-8.
        """
        present = [name for name in self.schema.names if name in columns]
        if not present:
            raise ValueError(
                f"{self.name} has none of the columns {', '.join(columns)}; it has: {', '.join(self.schema.names)}"
            )
        return self._batches(present, _rows)

    def _batches(self, columns: list[str], take: Callable[[Any], list[Any]]) -> Iterator[Any]:
        with read_errors_of(self.name):
            if self.kind == "parquet":
                groups = range(self.start, self.stop)
                batches = self._table.iter_batches(1024, row_groups=groups, columns=columns)
            else:
                rows = self._table.select_columns(columns).select(range(self.start, self.stop))
                batches = rows.with_format("arrow").iter(1024)
            for batch in batches:
                yield from take(batch)


def _rows(batch: Any) -> list[dict[str, Any] | None]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]
    kinds = {field.name: field.type for field in batch.schema}
    return [{name: _objects_in(_as_written(value, kinds[name])) for name, value in row.items()} for row in rows]


def _as_written(value: Any, kind: Any) -> Any:
    """Undo what a table does to nested JSON.

    All rows of a struct have the same keys: those that only other rows have are null, and are left out. A null in a
    list was written by someone and stays. A value of the JSON type (`datasets.Json`) is the text of its JSON.

    Args:
        kind: the Arrow type of `value`.
    """
    if getattr(kind, "extension_name", None) == "arrow.json":
        return _parse_json(value)
    if isinstance(value, dict):
        return {key: _as_written(item, kind.field(key).type) for key, item in value.items() if item is not None}
    if isinstance(value, list) and hasattr(kind, "key_type"):  # a map, which has the keys of its own row only
        return {key: _as_written(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [_as_written(item, kind.value_type) for item in value]
    return value


def _objects_in(value: Any) -> Any:
    """Parse the items of a list that are the JSON of an object: messages or tools in a column of strings."""
    if not isinstance(value, list):
        return value
    parsed = [_parse_json(item) for item in value]
    return [new if isinstance(new, dict) else old for new, old in zip(parsed, value)]


def _parse_json(value: Any) -> Any:
    """Parse a string of JSON; what is not one stays as it is, and is refused where an object is expected."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
