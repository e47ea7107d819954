"""Read a tokenized source from disk or S3: litdata chunks, each with a hash, readable from any token.

    <source>/<split>/index.json     litdata's index; the splits are train and val
                     chunk-*.bin    litdata chunks of fixed pages of `PAGE` tokens
                     source.json    exact token counts and the SHA-256 of every chunk (`SourceManifest`)
                     samples.npy    for conversations: the length of each

Conversations are stored as marked tokens. A marked token is a token id of at most 30 bits with the bit `TRAINED` set
if the token is trained on: `marked & TRAINED` tells, `marked & (TRAINED - 1)` is the id.

litdata reads, streams (s3://) and caches the pages. Only the last page of a chunk may be partly filled; its true length
is in the manifest, so no token is dropped. litdata does not notice a flipped bit, so `Source` checks the hash of each
chunk when it first opens it, and names the file. data/prepare/source_writer.py writes sources.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset, TokensLoader
from litdata.streaming.fs_provider import _get_fs_provider

from nb_lightning.files import sha256_of, write_json

PAGE = 1024  # tokens
MANIFEST = "source.json"
INDEX = "index.json"
SPLITS = ("train", "val")
SAMPLES = "samples.npy"
TRAINED = 1 << 30  # the bit of a marked token


@dataclass
class SourceManifest:
    """The content of `source.json`.

    Attributes:
        chunks: {filename, tokens, bytes, sha256} of each chunk.
        spelled: number of documents that spell a special token, which is text in them; only written if there are any.
        template: digest of the chat template; only conversations have one, and the following attributes.
        trained: number of tokens to train on.
        template_kwargs: variables of the template in all conversations; only written if there are any.
        samples: {bytes, sha256} of the file `SAMPLES`.
        pairs: the samples are the chosen and the rejected response of one pair after the other.
    """

    tokenizer: str  # digest of the tokenizer
    vocab_size: int
    eos_id: int
    documents: int = 0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> records left out
    page: int = PAGE
    template: str | None = None
    trained: int = 0
    samples: dict[str, Any] | None = None
    pairs: bool = False
    spelled: int = 0
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the source holds conversations."""
        return self.template is not None

    @property
    def tokens(self) -> int:
        return sum(chunk["tokens"] for chunk in self.chunks)

    @property
    def digest(self) -> str:
        """A hash over the hashes of all files, in order: the identity of this data."""
        files = [*self.chunks, *([self.samples] if self.samples else [])]
        return hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        content = asdict(self)
        for name in ("spelled", "template_kwargs"):
            if not content[name]:
                del content[name]
        write_json(folder / MANIFEST, content)

    @classmethod
    def read(cls, folder: str) -> SourceManifest:
        """Read `source.json` in the folder of a split, local or s3://.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = f"{folder}/{MANIFEST}"
        try:
            with _local(folder, MANIFEST) as file:
                return cls(**json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise ValueError(
                f"no tokenized data at {folder}: {path} is missing; make it with python -m data.prepare"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


class Source:
    """The tokens of a split, readable from any position. Files are opened lazily, so loader workers may get a copy.

    Args:
        folder: the split's folder, local or s3://.
        verify: check the hash of each chunk when it is first read, in each process.

    Raises:
        ValueError: on reading, a chunk is truncated, missing, cannot be streamed, or differs from its recorded hash.
    """

    def __init__(self, folder: str, verify: bool = True) -> None:
        self.folder, self.verify = folder, verify
        self.manifest = SourceManifest.read(folder)
        self.chunk_tokens = np.array([chunk["tokens"] for chunk in self.manifest.chunks], dtype=np.int64)
        self._ends = np.cumsum(self.chunk_tokens)
        pages = -(-self.chunk_tokens // self.manifest.page)
        self._first_page = np.concatenate([[0], np.cumsum(pages)]).tolist()
        self._dataset: StreamingDataset | None = None
        self._checked: set[int] = set()

    @property
    def tokens(self) -> int:
        return int(self.chunk_tokens.sum())

    def samples(self) -> np.ndarray:
        """Read the lengths of the conversations, which follow one another in the order of the chunks.

        Returns:
            [n, 2] int32: tokens of each conversation, and the index in it of the first token to train on.

        Raises:
            ValueError: the file is missing or damaged.
        """
        assert self.manifest.samples is not None, self.folder
        name = f"{self.folder}/{SAMPLES}"
        try:
            with _local(self.folder, SAMPLES) as path:
                if self.verify and sha256_of(path) != self.manifest.samples["sha256"]:
                    raise ValueError(f"its SHA-256 differs from {MANIFEST}")
                return np.load(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is missing or damaged ({error}); prepare the source again") from error

    def read_on(self, start: int, n: int) -> np.ndarray:
        """Read [n] int64 tokens (of conversations: marked tokens) from token `start` on, counted over all chunks."""
        pieces = []
        while n > 0:
            chunk = int(np.searchsorted(self._ends, start, side="right"))
            take = min(n, int(self._ends[chunk]) - start)
            pieces.append(self.read(chunk, start - int(self._ends[chunk] - self.chunk_tokens[chunk]), take))
            start, n = start + take, n - take
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def read(self, chunk: int, start: int, n: int) -> np.ndarray:
        """Read [n] int64 tokens of one chunk from its token `start` on; all must lie inside the chunk."""
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
        if chunk not in self._checked and "://" not in self.folder:
            self._check(chunk, Path(self.folder, self.manifest.chunks[chunk]["filename"]))
        try:
            tokens = self._dataset[self._first_page[chunk] + page].numpy()
        except Exception as error:  # litdata's threads, its storage clients and the network raise many classes
            name = f"{self.folder}/{self.manifest.chunks[chunk]['filename']}"
            raise ValueError(f"data chunk {name} cannot be read: {error}") from error
        if chunk not in self._checked:  # streamed: the read above has put it into litdata's cache
            assert self._dataset.cache is not None  # made by the read above
            self._check(chunk, Path(self._dataset.cache.cache_dir, self.manifest.chunks[chunk]["filename"]))
        return tokens

    def _check(self, chunk: int, path: Path) -> None:
        """Raise ValueError unless size and hash of the chunk's file are as recorded."""
        entry = self.manifest.chunks[chunk]
        name = f"{self.folder}/{entry['filename']}"
        if not path.is_file():
            raise ValueError(f"data chunk {name} is missing; prepare the source again")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"data chunk {name} has {path.stat().st_size} bytes, not {entry['bytes']}; prepare the source again"
            )
        if self.verify and sha256_of(path) != entry["sha256"]:
            raise ValueError(
                f"data chunk {name} is damaged (its SHA-256 differs from {MANIFEST}); prepare the source again"
            )
        self._checked.add(chunk)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None, "_checked": set()}


@contextmanager
def _local(folder: str, name: str) -> Iterator[Path]:
    """Yield a local path to the file `name` of a folder; from s3:// it is downloaded to a temporary file."""
    if "://" not in folder:
        yield Path(folder, name)
        return
    provider = _get_fs_provider(folder)
    if not provider.exists(f"{folder}/{name}"):
        raise FileNotFoundError(f"{folder}/{name}")
    with tempfile.TemporaryDirectory() as local:
        provider.download_file(f"{folder}/{name}", f"{local}/{name}")
        yield Path(local, name)
