"""GRPO's loss against a naive float64 one and hand calculations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nb_lightning.batch import IGNORE, RolloutBatch, pack_responses
from nb_lightning.losses import grpo
from tests.losses.counting_harness import HeadProducts
from tests.losses.pairs_harness import D, V


def rollout(logprobs: Sequence[Sequence[float]], trained: Sequence[Sequence[int]], **fields: Any) -> tuple[Any, ...]:
    """Hidden states and head whose log-probabilities of label 0 are `logprobs` [C, T]; 0 in `trained` masks."""
    p = torch.tensor(logprobs, dtype=torch.float64).exp()
    hidden = torch.stack([p.log(), (1 - p).log()], -1).view(1, -1, 2).requires_grad_()
    mask, (C, T) = torch.tensor(trained, dtype=torch.bool).flatten(), p.shape
    index = torch.arange(C, dtype=torch.int32).repeat_interleave(T)
    batch = RolloutBatch(
        torch.zeros(1, C * T, dtype=torch.int64), torch.where(mask, 0, IGNORE).view(1, -1),
        completion_index=torch.where(mask, index, -1).view(1, -1), **fields,
    )  # fmt: skip
    return hidden, torch.eye(2, dtype=torch.float64), batch


def per_token(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1)


# Two completions of three tokens; ratios to the old policy, advantages 1 and -2; clipped at 0.8 and 1.3.
RATIOS = [[1.0, 1.5, 0.5], [1.5, 0.5, 1.1]]
LOGPROBS = [[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]
# -min(r A, clip(r) A): 1.0, 1.3 (clipped high), 0.5 | 3.0 (r above counts in full), 1.6 (clipped low), 2.2
TOKEN_LOSSES = [[-1.0, -1.3, -0.5], [3.0, 1.6, 2.2]]


def rollout_by_hand(trained: Sequence[Sequence[int]]) -> tuple[Any, ...]:
    old = [[-1.0 - math.log(r) for r in row] for row in RATIOS]
    return rollout(LOGPROBS, trained, advantages=torch.tensor([1.0, -2.0]), old_logprobs=per_token(old))


def loss_by_hand(trained: Sequence[Sequence[int]], normalisation: str) -> float:
    hidden, head_weight, batch = rollout_by_hand(trained)
    loss, _ = grpo.grpo_loss(
        hidden, head_weight, batch, batch.counts, clip_high=0.3, normalisation=normalisation, max_tokens=10
    )
    return loss.item()


def test_the_clipped_loss_and_its_gradient_equal_numbers_by_hand() -> None:
    hidden, head_weight, batch = rollout_by_hand([[1, 1, 1], [1, 1, 1]])
    loss, sums = grpo.grpo_loss(hidden, head_weight, batch, batch.counts, clip_high=0.3)
    assert loss.item() == pytest.approx(sum(map(sum, TOKEN_LOSSES)) / 6)
    assert sums["clipped_low"] == 1 and sums["clipped_high"] == 1 and sums["ref_kl"] == sums["rollout_gap"] == 0
    # d loss / d logprob = -r A where not clipped, 0 where clipped; d logprob / d logit of the label = 1 - p
    (gradient,) = torch.autograd.grad(loss, hidden)
    factor = (1 - math.exp(-1)) / 6
    expected = [-1.0 * factor, 0.0, -0.5 * factor, 3.0 * factor, 0.0, 2.2 * factor]
    assert gradient[0, :, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "normalisation, expected",
    [("token", (-2.8 + 4.6) / 5), ("sequence", (-2.8 / 3 + 4.6 / 2) / 2), ("constant", (-2.8 + 4.6) / 10 / 2)],
)
def test_a_masked_token_is_in_neither_numerator_nor_denominator(normalisation: str, expected: float) -> None:
    trained = [[1, 1, 1], [1, 1, 0]]
    assert rollout_by_hand(trained)[2].counts == {"tokens": 5, "completions": 2}
    assert loss_by_hand(trained, normalisation) == pytest.approx(expected)


@pytest.mark.parametrize("normalisation, expected", [("token", -2.8 / 3), ("sequence", -2.8 / 3), ("constant", -0.28)])
def test_a_truncated_completion_is_in_neither_numerator_nor_denominator(normalisation: str, expected: float) -> None:
    trained = [[1, 1, 1], [0, 0, 0]]
    assert rollout_by_hand(trained)[2].counts == {"tokens": 3, "completions": 1}
    assert loss_by_hand(trained, normalisation) == pytest.approx(expected)


def random_rollout(lengths: Sequence[int], truncated: Sequence[int] = ()) -> tuple[Tensor, Tensor, RolloutBatch]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    responses = [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]
    packed, index = pack_responses([[1, 2]] * len(lengths), responses)
    for i in truncated:
        packed["labels"][index == i] = IGNORE
        index[index == i] = -1
    T = index.numel()
    batch = RolloutBatch(
        **packed, completion_index=index, advantages=draw(len(lengths)).float(), old_logprobs=-1.5 + draw(1, T) / 3,
        ref_logprobs=-1.5 + draw(1, T) / 3, rollout_logprobs=-1.5 + draw(1, T) / 3,
    )  # fmt: skip
    return draw(1, T, D).requires_grad_(), draw(V, D).requires_grad_(), batch


def naive_grpo(
    hidden: Tensor, head_weight: Tensor, batch: RolloutBatch, on_policy: bool, normalisation: str, kl_weight: float
) -> Tensor:
    logprobs = (hidden[0] @ head_weight.T).log_softmax(-1)
    sequences = []
    for i, advantage in enumerate(batch.advantages.double()):
        values = []
        for t in (batch.completion_index[0] == i).nonzero().flatten().tolist():
            lp = logprobs[t, batch.labels[0, t]]
            r = (lp - (lp.detach() if on_policy else batch.old_logprobs[0, t])).exp()
            value = -torch.minimum(r * advantage, r.clamp(0.9, 1.4) * advantage)
            d = batch.ref_logprobs[0, t] - lp
            values.append(value + kl_weight * (d.exp() - d - 1))
        if values:
            sequences.append(torch.stack(values))
    if normalisation == "token":
        return torch.cat(sequences).mean()
    if normalisation == "sequence":
        return torch.stack([x.mean() for x in sequences]).mean()
    return torch.stack([x.sum() / 11 for x in sequences]).mean()


@pytest.mark.parametrize("normalisation", grpo.NORMALISATIONS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_grpo_and_its_gradients_equal_the_naive_loss(normalisation: str, on_policy: bool, kl_weight: float) -> None:
    hidden, head_weight, batch = random_rollout([4, 1, 0, 7, 3], truncated=[3])
    expected = naive_grpo(hidden, head_weight, batch, on_policy, normalisation, kl_weight)
    if on_policy:
        batch.old_logprobs = None
    loss, sums = grpo.grpo_loss(
        hidden, head_weight, batch, batch.counts, clip_low=0.1, clip_high=0.4, normalisation=normalisation,
        max_tokens=11, kl_weight=kl_weight, chunk_size=3,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, head_weight)), torch.autograd.grad(expected, (hidden, head_weight))
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert batch.counts == {"tokens": 8, "completions": 3} and sums["ref_kl"] > 0 and sums["rollout_gap"] > 0
    assert sums.keys() == grpo.GRPO_PER.keys()


def test_nothing_but_truncated_completions_is_no_nan() -> None:
    hidden, head_weight, batch = random_rollout([4, 2], truncated=[0, 1])
    for normalisation in grpo.NORMALISATIONS:
        loss, _ = grpo.grpo_loss(
            hidden, head_weight, batch, batch.counts, normalisation=normalisation, max_tokens=5, kl_weight=1
        )
        assert batch.counts == {"tokens": 0, "completions": 0} and loss == 0
        assert all((x == 0).all() for x in torch.autograd.grad(loss, (hidden, head_weight)))


def test_advantages_are_standardised_in_their_group_and_0_where_rewards_are_equal() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 3.0]])
    advantages, constant = grpo.group_advantages(rewards)
    assert constant == 1 and (advantages[1] == 0).all()
    std = math.sqrt(4 * 0.25 / 3) + 1e-4
    assert advantages[0].tolist() == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std])
    unscaled, _ = grpo.group_advantages(rewards, scale=False)
    assert unscaled[2].tolist() == pytest.approx([-0.75, -0.75, -0.75, 2.25])
    alone, constant = grpo.group_advantages(torch.ones(3, 1))
    assert constant == 3 and (alone == 0).all()


def test_grpo_takes_three_products_on_policy_or_not() -> None:
    hidden, head_weight, batch = random_rollout([4, 7, 3], truncated=[1])
    with HeadProducts(V) as counted:
        grpo.grpo_loss(hidden, head_weight, batch, batch.counts, kl_weight=0.1, chunk_size=2)[0].backward()
    assert counted.multiplications == 3 * 7 * V * D
