"""Write a corpus of random tokens, and train on it with the stage, data and trainer of train.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import ADAM_EPS, BETAS, CLIP, LR, ROOT, Shape
from data.prepare.source_writer import SourceWriter
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.token_source import SourceManifest

SOURCES = ("docs", "code", "tests", "arithmetic")  # of the demo plan


def write_corpus(root: Path, tokens: int, vocab: int = Shape.vocab, seed: int = 0) -> None:
    """Write the demo plan's four sources below `root` (paths.root): `tokens` random tokens each, 600 a document."""
    tokenizer = load_tokenizer("bytes")  # used here for its vocabulary and its end token only
    rng = np.random.default_rng(seed)
    for name in SOURCES:
        for split, size in (("train", tokens), ("val", max(20_000, tokens // 100))):
            manifest = SourceManifest(tokenizer.digest, vocab, tokenizer.eos_id)
            writer = SourceWriter(root / "data/demo" / name / split, manifest)
            ends = np.flatnonzero(rng.random(size) < 1 / 600)
            for document in np.split(rng.integers(tokenizer.eos_id + 1, vocab, size), ends):
                writer.add([*document.tolist(), tokenizer.eos_id])
            writer.close()


def overrides(
    root: Path, steps: int, shape: Shape | None = None, seq_len: int = 512, rows: int = 8, packed: bool = False
) -> list[str]:
    """Return the arguments of train.py for one phase of `steps` steps of `rows` rows over the corpus in `root`."""
    s = shape or Shape()
    phase = dict(tokens=steps * rows * seq_len, seq_len=seq_len, rope_theta=s.theta)
    return [
        "stage=pretrain", *base(root, s),
        *(f"stage.phases.warmup.{key}={value}" for key, value in phase.items()),
        f"stage.phases.warmup.lr={{start: {LR}, end: null}}",
        *(f"~stage.phases.{name}" for name in ("diversity_enriched_stable", "high_quality_stable", "decay")),
        f"stage.global_batch_tokens={rows * seq_len}", f"stage.micro_batch_size={rows}", "stage.total_tokens=null",
        "data.demo_corpus=false", f"data.mask_documents={str(packed).lower()}",
    ]  # fmt: skip


def base(root: Path, s: Shape) -> list[str]:
    """Return the arguments of all benchmarks of train.py: a model's shape, one thread, no saving, no validation."""
    model = dict(
        vocab_size=s.vocab, d_model=s.dim, n_layers=s.layers, n_heads=s.heads, n_kv_heads=s.kv_heads,
        head_dim=s.head_dim, d_mlp=s.mlp, norm_eps=s.eps, rope_theta=s.theta,
    )  # fmt: skip
    optim = dict(betas=list(BETAS), eps=ADAM_EPS, weight_decay=0.0, clip_norm=CLIP)
    return [
        "model=demo", "trainer=cpu", "trainer.threads=1", "trainer.progress_bar=false", "trainer.log_every_n_steps=1",
        "trainer.val_every_n_steps=1000000", "trainer.save_every_n_steps=1000000", f"paths.root={root}",
        *(f"model.{key}={value}" for key, value in model.items()),
        *(f"stage.optim.{key}={value}" for key, value in optim.items()),
    ]  # fmt: skip


def composed(arguments: Sequence[str]):
    """Compose and check the config of `python train.py ARGUMENTS`."""
    from nb_lightning.config.checks import check
    from nb_lightning.config.compose import compose, register

    register()
    cfg = compose(ROOT / "conf", arguments)
    check(cfg)
    return cfg


def fit(cfg, callbacks: Sequence[str], clock) -> None:
    """Fit as train.py does, with `callbacks` only, and with `clock`. Without callbacks there is no logger either."""
    from nb_lightning.config.compose import plan_of, run_dir
    from nb_lightning.stages.strategies import resolve_accelerator
    from train import build_stage, build_trainer, quieten

    cfg.callbacks = {name: cfg.callbacks[name] for name in callbacks}
    cfg.logger = {"csv": cfg.logger["csv"]} if callbacks else {}
    quieten()
    module, data = build_stage(cfg, plan_of(cfg.stage).in_whole_steps())
    data.open_sources()
    trainer = build_trainer(cfg, resolve_accelerator(cfg.trainer), run_dir(cfg))
    trainer.callbacks.append(clock)
    trainer.fit(module, datamodule=data)
