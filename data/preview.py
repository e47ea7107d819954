"""What a source of conversations looks like to the model: `python -m data.preview SOURCE --tokenizer ... --seq-len N`.

Lengths, what `seq_len` does to them, and one packed row with its mask: what is trained on is green (or between
brackets where there is no colour), what is not is dim, and a line begins each sample.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from data.bin_packing import OVER_LONG, Packing
from data.packed import PackedSource, describe
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.errors import one_line_errors
from nb_lightning.text.tokenizer import TextTokenizer
from nb_lightning.token_source import SPLITS, TRAINED, Source

PERCENTILES = (0, 10, 25, 50, 75, 90, 95, 99, 100)


def statistics(name: str, source: Source, samples: np.ndarray, packing: Packing) -> str:
    """Lengths of the samples, and of their packing."""
    lengths, manifest = samples[:, 0], source.manifest
    heads = ["min" if p == 0 else "max" if p == 100 else f"{p} %" for p in PERCENTILES]
    lines = [
        f"{source.folder}: {len(samples):,} samples, {source.tokens:,} tokens, "
        f"{manifest.trained:,} of them trained on ({manifest.trained / max(source.tokens, 1):.1%})",
        "tokens a sample   " + "".join(f"{head:>9}" for head in heads),
        "                  " + "".join(f"{round(np.percentile(lengths, p)):>9,}" for p in PERCENTILES),
        "of them prompt    " + "".join(f"{round(np.percentile(samples[:, 1], p)):>9,}" for p in PERCENTILES),
        f"longer than a row {int((lengths - 1 > packing.seq_len).sum()):>9,}",
        describe(name, packing, len(samples)),
    ]
    if manifest.dropped:
        lines.append("left out by data.prepare: " + ", ".join(f"{n:,} {why}" for why, n in manifest.dropped.items()))
    return "\n".join(lines)


def stretches(words: np.ndarray, tokenizer: TextTokenizer) -> Iterator[tuple[bool, str]]:
    """A sample's text in stretches that are trained on, and not."""
    trained = (words & TRAINED) > 0
    borders = np.flatnonzero(np.diff(trained)) + 1
    for piece in np.split(words, borders):
        yield bool(piece[0] & TRAINED), tokenizer.decode((piece & (TRAINED - 1)).tolist())


def show(row: list[np.ndarray], tokenizer: TextTokenizer, colour: bool) -> None:
    """Print the samples of a row."""
    if not colour:
        for number, words in enumerate(row):
            print(f"--- sample {number}: {len(words):,} tokens, {int((words & TRAINED > 0).sum()):,} trained on ---")
            print("".join(f"[{text}]" if trained else text for trained, text in stretches(words, tokenizer)))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for number, words in enumerate(row):
        console.rule(f"sample {number}: {len(words):,} tokens, {int((words & TRAINED > 0).sum()):,} trained on")
        text = Text()
        for trained, piece in stretches(words, tokenizer):
            text.append(piece, "bold green" if trained else "dim")
        console.print(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.preview", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("source", help="folder or s3:// prefix that data.prepare --chat made")
    add("--tokenizer", default="bytes", help="what it was made with (default: %(default)s)")
    add("--seq-len", type=int, default=4096, metavar="N", help="tokens a row (default: %(default)s)")
    add("--over-long", choices=OVER_LONG, default="drop", help="samples that a row cannot hold (default: %(default)s)")
    add("--split", choices=SPLITS, default=SPLITS[0])
    add("--row", type=int, default=0, metavar="I", help="which row to print (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the run (default: %(default)s)")
    add("--plain", action="store_true", help="no colour: brackets around what is trained on")
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
        print(statistics(name, source, source.samples(), packing))
        if packing.rows:
            print(f"\nrow {a.row} of a run with seed {a.seed}, if the source is called {name} there:")
            show(packed.row(a.row, a.seq_len), tokenizer, sys.stdout.isatty() and not a.plain)


if __name__ == "__main__":
    main()
