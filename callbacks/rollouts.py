"""Write completions with their rewards to `rollouts.jsonl` and TensorBoard (RL)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from nb_lightning.batch import RolloutStep
from nb_lightning.files import write_text
from nb_lightning.phase_callback import StageModule
from nb_lightning.rollouts.groups import Group
from nb_lightning.rollouts.policy import PolicyModule
from nb_lightning.run_folder import ROLLOUTS


class RolloutSamples(pl.Callback):
    """Writes the first groups of every `every_n_steps`-th step on rank 0.

    Args:
        every_n_steps: optimizer steps.
        groups: the number of groups of a step.
        completions: the number of completions of a group.
    """

    def __init__(self, every_n_steps: int = 10, groups: int = 2, completions: int = 4) -> None:
        self.every_n_steps, self.groups, self.completions = every_n_steps, groups, completions

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Drop the lines of steps that a resumed run repeats."""
        path = Path(trainer.default_root_dir) / ROLLOUTS
        if trainer.is_global_zero and path.is_file():
            # A kill may have torn the last line. Not `splitlines`: texts have characters that it takes for line ends.
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            earlier = [line for line in lines if json.loads(line)["clock"] < module.tokens_seen]
            write_text(path, "".join(f"{line}\n" for line in earlier))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: PolicyModule, outputs: Any, batch: RolloutStep, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or batch.number % self.every_n_steps:
            return
        clock = module.tokens_seen - batch.tokens
        lines = [line for group in module.groups[: self.groups] for line in self._lines(group, clock, batch.number)]
        with open(Path(trainer.default_root_dir) / ROLLOUTS, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("rollouts", "\n\n".join(map(_markdown, lines)), batch.number)

    def _lines(self, group: Group, clock: int, step: int) -> list[dict[str, Any]]:
        attempts = group.attempts
        return [
            {
                "clock": clock,
                "step": step,
                "source": attempts.task.source,
                "task": attempts.task.id,
                "prompt": attempts.task.question,
                "completion": text,
                "reward": score.reward,
                "status": score.info["status"],
                "finish_reason": reason,
            }
            for text, score, reason in zip(attempts.texts, attempts.scores, attempts.finish_reasons)
        ][: self.completions]


def _markdown(line: dict[str, Any]) -> str:
    def quoted(text: str) -> str:
        return "\n".join(f"    {row}" for row in text.splitlines())

    head = f"**{line['task']}**, reward {line['reward']:g} ({line['status']})"
    return "\n\n".join((head, quoted(line["prompt"]), quoted(line["completion"])))
