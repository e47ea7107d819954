"""The whole recipe: `python -m nb_lightning.recipe [model=demo] [key=value ...] [STEP:key=value ...]`.

Runs the steps of conf/recipe/<model>.yaml one after the other, each the very command that a user types. Stopped or
killed, the same command goes on: finished steps are not run again, the broken one resumes. docs/getting_started.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nb_lightning.errors import RunStopped
from nb_lightning.recipe.child import last_line
from nb_lightning.recipe.plans import check_configurations, show_plans
from nb_lightning.recipe.runner import Progress, Runner, clock, to_go_on
from nb_lightning.recipe.steps import Step, read_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_intermixed_args(arguments)
    try:
        run(a)
    except (ValueError, RunStopped, OSError) as error:  # of the system: no such launcher, a full or read-only disk
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {to_go_on(a.again)}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.recipe", description=__doc__.partition("\n")[0])
    p.add_argument("words", nargs="*", metavar="WORD", help="model=NAME: which recipe (default: demo); key=value: for "
                   "every train.py; STEP:word: for the command of one step, as sft:seed=1")  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="print every command, and each stage's plan; run nothing")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--only", metavar="STEP", help="this step alone")
    g.add_argument("--from", dest="start", metavar="STEP", help="leave alone what is before this step")
    p.add_argument("--again", metavar="STEP", help="begin this step afresh, though its command is the same")
    p.add_argument("--launch", default="python", metavar="COMMAND", help="what starts train.py, as "
                   "'torchrun --nproc-per-node=8' (default: %(default)s)")  # fmt: skip
    return p


def run(a: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be done as asked, RunStopped for a step that failed."""
    model, words = "demo", []
    for word in a.words:
        key, _, value = word.partition("=")
        if key == "model":
            model = value
        elif key == "paths.root":
            os.environ["NB_ROOT"] = value
        else:
            words.append(word)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does for itself: two threads beside a busy program
    steps = read_recipe(model, words, shlex.split(a.launch))
    chosen = _choose(steps, a)
    if a.dry_run:
        show_plans(steps, chosen)
        return
    folder = root() / "recipe"
    print(f"recipe {model}: {len(steps)} steps; state and logs are in {folder}", flush=True)
    check_configurations(chosen)
    status = Status()
    Runner(folder, status.tell, status.show).run(steps, chosen, a.again)
    print(f"all done. {chosen[-1].name}: {last_line(folder / f'{chosen[-1].name}.log')}")


def root() -> Path:
    return Path(os.environ.get("NB_ROOT", "outputs"))


def _choose(steps: list[Step], a: argparse.Namespace) -> list[Step]:
    names = [step.name for step in steps]
    for name in (a.only, a.start, a.again):
        if name and name not in names:
            raise ValueError(f"there is no step {name!r}; the steps are {', '.join(names)}")
    if a.only:
        return [steps[names.index(a.only)]]
    return steps[names.index(a.start) if a.start else 0 :]


class Status:
    """One line at the foot of a terminal; elsewhere, in a file say, a line a minute."""

    EVERY = 60.0

    def __init__(self) -> None:
        self._live, self._next = sys.stdout.isatty(), self.EVERY

    def tell(self, line: str) -> None:
        print(f"\r\x1b[2K{line}" if self._live else line, flush=True)
        self._next = self.EVERY

    def show(self, p: Progress) -> None:
        text = f"{clock(p.earlier + p.seconds)} [{p.number}/{p.of}] {p.step.name} {clock(p.seconds)} | {p.doing}"
        if self._live:
            print(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif p.seconds >= self._next:
            print(text, flush=True)
            self._next = p.seconds + self.EVERY


if __name__ == "__main__":
    main()
