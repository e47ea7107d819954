"""Ask many questions of one role, read the replies, and ask again where a reply cannot be read."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.calls.call import Call, Reply
from data.calls.caller import Caller
from data.calls.engine import Engine
from data.refine.drafts import History
from data.refine.parse import Unreadable
from nb_lightning.generation.sampling import Sampling

TRIES = 2  # of a question whose reply cannot be read
RETRY_TEMPERATURE = 0.7  # at least, of a second try: at 0 the same reply would come again


@dataclass(frozen=True)
class Question:
    """A call about one instruction.

    Attributes:
        name: distinguishes the calls of one role about one instruction; part of the seed.
        read: reads the reply; raises `Unreadable`.
        is_answer: the reply answers the task itself, and may call its tools.
    """

    history: History
    name: str
    messages: Sequence[dict[str, Any]]
    read: Callable[[Reply], Any]
    is_answer: bool = False


@dataclass
class Asker:
    """Asks through one `Caller`; counts what could not be read.

    Attributes:
        seed: of all calls, together with role, task and question.
        unreadable: role -> reason -> replies.
    """

    caller: Caller
    seed: int
    unreadable: dict[str, Counter[str]] = field(default_factory=dict)

    def ask(self, role: str, engine: Engine, sampling: Sampling, questions: Sequence[Question]) -> list[Any]:
        """Ask all questions; return what each reply says, in order; None where no reply could be had or read."""
        results: list[Any] = [None] * len(questions)
        left = list(range(len(questions)))
        for attempt in range(TRIES):
            if not left:
                break
            if attempt:
                sampling = warmer(sampling)
            calls = [self._call(role, questions[i], sampling, attempt) for i in left]
            again = []
            for i, reply in zip(left, self.caller.ask(engine, calls, role)):
                if reply is None:  # the engine gave up; the caller counts it
                    continue
                history = questions[i].history
                history.calls[role] = history.calls.get(role, 0) + 1
                history.tokens[role] = history.tokens.get(role, 0) + reply.completion_tokens
                try:
                    results[i] = questions[i].read(reply)
                except Unreadable as error:
                    self.unreadable.setdefault(role, Counter())[str(error)] += 1
                    again.append(i)
            left = again
        return results

    def _call(self, role: str, question: Question, sampling: Sampling, attempt: int) -> Call:
        task = question.history.task
        name = f"{self.seed} {role} {task.key} {question.name}"
        tools = task.tools if question.is_answer else None
        return Call(question.messages, sampling, zlib.crc32(name.encode()) >> 1, attempt, tools)


def warmer(sampling: Sampling) -> Sampling:
    """Return the sampling of a further try, warm enough that another reply comes."""
    return replace(sampling, temperature=max(sampling.temperature, RETRY_TEMPERATURE))
