"""The verifier "math": formats, equivalence, Python checks, and strings that hang SymPy."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nb_lightning.rewards import Guarded, Score, get_verifier, statuses
from nb_lightning.rewards.math import Math
from nb_lightning.rewards.sandbox import pool as sandbox_module
from nb_lightning.rewards.sandbox.pool import Limits

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def maths() -> Guarded:
    return get_verifier("math")


def answered(maths: Guarded, reference: Any, *answers: str) -> list[Score]:
    return maths.score("", [f"So it is \\boxed{{{answer}}}." for answer in answers], reference)


@pytest.mark.parametrize(
    "reference, right, wrong",
    [
        ("\\frac{1}{2}", ["1/2", "0.5", "\\dfrac12", "\\frac{2}{4}", "2^{-1}", "$0.5$", "\\(\\frac 1 2\\)"],
        ["2", "-0.5", "0.51"]),
        (5, ["5", "5.0", "+5", "x=5", "\\text{5}", "10/2", "\\$5", "5 \\text{ cm}"],
        ["6", "-5", "5.1", "x=6", "5,6", "55"]),
        ("0.333333", ["1/3"], ["0.3"]),
        (0.25, ["1/4", ".25", "+0.250"], ["0.26"]),
        ("0.0000001", ["10^{-7}", "0.00000010"], ["10^{-6}"]),
        ("3.14", ["3.140000001", "\\approx 3.14"], ["3.15", "3"]),
        ("1,000", ["1000", "10^3"], ["1", "100"]),
        ("x^2+2x+1", ["(x+1)^2", "1+x(x+2)"], ["x^2+2x", "(x-1)^2", "y^2+2y+1"]),
        ("\\sqrt{2}", ["2^{1/2}", "\\frac{2}{\\sqrt2}"], ["1.41", "2"]),
        ("2\\pi", ["\\pi\\cdot 2"], ["2", "\\pi"]),
        ("\\{1, 2\\}", ["\\{2, 1\\}"], ["\\{1\\}", "\\{1,2,3\\}"]),
        ("[1, 2)", ["[1,2)"], ["(1,2)", "[1,2]"]),
        ("\\begin{pmatrix}1 & 2\\end{pmatrix}", ["\\begin{pmatrix} 1&2 \\end{pmatrix}"],
        ["\\begin{pmatrix}2 & 1\\end{pmatrix}"]),
        ("dog", ["dog", "Dog", "\\text{dog}"], ["god", "dogs", "do g"]),
        ("\\text{odd}", ["odd"], ["even", "ddo"]),
        ("A", ["A", "a", "\\text{A}"], ["B", "AB"]),
        (18, ["18 dollars", "18 people", "18 eggs", "18 years old", "18 km/h", "18 USD", "USD 18", "18/day",
              "18\\text{ m/s}", "18\\ \\mathrm{kg}"],
        ["17 dollars", "18 million", "18 thousand dollars", "18x", "18 x", "18 or 19", "18 is wrong", "18 minus 2"]),
        ("18 hours", ["18 hours", "18 hour", "18"], ["17 hours", "19"]),
        ("2.5", ["2.5 apples", "2.50 litres"], ["2.6 apples", "25 apples"]),
        (10**50, [str(10**50), "10^{50}"], [str(10**50 + 1)]),
    ],
)  # fmt: skip
def test_an_equal_answer_in_another_form_is_correct(
    maths: Guarded, reference: Any, right: list[str], wrong: list[str]
) -> None:
    scores = dict(zip(right + wrong, answered(maths, reference, *right, *wrong)))
    assert [answer for answer, score in scores.items() if score.reward == 1] == right
    assert {score.info["status"] for answer, score in scores.items() if answer in wrong} == {"wrong"}


@pytest.mark.parametrize(
    "reference, answers",
    [
        (7, ["\\neq 7", "\\ne 7", "\\neg 7", "8 \\to 7", "7 \\to 8", "7 \\approx 8", "8 \\approx 7", "7 \\\\ 8",
        "8 \\implies 7", "not 7",
             "7 \\text{ or } 8", "7 \\text{ (not 8)}", "7, 8", "x \\ge 7", "x \\neq 7", "7 \\pm 1", "x", "7x",
             "7.0000001", "\\infty", "0/0"]),
        ("0.0000001", ["0.0000002", "0"]),
        ("1, 2", ["1", "1, 2, 3", "2"]),
    ],
)  # fmt: skip
def test_hedges_are_not_paid(maths: Guarded, reference: Any, answers: list[str]) -> None:
    assert [answer for answer, score in zip(answers, answered(maths, reference, *answers)) if score.reward] == []


@pytest.mark.parametrize(
    "formats, text, answer",
    [
        (None, "\\boxed{1} Answer: 2", "1"), (None, "Answer: 2.", "2"), (None, "2", ""),
        ("answer", "\\boxed{1} Answer: 2", "2"),
        ("hashes", "so\n#### 2", "2"), (["hashes", "boxed"], "\\boxed{1}", "1"), ("boxed", "Answer: 2", ""),
        (None, "<think>\\boxed{1}</think> \\boxed{2}", "2"), (None, "<think>\\boxed{1}", ""),
        (None, "\\boxed{1} or \\boxed{2}", "2"),
    ],
)  # fmt: skip
def test_the_answer_is_found_by_the_formats_in_order(maths: Guarded, formats: Any, text: str, answer: str) -> None:
    reference = {"answer": answer or "1"} | ({"format": formats} if formats else {})
    [score] = maths.score("", [text], reference)
    assert score.info["answer"] == answer
    assert score.info["status"] == ("correct" if answer else "no_answer")


TOWERS = [
    "9^{9^{9^{9}}}", "(10^{10})!", "10^{10^{10^{10}}}", "((100!)!)!", "2^{2^{2^{2^{2^{2}}}}}", "\\binom{10^9}{10^8}",
    "\\sum_{k=1}^{10^9} k^k", "\\prod_{k=1}^{10^8} k", "\\int_0^1 x^{x^{x^{x}}} dx",
    "\\int \\sin(x^x) e^{x^5} \\ln(x) dx",
    "\\lim_{x \\to 0} \\frac{\\sin(\\tan x) - \\tan(\\sin x)}{x^{77}}", "(x+y+z+w+1)^{200}", "(a+b)^{10^6}",
    "\\sin(10^{10^{8}})", "0.(9)^{10^{12}}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{10^{9}}", "x^{10^{9}} - 1 = 0",
]  # fmt: skip
DEEP = [
    "(" * 500 + "1" + ")" * 500, "\\frac{" * 60 + "1" + "}{2}" * 60, "\\sqrt{" * 150 + "2" + "}" * 150,
    "{" * 900 + "}" * 900,
    "-" * 1500 + "1", "1" + "+1" * 900,
    "\\left(" * 200, "x_{" * 300 + "1" + "}" * 300, "!" * 1000, "\\\\" * 900, "$" * 1000,
    "9" * 1999, "\x00\ud800\u202e",
    "\\text{" * 300, "1/" * 900 + "1", "|" * 999, "\\boxed{" * 200, ",".join("123456789" * 100),
]  # fmt: skip


@pytest.mark.runs
def test_a_hostile_answer_stays_within_its_limit() -> None:
    """All at once, good answers among them: every one is judged, and the good ones are paid."""
    maths = Guarded("math", Math(item_seconds=0.25))
    good = ["2/4", "0.50"]
    answers = [*TOWERS[:9], good[0], *TOWERS[9:], *DEEP, good[1]]
    completions = [f"Answer: {answer}" for answer in answers]
    scores = dict(zip(answers, maths.score("", completions, "\\frac12")))
    assert [answer for answer, score in scores.items() if score.reward == 1] == good
    counted = statuses(scores.values())
    assert set(counted) <= {"correct", "wrong", "timeout", "memory", "crash", "no_answer"}
    assert counted["timeout"] >= 3  # they do hang


def test_a_hostile_reference_stays_within_its_limit() -> None:
    maths = Guarded("math", Math(item_seconds=0.4))
    for reference in TOWERS[:2]:
        [score] = answered(maths, reference, "7^{7^7}")
        assert score.reward == 0 and score.info["status"] in ("timeout", "memory", "wrong")


def test_scores_are_the_same_from_any_thread(maths: Guarded) -> None:
    """math-verify's own limits are alarms, which work in the main thread only (elsewhere all would score 0)."""
    results: dict[int, list[Score]] = {}

    def work(i: int) -> None:
        results[i] = answered(maths, f"\\frac{{{i}}}{{7}}", f"{i}/7", f"{i}/8", f"\\frac{{{2 * i}}}{{14}}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([score.reward for score in results[i]] == [1, 0, 1] for i in range(1, 9))


def test_memory_is_limited_and_one_hog_does_not_starve_the_others() -> None:
    maths = Guarded("math", Math(item_seconds=5.0, memory_mb=64))
    hog = "\\sum_{k=1}^{9} 2^{k \\cdot 10^{9}}"
    first, bad, last = answered(maths, "\\frac12", "2/4", hog, "4/8")
    assert (first.reward, bad.reward, last.reward) == (1, 0, 1)
    assert bad.info["status"] in ("memory", "wrong", "timeout", "crash")


@pytest.mark.parametrize(
    "expression, status",
    [
        ("55", "correct"), ("sum(range(11))", "correct"), ("Fraction(110, 2)", "correct"), ("comb(11, 2)", "correct"),
        ("55.0", "correct"),
        ("56", "wrong"), ("True", "wrong"), ("'55'", "wrong"), ("[55]", "wrong"), ("", "no_answer"),
        ("undefined", "wrong"), ("1 +", "wrong"),
        ("__import__('os').system('true') or 55", "wrong"), ("open('/etc/passwd').read()", "wrong"),
        ("9**9**9**9", "timeout"),
        ("[0] * 10**10", "memory"), ("type('X', (int,), {'__eq__': lambda s, o: True})(1)", "wrong"),
        ("print('55')", "wrong"),
    ],
)  # fmt: skip
def test_a_computed_answer_is_compared_by_its_value(expression: str, status: str) -> None:
    maths = Guarded("math", Math(item_seconds=0.5))
    [score] = maths.score("", [f"Answer: {expression}"], {"answer": 55, "compute": True})
    assert score.info["status"] == status and score.reward == float(status == "correct"), score


def test_the_tolerance_holds_for_computed_answers(maths: Guarded) -> None:
    for tolerance, right in ((0, [1, 0, 0]), (1e-3, [1, 1, 0])):
        reference = {"answer": 0.5, "compute": True, "tolerance": tolerance}
        scores = maths.score("", ["Answer: 1/2", "Answer: 0.5001", "Answer: 0.6"], reference)
        assert [score.reward for score in scores] == right


def test_the_references_check_decides(maths: Guarded) -> None:
    source = """
def check(answer):
    n = int(answer)
    return n > 100 and all(n % i for i in range(2, n))
"""
    answers = ["101", "103", "100", "9", "prime", "101) or (True", "'" * 50]
    scores = maths.score("", [f"Answer: {answer}" for answer in answers], {"check": source})
    assert [score.reward for score in scores] == [1, 1, 0, 0, 0, 0, 0]
    for returned in ("1", "'True'", "[True]", "None"):  # only True is true
        [score] = maths.score("", ["Answer: 1"], {"check": f"def check(answer): return {returned}"})
        assert score.reward == 0


@pytest.mark.parametrize(
    "reference, words",
    [
        (None, "the answer in a 'math' reference is None"), ("", "not blank"), (True, "is True"), ([1], "is \\[1\\]"),
        ({}, "either 'answer' or 'check'"),
        ({"answer": 1, "check": "x"}, "either"), ({"answer": 1, "form": "x"}, "unknown field 'form'"),
        ({"answer": 1, "format": "x"}, "there are: boxed"),
        ({"answer": 1, "format": []}, "there are: boxed"), ({"answer": "1", "compute": True}, "must be a number"),
        ({"check": 1}, "source of a Python"),
        ({"answer": 1, "compute": True, "tolerance": "x"}, "'tolerance'"),
    ],
)  # fmt: skip
def test_a_bad_reference_is_refused(maths: Guarded, reference: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        maths.check(reference)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = sandbox_module.importlib.util.find_spec
    monkeypatch.setattr(
        sandbox_module.importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name)
    )
    with pytest.raises(ValueError, match=r"needs math_verify: pip install 'nb_lightning\[rewards\]'"):
        get_verifier("math")


def test_an_item_that_ends_its_job_costs_only_itself(maths: Guarded) -> None:
    """The one that ends its job is the one that is blamed, wherever it stands."""
    maths = Guarded("math", Math(item_seconds=0.4))
    bad = "10^{10^{10^{10}}}+((100!)!)!"
    for place in range(4):
        answers = [f"{i}/3" for i in range(1, 5)]
        answers[place] = bad
        found = [score.info["status"] for score in answered(maths, "10/3", *answers)]
        assert found == ["timeout" if i == place else "wrong" for i in range(4)]
    assert maths.verifier.limits == Limits(0.4, 2.6, 512)
