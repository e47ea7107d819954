"""The checkout around the library: where it is, and what its `train.py` would run with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nb_lightning.config.checks import check
from nb_lightning.config.compose import compose, register
from nb_lightning.config.schema import Config

CHECKOUT = Path(__file__).resolve().parent.parent


def shape_at(init_from: str | None) -> dict[str, Any]:
    """What `model=from_hf` asks for; torch is loaded only if it does."""
    from nb_lightning.checkpoints import pretrained

    return pretrained.shape_at(init_from)


def composed(overrides: Sequence[str]) -> Config:
    """The config of `python train.py *overrides`, not checked yet.

    Raises:
        ValueError: an override that does not fit, in Hydra's words.
    """
    register(shape_at)
    return compose(CHECKOUT / "conf", overrides)


def check_as_train(cfg: Config, overrides: Sequence[str]) -> None:
    """Check a config as `python train.py *overrides` would; a package of hydra.searchpath is trusted.

    Raises:
        ValueError: see `config_checks.check`.
    """
    searchpath = " ".join(word for word in overrides if word.startswith("hydra.searchpath="))
    check(cfg, re.findall(r"pkg://(\w+)", searchpath))
