"""A frozen model beside the one that trains: the teacher of DPD, the reference of RL.

No module holds it, so no optimizer, checkpoint or gradient exchange sees it. Under FSDP2 it is sharded like the policy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nb_lightning.batch import PackedBatch
from nb_lightning.checkpoints.pretrained import Origin
from nb_lightning.config.schema import TrainerConfig
from nb_lightning.losses.divergence import TeacherOutputs
from nb_lightning.model import bnb
from nb_lightning.model.layout import build_model
from nb_lightning.model.transformer import ModelShape, Transformer, copy_into
from nb_lightning.model.weights import Weights


class FrozenModel:
    """A model without gradients, on its device.

    Args:
        origin: where its weights are. Under any bf16 precision they are held in bfloat16.
        trainer: the policy's trainer config.
        backend: the attention backend.
        device: where it runs.
        mesh: what its parameters are sharded over; None for one copy on every device.
        nf4: hold the layers' linears in 4 bits.

    Raises:
        ValueError: weights that do not fit together, or bitsandbytes is missing.
    """

    def __init__(
        self,
        origin: Origin,
        trainer: TrainerConfig,
        backend: str,
        device: torch.device,
        mesh: DeviceMesh | None,
        nf4: bool = False,
    ) -> None:
        weights = origin.open()
        weights.require(origin.shape)  # before memory is taken for them
        precision = "32-true" if trainer.precision == "32-true" else "bf16-true"
        settings = replace(trainer, precision=precision)
        self.model = build_model(origin.shape, settings, backend, device, mesh, None, partial(_freeze, nf4=nf4))
        _fill(self.model, weights)
        self.model.eval()

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> TeacherOutputs:
        """Run it on a batch; the outputs have one row per token, [B * T, D] hidden states."""
        hidden, weight = self.model(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, head=lambda hidden, weight: (hidden, weight)
        )
        return TeacherOutputs(hidden.flatten(0, 1), weight)


def _freeze(model: Transformer, nf4: bool) -> None:
    if nf4:
        bnb.empty_linears(model, next(model.parameters()).dtype, "stage.teacher_nf4=true")
    model.requires_grad_(False)


def _fill(model: nn.Module, weights: Weights) -> None:
    for name, parameter in list(model.named_parameters()):
        if parameter.dtype == torch.uint8:
            linear = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, nn.Linear)  # only linears are held in 4 bits
            bnb.quantise(linear, weights.read(name))
        else:
            copy_into(parameter, weights.read(name))
