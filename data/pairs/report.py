"""The report of `python -m data.pairs`: how many tasks gave pairs, and why the others gave none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.pairs.answers import Answers
from data.pairs.responses import Response

SHOWN = 3  # ids in a line


def build_report(answers: Sequence[Answers]) -> dict[str, Any]:
    """Count tasks ("prompts") and pairs, over all and by source, and list the tasks without pairs by reason."""
    none: dict[str, list[str]] = {}
    by_source: dict[str, list[Answers]] = {}
    for a in answers:
        by_source.setdefault(a.task.source, []).append(a)
        if not a.pairs:
            none.setdefault(a.reason, []).append(a.task.id)
    return {
        "prompts": len(answers),
        "with_pairs": sum(bool(a.pairs) for a in answers),
        "pairs": sum(len(a.pairs) for a in answers),
        "none": dict(sorted(none.items(), key=lambda item: -len(item[1]))),
        "sources": {
            source: {
                "prompts": len(group),
                "with_pairs": sum(bool(a.pairs) for a in group),
                "teacher": _mean_reward(a.teacher for a in group),
                "student": _mean_reward(a.student for a in group),
            }
            for source, group in by_source.items()
        },
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Format the report of `make_pairs` as text."""
    lines = [
        f"{report['path']}: {report['pairs']:,} pairs of {report['with_pairs']:,} of {report['prompts']:,} prompts"
    ]
    for source, counts in report["sources"].items():
        student = "" if counts["student"] is None else f", student {counts['student']:.3f} where asked"
        lines.append(
            f"  {source:<20}{counts['with_pairs']:>8,} of {counts['prompts']:>8,} prompts; mean reward: teacher "
            f"{counts['teacher']:.3f}{student}"
        )
    calls = report["calls"]
    tokens = calls["prompt_tokens"] + calls["completion_tokens"]
    lines.append(f"  {calls['calls']:,} calls ({calls['cached']:,} from the journal, {calls['failed']:,} failed), "
                 f"{tokens:,} tokens")  # fmt: skip
    for reason, number in report["unwritable"].items():
        lines.append(f"{number:>12,} replies of the teacher are no responses: {reason}")
    lines.append(f"  none of {sum(map(len, report['none'].values())):,} prompts" + (":" if report["none"] else ""))
    for reason, ids in report["none"].items():
        lines.append(f"{len(ids):>12,} {reason}: {', '.join(ids[:SHOWN])}{', ...' if len(ids) > SHOWN else ''}")
    return "\n".join(lines)


def _mean_reward(responses: Iterable[Sequence[Response]]) -> float | None:
    rewards = [response.reward for some in responses for response in some]
    return sum(rewards) / len(rewards) if rewards else None
