"""Two small files of tasks, a policy as a Hugging Face folder, and `train.py stage=rl` over two phases of them."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from data.prompts import PromptData
from nb_lightning.config.compose import plan_of
from nb_lightning.model.transformer import ModelShape
from nb_lightning.rewards.tasks import Task, read_tasks, write_tasks
from tests.dpd_harness import checked, random_model, save_model, train_here
from tests.harness import ROOT, environment, logged

POLICY = ModelShape(260, 32, 2, 2, 1, 16, 64, rope_theta=1e5, init_std=0.3)
HEAT = 0.35  # of the head: what it says is random enough to be rewarded now and then
END = 258  # <|im_end|>

# 4 steps of 4 prompts x 4 completions, and 3 of 6 x 4.
RL = (
    "stage=rl model=demo trainer=cpu data.demo_tasks=false data.tasks=[] trainer.threads=1 trainer.progress_bar=false "
    "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.head_dim=16 model.d_mlp=64 "
    "model.rope_theta=100000 stage.total_tokens=null stage.group_size=4 stage.max_new_tokens=24 "
    "stage.micro_batch_size=4 stage.max_batch=16 callbacks.plots=null callbacks.rollouts.every_n_steps=1 "
    "callbacks.on_policy_filter.min_prompts=1 callbacks.on_policy_filter.samples=8 "
    "trainer.log_every_n_steps=1 trainer.save_every_n_steps=2"
).split()
PHASES = (
    "stage.phases.stem.steps=4 stage.phases.stem.prompts=4 stage.phases.stem.lr.start=0.005 "
    "stage.phases.stem.lr.end=null stage.phases.code.lr.end=null "
    "stage.phases.stem.seq_len=96 "
    "stage.phases.code.steps=3 stage.phases.code.prompts=6 stage.phases.code.lr.start=0.005 "
    "stage.phases.code.seq_len=128 stage.phases.code.rope_theta=2e5 "
    "stage.phases.stem.mixture.maths_sort=0 stage.phases.stem.mixture.science_binary=0 "
    "stage.phases.code.mixture.code_functions=0 +stage.phases.stem.mixture.words=0.5 "
    "+stage.phases.stem.mixture.digits=0.5 +stage.phases.code.mixture.digits=1"
).split()


def write_sources(root: Path, number: int = 12) -> None:
    """Rewards that a model which knows nothing gets in some of its attempts."""
    wanted = {
        "words": {"instructions": [{"name": "words", "at_least": 6}]},
        "digits": {"instructions": [{"name": "letter", "letter": "e", "at_least": 1}]},
    }
    for name, reference in wanted.items():
        tasks = [
            Task(
                f"{name}/{i}", name, [{"role": "user", "content": f"{name[0]}{'x' * (i % 5)} {i}"}], "ifeval", reference
            )
            for i in range(number)
        ]
        write_tasks(root / f"{name}.jsonl", tasks)


def write_judged(made: Path, path: Path, reference: str | None = None) -> None:
    """The tasks of "words", for a reward model to judge."""
    tasks = [replace(task, verifier="preference", reference=reference) for task in read_tasks(made / "words.jsonl")]
    write_tasks(path, tasks)


def make(root: Path) -> Path:
    """The tasks, beside `policy/`."""
    write_sources(root)
    model = random_model(POLICY, 3)
    model.head.weight.data.mul_(HEAT)
    model.head.weight.data[END] *= 6  # often likely: about half of its completions end
    save_model(model, root / "policy")
    return root


def stage(made: Path) -> list[str]:
    """The two phases over the tasks of `write_sources`."""
    sources = (f"+data.sources.{name}={made}/{name}.jsonl" for name in ("words", "digits"))
    return [*RL, *PHASES, "~stage.phases.preference", *sources]


def overrides(made: Path, root: Path, *more: str) -> list[str]:
    paths = [f"paths.root={root}", f"paths.data_root={made}", f"init_from={made}/policy"]
    return [*stage(made), *paths, *more]


def run_here(made: Path, root: Path, *more: str) -> Path:
    """`train.py stage=rl` in this process; returns the run's folder."""
    return train_here(overrides(made, root, *more))


def run_rl(made: Path, root: Path, *more: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The same in processes of their own."""
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
        more = (*more, f"trainer.devices={ranks}")
    command += [str(ROOT / "train.py"), *overrides(made, root, *more)]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"train.py exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def opened(made: Path, root: Path, *more: str) -> PromptData:
    cfg = checked(overrides(made, root, *more))
    data = PromptData(cfg, plan_of(cfg.stage).in_whole_steps())
    data.open_sources()
    return data


def steps_logged(run: Path, version: int = 0) -> list[dict[str, float]]:
    """The metrics of each step."""
    return [row for row in logged(run, version) if "train/loss" in row]
