"""Groups of completions against numbers by hand."""

from __future__ import annotations

import pytest
import torch

from nb_lightning.batch import IGNORE
from nb_lightning.generation.decoder import Completion
from nb_lightning.rewards import Score
from nb_lightning.rewards.tasks import Task
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.rollouts.groups import Group, gather_groups, pack_groups, rewards_of, statistics


def group(source: str, rewards: list[float], lengths: list[int], truncated: list[bool]) -> Group:
    """A prompt of 2 tokens; completion j repeats the token 10 + j."""
    attempts = Attempts(Task(source, source, [{"role": "user", "content": "?"}], "exact", "x"))
    for j, (reward, length, is_truncated) in enumerate(zip(rewards, lengths, truncated)):
        completion = Completion([10 + j] * length, [-0.5] * length, "length" if is_truncated else "stop")
        attempts.completions.append(completion)
        attempts.finish_reasons.append(completion.finish_reason)
        attempts.n_tokens.append(length)
        attempts.texts.append("text")
        attempts.scores.append(Score(reward, {"status": "correct" if reward == 1 else "wrong"}))
    return Group([1, 2], attempts)


A = group("a", [1, 0], [3, 2], [False, False])
B = group("b", [0, 0], [4, 1], [True, False])


def test_micro_batches_hold_whole_completions_up_to_the_limit() -> None:
    # A row reads the prompt and all tokens but the last: 2 + 3 - 1 = 4, 3, 5 and 2 tokens.
    batches = pack_groups([A, B], torch.tensor([[0.5, -0.5], [0.25, -0.25]]), max_tokens=8, mask_truncated=False)
    assert [batch.input_ids.tolist() for batch in batches] == [
        [[1, 2, 10, 10, 1, 2, 11]], [[1, 2, 10, 10, 10, 1, 2]],
    ]  # fmt: skip
    assert [batch.advantages.tolist() for batch in batches] == [[0.5, -0.5], [0.25, -0.25]]
    assert [int(batch.counts["tokens"]) for batch in batches] == [5, 5]


def test_a_truncated_completion_is_read_and_not_trained() -> None:
    [batch] = pack_groups([B], torch.tensor([[0.25, -0.25]]), max_tokens=99, mask_truncated=True)
    assert batch.labels.tolist() == [[IGNORE] * 6 + [11]]
    assert batch.completion_index.tolist() == [[-1] * 6 + [1]]
    assert int(batch.counts["tokens"]) == int(batch.counts["completions"]) == 1


def test_statistics_by_hand() -> None:
    replaced = group("a", [0, 0], [1, 1], [False, False])
    replaced.is_trained = False
    metrics, by_task = statistics(gather_groups([A, B, replaced]))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "rl/reward": 1 / 6,
            "rl/reward_std": 0.5**0.5 / 3,  # of [1, 0] with G - 1 = 1 in the denominator; the others are constant
            "rl/pass_rate": 1 / 6,
            "rl/truncated": 1 / 6,
            "rl/completion_tokens": 2,
            "rl/sampled_tokens": 12,
            "rl/no_signal": 2 / 3,
            "rl/replaced": 1,
        }
    )
    assert by_task == {"rl/reward/a": 0.25, "rl/reward/b": 0.0, "rl/status/correct": 1.0, "rl/status/wrong": 5.0}
    assert rewards_of([A, B]).tolist() == [[1, 0], [0, 0]]


def test_groups_are_gathered_without_texts_and_tokens() -> None:
    [gathered] = gather_groups([A])
    assert gathered.attempts.texts == gathered.attempts.completions == []
    assert A.attempts.texts and gathered.rewards == A.rewards
