"""Samples into rows: nothing lost, nothing cut unasked, full rows, the same each time; and rows into batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from data.bin_packing import Packing, assemble_batch, best_fit, by_patterns, cut_samples, pack_samples
from nb_lightning.batch import IGNORE
from nb_lightning.token_source import TRAINED


def samples(lengths: list[int] | np.ndarray, first: int = 1) -> np.ndarray:
    """As `Source.samples` gives them; a sample of n + 1 tokens takes n places."""
    places = np.asarray(lengths)
    return np.stack([places + 1, np.full(len(places), first)], axis=1).astype(np.int32)


def rows_of(packing: Packing) -> list[list[int]]:
    return [packing.members[a:b].tolist() for a, b in pairwise(packing.starts)]


def require_sound(packing: Packing) -> None:
    assert sorted(packing.members.tolist()) == list(range(len(packing.pieces.length)))
    used = np.add.reduceat(packing.pieces.length[packing.members], packing.starts[:-1])
    assert used.max() <= packing.seq_len and used.min() > 0
    assert packing.fill == pytest.approx(used.mean() / packing.seq_len)


def clipped(rng: np.random.RandomState, mean: float, sigma: float, n: int, most: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(mean), sigma, n).astype(int), 2, most)


@pytest.mark.parametrize(
    "name, lengths, seq_len",
    [
        ("short answers", lambda rng: clipped(rng, 400, 1.0, 50_000, 4096), 4096),
        ("long chains of thought", lambda rng: clipped(rng, 7000, 0.8, 20_000, 32768), 32768),
        ("both", lambda rng: np.r_[clipped(rng, 300, 0.9, 5000, 65536), clipped(rng, 9000, 0.8, 5000, 65536)], 65536),
        ("every length alike", lambda rng: rng.randint(1, 2049, 20_000), 2048),
        ("all much alike", lambda rng: rng.randint(70, 106, 8000), 512),  # the demo's: patterns, not best fit
        ("few", lambda rng: rng.randint(40, 160, 1000), 1024),
        ("a million", lambda rng: clipped(rng, 900, 1.2, 1_000_000, 8192), 8192),
    ],
)  # fmt: skip
def test_rows_are_full(name: str, lengths: object, seq_len: int) -> None:
    packing = pack_samples(samples(lengths(np.random.RandomState(0))), seq_len)
    require_sound(packing)
    assert packing.fill >= 0.98, name
    assert packing.pieces.dropped == packing.pieces.cut == 0


def test_what_no_packing_can_fill_is_packed_all_the_same() -> None:
    packing = pack_samples(samples(np.random.RandomState(0).randint(2000, 2300, 5000)), 4096)  # two of them rarely fit
    require_sound(packing)
    assert 0.5 < packing.fill < 0.7


def test_best_fit_is_best_fit_decreasing() -> None:
    """Against the algorithm as it is in the books, one item after the other."""
    for seed in range(20):
        rng = np.random.RandomState(seed)
        lengths = np.sort(rng.randint(1, rng.randint(2, 101), size=300))[::-1]
        room: list[int] = []
        for length in lengths.tolist():
            fitting = [left for left in room if left >= length]
            if fitting:
                room.remove(min(fitting))
            room.append(min(fitting, default=100) - length)
        found = np.bincount(best_fit(lengths, 100), weights=lengths)
        assert sorted(found.astype(int).tolist()) == sorted(100 - left for left in room)


def test_patterns_are_sound_and_fill_where_best_fit_does_not() -> None:
    lengths = np.sort(np.random.RandomState(1).randint(71, 102, 8000))[::-1]
    bins = by_patterns(lengths, 512)
    used = np.bincount(bins, weights=lengths)
    assert used.max() <= 512 and used.min() > 0 and lengths.sum() / (512 * len(used)) > 0.98
    assert best_fit(lengths, 512).max() + 1 > 1.04 * len(used)


def test_the_same_each_time_and_another_for_another_seed() -> None:
    lengths = samples(np.random.RandomState(0).randint(10, 500, 2000))
    one, same, other = (rows_of(pack_samples(lengths, 1024, seed=seed)) for seed in (5, 5, 6))
    assert one == same != other


def test_neighbours_of_the_input_do_not_share_rows() -> None:
    """Equal lengths in input order would put each dialogue beside the next one of its file."""
    packing = pack_samples(samples([100] * 4000), 1000)
    apart = [abs(a - b) for row in rows_of(packing) for a, b in pairwise(row)]
    assert len(packing.starts) == 401 and np.mean(apart) > 500


def test_over_long_samples() -> None:
    #                places: fits, just, too long, too long with a late first trained token
    given = np.array([[50, 3], [101, 3], [250, 3], [250, 120]], dtype=np.int32)
    dropped = cut_samples(given, 100, "drop")
    assert (dropped.sample.tolist(), dropped.length.tolist(), dropped.dropped, dropped.cut) == ([0, 1], [49, 100], 2, 0)
    truncated = cut_samples(given, 100, "truncate")
    assert truncated.sample.tolist() == [0, 1, 2] and truncated.length.tolist() == [49, 100, 100]
    assert (truncated.dropped, truncated.cut) == (1, 1)  # of the last one, nothing that is trained on would be left
    split = cut_samples(given, 100, "split")
    pieces = list(zip(split.sample.tolist(), split.start.tolist(), split.length.tolist()))
    assert pieces == [(0, 0, 49), (1, 0, 100), (2, 0, 100), (2, 100, 100), (2, 200, 49), (3, 100, 100), (3, 200, 49)]
    assert (split.dropped, split.cut) == (0, 2)
    # The first trained token may be the label of a piece's last place.
    assert cut_samples(np.array([[250, 100]]), 100, "split").start.tolist() == [0, 100, 200]
    assert cut_samples(np.array([[250, 101]]), 100, "split").start.tolist() == [100, 200]
    assert cut_samples(np.array([[250, 100]]), 100, "truncate").length.tolist() == [100]


def test_nothing_to_pack() -> None:
    packing = pack_samples(samples([500]), 100)
    assert (packing.n_rows, packing.fill, packing.pieces.dropped) == (0, 0.0, 1)
    assert pack_samples(samples([]), 100).n_rows == 0


def test_a_batch_place_by_place() -> None:
    def marked(*tokens: int, trained: tuple[int, ...]) -> np.ndarray:
        return np.array([t | TRAINED if t in trained else t for t in tokens], dtype=np.int64)

    a, b, c = marked(11, 12, 13, 14, trained=(13, 14)), marked(21, 22, trained=(22,)), marked(31, 32, 33, trained=(32,))
    batch = assemble_batch([[a, b], [c]], seq_len=5, pad_id=9)
    X = IGNORE
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 9], [31, 32, 9, 9, 9]]
    assert batch.labels.tolist() == [[X, 13, 14, 22, X], [32, X, X, X, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 7, 10]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.input_ids.dtype == batch.labels.dtype == torch.int64
    full = assemble_batch([[a]], seq_len=3, pad_id=9)
    assert full.input_ids.tolist() == [[11, 12, 13]] and full.cu_seqlens.tolist() == [0, 3]
