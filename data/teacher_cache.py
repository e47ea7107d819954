"""What a teacher knows of every response of a source of pairs, beside its samples: its k most likely tokens there.

    <source>/<split>/teacher.json      whose it is, k, temperature, and each file with its samples and its SHA-256
                     teacher-<n>.npy   records of k token ids and k log-probabilities, one for each token of a sample
                                       from its first trained one on

It takes the place of a teacher that does not fit beside the student. Made by `python -m data.teacher_logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nb_lightning.files import atomic_write, read_json, sha256_of, write_json
from nb_lightning.token_source import Source

MANIFEST = "teacher.json"
FILE_TOKENS = 2**18  # records of a file, about


def record(k: int) -> np.dtype:
    """Token ids, and log-probabilities in nats at the cache's temperature; most likely first."""
    return np.dtype([("ids", "<i4", (k,)), ("logprobs", "<f4", (k,))])


def records_of(samples: np.ndarray) -> np.ndarray:
    """[n] how many records each sample has; `samples` as `Source.samples` gives them."""
    return (samples[:, 0] - samples[:, 1]).astype(np.int64)


class TeacherCache:
    """Reads the records of a split's samples.

    Raises:
        ValueError: there are none, they are not whole, or of other samples than the split has; on reading, a file that
            is missing or damaged.
    """

    def __init__(self, source: Source, verify: bool = True) -> None:
        self.folder, self.verify = Path(source.folder), verify
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {MANIFEST}; make it with python -m data.teacher_logprobs")
        self.about: dict[str, Any] = read_json(path)
        if self.about["source"] != source.manifest.digest:
            raise ValueError(f"{path} is of other samples than the source has now; make it again")
        count = records_of(source.samples())
        if (self.about["files"][-1]["stop"] if self.about["files"] else 0) < len(count):
            raise ValueError(f"{path} is not whole; run python -m data.teacher_logprobs again to go on")
        self._starts = np.concatenate([[0], np.cumsum(count)])
        self._stops = np.array([file["stop"] for file in self.about["files"]])
        self._opened: dict[int, np.ndarray] = {}

    @property
    def digest(self) -> str:
        """Of all that it holds."""
        return " ".join(file["sha256"] for file in self.about["files"])

    def read(self, sample: int) -> np.ndarray:
        """The records of a sample."""
        number = int(np.searchsorted(self._stops, sample, side="right"))
        first = self.about["files"][number]["start"]
        begin, end = self._starts[[sample, sample + 1]] - self._starts[first]
        return self._open(number)[begin:end]

    def _open(self, number: int) -> np.ndarray:
        if number not in self._opened:
            entry = self.about["files"][number]
            path = self.folder / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path} is missing or cut off; delete {self.folder / MANIFEST} and make it again")
            if self.verify and sha256_of(path) != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its SHA-256 differs from {MANIFEST}; make it again")
            self._opened[number] = np.load(path, mmap_mode="r")
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


class CacheWriter:
    """Writes the records of a split's samples, file by file, going on after those that are there.

    Args:
        about: whose records: teacher, k, temperature.

    Raises:
        ValueError: there are records of something else, and not `overwrite`.
    """

    def __init__(self, source: Source, about: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(source.folder)
        self.samples = source.samples()
        self.about = {**about, "source": source.manifest.digest, "files": []}
        path = self.folder / MANIFEST
        old = read_json(path) if path.is_file() else None
        changed = [key for key in self.about if key != "files" and old is not None and old.get(key) != self.about[key]]
        if changed and not overwrite:
            raise ValueError(f"{path} is of another {', '.join(changed)}; replace it with --overwrite")
        if old is not None and not changed:
            self.about["files"] = old["files"]
        else:
            path.unlink(missing_ok=True)
            for file in self.folder.glob("teacher-*.npy"):
                file.unlink()

    def left(self) -> Iterator[range]:
        """The samples of each file that is still to be written."""
        count = records_of(self.samples)
        start = self.about["files"][-1]["stop"] if self.about["files"] else 0
        total = 0
        for sample in range(start, len(count)):
            total += int(count[sample])
            if total >= FILE_TOKENS or sample == len(count) - 1:
                yield range(start, sample + 1)
                start, total = sample + 1, 0

    def write(self, samples: range, records: np.ndarray) -> None:
        """Keep the records of `samples`, the next ones of `left`."""
        assert len(records) == records_of(self.samples)[samples.start : samples.stop].sum()
        path = self.folder / f"teacher-{len(self.about['files']):06d}.npy"
        with atomic_write(path) as file:
            np.save(file, records)
        entry = {"name": path.name, "start": samples.start, "stop": samples.stop, "bytes": path.stat().st_size}
        self.about["files"].append({**entry, "sha256": sha256_of(path)})
        write_json(self.folder / MANIFEST, self.about)
