"""What a refinement knows about one instruction: its checklist, drafts, critiques and chains; all of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data.calls.call import CUT
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.thoughts import END_OF_THINK, THINK

REVISION = "round"  # what the names of revised drafts begin with
CANDIDATE_ROLES = ("teacher", "student")  # what the names of roles begin with that write candidates


@dataclass(frozen=True)
class Critique:
    """One problem of a draft.

    Attributes:
        item: number of the checklist's item, from 1; None if it belongs to none.
        where: the place, in the draft's words or as "line 3".
        problem: what is wrong there.
        fix: how to mend it.
    """

    item: int | None
    where: str
    problem: str
    fix: str


@dataclass
class Draft:
    """An answer to the instruction, with its reasoning.

    Attributes:
        name: such as "teacher-0", "student-3", "round1-0".
        reasoning: its thought; "" without one.
        content: the answer itself.
        finish: "stop", or why the model was stopped before it had finished: "length", "content_filter".
        status: of the task's verifier; "" where the critic alone judges, and for a truncated draft.
        scores: dimension -> score from 0 to 1; empty for a truncated draft.
        total: mean over the plan's dimensions by their weights; a dimension without a score counts 0.
        passed: every dimension of the plan reaches its `least`.
        critiques: what the critic found; None if it was not asked, or its reply could not be read.
    """

    name: str
    reasoning: str
    content: str
    finish: str
    status: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    passed: bool = False
    critiques: list[Critique] | None = None

    @property
    def is_revision(self) -> bool:
        return self.name.startswith(REVISION)

    @property
    def is_cut(self) -> bool:
        """Whether the model was stopped before it had finished."""
        return self.finish in CUT

    @property
    def text(self) -> str:
        """The answer as an assistant's text, with its thought: what verifiers read."""
        return with_thought(self.reasoning, self.content)

    @property
    def lines(self) -> list[str]:
        """The lines of reasoning and answer: what critiques by line count."""
        return [line for line in [*self.reasoning.splitlines(), *self.content.splitlines()] if line.strip()]


def with_thought(reasoning: str, content: str) -> str:
    """Write a thought and an answer as one text."""
    return f"{THINK}\n{reasoning}\n{END_OF_THINK}\n\n{content}" if reasoning else content


@dataclass
class Chain:
    """A reconstructed chain of thought.

    Attributes:
        reasoning: the chain.
        skeleton: the outline that it follows, or the summary before it; "" without one.
        own_answer: what the writer concluded from the chain.
        problem: why the chain is refused; "" if it is not.
        lines_valid, lines_checked: of the lines that a check could replay.
        lexical, probability: anchoring (data/refine/anchoring.py); None where it is not measured.
    """

    reasoning: str
    skeleton: str = ""
    own_answer: str = ""
    problem: str = ""
    lines_valid: int = 0
    lines_checked: int = 0
    lexical: float | None = None
    probability: float | None = None


@dataclass
class History:
    """Everything about one instruction.

    Attributes:
        checklist: what a good answer must satisfy; item 1 is the verifier's, where the task has one.
        drafts: in the order in which they were written.
        best: index of the best draft; None before any is scored.
        rounds: of critique and revision that were done.
        chains: that were tried; the last one is kept, unless it has a problem.
        dropped: why the instruction gives no sample; "" if it gives one.
        calls: role -> replies, those that could not be read included.
        tokens: role -> generated tokens of these.
    """

    task: Task
    checklist: list[str] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    best: int | None = None
    rounds: int = 0
    chains: list[Chain] = field(default_factory=list)
    dropped: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def best_draft(self) -> Draft | None:
        return None if self.best is None else self.drafts[self.best]

    @property
    def passed(self) -> bool:
        """Whether the best draft passes."""
        return self.best_draft is not None and self.best_draft.passed

    @property
    def candidates(self) -> list[Draft]:
        """The drafts that are no revisions."""
        return [draft for draft in self.drafts if not draft.is_revision]

    @property
    def first_right(self) -> Draft | None:
        """The first candidate that passes: what rejection sampling would keep."""
        return next((draft for draft in self.candidates if draft.passed), None)

    @property
    def first_draft(self) -> Draft | None:
        """The draft that the first revision began with: the best candidate."""
        scored = [draft for draft in self.candidates if draft.scores]
        return max(scored, key=lambda draft: (draft.passed, draft.total), default=None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def history_of(fields: dict[str, Any]) -> History:
    """Read what `History.as_json` wrote."""
    drafts = [
        Draft(**{**draft, "critiques": draft["critiques"] and [Critique(**c) for c in draft["critiques"]]})
        for draft in fields["drafts"]
    ]
    chains = [Chain(**chain) for chain in fields["chains"]]
    return History(**{**fields, "task": Task(**fields["task"]), "drafts": drafts, "chains": chains})


def of_candidates(by_role: Mapping[str, int]) -> int:
    """Sum counts of calls or tokens over the roles that write candidates."""
    return sum(n for role, n in by_role.items() if role.startswith(CANDIDATE_ROLES))
