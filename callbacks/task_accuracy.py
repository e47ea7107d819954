"""Measure accuracy on held-out tasks, before the first step and at the end of every phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nb_lightning.checkpoints.pretrained import in_training
from nb_lightning.evaluate.accuracy import Report
from nb_lightning.files import read_json, write_json
from nb_lightning.generation.sampling import Sampling
from nb_lightning.phase_callback import PhaseCallback, StageModule
from nb_lightning.phases import Phase
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.tasks import read_tasks
from nb_lightning.rollouts.attempts import Prompt
from nb_lightning.rollouts.sampler import RolloutSampler
from nb_lightning.run_folder import ACCURACY, BEFORE_TRAINING


class TaskAccuracy(PhaseCallback):
    """Logs `val/greedy/<source>` and `val/avg@k/<source>`, writes `accuracy.json`, prints a table at the end.

    Args:
        tasks: .jsonl files of `nb_lightning.rewards.tasks.Task`.
        k: completions sampled for each task.
        limit: use only the first `limit` tasks of each file.
        temperature, top_p: of the sampled completions.
        max_new_tokens: of the sampled and the greedy completions.
        seed: of the sampled completions; the same after every phase.
    """

    def __init__(
        self,
        tasks: list[str],
        k: int = 8,
        limit: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        self.files, self.k, self.limit, self.seed = list(tasks), k, limit, seed
        self.greedy = Sampling(max_new_tokens, temperature=0.0)
        self.sampled = Sampling(max_new_tokens, temperature, top_p=top_p)
        self._prompts: list[Prompt] = []
        self._sampler: RolloutSampler | None = None  # None without tasks

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        if tasks := [task for file in self.files for task in read_tasks(file)[: self.limit]]:
            data = module.data
            policy = in_training(module.model, data.tokenizer, data.chat, module.cfg.run_name)
            self._sampler = RolloutSampler(policy, get_verifiers(tasks), self.sampled, self.k)
            self._prompts = self._sampler.encode(tasks, self.seed)
        if module.tokens_seen == 0:
            self._measure(trainer, module, BEFORE_TRAINING)

    def on_phase_end(self, trainer: pl.Trainer, module: StageModule, phase: Phase) -> None:
        self._measure(trainer, module, phase.name)

    def on_train_end(self, trainer: pl.Trainer, module: StageModule) -> None:
        if trainer.is_global_zero:  # not `module.print`: the progress bar that would show it is closed by now
            print(table(read_json(Path(trainer.default_root_dir) / ACCURACY, {})))

    def _measure(self, trainer: pl.Trainer, module: StageModule, when: str) -> None:
        """Measure on all ranks together; rank 0 writes and logs the results."""
        if self._sampler is None:
            return
        greedy = self._report(replace(self._sampler, sampling=self.greedy, k=1)).summary()
        sampled = self._report(self._sampler)
        if not trainer.is_global_zero:
            return
        sources = {
            name: {
                "tasks": numbers["tasks"],
                "greedy": greedy[name]["mean"],
                f"avg@{self.k}": numbers["mean"],
                "interval": numbers["interval"],
                "truncated": numbers["truncated"],
                "each": [attempts.mean_reward for attempts in sampled.by_source()[name]],  # for paired comparisons
            }
            for name, numbers in sampled.summary().items()
        }
        path = Path(trainer.default_root_dir) / ACCURACY
        earlier = read_json(path, {}) if when != BEFORE_TRAINING else {}
        write_json(path, {**earlier, when: {"tokens_seen": module.tokens_seen, "k": self.k, "sources": sources}})
        metrics: dict[str, Any] = {"tokens_seen": module.tokens_seen}
        for name, numbers in sources.items():
            metrics |= {f"val/{key}/{name}": numbers[key] for key in ("greedy", f"avg@{self.k}")}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _report(self, sampler: RolloutSampler) -> Report:
        return Report(sampler.sample_over_ranks(self._prompts), sampler.k)


def table(measured: dict[str, Any]) -> str:
    """Format the content of `accuracy.json`: sources down, phases across, greedy and avg@k in percent."""
    if not measured:
        return ""
    k = next(iter(measured.values()))["k"]
    head = f"{'held-out tasks right, in %':<28}" + "".join(f"{when.replace('_', ' '):>24}" for when in measured)
    lines = [head, f"{'':<28}" + f"{'greedy':>12}{f'avg@{k}':>12}" * len(measured)]
    for name in next(iter(measured.values()))["sources"]:
        cells = (entry["sources"][name] for entry in measured.values())
        lines.append(f"{name:<28}" + "".join(f"{100 * c['greedy']:>12.1f}{100 * c[f'avg@{k}']:>12.1f}" for c in cells))
    return "\n".join(lines)
