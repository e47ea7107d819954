"""DPD: dual-level preference distillation (report, section on DPD).

Two losses on each pair of responses: DPO compares the two, with the starting policy as reference; a divergence compares
the policy with a frozen teacher at each of their tokens. The loss is `losses.dpd.dpd_loss`. The reference's
log-probabilities are computed once, before the first step, and cached in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nb_lightning.batch import PreferenceBatch
from nb_lightning.checkpoints.pretrained import TEACHER_KEY, Origin, find_origin, require_same_vocabulary
from nb_lightning.config.compose import run_dir
from nb_lightning.config.schema import Config, DPDConfig
from nb_lightning.losses.divergence import Divergence, TeacherOutputs
from nb_lightning.losses.dpd import DPD_PER, dpd_loss, response_logprobs
from nb_lightning.phases import PhasePlan
from nb_lightning.run_folder import REFERENCE
from nb_lightning.stages.base import ValidatedByMeans
from nb_lightning.stages.frozen import FrozenModel
from nb_lightning.stages.reference_cache import ReferenceKey, read_reference, write_reference


class DPDStage(ValidatedByMeans[DPDConfig]):
    """Preference distillation on packed rows of pairs (data/preference.py).

    Attributes:
        teacher: None without `stage.teacher`.
        reference: [pairs, 2] float32 nats, a row per pair id, on the device; -inf for pairs that the run does not use.
            Set by `on_train_start`.
    """

    per = validated = DPD_PER
    reference: Tensor

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        s = self.settings
        self._loss = partial(
            dpd_loss,
            beta=s.beta,
            variant=s.variant,
            label_smoothing=s.label_smoothing,
            dpo_weight=s.dpo_weight,
            lambda_plus=s.lambda_plus,
            lambda_minus=s.lambda_minus,
            divergence=Divergence(s.divergence, s.jsd_beta, s.temperature),
            chunk_size=s.head_chunk,
        )
        self._teacher_origin: Origin | None = None
        self.teacher: FrozenModel | None = None
        self._start_digests: dict[str, str] = {}  # of the starting policy and of the teacher

    # Building -------------------------------------------------------------------------------------------------------

    def check_data(self, data: Any) -> None:
        if self.settings.teacher:
            try:
                self._teacher_origin = find_origin(self.settings.teacher)
            except ValueError as error:
                raise ValueError(f"{TEACHER_KEY}={self.settings.teacher}: {error}") from error
            require_same_vocabulary(self._teacher_origin, data.tokenizer, self.shape.vocab_size)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        super().configure_model()
        if self._teacher_origin is not None:
            self.teacher = self.frozen(self._teacher_origin, self.settings.teacher_nf4)

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Add the teacher's forward, a third of its forward and backward."""
        student = super().flops_per_token(seq_len, causal)
        return student + (self.teacher.shape.flops_per_token(seq_len, causal) / 3 if self.teacher else 0)

    # Reference ------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Read the reference's log-probabilities, or, before the first step, compute them."""
        data, path = self.data, run_dir(self.cfg) / REFERENCE
        if not self._start_digests:
            self._start_digests = self._digests_at_start()
        key = ReferenceKey(data.pairs_digest, self._start_digests["policy"], data.template_digest)
        new_pairs_by_step = dict(data.new_pairs())
        try:
            logprobs = read_reference(path, key, data.n_pairs)
            needed = torch.from_numpy(np.concatenate([*new_pairs_by_step.values(), data.validated_pairs()]))
            if not logprobs[needed].isfinite().all():
                logprobs = None
        except FileNotFoundError:
            logprobs = None
        self.trainer.strategy.barrier("reference")  # all ranks have looked before rank 0 writes
        if logprobs is None:
            if self.tokens_seen:
                raise ValueError(
                    f"{path} is gone, or lacks pairs that this plan draws, and the reference's weights with it: the "
                    "policy has been trained since; begin another run"
                )
            logprobs = self._compute_reference(new_pairs_by_step)
            if self.global_rank == 0:
                write_reference(path, logprobs, key)
        self.reference = logprobs.to(self.device)

    def _digests_at_start(self) -> dict[str, str]:
        if self.origin is None:
            raise ValueError("there is nothing to resume, and stage=dpd needs init_from to begin: the model after SFT")
        # All that the log-probabilities depend on besides the data; the precision changes them as the weights do.
        adapter = asdict(self.settings.adapter) if self.settings.adapter.name == "qlora" else None
        computed_with = [self.origin.digest(), self.model.rope.theta, self.cfg.trainer.precision, adapter]
        policy = hashlib.sha256(json.dumps(computed_with).encode()).hexdigest()
        teacher = self._teacher_origin.digest() if self._teacher_origin else ""
        return {"policy": policy, "teacher": teacher}

    def _compute_reference(self, new_pairs_by_step: Mapping[int, np.ndarray]) -> Tensor:
        """Compute the log-probabilities of all pairs that the run trains or validates on; every rank takes its share.

        Each pair is computed in the micro-batch in which it is first trained, in training mode and with a graph that is
        thrown away: the same products in the same order, so that the first margin is 0 to the last bit. (Adapters start
        as 0, so their dropout changes nothing.)

        Args:
            new_pairs_by_step: step -> ids of the pairs that it is the first to draw (`data.new_pairs`).

        Returns:
            [pairs, 2] float32 nats on the CPU; -inf for all other pairs.
        """
        data, rank, ranks = self.data, self.trainer.global_rank, self.trainer.world_size
        self.print("log-probabilities of the reference ...")
        table = torch.full((data.n_pairs, 2), -torch.inf, device=self.device)
        steps = data.steps(rank, ranks)
        for step, new_pairs in new_pairs_by_step.items():
            wanted = set(new_pairs.tolist())
            for micro in steps[step].micro_batches:
                self._add_reference(table, micro, wanted)
        for loader in data.val_dataloader():
            for batch in loader:
                self._add_reference(table, batch, set(batch.pair_ids.tolist()))
        if ranks > 1:
            table = self.trainer.strategy.reduce(table, reduce_op="max")
            assert isinstance(table, Tensor)
        return table.cpu()

    def _add_reference(self, table: Tensor, batch: PreferenceBatch, wanted: set[int]) -> None:
        """Write the log-probabilities of a batch's wanted pairs into the table."""
        batch = self.trainer.strategy.batch_to_device(batch, self.device)
        assert batch.pair_ids is not None  # data/preference.py numbers every pair
        head = partial(response_logprobs, batch=batch, chunk_size=self.settings.head_chunk)
        with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
            logprobs = self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head).detach()
        rows = [row for row, pair in enumerate(batch.pair_ids.tolist()) if pair in wanted]
        table[batch.pair_ids[rows]] = logprobs[rows].float()

    # Training -------------------------------------------------------------------------------------------------------

    def loss(self, batch: PreferenceBatch, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.pair_ids is not None  # data/preference.py numbers every pair
        batch = replace(batch, ref_logprobs=self.reference[batch.pair_ids])
        teacher: TeacherOutputs | None = self.teacher(batch) if self.teacher else None
        head = partial(self._loss, batch=batch, counts=counts, teacher=teacher)
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {**super().state(), "began_as": self._start_digests}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._start_digests = checkpoint["nb_lightning"]["began_as"]
        teacher = self._teacher_origin.digest() if self._teacher_origin else ""
        if teacher != self._start_digests["teacher"]:
            raise ValueError(
                f"{TEACHER_KEY}={self.settings.teacher} is not the teacher that this run was trained with so far; "
                "begin another run to change it"
            )
