"""Where the answer is."""

from __future__ import annotations

import pytest

from nb_lightning.rewards.extract import after_thinking, answer_line, boxed, code_block


@pytest.mark.parametrize(
    "text, said",
    [
        ("a", "a"), ("<think>x</think>a", "a"), ("x</think>a", "a"), ("<think>x", ""), (" <think>x", ""),
        ("<think>a</think>b</think>c", "c"), ("<think>a</think><think>b", ""),
        ("about <think> tags", "about <think> tags"),
    ],
)  # fmt: skip
def test_the_response_begins_after_the_reasoning(text: str, said: str) -> None:
    assert after_thinking(text) == said


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Answer: 5", "5"), ("Answer: 5.", "5"), ("Answer: 0.5.", "0.5"), ("**Answer:** 5", "5"),
        ("**Answer: 5**", "5"),
        ("Answer:\n\n 5 \nmore", "5"), ("Answer: 1\nAnswer: 2", "2"), ("Answer: 5 apples\nthat is", "5 apples"),
        ("Answer:", None), ("Answer: \n ", None), ("5", None), ("answer: 5", None), ("", None),
        ("Answer: __x__", "__x__"),
    ],
)  # fmt: skip
def test_the_answer_is_the_line_of_the_last_mark(text: str, answer: str | None) -> None:
    assert answer_line(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{5}", "5"), (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} \boxed{2", "1"), (r"\boxed{", None), (r"\boxed", None), ("5", None),
        (r"\boxed{}", ""), (r"\boxed 5 {6}", None), (r"\boxed{a}}", "a"), (r"$\boxed{x^{2}}$.", "x^{2}"), ("", None),
    ],
)  # fmt: skip
def test_the_last_closed_box_is_found(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\na\n```", "a\n"), ("```\na\n```", "a\n"), ("```py\na\nb\n```\nend", "a\nb\n"),
        ("```Python\na\n```", "a\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"), ("```python\na\n```\n```bash\nb\n```", "a\n"),
        ("```python\na", None),
        ("```cpp\na\n```", None), ("a", None), ("", None), ("```python\n```", "\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("1. so\n   ```python\n   a\n   ```", "a\n"), ("```python\na\n```\n```python\nb", "a\n"),
        ("``` a ```", None),
        ("```python\nx = '''\n``` not the end\n'''\n```", "x = '''\n``` not the end\n'''\n"),
    ],
)  # fmt: skip
def test_the_last_closed_python_block_is_found(text: str, code: str | None) -> None:
    assert code_block(text) == code


FENCE = "```"


@pytest.mark.parametrize(
    "text, code",
    [
        (f"{FENCE}python\nx = 1\n{FENCE}\nIt prints:\n{FENCE}\n[1]\n{FENCE}", "x = 1\n"),  # a program and its output
        (f"{FENCE}\nx = 1\n{FENCE}", "x = 1\n"),
        (f'{FENCE}python title="a.py" {{1,3}}\nx = 1\n{FENCE}', "x = 1\n"),
        (f"{FENCE}python3,ignore\nx = 1\n{FENCE}", "x = 1\n"),
        (f"{FENCE}pythonic\nx = 1\n{FENCE}", None),
        (f"1. Here:\n   {FENCE}python\n   if x:\n       y\n   {FENCE}", "if x:\n    y\n"),
        (f"  {FENCE}python\nx = 1\n  y = 2\n  {FENCE}", "x = 1\ny = 2\n"),  # a line with less indentation
        (f"{FENCE}python\nx = 1\n{FENCE}`", "x = 1\n"),  # a longer closing fence
        (f"{FENCE}`python\n{FENCE}\n{FENCE}`", "```\n"),  # a shorter fence inside is text
        (f"{FENCE}python\nx\n{FENCE}\n{FENCE}json\n{{}}\n{FENCE}", "x\n"),
    ],
)
def test_a_fence_is_read_as_commonmark_does(text: str, code: str | None) -> None:
    assert code_block(text) == code


@pytest.mark.timeout(120)
def test_hostile_text_costs_little() -> None:
    """A second; hours, were one of the rules quadratic."""
    for text in (
        "\\boxed{" * 200_000,
        "{" * 10**6,
        "```\n" * 200_001,
        "`" * 10**6,
        "Answer:" * 10**5,
        "</think>" * 10**5,
        "\n" * 10**6,
    ):
        for rule in (boxed, code_block, answer_line, after_thinking):
            rule(text)
