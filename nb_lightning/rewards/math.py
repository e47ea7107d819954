r"""The verifier "math": the answer equals the reference as a number or an expression (math-verify and SymPy).

Reference: the answer as LaTeX or a number ("\\frac{1}{2}", "0.5", 3), or an object

    {"answer": "1/2", "format": ["boxed", "answer"]}       where to look for the answer, in this order
    {"answer": 3628800, "compute": true, "tolerance": 0}   the answer is a Python expression; its value is compared
    {"check": "def check(answer): ...", "format": ...}     a Python function that returns whether the answer is right

Formats: "boxed" (the last \boxed{}), "answer" (the line of the last "Answer:"), "hashes" (the line of the last "####").
Model-written expressions, and SymPy on model-written text, run in the sandbox, each under its own time limit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isclose
from typing import Any

from nb_lightning.rewards.code import SETUP as CODE
from nb_lightning.rewards.extract import after_thinking, answer_line, boxed, fold
from nb_lightning.rewards.sandbox.jail import plain
from nb_lightning.rewards.sandbox.pool import Limits, Outcome, failure, readable, shared, with_packages
from nb_lightning.rewards.verifier import Score

PACKAGES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")
LONGEST = 2000  # characters of an answer
FORMATS = {"boxed": boxed, "answer": answer_line, "hashes": lambda text: answer_line(text, "####")}
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,100}\.?[0-9]{0,100}|\.[0-9]{1,100})")
# math-verify ignores these: it would read "\\neq 7" as 7, and so "8 \\to 7".
_HEDGE = re.compile(
    r"\\(?:neq?|neg|not|approx|sim|to|(?:long)?(?:left)?rightarrow|Rightarrow|implies|iff|lor|vee|p?mod)(?![a-zA-Z])"
    r"|\\\\|\b(?:or|not)\b"
)
_WORDS = re.compile(r"[^\W\d_]{3,}( [^\W\d_]+)*")
# A number and its unit: 18 dollars, 18 years old, 60 km/h, 5 m/s, 9.8 m/s^2, USD 18, 18/day. A single letter may be a
# variable, so it is a unit only beside a slash.
_UNIT_WORD = r"(?:[^\W\d_]{2,}|[^\W\d_](?=\s?/)|(?<=/)[^\W\d_])(?:\^\{?[23]\}?|[²³])?\.?"
_UNIT = rf"(?:/\s?)?{_UNIT_WORD}(?:[ /]{{1,3}}{_UNIT_WORD}){{0,4}}"
_QUANTITY = re.compile(rf"(USD|EUR|GBP|RMB|[€£¥])?\s?([+-]?[0-9][0-9.]{{0,100}})\s?({_UNIT})?")
# Words beside a number that change its value, or take it back.
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozens?|percent|percentage|half|halves|thirds?|quarters?|squared|"
    r"cubed|times|plus|minus|over|and|or|to|not|no|is|wrong|except|pi|sqrt|sin|cos|tan|log|ln|exp|mod|factorial)\b",
    re.IGNORECASE,
)
# Computes an expression's value as plain data.
_COMPUTE = """
from math import *
from fractions import Fraction
from decimal import Decimal
def compute():
    value = ({})
    return float(value) if isinstance(value, (Fraction, Decimal)) else value
"""


class Math:
    """Compares the answer of each completion with the reference.

    Args:
        item_seconds: CPU time for one answer; the limit of wall-clock time is four times that plus a second.
        memory_mb: memory for one run, in MiB.
    """

    def __init__(self, item_seconds: float = 3.0, memory_mb: int = 512) -> None:
        self.limits = Limits(item_seconds, 4 * item_seconds + 1, memory_mb)
        self.sandbox = shared(with_packages("run_math", PACKAGES, PACKAGES[:2]))
        self.interpreter = shared(CODE)

    def check(self, reference: Any) -> None:
        fields = _fields(reference)
        unknown = set(fields) - {"answer", "format", "compute", "tolerance", "check"}
        if unknown:
            raise ValueError(f"the reference of 'math' has the unknown field {min(unknown)!r}")
        if ("answer" in fields) == ("check" in fields):
            raise ValueError("the reference of 'math' needs either 'answer' or 'check'")
        answer = fields.get("answer", 0)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(
                f"the answer in a 'math' reference is {answer!r}; give a text that is not blank or a number"
            )
        if fields.get("compute") and isinstance(answer, str):
            raise ValueError(f"with 'compute', the answer in a 'math' reference must be a number, not {answer!r}")
        tolerance = fields.get("tolerance", 0)
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or tolerance < 0:
            raise ValueError(f"'tolerance' in a 'math' reference is {tolerance!r}; give a number of at least 0")
        if not isinstance(fields.get("check", ""), str):
            raise ValueError("'check' in a 'math' reference must be the source of a Python function check(answer)")
        formats = _formats(fields)
        if not formats or not set(formats) <= set(FORMATS):
            raise ValueError(f"'format' in a 'math' reference is {formats}; there are: {', '.join(FORMATS)}")

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
        fields = _fields(reference)
        answers = [_answer(completion, _formats(fields)) for completion in completions]
        judged: dict[str, Score] = {}
        asked = [answer for answer in dict.fromkeys(answers) if answer]
        if "check" in fields or fields.get("compute"):
            judged = dict(zip(asked, self.interpreter.threads.map(lambda answer: self._run(answer, fields), asked)))
        elif asked:
            judged = self._compare(asked, str(fields["answer"]).strip())
        judged[""] = Score(0.0, {"status": "no_answer", "answer": ""})
        return [judged[answer] for answer in answers]

    def _compare(self, answers: list[str], wanted: str) -> dict[str, Score]:
        """Compare answers with the reference by text where that decides, else by SymPy."""
        judged = {
            answer: _score(answer, verdict) for answer in answers if (verdict := _by_text(answer, wanted)) is not None
        }
        undecided = [answer for answer in answers if answer not in judged]
        job = {"wanted": _bare(wanted)}
        results = self.sandbox.run_items(job, [_bare(answer) for answer in undecided], self.limits)
        for answer, result in zip(undecided, results):
            if isinstance(result, Outcome):
                judged[answer] = _failed(answer, result)
            else:
                judged[answer] = _score(answer, result.get("equal") is True, str(result.get("error", "")))
        return judged

    def _run(self, answer: str, fields: dict[str, Any]) -> Score:
        """Run Python on the answer: compute its value as an expression, or call the reference's `check` with it."""
        if "check" in fields:
            job = {"code": fields["check"], "entry": "check", "calls": [plain.encode([answer])]}
            wanted, tolerance = True, None
        else:
            job = {"code": _COMPUTE.format(answer), "entry": "compute", "calls": [plain.encode([])]}
            wanted, tolerance = fields["answer"], fields.get("tolerance", 1e-9)
        job |= {"cpu": self.limits.cpu_seconds, "wall": self.limits.wall_seconds}
        outcome = self.interpreter.run(job, b"", self.limits)
        lines = [line for line in outcome.report if isinstance(line, dict)]
        if not lines:
            return _failed(answer, outcome)
        correct = "value" in lines[0] and plain.same(plain.encode(wanted), lines[0]["value"], tolerance)
        return _score(answer, correct, str(lines[0].get("error", "")))


def _fields(reference: Any) -> dict[str, Any]:
    return reference if isinstance(reference, dict) else {"answer": reference}


def _formats(fields: dict[str, Any]) -> list[str]:
    formats = fields.get("format", ["boxed", "answer"])
    return [formats] if isinstance(formats, str) else list(formats)


def _answer(completion: str, formats: list[str]) -> str:
    """Extract the answer by the first format that finds one; "" if none does."""
    response = after_thinking(completion)
    return next((answer for name in formats if (answer := FORMATS[name](response))), "")


def _by_text(answer: str, wanted: str) -> bool | None:
    """Return whether answer and reference are equal, by their letters; None where only SymPy can tell."""
    ours, theirs = fold(_bare(wanted)), fold(_bare(answer))
    if ours == theirs:
        return True
    if len(theirs) > LONGEST or not set(_HEDGE.findall(theirs)) <= set(_HEDGE.findall(ours)):
        return False
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs):
        return int(ours) == int(theirs)
    if _DECIMAL.fullmatch(ours) and _DECIMAL.fullmatch(theirs):
        exact = _INTEGER.fullmatch(ours) or _INTEGER.fullmatch(theirs)
        return isclose(float(ours), float(theirs), rel_tol=0 if exact else 1e-6)
    if (equal := _equal_quantities(ours, theirs)) is not None:
        return equal
    if _WORDS.fullmatch(ours):  # letters would be factors: dog = god
        return ours.casefold() == theirs.casefold()
    return None


def _equal_quantities(wanted: str, answer: str) -> bool | None:
    """Return whether two numbers agree of which at least one has a unit in words; None where that is not the case.

    Units must agree where both have one.
    """
    plain_texts = (re.sub(r"\\(?:text|mathrm|textrm|,|;| )|[{}~]", " ", text) for text in (wanted, answer))
    quantities = [_QUANTITY.fullmatch(fold(text)) for text in plain_texts]
    (ours, our_unit), (theirs, their_unit) = (
        (match[2], match[3] or match[1] or "") if match else ("", "") for match in quantities
    )
    if not (_DECIMAL.fullmatch(ours) and _DECIMAL.fullmatch(theirs)) or not (our_unit or their_unit):
        return None
    if _NO_UNIT.search(our_unit) or _NO_UNIT.search(their_unit):
        return None
    if our_unit and their_unit and _singular(our_unit) != _singular(their_unit):
        return None
    return isclose(float(ours), float(theirs), rel_tol=0 if float(ours).is_integer() else 1e-6)


def _singular(unit: str) -> str:
    return re.sub(r"s\b", "", unit.casefold()).replace(" ", "")


def _bare(text: str) -> str:
    r"""Strip the $ or \( \) around a formula, and the dollars in it, which would make it two formulas."""
    text = text.strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = text.replace("\\$", "").replace("$", " ").strip().removeprefix("\\approx").strip()
    if text.startswith("\\text{") and text.endswith("}"):
        text = text[6:-1].strip()
    return text


def _score(answer: str, correct: bool, why: str = "") -> Score:
    status = "correct" if correct else "memory" if why.startswith("MemoryError") else "wrong"
    return Score(float(correct), {"status": status, "answer": answer[:200], **({"why": readable(why)} if why else {})})


def _failed(answer: str, outcome: Outcome) -> Score:
    status, why = failure(outcome)
    return Score(0.0, {"status": status, "answer": answer[:200], "why": why})
