"""The order of rows: weights met exactly, every token once a repeat, nothing lost between context lengths."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.mixture import RowOrder, TokenStream, balanced_pattern, shuffled
from data.pretrain import HeldOutText
from nb_lightning.phases import LearningRate, Phase, PhasePlan
from nb_lightning.token_source import Source

SIZES = {"docs": 5000, "code": 7001, "tests": 3333}


def phase(name: str, tokens: int, mixture: dict[str, float], seq_len: int) -> Phase:
    return Phase(name, tokens, LearningRate(1e-3), mixture, seq_len, 1e4, 256, 1)


PLAN = PhasePlan(
    (
        phase("warmup", 256 * 10, {"docs": 0.3, "code": 0.5, "tests": 0.2}, 16),
        phase("stable", 256 * 41, {"docs": 0.37, "code": 0.63}, 16),
        phase("decay", 256 * 30, {"docs": 0.75, "tests": 0.25}, 64),
    )
)


@pytest.mark.parametrize("seed", range(50))
def test_every_prefix_of_the_pattern_is_within_one_of_the_weights(seed: int) -> None:
    rng = random.Random(seed)
    unit = rng.choice([10, 100, 1000])
    cuts = sorted(rng.sample(range(1, unit), rng.randint(0, 7)))
    weights = [(b - a) / unit for a, b in zip([0, *cuts], [*cuts, unit])]
    pattern = balanced_pattern(weights)
    counts = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    n = np.arange(1, len(pattern) + 1)[:, None]
    assert np.abs(counts - n * np.array(weights)).max() < 1 - 1e-9
    assert (counts[-1] / len(pattern) == np.array(weights)).all()


def test_counts_inside_each_phase_are_within_one_of_weight_times_n() -> None:
    order = RowOrder(PLAN, SIZES, seed=7)
    row = 0
    for index, part in enumerate(PLAN.phases):
        drawn: Counter[str] = Counter()
        for n in range(1, part.tokens // part.seq_len + 1):
            located = order.locate(row)
            assert located.phase == index and located.seq_len == part.seq_len  # the shift is at its exact row
            drawn[located.source] += 1
            row += 1
            for name, weight in part.mixture.items():
                assert abs(drawn[name] - weight * n) < 1
        assert set(drawn) <= set(part.mixture)
    assert row == order.total_rows


def test_rows_of_a_source_cover_its_stream_without_gap_or_overlap_across_context_lengths() -> None:
    order = RowOrder(PLAN, SIZES, seed=7)
    located = [order.locate(i) for i in range(order.total_rows)]
    for name in SIZES:
        stretches = sorted((row.start, row.start + row.seq_len) for row in located if row.source == name)
        assert stretches[0][0] == 0
        assert all(end == start for (_, end), (start, _) in pairwise(stretches))
        assert stretches[-1][1] == order.consumed(PLAN.total_tokens)[name]
    assert sum(order.consumed(PLAN.total_tokens).values()) == PLAN.total_tokens


def test_order_is_a_function_of_the_seed() -> None:
    rows = [[RowOrder(PLAN, SIZES, seed).locate(i) for i in range(50)] for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_shuffles_do_not_change_between_versions() -> None:
    assert shuffled(8, 0, "docs", 1).tolist() == [0, 3, 2, 6, 1, 7, 5, 4]


def test_steps_of_the_paper_plan_are_located_without_walking_there() -> None:
    big = PhasePlan((phase("a", 256 * 10**11, {"docs": 0.31, "code": 0.69}, 16), phase("b", 256, {"tests": 1.0}, 64)))
    order = RowOrder(big, {name: 10**12 for name in SIZES}, seed=0)
    assert order.first_row_of_step(10**11) == 16 * 10**11
    assert order.locate(16 * 10**11 - 1).phase == 0 and order.locate(16 * 10**11).phase == 1
    taken = order.consumed(256 * 10**11)
    assert abs(taken["docs"] - 0.31 * 256 * 10**11) <= 16


def test_each_repeat_of_a_stream_reads_every_token_once_in_a_new_order(corpus: Path) -> None:
    source = Source(str(corpus / "demo/docs/train"))
    stream, size = TokenStream("docs", source, seed=3), source.tokens
    whole = np.concatenate([source.read(c, 0, int(n)) for c, n in enumerate(source.chunk_tokens)])
    repeats = [stream.read(r * size, size) for r in range(3)]
    for tokens in repeats:
        assert (np.sort(tokens) == np.sort(whole)).all()
    assert not (repeats[0] == repeats[1]).all()
    # Any stretch, also across chunks and repeats, is a piece of the same stream.
    endless = np.concatenate(repeats)
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(2 * size)
        n = rng.randint(1, min(3000, 3 * size - start))
        assert (stream.read(start, n) == endless[start : start + n]).all()


def test_held_out_rows_are_spread_over_the_split_without_overlap(corpus: Path) -> None:
    source = Source(str(corpus / "demo/docs/val"))
    whole = TokenStream("val", source, seed=0).read(0, source.tokens).tolist()
    for rows in (1, 4, 7, 10**6):
        held_out = HeldOutText(source, seq_len=32, rows=rows, batch_rows=3, eos_id=None)
        batches = [held_out[i] for i in range(len(held_out))]
        assert sum(len(batch.input_ids) for batch in batches) == min(rows, (source.tokens - 1) // 32)
        starts = [r * held_out.stride for r in range(held_out.n_rows)]
        assert all(b - a >= 32 for a, b in pairwise(starts)) and starts[-1] + 33 <= source.tokens
        tokens = [token for batch in batches for row in batch.labels.tolist() for token in row]
        assert tokens == [token for start in starts for token in whole[start + 1 : start + 33]]
    assert held_out[len(held_out)].counts["tokens"] == 0  # what evens out the ranks counts nothing
