"""The output folder of `python -m data.pairs`: its files, and the claim by which a run resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.calls.journal import JOURNAL

PAIRS, REPORT = "pairs.jsonl", "report.json"
VERSION = 2  # of the journal; a claim of version 1 has none
OLD_FILES = ("teacher.jsonl", "student.jsonl", "judge.jsonl")  # of version 1
FILES = (PAIRS, REPORT, JOURNAL, *OLD_FILES)


def describe_other_work(old: Mapping[str, Any], changed: Sequence[str]) -> str:
    """Say what a folder with another claim holds; see `data.prepare.claim.claim_folder`."""
    held = f"responses of other {', '.join(changed)}"
    if old.get("version") != VERSION:
        held = "responses in the journals of an earlier version, which are no longer read"
    return f"{held}; name another folder, or replace them with --overwrite"
