"""Callbacks of another package: through hydra.searchpath, and through Lightning's entry-point group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, TRACE, read_trace, run_train

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example extension as pip installs it, entry points and all."""
    target = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--target={target}", str(ROOT / "docs/examples/nb_trace")], check=True)
    return target


def test_a_callback_of_another_package_is_chosen_in_the_config(corpus: Path, tmp_path: Path, installed: Path) -> None:
    done = run_train(corpus, tmp_path, *TRACE, PYTHONPATH=str(installed))
    assert sorted(read_trace(tmp_path / "runs/pretrain")) == list(range(20))
    assert "trace: decay from 8192 tokens" in done.stdout
    manifest = json.loads((tmp_path / "runs/pretrain/manifest.json").read_text())
    assert "nb_trace.StepTrace" in manifest["callbacks"]


def test_a_callback_of_an_entry_point_always_runs(corpus: Path, tmp_path: Path, installed: Path) -> None:
    announced = tmp_path / "announced.txt"
    run_train(corpus, tmp_path, PYTHONPATH=str(installed), NB_TRACE_ANNOUNCE=str(announced))
    assert announced.read_text().splitlines() == [
        "start warmup 0",
        "end warmup 3072",
        "start diversity_enriched_stable 3072",
        "end diversity_enriched_stable 6144",
        "start high_quality_stable 6144",
        "end high_quality_stable 8192",
        "start decay 8192",
        "end decay 10240",
    ]
    manifest = json.loads((tmp_path / "runs/pretrain/manifest.json").read_text())
    assert "nb_trace.AnnouncePhases" in manifest["callbacks"]
