"""The recipe over all real stages: killed twice and resumed, it ends with the same weights and numbers."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from omegaconf import OmegaConf

from nb_lightning.checkpoints import folders
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.files import read_json
from nb_lightning.run_folder import read_metrics
from tests import dpd_harness, reward_harness, rl_harness, sft_harness
from tests.harness import ROOT, TINY, environment

STAGES = ("pretrain", "sft", "dpd", "reward_model", "rl")
PLACES = ("pretrain", "sft", "pairs", "dpd", "reward_model", "rl")  # where a kill may come, in the recipe's order


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Where to run `model=tiny`: every stage from the one before, the last phase of RL judged by the reward model."""
    place = tmp_path_factory.mktemp("place")
    chats, given = place / "chats", place / "given"
    for folder in (chats, given, place / "conf/recipe"):
        folder.mkdir(parents=True)
    sft_harness.make_sources(chats)
    dpd_harness.make(given)
    rl_harness.write_sources(place)
    rl_harness.write_judged(place, place / "judged.jsonl")
    measured = [f"data.tasks=[{place}/digits.jsonl]", "data.task_limit=3", "data.task_tokens=8"]
    pairs = "${root}/data/demo_pairs/tasks"
    words = f"+data.sources.words={given}/words"
    trained = {
        "pretrain": [*TINY, f"paths.data_root={corpus}"],
        "sft": [*sft_harness.SFT, f"paths.data_root={chats}", "init_from=${runs}/pretrain", *measured],
        "dpd": [*dpd_harness.DPD, words, "init_from=${runs}/sft", "stage.teacher=${runs}/sft", *measured],
        "reward_model": [*reward_harness.REWARD, words, f"+data.sources.tasks={pairs}/source", "init_from=${runs}/sft"],
        "rl": [*rl_harness.stage(place), f"data.sources.words={place}/judged.jsonl", "init_from=${runs}/dpd",
               "stage.reward_model=${runs}/reward_model", "stage.phases.stem.mixture.words=0",
               "stage.phases.stem.mixture.digits=1", "+stage.phases.code.mixture.words=1",
               "stage.phases.code.mixture.digits=0", *measured],
    }  # fmt: skip
    steps: dict[str, Any] = {
        name: {
            "run": ["python", str(ROOT / "train.py"), *words],
            "makes": [f"${{runs}}/{name}"],
            "resume": ["resume=true"],
        }
        for name, words in trained.items()
    }
    tasks = ["--tasks", f"{place}/digits.jsonl"]
    others = {
        "pairs": ["data.pairs", *tasks, "--teacher", "${runs}/sft", "--student", "${runs}/sft", "--max-new-tokens", 24,
                  "--pairs-per-prompt", 4, "--output", pairs, "--overwrite"],
        "pairs_source": ["data.prepare", "--pairs", "--input", f"{pairs}/pairs.jsonl", "--val-fraction", 0.2,
                         "--tokenizer", "${runs}/sft", "--output", f"{pairs}/source", "--overwrite"],
        "evaluate": ["nb_lightning.evaluate", "--model", "${runs}/rl", *tasks, "--max-new-tokens", 24,
                     "--out", "${root}/evaluation.json", "--samples", "${root}/answers.jsonl"],
        "export": ["nb_lightning.export", "--from", "${runs}/rl", "--to", "${root}/exported"],
    }  # fmt: skip
    steps |= {name: {"run": ["python", "-m", *words]} for name, words in others.items()}
    order = ("pretrain", "sft", "pairs", "pairs_source", "dpd", "reward_model", "rl", "evaluate", "export")
    recipe = {"root": "${oc.env:NB_ROOT}", "runs": "${root}/runs", "steps": {name: steps[name] for name in order}}
    OmegaConf.save(recipe, place / "conf/recipe/tiny.yaml")
    return place


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """What the recipe leaves behind when nothing happens."""
    root = place / "unbroken"
    assert start(place, root).wait(timeout=500) == 0
    boundaries = [digest for name in STAGES for digest in ended(root / "runs" / name).values()]
    assert len(boundaries) == len(set(boundaries)) == 10, "a phase has learnt nothing; the test proves nothing"
    return root


def start(place: Path, root: Path) -> subprocess.Popen[bytes]:
    env = {**environment(), "NB_ROOT": str(root)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "nb_lightning.recipe", "model=tiny"]
    return subprocess.Popen(command, cwd=place, env=env)


def ended(run: Path) -> dict[str, str]:
    """Of each phase a digest over all weights at its end."""
    boundaries = (path for path in folders.all_checkpoints(run) if "-end-of-" in path.name)
    return {path.name: find_origin(str(path)).digest() for path in boundaries}


def results(root: Path) -> dict[str, Any]:
    """All that must not depend on kills."""
    found: dict[str, Any] = {
        "pairs": (root / "data/demo_pairs/tasks/pairs.jsonl").read_text(),
        "evaluation": read_json(root / "evaluation.json")["tasks"],
        "answers": (root / "answers.jsonl").read_text(),
        "exported": find_origin(str(root / "exported")).digest(),
        "rollouts": (root / "runs/rl/rollouts.jsonl").read_text(),
        "filtered": read_json(root / "runs/rl/on_policy_filter.json"),
    }
    for name in STAGES:
        run = root / "runs" / name
        manifest = read_json(run / "manifest.json")
        last = {key: value for key, value in manifest["metrics"].items() if not key.startswith("perf/")}
        found[name] = (ended(run), read_json(run / "accuracy.json", {}), manifest["finished"], manifest["data"], last)
    return found


def curves(run: Path) -> dict[str, dict[float, float]]:
    """{metric: {tokens seen: value}}, without times."""
    return {name: dict(x.tolist()) for name, x in read_metrics(run).items() if not name.startswith("perf/")}


def written(root: Path, step: str) -> int:
    """Lines that a step has written so far: of the pairs its samples, of a stage its metrics, and one as it begins."""
    if step == "pairs":
        files = [root / f"data/demo_pairs/tasks/{model}.jsonl" for model in ("teacher", "student")]
    else:
        files = [root / f"runs/{step}/metrics/version_0/metrics.csv"]
    begun = (root / f"runs/{step}/config.yaml").is_file()
    return begun + sum(file.read_text().count("\n") for file in files if file.is_file())


def interrupt(place: Path, root: Path, step: str, lines: int, number: Signals) -> int:
    """Run the recipe until the step has written so many lines, and end it there.

    Returns:
        tokens that the step had seen in the newest checkpoint that is left of it; 0 where there is none.
    """
    process = start(place, root)
    while process.poll() is None and written(root, step) < lines:
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(timeout=60) == (-SIGKILL if number == SIGKILL else 128 + number)
    with open(root / "recipe/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the step's own process is gone too
    state = read_json(root / "recipe/state.json")
    assert list(state)[-1] == step and state[step]["state"] == "running", "the kill did not come inside the step"
    left = folders.newest(root / "runs" / step)[0]
    return 0 if left is None else folders.read_info(left)["tokens_seen"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, places, number, earliest",
    [
        (0, ("reward_model", "rl"), SIGKILL, 0.6),  # that of RL in the phase that the reward model judges
        (1, ("dpd", "rl"), SIGTERM, 0.0),
        (2, None, SIGKILL, 0.0),
        (3, None, SIGKILL, 0.0),
    ],
)
def test_killed_twice_the_weights_and_numbers_are_the_same(
    place: Path, unbroken: Path, seed: int, places: tuple[str, ...] | None, number: Signals, earliest: float
) -> None:
    """At random steps of random stages, or those named, after the share `earliest` of their lines."""
    rng, root = random.Random(seed), place / f"broken{seed}"
    left = {}
    for step in places or sorted(rng.sample(PLACES, 2), key=PLACES.index):
        lines = written(unbroken, step)
        left[step] = interrupt(place, root, step, rng.randint(1 + int(earliest * lines), int(0.8 * lines)), number)
    assert start(place, root).wait(timeout=500) == 0
    assert results(root) == results(unbroken)
    for step, entry in read_json(root / "recipe/state.json").items():
        log = (root / f"recipe/{step}.log").read_text()
        assert entry["state"] == "finished" and log.count("$ python ") == 1 + (step in left), step
    for name in STAGES:
        starts = [entry["tokens_seen"] for entry in read_json(root / f"runs/{name}/manifest.json")["starts"]]
        assert starts == ([0, left[name]] if left.get(name) else [0]), name  # it went on where it was
        ours, whole = curves(root / "runs" / name), curves(unbroken / "runs" / name)
        for metric, points in whole.items():
            lost = points.keys() - ours[metric].keys()  # killed after a save, before the step's numbers were written
            assert lost <= {left.get(name)} and ours[metric] == {x: y for x, y in points.items() if x not in lost}, name
