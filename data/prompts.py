"""Prompts of RL: the tasks that a step samples, a pure function of (seed, plan, step, selected tasks).

A prompt with its group of completions takes the place of a row: `RowOrder` (data/mixture.py) maps prompt i to its
source and to its index within that source. The tasks that the on-policy filter selected from a source are drawn in a
shuffled order, then in another one, and so on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from data.base import PlannedData
from data.mixture import RowOrder, Stream, shuffled
from data.packed import chat_template
from nb_lightning.batch import RolloutStep
from nb_lightning.config.schema import Config, PromptDataConfig, RLConfig
from nb_lightning.files import sha256_of
from nb_lightning.phases import PhasePlan
from nb_lightning.rewards.tasks import Task, read_tasks
from nb_lightning.rollouts.attempts import Prompt
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.chat_tokens import ChatTokenizer

log = logging.getLogger(__name__)


class RolloutSteps(Dataset[RolloutStep]):
    """Item s tells the stage to roll out optimizer step s; the stage draws the prompts itself."""

    def __init__(self, plan: PhasePlan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.total_steps

    def __getitem__(self, step: int) -> RolloutStep:
        return RolloutStep(step, self.plan.phase_at(self.plan.tokens_at(step)).global_batch_tokens)


class PromptData(PlannedData[PromptDataConfig]):
    """Files of tasks.

    Attributes (after `open_sources`):
        tasks: source name -> task id -> task.
        fitting_tasks: phase name -> source name -> ids of the tasks whose prompts leave room for a whole completion.
        selected_tasks: phase name -> source name -> ids of the tasks to draw. A callback sets it; a phase that it lacks
            draws all that fit.
    """

    chat: ChatTemplate

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        self.chat = chat_template(self.tokenizer, self.settings)
        self.tasks: dict[str, dict[str, Task]] = {}
        self.fitting_tasks: dict[str, dict[str, list[str]]] = {}
        self.selected_tasks: dict[str, dict[str, list[str]]] = {}
        self._prompt_ids: dict[str, dict[str, list[int]]] = {}  # source name -> task id -> tokens
        self._digests: dict[str, str] = {}

    def build_demo(self) -> None:
        if self.settings.demo_tasks:
            from data.demo.tasks import build_demo_tasks

            build_demo_tasks(Path(self.cfg.paths.data_root) / "demo_tasks")

    def open_sources(self) -> None:
        """Build the demo's tasks, read every source's tasks, and set `order`.

        Raises:
            ValueError: a file cannot be read (names the line), the chat template refuses a task, or a phase has room
                for no prompt of a source.
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
            self._prompt_ids[name] = {}
            for task in tasks:
                try:
                    self._prompt_ids[name][task.id] = chat.prompt(task.messages, task.tools, require_tools=True)
                except ValueError as error:
                    raise ValueError(f"data.sources.{name}: task {task.id!r}: {error}") from error
        self._build_order()
        self.val_names = []  # RL validates on tasks, by a callback

    def _build_order(self) -> None:
        """Set `fitting_tasks` and `order`, in which a prompt counts as a row of all tokens of its group."""
        stage = self.cfg.stage
        assert isinstance(stage, RLConfig)
        sizes: dict[Stream, int] = {}  # tokens of a pass over each source
        for phase in self.plan.phases:
            room = phase.seq_len - stage.max_new_tokens
            for name in (name for name, weight in phase.mixture.items() if weight > 0):
                fitting = [task for task, ids in self._prompt_ids[name].items() if len(ids) <= room]
                if not fitting:
                    raise ValueError(
                        f"data.sources.{name}: none of its {len(self.tasks[name])} prompts leaves room for "
                        f"stage.max_new_tokens={stage.max_new_tokens} in a row of {phase.seq_len} tokens; "
                        f"raise stage.phases.{phase.name}.seq_len"
                    )
                self.fitting_tasks.setdefault(phase.name, {})[name] = fitting
                log.info("%s: %s: %s", phase.name, name, describe_prompts(len(fitting), len(self.tasks[name])))
                group_tokens = phase.seq_len * stage.group_size
                sizes[name, group_tokens] = len(fitting) * group_tokens
        phases = tuple(replace(phase, seq_len=phase.seq_len * stage.group_size) for phase in self.plan.phases)
        self.order = RowOrder(PhasePlan(phases), sizes, self.cfg.seed)

    def all_tasks(self) -> Iterable[Task]:
        """Iterate over the tasks of all sources."""
        return (task for tasks in self.tasks.values() for task in tasks.values())

    def draw(self, step: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Draw this rank's prompts of an optimizer step."""
        first, per_rank = self._share_of(step, rank, world_size)
        return [self._draw_row(row) for row in range(first, first + per_rank)]

    def draw_replacement(self, step: int, round: int, place: int, rank: int = 0, world_size: int = 1) -> Prompt:
        """Draw another prompt of the same source instead of one of this rank's prompts of a step.

        Args:
            round: from 1; each round draws a new prompt.
            place: index of the prompt to replace in `draw(step, rank, world_size)`.
        """
        first, per_rank = self._share_of(step, rank, world_size)
        row = first + place
        phase, source, _ = self.order.turn(row)
        tasks = self._tasks_of(phase, source)
        nth = rank * per_rank + place + (round - 1) * per_rank * world_size  # over all ranks and rounds
        order = shuffled(len(tasks), self.cfg.seed, source, phase, "another", step)
        return self._prompt(source, tasks[int(order[nth % len(tasks)])], row, round)

    def _share_of(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Return the first row of a rank's share of a step, and the number of its rows."""
        phase = self.order.plan.phase_at(self.order.plan.tokens_at(step))
        per_rank = phase.rows_per_step // world_size
        return self.order.first_row_of_step(step) + rank * per_rank, per_rank

    def _draw_row(self, row: int) -> Prompt:
        phase, source, drawn = self.order.turn(row)
        tasks = self._tasks_of(phase, source)
        repeat, nth = divmod(drawn, len(tasks))
        order = shuffled(len(tasks), self.cfg.seed, source, phase, "prompts", repeat)
        return self._prompt(source, tasks[int(order[nth])], row, 0)

    def _tasks_of(self, phase: int, source: str) -> list[str]:
        """Return the ids of the tasks that a phase draws from a source."""
        name = self.plan.phases[phase].name
        return self.selected_tasks.get(name, self.fitting_tasks[name])[source]

    def _prompt(self, source: str, task: str, row: int, round: int) -> Prompt:
        return Prompt(self.tasks[source][task], self._prompt_ids[source][task], (self.cfg.seed, row, round))

    @property
    def digests(self) -> dict[str, str]:
        """Hash of each source's file, and of the template's variables, which change its prompts."""
        if not self.chat.variables:
            return self._digests
        variables = json.dumps(self.chat.variables, sort_keys=True)
        texts = {name: f"{variables} {digest}" for name, digest in self._digests.items()}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}

    def describe_sources(self) -> Mapping[str, Any]:
        """Describe each source: number of tasks and hash."""
        return {name: {"tasks": len(tasks), "sha256": self._digests[name]} for name, tasks in self.tasks.items()}

    def steps(self, rank: int = 0, world_size: int = 1) -> RolloutSteps:
        return RolloutSteps(self.plan)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return []


def describe_prompts(fitting: int, tasks: int) -> str:
    """Describe how many prompts there are, and how many are left out."""
    left_out = f"; {tasks - fitting:,} too long, left out" if fitting < tasks else ""
    return f"{fitting:,} prompts{left_out}"
