"""Preference data: packed rows of whole pairs, chosen and rejected response one after the other.

Every pair has a number, over all sources, trained on or held out, in their order: the log-probabilities of the
reference are kept by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from data.bin_packing import Packing, assemble_batch, pack_pairs
from data.packed import PackedData, PackedSource
from data.teacher_cache import TeacherCache, record
from nb_lightning.batch import IGNORE, PreferenceBatch
from nb_lightning.config.schema import Config, PreferenceDataConfig
from nb_lightning.phases import PhasePlan
from nb_lightning.token_source import Source


class PairSource(PackedSource):
    """A source of pairs and its packings.

    Args:
        first: the number of its first pair.
        cache: what a teacher knows of its samples.
    """

    unit = "pairs"

    def __init__(
        self,
        name: str,
        source: Source,
        seq_lens: Sequence[int],
        seed: int,
        first: int,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(name, source, seq_lens, "drop", seed)
        self.first, self.cache = first, cache

    def _pack(self, samples: np.ndarray, seq_len: int, over_long: str) -> Packing:
        return pack_pairs(samples, seq_len, self.seed)

    def __len__(self) -> int:
        return len(self.ends) // 2

    def pairs_in_row(self, nth: int, seq_len: int) -> np.ndarray:
        """Which pairs of the source are in the row that comes nth."""
        return self.packings[seq_len].pieces.sample[self.pieces(nth, seq_len)]

    def row(self, nth: int, seq_len: int) -> list[np.ndarray]:
        """The words of that row's responses: chosen, rejected, chosen, ..."""
        return [self.read(sample) for sample in self.responses(nth, seq_len)]

    def responses(self, nth: int, seq_len: int) -> list[int]:
        """Which samples of the source these are."""
        return [2 * int(pair) + side for pair in self.pairs_in_row(nth, seq_len) for side in range(2)]


class PreferenceData(PackedData):
    """Sources of pairs.

    Attributes (after `open_sources`):
        n_pairs: how many there are, held-out ones included: their numbers are below it.
    """

    packed: dict[str, PairSource]
    packed_val: dict[str, PairSource]
    settings: PreferenceDataConfig

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        self.n_pairs = 0
        self.assemble = partial(preferences, pad_id=self.tokenizer.eos_id)

    def require_usable(self, key: str, source: Source, split: str) -> None:
        require_pairs(key, source)
        super().require_usable(key, source, split)

    def pack_source(self, name: str, source: Source, seq_lens: Sequence[int]) -> PairSource:
        cache = self._cache(name, source) if self.settings.cached_teacher else None
        packed = PairSource(name, source, seq_lens, self.cfg.seed, self.n_pairs, cache)
        self.n_pairs += len(packed)
        return packed

    def _cache(self, name: str, source: Source) -> TeacherCache:
        try:
            cache = TeacherCache(source, self.settings.verify)
        except ValueError as error:
            raise ValueError(f"data.sources.{name} (data.cached_teacher=true): {error}") from error
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
        """Of each source its training data, and what a cached teacher knows of it."""
        found = super().digests
        for name, source in self.packed.items():
            if source.cache is not None:
                found[name] = hashlib.sha256(f"{found[name]} {source.cache.digest}".encode()).hexdigest()
        return found

    @property
    def pairs_digest(self) -> str:
        """Of all pairs in the order of their numbers."""
        sources = [source for name in self.train for source in (self.train[name], self.val[name])]
        return hashlib.sha256(" ".join(source.manifest.digest for source in sources).encode()).hexdigest()

    def new_pairs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(optimizer step, numbers of the pairs that no step before it draws), of the steps that have any."""
        seen = np.zeros(self.n_pairs, dtype=bool)
        left = sum(len(_fitting(source)) for source in self.packed.values())
        for step in range(self.plan.total_steps):
            first, phase = self.order.first_row_of_step(step), self.plan.phase_at(self.plan.tokens_at(step))
            rows = [self.order.locate(i) for i in range(first, first + phase.rows_per_step)]
            drawn = [numbers(self.packed[row.source], row.start // row.seq_len, row.seq_len) for row in rows]
            new = np.unique(np.concatenate(drawn))
            new = new[~seen[new]]
            if len(new):
                yield step, new
                seen[new], left = True, left - len(new)
            if not left:
                return

    def validated_pairs(self) -> np.ndarray:
        """Numbers of the pairs that are validated on."""
        seq_len, found = self.plan.phases[0].seq_len, []
        for name, source in self.packed_val.items():
            found += [numbers(source, row, seq_len) for row in range(self.held_out(name).rows)]
        return np.concatenate(found)


def require_pairs(key: str, source: Source) -> None:
    """Raise `ValueError` beginning with `key` unless the source is one of pairs."""
    if not source.manifest.pairs:
        kind = "conversations" if source.manifest.is_chat else "documents"
        raise ValueError(f"{key}: {source.folder} holds {kind}; data.prepare --pairs makes preference pairs")


def numbers(source: PairSource, nth: int, seq_len: int) -> np.ndarray:
    """[n] int64, over all sources, of the pairs in the row that comes nth."""
    return source.first + source.pairs_in_row(nth, seq_len)


def _fitting(source: PairSource) -> set[int]:
    """The pairs that some row can hold."""
    return set().union(*(packing.pieces.sample.tolist() for packing in source.packings.values()))


def preferences(rows: Sequence[tuple[PairSource, int]], seq_len: int, pad_id: int) -> PreferenceBatch:
    """A batch of rows, each the nth of a source's stream."""
    words = [source.row(nth, seq_len) for source, nth in rows]
    batch = assemble_batch(words, seq_len, pad_id)
    index = np.full((len(words), seq_len), -1, dtype=np.int32)
    response = 0
    for b, row in enumerate(words):
        at = 0
        for one in row:
            places = len(one) - 1
            index[b, at : at + places] = response
            at, response = at + places, response + 1
    index[batch.labels.numpy() == IGNORE] = -1
    ids = np.concatenate([numbers(source, nth, seq_len) for source, nth in rows])
    return PreferenceBatch(
        **vars(batch),
        pairs=len(ids),
        response_index=torch.from_numpy(index),
        pair_ids=torch.from_numpy(ids),
        **_cached(rows, words, seq_len),
    )


def _cached(rows: Sequence[tuple[PairSource, int]], words: Sequence[Sequence[np.ndarray]], seq_len: int) -> dict:
    """The fields of the cached teacher, where there is one."""
    if rows[0][0].cache is None:
        return {}
    k = rows[0][0].cache.about["k"]
    known = np.zeros((len(rows), seq_len), dtype=record(k))
    for b, (source, nth) in enumerate(rows):
        end = 0
        for sample, one in zip(source.responses(nth, seq_len), words[b]):
            end += len(one) - 1
            records = source.cache.read(sample)
            known[b, end - len(records) : end] = records
    ids, logprobs = (torch.from_numpy(np.ascontiguousarray(known[name])) for name in ("ids", "logprobs"))
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}
