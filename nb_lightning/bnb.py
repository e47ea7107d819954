"""bitsandbytes: its 8-bit optimizers and its 4-bit linear layers; the only file that imports it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

# On some CPUs its import (peft imports it too) advises to install a package that would download kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
QLORA = "stage.adapter.name=qlora"
BLOCK = 64  # weights with a common scale


def load(wanted: str) -> Any:
    """The module `bitsandbytes`.

    Raises:
        ValueError: it is not installed; names `wanted`, the setting that asks for it.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{wanted} needs bitsandbytes ({error}); pip install 'nb_lightning[bnb]'") from error
    return bitsandbytes


@functools.cache
def _linear_class() -> type[nn.Linear]:
    bnb = load(QLORA)

    class Linear4bit(bnb.nn.Linear4bit):
        """A frozen linear layer in NF4 that behaves under autocast as `nn.Linear` does."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # Else, on a CPU that can do it, a forward in eval mode packs the weights anew, and from then on a forward
            # in training mode gives no gradient to its input.
            self.support_avx512bf16_for_cpu = False

        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            if torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
            return super().forward(x)

    return Linear4bit


def empty_linear(old: nn.Linear, compute_dtype: torch.dtype, double_quant: bool) -> nn.Linear:
    """An NF4 layer of the size of `old` (no bias) that holds nothing yet; `quantise` fills it.

    Args:
        compute_dtype: of the products.
        double_quant: also quantise the scales of the blocks of 64 weights: 0.516 bytes a weight instead of 0.5625.

    Raises:
        ValueError: bitsandbytes is missing, or a row is not whole blocks: on the CPU it would give back other weights.
    """
    if old.in_features % BLOCK:
        raise ValueError(
            f"{QLORA} needs layers whose number of inputs is a multiple of {BLOCK}, and this model has one with "
            f"{old.in_features}: bitsandbytes reads others wrong on the CPU; use lora"
        )
    # Its constructor allocates the whole weight, its `to_empty` would again: nothing does on `meta` or of size 0.
    with torch.device("meta"):
        new = _linear_class()(
            old.in_features, old.out_features, bias=False, compute_dtype=compute_dtype,
            compress_statistics=double_quant, quant_type="nf4",
        )  # fmt: skip
    new.weight.data = torch.empty(0, dtype=torch.uint8, device=old.weight.device)
    new.double_quant = double_quant
    return new


@torch.no_grad()
def quantise(linear: nn.Linear, whole: Tensor) -> None:
    """Fill an `empty_linear`, on its device, with `whole` [out, in]."""
    device = linear.weight.device
    weight = (
        load(QLORA)
        .nn.Params4bit(
            whole.to(device),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=linear.double_quant,
            module=linear,
        )
        .to(device)
    )
    weight.quant_state.dtype = linear.compute_dtype  # of what it gives back
    linear.weight = weight
