"""Make SFT data for a refiner and a writer of chains from worked answers: where no stronger model is at hand.

`python -m data.refine.train_data --worked chats.jsonl --student RUN --plan PLAN --output FOLDER` takes conversations
that end in a worked answer (with `reasoning_content`), and writes FOLDER/<file>.jsonl for `data.prepare --chat`. The
prompts are those of the plan, so that the trained model knows the words in which data.refine asks it:

    critique    a draft, and where its first wrong line is; or that nothing is wrong
    revise      a draft with its critiques, and the worked answer
    skeleton    a worked answer, and the outline of its reasoning: words and numbers replaced by w and n
    chain       a worked answer with or without its skeleton, and its reasoning

Drafts are the student's own answers (`--student`) and worked answers with a corrupted line. The first wrong line of a
draft is the first that fails the source's line check, where the plan names one, and else the first that differs from
the worked answer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from data.calls.caller import Caller
from data.calls.flags import add_call_flags, budget_of, check_call_flags, make_engine
from data.refine.asking import Asker, Question
from data.refine.drafts import Critique, Draft, History
from data.refine.line_checks import LINE_CHECKS
from data.refine.loop import verdicts
from data.refine.make import CALLS
from data.refine.parse import read_draft, write_line_critiques
from data.refine.plan import RefinePlan, read_plan
from data.refine.prompts import Prompts, read_prompts, task_text
from nb_lightning.errors import one_line_errors, require_at_least
from nb_lightning.files import atomic_write, json_line
from nb_lightning.rewards.extract import fold
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.messages import assistant_message, check_messages
from nb_lightning.text.thoughts import split_thought

DESCRIPTION = "Make SFT data for a refiner and a writer of chains from worked answers."
SHARES = {"critique": 0.35, "revise": 0.4, "skeleton": 0.08, "chain": 0.17}  # of the records
STUDENT_SHARE = 0.6  # of the drafts, where the student answered; the others are corrupted worked answers
RIGHT_SHARE = 0.2  # of the corrupted drafts: nothing is corrupted, so that the critic learns to approve
TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


@dataclass(frozen=True)
class Worked:
    """A task with its worked answer.

    Attributes:
        task: its reference is the answer's text; `verifier` is not used.
        answer: the worked answer.
    """

    task: Task
    answer: Draft


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_intermixed_args(arguments)
    with one_line_errors(interrupted="run the same command again to go on"):
        for path, counts in run(a).items():
            print(f"{path}: {', '.join(f'{n:,} {kind}' for kind, n in counts.items())}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.refine.train_data", description=DESCRIPTION)
    p.add_argument(
        "--worked", nargs="+", required=True, metavar="FILE", help="conversations with worked answers, .jsonl"
    )
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    p.add_argument("--plan", default="default", metavar="NAME", help="whose prompts are used (default: %(default)s)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the plan")
    p.add_argument("--student", metavar="MODEL", help="whose wrong answers are mended (default: none)")
    p.add_argument("--student-model", metavar="NAME", help="what the student's endpoint calls it")
    p.add_argument("--drafts", type=int, default=1, metavar="N", help="of the student for each task (default: 1)")
    p.add_argument("--records", type=int, metavar="N", help="of each file (default: one for each worked answer)")
    p.add_argument("--limit", type=int, metavar="N", help="use only the first N conversations of each file")
    p.add_argument("--seed", type=int, default=0)
    add_call_flags(p)
    return p


def run(a: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Write a file of records for each file of worked answers; return how many of each kind are in each.

    Raises:
        ValueError: the arguments cannot be used, or a line is no worked answer; names file and line.
    """
    check_call_flags(a)
    require_at_least(a, drafts=1, records=1, limit=1)
    plan = read_plan(a.plan, a.overrides)
    prompts = read_prompts(plan.language, plan.prompts, plan.critiques)
    paths = [Path(path) for path in a.worked]
    _check_paths(paths, a.output)
    worked_by_file = {path: read_worked(path)[: a.limit] for path in paths}
    (a.output / CALLS).mkdir(parents=True, exist_ok=True)
    drafts: dict[str, list[Draft]] = {}
    if a.student:
        asker = Asker(Caller(a.output / CALLS, budget_of(a), a.max_failed), a.seed)
        engine = make_engine("--student", a.student, a.student_model, a)
        questions = [
            Question(history, str(n), w.task.messages, partial(read_draft, name=f"student-{n}"), is_answer=True)
            for worked in worked_by_file.values()
            for w in worked
            for history in [History(w.task)]
            for n in range(a.drafts)
        ]
        answered = asker.ask("student", engine, plan.sampling.candidates.sampling(), questions)
        for question, draft in zip(questions, answered):
            if draft is not None and draft.content and not draft.is_cut:
                drafts.setdefault(question.history.task.key, []).append(draft)
    written = {}
    for path, worked in worked_by_file.items():
        rng = random.Random(f"{a.seed} {path.stem}")
        kinds = list(make_records(worked, drafts, plan, prompts, a.records or len(worked), rng))
        target = a.output / path.name
        with atomic_write(target) as file:
            for _, messages in kinds:
                file.write(json_line({"messages": messages}))
        written[str(target)] = {kind: len(list(group)) for kind, group in groupby(sorted(kind for kind, _ in kinds))}
    return written


def _check_paths(paths: Sequence[Path], output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is no folder")
    for path in paths:
        if output.resolve() == path.parent.resolve():
            raise ValueError(f"--output {output} is the folder of {path}, which would be replaced; name another folder")
    for stem, n in Counter(path.stem for path in paths).items():
        if n > 1:
            raise ValueError(
                f"--worked names {n} files that are called {stem}; the name is their source, so rename one"
            )


def read_worked(path: Path) -> list[Worked]:
    """Read conversations whose last message is an assistant's answer; the file's name is their source.

    Raises:
        ValueError: the file cannot be read, or a line is something else; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    worked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = check_messages(record.get("messages") if isinstance(record, dict) else None)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no conversation: {error}") from error
        answer = split_thought(messages[-1])
        if len(messages) < 2 or answer["role"] != "assistant" or not answer["content"].strip():
            raise ValueError(f"{path}:{number}: it does not end in an assistant's answer with text")
        draft = Draft("worked", answer.get("reasoning_content") or "", answer["content"], "stop")
        worked.append(Worked(Task(f"{path.stem}/{number}", path.stem, messages[:-1], "exact", draft.content), draft))
    if not worked:
        raise ValueError(f"{path} holds no worked answer")
    return worked


def make_records(
    worked: Sequence[Worked], drafts: Mapping[str, Sequence[Draft]], plan: RefinePlan, prompts: Prompts,
    records: int, rng: random.Random,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:  # fmt: skip
    """Yield `records` conversations, each with its kind ("critique", "revise", "skeleton", "chain").

    Args:
        drafts: the student's, by the task's key.
    """
    order = list(range(len(worked)))
    for number in range(records):
        if number % len(order) == 0:
            rng.shuffle(order)
        w = worked[order[number % len(order)]]
        (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
        if kind in ("skeleton", "chain") and not w.answer.reasoning:
            kind = "revise"
        if kind in ("skeleton", "chain"):
            yield kind, _chain_record(kind, w, plan, prompts, rng)
        else:
            yield kind, _critique_record(kind, w, drafts.get(w.task.key, ()), plan, prompts, rng)


def _critique_record(
    kind: str, w: Worked, drafts: Sequence[Draft], plan: RefinePlan, prompts: Prompts, rng: random.Random
) -> list[dict[str, Any]]:
    by_student = [d for d in drafts if d.lines] if rng.random() < STUDENT_SHARE else []
    draft = rng.choice(by_student) if by_student else corrupt(w.answer, rng)
    wrong = first_wrong_line(draft, w, plan)
    shown = {"task": task_text(w.task), "checklist": [], "reasoning": draft.reasoning, "answer": draft.content,
             "draft": "\n".join(draft.lines)}  # fmt: skip
    if wrong is None:
        draft.critiques = []
    elif plan.critiques == "lines":
        draft.critiques = [Critique(None, f"line {wrong + 1}", "wrong", "write it again")]
    else:
        draft.critiques = [Critique(None, draft.lines[wrong], "This does not hold.", _fix(draft, wrong, w.answer))]
    if kind == "critique":
        asked = prompts.messages("critique", verdict="", **shown)
        if plan.critiques == "lines":
            return [*asked, assistant_message(write_line_critiques(draft, wrong))]
        problems = [{"item": c.item, "where": c.where, "problem": c.problem, "fix": c.fix} for c in draft.critiques]
        return [*asked, assistant_message(json.dumps({"problems": problems}, ensure_ascii=False))]
    signs = verdicts(draft) if plan.critiques == "lines" else ""
    asked = prompts.messages("revise", critiques=draft.critiques, verdicts=signs, verdict="", **shown)
    return [*asked, assistant_message(w.answer.content, w.answer.reasoning)]


def _fix(draft: Draft, wrong: int, worked: Draft) -> str:
    """Say how to mend a line: the worked answer has the line where all before it are the same."""
    same = [fold(line) for line in draft.lines[:wrong]] == [fold(line) for line in worked.lines[:wrong]]
    if not same:
        return "Work it out again."
    return f"It is: {worked.lines[wrong]}" if wrong < len(worked.lines) else "Leave it out."


def _chain_record(kind: str, w: Worked, plan: RefinePlan, prompts: Prompts, rng: random.Random) -> list[dict[str, Any]]:
    task, tagged = task_text(w.task), plan.reconstruct.chains == "tagged"
    skeleton = outline_of(w.answer.reasoning)
    if kind == "skeleton":
        asked = prompts.messages("skeleton", task=task, answer=w.answer.content)
        return [*asked, assistant_message(f"<skeleton>\n{skeleton}\n</skeleton>" if tagged else skeleton)]
    is_plain = rng.random() < 0.5
    answer = w.answer.content if plan.reconstruct.answer_in_sight else ""
    asked = prompts.messages("chain", task=task, answer=answer, skeleton="" if is_plain else skeleton)
    if not tagged:
        return [*asked, assistant_message(w.answer.content, w.answer.reasoning)]
    summary = f"<summary>\n{skeleton}\n</summary>\n" if is_plain and answer else ""
    chain = f"<chain>\n{w.answer.reasoning}\n</chain>\n<answer>\n{w.answer.content}\n</answer>"
    return [*asked, assistant_message(summary + chain)]


def outline_of(reasoning: str) -> str:
    """Outline a chain without its contents: words become w, numbers n; equal lines in a row are counted.

    "7 + 5 = 12" becomes "n + n = n", and ten lines of two numbers "n n x10".
    """
    shapes = [" ".join(_shape(token) for token in TOKEN.findall(line)) for line in reasoning.splitlines()]
    counted = [(shape, len(list(group))) for shape, group in groupby(filter(None, shapes))]
    return "\n".join(shape if n == 1 else f"{shape} x{n}" for shape, n in counted)


def _shape(token: str) -> str:
    return "n" if token.isdigit() else "w" if token.isalpha() else token


def corrupt(answer: Draft, rng: random.Random) -> Draft:
    """Return a worked answer in which a character of a line is another, is left out, or changes places.

    In `RIGHT_SHARE` of the cases nothing is changed.
    """
    reasoning, content = answer.reasoning, answer.content
    if rng.random() >= RIGHT_SHARE:
        text = f"{reasoning}\n{content}" if reasoning else content
        lines = text.split("\n")
        number = rng.choice([i for i, line in enumerate(lines) if line.strip()])
        lines[number] = _corrupt_line(lines[number], rng)
        parts = reasoning.count("\n") + 1 if reasoning else 0
        reasoning, content = "\n".join(lines[:parts]), "\n".join(lines[parts:])
    return Draft("corrupted", reasoning, content, "stop")


def _corrupt_line(line: str, rng: random.Random) -> str:
    places = [i for i, character in enumerate(line) if character.isalnum()]
    if not places:
        return line
    i = rng.choice(places)
    kind = rng.choice(("replace", "leave out", "swap"))
    if kind == "swap" and i + 1 < len(line):
        return line[:i] + line[i + 1] + line[i] + line[i + 2 :]
    if kind == "leave out" and len(line.strip()) > 1:
        return line[:i] + line[i + 1 :]
    alphabet = "0123456789" if line[i].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    return line[:i] + rng.choice(alphabet) + line[i + 1 :]


def first_wrong_line(draft: Draft, w: Worked, plan: RefinePlan) -> int | None:
    """Return the index of the first wrong line of a draft's lines; None if the draft is right.

    Lines of reasoning are judged by the source's line check, where the plan names one: a right chain in other words is
    right. Without one, and in the answer itself, lines are compared with the worked answer's.
    """
    reasoning, content = (
        [line for line in text.splitlines() if line.strip()] for text in (draft.reasoning, draft.content)
    )
    check = LINE_CHECKS.get(plan.reconstruct.line_checks.get(w.task.source, ""))
    if check is not None and reasoning:
        verdicts = check(task_text(w.task), "\n".join(reasoning))
        if False in verdicts:  # it may be of a line that is missing: then the answer comes too early
            return min(verdicts.index(False), len(reasoning) + len(content) - 1)
    elif reasoning and (number := _first_difference(reasoning, w.answer.lines)) is not None:
        return number
    if fold(draft.content) == fold(w.answer.content):
        return None
    number = _first_difference(content, [line for line in w.answer.content.splitlines() if line.strip()])
    return len(reasoning) + (len(content) - 1 if number is None else number)  # None: the end is missing


def _first_difference(lines: Sequence[str], right: Sequence[str]) -> int | None:
    """Return the index of the first line that is not the one of `right`; None if `lines` are its beginning."""
    return next((i for i, line in enumerate(lines) if i >= len(right) or fold(line) != fold(right[i])), None)


if __name__ == "__main__":
    main()
