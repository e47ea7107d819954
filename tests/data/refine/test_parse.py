"""The ways in which models answer, and what is read of them."""

from __future__ import annotations

import pytest

from data.calls.call import Reply
from data.refine.drafts import Critique, Draft
from data.refine.parse import (
    Unreadable,
    read_checklist,
    read_critiques,
    read_draft,
    read_line_critiques,
    read_scores,
    read_tagged,
    read_thought_chain,
    write_line_critiques,
)
from tests.data.refine.harness import reply

ITEMS = '{"items": ["It is 5."]}'
DEEP = '{"a":' * 5000

READABLE = {
    "alone": ITEMS,
    "over several lines": '{\n  "items": [\n    "It is 5."\n  ]\n}',
    "CRLF": '{\r\n"items": ["It is 5."]\r\n}',
    "fence": f"```json\n{ITEMS}\n```",
    "fence in capitals": f"```JSON\n{ITEMS}\n```",
    "fence without language": f"```\n{ITEMS}\n```",
    "fence of tildes": f"~~~json\n{ITEMS}\n~~~",
    "fence that is not closed": f"```json\n{ITEMS}",
    "preamble": f"Here is the checklist:\n\n{ITEMS}",
    "words after it": f"{ITEMS}\n\nTell me if you need more.",
    "braces before it": f"The set {{1, 2}} and \\frac{{1}}{{2}} matter. {ITEMS}",
    "code before it": f"```python\nx = {{}}\n```\n```json\n{ITEMS}\n```",
    "a thought": f"<think>\nPerhaps {{}} or {ITEMS}?\n</think>\n\n{ITEMS}",
    "a thought that the prompt opened": f"Perhaps {ITEMS}?\n</think>\n\n{ITEMS}",
    "white space": '{"items": ["  It is 5. \\n"]}',
}
UNREADABLE = {
    "": "empty",
    "<think>\nhm\n</think>\n\n": "empty",
    "I cannot do that.": "not one JSON object",
    '{"items": ["It is 5."': "not one JSON object",
    '{"items": ["It is 5.",]}': "not one JSON object",
    "{'items': ['It is 5.']}": "not one JSON object",
    '["It is 5."]': "not one JSON object",
    DEEP: "not one JSON object",
    f"{ITEMS} or {ITEMS}": "not one object with exactly items",
    '{"items": ["a"], "notes": 1}': "not one object with exactly items",
    f'{{"result": {ITEMS}}}': "not one object with exactly items",
    '{"items": ["a"], "items": ["b"]}': "a key that is there twice",
    '{"items": [NaN]}': "NaN, which is not JSON",
    '{"items": []}': "items are no list of 1 to 50",
    '{"items": "It is 5."}': "items are no list of 1 to 50",
    '{"items": [" "]}': "an item is no text",
    '{"items": [{"text": "a"}]}': "an item is no text",
}


@pytest.mark.parametrize("answer", READABLE.values(), ids=READABLE)
def test_a_checklist_is_read_however_it_is_wrapped(answer: str) -> None:
    assert read_checklist(reply(answer)) == ["It is 5."]


@pytest.mark.parametrize(("answer", "reason"), UNREADABLE.items(), ids=[str(i) for i in range(len(UNREADABLE))])
def test_what_is_no_checklist_is_not_guessed(answer: str, reason: str) -> None:
    with pytest.raises(Unreadable) as error:
        read_checklist(reply(answer))
    assert str(error.value) == reason


def test_the_limit_of_items() -> None:
    assert len(read_checklist(reply(str({"items": ["a"] * 50}).replace("'", '"')))) == 50
    with pytest.raises(Unreadable, match="no list of 1 to 50"):
        read_checklist(reply(str({"items": ["a"] * 51}).replace("'", '"')))


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_a_reply_that_is_cut_off_is_never_read_even_if_it_looks_whole(finish: str) -> None:
    with pytest.raises(Unreadable, match=r"^cut off$"):
        read_checklist(reply(ITEMS, finish))
    assert read_draft(reply("It is 5.", finish), "d") == Draft("d", "", "It is 5.", finish)
    assert read_draft(reply("It is 5.", finish), "d").is_cut


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ('{"scores": {"a": 7, "b": 10}}', {"a": 0.7, "b": 1.0}),
        ('{"scores": {"b": 0, "a": 7.0}}', {"a": 0.7, "b": 0.0}),
        ('{"scores": {"a": "7", "b": "10"}}', {"a": 0.7, "b": 1.0}),
        ('{"scores": {"a": 7}}', "scores of other dimensions than asked"),
        ('{"scores": {"a": 7, "b": 1, "c": 1}}', "scores of other dimensions than asked"),
        ('{"scores": [7, 1]}', "scores of other dimensions than asked"),
        ('{"scores": {"a": 7.5, "b": 1}}', "a score that is no whole number from 0 to 10"),
        ('{"scores": {"a": "7/10", "b": 1}}', "a score that is no whole number from 0 to 10"),
        ('{"scores": {"a": true, "b": 1}}', "a score that is no whole number from 0 to 10"),
        ('{"scores": {"a": null, "b": 1}}', "a score that is no whole number from 0 to 10"),
        ('{"scores": {"a": -1, "b": 1}}', "a score that is no whole number from 0 to 10"),
        ('{"scores": {"a": 11, "b": 1}}', "a score that is no whole number from 0 to 10"),
        ('{"scores": {"a": 1e999, "b": 1}}', "a score that is no whole number from 0 to 10"),
    ],
)
def test_scores(said: str, read: dict[str, float] | str) -> None:
    if isinstance(read, dict):
        assert read_scores(reply(said), ["a", "b"]) == read
    else:
        with pytest.raises(Unreadable, match=f"^{read}$"):
            read_scores(reply(said), ["a", "b"])


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ('"item": 2, "where": "x", "problem": "p", "fix": "f"', Critique(2, "x", "p", "f")),
        ('"item": "2", "where": " x ", "problem": "p", "fix": "f"', Critique(2, "x", "p", "f")),
        ('"item": null, "where": "", "problem": "p", "fix": "f"', Critique(None, "", "p", "f")),
        ('"item": null, "where": null, "problem": "p", "fix": "f"', Critique(None, "", "p", "f")),
        ('"item": 3, "where": "", "problem": "p", "fix": "f"', "a problem whose item is not in the checklist"),
        ('"item": 0, "where": "", "problem": "p", "fix": "f"', "a problem whose item is not in the checklist"),
        ('"item": true, "where": "", "problem": "p", "fix": "f"', "a problem whose item is not in the checklist"),
        ('"item": "first", "where": "", "problem": "p", "fix": "f"', "a problem whose item is not in the checklist"),
        ('"item": 1, "where": "", "problem": "", "fix": "f"', "problem is no text"),
        ('"item": 1, "where": "", "problem": "p", "fix": 3', "fix is no text"),
        ('"item": 1, "where": ["x"], "problem": "p", "fix": "f"', "where is no text"),
        ('"where": "", "problem": "p", "fix": "f"', "a problem with other fields than item, where, problem, fix"),
    ],
)
def test_critiques(fields: str, read: Critique | str) -> None:
    answer, draft = reply(f'{{"problems": [{{{fields}}}]}}'), Draft("d", "", "x", "stop")
    if isinstance(read, Critique):
        assert read_critiques(answer, draft, items=2) == [read]
    else:
        with pytest.raises(Unreadable, match=f"^{read}$"):
            read_critiques(answer, draft, items=2)


def test_no_problems_approve_and_other_forms_do_not() -> None:
    draft = Draft("d", "", "x", "stop")
    assert read_critiques(reply('{"problems": []}'), draft, 1) == []
    for said in ('{"problems": null}', '{"problems": {}}', "Nothing is wrong.", "{}"):
        with pytest.raises(Unreadable):
            read_critiques(reply(said), draft, 1)


DRAFT = Draft("d", "7 + 5 = 12\n\n12 + 1 = 14", "Answer: 14", "stop")


@pytest.mark.parametrize(
    ("said", "places"),
    [
        ("7 +\n12 +\nAnswer: +", []),
        ("7 +\r\n12 -", ["line 2"]),
        ("7 -", ["line 1"]),
        ("7 +\n12 +\nAnswer: -", ["line 3"]),
    ],
)
def test_line_critiques_are_read_and_written_alike(said: str, places: list[str]) -> None:
    critiques = read_line_critiques(reply(said), DRAFT, 0)
    assert [c.where for c in critiques] == places
    first_wrong = int(places[0].split()[1]) - 1 if places else None
    assert write_line_critiques(DRAFT, first_wrong) == said.replace("\r", "")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("7 +\n12 +", "fewer lines than the draft has"),
        ("7 +\n12 +\nAnswer: +\n9 +", "more lines than the draft has"),
        ("7 -\n12 +", "lines after the first wrong one"),
        ("7 +\n13 -", "a line that is no word of the draft and [+] or -"),
        ("7 ok", "a line that is no word of the draft and [+] or -"),
        ("7+", "a line that is no word of the draft and [+] or -"),
        ("", "empty"),
    ],
)
def test_line_critiques_that_are_none(said: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        read_line_critiques(reply(said), DRAFT, 0)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("<chain>\na\n</chain>\n<answer>\n5\n</answer>", ("a", "5")),
        ("Sure:\n<chain>a</chain> so <answer>5</answer>. Done.", ("a", "5")),
        ("```\n<chain>a</chain>\n<answer>5</answer>\n```", ("a", "5")),
        ("<think>\n<chain>?\n</think>\n\n<chain>a</chain><answer>5</answer>", ("a", "5")),
        # The task asks for its answer in these tags; the chain speaks of them.
        ("<chain><answer>5</answer>!</chain><answer><answer>5</answer></answer>",
         ("<answer>5</answer>!", "<answer>5</answer>")),
        ("<answer>5</answer>", "not exactly one <chain>...</chain>"),
        ("<chain>a<answer>5</answer>", "not exactly one <chain>...</chain>"),
        ("a</chain><answer>5</answer>", "not exactly one <chain>...</chain>"),
        ("<chain>a</chain><chain>b</chain><answer>5</answer>", "not exactly one <chain>...</chain>"),
        ("<answer>5</answer><chain>a</chain>", "not exactly one <answer>...</answer>"),
        ("<chain>a</chain><answer>5</answer><answer>6</answer>", "not exactly one <answer>...</answer>"),
        ("<chain> \n</chain><answer>5</answer>", "an empty <chain>"),
    ],
)  # fmt: skip
def test_tagged_replies(said: str, read: tuple[str, str] | str) -> None:
    if isinstance(read, tuple):
        assert read_tagged(reply(said), ["chain", "answer"]) == {"chain": read[0], "answer": read[1]}
    else:
        with pytest.raises(Unreadable) as error:
            read_tagged(reply(said), ["chain", "answer"])
        assert str(error.value) == read


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        (reply("<think>\nadd\n</think>\n\n5"), "add", "5"),
        (reply("add\n</think>\n\n5"), "add", "5"),
        (reply("5", reasoning_content="add"), "add", "5"),
        (reply("5", reasoning="add"), "add", "5"),
        (reply("5", reasoning="add", reasoning_content="add"), "add", "5"),
        (Reply({"content": None, "reasoning_content": "add"}, "stop", 1, 1), "add", ""),
        (reply([{"type": "text", "text": "5"}]), "", "5"),  # type: ignore[arg-type]
        (reply("<think>\nadd", "length"), "add", ""),
        (reply("Close it with </think> as usual."), "", "Close it with </think> as usual."),
    ],
)  # fmt: skip
def test_a_draft_has_its_thought_wherever_the_server_puts_it(message: Reply, reasoning: str, content: str) -> None:
    draft = read_draft(message, "d")
    assert (draft.reasoning, draft.content) == (reasoning, content)


def test_calls_of_tools_are_part_of_a_draft() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    draft = read_draft(reply("Yes.", "tool_calls", tool_calls=[call]), "d")
    assert draft.content == 'Yes.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert not draft.is_cut


def test_half_a_surrogate_pair_is_unreadable() -> None:
    with pytest.raises(Unreadable, match=r"^not UTF-8$"):
        read_draft(reply("\ud83d"), "d")


def test_a_thought_as_chain() -> None:
    assert read_thought_chain(reply("<think>\nadd\n</think>\n\n5")) == {"chain": "add", "answer": "5"}
    for said, reason in (("5", "no thought"), ("<think>\nadd\n</think>", "empty")):
        with pytest.raises(Unreadable, match=f"^{reason}$"):
            read_thought_chain(reply(said))
