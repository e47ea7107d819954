"""The reward model: which of two responses is better, said in one token (report, section on human preference).

The backbone as it is, without a head of its own: what counts is its logits for "A" and "B" after a comparison
(nb_lightning/pairwise.py). nb_lightning/rewards/preference.py is where it judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from nb_lightning.batch import PackedBatch
from nb_lightning.config import plain
from nb_lightning.losses import REWARD_PER, pairwise_reward_loss
from nb_lightning.metrics import Means
from nb_lightning.pairwise import ComparisonForm
from nb_lightning.stages.base import BaseStage

VALIDATED = {**REWARD_PER, "loss": "tokens"}


class RewardModelStage(BaseStage):
    """Training on comparisons (data/reward.py); `train/tokens` counts them.

    Attributes:
        form: how they are written; in every checkpoint.
    """

    per = REWARD_PER
    form: ComparisonForm

    def check_data(self, data: Any) -> None:
        self.form = data.form

    def loss(self, batch: PackedBatch, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        s: Any = self.cfg.stage
        head = partial(
            pairwise_reward_loss,
            labels=batch.labels,
            counts=counts,
            answers=self.form.answers,
            kind=s.loss,
            chunk=s.head_chunk,
        )
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)

    # Validation -----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._means = {name: Means(VALIDATED).to(self.device) for name in self.trainer.datamodule.val_names}

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        counts = batch.counts
        loss, sums = self.loss(batch, counts)
        name = self.trainer.datamodule.val_names[dataloader_idx]
        self._means[name].update({**sums, "loss": loss * counts["tokens"]}, counts)

    def on_validation_epoch_end(self) -> None:
        values = {
            f"val/{key}/{name}": value.float()
            for name, means in self._means.items()
            for key, value in means.compute().items()
        }
        self.log_dict({**values, "tokens_seen": self._clock()}, batch_size=1)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {**super().state(), "comparison": plain(self.form)}
