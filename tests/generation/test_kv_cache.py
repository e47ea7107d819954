"""A model that reads keys and values from the cache gives the logits of one that runs the whole row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nb_lightning.generation.kv_cache import MIN_CAPACITY, Decode, KVCache, Prefill
from nb_lightning.model.transformer import Transformer
from tests.model.harness import TINY, ids, random_model

CPU = torch.device("cpu")


def uncached(model: Transformer, rows: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each row by a forward of its own."""
    return [model(row[None])[0] for row in rows]


@torch.no_grad()
def cached(
    model: Transformer, cache: KVCache, rows: list[Tensor], prompts: list[int], slots: list[int]
) -> list[Tensor]:
    """The same: a prefill of the first `prompts[i]` tokens of each row, then one token at a time for all."""
    cache.reserve(max(prompts))
    cu = torch.tensor([0, *torch.tensor(prompts).cumsum(0)], dtype=torch.int32)
    packed = torch.cat([row[:n] for row, n in zip(rows, prompts)])[None]
    positions = torch.cat([torch.arange(n) for n in prompts])[None]
    first = model(packed, positions, mask=Prefill(cache, model.attention_backend, cu, slots))[0].split(prompts)
    out = [[logits] for logits in first]
    order = sorted(range(len(rows)), key=lambda i: slots[i])
    assert slots == sorted(slots) or set(slots) == set(range(len(slots)))
    for step in range(len(rows[0]) - prompts[0]):
        lengths = [prompts[i] + step for i in order]
        cache.reserve(max(lengths) + 1)
        mask = Decode(cache, lengths, CPU)
        tokens = torch.stack([rows[i][prompts[i] + step] for i in order])
        logits = model(tokens[:, None], mask.positions[:, None], mask=mask)
        for place, i in enumerate(order):
            out[i].append(logits[place])
    return [torch.cat(logits) for logits in out]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_cached_logits_are_those_of_the_whole_row(n_kv_heads: int, tie_embeddings: bool) -> None:
    model = random_model(replace(TINY, n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)).eval()
    prompts = [7, 1, 4]
    rows = [ids(1, n + 9, seed=n)[0] for n in prompts]
    with torch.no_grad():
        expected = uncached(model, rows)
    for ours, row in zip(cached(model, KVCache(5), rows, prompts, [0, 1, 2]), expected):
        torch.testing.assert_close(ours, row, atol=2e-5, rtol=1e-5)


def test_equally_long_rows_and_slots_in_another_order() -> None:
    model = random_model(TINY).eval()
    rows = [ids(1, 12, seed=n)[0] for n in range(3)]
    with torch.no_grad():
        expected = uncached(model, rows)
    for ours, row in zip(cached(model, KVCache(3), rows, [5, 5, 5], [2, 0, 1]), expected):
        torch.testing.assert_close(ours, row, atol=2e-5, rtol=1e-5)


def test_rows_grow_past_the_capacity() -> None:
    model = random_model(TINY).eval()
    cache = KVCache(2)
    rows = [ids(1, n + 3 * MIN_CAPACITY, seed=n)[0] for n in (MIN_CAPACITY - 3, 20)]
    with torch.no_grad():
        expected = uncached(model, rows)
    for ours, row in zip(cached(model, cache, rows, [MIN_CAPACITY - 3, 20], [0, 1]), expected):
        torch.testing.assert_close(ours, row, atol=5e-5, rtol=1e-5)
    assert cache.capacity == 4 * MIN_CAPACITY


def test_a_changed_rope_base_is_seen() -> None:
    model = random_model(TINY).eval()
    row = [ids(1, 12)[0]]
    before = cached(model, KVCache(1), row, [4], [0])[0]
    model.rope.theta = 70e6
    with torch.no_grad():
        expected = model(row[0][None])[0]
    after = cached(model, KVCache(1), row, [4], [0])[0]
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=1e-5)
    assert (after - before).abs().max() > 0.01


def test_what_a_slot_held_before_is_not_seen() -> None:
    """A short row in a slot where a long one was."""
    model = random_model(TINY).eval()
    cache = KVCache(1)
    long, short = [ids(1, 40, seed=1)[0]], [ids(1, 9, seed=2)[0]]
    cached(model, cache, long, [30], [0])
    with torch.no_grad():
        expected = uncached(model, short)
    torch.testing.assert_close(cached(model, cache, short, [2], [0])[0], expected[0], atol=2e-5, rtol=1e-5)


def test_room_is_made_and_kept() -> None:
    cache = KVCache(3)
    cache.reserve(1)
    assert cache.capacity == MIN_CAPACITY
    keys, values = cache.layer(0, torch.zeros(1, 2, 5, 4, dtype=torch.bfloat16))
    assert keys.shape == values.shape == (3, 2, MIN_CAPACITY, 4) and keys.dtype == torch.bfloat16
    keys.copy_(torch.randn(keys.shape))
    values.copy_(torch.randn(keys.shape))
    cache.reserve(MIN_CAPACITY)
    assert cache.keys[0] is keys
    cache.reserve(5 * MIN_CAPACITY)
    assert cache.capacity == 8 * MIN_CAPACITY
    for new, old in ((cache.keys[0], keys), (cache.values[0], values)):
        assert new.shape[2] == 8 * MIN_CAPACITY
        assert torch.equal(new[:, :, :MIN_CAPACITY], old) and not new[:, :, MIN_CAPACITY:].any()


def test_a_row_is_moved_with_all_its_layers() -> None:
    cache = KVCache(3)
    cache.reserve(10)
    for index in range(2):
        for tensor in cache.layer(index, torch.zeros(1, 2, 5, 4)):
            tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    cache.move(2, 0, 6)
    for new, old in zip((*cache.keys, *cache.values), before):
        assert torch.equal(new[0, :, :6], old[2, :, :6]) and torch.equal(new[0, :, 6:], old[0, :, 6:])
        assert torch.equal(new[1:], old[1:])
