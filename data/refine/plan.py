"""The plan of a refinement: what is scored by whom, how many rounds, how a chain is rebuilt (conf/refine/*.yaml)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.refine.line_checks import LINE_CHECKS
from nb_lightning.checkout import CHECKOUT
from nb_lightning.config.bounds import FINITE_NOT_NEGATIVE, NOT_NEGATIVE, Bound, bounded, check_bounds, one_of
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.messages import ChatError, check_messages

PLANS = CHECKOUT / "conf" / "refine"
DESCRIBED = ("correctness", "completeness", "consistency", "executability", "safety", "format")  # by the templates
NO_VERIFIER = "preference"  # a task of this verifier has no reference: the critic alone judges it
AT_LEAST_1 = Bound(lambda value: value >= 1, "it must be at least 1")
SHARE = Bound(lambda value: 0 <= value <= 1, "it must be from 0 to 1")


@dataclass
class Dimension:
    """One quality of an answer, scored from 0 to 1.

    Attributes:
        weight: in the mean over the dimensions.
        least: the score from which an answer passes.
        by: "verifier" (the task's own, whose reward is the score) or "model" (the critic, which also stands in for
            the verifier of tasks without a reference).
        verifiers: the dimension applies to tasks of these verifiers; empty for all.
        description: what the critic is to look at; the templates describe `DESCRIBED`.
        critic_least: instead of `least` where a task has no reference and the critic judges everything; None: `least`.
    """

    weight: float = bounded(1.0, FINITE_NOT_NEGATIVE)
    least: float = bounded(0.0, SHARE)
    by: str = bounded("model", one_of("verifier", "model"))
    verifiers: list[str] = field(default_factory=list)
    description: str = ""
    critic_least: float | None = bounded(None, SHARE)

    def applies_to(self, verifier: str) -> bool:
        """Whether tasks of a verifier have this dimension."""
        return not self.verifiers or verifier in self.verifiers


@dataclass
class RoleSampling:
    """How one role samples; as `nb_lightning.generation.sampling.Sampling`."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024

    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, top_p=self.top_p)


@dataclass
class SamplingByRole:
    """The sampling of every role."""

    candidates: RoleSampling = field(default_factory=RoleSampling)
    checklist: RoleSampling = field(default_factory=RoleSampling)
    score: RoleSampling = field(default_factory=RoleSampling)
    critique: RoleSampling = field(default_factory=RoleSampling)
    revise: RoleSampling = field(default_factory=RoleSampling)
    skeleton: RoleSampling = field(default_factory=RoleSampling)
    chain: RoleSampling = field(default_factory=RoleSampling)
    same: RoleSampling = field(default_factory=RoleSampling)


@dataclass
class Reconstruction:
    """How the chain of thought of a refined answer is made.

    Attributes:
        mode: "skeleton" (an outline without the answer, then the chain along it), "plain" (a summary, then the chain:
            the report's way) or "none" (the draft's own chain).
        chains: "tagged" (the reply holds <chain> and <answer>) or "thought" (the reply's thought is the chain).
        attempts: chains that are tried.
        line_checks: source of tasks -> name of the check that replays each line (data/refine/line_checks.py).
        answer_in_sight: whether the writer of the chain sees the answer; a skeleton's writer always does.
        min_chain_chars: a shorter chain is refused; 0 lets drafts without reasoning pass in the mode "none".
        max_lexical, max_probability: anchoring above which a chain is refused; None only reports it.
    """

    mode: str = bounded("skeleton", one_of("skeleton", "plain", "none"))
    chains: str = bounded("tagged", one_of("tagged", "thought"))
    attempts: int = bounded(1, AT_LEAST_1)
    line_checks: dict[str, str] = field(default_factory=dict)
    answer_in_sight: bool = True
    min_chain_chars: int = bounded(1, NOT_NEGATIVE)
    max_lexical: float | None = bounded(None, SHARE)
    max_probability: float | None = bounded(None, FINITE_NOT_NEGATIVE)


@dataclass
class RefinePlan:
    """A file of conf/refine/; conf/refine/default.yaml explains every key."""

    dimensions: dict[str, Dimension]
    language: str = "en"
    prompts: str | None = None
    k: int = bounded(4, AT_LEAST_1)
    checklist: bool = True
    rounds: int = bounded(3, NOT_NEGATIVE)
    revisions: int = bounded(1, AT_LEAST_1)
    patience: int = bounded(1, AT_LEAST_1)
    critiques: str = bounded("json", one_of("json", "lines"))
    tournament: str | None = None
    reconstruct: Reconstruction = field(default_factory=Reconstruction)
    sampling: SamplingByRole = field(default_factory=SamplingByRole)

    def by_verifier(self, verifier: str) -> dict[str, Dimension]:
        """Return the dimensions that a task's verifier scores."""
        return {n: d for n, d in self._dimensions(verifier).items() if d.by == "verifier" and verifier != NO_VERIFIER}

    def by_model(self, verifier: str) -> dict[str, Dimension]:
        """Return the dimensions that the critic scores: all of them where the task has no reference."""
        if verifier != NO_VERIFIER:
            return {n: d for n, d in self._dimensions(verifier).items() if d.by == "model"}
        return {
            n: d if d.critic_least is None else replace(d, least=d.critic_least)
            for n, d in self._dimensions(verifier).items()
        }

    def _dimensions(self, verifier: str) -> dict[str, Dimension]:
        return {name: dimension for name, dimension in self.dimensions.items() if dimension.applies_to(verifier)}

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Check that each task can be asked and judged.

        Raises:
            ValueError: names a task whose messages are none, or that no dimension applies to.
        """
        for task in tasks:
            try:
                check_messages(task.messages)
            except ChatError as error:
                raise ValueError(f"task {task.id!r} of {task.source!r}: {error}") from error
            if not any(dimension.weight for dimension in self._dimensions(task.verifier).values()):
                raise ValueError(
                    f"no dimension of the plan with a weight applies to tasks of the verifier {task.verifier!r}, such "
                    f"as {task.id!r} of {task.source!r}: nothing would judge their answers"
                )

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain data, for the claim of a folder."""
        return asdict(self)


def shipped_plans() -> list[str]:
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def read_plan(name: str, overrides: list[str] | None = None) -> RefinePlan:
    """Read conf/refine/<name>.yaml, or the file at a path that ends in .yaml.

    Args:
        overrides: of the form key=value, such as `rounds=2` or `reconstruct.mode=plain`.

    Raises:
        ValueError: no such plan, an unknown key, or a value that is not allowed; names file and key.
    """
    path = Path(name) if name.endswith(".yaml") else PLANS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no plan {name!r}; there are {', '.join(shipped_plans())}, or give a .yaml file")
    for override in overrides or []:
        if "=" not in override:
            raise ValueError(f"{override!r} sets no key of the plan; write key=value")
    where = f"{path}{' with ' if overrides else ''}{' '.join(overrides or [])}"
    try:
        loaded = OmegaConf.merge(
            OmegaConf.structured(RefinePlan), OmegaConf.load(path), OmegaConf.from_dotlist(overrides or [])
        )
        plan = OmegaConf.to_object(loaded)
        assert isinstance(plan, RefinePlan)
        _check(plan)
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        key = error.full_key or ""
        raise ValueError(f"{where}: {key}{': ' if key else ''}{problem}") from error
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    return plan


def _check(plan: RefinePlan) -> None:
    check_bounds(plan, "")
    check_bounds(plan.reconstruct, "reconstruct")
    for name, dimension in plan.dimensions.items():
        check_bounds(dimension, f"dimensions.{name}")
        judged_by_model = dimension.by == "model" or dimension.applies_to(NO_VERIFIER)
        if judged_by_model and name not in DESCRIBED and not dimension.description:
            raise ValueError(f"dimensions.{name}.description is empty; say what the critic is to look at")
    if not sum(dimension.weight for dimension in plan.dimensions.values()):
        raise ValueError("dimensions: at least one must have a weight above 0")
    for source, check in plan.reconstruct.line_checks.items():
        if check not in LINE_CHECKS:
            raise ValueError(f"reconstruct.line_checks.{source} is {check!r}; allowed: {', '.join(LINE_CHECKS)}")
    for role, sampling in asdict(plan.sampling).items():
        try:
            RoleSampling(**sampling).sampling()
        except ValueError as error:
            raise ValueError(f"sampling.{role}: {error}") from error
