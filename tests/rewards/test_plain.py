"""Values across the border of the sandbox."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import pytest

from nb_lightning.rewards.sandbox.jail.plain import DEPTH, decode, encode, from_json, same, show

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 10**5000, 0.0, -0.0, 1.5, 1e300, math.inf, -math.inf, 1 + 2j, b"", b"\x00\xff", "",
    "a", "\ud800",
    [], [1, [2, [3]]], (), (1,), (1, (2,)), set(), {1, "a", None}, frozenset({frozenset({1}), frozenset({2})}), {},
    {"a": 1, "b": [2]}, {1: 2, (1, 2): {3}, None: True, frozenset({1}): 0}, [{"a": (1, {2})}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30] if value != 10**5000 else "large")
def test_a_value_survives_encoding(value: Any) -> None:
    wire = json.loads(json.dumps(encode(value)))
    back = decode(wire)
    assert type(back) is type(value) and back == value
    assert same(encode(value), wire)


@pytest.mark.parametrize("i", range(len(VALUES)))
def test_a_value_equals_no_other(i: int) -> None:
    equal = [j for j in range(len(VALUES)) if same(encode(VALUES[i]), encode(VALUES[j]))]
    assert equal in ([i], [7, 8])  # 0.0 and -0.0 are one number


class Sub(int):
    pass


@pytest.mark.parametrize(
    "value", [Sub(1), type("T", (str,), {})("a"), Counter("a"), OrderedDict(), object(), int, iter([]), [Sub(1)],
              {Sub(1): 1}, {1: Sub(1)}, range(3), len, ..., bytearray(b"a")]
)  # fmt: skip
def test_only_exact_built_in_types_are_encoded(value: Any) -> None:
    with pytest.raises(TypeError, match="a value of type"):
        encode(value)


def test_deep_nesting_is_refused() -> None:
    value: Any = []
    for _ in range(DEPTH - 1):
        value = [value]
    assert same(encode(value), encode(value))
    with pytest.raises(ValueError, match="nested more than"):
        encode([value])
    value.append(value)
    with pytest.raises(ValueError, match="nested more than"):
        encode(value)


@pytest.mark.parametrize(
    "a, b, tolerance, equal",
    [
        (1, 1.0, None, False), (1, 1.0, 0, True), (1, True, 0, False), (0.1 + 0.2, 0.3, None, False),
        (0.1 + 0.2, 0.3, 1e-9, True), (100.0, 101.0, 1e-3, False), (100.0, 100.05, 1e-3, True), (0.0, 1e-4, 1e-3, True),
        (math.nan, math.nan, None, True), (math.nan, math.nan, 1e-3, True), (math.nan, 1.0, 1e-3, False),
        (math.inf, math.inf, 1e-3, True), (math.inf, -math.inf, 1e-3, False), (math.inf, 1e308, 1e-3, False),
        (10**400, 10**400, 1e-3, True), (10**400, 10**400 + 1, 1e-3, False), (10**400, math.inf, 1e-3, False),
        ([1, 2.0], [1.0, 2], 0, True), ({"a": 1}, {"a": 1.0}, 0, True), ({1: 1}, {1.0: 1}, 0, False),
        ({1}, {1.0}, 0, False), ("1", 1, 0, False), ([1], (1,), 0, False), (1, 1 + 0j, 0, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None, True), ({"a": 1}, {"a": 1, "b": 2}, None, False),
        ({frozenset({1, 2}): 1}, {frozenset({2, 1}): 1}, None, True), ([1, 2], [1], None, False), ([], {}, None, False),
    ],
)  # fmt: skip
def test_same_compares_types_and_values(a: Any, b: Any, tolerance: float | None, equal: bool) -> None:
    assert same(encode(a), encode(b), tolerance) is equal
    assert same(encode(b), encode(a), tolerance) is equal


HOSTILE = [
    [], [[]], ["i"], ["i", 6], ["i", "x"], ["i", "0x6", 1], ["f", "x"], ["f", None], ["set"], ["set", ["i", "0x6"]],
    ["dict", 1],
    ["dict", [1]], ["dict", [1, 2, 3]], ["dict", {}], {}, {"i": "0x6"}, 6, 6.0, "6", True, None, ["?", 1], [None],
    [True, 1],
]  # fmt: skip


@pytest.mark.parametrize("got", HOSTILE, ids=str)
@pytest.mark.parametrize("wanted", [6, 6.0, {6}, {6: 6}, [6], (6,), b"6", 6j], ids=str)
@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_what_no_encoder_wrote_is_never_the_same_and_never_raises(
    got: Any, wanted: Any, tolerance: float | None
) -> None:
    if (wanted, got) != ({6}, ["set", ["i", "0x6"]]):
        assert not same(encode(wanted), got, tolerance)
    assert isinstance(show(got), str)


@pytest.mark.runs
@pytest.mark.timeout(60)
def test_hostile_data_costs_little() -> None:
    """Numbers that all hash alike, frozensets in each other, deep lists: minutes or gigabytes for a naive one."""
    prime = 2**61 - 1
    many = ["set", *(["i", hex(i * prime)] for i in range(200_000))]
    deep: Any = []
    for _ in range(800):
        deep = [deep]
    nested: Any = ["frozenset", "\\" * 10_000]
    for _ in range(DEPTH):
        nested = ["frozenset", nested, '"' * 100]
    for got in (many, deep, nested, ["set", deep], ["set", nested]):
        assert not same(encode({frozenset({1})}), got) and not same(encode({1}), got)
        same(got, got)
        show(got)


@pytest.mark.parametrize(
    "written, value",
    [
        ({"$tuple": [1, {"$set": []}]}, (1, set())), ({"$dict": [[{"$tuple": [1]}, 2]]}, {(1,): 2}),
        ({"$bytes": "ff"}, b"\xff"),
        ({"$float": "inf"}, math.inf), ({"$complex": [1, 2]}, 1 + 2j), ({"$frozenset": [1]}, frozenset({1})),
        ({"a": {"$tuple": []}}, {"a": ()}), ({"$tuple": [], "b": 1}, {"$tuple": [], "b": 1}), ({}, {}),
        ([None], [None]),
    ],
)  # fmt: skip
def test_json_can_write_types_that_it_lacks(written: Any, value: Any) -> None:
    assert from_json(written) == value and type(from_json(written)) is type(value)


@pytest.mark.parametrize("written", [{"$what": 1}, {"$set": [[]]}, {"$bytes": "x"}, {"$tuple": 1}, {"$dict": [1]}])
def test_json_with_a_wrong_type_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="is no value"):
        from_json(written)
