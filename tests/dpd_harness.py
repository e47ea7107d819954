"""Make two small sources of pairs, a policy and a wider teacher, and run `train.py stage=dpd` on them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import torch

from data.preference import PreferenceData
from data.prepare.make import prepare
from data.prepare.settings import ChatSettings, SourceSettings
from nb_lightning.checkpoints.folders import CheckpointWeights
from nb_lightning.checkpoints.hf_config import config_from_shape
from nb_lightning.checkpoints.hf_weights import save_hf
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.config.checks import check
from nb_lightning.config.compose import plan_of, run_dir
from nb_lightning.config.schema import Config
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.model.weights import StoredTensor, Weights
from tests.config.harness import composed
from tests.harness import ROOT, environment, read_trace

POLICY = ModelShape(260, 32, 2, 2, 1, 16, 64, rope_theta=1e5, init_std=0.3)
TEACHER = ModelShape(260, 64, 1, 2, 1, 32, 64, rope_theta=5e4, init_std=0.3)

# 8 steps of 4 rows with about two pairs each; the smaller source is gone through more than once.
DPD = (
    "stage=dpd model=demo trainer=cpu data.tasks=[] trainer.threads=1 trainer.progress_bar=false "
    "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.head_dim=16 model.d_mlp=64 "
    "model.rope_theta=100000 stage.phases.distillation.tokens=4096 stage.phases.distillation.seq_len=128 "
    "stage.phases.distillation.mixture.tasks=0.5 +stage.phases.distillation.mixture.words=0.5 "
    "stage.global_batch_tokens=512 "
    "stage.micro_batch_size=2 data.val_rows=3 stage.phases.distillation.lr.start=0.01 "
    "callbacks.plots=null trainer.log_every_n_steps=1 trainer.val_every_n_steps=100 trainer.save_every_n_steps=3"
).split()
TRACE = ("callbacks=[dpd,trace]", "hydra.searchpath=[pkg://nb_trace.conf]")


class _OfModel(Weights):
    def __init__(self, model: Transformer) -> None:
        self.tensors = dict(model.named_parameters())
        stored = {name: StoredTensor(name, tuple(p.shape)) for name, p in self.tensors.items()}
        super().__init__("a model", stored, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()


def save_model(model: Transformer, folder: Path, tokenizer: str = "bytes") -> Path:
    """Save a model as a Hugging Face folder."""
    folder.mkdir(parents=True)
    save_hf(_OfModel(model), model.shape, folder, torch.float32, 2**30)
    (folder / "config.json").write_text(json.dumps(config_from_shape(model.shape, torch.float32)))
    load_tokenizer(tokenizer).save(folder)
    return folder


def random_model(shape: ModelShape, seed: int) -> Transformer:
    model = Transformer(shape)
    model.init_weights(seed)
    return model


def write_pairs(path: Path, name: str, pairs: int) -> None:
    rng = random.Random(name)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(20)]
    with open(path, "w") as file:
        for number in range(pairs):
            chosen, rejected = (" ".join(rng.sample(words, rng.randint(0, 3))) for _ in range(2))
            pair = {"prompt": f"{name[0]} {number}", "chosen": chosen, "rejected": f"{rejected}!"}
            if number % 5 == 0:  # a chosen response of one token, the end of turn; a rejected one that never ended
                pair |= {"chosen": "", "rejected_finish": "length"}
            file.write(json.dumps(pair) + "\n")


def make(root: Path) -> Path:
    """Make `paths.data_root` with the sources, `policy/` and `teacher/` in it."""
    settings = SourceSettings("bytes", val_fraction=0.2, chunk_tokens=2048, chat=ChatSettings(), pairs=True)
    for name, pairs, folder in (("tasks", 50, "demo_pairs/tasks/source"), ("words", 20, "words")):
        write_pairs(root / f"{name}.jsonl", name, pairs)
        prepare([root / f"{name}.jsonl"], str(root / folder), settings, progress=False)
    save_model(random_model(POLICY, 1), root / "policy")
    save_model(random_model(TEACHER, 2), root / "teacher")
    return root


def overrides(made: Path, root: Path, *more: str) -> list[str]:
    paths = [f"paths.root={root}", f"paths.data_root={made}", f"+data.sources.words={made}/words"]
    return [*DPD, *paths, f"init_from={made}/policy", f"stage.teacher={made}/teacher", *more]


def run_dpd(made: Path, root: Path, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *overrides(made, root, *more)]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"train.py exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def checked(arguments: list[str]) -> Config:
    """Compose and check the config of `train.py ARGUMENTS`, and make its run folder."""
    cfg = composed(*arguments)
    check(cfg, ["nb_trace"])
    run_dir(cfg).mkdir(parents=True, exist_ok=True)
    return cfg


def train_here(arguments: list[str]) -> Path:
    """Run `train.py ARGUMENTS` in this process; return the run folder."""
    import train as command

    cfg = checked(arguments)
    command.run(cfg)
    return run_dir(cfg)


def run_here(made: Path, root: Path, *more: str) -> Path:
    """Run `train.py stage=dpd` in this process; return the run folder."""
    return train_here(overrides(made, root, *more))


def opened(made: Path, root: Path, *more: str) -> PreferenceData:
    cfg = checked(overrides(made, root, *more))
    data = PreferenceData(cfg, plan_of(cfg.stage).in_whole_steps())
    data.open_sources()
    return data


def trained(run: Path) -> CheckpointWeights:
    """Open the weights of a run's last checkpoint."""
    return CheckpointWeights(sorted((run / "checkpoints").iterdir())[-1])


def loss_curve(run: Path, rank: int | None = None) -> list[float]:
    trace = read_trace(run, rank)
    return [float.fromhex(trace[step]["loss"]) for step in sorted(trace)]
