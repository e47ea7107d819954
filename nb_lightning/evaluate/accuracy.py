"""How often a model is right: k completions of each task, scored by the task's verifier, with intervals.

    report = evaluate_tasks(pretrained, read_tasks("tasks.jsonl"), Sampling(512, 0.6, top_p=0.95), k=8)
    report.summary()["all"]["mean"], report.summary()["all"]["pass"][8]

The seed of a completion is made of `seed`, the task and the completion's number. So what is drawn does not depend on
the batch, on the other tasks or on the number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.evaluate.statistics import bootstrap, pass_at
from nb_lightning.generation.decoder import MAX_BATCH
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.tasks import Task
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.rollouts.sampler import OnScored, RolloutSampler


@dataclass
class Report:
    """The attempts at all tasks, in the order of the tasks, k completions each."""

    attempts: list[Attempts]
    k: int

    def by_source(self) -> dict[str, list[Attempts]]:
        """Group the attempts by source; "all" has all of them."""
        sources: dict[str, list[Attempts]] = {}
        for attempts in self.attempts:
            sources.setdefault(attempts.task.source, []).append(attempts)
        return {**sources, "all": self.attempts}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Summarise each source, and "all"; see `summarise`."""
        return {name: summarise(attempts, self.k) for name, attempts in self.by_source().items()}


def summarise(attempts: Sequence[Attempts], k: int) -> dict[str, Any]:
    """Summarise the attempts at a set of tasks.

    Returns:
        tasks: their number; mean: avg@k, the mean reward; interval: its 95 % bootstrap interval over tasks; pass:
        {j: pass@j} for j = 1, 2, 4, ... and k, where a completion passes with reward 1; truncated: share of
        completions that ended with "length"; tokens: mean length; statuses: {status: number of completions}.
    """
    rewards = np.array([a.mean_reward for a in attempts])
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    return {
        "tasks": len(attempts),
        "mean": float(rewards.mean()),
        "interval": bootstrap(rewards),
        "pass": {j: float(np.mean([pass_at(j, k, a.n_correct) for a in attempts])) for j in sizes if j <= k},
        "truncated": float(np.mean([reason == "length" for a in attempts for reason in a.finish_reasons])),
        "tokens": float(np.mean([n for a in attempts for n in a.n_tokens])),
        "statuses": dict(Counter(str(score.info["status"]) for a in attempts for score in a.scores)),
    }


def evaluate_tasks(
    pretrained: Pretrained,
    tasks: Sequence[Task],
    sampling: Sampling,
    k: int = 1,
    seed: int = 0,
    max_batch: int = MAX_BATCH,
    on_scored: OnScored = lambda attempts: None,
) -> Report:
    """Sample and score k completions of every task.

    Where torch.distributed is initialised, each rank takes its share and all return the whole report. Every rank must
    call this, under FSDP2 too.

    Args:
        sampling: how tokens are drawn; the stop tokens of `pretrained` are added.
        on_scored: called with the attempts at each task of this process, as soon as they are scored.

    Raises:
        ValueError: no task, no chat template, messages that the template refuses, an unknown verifier, or a reference
            that its verifier cannot read; all of it before anything is sampled.
    """
    if not tasks:
        raise ValueError("no task to evaluate")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    sampler = RolloutSampler(pretrained, get_verifiers(tasks), sampling, k, max_batch)
    return Report(sampler.sample_over_ranks(sampler.encode(tasks, seed), on_scored), k)
