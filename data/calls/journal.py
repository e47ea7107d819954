"""The journal of calls: a file of one line for each reply, written as soon as the reply is there.

    {"key": "<SHA-256 of the call>", "role": "teacher", "priced": true, "reply": {"message": ..., "finish": ...}}

In memory are 16 bytes of each key and the place of its line. Replies are read from the file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data.calls.call import Reply

JOURNAL = "calls.jsonl"
OnLine = Callable[[Reply, bool], None]  # a reply, and whether it is priced


class Journal:
    """Replies by the keys of their calls. One process writes at a time; `Caller` lets one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}  # compact key -> where its line begins
        self._end = 0  # bytes that are indexed
        self._files: tuple[BinaryIO, BinaryIO] | None = None  # to write and to read, while `open`

    @contextmanager
    def open(self, on_line: OnLine) -> Iterator[None]:
        """Open the file to read and write. A last line that a kill left unfinished is cut off.

        Args:
            on_line: called with each reply in the file that this object has not seen.

        Raises:
            ValueError: another process writes the file, or a line is damaged.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as writer, open(self.path, "rb") as reader:
            try:
                fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process writes {self.path}; wait until it is done") from None
            self._index(reader, on_line)
            self._files = writer, reader
            try:
                yield
            finally:
                self._files = None

    def __contains__(self, key: str) -> bool:
        return compact_key(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: str) -> Reply:
        """Read the reply to the call with this key."""
        return self.read_with_price(key)[0]

    def read_with_price(self, key: str) -> tuple[Reply, bool]:
        """Read a reply, and whether it is priced."""
        assert self._files is not None, "the journal is not open"
        reader = self._files[1]
        reader.seek(self._places[compact_key(key)])
        return _parse(reader.readline())[1:]

    def add(self, key: str, role: str, priced: bool, reply: Reply) -> None:
        """Append a reply. It is in the file when this returns."""
        assert self._files is not None, "the journal is not open"
        fields = {name: value for name, value in vars(reply).items() if name != "retries" or value}
        line = json.dumps({"key": key, "role": role, "priced": priced, "reply": fields}).encode() + b"\n"
        try:
            written = self._files[0].write(line)
            if written != len(line):
                raise OSError(f"{self.path}: only {written} of the {len(line)} bytes of a reply could be written")
        except OSError:
            os.truncate(self.path, self._end)  # no other line may follow half a line
            raise
        self._places[compact_key(key)] = self._end
        self._end += len(line)

    def _index(self, reader: BinaryIO, on_line: OnLine) -> None:
        """Read the lines that are not indexed."""
        reader.seek(self._end)
        for line in reader:
            if not line.endswith(b"\n"):
                os.truncate(self.path, self._end)
                break
            try:
                key, reply, priced = _parse(line)
                place = compact_key(key)
            except (ValueError, TypeError, KeyError) as error:
                number = len(self._places) + 1
                raise ValueError(
                    f"{self.path}:{number}: not the reply to a call ({error!r}); remove the line"
                ) from None
            self._places[place] = self._end
            self._end += len(line)
            on_line(reply, priced)


def _parse(line: bytes) -> tuple[str, Reply, bool]:
    value: dict[str, Any] = json.loads(line)
    return value["key"], Reply(**value["reply"]), bool(value["priced"])


def compact_key(key: str) -> bytes:
    """Keep 128 of the key's 256 bits: among 10^15 calls, two share them with a probability of 10^-9."""
    return bytes.fromhex(key[:32])
