"""The cache of reference log-probabilities: what comes back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nb_lightning.stages.reference_cache import (
    ReferenceKey,
    StaleCache,
    read_reference,
    write_reference,
)

KEY = ReferenceKey(data="d1", model="m1", template="t1")
VALUES = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "reference.safetensors"
    write_reference(path, VALUES, KEY)
    return path


def test_what_was_written_comes_back(cache: Path) -> None:
    assert torch.equal(read_reference(cache, KEY, 5), VALUES)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    write_reference(cache, VALUES + 1, KEY)
    assert torch.equal(read_reference(cache, KEY, 5), VALUES + 1)


@pytest.mark.parametrize("part", ["data", "model", "template"])
def test_a_stale_cache_is_refused_and_the_error_says_what_changed(cache: Path, part: str) -> None:
    with pytest.raises(StaleCache, match=f"computed with another {part} than this run has; delete the file"):
        read_reference(cache, replace(KEY, **{part: "other"}), 5)


def test_all_that_changed_is_named(cache: Path) -> None:
    with pytest.raises(StaleCache, match="another data and another template than"):
        read_reference(cache, replace(KEY, data="x", template="y"), 5)


def test_another_number_of_pairs_is_refused(cache: Path) -> None:
    with pytest.raises(StaleCache, match="holds 5 pairs, the data 6"):
        read_reference(cache, KEY, 6)


def test_a_flipped_bit_a_cut_file_and_another_file_are_refused(cache: Path) -> None:
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StaleCache, match="damaged: its numbers are not those that were written"):
        read_reference(cache, KEY, 5)
    for content in (whole[:-3], b"", b"not safetensors at all"):
        cache.write_bytes(content)
        with pytest.raises(StaleCache, match="not a reference cache or is damaged"):
            read_reference(cache, KEY, 5)


def test_no_cache_is_another_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_reference(tmp_path / "none", KEY, 5)
