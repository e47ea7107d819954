"""RL: on-policy GRPO (report, section on RL). A training step is one rollout:

1. `roll_out`: the current weights answer each prompt `group_size` times; verifiers score the completions.
2. `group_advantages`: each reward is compared with the other rewards of its group.
3. `micro_batches`: the completions become rows of tokens.
4. `update`, `updates_per_rollout` times: one optimizer step of `losses.grpo_loss` on all rows.

data/prompts.py says which prompts a step has, and callbacks/on_policy_filter.py which prompts a phase draws from.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nb_lightning.batch import PackedBatch, RolloutBatch, RolloutStep
from nb_lightning.checkpoints.pretrained import find_origin, in_training
from nb_lightning.config.schema import Config, RLConfig
from nb_lightning.generation.sampling import Sampling
from nb_lightning.losses.grpo import GRPO_PER, group_advantages, grpo_loss
from nb_lightning.losses.head import token_logprobs
from nb_lightning.model.transformer import Transformer
from nb_lightning.phases import PhasePlan
from nb_lightning.rewards.preference import Preference, load_reward_model
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.verifier import Guarded
from nb_lightning.rollouts.attempts import Prompt
from nb_lightning.rollouts.groups import Group, gather_groups, pack_groups, rewards_of, statistics
from nb_lightning.rollouts.policy import PolicyModule
from nb_lightning.rollouts.sampler import RolloutSampler
from nb_lightning.stages.base import BaseStage
from nb_lightning.stages.frozen import FrozenModel


class RLStage(BaseStage[RLConfig], PolicyModule):
    """GRPO on prompts with verifiable answers. `configure_model` sets the sampler.

    Attributes:
        reference: the weights at `init_from`, where the loss has a KL term.
    """

    per = GRPO_PER

    def __init__(self, cfg: Config, plan: PhasePlan) -> None:
        super().__init__(cfg, plan)
        stage = self.settings
        self._loss = partial(
            grpo_loss,
            clip_low=stage.clip_low,
            clip_high=stage.clip_high,
            normalisation=stage.normalisation,
            max_tokens=stage.max_new_tokens,
            kl_weight=stage.kl_weight,
            chunk_size=stage.head_chunk,
        )
        self.groups = []
        self.reference: FrozenModel | None = None

    # Building -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        super().configure_model()
        self.sampler = self._sampler()
        if self.settings.kl_weight:
            assert self.cfg.init_from is not None  # config/checks.py requires it
            self.reference = self.frozen(find_origin(self.cfg.init_from))

    def _sampler(self) -> RolloutSampler:
        data, stage = self.data, self.settings
        tasks = list(data.all_tasks())
        judges = self._load_judge() if any(task.verifier == "preference" for task in tasks) else {}
        # Temperature 1 and the whole distribution: any other sampling would be another policy than the trained one.
        return RolloutSampler(
            in_training(self.model, data.tokenizer, data.chat, self.cfg.run_name),
            get_verifiers(tasks, judges),
            Sampling(stage.max_new_tokens),
            stage.group_size,
            stage.max_batch,
        )

    def _load_judge(self) -> dict[str, Guarded]:
        """Load the reward model that judges the tasks of the verifier "preference", if the config names one."""
        path = self.settings.reward_model
        if not path:
            return {}
        try:
            model = load_reward_model(path, str(self.trainer.strategy.root_device))
        except ValueError as error:
            raise ValueError(f"stage.reward_model={path}: {error}") from error
        return {"preference": Guarded("preference", Preference(model))}

    # Training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: RolloutStep, batch_idx: int) -> dict[str, Tensor]:
        started = time.perf_counter()
        self.groups, scoring_seconds = self.roll_out(batch.number)
        rolled_out = time.perf_counter()
        trained = [group for group in self.groups if group.is_trained]
        advantages, _ = group_advantages(rewards_of(trained), self.settings.scale_advantages)  # [P, G]
        micro_batches = self.micro_batches(trained, advantages)
        updates = [self.update(micro_batches) for _ in range(self.settings.updates_per_rollout)]
        seconds = {
            "perf/sampling_sec": rolled_out - started - scoring_seconds,
            "perf/scoring_sec": scoring_seconds,
            "perf/training_sec": time.perf_counter() - rolled_out,
        }
        self.tokens_seen += batch.tokens
        metrics = {name: torch.stack([update[name] for update in updates]).mean() for name in updates[0]}
        rollout_metrics, metrics_by_task = statistics(gather_groups(self.groups))
        metrics |= rollout_metrics
        metrics |= {name: torch.tensor(value) for name, value in seconds.items()}
        self.log_dict({**metrics, "tokens_seen": self._clock()}, batch_size=1)
        if (batch_idx + 1) % self.cfg.trainer.log_every_n_steps == 0:
            # Not by `log`, which would repeat a value in later steps that have none of that name.
            for logger in self.trainer.loggers:
                logger.log_metrics({**metrics_by_task, "tokens_seen": self.tokens_seen}, self.trainer.global_step)
        return metrics

    def roll_out(self, step: int) -> tuple[list[Group], float]:
        """Sample and score this rank's groups of a step.

        With `extra_rounds`, a group whose rewards are all equal is replaced by the group of another prompt of its
        source, until that has signal or the rounds are over.

        Returns:
            All groups, the replaced ones included; and the seconds in which only scores were waited for.
        """
        data, rank = self.data, (self.global_rank, self.trainer.world_size)
        groups, scoring_seconds = self._answer(data.draw(step, *rank))
        current = list(groups)  # the group that now stands in each place of the step
        for round in range(1, self.settings.extra_rounds + 1):
            without_signal = [i for i, group in enumerate(current) if not group.has_signal]
            if not self.trainer.strategy.reduce_boolean_decision(bool(without_signal), all=False):
                break  # no rank needs another round. If any does, all take part: under FSDP2 sampling is a collective
            prompts = [data.draw_replacement(step, round, i, *rank) for i in without_signal]
            replacements, seconds = self._answer(prompts)
            for i, replacement in zip(without_signal, replacements):
                current[i].is_trained, current[i] = False, replacement
            groups, scoring_seconds = groups + replacements, scoring_seconds + seconds
        return groups, scoring_seconds

    def _answer(self, prompts: Sequence[Prompt]) -> tuple[list[Group], float]:
        attempts, scoring_seconds = self.sampler.sample(prompts)
        return [Group(prompt.ids, answers) for prompt, answers in zip(prompts, attempts)], scoring_seconds

    def micro_batches(self, groups: Sequence[Group], advantages: Tensor) -> list[RolloutBatch]:
        """Pack groups into rows of tokens, with the log-probabilities that the loss compares with.

        Every rank gets equally many micro-batches; the ones added for that are not trained.

        Args:
            advantages: [P, G] float32.
        """
        stage, strategy = self.settings, self.trainer.strategy
        max_tokens = self.phase.micro_batch_size * self.phase.seq_len
        batches = pack_groups(groups, advantages, max_tokens, stage.mask_truncated)
        most = int(strategy.reduce(torch.tensor(len(batches), device=self.device), reduce_op="max"))
        batches += [batches[0].silenced() for _ in range(most - len(batches))]
        batches = [strategy.batch_to_device(batch, self.device) for batch in batches]
        if self.reference is not None:
            reference = self.reference.model
            batches = [replace(batch, ref_logprobs=self._logprobs(batch, reference)) for batch in batches]
        if stage.updates_per_rollout > 1:  # else the first update's own log-probabilities are the old ones
            batches = [replace(batch, old_logprobs=self._logprobs(batch, self.model)) for batch in batches]
        return batches

    @torch.no_grad()
    def _logprobs(self, batch: RolloutBatch, model: Transformer) -> Tensor:
        """Compute the log-probabilities of the labels: [B, T] float32 nats."""
        labels, chunk_size = batch.labels, self.settings.head_chunk

        def label_logprobs(hidden: Tensor, head_weight: Tensor) -> Tensor:
            return token_logprobs(hidden.flatten(0, 1), head_weight, labels.flatten(), chunk_size).view_as(labels)

        return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=label_logprobs)

    def update(self, micro_batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
        # Autocast caches bfloat16 copies of weights. Those made while sampling have no graph, and those made in an
        # earlier update are of older weights.
        torch.clear_autocast_cache()
        return super().update(micro_batches)

    def loss(self, batch: RolloutBatch, counts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        head = partial(self._loss, batch=batch, counts=counts)
        return self.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, head=head)
