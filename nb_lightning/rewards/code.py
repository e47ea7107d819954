"""The verifier "code": Python solutions against public and private tests, in the sandbox.

Reference, for a function (or a method of a class that takes no arguments):

    {"entry": "add", "tests": [{"args": [1, 2], "expect": 3}], "private": [...], "tolerance": 1e-9, "prelude": "..."}

and for a program that reads standard input:

    {"tests": [{"stdin": "1 2\\n", "expect": "3\\n"}], "private": [...], "tolerance": 1e-9}

The prelude is Python that the task gives its solutions, such as imports and helper functions. The names of `typing` are
there without one: LeetCode's and HumanEval's signatures use them.

Only inputs enter the sandbox. Its outputs are plain data, which are compared here with the expected values. So nothing
in the sandbox knows the answer or the verdict. The reward is 1 if all tests pass, else 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nb_lightning.rewards.extract import after_thinking, code_block
from nb_lightning.rewards.sandbox.jail import plain
from nb_lightning.rewards.sandbox.pool import Limits, Setup, error_status, failure, readable, shared
from nb_lightning.rewards.verifier import Score

# The modules that solutions use most, imported once, in the zygote. A solution imports others itself.
PRELOAD = (
    "array ast base64 bisect bz2 calendar cmath collections contextlib copy csv ctypes dataclasses datetime decimal "
    "difflib enum fractions functools graphlib hashlib heapq inspect io itertools json lzma math numbers operator os "
    "pathlib pprint queue random re secrets statistics string struct sys textwrap threading time timeit typing "
    "unicodedata urllib.parse uuid zlib"
)
TYPING = "from typing import *\n"
SETUP = Setup("run_code", preload=tuple(PRELOAD.split()))


@dataclass(frozen=True)
class Verdict:
    """The result of one test: the status, and a text that says why it failed."""

    status: str
    why: str = ""


class Code:
    """Runs the last Python block of each completion against all tests.

    Args:
        test_seconds: CPU time of one test, unless the reference has "seconds". The limit of wall-clock time is four
            times that plus a second, because other programs may be running.
        total_seconds: CPU time of all tests of one completion.
        memory_mb: memory of one run, in MiB.
    """

    def __init__(self, test_seconds: float = 4.0, total_seconds: float = 20.0, memory_mb: int = 512) -> None:
        self.test_seconds, self.total_seconds, self.memory_mb = test_seconds, total_seconds, memory_mb
        self.sandbox = shared(SETUP)

    def check(self, reference: Any) -> None:
        if not isinstance(reference, dict):
            raise ValueError(f"the reference of 'code' is {reference!r:.80}; give an object with 'tests'")
        unknown = set(reference) - {"entry", "tests", "private", "tolerance", "seconds", "prelude"}
        if unknown:
            raise ValueError(f"the reference of 'code' has the unknown field {min(unknown)!r}")
        if not all(isinstance(reference.get(kind, []), list) for kind in ("tests", "private")) or not _tests(reference):
            raise ValueError("the reference of 'code' needs a list 'tests' or 'private' with at least one test")
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)?", str(reference.get("entry", "f"))):
            raise ValueError(f"'entry' is {reference['entry']!r}; give the name of a function or Class.method")
        if not isinstance(reference.get("prelude", ""), str) or ("prelude" in reference and "entry" not in reference):
            raise ValueError("'prelude' in a 'code' reference must be Python source, and needs an 'entry'")
        _number(reference, "tolerance")
        _number(reference, "seconds")
        field, kind = ("args", list) if "entry" in reference else ("stdin", str)
        for name, test in _tests(reference):
            if not isinstance(test, dict) or set(test) != {field, "expect"}:
                raise ValueError(f"{name} of a 'code' reference must have exactly the fields {field!r} and 'expect'")
            if not isinstance(test[field], kind) or (kind is str and not isinstance(test["expect"], str)):
                raise ValueError(f"{name} of a 'code' reference: {field!r} must be a {kind.__name__}")
            if kind is list:
                _encoded(name, test)

    def score(self, prompt: str, completions: Sequence[str], reference: dict[str, Any]) -> list[Score]:
        tests = _tests(reference)
        seconds = float(reference.get("seconds", self.test_seconds))
        pairs = [_encoded(name, test) for name, test in tests] if "entry" in reference else []

        def judge(completion: str) -> Score:
            code = code_block(after_thinking(completion))
            if code is None:
                return Score(0.0, {"status": "no_answer", "passed": 0, "total": len(tests)})
            if pairs:
                return _score(self._judge_function(code, reference, pairs, seconds), tests)
            return _score(self._judge_program(code, reference, tests, seconds), tests)

        return list(self.sandbox.threads.map(judge, completions))

    def _judge_function(
        self, code: str, reference: dict[str, Any], pairs: list[tuple[Any, Any]], seconds: float
    ) -> list[Verdict]:
        """Run all calls in one job, each under a limit of its own; `pairs` are encoded arguments and results."""
        job = {
            "code": code, "prelude": TYPING + reference.get("prelude", ""),
            "entry": reference["entry"], "calls": [args for args, _ in pairs],
            "cpu": seconds, "wall": _wall(seconds),
        }  # fmt: skip
        total = min(self.total_seconds, seconds * (len(pairs) + 1))
        outcome = self.sandbox.run(job, b"", Limits(total, _wall(total), self.memory_mb))
        lines: dict[int, dict[str, Any]] = {}  # number of the call -> the first line reported for it
        for line in outcome.report:
            if isinstance(line, dict) and type(line.get("call")) is int:
                lines.setdefault(line["call"], line)
            elif isinstance(line, dict) and "error" in line:
                return [_error(line)]
        tolerance = reference.get("tolerance")
        return [
            _compare(lines[i], expect, tolerance) if i in lines else Verdict(*failure(outcome))
            for i, (_, expect) in enumerate(pairs)
        ]

    def _judge_program(
        self, code: str, reference: dict[str, Any], tests: list[tuple[str, Any]], seconds: float
    ) -> list[Verdict]:
        """Run each test in a job of its own, up to the first that fails."""
        verdicts: list[Verdict] = []
        cpu, wall = self.total_seconds, _wall(self.total_seconds)
        for _, test in tests:
            limits = Limits(min(seconds, cpu), min(_wall(seconds), wall), self.memory_mb)
            outcome = self.sandbox.run({"code": code}, test["stdin"].encode("utf-8", "surrogatepass"), limits)
            cpu, wall = max(0.01, cpu - outcome.cpu_seconds), max(0.1, wall - outcome.wall_seconds)
            verdict = Verdict(*failure(outcome))
            if outcome.status == "ok":
                output = outcome.stdout.decode("utf-8", "replace")
                if same_output(test["expect"], output, reference.get("tolerance")):
                    verdict = Verdict("correct")
                else:
                    verdict = Verdict("wrong", f"printed {output[:200]!r}")
            verdicts.append(verdict)
            if verdict.status != "correct":
                break
        return verdicts


def same_output(expected: str, output: str, tolerance: float | None = None) -> bool:
    """Return whether two outputs agree.

    They are compared line by line, up to white space at the ends of lines and blank lines at the end. With a
    `tolerance` they are compared word by word, and numbers agree up to it, relative or absolute.
    """
    if tolerance is None:
        return _lines(expected) == _lines(output)
    ours, theirs = expected.split(), output.split()
    return len(ours) == len(theirs) and all(_same_word(a, b, tolerance) for a, b in zip(ours, theirs))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_word(expected: str, word: str, tolerance: float) -> bool:
    if expected == word:
        return True
    if len(word) > 100:
        return False
    try:
        return math.isclose(float(expected), float(word), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


def _tests(reference: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, test) of all tests, the public ones first."""
    return [(f"{kind}[{i}]", test) for kind in ("tests", "private") for i, test in enumerate(reference.get(kind, []))]


def _encoded(name: str, test: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return plain.encode(plain.from_json(test["args"])), plain.encode(plain.from_json(test["expect"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of a 'code' reference: {error}") from error


def _number(reference: dict[str, Any], name: str) -> None:
    value = reference.get(name, 1)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name!r} of a 'code' reference is {value!r}; give a number of at least 0")


def _wall(seconds: float) -> float:
    return 4 * seconds + 1


def _compare(line: dict[str, Any], expect: Any, tolerance: float | None) -> Verdict:
    if "value" not in line:
        return _error(line)
    if plain.same(expect, line["value"], tolerance):
        return Verdict("correct")
    return Verdict("wrong", f"returned {plain.show(line['value'])}")


def _error(line: dict[str, Any]) -> Verdict:
    why = str(line.get("error"))
    return Verdict(error_status(why), readable(why))


def _score(verdicts: list[Verdict], tests: list[tuple[str, Any]]) -> Score:
    passed = sum(verdict.status == "correct" for verdict in verdicts)
    info: dict[str, Any] = {"status": "correct", "passed": passed, "total": len(tests)}
    for (name, _), verdict in zip(tests, verdicts):
        if verdict.status != "correct":
            info |= {"status": verdict.status, "failed": name, "why": verdict.why}
            break
    return Score(float(passed == len(tests)), info)
