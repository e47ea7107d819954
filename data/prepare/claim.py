"""A claim: the file `claim.json`, which says what the work in a folder is for, so that it can be resumed.

A command that resumes compares its claim with the one in the folder: equal claims lead to equal results. Used for the
staging folders of `data.prepare` (data/prepare/staging.py) and the output folders of `data.pairs`
(data/pairs/workspace.py); data/teacher_cache.py compares its manifest in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nb_lightning.files import read_json, write_json

CLAIM = "claim.json"


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
