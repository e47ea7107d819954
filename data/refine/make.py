"""Make a folder of refined samples: batches of instructions through the loop and the reconstruction; resume; write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.calls.caller import Caller
from data.refine.drafts import History, history_of
from data.refine.loop import Refinement
from data.refine.reconstruct import Reconstruction
from data.refine.report import Report
from nb_lightning.files import atomic_write, json_line, write_json
from nb_lightning.rewards.tasks import Task
from nb_lightning.text.messages import assistant_message

SAMPLES, HISTORIES, DROPPED, REPORT = "samples.jsonl", "histories.jsonl", "dropped.jsonl", "report.json"
CALLS = "calls"  # folder of the calls' journal
FILES = (SAMPLES, HISTORIES, DROPPED, REPORT)


def refine_tasks(
    tasks: Sequence[Task],
    refinement: Refinement,
    reconstruction: Reconstruction,
    caller: Caller,
    provenance: Mapping[str, Any],
    folder: Path,
    batch: int,
) -> dict[str, Any]:
    """Refine all tasks, `batch` at a time, and write the files of `folder`; return the report.

    Every reply is in the caller's journal, so a stopped run does the same again without paying, and goes on.

    Args:
        provenance: goes into each sample: the engines, and the digest of all that the work depends on.
    """
    report, caller.kept = Report(), 0
    with ExitStack() as files:
        samples, histories, dropped = (files.enter_context(atomic_write(folder / name)) for name in FILES[:3])
        for start in range(0, len(tasks), batch):
            done = refinement.refine(tasks[start : start + batch])
            reconstruction.reconstruct(done)
            for history in done:
                report.add(history)
                histories.write(json_line(history.as_json()))
                if history.dropped:
                    why = {"id": history.task.id, "source": history.task.source, "reason": history.dropped}
                    dropped.write(json_line(why))
                else:
                    samples.write(json_line(sample_of(history, provenance)))
            caller.kept = report.kept
    content = report.as_json(refinement.asker.unreadable, caller.summary())
    write_json(folder / REPORT, content)
    if not report.kept:
        raise ValueError(f"not one sample of {len(tasks)} tasks: {report.reasons()}; what was tried is in {folder}")
    return content


def sample_of(history: History, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Write a history's sample as a record of `data.prepare --chat`."""
    draft, chain = history.best_draft, history.chains[-1]
    assert draft is not None
    return {
        "id": history.task.id,
        "source": history.task.source,
        **conversation(history.task, chain.reasoning, draft.content),
        "refine": {
            "draft": draft.name,
            "judged_by": "verifier" if draft.status else "critic",
            "scores": draft.scores,
            "total": draft.total,
            "rounds": history.rounds,
            "critiques": sum(len(d.critiques or []) for d in history.drafts),
            "chains": len(history.chains),
            "lexical_anchoring": chain.lexical,
            "probability_anchoring": chain.probability,
            "calls": history.calls,
            "tokens": history.tokens,
            **provenance,
        },
    }


def conversation(task: Task, reasoning: str, content: str) -> dict[str, Any]:
    """Write a task and an answer as a record of `data.prepare --chat`; the answer alone is to be trained on."""
    asked = [{**message, "train": False} if message["role"] == "assistant" else message for message in task.messages]
    answer = assistant_message(content, reasoning)
    return {"messages": [*asked, answer], **({"tools": task.tools} if task.tools else {})}


def digest_of(claim: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a claim: of the tasks, engines, plan, prompts and seed that samples depend on."""
    return hashlib.sha256(json.dumps(claim, sort_keys=True).encode()).hexdigest()


def read_histories(folder: Path) -> Iterator[History]:
    """Read the histories of a finished run.

    Raises:
        ValueError: `folder` holds none.
    """
    path = folder / HISTORIES
    if not path.is_file():
        raise ValueError(f"{folder} has no {HISTORIES}; data.refine writes it when it has gone through all tasks")
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield history_of(json.loads(line))


def describe_other_work(old: Mapping[str, Any], changed: Sequence[str]) -> str:
    """Say what a folder with another claim holds; see `data.prepare.claim.claim_folder`."""
    return (
        f"work with other {', '.join(changed)}; name another folder, or replace it with --overwrite: calls that are "
        "the same are not paid again"
    )
