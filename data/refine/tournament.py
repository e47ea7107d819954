"""Choose among drafts that pass by a pairwise reward model: each plays each other one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from data.refine.drafts import Draft
from data.refine.loop import Tournament
from nb_lightning.rewards.preference import RewardModel, load_reward_model
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.messages import ChatError


def tournament_of(path: str, device: str = "auto", dtype: str = "auto") -> Tournament:
    """Return a tournament by the reward model at a path: see `choose`."""
    model = load_reward_model(path, device, dtype)
    return lambda task, drafts: choose(model, task, drafts)


def choose(model: RewardModel, task: Task, drafts: Sequence[Draft]) -> int | None:
    """Return the index of the draft with the most expected wins; the first of equal ones.

    Returns:
        None where two drafts are too long to be compared, or the model's template or tokenizer refuses one.
    """
    texts = [draft.text for draft in drafts]
    try:
        if 2 * max(len(model.read(task.messages, text, task.tools)) for text in texts) > model.context:
            return None
        pairs = list(combinations(range(len(texts)), 2))
        preferences = model.compare(task.messages, [(texts[i], texts[j]) for i, j in pairs], task.tools)
    except ChatError:
        return None
    wins = [0.0] * len(texts)
    for (i, j), preference in zip(pairs, preferences):
        wins[i] += preference
        wins[j] += 1 - preference
    return wins.index(max(wins))
