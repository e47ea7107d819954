"""The order of rows: row i of the run is a pure function of (seed, plan, sizes of the sources, i).

Inside a phase the sources alternate in a fixed pattern that meets every weight to within one row after any number of
rows (`balanced_pattern`). The rows that a phase takes from a source are one stretch of that source's endless token
stream. It starts at the token where the previous phase stopped, whatever the context length was there, so a change of
context length loses no token and repeats none. Within the stretch rows are shuffled window by window, which keeps
streamed reads local. The stream repeats the source's chunks in a new order each time it runs out.

Conversations are packed anew for each context length (data/bin_packing.py). There, the rows of a source at one context
length are a stream, and a phase continues where the last phase of its context length stopped.

So the state of the data is one integer, resume is exact with any number of workers or ranks, and a shift of the mixture
takes effect at its exact row.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nb_lightning.phases import PhasePlan, exact
from nb_lightning.token_source import Source

SHUFFLE_WINDOW_TOKENS = 2**26  # rows are shuffled within stretches of this length
Stream = str | tuple[str, int]  # the key of a stream: source, or (source, seq_len)


def balanced_pattern(weights: list[float]) -> np.ndarray:
    """Compute the order in which sources alternate: [L] int64 indices into `weights`, to be repeated.

    After any number n of rows each source was drawn within one of weight * n times. L is the least common denominator
    of the weights (as written in decimal), so after L rows every count is exact. This is Pfair scheduling on one
    processor: the j-th draw of a source with weight w is due in a window of rows, and earliest deadline first meets
    every window (Baruah et al. 1996).
    """
    fractions = [exact(w) for w in weights]
    assert sum(fractions) == 1, weights
    length = math.lcm(*(f.denominator for f in fractions))
    quota = [f.numerator * (length // f.denominator) for f in fractions]
    drawn = [0] * len(weights)
    pattern = np.empty(length, dtype=np.int64)
    for row in range(length):
        # Draw j (from 0) of a source is allowed from row floor(j L / q) on and due by row ceil((j + 1) L / q) - 1.
        due = [
            (-(-(drawn[s] + 1) * length // q), s)
            for s, q in enumerate(quota)
            if drawn[s] < q and drawn[s] * length // q <= row
        ]
        source = min(due)[1]
        pattern[row] = source
        drawn[source] += 1
    return pattern


@dataclass(frozen=True)
class Row:
    """The location of one row of tokens."""

    phase: int
    source: str
    start: int  # token offset in the endless stream
    seq_len: int


class _PhaseOrder:
    """The order of rows inside one phase."""

    def __init__(self, names: list[str], weights: list[float], rows: int, starts: dict[str, int]) -> None:
        self.names, self.rows, self.starts = names, rows, starts
        self.pattern = balanced_pattern(weights)
        onehot = self.pattern[:, None] == np.arange(len(names))
        self.before = np.concatenate([np.zeros((1, len(names)), np.int64), np.cumsum(onehot, axis=0)])

    def drawn(self, row: int) -> np.ndarray:
        """Count the rows drawn from each source before `row` of the phase: [sources] int64."""
        rounds, rest = divmod(row, len(self.pattern))
        return rounds * self.before[-1] + self.before[rest]


class RowOrder:
    """The run's one global order of rows.

    Args:
        plan: the plan as it runs (`PhasePlan.in_whole_steps`).
        tokens: size of each stream in tokens: of a source by its name, or by (name, seq_len) where the rows of each
            context length are a stream of their own.
        seed: fixes every shuffle.
    """

    def __init__(self, plan: PhasePlan, tokens: Mapping[Stream, int], seed: int) -> None:
        self.plan, self.tokens, self.seed = plan, dict(tokens), seed
        self._phases: list[_PhaseOrder] = []
        self._first_row: list[int] = []
        reached = dict.fromkeys(tokens, 0)
        first = 0
        for phase in plan.phases:
            names = [name for name, weight in phase.mixture.items() if weight > 0]
            rows = phase.tokens // phase.seq_len
            streams = {name: self._stream(name, phase.seq_len) for name in names}
            starts = {name: reached[stream] for name, stream in streams.items()}
            order = _PhaseOrder(names, [phase.mixture[name] for name in names], rows, starts)
            self._phases.append(order)
            self._first_row.append(first)
            first += rows
            for name, count in zip(names, order.drawn(rows)):
                reached[streams[name]] += int(count) * phase.seq_len
        self.total_rows = first

    def _stream(self, source: str, seq_len: int) -> Stream:
        return source if source in self.tokens else (source, seq_len)

    def first_row_of_step(self, step: int) -> int:
        """Return the global number of the first row of optimizer step `step`."""
        index = self.plan.index_at(self.plan.tokens_at(step))
        steps_before = sum(phase.steps for phase in self.plan.phases[:index])
        return self._first_row[index] + (step - steps_before) * self.plan.phases[index].rows_per_step

    def turn(self, row: int) -> tuple[int, str, int]:
        """Return phase and source of row `row` of the run, and how many rows of both come before it."""
        index = int(np.searchsorted(self._first_row, row, side="right")) - 1
        order = self._phases[index]
        within = row - self._first_row[index]
        assert 0 <= within < order.rows, row
        source = int(order.pattern[within % len(order.pattern)])
        return index, order.names[source], int(order.drawn(within)[source])

    def locate(self, row: int) -> Row:
        """Locate row `row` of the run."""
        index, name, nth = self.turn(row)
        phase, order = self.plan.phases[index], self._phases[index]
        count = int(order.drawn(order.rows)[order.names.index(name)])
        window = max(1, SHUFFLE_WINDOW_TOKENS // phase.seq_len)
        base = nth - nth % window
        place = base + int(shuffled(min(window, count - base), self.seed, name, index, nth // window)[nth % window])
        return Row(index, name, order.starts[name] + place * phase.seq_len, phase.seq_len)

    def consumed(self, tokens_seen: int) -> dict[str, int]:
        """Count the tokens taken from each source in the first `tokens_seen` tokens of the run."""
        taken: dict[str, int] = {}
        for (name, _), tokens in self._taken(tokens_seen).items():
            taken[name] = taken.get(name, 0) + tokens
        return taken

    def repeats(self, tokens_seen: int) -> dict[str, float]:
        """Count the passes over each source in the first `tokens_seen` tokens of the run."""
        times: dict[str, float] = {}
        for (name, seq_len), tokens in self._taken(tokens_seen).items():
            times[name] = times.get(name, 0.0) + tokens / self.tokens[self._stream(name, seq_len)]
        return times

    def _taken(self, tokens_seen: int) -> dict[tuple[str, int], int]:
        """Count the tokens taken from each source at each context length."""
        taken: dict[tuple[str, int], int] = {}
        for index, (phase, order) in enumerate(zip(self.plan.phases, self._phases)):
            seen = min(max(tokens_seen - self.plan.start_of(index), 0), phase.tokens)
            for name, count in zip(order.names, order.drawn(seen // phase.seq_len)):
                key = (name, phase.seq_len)
                taken[key] = taken.get(key, 0) + int(count) * phase.seq_len
        return taken


@lru_cache(maxsize=64)
def shuffled(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of 0..n-1, int64, that depends on `key` alone.

    It is the same in every process and numpy version, because it uses the legacy MT19937.
    """
    seeds = [zlib.crc32(part.encode()) if isinstance(part, str) else part % 2**32 for part in key]
    return np.random.RandomState(seeds).permutation(n)


class TokenStream:
    """The endless token stream of a source: all its chunks in a shuffled order, then in another one, and so on.

    Repeat r covers tokens [r * size, (r + 1) * size) and reads every token of the source exactly once.
    """

    def __init__(self, name: str, source: Source, seed: int) -> None:
        self.name, self.source, self.seed = name, source, seed

    def read(self, start: int, n: int) -> np.ndarray:
        """Read [n] int64 tokens from token `start` on."""
        pieces = []
        while n > 0:
            repeat, offset = divmod(start, self.source.tokens)
            order, ends = self._layout(repeat)
            slot = int(np.searchsorted(ends, offset, side="right"))
            take = min(n, int(ends[slot]) - offset)
            chunk = int(order[slot])
            pieces.append(self.source.read(chunk, offset - int(ends[slot] - self.source.chunk_tokens[chunk]), take))
            start, n = start + take, n - take
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _layout(self, repeat: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the chunks in one repeat, and the tokens up to the end of each."""
        order = shuffled(len(self.source.chunk_tokens), self.seed, self.name, "repeat", repeat)
        return order, np.cumsum(self.source.chunk_tokens[order])
