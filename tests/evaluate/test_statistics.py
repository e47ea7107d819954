"""Means, intervals and paired differences against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nb_lightning.ablate import compare, measured, table
from nb_lightning.evaluate.statistics import estimate, student_interval


def test_students_interval_by_hand() -> None:
    # mean 3, s = 2; t(2) = 4.303: 3 +- 4.303 * 2 / sqrt(3)
    assert student_interval(np.array([1.0, 3.0, 5.0])) == pytest.approx((3 - 4.96868, 3 + 4.96868), abs=1e-4)
    assert student_interval(np.array([1.0])) is None


def test_the_bootstrap_draws_seeds_and_tasks() -> None:
    """Where a value is a sum of a seed's part and a task's part, so is the variance of the mean of a resample."""
    rng = np.random.default_rng(5)
    seeds, tasks = rng.normal(size=(20, 1)), 2 * rng.normal(size=(1, 50))
    low, high = estimate(seeds + tasks).over_tasks_and_seeds
    expected = 2 * 1.96 * (seeds.var() / 20 + tasks.var() / 50) ** 0.5
    assert high - low == pytest.approx(expected, rel=0.06)
    only_tasks = estimate(np.tile(tasks, (3, 1))).over_tasks_and_seeds
    assert np.diff(only_tasks)[0] == pytest.approx(2 * 1.96 * (tasks.var() / 50) ** 0.5, rel=0.06)


def test_differences_are_paired_by_task_and_seed() -> None:
    hard = np.random.default_rng(0).random((3, 40))  # what is common to both arms cancels
    found = compare({"a": hard, "b": hard + 0.25}, {"a": hard - 0.5, "b": hard})
    assert "difference" not in found["a"]
    assert found["b"]["difference"]["mean"] == pytest.approx(0.25)
    assert found["b"]["difference"]["over_tasks_and_seeds"] == pytest.approx((0.25, 0.25))
    assert found["b"]["difference"]["over_seeds"] == pytest.approx((0.25, 0.25))
    assert [found[arm]["gain"]["mean"] for arm in "ab"] == pytest.approx([0.5, 0.25])


def test_the_table_of_single_numbers() -> None:
    found = compare({"a": np.array([[1.0], [3.0]]), "b": np.array([[2.0], [5.0]])})
    # t(1) = 12.706, s / sqrt(2) = 1 and 1.5; of the differences 1 and 2: 0.5
    assert table(found, "perplexity", digits=2).splitlines() == [
        "| arm | perplexity | 95 % over seeds | each seed | minus a | 95 % over seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 2.00 | -10.71 … 14.71 | 1.00, 3.00 |  |  |",
        "| b | 3.50 | -15.56 … 22.56 | 2.00, 5.00 | +1.50 | -4.85 … +7.85 |",
    ]


def test_the_table_of_tasks() -> None:
    after = {"a": np.full((2, 3), 0.5), "b": np.full((2, 3), 0.75)}
    found = compare(after, {arm: np.zeros((2, 3)) for arm in after})
    assert table(found, "avg in %", scale=100).splitlines() == [
        "| arm | avg in % | 95 % | 95 % over seeds | each seed | gain | 95 % | minus a | 95 % | 95 % over seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 50.0 | 50.0 … 50.0 | 50.0 … 50.0 | 50.0, 50.0 | +50.0 | +50.0 … +50.0 |  |  |  |",
        "| b | 75.0 | 75.0 … 75.0 | 75.0 … 75.0 | 75.0, 75.0 | +75.0 | +75.0 … +75.0 "
        "| +25.0 | +25.0 … +25.0 | +25.0 … +25.0 |",
    ]


def test_what_a_run_measured(tmp_path: Path) -> None:
    phases = {when: {"sources": {"sort": {"each": each}}} for when, each in (("before", [0, 0]), ("end", [0.5, 1]))}
    (tmp_path / "accuracy.json").write_text(json.dumps(phases))
    after, before = measured(tmp_path, "accuracy", "sort")
    assert after.tolist() == [0.5, 1] and before.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"measure\.sources names 'maths'; .* measured sort"):
        measured(tmp_path, "accuracy", "maths")
    for version, values in enumerate(([5.0, 4.0], [3.0])):  # a run that was resumed once
        folder = tmp_path / f"metrics/version_{version}"
        folder.mkdir(parents=True)
        lines = [f"{2 * version + i},{value}" for i, value in enumerate(values)]
        (folder / "metrics.csv").write_text("\n".join(["tokens_seen,val/perplexity/docs", *lines]))
    assert measured(tmp_path, "perplexity", "docs")[0].tolist() == [3.0]
    with pytest.raises(ValueError, match="logged no val/perplexity/code"):
        measured(tmp_path, "perplexity", "code")
