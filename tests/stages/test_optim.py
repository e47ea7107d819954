"""Optimizers against hand-written float64 steps, which parameters decay, and clear refusals."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.stages.optim import OPTIMIZERS, build_optimizer, clip_grad_norm, parameter_groups

SHAPE = ModelShape(vocab_size=20, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_mlp=12)
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def build(model: nn.Module, name: str = "adamw", lr: float = 0.0) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, name, BETAS, EPS, DECAY)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


# Groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_matrices_decay_and_norms_do_not(tie_embeddings: bool) -> None:
    model = Transformer(replace(SHAPE, tie_embeddings=tie_embeddings))
    decayed, plain = parameter_groups(model, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in names[p] for p in plain["params"])
    assert not any("norm" in names[p] for p in decayed["params"])
    together = [*decayed["params"], *plain["params"]]
    assert len(together) == len(set(together)) == len(names)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = Transformer(SHAPE)
    for name, p in model.named_parameters():
        p.requires_grad_(name == "layers.1.mlp.up_proj.weight")
    assert [group["params"] for group in parameter_groups(model, 0.1)] == [[model.layers[1].mlp.up_proj.weight]]


# Steps --------------------------------------------------------------------------------------------------------------


def adamw_by_hand(p: Tensor, gradients: list[Tensor], lrs: list[float], weight_decay: float) -> Tensor:
    """Decoupled weight decay, bias-corrected moments (Loshchilov and Hutter, algorithm 2), in float64."""
    p, m, v = p.double(), torch.zeros_like(p, dtype=torch.float64), torch.zeros_like(p, dtype=torch.float64)
    for t, (g, lr) in enumerate(zip(gradients, lrs), start=1):
        p = p - lr * weight_decay * p
        m = BETAS[0] * m + (1 - BETAS[0]) * g.double()
        v = BETAS[1] * v + (1 - BETAS[1]) * g.double() ** 2
        p = p - lr * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return p


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_adamw_equals_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    model = Transformer(SHAPE).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build(model)
    generator = torch.Generator().manual_seed(0)
    lrs = [0.0, 1e-2, 3e-3, 2e-2, 1e-3]  # moves while training, as a plan's does
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(dtype)
            gradients[name].append(p.grad.clone())
        optimizer.step()
    for name, p in model.named_parameters():
        expected = adamw_by_hand(before[name], gradients[name], lrs, 0.0 if p.dim() == 1 else DECAY)
        torch.testing.assert_close(p.detach().double(), expected, atol=tolerance, rtol=tolerance)


def test_a_new_optimizer_moves_nothing_before_its_rate_is_set() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.clone()
    optimizer = build_optimizer(model, "adamw", BETAS, EPS, DECAY)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert optimizer.param_groups[0]["fused"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_adamw_trains_on_cpu(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Linear(64, 64)  # 4096 weights: the least that bitsandbytes keeps in 8 bits
    x = torch.randn(256, 64)
    target = x @ torch.randn(64, 64)
    optimizer = build(model, name, lr=5e-2)
    found = []
    for _ in range(150):
        loss = (model(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.05 * found[0]
    assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


# Refusals -----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        build(nn.Linear(2, 2), "sgd")
    assert str(error.value) == f"stage.optim.name is 'sgd'; allowed: {', '.join(OPTIMIZERS)}"


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_a_missing_bitsandbytes_is_named_with_its_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=rf"^stage\.optim\.name={name} needs bitsandbytes .*'nb_lightning\[bnb\]'$"):
        build(nn.Linear(2, 2), name)


def test_adamw_needs_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    build(nn.Linear(2, 2))


# Clipping -----------------------------------------------------------------------------------------------------------


def with_gradients(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(5, 3), (7,), (2, 2, 2), (1,)]]
    for p in parameters[:-1]:  # the last one has none
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
    return parameters


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_equals_torchs(max_norm: float) -> None:
    ours, theirs = with_gradients(), with_gradients()
    norm = clip_grad_norm(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert torch.equal(norm, expected) and norm.shape == () and norm.dtype == torch.float32
    for a, b in zip(ours[:-1], theirs[:-1]):
        assert torch.equal(a.grad, b.grad)
    assert ours[-1].grad is None


def test_clipping_by_hand() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert clip_grad_norm(iter([a, b]), 3.5).item() == 7.0
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([1.0, 1.5, 3.0]))


def test_small_gradients_are_not_scaled_up() -> None:
    parameters = with_gradients(scale=1e-3)
    before = [p.grad.clone() for p in parameters[:-1]]
    clip_grad_norm(parameters, 1.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    parameters = with_gradients()
    parameters[1].grad[0] = bad
    assert not clip_grad_norm(parameters, 1.0).isfinite()


def test_no_gradients_have_norm_zero() -> None:
    assert clip_grad_norm([nn.Parameter(torch.zeros(3))], 1.0).item() == 0.0
