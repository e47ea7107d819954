"""Write the demo tasks as files: chats to train on, tasks for preference pairs, RL and evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.demo.tasks import build_demo_tasks
from nb_lightning.errors import one_line_errors


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.demo", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    with one_line_errors():
        build_demo_tasks(a.output, seed=a.seed)
    for split in ("chats/train", "chats/val", "tasks/train", "tasks/val"):
        counts = {file.stem: file.read_text().count("\n") for file in sorted((a.output / split).iterdir())}
        print(f"{a.output / split}: " + ", ".join(f"{family} {n:,}" for family, n in counts.items()))


if __name__ == "__main__":
    main()
