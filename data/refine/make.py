"""Make a folder of refined samples: batches of instructions through the loop and the reconstruction; resume; write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from data.calls.caller import Caller
from data.prepare.claim import CLAIM, as_json, changed_keys, read_claim, write_claim
from data.refine.drafts import History, history_of
from data.refine.loop import Refinement
from data.refine.reconstruct import Reconstruction
from data.refine.report import Report
from nb_lightning.files import atomic_write, write_json
from nb_lightning.rewards.tasks import Task

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
                _write(histories, history.as_json())
                if history.dropped:
                    _write(dropped, {"id": history.task.id, "source": history.task.source, "reason": history.dropped})
                else:
                    _write(samples, sample_of(history, provenance))
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
    answer = {"role": "assistant", **({"reasoning_content": reasoning} if reasoning else {}), "content": content}
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


def claim_folder(folder: Path, claim: Mapping[str, Any], overwrite: bool) -> None:
    """Claim `folder` for this work, or resume the same work in it.

    With `overwrite`, other work is replaced; its calls stay, and those that are asked again are not paid again.

    Raises:
        ValueError: the folder holds something else, or, without `overwrite`, work of another claim.
    """
    claim = as_json(claim)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if names and CLAIM not in names:
        raise ValueError(f"--output {folder} holds something else ({', '.join(names[:3])}); name another folder")
    changed = changed_keys(read_claim(folder), claim)
    if changed and not overwrite:
        raise ValueError(
            f"--output {folder} holds work with other {', '.join(changed)}; name another folder, or replace it with "
            "--overwrite: calls that are the same are not paid again"
        )
    if changed:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    write_claim(folder, claim)


def _write(file: BinaryIO, value: Any) -> None:
    file.write(f"{json.dumps(value, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))
