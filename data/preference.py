"""Preference data: packed rows of pairs. A row holds both responses of each of its pairs, the chosen one first.

Every pair has an id over all sources and both splits, by which the reference's log-probabilities are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from data.bin_packing import Packing, assemble_batch, pack_pairs
from data.packed import PackedData, PackedSource
from data.teacher_cache import TeacherCache, record_dtype
from nb_lightning.batch import IGNORE, PreferenceBatch
from nb_lightning.config.schema import Config, DPDConfig, PreferenceDataConfig
from nb_lightning.phases import PhasePlan
from nb_lightning.token_source import Source


class PairSource(PackedSource):
    """A split of pairs, and its packing for each context length. Pair p is the samples 2 p and 2 p + 1.

    Args:
        first_id: id of the first pair; the others follow.
        cache: the teacher's most likely tokens at each response token.
    """

    unit = "pairs"

    def __init__(
        self,
        name: str,
        source: Source,
        seq_lens: Sequence[int],
        seed: int,
        first_id: int,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(name, source, seq_lens, "drop", seed)
        self.first_id, self.cache = first_id, cache

    def _pack(self, samples: np.ndarray, seq_len: int, over_long: str) -> Packing:
        return pack_pairs(samples, seq_len, self.seed)

    def __len__(self) -> int:
        return len(self.ends) // 2

    def pairs_in_row(self, nth: int, seq_len: int) -> np.ndarray:
        """Return [n] int64, the pairs of the source in the nth row of its stream."""
        return self.packings[seq_len].pieces.sample[self.pieces_in_row(nth, seq_len)]

    def pair_ids(self, nth: int, seq_len: int) -> np.ndarray:
        """Return [n] int64, the ids of the pairs in the nth row of the stream."""
        return self.first_id + self.pairs_in_row(nth, seq_len)

    def samples_in_row(self, nth: int, seq_len: int) -> list[int]:
        """Return the samples of a row: chosen, rejected, chosen, ..."""
        return [2 * int(pair) + side for pair in self.pairs_in_row(nth, seq_len) for side in range(2)]

    def row(self, nth: int, seq_len: int) -> list[np.ndarray]:
        """Read the marked tokens of a row's samples."""
        return [self.read(sample) for sample in self.samples_in_row(nth, seq_len)]

    def fitting_pairs(self) -> set[int]:
        """Return the pairs that some row can hold."""
        return set().union(*(packing.pieces.sample.tolist() for packing in self.packings.values()))


class PreferenceData(PackedData[PreferenceDataConfig]):
    """Sources of pairs.

    Attributes (after `open_sources`):
        n_pairs: number of all pairs, held-out ones included; ids are below it.
    """

    packed: dict[str, PairSource]
    packed_val: dict[str, PairSource]

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        self.n_pairs = 0
        self.assemble = partial(assemble_pairs, pad_id=self.tokenizer.eos_id)

    def require_usable(self, key: str, source: Source, split: str) -> None:
        require_pairs(key, source)
        super().require_usable(key, source, split)

    def pack_source(self, name: str, source: Source, seq_lens: Sequence[int]) -> PairSource:
        cache = self._open_cache(name, source) if self.settings.cached_teacher else None
        packed = PairSource(name, source, seq_lens, self.cfg.seed, self.n_pairs, cache)
        self.n_pairs += len(packed)
        return packed

    def _open_cache(self, name: str, source: Source) -> TeacherCache:
        try:
            cache = TeacherCache(source, self.settings.verify)
        except ValueError as error:
            raise ValueError(f"data.sources.{name} (data.cached_teacher=true): {error}") from error
        assert isinstance(self.cfg.stage, DPDConfig)
        temperature = self.cfg.stage.temperature
        if cache.about["temperature"] != temperature:
            raise ValueError(
                f"stage.temperature is {temperature}, but the cached teacher of data.sources.{name} was asked at "
                f"{cache.about['temperature']}; ask it again with --temperature {temperature}"
            )
        return cache

    def build_order(self) -> None:
        super().build_order()
        if len({source.cache and source.cache.about["k"] for source in self.packed.values()}) > 1:
            raise ValueError("data.cached_teacher=true: the sources have teachers of different k; make them with one")

    @property
    def digests(self) -> dict[str, str]:
        """Hash of each source's training data and of its cached teacher."""
        digests = super().digests
        for name, source in self.packed.items():
            if source.cache is not None:
                digests[name] = hashlib.sha256(f"{digests[name]} {source.cache.digest}".encode()).hexdigest()
        return digests

    @property
    def pairs_digest(self) -> str:
        """Hash of all pairs in the order of their ids."""
        sources = [source for name in self.train for source in (self.train[name], self.val[name])]
        return hashlib.sha256(" ".join(source.manifest.digest for source in sources).encode()).hexdigest()

    def new_pairs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (optimizer step, ids of the pairs that no earlier step draws) for each step that has any."""
        is_drawn = np.zeros(self.n_pairs, dtype=bool)
        left = sum(len(source.fitting_pairs()) for source in self.packed.values())
        for step in range(self.plan.total_steps):
            first, phase = self.order.first_row_of_step(step), self.plan.phase_at(self.plan.tokens_at(step))
            rows = [self.order.locate(i) for i in range(first, first + phase.rows_per_step)]
            ids = [self.packed[row.source].pair_ids(row.start // row.seq_len, row.seq_len) for row in rows]
            new = np.unique(np.concatenate(ids))
            new = new[~is_drawn[new]]
            if len(new):
                yield step, new
                is_drawn[new], left = True, left - len(new)
            if not left:
                return

    def validated_pairs(self) -> np.ndarray:
        """Return [n] int64, the ids of the pairs to validate on."""
        seq_len, ids = self.plan.phases[0].seq_len, []
        for name, source in self.packed_val.items():
            ids += [source.pair_ids(row, seq_len) for row in range(self.held_out(name).n_rows)]
        return np.concatenate(ids)


def require_pairs(key: str, source: Source) -> None:
    """Raise `ValueError` beginning with `key` unless the source holds pairs."""
    if not source.manifest.pairs:
        kind = "conversations" if source.manifest.is_chat else "documents"
        raise ValueError(f"{key}: {source.folder} holds {kind}; data.prepare --pairs makes preference pairs")


def assemble_pairs(rows: Sequence[tuple[PairSource, int]], seq_len: int, pad_id: int) -> PreferenceBatch:
    """Assemble (source, nth row of its stream) into one batch."""
    samples = [source.row(nth, seq_len) for source, nth in rows]  # of each row
    batch = assemble_batch(samples, seq_len, pad_id)
    response_index = np.full((len(rows), seq_len), -1, dtype=np.int32)
    response = 0
    for b, row in enumerate(samples):
        at = 0
        for marked in row:
            places = len(marked) - 1
            response_index[b, at : at + places] = response
            at, response = at + places, response + 1
    response_index[batch.labels.numpy() == IGNORE] = -1
    ids = np.concatenate([source.pair_ids(nth, seq_len) for source, nth in rows])
    return PreferenceBatch(
        **vars(batch),
        pairs=len(ids),
        response_index=torch.from_numpy(response_index),
        pair_ids=torch.from_numpy(ids),
        **_read_cached_teacher(rows, samples, seq_len),
    )


def _read_cached_teacher(
    rows: Sequence[tuple[PairSource, int]], samples: Sequence[Sequence[np.ndarray]], seq_len: int
) -> dict[str, torch.Tensor]:
    """Read `teacher_ids` and `teacher_logprobs` [B, T, k] of a batch; {} without a cached teacher."""
    first = rows[0][0].cache
    if first is None:
        return {}
    records = np.zeros((len(rows), seq_len), dtype=record_dtype(first.about["k"]))
    for b, (source, nth) in enumerate(rows):
        assert source.cache is not None  # of all sources or of none
        end = 0
        for sample, marked in zip(source.samples_in_row(nth, seq_len), samples[b]):
            end += len(marked) - 1
            of_sample = source.cache.read(sample)
            records[b, end - len(of_sample) : end] = of_sample
    ids, logprobs = (torch.from_numpy(np.ascontiguousarray(records[name])) for name in ("ids", "logprobs"))
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}
