"""Text into tokenized sources: `python -m data.prepare --input PATH... --output FOLDER --tokenizer ...`.

The input is cut into parts (data/records.py). Each part becomes chunks of its own, in a worker process; finished parts
are kept, so a stopped preparation goes on where it was; at the end the chunks move under one index. What comes out
depends on the input and the settings alone, not on the number of workers. A bad record is counted, written to
`dropped.jsonl` with file and line, and left out, or ends the preparation with --on-bad fail.

    <staging>/claim.json        what the work is for, and how far it is
    <staging>/parts/<number>/   a finished part: train/, val/, dropped.jsonl, done.json
    <staging>/parts/whole/      the source, until it is uploaded (remote outputs only)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import source
from data.records import ARCHIVES, Part, cut, lines_before, log_dropped, merge_dropped, read
from data.source import CHUNK_TOKENS, SourceWriter
from nb_lightning.source import PAGE, SPLITS, SourceManifest, write_json
from nb_lightning.tokenizer import load_tokenizer

CLAIM, DONE, DROPPED = "claim.json", "done.json", "dropped.jsonl"
ENCODE_CHARACTERS = 2**20
_GO_ON = "run the same command again to go on: finished parts are kept"


@dataclass(frozen=True)
class Settings:
    """What the result depends on besides the input."""

    tokenizer: str = "bytes"
    eos: str | None = None
    field: str = "text"
    val_fraction: float = 0.005  # of the documents, chosen by a hash of their text
    seed: int = 0  # another seed holds out other documents
    chunk_tokens: int = CHUNK_TOKENS


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
            lines.append(f"  {name:<8}{m.documents:>14,} documents{m.tokens:>20,} tokens{len(m.chunks):>8,} chunks")
        dropped = self.manifests["train"].dropped
        lines.append(f"  dropped {sum(dropped.values()):>14,} records" + (f", each in {DROPPED}" if dropped else ""))
        for reason, count in sorted(dropped.items()):
            shown = self.origins[reason]
            lines.append(f"{count:>24,} {reason}: {', '.join(shown)}{', ...' if count > len(shown) else ''}")
        if self.ignored:
            kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(self.ignored.items()))
            lines.append(f"  not read{sum(self.ignored.values()):>14,} files of other kinds: {kinds}")
        if not self.manifests["val"].tokens:
            lines.append("  no document was held out: raise --val-fraction to be able to validate on this source")
        return "\n".join(lines)


class BadRecord(ValueError):
    """What --on-bad fail ends with."""


def prepare(
    inputs: Iterable[str],
    output: str,
    settings: Settings,
    *,
    workers: int = 1,
    on_bad: str = "skip",
    overwrite: bool = False,
    staging: Path | None = None,
    text_suffixes: Iterable[str] = (),
    hf_split: str | None = None,
    progress: bool = True,
) -> Prepared:
    """Make the source `output` (local or s3://). With `workers` > 1 the caller's module must be importable (spawn).

    Raises:
        BadRecord: the first bad record of the input, with `on_bad="fail"`.
        ValueError: input, settings, output or a worker that does not do, in one line.
    """
    if not 0 < settings.val_fraction < 1:
        raise ValueError(f"--val-fraction is {settings.val_fraction}; it must lie between 0 and 1")
    for name, value, least in (("chunk-tokens", settings.chunk_tokens, PAGE), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    load_tokenizer(settings.tokenizer, settings.eos)  # its errors come before any work
    inputs, output = [str(path) for path in inputs], output.rstrip("/")
    remote = "://" in output
    if staging is None:  # a place that the same command finds again
        address = f"nb_lightning-{os.getuid()}-{hashlib.sha256(output.encode()).hexdigest()[:12]}"
        staging = Path(tempfile.gettempdir(), address) if remote else Path(f"{Path(output)}.parts")
    work = staging / "parts"
    final = work / "whole" if remote else Path(output)
    for given in inputs:
        for place in (final.resolve(), staging.resolve()):
            if Path(given).resolve() in (place, *place.parents):
                raise ValueError(f"--input {given} contains {place}, where output goes; choose a folder outside it")
    parts, ignored = cut(inputs, text_suffixes, hf_split)
    source.require_source_or_nothing(final)
    folders = [work / f"{number:06d}" for number in range(len(parts))]
    with source.locked(staging, wait=False):
        claim = _take_up(staging, _claim(parts, settings, output), output, overwrite)
        _require_room(staging, [p for p, folder in zip(parts, folders) if not (folder / DONE).exists()], settings)
        _run(parts, folders, settings, workers, on_bad, progress)
        summaries = [json.loads((folder / DONE).read_text()) for folder in folders]
        lines = [summary["lines"] for summary in summaries]
        if not any(summary["tokens"] for summary in summaries):  # a wrong --field, most likely
            _clean_up(staging, claim)
            reasons = sorted({reason for summary in summaries for reason in summary["dropped"]})
            raise ValueError(f"none of the {sum(lines)} records of the input is a document: {', '.join(reasons)}")
        if claim["state"] != "merging":  # else what is there is ours already
            source.remove_source(final)
            (final / DROPPED).unlink(missing_ok=True)
            write_json(staging / CLAIM, {**claim, "state": "merging"})
        final.mkdir(parents=True, exist_ok=True)
        origins = merge_dropped(zip([folder / DROPPED for folder in folders], parts, lines), final / DROPPED)
        made = {name: source.merge_parts([folder / name for folder in folders], final / name) for name in SPLITS}
        if remote:
            source.upload_source(final, output, progress)
        _clean_up(staging, claim)
    return Prepared(output, made, origins, dict(ignored))


def _run(parts: list[Part], folders: list[Path], settings: Settings, workers: int, on_bad: str, progress: bool) -> None:
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
                raise ValueError(f"a worker died (killed, or out of memory: --workers); {_GO_ON}") from error
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


def do_part(part: Part, folder: Path, settings: Settings, on_bad: str) -> dict[str, Any]:
    """Tokenize one part into `folder`, unless it is there already; returns {tokens, lines, dropped}."""
    if (folder / DONE).exists():
        summary = json.loads((folder / DONE).read_text())
        if summary["dropped"] and on_bad == "fail":
            with open(folder / DROPPED, encoding="utf-8") as log:
                raise _bad_record(part, **json.loads(log.readline()))
        return summary
    # Only a finished part gets its name, and two processes never write into one folder.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    tokenizer = load_tokenizer(settings.tokenizer, settings.eos)
    manifests = [SourceManifest(tokenizer.digest, tokenizer.vocab_size, tokenizer.eos_id) for _ in SPLITS]
    train, val = (SourceWriter(unfinished / s, m, settings.chunk_tokens) for s, m in zip(SPLITS, manifests))
    dropped: Counter[str] = Counter()
    lines = 0

    def good() -> Iterator[str]:
        nonlocal lines
        for record in read(part, settings.field):
            lines += 1
            if record.text is not None:
                yield record.text
            elif on_bad == "fail":
                raise _bad_record(part, record.file, record.line, record.bad)
            else:
                dropped[record.bad or ""] += 1
                log_dropped(log, record)

    with open(unfinished / DROPPED, "w", encoding="utf-8", errors="backslashreplace") as log:
        for texts in _batches(good()):
            for text, ids in zip(texts, tokenizer.encode(texts)):
                (val if _is_held_out(text, settings) else train).add(ids)
    train.manifest.dropped.update(dropped)
    tokens = sum(writer.close().tokens for writer in (train, val))
    summary = {"tokens": tokens, "lines": lines, "dropped": dict(dropped)}
    write_json(unfinished / DONE, summary)
    unfinished.rename(folder)
    return summary


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Enough texts at a time to keep the tokenizer busy, few enough to bound the memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 100
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _is_held_out(text: str, settings: Settings) -> bool:
    """By the text alone: equal texts fall on one side, in whatever order and wherever they come."""
    digest = hashlib.blake2b(f"{settings.seed} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < settings.val_fraction * 2**64


def _bad_record(part: Part, file: str, line: int, reason: str | None) -> BadRecord:
    return BadRecord(f"{file}:{lines_before(part) + line}: {reason}")


def _claim(parts: list[Part], settings: Settings, output: str) -> dict[str, Any]:
    """What the work in a staging folder is for; `state` is tokenizing, then merging, then over."""
    named = sorted({Path(file) for part in parts for file in part.files})
    files = [f for path in named for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    claim = {
        "state": "tokenizing",
        "output": output if "://" in output else str(Path(output).resolve()),
        "settings": {**asdict(settings), "tokenizer": load_tokenizer(settings.tokenizer, settings.eos).digest},
        "files": {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files},
        "parts": [asdict(part) for part in parts],
    }
    return json.loads(json.dumps(claim))  # as it reads back


def _take_up(staging: Path, claim: dict[str, Any], output: str, overwrite: bool) -> dict[str, Any]:
    """Claim `staging`, or go on with the same work there; returns the claim that holds.

    Without `overwrite`, unfinished work of other input or settings, or a finished source, is a `ValueError`.
    """
    path, work = staging / CLAIM, staging / "parts"
    old = json.loads(path.read_text()) if path.exists() else {}
    if work.exists() and not old:
        raise ValueError(f"{work} is in the way, and not from a preparation; choose another --staging")
    changed = [key for key in claim if old and key != "state" and old[key] != claim[key]]
    if changed and old["state"] != "over" and not overwrite:
        raise ValueError(
            f"{staging} holds unfinished work with other {', '.join(changed)}; finish that, or start over: --overwrite"
        )
    if old and (changed or old["state"] == "over"):
        _clean_up(staging, old)
        old = {}
    if source.is_source(output) and not overwrite and old.get("state") != "merging":
        raise ValueError(f"--output {output} holds a finished source; replace it with --overwrite")
    if not old:
        write_json(path, claim)
    work.mkdir(exist_ok=True)
    for unfinished in work.glob("*.*"):
        shutil.rmtree(unfinished)
    return old or claim


def _clean_up(staging: Path, claim: dict[str, Any]) -> None:
    """Remove all work. The claim first says so: half removed parts must not be gone on with."""
    write_json(staging / CLAIM, {**claim, "state": "over"})
    shutil.rmtree(staging / "parts", ignore_errors=True)
    (staging / CLAIM).unlink()


def _require_room(staging: Path, parts: list[Part], settings: Settings) -> None:
    """A rough lower bound, so that nothing that could fit is refused: archives hold 2.5 times their size in text."""
    text = sum(part.bytes * (2.5 if part.kind in ARCHIVES else 1) for part in parts)
    per_byte = 2.0  # a token for each byte, two bytes each
    if settings.tokenizer != "bytes":
        per_byte = 0.2 * (2 if load_tokenizer(settings.tokenizer, settings.eos).vocab_size <= 2**16 else 4)
    need, free = text * per_byte, shutil.disk_usage(staging).free
    if free < need:
        raise ValueError(
            f"{staging} has {free / 1e9:.1f} GB free, but about {need / 1e9:.1f} GB are needed; name another --staging"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=".jsonl(.gz|.zst), .parquet, datasets folder, texts")
    add("--output", required=True, help="folder or s3:// prefix of the source; gets train/ and val/")
    add("--tokenizer", default="bytes", help="'bytes' (default), a tokenizer.json, or a folder that holds one")
    add("--eos", metavar="TOKEN", help="token that ends a document (default: the tokenizer's usual one)")
    add("--field", default="text", help="field or column that holds the text (default: %(default)s)")
    add("--hf-split", "--split", metavar="NAME", help="split of a datasets folder that has several")
    add("--text-suffix", nargs="*", default=[], metavar=".py", help="further suffixes read as one document a file")
    add("--val-fraction", type=float, default=0.005, metavar="X", help="documents held out (default: %(default)s)")
    add("--seed", type=int, default=0, help="another one holds out other documents (default: %(default)s)")
    add("--chunk-tokens", type=int, default=CHUNK_TOKENS, metavar="N", help="tokens in a chunk (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    add("--on-bad", choices=("skip", "fail"), default="skip", help="what a bad record does (default: %(default)s)")
    add("--staging", type=Path, metavar="FOLDER", help="for the work in between (default: beside the output, or /tmp)")
    add("--overwrite", action="store_true", help="replace a finished source or other unfinished work")
    a = parser.parse_args(arguments)
    settings = Settings(a.tokenizer, a.eos, a.field, a.val_fraction, a.seed, a.chunk_tokens)
    try:
        made = prepare(
            a.input, a.output, settings, workers=a.workers, on_bad=a.on_bad, overwrite=a.overwrite,
            staging=a.staging, text_suffixes=a.text_suffix, hf_split=a.hf_split,
        )  # fmt: skip
    except (ValueError, OSError, KeyboardInterrupt) as error:
        hint = "" if isinstance(error, ValueError) else f"; {_GO_ON}"
        print(f"error: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadRecord) else 130 if isinstance(error, KeyboardInterrupt) else 1)
    print(made)


if __name__ == "__main__":
    main()
