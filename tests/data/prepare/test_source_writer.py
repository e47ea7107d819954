"""Tokens come back as they were written, and a chunk that changed is named."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from data.prepare.source_writer import SourceWriter, is_source, locked, merge_parts, remove_source, upload_source
from nb_lightning.token_source import INDEX, MANIFEST, PAGE, Source, SourceManifest
from tests.data.prepare.harness import everything, s3_server


def write(folder: Path, documents: list[list[int]], vocab_size: int = 260) -> SourceManifest:
    writer = SourceWriter(folder, SourceManifest("t", vocab_size, 0), chunk_tokens=3 * PAGE)
    for document in documents:
        writer.add(document)
    return writer.close()


def documents(seed: int, count: int, vocab_size: int = 260) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 900))] for _ in range(count)]


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


def interrupted(steps: Iterator[int], real: Callable[[Path, Path], object], old: Path, new: Path) -> None:
    if next(steps, None) is None:
        raise KeyboardInterrupt
    real(old, new)


def test_a_merge_may_be_interrupted_anywhere_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    for number in range(3):
        write(made / f"part{number}", documents(number, 30))

    def copy_of_parts(name: str) -> list[Path]:
        shutil.copytree(made, tmp_path / name)
        return [tmp_path / name / f"part{number}" for number in range(3)]

    expected = merge_parts(copy_of_parts("unbroken"), tmp_path / "unbroken" / "train")
    assert len(expected.chunks) > 6
    for stop in range(len(expected.chunks) + 2):  # at each move, at the index, at the manifest
        parts, train = copy_of_parts(f"stopped{stop}"), tmp_path / f"stopped{stop}" / "train"
        steps = iter(range(stop))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "move", partial(interrupted, steps, shutil.move))
            patch.setattr(os, "replace", partial(interrupted, steps, os.replace))
            merge_parts(parts, train)
        assert not (train / MANIFEST).exists()
        assert merge_parts(parts, train) == merge_parts(parts, train) == expected
        assert (everything(Source(str(train))) == everything(Source(str(tmp_path / "unbroken" / "train")))).all()
        assert (train / INDEX).read_bytes() == (tmp_path / "unbroken" / "train" / INDEX).read_bytes()


def test_a_merge_without_a_chunk_says_so(tmp_path: Path) -> None:
    write(tmp_path / "part", documents(0, 30))
    next((tmp_path / "part").glob("chunk-*.bin")).unlink()
    with pytest.raises(ValueError, match=r"part/chunk-.*.bin is missing; delete .* and prepare the source again"):
        merge_parts([tmp_path / "part"], tmp_path / "train")


def test_only_what_belongs_to_a_source_is_deleted(tmp_path: Path) -> None:
    write(tmp_path / "train", documents(0, 30))
    (tmp_path / "val").mkdir()  # half-made
    (tmp_path / "val" / "chunk-0-0.bin").touch()
    (tmp_path / "notes.txt").touch()
    remove_source(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write(tmp_path / "train", documents(0, 30))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "thesis.pdf").touch()
    with pytest.raises(ValueError, match=r"val holds thesis.pdf, which is no part of a source"):
        remove_source(tmp_path)
    assert (tmp_path / "train" / MANIFEST).exists() and (tmp_path / "val" / "thesis.pdf").exists()


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    folder = tmp_path / "staging"
    with locked(folder, wait=False):
        with pytest.raises(ValueError, match="another process is at work in"), locked(folder, wait=False):
            pass
    assert not folder.exists()  # made for the lock, and nothing was put into it


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


@pytest.mark.slow
def test_s3_with_another_source_under_the_same_address(tmp_path: Path) -> None:
    """What was streamed before is not taken for the new, and of the old nothing is left."""
    with s3_server(tmp_path / "cache") as client:
        client.create_bucket(Bucket="corpus")
        with pytest.raises(ValueError, match=r"no tokenized data at s3://corpus/web/train: .*/source.json is missing"):
            Source("s3://corpus/web/train")
        for seed, count in ((0, 30), (1, 12)):
            local = tmp_path / f"local{seed}"
            for split in ("train", "val"):
                write(local / "parts" / split, documents(seed, count))
                manifest = merge_parts([local / "parts" / split], local / "whole" / split)
            assert is_source("s3://corpus/web") == (seed == 1)
            upload_source(local / "whole", "s3://corpus/web", progress=False)
            there, here = Source("s3://corpus/web/val"), Source(f"{local}/whole/val")
            assert there.manifest == here.manifest and (everything(there) == everything(here)).all()
        keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="corpus")["Contents"]}
        files = [path for path in (local / "whole").rglob("*") if path.is_file()]
        assert keys == {f"web/{path.relative_to(local / 'whole')}" for path in files}
        shutil.rmtree(tmp_path / "cache")
        lost = f"web/val/{manifest.chunks[1]['filename']}"
        client.delete_object(Bucket="corpus", Key=lost)
        with pytest.raises(ValueError, match=f"data chunk s3://corpus/{lost} cannot be read"):
            everything(Source("s3://corpus/web/val"))
