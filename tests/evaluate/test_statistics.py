"""Means and intervals against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

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
