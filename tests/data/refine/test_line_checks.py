"""Lines that are replayed: what holds, what does not, and what says nothing that can be replayed."""

from __future__ import annotations

import pytest

from data.refine.line_checks import binary, equations, sorting


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("3 + 4 = 7", True),
        ("So 3 + 4 = 7.", True),
        ("3+4=8", False),
        ("2 + 3 * 4 = 14", True),
        ("6 / 2 x 3 = 9", True),
        ("3 - -4 = 7", True),
        ("3 + 4 + 5 = 7 + 5 = 12", True),
        ("3 + 4 + 5 = 8 + 5 = 12", False),
        ("3 + 4 = 7 and 7 + 1 = 9", False),
        ("Thus 3 + 4 = 7 km", True),
        ("所以3+4=7个", True),
        ("所以3+4=8个", False),
        # Other spellings.
        ("3 × 4 + 2 = 14", True),
        ("3 × 4 + 2 = 6", False),
        (r"3 \times 4 = 12", True),
        (r"$3 \cdot 4 = 13$", False),
        ("8 ÷ 2 − 1 = 3", True),
        ("1,000 + 500 = 1,500", True),
        ("1,000 + 500 = 1,600", False),
        # Results may be rounded.
        ("10 / 3 = 3.33", True),
        ("10 / 3 = 3.3333 = 3.33", True),
        ("10 / 3 = 3.34", False),
        ("10 / 3 = 3", False),
        ("1.5 + 2.5 = 4", True),
        ("1.5 + 2.5 = 4.1", False),
        ("7 / 0 = 0", False),
        # Nothing to replay.
        ("", None),
        ("x = 7", None),
        ("7 = 7", None),
        ("3 + 4 == 7", None),
        ("10 - 4 = 3y", None),
        ("2y + 3 + 4 = 9", None),
        ("y -3 + 4 = 9", None),
        ("(2) -3 + 4 = 5", None),
        ("17 mod 5 + 1 = 3", None),
        ("10 / 20 = 50%", None),
        ("7 / 2 = 3 remainder 1", None),
        ("2 * 5! = 240", None),
        ("2^3 + 1 = 9", None),
        ("10 - 2^2 = 6", None),
        (r"\frac{1}{2} + 3 + 4 = 7.5", None),
        ("f(1) + 3 = 4", None),
    ],
)  # fmt: skip
def test_equations(line: str, holds: bool | None) -> None:
    assert equations("", line) == ([] if not line else [holds])


def test_each_line_is_a_verdict() -> None:
    assert equations("", "3 + 4 = 7\n\nso\n7 + 1 = 9") == [True, None, None, False]


def test_long_lines_are_read_in_linear_time() -> None:
    for line in ("1+" * 20_000, "1 + " * 20_000 + "=", "1=" * 20_000 + "x", "1" * 40_000, "-" * 40_000 + "=1"):
        equations("", line)


def test_sorting_is_replayed_letter_by_letter() -> None:
    assert sorting("Sort cab", "a cb\nb c\nc") == [True, True, True]
    assert sorting("Sort cab", "a cb\nc b\nc") == [True, False, True]
    assert sorting("Sort cab", "a cb\nb c") == [True, True, False]  # a line is missing
    assert sorting("Sort cab", "a cb\nb c\nc\nc") == [True, True, True, False]  # one too many
    assert sorting("", "a") == [False]


def test_binary_is_replayed_bit_by_bit() -> None:
    assert binary("Write 5 in binary", "5 1\n2 0\n1 1") == [True, True, True]
    assert binary("Write 5 in binary", "5 1\n2 1\n1 1") == [True, False, True]
    assert binary("Write 5 in binary", "5 1\n2 0") == [True, True, False]
    assert binary("Write it", "5 1") == [False]
