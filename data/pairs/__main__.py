"""Make preference pairs from verifiable tasks: a teacher's right response beside the student's wrong one.

`python -m data.pairs --tasks tasks.jsonl --teacher RUN --student RUN --output FOLDER` (docs/dpd.md) samples several
responses of each model, scores them, and writes the pairs in which the teacher's response is clearly better:

    FOLDER/claim.json       what the work is for: tasks, models, sampling, seed
           calls.jsonl      all replies of the models, written as they come: after a stop, the same command resumes
           pairs.jsonl      input of data.prepare --pairs
           report.json      how many tasks gave no pair, and why

The result depends on the input, the settings and the seed alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.calls.flags import add_call_flags, budget_of, check_call_flags, is_address, make_engine
from data.calls.local import LocalModel
from data.pairs.judge import EndpointJudge, Judge, RewardModelJudge
from data.pairs.make import make_pairs
from data.pairs.report import format_report
from data.pairs.responses import Sampler
from data.pairs.rule import BY, Rule
from nb_lightning.errors import note, one_line_errors, require_at_least
from nb_lightning.files import sha256_of
from nb_lightning.generation.sampling import Sampling
from nb_lightning.rewards.tasks import read_task_files
from nb_lightning.text.chat_template import read_template
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.variables import check_variables

DESCRIPTION = "Make preference pairs from verifiable tasks: a teacher's right response beside the student's wrong one."


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    with one_line_errors(interrupted="run the same command again to go on"):
        print(format_report(run(a)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.pairs", description=DESCRIPTION)
    p.add_argument("--tasks", nargs="+", required=True, metavar="FILE", help="verifiable tasks, .jsonl")
    p.add_argument("--teacher", required=True, metavar="MODEL", help="run, checkpoint, Hugging Face folder, .gguf "
                   "file, or the address of an endpoint (http://host:port/v1, with --teacher-model)")  # fmt: skip
    p.add_argument("--teacher-model", metavar="NAME", help="what the endpoint calls the teacher")
    p.add_argument("--student", required=True, metavar="MODEL", help="the model that DPD is to begin with")
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    p.add_argument("--overwrite", action="store_true", help="drop the work of other settings in the folder")
    p.add_argument("--limit", type=int, metavar="N", help="use only the first N tasks of each file")
    g = p.add_argument_group("sampling")
    g.add_argument("--k", type=int, default=4, help="responses of the teacher to each prompt (default: %(default)s)")
    g.add_argument("--student-k", type=int, help="responses of the student (default: as many)")
    g.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    g.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    g.add_argument("--max-new-tokens", type=int, default=512, help="(default: %(default)s)")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--chat-template", type=Path, metavar="FILE", help="of both models (default: the models' own)")
    g.add_argument("--template-kwargs", metavar="JSON", help="variables of the local models' template, such as "
                   "'{\"enable_thinking\": false}'")  # fmt: skip
    g = p.add_argument_group("the rule for pairs")
    g.add_argument("--by", default="verifier", choices=BY, help="(default: %(default)s)")
    g.add_argument(
        "--chosen-reward",
        type=float,
        default=1.0,
        metavar="X",
        help="lowest reward of a chosen response (default: %(default)s)",
    )
    g.add_argument("--margin", type=float, default=1.0, metavar="X",
                   help="by which a rejected response's reward is lower, at least (default: %(default)s)")  # fmt: skip
    g.add_argument("--pairs-per-prompt", type=int, default=1, metavar="N", help="at most (default: %(default)s)")
    g.add_argument("--judge", metavar="MODEL", help="for --by judge or both: a run of stage=reward_model, or the "
                   "address of an endpoint (with --judge-model)")  # fmt: skip
    g.add_argument("--judge-model", metavar="NAME", help="what the endpoint calls the judge")
    g.add_argument("--preference", type=float, default=0.75, metavar="X", help="of the judge for the chosen response, "
                   "at least (default: %(default)s: in both orders, or in one with the other undecided)")  # fmt: skip
    add_call_flags(p)
    return p


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Make the pairs; return the report.

    Raises:
        ValueError: the arguments cannot be used, or no task gives a pair.
    """
    rule = Rule(a.by, a.chosen_reward, a.margin, a.preference, a.pairs_per_prompt)
    check_call_flags(a)
    budget = budget_of(a)
    judge = None
    if rule.by != "verifier":
        judge = _judge(a)
    tasks = read_task_files(a.tasks, a.limit)
    files = [(Path(path).name, sha256_of(Path(path))) for path in a.tasks]
    teacher, student, chat = _samplers(a)
    claim = {
        "tasks": files,
        "limit": a.limit,
        "teacher": teacher.engine.about(),
        "student": student.engine.about(),
        "template": chat.template.source,
        **({"template_kwargs": chat.template.variables} if chat.template.variables else {}),
        "sampling": {
            "k": teacher.k,
            "student_k": student.k,
            "temperature": a.temperature,
            "top_p": a.top_p,
            "max_new_tokens": a.max_new_tokens,
        },
        "seed": a.seed,
    }
    return make_pairs(tasks, teacher, student, rule, judge, claim, a.output, a.overwrite, budget, a.max_failed)


def _judge(a: argparse.Namespace) -> Judge:
    if a.judge and not is_address(a.judge):
        return RewardModelJudge(a.judge, a.device, a.dtype)
    if not (a.judge and a.judge_model):
        raise ValueError(f"--by {a.by} needs --judge: a run of stage=reward_model, or an endpoint with --judge-model")
    return EndpointJudge(make_engine("--judge", a.judge, a.judge_model, a))


def _samplers(a: argparse.Namespace) -> tuple[Sampler, Sampler, ChatTokenizer]:
    """Return teacher, student, and the student's tokenizer with the template that writes the pairs."""
    template = read_template(a.chat_template, f"--chat-template {a.chat_template}") if a.chat_template else None
    require_at_least(a, k=1, student_k=1, limit=1, seed=0)
    if is_address(a.student):
        raise ValueError("--student is an endpoint; it must be a local model: its template writes the pairs")
    sampling = Sampling(a.max_new_tokens, a.temperature, top_p=a.top_p)
    variables = check_variables(a.template_kwargs or {}, "--template-kwargs")
    student = LocalModel(a.student, template, a.max_batch, a.device, a.dtype, variables)
    teacher, chat = make_engine("--teacher", a.teacher, a.teacher_model, a, template, variables), student.chat
    note(chat.template.describe_unread())
    is_local = isinstance(teacher, LocalModel)
    if is_local and teacher.chat.template.source != chat.template.source:
        raise ValueError(
            "teacher and student have different chat templates, and a pair keeps responses letter for letter; give one "
            "for both with --chat-template"
        )
    # Different seeds: where teacher and student are one model, they must not draw the same responses.
    return (
        Sampler("teacher", teacher, sampling, a.k, 2 * a.seed, None if is_local else chat),
        Sampler("student", student, sampling, a.student_k or a.k, 2 * a.seed + 1),
        chat,
    )


if __name__ == "__main__":
    main()
