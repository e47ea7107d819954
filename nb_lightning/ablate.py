"""Ablations: `python -m nb_lightning.ablate NAME [key=value ...] [--seeds 0 1 2] [--jobs 2] [--dry-run]`.

An ablation is a file conf/ablation/NAME.yaml: what its arms share, what sets them apart, and what is measured.

    question: Does DPD beat its parts?
    common: [stage=dpd, "init_from=${paths.root}/runs/sft"]     # overrides of train.py
    arms:
      dpd: []                                                   # the first: the others are held against it
      no_negative: [stage.lambda_minus=0]
    measure: {kind: accuracy, sources: [all, maths_sort]}       # or kind: perplexity

Every arm is trained with every seed, in `paths.root`/runs/ablation/NAME/ARM-seedK, several at a time. A run that is
finished is not run again, one that was broken off goes on. A run that fails is named and the others go on. At the end
`paths.root`/ablation/NAME.md and .json hold the table. In these runs `paths.runs` is the ablation's own folder, so
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nb_lightning.checkout import CHECKOUT, require_checkout
from nb_lightning.errors import one_line_errors
from nb_lightning.evaluate.statistics import Interval, estimate
from nb_lightning.files import read_json, write_json, write_text
from nb_lightning.recipe.outcome import describe_exit, last_line
from nb_lightning.run_folder import read_metrics

FOLDER = CHECKOUT / "conf" / "ablation"
CLAIM = "ablation.json"  # in a run's folder: what it was begun with, and whether it is finished
KINDS = ("accuracy", "perplexity")


@dataclass
class Measure:
    kind: str  # accuracy: avg@k at the end of the last phase; perplexity: of held-out rows, at the end
    sources: list[str]


@dataclass
class Ablation:
    question: str
    common: list[str]
    arms: dict[str, list[str]]
    measure: Measure


@dataclass(frozen=True)
class Run:
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

    def claim(self) -> dict[str, Any]:
        """What the folder says of the run; of one that is not begun, what it will say."""
        return read_json(self.folder / CLAIM, {}) or {"overrides": self.overrides, "finished": False, "seconds": 0.0}


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_intermixed_args(arguments)  # overrides after flags, as before them
    with one_line_errors(interrupted="run the same command again to go on"):
        failed = ablate(a.name, a.seeds, a.jobs, a.overrides, a.dry_run)
        sys.exit(1 if failed else 0)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.ablate", description=__doc__.partition("\n")[0])
    p.add_argument("name", help=f"one of {', '.join(shipped())}, or the path of a .yaml file")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="K", help="(default: 0 1 2)")
    p.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one thread each (default: 2)")
    p.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides of train.py, for every arm")
    return p


def shipped() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> Ablation:
    """The ablation called `name`, or of the file at that path.

    Raises:
        ValueError: no such ablation, or a file that does not say what one is.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no ablation {name!r}; there are {', '.join(shipped())}, or give a .yaml file")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Ablation), OmegaConf.load(path))
        plain = OmegaConf.to_container(loaded, throw_on_missing=True)  # ${...} stays: it is for train.py
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key or ''} {str(error).splitlines()[0]}") from error
    found = Ablation(**{**plain, "measure": Measure(**plain["measure"])})
    if not found.arms:
        raise ValueError(f"{path}: arms is empty")
    if found.measure.kind not in KINDS:
        raise ValueError(f"{path}: measure.kind is {found.measure.kind!r}; allowed: {', '.join(KINDS)}")
    return found


def runs_of(name: str, ablation: Ablation, seeds: Sequence[int], extra: Sequence[str], root: str) -> list[Run]:
    """Seed by seed, so that stopped early the arms have as many runs each."""
    folder = Path(root) / "runs" / "ablation" / Path(name).stem
    shared = ["trainer.threads=1", "trainer.progress_bar=false", *ablation.common]
    return [
        Run(arm, seed, folder / f"{arm}-seed{seed}", [
            *shared, *overrides, *extra, f"seed={seed}", f"paths.root={root}", f"paths.runs={folder}",
            f"run_name={arm}-seed{seed}",
        ])
        for seed in seeds
        for arm, overrides in ablation.arms.items()
    ]  # fmt: skip


def ablate(name: str, seeds: Sequence[int], jobs: int, extra: Sequence[str], dry_run: bool = False) -> list[str]:
    """Run what is not finished and write the table; returns the names of the runs that failed.

    Raises:
        ValueError: see `read`; or a run is there that was begun with other overrides.
    """
    require_checkout()
    ablation = read(name)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: a seed is there twice, and would count as two")
    root = next((word.partition("=")[2] for word in reversed(extra) if word.startswith("paths.root=")), None)
    root = root or os.environ.get("NB_ROOT", "outputs")
    runs = runs_of(name, ablation, seeds, extra, root)
    if dry_run:
        print("\n".join(shlex.join(run.command) for run in runs))
        return []
    for run in runs:
        if run.claim()["overrides"] != run.overrides:
            raise ValueError(f"{run.folder} was begun with other overrides ({CLAIM} has them): remove or rename it")
    failed = train_all(runs, jobs)
    whole = [arm for arm in ablation.arms if not any(run.arm == arm and run.name in failed for run in runs)]
    if not whole:
        raise ValueError(f"every arm failed; the logs are {runs[0].folder.parent}/*/{runs[0].log.name}")
    write_report(Path(root) / "ablation" / Path(name).stem, ablation, [r for r in runs if r.arm in whole], failed)
    return list(failed)


def train_all(runs: Sequence[Run], jobs: int) -> dict[str, str]:
    """Train what is not finished, `jobs` at a time; {name: what was wrong} of those that failed."""
    left = [run for run in runs if not run.claim()["finished"]]
    print(f"{len(runs)} runs, {len(runs) - len(left)} finished before", flush=True)
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(train, run): run for run in left}
        for done, future in enumerate(as_completed(futures), 1):
            run, problem = futures[future], future.result()
            if problem:
                failed[run.name] = problem
            print(f"{done}/{len(left)} {run.name}: {problem or 'finished'}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def train(run: Run) -> str | None:
    """Begin a run or go on with it; None, or if it failed how, and the last line of what it said."""
    claim, began = run.claim(), time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        try:  # the run inherits the lock: it holds as long as either of us lives
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another process is training it: {run.log} is locked"
        write_json(run.folder / CLAIM, claim)
        start = log.tell()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(run.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env).returncode
    claim["seconds"] += time.monotonic() - began
    write_json(run.folder / CLAIM, {**claim, "finished": code == 0})
    return None if code == 0 else f"{describe_exit(code)}: {last_line(run.log, start) or 'it said nothing'}"


def write_report(path: Path, ablation: Ablation, runs: Sequence[Run], failed: dict[str, str]) -> None:
    """`path`.md and `path`.json, of the arms whose runs are all finished."""
    folders: dict[str, list[Path]] = {}
    for run in runs:
        folders.setdefault(run.arm, []).append(run.folder)
    compared, tables = {}, []
    for source in ablation.measure.sources:
        read_one = partial(measured, kind=ablation.measure.kind, source=source)
        found = {arm: [read_one(folder) for folder in of_arm] for arm, of_arm in folders.items()}
        after = {arm: np.stack([values for values, _ in of_arm]) for arm, of_arm in found.items()}
        if ablation.measure.kind == "accuracy":
            before = {arm: np.stack([values for _, values in of_arm]) for arm, of_arm in found.items()}
            compared[source] = compare(after, before)
            tables.append(f"**{source}**\n\n{table(compared[source], 'avg in %', scale=100)}")
        else:
            compared[source] = compare(after)
            tables.append(f"**{source}**\n\n{table(compared[source], 'perplexity', digits=3)}")
    start = read_json(runs[0].folder / "manifest.json")["starts"][-1]
    seconds = {arm: [read_json(folder / CLAIM)["seconds"] for folder in of_arm] for arm, of_arm in folders.items()}
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
    notes += [f"failed: {name}: {problem}" for name, problem in failed.items()]
    text = "\n\n".join([ablation.question, *tables, "\n".join(f"* {note}" for note in notes)]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    page, numbers = (path.with_name(path.name + ending) for ending in (".md", ".json"))  # a name may have dots
    write_text(page, text)
    write_json(numbers, {**about, "measured": compared})
    print(f"\n{text}\n{page}, {numbers}")


if __name__ == "__main__":
    main()


def measured(run: Path, kind: str, source: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What the finished run in that folder measured of a source at its end, and before its first step.

    Args:
        kind: "accuracy": avg@k of each task, [tasks] and [tasks] (`callbacks.task_accuracy`); or "perplexity" of
            held-out rows, [1] and None.

    Raises:
        ValueError: it measured no such source.
    """
    if kind == "accuracy":
        phases = read_json(run / "accuracy.json")
        before, after = (phases[when]["sources"] for when in ("before", list(phases)[-1]))
        if source not in after:
            raise ValueError(f"measure.sources names {source!r}; {run} measured {', '.join(after)}")
        return np.array(after[source]["each"]), np.array(before[source]["each"])
    metrics, key = read_metrics(run), f"val/perplexity/{source}"
    if key not in metrics:
        raise ValueError(f"measure.sources names {source!r}, but {run} logged no {key}")
    return metrics[key][-1:, 1], None


def compare(arms: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """{arm: {"after": ..., "gain": ..., "difference": ...}}, each as the fields of `Estimate`.

    Args:
        arms: values at the end of each arm's runs, [seeds, tasks]; the first arm is what the others are held against.
        before: the same before the first step; without it there is no "gain".
    """
    first = next(iter(arms.values()))
    found: dict[str, Any] = {}
    for name, values in arms.items():
        found[name] = {"after": asdict(estimate(values))}
        if before:
            found[name]["gain"] = asdict(estimate(values - before[name]))
        if values is not first:
            found[name]["difference"] = asdict(estimate(values - first))
    return found


def table(compared: Mapping[str, Any], what: str, scale: float = 1, digits: int = 1) -> str:
    """Markdown: arms down. `what` heads the means, which are multiplied with `scale`."""
    names = list(compared)
    gains = "gain" in compared[names[0]]
    tasks = compared[names[0]]["after"]["over_tasks_and_seeds"] is not None
    head = ["arm", what, *(["95 %"] if tasks else []), "95 % over seeds", "each seed"]
    head += ["gain", "95 %"] if gains else []
    head += [f"minus {names[0]}", *(["95 %"] if tasks else []), "95 % over seeds"] if names[1:] else []

    def number(x: float, sign: str = "") -> str:
        return f"{scale * x:{sign}.{digits}f}"

    def interval(found: Interval | None, sign: str = "") -> str:
        return "–" if found is None else f"{number(found[0], sign)} … {number(found[1], sign)}"

    rows = []
    for name in names:
        after, gain, difference = (compared[name].get(key) for key in ("after", "gain", "difference"))
        row = [name, number(after["mean"]), *([interval(after["over_tasks_and_seeds"])] if tasks else [])]
        row += [interval(after["over_seeds"]), ", ".join(map(number, after["seeds"]))]
        if gain:
            row += [number(gain["mean"], "+"), interval(gain["over_tasks_and_seeds"], "+")]
        if difference:
            row += [number(difference["mean"], "+")]
            row += [interval(difference["over_tasks_and_seeds"], "+")] if tasks else []
            row += [interval(difference["over_seeds"], "+")]
        rows.append(row + [""] * (len(head) - len(row)))
    return markdown([head, ["---", *["---:"] * (len(head) - 1)], *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
