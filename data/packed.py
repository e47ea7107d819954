"""Packed rows of samples under the plan: what the data of SFT and of preferences share.

A source's samples are packed once for each context length that a phase has (data/bin_packing.py); its rows come in a
new shuffled order each time they have all been used. Which row comes i-th is `RowOrder`'s, as in pretraining.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data.base import HeldOut, PlannedData
from data.bin_packing import Packing, pack_samples
from data.mixture import Row, RowOrder, shuffled
from data.prepare.chats import template_digest
from nb_lightning.batch import PackedBatch
from nb_lightning.config.schema import ChatDataConfig, Config
from nb_lightning.phases import PhasePlan
from nb_lightning.text.chat_template import ChatTemplate, read_template
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.token_source import Source

log = logging.getLogger(__name__)


class PackedSource:
    """A source of conversations and its packings, by context length."""

    unit = "samples"

    def __init__(self, name: str, source: Source, seq_lens: Sequence[int], over_long: str, seed: int) -> None:
        self.name, self.source, self.seed = name, source, seed
        samples = source.samples()
        self.ends = np.cumsum(samples[:, 0], dtype=np.int64)
        self.packings = {seq_len: self._pack(samples, seq_len, over_long) for seq_len in seq_lens}

    def _pack(self, samples: np.ndarray, seq_len: int, over_long: str) -> Packing:
        return pack_samples(samples, seq_len, over_long, self.seed)

    def __len__(self) -> int:
        """How many there are to pack."""
        return len(self.ends)

    def pieces(self, nth: int, seq_len: int) -> np.ndarray:
        """Numbers of the pieces in the row that comes nth in the endless stream of rows."""
        packing = self.packings[seq_len]
        repeat, place = divmod(nth, packing.rows)
        r = int(shuffled(packing.rows, self.seed, self.name, seq_len, "rows", repeat)[place])
        return packing.members[packing.starts[r] : packing.starts[r + 1]]

    def row(self, nth: int, seq_len: int) -> list[np.ndarray]:
        """The words of that row's pieces, each one longer than its places."""
        pieces = self.packings[seq_len].pieces
        return [
            self.read(int(pieces.sample[i]), int(pieces.start[i]), int(pieces.length[i]))
            for i in self.pieces(nth, seq_len)
        ]

    def read(self, sample: int, start: int = 0, places: int | None = None) -> np.ndarray:
        """Words of a sample, for so many places from `start` on and the last one's label; by default all."""
        begin, end = (int(self.ends[sample - 1]) if sample else 0), int(self.ends[sample])
        return self.source.read_on(begin + start, end - begin - start if places is None else places + 1)


Assemble = Callable[[Sequence[tuple[Any, int]], int], PackedBatch]  # of (source, nth) rows of a length, one batch


class PackedRows:
    """Reads rows of packed sources."""

    def __init__(self, sources: Mapping[str, PackedSource], assemble: Assemble) -> None:
        self.sources, self.assemble = sources, assemble

    def batch(self, rows: Sequence[Row]) -> PackedBatch:
        seq_len = rows[0].seq_len
        return self.assemble([(self.sources[row.source], row.start // seq_len) for row in rows], seq_len)


class HeldOutRows(HeldOut):
    """Rows of a packed validation split."""

    def __init__(self, source: PackedSource, seq_len: int, rows: int, batch_rows: int, assemble: Assemble) -> None:
        super().__init__(min(rows, source.packings[seq_len].rows), batch_rows)
        self.source, self.seq_len, self.assemble = source, seq_len, assemble

    def read(self, rows: Sequence[int]) -> PackedBatch:
        return self.assemble([(self.source, r) for r in rows], self.seq_len)


class PackedData(PlannedData):
    """Sources that a chat template wrote, packed.

    Attributes (after `open_sources`):
        packed, packed_val: source name -> its packings, and those of what is held out.
        chat: the template that they were written with.
    """

    packed: dict[str, PackedSource]
    packed_val: dict[str, PackedSource]

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        if not cfg.data.mask_documents:
            raise ValueError(
                "data.mask_documents=false: samples in a row must not see one another; "
                f"stage={cfg.stage.name} needs true"
            )
        self.chat = chat_template(self.tokenizer, self.settings.template)

    @property
    def settings(self) -> ChatDataConfig:
        return self.cfg.data  # type: ignore[return-value]

    @property
    def template_digest(self) -> str:
        """Of tokenizer and template together: how text becomes tokens."""
        both = f"{self.tokenizer.digest} {template_digest(self.chat)}"
        return hashlib.sha256(both.encode()).hexdigest()

    # What a stage's data defines ------------------------------------------------------------------------------------

    assemble: Assemble

    def pack_source(self, name: str, source: Source, seq_lens: Sequence[int]) -> PackedSource:
        raise NotImplementedError

    # What they share ------------------------------------------------------------------------------------------------

    def require_usable(self, key: str, source: Source, split: str) -> None:
        if source.manifest.template != template_digest(self.chat):
            raise ValueError(
                f"{key}: {source.folder} was prepared with another chat template than "
                f"{self.settings.template or 'that of data.tokenizer'}; prepare it again or name its template in "
                "data.template"
            )

    def build_order(self) -> None:
        first = self.plan.phases[0].seq_len
        self.packed, self.packed_val = {}, {}
        sizes: dict[tuple[str, int], int] = {}
        for name, source in self.train.items():
            seq_lens = sorted({phase.seq_len for phase in self.plan.phases if phase.mixture.get(name, 0) > 0})
            self.packed[name] = self._packed(name, source, seq_lens)
            self.packed_val[name] = self._packed(name, self.val[name], [first])
            for seq_len, packing in self.packed[name].packings.items():
                sizes[name, seq_len] = packing.rows * seq_len
                log.info(describe(name, packing, len(self.packed[name]), self.packed[name].unit))
        self.order = RowOrder(self.plan, sizes, self.cfg.seed)
        self.rows = PackedRows(self.packed, self.assemble)

    def _packed(self, name: str, source: Source, seq_lens: Sequence[int]) -> PackedSource:
        packed = self.pack_source(name, source, seq_lens)
        for seq_len, packing in packed.packings.items():
            if not packing.rows:
                cut = ", or set data.over_long=split" if hasattr(self.settings, "over_long") else ""
                raise ValueError(
                    f"data.sources.{name}: {source.folder} has no {packed.unit.removesuffix('s')} for a row of "
                    f"{seq_len} tokens; raise seq_len{cut}"
                )
        return packed

    def held_out(self, name: str) -> HeldOutRows:
        phase = self.plan.phases[0]  # the same rows and context all through, so that curves can be compared
        rows, size = self.settings.val_rows, phase.micro_batch_size
        return HeldOutRows(self.packed_val[name], phase.seq_len, rows, size, self.assemble)


def chat_template(tokenizer: TextTokenizer, file: str | None) -> ChatTemplate:
    """Return the template in `file` (the key data.template), else the tokenizer's, else ChatML.

    Raises:
        ValueError: the file cannot be read.
    """
    source = None if file is None else read_template(file, f"data.template={file}")
    return ChatTokenizer.of(tokenizer, source).template


def describe(name: str, packing: Packing, number: int, unit: str = PackedSource.unit) -> str:
    """One line on a packing of so many samples or pairs: what a pass over the source is, and what was left out."""
    pieces = packing.pieces
    line = f"{name}: {number:,} {unit} in {packing.rows:,} rows of {packing.seq_len:,}, {packing.fill:.1%} full"
    line += f" (one pass: {packing.rows * packing.seq_len:,} tokens)"
    if pieces.dropped:
        line += f"; {pieces.dropped:,} over-long dropped"
    return line + (f"; {pieces.cut:,} over-long cut" if pieces.cut else "")
