"""Pretraining: next-token cross-entropy under an FG-WSD plan (report, section "Training recipe").

Learning rate, mixture, context and RoPE base are moved by the callbacks `FGWSD`, `DataMixtureShift` and
`ContextExtension`; what is left here is the loss.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nb_lightning.batch import PackedBatch
from nb_lightning.losses import cross_entropy
from nb_lightning.stages.base import BaseStage


class PretrainStage(BaseStage):
    def loss(self, batch: PackedBatch) -> Tensor:
        head = partial(cross_entropy, labels=batch.labels, chunk=self.cfg.stage.head_chunk)
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)
