"""Make SFT data by deliberative refinement and chain-of-thought reconstruction.

`python -m data.refine --tasks tasks.jsonl --teacher MODEL --student RUN --output FOLDER` (docs/refine.md) writes

    FOLDER/claim.json        what the work is for: tasks, engines, plan, prompts and seed
           calls/            every reply of a model, written as it comes: after a stop, the same command resumes
           samples.jsonl     input of data.prepare --chat
           histories.jsonl   every draft, score, critique and chain of every task
           dropped.jsonl     the tasks without a sample, and why
           report.json       what was kept, and what it cost

`python -m data.refine --output FOLDER --show ID` prints one task's history; `--page FILE.html` writes a page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.calls.caller import Caller
from data.calls.engine import Engine
from data.calls.flags import add_call_flags, budget_of, check_call_flags, is_address, make_engine
from data.prepare.claim import as_json, claim_folder
from data.prepare.source_writer import locked
from data.refine.anchoring import AnchoringModel
from data.refine.asking import Asker
from data.refine.loop import Refinement
from data.refine.make import CALLS, FILES, SAMPLES, describe_other_work, digest_of, refine_tasks
from data.refine.plan import NO_VERIFIER, read_plan, shipped_plans
from data.refine.prompts import read_prompts
from data.refine.reconstruct import Reconstruction
from data.refine.report import format_report
from data.refine.show import show, write_page
from data.refine.tournament import tournament_of
from data.refine.work import Engines
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.errors import one_line_errors, require_at_least
from nb_lightning.files import sha256_of
from nb_lightning.rewards.registry import get_verifiers
from nb_lightning.rewards.tasks import read_task_files

DESCRIPTION = "Make SFT data by deliberative refinement and chain-of-thought reconstruction."
VERSION = 1  # of the claim: raised when the same settings lead to other samples
MODEL = "run, checkpoint, Hugging Face folder, .gguf file, or the address of an endpoint"


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_intermixed_args(arguments)
    with one_line_errors(interrupted="run the same command again to go on"):
        if a.show or a.page:
            if a.show:
                show(a.output, a.show)
            if a.page:
                write_page(a.output, a.page)
                print(a.page)
            return
        print(format_report(run(a), str(a.output / SAMPLES)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.refine", description=DESCRIPTION)
    p.add_argument("--tasks", nargs="+", default=[], metavar="FILE", help="tasks, .jsonl; their verifiers judge the "
                   "answers")  # fmt: skip
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    p.add_argument("--overwrite", action="store_true", help="replace work of other settings in the folder")
    p.add_argument("--plan", default="default", metavar="NAME", help=f"of conf/refine ({', '.join(shipped_plans())}), "
                   "or the path of a .yaml file (default: %(default)s)")  # fmt: skip
    p.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the plan, such as rounds=2")
    p.add_argument("--limit", type=int, metavar="N", help="use only the first N tasks of each file")
    p.add_argument(
        "--batch", type=int, default=512, metavar="N", help="tasks in memory at a time (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("models")
    g.add_argument("--teacher", action="append", default=[], metavar="MODEL", help=f"answers the tasks: {MODEL}; "
                   "may be given several times")  # fmt: skip
    g.add_argument("--student", metavar="MODEL", help="answers them too: the model that is to be trained")
    g.add_argument("--critic", metavar="MODEL", help="writes checklists, scores, critiques (default: the teacher)")
    g.add_argument("--writer", metavar="MODEL", help="writes revisions and chains (default: the critic)")
    g.add_argument("--teacher-model", action="append", default=[], metavar="NAME", help="what the teacher's endpoint "
                   "calls it; as often as --teacher is an endpoint")  # fmt: skip
    for role in ("student", "critic", "writer"):
        g.add_argument(f"--{role}-model", metavar="NAME", help=f"what the {role}'s endpoint calls it")
    g.add_argument("--anchoring-model", metavar="MODEL", help="measures how likely a chain is with and without the "
                   "answer in sight: a local model, such as the writer (default: not measured)")  # fmt: skip
    add_call_flags(p)
    g = p.add_argument_group("look at a finished folder")
    g.add_argument("--show", metavar="ID", help="print the history of a task")
    g.add_argument("--page", type=Path, metavar="FILE.html", help="write a page of samples")
    return p


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Refine the tasks; return the report.

    Raises:
        ValueError: the arguments cannot be used, a limit of the calls is reached, or no task gives a sample.
    """
    check_call_flags(a)
    require_at_least(a, batch=1, limit=1)
    if a.output.exists() and not a.output.is_dir():
        raise ValueError(f"--output {a.output} is no folder")
    plan = read_plan(a.plan, a.overrides)
    prompts = read_prompts(plan.language, plan.prompts, plan.critiques)
    budget = budget_of(a)
    if not a.tasks:
        raise ValueError("--tasks is missing: name one or several .jsonl files of tasks (docs/rewards.md)")
    tasks = read_task_files(a.tasks, a.limit)
    plan.check_tasks(tasks)
    verifiers = get_verifiers(task for task in tasks if task.verifier != NO_VERIFIER)
    engines = _engines(a)
    anchoring = AnchoringModel(a.anchoring_model, a.device, a.dtype) if a.anchoring_model else None
    about: dict[str, Any] = {name: engine.about() for name, engine in engines.candidates.items()}
    about |= {"critic": engines.critic.about(), "writer": engines.writer.about()}
    if a.anchoring_model:
        about["anchoring_model"] = find_origin(a.anchoring_model).digest()
    if plan.tournament:
        about["tournament"] = find_origin(plan.tournament).digest()
    files = [(Path(path).name, sha256_of(Path(path))) for path in a.tasks]
    claim = {"tasks": files, "limit": a.limit, "engines": about, "plan": plan.as_json(), "prompts": prompts.digests,
             "seed": a.seed, "version": VERSION}  # fmt: skip
    a.output.mkdir(parents=True, exist_ok=True)
    with locked(a.output, wait=False):
        claim_folder(a.output, as_json(claim), FILES, a.overwrite, describe_other_work)
        (a.output / CALLS).mkdir(exist_ok=True)
        caller = Caller(a.output / CALLS, budget, a.max_failed)
        asker = Asker(caller, a.seed)
        tournament = tournament_of(plan.tournament, a.device, a.dtype) if plan.tournament else None
        refinement = Refinement(plan, prompts, engines, asker, verifiers, tournament)
        reconstruction = Reconstruction(plan, prompts, engines, asker, verifiers, anchoring)
        provenance = {"engines": about, "plan": a.plan, "seed": a.seed, "claim": digest_of(claim)}
        return refine_tasks(tasks, refinement, reconstruction, caller, provenance, a.output, a.batch)


def _engines(a: argparse.Namespace) -> Engines:
    """Make each engine once: roles of one model share it."""
    made: dict[tuple[str, str | None], Engine] = {}

    def engine(flag: str, text: str, model: str | None) -> Engine:
        return made.setdefault((text, model), make_engine(flag, text, model, a))

    names = iter(a.teacher_model)
    candidates = {
        "teacher" if number == 1 else f"teacher_{number}": engine(
            "--teacher", text, next(names, None) if is_address(text) else None
        )
        for number, text in enumerate(a.teacher, 1)
    }
    if (unused := next(names, None)) is not None:
        raise ValueError(f"--teacher-model {unused} belongs to no --teacher that is an endpoint")
    for role in ("student", "critic", "writer"):
        if getattr(a, f"{role}_model") and not is_address(getattr(a, role) or ""):
            raise ValueError(f"--{role}-model names a model of an endpoint; --{role} is none")
    if a.student:
        candidates["student"] = engine("--student", a.student, a.student_model)
    if not candidates:
        raise ValueError("nobody answers the tasks: give --teacher, --student or both")
    critic = engine("--critic", a.critic, a.critic_model) if a.critic else next(iter(candidates.values()))
    writer = engine("--writer", a.writer, a.writer_model) if a.writer else critic
    return Engines(candidates, critic, writer)


if __name__ == "__main__":
    main()
