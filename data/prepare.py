"""Text into tokenized sources: `python -m data.prepare --input PATH... --output FOLDER --tokenizer ...`.

The input is cut into parts (data/records.py). Each part becomes chunks of its own, in a worker process; finished parts
are kept, so a stopped preparation goes on where it was; at the end the chunks move under one index. What comes out
depends on the input and the settings alone, not on the number of workers. A bad record is counted, written to
`dropped.jsonl` with file and line, and left out, or ends the preparation with --on-bad fail.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from litdata.streaming.fs_provider import _get_fs_provider
from tqdm import tqdm

from data.records import Part, Record, cut, lines_before, read
from data.source import CHUNK_TOKENS, MANIFEST, SourceManifest, SourceWriter, merge_parts, write_json
from data.tokenizer import load_tokenizer

SPLITS = ("train", "val")
DROPPED = "dropped.jsonl"
ENCODE_BATCH = 256


@dataclass(frozen=True)
class Settings:
    """What the result depends on besides the input."""

    tokenizer: str
    eos: str | None = None
    field: str = "text"
    val_fraction: float = 0.005  # of the documents, chosen by a hash of their text
    chunk_tokens: int = CHUNK_TOKENS
    on_bad: str = "skip"  # skip | fail


def prepare(
    inputs: list[str],
    output: str,
    settings: Settings,
    workers: int = 1,
    overwrite: bool = False,
    staging: Path | None = None,
    text_suffixes: tuple[str, ...] = (),
    split: str | None = None,
    progress: bool = True,
) -> dict[str, SourceManifest]:
    """Make the source `output` (local or s3://) and return the manifest of each split.

    Raises:
        ValueError: input, settings, output or a worker that does not do, in one line.
    """
    remote = "://" in output
    if remote and staging is None:
        raise ValueError(f"--output {output} is remote: name a local folder for the work in between with --staging")
    final = staging / "finished" if remote else Path(output)
    work = (staging or Path(f"{output}.parts")) / "parts"
    if not overwrite and not remote and (final / "train" / MANIFEST).exists() and not work.exists():
        raise ValueError(f"--output {output} holds a finished source; replace it with --overwrite")
    if not 0 < settings.val_fraction < 1:
        raise ValueError(f"--val-fraction is {settings.val_fraction}; it must lie between 0 and 1")
    load_tokenizer(settings.tokenizer, settings.eos)  # its errors come before any work
    parts = cut(inputs, text_suffixes, split)
    _require_room(work, sum(part.bytes for part in parts))
    if overwrite:
        for folder in (work, final / "train", final / "val"):
            shutil.rmtree(folder, ignore_errors=True)
    _claim(work, parts, settings)
    dropped = _run(parts, work, settings, workers, progress)
    folders = [work / f"{number:06d}" for number in range(len(parts))]
    manifests = {name: merge_parts([folder / name for folder in folders], final / name) for name in SPLITS}
    _write_dropped(final, folders, parts, sum(dropped.values()))
    if remote:
        _upload(final, output)
        shutil.rmtree(final)
    shutil.rmtree(work)
    if not remote and staging is None:
        work.parent.rmdir()
    return manifests


def _run(parts: list[Part], work: Path, settings: Settings, workers: int, progress: bool) -> Counter[str]:
    """Do every part that is not done yet; returns how many records were dropped, by reason."""
    total = sum(part.bytes for part in parts)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not progress)
    dropped: Counter[str] = Counter()
    tokens = 0

    def done(number: int, summary: dict[str, Any]) -> None:
        nonlocal tokens
        dropped.update(summary["dropped"])
        tokens += summary["tokens"]
        bar.set_postfix(tokens=f"{tokens:,}", dropped=sum(dropped.values()), refresh=False)
        bar.update(parts[number].bytes)

    with bar:
        jobs = [(number, part, work / f"{number:06d}", settings) for number, part in enumerate(parts)]
        if workers <= 1:
            for job in jobs:
                done(job[0], do_part(*job))
            return dropped
        # spawn: a forked child of a process whose tokenizer has run its threads can hang.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(do_part, *job): job[0] for job in jobs}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BrokenProcessPool as error:
                raise ValueError(
                    "a worker process died (killed, or out of memory); run the same command again to go on: "
                    "finished parts are kept (fewer --workers need less memory)"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    return dropped


def do_part(number: int, part: Part, folder: Path, settings: Settings) -> dict[str, Any]:
    """Tokenize one part into `folder`, unless it is there already; returns {tokens, documents, dropped}."""
    summary_path = folder / "done.json"
    if summary_path.exists():
        return json.loads(summary_path.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if multiprocessing.parent_process() else "true"
    tokenizer = load_tokenizer(settings.tokenizer, settings.eos)
    writers = {
        name: SourceWriter(
            folder / name,
            SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id),
            settings.chunk_tokens,
        )
        for name in SPLITS
    }
    dropped: Counter[str] = Counter()
    with open(folder / DROPPED, "w", encoding="utf-8") as log:
        good = _good(part, settings, dropped, log)
        while texts := list(islice(good, ENCODE_BATCH)):
            for text, ids in zip(texts, tokenizer.encode(texts)):
                writers["val" if _is_held_out(text, settings.val_fraction) else "train"].add(ids)
    writers["train"].manifest.dropped.update(dropped)
    manifests = [writer.close() for writer in writers.values()]
    summary = {
        "tokens": sum(m.tokens for m in manifests),
        "documents": sum(m.documents for m in manifests),
        "dropped": dict(dropped),
    }
    write_json(summary_path, summary)
    return summary


def _good(part: Part, settings: Settings, dropped: Counter[str], log: Any) -> Iterator[str]:
    for record in read(part, settings.field):
        if record.text is not None:
            yield record.text
        elif settings.on_bad == "fail":
            raise ValueError(f"{record.file}, line {lines_before(part) + record.line}: {record.bad}")
        else:
            dropped[record.bad or ""] += 1
            _log(log, record, record.line)


def _log(log: Any, record: Record, line: int) -> None:
    log.write(json.dumps({"reason": record.bad, "file": record.file, "line": line}, ensure_ascii=False) + "\n")


def _is_held_out(text: str, fraction: float) -> bool:
    """By the text alone: equal texts fall on one side, in whatever order and wherever they come."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _claim(work: Path, parts: list[Part], settings: Settings) -> None:
    """Refuse to mix finished parts of another input or of other settings into this preparation."""
    files = sorted({file for part in parts for file in part.files})
    claim = {
        "settings": {**asdict(settings), "tokenizer": load_tokenizer(settings.tokenizer, settings.eos).digest},
        "parts": [asdict(part) for part in parts],
        "files": {file: [(stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files},
    }
    claim = json.loads(json.dumps(claim))  # as it reads back
    path = work / "claim.json"
    if path.exists() and json.loads(path.read_text()) != claim:
        raise ValueError(
            f"{work} holds an unfinished preparation of other input or settings; finish that one, or start over "
            "with --overwrite"
        )
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, claim)


def _require_room(work: Path, size: int) -> None:
    """Two bytes of tokens for each byte of input is what a byte tokenizer needs, and the most there is."""
    folder = next(parent for parent in (work, *work.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free; this input may need up to {2 * size / 1e9:.1f} GB")


def _write_dropped(final: Path, folders: list[Path], parts: list[Part], count: int) -> None:
    """One `dropped.jsonl` for all parts, with line numbers of the files."""
    if not count:
        return
    with open(final / DROPPED, "w", encoding="utf-8") as out:
        for folder, part in zip(folders, parts):
            entries = [json.loads(line) for line in (folder / DROPPED).read_text(encoding="utf-8").splitlines()]
            before = lines_before(part) if entries else 0
            for entry in entries:
                _log(out, Record(entry["file"], entry["line"], None, entry["reason"]), before + entry["line"])


def _upload(final: Path, output: str) -> None:
    """Everything under `final` to `output`; the manifests last, so that a source is there only when it is whole."""
    provider = _get_fs_provider(output)
    files = sorted((p for p in final.rglob("*") if p.is_file()), key=lambda p: (p.name == MANIFEST, p))
    for path in tqdm(files, desc="uploading", unit="file"):
        provider.upload_file(str(path), f"{output.rstrip('/')}/{path.relative_to(final)}")


def report(output: str, manifests: dict[str, SourceManifest]) -> str:
    lines = [f"{output}:"]
    for name, manifest in manifests.items():
        lines.append(
            f"  {name:<6}{manifest.documents:>14,} documents {manifest.tokens:>18,} tokens "
            f"{len(manifest.chunks):>6} chunks"
        )
    dropped = manifests["train"].dropped
    lines.append(f"  dropped{sum(dropped.values()):>13,} records" + (f" (each in {DROPPED})" if dropped else ""))
    lines += [f"    {count:>8,}  {reason}" for reason, count in sorted(dropped.items())]
    if not manifests["val"].tokens:
        lines.append("  no document was held out: raise --val-fraction to be able to validate on this source")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=".jsonl(.gz|.zst), .parquet, datasets folder, texts")
    add("--output", required=True, help="folder or s3:// prefix of the source; gets train/ and val/")
    add("--tokenizer", required=True, help="'bytes', a tokenizer.json, or a folder that holds one")
    add("--eos", help="token that ends a document (default: the tokenizer's usual one)")
    add("--field", default="text", help="field or column that holds the text (default: %(default)s)")
    add("--val-fraction", type=float, default=0.005, help="share of documents held out (default: %(default)s)")
    add("--text-suffix", nargs="*", default=[], metavar=".py", help="further suffixes read as one document a file")
    add("--split", help="split of a datasets folder that has several")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--on-bad", choices=("skip", "fail"), default="skip", help="what a bad record does (default: %(default)s)")
    add("--chunk-tokens", type=int, default=CHUNK_TOKENS, help="tokens in a chunk (default: %(default)s)")
    add("--staging", type=Path, help="local folder for the work in between; needed for s3://")
    add("--overwrite", action="store_true", help="replace a finished source or an unfinished preparation")
    a = parser.parse_args(arguments)
    settings = Settings(a.tokenizer, a.eos, a.field, a.val_fraction, a.chunk_tokens, a.on_bad)
    try:
        made = prepare(a.input, a.output, settings, a.workers, a.overwrite, a.staging, tuple(a.text_suffix), a.split)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report(a.output, made))


if __name__ == "__main__":
    main()
