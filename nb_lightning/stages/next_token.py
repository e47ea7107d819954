"""Pretraining and SFT: training on the next token. The two differ in their data alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from nb_lightning.batch import PackedBatch
from nb_lightning.config.schema import TokensConfig
from nb_lightning.losses.head import cross_entropy
from nb_lightning.stages.base import BaseStage
from nb_lightning.stages.metrics import Perplexity


class NextTokenStage(BaseStage[TokensConfig]):
    """Cross-entropy per trained token; validation is the perplexity of each source on held-out rows."""

    def nll(self, batch: PackedBatch) -> Tensor:
        """Compute the sum of -log p over all trained labels: 0-d float32 nats."""
        head = partial(cross_entropy, labels=batch.labels, chunk_size=self.settings.head_chunk)
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)

    def loss(self, batch: PackedBatch, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.nll(batch) / counts["tokens"], {}

    def on_validation_epoch_start(self) -> None:
        self._perplexity = {name: Perplexity().to(self.device) for name in self.data.val_names}

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = self.data.val_names[dataloader_idx]
        self._perplexity[name].update(self.nll(batch), batch.counts["tokens"])

    def on_validation_epoch_end(self) -> None:
        metrics = {f"val/perplexity/{name}": metric.compute().float() for name, metric in self._perplexity.items()}
        self.log_dict({**metrics, "tokens_seen": self._clock()}, batch_size=1)
