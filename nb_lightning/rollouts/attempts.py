"""Sample k completions of each task and score them with its verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.generation.decoder import MAX_BATCH, Completion, Request, stream
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.registry import get_verifier
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import Score, Verifier

SCORERS = 4  # threads that score while the model goes on


@dataclass
class Attempts:
    """The completions of one task, k of each list."""

    task: Task
    texts: list[str] = field(default_factory=list)  # without the token that ended them
    tokens: list[int] = field(default_factory=list)  # with it
    finish_reasons: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)  # what `attempt` keeps for training; else empty

    @property
    def mean(self) -> float:
        """The mean reward: avg@k."""
        return sum(score.reward for score in self.scores) / len(self.scores)

    @property
    def correct(self) -> int:
        """Completions with the whole reward."""
        return sum(score.reward == 1 for score in self.scores)


def verifiers_of(tasks: Iterable[Task], known: Mapping[str, Verifier] | None = None) -> dict[str, Verifier]:
    """The verifiers that tasks name, with every reference checked.

    Args:
        known: verifiers that are there already, by name.

    Raises:
        ValueError: an unknown verifier, or a reference that it does not read, by the task's id.
    """
    verifiers: dict[str, Any] = dict(known or {})
    for task in tasks:
        if task.verifier not in verifiers:
            verifiers[task.verifier] = get_verifier(task.verifier)
        try:
            verifiers[task.verifier].check(task.reference)
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from error
    return verifiers


def attempt(
    pretrained: Pretrained,
    tasks: Sequence[Task],
    prompts: Sequence[Sequence[int]],
    verifiers: Mapping[str, Verifier],
    sampling: Sampling,
    k: int,
    seeds: Sequence[Sequence[int]],
    max_batch: int = MAX_BATCH,
    on_scored: Callable[[Attempts], None] = lambda attempts: None,
    on_sampled: Callable[[], None] = lambda: None,
    keep: bool = False,
) -> list[Attempts]:
    """Sample and score k completions of each task, in this process alone; scoring goes on while others are sampled.

    Args:
        prompts: of each task, see `encode`.
        sampling: the stop tokens of `pretrained` are added.
        seeds: of each task, its own; completion j is drawn from [*seed, j].
        on_scored: called for each task, in the order in which they are done.
        on_sampled: called when the last completion is there and only scores are waited for.
        keep: keep `Attempts.completions`.
    """
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *pretrained.stop_ids))
    requests = (Request((i, j), prompts[i], sampling, [*seeds[i], j]) for i in range(len(tasks)) for j in range(k))
    attempts = [Attempts(task) for task in tasks]
    done: dict[int, dict[int, Completion]] = {}
    with ThreadPoolExecutor(SCORERS) as scorers:
        scoring: list[Future[None]] = []
        for (i, j), completion in stream(pretrained.model, requests, max_batch):  # type: ignore[misc]
            done.setdefault(i, {})[j] = completion
            if len(done[i]) == k:
                _record(attempts[i], [completion for _, completion in sorted(done.pop(i).items())], pretrained, keep)
                scoring.append(scorers.submit(_score, verifiers[tasks[i].verifier], attempts[i], on_scored))
        on_sampled()
        for future in scoring:
            future.result()  # raises what it raised
    return attempts


def encode(pretrained: Pretrained, tasks: Iterable[Task]) -> list[list[int]]:
    """The tokens of each task's chat, up to where the assistant begins.

    Raises:
        ValueError: no chat template, or messages that it refuses, by the task's id.
    """
    if pretrained.chat is None:
        raise ValueError(f"{pretrained.name} has no chat template, and tasks are chats; name one (--chat-template)")
    texts = []
    for task in tasks:
        try:
            texts.append(pretrained.chat.render(task.messages, add_generation_prompt=True))
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from error
    batch = pretrained.tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in batch]


def _record(attempts: Attempts, completions: Sequence[Completion], pretrained: Pretrained, keep: bool) -> None:
    for completion in completions:
        ids = completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids
        attempts.texts.append(pretrained.tokenizer.decode(ids))
        attempts.tokens.append(len(completion.ids))
        attempts.finish_reasons.append(completion.finish_reason)
    attempts.completions = list(completions) if keep else []


def _score(verifier: Verifier, attempts: Attempts, on_scored: Callable[[Attempts], None]) -> None:
    asked = str(attempts.task.messages[-1].get("content", ""))
    attempts.scores = verifier.score(asked, attempts.texts, attempts.task.reference)
    on_scored(attempts)
