"""Tokenize the parts of the input, each into a folder, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.prepare.dropped import DROPPED, describe_bad, first_dropped, log_dropped
from data.prepare.forms import form_of
from data.prepare.parts import Part
from data.prepare.settings import SourceSettings
from nb_lightning.files import read_json, write_json
from nb_lightning.token_source import SPLITS

DONE = "done.json"
GO_ON = "run the same command again to go on: finished parts are kept"


class BadRecord(ValueError):
    """The first bad record of the input; raised with --on-bad fail."""


@dataclass(frozen=True)
class Job:
    """One part to tokenize; sent to a worker process.

    Attributes:
        folder: gets train/, val/, dropped.jsonl and done.json; it exists once the part is finished.
        on_bad: "skip" or "fail": what a bad record does.
    """

    part: Part
    folder: Path
    settings: SourceSettings
    on_bad: str

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).exists()

    def read_summary(self) -> dict[str, Any]:
        """Read {tokens, lines, dropped} of a finished part."""
        return read_json(self.folder / DONE)


def tokenize_parts(jobs: list[Job], workers: int, progress: bool) -> None:
    """Tokenize every part that is not finished yet.

    Raises:
        BadRecord: see `Job.on_bad`.
        ValueError: a file cannot be read to its end, or a worker died.
    """
    bar = _Progress(jobs, progress)
    with bar.bar:
        if workers == 1:
            for number, job in enumerate(jobs):
                bar.update(number, tokenize_part(job))
            return
        # spawn: a forked child of a process whose tokenizer has run its threads can hang.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), spawn, _start_worker) as pool:
            futures = {pool.submit(tokenize_part, job): number for number, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    bar.update(futures[future], future.result())
            except BrokenProcessPool as error:
                raise ValueError(f"a worker died (killed, or out of memory: --workers); {GO_ON}") from error
            except (ValueError, OSError):
                pool.shutdown(cancel_futures=True)
                # Parts begin in order, so this is the first of the input's errors, whatever the number of workers.
                errors = (error for future in futures if not future.cancelled() and (error := future.exception()))
                raise next(errors) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def tokenize_part(job: Job) -> dict[str, Any]:
    """Tokenize one part, unless it is finished already; return {tokens, lines, dropped}."""
    part = job.part
    if job.is_done:
        summary = job.read_summary()
        if summary["dropped"] and job.on_bad == "fail":
            raise BadRecord(first_dropped(part, job.folder / DROPPED))
        return summary
    # Only a finished part gets its name, and two processes never write into one folder.
    unfinished = job.folder.with_name(f"{job.folder.name}.{os.getpid()}")
    form = form_of(job.settings)
    train, val = (form.open_writer(unfinished / split) for split in SPLITS)
    dropped: Counter[str] = Counter()
    lines = 0

    def good_values() -> Iterator[Any]:
        nonlocal lines
        for record in form.read(part):
            lines += 1
            if record.bad is None:
                yield record.value
            elif job.on_bad == "fail":
                raise BadRecord(describe_bad(part, record))
            else:
                dropped[record.bad] += 1
                log_dropped(log, record)

    with open(unfinished / DROPPED, "w", encoding="utf-8", errors="backslashreplace") as log:
        for is_held_out, sequences in form.encode(good_values()):
            for tokens in sequences:
                (val if is_held_out or part.held_out else train).add(tokens)
    train.manifest.dropped.update(dropped)
    train.manifest.spelled = form.spelled
    total = sum(writer.close().tokens for writer in (train, val))
    summary = {"tokens": total, "lines": lines, "dropped": dict(dropped)}
    write_json(unfinished / DONE, summary)
    unfinished.rename(job.folder)
    return summary


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback from each worker
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Without this thread, a worker whose parent was killed would wait for work for ever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _Progress:
    """A bar over the bytes of the input. Its speed leaves out parts that an earlier run finished."""

    def __init__(self, jobs: list[Job], visible: bool) -> None:
        self.jobs = jobs
        self.finished_before = {number for number, job in enumerate(jobs) if job.folder.exists()}
        self.tokens = self.new_tokens = self.dropped = 0
        total = sum(job.part.bytes for job in jobs)
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not visible)

    def update(self, number: int, summary: dict[str, Any]) -> None:
        """Add the summary of a finished part."""
        self.tokens += summary["tokens"]
        self.new_tokens += 0 if number in self.finished_before else summary["tokens"]
        self.dropped += sum(summary["dropped"].values())
        speed = self.new_tokens / (self.bar.format_dict["elapsed"] or 1)
        text = f"{self.tokens:,} tokens, {speed:,.0f}/s, {self.dropped:,} dropped"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.jobs[number].part.bytes)
