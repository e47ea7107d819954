"""The job of math.py: find the answers that equal the wanted one, by math-verify and SymPy.

In: {"wanted", "items", "cpu", "wall"}. Out: {"item": i, "equal": bool} for each answer.
"""

from __future__ import annotations

import logging
from typing import Any

import runner

# Compared once in the zygote: the parser builds its tables on first use, and SymPy imports many modules only then.
WARM = (
    ("\\frac{1}{2}", "0.5"), ("x^2+2x+1", "(x+1)^2"), ("\\sqrt{2}", "2^{1/2}"), ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("[1, 2)", "[1, 3)"), ("2\\pi", "6.28"), ("\\sin x", "\\cos(x)"), ("1 \\le x < 2", "x > 3"), ("\\infty", "-1"),
    ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 3 \\end{pmatrix}"), ("5!", "120"), ("5", "x = 6"),
    ("1,000", "3^4"),
    ("\\log_2 8", "3"), ("e^{i\\pi}", "-1"), ("1+i", "\\frac{2}{1-i}"), ("50\\%", "0.5"), ("\\text{no}", "yes"),
)  # fmt: skip


def prepare(setup: dict[str, Any]) -> None:
    logging.disable(logging.CRITICAL)
    for wanted, answer in WARM:
        equal(wanted, answer)


def main() -> int:
    job = runner.task()
    for i, answer in enumerate(job["items"]):
        runner.arm(job)
        try:
            runner.report({"item": i, "equal": equal(job["wanted"], answer)})
        except MemoryError:
            return runner.out_of_memory()
        except Exception as error:
            runner.report({"item": i, "equal": False, "error": f"{type(error).__name__}: {error}"[:300]})
    return 0


def equal(wanted: str, answer: str) -> bool:
    from math_verify import parse, verify

    # No time limits of math-verify: they are alarms, which this job sets itself.
    parsed = [parse(f"${text}$", parsing_timeout=None, raise_on_error=True) for text in (wanted, answer)]
    return bool(verify(*parsed, timeout_seconds=None))
