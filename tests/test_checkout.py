"""The library without its checkout, as a wheel installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package nb_lightning and nothing else."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "nb_lightning", site / "nb_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    return site


@pytest.mark.parametrize("command", ["recipe", "recipe --dry-run", "ablate dpd", "submit --machine CPU stage=sft"])
def test_a_command_that_needs_conf_says_so_in_one_line(installed: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *f"nb_lightning.{command}".split()],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: this command needs nb_lightning's checkout, and {installed} has no conf/: an installed wheel is the "
        "library alone; clone the repository and run it there\n"
    )
