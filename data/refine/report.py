"""The report of `python -m data.refine`: what was kept, what it cost, and what the checks said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.refine.drafts import History, of_candidates


@dataclass
class Mean:
    """A mean of numbers that are not held."""

    total: float = 0.0
    n: int = 0

    def add(self, number: float) -> None:
        self.total, self.n = self.total + number, self.n + 1

    @property
    def value(self) -> float | None:
        return self.total / self.n if self.n else None


@dataclass
class Report:
    """Counts over histories, which are not held.

    Attributes:
        kept: samples.
        first_right: tasks with a candidate that passed before any revision: what rejection sampling would keep.
        by_source: source -> tasks, kept, first_right.
        dropped: reason -> tasks.
        rounds: rounds until a draft passed -> tasks.
        tokens: role -> generated tokens.
        statuses: of the tasks' verifiers -> drafts.
        lines: of all chains that were written, refused ones included: chains, chains_valid, lines, lines_valid.
        lexical, probability: anchoring of the kept chains.
        judged_by: "verifier" or "critic" -> samples.
    """

    tasks: int = 0
    kept: int = 0
    first_right: int = 0
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    rounds: Counter[int] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    lexical: Mean = field(default_factory=Mean)
    probability: Mean = field(default_factory=Mean)
    statuses: Counter[str] = field(default_factory=Counter)
    judged_by: Counter[str] = field(default_factory=Counter)

    def add(self, history: History) -> None:
        source = self.by_source.setdefault(history.task.source, Counter())
        first_right = history.first_right is not None
        self.tasks += 1
        self.first_right += first_right
        self.tokens.update(history.tokens)
        self.statuses.update(draft.status for draft in history.drafts if draft.status)
        source.update(tasks=1, first_right=int(first_right), kept=int(not history.dropped))
        for chain in history.chains:
            if chain.lines_checked:
                is_valid = chain.lines_valid == chain.lines_checked
                self.lines.update(chains=1, chains_valid=int(is_valid))
                self.lines.update(lines=chain.lines_checked, lines_valid=chain.lines_valid)
        if history.passed:
            self.rounds[history.rounds] += 1
        if history.dropped:
            self.dropped[history.dropped] += 1
            return
        self.kept += 1
        draft, chain = history.best_draft, history.chains[-1]
        assert draft is not None
        self.judged_by["verifier" if draft.status else "critic"] += 1
        if chain.lexical is not None:
            self.lexical.add(chain.lexical)
        if chain.probability is not None:
            self.probability.add(chain.probability)

    def reasons(self) -> str:
        return ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())

    def as_json(self, unreadable: Mapping[str, Counter[str]], calls: Mapping[str, Any]) -> dict[str, Any]:
        """Return the report as plain data.

        Args:
            unreadable: role -> reason -> replies that could not be read.
            calls: the caller's summary.
        """
        generated = sum(self.tokens.values())
        candidates = of_candidates(self.tokens)
        return {
            "tasks": self.tasks,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "sources": {name: dict(counts) for name, counts in self.by_source.items()},
            "judged_by": dict(self.judged_by),
            "verifier": dict(self.statuses.most_common()),
            "rounds": {str(n): count for n, count in sorted(self.rounds.items())},
            "tokens": {**self.tokens, "all": generated},
            "tokens_per_sample": generated / self.kept if self.kept else None,
            "rejection_sampling": {
                "kept": self.first_right,
                "tokens_per_sample": candidates / self.first_right if self.first_right else None,
            },
            "chains": {
                "replayed": self.lines["chains"],
                "every_line_valid": self.lines["chains_valid"],
                "lines": self.lines["lines"],
                "lines_valid": self.lines["lines_valid"],
                "lexical_anchoring": self.lexical.value,
                "probability_anchoring": self.probability.value,
            },
            "unreadable": {role: dict(reasons) for role, reasons in unreadable.items()},
            "calls": calls,
        }


def format_report(report: Mapping[str, Any], path: str) -> str:
    """Format the report as text."""
    rejection = report["rejection_sampling"]
    lines = [
        f"{path}: {report['kept']:,} samples of {report['tasks']:,} tasks, {_number(report['tokens_per_sample'])} "
        f"generated tokens a sample (rejection sampling alone: {rejection['kept']:,}, "
        f"{_number(rejection['tokens_per_sample'])})"
    ]
    for source, counts in report["sources"].items():
        lines.append(
            f"  {source:<20}{counts['kept']:>8,} of {counts['tasks']:>8,} tasks; right before any revision: "
            f"{counts['first_right']:,}"
        )
    lines += [f"{n:>12,} dropped: {reason}" for reason, n in report["dropped"].items()]
    for role, reasons in report["unreadable"].items():
        lines += [f"{n:>12,} replies of the {role} call not readable: {reason}" for reason, n in reasons.items()]
    chains = report["chains"]
    if chains["replayed"]:
        lines.append(f"  of {chains['replayed']:,} chains that were written and replayed, every line holds in "
                     f"{chains['every_line_valid']:,}; the others are not kept")  # fmt: skip
    anchoring = [f"{name} {chains[f'{name}_anchoring']:.3f}" for name in ("lexical", "probability")
                 if chains[f"{name}_anchoring"] is not None]  # fmt: skip
    if anchoring:
        lines.append(f"  anchoring: {', '.join(anchoring)} (docs/refine.md)")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "no" if value is None else f"{value:,.0f}"
