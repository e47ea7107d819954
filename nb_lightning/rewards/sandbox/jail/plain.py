"""Values as tagged plain data, the only form in which they cross the border of the sandbox.

`encode` accepts only exact built-in types. It refuses a subclass, which could have an `__eq__` of its own. `same`
compares two encoded values without making objects of them, so nothing that comes out of the sandbox is hashed, called
or compared by its own methods.

    None, bool, str: as they are    ["i", "0x2a"]  ["f", "0x1.8p+0"]  ["c", real, imag]  ["b", "hex"]
    ["list", ...]  ["tuple", ...]  ["set", ...]  ["frozenset", ...]  ["dict", [key, value], ...]
"""

from __future__ import annotations

import json
import math
from typing import Any

DEPTH = 60  # nesting
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, depth: int = DEPTH) -> Any:
    """Encode `value` as JSON that keeps the types.

    Raises:
        TypeError: a type that is not plain data.
        ValueError: nested too deep, or in itself.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return ["i", hex(value)]
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["b", value.hex()]
    if depth <= 0:
        raise ValueError(f"a value nested more than {DEPTH} deep")
    if kind is dict:
        return ["dict", *([encode(key, depth - 1), encode(item, depth - 1)] for key, item in value.items())]
    for name, container in CONTAINERS.items():
        if kind is container:
            return [name, *(encode(item, depth - 1) for item in value)]
    raise TypeError(f"a value of type {kind.__name__}")


def decode(data: Any) -> Any:
    """Decode the output of `encode`. Only for data from the trusted side."""
    if not isinstance(data, list):
        return data
    tag, *items = data
    if tag == "i":
        return int(items[0], 16)
    if tag == "f":
        return float.fromhex(items[0])
    if tag == "c":
        return complex(float.fromhex(items[0]), float.fromhex(items[1]))
    if tag == "b":
        return bytes.fromhex(items[0])
    if tag == "dict":
        return {decode(key): decode(item) for key, item in items}
    return CONTAINERS[tag](map(decode, items))


def from_json(value: Any) -> Any:
    """Convert JSON to a Python value. A type that JSON lacks is written as an object with one key:

    {"$tuple": [...]}, {"$set": [...]}, {"$frozenset": [...]}, {"$dict": [[key, value], ...]}, {"$bytes": "hex"},
    {"$float": "nan"}, {"$complex": [re, im]}

    Raises:
        ValueError: such an object has a wrong content.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(key, item), *more] = [*value.items()] or [("", None)]
    if more or not key.startswith("$"):
        return {name: from_json(inner) for name, inner in value.items()}
    try:
        if key == "$dict":
            return {from_json(name): from_json(inner) for name, inner in item}
        if key == "$bytes":
            return bytes.fromhex(item)
        if key == "$float":
            return float(item)
        if key == "$complex":
            return complex(*item)
        return CONTAINERS[key[1:]](map(from_json, item))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{json.dumps(value)[:200]} is no value: {type(error).__name__}: {error}") from error


def same(wanted: Any, got: Any, tolerance: float | None = None) -> bool:
    """Return whether the encoded `got`, which may be any JSON, equals the encoded value `wanted`.

    Types must agree: True is not 1, 1 is not 1.0, a list is not a tuple. NaN equals NaN. With a `tolerance`, int and
    float are both numbers, which are equal up to it, relative or absolute; sets and keys are still compared exactly.
    """
    return _shallow(got) and _same(wanted, got, tolerance)


def _same(wanted: Any, got: Any, tolerance: float | None) -> bool:
    if not isinstance(wanted, list):
        return type(got) is type(wanted) and got == wanted
    if not isinstance(got, list) or not got:
        return False
    tag, *items = wanted
    if tag in ("i", "f") and got[0] in ("i", "f"):
        return _same_number(wanted, got, tolerance)
    if got[0] != tag or len(got) != len(wanted):
        return False
    if tag in ("set", "frozenset"):
        return sorted(map(_text, items)) == sorted(map(_text, got[1:]))
    if tag == "dict":
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in got[1:]):
            return False
        pairs = [sorted((_text(key), i) for i, (key, _) in enumerate(side)) for side in (items, got[1:])]
        return all(
            key == other and _same(items[i][1], got[1 + j][1], tolerance)
            for (key, i), (other, j) in zip(*pairs, strict=True)
        )
    if tag in CONTAINERS:
        return all(_same(a, b, tolerance) for a, b in zip(items, got[1:], strict=True))
    return wanted == got  # complex, bytes


def show(data: Any) -> str:
    """Format encoded data for messages: a short value as Python writes it."""
    text = json.dumps(data)
    try:
        return repr(decode(data)) if len(text) < 300 else f"{text[:200]}..."
    except (TypeError, ValueError, KeyError, IndexError):
        return text


def _same_number(wanted: list[Any], got: list[Any], tolerance: float | None) -> bool:
    if len(got) != 2 or not isinstance(got[1], str):
        return False
    if tolerance is None:
        return wanted == got or (wanted[0] == got[0] == "f" and {wanted[1], got[1]} == {"0x0.0p+0", "-0x0.0p+0"})
    try:
        a, b = (float.fromhex(text) if tag == "f" else float(int(text, 16)) for tag, text in (wanted, got))
    except (ValueError, OverflowError):
        return wanted == got
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def _text(data: Any) -> str:
    """Return a text that is equal for two encoded values exactly if they are equal, whatever the order of sets."""
    return json.dumps(_sorted(data))


def _sorted(data: Any) -> Any:
    if not isinstance(data, list) or not data:
        return data
    items = [_sorted(item) for item in data[1:]]
    return [data[0], *(sorted(items, key=json.dumps) if data[0] == "frozenset" else items)]


def _shallow(data: Any) -> bool:
    """Return whether lists are nested no deeper than `encode` nests them (a dict takes two levels)."""
    level = [data]
    for _ in range(2 * DEPTH + 2):
        level = [item for inner in level if isinstance(inner, list) for item in inner]
    return not level
