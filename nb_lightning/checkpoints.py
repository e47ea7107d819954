"""Checkpoint folders that are whole or not there, and known to be what was written.

    checkpoints/step-00000200/state     what Lightning wrote: a file, or a folder of shards
                              checkpoint.json size and SHA-256 of every file; model, plan, tokens_seen

A checkpoint is written into a hidden folder beside its place, synced, and renamed: a kill, a full disk or a separate
file system leaves either the whole checkpoint or none. Before one is loaded its files are compared with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nb_lightning.model import copy_into

STATE = "state"
MANIFEST = "checkpoint.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written."""


def commit(temporary: Path, final: Path, info: dict[str, Any]) -> None:
    """Make the checkpoint in `temporary` durable and rename it to `final` (both on one file system)."""
    files = {}
    for path in _files(temporary):
        _sync(path)
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({**info, "files": files}, indent=1))
    _sync(manifest)
    for folder in {temporary, *(path.parent for path in _files(temporary))}:
        _sync(folder)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(final.parent)


def read_info(folder: Path) -> dict[str, Any]:
    """What `checkpoint.json` says: the stage's `state()` and the files.

    Raises:
        DamagedCheckpoint: it is missing or damaged.
    """
    try:
        info = json.loads((folder / MANIFEST).read_text())
        if not isinstance(info["files"], dict):
            raise ValueError("'files' is not a mapping")
        return info
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{folder} is not a whole checkpoint: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} is damaged: {error}") from error


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with what was written.

    Raises:
        DamagedCheckpoint: names the file and what is wrong with it.
    """
    for name, entry in read_info(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"checkpoint file {path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"checkpoint file {path} has {path.stat().st_size} bytes, not {entry['bytes']}")
        if _sha256(path) != entry["sha256"]:
            raise DamagedCheckpoint(f"checkpoint file {path} is damaged: its SHA-256 differs from {MANIFEST}")


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and what was wrong with each newer one."""
    problems: list[str] = []
    for folder in reversed(all_checkpoints(run)):
        try:
            verify(folder)
        except DamagedCheckpoint as error:
            problems.append(str(error))
        else:
            return folder, problems
    return None, problems


def resolve(path: str) -> Path:
    """The verified checkpoint folder that `path` means: a checkpoint, or a run (its newest whole checkpoint).

    Raises:
        ValueError: nothing there, or damaged.
    """
    folder = Path(path)
    if folder.name == STATE:
        folder = folder.parent
    if (folder / MANIFEST).is_file():
        verify(folder)
        return folder
    if all_checkpoints(folder):
        found, problems = newest(folder)
        if found is None:
            raise DamagedCheckpoint("; ".join(problems))
        return found
    raise ValueError(f"no checkpoint at {path!r}: give a run folder or one of its checkpoints/step-* folders")


def load_weights(model: nn.Module, folder: Path, prefix: str = "model.") -> None:
    """Fill `model` from a checkpoint's weights, whatever number of ranks wrote it and holds it now.

    Nothing but tensors and plain containers is unpickled (`weights_only`).

    Raises:
        ValueError: a missing, additional or differently shaped parameter, by name.
    """
    state = folder / STATE
    weights = _read_sharded(state, prefix) if state.is_dir() else _read_single(state, prefix)
    known = model.state_dict()
    for name in sorted(known.keys() ^ weights.keys()):
        raise ValueError(f"{folder}: parameter {name} is {'missing' if name in known else 'unknown to the model'}")
    for name, parameter in known.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"{folder}: parameter {name} is {list(weights[name].shape)}, the model's is {list(parameter.shape)}"
            )
    for name, parameter in model.named_parameters():
        copy_into(parameter, weights.pop(name))
    for name, value in weights.items():  # what is left shares its memory with a parameter above: tied embeddings
        if not torch.equal(_whole(known[name]), value.to(known[name].dtype)):
            raise ValueError(
                f"{folder}: {name} differs from the parameter that the model ties it to (model.tie_embeddings)"
            )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _read_single(state: Path, prefix: str) -> dict[str, torch.Tensor]:
    content = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}


def _read_sharded(state: Path, prefix: str) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(state)
    wanted = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key, meta in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(f"state_dict.{prefix}") and isinstance(meta, TensorStorageMetadata)
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"state_dict.{prefix}"): value for key, value in wanted.items()}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
