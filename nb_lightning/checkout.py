"""The checkout that the library was imported from: conf/, train.py, and what `train.py` would run with.

The wheel holds the library alone. Commands that compose a config or start train.py call `require_checkout`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nb_lightning.config.checks import check
from nb_lightning.config.compose import compose, register
from nb_lightning.config.schema import Config

CHECKOUT = Path(__file__).resolve().parent.parent
CONF = "conf"


def default_root() -> str:
    """Return `paths.root` where no override sets it, as conf/train.yaml has it."""
    return os.environ.get("NB_ROOT", "outputs")


def require_checkout(folder: Path | None = None) -> None:
    """Refuse to go on where there is no conf/.

    Args:
        folder: where to look; by default where the library was imported from.

    Raises:
        ValueError: says what is missing and what to do.
    """
    folder = folder or CHECKOUT
    if not (folder / CONF).is_dir():
        raise ValueError(
            f"this command needs nb_lightning's checkout, and {folder.resolve()} has no {CONF}/: an installed wheel is "
            "the library alone; clone the repository and run it there"
        )


def read_shape(init_from: str | None) -> Mapping[str, Any]:
    """Read the shape of a model for `model=from_hf`."""
    from nb_lightning.checkpoints.pretrained import shape_at  # loads torch, which other models do not need here

    return shape_at(init_from)


def composed(overrides: Sequence[str], shape_of: Callable[[str | None], Mapping[str, Any]] = read_shape) -> Config:
    """Compose the config of `python train.py *overrides`, unchecked.

    Args:
        overrides: the arguments after `train.py`.
        shape_of: how `model=from_hf` reads the model's shape from `init_from`.

    Raises:
        ValueError: this is no checkout; an override does not fit; or a value is missing.
    """
    require_checkout()
    register(shape_of)
    return compose(CHECKOUT / CONF, overrides)


def check_as_train(cfg: Config, overrides: Sequence[str]) -> None:
    """Check a config as `python train.py *overrides` would; packages in hydra.searchpath are trusted.

    Raises:
        ValueError: see `config.checks.check`.
    """
    searchpath = " ".join(override for override in overrides if override.startswith("hydra.searchpath="))
    check(cfg, re.findall(r"pkg://(\w+)", searchpath))
