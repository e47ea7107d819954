"""Paired differences, and the table of an ablation's arms, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nb_lightning.evaluate.comparison import compare, comparison_table


def test_differences_are_paired_by_task_and_seed() -> None:
    hard = np.random.default_rng(0).random((3, 40))  # what is common to both arms cancels
    estimates = compare({"a": hard, "b": hard + 0.25}, {"a": hard - 0.5, "b": hard})
    assert "difference" not in estimates["a"]
    assert estimates["b"]["difference"]["mean"] == pytest.approx(0.25)
    assert estimates["b"]["difference"]["over_tasks_and_seeds"] == pytest.approx((0.25, 0.25))
    assert estimates["b"]["difference"]["over_seeds"] == pytest.approx((0.25, 0.25))
    assert [estimates[arm]["gain"]["mean"] for arm in "ab"] == pytest.approx([0.5, 0.25])


def test_the_table_of_single_numbers() -> None:
    estimates = compare({"a": np.array([[1.0], [3.0]]), "b": np.array([[2.0], [5.0]])})
    # t(1) = 12.706, s / sqrt(2) = 1 and 1.5; of the differences 1 and 2: 0.5
    assert comparison_table(estimates, "perplexity", digits=2).splitlines() == [
        "| arm | perplexity | 95 % over seeds | each seed | minus a | 95 % over seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 2.00 | -10.71 … 14.71 | 1.00, 3.00 |  |  |",
        "| b | 3.50 | -15.56 … 22.56 | 2.00, 5.00 | +1.50 | -4.85 … +7.85 |",
    ]


def test_the_table_of_tasks() -> None:
    after = {"a": np.full((2, 3), 0.5), "b": np.full((2, 3), 0.75)}
    estimates = compare(after, {arm: np.zeros((2, 3)) for arm in after})
    assert comparison_table(estimates, "avg in %", scale=100).splitlines() == [
        "| arm | avg in % | 95 % | 95 % over seeds | each seed | gain | 95 % | minus a | 95 % | 95 % over seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 50.0 | 50.0 … 50.0 | 50.0 … 50.0 | 50.0, 50.0 | +50.0 | +50.0 … +50.0 |  |  |  |",
        "| b | 75.0 | 75.0 … 75.0 | 75.0 … 75.0 | 75.0, 75.0 | +75.0 | +75.0 … +75.0 "
        "| +25.0 | +25.0 … +25.0 | +25.0 … +25.0 |",
    ]
