"""The steps of a recipe: commands as a user types them, read from `conf/recipe/<model>.yaml`.

    steps:
      sft:
        run: [python, train.py, stage=sft]   # the command; a list in it is spliced in
        makes: ["${runs}/sft"]               # moved aside when the step starts afresh
        resume: [resume=true]                # arguments with which the command continues where it was stopped

A step without `resume` is continued, or started again, by the same command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.checkout import require_checkout

RECIPES = Path("conf/recipe")
TRAIN = "train.py"
_FOR_ONE_STEP = re.compile(r"(\w+):(.+)", re.DOTALL)
_ABOUT_THE_TRAINER = re.compile(r"\+*trainer[.=]")


@dataclass(frozen=True)
class Step:
    """A command of the recipe.

    Attributes:
        makes: files and folders that hold the results.
        resume: arguments with which a stopped command continues.
    """

    name: str
    command: list[str]
    makes: list[Path] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        return TRAIN in self.command

    @property
    def identity(self) -> list[str]:
        """The part of the command that determines the result; if it changes, the step starts afresh.

        Overrides of the trainer and the launcher before `train.py` only say where and how fast a run goes: a stopped
        run may continue with others, also on another number of devices.
        """
        if not self.trains:
            return self.command
        arguments = self.command[self.command.index(TRAIN) :]
        return [argument for argument in arguments if not _ABOUT_THE_TRAINER.match(argument)]


def read_recipe(model: str, arguments: Sequence[str] = (), launch: Sequence[str] = ("python",)) -> list[Step]:
    """Read the steps of `conf/recipe/<model>.yaml`.

    Args:
        arguments: `key=value` is appended to every command of train.py, `STEP:argument` to the command of one step.
        launch: the command that starts train.py.

    Raises:
        ValueError: there is no such recipe or step, or the YAML file holds something else.
    """
    require_checkout(Path())  # the steps run in the current folder
    path = RECIPES / f"{model}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ValueError(f"there is no recipe model={model}; {RECIPES} has: {shipped}")
    try:
        recipe: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    steps = {name: _step(name, fields, path) for name, fields in recipe["steps"].items()}
    for argument in arguments:
        _append(steps, argument)
    for step in steps.values():
        if step.trains:
            step.command[: step.command.index(TRAIN)] = launch
    return list(steps.values())


def _step(name: str, fields: Mapping[str, Any], path: Path) -> Step:
    unknown = set(fields) - {"run", "makes", "resume"}
    if unknown or "run" not in fields:
        raise ValueError(f"{path}: steps.{name} has {', '.join(fields)}; it takes run, makes, resume, and needs run")
    makes = [Path(place) for place in fields.get("makes", [])]
    return Step(name, list(_flatten(fields["run"])), makes, list(_flatten(fields.get("resume", []))))


def _flatten(arguments: Sequence[Any]) -> Iterator[str]:
    for argument in arguments:
        if isinstance(argument, list):
            yield from _flatten(argument)
        else:
            yield str(argument)


def _append(steps: Mapping[str, Step], argument: str) -> None:
    """Append an argument of the user to the commands that it is meant for."""
    if match := _FOR_ONE_STEP.fullmatch(argument):
        name, rest = match.groups()
        if name not in steps:
            raise ValueError(f"{argument}: there is no step {name!r}; the steps are {', '.join(steps)}")
        steps[name].command.append(rest)
        return
    for step in steps.values():
        if step.trains:
            step.command.append(argument)
