"""The staging folder, in which a preparation works until the source is complete.

    <staging>/claim.json        what the work is for, and its state (data/prepare/claim.py)
    <staging>/parts/<number>/   a finished part: train/, val/, dropped.jsonl, done.json
    <staging>/parts/whole/      the source, until it is uploaded (remote outputs only)

The state in the claim is "tokenizing", then "merging" (parts lose their chunks to the source), then "over" (parts are
being deleted, so nothing can be resumed).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.prepare import source_writer
from data.prepare.archives import UNPACKED
from data.prepare.claim import CLAIM, as_json, changed_keys, read_claim, write_claim
from data.prepare.parts import Part
from data.prepare.settings import SourceSettings


class Staging:
    """The staging folder of one output.

    Args:
        output: local folder or s3:// prefix of the source.
        folder: where to work. By default beside a local output, for a remote one in the system's temporary folder:
            places that the same command finds again.
    """

    def __init__(self, output: str, folder: Path | None = None) -> None:
        self.output = output
        self.is_remote = "://" in output
        self.folder = folder or _default_folder(output)
        self.parts_folder = self.folder / "parts"
        self.source = self.parts_folder / "whole" if self.is_remote else Path(output)  # where the parts are merged
        self.claim: dict[str, Any] = {}

    def part_folder(self, number: int) -> Path:
        """Name the folder of a part; it exists once the part is finished."""
        return self.parts_folder / f"{number:06d}"

    def take(self, claim: dict[str, Any], overwrite: bool) -> None:
        """Claim the folder, or resume the same work in it. Call it under the folder's lock.

        Raises:
            ValueError: without `overwrite`, the folder holds unfinished work of another claim, or `output` a finished
                source; in any case, the folder holds something else.
        """
        old = read_claim(self.folder)
        if self.parts_folder.exists() and not old:
            raise ValueError(f"{self.parts_folder} is in the way, and not from a preparation; choose another --staging")
        changed = [key for key in changed_keys(old, claim) if key != "state"]
        if changed and old["state"] != "over" and not overwrite:
            raise ValueError(
                f"{self.folder} holds unfinished work with other {', '.join(changed)}; finish that, or start over: "
                "--overwrite"
            )
        if old and (changed or old["state"] == "over"):
            self.claim = old
            self.clean_up()
            old = {}
        if source_writer.is_source(self.output) and not overwrite and old.get("state") != "merging":
            raise ValueError(f"--output {self.output} holds a finished source; replace it with --overwrite")
        if not old:
            write_claim(self.folder, claim)
        self.claim = old or claim
        self.parts_folder.mkdir(exist_ok=True)
        for unfinished in self.parts_folder.glob("*.*"):
            shutil.rmtree(unfinished)

    @property
    def is_merging(self) -> bool:
        """Whether chunks may have moved into `source` already, which then belongs to this work."""
        return self.claim["state"] == "merging"

    def begin_merging(self) -> None:
        """Record that chunks move from here on."""
        write_claim(self.folder, {**self.claim, "state": "merging"})

    def clean_up(self) -> None:
        """Remove all work. The claim says so first, so that half-removed parts are never resumed."""
        write_claim(self.folder, {**self.claim, "state": "over"})
        shutil.rmtree(self.parts_folder, ignore_errors=True)
        (self.folder / CLAIM).unlink()

    def require_room(self, parts: list[Part], settings: SourceSettings) -> None:
        """Require disk space for the tokens of `parts`, estimated low so that nothing that could fit is refused.

        Raises:
            ValueError: too little space is free.
        """
        endings = tuple(UNPACKED)  # archives unpack to 2.5 times their size
        text = sum(part.bytes * (2.5 if part.files[0].endswith(endings) else 1) for part in parts)
        per_byte = 2.0  # a token for each byte, two bytes each
        if settings.tokenizer != "bytes":
            per_byte = 0.2 * (2 if settings.load_tokenizer().vocab_size <= 2**16 else 4)
        need, free = text * per_byte, shutil.disk_usage(self.folder).free
        if free < need:
            raise ValueError(
                f"{self.folder} has {free / 1e9:.1f} GB free, but about {need / 1e9:.1f} GB are needed; name another "
                "--staging"
            )


def new_claim(parts: list[Part], settings: SourceSettings, output: str) -> dict[str, Any]:
    """Write down all that the source depends on: output, settings, and size and time of every input file."""
    inputs = sorted({Path(file) for part in parts for file in part.files})
    files = [file for path in inputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    tokenizer = settings.load_tokenizer()
    return as_json(
        {
            "state": "tokenizing",
            "output": output if "://" in output else str(Path(output).resolve()),
            "settings": {**asdict(settings), "tokenizer": tokenizer.digest},
            "template": tokenizer.chat_template if settings.chat else None,
            "files": {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files},
            "parts": [asdict(part) for part in parts],
        }
    )


def _default_folder(output: str) -> Path:
    if "://" not in output:
        return Path(f"{Path(output)}.parts")
    address = hashlib.sha256(output.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir(), f"nb_lightning-{os.getuid()}-{address}")
