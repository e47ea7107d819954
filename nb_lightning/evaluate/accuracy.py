"""How often a model is right: k completions of each task, scored by its verifier, with intervals.

    report = evaluate_tasks(pretrained, read_tasks("tasks.jsonl"), Sampling(512, 0.6, top_p=0.95), k=8)
    report.summary()["all"]["mean"], report.summary()["all"]["pass"][8]

Completion j of a task has a seed of its own, made of `seed`, the task and j: what is drawn depends neither on the batch
nor on which other tasks there are, nor on the number of processes.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.evaluate.statistics import bootstrap, pass_at
from nb_lightning.generation.decoder import MAX_BATCH
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import Verifier
from nb_lightning.rollouts.attempts import Attempts, attempt, encode, verifiers_of


@dataclass
class Report:
    """All attempts, in the order of the tasks."""

    attempts: list[Attempts]
    k: int

    def by_source(self) -> dict[str, list[Attempts]]:
        """The attempts of each source, and "all"."""
        found: dict[str, list[Attempts]] = {}
        for attempts in self.attempts:
            found.setdefault(attempts.task.source, []).append(attempts)
        return {**found, "all": self.attempts}

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each source, and "all": see `summarise`."""
        return {name: summarise(found, self.k) for name, found in self.by_source().items()}


def summarise(attempts: Sequence[Attempts], k: int) -> dict[str, Any]:
    """Numbers of a set of tasks.

    Returns:
        tasks: how many; mean: avg@k, the mean reward; interval: 95 % of the bootstrap over tasks; pass: {j: pass@j}
        for j = 1, 2, 4, ... and k, of completions with the whole reward; truncated: share of completions that ended
        with "length"; tokens: mean length; statuses: {status: completions}.
    """
    means = np.array([a.mean for a in attempts])
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    return {
        "tasks": len(attempts),
        "mean": float(means.mean()),
        "interval": bootstrap(means),
        "pass": {j: float(np.mean([pass_at(j, k, a.correct) for a in attempts])) for j in sizes if j <= k},
        "truncated": float(np.mean([reason == "length" for a in attempts for reason in a.finish_reasons])),
        "tokens": float(np.mean([n for a in attempts for n in a.tokens])),
        "statuses": dict(Counter(str(score.info["status"]) for a in attempts for score in a.scores)),
    }


def evaluate_tasks(
    pretrained: Pretrained,
    tasks: Sequence[Task],
    sampling: Sampling,
    k: int = 1,
    seed: int = 0,
    max_batch: int = MAX_BATCH,
    on_scored: Callable[[Attempts], None] = lambda attempts: None,
    verifiers: Mapping[str, Verifier] | None = None,
) -> Report:
    """Sample and score k completions of every task.

    Where processes train together (torch.distributed is initialised) each takes its share, all get the whole report,
    and all must call this; under FSDP2 too.

    Args:
        sampling: the stop tokens of `pretrained` are added.
        on_scored: called for each task of this process, in the order in which they are done.
        verifiers: by name; those of `verifiers_of(tasks)` if not given.

    Raises:
        ValueError: no task, no chat template, messages that it refuses, an unknown verifier, or a reference that it
            does not read; before anything is sampled.
    """
    if not tasks:
        raise ValueError("no task to evaluate")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    verifiers = verifiers_of(tasks) if verifiers is None else verifiers
    rank, ranks = _place()
    prompts = encode(pretrained, tasks)  # all on every rank: one that fails alone leaves the others waiting
    seeds = [[seed, zlib.crc32(f"{task.source}\n{task.id}".encode())] for task in tasks]
    share = slice(rank, None, ranks)
    attempts = attempt(
        pretrained, tasks[share], prompts[share], verifiers, sampling, k, seeds[share], max_batch, on_scored
    )
    return Report(_in_order(attempts, len(tasks)), k)


def _place() -> tuple[int, int]:
    """(rank, number) of the processes that evaluate together."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _in_order(share: list[Attempts], count: int) -> list[Attempts]:
    """Every rank's attempts, in the order of all tasks."""
    ranks = _place()[1]
    if ranks == 1:
        return share
    shares: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(shares, share)
    return [shares[i % ranks][i // ranks] for i in range(count)]
