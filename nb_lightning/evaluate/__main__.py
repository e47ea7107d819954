"""Evaluate a model: `python -m nb_lightning.evaluate --model RUN --tasks tasks.jsonl --k 8 --out result.json`.

It measures accuracy on verifiable tasks (avg@k, pass@k, greedy), and perplexity and bits per byte of held-out text. It
prints a table and writes all numbers to a JSON file. Under torchrun the processes share the tasks. docs/evaluation.md.
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
from nb_lightning.errors import note, one_line_errors, require_at_least
from nb_lightning.evaluate.accuracy import Report, evaluate_tasks
from nb_lightning.evaluate.perplexity import perplexity, source_documents, text_documents
from nb_lightning.files import atomic_write, write_json
from nb_lightning.generation.decoder import MAX_BATCH
from nb_lightning.generation.sampling import PAPER_DECODING, Sampling
from nb_lightning.rewards.tasks import Task, read_tasks
from nb_lightning.rollouts.attempts import Attempts
from nb_lightning.text.chat_template import ChatTemplate, read_template
from nb_lightning.text.chat_tokens import ends_of_turn
from nb_lightning.text.variables import check_variables

SUMMARY = "Evaluate a model: accuracy on verifiable tasks, perplexity of held-out text."


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with one_line_errors():
        run(args)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m nb_lightning.evaluate", description=SUMMARY)
    p.add_argument("--model", required=True, help="a run, a checkpoint, a Hugging Face folder or a .gguf file")
    p.add_argument("--tasks", nargs="+", default=[], metavar="FILE", help="verifiable tasks, .jsonl")
    p.add_argument("--source", nargs="+", default=[], metavar="NAME=FOLDER", help="tokenized sources (held-out split)")
    p.add_argument("--text", nargs="+", default=[], metavar="NAME=FILE", help='.jsonl with "text", or one text a file')
    p.add_argument("--out", metavar="FILE", help="write all numbers and settings here, as JSON")
    p.add_argument("--samples", metavar="FILE", help="write every completion and its score here, as .jsonl")
    g = p.add_argument_group("tasks")
    g.add_argument("--k", type=int, default=8, help="completions sampled for each task; 0: greedy only")
    g.add_argument("--no-greedy", action="store_true", help="sample no greedy completion")
    g.add_argument("--temperature", type=float, default=PAPER_DECODING["temperature"])
    g.add_argument("--top-p", type=float, default=PAPER_DECODING["top_p"])
    g.add_argument("--top-k", type=int, default=0)
    g.add_argument("--max-new-tokens", type=int, default=512)
    g.add_argument("--limit", type=int, metavar="N", help="use only the first N tasks of each file")
    g.add_argument("--chat-template", metavar="FILE", help="replaces the model's own; 'chatml' is ours")
    g.add_argument("--template-kwargs", metavar="JSON", help="variables of the template, such as "
                   "'{\"enable_thinking\": false}'")  # fmt: skip
    g.add_argument("--max-batch", type=int, default=MAX_BATCH, help="completions sampled at the same time")
    g = p.add_argument_group("text")
    g.add_argument("--seq-len", type=int, default=1024, help="largest context, in tokens")
    g.add_argument("--max-tokens", type=int, default=200_000, help="tokens to predict of each source or text; 0: all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate what the arguments ask for. Rank 0 prints and writes the result.

    Raises:
        ValueError: an argument cannot be used.
    """
    _check(args)
    variables = check_variables(args.template_kwargs or {}, "--template-kwargs")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    tasks = [task for file in args.tasks for task in read_tasks(file)[: args.limit]]
    texts = [(*_name_and_path(pair, "--source"), source_documents) for pair in args.source]
    texts += [(*_name_and_path(pair, "--text"), text_documents) for pair in args.text]
    device = args.device
    is_launched = "WORLD_SIZE" in os.environ  # by torchrun
    if is_launched:
        distributed.init_process_group("gloo")  # only Python objects are exchanged
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "auto" and torch.cuda.is_available() else device
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    pretrained = load_pretrained(args.model, device, args.dtype)
    if args.chat_template:
        pretrained.chat = ChatTemplate(
            read_template(args.chat_template, f"--chat-template {args.chat_template}"), pretrained.tokenizer.special
        )
        pretrained.stop_ids += ends_of_turn(pretrained.tokenizer, pretrained.chat)
    if variables and pretrained.chat is not None:
        pretrained.chat = pretrained.chat.with_variables(variables)
        if is_first:
            note(pretrained.chat.describe_unread())
    result = {"model": _describe(pretrained, args.model), "settings": vars(args), "versions": _versions()}
    if tasks:
        ways = {"sampled": (sampling, args.k)} if args.k else {}
        ways |= {} if args.no_greedy else {"greedy": (replace(sampling, temperature=0.0), 1)}
        reports = {way: _evaluate(args, pretrained, tasks, way, *how, is_first) for way, how in ways.items()}
        result["tasks"] = {way: report.summary() for way, report in reports.items()}
        if args.samples and is_first:
            _write_samples(args.samples, reports)
    if texts and is_first:
        result["perplexity"] = {}
        for name, path, documents in texts:
            with tqdm(desc=name, unit=" tokens", unit_scale=True, disable=None) as bar:
                result["perplexity"][name] = perplexity(
                    pretrained, documents(path, pretrained), args.seq_len, args.max_tokens or None, bar.update
                )
    if is_first:
        print(format_result(result))
        if args.out:
            write_json(Path(args.out), result)
    if is_launched:
        distributed.destroy_process_group()
    return result


def _check(args: argparse.Namespace) -> None:
    if not (args.tasks or args.source or args.text):
        raise ValueError("nothing to evaluate: give --tasks, --source or --text")
    require_at_least(args, seq_len=1, max_batch=1)
    if args.k < 0 or (args.k == 0 and args.no_greedy):
        raise ValueError(f"--k is {args.k}; it must be at least 1, or 0 for greedy only (without --no-greedy)")
    for path in (args.out, args.samples):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: its folder does not exist")


def _evaluate(
    args: argparse.Namespace,
    pretrained: Pretrained,
    tasks: list[Task],
    way: str,
    sampling: Sampling,
    k: int,
    has_bar: bool,
) -> Report:
    """Evaluate the tasks with a progress bar, which is named after the way of sampling."""
    with tqdm(total=len(tasks), desc=way, unit="task", disable=None if has_bar else True) as bar:
        means: list[float] = []

        def on_scored(attempts: Attempts) -> None:
            means.append(attempts.mean_reward)
            bar.set_postfix(mean=f"{sum(means) / len(means):.3f}", refresh=False)
            bar.update()

        return evaluate_tasks(pretrained, tasks, sampling, k, args.seed, args.max_batch, on_scored)


def format_result(result: dict[str, Any]) -> str:
    """Format the numbers as tables."""
    blocks = [f"{result['model']['name']}: {result['model']['parameters']:,} parameters, {result['model']['dtype']}"]
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
        blocks.append(_table(header, rows if len(rows) > 2 else rows[:1]))
    if "perplexity" in result:
        header = ["text", "tokens", "nats/token", "95 %", "perplexity", "bits/byte"]
        rows = []
        for name, s in result["perplexity"].items():
            bits = "-" if s["bits_per_byte"] is None else f"{s['bits_per_byte']:.3f}"
            rate = f"{s['nats_per_token']:.3f}"
            rows.append([name, f"{s['tokens']:,}", rate, _interval(s), f"{s['perplexity']:,.2f}", bits])
        blocks.append(_table(header, rows))
    return "\n\n".join(blocks)


def _interval(numbers: dict[str, Any]) -> str:
    return "{:.3f}-{:.3f}".format(*numbers["interval"]) if numbers["interval"] else "-"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _name_and_path(pair: str, flag: str) -> tuple[str, str]:
    name, _, path = pair.partition("=")
    if not (name and path):
        raise ValueError(f"{flag} {pair}: write it as NAME=PATH")
    return name, path


def _describe(pretrained: Pretrained, path: str) -> dict[str, Any]:
    embedding = pretrained.model.embedding.weight
    return {
        "name": pretrained.name,
        "path": str(Path(path).resolve()),
        "parameters": pretrained.model.shape.count_parameters(),
        "shape": asdict(pretrained.model.shape),
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "device": str(embedding.device),
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
