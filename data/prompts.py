"""Prompts of RL: which tasks a step samples, a pure function of (seed, plan, step, what the filter kept).

A prompt with its group is to the mixture what a row is in other stages: `RowOrder` says which source the i-th is of and
the how-manieth of that source it is. What the on-policy filter keeps of a source is gone through in a shuffled order,
again and again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from data.base import PlannedData
from data.mixture import RowOrder, shuffled
from data.packed import chat_template
from nb_lightning.batch import RolloutStep
from nb_lightning.config.schema import Config, PromptDataConfig
from nb_lightning.files import sha256_of
from nb_lightning.phases import PhasePlan
from nb_lightning.rewards.tasks import Task, read_tasks
from nb_lightning.rollouts.attempts import Prompt
from nb_lightning.text.chat_tokens import ChatTokenizer

log = logging.getLogger(__name__)


class RolloutSteps(Dataset[RolloutStep]):
    """Item s is optimizer step s."""

    def __init__(self, plan: PhasePlan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.total_steps

    def __getitem__(self, step: int) -> RolloutStep:
        return RolloutStep(step, self.plan.phase_at(self.plan.tokens_at(step)).global_batch_tokens)


class PromptData(PlannedData):
    """Files of tasks.

    Attributes (after `open_sources`):
        tasks: source name -> its tasks.
        fitting_tasks: phase -> source -> ids of the tasks whose prompts leave room for a whole completion.
        selected_tasks: phase -> source -> ids of those that the phase draws from; all of them, where it is not there.
    """

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        self.chat = chat_template(self.tokenizer, self.settings.template)
        self.tasks: dict[str, dict[str, Task]] = {}
        self.fitting_tasks: dict[str, dict[str, list[str]]] = {}
        self.selected_tasks: dict[str, dict[str, list[str]]] = {}
        self._ids: dict[str, dict[str, list[int]]] = {}
        self._digests: dict[str, str] = {}

    @property
    def settings(self) -> PromptDataConfig:
        return self.cfg.data  # type: ignore[return-value]

    def build_demo(self) -> None:
        if self.settings.demo_tasks:
            from data.demo.tasks import build_demo_tasks

            build_demo_tasks(Path(self.cfg.paths.data_root) / "demo_tasks")

    def open_sources(self) -> None:
        """Read every source's tasks.

        Raises:
            ValueError: a file that cannot be read, by line; a task that the chat template refuses; or no prompt that a
                phase has room for.
        """
        self.build_demo()
        chat = ChatTokenizer(self.tokenizer, self.chat)
        for name, path in self.source_folders.items():
            try:
                tasks = read_tasks(path)
            except ValueError as error:
                raise ValueError(f"data.sources.{name}: {error}") from error
            self.tasks[name] = {task.id: task for task in tasks}
            self._digests[name] = sha256_of(Path(path))
            self._ids[name] = {}
            for task in tasks:
                try:
                    self._ids[name][task.id] = chat.prompt(task.messages)
                except ValueError as error:
                    raise ValueError(f"data.sources.{name}: task {task.id!r}: {error}") from error
        self.build_order()

    def build_order(self) -> None:
        group = self.cfg.stage.group_size
        streams: dict[Any, int] = {}
        for phase in self.plan.phases:
            for name in (name for name, weight in phase.mixture.items() if weight > 0):
                room = phase.seq_len - self.cfg.stage.max_new_tokens
                fitting = [task for task, ids in self._ids[name].items() if len(ids) <= room]
                if not fitting:
                    raise ValueError(
                        f"data.sources.{name}: none of its {len(self.tasks[name])} prompts leaves room for "
                        f"stage.max_new_tokens={self.cfg.stage.max_new_tokens} in a row of {phase.seq_len} tokens; "
                        f"raise stage.phases.{phase.name}.seq_len"
                    )
                self.fitting_tasks.setdefault(phase.name, {})[name] = fitting
                log.info("%s: %s: %s", phase.name, name, describe(len(fitting), len(self.tasks[name])))
                streams[name, phase.seq_len * group] = len(fitting) * phase.seq_len * group
        rows = PhasePlan(tuple(replace(phase, seq_len=phase.seq_len * group) for phase in self.plan.phases))
        self.order = RowOrder(rows, streams, self.cfg.seed)
        self.val_names = []

    def all_tasks(self) -> Iterable[Task]:
        return (task for tasks in self.tasks.values() for task in tasks.values())

    def draw(self, step: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """This rank's prompts of an optimizer step."""
        first, per_rank = self._place(step, rank, world_size)
        return [self._nth(i) for i in range(first, first + per_rank)]

    def draw_replacement(self, step: int, round: int, place: int, rank: int = 0, world_size: int = 1) -> Prompt:
        """A prompt of the same source instead of this rank's number `place` of the step; another one each round."""
        first, per_rank = self._place(step, rank, world_size)
        row = first + place
        phase, source, _ = self.order.turn(row)
        kept = self._kept(phase, source)
        whole = rank * per_rank + place + (round - 1) * per_rank * world_size
        order = shuffled(len(kept), self.cfg.seed, source, phase, "another", step)
        return self._prompt(source, kept[int(order[whole % len(kept)])], row, round)

    def _place(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        phase = self.order.plan.phase_at(self.order.plan.tokens_at(step))
        per_rank = phase.rows_per_step // world_size
        return self.order.first_row_of_step(step) + rank * per_rank, per_rank

    def _nth(self, row: int) -> Prompt:
        phase, source, drawn = self.order.turn(row)
        kept = self._kept(phase, source)
        repeat, nth = divmod(drawn, len(kept))
        order = shuffled(len(kept), self.cfg.seed, source, phase, "prompts", repeat)
        return self._prompt(source, kept[int(order[nth])], row, 0)

    def _kept(self, phase: int, source: str) -> list[str]:
        name = self.plan.phases[phase].name
        return self.selected_tasks.get(name, self.fitting_tasks[name])[source]

    def _prompt(self, source: str, task: str, row: int, round: int) -> Prompt:
        return Prompt(self.tasks[source][task], self._ids[source][task], (self.cfg.seed, row, round))

    @property
    def digests(self) -> dict[str, str]:
        """Of each source its file."""
        return self._digests

    def describe_sources(self) -> Mapping[str, Any]:
        return {name: {"tasks": len(tasks), "sha256": self._digests[name]} for name, tasks in self.tasks.items()}

    def steps(self, rank: int = 0, world_size: int = 1) -> Any:
        return RolloutSteps(self.plan)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return []


def describe(fitting: int, tasks: int) -> str:
    """How many prompts there are, and how many were left out."""
    left = f"; {tasks - fitting:,} too long, left out" if fitting < tasks else ""
    return f"{fitting:,} prompts{left}"
