"""Arms of an ablation beside each other: means, intervals, and each arm's difference from the first.

A measurement is an array [seeds, tasks], or [seeds, 1] where a run gives one number. Seeds and tasks are the same in
every arm, so differences are taken pairwise: what a hard task or a lucky order of the data does to all arms cancels.

Two intervals, both of 95 %, because they answer different questions:
    over tasks and seeds: percentiles of the bootstrap that draws seeds and tasks anew, with repeats. With three seeds
        it shows mostly how far the held-out tasks were luck.
    over seeds: Student's t of the means of the seeds. It asks nothing of the tasks, and is wide with few seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 2000
# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom; any handbook.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and tasks; an interval is None where there is only one of what it is over."""

    mean: float
    seeds: list[float]  # the mean of each
    over_tasks_and_seeds: Interval | None
    over_seeds: Interval | None


def estimate(values: np.ndarray) -> Estimate:
    """Of values [seeds, tasks]. Equal input gives equal intervals."""
    seeds = values.mean(axis=1)
    bootstrapped = None
    if values.shape[1] > 1:
        rng = np.random.default_rng(0)
        drawn = [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in values.shape]
        means = np.einsum("rs,st,rt->r", drawn[0], values, drawn[1], optimize=True)
        bootstrapped = tuple(float(x) for x in np.percentile(means, (2.5, 97.5)))
    return Estimate(float(seeds.mean()), seeds.tolist(), bootstrapped, student(seeds))


def student(values: np.ndarray) -> Interval | None:
    """mean +- t s / sqrt(n) of n values. More than 16 are held against the t of 16: a little too wide."""
    if len(values) < 2:
        return None
    half = T_95[min(len(values) - 1, len(T_95)) - 1] * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


RESAMPLES = 2000


def pass_at(j: int, k: int, correct: int) -> float:
    """The unbiased estimate, from k completions of which `correct` are, that one of j is: 1 - C(k - c, j) / C(k, j)."""
    return 1 - comb(k - correct, j) / comb(k, j)


def bootstrap(
    values: np.ndarray, weights: np.ndarray | None = None, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(values) / sum(weights), resampling pairs; weights are 1 if not given.

    Always from the same random numbers: equal input gives equal intervals. One value says nothing of its spread: None.
    """
    if len(values) < 2:
        return None
    weights = np.ones(len(values)) if weights is None else weights
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(resamples):
        chosen = rng.integers(len(values), size=len(values))
        ratios.append(values[chosen].sum() / weights[chosen].sum())
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)
