"""RL with a pairwise reward model as the judge of tasks with the verifier "preference"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nb_lightning.rewards.preference import Preference, load_reward_model
from tests import dpd_harness, reward_harness
from tests.harness import curve
from tests.rl_harness import make, run_here, write_judged

pytestmark = pytest.mark.runs

JUDGED = ("callbacks.on_policy_filter=null", "stage.phases.stem.steps=2", "stage.phases.code.steps=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judge")
    (root / "pairs").mkdir()
    return reward_harness.run_here(dpd_harness.make(root / "pairs"), root)


def judged(made: Path, folder: Path, reference: str | None) -> str:
    write_judged(made, folder / "judged.jsonl", reference)
    return f"data.sources.words={folder}/judged.jsonl"


@pytest.mark.parametrize("reference", [None, "abc def"])
def test_rewards_are_what_the_judge_prefers(made: Path, judge: Path, tmp_path: Path, reference: str | None) -> None:
    """Inside the group, or against a reference, beside a source with another verifier."""
    words = (f"stage.reward_model={judge}", "callbacks.rollouts.groups=4")
    run = run_here(made, tmp_path, *JUDGED, judged(made, tmp_path, reference), *words)
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    by_group: dict[tuple[int, str], list[dict]] = {}
    for line in lines:
        by_group.setdefault((line["step"], line["task"]), []).append(line)
    preference, compared = Preference(load_reward_model(str(judge))), 0
    for group in by_group.values():
        rewards = [line["reward"] for line in group]
        if group[0]["source"] == "digits":
            assert set(rewards) <= {0.0, 1.0}
            continue
        found = preference.score(group[0]["prompt"], [line["completion"] for line in group], reference)
        assert rewards == pytest.approx([score.reward for score in found])
        assert [line["status"] for line in group] == [score.info["status"] for score in found]
        compared += sum(score.info["status"] == "compared" for score in found)
    assert compared > 8 and len(set(curve(run, "rl/reward"))) > 1


def test_what_is_judged_inside_the_group_is_not_filtered(made: Path, judge: Path, tmp_path: Path) -> None:
    words = (f"stage.reward_model={judge}", "callbacks.on_policy_filter.min_prompts=1", *JUDGED[1:])
    run = run_here(made, tmp_path, judged(made, tmp_path, None), *words)
    found = json.loads((run / "on_policy_filter.json").read_text())
    assert found["stem"].keys() == {"digits"} and found["code"].keys() == {"digits"}


def test_no_reward_model_is_an_error_that_names_the_key(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a reward model: name a run .* with stage\.reward_model="):
        run_here(made, tmp_path, *JUDGED, judged(made, tmp_path, None), "stage.reward_model=null")


def test_a_model_that_is_none_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage\.reward_model=.*policy is no reward model"):
        run_here(made, tmp_path, *JUDGED, judged(made, tmp_path, None), f"stage.reward_model={made}/policy")
