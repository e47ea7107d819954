"""The numbers that a run logged, out of its CSV files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """All metrics of a run as {name: [n, 2] of (tokens_seen, value)}, over all its restarts.

    Where a restart went over the same tokens again, the later value counts.
    """
    series: dict[str, dict[float, float]] = {}
    versions = sorted((run / "metrics").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    for version in versions:
        if not (version / "metrics.csv").is_file():
            continue
        with open(version / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not row.get("tokens_seen"):
                    continue
                for name, value in row.items():
                    if value and name not in ("tokens_seen", "step", "epoch"):
                        series.setdefault(name, {})[float(row["tokens_seen"])] = float(value)
    return {name: np.array(sorted(points.items())) for name, points in series.items()}
