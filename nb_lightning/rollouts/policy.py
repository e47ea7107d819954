"""The stage of RL as callbacks see it."""

from __future__ import annotations

from nb_lightning.phase_callback import StageModule
from nb_lightning.rollouts.groups import Group
from nb_lightning.rollouts.sampler import RolloutSampler


class PolicyModule(StageModule):
    """A stage that rolls out its model. `stages.rl.RLStage` is one.

    Attributes:
        sampler: the policy with the verifiers of all tasks.
        groups: what this rank sampled in the last step.
    """

    sampler: RolloutSampler
    groups: list[Group]
