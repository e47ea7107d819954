"""Held-out tasks are measured before the first step and after every phase, kept, logged and shown."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nb_lightning.rewards.tasks import Task, write_tasks
from tests.sft_harness import make_sources, run_sft

pytestmark = pytest.mark.runs


def test_accuracy_is_measured_written_logged_and_shown(tmp_path: Path) -> None:
    chats = make_sources(tmp_path)
    asked = [{"role": "user", "content": "abc"}]
    tasks = [Task(f"{source}/{i}", source, asked, "exact", "never") for source in ("one", "two") for i in range(3)]
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    words = (f"data.tasks=[{tmp_path}/tasks.jsonl]", "data.task_limit=5", "data.task_tokens=8")
    done = run_sft(chats, tmp_path, *words, "trainer.progress_bar=true")
    run = tmp_path / "runs/sft"
    measured = json.loads((run / "accuracy.json").read_text())
    assert {when: entry["tokens_seen"] for when, entry in measured.items()} == {
        "before": 0, "cold_start": 6144, "overall": 12288,
    }  # fmt: skip
    for entry in measured.values():
        assert {name: found["tasks"] for name, found in entry["sources"].items()} == {"one": 3, "two": 2, "all": 5}
        assert all(found["greedy"] == found["avg@8"] == 0 for found in entry["sources"].values())
        assert {name: found["each"] for name, found in entry["sources"].items()} == {
            "one": [0, 0, 0], "two": [0, 0], "all": [0, 0, 0, 0, 0],
        }  # fmt: skip
    with open(run / "metrics/version_0/metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["val/avg@8/one"]]
    assert [float(row["tokens_seen"]) for row in logged] == [0, 6144, 12288]
    shown = done.stdout.partition("held-out tasks right, in %")[2].splitlines()
    assert [line.split()[0] for line in shown[2:5]] == ["one", "two", "all"]
