"""The output folder of `python -m data.pairs`: its files, its claim, and the journals by which a run resumes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from data.prepare.claim import CLAIM, changed_keys, read_claim, write_claim
from nb_lightning.files import temporary_path

PAIRS, REPORT = "pairs.jsonl", "report.json"
TEACHER, STUDENT, JUDGE = "teacher.jsonl", "student.jsonl", "judge.jsonl"
FILES = (PAIRS, REPORT, TEACHER, STUDENT, JUDGE)
SHOWN = 3  # names in a message


def claim_folder(folder: Path, claim: dict[str, Any], overwrite: bool) -> None:
    """Claim `folder`, or resume the same work in it.

    Raises:
        ValueError: the folder holds something else, or, without `overwrite`, work of another claim.
    """
    names = sorted(path.name for path in folder.iterdir() if path != temporary_path(folder / CLAIM))
    if names and CLAIM not in names:
        raise ValueError(f"--output {folder} holds something else ({', '.join(names[:SHOWN])}); name another folder")
    changed = changed_keys(read_claim(folder), claim)
    if changed and not overwrite:
        raise ValueError(
            f"--output {folder} holds responses of other {', '.join(changed)}; name another folder, or replace them "
            "with --overwrite"
        )
    if changed:
        # The old claim goes last. A run killed before that leaves it, and the next run deletes the files again.
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    write_claim(folder, claim)


class Journal:
    """A file of {"key", "value"} lines, each written as soon as its value is known. Threads may share it.

    Opening it cuts off a last line that a kill left unfinished.

    Attributes:
        entries: key -> value, of all lines.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.entries: dict[str, Any] = {}
        if path.exists():
            text = path.read_bytes()
            text = text[: text.rfind(b"\n") + 1]
            os.truncate(path, len(text))
            for line in text.split(b"\n")[:-1]:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry["value"]

    def add(self, key: str, value: Any) -> None:
        """Append a line."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
        with self._lock, open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
            self.entries[key] = json.loads(line)["value"]
