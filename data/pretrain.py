"""Pretraining data: rows of tokenized documents. A row is a stretch of a source's endless token stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from data.base import TokenizedData
from data.mixture import Row, RowOrder, Stream, TokenStream
from data.steps import HeldOut
from nb_lightning.batch import PackedBatch
from nb_lightning.config.schema import DataConfig
from nb_lightning.token_source import Source


class StreamReader:
    """Reads rows of token streams.

    Args:
        eos_id: attention and positions restart after each of these tokens; None lets them run on.
    """

    def __init__(self, streams: Mapping[str, TokenStream], eos_id: int | None) -> None:
        self.streams, self.eos_id = streams, eos_id

    def read(self, rows: Sequence[Row]) -> PackedBatch:
        # One token more than the row is long: the last label.
        tokens = [self.streams[row.source].read(row.start, row.seq_len + 1) for row in rows]
        return PackedBatch.from_rows(torch.from_numpy(np.stack(tokens)), self.eos_id)


class HeldOutText(HeldOut):
    """Rows spread evenly over a held-out split."""

    def __init__(self, source: Source, seq_len: int, rows: int, batch_rows: int, eos_id: int | None) -> None:
        super().__init__(min(rows, (source.tokens - 1) // seq_len), batch_rows)
        self.stream = TokenStream("val", source, seed=0)
        self.seq_len, self.eos_id = seq_len, eos_id
        self.stride = (source.tokens - 1 - seq_len) // max(self.n_rows - 1, 1)

    def read(self, rows: Sequence[int]) -> PackedBatch:
        tokens = np.stack([self.stream.read(r * self.stride, self.seq_len + 1) for r in rows])
        return PackedBatch.from_rows(torch.from_numpy(tokens), self.eos_id)


class PretrainData(TokenizedData[DataConfig]):
    """Sources of documents."""

    def build_demo(self) -> None:
        if self.settings.demo_corpus:
            from data.demo import build_demo_corpus

            build_demo_corpus({name: Path(path) for name, path in self.source_folders.items()})

    def require_usable(self, key: str, source: Source, split: str) -> None:
        if source.manifest.is_chat:
            raise ValueError(f"{key}: {source.folder} holds conversations; stage=sft trains on them")
        longest = max(phase.seq_len for phase in self.plan.phases)
        if split == "train" and source.tokens <= longest:
            raise ValueError(f"{key}: {source.folder} has {source.tokens} tokens, less than a row of {longest}")
        if split == "val" and source.tokens <= self.plan.phases[0].seq_len:
            raise ValueError(f"{key}: {source.folder} has {source.tokens} tokens, too few to validate on")

    def build_order(self) -> None:
        sizes: dict[Stream, int] = {name: source.tokens for name, source in self.train.items()}
        self.order = RowOrder(self.plan, sizes, self.cfg.seed)
        streams = {name: TokenStream(name, source, self.cfg.seed) for name, source in self.train.items()}
        self.reader = StreamReader(streams, self._eos_id)

    def held_out(self, name: str) -> HeldOutText:
        phase = self.plan.phases[0]  # the same rows and context in every phase, so that curves can be compared
        rows = self.settings.val_rows
        return HeldOutText(self.val[name], phase.seq_len, rows, phase.micro_batch_size, self._eos_id)

    @property
    def _eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.settings.mask_documents else None
