"""Write tokenized sources: chunks of pages, a hash for each; merge, upload and remove whole sources.

nb_lightning/token_source.py describes the files and reads them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import TokensLoader
from litdata.streaming.fs_provider import _get_fs_provider
from litdata.streaming.writer import BinaryWriter
from tqdm import tqdm

from nb_lightning.files import atomic_write, read_json, sha256_of, write_json
from nb_lightning.token_source import INDEX, MANIFEST, SAMPLES, SPLITS, TRAINED, SourceManifest

CHUNK_TOKENS = 2**24  # 32 MiB of uint16, 64 MiB of int32
_OF_A_SPLIT = re.compile(r"chunk-.*\.bin|.*index\.json|source\.json|samples\.npy|teacher(-\d+\.npy|\.json)|\..*\.tmp")


class SourceWriter:
    """Writes documents into the folder of one split; `merge_parts` merges several such folders.

    The folder is complete when `close` has returned. An interrupted writer leaves a folder without manifest.
    """

    def __init__(self, folder: Path, manifest: SourceManifest, chunk_tokens: int = CHUNK_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.manifest = folder, manifest
        self.dtype = torch.uint16 if manifest.vocab_size <= 2**16 and not manifest.is_chat else torch.int32
        # With a `TokensLoader`, litdata counts `chunk_size` in tokens, not in items.
        self._writer = BinaryWriter(str(folder), chunk_size=chunk_tokens, item_loader=TokensLoader(manifest.page))
        self._buffer: list[int] = []
        self._pages = 0
        self._tokens = 0

    def add(self, tokens: list[int]) -> None:
        """Append one document, its end token included."""
        self._buffer += tokens
        self._tokens += len(tokens)
        self.manifest.documents += 1
        page = self.manifest.page
        full = len(self._buffer) // page
        for i in range(full):
            self._write(self._buffer[i * page : (i + 1) * page])
        del self._buffer[: full * page]

    def close(self) -> SourceManifest:
        """Write the last page, the litdata index and the manifest; return the manifest."""
        page = self.manifest.page
        if self._buffer:
            self._write(self._buffer + [self.manifest.eos_id] * (page - len(self._buffer)))
        if self._pages:
            self._writer.done()
            self._writer.merge(1)
            tokens_left = self._tokens
            for chunk in read_json(self.folder / INDEX)["chunks"]:
                path = self.folder / chunk["filename"]
                tokens = min(tokens_left, chunk["dim"])
                self.manifest.chunks.append(
                    {"filename": path.name, "tokens": tokens, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
                )
                tokens_left -= tokens
            assert tokens_left == 0
        self.manifest.write(self.folder)
        return self.manifest

    def _write(self, page: list[int]) -> None:
        self._writer.add_item(self._pages, torch.tensor(page, dtype=self.dtype))
        self._pages += 1


class SampleWriter(SourceWriter):
    """Writes samples of marked tokens (nb_lightning/token_source.py) into the folder of one split."""

    def __init__(self, folder: Path, manifest: SourceManifest, chunk_tokens: int = CHUNK_TOKENS) -> None:
        assert manifest.is_chat and manifest.vocab_size <= TRAINED
        super().__init__(folder, manifest, chunk_tokens)
        self._samples: list[tuple[int, int]] = []

    def add(self, tokens: list[int]) -> None:
        """Append the marked tokens of one sample, of which at least one is trained on."""
        trained = [place for place, token in enumerate(tokens) if token & TRAINED]
        self.manifest.trained += len(trained)
        self._samples.append((len(tokens), trained[0]))
        super().add(tokens)

    def close(self) -> SourceManifest:
        self.manifest.samples = _write_samples(self.folder, np.array(self._samples, dtype=np.int32).reshape(-1, 2))
        return super().close()


def _write_samples(folder: Path, samples: np.ndarray) -> dict[str, Any]:
    path = folder / SAMPLES
    with atomic_write(path) as file:
        np.save(file, samples)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def merge_parts(parts: list[Path], folder: Path) -> SourceManifest:
    """Move the chunks of finished splits into `folder`, under one index and one manifest.

    An interrupted merge can be repeated over the same parts, because a chunk's new name depends on its position alone.
    The manifest is written last.

    Args:
        parts: folders of one split each, in order.

    Raises:
        ValueError: a chunk is neither in its part nor, from an earlier attempt, in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged: SourceManifest | None = None
    chunks: list[dict[str, Any]] = []
    config: dict[str, Any] | None = None
    for number, part in enumerate(parts):
        manifest = SourceManifest.read(str(part))
        if merged is None:
            merged = replace(manifest, documents=0, chunks=[], dropped={}, trained=0, samples=None, spelled=0)
        made_by = [(m.tokenizer, m.template, m.page) for m in (merged, manifest)]
        assert made_by[0] == made_by[1], part
        merged.documents += manifest.documents
        merged.trained += manifest.trained
        merged.spelled += manifest.spelled
        for reason, count in manifest.dropped.items():
            merged.dropped[reason] = merged.dropped.get(reason, 0) + count
        if not manifest.chunks:
            continue
        index = read_json(part / INDEX)
        config = config or index["config"]
        for chunk, entry in zip(index["chunks"], manifest.chunks):
            name = f"chunk-{number}-{len(chunks)}.bin"
            old, new = part / chunk["filename"], folder / name
            if old.exists():
                shutil.move(old, new)  # a rename, or between file systems a copy that ends with removing `old`
            elif not (new.exists() and new.stat().st_size == entry["bytes"]):
                raise ValueError(f"data chunk {old} is missing; delete {part.parent} and prepare the source again")
            chunks.append({**chunk, "filename": name})
            merged.chunks.append({**entry, "filename": name})
    assert merged is not None, "nothing to merge"
    if merged.is_chat:
        merged.samples = _write_samples(folder, np.concatenate([np.load(part / SAMPLES) for part in parts]))
    # litdata caches streamed chunks until `updated_at` changes: another source at this address must change it.
    write_json(folder / INDEX, {"chunks": chunks, "config": config, "updated_at": merged.digest})
    merged.write(folder)
    return merged


def require_source_or_nothing(folder: Path) -> None:
    """Raise `ValueError` if the splits in `folder` hold anything but a source, complete or unfinished."""
    for split in (folder / name for name in SPLITS):
        for path in split.iterdir() if split.exists() else ():
            if not _OF_A_SPLIT.fullmatch(path.name) or path.is_dir():
                raise ValueError(f"{split} holds {path.name}, which is no part of a source; name another folder")


def remove_source(folder: Path) -> None:
    """Delete the splits in `folder`, complete or unfinished, and nothing else.

    The manifests go first, so that a half-deleted source never looks complete.

    Raises:
        ValueError: the splits hold other files.
    """
    require_source_or_nothing(folder)
    for name in SPLITS:
        (folder / name / MANIFEST).unlink(missing_ok=True)
    for name in SPLITS:
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def is_source(output: str) -> bool:
    """Tell whether both splits at `output`, local or s3://, are complete.

    Raises:
        ValueError: a remote output cannot be reached.
    """
    paths = [f"{output}/{name}/{MANIFEST}" for name in SPLITS]
    if "://" not in output:
        return all(Path(path).is_file() for path in paths)
    try:
        return all(map(_get_fs_provider(output).exists, paths))
    except Exception as error:  # each cloud's library raises other classes
        raise ValueError(f"{output} cannot be reached: {error}") from error


def upload_source(local: Path, remote: str, progress: bool = True) -> None:
    """Replace the source at `remote` by the one in `local`.

    The manifests go last, so that an unfinished upload never looks complete.

    Raises:
        ValueError: the upload failed; it may be repeated.
    """
    files = sorted((p for p in local.rglob("*") if p.is_file()), key=lambda p: (p.name == MANIFEST, p))
    try:
        provider = _get_fs_provider(remote)
        for folder in [f"{remote}/{name}" for name in SPLITS]:
            if provider.exists(f"{folder}/{MANIFEST}"):
                old = [chunk["filename"] for chunk in SourceManifest.read(folder).chunks]
                for name in (MANIFEST, *old):
                    provider.delete_file_or_directory(f"{folder}/{name}")
        for path in tqdm(files, desc="uploading", unit="file", disable=not progress):
            provider.upload_file(str(path), f"{remote}/{path.relative_to(local)}")
    except Exception as error:  # as above
        raise ValueError(f"{remote}: {error}") from error


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the lock on a folder. The folder is created for it, and removed afterwards if it is empty.

    Raises:
        ValueError: another process holds the lock, and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process is at work in {folder}; wait until it has ended") from None
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            folder.rmdir()
        os.close(lock)
