"""What the data of all stages shares: whole optimizer steps in the run's one global order, resumable at any of them.

A stage's data says what a row is (`Rows`), what is held out (`HeldOut`) and what its sources must fulfil.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.mixture import Row, RowOrder
from nb_lightning.batch import PackedBatch, StepBatch
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.config.schema import Config
from nb_lightning.phases import PhasePlan
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.token_source import Source

WORKER_TIMEOUT_S = 300  # a worker that stopped answering is an error, not a hang


class Rows(Protocol):
    """Reads rows."""

    def batch(self, rows: Sequence[Row]) -> PackedBatch:
        """One micro-batch of rows of one context length."""


class StepDataset(Dataset[StepBatch]):
    """Item s is everything this rank contributes to optimizer step s.

    A step's rows are dealt in contiguous shares, so their order over all ranks is the same for every world size.
    """

    def __init__(self, order: RowOrder, rows: Rows, rank: int, world_size: int) -> None:
        self.order, self.rows, self.rank, self.world_size = order, rows, rank, world_size

    def __len__(self) -> int:
        return self.order.plan.total_steps

    def __getitem__(self, step: int) -> StepBatch:
        phase = self.order.plan.phase_at(self.order.plan.tokens_at(step))
        share = phase.rows_per_step // self.world_size
        first = self.order.first_row_of_step(step) + self.rank * share
        located = [self.order.locate(i) for i in range(first, first + share)]
        size = phase.micro_batch_size
        micro_batches = [self.rows.batch(located[i : i + size]) for i in range(0, share, size)]
        return StepBatch(micro_batches, phase.global_batch_tokens, torch.arange(first, first + share))


class _StepsFrom(Sampler[int]):
    """Steps `start`, `start + 1`, ... The length is the whole run's: Lightning counts all its steps."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class StepLoader(DataLoader[Any]):
    """A DataLoader over optimizer steps from `start` on.

    It is resumable by construction: its place is the clock's (`tokens_seen`), which the stage restores. The empty
    state tells Lightning so.
    """

    def __init__(self, dataset: Any, start: int, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=None, sampler=_StepsFrom(start, len(dataset)), **kwargs)

    def __iter__(self) -> Any:
        steps = super().__iter__()
        if self.num_workers:
            atexit.register(_stop_workers, steps)  # runs before Python's own SIGTERM to them, which they do not hear
        return steps

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A scheduler signals every process; a worker that died of it would take the step being saved with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _stop_workers(steps: Any) -> None:
    steps._shutdown_workers()
    for worker in steps._workers:
        if worker.is_alive():
            worker.kill()


class HeldOut(Dataset[PackedBatch]):
    """Rows to validate on, in batches; past the last come batches that count nothing."""

    def __init__(self, rows: int, batch_rows: int) -> None:
        self.rows, self.batch_rows = rows, batch_rows

    def read(self, rows: Sequence[int]) -> PackedBatch:
        """Some of the rows, by number."""
        raise NotImplementedError

    def __len__(self) -> int:
        return -(-self.rows // self.batch_rows)

    def __getitem__(self, i: int) -> PackedBatch:
        first = i % len(self) * self.batch_rows
        batch = self.read(range(first, min(first + self.batch_rows, self.rows)))
        return batch if i < len(self) else batch.silenced()


class PlannedData(pl.LightningDataModule):
    """Sources, their mixture over the plan, and held-out rows of each source.

    Attributes (after `open_sources`):
        train, val: source name -> `Source`.
        order: the global order of rows.
        rows: reads them.
        val_names: source of each validation loader.
        chat: the chat template, where the stage has one.
    """

    order: RowOrder
    rows: Rows
    chat: Any = None

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__()
        self.cfg, self.plan = cfg, plan
        self.tokenizer: TextTokenizer = load_tokenizer(cfg.data.tokenizer)
        self.train: dict[str, Source] = {}
        self.val: dict[str, Source] = {}

    # What a stage's data defines ------------------------------------------------------------------------------------

    def build_demo(self) -> None:
        """Make the embedded demo's sources where they are asked for and missing."""

    def require_usable(self, key: str, source: Source, split: str) -> None:
        """Raise `ValueError` beginning with `key` unless the source fits the stage."""

    def build_order(self) -> None:
        """Set `order` and `rows`, with all sources open."""
        raise NotImplementedError

    def held_out(self, name: str) -> HeldOut:
        """The rows of a source's validation split."""
        raise NotImplementedError

    # What they share ------------------------------------------------------------------------------------------------

    @property
    def source_folders(self) -> dict[str, str]:
        """Folder of each source that some phase draws from."""
        drawn = {name for phase in self.plan.phases for name, weight in phase.mixture.items() if weight > 0}
        return {name: path for name, path in self.cfg.data.sources.items() if name in drawn}

    def open_sources(self) -> None:
        """Build the demo's sources if asked for, open every source and check that they fit the run.

        Raises:
            ValueError: missing or damaged data, another tokenizer, a vocabulary larger than the model's, or a source
                that the stage cannot train or validate on.
        """
        self.build_demo()
        for name, folder in self.source_folders.items():
            for split, opened in (("train", self.train), ("val", self.val)):
                source = opened[name] = Source(f"{folder}/{split}", self.cfg.data.verify)
                key, manifest = f"data.sources.{name}", source.manifest
                if manifest.tokenizer != self.tokenizer.digest:
                    raise ValueError(
                        f"{key}: {source.folder} was tokenized with another tokenizer than "
                        f"data.tokenizer={self.cfg.data.tokenizer}; prepare it again or name its tokenizer"
                    )
                if manifest.vocab_size > self.cfg.model.vocab_size:
                    raise ValueError(
                        f"{key}: token ids go up to {manifest.vocab_size - 1}, but model.vocab_size is "
                        f"{self.cfg.model.vocab_size}"
                    )
                self.require_usable(key, source, split)
        self.build_order()
        self.val_names = list(self.val)

    @property
    def digests(self) -> dict[str, str]:
        """Hash of the training data of each source."""
        return {name: source.manifest.digest for name, source in self.train.items()}

    def describe_sources(self) -> Mapping[str, Any]:
        """Of each source, what a run's manifest says of it."""
        return {
            name: {"tokens": source.tokens, "documents": source.manifest.documents, "sha256": source.manifest.digest}
            for name, source in self.train.items()
        }

    def steps(self, rank: int = 0, world_size: int = 1) -> Dataset[Any]:
        """Item s is what this rank does in optimizer step s."""
        return StepDataset(self.order, self.rows, rank, world_size)

    def train_dataloader(self) -> StepLoader:
        assert self.trainer is not None
        start = self.plan.step_at(self.trainer.lightning_module.tokens_seen)
        dataset = self.steps(self.trainer.global_rank, self.trainer.world_size)
        workers = min(self.cfg.data.workers, os.cpu_count() or 1)
        extra: dict[str, Any] = {}
        if workers:
            extra = {"prefetch_factor": 4, "timeout": WORKER_TIMEOUT_S, "worker_init_fn": _leave_signals_to_the_trainer}
        return StepLoader(dataset, start, num_workers=workers, pin_memory=torch.cuda.is_available(), **extra)

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        assert self.trainer is not None
        loaders = []
        for name in self.val_names:
            held_out = self.held_out(name)
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            # Every rank runs as many batches as the others: under FSDP a forward is a collective.
            share = range(rank, -(-len(held_out) // world_size) * world_size, world_size)
            loaders.append(DataLoader(held_out, batch_size=None, sampler=list(share)))
        return loaders
