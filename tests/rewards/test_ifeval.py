"""Instructions that a program can check."""

from __future__ import annotations

from typing import Any

import pytest

from nb_lightning.rewards import get_verifier
from nb_lightning.rewards.ifeval import CHECKS

# name, arguments, texts that follow the instruction, texts that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("words", {"at_least": 2, "at_most": 3}, ["two words", "it's well-known, really"],
    ["one", "one two three four", "- !"]),
    ("sentences", {"at_least": 2, "at_most": 2}, ["One. Two!", "Really?! Yes", "At 3.5 m. Yes."],
    ["One", "A. B. C.", "3.5"]),
    ("paragraphs", {"at_least": 2, "at_most": 2}, ["a\n\nb", "a\nb\n \n\nc\n"], ["a", "a\nb", "a\n\nb\n\nc"]),
    ("bullets", {"at_least": 2, "at_most": 2}, ["* a\n* b", "so:\n  - a\n  - b"], ["* a", "*a\n*b", "- a\n- b\n- c"]),
    ("headings", {"at_least": 1}, ["# A\ntext", "x\n### B"], ["#A", "text # A", "####### A"]),
    ("placeholders", {"at_least": 2}, ["[name] and [place]"], ["[name]", "[] []", "name place"]),
    ("keyword", {"word": "Red car"}, ["a red car.", "RED  CAR"], ["red", "red cars", "a car red", "reddest car"]),
    ("keyword", {"word": "red", "at_least": 0, "at_most": 0}, ["reddish", "blue"], ["Red.", "a red, red rose"]),
    ("keyword", {"word": "a", "at_least": 2, "at_most": 2}, ["a b a"], ["a", "a a a"]),
    ("letter", {"letter": "e", "at_least": 2, "at_most": 3}, ["Ee", "eel tree"[:6]], ["e", "eeee", ""]),
    ("no_commas", {}, ["a; b", "a. b"], ["a, b", "一，二", "一、二"]),
    ("lowercase", {}, ["all small 1."], ["One", "123", "aB"]),
    ("uppercase", {}, ["ALL LARGE 1."], ["One", "123", "Ab"]),
    ("capital_words", {"at_least": 1, "at_most": 2}, ["it is NOW", "NOW and THEN"], ["now", "A B C", "Now"]),
    ("json_only", {}, ['{"a": [1]}', " 3 ", '```json\n{"a": 1}\n```', "```\n[]\n```"],
    ["{'a': 1}", 'Here: {"a": 1}', "[" * 10**5]),
    ("starts_with", {"phrase": "Dear  reader"}, ["Dear reader, ...", "\nDear\nreader"],
    ["dear reader", "My dear reader"]),
    ("ends_with", {"phrase": "The end."}, ["... The end.", "The\nend.\n"], ["The end", "The end. Not yet."]),
    ("in_quotes", {}, ['"all of it"', ' "a" '], ['"', '"a" b', "'a'"]),
    ("title", {}, ["<<A title>>\ntext"], ["<A>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("one_of", {"options": ["yes", "no idea"]}, ["yes", " no\nidea "], ["Yes", "yes.", "no"]),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, followed, not_followed", CASES, ids=[row[0] for row in CASES])
def test_a_check_decides_by_the_text(
    name: str, arguments: dict[str, Any], followed: list[str], not_followed: list[str]
) -> None:
    verifier = get_verifier("ifeval")
    reference = {"instructions": [{"name": name, **arguments}]}
    verifier.check(reference)
    scores = verifier.score("", [*followed, *not_followed], reference)
    assert [score.reward for score in scores] == [1] * len(followed) + [0] * len(not_followed)
    assert all(score.info["failed"] == [name] for score in scores if score.info["status"] == "wrong")


def test_every_check_is_tested() -> None:
    assert {row[0] for row in CASES} == set(CHECKS)


def test_all_instructions_count() -> None:
    reference = {"instructions": [{"name": "no_commas"}, {"name": "lowercase"}, {"name": "words", "at_most": 2}]}
    texts = ["fine", "Not, fine at all", "", "<think>Long, AND loud</think>fine", "<think>fine"]
    scores = get_verifier("ifeval").score("", texts, reference)
    assert [score.reward for score in scores] == [1, 0, 0, 1, 0]
    assert scores[1].info["failed"] == ["no_commas", "lowercase", "words"]
    assert scores[2].info["status"] == scores[4].info["status"] == "no_answer"


@pytest.mark.runs
@pytest.mark.timeout(120)
def test_hostile_text_costs_little() -> None:
    instructions = [{"name": name, **arguments} for name, arguments, _, _ in CASES]
    texts = [
        "a" * 10**6,
        "a " * 10**5,
        "[" * 10**6,
        "<<" * 10**5,
        "#" * 10**6,
        "- " * 10**5,
        "." * 10**6,
        "a-" * 10**5,
        "\n" * 10**6,
        '"' * 10**6,
    ]
    scores = get_verifier("ifeval").score("", texts, {"instructions": instructions})
    assert [score.reward for score in scores] == [0] * len(texts)


@pytest.mark.parametrize(
    "reference, words",
    [
        ({}, "needs a list 'instructions'"), ({"instructions": []}, "at least one"),
        ({"instructions": ["x"]}, "there are: words"), ({"instructions": [{"name": []}]}, "there are: words"),
        ({"instructions": [{"name": "wrods"}]}, r"instructions\[0\].*wrods.*there are: words"),
        ({"instructions": [{"name": "words", "most": 3}]}, "'words' has no 'most'; it has: at_least, at_most"),
        ({"instructions": [{"name": "no_commas", "at_most": 3}]}, "it has: nothing"),
        ({"instructions": [{"name": "keyword"}]}, "'keyword' needs 'word'"),
        ({"instructions": [{"name": "words", "at_most": "3"}]}, "'at_most' of 'words' is '3', not int"),
        ({"instructions": [{"name": "keyword", "word": ""}]}, "'word' of 'keyword' is '', not str"),
        ({"instructions": [{"name": "one_of", "options": []}]}, "'options' of 'one_of'"),
    ],
)  # fmt: skip
def test_a_bad_reference_is_refused(reference: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_verifier("ifeval").check(reference)
