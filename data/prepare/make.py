"""Prepare a tokenized source: cut the input, tokenize the parts in workers, merge them, upload the source.

A finished part stays in the staging folder, so a stopped preparation resumes. The result depends on the input and the
settings alone, not on the number of workers. A form (data/prepare/forms.py) turns records into token sequences. A bad
record is counted, logged in `dropped.jsonl` and left out; with --on-bad fail it ends the preparation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from data.prepare import source_writer
from data.prepare.dropped import DROPPED, first_dropped, merge_dropped
from data.prepare.forms import form_of
from data.prepare.parts import Part, cut_inputs
from data.prepare.report import Prepared
from data.prepare.settings import SourceSettings
from data.prepare.staging import Staging, new_claim
from data.prepare.workers import Job, tokenize_parts
from nb_lightning.token_source import PAGE, SPLITS


def prepare(
    inputs: Iterable[str | Path],
    output: str,
    settings: SourceSettings,
    *,
    workers: int = 1,
    on_bad: str = "skip",
    overwrite: bool = False,
    staging: Path | None = None,
    val_inputs: Iterable[str | Path] = (),
    text_suffixes: Iterable[str] = (),
    hf_split: str | None = None,
    progress: bool = True,
) -> Prepared:
    """Prepare the source `output`. With `workers` > 1 the caller's module must be importable (spawn).

    Args:
        inputs: files and folders.
        output: local folder or s3:// prefix.
        workers: processes that tokenize.
        on_bad: "skip" or "fail": what a bad record does.
        overwrite: replace a finished source, or unfinished work of other settings.
        staging: folder for the work (default: beside a local output, else in the temporary folder).
        val_inputs: all that is held out; nothing of `inputs` is then.
        text_suffixes: suffixes of further files that are one document each.
        hf_split: split of a datasets folder that has several.

    Raises:
        BadRecord: the first bad record of the input, with `on_bad="fail"`.
        ValueError: input, settings or output cannot be used, or a worker died; one line.
    """
    inputs, val_inputs = [str(path) for path in inputs], [str(path) for path in val_inputs]
    if val_inputs:
        settings = replace(settings, val_fraction=0.0)
    place = Staging(output.rstrip("/"), staging)
    _require_valid_settings(settings, workers, holds_out_by_fraction=not val_inputs)
    _require_no_output_inside([*inputs, *val_inputs], place)
    parts, ignored = _cut(inputs, val_inputs, None if settings.chat else text_suffixes, hf_split)
    source_writer.require_source_or_nothing(place.source)
    jobs = [Job(part, place.part_folder(number), settings, on_bad) for number, part in enumerate(parts)]
    with source_writer.locked(place.folder, wait=False):
        place.take(new_claim(parts, settings, place.output), overwrite)
        place.require_room([job.part for job in jobs if not job.is_done], settings)
        tokenize_parts(jobs, workers, progress)
        _require_tokens(jobs, place, inputs)
        prepared = _merge(jobs, place, ignored)
        if place.is_remote:
            source_writer.upload_source(place.source, place.output, progress)
        place.clean_up()
    return prepared


def _require_valid_settings(settings: SourceSettings, workers: int, holds_out_by_fraction: bool) -> None:
    if holds_out_by_fraction and not 0 <= settings.val_fraction < 1:
        raise ValueError(f"--val-fraction is {settings.val_fraction}; it must lie between 0 and 1")
    for name, value, least in (("chunk-tokens", settings.chunk_tokens, PAGE), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    form_of(settings)  # raises the errors of tokenizer and template before any work


def _require_no_output_inside(inputs: list[str], place: Staging) -> None:
    """Refuse input folders that contain the output or the staging folder."""
    for name in inputs:
        for folder in (place.source.resolve(), place.folder.resolve()):
            if Path(name).resolve() in (folder, *folder.parents):
                raise ValueError(f"--input {name} contains {folder}, where output goes; choose a folder outside it")


def _cut(
    inputs: list[str], val_inputs: list[str], text_suffixes: Iterable[str] | None, hf_split: str | None
) -> tuple[list[Part], Counter[str]]:
    """Cut `inputs`, then `val_inputs`, into parts; return them with the counts of files that are not read."""
    parts, ignored = cut_inputs(inputs, text_suffixes, hf_split)
    if not val_inputs:
        return parts, ignored
    val_parts, val_ignored = cut_inputs(val_inputs, text_suffixes, hf_split)
    both = {file for part in parts for file in part.files} & {file for part in val_parts for file in part.files}
    if both:
        raise ValueError(f"{min(both)} is in both --input and --val-input")
    return [*parts, *(replace(part, held_out=True) for part in val_parts)], ignored + val_ignored


def _require_tokens(jobs: list[Job], place: Staging, inputs: list[str]) -> None:
    """Remove the work and raise `ValueError` if the parts hold no record, or no good one."""
    summaries = [job.read_summary() for job in jobs]
    lines = sum(summary["lines"] for summary in summaries)
    if not lines:
        place.clean_up()
        raise ValueError(f"--input {', '.join(inputs)}: there is no record in it")
    if not any(summary["tokens"] for summary in summaries):  # a wrong --field, most likely
        first = next((origin for job in jobs if (origin := first_dropped(job.part, job.folder / DROPPED))), None)
        reasons = sorted({reason for summary in summaries for reason in summary["dropped"]})
        place.clean_up()
        raise ValueError(
            f"none of the {lines} records of the input can be used: {', '.join(reasons)}; the first: {first}"
        )


def _merge(jobs: list[Job], place: Staging, ignored: Counter[str]) -> Prepared:
    """Move the parts' chunks into `place.source`; an interrupted merge may be repeated."""
    source = place.source
    if not place.is_merging:  # else the source there is a part of this work
        source_writer.remove_source(source)
        (source / DROPPED).unlink(missing_ok=True)
        place.begin_merging()
    source.mkdir(parents=True, exist_ok=True)
    logs = [(job.folder / DROPPED, job.part, job.read_summary()["lines"]) for job in jobs]
    origins = merge_dropped(logs, source / DROPPED)
    manifests = {
        split: source_writer.merge_parts([job.folder / split for job in jobs], source / split) for split in SPLITS
    }
    return Prepared(place.output, manifests, origins, dict(ignored))
