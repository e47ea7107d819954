"""The folder of a run, `paths.runs/<run_name>`: the names of its files, and the metrics in it.

config.yaml              the resolved config
manifest.json            plan, versions, commit, callbacks, data; whether the run is finished
tokenizer/               what the model was trained with
checkpoints/             step-00000123, step-00000200-end-of-<phase>, ... (checkpoints/folders.py)
metrics/version_0/       metrics.csv of each start: version_0, version_1, ...
plan.png, curves.png     what was planned, and what happened
samples.txt              text at the end of each phase (pretraining)
accuracy.json            held-out tasks after each phase (SFT, DPD, RL)
rollouts.jsonl           completions with their rewards (RL)
reference.safetensors    the reference's log-probabilities (DPD)
on_policy_filter.json    the prompts that passed the filter, and a histogram for each phase (RL)
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
METRICS = "metrics"  # Lightning's CSVLogger, conf/logger/default.yaml
PLAN_PICTURE = "plan.png"
CURVES_PICTURE = "curves.png"
SAMPLES = "samples.txt"
ACCURACY = "accuracy.json"
ROLLOUTS = "rollouts.jsonl"
REFERENCE = "reference.safetensors"
ON_POLICY_FILTER = "on_policy_filter.json"

BEFORE_TRAINING = "before"  # in accuracy.json beside the names of the phases: measured before the first step


def on_policy_filter_picture(phase: str) -> str:
    """Name the histogram that the on-policy filter draws before a phase."""
    return f"on_policy_filter_{phase}.png"


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """Read all metrics of a run as {name: [n, 2] of (tokens_seen, value)}, over all its starts.

    Where a restart repeated steps, the later value counts.
    """
    series: dict[str, dict[float, float]] = {}
    starts = sorted((run / METRICS).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    for start in starts:
        if not (start / "metrics.csv").is_file():
            continue
        with open(start / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not row.get("tokens_seen"):
                    continue
                for name, value in row.items():
                    if value and name not in ("tokens_seen", "step", "epoch"):
                        series.setdefault(name, {})[float(row["tokens_seen"])] = float(value)
    return {name: np.array(sorted(points.items())) for name, points in series.items()}
