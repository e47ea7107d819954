"""The demo tasks as files: chats with worked answers for SFT, tasks for RL and evaluation (data/demo/problems.py).

    <folder>/chats/train/<family>.jsonl     {"messages": [...]}: what SFT trains on
             chats/val/<family>.jsonl       the same of held-out problems
             tasks/train/<family>.jsonl     `nb_lightning.rewards.tasks.Task`: prompts for preference pairs and RL
             tasks/train/<family>_preference.jsonl    of `PREFERENCE`: the same prompts, for a reward model to judge
             tasks/val/<family>.jsonl       held-out tasks for evaluation
             tasks.json                     what was built

A hash of the problem decides where it goes: no problem is in two of chats/train, tasks/train and val, in any wording.
`python -m data.demo --output FOLDER` writes them; stages that need them build them by themselves.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

from data.demo.problems import FAMILIES, Problem
from data.prepare.source_writer import locked
from nb_lightning.files import read_json, write_json
from nb_lightning.rewards.tasks import Task, write_tasks

VERSION = 4  # of the problems: raise it when their text changes
MANIFEST = "tasks.json"
COUNTS = {"chats/train": 8000, "tasks/train": 3000, "val": 256}  # at most; a small family has fewer problems
PARTS = {"chats/train": range(6, 32), "tasks/train": range(2, 6), "val": range(2)}  # of 32 parts by hash
# Families that a reward model judges in RL (nb_lightning/rewards/preference.py). Held-out tasks stay with the exact
# verifier: the reward model does not judge what it did itself.
PREFERENCE = ("general_words",)
EXHAUSTED = 2000  # draws in a row without a new problem end the search for more


def problem(family: str, seed: int, index: int) -> Problem:
    """The problem at `index`, a pure function of its three arguments."""
    return FAMILIES[family](random.Random(f"{family} {seed} {index}"))


def problems(family: str, counts: dict[str, int] = COUNTS, seed: int = 0) -> dict[str, list[Problem]]:
    """Different problems for each of `PARTS`, `counts` of them or as many as the family has."""
    found: dict[str, list[Problem]] = {split: [] for split in PARTS}
    seen: set[str] = set()
    last_new = 0
    for index in count():
        if all(len(found[split]) == counts[split] for split in PARTS) or index - last_new > EXHAUSTED:
            return found
        new = problem(family, seed, index)
        part = hashlib.sha256(f"{family} {new.key}".encode()).digest()[0] % 32
        split = next(split for split in PARTS if part in PARTS[split])
        if new.key not in seen and len(found[split]) < counts[split]:
            seen.add(new.key)
            found[split].append(new)
            last_new = index
    raise AssertionError


def build_demo_tasks(
    folder: Path, families: tuple[str, ...] = tuple(FAMILIES), counts: dict[str, int] = COUNTS, seed: int = 0
) -> None:
    """Write all files of the demo tasks, unless they are there already; one process at a time.

    Raises:
        ValueError: an unknown family, or a folder that holds something else.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"the demo tasks have no family {family!r}; they have {', '.join(FAMILIES)}")
    made = {"version": VERSION, "seed": seed, "families": list(families), "counts": counts}
    made["preference"] = list(PREFERENCE)
    with locked(folder.parent, wait=True):  # a second process waits here and then finds them built
        if folder.exists():
            if _made(folder) == made:
                return
            if _made(folder) is None and any(folder.iterdir()):
                raise ValueError(f"the demo tasks are to be built in {folder}, but that holds something else")
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in ("chats/train", "chats/val", "tasks/train", "tasks/val"):
            (unfinished / part).mkdir(parents=True)
        for family in families:
            found = problems(family, counts, seed)
            _write_chats(unfinished / "chats/train" / f"{family}.jsonl", found["chats/train"])
            _write_chats(unfinished / "chats/val" / f"{family}.jsonl", found["val"])
            for split, name in (("train", "tasks/train"), ("val", "val")):
                tasks = [_as_task(family, split, number, p) for number, p in enumerate(found[name])]
                write_tasks(unfinished / "tasks" / split / f"{family}.jsonl", tasks)
            if family in PREFERENCE:
                name = f"{family}_preference"
                tasks = [_preference_task(name, number, p) for number, p in enumerate(found["tasks/train"])]
                write_tasks(unfinished / "tasks/train" / f"{name}.jsonl", tasks)
        write_json(unfinished / MANIFEST, made)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def _made(folder: Path) -> dict | None:
    try:
        return read_json(folder / MANIFEST)
    except ValueError:
        return None


def _write_chats(path: Path, found: list[Problem]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": p.messages}, ensure_ascii=False) + "\n" for p in found)


def _as_task(family: str, split: str, number: int, p: Problem) -> Task:
    asked = next(i for i, message in enumerate(p.messages) if message["role"] == "assistant")
    return Task(f"{family}/{split}/{number}", family, p.messages[:asked], p.verifier, p.reference)


def _preference_task(name: str, number: int, p: Problem) -> Task:
    """Without a reference: a completion is worth how often it is preferred to the others."""
    return replace(_as_task(name, "train", number, p), verifier="preference", reference=None)
