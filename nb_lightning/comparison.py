"""Arms of an ablation beside each other: means, intervals, and each arm's difference from the first.

A measurement is an array [seeds, tasks], or [seeds, 1] where a run gives one number. Seeds and tasks are the same in
every arm, so differences are taken pairwise: what a hard task or a lucky order of the data does to all arms cancels.

Two intervals, both of 95 %, because they answer different questions:
    over tasks and seeds: percentiles of the bootstrap that draws seeds and tasks anew, with repeats. With three seeds
        it shows mostly how far the held-out tasks were luck.
    over seeds: Student's t of the means of the seeds. It asks nothing of the tasks, and is wide with few seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nb_lightning.run_metrics import read_metrics

RESAMPLES = 2000
# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom; any handbook.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Interval = tuple[float, float]


def measured(run: Path, kind: str, source: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What the finished run in that folder measured of a source at its end, and before its first step.

    Args:
        kind: "accuracy": avg@k of each task, [tasks] and [tasks] (`callbacks.task_accuracy`); or "perplexity" of
            held-out rows, [1] and None.

    Raises:
        ValueError: it measured no such source.
    """
    if kind == "accuracy":
        phases = json.loads((run / "accuracy.json").read_text(encoding="utf-8"))
        before, after = (phases[when]["sources"] for when in ("before", list(phases)[-1]))
        if source not in after:
            raise ValueError(f"measure.sources names {source!r}; {run} measured {', '.join(after)}")
        return np.array(after[source]["each"]), np.array(before[source]["each"])
    metrics, key = read_metrics(run), f"val/perplexity/{source}"
    if key not in metrics:
        raise ValueError(f"measure.sources names {source!r}, but {run} logged no {key}")
    return metrics[key][-1:, 1], None


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


def compare(arms: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """{arm: {"after": ..., "gain": ..., "difference": ...}}, each as the fields of `Estimate`.

    Args:
        arms: values at the end of each arm's runs, [seeds, tasks]; the first arm is what the others are held against.
        before: the same before the first step; without it there is no "gain".
    """
    first = next(iter(arms.values()))
    found: dict[str, Any] = {}
    for name, values in arms.items():
        found[name] = {"after": asdict(estimate(values))}
        if before:
            found[name]["gain"] = asdict(estimate(values - before[name]))
        if values is not first:
            found[name]["difference"] = asdict(estimate(values - first))
    return found


def table(compared: Mapping[str, Any], what: str, scale: float = 1, digits: int = 1) -> str:
    """Markdown: arms down. `what` heads the means, which are multiplied with `scale`."""
    names = list(compared)
    gains = "gain" in compared[names[0]]
    tasks = compared[names[0]]["after"]["over_tasks_and_seeds"] is not None
    head = ["arm", what, *(["95 %"] if tasks else []), "95 % over seeds", "each seed"]
    head += ["gain", "95 %"] if gains else []
    head += [f"minus {names[0]}", *(["95 %"] if tasks else []), "95 % over seeds"] if names[1:] else []

    def number(x: float, sign: str = "") -> str:
        return f"{scale * x:{sign}.{digits}f}"

    def interval(found: Interval | None, sign: str = "") -> str:
        return "–" if found is None else f"{number(found[0], sign)} … {number(found[1], sign)}"

    rows = []
    for name in names:
        after, gain, difference = (compared[name].get(key) for key in ("after", "gain", "difference"))
        row = [name, number(after["mean"]), *([interval(after["over_tasks_and_seeds"])] if tasks else [])]
        row += [interval(after["over_seeds"]), ", ".join(map(number, after["seeds"]))]
        if gain:
            row += [number(gain["mean"], "+"), interval(gain["over_tasks_and_seeds"], "+")]
        if difference:
            row += [number(difference["mean"], "+")]
            row += [interval(difference["over_tasks_and_seeds"], "+")] if tasks else []
            row += [interval(difference["over_seeds"], "+")]
        rows.append(row + [""] * (len(head) - len(row)))
    return markdown([head, ["---", *["---:"] * (len(head) - 1)], *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
