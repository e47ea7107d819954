"""Three small sources of conversations, and `train.py stage=sft` over two phases of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from tests.harness import ROOT, environment

FAMILIES = "maths_sort science_binary code_functions general_words general_spelling tools_calls".split()

# The demo plan in 12 steps: 6 with rows of 128 tokens, 6 with rows of 256.
SFT = (
    "stage=sft model=demo trainer=cpu init_from=null data.demo_tasks=false data.tasks=[] trainer.threads=1 "
    "trainer.progress_bar=false "
    "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.head_dim=16 model.d_mlp=64 "
    "stage.total_tokens=null stage.global_batch_tokens=1024 stage.micro_batch_size=4 data.val_rows=4 "
    "stage.phases.cold_start.tokens=6144 stage.phases.overall.tokens=6144 stage.phases.cold_start.seq_len=128 "
    "stage.phases.cold_start.lr.start=0.005 stage.phases.overall.lr.start=0.005 "
    "stage.phases.overall.seq_len=256 stage.phases.overall.micro_batch_size=2 "
    "callbacks.plots=null trainer.log_every_n_steps=1 trainer.val_every_n_steps=100 trainer.save_every_n_steps=3"
).split()
TRACE = ("callbacks=[sft,trace]", "hydra.searchpath=[pkg://nb_trace.conf]")


def write_chats(path: Path, name: str, records: int) -> None:
    rng = random.Random(name)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(30)]
    with open(path, "w") as file:
        for _ in range(records):
            messages = []
            for _ in range(rng.choice((1, 1, 2))):
                messages.append({"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(1, 4)))})
                answer = " ".join(rng.choices(words, k=rng.randint(0, 12)))
                messages.append({"role": "assistant", "content": f"{name} {answer}"})
            file.write(json.dumps({"messages": messages}) + "\n")


def make_sources(root: Path) -> Path:
    settings = SourceSettings("bytes", val_fraction=0.2, chunk_tokens=2048, chat=ChatSettings())
    for name in FAMILIES:
        write_chats(root / f"{name}.jsonl", name, 60)
        prepare([root / f"{name}.jsonl"], str(root / "demo_chats" / name), settings, progress=False)
    return root


def overrides(chats: Path, root: Path, *more: str) -> list[str]:
    return [*SFT, f"paths.root={root}", f"paths.data_root={chats}", *more]


def run_sft(chats: Path, root: Path, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *overrides(chats, root, *more)]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"train.py exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done
