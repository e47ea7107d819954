"""Show a source of conversations as the model sees it: `python -m data.preview SOURCE --tokenizer ... --seq-len N`.

It prints the lengths of the samples, how they fill rows of `seq_len` tokens, and one packed row with its mask: trained
tokens are green (without colour: between brackets), the others dim, and a line begins each sample.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np

from data.bin_packing import OVER_LONG, Packing
from data.packed import PackedSource, describe_packing
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.errors import one_line_errors
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.token_source import SPLITS, TRAINED, Source

DESCRIPTION = "Show a source of conversations as the model sees it: lengths, packing, and one row with its mask."
PERCENTILES = (0, 10, 25, 50, 75, 90, 95, 99, 100)


def describe_source(name: str, source: Source, samples: np.ndarray, packing: Packing) -> str:
    """Describe the lengths of the samples and their packing.

    Args:
        samples: [n, 2] int32, as `Source.samples` returns them.
    """
    lengths, manifest = samples[:, 0], source.manifest
    heads = ["min" if p == 0 else "max" if p == 100 else f"{p} %" for p in PERCENTILES]
    lines = [
        f"{source.folder}: {len(samples):,} samples, {source.tokens:,} tokens, "
        f"{manifest.trained:,} of them trained on ({manifest.trained / max(source.tokens, 1):.1%})",
        "tokens a sample   " + "".join(f"{head:>9}" for head in heads),
        "                  " + "".join(f"{round(np.percentile(lengths, p)):>9,}" for p in PERCENTILES),
        "of them prompt    " + "".join(f"{round(np.percentile(samples[:, 1], p)):>9,}" for p in PERCENTILES),
        f"longer than a row {int((lengths - 1 > packing.seq_len).sum()):>9,}",
        describe_packing(name, packing, len(samples)),
    ]
    if manifest.template_kwargs:
        lines.append(f"variables of the template: {json.dumps(manifest.template_kwargs, ensure_ascii=False)}")
    if manifest.dropped:
        lines.append("left out by data.prepare: " + ", ".join(f"{n:,} {why}" for why, n in manifest.dropped.items()))
    return "\n".join(lines)


def trained_spans(marked: np.ndarray, tokenizer: TextTokenizer) -> Iterator[tuple[bool, str]]:
    """Split a sample into spans of trained and of other tokens; yield (is trained, text) of each."""
    is_trained = (marked & TRAINED) > 0
    borders = np.flatnonzero(np.diff(is_trained)) + 1
    for piece in np.split(marked, borders):
        yield bool(piece[0] & TRAINED), tokenizer.decode((piece & (TRAINED - 1)).tolist())


def print_row(row: list[np.ndarray], tokenizer: TextTokenizer, colour: bool) -> None:
    """Print the samples of a row, [n] marked tokens each."""
    if not colour:
        for number, marked in enumerate(row):
            print(f"--- sample {number}: {len(marked):,} tokens, {int((marked & TRAINED > 0).sum()):,} trained on ---")
            print("".join(f"[{text}]" if trained else text for trained, text in trained_spans(marked, tokenizer)))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for number, marked in enumerate(row):
        console.rule(f"sample {number}: {len(marked):,} tokens, {int((marked & TRAINED > 0).sum()):,} trained on")
        text = Text()
        for trained, piece in trained_spans(marked, tokenizer):
            text.append(piece, "bold green" if trained else "dim")
        console.print(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.preview", description=DESCRIPTION)
    add = parser.add_argument
    add("source", help="folder or s3:// prefix that data.prepare --chat made")
    add("--tokenizer", default="bytes", help="of the source (default: %(default)s)")
    add("--seq-len", type=int, default=4096, metavar="N", help="tokens a row (default: %(default)s)")
    add("--over-long", choices=OVER_LONG, default="drop", help="samples that a row cannot hold (default: %(default)s)")
    add("--split", choices=SPLITS, default=SPLITS[0])
    add("--row", type=int, default=0, metavar="I", help="which row to print (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the run (default: %(default)s)")
    add("--plain", action="store_true", help="no colour: brackets around trained tokens")
    a = parser.parse_args(arguments)
    with one_line_errors():
        tokenizer = load_tokenizer(a.tokenizer)
        source = Source(f"{a.source.rstrip('/')}/{a.split}")
        if not source.manifest.is_chat:
            raise ValueError(f"{source.folder} holds documents, not conversations")
        if source.manifest.tokenizer != tokenizer.digest:
            raise ValueError(f"{source.folder} was made with another tokenizer than --tokenizer {a.tokenizer}")
        if not source.tokens:
            raise ValueError(f"{source.folder} is empty")
        name = a.source.rstrip("/").rpartition("/")[2]
        packed = PackedSource(name, source, [a.seq_len], a.over_long, a.seed)
        packing = packed.packings[a.seq_len]
        print(describe_source(name, source, source.samples(), packing))
        if packing.n_rows:
            print(f"\nrow {a.row} of a run with seed {a.seed}, if the source is called {name} there:")
            print_row(packed.row(a.row, a.seq_len), tokenizer, sys.stdout.isatty() and not a.plain)


if __name__ == "__main__":
    main()
