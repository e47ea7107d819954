"""A run as the report sees it: the files in its folder, any of which may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from nb_lightning import run_folder
from nb_lightning.checkpoints import folders
from nb_lightning.files import read_json
from nb_lightning.run_folder import read_metrics

# The recipe's run folders in its order, and what the report calls them.
RUNS = {
    "pretrain": "Pretraining",
    "sft": "SFT",
    "teacher": "Teacher",
    "dpd": "DPD",
    "reward_model": "Reward model",
    "rl": "RL",
}


@dataclass(frozen=True)
class Run:
    """One stage of the recipe, run or not."""

    name: str
    title: str
    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Empty where the stage has not run."""
        return read_json(self.folder / run_folder.MANIFEST, {})

    @property
    def state(self) -> str:
        if not self.manifest:
            return "not run"
        return "finished" if self.manifest["finished"] else "not finished"

    @cached_property
    def config(self) -> Any:
        return OmegaConf.load(self.folder / run_folder.CONFIG)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """{name: [n, 2] of (tokens_seen, value)}."""
        return read_metrics(self.folder)

    @property
    def accuracy(self) -> dict[str, Any]:
        """What callbacks/task_accuracy.py measured, by phase."""
        return read_json(self.folder / run_folder.ACCURACY, {})

    @property
    def filter_report(self) -> dict[str, Any]:
        """How many prompts passed callbacks/on_policy_filter.py, by phase and source."""
        return read_json(self.folder / run_folder.ON_POLICY_FILTER, {})

    def pictures(self) -> list[Path]:
        """Return plan, curves, and the on-policy filter's histograms in the order of the phases."""
        names = [run_folder.PLAN_PICTURE, run_folder.CURVES_PICTURE]
        names += [run_folder.on_policy_filter_picture(phase) for phase in self.filter_report]
        return [path for name in names if (path := self.folder / name).is_file()]

    @property
    def steps(self) -> int:
        """Optimizer steps of the plan."""
        return sum(phase["tokens"] // phase["global_batch_tokens"] for phase in self.manifest["plan"])

    @property
    def tokens_seen(self) -> int:
        """The clock at the end, or at the last point that was logged."""
        if "tokens_seen" in self.manifest:
            return self.manifest["tokens_seen"]
        return int(max((series[-1, 0] for series in self.metrics.values()), default=0))

    @property
    def tokens(self) -> int:
        """Tokens trained on.

        RL's clock counts what rollouts can hold at most; where every step was logged, this is what they held.
        """
        if "rl/sampled_tokens" in self.metrics and self.config.trainer.log_every_n_steps == 1:
            return int(self.metrics["rl/sampled_tokens"][:, 1].sum())
        return self.tokens_seen

    @property
    def tokens_per_sec(self) -> float | None:
        """The median over the logged points."""
        speeds = self.metrics.get("perf/tokens_per_sec")
        return None if speeds is None else float(np.median(speeds[:, 1]))

    def last_values(self, prefix: str) -> dict[str, float]:
        """Return the last value of each metric whose name begins with `prefix`, by the rest of the name."""
        return {
            name.removeprefix(prefix): float(series[-1, 1])
            for name, series in self.metrics.items()
            if name.startswith(prefix)
        }

    def shares(self) -> list[tuple[str, float, float]]:
        """Return (source, planned share, realised share) of the tokens up to the last logged point."""
        shares = []
        for source in dict.fromkeys(name for phase in self.manifest["plan"] for name in phase["mixture"]):
            series = self.metrics.get(f"data/share/{source}")
            if series is not None:
                tokens = np.diff(series[:, 0], prepend=0.0)
                end = series[-1, 0]
                shares.append((source, self._planned_share(source, end), float((series[:, 1] * tokens).sum() / end)))
        return shares

    def _planned_share(self, source: str, end: float) -> float:
        start, tokens = 0.0, 0.0
        for phase in self.manifest["plan"]:
            tokens += phase["mixture"].get(source, 0.0) * max(0.0, min(phase["tokens"], end - start))
            start += phase["tokens"]
        return tokens / end

    def newest_checkpoint(self) -> tuple[str, str] | None:
        """Return name and SHA-256 of the newest checkpoint; the hash of a sharded one is that of its first file."""
        for folder in reversed(folders.all_checkpoints(self.folder)):
            files: Mapping[str, Any] = folders.read_info(folder)["files"]
            return folder.name, next(iter(files.values()))["sha256"]
        return None


def read_runs(root: Path) -> list[Run]:
    """Return all runs of the recipe, also those that are not there."""
    return [Run(name, title, root / "runs" / name) for name, title in RUNS.items()]
