"""The recipe over real stages: killed at random places and resumed, it ends with the same weights and numbers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nb_lightning.pretrained import find
from tests import dpd_harness, sft_harness
from tests.harness import ROOT, TINY, environment

STAGES = ("pretrain", "sft", "dpd")


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Path:
    """Where to run `model=tiny`: pretraining, SFT from there, DPD from there with pairs."""
    chats, pairs = tmp_path / "chats", tmp_path / "pairs"
    for folder in (chats, pairs, tmp_path / "conf/recipe"):
        folder.mkdir(parents=True)
    sft_harness.make_sources(chats)
    dpd_harness.make(pairs)
    task = {"id": "1", "source": "words", "messages": [{"role": "user", "content": "ab"}], "verifier": "exact",
            "reference": "b"}  # fmt: skip
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    measured = ["data.tasks=[tasks.jsonl]", "data.task_tokens=4"]
    words = {
        "pretrain": [*TINY, f"paths.data_root={corpus}"],
        "sft": [*sft_harness.SFT, "init_from=${runs}/pretrain", f"paths.data_root={chats}", *measured],
        "dpd": [*dpd_harness.DPD, f"paths.data_root={pairs}", f"+data.sources.words={pairs}/words",
                "init_from=${runs}/sft", "stage.teacher=${runs}/sft", *measured],
    }  # fmt: skip
    steps = {
        name: {
            "run": ["python", str(ROOT / "train.py"), *of_stage],
            "makes": [f"${{runs}}/{name}"],
            "resume": ["resume=true"],
        }
        for name, of_stage in words.items()
    }
    OmegaConf.save({"runs": "${oc.env:NB_ROOT}/runs", "steps": steps}, tmp_path / "conf/recipe/tiny.yaml")
    return tmp_path


def start(place: Path, root: Path) -> subprocess.Popen[bytes]:
    env = {**environment(), "NB_ROOT": str(root)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "nb_lightning.recipe", "model=tiny"]
    return subprocess.Popen(command, cwd=place, env=env)


def ends(root: Path) -> dict[str, object]:
    """Of each stage a digest over all weights, and how often it was right."""
    found: dict[str, object] = {}
    for name in STAGES:
        run = root / "runs" / name
        accuracy = run / "accuracy.json"
        found[name] = (find(str(run)).digest(), json.loads(accuracy.read_text()) if name != "pretrain" else None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_twice_and_the_same_in_the_end(place: Path, seed: int) -> None:
    rng = random.Random(seed)
    assert start(place, place / "unbroken").wait(timeout=500) == 0
    root = place / "broken"
    for stage in sorted(rng.sample(STAGES, 2), key=STAGES.index):
        process = start(place, root)
        while process.poll() is None and not list((root / "runs" / stage).glob("checkpoints/step-*")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
    assert start(place, root).wait(timeout=500) == 0
    assert ends(root) == ends(place / "unbroken")
    starts = [len(json.loads((root / f"runs/{name}/manifest.json").read_text())["starts"]) for name in STAGES]
    assert sum(starts) > len(STAGES), "no kill came inside a stage; the test proves nothing"
