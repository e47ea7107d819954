"""Low-rank adapters on a frozen base: LoRA, and QLoRA with the base's layers in 4 bits (NF4).

A linear layer W of the base becomes W + alpha / rank * B @ A; only A [rank, in] and B [out, rank] train. `peft` puts
them in, so what trains here is what it loads elsewhere; `Merged` adds them to the base's weights one tensor at a time,
for whoever reads a checkpoint: a later stage, generation, export. For that neither peft nor bitsandbytes is needed.

    training:  attach (on `meta`) -> lay out, allocate -> fill (quantises each layer as it is read)
    after it:  a checkpoint holds what trained and the digests of the base -> Merged
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
    """peft's own description of the adapters."""
    return _peft().LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=list(cfg.targets), bias="none",
        task_type="CAUSAL_LM", **more,
    )  # fmt: skip


# Training -----------------------------------------------------------------------------------------------------------


def frozen_dtype(cfg: AdapterConfig, precision: str) -> torch.dtype:
    """Of the frozen weights that are not in 4 bits.

    bfloat16 under any bf16 precision: their products are in bfloat16 anyway. But a part that is trained whole
    (`also_train`) stays float32 under bf16-mixed, and outside autocast all must be of one dtype.
    """
    mixed = precision == "bf16-mixed" and not cfg.also_train
    return torch.bfloat16 if precision == "bf16-true" or mixed else torch.float32


def compute_dtype(cfg: AdapterConfig, precision: str) -> torch.dtype:
    """Of the products with 4-bit weights."""
    if cfg.compute_dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.compute_dtype]
    return torch.float32 if precision == "32-true" else torch.bfloat16


def attach(model: Transformer, cfg: AdapterConfig, precision: str) -> None:
    """Freeze a model on `meta` and put adapters in; under qlora its layers' linears become 4-bit ones without content.

    Raises:
        ValueError: peft or bitsandbytes is missing.
    """
    peft = _peft()
    trained = next(model.parameters()).dtype
    model.to(frozen_dtype(cfg, precision))
    if cfg.name == "qlora":
        model.is_loaded_in_4bit = True  # peft looks for it
        bnb.empty_linears(model, compute_dtype(cfg, precision), "stage.adapter.name=qlora", cfg.double_quant)
    with torch.device("meta"):
        peft.inject_adapter_in_model(peft_config(cfg), model, low_cpu_mem_usage=True)
    for name in cfg.also_train:
        model.get_submodule(name).weight.requires_grad_(True)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad and p.dtype != trained:
                setattr(module, name, nn.Parameter(p.to(trained)))
    model.tie()
    model.draws = cfg.dropout > 0


def fill(model: Transformer, weights: Weights, seed: int) -> dict[str, str]:
    """Fill the base from `weights` and the adapters with their start: A drawn as `nn.Linear` does, B zero.

    A layer in 4 bits is quantised as it is read, so at most one tensor of it is there in full.

    Returns:
        The SHA-256 of each tensor of the base, see `Weights.digest`.

    Raises:
        ValueError: see `Weights.require`.
    """
    weights.require(model.shape)
    for name, parameter in list(model.named_parameters()):
        if name.endswith(A):
            # Its own generator for each: the start depends on `seed` alone, not on order, device or sharding.
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
    """A parameter's name before peft wrapped its layer."""
    return name.replace(".base_layer.", ".")


def trained_parameters(shape: ModelShape, cfg: AdapterConfig) -> int:
    """How many parameters train."""
    if cfg.name == "none":
        return shape.parameters()
    shapes = parameter_shapes(shape)
    adapters = [cfg.rank * sum(dims) for name, dims in shapes.items() if name.split(".")[-2] in cfg.targets]
    whole = {"head": "embedding"} if shape.tie_embeddings else {}
    names = {whole.get(name, name) for name in cfg.also_train}
    return sum(adapters) + sum(torch.Size(shapes[f"{name}.weight"]).numel() for name in names)


# Identity of the base -----------------------------------------------------------------------------------------------


def require_same_base(saved: Mapping[str, str], found: Mapping[str, str], given: str, trained_on: str) -> None:
    """Refuse adapters on another base than theirs; `saved` and `found` map tensors to digests.

    Raises:
        ValueError: names what was given, what they were trained on, and the first tensor that differs.
    """
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise ValueError(
                f"{given} is not the base that the adapters were trained on ({trained_on}, as it was then): "
                f"tensor {name} differs"
            )


class Merged(Weights):
    """A base with adapters added: what the run's model computes, as plain weights.

    Tensors that adapters change come as float32, for whoever rounds them to round once. Each tensor of the base is
    compared with its digest when it is read.

    Args:
        base: the weights that the run began with.
        trained: the tensors in the run's checkpoint.
        saved: what the checkpoint says of its adapters.
    """

    def __init__(self, base: Weights, trained: Weights, saved: Mapping[str, Any]) -> None:
        whole = {name: stored for name, stored in trained.stored.items() if not name.endswith((A, B))}
        super().__init__(trained.origin, {**base.stored, **whole}, base.dtype)
        self.base, self.trained, self.saved = base, trained, saved
        self.scale = saved["alpha"] / saved["rank"]

    def read(self, name: str) -> Tensor:
        if name in self.trained.stored:
            return self.trained.read(name)
        known, found = self.saved["base"]["tensors"].get(name), self.base.digest(name)
        require_same_base({name: known}, {name: found}, self.base.origin, self.saved["base"]["path"])
        whole = self.base.read(name)
        layer = name.removesuffix(".weight")
        if layer + A not in self.trained.stored:
            return whole
        wide = torch.promote_types(whole.dtype, torch.float32)
        a, b = self.trained.read(layer + A).to(wide), self.trained.read(layer + B).to(wide)
        return torch.addmm(whole.to(wide), b, a, alpha=self.scale)

    def digest(self, name: str) -> str:
        """Of what the tensor is made from: the sum itself may differ in its last bits between machines."""
        layer = name.removesuffix(".weight")
        parts = [name] if name in self.trained.stored else [layer + A, layer + B]
        made_of = [self.trained.digest(part) for part in parts if part in self.trained.stored]
        made_of += [self.base.digest(name), repr(self.scale)]
        return hashlib.sha256(" ".join(made_of).encode()).hexdigest()
