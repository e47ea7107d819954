"""Chat templates: render messages as text, and find which characters of it the assistant wrote.

A template comes with a checkpoint and is never trusted. It runs in another process (template_worker.py), which is
reused, and killed when it takes too long.

A template may mark what the assistant writes by `{% generation %}` blocks, as ours does. Most that come with
tokenizers do not. These are rendered again with each assistant turn replaced by a random word: the text that stays the
same before and after the word is not part of the turn. A turn that cannot be located in this way is an error, not a
guess.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from nb_lightning.text.messages import THINK, ChatError, Message, check_messages, is_trained, or_raise, outcome
from nb_lightning.text.template_process import TemplateProcess

# A template made of two, see `choose_by_tools`.
WITH_TOOLS, WITHOUT_TOOLS, END = (
    "{% if tools %}{# tool_use #}\n",
    "{{ '' }}{% else %}{# default #}\n",
    "{{ '' }}{% endif %}",
)
CPU_S = 2.0  # CPU seconds of one call; a long conversation takes about a millisecond


@dataclass(frozen=True)
class Turn:
    """An assistant turn: message number `index` wrote the characters [start, end), its end-of-turn token included."""

    index: int
    start: int
    end: int


class ChatTemplate:
    """A Jinja chat template, rendered in an immutable sandbox that is killed past a time limit.

    Safe to use from any thread, to pickle, and to carry across a fork: each process starts its own worker.

    Args:
        source: Jinja source.
        special: variables of the template such as `bos_token` and `eos_token`.
        now: ISO date and time that `strftime_now` returns; None is the current time. Data that is prepared with a
            template that writes the date depends on it.
        cpu_s: limit of one call, in CPU seconds.
    """

    def __init__(
        self, source: str, special: Mapping[str, str] = {}, now: str | None = None, cpu_s: float = CPU_S
    ) -> None:
        self.source, self.special, self.now, self.cpu_s = source, dict(special), now, cpu_s
        self._workers: dict[int, TemplateProcess] = {}  # process id -> worker
        self.probed: dict[bool, tuple[str, str]] = {}  # see `_Replacement._probe`

    @classmethod
    def chatml(cls) -> ChatTemplate:
        """Return our template: ChatML with reasoning in `<think>`, tools and generation blocks.

        A turn is `<|im_start|>role`, newline, content, `<|im_end|>`. Reasoning is written in earlier turns too, so
        that the text of the first messages is a prefix of the whole text, and all turns can be trained at once.
        """
        return cls(Path(__file__).with_name("chatml.jinja").read_text("utf-8"))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation; with `add_generation_prompt`, up to where the assistant begins to write.

        Raises:
            ChatError: invalid messages, or a template that raises, takes too long or too much memory.
        """
        (texts,) = self._render([[_Job(check_messages(messages), tools, add_generation_prompt)]])
        return or_raise(texts)[0]

    def render_with_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation, and find the character spans [start, end) to train on.

        These are the assistant's turns without those that have `train: false`.

        Raises:
            ChatError: as `render`; or the assistant's turns cannot be located.
        """
        text, turns = self.render_turns(messages, tools)
        return text, [(turn.start, turn.end) for turn in turns if is_trained(messages[turn.index])]

    def render_turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Turn]]:
        """Render a conversation, and locate each assistant turn in it, in order.

        Raises:
            ChatError: as `render_with_spans`.
        """
        return or_raise(self.render_many([(messages, tools)])[0])

    def render_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[Any] | None]]
    ) -> list[tuple[str, list[Turn]] | ChatError]:
        """Do `render_turns` for many conversations (messages and tools) at once, which is faster.

        Returns:
            For each conversation its text and turns, or the error that `render_turns` would raise.
        """
        finder = _Blocks(self) if self.has_generation_blocks else _Replacement(self)
        checked = [outcome(check_messages, messages) for messages, _ in conversations]
        groups = [
            outcome(finder.jobs, messages, tools) if not isinstance(messages, ChatError) else messages
            for messages, (_, tools) in zip(checked, conversations)
        ]
        rendered = iter(self._render([jobs for jobs in groups if not isinstance(jobs, ChatError)]))
        results: list[Any] = []
        for messages, (_, tools), jobs in zip(checked, conversations, groups):
            texts = jobs if isinstance(jobs, ChatError) else next(rendered)
            results.append(texts if isinstance(texts, ChatError) else outcome(finder.turns, messages, tools, texts))
        return results

    @property
    def has_generation_blocks(self) -> bool:
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def _render(self, groups: list[list[_Job]]) -> list[list[str] | ChatError]:
        """Render the jobs of each group in the worker: all of its texts, or one error."""
        if not groups:
            return []
        setup = {"source": self.source, "special": self.special, "now": self.now, "cpu_s": self.cpu_s}
        requests = [
            [
                [job.messages, list(job.tools) if job.tools else None, job.add_generation_prompt, job.marks]
                for job in jobs
            ]
            for jobs in groups
        ]
        return self._workers.setdefault(os.getpid(), TemplateProcess()).render(setup, requests)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": {}}


def choose_by_tools(default: str, tool_use: str) -> str:
    """Make one template of two: `tool_use` writes conversations with tools, `default` all others.

    Each writes what it does alone: Jinja ignores a newline at a template's end, and the empty expressions keep white
    space there from being taken for the indentation of a tag.
    """
    tool_use, default = (re.sub(r"(\r\n|\r|\n)\Z", "", source) for source in (tool_use, default))
    return WITH_TOOLS + tool_use + WITHOUT_TOOLS + default + END


def refusing_template(reason: str) -> str:
    """Make a template that raises `reason` for every conversation."""
    return f"{{{{ raise_exception({json.dumps(reason)}) }}}}"


def read_template(spec: str | Path, named: str) -> str:
    """Read the Jinja source of a chat template.

    Args:
        spec: a file, or "chatml" for ours.
        named: how an error names it, such as "--template a.jinja".

    Raises:
        ValueError: the file cannot be read.
    """
    if str(spec) == "chatml":
        return ChatTemplate.chatml().source
    try:
        return Path(spec).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{named} cannot be read: {error}") from error


class _Job(NamedTuple):
    """One text to render. `marks` are written before and after each generation block."""

    messages: list[dict[str, Any]]
    tools: Sequence[Any] | None = None
    add_generation_prompt: bool = False
    marks: tuple[str, str] = ("", "")


class _Blocks:
    """Locates turns by generation blocks: the text is rendered again with a mark before and after each block."""

    def __init__(self, template: ChatTemplate) -> None:
        nonce = secrets.token_hex(8)
        self.marks = f"<{nonce}>", f"</{nonce}>"
        self.any_mark = re.compile("|".join(f"({mark})" for mark in self.marks))

    def jobs(self, messages: list[dict[str, Any]], tools: Any) -> list[_Job]:
        return [_Job(messages, tools), _Job(messages, tools, marks=self.marks)]

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


class _Replacement:
    """Locates turns of a template without generation blocks.

    Turn i is replaced by a message whose content is a word W, without reasoning and calls; the text is then A + W + Z.
    In the real text the turn lies between A's generation prompt and Z, with the end-of-turn token that Z begins with.
    The real text must begin with A up to that prompt, and end with Z. Otherwise the text around a turn depends on its
    content, and the turn cannot be located.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.word = template, f"W{secrets.token_hex(12)}"

    def jobs(self, messages: list[dict[str, Any]], tools: Any) -> list[_Job]:
        prompt, _ = self._probe(tools)
        indices, word = _assistant_indices(messages), {"role": "assistant", "content": self.word}
        jobs = [_Job(messages, tools)]
        jobs += [_Job([*messages[:i], word, *messages[i + 1 :]], tools) for i in indices]
        if not prompt:  # a turn then begins where the text of the messages before it ends
            jobs += [_Job(messages[:i], tools) for i in indices]
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
            if (
                start is None
                or start > min(content_end, len(before))
                or text[:start] != before[:start]
                or not (text.endswith(after) and after.startswith(end))
            ):
                raise ChatError(
                    "the template does not write this assistant turn between its generation prompt and its end of turn",
                    f"message {i}",
                    "; give a template with {% generation %} blocks",
                )
            head, think, rest = prompt.partition("<think>")
            if before[:start].endswith(head) and text.startswith(think + rest, start):
                start += len(think + rest)  # this turn has reasoning, so the prompt includes the opened <think>
            turns.append(Turn(i, start, content_end + len(end)))
        return text, turns

    def _probe(self, tools: Any) -> tuple[str, str]:
        """Find the generation prompt, and the end of a turn without white space after it, in a small conversation.

        It has no tools, unless another template writes conversations with tools.
        """
        tools = tools if self.template.source.startswith(WITH_TOOLS) else None
        if bool(tools) not in self.template.probed:
            question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": self.word}
            jobs = [_Job([question], tools), _Job([question], tools, True), _Job([question, answer], tools)]
            asked, prompted, answered = or_raise(self.template._render([jobs])[0])
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


def opened_thought(prompt: str) -> str:
    """Return the `<think>` that a prompt ends with, and the white space after it; "" for a prompt that opens none."""
    match = re.search(rf"{THINK}\s*\Z", prompt)
    return match[0] if match else ""
