"""A tokenized source on disk: litdata chunks that can be read from any token, each with a hash.

    <source>/<split>/index.json     litdata's index; the splits are train and val
                     chunk-*.bin    litdata chunks of fixed pages of `PAGE` tokens
                     source.json    exact token counts and the SHA-256 of every chunk (`SourceManifest`)

litdata reads, streams (s3://) and caches the pages. Only a chunk's last page may be part full; its true length is in
the manifest, so no token is ever dropped. litdata itself does not notice a flipped bit: `Source` checks a chunk's hash
when it is first opened and names the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataset, TokensLoader
from litdata.streaming.fs_provider import _get_fs_provider
from litdata.streaming.writer import BinaryWriter
from tqdm import tqdm

PAGE = 1024
CHUNK_TOKENS = 2**24  # 32 MiB of uint16, 64 MiB of int32
MANIFEST = "source.json"
INDEX = "index.json"
SPLITS = ("train", "val")
_OF_A_SPLIT = re.compile(r"chunk-.*\.bin|.*index\.json|source\.json|\..*\.json\.tmp")


@dataclass
class SourceManifest:
    """What `source.json` holds. `chunks` has one {filename, tokens, bytes, sha256} for each chunk."""

    tokenizer: str  # digest of the tokenizer
    vocab_size: int
    eos_id: int
    documents: int = 0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> records left out
    page: int = PAGE

    @property
    def tokens(self) -> int:
        return sum(chunk["tokens"] for chunk in self.chunks)

    @property
    def digest(self) -> str:
        """One hash over the hashes of all chunks, in order: the identity of this data."""
        return hashlib.sha256("".join(chunk["sha256"] for chunk in self.chunks).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: str) -> SourceManifest:
        """Read `source.json` of a split, local or s3://.

        Raises:
            ValueError: it is missing or is not a manifest.
        """
        path = f"{folder}/{MANIFEST}"
        try:
            if "://" in folder:
                provider = _get_fs_provider(folder)
                if not provider.exists(path):
                    raise FileNotFoundError(path)
                with tempfile.TemporaryDirectory() as local:
                    provider.download_file(path, f"{local}/{MANIFEST}")
                    fields = json.loads(Path(local, MANIFEST).read_text())
            else:
                fields = json.loads(Path(path).read_text())
            return cls(**fields)
        except FileNotFoundError as error:
            raise ValueError(
                f"no tokenized data at {folder}: {path} is missing; make it with python -m data.prepare"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


class SourceWriter:
    """Write documents into one folder of pages; several folders may be merged later (`merge_parts`).

    The folder is complete once `close` returned; what an interrupted writer leaves behind has no manifest.
    """

    def __init__(self, folder: Path, manifest: SourceManifest, chunk_tokens: int = CHUNK_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.manifest = folder, manifest
        self.dtype = torch.uint16 if manifest.vocab_size <= 2**16 else torch.int32
        # For tokens, litdata counts `chunk_size` in tokens, not in items.
        self._writer = BinaryWriter(str(folder), chunk_size=chunk_tokens, item_loader=TokensLoader(manifest.page))
        self._buffer: list[int] = []
        self._pages = 0
        self._tokens = 0

    def add(self, ids: list[int]) -> None:
        """Append one document, its end token included."""
        self._buffer += ids
        self._tokens += len(ids)
        self.manifest.documents += 1
        page = self.manifest.page
        full = len(self._buffer) // page
        for i in range(full):
            self._write(self._buffer[i * page : (i + 1) * page])
        del self._buffer[: full * page]

    def close(self) -> SourceManifest:
        """Write what is left, the litdata index and the manifest; returns the manifest."""
        page = self.manifest.page
        if self._buffer:
            self._write(self._buffer + [self.manifest.eos_id] * (page - len(self._buffer)))
        if self._pages:
            self._writer.done()
            self._writer.merge(1)
            left = self._tokens
            for chunk in json.loads((self.folder / INDEX).read_text())["chunks"]:
                path = self.folder / chunk["filename"]
                held = min(left, chunk["dim"])
                self.manifest.chunks.append(
                    {"filename": path.name, "tokens": held, "bytes": path.stat().st_size, "sha256": sha256(path)}
                )
                left -= held
            assert left == 0
        self.manifest.write(self.folder)
        return self.manifest

    def _write(self, page: list[int]) -> None:
        self._writer.add_item(self._pages, torch.tensor(page, dtype=self.dtype))
        self._pages += 1


def merge_parts(parts: list[Path], folder: Path) -> SourceManifest:
    """Move the chunks of finished part folders into `folder` under one index and one manifest.

    Repeatable: a chunk's new name depends on its place alone, so a merge that was interrupted anywhere can be run
    again over the same parts. The manifest is written last.

    Raises:
        ValueError: a chunk that is neither in its part nor, from an earlier attempt, in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged: SourceManifest | None = None
    chunks: list[dict[str, Any]] = []
    config: dict[str, Any] | None = None
    for number, part in enumerate(parts):
        manifest = SourceManifest.read(str(part))
        if merged is None:
            merged = SourceManifest(manifest.tokenizer, manifest.vocab_size, manifest.eos_id, page=manifest.page)
        assert (merged.tokenizer, merged.page) == (manifest.tokenizer, manifest.page), part
        merged.documents += manifest.documents
        for reason, count in manifest.dropped.items():
            merged.dropped[reason] = merged.dropped.get(reason, 0) + count
        if not manifest.chunks:
            continue
        index = json.loads((part / INDEX).read_text())
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
    # litdata keeps what it streamed until `updated_at` changes: another source under the same address has another one.
    write_json(folder / INDEX, {"chunks": chunks, "config": config, "updated_at": merged.digest})
    merged.write(folder)
    return merged


def require_source_or_nothing(folder: Path) -> None:
    """Raise `ValueError` if the splits in `folder` hold anything but a source, whole or half-made."""
    for split in (folder / name for name in SPLITS):
        for path in split.iterdir() if split.exists() else ():
            if not _OF_A_SPLIT.fullmatch(path.name) or path.is_dir():
                raise ValueError(f"{split} holds {path.name}, which is no part of a source; name another folder")


def remove_source(folder: Path) -> None:
    """Delete the splits in `folder`, whole or half-made, and nothing else. Manifests first: no half looks whole.

    Raises:
        ValueError: the splits hold anything else.
    """
    require_source_or_nothing(folder)
    for name in SPLITS:
        (folder / name / MANIFEST).unlink(missing_ok=True)
    for name in SPLITS:
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def is_source(output: str) -> bool:
    """Whether both splits at `output`, local or s3://, are complete.

    Raises:
        ValueError: a remote place that cannot be reached.
    """
    paths = [f"{output}/{name}/{MANIFEST}" for name in SPLITS]
    if "://" not in output:
        return all(Path(path).is_file() for path in paths)
    try:
        return all(map(_get_fs_provider(output).exists, paths))
    except Exception as error:  # each cloud's library has classes of its own
        raise ValueError(f"{output} cannot be reached: {error}") from error


def upload_source(local: Path, remote: str, progress: bool = True) -> None:
    """Replace what is at `remote` by `local`; the manifests last, so that a source is there only when it is whole.

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


class Source:
    """Read any run of tokens of a split. Opens lazily, so it may be sent to loader workers.

    Args:
        folder: the split's folder, local or s3://.
        verify: check the hash of each chunk when it is first read, in each process.

    Raises:
        ValueError: on reading a chunk that is truncated, missing, cannot be streamed or differs from its recorded hash.
    """

    def __init__(self, folder: str, verify: bool = True) -> None:
        self.folder, self.verify = folder, verify
        self.manifest = SourceManifest.read(folder)
        self.chunk_tokens = np.array([chunk["tokens"] for chunk in self.manifest.chunks], dtype=np.int64)
        pages = -(-self.chunk_tokens // self.manifest.page)
        self._first_page = np.concatenate([[0], np.cumsum(pages)]).tolist()
        self._dataset: StreamingDataset | None = None
        self._opened: set[int] = set()

    @property
    def tokens(self) -> int:
        return int(self.chunk_tokens.sum())

    def read(self, chunk: int, start: int, n: int) -> np.ndarray:
        """`n` tokens of `chunk` from its token `start`, as int64; they must lie inside the chunk."""
        assert start + n <= self.chunk_tokens[chunk]
        page = self.manifest.page
        first, last = start // page, (start + n - 1) // page
        pages = [self._page(chunk, p) for p in range(first, last + 1)]
        tokens = pages[0] if len(pages) == 1 else np.concatenate(pages)
        offset = start - first * page
        return tokens[offset : offset + n].astype(np.int64)

    def _page(self, chunk: int, page: int) -> np.ndarray:
        if self._dataset is None:
            loader = TokensLoader(self.manifest.page)
            self._dataset = StreamingDataset(self.folder, item_loader=loader, shuffle=False, drop_last=False)
        if chunk not in self._opened and "://" not in self.folder:
            self._check(chunk, Path(self.folder, self.manifest.chunks[chunk]["filename"]))
        try:
            tokens = self._dataset[self._first_page[chunk] + page].numpy()
        except Exception as error:  # litdata's threads, its clients and the network have a class each
            name = f"{self.folder}/{self.manifest.chunks[chunk]['filename']}"
            raise ValueError(f"data chunk {name} cannot be read: {error}") from error
        if chunk not in self._opened:  # streamed: litdata has fetched it into its cache only now
            self._check(chunk, Path(self._dataset.cache.cache_dir, self.manifest.chunks[chunk]["filename"]))
        return tokens

    def _check(self, chunk: int, path: Path) -> None:
        """Raise unless the chunk's file is the one that was written."""
        entry = self.manifest.chunks[chunk]
        name = f"{self.folder}/{entry['filename']}"
        if not path.is_file():
            raise ValueError(f"data chunk {name} is missing; prepare the source again")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"data chunk {name} has {path.stat().st_size} bytes, not {entry['bytes']}; prepare the source again"
            )
        if self.verify and sha256(path) != entry["sha256"]:
            raise ValueError(
                f"data chunk {name} is damaged (its SHA-256 differs from {MANIFEST}); prepare the source again"
            )
        self._opened.add(chunk)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None, "_opened": set()}


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the lock on a folder; it is made for that, and removed again if it is left empty.

    Raises:
        ValueError: another process holds it, and not `wait`.
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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a temporary file in the same folder, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
