"""Tokens come back as they were written, and a chunk that changed is named."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from data.source import INDEX, MANIFEST, PAGE, Source, SourceManifest, SourceWriter, merge_parts


def write(folder: Path, documents: list[list[int]], vocab_size: int = 260) -> SourceManifest:
    writer = SourceWriter(folder, SourceManifest("t", vocab_size, 0), chunk_tokens=3 * PAGE)
    for document in documents:
        writer.add(document)
    return writer.close()


def documents(seed: int, count: int, vocab_size: int = 260) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 900))] for _ in range(count)]


def everything(source: Source) -> np.ndarray:
    return np.concatenate([source.read(c, 0, int(n)) for c, n in enumerate(source.chunk_tokens)])


@pytest.mark.parametrize("vocab_size, width", [(260, 2), (2**16, 2), (2**16 + 1, 4), (166144, 4)])
def test_round_trip_through_parts(tmp_path: Path, vocab_size: int, width: int) -> None:
    parts = [documents(seed, 40, vocab_size) for seed in range(3)]
    for number, part in enumerate(parts):
        write(tmp_path / f"part{number}", part, vocab_size)
    merged = merge_parts([tmp_path / f"part{number}" for number in range(3)], tmp_path / "train")
    flat = [token for part in parts for document in part for token in document]
    source = Source(str(tmp_path / "train"))
    assert merged.tokens == source.tokens == len(flat) and merged.documents == 120
    assert (everything(source) == flat).all()
    assert merged.chunks[0]["bytes"] == 4 * (3 + 2) + 3 * PAGE * width  # litdata's header, then the pages
    rng = random.Random(0)
    for _ in range(100):
        chunk = rng.randrange(len(source.chunk_tokens))
        start = rng.randrange(int(source.chunk_tokens[chunk]))
        n = rng.randint(1, int(source.chunk_tokens[chunk]) - start)
        offset = int(source.chunk_tokens[:chunk].sum()) + start
        assert (source.read(chunk, start, n) == flat[offset : offset + n]).all()


def test_a_merge_may_be_interrupted_and_run_again(tmp_path: Path) -> None:
    parts = [tmp_path / f"part{number}" for number in range(3)]
    for number, part in enumerate(parts):
        write(part, documents(number, 30))
    expected = np.concatenate([everything(Source(str(part))) for part in parts])
    merge_parts(parts, tmp_path / "train")
    (tmp_path / "train" / MANIFEST).unlink()  # as if stopped before the last write ...
    moved = tmp_path / "train" / "chunk-2-6.bin"
    back = next(iter(SourceManifest.read(str(parts[2])).chunks))["filename"]
    if moved.exists():
        moved.rename(parts[2] / back)  # ... and before some moves
    merge_parts(parts, tmp_path / "train")
    assert (everything(Source(str(tmp_path / "train"))) == expected).all()


def test_a_source_travels_to_a_worker(tmp_path: Path) -> None:
    write(tmp_path, documents(0, 20))
    source = Source(str(tmp_path))
    expected = everything(source)
    assert (everything(pickle.loads(pickle.dumps(source))) == expected).all()


def chunk_of(tmp_path: Path) -> Path:
    write(tmp_path, documents(0, 30))
    return sorted(tmp_path.glob("chunk-*.bin"))[1]


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path)
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=f"{chunk.name} is damaged"):
        everything(Source(str(tmp_path)))
    everything(Source(str(tmp_path), verify=False))  # the knob really is what finds it


def test_two_swapped_chunks_are_named(tmp_path: Path) -> None:
    second = chunk_of(tmp_path)
    first = sorted(tmp_path.glob("chunk-*.bin"))[0]
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    with pytest.raises(ValueError, match=f"{first.name} is damaged"):
        everything(Source(str(tmp_path)))


def test_a_truncated_chunk_is_named(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path)
    chunk.write_bytes(chunk.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{chunk.name} has .* bytes, not"):
        everything(Source(str(tmp_path)))


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    chunk = chunk_of(tmp_path)
    chunk.unlink()
    with pytest.raises(ValueError, match=f"{chunk.name} is missing"):
        everything(Source(str(tmp_path)))


def test_a_missing_or_damaged_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source.json is missing; make it with python -m data.prepare"):
        Source(str(tmp_path))
    write(tmp_path, documents(0, 2))
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"source.json is damaged"):
        Source(str(tmp_path))
    assert (tmp_path / INDEX).is_file()
