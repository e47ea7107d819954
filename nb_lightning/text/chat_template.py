"""Chat templates: render messages as text, and find which characters of it the assistant wrote.

A template comes with a checkpoint and is never trusted. It runs in another process (template_worker.py), which is
reused, and killed when it takes too long.

How the assistant's turns are found in the text: nb_lightning/text/turns.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nb_lightning.text.messages import ChatError, Message, check_messages, is_trained, or_raise, outcome
from nb_lightning.text.template_process import TemplateProcess
from nb_lightning.text.thoughts import opened_thought
from nb_lightning.text.turns import Blocks, Job, Replacement, Turn
from nb_lightning.text.variables import Variables, check_variables

# A template made of two, see `choose_by_tools`.
WITH_TOOLS, WITHOUT_TOOLS, END = (
    "{% if tools %}{# tool_use #}\n",
    "{{ '' }}{% else %}{# default #}\n",
    "{{ '' }}{% endif %}",
)
CPU_S = 2.0  # CPU seconds of one call; a long conversation takes about a millisecond


class ChatTemplate:
    """A Jinja chat template, rendered in an immutable sandbox that is killed past a time limit.

    Safe to use from any thread, to pickle, and to carry across a fork: each process starts its own worker.

    Args:
        source: Jinja source.
        special: variables of the template such as `bos_token` and `eos_token`.
        now: ISO date and time that `strftime_now` returns; None is the current time. Data that is prepared with a
            template that writes the date depends on it.
        cpu_s: limit of one call, in CPU seconds.
        variables: of the template in every conversation, such as `enable_thinking` (nb_lightning/text/variables.py).
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str] = {},
        now: str | None = None,
        cpu_s: float = CPU_S,
        variables: Mapping[str, Any] = {},
    ) -> None:
        self.source, self.special, self.now, self.cpu_s = source, dict(special), now, cpu_s
        self.variables = check_variables(variables)
        self._workers: dict[int, TemplateProcess] = {}  # process id -> worker
        self.probed: dict[bool, tuple[str, str]] = {}  # see `Replacement._probe`

    @classmethod
    def chatml(cls) -> ChatTemplate:
        """Return our template: ChatML with reasoning in `<think>`, tools and generation blocks.

        A turn is `<|im_start|>role`, newline, content, `<|im_end|>`. Reasoning is written in earlier turns too, so
        that the text of the first messages is a prefix of the whole text, and all turns can be trained at once.
        """
        return cls(Path(__file__).with_name("chatml.jinja").read_text("utf-8"))

    def with_variables(self, variables: Variables) -> ChatTemplate:
        """Return this template with further variables, which win over its own. Both share one worker.

        Raises:
            ChatError: a variable has a reserved name, or is no JSON.
        """
        if not variables:
            return self
        changed = {**self.variables, **check_variables(variables)}
        other = ChatTemplate(self.source, self.special, self.now, self.cpu_s, changed)
        other._workers = self._workers
        return other

    def describe_unread(self) -> str:
        """Name the variables that the template does not read, in one line; "" if it reads all, or is broken.

        transformers ignores such a variable, and so does rendering.
        """
        names = self._ask(["variables"])[0] if self.variables else []
        unread = [] if isinstance(names, ChatError) else [key for key in self.variables if key not in names]
        return f"the chat template does not read {', '.join(unread)}" if unread else ""

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the generation prompt ends in an opened `<think>`, so that the model writes only its end."""
        prompt = outcome(self.render, [{"role": "user", "content": "x"}], None, True)
        return not isinstance(prompt, ChatError) and bool(opened_thought(prompt))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Render a conversation; with `add_generation_prompt`, up to where the assistant begins to write.

        Raises:
            ChatError: invalid messages, or a template that raises, takes too long or too much memory.
        """
        (texts,) = self.render_jobs([[Job(check_messages(messages), tools, add_generation_prompt)]])
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
        finder = Blocks() if self.has_generation_blocks else Replacement(self)
        checked = [outcome(check_messages, messages) for messages, _ in conversations]
        groups = [
            outcome(finder.jobs, messages, tools) if not isinstance(messages, ChatError) else messages
            for messages, (_, tools) in zip(checked, conversations)
        ]
        rendered = iter(self.render_jobs([jobs for jobs in groups if not isinstance(jobs, ChatError)]))
        results: list[Any] = []
        for messages, (_, tools), jobs in zip(checked, conversations, groups):
            texts = jobs if isinstance(jobs, ChatError) else next(rendered)
            results.append(texts if isinstance(texts, ChatError) else outcome(finder.turns, messages, tools, texts))
        return results

    @property
    def has_generation_blocks(self) -> bool:
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    @property
    def differs_with_tools(self) -> bool:
        """Whether another template writes conversations with tools, see `choose_by_tools`."""
        return self.source.startswith(WITH_TOOLS)

    def render_jobs(self, groups: list[list[Job]]) -> list[list[str] | ChatError]:
        """Render the jobs of each group in the worker: all of its texts, or one error."""
        return self._ask([[job.request(self.variables) for job in jobs] for jobs in groups])

    def _ask(self, groups: list[Any]) -> list[list[str] | ChatError]:
        """Send groups to this process's worker (template_worker.py)."""
        if not groups:
            return []
        setup = {"source": self.source, "special": self.special, "now": self.now, "cpu_s": self.cpu_s}
        return self._workers.setdefault(os.getpid(), TemplateProcess()).render(setup, groups)

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
