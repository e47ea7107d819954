"""What the two halves of a refinement share: the plan, the prompts, who is asked, and who verifies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.calls.engine import Engine
from data.refine.asking import Asker
from data.refine.plan import RefinePlan
from data.refine.prompts import Prompts
from nb_lightning.rewards.verifier import Verifier


@dataclass(frozen=True)
class Engines:
    """Who does what.

    Attributes:
        candidates: name -> a model that answers the instructions: teachers and the student.
        critic: writes checklists, scores and critiques, and compares answers.
        writer: revises drafts, and writes skeletons and chains.
    """

    candidates: Mapping[str, Engine]
    critic: Engine
    writer: Engine


@dataclass
class Work:
    """The base of `Refinement` (data/refine/loop.py) and `Reconstruction` (data/refine/reconstruct.py).

    Attributes:
        verifiers: by name, of all tasks that have one.
    """

    plan: RefinePlan
    prompts: Prompts
    engines: Engines
    asker: Asker
    verifiers: Mapping[str, Verifier]
