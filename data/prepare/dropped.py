"""The log of bad records, `dropped.jsonl`: one line for each, with reason, file and line.

A worker logs with line numbers of its part; `merge_dropped` turns them into line numbers of the file. Logs are written
with errors="backslashreplace", because file names may hold any bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from data.prepare.parts import Part, count_lines_before
from data.prepare.records import Record

DROPPED = "dropped.jsonl"


def log_dropped(log: TextIO, record: Record) -> None:
    """Write one line of the log."""
    detail = {"detail": record.detail} if record.detail else {}
    entry = {"reason": record.bad, **detail, "file": record.file, "line": record.line}
    log.write(json.dumps(entry, ensure_ascii=False) + "\n")


def merge_dropped(logs: Iterable[tuple[Path, Part, int]], target: Path, shown: int = 3) -> dict[str, list[str]]:
    """Merge the parts' logs into `target`, with line numbers of the files.

    Without bad records, no `target` is written.

    Args:
        logs: of each part in order: its log, the part, and the number of its lines or rows.

    Returns:
        reason -> its first `shown` origins, as file:line.
    """
    origins: dict[str, list[str]] = {}
    lines_before: Counter[tuple[str, ...]] = Counter()  # a file's parts follow one another
    with open(target, "w", encoding="utf-8", errors="backslashreplace") as merged:
        for path, part, lines in logs:
            with open(path, encoding="utf-8", newline="\n") as log:
                for entry in map(json.loads, log):
                    record = _record_of(entry, lines_before[part.files])
                    log_dropped(merged, record)
                    if len(first := origins.setdefault(entry["reason"], [])) < shown:
                        first.append(f"{record.file}:{record.line}")
            if part.kind != "text":  # each text file is one record, on line 1
                lines_before[part.files] += lines
    if not origins:
        target.unlink()
    return origins


def first_dropped(part: Part, log: Path) -> str | None:
    """Describe the first bad record in the log of a part, as file:line: reason."""
    with open(log, encoding="utf-8") as file:
        entry = json.loads(file.readline() or "null")
    return None if entry is None else describe_bad(part, _record_of(entry))


def describe_bad(part: Part, record: Record) -> str:
    """Describe a bad record as file:line: reason."""
    return f"{record.file}:{count_lines_before(part) + record.line}: {record.detail or record.bad}"


def _record_of(entry: dict[str, Any], lines_before: int = 0) -> Record:
    return Record(entry["file"], lines_before + entry["line"], None, entry["reason"], entry.get("detail"))
