"""Find which characters of a rendered conversation the assistant wrote.

A template may mark what the assistant writes by `{% generation %}` blocks, as ours does. Most that come with
tokenizers do not. These are rendered again with each assistant turn replaced by a random word: the text that stays the
same before and after the word is not part of the turn. A turn that cannot be located in this way is an error, not a
guess.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from nb_lightning.text.messages import ChatError, or_raise
from nb_lightning.text.thoughts import THINK, closed_thought, thought_of
from nb_lightning.text.variables import Variables


@dataclass(frozen=True)
class Turn:
    """An assistant turn: message number `index` wrote the characters [start, end), its end-of-turn token included."""

    index: int
    start: int
    end: int


class Job(NamedTuple):
    """One text to render. `marks` are written before and after each generation block."""

    messages: list[dict[str, Any]]
    tools: Sequence[Any] | None = None
    add_generation_prompt: bool = False
    marks: tuple[str, str] = ("", "")

    def request(self, variables: Variables) -> list[Any]:
        """Write the job as template_worker.py reads it."""
        tools = list(self.tools) if self.tools else None
        return [self.messages, tools, self.add_generation_prompt, variables, self.marks]


class Renderer(Protocol):
    """What locating turns needs of a `ChatTemplate`.

    Attributes:
        probed: whether with tools -> see `Replacement._probe`.
        differs_with_tools: another template writes conversations with tools.
    """

    probed: dict[bool, tuple[str, str]]

    @property
    def differs_with_tools(self) -> bool: ...

    def render_jobs(self, groups: list[list[Job]]) -> list[list[str] | ChatError]:
        """Render the jobs of each group: all of its texts, or one error."""
        ...


class Blocks:
    """Locates turns by generation blocks: the text is rendered again with a mark before and after each block."""

    def __init__(self) -> None:
        nonce = secrets.token_hex(8)
        self.marks = f"<{nonce}>", f"</{nonce}>"
        self.any_mark = re.compile("|".join(f"({mark})" for mark in self.marks))

    def jobs(self, messages: list[dict[str, Any]], tools: Any) -> list[Job]:
        return [Job(messages, tools), Job(messages, tools, marks=self.marks)]

    def turns(self, messages: list[dict[str, Any]], tools: Any, texts: list[str]) -> tuple[str, list[Turn]]:
        indices, (text, marked) = _assistant_indices(messages), texts
        pieces = self.any_mark.split(marked)
        marks = [mark for mark in pieces if mark in self.marks]
        if marks != [*self.marks] * len(indices):
            raise ChatError(
                "the template has not one generation block for each assistant turn",
                detail=f", but {marks.count(self.marks[0])} for {len(indices)}",
            )
        pieces = pieces[::3]  # between them are the two groups of the pattern
        if "".join(pieces) != text:
            raise ChatError("the template changes what it wrote in a generation block afterwards; it must not")
        ends = [0, *accumulate(map(len, pieces))]
        return text, [Turn(i, ends[2 * n + 1], ends[2 * n + 2]) for n, i in enumerate(indices)]


class Replacement:
    """Locates turns of a template without generation blocks.

    Turn i is replaced by a message whose content is a word W, without reasoning and calls; the text is then A + W + Z.
    In the real text the turn lies between A's generation prompt and Z, with the end-of-turn token that Z begins with.
    The real text must begin with A up to that prompt, and end with Z. Otherwise the text around a turn depends on its
    content, and the turn cannot be located.
    """

    def __init__(self, template: Renderer) -> None:
        self.template, self.word = template, f"W{secrets.token_hex(12)}"

    def jobs(self, messages: list[dict[str, Any]], tools: Any) -> list[Job]:
        prompt, _ = self._probe(tools)
        indices, word = _assistant_indices(messages), {"role": "assistant", "content": self.word}
        jobs = [Job(messages, tools)]
        jobs += [Job([*messages[:i], word, *messages[i + 1 :]], tools) for i in indices]
        if not prompt:  # a turn then begins where the text of the messages before it ends
            jobs += [Job(messages[:i], tools) for i in indices]
        return jobs

    def turns(self, messages: list[dict[str, Any]], tools: Any, texts: list[str]) -> tuple[str, list[Turn]]:
        prompt, end = self._probe(tools)
        indices, (text, *others) = _assistant_indices(messages), texts
        turns = []
        for number, i in enumerate(indices):
            before, word, after = others[number].partition(self.word)
            if not word:
                raise ChatError("the template leaves out an assistant turn", f"message {i}")
            start = _after_prompt(before, prompt) if prompt else len(others[len(indices) + number])
            content_end = len(text) - len(after)
            is_same = start is not None and text[:start] == before[:start]
            if not is_same and closed_thought(prompt) and thought_of(messages[i]):
                raise ChatError("reasoning where the generation prompt closes the thought", f"message {i}")
            if (
                start is None
                or start > min(content_end, len(before))
                or not is_same
                or not (text.endswith(after) and after.startswith(end))
            ):
                raise ChatError(
                    "the template does not write this assistant turn between its generation prompt and its end of turn",
                    f"message {i}",
                    "; give a template with {% generation %} blocks",
                )
            head, think, rest = prompt.partition(THINK)
            if before[:start].endswith(head) and text.startswith(think + rest, start):
                start += len(think + rest)  # this turn has reasoning, so the prompt includes the opened <think>
            turns.append(Turn(i, start, content_end + len(end)))
        return text, turns

    def _probe(self, tools: Any) -> tuple[str, str]:
        """Find the generation prompt, and the end of a turn without white space after it, in a small conversation.

        It has no tools, unless another template writes conversations with tools.
        """
        tools = tools if self.template.differs_with_tools else None
        if bool(tools) not in self.template.probed:
            question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": self.word}
            jobs = [Job([question], tools), Job([question], tools, True), Job([question, answer], tools)]
            asked, prompted, answered = or_raise(self.template.render_jobs([jobs])[0])
            if not prompted.startswith(asked) or self.word not in answered:
                raise ChatError(
                    "the template's generation prompt cannot be told; give one with {% generation %} blocks"
                )
            self.template.probed[bool(tools)] = prompted[len(asked) :], answered.partition(self.word)[2].rstrip()
        return self.template.probed[bool(tools)]


def _assistant_indices(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _after_prompt(before: str, prompt: str) -> int | None:
    """Find the end of the last generation prompt in `before`; only white space and an empty thought may follow it.

    A prompt may end in an opened `<think>` that the template omits in a turn without reasoning.
    """
    for form in (prompt, prompt.partition("<think>")[0]):
        head, separator, rest = before.rpartition(form) if form else ("", "", "")
        if separator and re.fullmatch(r"\s*(<think>)?\s*(</think>)?\s*", rest):
            return len(head) + len(form)
    return None
