"""Evaluate a model: `python -m nb_lightning.evaluate --model RUN --tasks tasks.jsonl --k 8 --out result.json`.

Accuracy on verifiable tasks (avg@k, pass@k, greedy), and perplexity and bits per byte of held-out text; a table on the
terminal, everything in a JSON file. docs/evaluation.md. Under torchrun the processes share the tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm

from nb_lightning.checkpoints.pretrained import Pretrained, load_pretrained
from nb_lightning.errors import one_line_errors
from nb_lightning.evaluate.accuracy import Report, evaluate_tasks
from nb_lightning.evaluate.perplexity import perplexity, source_documents, text_documents
from nb_lightning.files import atomic_write, write_json
from nb_lightning.generation.decoder import MAX_BATCH
from nb_lightning.generation.sampling import PAPER_DECODING, Sampling
from nb_lightning.rewards.tasks import Task, read_tasks
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.text.chat_template import ChatTemplate, read_template


def main(arguments: Sequence[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    with one_line_errors():
        run(a)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.evaluate", description=__doc__.partition("\n")[0])
    p.add_argument("--model", required=True, help="a run, a checkpoint, a Hugging Face folder or a .gguf file")
    p.add_argument("--tasks", nargs="+", default=[], metavar="FILE", help="verifiable tasks, .jsonl")
    p.add_argument("--source", nargs="+", default=[], metavar="NAME=FOLDER", help="tokenized sources (held-out split)")
    p.add_argument("--text", nargs="+", default=[], metavar="NAME=FILE", help='.jsonl with "text", or one text a file')
    p.add_argument("--out", metavar="FILE", help="write all numbers and settings here, as JSON")
    p.add_argument("--samples", metavar="FILE", help="write every completion and its score here, as .jsonl")
    g = p.add_argument_group("tasks")
    g.add_argument("--k", type=int, default=8, help="completions sampled for each task; 0: greedy only")
    g.add_argument("--no-greedy", action="store_true", help="leave the greedy completion out")
    g.add_argument("--temperature", type=float, default=PAPER_DECODING["temperature"])
    g.add_argument("--top-p", type=float, default=PAPER_DECODING["top_p"])
    g.add_argument("--top-k", type=int, default=0)
    g.add_argument("--max-new-tokens", type=int, default=512)
    g.add_argument("--limit", type=int, help="only the first so many tasks of each file")
    g.add_argument("--chat-template", metavar="FILE", help="instead of the model's own; 'chatml' is ours")
    g.add_argument("--max-batch", type=int, default=MAX_BATCH, help="completions generated at the same time")
    g = p.add_argument_group("text")
    g.add_argument("--seq-len", type=int, default=1024, help="tokens of context at most")
    g.add_argument("--max-tokens", type=int, default=200_000, help="predicted per source or text; 0: all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    return p


def run(a: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for; on rank 0 shown and written.

    Raises:
        ValueError: something that was asked for cannot be done.
    """
    if not (a.tasks or a.source or a.text):
        raise ValueError("nothing to evaluate: give --tasks, --source or --text")
    for flag in ("seq_len", "max_batch"):
        if getattr(a, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(a, flag)}; it must be at least 1")
    if a.k < 0 or (a.k == 0 and a.no_greedy):
        raise ValueError(f"--k is {a.k}; it must be at least 1, or 0 for greedy only (without --no-greedy)")
    for name in (a.out, a.samples):
        if name and not Path(name).absolute().parent.is_dir():
            raise ValueError(f"{name} cannot be written: its folder does not exist")
    sampling = Sampling(a.max_new_tokens, a.temperature, a.top_k, a.top_p)
    tasks = [task for file in a.tasks for task in read_tasks(file)[: a.limit]]
    texts = [(*_named(pair, "--source"), source_documents) for pair in a.source]
    texts += [(*_named(pair, "--text"), text_documents) for pair in a.text]
    device = a.device
    launched = "WORLD_SIZE" in os.environ
    if launched:
        distributed.init_process_group("gloo")  # only Python objects are exchanged
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "auto" and torch.cuda.is_available() else device
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    pretrained = load_pretrained(a.model, device, a.dtype)
    if a.chat_template:
        pretrained.chat = ChatTemplate(read_template(a.chat_template, f"--chat-template {a.chat_template}"))
    result = {"model": _about(pretrained, a.model), "settings": vars(a), "versions": _versions()}
    if tasks:
        ways = {"sampled": (sampling, a.k), "greedy": (replace(sampling, temperature=0.0), 0 if a.no_greedy else 1)}
        reports = {}
        for way, (how, k) in ways.items():
            if k:
                reports[way] = _with_bar(way, pretrained, tasks, how, k, a.seed, a.max_batch, first)
        result["tasks"] = {way: report.summary() for way, report in reports.items()}
        if a.samples and first:
            _write_samples(a.samples, reports)
    if texts and first:
        result["perplexity"] = {}
        for name, place, documents in texts:
            with tqdm(desc=name, unit=" tokens", unit_scale=True, disable=None) as bar:
                found = perplexity(
                    pretrained, documents(place, pretrained), a.seq_len, a.max_tokens or None, bar.update
                )
            result["perplexity"][name] = found
    if first:
        print(show(result))
        if a.out:
            write_json(Path(a.out), result)
    if launched:
        distributed.destroy_process_group()
    return result


def _with_bar(
    way: str,
    pretrained: Pretrained,
    tasks: list[Task],
    sampling: Sampling,
    k: int,
    seed: int,
    max_batch: int,
    bar: bool,
) -> Report:
    with tqdm(total=len(tasks), desc=way, unit="task", disable=None if bar else True) as progress:
        done: list[float] = []

        def on_scored(attempts: Attempts) -> None:
            done.append(attempts.mean_reward)
            progress.set_postfix(mean=f"{sum(done) / len(done):.3f}", refresh=False)
            progress.update()

        return evaluate_tasks(pretrained, tasks, sampling, k, seed, max_batch, on_scored)


def show(result: dict[str, Any]) -> str:
    """The numbers as text."""
    parts = [f"{result['model']['name']}: {result['model']['parameters']:,} parameters, {result['model']['dtype']}"]
    for way, by_source in result.get("tasks", {}).items():
        sizes = list(next(iter(by_source.values()))["pass"])
        k = sizes[-1]
        header = ["source", "tasks", f"avg@{k}" if way == "sampled" else way, "95 %"]
        header += [f"pass@{j}" for j in sizes if j > 1] + ["truncated", "tokens"]
        rows = []
        for name, s in by_source.items():
            row = [name, f"{s['tasks']:,}", f"{s['mean']:.3f}", _interval(s)]
            row += [f"{s['pass'][j]:.3f}" for j in sizes if j > 1]
            rows.append([*row, f"{s['truncated']:.1%}", f"{s['tokens']:.0f}"])
        parts.append(_table(header, rows if len(rows) > 2 else rows[:1]))
    if "perplexity" in result:
        header = ["text", "tokens", "nats/token", "95 %", "perplexity", "bits/byte"]
        rows = []
        for name, s in result["perplexity"].items():
            bits = "-" if s["bits_per_byte"] is None else f"{s['bits_per_byte']:.3f}"
            rate = f"{s['nats_per_token']:.3f}"
            rows.append([name, f"{s['tokens']:,}", rate, _interval(s), f"{s['perplexity']:,.2f}", bits])
        parts.append(_table(header, rows))
    return "\n\n".join(parts)


def _interval(numbers: dict[str, Any]) -> str:
    return "{:.3f}-{:.3f}".format(*numbers["interval"]) if numbers["interval"] else "-"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _named(pair: str, flag: str) -> tuple[str, str]:
    name, found, place = pair.partition("=")
    if not (name and found and place):
        raise ValueError(f"{flag} {pair}: write it as NAME=PATH")
    return name, place


def _about(pretrained: Pretrained, path: str) -> dict[str, Any]:
    weight = pretrained.model.embedding.weight
    return {
        "name": pretrained.name,
        "path": str(Path(path).resolve()),
        "parameters": pretrained.model.shape.parameters(),
        "shape": asdict(pretrained.model.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "tokenizer": pretrained.tokenizer.digest,
    }


def _versions() -> dict[str, str]:
    packages = ("nb_lightning", "torch", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _write_samples(path: str, reports: dict[str, Report]) -> None:
    with atomic_write(Path(path)) as file:
        for way, report in reports.items():
            for attempts in report.attempts:
                task = attempts.task
                for j, score in enumerate(attempts.scores):
                    line = {
                        "id": task.id, "source": task.source, "way": way, "sample": j, "messages": task.messages,
                        "completion": attempts.texts[j], "tokens": attempts.n_tokens[j],
                        "finish_reason": attempts.finish_reasons[j], "reward": score.reward, "info": dict(score.info),
                        "reference": task.reference,
                    }  # fmt: skip
                    file.write(f"{json.dumps(line, ensure_ascii=False, default=str)}\n".encode())


if __name__ == "__main__":
    main()
