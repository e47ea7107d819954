"""Validation by the means of what the loss counts: what DPD and the reward model share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from nb_lightning.batch import PackedBatch
from nb_lightning.metrics import Means
from nb_lightning.stages.base import BaseStage


class ValidatedByMeans(BaseStage):
    """Logs `val/<statistic>/<source>` over the held-out rows of each source."""

    # Each statistic of `held_out` -> which of the batch's `counts` it is a mean over.
    validated: ClassVar[Mapping[str, str]] = {}

    def held_out(self, batch: PackedBatch, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of the statistics that `validated` names; by default those of the loss."""
        _, sums = self.loss(batch, counts)
        return sums

    def on_validation_epoch_start(self) -> None:
        names = self.trainer.datamodule.val_names
        self._means = {name: Means(self.validated).to(self.device) for name in names}

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        counts = batch.counts
        self._means[self.trainer.datamodule.val_names[dataloader_idx]].update(self.held_out(batch, counts), counts)

    def on_validation_epoch_end(self) -> None:
        values = {
            f"val/{key}/{name}": value.float()
            for name, means in self._means.items()
            for key, value in means.compute().items()
        }
        self.log_dict({**values, "tokens_seen": self._clock()}, batch_size=1)
