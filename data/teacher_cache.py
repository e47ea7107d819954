"""The cached teacher: its k most likely tokens at every response token of a source of pairs, stored beside the samples.

    <source>/<split>/teacher.json      teacher, k, temperature, digest of the samples, and each file with its SHA-256
                     teacher-<n>.npy   records of k token ids and k log-probabilities: of each sample, one for every
                                       token from the first trained one on

It replaces a teacher that does not fit beside the student. `python -m data.teacher_logprobs` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.claim import changed_keys
from nb_lightning.files import atomic_write, read_json, sha256_of, write_json
from nb_lightning.token_source import Source

MANIFEST = "teacher.json"
FILE_TOKENS = 2**18  # records after which a file ends with the sample: at k = 64, 128 MiB


def record_dtype(k: int) -> np.dtype:
    """Return the dtype of a record: k token ids with log-probabilities (nats, at the temperature), descending."""
    return np.dtype([("ids", "<i4", (k,)), ("logprobs", "<f4", (k,))])


def count_records(samples: np.ndarray) -> np.ndarray:
    """Return [n] int64, the records of each sample; `samples` as `Source.samples` returns them."""
    return (samples[:, 0] - samples[:, 1]).astype(np.int64)


class TeacherCache:
    """Reads the records of a split's samples.

    Attributes:
        about: the content of teacher.json.

    Raises:
        ValueError: there are no records, some are missing, or they are of other samples than the split has; on reading,
            a file is missing or damaged.
    """

    def __init__(self, source: Source, verify: bool = True) -> None:
        self.folder, self.verify = Path(source.folder), verify
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {MANIFEST}; make it with python -m data.teacher_logprobs")
        self.about: dict[str, Any] = read_json(path)
        if self.about["source"] != source.manifest.digest:
            raise ValueError(f"{path} is of other samples than the source has now; make it again")
        counts = count_records(source.samples())
        if (self.about["files"][-1]["stop"] if self.about["files"] else 0) < len(counts):
            raise ValueError(f"{path} is not whole; run python -m data.teacher_logprobs again to go on")
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._stops = np.array([file["stop"] for file in self.about["files"]])
        self._arrays: dict[int, np.ndarray] = {}

    @property
    def digest(self) -> str:
        """Hash of all records."""
        return " ".join(file["sha256"] for file in self.about["files"])

    def read(self, sample: int) -> np.ndarray:
        """Read the records of a sample."""
        number = int(np.searchsorted(self._stops, sample, side="right"))
        first = self.about["files"][number]["start"]
        begin, end = self._starts[[sample, sample + 1]] - self._starts[first]
        return self._open(number)[begin:end]

    def _open(self, number: int) -> np.ndarray:
        if number not in self._arrays:
            entry = self.about["files"][number]
            path = self.folder / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path} is missing or cut off; delete {self.folder / MANIFEST} and make it again")
            if self.verify and sha256_of(path) != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its SHA-256 differs from {MANIFEST}; make it again")
            self._arrays[number] = np.load(path, mmap_mode="r")
        return self._arrays[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}


class CacheWriter:
    """Writes the records of a split's samples, file by file; resumes after the files that are there.

    Args:
        about: what the records depend on besides the samples: teacher, k, temperature.
        overwrite: replace records of another teacher, k, temperature or of other samples.

    Raises:
        ValueError: there are such records, and `overwrite` is False.
    """

    def __init__(self, source: Source, about: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(source.folder)
        self.samples = source.samples()
        path = self.folder / MANIFEST
        claim = {**about, "source": source.manifest.digest}
        old = read_json(path, {})
        changed = changed_keys(old, claim)
        if changed and not overwrite:
            raise ValueError(f"{path} is of another {', '.join(changed)}; replace it with --overwrite")
        resumes = bool(old) and not changed
        self.about = {**claim, "files": old["files"] if resumes else []}
        if not resumes:
            path.unlink(missing_ok=True)
            for file in self.folder.glob("teacher-*.npy"):
                file.unlink()

    def missing(self) -> Iterator[range]:
        """Yield the samples of each file that is still to be written."""
        counts = count_records(self.samples)
        start = self.about["files"][-1]["stop"] if self.about["files"] else 0
        total = 0
        for sample in range(start, len(counts)):
            total += int(counts[sample])
            if total >= FILE_TOKENS or sample == len(counts) - 1:
                yield range(start, sample + 1)
                start, total = sample + 1, 0

    def write(self, samples: range, records: np.ndarray) -> None:
        """Write the records of `samples`, the next range of `missing`, as one file."""
        assert len(records) == count_records(self.samples)[samples.start : samples.stop].sum()
        path = self.folder / f"teacher-{len(self.about['files']):06d}.npy"
        with atomic_write(path) as file:
            np.save(file, records)
        entry = {"name": path.name, "start": samples.start, "stop": samples.stop, "bytes": path.stat().st_size}
        self.about["files"].append({**entry, "sha256": sha256_of(path)})
        write_json(self.folder / MANIFEST, self.about)
