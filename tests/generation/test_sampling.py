"""The draw against numpy in float64 and transformers' own filters: which tokens may come, and how often they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nb_lightning.generation import sampling
from nb_lightning.generation.sampling import BLOCK, NUCLEUS, Sampling, choose
from tests.generation.harness import expected, p_value

ONE = Sampling(max_new_tokens=1)


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(logits: Sequence[float] | Tensor, how: Sampling, u: Tensor) -> Tensor:
    row = torch.as_tensor(logits, dtype=torch.float32)
    return choose(row.expand(len(u), -1), [how] * len(u), u)


def possible_tokens(logits: Sequence[float] | Tensor, how: Sampling) -> list[int]:
    """Every token that can come, found by drawing with a grid of uniforms."""
    grid = torch.arange(500, dtype=torch.float64) / 500
    return sorted(set(draw(logits, how, grid).tolist()))


SETTINGS = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_p=0.5),
    dict(top_p=0.95),
    dict(top_p=0.95, temperature=0.6),
    dict(top_k=9, top_p=0.8, temperature=1.3),
]


@pytest.mark.runs
@pytest.mark.parametrize("V", [30, 3000])  # searched directly, and by blocks
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings: dict, V: int) -> None:
    how = replace(ONE, **settings)
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(1))
    p = expected(logits.double().numpy(), how)
    drawn = torch.cat([draw(logits, how, u) for u in uniforms(20_000 if V < 100 else 4000, seed=2).split(1000)])
    assert p_value(np.bincount(drawn.numpy(), minlength=V), p) > 1e-3


def test_the_chi_square_sees_a_wrong_temperature() -> None:
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, replace(ONE, temperature=1.05), uniforms(20_000))
    assert p_value(np.bincount(drawn.numpy(), minlength=30), expected(logits.double().numpy(), ONE)) < 1e-6


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_tokens_are_kept_as_by_transformers(settings: dict) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    how = replace(ONE, **settings)
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    theirs = TemperatureLogitsWarper(how.temperature)(None, logits)
    theirs = TopKLogitsWarper(how.top_k)(None, theirs) if how.top_k else theirs
    theirs = TopPLogitsWarper(how.top_p)(None, theirs) if how.top_p < 1 else theirs
    for row, warped in zip(logits, theirs):
        p = expected(row.double().numpy(), how)
        assert set(np.flatnonzero(p)) == set(torch.isfinite(warped).nonzero()[:, 0].tolist())
        order = np.argsort(-p, kind="stable") if how.top_k or how.top_p < 1 else np.arange(len(p))
        middle = np.cumsum(p[order]) - p[order] / 2  # of each token's share of [0, 1)
        large = p[order] > 1e-5
        assert draw(row, how, torch.tensor(middle[large])).tolist() == order[large].tolist()


# The edges of top-p -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logits, top_p, tokens",
    [
        ([0, 0, 0, 0], 0.5, [0, 1]),  # p at the sum of two: no third
        ([0, 0, 0, 0], 0.5 + 1e-9, [0, 1, 2]),
        ([0, 0, 0, 0], 0.25, [0]),
        ([0] * 10, 0.3, [0, 1, 2]),
        ([0, 5, 5, 0, 5], 0.34, [1, 2]),  # ties: the smaller id first
        ([0, 1, 2, 3], 1e-12, [3]),  # p -> 0: always one
        ([3, 3, 3], 1e-300, [0]),
        ([0, 0, 0, -200], 1 - 1e-12, [0, 1, 2]),
        ([7], 0.5, [0]),
    ],
)
def test_the_edge_of_the_nucleus(logits: list[float], top_p: float, tokens: list[int]) -> None:
    assert possible_tokens(logits, replace(ONE, top_p=top_p)) == tokens


@pytest.mark.parametrize(
    "top_k, tokens", [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_the_edge_of_top_k_among_equals(top_k: int, tokens: list[int]) -> None:
    assert possible_tokens([0, 5, 5, 0, 5], replace(ONE, top_k=top_k, temperature=10)) == tokens


def test_top_p_is_of_what_top_k_kept() -> None:
    """Four equals, top-k 2: p = 0.5 is one of the two, not two of the four."""
    assert possible_tokens([0, 0, 0, 0], replace(ONE, top_k=2, top_p=0.5)) == [0]


@pytest.mark.parametrize("V", [NUCLEUS, NUCLEUS + 1, 3 * NUCLEUS, 9 * NUCLEUS])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_flat_distribution_over_a_wide_vocabulary(V: int, top_p: float) -> None:
    """The nucleus is wider than what is looked at first."""
    logits = torch.zeros(V)
    logits[V // 2 :] = 0.01
    how = replace(ONE, top_p=top_p)
    p = expected(logits.double().numpy(), how)
    order = np.argsort(-logits.numpy(), kind="stable")[: (p > 0).sum()]
    some = np.unique(np.linspace(0, len(order) - 1, 200).astype(int))
    middle = (np.cumsum(p[order]) - p[order] / 2)[some]
    assert draw(logits, how, torch.tensor(middle)).tolist() == order[some].tolist()


def test_ties_across_the_width_that_is_looked_at_first() -> None:
    """bfloat16 logits of a wide vocabulary: many are equal, topk may take any of them, the draw may not."""
    logits = (torch.randn(4, 6000, generator=torch.Generator().manual_seed(0)) / 2).bfloat16().float()
    how = replace(ONE, top_k=NUCLEUS - 1)
    u = uniforms(4)
    for row, one in zip(logits, u):
        order = np.argsort(-row.numpy(), kind="stable")
        p = expected(row.double().numpy(), how)[order]
        want = order[np.searchsorted(np.cumsum(p), float(one), side="right")]
        assert draw(row, how, one[None]).tolist() == [want]


def test_only_what_is_needed_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    real = sampling._most_likely
    monkeypatch.setattr(sampling, "_most_likely", lambda s, width: widths.append(width) or real(s, width))
    peaked = torch.zeros(50_000)
    peaked[7] = 30.0
    assert draw(peaked, replace(ONE, top_p=0.9), uniforms(3)).tolist() == [7, 7, 7]
    draw(torch.randn(50_000), replace(ONE, top_p=0.05), uniforms(3))
    assert widths == [NUCLEUS, NUCLEUS, 8 * NUCLEUS]


# Any temperature, any batch -----------------------------------------------------------------------------------------


def test_temperature_0_is_the_most_likely_token() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    logits[:, [3, 7]] = 9.0  # of two, the first
    assert choose(logits, [replace(ONE, temperature=0)] * 50, uniforms(50)).tolist() == [3] * 50


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
@pytest.mark.parametrize("cut", [dict(), dict(top_p=0.9), dict(top_k=5)], ids=str)
def test_a_cold_temperature_is_greedy(temperature: float, cut: dict) -> None:
    logits = 1000 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    how = replace(ONE, temperature=temperature, **cut)
    assert torch.equal(choose(logits, [how] * 50, uniforms(50)), logits.argmax(-1))


def test_a_hot_temperature_is_uniform() -> None:
    drawn = draw(1000 * torch.randn(30), replace(ONE, temperature=1e30), uniforms(20_000))
    assert p_value(np.bincount(drawn.numpy(), minlength=30), np.full(30, 1 / 30)) > 1e-3


@pytest.mark.parametrize("V", [30, 4 * NUCLEUS])
def test_a_row_does_not_see_the_others(V: int) -> None:
    """Greedy, plain, top-k and top-p rows in one batch draw what they draw alone, and in any company."""
    logits = torch.randn(27, V, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[::3] *= 8
    hows = [replace(ONE, **settings) for settings in (*SETTINGS, *SETTINGS, *SETTINGS)]
    hows[4] = replace(ONE, temperature=0)
    u = uniforms(27)
    alone = [choose(logits[i : i + 1], [hows[i]], u[i : i + 1]).item() for i in range(27)]
    assert choose(logits, hows, u).tolist() == alone
    some = [25, 3, 4, 11, 8, 9]
    assert choose(logits[some], [hows[i] for i in some], u[some]).tolist() == [alone[i] for i in some]


@pytest.mark.parametrize("V", [4 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK - 1, 5 * BLOCK, 20 * BLOCK + 7])
def test_every_place_of_a_long_row_is_found(V: int) -> None:
    """At the beginnings of blocks, at their ends, and where some hold nothing at all."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    logits[BLOCK + 5 : 3 * BLOCK + 9] = float("-inf")
    p = expected(logits.double().numpy(), ONE)
    some = np.flatnonzero(p)[:: max(1, V // 300)]
    some = np.union1d(some, [0, BLOCK - 1, BLOCK, BLOCK + 4, 3 * BLOCK + 9, 4 * BLOCK - 1, V - 1])
    below = np.cumsum(p)
    for share in (0.001, 0.5, 0.999):
        u = below[some] - (1 - share) * p[some]
        assert draw(logits, ONE, torch.tensor(u)).tolist() == some.tolist()


def test_uniforms_at_their_ends() -> None:
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for how in (ONE, replace(ONE, top_p=0.9), replace(ONE, top_k=2)):
        assert draw([1.0, 3.0, 2.0], how, u).tolist() in ([0, 2], [1, 2])
    assert draw([float("-inf"), 0.0, 0.0], ONE, u).tolist() == [1, 2]  # never what has no probability


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_p=1.01), "top_p is 1.01"),
        (dict(top_logprobs=-2), "top_logprobs is -2"),
    ],
    ids=str,
)
def test_a_value_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ONE, **wrong)
