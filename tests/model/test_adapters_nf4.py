"""QLoRA: the base in 4 bits."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nb_lightning.config.schema import AdapterConfig
from tests.model.adapters_harness import (
    SHAPE,
    InMemory,
    adapted,
    base_weights,
    dequantised,
    loss_of,
    train,
    trained,
    trained_parameters,
)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_the_nearest_of_sixteen_values_in_blocks_of_64(double_quant: bool) -> None:
    """QLoRA (arXiv 2305.14314), section 3: quantiles of the normal distribution, scaled by each block's largest."""
    levels = torch.tensor([-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
                           0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0])  # fmt: skip
    base = base_weights()
    model = adapted(AdapterConfig("qlora", double_quant=double_quant), base)
    for key in ("layers.0.attention.k_proj.weight", "layers.1.mlp.down_proj.weight"):
        blocks = base.read(key).view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        expected = levels[(blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale
        found = dequantised(model).read(key).view(-1, 64)
        # Scales in 8 bits are off by less than 1 % of the largest.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(scale.max()) if double_quant else 1e-6)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    shape = replace(SHAPE, d_mlp=96)
    with pytest.raises(ValueError, match=r"qlora needs layers whose number of inputs is a multiple of 64, .* with 96"):
        adapted(AdapterConfig("qlora"), base_weights(shape), shape)


def test_gradients_are_those_through_the_dequantised_base_before_and_after_an_evaluation() -> None:
    """bitsandbytes packs weights anew in eval mode on some CPUs, and then gives no gradient to what comes before."""
    model = adapted(AdapterConfig("qlora"), base_weights())
    train(model, 3)
    reference = adapted(AdapterConfig("lora"), dequantised(model))
    reference.load_state_dict(trained(model).tensors, strict=False)
    for evaluated in (False, True):
        if evaluated:
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss_of(model)
            model.train()
        for m in (model, reference):
            m.zero_grad()
            loss_of(m).backward()
        for name, p in trained_parameters(model).items():
            torch.testing.assert_close(p.grad, trained_parameters(reference)[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_products_with_4_bit_weights_run_in_the_compute_dtype(compute: str) -> None:
    model = adapted(AdapterConfig("qlora", compute_dtype=compute), base_weights())
    seen = []
    original = torch.ops.bitsandbytes.gemm_4bit.default

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Spy():
        loss_of(model).backward()
    assert len(seen) == 14 and set(seen) == {getattr(torch, compute)}


def test_loading_holds_one_full_tensor_at_a_time_and_allocates_only_what_stays() -> None:
    base, alive, most = base_weights(), [], 0

    class Reader(InMemory):
        def read(self, name: str) -> Tensor:
            nonlocal most
            tensor = base.tensors[name].clone()
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    model = adapted(AdapterConfig("qlora"), Reader(base.tensors))
    gc.collect()
    assert most <= 2 and not any(ref() is not None for ref in alive)
    size = sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad)
    linears = SHAPE.count_parameters() - 2 * 260 * 64 - 5 * 64
    assert size == linears / 2 + (2 * 260 * 64 + 5 * 64) * 4
