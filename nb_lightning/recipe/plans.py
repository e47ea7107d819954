"""What a recipe would do, without doing it: commands, the plan of each stage, and what is not there yet.

Composed in this process as `train.py` does it: nothing is written, and a mistake is an error here, not in a child.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from omegaconf import OmegaConf

from nb_lightning.checkout import check_as_train, composed
from nb_lightning.config.compose import run_dir
from nb_lightning.config.schema import Config
from nb_lightning.recipe.steps import TRAIN, Step

READ = ("--tasks", "--teacher", "--student", "--judge", "--model", "--from", "--input", "--tokenizer")
WRITTEN = ("--output", "--out", "--samples", "--to")


def check_configurations(chosen: Sequence[Step]) -> None:
    """A key that is wrong in the last stage is better known before the first.

    Raises:
        ValueError: names the step.
    """
    for step in chosen:
        if step.trains:
            folder = run_dir(_config(step))
            if step.makes and folder not in step.makes:
                raise ValueError(
                    f"step {step.name}: it would write {folder}, but the steps after it look in {step.makes[0]}; move "
                    "everything with paths.root="
                )


def show_plans(steps: Sequence[Step], chosen: Sequence[Step]) -> None:
    """Print it all.

    Raises:
        ValueError: a stage that cannot work; names the step.
    """
    from nb_lightning.dry_run import describe, missing  # imports torch

    if "NB_ROOT" in os.environ:
        print(f"export NB_ROOT={shlex.quote(os.environ['NB_ROOT'])}\n")
    for number, step in enumerate(steps, 1):
        if step in chosen:
            print(f"# {number}/{len(steps)} {step.name}\n{shlex.join(step.command)}\n", flush=True)
    made: list[Path] = []
    wanted: dict[str, list[str]] = {}  # what is not there, and no step before makes it -> the steps that read it
    for step in chosen:
        read = list(_arguments(step, READ))
        if step.trains:
            cfg = _config(step, "dry_run=true")
            read = list(missing(cfg).values())
            if getattr(cfg.data, "demo_corpus", False) or getattr(cfg.data, "demo_tasks", False):
                made.append(Path(cfg.paths.data_root))
            unknown = f"not planned: its model is that of {cfg.init_from}, which is not there yet"
            print(f"---- {step.name} ----\n{unknown if _shape_unknown(cfg) else describe(cfg)}\n", flush=True)
        for path in read:
            if not Path(path).exists() and not any(Path(path).is_relative_to(one) for one in made):
                wanted.setdefault(path, []).append(step.name)
        made += [*step.makes, *map(Path, _arguments(step, WRITTEN))]
    if wanted:
        print("---- not there yet, and no step makes it ----")
        width = max(map(len, wanted))
        print("\n".join(f"{path:<{width}}  for {', '.join(names)}" for path, names in wanted.items()))


def _config(step: Step, *more: str) -> Config:
    """What a step's `train.py` would run with."""
    words = [*step.command[step.command.index(TRAIN) + 1 :], *more]
    try:
        cfg = composed(words)
        if not _shape_unknown(cfg):
            check_as_train(cfg, words)
    except ValueError as error:
        raise ValueError(f"step {step.name}: {error}") from error
    return cfg


def _shape_unknown(cfg: Config) -> bool:
    """With model=from_hf: the model is that of weights which a step before has to make first."""
    return "shape_of:" in str(OmegaConf.to_container(cfg.model)) and not Path(cfg.init_from or "").exists()


def _arguments(step: Step, flags: Sequence[str]) -> Iterator[str]:
    """What a command has after these flags; addresses are left out."""
    for i, word in enumerate(step.command):
        if word in flags:
            values = takewhile(lambda value: not value.startswith("--"), step.command[i + 1 :])
            yield from (value for value in values if "://" not in value)
