"""Packed rows of samples under the plan: the common part of the data of SFT, preference pairs and the reward model.

A source's samples are packed once for each context length of the plan (data/bin_packing.py). Its rows are an endless
stream: all of them in a shuffled order, then all in another one. As in pretraining, `RowOrder` (data/mixture.py) draws
from the streams.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from data.base import TokenizedData
from data.bin_packing import Packing, pack_samples
from data.mixture import Row, RowOrder, Stream, shuffled
from data.prepare.chats import template_digest
from data.steps import HeldOut
from nb_lightning.batch import PackedBatch
from nb_lightning.config.schema import ChatDataConfig, Config
from nb_lightning.phases import PhasePlan
from nb_lightning.text.chat_template import ChatTemplate, read_template
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.text.variables import check_variables
from nb_lightning.token_source import Source

log = logging.getLogger(__name__)
ChatDataSettings = TypeVar("ChatDataSettings", bound=ChatDataConfig)


class PackedSource:
    """A split of samples, and its packing for each context length.

    Args:
        seq_lens: context lengths to pack for, in tokens.
        over_long: see `data.bin_packing.pack_samples`.
    """

    unit = "samples"  # what is packed, in messages

    def __init__(self, name: str, source: Source, seq_lens: Sequence[int], over_long: str, seed: int) -> None:
        self.name, self.source, self.seed = name, source, seed
        samples = source.samples()
        self.ends = np.cumsum(samples[:, 0], dtype=np.int64)  # [n] tokens up to the end of each sample
        self.packings = {seq_len: self._pack(samples, seq_len, over_long) for seq_len in seq_lens}

    def _pack(self, samples: np.ndarray, seq_len: int, over_long: str) -> Packing:
        return pack_samples(samples, seq_len, over_long, self.seed)

    def __len__(self) -> int:
        """Count what there is to pack, in `unit`."""
        return len(self.ends)

    def pieces_in_row(self, nth: int, seq_len: int) -> np.ndarray:
        """Return [n] int64, the pieces in the nth row of the endless stream of rows."""
        packing = self.packings[seq_len]
        repeat, place = divmod(nth, packing.n_rows)
        r = int(shuffled(packing.n_rows, self.seed, self.name, seq_len, "rows", repeat)[place])
        return packing.members[packing.starts[r] : packing.starts[r + 1]]

    def row(self, nth: int, seq_len: int) -> list[np.ndarray]:
        """Read the marked tokens of the pieces in a row: [places + 1] int64 each."""
        pieces = self.packings[seq_len].pieces
        return [
            self.read(int(pieces.sample[i]), int(pieces.start[i]), int(pieces.length[i]))
            for i in self.pieces_in_row(nth, seq_len)
        ]

    def read(self, sample: int, start: int = 0, places: int | None = None) -> np.ndarray:
        """Read [places + 1] int64 marked tokens of a sample from token `start` on; by default all of them."""
        begin, end = (int(self.ends[sample - 1]) if sample else 0), int(self.ends[sample])
        return self.source.read_on(begin + start, end - begin - start if places is None else places + 1)


# Assembles rows, each (source, nth row of its stream), of one seq_len.
Assemble = Callable[[Sequence[tuple[Any, int]], int], PackedBatch]


class PackedReader:
    """Reads rows of packed sources."""

    def __init__(self, sources: Mapping[str, PackedSource], assemble: Assemble) -> None:
        self.sources, self.assemble = sources, assemble

    def read(self, rows: Sequence[Row]) -> PackedBatch:
        seq_len = rows[0].seq_len
        return self.assemble([(self.sources[row.source], row.start // seq_len) for row in rows], seq_len)


class HeldOutRows(HeldOut):
    """The first rows of a packed held-out split."""

    def __init__(self, source: PackedSource, seq_len: int, rows: int, batch_rows: int, assemble: Assemble) -> None:
        super().__init__(min(rows, source.packings[seq_len].n_rows), batch_rows)
        self.source, self.seq_len, self.assemble = source, seq_len, assemble

    def read(self, rows: Sequence[int]) -> PackedBatch:
        return self.assemble([(self.source, r) for r in rows], self.seq_len)


class PackedData(TokenizedData[ChatDataSettings]):
    """Sources of samples that a chat template wrote, packed.

    Attributes (after `open_sources`):
        packed, packed_val: source name -> its packed training and held-out split.
        chat: the template that the sources were prepared with.
        assemble: assembles rows of these sources; a subclass sets it.
    """

    assemble: Assemble
    chat: ChatTemplate
    packed: dict[str, PackedSource]
    packed_val: dict[str, PackedSource]

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        if not self.settings.mask_documents:
            raise ValueError(
                "data.mask_documents=false: samples in a row must not see one another; "
                f"stage={cfg.stage.name} needs true"
            )
        self.chat = chat_template(self.tokenizer, self.settings)

    @property
    def template_digest(self) -> str:
        """Hash of tokenizer and template, which turn text into tokens."""
        both = f"{self.tokenizer.digest} {template_digest(self.chat)}"
        return hashlib.sha256(both.encode()).hexdigest()

    @abstractmethod
    def pack_source(self, name: str, source: Source, seq_lens: Sequence[int]) -> PackedSource:
        """Pack a split for some context lengths."""

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
        sizes: dict[Stream, int] = {}  # tokens of each stream of rows
        for name, source in self.train.items():
            seq_lens = sorted({phase.seq_len for phase in self.plan.phases if phase.mixture.get(name, 0) > 0})
            self.packed[name] = self._pack_required(name, source, seq_lens)
            self.packed_val[name] = self._pack_required(name, self.val[name], [first])
            for seq_len, packing in self.packed[name].packings.items():
                sizes[name, seq_len] = packing.n_rows * seq_len
                log.info(describe_packing(name, packing, len(self.packed[name]), self.packed[name].unit))
        self.order = RowOrder(self.plan, sizes, self.cfg.seed)
        self.reader = PackedReader(self.packed, self.assemble)

    def _pack_required(self, name: str, source: Source, seq_lens: Sequence[int]) -> PackedSource:
        packed = self.pack_source(name, source, seq_lens)
        for seq_len, packing in packed.packings.items():
            if not packing.n_rows:
                hint = ", or set data.over_long=split" if hasattr(self.settings, "over_long") else ""
                raise ValueError(
                    f"data.sources.{name}: {source.folder} has no {packed.unit.removesuffix('s')} for a row of "
                    f"{seq_len} tokens; raise seq_len{hint}"
                )
        return packed

    def held_out(self, name: str) -> HeldOutRows:
        phase = self.plan.phases[0]  # the same rows and context in every phase, so that curves can be compared
        rows, size = self.settings.val_rows, phase.micro_batch_size
        return HeldOutRows(self.packed_val[name], phase.seq_len, rows, size, self.assemble)


def chat_template(tokenizer: TextTokenizer, settings: ChatDataConfig) -> ChatTemplate:
    """Return the template in the file `data.template`, else the tokenizer's, else ChatML; with its variables.

    Raises:
        ValueError: the file cannot be read, or `data.template_kwargs` has a reserved name.
    """
    file = settings.template
    source = None if file is None else read_template(file, f"data.template={file}")
    template = ChatTokenizer.of(tokenizer, source).template
    template = template.with_variables(check_variables(settings.template_kwargs, "data.template_kwargs"))
    if unread := template.describe_unread():
        log.warning("data.template_kwargs: %s", unread)
    return template


def describe_packing(name: str, packing: Packing, count: int, unit: str = PackedSource.unit) -> str:
    """Describe a packing of `count` samples or pairs in one line: the size of a pass, what was left out or cut."""
    pieces = packing.pieces
    line = f"{name}: {count:,} {unit} in {packing.n_rows:,} rows of {packing.seq_len:,}, {packing.fill:.1%} full"
    line += f" (one pass: {packing.n_rows * packing.seq_len:,} tokens)"
    if pieces.dropped:
        line += f"; {pieces.dropped:,} over-long dropped"
    return line + (f"; {pieces.cut:,} over-long cut" if pieces.cut else "")
