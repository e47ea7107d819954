"""Optimizer steps as items of a dataset: each holds all that this rank contributes to one step.

The steps come in the run's one global order of rows (data/mixture.py), so training resumes at any of them.
"""

from __future__ import annotations

import atexit
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.mixture import Row, RowOrder
from nb_lightning.batch import PackedBatch, StepBatch


class RowReader(Protocol):
    """Reads the tokens of rows."""

    def read(self, rows: Sequence[Row]) -> PackedBatch:
        """Read rows of one context length into one micro-batch."""
        ...


class StepDataset(Dataset[StepBatch]):
    """Item s is all that this rank contributes to optimizer step s.

    Each rank takes a contiguous share of a step's rows, so their order over all ranks is the same for every world size.
    """

    def __init__(self, order: RowOrder, reader: RowReader, rank: int, world_size: int) -> None:
        self.order, self.reader, self.rank, self.world_size = order, reader, rank, world_size

    def __len__(self) -> int:
        return self.order.plan.total_steps

    def __getitem__(self, step: int) -> StepBatch:
        phase = self.order.plan.phase_at(self.order.plan.tokens_at(step))
        share = phase.rows_per_step // self.world_size
        first = self.order.first_row_of_step(step) + self.rank * share
        rows = [self.order.locate(i) for i in range(first, first + share)]
        size = phase.micro_batch_size
        micro_batches = [self.reader.read(rows[i : i + size]) for i in range(0, share, size)]
        return StepBatch(micro_batches, phase.global_batch_tokens, torch.arange(first, first + share))


class _StepsFrom(Sampler[int]):
    """Steps `start`, `start + 1`, ... Its length is that of the whole run, by which Lightning counts."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class StepLoader(DataLoader[Any]):
    """A DataLoader over the optimizer steps from `start` on.

    It needs no state to resume, because `start` follows from the clock (`tokens_seen`), which the stage restores. The
    empty state tells Lightning so.
    """

    def __init__(self, dataset: Any, start: int, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=None, sampler=_StepsFrom(start, len(dataset)), **kwargs)

    def __iter__(self) -> Any:
        steps = super().__iter__()
        if self.num_workers:
            atexit.register(_stop_workers, steps)  # runs before Python's own SIGTERM, which the workers ignore
        return steps

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def ignore_signals(worker: int) -> None:
    """Make a loader worker ignore SIGTERM and SIGINT.

    A scheduler signals every process of a run. The trainer then saves a checkpoint, and still needs its workers.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _stop_workers(steps: Any) -> None:
    steps._shutdown_workers()
    for worker in steps._workers:
        if worker.is_alive():
            worker.kill()


class HeldOut(Dataset[PackedBatch], ABC):
    """Validation rows in batches. Past the last one, batches repeat without labels: they count nothing.

    Args:
        n_rows: rows to validate on.
        batch_rows: rows of a batch.
    """

    def __init__(self, n_rows: int, batch_rows: int) -> None:
        self.n_rows, self.batch_rows = n_rows, batch_rows

    @abstractmethod
    def read(self, rows: Sequence[int]) -> PackedBatch:
        """Read rows by number, from 0 to `n_rows` - 1."""

    def __len__(self) -> int:
        return -(-self.n_rows // self.batch_rows)

    def __getitem__(self, i: int) -> PackedBatch:
        first = i % len(self) * self.batch_rows
        batch = self.read(range(first, min(first + self.batch_rows, self.n_rows)))
        return batch if i < len(self) else batch.silenced()
