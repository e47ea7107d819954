"""Before a phase the current weights answer every prompt; what is too easy or too hard for them goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from callbacks.on_policy_filter import OnPolicyFilter
from nb_lightning.checkpoints.pretrained import in_training, load_pretrained
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.errors import RunStopped
from nb_lightning.evaluate.accuracy import evaluate_tasks
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards import Score
from nb_lightning.rewards.tasks import read_tasks
from nb_lightning.rollouts.attempts import Attempts, Prompt
from nb_lightning.rollouts.sampler import RolloutSampler
from nb_lightning.text.chat_template import ChatTemplate
from tests.rl_harness import make, run_here

pytestmark = pytest.mark.runs

SAMPLES = ("callbacks.on_policy_filter.samples=16",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


def solved(monkeypatch: pytest.MonkeyPatch, right: Any) -> list[tuple[float, float, list[str]]]:
    """Let `right(task)` of the 16 answers to each task be right; returns the calls: the policy, its RoPE base and the
    tasks asked."""
    calls: list[tuple[float, float, list[str]]] = []

    def sample_over_ranks(self: RolloutSampler, prompts: Sequence[Prompt], on_scored: Any) -> list[Attempts]:
        assert self.k == 16 and self.sampling.temperature == 1 and self.sampling.max_new_tokens == 24
        model, tasks = self.pretrained.model, [prompt.task for prompt in prompts]
        policy = float(model.embedding.weight.detach().sum())
        calls.append((policy, model.rope.theta, [task.id for task in tasks]))
        scores = [[Score(float(j < right(task)), {"status": "x"}) for j in range(self.k)] for task in tasks]
        return [Attempts(task, scores=task_scores) for task, task_scores in zip(tasks, scores)]

    monkeypatch.setattr(RolloutSampler, "sample_over_ranks", sample_over_ranks)
    return calls


def test_prompts_strictly_between_a_tenth_and_nine_tenths_are_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16: 1 is 6 % and goes, 2 stays; 14 is 87.5 % and stays, 15 goes."""
    right = {0: 0, 1: 1, 2: 2, 3: 8, 4: 14, 5: 15, 6: 16}
    calls = solved(monkeypatch, lambda task: right[int(task.id.split("/")[1]) % 7])
    run = run_here(made, tmp_path, *SAMPLES)
    found = json.loads((run / "on_policy_filter.json").read_text())
    counts = [2, 2, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 1, 1]
    expected = {"counts": counts, "kept": 6, "of": 12}
    assert found == {"stem": {"words": expected, "digits": expected}, "code": {"digits": expected}}
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert {int(line["task"].split("/")[1]) % 7 for line in lines} <= {2, 3, 4}
    policies, thetas, asked = zip(*calls)
    assert [len(tasks) for tasks in asked] == [24, 12] and policies[0] != policies[1]  # by the weights of each phase
    assert thetas == (1e5, 2e5)  # a run that resumes at the boundary comes with the first one's
    for phase in ("stem", "code"):
        assert (run / f"on_policy_filter_{phase}.png").stat().st_size > 5000


def test_only_the_candidates_are_answered(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = solved(monkeypatch, lambda task: 8)
    run_here(made, tmp_path, *SAMPLES, "callbacks.on_policy_filter.candidates=5")
    assert [len(tasks) for *_, tasks in calls] == [10, 5]


@pytest.mark.parametrize("n, advice", [(16, "harder"), (0, "easier")])
def test_too_few_stop_the_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, advice: str) -> None:
    solved(monkeypatch, lambda task: n if task.source == "digits" else 8)
    message = f"before phase stem: 0 of 12 prompts of digits stay .* fewer than .*min_prompts=4; give it {advice}"
    with pytest.raises(RunStopped, match=message):
        run_here(made, tmp_path, *SAMPLES, "callbacks.on_policy_filter.min_prompts=4")
    assert "digits" in (tmp_path / "runs/rl/on_policy_filter.json").read_text()  # to see why


def test_the_filter_counts_what_evaluation_counts(made: Path, tmp_path: Path) -> None:
    """The counts are those of `evaluate_tasks` on the starting weights, with the run's seed."""
    run = run_here(made, tmp_path, *SAMPLES, "stage.phases.stem.steps=1", "stage.phases.code.steps=1")
    loaded = load_pretrained(str(made / "policy"))
    model = in_training(loaded.model, load_tokenizer("bytes"), ChatTemplate.chatml(), "policy")
    report = evaluate_tasks(model, read_tasks(made / "words.jsonl"), Sampling(24), 16, 0)
    right = [attempts.n_correct for attempts in report.attempts]
    found = json.loads((run / "on_policy_filter.json").read_text())["stem"]["words"]
    assert found["counts"] == [right.count(n) for n in range(17)]
    assert found["kept"] == sum(2 <= n <= 14 for n in right)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"low": 0.9, "high": 0.1}, {"high": 1.5}], ids=str)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.on_policy_filter: samples"):
        OnPolicyFilter(**bad)
