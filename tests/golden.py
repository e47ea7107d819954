"""Prove that a refactor changes nothing: run every stage at a tiny budget, and write digests of all results.

Run it before and after the change, on one machine, and let it compare:

    python tests/golden.py before.json                          # in the old checkout
    python tests/golden.py after.json --compare before.json     # in the new one: exit code 1 and a line per difference

It uses public addresses only (commands, config keys, file formats), so it runs in every version that has them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 6)) for i in range(40)]

TINY = (
    "trainer=cpu trainer.threads=1 trainer.progress_bar=false model=demo model.d_model=32 model.n_layers=2 "
    "model.n_heads=2 model.n_kv_heads=1 model.head_dim=16 model.d_mlp=64 model.init_std=0.2 stage.total_tokens=null "
    "trainer.log_every_n_steps=1 trainer.val_every_n_steps=4 trainer.save_every_n_steps=3 callbacks.plots=null"
).split()
STAGES = {
    "pretrain": (
        "stage.global_batch_tokens=512 stage.micro_batch_size=8 data.demo_corpus=false data.val_rows=4 "
        "stage.phases.warmup.tokens=2048 stage.phases.diversity_enriched_stable.tokens=2048 "
        "stage.phases.high_quality_stable.tokens=1024 stage.phases.decay.tokens=1024 "
        "stage.phases.warmup.seq_len=32 stage.phases.diversity_enriched_stable.seq_len=32 "
        "stage.phases.high_quality_stable.seq_len=32 stage.phases.decay.seq_len=128 "
        "stage.phases.decay.micro_batch_size=2"
    ),
    "sft": (
        "init_from=${paths.runs}/pretrain data.demo_tasks=false data.tasks=[${paths.root}/digits.jsonl] "
        "data.task_limit=3 data.task_tokens=8 "
        "stage.global_batch_tokens=1024 stage.micro_batch_size=4 data.val_rows=4 "
        "stage.phases.cold_start.tokens=4096 stage.phases.overall.tokens=4096 stage.phases.cold_start.seq_len=128 "
        "stage.phases.overall.seq_len=256 stage.phases.overall.micro_batch_size=2"
    ),
    "dpd": (
        "data.tasks=[] stage.teacher=${paths.runs}/pretrain "
        "data.sources.tasks=${paths.data_root}/pairs stage.phases.distillation.tokens=3072 "
        "stage.phases.distillation.seq_len=128 stage.global_batch_tokens=512 stage.micro_batch_size=2 data.val_rows=3"
    ),
    "reward_model": (
        "init_from=${paths.runs}/sft data.sources.general_words=${paths.data_root}/pairs "
        "~stage.phases.warmup stage.phases.comparisons.tokens=4608 stage.phases.comparisons.seq_len=192 "
        "stage.global_batch_tokens=768 stage.micro_batch_size=2 data.val_rows=16"
    ),
    "rl": (
        "data.demo_tasks=false data.tasks=[${paths.root}/digits.jsonl] data.task_limit=3 data.task_tokens=8 "
        "stage.group_size=4 stage.max_new_tokens=24 stage.micro_batch_size=4 stage.max_batch=16 stage.kl_weight=0.01 "
        "callbacks.rollouts.every_n_steps=1 callbacks.on_policy_filter.min_prompts=1 "
        "callbacks.on_policy_filter.samples=8 callbacks.on_policy_filter.candidates=null "
        "stage.phases.stem.steps=3 stage.phases.stem.prompts=4 stage.phases.stem.seq_len=96 "
        "stage.phases.stem.mixture.maths_sort=1 stage.phases.stem.mixture.science_binary=0 "
        "stage.phases.code.steps=2 stage.phases.code.prompts=4 stage.phases.code.seq_len=96 "
        "stage.phases.preference.steps=2 stage.phases.preference.prompts=4 stage.phases.preference.seq_len=96 "
        "data.sources.maths_sort=${paths.root}/digits.jsonl data.sources.science_binary=${paths.root}/digits.jsonl "
        "data.sources.code_functions=${paths.root}/counts.jsonl "
        "data.sources.general_words_preference=${paths.root}/judged.jsonl"
    ),
}
SOURCES = ("docs", "code", "tests", "arithmetic")
FAMILIES = ("maths_sort", "science_binary", "code_functions", "general_words", "general_spelling", "tools_calls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the digests are written")
    parser.add_argument("--compare", type=Path, metavar="BEFORE", help="digests of another version")
    args = parser.parse_args()
    before = json.loads(args.compare.read_text()) if args.compare else None
    digests = compute_digests()
    args.out.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
    if before is not None:
        lines = list(differences(before, digests))
        print("\n".join(lines) or "the same: all losses, rows, weights and files")
        sys.exit(bool(lines))


def compute_digests() -> dict[str, Any]:
    """Prepare the sources, run every stage, then the commands; the keys are in this order."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        root = Path(folder)
        write_inputs(root)
        with step("data.prepare"):
            digests: dict[str, Any] = {"prepared": prepare(root)}
        for stage, overrides in STAGES.items():
            trace = [f"callbacks=[{stage},trace]", "hydra.searchpath=[pkg://nb_trace.conf]"] if stage != "rl" else []
            paths = [f"paths.root={root}", f"paths.data_root={root}/data"]
            with step(f"train.py stage={stage}"):
                run(root, "train.py", f"stage={stage}", *TINY, *overrides.split(), *paths, *trace)
            digests[stage] = digest_of_run(root / "runs" / stage)
        with step("evaluate, pairs, export"):
            digests |= run_commands(root)
    return digests


@contextmanager
def step(name: str) -> Iterator[None]:
    start = time.monotonic()
    print(f"golden: {name} ...", end="", file=sys.stderr, flush=True)
    yield
    print(f" {time.monotonic() - start:.0f} s", file=sys.stderr)


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each value that differs: the first of them is the first in the order of the pipeline."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*after, *(key for key in before if key not in after)]:
            yield from differences(before.get(key), after.get(key), f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list):
        for i, (old, new) in enumerate(zip_longest(before, after)):
            yield from differences(old, new, f"{path}[{i}]")
    elif before != after:
        yield f"{path.lstrip('/')}: {before} before, {after} now"


def run(root: Path, *arguments: str, check: bool = True) -> None:
    """Run Python with these arguments; with `check`, end with the output of a command that fails."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "docs/examples/nb_trace")])
    command = [sys.executable, *(str(ROOT / word) if word == "train.py" else word for word in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def write_inputs(root: Path) -> None:
    """Write documents, conversations, pairs and tasks: the same in every run."""
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    def write(name: str, records: list[dict[str, Any]]) -> None:
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    for name in SOURCES:
        write(f"{name}.jsonl", [{"text": text(5, 60)} for _ in range(150)])
    for name in FAMILIES:
        chats = []
        for _ in range(60):
            messages = []
            for _ in range(rng.choice((1, 1, 2))):
                messages.append({"role": "user", "content": text(1, 4)})
                messages.append({"role": "assistant", "content": text(0, 8), "reasoning_content": text(1, 5)})
            chats.append({"messages": messages})
        write(f"{name}.jsonl", chats)
    write("pairs.jsonl", [{"prompt": f"p {i}", "chosen": text(1, 3), "rejected": f"{text(0, 3)}!"} for i in range(60)])
    letter = {"instructions": [{"name": "letter", "letter": "e", "at_least": 1}]}
    words = {"instructions": [{"name": "words", "at_least": 3}]}
    for name, verifier, reference in (
        ("digits", "ifeval", letter),
        ("counts", "ifeval", words),
        ("judged", "preference", None),
    ):
        tasks = []
        for i in range(12):
            messages = [{"role": "user", "content": f"{name[0]}{'x' * (i % 5)} {i}"}]
            task = {"id": f"{name}/{i}", "source": name, "messages": messages, "verifier": verifier}
            tasks.append({**task, "reference": reference})
        write(f"{name}.jsonl", tasks)


def prepare(root: Path) -> dict[str, str]:
    """Tokenize every source, two at a time."""
    common = ["--tokenizer", "bytes", "--val-fraction", "0.2"]
    jobs = [(name, f"demo/{name}", []) for name in SOURCES]
    jobs += [(name, f"demo_chats/{name}", ["--chat"]) for name in FAMILIES]
    jobs += [("pairs", "pairs", ["--pairs"])]

    def prepare_source(job: tuple[str, str, list[str]]) -> None:
        name, folder, flags = job
        files = ["--input", f"{root}/{name}.jsonl", "--output", f"{root}/data/{folder}"]
        run(root, "-m", "data.prepare", *files, *flags, *common)

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(prepare_source, jobs))
    return {folder: digest_of_folder(root / "data" / folder) for _, folder, _ in jobs}


def run_commands(root: Path) -> dict[str, Any]:
    """Evaluate, make pairs and export with the trained models."""
    runs, sampling = root / "runs", ["--tasks", f"{root}/digits.jsonl", "--max-new-tokens", "24"]
    evaluate = ["--model", f"{runs}/rl", "--k", "2", "--out", f"{root}/evaluation.json"]
    run(root, "-m", "nb_lightning.evaluate", *evaluate, *sampling)
    pairs = ["--teacher", f"{runs}/sft", "--student", f"{runs}/dpd", "--output", f"{root}/made"]
    run(root, "-m", "data.pairs", *pairs, *sampling, check=False)  # fails where no pair results: compare the responses
    export = ["--from", f"{runs}/rl", "--to", f"{root}/exported", "--gguf", f"{root}/x.gguf"]
    run(root, "-m", "nb_lightning.export", *export)
    evaluation = json.loads((root / "evaluation.json").read_text())["tasks"]
    return {
        "evaluation": digest(json.dumps(evaluation, sort_keys=True).encode()),
        "responses": {path.name: digest_of_lines(path) for path in sorted((root / "made").glob("*.jsonl"))},
        "exported": digest((root / "exported/model.safetensors").read_bytes()),
        "gguf": digest((root / "x.gguf").read_bytes()),
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of_lines(path: Path) -> str:
    """Digest the lines in sorted order: several threads write them."""
    return digest(b"".join(sorted(path.read_bytes().splitlines(keepends=True))))


def digest_of_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(b"".join(f"{path.relative_to(folder)}".encode() + path.read_bytes() for path in files))


def digest_of_run(folder: Path) -> dict[str, Any]:
    """Return the losses of a run, and digests of its metrics (without times), rows and weights."""
    digests: dict[str, Any] = {"losses": [], "checkpoints": {}}
    with open(folder / "metrics/version_0/metrics.csv", newline="") as file:
        rows = [
            {name: value for name, value in sorted(row.items()) if value and not name.startswith("perf/")}
            for row in csv.DictReader(file)
        ]
    digests["metrics"] = digest(json.dumps(rows).encode())
    digests["losses"] = [row["train/loss"] for row in rows if "train/loss" in row]
    for name in ("trace.jsonl", "rollouts.jsonl", "accuracy.json", "on_policy_filter.json"):
        if (folder / name).is_file():
            digests[name] = digest((folder / name).read_bytes())
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        digests["checkpoints"][checkpoint.name] = digest_of_tensors(checkpoint)
    return digests


def digest_of_tensors(checkpoint: Path) -> str:
    """Digest the weights and the optimizer's states."""
    state = torch.load(checkpoint / "state", weights_only=True)
    total = hashlib.sha256()

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            total.update(name.encode() + value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(value[key], f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{name}.{i}")

    walk({key: state[key] for key in ("state_dict", "optimizer_states")}, "")
    return total.hexdigest()[:16]


if __name__ == "__main__":
    main()
