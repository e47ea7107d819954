"""On-policy filtering (report, section on RL): keep the prompts that are neither too easy nor too hard for the policy.

Before each phase the current weights answer every prompt 16 times, and the mean reward decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from nb_lightning.errors import RunStopped
from nb_lightning.files import read_json, write_json
from nb_lightning.phase_callback import PhaseCallback
from nb_lightning.phases import Phase
from nb_lightning.plotting import COLORS, GREY, pyplot
from nb_lightning.rollouts.groups import is_judged_in_group
from nb_lightning.rollouts.policy import PolicyModule
from nb_lightning.run_folder import ON_POLICY_FILTER, on_policy_filter_picture


class OnPolicyFilter(PhaseCallback):
    """Sets `datamodule.selected_tasks` at the start of every phase, and draws how often prompts were solved.

    A source that is judged inside its groups keeps all its prompts: a group's mean says nothing about the policy.

    The selection is in the checkpoint, so a run that resumes inside a phase does not filter again. A run stopped
    before the phase's first checkpoint filters again, with the same weights and seeds.

    Args:
        samples: completions of each prompt.
        low, high: a prompt is kept if its mean reward lies strictly between them.
        candidates: answer only the first prompts of each source, at most this many; null takes all.
        min_prompts: stop the run if fewer prompts of a source are kept.
    """

    def __init__(
        self,
        samples: int = 16,
        low: float = 0.1,
        high: float = 0.9,
        candidates: int | None = None,
        min_prompts: int = 8,
    ) -> None:
        if samples < 1 or min_prompts < 1 or not 0 <= low < high <= 1:
            raise ValueError(
                f"callbacks.on_policy_filter: samples {samples}, min_prompts {min_prompts}, low {low}, high {high}; "
                "samples and min_prompts must be positive and low below high, both from 0 to 1"
            )
        self.samples, self.low, self.high = samples, low, high
        self.candidates, self.min_prompts = candidates, min_prompts
        self.selected_tasks: dict[str, dict[str, list[str]]] = {}  # phase -> source -> task ids

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.selected_tasks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.selected_tasks = state_dict["kept"]

    def on_train_start(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        module.data.selected_tasks = self.selected_tasks

    def on_phase_start(self, trainer: pl.Trainer, module: PolicyModule, phase: Phase) -> None:
        if phase.name in self.selected_tasks:
            return
        tasks = module.data.tasks
        candidates, selected = {}, {}
        for source, ids in module.data.fitting_tasks[phase.name].items():
            if all(is_judged_in_group(tasks[source][id]) for id in ids):
                selected[source] = ids
            else:
                candidates[source] = ids[: self.candidates]
        if candidates:
            selected |= self._filter(trainer, module, phase.name, candidates)
        self.selected_tasks[phase.name] = selected

    def _filter(
        self, trainer: pl.Trainer, module: PolicyModule, phase: str, candidates: dict[str, list[str]]
    ) -> dict[str, list[str]]:
        """Sample the candidates on all ranks together; return the task ids of each source that are selected."""
        tasks = [module.data.tasks[source][id] for source, ids in candidates.items() for id in ids]
        sampler = replace(module.sampler, k=self.samples)
        share = -(-len(tasks) // trainer.world_size)
        is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with tqdm(total=share, desc=f"on-policy filter for {phase}", disable=not is_shown) as bar:
            prompts = sampler.encode(tasks, module.cfg.seed)
            attempts = iter(sampler.sample_over_ranks(prompts, on_scored=lambda _: bar.update()))
        means = {source: {id: next(attempts).mean_reward for id in ids} for source, ids in candidates.items()}
        selected = {
            source: [id for id, mean in by_id.items() if self.low < mean < self.high] for source, by_id in means.items()
        }
        report = {
            source: {"counts": self._counts(by_id.values()), "kept": len(selected[source]), "of": len(by_id)}
            for source, by_id in means.items()
        }
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir), phase, report)
        for source, numbers in report.items():
            module.print(
                f"phase {phase}: {numbers['kept']} of {numbers['of']} prompts of {source} are solved in more than "
                f"{self.low:.0%} and fewer than {self.high:.0%} of {self.samples} attempts"
            )
            if numbers["kept"] < self.min_prompts:
                self._stop(phase, source, list(means[source].values()))
        return selected

    def _counts(self, means: Iterable[float]) -> list[int]:
        """Count the prompts with 0, 1, ... correct samples; partial rewards are rounded."""
        n_correct = [round(mean * self.samples) for mean in means]
        return [n_correct.count(n) for n in range(self.samples + 1)]

    def _stop(self, phase: str, source: str, means: list[float]) -> None:
        easy, hard = sum(mean >= self.high for mean in means), sum(mean <= self.low for mean in means)
        raise RunStopped(
            f"on-policy filter before phase {phase}: {len(means) - easy - hard} of {len(means)} prompts of {source} "
            f"stay ({easy} are too easy, {hard} too hard), fewer than callbacks.on_policy_filter.min_prompts="
            f"{self.min_prompts}; give it {'harder' if easy > hard else 'easier'} prompts or another starting model, "
            "or take the source out of the phase's mixture"
        )

    def _write(self, run: Path, phase: str, report: dict[str, Any]) -> None:
        path = run / ON_POLICY_FILTER
        write_json(path, {**read_json(path, {}), phase: report})
        plot_filter(phase, report, self.samples, (self.low, self.high), run / on_policy_filter_picture(phase))


def plot_filter(phase: str, report: dict[str, Any], samples: int, bounds: tuple[float, float], path: Path) -> None:
    """Draw the number of prompts by their correct samples, one panel a source; bars of kept prompts are coloured."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(report), figsize=(4.5 * len(report) + 0.5, 3.2), squeeze=False, constrained_layout=True
    )
    low, high = bounds
    colors = [COLORS[0] if low < n / samples < high else GREY for n in range(samples + 1)]
    for axis, (name, numbers) in zip(axes[0], report.items()):
        axis.bar(range(samples + 1), numbers["counts"], color=colors, width=0.85)
        axis.set_title(f"{name}: {numbers['kept']} of {numbers['of']} kept", fontsize=10, loc="left")
        axis.set_xlabel(f"right, of {samples}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"prompts before {phase}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
