"""How often each stage's model is right on held-out tasks, and what each stage added, with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nb_lightning.evaluate.statistics import Interval, estimate
from nb_lightning.files import read_json
from nb_lightning.report.runs import RUNS, Run
from nb_lightning.run_folder import BEFORE_TRAINING

ALL = "all"  # all families together
CHAIN = ("sft", "dpd", "rl")  # each begins with the weights at the end of the one before

Difference = tuple[float, Interval | None]


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right on one family of tasks.

    Attributes:
        mean: avg@k, from 0 to 1.
        by_task: [tasks] avg@k of each task, where it was recorded. Under one protocol the tasks are the same and in the
            same order.
    """

    tasks: int
    mean: float
    interval: Interval | None
    greedy: float | None
    by_task: np.ndarray | None


@dataclass(frozen=True)
class Measurement:
    """All families at one point of the recipe.

    Attributes:
        when: the phase after which it was measured, `BEFORE_TRAINING`, or "" for the finished run.
        protocol: tasks and sampling. Only measurements with one protocol can be compared task by task.
        accuracies: by family.
    """

    run: str
    when: str
    k: int
    protocol: Any
    accuracies: Mapping[str, Accuracy]

    @property
    def title(self) -> str:
        if not self.when:
            return RUNS[self.run]
        if self.when == BEFORE_TRAINING:
            return f"before {RUNS[self.run]}"
        return f"{RUNS[self.run]}: {self.when.replace('_', ' ')}"


@dataclass(frozen=True)
class Gain:
    """The difference of two measurements, by family.

    Attributes:
        paired: the intervals are of differences task by task.
    """

    title: str
    differences: Mapping[str, Difference]
    paired: bool


@dataclass
class Results:
    """Measurements in the order of the recipe, and the gains between them.

    Attributes:
        families: in the order of their first appearance, `ALL` last.
    """

    measurements: list[Measurement]
    gains: list[Gain]
    families: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(name for m in self.measurements for name in m.accuracies if name != ALL)
        self.families = [*names, ALL] if names else []

    def accuracy(self, measurement: Measurement, family: str) -> Accuracy | None:
        """Return None where a family was not measured; for `ALL`, where any of the families was not."""
        if family == ALL and len(measurement.accuracies) < len(self.families):
            return None
        return measurement.accuracies.get(family)

    def difference(self, gain: Gain, family: str) -> Difference | None:
        """Return None where `accuracy` does."""
        if family == ALL and len(gain.differences) < len(self.families):
            return None
        return gain.differences.get(family)

    @property
    def one_protocol(self) -> bool:
        return all(m.protocol == self.measurements[0].protocol for m in self.measurements)

    def final_means(self) -> list[tuple[str, float]]:
        """Return the last phase of each stage that was measured on all families, and its avg@k."""
        last = {m.run: m for m in self.measurements if m.run in CHAIN and m.when != BEFORE_TRAINING}
        accuracies = [(m.title, self.accuracy(m, ALL)) for m in last.values()]
        return [(title, accuracy.mean) for title, accuracy in accuracies if accuracy]


# During training ------------------------------------------------------------------------------------------------------


def results_of_training(runs: Sequence[Run]) -> Results:
    """Collect what `TaskAccuracy` measured in each run, before its first step and after each of its phases."""
    by_name = {run.name: run for run in runs}
    measurements: list[Measurement] = []
    gains: list[Gain] = []
    for name in CHAIN:
        in_run = _measurements_of(by_name[name])
        gains += [gain(before, after, after.title) for before, after in pairwise(in_run)]
        # The measurement before a stage repeats the one at the end of the stage before it.
        measurements += in_run[1:] if measurements else in_run
    of_sft, of_rl = ([m for m in measurements if m.run == name] for name in ("sft", "rl"))
    if of_sft and of_rl and of_sft[-1].protocol == of_rl[-1].protocol:
        start, end = of_sft[-1], of_rl[-1]
        gains.append(gain(start, end, f"{start.title} to {end.title}, all together"))
    return Results([*measurements, *_measurements_of(by_name["teacher"])[-1:]], gains)


def _measurements_of(run: Run) -> list[Measurement]:
    return [_measurement(run, when, entry) for when, entry in run.accuracy.items()]


def _measurement(run: Run, when: str, entry: Mapping[str, Any]) -> Measurement:
    data, k = run.config.data, entry["k"]
    accuracies = {}
    for family, numbers in entry["sources"].items():
        by_task = numbers.get("each")
        accuracies[family] = Accuracy(
            numbers["tasks"],
            numbers[f"avg@{k}"],
            numbers["interval"],
            numbers["greedy"],
            None if by_task is None else np.array(by_task),
        )
    return Measurement(run.name, when, k, (list(data.tasks), data.task_limit, data.task_tokens, k), accuracies)


# After training -------------------------------------------------------------------------------------------------------


def results_of_evaluation(root: Path) -> Results:
    """Collect what `nb_lightning.evaluate` measured, from the recipe's evaluate_<run>.json and .jsonl."""
    measurements = []
    for name in CHAIN:
        content = read_json(root / "recipe" / f"evaluate_{name}.json", {})
        tasks, settings = content.get("tasks", {}), content.get("settings", {})
        if "sampled" not in tasks:
            continue
        by_task = _means_by_task(root / "recipe" / f"evaluate_{name}.jsonl")
        greedy = {family: numbers["mean"] for family, numbers in tasks.get("greedy", {}).items()}
        accuracies = {
            family: Accuracy(
                numbers["tasks"], numbers["mean"], numbers["interval"], greedy.get(family), by_task.get(family)
            )
            for family, numbers in tasks["sampled"].items()
        }
        protocol = {key: settings[key] for key in sorted(settings) if key not in ("model", "out", "samples")}
        measurements.append(Measurement(name, "", settings["k"], protocol, accuracies))
    gains = [gain(before, after, f"{before.title} to {after.title}") for before, after in pairwise(measurements)]
    if len(measurements) > 2:
        start, end = measurements[0], measurements[-1]
        gains.append(gain(start, end, f"{start.title} to {end.title}, all together"))
    return Results(measurements, gains)


def _means_by_task(samples: Path) -> dict[str, np.ndarray]:
    """Return {family: [tasks] avg@k}, tasks in the order of the file."""
    rewards: dict[str, dict[tuple[str, str], list[float]]] = {}
    for sample in read_samples(samples):
        if sample["way"] == "sampled":
            for family in (sample["source"], ALL):
                task = (sample["source"], sample["id"])
                rewards.setdefault(family, {}).setdefault(task, []).append(sample["reward"])
    return {family: np.array([np.mean(r) for r in by_task.values()]) for family, by_task in rewards.items()}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the samples of an evaluation; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Gains ----------------------------------------------------------------------------------------------------------------


def gain(before: Measurement, after: Measurement, title: str) -> Gain:
    """Subtract two measurements: task by task where both recorded each task, else as if they were independent."""
    differences: dict[str, Difference] = {}
    paired = before.protocol == after.protocol
    for family in after.accuracies:
        if family not in before.accuracies:
            continue
        if family == ALL and before.accuracies.keys() != after.accuracies.keys():
            continue
        a, b = before.accuracies[family], after.accuracies[family]
        if paired and a.by_task is not None and b.by_task is not None and len(a.by_task) == len(b.by_task):
            difference = estimate((b.by_task - a.by_task)[None])
            differences[family] = (difference.mean, difference.over_tasks_and_seeds)
        else:
            paired = False
            differences[family] = (b.mean - a.mean, _independent_interval(a, b))
    return Gain(title, differences, paired)


def _independent_interval(a: Accuracy, b: Accuracy) -> Interval | None:
    if a.interval is None or b.interval is None:
        return None
    half = np.hypot(a.interval[1] - a.interval[0], b.interval[1] - b.interval[0]) / 2
    return b.mean - a.mean - float(half), b.mean - a.mean + float(half)
