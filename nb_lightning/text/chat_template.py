"""Chat templates: messages into the text a model sees, and which characters of it the assistant wrote.

A template comes with a checkpoint and is never trusted: it runs in a process of its own (template_worker.py), which
is reused, and killed when it takes too long.

Which characters are the assistant's is marked by `{% generation %}` blocks, as in ours. Templates without them (most
that come with tokenizers) are asked again with each assistant turn replaced by a word that occurs nowhere else: what
stays the same before and after it is not the turn's. What cannot be told apart in this way is an error, not a guess.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nb_lightning.text.messages import ChatError, Message, check_messages, outcome
from nb_lightning.text.template_process import TemplateProcess

T = TypeVar("T")
CPU_S = 2.0  # per call; to render a long conversation takes about a millisecond


@dataclass(frozen=True)
class Turn:
    """An assistant turn: message number `index` wrote the characters [start, end), its end-of-turn token included."""

    index: int
    start: int
    end: int


class ChatTemplate:
    """A Jinja chat template: rendered in an immutable sandbox, killed past a time limit, never trusted.

    Safe to use from any thread, to pickle, and to carry across a fork; each process has a worker of its own.

    Args:
        source: the template's text.
        special: variables of the template such as `bos_token` and `eos_token`.
        now: ISO date and time that `strftime_now` tells; None is the time of day. What is prepared from a template
            that writes the date depends on it.
        cpu_s: limit of one call, in CPU seconds.
    """

    def __init__(
        self, source: str, special: Mapping[str, str] = {}, now: str | None = None, cpu_s: float = CPU_S
    ) -> None:
        self.source, self.special, self.now, self.cpu_s = source, dict(special), now, cpu_s
        self._workers: dict[int, TemplateProcess] = {}  # process id -> worker
        self.probed: tuple[str, str] | None = None  # see `_Replacement`

    @classmethod
    def chatml(cls) -> ChatTemplate:
        """Ours: `<|im_start|>role`, newline, content, `<|im_end|>`; reasoning in `<think>`, tools, generation blocks.

        Reasoning is written wherever it is given, in earlier turns too: every rendering of a conversation's beginning
        is then a prefix of the whole, and all turns can be trained at once.
        """
        return cls(Path(__file__).with_name("chatml.jinja").read_text("utf-8"))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where the assistant begins to write.

        Raises:
            ChatError: messages that are no conversation, or a template that raises, takes too long or too much memory.
        """
        (texts,) = self._render([[_Job(check_messages(messages), tools, add_generation_prompt)]])
        return _or_raise(texts)[0]

    def render_with_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans [start, end) to train on: the assistant's, less turns of `train: false`.

        Raises:
            ChatError: as `render`; or the template does not show what the assistant wrote.
        """
        text, turns = self.render_turns(messages, tools)
        return text, [(turn.start, turn.end) for turn in turns if messages[turn.index].get("train") is not False]

    def render_turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Turn]]:
        """The text, and where in it each assistant turn lies, in order.

        Raises:
            ChatError: as `render_with_spans`.
        """
        return _or_raise(self.render_many([(messages, tools)])[0])

    def render_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[Any] | None]]
    ) -> list[tuple[str, list[Turn]] | ChatError]:
        """`render_turns` of many conversations (messages and tools) at a time, which is faster; or its error."""
        finder = _Blocks(self) if self.has_generation_blocks else _Replacement(self)
        checked = [outcome(check_messages, messages) for messages, _ in conversations]
        groups = [
            outcome(finder.jobs, messages, tools) if not isinstance(messages, ChatError) else messages
            for messages, (_, tools) in zip(checked, conversations)
        ]
        answers = iter(self._render([jobs for jobs in groups if not isinstance(jobs, ChatError)]))
        results: list[Any] = []
        for messages, jobs in zip(checked, groups):
            texts = jobs if isinstance(jobs, ChatError) else next(answers)
            results.append(texts if isinstance(texts, ChatError) else outcome(finder.turns, messages, texts))
        return results

    @property
    def has_generation_blocks(self) -> bool:
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def _render(self, groups: list[list[_Job]]) -> list[list[str] | ChatError]:
        if not groups:
            return []
        setup = {"source": self.source, "special": self.special, "now": self.now, "cpu_s": self.cpu_s}
        requests = [
            [[job.messages, list(job.tools) if job.tools else None, job.prompt, job.marks] for job in jobs]
            for jobs in groups
        ]
        return self._workers.setdefault(os.getpid(), TemplateProcess()).render(setup, requests)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": {}}


class _Job(NamedTuple):
    messages: list[dict[str, Any]]
    tools: Sequence[Any] | None = None
    prompt: bool = False
    marks: tuple[str, str] = ("", "")


class _Blocks:
    """Finds turns by generation blocks: the text once more with a mark before and after each."""

    def __init__(self, template: ChatTemplate) -> None:
        nonce = secrets.token_hex(8)
        self.marks = f"<{nonce}>", f"</{nonce}>"
        self.either = re.compile("|".join(f"({mark})" for mark in self.marks))

    def jobs(self, messages: list[dict[str, Any]], tools: Any) -> list[_Job]:
        return [_Job(messages, tools), _Job(messages, tools, marks=self.marks)]

    def turns(self, messages: list[dict[str, Any]], texts: list[str]) -> tuple[str, list[Turn]]:
        indices, (text, marked) = _assistant(messages), texts
        pieces = self.either.split(marked)
        found = [mark for mark in pieces if mark in self.marks]
        if found != [*self.marks] * len(indices):
            raise ChatError(
                "the template has not one generation block for each assistant turn",
                detail=f", but {found.count(self.marks[0])} for {len(indices)}",
            )
        pieces = pieces[::3]  # without the two groups of the separator
        if "".join(pieces) != text:
            raise ChatError("the template changes what it wrote in a generation block afterwards; it must not")
        ends = [0, *accumulate(map(len, pieces))]
        return text, [Turn(i, ends[2 * n + 1], ends[2 * n + 2]) for n, i in enumerate(indices)]


class _Replacement:
    """Finds turns of a template without generation blocks.

    With turn i replaced by a word W and nothing else (no reasoning, no calls), the text is A + W + Z. In the real text
    the turn is what lies between A's generation prompt and Z, and the end-of-turn token that Z begins with. The text
    must begin as A does up to that prompt, and end in Z: else the template writes what is around a turn differently
    depending on its content, and where the turn lies cannot be told.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.word = template, f"W{secrets.token_hex(12)}"

    def jobs(self, messages: list[dict[str, Any]], tools: Any) -> list[_Job]:
        prompt, _ = self._probe()
        indices, word = _assistant(messages), {"role": "assistant", "content": self.word}
        jobs = [_Job(messages, tools)]
        jobs += [_Job([*messages[:i], word, *messages[i + 1 :]], tools) for i in indices]
        if not prompt:  # then a turn begins where the text of the messages before it ends
            jobs += [_Job(messages[:i], tools) for i in indices]
        return jobs

    def turns(self, messages: list[dict[str, Any]], texts: list[str]) -> tuple[str, list[Turn]]:
        prompt, end = self._probe()
        indices, (text, *others) = _assistant(messages), texts
        turns = []
        for number, i in enumerate(indices):
            before, found, after = others[number].partition(self.word)
            if not found:
                raise ChatError("the template leaves out an assistant turn", f"message {i}")
            start = _after_prompt(before, prompt) if prompt else len(others[len(indices) + number])
            content_end = len(text) - len(after)
            known = start is not None and start <= min(content_end, len(before)) and text[:start] == before[:start]
            if not (known and text.endswith(after) and after.startswith(end)):
                raise ChatError(
                    "the template does not write this assistant turn between its generation prompt and its end of turn",
                    f"message {i}",
                    "; give a template with {% generation %} blocks",
                )
            head, think, rest = prompt.partition("<think>")
            if before[:start].endswith(head) and text.startswith(think + rest, start):
                start += len(think + rest)  # this turn has a thought, so the prompt goes on to open it
            turns.append(Turn(i, start, content_end + len(end)))
        return text, turns

    def _probe(self) -> tuple[str, str]:
        """(generation prompt, end of turn without the white space after it), as the smallest conversation has them."""
        if self.template.probed is None:
            question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": self.word}
            jobs = [_Job([question]), _Job([question], prompt=True), _Job([question, answer])]
            asked, prompted, answered = _or_raise(self.template._render([jobs])[0])
            if not prompted.startswith(asked) or self.word not in answered:
                raise ChatError(
                    "the template's generation prompt cannot be told; give one with {% generation %} blocks"
                )
            self.template.probed = prompted[len(asked) :], answered.partition(self.word)[2].rstrip()
        return self.template.probed


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


def _assistant(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _or_raise(found: T | ChatError) -> T:
    if isinstance(found, ChatError):
        raise found
    return found


def _after_prompt(before: str, prompt: str) -> int | None:
    """Where the last generation prompt in `before` ends, if nothing but white space and an empty thought follow it.

    A prompt may end in an opened `<think>` that the template leaves away where there was no thought.
    """
    for form in (prompt, prompt.partition("<think>")[0]):
        head, found, rest = before.rpartition(form) if form else ("", "", "")
        if found and re.fullmatch(r"\s*(<think>)?\s*(</think>)?\s*", rest):
            return len(head) + len(form)
    return None
