"""SFT data: packed rows of conversations, of which the assistant's tokens are trained on.

A source's samples are packed once for each context length that a phase has (data/packing.py); its rows come in a new
shuffled order each time they have all been used. Which row comes i-th is `RowOrder`'s, as in pretraining.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.chats import template_digest
from data.loading import HeldOut, PlannedData
from data.mixture import Row, RowOrder, shuffled
from data.packing import OVER_LONG, Packing, pack, to_batch
from nb_lightning.batch import PackedBatch
from nb_lightning.chat import ChatTemplate
from nb_lightning.chat_tokens import ChatTokenizer
from nb_lightning.config import Config, SFTDataConfig
from nb_lightning.phases import PhasePlan
from nb_lightning.source import Source

log = logging.getLogger(__name__)


class PackedSource:
    """A source of conversations and its packings, by context length."""

    def __init__(self, name: str, source: Source, seq_lens: Sequence[int], over_long: str, seed: int) -> None:
        self.name, self.source, self.seed = name, source, seed
        samples = source.samples()
        self.ends = np.cumsum(samples[:, 0], dtype=np.int64)
        self.packings = {seq_len: pack(samples, seq_len, over_long, seed) for seq_len in seq_lens}

    def row(self, nth: int, seq_len: int) -> list[np.ndarray]:
        """The words of the pieces of the row that comes nth in the endless stream of rows."""
        packing = self.packings[seq_len]
        repeat, place = divmod(nth, packing.rows)
        r = int(shuffled(packing.rows, self.seed, self.name, seq_len, "rows", repeat)[place])
        pieces = packing.members[packing.starts[r] : packing.starts[r + 1]]
        return [self._words(packing, int(piece)) for piece in pieces]

    def _words(self, packing: Packing, piece: int) -> np.ndarray:
        sample, start = int(packing.pieces.sample[piece]), int(packing.pieces.start[piece])
        begin = int(self.ends[sample - 1]) if sample else 0
        return self.source.read_on(begin + start, int(packing.pieces.length[piece]) + 1)


class PackedRows:
    """Reads rows of packed sources."""

    def __init__(self, sources: Mapping[str, PackedSource], pad_id: int) -> None:
        self.sources, self.pad_id = sources, pad_id

    def batch(self, rows: Sequence[Row]) -> PackedBatch:
        seq_len = rows[0].seq_len
        words = [self.sources[row.source].row(row.start // seq_len, seq_len) for row in rows]
        return to_batch(words, seq_len, self.pad_id)


class HeldOutChats(HeldOut):
    """Rows of a packed validation split."""

    def __init__(self, source: PackedSource, seq_len: int, rows: int, batch_rows: int, pad_id: int) -> None:
        super().__init__(min(rows, source.packings[seq_len].rows), batch_rows)
        self.source, self.seq_len, self.pad_id = source, seq_len, pad_id

    def read(self, rows: Sequence[int]) -> PackedBatch:
        return to_batch([self.source.row(r, self.seq_len) for r in rows], self.seq_len, self.pad_id)


class SFTData(PlannedData):
    """Sources of conversations.

    Attributes (after `prepare`):
        packed: source name -> its packings.
        chat: the template that they were written with.
    """

    packed: dict[str, PackedSource]

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        data = self._settings
        if data.over_long not in OVER_LONG:
            raise ValueError(f"data.over_long is {data.over_long!r}; allowed: {', '.join(OVER_LONG)}")
        if not data.mask_documents:
            raise ValueError("data.mask_documents=false: samples in a row must not see one another; SFT needs true")
        self.chat: ChatTemplate = ChatTokenizer.of(self.tokenizer, read_template(data.template)).template

    @property
    def _settings(self) -> SFTDataConfig:
        return self.cfg.data  # type: ignore[return-value]

    def build_demo(self) -> None:
        if self._settings.demo_tasks:
            from data.demo.chats import build_demo_chats

            build_demo_chats(
                Path(self.cfg.paths.data_root) / "demo_tasks",
                {name: Path(path) for name, path in self.used.items()},
                self._settings.tokenizer,
                self.chat.source,
            )

    def check(self, key: str, source: Source, split: str) -> None:
        if not source.manifest.is_chat:
            raise ValueError(f"{key}: {source.folder} holds documents; data.prepare --chat makes conversations")
        if source.manifest.template != template_digest(self.chat):
            raise ValueError(
                f"{key}: {source.folder} was prepared with another chat template than "
                f"{self._settings.template or 'that of data.tokenizer'}; prepare it again or name its template in "
                "data.template"
            )

    def set_up(self) -> None:
        first = self.plan.phases[0].seq_len
        self.packed = {}
        self._val: dict[str, PackedSource] = {}
        sizes: dict[tuple[str, int], int] = {}
        for name, source in self.train.items():
            seq_lens = sorted({phase.seq_len for phase in self.plan.phases if phase.mixture.get(name, 0) > 0})
            self.packed[name] = self._pack(name, source, seq_lens)
            self._val[name] = self._pack(name, self.val[name], [first])
            for seq_len, packing in self.packed[name].packings.items():
                sizes[name, seq_len] = packing.rows * seq_len
                log.info(describe(name, packing, len(self.packed[name].ends)))
        self.order = RowOrder(self.plan, sizes, self.cfg.seed)
        self.rows = PackedRows(self.packed, self.tokenizer.eos_id)

    def _pack(self, name: str, source: Source, seq_lens: Sequence[int]) -> PackedSource:
        packed = PackedSource(name, source, seq_lens, self._settings.over_long, self.cfg.seed)
        for seq_len, packing in packed.packings.items():
            if not packing.rows:
                raise ValueError(
                    f"data.sources.{name}: {source.folder} has no sample for a row of {seq_len} tokens; raise seq_len, "
                    "or set data.over_long=split"
                )
        return packed

    def held_out(self, name: str) -> HeldOutChats:
        phase = self.plan.phases[0]  # the same rows and context all through, so that curves can be compared
        rows = self._settings.val_rows
        return HeldOutChats(self._val[name], phase.seq_len, rows, phase.micro_batch_size, self.tokenizer.eos_id)

    @property
    def digests(self) -> dict[str, str]:
        """Of each source, its training data and what is done with it: with another one, other rows come."""
        how = self._settings.over_long
        return {name: hashlib.sha256(f"{how} {sha}".encode()).hexdigest() for name, sha in super().digests.items()}


def read_template(path: str | None) -> str | None:
    """Jinja source of `data.template`.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return None if path is None else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.template={path} cannot be read: {error}") from error


def describe(name: str, packing: Packing, samples: int) -> str:
    """One line on a packing: what a pass over the source is, and what was left out."""
    pieces = packing.pieces
    line = f"{name}: {samples:,} samples in {packing.rows:,} rows of {packing.seq_len:,}, {packing.fill:.1%} full"
    line += f" (one pass: {packing.rows * packing.seq_len:,} tokens)"
    if pieces.dropped:
        line += f"; {pieces.dropped:,} over-long dropped"
    return line + (f"; {pieces.cut:,} over-long cut" if pieces.cut else "")
