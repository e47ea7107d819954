"""The interface: scores, lookup by name, and verifiers that fail."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from nb_lightning.rewards import Guarded, Score, get_verifier, registry, statuses


@pytest.mark.parametrize(
    "completion, reward, status",
    [
        ("Answer: a b", 1, "correct"),
        ("thinking... Answer: x\nAnswer:  a\n b ", 1, "correct"),
        ("Answer: a b\nAnswer: c", 0, "wrong"),
        ("a b", 1, "correct"),
        ("well, a b", 0, "wrong"),
        ("Answer: A b", 0, "wrong"),
        ("Answer: a b.", 0, "wrong"),
        ("Answer: ab", 0, "wrong"),
        ("Answer: ", 0, "no_answer"),
        ("", 0, "no_answer"),
    ],
)
def test_exact_compares_the_text_after_the_last_mark(completion: str, reward: float, status: str) -> None:
    [score] = get_verifier("exact").score("", [completion], "a  b")
    assert (score.reward, score.info["status"]) == (reward, status)


@pytest.mark.parametrize("reference", [None, 3, "", "  ", ["a"]])
def test_exact_refuses_a_reference_that_is_no_text(reference: Any) -> None:
    with pytest.raises(ValueError, match="the reference of 'exact' is"):
        get_verifier("exact").check(reference)
    with pytest.raises(ValueError, match="the reference of 'exact' is"):
        get_verifier("exact").score("", ["a"], reference)


def test_statuses_are_counted() -> None:
    scores = get_verifier("exact").score("", ["a", "b", "", "a"], "a")
    assert [score.reward for score in scores] == [1, 0, 0, 1]
    assert statuses(scores) == {"correct": 2, "wrong": 1, "no_answer": 1}


def test_no_completions_are_no_scores() -> None:
    assert get_verifier("exact").score("", [], "a") == []


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no verifier is called 'exakt'; there are: .*exact"):
        get_verifier("exakt")


class Bad:
    """A verifier that does what its reference says. (Those that run in a process of their own: test_isolated.py.)"""

    in_process = True

    def score(self, prompt: str, completions: Sequence[str], reference: Any) -> list[Score]:
        if reference == "raise":
            raise ZeroDivisionError("ha")
        if reference == "exit":
            raise SystemExit(0)
        if reference == "short":
            return []
        if reference == "type":
            return [0.5] * len(completions)  # type: ignore[list-item]
        return [Score(float(reference), {"note": 1})] * len(completions)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    entry = EntryPoint("bad", f"{__name__}:Bad", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Bad)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])
    return get_verifier("bad")


@pytest.mark.parametrize(
    "reference, words",
    [
        ("raise", "bad: ZeroDivisionError: ha"),
        ("exit", "bad: SystemExit: 0"),
        ("short", "0 scores for 2 completions"),
        ("type", "AttributeError"),
        ("nan", "a reward of nan is not in [0, 1]"),
        ("inf", "a reward of inf is not in [0, 1]"),
        ("1.5", "a reward of 1.5 is not in [0, 1]"),
        ("-0.1", "a reward of -0.1 is not in [0, 1]"),
    ],
)
def test_a_failing_verifier_gives_zeros(bad: Guarded, reference: str, words: str) -> None:
    scores = bad.score("", ["a", "b"], reference)
    assert [score.reward for score in scores] == [0, 0]
    assert statuses(scores) == {"verifier_error": 2}
    assert words in scores[0].info["why"]


def test_a_verifier_of_another_package_is_found(bad: Guarded) -> None:
    half, whole = bad.score("", ["a"], "0.5") + bad.score("", ["a"], "1")
    assert (half.reward, half.info) == (0.5, {"status": "wrong", "note": 1})
    assert (whole.reward, whole.info) == (1, {"status": "correct", "note": 1})


def test_a_verifier_of_another_package_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("gone", "no_such_package:Gone", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(ValueError, match=r"verifier 'gone' \(no_such_package:Gone\) cannot be loaded: No module"):
        get_verifier("gone")
