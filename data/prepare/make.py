"""Turn text, conversations and pairs into tokenized sources: cut, tokenize in workers, merge.

The input is cut into parts (data/prepare/records.py). A worker process turns each part into chunks of its own.
Finished parts are kept, so a stopped preparation resumes. At the end the chunks move under one index. The result
depends on the input and the settings alone, not on the number of workers. A form turns records into samples:
`Documents` (data/prepare/documents.py), `Chats` (data/prepare/chats.py, --chat) or `Pairs` (data/prepare/pairs.py,
--pairs). A bad record is counted, written to `dropped.jsonl` with file and line, and left out; with --on-bad fail it
ends the preparation.

    <staging>/claim.json        what the work is for, and how far it is
    <staging>/parts/<number>/   a finished part: train/, val/, dropped.jsonl, done.json
    <staging>/parts/whole/      the source, until it is uploaded (remote outputs only)
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.prepare import source_writer
from data.prepare.chats import Chats
from data.prepare.documents import Documents
from data.prepare.pairs import Pairs
from data.prepare.records import Part, Record, cut, lines_before, log_dropped, merge_dropped
from data.prepare.settings import SourceSettings
from data.prepare.staging import CLAIM, clean_up, new_claim, require_room, take_up
from nb_lightning.files import read_json, write_json
from nb_lightning.token_source import PAGE, SPLITS, SourceManifest

DONE, DROPPED = "done.json", "dropped.jsonl"
GO_ON = "run the same command again to go on: finished parts are kept"


@dataclass
class Prepared:
    """What was made, and what was left out."""

    output: str
    manifests: dict[str, SourceManifest]  # of each split; records left out are counted in train's
    origins: dict[str, list[str]]  # reason -> the first few file:line
    ignored: dict[str, int]  # suffix -> files in input folders that were not read

    def __str__(self) -> str:
        lines = [self.output]
        for name, m in self.manifests.items():
            number, kind = (m.documents // 2, "pairs") if m.pairs else (m.documents, "samples")
            kind = f"{kind}{m.trained:>20,} trained of" if m.is_chat else "documents"
            lines.append(f"  {name:<8}{number:>14,} {kind}{m.tokens:>20,} tokens{len(m.chunks):>8,} chunks")
        dropped = self.manifests["train"].dropped
        lines.append(f"  dropped {sum(dropped.values()):>14,} records" + (f", each in {DROPPED}" if dropped else ""))
        for reason, count in sorted(dropped.items()):
            shown = self.origins[reason]
            lines.append(f"{count:>24,} {reason}: {', '.join(shown)}{', ...' if count > len(shown) else ''}")
        if self.ignored:
            kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(self.ignored.items()))
            lines.append(f"  not read{sum(self.ignored.values()):>14,} files of other kinds: {kinds}")
        if not self.manifests["val"].tokens:
            lines.append("  nothing was held out: raise --val-fraction to be able to validate on this source")
        return "\n".join(lines)


class BadRecord(ValueError):
    """What --on-bad fail ends with."""


def prepare(
    inputs: Iterable[str],
    output: str,
    settings: SourceSettings,
    *,
    workers: int = 1,
    on_bad: str = "skip",
    overwrite: bool = False,
    staging: Path | None = None,
    val_inputs: Iterable[str] = (),
    text_suffixes: Iterable[str] = (),
    hf_split: str | None = None,
    progress: bool = True,
) -> Prepared:
    """Make the source `output` (local or s3://). With `workers` > 1 the caller's module must be importable (spawn).

    Args:
        val_inputs: all that is held out; of `inputs` then nothing is.

    Raises:
        BadRecord: the first bad record of the input, with `on_bad="fail"`.
        ValueError: input, settings, output or a worker that does not do, in one line.
    """
    inputs, val_inputs, output = [str(p) for p in inputs], [str(p) for p in val_inputs], output.rstrip("/")
    if val_inputs:
        settings = replace(settings, val_fraction=0.0)
    elif not 0 < settings.val_fraction < 1:
        raise ValueError(f"--val-fraction is {settings.val_fraction}; it must lie between 0 and 1")
    for name, value, least in (("chunk-tokens", settings.chunk_tokens, PAGE), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    _form(settings)  # a tokenizer's errors come before any work
    remote = "://" in output
    if staging is None:  # a place that the same command finds again
        address = f"nb_lightning-{os.getuid()}-{hashlib.sha256(output.encode()).hexdigest()[:12]}"
        staging = Path(tempfile.gettempdir(), address) if remote else Path(f"{Path(output)}.parts")
    work = staging / "parts"
    final = work / "whole" if remote else Path(output)
    for given in (*inputs, *val_inputs):
        for place in (final.resolve(), staging.resolve()):
            if Path(given).resolve() in (place, *place.parents):
                raise ValueError(f"--input {given} contains {place}, where output goes; choose a folder outside it")
    suffixes = None if settings.chat else text_suffixes
    parts, ignored = cut(inputs, suffixes, hf_split)
    if val_inputs:
        held_out, ignored_too = cut(val_inputs, suffixes, hf_split)
        _require_apart(parts, held_out)
        parts, ignored = [*parts, *(replace(part, held_out=True) for part in held_out)], ignored + ignored_too
    source_writer.require_source_or_nothing(final)
    folders = [work / f"{number:06d}" for number in range(len(parts))]
    with source_writer.locked(staging, wait=False):
        claim = take_up(staging, new_claim(parts, settings, output), output, overwrite)
        require_room(staging, [p for p, folder in zip(parts, folders) if not (folder / DONE).exists()], settings)
        _run(parts, folders, settings, workers, on_bad, progress)
        summaries = [read_json(folder / DONE) for folder in folders]
        lines = [summary["lines"] for summary in summaries]
        if not any(lines):
            clean_up(staging, claim)
            raise ValueError(f"--input {', '.join(inputs)}: there is no record in it")
        if not any(summary["tokens"] for summary in summaries):  # a wrong --field, most likely
            first = next((r for p, f in zip(parts, folders) if (r := _first_dropped(p, f))), None)
            reasons = sorted({reason for summary in summaries for reason in summary["dropped"]})
            clean_up(staging, claim)
            raise ValueError(
                f"none of the {sum(lines)} records of the input can be used: {', '.join(reasons)}; the first: {first}"
            )
        if claim["state"] != "merging":  # else what is there is ours already
            source_writer.remove_source(final)
            (final / DROPPED).unlink(missing_ok=True)
            write_json(staging / CLAIM, {**claim, "state": "merging"})
        final.mkdir(parents=True, exist_ok=True)
        origins = merge_dropped(zip([folder / DROPPED for folder in folders], parts, lines), final / DROPPED)
        made = {name: source_writer.merge_parts([folder / name for folder in folders], final / name) for name in SPLITS}
        if remote:
            source_writer.upload_source(final, output, progress)
        clean_up(staging, claim)
    return Prepared(output, made, origins, dict(ignored))


def _run(
    parts: list[Part], folders: list[Path], settings: SourceSettings, workers: int, on_bad: str, progress: bool
) -> None:
    """Do every part that is not done yet."""
    total: Counter[str] = Counter()
    jobs = [(part, folder, settings, on_bad) for part, folder in zip(parts, folders)]
    kept = {number for number, folder in enumerate(folders) if folder.exists()}
    bar = tqdm(total=sum(p.bytes for p in parts), unit="B", unit_scale=True, desc="tokenizing", disable=not progress)

    def done(number: int, summary: dict[str, Any]) -> None:
        total.update(tokens=summary["tokens"], dropped=sum(summary["dropped"].values()))
        total["new"] += 0 if number in kept else summary["tokens"]
        speed = total["new"] / (bar.format_dict["elapsed"] or 1)
        bar.set_postfix_str(f"{total['tokens']:,} tokens, {speed:,.0f}/s, {total['dropped']:,} dropped", refresh=False)
        bar.update(parts[number].bytes)

    with bar:
        if workers == 1:
            for number, job in enumerate(jobs):
                done(number, do_part(*job))
            return
        # spawn: a forked child of a process whose tokenizer has run its threads can hang.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(parts)), spawn, _start_worker) as pool:
            futures = {pool.submit(do_part, *job): number for number, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BrokenProcessPool as error:
                raise ValueError(f"a worker died (killed, or out of memory: --workers); {GO_ON}") from error
            except (ValueError, OSError):
                pool.shutdown(cancel_futures=True)
                # Parts begin in order, so this is the first of the input's errors, whatever the number of workers.
                raise next(e for f in futures if not f.cancelled() and (e := f.exception())) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback from each worker
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A killed parent would leave this process waiting for work for ever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def do_part(part: Part, folder: Path, settings: SourceSettings, on_bad: str) -> dict[str, Any]:
    """Tokenize one part into `folder`, unless it is there already; returns {tokens, lines, dropped}."""
    if (folder / DONE).exists():
        summary = read_json(folder / DONE)
        if summary["dropped"] and on_bad == "fail":
            raise BadRecord(_first_dropped(part, folder))
        return summary
    # Only a finished part gets its name, and two processes never write into one folder.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    form = _form(settings)
    train, val = (form.writer(unfinished / split) for split in SPLITS)
    dropped: Counter[str] = Counter()
    lines = 0

    def good() -> Iterator[Any]:
        nonlocal lines
        for record in form.read(part):
            lines += 1
            if record.bad is None:
                yield record.value
            elif on_bad == "fail":
                raise BadRecord(_place(part, record))
            else:
                dropped[record.bad] += 1
                log_dropped(log, record)

    with open(unfinished / DROPPED, "w", encoding="utf-8", errors="backslashreplace") as log:
        for held_out, items in form.encode(good()):
            for words in items:
                (val if held_out or part.held_out else train).add(words)
    train.manifest.dropped.update(dropped)
    tokens = sum(writer.close().tokens for writer in (train, val))
    summary = {"tokens": tokens, "lines": lines, "dropped": dict(dropped)}
    write_json(unfinished / DONE, summary)
    unfinished.rename(folder)
    return summary


def _form(settings: SourceSettings) -> Documents | Chats:
    if settings.pairs:
        return Pairs(settings)
    return Chats(settings) if settings.chat else Documents(settings)


def _require_apart(train: list[Part], held_out: list[Part]) -> None:
    both = {file for part in train for file in part.files} & {file for part in held_out for file in part.files}
    if both:
        raise ValueError(f"{min(both)} is in both --input and --val-input")


def _place(part: Part, record: Record) -> str:
    return f"{record.file}:{lines_before(part) + record.line}: {record.detail or record.bad}"


def _first_dropped(part: Part, folder: Path) -> str | None:
    """The first bad record of a finished part, by file and line."""
    with open(folder / DROPPED, encoding="utf-8") as log:
        entry = json.loads(log.readline() or "null")
    if entry is None:
        return None
    return _place(part, Record(entry["file"], entry["line"], None, entry["reason"], entry.get("detail")))
