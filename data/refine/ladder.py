"""Write what other methods would have made of the calls of a finished refinement, to compare them.

`python -m data.refine.ladder --from FOLDER --output OUTPUT` writes

    OUTPUT/raw.jsonl                  the first candidate of each task, right or wrong
           rejection.jsonl            the first right candidate: rejection sampling
           rejection_rebuilt.jsonl    the same tasks, each with its rebuilt chain
           refined_old_chain.jsonl    the refined answers, each over the reasoning of the draft that was revised
           refined_rebuilt.jsonl      what data.refine keeps: refined answers with rebuilt chains
           ladder.json                samples of each, and the generated tokens of a sample

With `--tokenizer`, each is tokenized too, as OUTPUT/sources/<name>, for train.py's data.sources.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from data.refine.drafts import Draft, History, of_candidates
from data.refine.make import conversation, read_histories
from nb_lightning.errors import one_line_errors
from nb_lightning.files import atomic_write, json_line, write_json

RUNGS = ("raw", "rejection", "rejection_rebuilt", "refined_old_chain", "refined_rebuilt")
HELD_OUT = 0.03  # of the records of a source
REBUILDING = ("skeleton", "chain")  # the roles whose tokens a rebuilt chain costs
DESCRIPTION = "Write what other methods would have made of a finished refinement's calls, to compare them."


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m data.refine.ladder", description=DESCRIPTION)
    p.add_argument("--from", dest="folder", required=True, type=Path, metavar="FOLDER", help="output of data.refine")
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    p.add_argument("--tokenizer", metavar="PATH", help="of the sources, as in data.prepare")
    a = p.parse_args(arguments)
    with one_line_errors():
        for rung, numbers in write_ladder(a.folder, a.output).items():
            cost = numbers["tokens_per_sample"]
            print(f"{rung:<20}{numbers['samples']:>8,} samples, {cost or 0:>8,.0f} tokens each")
            if a.tokenizer:
                write_source(a.output / f"{rung}.jsonl", a.output / "sources" / rung, a.tokenizer)


def write_ladder(folder: Path, output: Path) -> dict[str, dict[str, float | None]]:
    """Write the rungs' records, and return for each its samples and the generated tokens of a sample.

    Raises:
        ValueError: `folder` holds no finished refinement.
    """
    output.mkdir(parents=True, exist_ok=True)
    samples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {rung: stack.enter_context(atomic_write(output / f"{rung}.jsonl")) for rung in RUNGS}
        for history in read_histories(folder):
            cost = rung_tokens(history)
            for rung in RUNGS:
                tokens[rung] += cost[rung]
                if (response := rung_response(history, rung)) is not None:
                    samples[rung] += 1
                    files[rung].write(_record(history, *response))
    numbers = {
        rung: {"samples": samples[rung], "tokens_per_sample": tokens[rung] / samples[rung] if samples[rung] else None}
        for rung in RUNGS
    }
    write_json(output / "ladder.json", numbers)
    return numbers


def write_source(records: Path, source: Path, tokenizer: str) -> None:
    """Tokenize records for training; a few are held out, because a run needs some for its validation loss."""
    settings = SourceSettings(tokenizer, val_fraction=HELD_OUT, chat=ChatSettings())
    prepare([records], str(source), settings, on_bad="fail", overwrite=True, progress=False)


def rung_response(history: History, rung: str) -> tuple[str, str] | None:
    """Return the reasoning and the answer that a method would keep for a task; None if it keeps none."""
    candidates, first_right = history.candidates, history.first_right
    if rung == "raw":
        return _own(candidates[0]) if candidates and candidates[0].content and not candidates[0].is_cut else None
    if rung == "rejection":
        return _own(first_right) if first_right else None
    if rung == "rejection_rebuilt":
        return _rebuilt(history) if first_right else None
    if rung == "refined_rebuilt":
        return _rebuilt(history)
    old, best = history.first_draft, history.best_draft
    return (old.reasoning, best.content) if old and best and best.passed else None


def rung_tokens(history: History) -> Counter[str]:
    """Return the generated tokens that each method needs for a task."""
    candidates, n_candidates = of_candidates(history.tokens), of_candidates(history.calls)
    rebuilding = sum(history.tokens.get(role, 0) for role in REBUILDING)
    everything, refining = sum(history.tokens.values()), sum(history.tokens.values()) - rebuilding
    return Counter(
        raw=round(candidates / n_candidates) if n_candidates else 0,
        rejection=candidates,
        rejection_rebuilt=candidates + rebuilding * (history.first_right is not None),
        refined_old_chain=refining,
        refined_rebuilt=everything,
    )


def _own(draft: Draft) -> tuple[str, str]:
    return draft.reasoning, draft.content


def _rebuilt(history: History) -> tuple[str, str] | None:
    if history.dropped or history.best_draft is None:
        return None
    return history.chains[-1].reasoning, history.best_draft.content


def _record(history: History, reasoning: str, content: str) -> bytes:
    return json_line({"id": history.task.id, **conversation(history.task, reasoning, content)})


if __name__ == "__main__":
    main()
