"""The reward model: it says in one token which of two responses is better (report, section on human preference).

The model has no extra head: the loss compares its logits for "A" and "B" after a comparison
(nb_lightning/rewards/comparison_form.py). nb_lightning/rewards/preference.py judges with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from nb_lightning.batch import PackedBatch
from nb_lightning.config.schema import RewardModelConfig
from nb_lightning.losses.pairwise import REWARD_PER, pairwise_reward_loss
from nb_lightning.rewards.comparison_form import ComparisonForm
from nb_lightning.stages.base import ValidatedByMeans


class RewardModelStage(ValidatedByMeans[RewardModelConfig]):
    """Training on comparisons (data/reward.py); `train/tokens` counts them.

    Attributes:
        form: how comparisons are written; every checkpoint holds it.
    """

    per = REWARD_PER
    validated: ClassVar[Mapping[str, str]] = {**REWARD_PER, "loss": "tokens"}
    form: ComparisonForm

    def check_data(self, data: Any) -> None:
        self.form = data.form

    def loss(self, batch: PackedBatch, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        head = partial(
            pairwise_reward_loss,
            labels=batch.labels,
            counts=counts,
            answers=self.form.answers,
            kind=s.loss,
            chunk_size=s.head_chunk,
        )
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)

    def held_out(self, batch: PackedBatch, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loss, sums = self.loss(batch, counts)
        return {**sums, "loss": loss * counts["tokens"]}

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {**super().state(), "comparison": asdict(self.form)}
