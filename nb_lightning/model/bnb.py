"""bitsandbytes: its 8-bit optimizers and its 4-bit linear layers; the only file that imports it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from nb_lightning.model.transformer import Layer, Transformer

# On some CPUs its import (peft imports it too) advises to install a package that would download kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
BLOCK_SIZE = 64  # weights with a common scale


def import_bitsandbytes(setting: str) -> Any:
    """Return the module `bitsandbytes`.

    Raises:
        ValueError: it is not installed; the message names `setting`, which asks for it.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"{setting} needs bitsandbytes ({error}); pip install 'nb_lightning[bnb]'") from error
    return bitsandbytes


@functools.cache
def _linear_class(setting: str) -> Any:
    """Return the class `Linear4bit`, which exists only where bitsandbytes does."""
    bnb = import_bitsandbytes(setting)

    class Linear4bit(bnb.nn.Linear4bit):
        """A frozen linear layer in NF4 that behaves under autocast as `nn.Linear` does."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # Otherwise a forward in eval mode on a CPU with AVX512-BF16 packs the weights anew, and from then on a
            # forward in training mode gives no gradient to its input.
            self.support_avx512bf16_for_cpu = False

        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            if torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
            return super().forward(x)

    return Linear4bit


def empty_linears(model: Transformer, compute_dtype: torch.dtype, setting: str, double_quant: bool = True) -> None:
    """Replace the linears of all layers of a model on `meta` by NF4 layers without content; `quantise` fills them.

    Args:
        compute_dtype: of the products.
        setting: the setting that asks for it, for error messages.
        double_quant: also quantise the scales of the blocks of 64 weights: 0.516 bytes a weight instead of 0.5625.

    Raises:
        ValueError: bitsandbytes is missing, or a row is not whole blocks: on the CPU it would give back other weights.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for block in (layer.attention, layer.mlp):
            for name, linear in list(block.named_children()):
                assert isinstance(linear, nn.Linear)
                setattr(block, name, _empty_linear(linear, compute_dtype, setting, double_quant))


def _empty_linear(old: nn.Linear, compute_dtype: torch.dtype, setting: str, double_quant: bool) -> nn.Linear:
    if old.in_features % BLOCK_SIZE:
        raise ValueError(
            f"{setting} needs layers whose number of inputs is a multiple of {BLOCK_SIZE}, and this model has one with "
            f"{old.in_features}: bitsandbytes reads others wrong on the CPU"
        )
    # The constructor and `to_empty` allocate the whole weight in full precision: not on `meta`, nor of size 0.
    with torch.device("meta"):
        new = _linear_class(setting)(
            old.in_features, old.out_features, bias=False, compute_dtype=compute_dtype,
            compress_statistics=double_quant, quant_type="nf4",
        )  # fmt: skip
    new.weight.data = torch.empty(0, dtype=torch.uint8, device=old.weight.device)
    new.double_quant = double_quant
    return new


@torch.no_grad()
def quantise(linear: Any, weight: Tensor) -> None:
    """Quantise `weight` [out, in] into a layer of `empty_linears`, on the layer's device."""
    device = linear.weight.device
    params_class = import_bitsandbytes("a layer in 4 bits").nn.Params4bit
    quantised = params_class(
        weight.to(device),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=linear.double_quant,
        module=linear,
    ).to(device)
    quantised.quant_state.dtype = linear.compute_dtype  # of the dequantised weight
    linear.weight = quantised
