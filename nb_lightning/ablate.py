"""Run an ablation: `python -m nb_lightning.ablate NAME [key=value ...] [--seeds 0 1 2] [--jobs 2] [--dry-run]`.

An ablation is a file conf/ablation/NAME.yaml: what its arms share, what differs between them, and what is measured.

    question: Does DPD beat its parts?
    common: [stage=dpd, "init_from=${paths.root}/runs/sft"]     # overrides of train.py
    arms:
      dpd: []                                                   # the others are compared with the first
      no_negative: [stage.lambda_minus=0]
    measure: {kind: accuracy, sources: [all, maths_sort]}       # or kind: perplexity
    recipe: NAME                                                # optional: its recipe makes what the arms need

Each arm is trained with each seed in `paths.root`/runs/ablation/NAME/ARM-seedK, several runs at a time. The same
command skips finished runs and resumes broken ones. If a run fails, it is named and the others go on. In the end the
table is written to `paths.root`/ablation/NAME.md and .json. In these runs `paths.runs` is the ablation's folder, so
other runs are named by `${paths.root}/runs/...`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning import run_folder
from nb_lightning.checkout import CHECKOUT, default_root, require_checkout
from nb_lightning.errors import one_line_errors
from nb_lightning.evaluate.comparison import compare, comparison_table
from nb_lightning.files import read_json, write_json, write_text
from nb_lightning.recipe.outcome import describe_exit, last_line

ABLATIONS = CHECKOUT / "conf" / "ablation"
RECORD = "ablation.json"  # in a run's folder: its overrides, whether it is finished, and its seconds
KINDS = ("accuracy", "perplexity")


@dataclass
class Measure:
    """What is compared.

    Attributes:
        kind: accuracy (avg@k at the end of the last phase) or perplexity (of held-out rows, at the end).
    """

    kind: str
    sources: list[str]


@dataclass
class Ablation:
    """A file of conf/ablation/; `common` and `arms` hold overrides of train.py.

    Attributes:
        recipe: runs before the arms and makes what they need (conf/recipe/<recipe>.yaml); finished steps are skipped.
    """

    question: str
    common: list[str]
    arms: dict[str, list[str]]
    measure: Measure
    recipe: str | None = None

    def recipe_command(self, root: str) -> list[str]:
        return [sys.executable, "-m", "nb_lightning.recipe", f"model={self.recipe}", f"paths.root={root}"]


@dataclass(frozen=True)
class ArmRun:
    """One arm trained with one seed."""

    arm: str
    seed: int
    folder: Path
    overrides: list[str]

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(CHECKOUT / "train.py"), *self.overrides, "resume=true"]

    @property
    def log(self) -> Path:
        return self.folder / "ablation.log"

    def record(self) -> dict[str, Any]:
        """Read the record in the run's folder; before its first start, return the one to begin with."""
        return read_json(self.folder / RECORD, {}) or {"overrides": self.overrides, "finished": False, "seconds": 0.0}


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_intermixed_args(arguments)  # overrides may come after flags
    with one_line_errors(interrupted="run the same command again to go on"):
        failed = ablate(a.name, a.seeds, a.jobs, a.overrides, a.dry_run)
        sys.exit(1 if failed else 0)


def parser() -> argparse.ArgumentParser:
    description = "Train and compare the arms of an ablation."
    p = argparse.ArgumentParser(prog="python -m nb_lightning.ablate", description=description)
    p.add_argument("name", help=f"one of {', '.join(shipped_ablations())}, or the path of a .yaml file")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="K", help="(default: 0 1 2)")
    p.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one thread each (default: 2)")
    p.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides of train.py, for every arm")
    return p


def shipped_ablations() -> list[str]:
    return sorted(path.stem for path in ABLATIONS.glob("*.yaml"))


def ablate(name: str, seeds: Sequence[int], jobs: int, extra: Sequence[str], dry_run: bool = False) -> list[str]:
    """Train the runs that are not finished and write the table.

    Args:
        name: see `read_ablation`.
        jobs: runs at a time.
        extra: overrides of train.py for every run.

    Returns:
        The names of the runs that failed.

    Raises:
        ValueError: this is no checkout; see `read_ablation`; or a run was started before with other overrides.
    """
    require_checkout()
    ablation = read_ablation(name)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: a seed is there twice, and would count as two")
    roots = [override.partition("=")[2] for override in extra if override.startswith("paths.root=")]
    root = roots[-1] if roots else default_root()
    runs = plan_runs(name, ablation, seeds, extra, root)
    if dry_run:
        recipe = [ablation.recipe_command(root)] if ablation.recipe else []
        print("\n".join(map(shlex.join, [*recipe, *(run.command for run in runs)])))
        return []
    for run in runs:
        if run.record()["overrides"] != run.overrides:
            raise ValueError(f"{run.folder} was begun with other overrides ({RECORD} has them): remove or rename it")
    if ablation.recipe and subprocess.run(ablation.recipe_command(root)).returncode:
        raise ValueError(f"the recipe {ablation.recipe} failed; the same command goes on where it stopped")
    failed = train_all(runs, jobs)
    broken_arms = {run.arm for run in runs if run.name in failed}
    complete = [run for run in runs if run.arm not in broken_arms]
    if not complete:
        raise ValueError(f"every arm failed; the logs are {runs[0].folder.parent}/*/{runs[0].log.name}")
    write_report(Path(root) / "ablation" / Path(name).stem, ablation, complete, failed)
    return list(failed)


def read_ablation(name: str) -> Ablation:
    """Read conf/ablation/<name>.yaml, or the file at a path that ends in .yaml.

    Raises:
        ValueError: there is no such ablation, or the file holds something else.
    """
    path = Path(name) if name.endswith(".yaml") else ABLATIONS / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(shipped_ablations())
        raise ValueError(f"there is no ablation {name!r}; there are {shipped}, or give a .yaml file")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Ablation), OmegaConf.load(path))
        # Not resolved: ${...} in an override is for train.py.
        fields: Any = OmegaConf.to_container(loaded, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key or ''} {str(error).splitlines()[0]}") from error
    ablation = Ablation(**{**fields, "measure": Measure(**fields["measure"])})
    if not ablation.arms:
        raise ValueError(f"{path}: arms is empty")
    if ablation.measure.kind not in KINDS:
        raise ValueError(f"{path}: measure.kind is {ablation.measure.kind!r}; allowed: {', '.join(KINDS)}")
    return ablation


def plan_runs(name: str, ablation: Ablation, seeds: Sequence[int], extra: Sequence[str], root: str) -> list[ArmRun]:
    """List all runs seed by seed, so that all arms have equally many when the ablation is stopped early."""
    folder = Path(root) / "runs" / "ablation" / Path(name).stem
    shared = ["trainer.threads=1", "trainer.progress_bar=false", *ablation.common]
    return [
        ArmRun(arm, seed, folder / f"{arm}-seed{seed}", [
            *shared, *overrides, *extra, f"seed={seed}", f"paths.root={root}", f"paths.runs={folder}",
            f"run_name={arm}-seed{seed}",
        ])
        for seed in seeds
        for arm, overrides in ablation.arms.items()
    ]  # fmt: skip


# Training -------------------------------------------------------------------------------------------------------------


def train_all(runs: Sequence[ArmRun], jobs: int) -> dict[str, str]:
    """Train the unfinished runs, `jobs` at a time; return {name: reason} of those that failed."""
    unfinished = [run for run in runs if not run.record()["finished"]]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} finished before", flush=True)
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(train, run): run for run in unfinished}
        for done, future in enumerate(as_completed(futures), 1):
            run, reason = futures[future], future.result()
            if reason:
                failed[run.name] = reason
            print(f"{done}/{len(unfinished)} {run.name}: {reason or 'finished'}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def train(run: ArmRun) -> str | None:
    """Start or resume a run; return None, or how it failed and the last line of its output."""
    record, started = run.record(), time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        try:  # the run inherits the lock, which holds as long as one of the two processes lives
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another process is training it: {run.log} is locked"
        write_json(run.folder / RECORD, record)
        log_start = log.tell()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(run.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env).returncode
    record["seconds"] += time.monotonic() - started
    write_json(run.folder / RECORD, {**record, "finished": code == 0})
    return None if code == 0 else f"{describe_exit(code)}: {last_line(run.log, log_start) or 'it said nothing'}"


# The table ------------------------------------------------------------------------------------------------------------


def write_report(path: Path, ablation: Ablation, runs: Sequence[ArmRun], failed: dict[str, str]) -> None:
    """Write `path`.md and `path`.json about the arms whose runs are all finished, and print the former."""
    folders: dict[str, list[Path]] = {}
    for run in runs:
        folders.setdefault(run.arm, []).append(run.folder)
    estimates, tables = {}, []
    for source in ablation.measure.sources:
        estimates[source], table = compare_source(folders, ablation.measure.kind, source)
        tables.append(f"**{source}**\n\n{table}")
    start = read_json(runs[0].folder / run_folder.MANIFEST)["starts"][-1]
    seconds = {arm: [read_json(folder / RECORD)["seconds"] for folder in of_arm] for arm, of_arm in folders.items()}
    about = {
        "question": ablation.question,
        "command": f"python -m nb_lightning.ablate {shlex.join(sys.argv[1:])}",
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "minutes": {arm: [round(one / 60, 1) for one in of_arm] for arm, of_arm in seconds.items()},
        "cores": os.cpu_count(),
        "versions": start["versions"],
        "git": start["git"],
        "failed": failed,
    }
    notes = [f"{key}: {json.dumps(about[key])}" for key in ("command", "seeds", "minutes", "cores", "versions", "git")]
    notes += [f"failed: {name}: {reason}" for name, reason in failed.items()]
    text = "\n\n".join([ablation.question, *tables, "\n".join(f"* {note}" for note in notes)]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    page, numbers = (path.with_name(path.name + suffix) for suffix in (".md", ".json"))  # the name may have dots
    write_text(page, text)
    write_json(numbers, {**about, "measured": estimates})
    print(f"\n{text}\n{page}, {numbers}")


def compare_source(folders: dict[str, list[Path]], kind: str, source: str) -> tuple[dict[str, Any], str]:
    """Compare the arms on one source; return the estimates and their table."""
    if kind == "perplexity":
        after = {arm: np.stack([read_perplexity(run, source) for run in runs]) for arm, runs in folders.items()}
        estimates = compare(after)
        return estimates, comparison_table(estimates, "perplexity", digits=3)
    accuracies = {arm: np.stack([read_accuracy(run, source) for run in runs]) for arm, runs in folders.items()}
    before, after = ({arm: both[:, i] for arm, both in accuracies.items()} for i in (0, 1))
    estimates = compare(after, before)
    return estimates, comparison_table(estimates, "avg in %", scale=100)


def read_accuracy(run: Path, source: str) -> np.ndarray:
    """Read avg@k of each task before the first step and at the end of a run, [2, tasks].

    Raises:
        ValueError: the run did not measure this source.
    """
    phases = read_json(run / run_folder.ACCURACY)
    before, after = (phases[when]["sources"] for when in (run_folder.BEFORE_TRAINING, list(phases)[-1]))
    if source not in after:
        raise ValueError(f"measure.sources names {source!r}; {run} measured {', '.join(after)}")
    return np.array([before[source]["each"], after[source]["each"]])


def read_perplexity(run: Path, source: str) -> np.ndarray:
    """Read the perplexity of held-out rows at the end of a run, [1].

    Raises:
        ValueError: the run did not log it.
    """
    metrics, name = run_folder.read_metrics(run), f"val/perplexity/{source}"
    if name not in metrics:
        raise ValueError(f"measure.sources names {source!r}, but {run} logged no {name}")
    return metrics[name][-1:, 1]


if __name__ == "__main__":
    main()
