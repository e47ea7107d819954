"""Prove that a refactor changes nothing: run every stage at a tiny budget and print digests of all results.

Run it in the checkout before and after a change, on one machine, and compare the files:

    python tests/golden.py before.json        # in the old checkout
    python tests/golden.py after.json         # in the new one
    diff before.json after.json

It knows only public addresses (commands, config keys, file formats), so it runs in any version that has them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
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


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        root = Path(folder)
        write_inputs(root)
        digests: dict[str, Any] = {"prepared": prepare(root)}
        for stage, overrides in STAGES.items():
            print(f"golden: {stage}", file=sys.stderr)
            extra = [f"callbacks=[{stage},trace]", "hydra.searchpath=[pkg://nb_trace.conf]"] if stage != "rl" else []
            paths = [f"paths.root={root}", f"paths.data_root={root}/data"]
            run(root, "train.py", f"stage={stage}", *TINY, *overrides.split(), *paths, *extra)
            digests[stage] = digest_of_run(root / "runs" / stage)
        digests |= commands(root)
    out.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


def run(root: Path, *words: str, check: bool = True) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "docs/examples/nb_trace")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *(str(ROOT / word) if word == "train.py" else word for word in words)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def write_inputs(root: Path) -> None:
    """Documents, conversations, pairs and tasks, the same in every run."""
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
    common = ["--tokenizer", "bytes", "--val-fraction", "0.2"]
    jobs = [(name, f"demo/{name}", []) for name in SOURCES]
    jobs += [(name, f"demo_chats/{name}", ["--chat"]) for name in FAMILIES]
    jobs += [("pairs", "pairs", ["--pairs"])]
    for name, folder, flags in jobs:
        output = ["--output", f"{root}/data/{folder}"]
        run(root, "-m", "data.prepare", "--input", f"{root}/{name}.jsonl", *output, *flags, *common)
    return {folder: digest_of_folder(root / "data" / folder) for _, folder, _ in jobs}


def commands(root: Path) -> dict[str, Any]:
    """What evaluation, the pair maker and the export make of the trained models."""
    runs, tasks = root / "runs", ["--tasks", f"{root}/digits.jsonl"]
    tail = ["--max-new-tokens", "24"]
    results = root / "evaluation.json"
    run(root, "-m", "nb_lightning.evaluate", "--model", f"{runs}/rl", *tasks, *tail, "--k", "2", "--out", str(results))
    pairs = ["--teacher", f"{runs}/sft", "--student", f"{runs}/dpd", "--output", f"{root}/made"]
    run(root, "-m", "data.pairs", *tasks, *pairs, *tail, check=False)  # may end without a pair: compare the responses
    run(
        root,
        "-m",
        "nb_lightning.export",
        "--from",
        f"{runs}/rl",
        "--to",
        f"{root}/exported",
        "--gguf",
        f"{root}/x.gguf",
    )
    evaluation = json.loads(results.read_text())["tasks"]
    return {
        "evaluation": digest(json.dumps(evaluation, sort_keys=True).encode()),
        "responses": {path.name: digest(path.read_bytes()) for path in sorted((root / "made").glob("*.jsonl"))},
        "exported": digest((root / "exported/model.safetensors").read_bytes()),
        "gguf": digest((root / "x.gguf").read_bytes()),
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(b"".join(f"{path.relative_to(folder)}".encode() + path.read_bytes() for path in files))


def digest_of_run(folder: Path) -> dict[str, Any]:
    """Losses, rows and weights of a run; without times."""
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
    """Over weights and optimizer states."""
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
    main(Path(sys.argv[1]))
