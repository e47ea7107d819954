"""The folder in which a preparation works: what it is for, and how far it is, so that it can be gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.prepare import source_writer
from data.prepare.records import ARCHIVES, Part
from data.prepare.settings import SourceSettings
from nb_lightning.files import read_json, write_json

CLAIM = "claim.json"


def new_claim(parts: list[Part], settings: SourceSettings, output: str) -> dict[str, Any]:
    """What the work in a staging folder is for; `state` is tokenizing, then merging, then over."""
    named = sorted({Path(file) for part in parts for file in part.files})
    files = [f for path in named for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    tokenizer = settings.load_tokenizer()
    claim = {
        "state": "tokenizing",
        "output": output if "://" in output else str(Path(output).resolve()),
        "settings": {**asdict(settings), "tokenizer": tokenizer.digest},
        "template": tokenizer.chat_template if settings.chat else None,
        "files": {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files},
        "parts": [asdict(part) for part in parts],
    }
    return json.loads(json.dumps(claim))  # as it reads back


def take_up(staging: Path, claim: dict[str, Any], output: str, overwrite: bool) -> dict[str, Any]:
    """Claim `staging`, or go on with the same work there; returns the claim that holds.

    Without `overwrite`, unfinished work of other input or settings, or a finished source, is a `ValueError`.
    """
    path, work = staging / CLAIM, staging / "parts"
    old = read_json(path, {})
    if work.exists() and not old:
        raise ValueError(f"{work} is in the way, and not from a preparation; choose another --staging")
    changed = [key for key in claim if old and key != "state" and old[key] != claim[key]]
    if changed and old["state"] != "over" and not overwrite:
        raise ValueError(
            f"{staging} holds unfinished work with other {', '.join(changed)}; finish that, or start over: --overwrite"
        )
    if old and (changed or old["state"] == "over"):
        clean_up(staging, old)
        old = {}
    if source_writer.is_source(output) and not overwrite and old.get("state") != "merging":
        raise ValueError(f"--output {output} holds a finished source; replace it with --overwrite")
    if not old:
        write_json(path, claim)
    work.mkdir(exist_ok=True)
    for unfinished in work.glob("*.*"):
        shutil.rmtree(unfinished)
    return old or claim


def clean_up(staging: Path, claim: dict[str, Any]) -> None:
    """Remove all work. The claim first says so: half removed parts must not be gone on with."""
    write_json(staging / CLAIM, {**claim, "state": "over"})
    shutil.rmtree(staging / "parts", ignore_errors=True)
    (staging / CLAIM).unlink()


def require_room(staging: Path, parts: list[Part], settings: SourceSettings) -> None:
    """A rough lower bound, so that nothing that could fit is refused: archives hold 2.5 times their size in text."""
    text = sum(part.bytes * (2.5 if part.kind in ARCHIVES else 1) for part in parts)
    per_byte = 2.0  # a token for each byte, two bytes each
    if settings.tokenizer != "bytes":
        per_byte = 0.2 * (2 if settings.load_tokenizer().vocab_size <= 2**16 else 4)
    need, free = text * per_byte, shutil.disk_usage(staging).free
    if free < need:
        raise ValueError(
            f"{staging} has {free / 1e9:.1f} GB free, but about {need / 1e9:.1f} GB are needed; name another --staging"
        )
