"""A run as the report sees it: the files that it left in its folder, and nothing that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from nb_lightning.checkpoints import folders
from nb_lightning.files import read_json
from nb_lightning.run_folder import read_metrics

# Run folders of the recipe, in its order.
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
    name: str
    title: str
    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / "manifest.json", {})

    @property
    def state(self) -> str:
        if not self.manifest:
            return "not run"
        return "finished" if self.manifest["finished"] else "not finished"

    @cached_property
    def config(self) -> Any:
        return OmegaConf.load(self.folder / "config.yaml")

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        return read_metrics(self.folder)

    @property
    def accuracy(self) -> dict[str, Any]:
        """Held-out tasks, by when they were measured (callbacks/task_accuracy.py)."""
        return read_json(self.folder / "accuracy.json", {})

    @property
    def filtered(self) -> dict[str, Any]:
        """What the on-policy filter kept, by phase and source."""
        return read_json(self.folder / "on_policy_filter.json", {})

    def pictures(self) -> list[Path]:
        """Plan, curves, and the filter's histograms in the order of the phases."""
        names = ["plan", "curves", *(f"on_policy_filter_{phase}" for phase in self.filtered)]
        return [path for name in names if (path := self.folder / f"{name}.png").is_file()]

    @property
    def steps(self) -> int:
        """Optimizer steps of the plan."""
        return sum(phase["tokens"] // phase["global_batch_tokens"] for phase in self.manifest["plan"])

    @property
    def tokens_seen(self) -> int:
        if "tokens_seen" in self.manifest:
            return self.manifest["tokens_seen"]
        return int(max((series[-1, 0] for series in self.metrics.values()), default=0))

    @property
    def tokens(self) -> int:
        """Trained on. RL's clock counts what rollouts can hold; here is what they held, if every step was logged."""
        if "rl/sampled_tokens" in self.metrics and self.config.trainer.log_every_n_steps == 1:
            return int(self.metrics["rl/sampled_tokens"][:, 1].sum())
        return self.tokens_seen

    @property
    def tokens_per_sec(self) -> float | None:
        """Median over the points that were logged."""
        speeds = self.metrics.get("perf/tokens_per_sec")
        return None if speeds is None else float(np.median(speeds[:, 1]))

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of each metric whose name begins so, by the rest of the name."""
        found = {name: series[-1, 1] for name, series in self.metrics.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): float(value) for name, value in found.items()}

    def shares(self) -> list[tuple[str, float, float]]:
        """Of each source its planned and realised share of the tokens up to the last point that was logged."""
        found = []
        for source in dict.fromkeys(name for phase in self.manifest["plan"] for name in phase["mixture"]):
            series = self.metrics.get(f"data/share/{source}")
            if series is not None:
                tokens = np.diff(series[:, 0], prepend=0.0)
                end = series[-1, 0]
                found.append((source, self._planned(source, end), float((series[:, 1] * tokens).sum() / end)))
        return found

    def _planned(self, source: str, end: float) -> float:
        start, tokens = 0.0, 0.0
        for phase in self.manifest["plan"]:
            tokens += phase["mixture"].get(source, 0.0) * max(0.0, min(phase["tokens"], end - start))
            start += phase["tokens"]
        return tokens / end

    def checkpoint(self) -> tuple[str, str] | None:
        """Name and SHA-256 of the newest checkpoint; of a sharded one, of its first file."""
        for folder in reversed(folders.all_checkpoints(self.folder)):
            files: Mapping[str, Any] = folders.read_info(folder)["files"]
            return folder.name, next(iter(files.values()))["sha256"]
        return None


def read_runs(root: Path) -> list[Run]:
    """All runs of the recipe, those that are not there too."""
    return [Run(name, title, root / "runs" / name) for name, title in RUNS.items()]
