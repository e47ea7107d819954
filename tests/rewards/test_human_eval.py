"""HumanEval's problems become tasks: their assertions are read, and what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nb_lightning.rewards.human_eval import main, read_problems, task_of
from nb_lightning.rewards.registry import get_verifier

PROMPT = '''from typing import List, Tuple


def halve(n: int) -> float:
    return n / 2


def ends(numbers: List[int], sign: int = 1) -> Tuple[int, int]:
    """Return the smallest and the largest number.
    >>> ends([2, 1, 3])
    (1, 3)
    """
'''
TEST = '''

METADATA = {"author": "x"}


def check(candidate):
    """Assertions."""
    assert candidate([2, 1, 3]) == (1, 3)
    assert candidate([-5], 1) == (-5, -5), "one number"
    assert (7, 9) == candidate([9, 7])
    assert True, "This prints if this assert fails"
'''


def problem(**changes: Any) -> dict[str, Any]:
    fields = {"task_id": "HumanEval/900", "prompt": PROMPT, "entry_point": "ends", "test": TEST}
    return {**fields, "canonical_solution": "", **changes}


def test_assertions_become_tests_and_the_code_before_the_function_the_prelude() -> None:
    task = task_of(problem())
    assert (task.id, task.source, task.verifier) == ("HumanEval/900", "human_eval", "code")
    assert task.reference == {
        "entry": "ends",
        "private": [
            {"args": [[2, 1, 3]], "expect": {"$tuple": [1, 3]}},
            {"args": [[-5], 1], "expect": {"$tuple": [-5, -5]}},
            {"args": [[9, 7]], "expect": {"$tuple": [7, 9]}},
        ],
        "tolerance": 1e-9,
        "prelude": "from typing import List, Tuple\n\n\ndef halve(n: int) -> float:\n    return n / 2\n\n\n",
    }
    assert task.messages[0]["content"].endswith(f"```python\n{PROMPT.rstrip()}\n```")


@pytest.mark.runs
def test_the_verifier_takes_the_task() -> None:
    task, verifier = task_of(problem()), get_verifier("code")
    verifier.check(task.reference)
    right = "```python\ndef ends(numbers: List[int], sign=1):\n    halve(2)\n    return min(numbers), max(numbers)\n```"
    wrong = [right.replace("max", "min"), right.replace("return ", "return 0, ")]
    scores = verifier.score("", [right, *wrong], task.reference)
    assert [score.reward for score in scores] == [1, 0, 0]


@pytest.mark.parametrize(
    "assertion, args, expect",
    [
        ("candidate('x') is None", ["x"], None),
        ("candidate('x')", ["x"], True),
        ("not candidate('x', 2)", ["x", 2], False),
        ("candidate({1: 'a'}) == {2, 3}", [{"$dict": [[1, "a"]]}], {"$set": [2, 3]}),
        ("candidate(b'ab', 1j) == [(), None]", [{"$bytes": "6162"}, {"$complex": [0.0, 1.0]}], [{"$tuple": []}, None]),
        ("candidate(1e999) == -1.5", [{"$float": "inf"}], -1.5),
    ],
)
def test_forms_of_assertions(assertion: str, args: list[Any], expect: Any) -> None:
    task = task_of(problem(test=f"def check(candidate):\n    assert {assertion}"))
    assert task.reference["private"] == [{"args": args, "expect": expect}]
    get_verifier("code").check(task.reference)


def test_a_difference_below_a_bound_is_a_tolerance() -> None:
    task = task_of(problem(test="def check(candidate):\n    assert abs(candidate(3.5) - 0.5) < 1e-6"))
    assert task.reference["private"] == [{"args": [3.5], "expect": 0.5}] and task.reference["tolerance"] == 1e-6


@pytest.mark.parametrize(
    "statement",
    [
        "for i in range(3): assert candidate(i) == i",
        "assert candidate(candidate(1)) == 1",
        "assert candidate(*[1]) == 1",
        "assert candidate(n=1) == 1",
        "assert candidate(1) == other(1)",
        "assert candidate(1) > 1",
        "assert 1 < candidate(1) < 3",
        "import os",
        "print(candidate(1))",
    ],
)
def test_a_problem_that_could_only_be_run_is_left_out(statement: str) -> None:
    with pytest.raises(ValueError, match="the test does more than compare candidate with literals: "):
        task_of(problem(test=f"def check(candidate):\n    assert candidate(1) == 1\n    {statement}"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_is_left_out_is_named_with_its_line(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    bad = [
        "{", json.dumps({"task_id": "x"}), json.dumps(problem(entry_point="f")), json.dumps(problem(test="x = 1")),
        json.dumps(problem(prompt="def")), json.dumps(problem(test="def check(candidate):\n    pass")),
    ]  # fmt: skip
    text = "\n".join([json.dumps(problem()), "", *bad]).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    monkeypatch.setattr("sys.argv", ["human_eval", str(tmp_path / name)])
    main()
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["HumanEval/900"]
    lines = err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{tmp_path / name}:{number}" for number in range(3, 9)]
    assert [line.split(": ", 2)[2] for line in lines[1:4]] == [
        "not an object with texts task_id, prompt, entry_point, test",
        "the prompt has no function 'f'",
        "the test has no function check",
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    archive = gzip.compress(b"{}\n" * 99)
    (tmp_path / "damaged.jsonl.gz").write_bytes(archive[:12] + bytes([archive[12] ^ 255]) + archive[13:])
    (tmp_path / "cut.jsonl.gz").write_bytes(archive[:-9])
    for name in ("a.jsonl.gz", "damaged.jsonl.gz", "cut.jsonl.gz", "none.jsonl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            list(read_problems(tmp_path / name))
