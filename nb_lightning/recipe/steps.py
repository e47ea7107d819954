"""The steps of a recipe: commands as a user types them, read from `conf/recipe/<model>.yaml`.

    steps:
      sft:
        run: [python, train.py, stage=sft]   # the command; a list in it is spliced in
        makes: ["${runs}/sft"]               # what must not be there when the step begins afresh
        resume: [resume=true]                # words that make the command go on where it was stopped

A step without `resume` goes on, or begins again, by the same command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

RECIPES = Path("conf/recipe")
TRAIN = "train.py"
_OF_ONE_STEP = re.compile(r"(\w+):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    makes: list[Path] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        return TRAIN in self.command

    @property
    def identity(self) -> list[str]:
        """The command as far as it says what is computed: with other words here, its result is another one.

        A word about the trainer says where and how fast a run goes, and the launcher before `train.py` too: a stopped
        run goes on with others, on another number of devices as well.
        """
        if not self.trains:
            return self.command
        words = self.command[self.command.index(TRAIN) :]
        return [word for word in words if not re.match(r"\+*trainer[.=]", word)]


def read_recipe(model: str, words: Sequence[str] = (), launch: Sequence[str] = ("python",)) -> list[Step]:
    """The steps of `conf/recipe/<model>.yaml`.

    Args:
        words: `key=value` goes to every command of train.py, `STEP:word` to the command of one step.
        launch: what starts train.py.

    Raises:
        ValueError: no such recipe or step, or the YAML holds something else.
    """
    path = RECIPES / f"{model}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ValueError(
            f"there is no recipe model={model}; {RECIPES} has: {known or 'nothing: run this in the checkout'}"
        )
    try:
        written = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    steps = {name: _step(name, fields, path) for name, fields in written["steps"].items()}
    for word in words:
        own = _OF_ONE_STEP.fullmatch(word)
        if own and own[1] not in steps:
            raise ValueError(f"{word}: there is no step {own[1]!r}; the steps are {', '.join(steps)}")
        for step in [steps[own[1]]] if own else steps.values():
            if own or step.trains:
                step.command.append(own[2] if own else word)
    for step in steps.values():
        if step.trains:
            start = step.command.index(TRAIN)
            step.command[:start] = launch
    return list(steps.values())


def _step(name: str, fields: Mapping[str, Any], path: Path) -> Step:
    unknown = set(fields) - {"run", "makes", "resume"}
    if unknown or "run" not in fields:
        raise ValueError(f"{path}: steps.{name} has {', '.join(fields)}; it takes run, makes, resume, and needs run")
    makes = [Path(place) for place in fields.get("makes", [])]
    return Step(name, list(_flat(fields["run"])), makes, list(_flat(fields.get("resume", []))))


def _flat(words: Sequence[Any]) -> Iterator[str]:
    for word in words:
        if isinstance(word, list):
            yield from _flat(word)
        else:
            yield str(word)
