"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole: written beside its place, synced, then renamed."""
    temporary = unfinished(path)
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def unfinished(path: Path) -> Path:
    """Where `whole` writes; a kill leaves it there."""
    return path.with_name(f".{path.name}.tmp")
