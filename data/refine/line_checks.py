"""Check a chain of thought line by line, where its lines can be replayed.

A check takes the question and the chain, and returns for each line whether it holds; None for a line that says nothing
that can be replayed. Nothing is executed: numbers are read and computed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

LineCheck = Callable[[str, str], Sequence[bool | None]]
NUMBER = r"-?\d+(?:\.\d+)?"
EXPRESSION = rf"{NUMBER}(?:\s*[-+*/x]\s*{NUMBER})*"
TERM = re.compile(rf"\s*([-+*/x]?)\s*({NUMBER})")
# `3 + 4 = 7` or `3 + 4 + 5 = 7 + 5 = 12`, but no part of a longer expression such as `2y + 3 + 4 = 9` or `1 + 2 = 3y`.
EQUATION = re.compile(
    rf"(?<![\w.)\]}}^])(?<![-+*/x^]\s)(?<![-+*/x])({EXPRESSION}(?:\s*=\s*{EXPRESSION})+)"
    r"(?!\s*(?:[-+*/x^(!%]|remainder|rem\b|R\b|余)|\w|\.\d|[²³])",
    re.ASCII,  # a Chinese character may stand on either side
)
# What makes the number after it, or the sign before it, part of something else.
OPEN_BEFORE = re.compile(
    r"(?:[-+*/^(√]|\b(?:mod|log|ln|lg|sin|cos|tan|sqrt|times|plus|minus|by|over|x)|\\[a-zA-Z]+)\s*\Z", re.IGNORECASE
)
SPELLINGS = {"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "\\,": ""}
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def equations(question: str, chain: str) -> list[bool | None]:
    """Replay each equation between numbers with + - * / x, in every line; a line without one is None.

    `*`, `x` and `/` bind before + and -. A number with decimals that is a side of its own may be rounded.
    """
    return [_all_hold(list(_equations(line))) for line in chain.splitlines()]


def _equations(line: str) -> Iterator[str]:
    for spelling, sign in SPELLINGS.items():
        line = line.replace(spelling, sign)
    line = THOUSANDS.sub("", line)
    for match in EQUATION.finditer(line):
        before = line[max(0, match.start() - 12) : match.start()]
        follows_a_term = match[1].startswith("-") and re.search(r"[\w)\]}]\s*\Z", before)
        if not follows_a_term and not OPEN_BEFORE.search(before):
            yield match[1]


def _all_hold(equations: Sequence[str]) -> bool | None:
    with_operator = [e for e in equations if any(len(TERM.findall(side)) > 1 for side in e.split("="))]
    if not with_operator:
        return None
    return all(_equal(*sides) for e in with_operator for sides in pairwise(e.split("=")))


def _equal(left: str, right: str) -> bool:
    values = _value(left), _value(right)
    if values[0] is None or values[1] is None:
        return False
    results = [side.strip() for side in (left, right) if len(TERM.findall(side)) == 1]
    decimals = [len(number.partition(".")[2]) for number in results if "." in number]
    return abs(values[0] - values[1]) <= (Fraction(1, 2 * 10 ** min(decimals)) if decimals else 0)


def _value(expression: str) -> Fraction | None:
    """Compute a sum of products; None for a division by 0."""
    terms: list[Fraction] = []
    for operator, number in TERM.findall(expression):
        value = Fraction(number)
        if operator in ("*", "x"):
            terms[-1] *= value
        elif operator == "/":
            if not value:
                return None
            terms[-1] /= value
        else:
            terms.append(-value if operator == "-" else value)
    return sum(terms, Fraction(0))


def sorting(question: str, chain: str) -> list[bool | None]:
    """Replay "Sort <letters>": each line has the smallest letter that is left, and the letters left after it."""
    left = question.split()[-1] if question.split() else ""
    holds: list[bool | None] = []
    for line in chain.splitlines():
        smallest = min(left, default="")
        rest = left.replace(smallest, "", 1)
        holds.append(bool(left) and line == f"{smallest} {rest}".strip())
        left = rest
    return [*holds, False] if left else holds  # the missing lines


def binary(question: str, chain: str) -> list[bool | None]:
    """Replay "Write <n> in binary": each line has the number that is left and its last bit; then it is halved."""
    match = re.search(r"\d+", question)
    left = int(match[0]) if match else 0
    holds: list[bool | None] = []
    for line in chain.splitlines():
        holds.append(left > 0 and line == f"{left} {left % 2}")
        left //= 2
    return [*holds, False] if left else holds


LINE_CHECKS: dict[str, LineCheck] = {"equations": equations, "sorting": sorting, "binary": binary}
