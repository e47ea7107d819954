"""The dry run of a whole recipe, as a user types it: every step's command, every stage's plan, and what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nb_lightning.recipe.plans import check_configs, show_plans
from nb_lightning.recipe.steps import Step, read_recipe
from tests.harness import ROOT

pytestmark = pytest.mark.runs


def dry_run(root: Path, *words: str) -> str:
    command = [sys.executable, "-m", "nb_lightning.recipe", *words, "--dry-run"]
    env = {**os.environ, "NB_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and list(root.iterdir()) == []  # nothing but the plans, and nothing is written
    return done.stdout


def test_the_dry_run_of_the_3b_plans_each_stage_and_names_what_is_missing(tmp_path: Path) -> None:
    said = dry_run(tmp_path, "model=nanbeige4_3b", "trainer=fsdp")
    steps = read_recipe("nanbeige4_3b")
    assert re.findall(r"^# (\d+)/16 (\w+)$", said, re.M) == [(str(i), step.name) for i, step in enumerate(steps, 1)]
    plans = dict(zip(*[iter(re.split(r"^---- (.*) ----$", said, flags=re.M)[1:])] * 2))
    *stages, absent = plans
    assert stages == ["pretrain", "sft", "dpd", "reward_model", "rl"]
    assert absent == "not there yet, and no step makes it"
    for stage in stages:
        assert f"stage {stage}, 8 device(s), fsdp, bf16-mixed" in plans[stage]
        assert "3,933,637,120 parameters" in plans[stage] and " FLOP " in plans[stage]
    assert "teacher" in plans["dpd"] and "reward model" in plans["rl"]
    assert re.search(rf"init_from +{tmp_path}/runs/dpd\n", plans["rl"])
    to_bring = {line.split()[0]: line.split("  for ")[1] for line in plans[absent].strip().splitlines()}
    data = tmp_path / "data"
    assert to_bring[f"{data}/tokenizer"] == "pretrain, sft, dpd, reward_model, rl"
    assert to_bring[f"{data}/teacher"] == "pairs_reasoning, pairs_general, pairs_agent, dpd"
    assert to_bring[f"{data}/rl/stem.jsonl"] == "pairs_reasoning, rl"
    assert to_bring[f"{data}/held_out/code.jsonl"] == "evaluate_sft, evaluate_dpd, evaluate_rl"
    assert not any("runs/" in path or "/dpd/" in path for path in to_bring)  # steps make these


def test_the_demo_lacks_no_input(tmp_path: Path) -> None:
    said = dry_run(tmp_path)
    assert said.count("memory per device") == 6 and "no step makes it" not in said


def test_results_of_steps_that_were_not_chosen_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NB_ROOT", str(tmp_path))
    steps = read_recipe("demo")
    show_plans(steps, [step for step in steps if step.name in ("dpd", "evaluate_dpd")])
    absent = capsys.readouterr().out.partition("---- not there yet, and no step makes it ----\n")[2]
    lines = [line.split("  for ") for line in absent.splitlines()]
    assert [f"{tmp_path}/runs/sft", "dpd"] in [[path.strip(), names] for path, names in lines]
    assert not any(path.startswith(f"{tmp_path}/runs/dpd") for path, _ in lines)


def test_a_mistake_in_the_last_stage_is_named_before_the_first_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for word, message in (
        ("rl:stage.group_size=1", "step rl: stage.group_size is 1;"),
        ("rl:stage.group_sizes=8", "step rl: .*group_sizes"),
        ("paths.runs=elsewhere", "it would write elsewhere/.*paths.root="),
    ):
        with pytest.raises(ValueError, match=message):
            check_configs(read_recipe("demo", [word])[-6:])


def test_a_stage_whose_model_is_not_there_yet_has_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NB_ROOT", str(tmp_path))
    step = Step("sft", f"python train.py stage=sft model=from_hf init_from={tmp_path}/base".split())
    check_configs([step])
    show_plans([step], [step])
    assert f"not planned: its model is that of {tmp_path}/base, which is not there yet" in capsys.readouterr().out
