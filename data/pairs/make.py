"""Make preference pairs: sample teacher and student, choose by the rule, ask the judge, write pairs and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.pairs.answers import Answers
from data.pairs.judge import Comparison, Judge
from data.pairs.report import build_report
from data.pairs.responses import Response, Sampler, key_of, sample_all
from data.pairs.rule import NOT_PREFERRED, Rule
from data.pairs.workspace import JUDGE, PAIRS, REPORT, STUDENT, TEACHER, Journal, claim_folder
from data.prepare.claim import as_json
from data.prepare.source_writer import locked
from nb_lightning.files import atomic_write, write_json
from nb_lightning.rewards.tasks import Task


def make_pairs(
    tasks: Sequence[Task],
    teacher: Sampler,
    student: Sampler,
    rule: Rule,
    judge: Judge | None,
    claim: Mapping[str, Any],
    folder: Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the pairs in `folder`, or resume there; return the report (data/pairs/report.py).

    Args:
        judge: asked about each pair that the rule chooses; None asks nobody.
        claim: all that the responses depend on: tasks, models, sampling and seed. Each pair carries the last three.
        overwrite: drop the work of another claim.

    Raises:
        ValueError: `folder` holds something else, or no task gives a pair.
    """
    claim = as_json(claim)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        claim_folder(folder, claim, overwrite)
        answers = _sample(tasks, teacher, student, rule, folder)
        for a in answers:
            chosen = rule.choose_pairs(a.teacher, a.student, f"{claim['seed']} {key_of(a.task)}")
            a.pairs, a.reason = ((), chosen) if isinstance(chosen, str) else (chosen, "")
        provenance = {key: claim[key] for key in ("teacher", "student", "sampling", "seed")}
        if judge is not None:
            _ask_judge(answers, judge, rule.preference, folder / JUDGE)
            provenance["judge"] = judge.about()
        lines = [{**line, "provenance": provenance} for a in answers for line in _lines(a)]
        report = build_report(answers)
        _write_lines(folder / PAIRS, lines)
        write_json(folder / REPORT, report)
    if not lines:
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in report["none"].items())
        raise ValueError(f"not one pair of {len(tasks)} prompts: {reasons}; the responses are in {folder}")
    return {**report, "path": str(folder / PAIRS)}


def _sample(tasks: Sequence[Task], teacher: Sampler, student: Sampler, rule: Rule, folder: Path) -> list[Answers]:
    """Sample the teacher on all tasks, then the student where the teacher has a response to choose."""
    by_teacher = _sample_model("teacher", teacher, tasks, folder / TEACHER)
    asked = [task for task in tasks if not isinstance(rule.choosable(by_teacher[key_of(task)]), str)]
    by_student = _sample_model("student", student, asked, folder / STUDENT)
    return [Answers(task, by_teacher[key_of(task)], by_student.get(key_of(task), [])) for task in tasks]


def _sample_model(name: str, sampler: Sampler, tasks: Sequence[Task], journal: Path) -> dict[str, list[Response]]:
    with tqdm(total=len(tasks), desc=name, unit="prompt", disable=None) as bar:
        return sample_all(sampler, tasks, journal, bar.update)


def _ask_judge(answers: Sequence[Answers], judge: Judge, least: float, path: Path) -> None:
    """Keep the pairs whose chosen response the judge prefers, by at least `least`.

    Args:
        path: the journal of its preferences.
    """
    journal, about = Journal(path), judge.about()
    for a in tqdm(answers, desc="judge", unit="prompt", disable=None):
        if not a.pairs:
            continue
        questions = [[about, key_of(a.task), chosen.text, rejected.text] for chosen, rejected in a.pairs]
        keys = [hashlib.sha256(json.dumps(question).encode()).hexdigest() for question in questions]
        new = [(key, pair) for key, pair in zip(keys, a.pairs) if key not in journal.entries]
        comparisons = [Comparison(a.task.messages, chosen.text, rejected.text) for _, (chosen, rejected) in new]
        for (key, _), preference in zip(new, judge.compare(comparisons) if new else []):
            journal.add(key, preference)
        preferred = [(pair, p) for pair, key in zip(a.pairs, keys) if (p := journal.entries[key]) >= least]
        a.pairs, a.preferences = [pair for pair, _ in preferred], [p for _, p in preferred]
        a.reason = "" if a.pairs else NOT_PREFERRED


def _lines(a: Answers) -> Iterable[dict[str, Any]]:
    """Write the pairs of a task as records of `data.prepare --pairs`."""
    for n, (chosen, rejected) in enumerate(a.pairs):
        scores: dict[str, Any] = {
            "teacher": [r.reward for r in a.teacher],
            "student": [r.reward for r in a.student],
            "chosen": {"reward": chosen.reward, "status": chosen.status},
            "rejected": {"reward": rejected.reward, "status": rejected.status},
        }
        if a.preferences is not None:
            scores["preference"] = a.preferences[n]
        yield {
            "id": a.task.id, "source": a.task.source, "messages": a.task.messages,
            "chosen": chosen.text, "rejected": rejected.text,
            "chosen_finish": chosen.finish, "rejected_finish": rejected.finish,
            "scores": scores,
        }  # fmt: skip


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with atomic_write(path) as file:
        for line in lines:
            file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))
