"""Write the demo tasks: chats with worked answers for SFT, tasks for RL and evaluation (data/demo/problems.py).

    <folder>/chats/train/<family>.jsonl     {"messages": [...]}: conversations for SFT
             chats/val/<family>.jsonl       conversations of held-out problems
             tasks/train/<family>.jsonl     `nb_lightning.rewards.tasks.Task`: prompts for preference pairs and RL
             tasks/train/<family>_preference.jsonl    of `PREFERENCE`: the same prompts, for a reward model to judge
             tasks/val/<family>.jsonl       held-out tasks for evaluation
             tasks.json                     version, seed, families and counts

A hash of the problem decides its split: no problem is in two of chats/train, tasks/train and val, in any wording.
`python -m data.demo --output FOLDER` writes the files; stages that need them build them.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from data.demo.problems import FAMILIES, Problem
from data.prepare.source_writer import locked
from nb_lightning.files import read_json, write_json
from nb_lightning.rewards.tasks import Task, write_tasks

VERSION = 4  # of the problems; to be raised when their text changes
MANIFEST = "tasks.json"
COUNTS = {"chats/train": 8000, "tasks/train": 3000, "val": 256}  # problems at most; a small family has fewer
PARTS = {"chats/train": range(6, 32), "tasks/train": range(2, 6), "val": range(2)}  # of 32 parts by hash
# Families that a reward model judges in RL (nb_lightning/rewards/preference.py). The exact verifier judges the held-out
# tasks, so that the reward model does not measure its own success.
PREFERENCE = ("general_words",)
EXHAUSTED = 2000  # consecutive draws without a new problem after which a family counts as exhausted


def generate_problem(family: str, seed: int, index: int) -> Problem:
    """Generate the problem at `index`, a pure function of its three arguments."""
    return FAMILIES[family](random.Random(f"{family} {seed} {index}"))


def generate_problems(family: str, counts: dict[str, int] = COUNTS, seed: int = 0) -> dict[str, list[Problem]]:
    """Generate different problems for each split of `PARTS`: `counts` of them, or as many as the family has."""
    problems: dict[str, list[Problem]] = {split: [] for split in PARTS}
    seen: set[str] = set()
    last_new = 0
    for index in count():
        if all(len(problems[split]) == counts[split] for split in PARTS) or index - last_new > EXHAUSTED:
            return problems
        new = generate_problem(family, seed, index)
        part = hashlib.sha256(f"{family} {new.key}".encode()).digest()[0] % 32
        split = next(split for split in PARTS if part in PARTS[split])
        if new.key not in seen and len(problems[split]) < counts[split]:
            seen.add(new.key)
            problems[split].append(new)
            last_new = index
    raise AssertionError


def build_demo_tasks(
    folder: Path, families: tuple[str, ...] = tuple(FAMILIES), counts: dict[str, int] = COUNTS, seed: int = 0
) -> None:
    """Write all files of the demo tasks, unless they are there already. Only one process builds at a time.

    Raises:
        ValueError: a family is unknown, or the folder holds something else.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"the demo tasks have no family {family!r}; they have {', '.join(FAMILIES)}")
    manifest = {"version": VERSION, "seed": seed, "families": list(families), "counts": counts}
    manifest["preference"] = list(PREFERENCE)
    with locked(folder.parent, wait=True):  # a second process waits here, and then has nothing to build
        if folder.exists():
            built = read_if_json(folder / MANIFEST)
            if built == manifest:
                return
            if built is None and any(folder.iterdir()):
                raise ValueError(f"the demo tasks are to be built in {folder}, but that holds something else")
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in ("chats/train", "chats/val", "tasks/train", "tasks/val"):
            (unfinished / part).mkdir(parents=True)
        for family in families:
            _write_family(unfinished, family, generate_problems(family, counts, seed))
        write_json(unfinished / MANIFEST, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def read_if_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged."""
    try:
        return read_json(path)
    except ValueError:
        return None


def _write_family(folder: Path, family: str, problems: dict[str, list[Problem]]) -> None:
    _write_chats(folder / "chats/train" / f"{family}.jsonl", problems["chats/train"])
    _write_chats(folder / "chats/val" / f"{family}.jsonl", problems["val"])
    for split, name in (("train", "tasks/train"), ("val", "val")):
        tasks = [_as_task(family, split, number, p) for number, p in enumerate(problems[name])]
        write_tasks(folder / "tasks" / split / f"{family}.jsonl", tasks)
    if family in PREFERENCE:
        name = f"{family}_preference"
        tasks = [_as_preference_task(name, number, p) for number, p in enumerate(problems["tasks/train"])]
        write_tasks(folder / "tasks/train" / f"{name}.jsonl", tasks)


def _write_chats(path: Path, problems: list[Problem]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": p.messages}, ensure_ascii=False) + "\n" for p in problems)


def _as_task(family: str, split: str, number: int, p: Problem) -> Task:
    first_answer = next(i for i, message in enumerate(p.messages) if message["role"] == "assistant")
    return Task(f"{family}/{split}/{number}", family, p.messages[:first_answer], p.verifier, p.reference)


def _as_preference_task(name: str, number: int, p: Problem) -> Task:
    """Build a task without reference: a completion's reward is how often it is preferred to others of its group."""
    return replace(_as_task(name, "train", number, p), verifier="preference", reference=None)
