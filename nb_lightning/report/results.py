"""How often each stage's model is right on held-out tasks, and what each stage added, with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nb_lightning.evaluate.statistics import estimate
from nb_lightning.files import read_json
from nb_lightning.report.runs import RUNS, Run

ALL = "all"
BEFORE = "before"  # callbacks/task_accuracy.py
CHAIN = ("sft", "dpd", "rl")  # each begins where the one before ended

Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """Of one family of tasks.

    Attributes:
        mean: avg@k, from 0 to 1.
        each: avg@k of each task, where it was kept; always of the same tasks in the same order for one `protocol`.
    """

    tasks: int
    mean: float
    interval: Interval | None
    greedy: float | None
    each: np.ndarray | None


@dataclass(frozen=True)
class Measurement:
    """All families at one point of the recipe.

    Attributes:
        protocol: tasks and sampling; only measurements of one protocol can be compared task by task.
    """

    run: str
    when: str
    k: int
    protocol: Any
    scores: Mapping[str, Score]

    @property
    def title(self) -> str:
        when = self.when.replace("_", " ")
        if not when:
            return RUNS[self.run]
        return f"before {RUNS[self.run]}" if self.when == BEFORE else f"{RUNS[self.run]}: {when}"


@dataclass(frozen=True)
class Gain:
    """`after` minus `before`, of each family."""

    title: str
    of: Mapping[str, tuple[float, Interval | None]]
    paired: bool


@dataclass
class Results:
    """Families in the order of their first appearance, `ALL` last; measurements in the order of the recipe."""

    measurements: list[Measurement]
    gains: list[Gain]
    families: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys(name for m in self.measurements for name in m.scores if name != ALL)
        self.families = [*names, ALL] if names else []

    def score(self, m: Measurement, family: str) -> Score | None:
        """None where it was not measured; `ALL` only where it is over all families that anything was measured on."""
        if family == ALL and len(m.scores) < len(self.families):
            return None
        return m.scores.get(family)

    def difference(self, g: Gain, family: str) -> tuple[float, Interval | None] | None:
        """As `score`: `ALL` only where it is over all families."""
        if family == ALL and len(g.of) < len(self.families):
            return None
        return g.of.get(family)

    @property
    def one_protocol(self) -> bool:
        return all(m.protocol == self.measurements[0].protocol for m in self.measurements)

    def ends(self) -> list[tuple[str, float]]:
        """The last phase of each stage that was measured on all tasks, and avg@k of them."""
        last = {m.run: m for m in self.measurements if m.run in CHAIN and m.when != BEFORE}
        found = [(m.title, self.score(m, ALL)) for m in last.values()]
        return [(stage, score.mean) for stage, score in found if score]


def while_training(runs: Sequence[Run]) -> Results:
    """What `TaskAccuracy` measured in each run, before its first step and after each of its phases."""
    by_name = {run.name: run for run in runs}
    shown, gains, last = [], [], None
    for name in (*CHAIN, "teacher"):
        run = by_name[name]
        found = [_of_phase(run, when, entry) for when, entry in run.accuracy.items()]
        gains += [gain(before, after, after.title) for before, after in pairwise(found) if name in CHAIN]
        if last and found and name in CHAIN:
            found = found[1:]  # before this stage is after the one before it
        if name == "teacher":
            found = found[-1:]
        shown += found
        last = found[-1] if found else last
    ends = [m for m in shown if m.run in ("dpd", "rl")]
    starts = [m for m in shown if m.run == "sft"]
    if ends and starts and ends[-1].run == "rl" and starts[-1].protocol == ends[-1].protocol:
        gains.append(gain(starts[-1], ends[-1], f"{starts[-1].title} to {ends[-1].title}, all together"))
    return Results(shown, gains)


def _of_phase(run: Run, when: str, entry: Mapping[str, Any]) -> Measurement:
    data = run.config.data
    protocol = (list(data.tasks), data.task_limit, data.task_tokens, entry["k"])
    scores = {
        name: Score(s["tasks"], s[f"avg@{entry['k']}"], s["interval"], s["greedy"], _array(s.get("each")))
        for name, s in entry["sources"].items()
    }
    return Measurement(run.name, when, entry["k"], protocol, scores)


def at_the_end(root: Path) -> Results:
    """What `nb_lightning.evaluate` measured, in the files that the recipe keeps: recipe/evaluate_<run>.json(l)."""
    found = []
    for name in CHAIN:
        content = read_json(root / "recipe" / f"evaluate_{name}.json", {})
        tasks = content.get("tasks", {})
        if "sampled" in tasks:
            each = _each(root / "recipe" / f"evaluate_{name}.jsonl")
            greedy = {source: s["mean"] for source, s in tasks.get("greedy", {}).items()}
            scores = {
                source: Score(s["tasks"], s["mean"], s["interval"], greedy.get(source), each.get(source))
                for source, s in tasks["sampled"].items()
            }
            settings = content["settings"]
            protocol = {key: settings[key] for key in sorted(settings) if key not in ("model", "out", "samples")}
            found.append(Measurement(name, "", settings["k"], protocol, scores))
    gains = [gain(before, after, f"{before.title} to {after.title}") for before, after in pairwise(found)]
    if len(found) > 2:
        gains.append(gain(found[0], found[-1], f"{found[0].title} to {found[-1].title}, all together"))
    return Results(found, gains)


def _each(samples: Path) -> dict[str, np.ndarray]:
    """avg@k of each task by source, in the order of the file."""
    rewards: dict[str, dict[tuple[str, str], list[float]]] = {}
    for line in read_samples(samples):
        if line["way"] == "sampled":
            for source in (line["source"], ALL):
                rewards.setdefault(source, {}).setdefault((line["source"], line["id"]), []).append(line["reward"])
    return {source: np.array([np.mean(r) for r in tasks.values()]) for source, tasks in rewards.items()}


def read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gain(before: Measurement, after: Measurement, title: str) -> Gain:
    """Task by task where both kept each task's number; else from the two intervals, as if the tasks were others."""
    of: dict[str, tuple[float, Interval | None]] = {}
    paired = before.protocol == after.protocol
    for name in after.scores:
        if name not in before.scores:
            continue
        if name == ALL and before.scores.keys() != after.scores.keys():
            continue
        a, b = before.scores[name], after.scores[name]
        if paired and a.each is not None and b.each is not None and len(a.each) == len(b.each):
            found = estimate((b.each - a.each)[None])
            of[name] = (found.mean, found.over_tasks_and_seeds)
        else:
            paired = False
            of[name] = (b.mean - a.mean, _unpaired(a, b))
    return Gain(title, of, paired)


def _unpaired(a: Score, b: Score) -> Interval | None:
    if a.interval is None or b.interval is None:
        return None
    half = np.hypot(a.interval[1] - a.interval[0], b.interval[1] - b.interval[0]) / 2
    return b.mean - a.mean - float(half), b.mean - a.mean + float(half)


def _array(values: Sequence[float] | None) -> np.ndarray | None:
    return None if values is None else np.array(values)
