"""The state of one task on its way from sampled responses to pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.pairs.responses import Response
from data.pairs.rule import Pair
from nb_lightning.rewards.tasks import Task


@dataclass
class Answers:
    """The responses to one task, and the pairs chosen from them.

    Attributes:
        student: empty where the student was not asked, because the teacher has no response to choose.
        pairs: empty where `reason` says why.
        preferences: of the judge, one for each pair; None where no judge was asked.
    """

    task: Task
    teacher: list[Response]
    student: list[Response]
    pairs: Sequence[Pair] = ()
    reason: str = ""
    preferences: list[float] | None = None
