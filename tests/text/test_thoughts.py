"""Which text of a message, or of a prompt, is a thought."""

from __future__ import annotations

import pytest

from nb_lightning.text.thoughts import closed_thought, opened_thought, split_thought, thought_of, without_thought

BOTH = (False, True)


@pytest.mark.parametrize(
    "content, thought, rest, prompt_opens",
    [
        ("<think>\nsum\n</think>\n\n4", "sum", "4", BOTH),
        (" <think>a\nb</think>\n c</think>", "a\nb", "c</think>", BOTH),
        ("<think></think>4", "", "4", BOTH),
        ("<think>sum", "", "<think>sum", BOTH),
        ("4", "", "4", BOTH),
        ("It is <think>sum</think>", "", "It is <think>sum</think>", BOTH),
        ("sum\n</think>\n\n4", "sum", "4", BOTH),  # a tag on a line of its own
        ("sum\n</think>", "sum", "", BOTH),
        ("</think>\n4", "", "4", BOTH),
        ("sum</think>4", "sum", "4", [True]),
        ("Use the </think> tag.\n</think>\n4", "Use the", "tag.\n</think>\n4", [True]),
        ("Close it with the </think> tag.", "", "Close it with the </think> tag.", [False]),
        ("Close it with </think>\nand go on.", "", "Close it with </think>\nand go on.", [False]),
        ("a </think> b\n</think>\n4", "", "a </think> b\n</think>\n4", [False]),
    ],
)  # fmt: skip
def test_thoughts_at_the_beginning_of_the_content(
    content: str, thought: str, rest: str, prompt_opens: list[bool]
) -> None:
    user, message = ({"role": role, "content": content} for role in ("user", "assistant"))
    for opens in prompt_opens:
        assert thought_of(message, opens) == thought
        assert without_thought(message, opens) == {**message, "content": rest}
        assert split_thought(message, opens)["content"] == rest
        assert thought_of(user, opens) == "" and without_thought(user, opens) == user == split_thought(user, opens)


@pytest.mark.parametrize(
    "prompt, opened, closed",
    [
        ("assistant\n<think>\n", "<think>\n", ""),
        ("assistant\n<think>\n\n</think>\n\n", "", "<think>\n\n</think>\n\n"),
        ("assistant\n", "", ""),
        ("<think>\nHm.\n</think>\n", "", ""),
    ],
)  # fmt: skip
def test_a_prompt_shows_whether_it_opens_or_closes_a_thought(prompt: str, opened: str, closed: str) -> None:
    assert (opened_thought(prompt), closed_thought(prompt)) == (opened, closed)
