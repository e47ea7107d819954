"""The work of `python -m data.pairs`: sample, select, write pairs and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.pairs.judge import Comparison, Judge
from data.pairs.responses import Journal, Response, Sampler, key_of, sample_all
from data.pairs.rule import NOT_PREFERRED, Rule
from data.prepare.source_writer import locked
from nb_lightning.files import atomic_write, read_json, temporary_path, write_json
from nb_lightning.rewards.tasks import Task

CLAIM, PAIRS, REPORT = "claim.json", "pairs.jsonl", "report.json"
TEACHER, STUDENT, JUDGE = "teacher.jsonl", "student.jsonl", "judge.jsonl"
OURS = (CLAIM, PAIRS, REPORT, TEACHER, STUDENT, JUDGE)
SHOWN = 3
Chosen = tuple[Response, Response]


def make(
    tasks: Sequence[Task],
    teacher: Sampler,
    student: Sampler,
    rule: Rule,
    judge: Judge | None,
    claim: Mapping[str, Any],
    folder: Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the pairs into `folder`, going on with what is there; returns the report.

    Args:
        judge: where the rule asks one.
        claim: what the responses depend on: files, models, sampling and seed; the last three go into each pair.

    Raises:
        ValueError: `folder` holds something else, or there is not one pair.
    """
    claim = json.loads(json.dumps(claim))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        _take(folder, claim, overwrite)
        of_teacher = _sample("teacher", teacher, tasks, folder / TEACHER)
        # The student need not answer where the teacher gives nothing to choose.
        asked = [task for task in tasks if not isinstance(rule.good(of_teacher[key_of(task)]), str)]
        of_student = _sample("student", student, asked, folder / STUDENT)
        found: dict[str, list[Chosen] | str] = {}
        for task in tasks:
            key = key_of(task)
            found[key] = rule.candidates(of_teacher[key], of_student.get(key, []), f"{claim['seed']} {key}")
        preferences: dict[str, list[float]] = {}
        if judge is not None:
            preferences = _judged(tasks, found, judge, rule, folder / JUDGE)
        provenance = {key: claim[key] for key in ("teacher", "student", "sampling", "seed")}
        provenance |= {"judge": judge.about()} if judge is not None else {}
        lines = []
        for task in tasks:
            key = key_of(task)
            for n, pair in enumerate([] if isinstance(found[key], str) else found[key]):
                line = _line(task, pair, of_teacher[key], of_student[key])
                line["scores"] |= {"preference": preferences[key][n]} if key in preferences else {}
                lines.append({**line, "provenance": provenance})
        report = _report(tasks, found, len(lines), of_teacher, of_student)
        _write_lines(folder / PAIRS, lines)
        write_json(folder / REPORT, report)
    if not lines:
        why = ", ".join(f"{len(ids)} {reason}" for reason, ids in report["none"].items())
        raise ValueError(f"not one pair of {len(tasks)} prompts: {why}; the responses are in {folder}")
    return {**report, "path": str(folder / PAIRS)}


def describe(report: Mapping[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['path']}: {report['pairs']:,} pairs of {report['with_pairs']:,} of {report['prompts']:,} prompts"
    ]
    for source, numbers in report["sources"].items():
        student = "" if numbers["student"] is None else f", student {numbers['student']:.3f} where asked"
        lines.append(
            f"  {source:<20}{numbers['with_pairs']:>8,} of {numbers['prompts']:>8,} prompts; mean reward: teacher "
            f"{numbers['teacher']:.3f}{student}"
        )
    lines.append(f"  none of {sum(map(len, report['none'].values())):,} prompts" + (":" if report["none"] else ""))
    for reason, ids in report["none"].items():
        lines.append(f"{len(ids):>12,} {reason}: {', '.join(ids[:SHOWN])}{', ...' if len(ids) > SHOWN else ''}")
    return "\n".join(lines)


def _take(folder: Path, claim: dict[str, Any], overwrite: bool) -> None:
    """Take `folder` for this work, or go on with it there."""
    path = folder / CLAIM
    there = sorted(file.name for file in folder.iterdir() if file != temporary_path(path))
    old = read_json(path) if CLAIM in there else None
    if old is None and there:
        raise ValueError(f"--output {folder} holds something else ({', '.join(there[:SHOWN])}); name another folder")
    changed = [key for key in claim if old is not None and old.get(key) != claim[key]]
    if changed and not overwrite:
        raise ValueError(
            f"--output {folder} holds responses of other {', '.join(changed)}; name another folder, or replace them "
            "with --overwrite"
        )
    if changed:
        # The old claim stays until the new one takes its place: killed in between, it is found changed again.
        for name in set(OURS) - {CLAIM}:
            (folder / name).unlink(missing_ok=True)
    write_json(path, claim)


def _sample(name: str, sampler: Sampler, tasks: Sequence[Task], path: Path) -> dict[str, list[Response]]:
    with tqdm(total=len(tasks), desc=name, unit="prompt", disable=None) as bar:
        return sample_all(sampler, tasks, path, bar.update)


def _judged(
    tasks: Sequence[Task], found: dict[str, list[Chosen] | str], judge: Judge, rule: Rule, path: Path
) -> dict[str, list[float]]:
    """Take out of `found` what the judge does not prefer; returns how much it prefers what is left."""
    journal, about = Journal(path), judge.about()
    preferences: dict[str, list[float]] = {}
    for task in tqdm(tasks, desc="judge", unit="prompt", disable=None):
        pairs, key = found[key_of(task)], key_of(task)
        if isinstance(pairs, str):
            continue
        asked = [json.dumps([about, key, chosen.text, rejected.text]) for chosen, rejected in pairs]
        names = [hashlib.sha256(text.encode()).hexdigest() for text in asked]
        new = [(name, pair) for name, pair in zip(names, pairs) if name not in journal.entries]
        comparisons = [Comparison(task.messages, chosen.text, rejected.text) for _, (chosen, rejected) in new]
        for (name, _), preference in zip(new, judge.compare(comparisons) if new else []):
            journal.add(name, preference)
        kept = [(pair, p) for pair, name in zip(pairs, names) if (p := journal.entries[name]) >= rule.preference]
        found[key] = [pair for pair, _ in kept] or NOT_PREFERRED
        preferences[key] = [p for _, p in kept]
    return preferences


def _line(task: Task, pair: Chosen, of_teacher: Sequence[Response], of_student: Sequence[Response]) -> dict[str, Any]:
    chosen, rejected = pair
    scores = {"teacher": [r.reward for r in of_teacher], "student": [r.reward for r in of_student]}
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        scores[side] = {"reward": response.reward, "status": response.status}
    return {
        "id": task.id, "source": task.source, "messages": task.messages,
        "chosen": chosen.text, "rejected": rejected.text,
        "chosen_finish": chosen.finish, "rejected_finish": rejected.finish,
        "scores": scores,
    }  # fmt: skip


def _report(
    tasks: Sequence[Task],
    found: Mapping[str, list[Chosen] | str],
    pairs: int,
    of_teacher: Mapping[str, list[Response]],
    of_student: Mapping[str, list[Response]],
) -> dict[str, Any]:
    """How many prompts gave pairs, and which gave none and why."""
    none: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}
    for task in tasks:
        key = key_of(task)
        sources.setdefault(task.source, []).append(key)
        if isinstance(found[key], str):
            none.setdefault(found[key], []).append(task.id)

    def mean(responses: Mapping[str, list[Response]], keys: list[str]) -> float | None:
        rewards = [r.reward for key in keys for r in responses.get(key, [])]
        return sum(rewards) / len(rewards) if rewards else None

    return {
        "prompts": len(tasks),
        "with_pairs": sum(not isinstance(pairs, str) for pairs in found.values()),
        "pairs": pairs,
        "none": dict(sorted(none.items(), key=lambda item: -len(item[1]))),
        "sources": {
            source: {
                "prompts": len(keys),
                "with_pairs": sum(not isinstance(found[key], str) for key in keys),
                "teacher": mean(of_teacher, keys),
                "student": mean(of_student, keys),
            }
            for source, keys in sources.items()
        },
    }


def _write_lines(path: Path, lines: Sequence[Any]) -> None:
    with atomic_write(path) as file:
        for line in lines:
            file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))
