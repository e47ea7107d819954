"""Low-rank adapters on a frozen base: LoRA, and QLoRA with the base's layers in 4 bits (NF4).

A linear layer W of the base becomes W + alpha / rank * B @ A; only A [rank, in] and B [out, rank] train. `peft` inserts
them, so peft can load what was trained here. `MergedWeights` adds them to the base's weights one tensor at a time, for
a later stage, generation and export; it needs neither peft nor bitsandbytes.

    training:       attach (on `meta`) -> shard, allocate -> load_base (quantises each layer as it is read)
    a checkpoint:   holds what trained and the digests of the base -> MergedWeights
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nb_lightning.model import bnb
from nb_lightning.model.transformer import ModelShape, Transformer, copy_into
from nb_lightning.model.weights import Weights, parameter_shapes

if TYPE_CHECKING:  # the schema imports OmegaConf
    from nb_lightning.config.schema import AdapterConfig

A, B = ".lora_A.default.weight", ".lora_B.default.weight"


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"stage.adapter needs peft ({error}); pip install 'nb_lightning[peft]'") from error
    return peft


def peft_config(cfg: AdapterConfig, **more: Any) -> Any:
    """Describe the adapters to peft; `more` are further arguments of `LoraConfig`."""
    return _peft().LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=list(cfg.targets), bias="none",
        task_type="CAUSAL_LM", **more,
    )  # fmt: skip


# Training -----------------------------------------------------------------------------------------------------------


def frozen_dtype(cfg: AdapterConfig, precision: str) -> torch.dtype:
    """Return the dtype of the frozen weights that are not in 4 bits.

    bfloat16 under any bf16 precision: their products are in bfloat16 anyway. But a full layer that trains
    (`also_train`) stays float32 under bf16-mixed, and outside autocast all weights need one dtype.
    """
    mixed = precision == "bf16-mixed" and not cfg.also_train
    return torch.bfloat16 if precision == "bf16-true" or mixed else torch.float32


def compute_dtype(cfg: AdapterConfig, precision: str) -> torch.dtype:
    """Return the dtype of the products with 4-bit weights."""
    if cfg.compute_dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.compute_dtype]
    return torch.float32 if precision == "32-true" else torch.bfloat16


def attach(model: Transformer, cfg: AdapterConfig, precision: str) -> None:
    """Freeze a model on `meta` and insert adapters; under qlora, replace its layers' linears by empty 4-bit ones.

    Raises:
        ValueError: peft or bitsandbytes is missing.
    """
    peft = _peft()
    trained_dtype = next(model.parameters()).dtype
    model.to(frozen_dtype(cfg, precision))
    if cfg.name == "qlora":
        model.is_loaded_in_4bit = True
        bnb.empty_linears(model, compute_dtype(cfg, precision), "stage.adapter.name=qlora", cfg.double_quant)
    with torch.device("meta"):
        peft.inject_adapter_in_model(peft_config(cfg), model, low_cpu_mem_usage=True)
    for name in cfg.also_train:
        model.get_submodule(name).weight.requires_grad_(True)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad and p.dtype != trained_dtype:
                setattr(module, name, nn.Parameter(p.to(trained_dtype)))
    model.tie()
    model.is_stochastic = cfg.dropout > 0


def load_base(model: Transformer, weights: Weights, seed: int) -> dict[str, str]:
    """Load the base from `weights` and initialise the adapters: A as `nn.Linear` does, B zero.

    A layer in 4 bits is quantised as it is read, so only one full tensor is in memory at a time.

    Returns:
        The SHA-256 of each tensor of the base, see `Weights.digest`.

    Raises:
        ValueError: see `Weights.require`.
    """
    weights.require(model.shape)
    for name, parameter in list(model.named_parameters()):
        if name.endswith(A):
            # A generator for each: the result depends on `seed` alone, not on order, device or sharding.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bound = parameter.shape[1] ** -0.5
            copy_into(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif name.endswith(B):
            copy_into(parameter, torch.zeros(parameter.shape))
        elif parameter.dtype == torch.uint8:
            bnb.quantise(model.get_submodule(name.removesuffix(".weight")), weights.read(base_name(name)))
        else:
            copy_into(parameter, weights.read(base_name(name)))
    return {name: weights.digest(name) for name in parameter_shapes(model.shape)}


def base_name(name: str) -> str:
    """Return the name that a parameter had before peft wrapped its layer."""
    return name.replace(".base_layer.", ".")


def count_trained_parameters(shape: ModelShape, cfg: AdapterConfig) -> int:
    """Count the parameters that train."""
    if cfg.name == "none":
        return shape.count_parameters()
    shapes = parameter_shapes(shape)
    adapters = [cfg.rank * sum(dims) for name, dims in shapes.items() if name.split(".")[-2] in cfg.targets]
    tied = {"head": "embedding"} if shape.tie_embeddings else {}
    full_layers = {tied.get(name, name) for name in cfg.also_train}
    return sum(adapters) + sum(torch.Size(shapes[f"{name}.weight"]).numel() for name in full_layers)


# Identity of the base -----------------------------------------------------------------------------------------------


def require_same_base(saved: Mapping[str, str], actual: Mapping[str, str], base: str, trained_on: str) -> None:
    """Check that a base is the one that the adapters were trained on.

    Args:
        saved, actual: digest of each tensor, then and now.
        base: the base, for the message.
        trained_on: where the base lay in training.

    Raises:
        ValueError: names both bases, and the first tensor that differs.
    """
    for name in sorted(saved.keys() | actual.keys()):
        if saved.get(name) != actual.get(name):
            raise ValueError(
                f"{base} is not the base that the adapters were trained on ({trained_on}, as it was then): "
                f"tensor {name} differs"
            )


class MergedWeights(Weights):
    """A base with adapters added: what the run's model computes, as plain weights.

    Tensors that adapters change are read as float32, so that they are rounded only once, where they are used. Each
    tensor of the base is compared with its digest when it is read.

    Args:
        base: the weights that the run began with.
        trained: the tensors in the run's checkpoint.
        saved: the entry "adapter" of the checkpoint: alpha, rank, and path and digests of the base.
    """

    def __init__(self, base: Weights, trained: Weights, saved: Mapping[str, Any]) -> None:
        full_layers = {name: stored for name, stored in trained.stored.items() if not name.endswith((A, B))}
        super().__init__(trained.origin, {**base.stored, **full_layers}, base.dtype)
        self.base, self.trained, self.saved = base, trained, saved
        self.scale = saved["alpha"] / saved["rank"]

    def read(self, name: str) -> Tensor:
        """Read a tensor of the base and add its adapter, if it has one.

        Raises:
            ValueError: the base has changed, see `require_same_base`.
        """
        if name in self.trained.stored:
            return self.trained.read(name)
        saved, actual = self.saved["base"]["tensors"].get(name), self.base.digest(name)
        require_same_base({name: saved}, {name: actual}, self.base.origin, self.saved["base"]["path"])
        weight = self.base.read(name)  # [out, in] of a linear layer
        layer = name.removesuffix(".weight")
        if layer + A not in self.trained.stored:
            return weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.trained.read(layer + A).to(dtype), self.trained.read(layer + B).to(dtype)  # [rank, in], [out, rank]
        return torch.addmm(weight.to(dtype), b, a, alpha=self.scale)

    def digest(self, name: str) -> str:
        """Hash the tensors that are summed: the sum may differ in its last bits between machines."""
        layer = name.removesuffix(".weight")
        trained = [name] if name in self.trained.stored else [layer + A, layer + B]
        digests = [self.trained.digest(tensor) for tensor in trained if tensor in self.trained.stored]
        digests += [self.base.digest(name), repr(self.scale)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()
