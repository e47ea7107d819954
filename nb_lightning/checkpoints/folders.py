"""Checkpoint folders: written atomically, verified before they are loaded.

    checkpoints/step-00000200/state     what Lightning wrote: a file, or a folder of shards
                              checkpoint.json size and SHA-256 of every file; model, plan, tokens_seen

A checkpoint is written into a hidden folder beside its place, synced, and renamed: a kill or a full disk leaves either
the whole checkpoint or none. Before it is loaded, its files are compared with the manifest.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nb_lightning.files import sha256_of
from nb_lightning.model.transformer import ModelShape
from nb_lightning.model.weights import StoredTensor, Weights
from nb_lightning.run_folder import CHECKPOINTS

STATE = "state"
MANIFEST = "checkpoint.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete, or differs from what was written."""


def commit(temporary: Path, final: Path, info: dict[str, Any], name: str = MANIFEST) -> None:
    """Write a manifest into `temporary`, sync all files, and rename the folder to `final`, which is replaced.

    Args:
        temporary: a folder on the file system of `final`.
        info: goes into the manifest, with the size and SHA-256 of every file.
        name: of the manifest.
    """
    files = {}
    for path in _files(temporary):
        _sync(path)
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = temporary / name
    manifest.write_text(json.dumps({**info, "files": files}, indent=1))
    _sync(manifest)
    for folder in {temporary, *(path.parent for path in _files(temporary))}:
        _sync(folder)
    replaced = final.with_name(f".dropping-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_info(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Read the manifest of a folder: for a checkpoint, the stage's `state()` and the files.

    Raises:
        DamagedCheckpoint: the manifest is missing or damaged.
    """
    try:
        info = json.loads((folder / name).read_text())
        if not isinstance(info["files"], dict):
            raise ValueError("'files' is not a mapping")
        return info
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{folder} is not whole: it has no {name}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / name} is damaged: {error}") from error


def verify(folder: Path) -> None:
    """Compare the size and SHA-256 of every file with the manifest.

    Raises:
        DamagedCheckpoint: names the first file that differs, and how.
    """
    for name, entry in read_info(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"checkpoint file {path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"checkpoint file {path} has {path.stat().st_size} bytes, not {entry['bytes']}")
        if sha256_of(path) != entry["sha256"]:
            raise DamagedCheckpoint(f"checkpoint file {path} is damaged: its SHA-256 differs from {MANIFEST}")


def all_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def newest(run: Path, but: int | None = None) -> tuple[Path | None, list[str]]:
    """Find the newest undamaged checkpoint of a run.

    Args:
        but: skip a checkpoint that was saved when so many tokens had been seen.

    Returns:
        The checkpoint, or None; and one line for each newer one that is damaged.
    """
    problems: list[str] = []
    for folder in reversed(all_checkpoints(run)):
        try:
            verify(folder)
            if read_info(folder)["tokens_seen"] != but:
                return folder, problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return None, problems


def is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def resolve(path: str, check: bool = True) -> Path:
    """Find the checkpoint that `path` names: a checkpoint's folder, or a run (its newest undamaged checkpoint).

    Args:
        check: verify the files; if not, a run stands for its newest checkpoint, damaged or not.

    Raises:
        ValueError: no checkpoint is there, or none that is undamaged.
    """
    folder = Path(path)
    if folder.name == STATE:
        folder = folder.parent
    if is_checkpoint(folder):
        if check:
            verify(folder)
        return folder
    if all_checkpoints(folder):
        if not check:
            return all_checkpoints(folder)[-1]
        checkpoint, problems = newest(folder)
        if checkpoint is None:
            raise DamagedCheckpoint("; ".join(problems))
        return checkpoint
    raise ValueError(f"no checkpoint at {path!r}: give a run folder or one of its checkpoints/step-* folders")


class CheckpointWeights(Weights):
    """The model's weights in a checkpoint, written by any number of ranks; one tensor is in memory at a time.

    Only tensors and plain containers are unpickled (`weights_only`), so that no file can run code.
    """

    def __init__(self, folder: Path, prefix: str = "model.") -> None:
        state = folder / STATE
        tensors = _open_sharded(state) if state.is_dir() else _open_single(state)
        self._tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        stored = {name: StoredTensor(name, tuple(tensor.shape)) for name, tensor in self._tensors.items()}
        dtypes = {tensor.dtype for tensor in self._tensors.values()}
        super().__init__(folder, stored, dtypes.pop() if len(dtypes) == 1 else torch.float32)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor.read() if isinstance(tensor, _Sharded) else tensor


def read_shape(folder: Path) -> ModelShape:
    """Read the shape of a checkpoint's model, with the RoPE base it was last trained with.

    Raises:
        DamagedCheckpoint: the manifest describes no model.
    """
    try:
        return ModelShape(**read_info(folder)["model"])
    except (KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} describes no model: {error}") from error


@dataclass(frozen=True)
class _Sharded:
    """A tensor in a folder of shards."""

    key: str
    shape: torch.Size
    dtype: torch.dtype
    reader: Any  # of torch.distributed.checkpoint

    def read(self) -> torch.Tensor:
        from torch.distributed.checkpoint.state_dict_loader import load

        tensors = {self.key: torch.empty(self.shape, dtype=self.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which `no_dist` asks for
            load(tensors, storage_reader=self.reader, no_dist=True)
        return tensors[self.key]


def _open_single(state: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(state, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{state} holds something else than tensors: {_first_line(error)}") from error


def _open_sharded(state: Path) -> dict[str, _Sharded]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(FileSystemReader):
        """torch's reader, without its unrestricted unpickling of the folder's table of contents."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return contents

    try:
        with open(state / ".metadata", "rb") as file:
            contents = _TableOfContents(file).load()
        paths = {str(info.relative_path) for info in contents.storage_data.values()}
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise DamagedCheckpoint(f"{state / '.metadata'} is no table of shards: {_first_line(error)}") from error
    for path in paths:
        if Path(path).name != path:
            raise DamagedCheckpoint(f"{state / '.metadata'} names {path!r}, a file outside its folder")
    reader = Reader(state)
    return {
        key.removeprefix("state_dict."): _Sharded(key, meta.size, meta.properties.dtype, reader)
        for key, meta in contents.state_dict_metadata.items()
        if key.startswith("state_dict.") and isinstance(meta, TensorStorageMetadata)
    }


class _TableOfContents(pickle.Unpickler):
    """An unpickler for the table of contents of a folder of shards; it refuses all that could run code."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"),
        "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
        "collections": ("OrderedDict",),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
