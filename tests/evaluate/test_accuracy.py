"""avg@k, pass@k and their intervals: against enumeration, and for a model whose every probability is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from nb_lightning.evaluate.accuracy import evaluate_tasks
from nb_lightning.evaluate.statistics import bootstrap, pass_at
from nb_lightning.generation.decoder import generate
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import ModelShape
from nb_lightning.rewards import Score
from tests.evaluate.harness import COIN, END, TOKENIZER, chain, id_of, pretrained_of, tasks_of
from tests.model.harness import random_model

SAMPLING = Sampling(12, temperature=1.0)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_pass_at_is_the_share_of_subsets_with_a_correct_one() -> None:
    for k in range(1, 7):
        for correct in range(k + 1):
            for j in range(1, k + 1):
                subsets = list(combinations([True] * correct + [False] * (k - correct), j))
                assert pass_at(j, k, correct) == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-12)


def test_the_interval_is_that_of_the_normal_distribution_for_many_values() -> None:
    values = np.random.default_rng(1).binomial(1, 0.3, size=2000).astype(float)
    low, high = bootstrap(values)
    spread = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - spread, abs=0.002)
    assert high == pytest.approx(values.mean() + spread, abs=0.002)
    assert bootstrap(values) == (low, high)
    assert bootstrap(np.array([1.0])) is None


def test_the_interval_of_a_ratio() -> None:
    """Documents of any length with the same rate have no spread; equal weights change nothing."""
    weights = np.arange(1.0, 30.0)
    assert bootstrap(3 * weights, weights) == pytest.approx((3, 3))
    values = np.random.default_rng(1).random(50)
    assert bootstrap(values, np.full(50, 2.0)) == pytest.approx(np.array(bootstrap(values)) / 2)


# A model with known probabilities -----------------------------------------------------------------------------------


def test_a_chain_has_the_probabilities_that_were_asked_for() -> None:
    with torch.no_grad():
        p = chain(COIN)(torch.tensor([[1, 2, id_of("\n")]]))[0, -1].softmax(-1)
    assert p[id_of("4")].item() == pytest.approx(0.75, abs=1e-3)
    assert p[id_of("7")].item() == pytest.approx(0.25, abs=1e-3)


def test_the_summary_shows_the_models_probabilities() -> None:
    """ "42" with probability 0.75; else sevens up to the limit."""
    tasks = tasks_of(["42"] * 60) + tasks_of(["77"] * 20, source="never")
    found = evaluate_tasks(pretrained_of(chain(COIN)), tasks, SAMPLING, k=4, max_batch=32)
    summary = found.summary()
    assert list(summary) == ["s", "never", "all"]
    s = summary["s"]
    assert s["tasks"] == 60 and s["mean"] == pytest.approx(0.75, abs=0.08)
    right = [sum(text == "42" for text in attempts.texts) for attempts in found.attempts[:60]]
    assert s["mean"] == pytest.approx(sum(right) / 240)
    low, high = s["interval"]
    assert 0.6 < low < s["mean"] < high < 0.9
    assert list(s["pass"]) == [1, 2, 4] and s["pass"][1] == pytest.approx(s["mean"])
    assert s["pass"][4] == np.mean([n > 0 for n in right])
    assert s["truncated"] == pytest.approx(1 - s["mean"])  # what is not 42 is sevens to the end
    assert s["tokens"] == pytest.approx(3 * s["mean"] + 12 * (1 - s["mean"]))
    assert s["statuses"] == {"correct": sum(right), "wrong": 240 - sum(right)}
    assert summary["never"]["mean"] == 0 and summary["never"]["interval"] == (0, 0)
    assert summary["all"]["mean"] == pytest.approx(s["mean"] * 60 / 80)
    assert {text for attempts in found.attempts for text in attempts.texts} == {"42", "7" * 12}


def test_greedy_takes_the_most_likely_completion() -> None:
    found = evaluate_tasks(pretrained_of(chain(COIN)), tasks_of(["42", "43"]), replace(SAMPLING, temperature=0))
    assert [attempts.mean_reward for attempts in found.attempts] == [1, 0]
    assert found.summary()["all"]["pass"] == {1: 0.5}


class Half:
    """Half a point for each completion, and what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, Any]] = []

    def check(self, reference: Any) -> None:
        if reference == "bad":
            raise ValueError("the reference is bad")

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
        self.calls.append((prompt, len(completions), reference))
        return [Score(0.5, {"status": "partly"}) for _ in completions]


def test_partial_rewards_count_for_the_mean_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Half()
    monkeypatch.setattr("nb_lightning.rewards.registry.get_verifier", lambda name: half)
    seen = []
    found = evaluate_tasks(pretrained_of(chain(COIN)), tasks_of([1, 2]), SAMPLING, k=3, on_scored=seen.append)
    assert found.summary()["all"]["mean"] == 0.5 and found.summary()["all"]["pass"] == {1: 0, 2: 0, 3: 0}
    assert sorted(half.calls) == [("question 0", 3, 1), ("question 1", 3, 2)]
    assert sorted(attempts.task.id for attempts in seen) == ["t0", "t1"]


# What is drawn ------------------------------------------------------------------------------------------------------


def test_completions_are_those_of_generate() -> None:
    """The chat up to where the assistant begins goes in; the text without the token that ended it comes out."""
    model = random_model(ModelShape(TOKENIZER.vocab_size, 24, 2, 2, 1, 12, 40)).eval()
    tasks = tasks_of(["a", "b"])
    found = evaluate_tasks(pretrained_of(model), tasks, replace(SAMPLING, temperature=0), k=1)
    for task, attempts in zip(tasks, found.attempts):
        text = f"<|im_start|>user\n{task.messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = TOKENIZER.tokenizer.encode(text, add_special_tokens=False).ids
        (want,) = generate(model, [prompt], Sampling(12, 0, stop_ids=(TOKENIZER.eos_id, END)))
        ids = want.ids[:-1] if want.finish_reason == "stop" else want.ids
        assert attempts.texts == [TOKENIZER.decode(ids)] and attempts.n_tokens == [len(want.ids)]
        assert attempts.finish_reasons == [want.finish_reason]


def test_completions_depend_on_seed_and_task_alone() -> None:
    model = pretrained_of(random_model(ModelShape(TOKENIZER.vocab_size, 24, 2, 2, 1, 12, 40)))
    tasks = tasks_of("abcdefg")
    texts = {a.task.id: a.texts for a in evaluate_tasks(model, tasks, SAMPLING, k=3, seed=5).attempts}
    assert len({text for found in texts.values() for text in found}) == 21
    for some, max_batch in ((tasks, 1), (tasks[::-1], 5), (tasks[3:5], 64)):
        found = evaluate_tasks(model, some, SAMPLING, k=3, seed=5, max_batch=max_batch)
        assert [a.task for a in found.attempts] == some
        assert {a.task.id: a.texts for a in found.attempts} == {t.id: texts[t.id] for t in some}
    fewer = evaluate_tasks(model, tasks, SAMPLING, k=2, seed=5).attempts
    assert [a.texts for a in fewer] == [found[:2] for found in texts.values()]
    other = evaluate_tasks(model, tasks, SAMPLING, k=3, seed=6).attempts
    assert all(a.texts != texts[a.task.id] for a in other)
    elsewhere = evaluate_tasks(model, [replace(t, source="other") for t in tasks], SAMPLING, k=3, seed=5).attempts
    assert all(a.texts != texts[a.task.id] for a in elsewhere)


def test_the_model_is_in_the_mode_it_was_in() -> None:
    model = pretrained_of(chain(COIN))
    model.model.train()
    evaluate_tasks(model, tasks_of(["42"]), SAMPLING)
    assert model.model.training


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tasks=[]), "no task to evaluate"),
        (dict(k=0), "k is 0; it must be at least 1"),
        (dict(tasks=tasks_of(["a"], verifier="oracle")), "no verifier is called 'oracle'"),
        (dict(tasks=tasks_of(["a", 3])), "task 't1': the reference of 'exact' is 3"),
        (dict(tasks=[replace(tasks_of("a")[0], messages=[{"role": "boss"}])]), "task 't0': message 0: unknown role"),
        (dict(pretrained=replace(pretrained_of(chain({})), chat=None)), "test has no chat template"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_before_anything_is_sampled(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("nb_lightning.rollouts.sampler.stream", lambda *_: pytest.fail("sampled"))
    given = {"pretrained": pretrained_of(chain({})), "tasks": tasks_of("a"), "sampling": SAMPLING, "k": 1, **change}
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(**given)


def test_what_a_verifier_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Half):
        def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
            raise RuntimeError("bug")

    monkeypatch.setattr("nb_lightning.rewards.registry.get_verifier", lambda name: Broken())
    with pytest.raises(RuntimeError, match="bug"):
        evaluate_tasks(pretrained_of(chain(COIN)), tasks_of([1, 2]), SAMPLING)
