"""The reward model's loss against hand calculations."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from nb_lightning.batch import IGNORE
from nb_lightning.losses import pairwise


def test_the_reward_models_loss_equals_numbers_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 3.0], [1.0, 1.5, 0.0]], dtype=torch.float64)
    hidden, head_weight = logits.unsqueeze(0).requires_grad_(), torch.eye(3, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[0, IGNORE, 0]])  # answers are tokens 0 and 1; the second row says the wrong one
    counts = {"tokens": torch.tensor(2)}
    reward_loss = partial(pairwise.pairwise_reward_loss, hidden, head_weight, counts=counts, answers=(0, 1))
    loss, sums = reward_loss(labels)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(0.5))) / 2)
    assert sums == {"accuracy": 1} and sums.keys() == pairwise.REWARD_PER.keys()
    (gradient,) = torch.autograd.grad(loss, hidden)
    a, b = 0.5 / (1 + math.exp(1.5)), 0.5 / (1 + math.exp(-0.5))
    assert gradient[0].flatten().tolist() == pytest.approx([-a, a, 0, 0, 0, 0, -b, b, 0])
    whole, _ = reward_loss(labels, kind="cross_entropy")
    assert whole.item() == pytest.approx(-logits.log_softmax(-1)[[0, 2], [0, 0]].mean().item())
    swapped, _ = reward_loss(torch.tensor([[1, IGNORE, 1]]))
    assert swapped.item() == pytest.approx((math.log(1 + math.exp(1.5)) + math.log(1 + math.exp(-0.5))) / 2)
    nothing, sums = reward_loss(torch.full((1, 3), IGNORE))
    assert nothing == sums["accuracy"] == 0 and (torch.autograd.grad(nothing, hidden)[0] == 0).all()
