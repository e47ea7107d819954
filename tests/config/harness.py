"""Compose the config as `train.py` does."""

from __future__ import annotations

from nb_lightning.config.compose import compose, register
from nb_lightning.config.schema import Config
from tests.harness import ROOT

CONF = ROOT / "conf"


def composed(*overrides: str) -> Config:
    register()
    return compose(CONF, overrides)
