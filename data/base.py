"""The base of every stage's data: sources, their mixture over the plan, and the loaders.

A stage's data module subclasses `PlannedData` (RL's prompts) or `TokenizedData` (all others).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from data.mixture import RowOrder
from data.steps import HeldOut, RowReader, StepDataset, StepLoader, ignore_signals
from nb_lightning.batch import PackedBatch
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.config.schema import Config, DataConfig
from nb_lightning.phase_callback import StageModule
from nb_lightning.phases import PhasePlan
from nb_lightning.text.chat_template import ChatTemplate
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.token_source import Source

DataSettings = TypeVar("DataSettings", bound=DataConfig)
WORKER_TIMEOUT_S = 300  # a worker that stopped answering is an error, not a hang


class PlannedData(pl.LightningDataModule, ABC, Generic[DataSettings]):
    """Sources, and the order in which the plan draws from them.

    train.py calls `open_sources` before there is a trainer, because it compares the digests with a checkpoint's. So
    Lightning's hooks `prepare_data` and `setup`, which `fit` would call, have nothing to do here.

    Attributes:
        settings: `cfg.data`, as the class of the stage's schema.
        order: the run's global order of rows; set by `open_sources`.
        val_names: source of each validation loader; set by `open_sources`.
        chat: the chat template; None where the stage has none.
    """

    order: RowOrder
    val_names: list[str]
    chat: ChatTemplate | None = None

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__()
        self.cfg, self.plan = cfg, plan
        self.settings = cast(DataSettings, cfg.data)  # conf/ gives each stage the data of its schema
        self.tokenizer: TextTokenizer = load_tokenizer(cfg.data.tokenizer)

    def build_demo(self) -> None:
        """Build the demo's sources if the config asks for them and they are missing."""

    @abstractmethod
    def open_sources(self) -> None:
        """Build the demo's sources, open all sources, require that the run can use them, and set `order`."""

    @property
    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Hash of each source: a run that resumes requires the same."""

    @abstractmethod
    def describe_sources(self) -> Mapping[str, Any]:
        """Describe each source for the run's manifest."""

    @abstractmethod
    def steps(self, rank: int = 0, world_size: int = 1) -> Dataset[Any]:
        """Return a dataset whose item s is what this rank does in optimizer step s."""

    @property
    def source_folders(self) -> dict[str, str]:
        """Folder or file of each source that some phase draws from."""
        drawn = {name for phase in self.plan.phases for name, weight in phase.mixture.items() if weight > 0}
        return {name: path for name, path in self.cfg.data.sources.items() if name in drawn}

    def train_dataloader(self) -> StepLoader:
        assert self.trainer is not None
        start = self.plan.step_at(cast(StageModule, self.trainer.lightning_module).tokens_seen)
        dataset = self.steps(self.trainer.global_rank, self.trainer.world_size)
        workers = min(self.cfg.data.workers, os.cpu_count() or 1)
        extra: dict[str, Any] = {}
        if workers:
            extra = {"prefetch_factor": 4, "timeout": WORKER_TIMEOUT_S, "worker_init_fn": ignore_signals}
        return StepLoader(dataset, start, num_workers=workers, pin_memory=torch.cuda.is_available(), **extra)


class TokenizedData(PlannedData[DataSettings]):
    """Tokenized sources, each with a training and a held-out split.

    Attributes (after `open_sources`):
        train, val: source name -> its `Source`.
        reader: reads the rows of `order`.
    """

    reader: RowReader

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        self.train: dict[str, Source] = {}
        self.val: dict[str, Source] = {}

    @abstractmethod
    def require_usable(self, key: str, source: Source, split: str) -> None:
        """Raise `ValueError` beginning with `key` unless the stage can use the split."""

    @abstractmethod
    def build_order(self) -> None:
        """Set `order` and `reader`, with all sources open."""

    @abstractmethod
    def held_out(self, name: str) -> HeldOut:
        """Return the rows of a source's held-out split."""

    def open_sources(self) -> None:
        """Build the demo's sources, open all sources, require that the run can use them, and set `order`.

        Raises:
            ValueError: data is missing or damaged, made with another tokenizer, has more tokens than the model's
                vocabulary, or is of a kind that the stage cannot use.
        """
        self.build_demo()
        for name, folder in self.source_folders.items():
            for split, sources in (("train", self.train), ("val", self.val)):
                source = sources[name] = Source(f"{folder}/{split}", self.cfg.data.verify)
                key = f"data.sources.{name}"
                self._require_vocabulary(key, source)
                self.require_usable(key, source, split)
        self.build_order()
        self.val_names = list(self.val)

    def _require_vocabulary(self, key: str, source: Source) -> None:
        manifest = source.manifest
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

    @property
    def digests(self) -> dict[str, str]:
        """Hash of each source's training data."""
        return {name: source.manifest.digest for name, source in self.train.items()}

    def describe_sources(self) -> Mapping[str, Any]:
        """Describe each source's training split: tokens, documents and hash."""
        return {
            name: {"tokens": source.tokens, "documents": source.manifest.documents, "sha256": source.manifest.digest}
            for name, source in self.train.items()
        }

    def steps(self, rank: int = 0, world_size: int = 1) -> Dataset[Any]:
        return StepDataset(self.order, self.reader, rank, world_size)

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
