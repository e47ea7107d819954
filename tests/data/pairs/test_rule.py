"""Which responses become a pair."""

from __future__ import annotations

from typing import Any

import pytest

from data.pairs.responses import Response
from data.pairs.rule import CUT_OFF, EQUAL, FAILED, NEVER_RIGHT, NEVER_WRONG, Rule

pytestmark = pytest.mark.runs


def r(text: str, reward: float = 1.0, finish: str = "stop", status: str = "") -> Response:
    return Response(text, finish, reward, status or ("correct" if reward == 1 else "wrong"))


RIGHT, WRONG, CUT, BROKEN = r("a"), r("b", 0.0), r("c", finish="length"), r("d", 0.0, status="verifier_error")


@pytest.mark.parametrize(
    "rule, teacher, student, expected",
    [
        (Rule(), [WRONG, RIGHT], [RIGHT, WRONG], [("a", "b")]),
        (Rule(), [WRONG, WRONG], [WRONG], NEVER_RIGHT),
        (Rule(), [CUT, WRONG], [WRONG], CUT_OFF),
        (Rule(), [BROKEN], [WRONG], FAILED),
        (Rule(), [BROKEN, RIGHT], [BROKEN], FAILED),  # a verifier that failed says nothing of the response
        (Rule(), [RIGHT], [RIGHT, r("x")], NEVER_WRONG),
        (Rule(), [RIGHT], [RIGHT, CUT, r("x", 0.5)], NEVER_WRONG),
        (Rule(margin=0.5), [RIGHT], [RIGHT, r("x", 0.5)], [("a", "x")]),
        (Rule(least=0.5, margin=0.5), [r("x", 0.5)], [WRONG], [("x", "b")]),
        (Rule(), [RIGHT], [r("a", 0.0)], EQUAL),  # a verifier of two minds
        (Rule(), [RIGHT], [r("c", 0.0, "length")], [("a", "c")]),  # one that never ends is a good rejected one
        (Rule(by="judge"), [WRONG], [r("x")], [("b", "x")]),
        (Rule(by="judge"), [RIGHT], [RIGHT], EQUAL),
        (Rule(by="judge"), [BROKEN], [BROKEN, RIGHT], [("d", "a")]),
        (Rule(by="judge"), [CUT], [WRONG], CUT_OFF),
        (Rule(by="both"), [WRONG], [RIGHT], NEVER_RIGHT),
    ],
)  # fmt: skip
def test_the_rule(rule: Rule, teacher: list[Response], student: list[Response], expected: Any) -> None:
    found = rule.choose_pairs(teacher, student, "seed")
    assert (found if isinstance(found, str) else [(c.text, d.text) for c, d in found]) == expected


def test_several_pairs_of_a_prompt() -> None:
    """They share no response, unless there are too few to choose."""
    teacher = [r(f"t{i % 4}") for i in range(8)] + [r("bad", 0.0)]
    student = [r(f"s{i % 3}", 0.0) for i in range(6)] + [r("good")]
    pairs = Rule(pairs=5).choose_pairs(teacher, student, "x")
    assert len(pairs) == 3 == len({c.text for c, _ in pairs}) == len({d.text for _, d in pairs})
    assert all(c.reward == 1 and d.reward == 0 for c, d in pairs)
    assert pairs == Rule(pairs=5).choose_pairs(teacher, student, "x")
    drawn = {Rule().choose_pairs(teacher, student, str(seed))[0][0].text for seed in range(40)}
    assert drawn == {"t0", "t1", "t2", "t3"}
    for chosen in (["t"], ["t", "u"]):
        pairs = Rule(pairs=5).choose_pairs([r(text) for text in chosen], student, "x")
        assert sorted(d.text for _, d in pairs) == ["s0", "s1", "s2"] and {c.text for c, _ in pairs} == set(chosen)
        assert len(Rule(pairs=2).choose_pairs([r("t")], student, "x")) == 2


@pytest.mark.parametrize("wrong", [{"by": "luck"}, {"margin": 0}, {"least": 2}, {"preference": 0}, {"pairs": 0}])
def test_a_rule_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^--"):
        Rule(**wrong)
