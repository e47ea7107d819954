"""Run `train.py stage=reward_model` on the sources of tests/dpd_harness.py: every rejected response ends in "!"."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data.reward import RewardData
from nb_lightning.config.compose import plan_of
from tests.dpd_harness import checked, train_here
from tests.harness import ROOT, environment

# 8 steps of 4 rows with one to three comparisons each.
REWARD = (
    "stage=reward_model model=demo trainer=cpu trainer.threads=1 trainer.progress_bar=false "
    "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.head_dim=16 model.d_mlp=64 "
    "model.rope_theta=100000 ~stage.phases.warmup stage.phases.comparisons.tokens=6144 "
    "stage.phases.comparisons.seq_len=192 "
    "stage.phases.comparisons.mixture.general_words=0 +stage.phases.comparisons.mixture.tasks=0.5 "
    "+stage.phases.comparisons.mixture.words=0.5 stage.phases.comparisons.lr.start=0.003 "
    "stage.global_batch_tokens=768 stage.micro_batch_size=2 data.val_rows=64 "
    "callbacks.plots=null trainer.log_every_n_steps=1 trainer.val_every_n_steps=100 trainer.save_every_n_steps=3"
).split()
TRACE = ("callbacks=[reward_model,trace]", "hydra.searchpath=[pkg://nb_trace.conf]")


def overrides(made: Path, root: Path, *more: str) -> list[str]:
    sources = (
        f"+data.sources.tasks={made}/demo_pairs/tasks/source",
        f"+data.sources.words={made}/words",
    )
    paths = (f"paths.root={root}", f"paths.data_root={made}", f"init_from={made}/policy")
    return [*REWARD, *sources, *paths, *more]


def run_here(made: Path, root: Path, *more: str) -> Path:
    """Run `train.py stage=reward_model` in this process; return the run folder."""
    return train_here(overrides(made, root, *more))


def run_two(made: Path, root: Path, strategy: str, port: int, *more: str) -> Path:
    """Run it in two processes; return the run folder."""
    arguments = (*TRACE, "trainer.devices=2", f"trainer.strategy={strategy}", "stage.micro_batch_size=1", *more)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += [str(ROOT / "train.py"), *overrides(made, root, *arguments)]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "runs/reward_model"


def opened(made: Path, root: Path, *more: str) -> RewardData:
    cfg = checked(overrides(made, root, *more))
    data = RewardData(cfg, plan_of(cfg.stage).in_whole_steps())
    data.open_sources()
    return data
