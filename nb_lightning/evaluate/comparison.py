"""The arms of an ablation side by side: means, gains over the start, and differences from the first arm.

A measurement is an array [seeds, tasks], or [seeds, 1] where a run gives one number. Seeds and tasks are the same in
every arm, so differences are taken pairwise: the effect of a hard task, or of a lucky order of the data, is the same in
all arms and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nb_lightning.evaluate.statistics import Interval, estimate


def compare(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Estimate {arm: {"after": ..., "gain": ..., "difference": ...}}, each with the fields of `Estimate`.

    Args:
        after: [seeds, tasks] of each arm at the end of its runs. "difference" is from the first arm, which has none.
        before: the same before the first step; without it there is no "gain".
    """
    first = next(iter(after.values()))
    estimates: dict[str, Any] = {}
    for arm, values in after.items():
        estimates[arm] = {"after": asdict(estimate(values))}
        if before:
            estimates[arm]["gain"] = asdict(estimate(values - before[arm]))
        if values is not first:
            estimates[arm]["difference"] = asdict(estimate(values - first))
    return estimates


def comparison_table(estimates: Mapping[str, Any], quantity: str, scale: float = 1, digits: int = 1) -> str:
    """Write what `compare` returns as a Markdown table, one row an arm.

    Args:
        quantity: heads the column of means.
        scale: all numbers are multiplied by it.
    """
    arms = list(estimates)
    has_gains = "gain" in estimates[arms[0]]
    has_tasks = estimates[arms[0]]["after"]["over_tasks_and_seeds"] is not None
    head = ["arm", quantity, *(["95 %"] if has_tasks else []), "95 % over seeds", "each seed"]
    head += ["gain", "95 %"] if has_gains else []
    head += [f"minus {arms[0]}", *(["95 %"] if has_tasks else []), "95 % over seeds"] if arms[1:] else []

    def number(x: float, sign: str = "") -> str:
        return f"{scale * x:{sign}.{digits}f}"

    def interval(bounds: Interval | None, sign: str = "") -> str:
        return "–" if bounds is None else f"{number(bounds[0], sign)} … {number(bounds[1], sign)}"

    rows = []
    for arm in arms:
        after, gain, difference = (estimates[arm].get(key) for key in ("after", "gain", "difference"))
        row = [arm, number(after["mean"]), *([interval(after["over_tasks_and_seeds"])] if has_tasks else [])]
        row += [interval(after["over_seeds"]), ", ".join(map(number, after["seeds"]))]
        if gain:
            row += [number(gain["mean"], "+"), interval(gain["over_tasks_and_seeds"], "+")]
        if difference:
            row += [number(difference["mean"], "+")]
            row += [interval(difference["over_tasks_and_seeds"], "+")] if has_tasks else []
            row += [interval(difference["over_seeds"], "+")]
        rows.append(row + [""] * (len(head) - len(row)))
    return _markdown([head, ["---", *["---:"] * (len(head) - 1)], *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
