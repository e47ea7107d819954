"""Samples into rows: which conversations share a row of `seq_len` tokens, fixed by the lengths and a seed.

A sample of n tokens takes n - 1 places: its last token is only ever a label. Samples are never cut unless `over_long`
says so. Best fit, longest first, over groups of equal rows and equal lengths, so that millions take seconds.
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
GOOD_FILL = 0.99
PATTERN_BUDGET = 3e7  # a few seconds of looking for patterns


@dataclass(frozen=True)
class Pieces:
    """What is packed: places [start, start + length) of sample `sample`; [n] each, and how many samples were over-long.

    Attributes:
        dropped: samples left out whole: too long, or truncated before the first token to train on.
        cut: samples truncated or split.
    """

    sample: np.ndarray
    start: np.ndarray
    length: np.ndarray
    dropped: int
    cut: int


@dataclass(frozen=True)
class Packing:
    """Row r holds the pieces `members[starts[r] : starts[r + 1]]`."""

    seq_len: int
    pieces: Pieces
    starts: np.ndarray
    members: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @property
    def fill(self) -> float:
        """Share of the places that hold a token of a sample."""
        return float(self.pieces.length.sum()) / (self.rows * self.seq_len) if self.rows else 0.0


def pack_samples(samples: np.ndarray, seq_len: int, over_long: str = "drop", seed: int = 0) -> Packing:
    """Pack the samples of a source.

    Args:
        samples: [n, 2] as `Source.samples` gives them: tokens, and the place of the first one to train on.
        over_long: what becomes of samples that a row cannot hold: "drop" leaves them out, "truncate" keeps their
            beginning, "split" makes pieces of one row each, of which only the last can share its row.
        seed: another one brings other samples together.
    """
    pieces = cut_samples(samples, seq_len, over_long)
    starts, members = bin_pack(pieces.length, seq_len, seed)
    return Packing(seq_len, pieces, starts, members)


def pack_pairs(samples: np.ndarray, seq_len: int, seed: int = 0) -> Packing:
    """Pack samples of which each two are a pair: both in one row, in their order. Pairs too long for it are left out.

    `Pieces` are of whole pairs: `sample` counts pairs, `length` is of both samples.
    """
    places = samples[:, 0].astype(np.int64).reshape(-1, 2).sum(1) - 2
    kept = np.flatnonzero(places <= seq_len)
    pieces = Pieces(kept, np.zeros_like(kept), places[kept], len(places) - len(kept), 0)
    return Packing(seq_len, pieces, *bin_pack(pieces.length, seq_len, seed))


def cut_samples(samples: np.ndarray, seq_len: int, over_long: str) -> Pieces:
    """The pieces of samples that rows can hold, but for those that end before their sample's first trained token."""
    assert over_long in OVER_LONG, over_long
    places, first = samples[:, 0].astype(np.int64) - 1, samples[:, 1].astype(np.int64)
    long = places > seq_len
    if over_long != "split":
        kept = ~long if over_long == "drop" else first <= seq_len
        sample = np.flatnonzero(kept)
        length = np.minimum(places[sample], seq_len)
        return Pieces(sample, np.zeros_like(sample), length, int((~kept).sum()), int(long[kept].sum()))
    count = -(-places // seq_len)
    sample = np.repeat(np.arange(len(places)), count)
    start = (np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    length = np.minimum(places[sample] - start, seq_len)
    kept = first[sample] <= start + length  # the label of the last place is the token after it
    return Pieces(sample[kept], start[kept], length[kept], 0, int(long.sum()))


def bin_pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins of `capacity` for items of `lengths`, each in (0, capacity].

    Returns:
        starts [bins + 1] and members [n]: bin b holds the items members[starts[b] : starts[b + 1]].
    """
    # Equal lengths change places at random, so that what shares a bin does not follow from the order of the input.
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
    """Best fit decreasing: the bin of each item; lengths in descending order."""
    bin_of = np.empty(len(ordered), dtype=np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # room left -> bins
    rooms: list[int] = []  # the keys, ascending
    bins = 0

    def put_back(room: int, some: np.ndarray) -> None:
        if room and len(some):
            if room not in open_bins:
                insort(rooms, room)
                open_bins[room] = []
            open_bins[room].append(some)

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
            each = room // length  # having taken one, a bin is still the fullest
            full, rest = np.split(group, [min(len(group), (end - begin) // each)])
            bin_of[begin : begin + len(full) * each] = np.repeat(full, each)
            put_back(room - each * length, full)
            begin += len(full) * each
            if begin < end and len(rest):  # too few are left to fill another
                bin_of[begin:end] = rest[0]
                put_back(room - (end - begin) * length, rest[:1])
                begin, rest = end, rest[1:]
            put_back(room, rest)
    return bin_of


def by_patterns(ordered: np.ndarray, capacity: int) -> np.ndarray:
    """Bins that are as full as can be, one after the other; lengths in descending order.

    Where all lengths are much alike, best fit puts equals together, and a bin of five has no room for a sixth. Here a
    bin takes the longest item left and the lengths that fill it best (which sums there are is a bit set), and that
    pattern is repeated while there are items for it.
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
        sums, steps = 1, []  # bit s: there is a choice of items that sum to s
        for length, n in count.items():
            n, some = min(n - (length == longest), room // length), 1
            while n > 0:  # 1, 2, 4, ... of them, and the rest
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
    """Rows of samples as one batch.

    Args:
        rows: the words of each row's pieces, each one longer than its places, as a source of conversations has them.
        pad_id: fills a row's end, which is a document of its own without labels.
    """
    B = len(rows)
    input_ids = np.full((B, seq_len), pad_id, dtype=np.int64)
    labels = np.full((B, seq_len), IGNORE, dtype=np.int64)
    starts = []
    for b, row in enumerate(rows):
        at = 0
        for words in row:
            places = len(words) - 1
            ids = words & (TRAINED - 1)
            input_ids[b, at : at + places] = ids[:-1]
            labels[b, at : at + places] = np.where(words[1:] & TRAINED, ids[1:], IGNORE)
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
