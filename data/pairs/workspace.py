"""The output folder of `python -m data.pairs`: its files, and the claim by which a run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.calls.journal import JOURNAL
from data.prepare.claim import CLAIM, changed_keys, read_claim, write_claim
from nb_lightning.files import temporary_path

PAIRS, REPORT = "pairs.jsonl", "report.json"
VERSION = 2  # of the journal; a claim of version 1 has none
OLD_FILES = ("teacher.jsonl", "student.jsonl", "judge.jsonl")  # of version 1
FILES = (PAIRS, REPORT, JOURNAL, *OLD_FILES)
SHOWN = 3  # names in a message


def claim_folder(folder: Path, claim: dict[str, Any], overwrite: bool) -> None:
    """Claim `folder`, or resume the same work in it.

    Raises:
        ValueError: the folder holds something else, or, without `overwrite`, work of another claim or version.
    """
    names = sorted(path.name for path in folder.iterdir() if path != temporary_path(folder / CLAIM))
    if names and CLAIM not in names:
        raise ValueError(f"--output {folder} holds something else ({', '.join(names[:SHOWN])}); name another folder")
    old = read_claim(folder)
    changed = changed_keys(old, claim)
    if changed and not overwrite:
        what = f"responses of other {', '.join(changed)}"
        if old.get("version") != VERSION:
            what = "responses in the journals of an earlier version, which are no longer read"
        raise ValueError(f"--output {folder} holds {what}; name another folder, or replace them with --overwrite")
    if changed:
        # The old claim goes last. A run killed before that leaves it, and the next run deletes the files again.
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    write_claim(folder, claim)
