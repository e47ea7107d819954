"""Pack samples into rows of `seq_len` tokens. Which samples share a row follows from their lengths and a seed.

A sample of n tokens takes n - 1 places of a row, because its last token is only a label. Samples are cut only where
`over_long` says so. The algorithm is best fit decreasing over groups of equal rows and equal lengths, so that millions
of samples take seconds. `assemble_batch` turns rows into a batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from nb_lightning.batch import IGNORE, PackedBatch
from nb_lightning.token_source import TRAINED

OVER_LONG = ("drop", "truncate", "split")
GOOD_FILL = 0.99  # best fit that fills this share of the places is not improved further
PATTERN_BUDGET = 3e7  # operations of `by_patterns`: a few seconds


@dataclass(frozen=True)
class Pieces:
    """The pieces of samples to pack: piece i is the places from start[i], length[i] of them, of sample sample[i].

    Attributes:
        sample, start, length: [n] int64.
        dropped: number of samples left out: too long, or truncated before the first token to train on.
        cut: number of samples truncated or split.
    """

    sample: np.ndarray
    start: np.ndarray
    length: np.ndarray
    dropped: int
    cut: int


@dataclass(frozen=True)
class Packing:
    """Rows of pieces: row r holds the pieces `members[starts[r] : starts[r + 1]]`.

    Attributes:
        starts: [rows + 1] int64.
        members: [n] int64 indices into `pieces`.
    """

    seq_len: int
    pieces: Pieces
    starts: np.ndarray
    members: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    @property
    def fill(self) -> float:
        """The share of the places that hold a token of a sample."""
        return float(self.pieces.length.sum()) / (self.n_rows * self.seq_len) if self.n_rows else 0.0


def pack_samples(samples: np.ndarray, seq_len: int, over_long: str = "drop", seed: int = 0) -> Packing:
    """Pack the samples of a source.

    Args:
        samples: [n, 2] int32, as `Source.samples` returns them: tokens, and the index of the first one to train on.
        over_long: what happens to samples that a row cannot hold. "drop" leaves them out, "truncate" keeps their
            beginning, "split" cuts them into pieces of one row each, of which only the last can share its row.
        seed: another seed puts other samples of equal length together.
    """
    pieces = cut_samples(samples, seq_len, over_long)
    starts, members = bin_pack(pieces.length, seq_len, seed)
    return Packing(seq_len, pieces, starts, members)


def pack_pairs(samples: np.ndarray, seq_len: int, seed: int = 0) -> Packing:
    """Pack pairs of consecutive samples, both into one row. Pairs that a row cannot hold are left out.

    In the packing's `Pieces`, `sample` is the index of the pair and `length` the places of both samples.

    Args:
        samples: [2 * pairs, 2] int32, as `Source.samples` returns them.
    """
    places = samples[:, 0].astype(np.int64).reshape(-1, 2).sum(1) - 2
    fitting = np.flatnonzero(places <= seq_len)
    pieces = Pieces(fitting, np.zeros_like(fitting), places[fitting], len(places) - len(fitting), 0)
    return Packing(seq_len, pieces, *bin_pack(pieces.length, seq_len, seed))


def cut_samples(samples: np.ndarray, seq_len: int, over_long: str) -> Pieces:
    """Cut samples into pieces that a row can hold.

    Pieces that end before their sample's first trained token are left out. Arguments as in `pack_samples`.
    """
    assert over_long in OVER_LONG, over_long
    places, first = samples[:, 0].astype(np.int64) - 1, samples[:, 1].astype(np.int64)
    is_long = places > seq_len
    if over_long != "split":
        is_packed = ~is_long if over_long == "drop" else first <= seq_len
        sample = np.flatnonzero(is_packed)
        length = np.minimum(places[sample], seq_len)
        return Pieces(sample, np.zeros_like(sample), length, int((~is_packed).sum()), int(is_long[is_packed].sum()))
    count = -(-places // seq_len)
    sample = np.repeat(np.arange(len(places)), count)
    start = (np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    length = np.minimum(places[sample] - start, seq_len)
    is_trained = first[sample] <= start + length  # the label of the last place is the token after it
    return Pieces(sample[is_trained], start[is_trained], length[is_trained], 0, int(is_long.sum()))


def bin_pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into bins.

    Args:
        lengths: [n] int64, each in (0, capacity].

    Returns:
        starts [bins + 1] and members [n], int64: bin b holds the items members[starts[b] : starts[b + 1]].
    """
    # Items of equal length are shuffled, so that neighbours of the input do not share bins.
    order = np.random.RandomState([seed % 2**32, capacity]).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    ordered = lengths[order]
    bins = best_fit(ordered, capacity)
    count = bins.max(initial=-1) + 1
    if ordered.sum() < GOOD_FILL * capacity * count:
        distinct = len(np.unique(ordered))
        if distinct * min(count, 4 * distinct) * (1 + capacity / 2**13) <= PATTERN_BUDGET:
            bins = min(bins, by_patterns(ordered, capacity), key=np.max)
    counts = np.bincount(bins)
    return np.concatenate([[0], np.cumsum(counts)]), order[np.argsort(bins, kind="stable")]


def best_fit(ordered: np.ndarray, capacity: int) -> np.ndarray:
    """Assign items to bins by best fit decreasing.

    Args:
        ordered: [n] int64 lengths in descending order.

    Returns:
        [n] int64, the bin of each item.
    """
    bin_of = np.empty(len(ordered), dtype=np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # room left -> groups of bins
    rooms: list[int] = []  # the keys, ascending
    bins = 0

    def put_back(room: int, group: np.ndarray) -> None:
        if room and len(group):
            if room not in open_bins:
                insort(rooms, room)
                open_bins[room] = []
            open_bins[room].append(group)

    ends = np.flatnonzero(np.diff(ordered, append=0)) + 1
    for begin, end in pairwise([0, *ends.tolist()]):
        length = int(ordered[begin])
        while begin < end:
            place = bisect_left(rooms, length)
            if place < len(rooms):  # the fullest bins that have room for one more
                room = rooms.pop(place)
                group = np.concatenate(open_bins.pop(room))
            else:
                room = capacity
                group = bins + np.arange(-(-(end - begin) // (room // length)))
                bins += len(group)
            each = room // length  # items per bin: after taking one, a bin is still the fullest
            full, rest = np.split(group, [min(len(group), (end - begin) // each)])
            bin_of[begin : begin + len(full) * each] = np.repeat(full, each)
            put_back(room - each * length, full)
            begin += len(full) * each
            if begin < end and len(rest):  # too few items are left to fill another bin
                bin_of[begin:end] = rest[0]
                put_back(room - (end - begin) * length, rest[:1])
                begin, rest = end, rest[1:]
            put_back(room, rest)
    return bin_of


def by_patterns(ordered: np.ndarray, capacity: int) -> np.ndarray:
    """Assign items to bins, one bin after the other, each filled as far as possible. Like `best_fit` otherwise.

    Best fit is poor where all lengths are similar: it puts equal lengths together, and a bin of five has no room for a
    sixth. Here a bin takes the longest item left and the lengths that fill the rest best (a subset sum, with the
    possible sums as a bit set). The pattern is repeated while there are items for it.
    """
    lengths, firsts, left = np.unique(-ordered, return_index=True, return_counts=True)
    next_item = dict(zip((-lengths).tolist(), firsts.tolist()))
    count = dict(zip((-lengths).tolist(), left.tolist()))  # descending
    bin_of = np.empty(len(ordered), dtype=np.int64)
    bins = 0
    while count:
        longest = next(iter(count))
        room = capacity - longest
        below = (1 << (room + 1)) - 1
        sums, steps = 1, []  # bit s of `sums` is set if some items sum to s
        for length, n in count.items():
            n, some = min(n - (length == longest), room // length), 1
            while n > 0:  # 1, 2, 4, ... items of this length, then the remainder
                some = min(some, n)
                steps.append((sums, length, some))
                sums |= sums << length * some & below
                n, some = n - some, 2 * some
        total, pattern = sums.bit_length() - 1, {longest: 1}
        for before, length, some in reversed(steps):
            if not before >> total & 1:
                total -= length * some
                pattern[length] = pattern.get(length, 0) + some
        times = min(count[length] // n for length, n in pattern.items())
        for length, n in pattern.items():
            at = next_item[length]
            bin_of[at : at + n * times] = np.tile(np.arange(bins, bins + times), n)
            next_item[length] += n * times
            count[length] -= n * times
            if not count[length]:
                del count[length]
        bins += times
    return bin_of


def assemble_batch(rows: Sequence[Sequence[np.ndarray]], seq_len: int, pad_id: int) -> PackedBatch:
    """Assemble rows of samples into one batch.

    Args:
        rows: of each row the marked tokens of its pieces, [places + 1] int64 each.
        pad_id: fills the end of a row, a further document without labels.
    """
    B = len(rows)
    input_ids = np.full((B, seq_len), pad_id, dtype=np.int64)
    labels = np.full((B, seq_len), IGNORE, dtype=np.int64)
    starts = []
    for b, row in enumerate(rows):
        at = 0
        for marked in row:
            places = len(marked) - 1
            ids = marked & (TRAINED - 1)
            input_ids[b, at : at + places] = ids[:-1]
            labels[b, at : at + places] = np.where(marked[1:] & TRAINED, ids[1:], IGNORE)
            starts.append(b * seq_len + at)
            at += places
        assert at <= seq_len
        if at < seq_len:
            starts.append(b * seq_len + at)
    cu_seqlens = np.array([*starts, B * seq_len], dtype=np.int64)
    positions = np.arange(B * seq_len) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions).view(B, seq_len),
        torch.from_numpy(cu_seqlens).int(),
    )
