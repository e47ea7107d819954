"""Means with intervals, over the tasks of one model and over the seeds and tasks of several runs.

An `Estimate` has two 95 % intervals, because they answer different questions:
    over tasks and seeds: percentiles of a bootstrap that resamples seeds and tasks. With three seeds it shows mostly
        how much of the result is due to the choice of the held-out tasks.
    over seeds: Student's t of the seeds' means. It assumes nothing about the tasks, and is wide with few seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 2000
# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom; any handbook.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Interval = tuple[float, float]


def pass_at(j: int, k: int, correct: int) -> float:
    """Estimate pass@j without bias from k completions of which `correct` pass: 1 - C(k - correct, j) / C(k, j)."""
    return 1 - comb(k - correct, j) / comb(k, j)


def bootstrap(values: np.ndarray, weights: np.ndarray | None = None) -> Interval | None:
    """Return the 95 % percentile interval of sum(values) / sum(weights), from resampled (value, weight) pairs.

    The random numbers are always the same, so equal input gives equal intervals.

    Args:
        values: [n].
        weights: [n]; 1 each if not given.

    Returns:
        None for a single value, which says nothing about the spread.
    """
    if len(values) < 2:
        return None
    weights = np.ones(len(values)) if weights is None else weights
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(values), size=len(values))
        ratios.append(values[chosen].sum() / weights[chosen].sum())
    return _percentiles(ratios)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and tasks. An interval over a single task or seed is None."""

    mean: float
    seeds: list[float]  # the mean of each seed
    over_tasks_and_seeds: Interval | None
    over_seeds: Interval | None


def estimate(values: np.ndarray) -> Estimate:
    """Estimate the mean of values [seeds, tasks] with its intervals. Equal input gives equal intervals."""
    seed_means = values.mean(axis=1)
    over_tasks_and_seeds = None
    if values.shape[1] > 1:
        rng = np.random.default_rng(0)
        # How often each seed and each task is drawn in each resample, as shares: [resamples, seeds or tasks].
        seed_shares, task_shares = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in values.shape)
        over_tasks_and_seeds = _percentiles(np.einsum("rs,st,rt->r", seed_shares, values, task_shares, optimize=True))
    return Estimate(float(seed_means.mean()), seed_means.tolist(), over_tasks_and_seeds, student_interval(seed_means))


def student_interval(values: np.ndarray) -> Interval | None:
    """Return mean +- t s / sqrt(n) of n values; None for one value.

    More than 16 values use the t of 16, which makes the interval slightly too wide.
    """
    if len(values) < 2:
        return None
    half_width = T_95[min(len(values) - 1, len(T_95)) - 1] * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half_width), float(values.mean() + half_width)


def _percentiles(resampled: np.ndarray | list[float]) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)
