"""What a rollout is made of, and what is logged of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nb_lightning.batch import RolloutBatch
from nb_lightning.losses.grpo import group_advantages
from nb_lightning.rewards.tasks import Task
from nb_lightning.rewards.verifier import statuses
from nb_lightning.rollouts.attempts import Attempts


@dataclass
class Group:
    """One prompt's completions.

    Attributes:
        prompt: token ids.
        attempts: the completions with their scores.
        trained: False where another group has taken its place (`stage.extra_rounds`).
    """

    prompt: Sequence[int]
    attempts: Attempts
    trained: bool = True

    @property
    def rewards(self) -> list[float]:
        return [score.reward for score in self.attempts.scores]

    @property
    def signal(self) -> bool:
        """Some of its rewards differ: without that all its advantages are 0."""
        return len(set(self.rewards)) > 1

    @property
    def truncated(self) -> list[bool]:
        return [reason == "length" for reason in self.attempts.finish_reasons]


def judged_in_group(task: Task) -> bool:
    """Its rewards are comparisons within the group, whose mean is always 0.5."""
    return task.verifier == "preference" and task.reference is None


def batches(groups: Sequence[Group], tokens: int, scale: bool, mask_truncated: bool) -> list[RolloutBatch]:
    """Groups as micro-batches of at most so many tokens, completions in their order.

    Args:
        scale: see `losses.group_advantages`.
        mask_truncated: completions that were cut off are not trained.
    """
    advantages, _ = group_advantages(torch.tensor([group.rewards for group in groups]), scale)
    parts: list[list[tuple[int, int]]] = [[]]
    used = 0
    for i, group in enumerate(groups):
        for j, completion in enumerate(group.attempts.completions):
            length = len(group.prompt) + len(completion.ids) - 1  # the last token is predicted, not read
            if parts[-1] and used + length > tokens:
                parts.append([])
                used = 0
            parts[-1].append((i, j))
            used += length
    return [_batch(groups, part, advantages, mask_truncated) for part in parts]


def _batch(
    groups: Sequence[Group], part: Sequence[tuple[int, int]], advantages: Tensor, mask_truncated: bool
) -> RolloutBatch:
    completions = [groups[i].attempts.completions[j] for i, j in part]
    return RolloutBatch.from_completions(
        prompts=[groups[i].prompt for i, _ in part],
        completions=[completion.ids for completion in completions],
        advantages=torch.stack([advantages[i, j] for i, j in part]),
        logprobs=[completion.logprobs for completion in completions],
        masked=[mask_truncated and groups[i].truncated[j] for i, j in part],
    )


def gathered(groups: Sequence[Group]) -> list[Group]:
    """The groups of all ranks, without their tokens; every rank must call this."""
    from torch import distributed

    own = [replace(group, attempts=replace(group.attempts, completions=[], texts=[])) for group in groups]
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    shares: list[list[Group]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(shares, own)
    return [group for share in shares for group in share]


def statistics(groups: Sequence[Group]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is logged of the groups of all ranks.

    Returns:
        Of every step: rl/reward, rl/pass_rate (whole rewards), rl/truncated: means over completions;
        rl/completion_tokens: their mean length; rl/sampled_tokens: their sum; rl/reward_std: mean over groups of the
        standard deviation (G - 1 in its denominator); rl/no_signal: share of groups whose rewards are all equal;
        rl/replaced: groups sampled and not trained. Of this step, as what there is differs: rl/reward/<source>;
        rl/status/<status>: completions.
    """
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    lengths = torch.tensor([group.attempts.tokens for group in groups], dtype=torch.float64)
    values = {
        "rl/reward": rewards.mean(),
        "rl/reward_std": rewards.std(1).mean(),
        "rl/pass_rate": (rewards == 1).double().mean(),
        "rl/truncated": torch.tensor([group.truncated for group in groups]).double().mean(),
        "rl/completion_tokens": lengths.mean(),
        "rl/sampled_tokens": lengths.sum(),
        "rl/no_signal": torch.tensor([not group.signal for group in groups]).double().mean(),
        "rl/replaced": torch.tensor(float(sum(not group.trained for group in groups))),
    }
    of_this_step = {}
    for source in sorted({group.attempts.task.source for group in groups}):
        own = torch.tensor([group.attempts.task.source == source for group in groups])
        of_this_step[f"rl/reward/{source}"] = float(rewards[own].mean())
    counters = statuses(score for group in groups for score in group.attempts.scores)
    of_this_step |= {f"rl/status/{name}": float(count) for name, count in counters.items()}
    return {name: value.float() for name, value in values.items()}, of_this_step
