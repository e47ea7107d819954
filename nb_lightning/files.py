"""Files: read JSON, hash a file, and write one so that a kill leaves either all of it or none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        default: returned if the file does not exist; without a default that is an error.

    Raises:
        ValueError: no file and no default, or the file holds something else than a JSON object.
    """
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def json_line(value: Any) -> bytes:
    """Return a value as a line of a .jsonl file. Halves of surrogate pairs, which UTF-8 cannot hold, are escaped."""
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, then sync it and rename it to `path`.

    An exception in between leaves `path` as it was.
    """
    temporary = temporary_path(path)
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def temporary_path(path: Path) -> Path:
    """Return the file beside `path` that `atomic_write` fills. A killed process leaves it behind."""
    return path.with_name(f".{path.name}.tmp")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
