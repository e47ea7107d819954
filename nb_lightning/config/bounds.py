"""Bounds of single config values, written beside the field: `clip_norm: float = bounded(1.0, POSITIVE)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Bound:
    """A condition on one value.

    Attributes:
        holds: Whether a value is allowed.
        requirement: The condition in words, for the error message.
    """

    holds: Callable[[Any], bool]
    requirement: str

    def require(self, key: str, value: Any) -> None:
        """Raise `ValueError` that names the key unless the value is allowed."""
        if not self.holds(value):
            raise ValueError(f"{key} is {value}; {self.requirement}")


@dataclass(frozen=True)
class OneOf(Bound):
    """A choice among words."""

    def require(self, key: str, value: Any) -> None:
        if not self.holds(value):
            raise ValueError(f"{key} is {value!r}; {self.requirement}")


def one_of(*allowed: str) -> Bound:
    """Return the bound of a word that must be one of `allowed`."""
    return OneOf(lambda value: value in allowed, f"allowed: {', '.join(allowed)}")


POSITIVE = Bound(lambda value: value > 0, "it must be positive")
POSITIVE_NUMBER = Bound(lambda value: 0 < value < math.inf, "it must be a positive number")
NOT_NEGATIVE = Bound(lambda value: value >= 0, "it must not be negative")
FINITE_NOT_NEGATIVE = Bound(lambda value: 0 <= value < math.inf, "it must be finite and not negative")
BETWEEN_0_AND_1 = Bound(lambda value: 0 < value < 1, "it must lie between 0 and 1")
FROM_0_BELOW_1 = Bound(lambda value: 0 <= value < 1, "it must be from 0 to below 1")


def bounded(default: T, bound: Bound) -> T:
    """Return a dataclass field with a default and a bound; None passes every bound."""
    return field(default=default, metadata={"bound": bound})


def check_bounds(config: Any, path: str) -> None:
    """Check the bounded fields of one config dataclass, not of those inside it.

    Args:
        config: The dataclass.
        path: Its YAML key, for the error messages; "" for the root.

    Raises:
        ValueError: The first field outside its bound.
    """
    for one in fields(config):
        value, bound = getattr(config, one.name), one.metadata.get("bound")
        if bound is not None and value is not None:
            bound.require(f"{path}.{one.name}".lstrip("."), value)
