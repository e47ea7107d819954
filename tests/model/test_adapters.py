"""LoRA and QLoRA: the low-rank step by hand, a base that stays as it is, and every mistake one line."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from nb_lightning.config.checks import check
from nb_lightning.config.schema import AdapterConfig
from nb_lightning.model import adapters, bnb
from nb_lightning.model.transformer import Transformer
from nb_lightning.model.weights import load_weights
from nb_lightning.stages.optim import build_optimizer
from tests.config.harness import composed
from tests.model.adapters_harness import SHAPE, adapted, base_weights, loss_of, train, trained


def test_a_step_is_the_low_rank_step_by_hand() -> None:
    """In float64: gradients of A and B from that of the whole matrix, then AdamW's first step."""
    cfg = AdapterConfig("lora", rank=3, alpha=5.0, targets=["o_proj"])
    model = adapted(cfg, base_weights()).double()
    layer = model.layers[0].attention.o_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.nn.init.normal_(b, generator=torch.Generator().manual_seed(1))
    before_a, before_b = a.detach().clone(), b.detach().clone()

    plain = Transformer(SHAPE).double()
    load_weights(plain, base_weights())
    whole = [plain.layers[i].attention.o_proj.weight for i in range(2)]
    with torch.no_grad():
        whole[0] += 5 / 3 * b @ a
    loss = loss_of(plain)
    loss.backward()
    gradient_a, gradient_b = 5 / 3 * b.T @ whole[0].grad, 5 / 3 * whole[0].grad @ a.T

    optimizer = build_optimizer(model, "adamw", (0.9, 0.95), 1e-8, weight_decay=0.1)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [
        p for layer in model.layers for p in layer.attention.o_proj.parameters() if p.requires_grad
    ]
    optimizer.param_groups[0]["lr"] = 1e-3
    assert loss_of(model).item() == pytest.approx(loss.item(), abs=1e-12)
    loss_of(model).backward()
    torch.testing.assert_close(a.grad, gradient_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b.grad, gradient_b, rtol=1e-9, atol=1e-12)
    optimizer.step()
    for now, before, gradient in ((a, before_a, gradient_a), (b, before_b, gradient_b)):
        expected = before * (1 - 1e-3 * 0.1) - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(now.detach(), expected, rtol=1e-9, atol=1e-12)


def test_at_the_start_the_model_is_its_base_and_depends_on_the_seed_alone() -> None:
    plain = Transformer(SHAPE)
    model = adapted(AdapterConfig("lora"), base_weights())
    assert torch.equal(loss_of(model), loss_of(plain))
    a = model.layers[1].mlp.down_proj.lora_A.default.weight.detach()
    assert a.abs().max() <= 128**-0.5 and float(a.std()) == pytest.approx(128**-0.5 / math.sqrt(3), rel=0.1)
    again = adapted(AdapterConfig("lora", targets=["down_proj"]), base_weights())
    assert torch.equal(a, again.layers[1].mlp.down_proj.lora_A.default.weight)


@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_loss_falls_and_the_base_stays_to_the_last_bit(name: str, precision: str) -> None:
    model = adapted(AdapterConfig(name, rank=4), base_weights(), precision=precision)
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    values = train(model, 8, mixed=precision == "bf16-mixed")
    assert values[-1] < values[0] - 0.5
    for key, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in key)
        assert (
            p.dtype == (torch.float32 if p.requires_grad or precision == "32-true" else torch.bfloat16)
            or p.dtype == torch.uint8
        )
        if key in frozen:
            assert torch.equal(p, frozen[key])
    assert ("layers.0.mlp.up_proj.base_layer.weight" in frozen) and len(frozen) == 21
    four_bit = [key for key, p in frozen.items() if p.dtype == torch.uint8]
    assert len(four_bit) == (14 if name == "qlora" else 0)


def test_also_train_trains_a_full_layer_and_keeps_all_weights_in_float32() -> None:
    cfg = AdapterConfig("lora", targets=["q_proj"], also_train=["head"])
    model = adapted(cfg, base_weights(), precision="bf16-mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = [key for key in trained(model).stored if ".lora_" not in key]
    assert names == ["head.weight"]


@pytest.mark.parametrize(
    "cfg",
    [
        AdapterConfig("lora"),
        AdapterConfig("qlora", rank=3, targets=["v_proj", "gate_proj"]),
        AdapterConfig("lora", also_train=["embedding", "head"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_of_trained_parameters_is_that_of_the_model(cfg: AdapterConfig, tied: bool) -> None:
    shape = replace(SHAPE, tie_embeddings=tied)
    model = adapted(cfg, base_weights(shape), shape)
    number = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapters.count_trained_parameters(shape, cfg) == number
    assert adapters.count_trained_parameters(shape, AdapterConfig()) == shape.count_parameters()


def test_dropout_is_drawn_again_when_a_layer_is_recomputed() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(AdapterConfig("lora", dropout=0.5), base_weights())
        model.activation_checkpointing = checkpointing
        for p in trained(model).tensors.values():
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        loss_of(model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients)
    model.eval()
    assert torch.equal(loss_of(model), loss_of(model))


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("name=dora", "stage.adapter.name is 'dora'; allowed: none, lora, qlora"),
        ("name=lora rank=0", "stage.adapter.rank is 0; it must be positive"),
        ("name=lora alpha=-1", "stage.adapter.alpha is -1.0; it must be positive"),
        ("name=lora dropout=1", "stage.adapter.dropout is 1.0; it must be from 0 to below 1"),
        ("name=lora targets=[]", "stage.adapter.targets is empty; allowed: q_proj, k_proj"),
        ("name=lora targets=[q_proj,head]", "stage.adapter.targets[1] is 'head'; allowed: q_proj, k_proj"),
        ("name=lora also_train=[norm]", "stage.adapter.also_train[0] is 'norm'; allowed: embedding, head"),
        ("name=qlora compute_dtype=fp16", "stage.adapter.compute_dtype is 'fp16'; allowed: auto, float32, bfloat16"),
        ("name=lora", "stage.adapter.name=lora needs init_from"),
    ],
)
def test_a_setting_that_cannot_work_is_named(overrides: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(composed(*(f"stage.adapter.{override}" for override in overrides.split())))
    assert str(caught.value).startswith(message)


def test_qlora_refuses_fsdp() -> None:
    with pytest.raises(ValueError, match=r"^stage.adapter.name=qlora does not work with trainer.strategy=fsdp"):
        check(composed("stage.adapter.name=qlora", "init_from=x", "trainer=fsdp", "stage.micro_batch_size=1"))


@pytest.mark.parametrize(
    "missing, message", [("peft", "stage.adapter needs peft"), ("bitsandbytes", "stage.adapter.name=qlora needs bits")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    bnb._linear_class.cache_clear()
    with pytest.raises(ValueError, match=f"{message}.*pip install 'nb_lightning"):
        adapted(AdapterConfig("qlora"), base_weights())
