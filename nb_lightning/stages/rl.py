"""RL: on-policy GRPO (report, section on RL). A training step is one rollout:

1. `roll_out`: the current weights answer each prompt `group_size` times; verifiers score the completions.
2. `rollouts.batches`: rewards against their group become advantages, completions become rows of tokens.
3. `update`, once or `updates_per_rollout` times: `losses.grpo_loss` on all tokens of all completions.

Which prompts a step has is the data's business (data/prompts.py), and which of them are worth it the filter's
(callbacks/on_policy_filter.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nb_lightning.batch import PackedBatch, RolloutBatch, RolloutStep
from nb_lightning.checkpoints.pretrained import find, in_training
from nb_lightning.config.schema import Config
from nb_lightning.generation.sampling import Sampling
from nb_lightning.losses.grpo import GRPO_PER, grpo_loss
from nb_lightning.losses.head import token_logprobs
from nb_lightning.model.transformer import Transformer
from nb_lightning.phases import PhasePlan
from nb_lightning.rewards.preference import Preference, load_reward_model
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import Guarded, Verifier
from nb_lightning.rollouts.attempts import attempt, verifiers_of
from nb_lightning.rollouts.groups import Group, batches, gathered, statistics
from nb_lightning.stages.base import BaseStage
from nb_lightning.stages.frozen import FrozenModel


class RLStage(BaseStage):
    """GRPO on prompts with verifiable answers.

    Attributes:
        verifiers: by name, of all tasks.
        groups: what this rank sampled in the last step.
        reference: the weights at `init_from`, where a KL term asks for them.
    """

    per = GRPO_PER

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        s: Any = cfg.stage
        self._loss = partial(
            grpo_loss,
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            normalisation=s.normalisation,
            max_tokens=s.max_new_tokens,
            kl_weight=s.kl_weight,
            chunk_size=s.head_chunk,
        )
        self.sampling = Sampling(s.max_new_tokens)  # temperature 1 and nothing cut off: else it is another policy
        self.verifiers: Mapping[str, Verifier] = {}
        self.groups: list[Group] = []
        self.reference: FrozenModel | None = None

    # Building -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.model is not None:
            return
        super().configure_model()
        self.verifiers = self._verifiers(list(self.trainer.datamodule.all_tasks()))
        if self.cfg.stage.kl_weight:
            self.reference = self.frozen(find(self.cfg.init_from))

    def _verifiers(self, tasks: Sequence[Task]) -> dict[str, Verifier]:
        path, judged, known = self.cfg.stage.reward_model, "preference", {}
        if path and any(task.verifier == judged for task in tasks):
            try:
                known[judged] = Guarded(
                    judged, Preference(load_reward_model(path, str(self.trainer.strategy.root_device)))
                )
            except ValueError as error:
                raise ValueError(f"stage.reward_model={path}: {error}") from error
        return verifiers_of(tasks, known)

    # Training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RolloutStep, batch_idx: int) -> dict[str, Tensor]:
        began = time.perf_counter()
        self.groups, waited = self.roll_out(batch.number)
        sampled = time.perf_counter()
        micro_batches = self.micro_batches()
        updates = [self.update(micro_batches) for _ in range(self.cfg.stage.updates_per_rollout)]
        seconds = {"sampling": sampled - began - waited, "scoring": waited, "training": time.perf_counter() - sampled}
        self.tokens_seen += batch.tokens
        metrics = {name: torch.stack([of_one[name] for of_one in updates]).mean() for name in updates[0]}
        of_all, of_this_step = statistics(gathered(self.groups))
        metrics |= of_all
        metrics |= {f"perf/{name}_sec": torch.tensor(value) for name, value in seconds.items()}
        self.log_dict({**metrics, "tokens_seen": self._clock()}, batch_size=1)
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:  # `log` would repeat what a later step has nothing of
            for logger in self.trainer.loggers:
                logger.log_metrics({**of_this_step, "tokens_seen": self.tokens_seen}, step=self.trainer.global_step)
        return metrics

    def roll_out(self, step: int) -> tuple[list[Group], float]:
        """This rank's groups, sampled and scored; and for how many seconds only scores were waited for.

        With `extra_rounds`, a group whose rewards are all equal is replaced by one of another prompt of its source,
        until it has signal or the rounds are over.
        """
        data, place = self.trainer.datamodule, (self.global_rank, self.trainer.world_size)
        groups, waited = self._answer(data.draw(step, *place))
        current = list(groups)  # in the places of the step
        for round in range(1, self.cfg.stage.extra_rounds + 1):
            dull = [i for i, group in enumerate(current) if not group.signal]
            if not self.trainer.strategy.reduce_boolean_decision(bool(dull), all=False):
                break  # no rank needs one; if any does, all go on: under FSDP2 sampling is a collective
            others, seconds = self._answer([data.draw_replacement(step, round, i, *place) for i in dull])
            for i, other in zip(dull, others):
                current[i].trained, current[i] = False, other
            groups, waited = groups + others, waited + seconds
        return groups, waited

    def _answer(self, prompts: Sequence[Any]) -> tuple[list[Group], float]:
        data = self.trainer.datamodule
        model = in_training(self.model, data.tokenizer, data.chat, self.cfg.run_name)
        tasks, ids = [prompt.task for prompt in prompts], [prompt.ids for prompt in prompts]
        sampled = [0.0]
        attempts = attempt(
            model,
            tasks,
            ids,
            self.verifiers,
            self.sampling,
            self.cfg.stage.group_size,
            [prompt.seed for prompt in prompts],
            self.cfg.stage.max_batch,
            on_sampled=lambda: sampled.append(time.perf_counter()),
            keep=True,
        )
        return [Group(*pair) for pair in zip(ids, attempts)], time.perf_counter() - sampled[-1]

    def micro_batches(self) -> list[RolloutBatch]:
        """The groups as rows of tokens; as many micro-batches on every rank."""
        s: Any = self.cfg.stage
        trained = [group for group in self.groups if group.trained]
        phase = self.phase
        found = batches(trained, phase.micro_batch_size * phase.seq_len, s.scale_advantages, s.mask_truncated)
        most = int(self.trainer.strategy.reduce(torch.tensor(len(found), device=self.device), reduce_op="max"))
        found += [found[0].silenced() for _ in range(most - len(found))]
        found = [self.trainer.strategy.batch_to_device(batch, self.device) for batch in found]
        if self.reference is not None:
            found = [replace(b, ref_logprobs=self._logprobs(b, self.reference.model)) for b in found]
        if s.updates_per_rollout > 1:
            found = [replace(b, old_logprobs=self._logprobs(b, self.model)) for b in found]
        return found

    @torch.no_grad()
    def _logprobs(self, batch: RolloutBatch, model: Transformer) -> Tensor:
        """[B, T] float32 nats of the labels."""

        def labels(hidden: Tensor, weight: Tensor) -> Tensor:
            found = token_logprobs(hidden.flatten(0, 1), weight, batch.labels.flatten(), self.cfg.stage.head_chunk)
            return found.view_as(batch.labels)

        return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=labels)

    def update(self, micro_batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
        # Autocast keeps bfloat16 copies of weights: made while sampling, they have no graph; of an update before, they
        # are old.
        torch.clear_autocast_cache()
        return super().update(micro_batches)

    def loss(self, batch: RolloutBatch, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        head = partial(self._loss, batch=batch, counts=counts)
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)
