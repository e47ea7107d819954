"""What a sampler takes and returns: a prompt, and k attempts at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nb_lightning.generation.decoder import Completion
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import Score


@dataclass(frozen=True)
class Prompt:
    """A task to answer.

    Attributes:
        ids: tokens of the task's chat, up to where the assistant begins.
        seed: completion j is drawn from [*seed, j].
    """

    task: Task
    ids: Sequence[int]
    seed: Sequence[int]


@dataclass
class Attempts:
    """The k completions of one task with their scores. Every list has one entry for each completion.

    Attributes:
        texts: without the stop token; with the `<think>` that the prompt opened, so that a thought is always seen.
        n_tokens: lengths in tokens, with the stop token.
        finish_reasons: "stop", or "length" for a truncated completion.
        scores: from the task's verifier.
        completions: token ids and log-probabilities for training; empty where nothing is trained.
    """

    task: Task
    texts: list[str] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)

    @property
    def mean_reward(self) -> float:
        """The task's avg@k."""
        return sum(score.reward for score in self.scores) / len(self.scores)

    @property
    def n_correct(self) -> int:
        """The number of completions with reward 1."""
        return sum(score.reward == 1 for score in self.scores)
