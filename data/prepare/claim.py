"""A claim: the file `claim.json`, which says what the work in a folder is for, so that it can be resumed.

A command that resumes compares its claim with the one in the folder: equal claims lead to equal results. Used for the
staging folders of `data.prepare` (data/prepare/staging.py), and for the output folders of `data.pairs` and
`data.refine`. data/teacher_cache.py compares its manifest in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nb_lightning.files import read_json, temporary_path, write_json

CLAIM = "claim.json"
SHOWN = 3  # names in a message


def as_json(claim: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a claim into what `read_claim` gives back (tuples become lists), so that claims can be compared."""
    return json.loads(json.dumps(claim))


def read_claim(folder: Path) -> dict[str, Any]:
    """Read the claim of a folder; {} where there is none."""
    return read_json(folder / CLAIM, {})


def write_claim(folder: Path, claim: Mapping[str, Any]) -> None:
    """Replace the claim of a folder."""
    write_json(folder / CLAIM, claim)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the keys of `new` that differ in `old`; none where there is no old claim."""
    return [key for key in new if old and old.get(key) != new[key]]


def claim_folder(
    folder: Path, claim: dict[str, Any], files: Sequence[str], overwrite: bool,
    describe: Callable[[Mapping[str, Any], Sequence[str]], str],
) -> None:  # fmt: skip
    """Claim the output folder of a command, or resume the same work in it.

    Args:
        claim: as `as_json` returns it.
        files: of other work, which are deleted when it is replaced.
        overwrite: replace other work.
        describe: the old claim and its keys that differ -> what the folder holds, and what the user may do.

    Raises:
        ValueError: the folder holds something else, or, without `overwrite`, other work.
    """
    names = sorted(path.name for path in folder.iterdir() if path != temporary_path(folder / CLAIM))
    if names and CLAIM not in names:
        shown = ", ".join(names[:SHOWN])
        raise ValueError(f"--output {folder} holds something else ({shown}); name another folder")
    old = read_claim(folder)
    changed = changed_keys(old, claim)
    if changed and not overwrite:
        raise ValueError(f"--output {folder} holds {describe(old, changed)}")
    if changed:
        # The old claim goes last. A run killed before that leaves it, and the next run deletes the files again.
        for name in files:
            (folder / name).unlink(missing_ok=True)
    write_claim(folder, claim)
