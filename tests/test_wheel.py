"""What the wheel holds: the library, its type marker, its templates and the licence, and nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return ZipFile(path)


def test_it_holds_every_file_of_the_library(wheel: ZipFile) -> None:
    files = {path for path in (ROOT / "nb_lightning").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(ROOT)) for path in files}
    assert {"nb_lightning/py.typed", "nb_lightning/text/chatml.jinja"} <= names


def test_it_holds_the_licence(wheel: ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_a_command_of_the_installed_wheel(wheel: ZipFile, tmp_path: Path) -> None:
    """Unpacked into a folder that comes before the checkout on the path, as pip unpacks it."""
    wheel.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "nb_lightning.evaluate", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and "--model" in done.stdout
