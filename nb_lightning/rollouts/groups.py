"""Groups of completions: what a rollout consists of, its rows of tokens, and its logged statistics.

P prompts (groups), G completions of each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nb_lightning.batch import RolloutBatch
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import statuses
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.rollouts.ranks import gather_shares


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        prompt: token ids.
        attempts: the completions with their scores.
        is_trained: False where another group has replaced this one (`stage.extra_rounds`).
    """

    prompt: Sequence[int]
    attempts: Attempts
    is_trained: bool = True

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.attempts.scores]

    @property
    def has_signal(self) -> bool:
        """Whether some of the rewards differ. Where all are equal, all advantages are 0."""
        return len(set(self.rewards)) > 1

    @property
    def truncated(self) -> list[bool]:
        """Whether each completion was cut off at the length limit."""
        return [reason == "length" for reason in self.attempts.finish_reasons]


def is_judged_in_group(task: Task) -> bool:
    """Return whether the rewards of a task are comparisons within the group, whose mean is always 0.5."""
    return task.verifier == "preference" and task.reference is None


def rewards_of(groups: Sequence[Group]) -> Tensor:
    """Return the rewards, [P, G] float32."""
    return torch.tensor([group.rewards for group in groups])


def pack_groups(
    groups: Sequence[Group], advantages: Tensor, max_tokens: int, mask_truncated: bool
) -> list[RolloutBatch]:
    """Pack the completions of groups into micro-batches, in order.

    Args:
        advantages: [P, G] float32.
        max_tokens: of a micro-batch, unless a single completion is longer.
        mask_truncated: leave truncated completions out of the loss; they are read but not trained.
    """
    micro_batches: list[list[tuple[int, int]]] = [[]]  # the (group, completion) numbers in each
    n_tokens = 0
    for i, group in enumerate(groups):
        for j, completion in enumerate(group.attempts.completions):
            length = len(group.prompt) + len(completion.ids) - 1  # the last token is predicted, not read
            if micro_batches[-1] and n_tokens + length > max_tokens:
                micro_batches.append([])
                n_tokens = 0
            micro_batches[-1].append((i, j))
            n_tokens += length
    return [_micro_batch(groups, members, advantages, mask_truncated) for members in micro_batches]


def _micro_batch(
    groups: Sequence[Group], members: Sequence[tuple[int, int]], advantages: Tensor, mask_truncated: bool
) -> RolloutBatch:
    completions = [groups[i].attempts.completions[j] for i, j in members]
    return RolloutBatch.from_completions(
        prompts=[groups[i].prompt for i, _ in members],
        completions=[completion.ids for completion in completions],
        advantages=torch.stack([advantages[i, j] for i, j in members]),
        logprobs=[completion.logprobs for completion in completions],
        masked=[mask_truncated and groups[i].truncated[j] for i, j in members],
    )


def gather_groups(groups: Sequence[Group]) -> list[Group]:
    """Return the groups of all ranks, without texts and tokens. Every rank must call this."""
    scored = [replace(group, attempts=replace(group.attempts, completions=[], texts=[])) for group in groups]
    return [group for share in gather_shares(scored) for group in share]


def statistics(groups: Sequence[Group]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compute what is logged of a step's groups, those of all ranks.

    Returns:
        The metrics that every step has, and those whose names depend on the step's tasks.

        Every step, over completions: rl/reward, rl/pass_rate (share with reward 1), rl/truncated (share),
        rl/completion_tokens (mean length), rl/sampled_tokens (their sum). Over groups: rl/reward_std (mean of the
        standard deviations, with G - 1 in their denominators), rl/no_signal (share of groups whose rewards are all
        equal), rl/replaced (number of groups that were sampled and not trained).

        By task: rl/reward/<source>, rl/status/<status> (number of completions).
    """
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)  # [P, G]
    lengths = torch.tensor([group.attempts.n_tokens for group in groups], dtype=torch.float64)  # [P, G]
    metrics = {
        "rl/reward": rewards.mean(),
        "rl/reward_std": rewards.std(1).mean(),
        "rl/pass_rate": (rewards == 1).double().mean(),
        "rl/truncated": torch.tensor([group.truncated for group in groups]).double().mean(),
        "rl/completion_tokens": lengths.mean(),
        "rl/sampled_tokens": lengths.sum(),
        "rl/no_signal": torch.tensor([not group.has_signal for group in groups]).double().mean(),
        "rl/replaced": torch.tensor(float(sum(not group.is_trained for group in groups))),
    }
    by_task = {}
    for source in sorted({group.attempts.task.source for group in groups}):
        is_of_source = torch.tensor([group.attempts.task.source == source for group in groups])
        by_task[f"rl/reward/{source}"] = float(rewards[is_of_source].mean())
    counts = statuses(score for group in groups for score in group.attempts.scores)
    by_task |= {f"rl/status/{status}": float(count) for status, count in counts.items()}
    return {name: value.float() for name, value in metrics.items()}, by_task
