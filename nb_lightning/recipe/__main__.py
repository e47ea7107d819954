"""Run the whole recipe: `python -m nb_lightning.recipe [model=demo] [key=value ...] [STEP:key=value ...]`.

The steps of conf/recipe/<model>.yaml run one after the other, each by the command that a user would type. After a stop
or a kill the same command goes on: it skips finished steps and resumes the broken one. docs/getting_started.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nb_lightning.checkout import default_root
from nb_lightning.errors import RunStopped, one_line_errors
from nb_lightning.recipe.outcome import last_line
from nb_lightning.recipe.plans import check_configs, show_plans
from nb_lightning.recipe.runner import Progress, Runner, clock, how_to_go_on
from nb_lightning.recipe.steps import Step, read_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_intermixed_args(arguments)
    # OSError: no such launcher, a full or read-only disk.
    with one_line_errors(RunStopped, OSError, interrupted=how_to_go_on(a.again)):
        run(a)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.recipe", description="Run all steps of a recipe.")
    p.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="model=NAME: which recipe (default: demo); "
                   "key=value: for every train.py; STEP:argument: for one step's command (sft:seed=1)")  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="print every command, and each stage's plan; run nothing")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--only", metavar="STEP", help="run this step alone")
    g.add_argument("--from", dest="start", metavar="STEP", help="leave out the steps before this one")
    p.add_argument("--again", metavar="STEP", help="start this step afresh, although its command is the same")
    p.add_argument("--launch", default="python", metavar="COMMAND", help="the command that starts train.py, as "
                   "'torchrun --nproc-per-node=8' (default: %(default)s)")  # fmt: skip
    return p


def run(a: argparse.Namespace) -> None:
    """Run the recipe, or print its dry run.

    Raises:
        ValueError: a mistake in the arguments or in a stage's config.
        RunStopped: a step failed.
    """
    model, step_arguments = "demo", []
    for argument in a.arguments:
        key, _, value = argument.partition("=")
        if key == "model":
            model = value
        elif key == "paths.root":
            os.environ["NB_ROOT"] = value
        else:
            step_arguments.append(argument)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py: two threads beside a busy program
    steps = read_recipe(model, step_arguments, shlex.split(a.launch))
    chosen = _choose(steps, a)
    if a.dry_run:
        show_plans(steps, chosen)
        return
    folder = Path(default_root()) / "recipe"
    print(f"recipe {model}: {len(steps)} steps; state and logs are in {folder}", flush=True)
    check_configs(chosen)
    status = Status()
    Runner(folder, status.tell, status.show).run(steps, chosen, a.again)
    print(f"all done. {chosen[-1].name}: {last_line(folder / f'{chosen[-1].name}.log')}")


def _choose(steps: list[Step], a: argparse.Namespace) -> list[Step]:
    names = [step.name for step in steps]
    for name in (a.only, a.start, a.again):
        if name and name not in names:
            raise ValueError(f"there is no step {name!r}; the steps are {', '.join(names)}")
    if a.only:
        return [steps[names.index(a.only)]]
    return steps[names.index(a.start) if a.start else 0 :]


class Status:
    """A status line at the foot of a terminal; elsewhere (in a file, say) one line a minute."""

    SECONDS_BETWEEN_LINES = 60.0

    def __init__(self) -> None:
        self._on_terminal, self._next_line = sys.stdout.isatty(), self.SECONDS_BETWEEN_LINES

    def tell(self, line: str) -> None:
        print(f"\r\x1b[2K{line}" if self._on_terminal else line, flush=True)
        self._next_line = self.SECONDS_BETWEEN_LINES

    def show(self, progress: Progress) -> None:
        recipe_time, step_time = clock(progress.earlier_seconds + progress.seconds), clock(progress.seconds)
        text = f"{recipe_time} {progress.title} {step_time} | {progress.line}"
        if self._on_terminal:
            print(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif progress.seconds >= self._next_line:
            print(text, flush=True)
            self._next_line = progress.seconds + self.SECONDS_BETWEEN_LINES


if __name__ == "__main__":
    main()
