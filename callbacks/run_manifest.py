"""Record what ran, beside the checkpoints: config, plan, versions, commit, callbacks, data hashes and the tokenizer."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import OmegaConf

from nb_lightning.files import read_json, write_json
from nb_lightning.phase_callback import StageModule
from nb_lightning.run_folder import CONFIG, MANIFEST, TOKENIZER

PACKAGES = (
    "nb_lightning",
    "torch",
    "lightning",
    "litdata",
    "hydra-core",
    "tokenizers",
    "numpy",
    "bitsandbytes",
    "peft",
    "xformers",
)


class RunManifest(pl.Callback):
    """Writes `config.yaml`, `manifest.json` and `tokenizer/` at the start; completes the manifest at the end.

    Every resume adds an entry to `starts`.
    """

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        (run / CONFIG).write_text(OmegaConf.to_yaml(module.cfg, resolve=True), encoding="utf-8")
        data = module.data
        chat = getattr(data, "chat", None)  # where a stage trains on conversations
        data.tokenizer.save(run / TOKENIZER, chat.source if chat else None)
        earlier = read_json(run / MANIFEST, {}).get("starts", []) if module.tokens_seen else []
        # Lightning sets this attribute without declaring it.
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        start = {
            "tokens_seen": module.tokens_seen,
            "command": sys.argv,
            "versions": {"python": platform.python_version(), **_versions()},
            "git": _git(Path(__file__).parent),
            "world_size": trainer.world_size,
            "device": str(module.device),
        }
        self._write(
            trainer,
            starts=[*earlier, start],
            stage=module.cfg.stage.name,
            init_from=module.cfg.init_from,
            parameters=module.shape.count_parameters(),
            trained_parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
            plan=[asdict(phase) for phase in module.plan.phases],
            callbacks=[f"{type(c).__module__}.{type(c).__qualname__}" for c in callbacks],
            data=data.describe_sources(),
            tokenizer=data.tokenizer.digest,
            finished=False,
        )

    def on_train_end(self, trainer: pl.Trainer, module: StageModule) -> None:
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._write(
                trainer,
                finished=True,
                tokens_seen=module.tokens_seen,
                skipped_steps=module.skipped_steps,
                metrics=metrics,
            )

    def _write(self, trainer: pl.Trainer, **fields: Any) -> None:
        path = Path(trainer.default_root_dir) / MANIFEST
        write_json(path, {**(read_json(path, {}) if fields["finished"] else {}), **fields})


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout and whether it had changes; None outside a git checkout."""
    try:
        return {
            "commit": _git_output(folder, "rev-parse", "HEAD"),
            "modified": bool(_git_output(folder, "status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git_output(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
