"""Make preference pairs: sample teacher and student, choose by the rule, ask the judge, write pairs and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.calls.budget import Budget
from data.calls.caller import MAX_FAILED, NO_LIMIT, Caller
from data.pairs.answers import Answers
from data.pairs.judge import Comparison, Judge, compare
from data.pairs.report import build_report
from data.pairs.responses import Sampler
from data.pairs.rule import NOT_PREFERRED, UNJUDGED, Rule
from data.pairs.workspace import FILES, PAIRS, REPORT, VERSION, describe_other_work
from data.prepare.claim import as_json, claim_folder
from data.prepare.conversations import VARIABLES
from data.prepare.source_writer import locked
from nb_lightning.files import atomic_write, json_line, write_json
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
    budget: Budget = NO_LIMIT,
    max_failed: float = MAX_FAILED,
) -> dict[str, Any]:
    """Make the pairs in `folder`, or resume there; return the report (data/pairs/report.py).

    Args:
        judge: asked about each pair that the rule chooses; None asks nobody.
        claim: all that the responses depend on: tasks, models, sampling and seed. Each pair carries the last three, and
            the variables of the template, so that its prompt is prepared as it was sampled.
        overwrite: drop the work of another claim.
        budget, max_failed: see `Caller`.

    Raises:
        ValueError: `folder` holds something else, the budget is spent, or no task gives a pair.
    """
    claim = as_json({**claim, "version": VERSION})
    caller = Caller(folder, budget, max_failed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        claim_folder(folder, claim, FILES, overwrite, describe_other_work)
        answers, unwritable = _sample(tasks, teacher, student, rule, caller)
        for a in answers:
            chosen = rule.choose_pairs(a.teacher, a.student, f"{claim['seed']} {a.task.key}")
            a.pairs, a.reason = ((), chosen) if isinstance(chosen, str) else (chosen, "")
        provenance = {key: claim[key] for key in ("teacher", "student", "sampling", "seed")}
        if judge is not None:
            _ask_judge(answers, judge, rule.preference, caller)
            provenance["judge"] = judge.engine.about()
        variables = {VARIABLES: claim["template_kwargs"]} if "template_kwargs" in claim else {}
        lines = [{**line, **variables, "provenance": provenance} for a in answers for line in _lines(a)]
        report = {**build_report(answers), "unwritable": unwritable, "calls": caller.summary()}
        _write_lines(folder / PAIRS, lines)
        write_json(folder / REPORT, report)
    if not lines:
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in report["none"].items())
        reasons += "".join(f"; {n} replies are no responses: {reason}" for reason, n in unwritable.items())
        raise ValueError(f"not one pair of {len(tasks)} prompts: {reasons}; the responses are in {folder}")
    return {**report, "path": str(folder / PAIRS)}


def _sample(
    tasks: Sequence[Task], teacher: Sampler, student: Sampler, rule: Rule, caller: Caller
) -> tuple[list[Answers], dict[str, int]]:
    """Sample the teacher on all tasks, then the student where the teacher has a response to choose.

    Returns:
        The responses to each task, and `Responses.unwritable` of the teacher.
    """
    by_teacher = teacher.sample(tasks, caller)
    asked = [task for task in tasks if not isinstance(rule.choosable(by_teacher.by_task[task.key]), str)]
    by_student = student.sample(asked, caller).by_task
    answers = [Answers(task, by_teacher.by_task[task.key], by_student.get(task.key, [])) for task in tasks]
    return answers, by_teacher.unwritable


def _ask_judge(answers: Sequence[Answers], judge: Judge, least: float, caller: Caller) -> None:
    """Keep the pairs whose chosen response the judge prefers, by at least `least`."""
    comparisons = [
        Comparison(a.task.messages, chosen.text, rejected.text, a.task.tools)
        for a in answers
        for chosen, rejected in a.pairs
    ]
    preferences = iter(compare(judge, comparisons, caller))
    for a in answers:
        if not a.pairs:
            continue
        judged = [(pair, next(preferences)) for pair in a.pairs]
        preferred = [(pair, p) for pair, p in judged if p is not None and p >= least]
        a.pairs, a.preferences = [pair for pair, _ in preferred], [p for _, p in preferred]
        if not a.pairs:
            a.reason = UNJUDGED if all(p is None for _, p in judged) else NOT_PREFERRED


def _lines(a: Answers) -> Iterable[dict[str, Any]]:
    """Write the pairs of a task as records of `data.prepare --pairs`."""
    tools = {"tools": a.task.tools} if a.task.tools else {}
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
            "id": a.task.id, "source": a.task.source, "messages": a.task.messages, **tools,
            "chosen": chosen.text, "rejected": rejected.text,
            "chosen_finish": chosen.finish, "rejected_finish": rejected.finish,
            "scores": scores,
        }  # fmt: skip


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with atomic_write(path) as file:
        for line in lines:
            file.write(json_line(line))
