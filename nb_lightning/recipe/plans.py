"""The dry run of a recipe: every command, the plan of each stage, and the inputs that are not there yet.

Configs are composed in this process as `train.py` composes them. Nothing is written.
"""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from nb_lightning.checkout import check_as_train, composed, read_shape
from nb_lightning.config.compose import builds_demo_data, run_dir
from nb_lightning.config.schema import Config
from nb_lightning.recipe.steps import TRAIN, Step

INPUT_FLAGS = ("--tasks", "--teacher", "--student", "--judge", "--model", "--from", "--input", "--tokenizer")
OUTPUT_FLAGS = ("--output", "--out", "--samples", "--to")


def check_configs(chosen: Sequence[Step]) -> None:
    """Check every stage's config, so that a wrong key in the last stage is an error before the first one runs.

    Raises:
        ValueError: names the step.
    """
    for step in chosen:
        if step.trains:
            folder = run_dir(_compose(step))
            if step.makes and folder not in step.makes:
                raise ValueError(
                    f"step {step.name}: it would write {folder}, but the steps after it look in {step.makes[0]}; move "
                    "everything with paths.root="
                )


def show_plans(steps: Sequence[Step], chosen: Sequence[Step]) -> None:
    """Print the commands of the steps `chosen`, their stages' plans, and the inputs that no step makes.

    Raises:
        ValueError: a stage cannot work; names the step.
    """
    from nb_lightning.dry_run import describe, missing  # imports torch

    if "NB_ROOT" in os.environ:
        print(f"export NB_ROOT={shlex.quote(os.environ['NB_ROOT'])}\n")
    for number, step in enumerate(steps, 1):
        if step in chosen:
            print(f"# {number}/{len(steps)} {step.name}\n{shlex.join(step.command)}\n", flush=True)
    outputs: list[Path] = []
    readers_of_missing: dict[str, list[str]] = {}  # a path that no earlier step makes -> the steps that read it
    for step in chosen:
        inputs = list(_paths_after(step, INPUT_FLAGS))
        if step.trains:
            cfg = _compose(step, "dry_run=true")
            inputs = list(missing(cfg).values())
            if builds_demo_data(cfg.data):
                outputs.append(Path(cfg.paths.data_root))
            if _needs_earlier_weights(cfg):
                plan = f"not planned: its model is that of {cfg.init_from}, which is not there yet"
            else:
                plan = describe(cfg)
            print(f"---- {step.name} ----\n{plan}\n", flush=True)
        for path in inputs:
            if not Path(path).exists() and not any(Path(path).is_relative_to(output) for output in outputs):
                readers_of_missing.setdefault(path, []).append(step.name)
        outputs += [*step.makes, *map(Path, _paths_after(step, OUTPUT_FLAGS))]
    if readers_of_missing:
        print("---- not there yet, and no step makes it ----")
        width = max(map(len, readers_of_missing))
        print("\n".join(f"{path:<{width}}  for {', '.join(names)}" for path, names in readers_of_missing.items()))


def _compose(step: Step, *more: str) -> Config:
    """Compose and check the config that a step's `train.py` would run with."""
    overrides = [*step.command[step.command.index(TRAIN) + 1 :], *more]
    try:
        cfg = composed(overrides, _shape_or_zeros)
        if not _needs_earlier_weights(cfg):
            check_as_train(cfg, overrides)
    except ValueError as error:
        raise ValueError(f"step {step.name}: {error}") from error
    return cfg


def _shape_or_zeros(init_from: str | None) -> Mapping[str, Any]:
    """Read the shape that model=from_hf takes; zeros for weights that an earlier step has yet to make."""
    return read_shape(init_from) if Path(init_from or "").exists() else defaultdict(int)


def _needs_earlier_weights(cfg: Config) -> bool:
    """Whether model=from_hf takes the shape from weights that an earlier step has yet to make."""
    return cfg.model.d_model == 0


def _paths_after(step: Step, flags: Sequence[str]) -> Iterator[str]:
    """Yield the values of these flags in a step's command, addresses of endpoints left out."""
    for i, argument in enumerate(step.command):
        if argument in flags:
            values = takewhile(lambda value: not value.startswith("--"), step.command[i + 1 :])
            yield from (value for value in values if "://" not in value)
