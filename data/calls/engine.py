"""Who answers calls: the protocol of an engine, and the error of one that refuses to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from data.calls.call import Call, Failure, Reply

TOO_LONG = "the prompt is too long for the model's context"  # the reason of a failure
OnReply = Callable[[int, Reply | Failure], None]


class Refused(ValueError):
    """An engine refuses calls for a reason that no repetition mends, such as a wrong key or model name."""


class Engine(Protocol):
    """Answers calls."""

    def about(self) -> dict[str, Any]:
        """Identify the engine, for the keys of calls and for provenance. An engine that costs money has a "url"."""
        ...

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        """Answer all calls, in any order.

        Args:
            on_reply: called once for each call, from any thread, with its number in `calls` and its reply or failure.
                If it raises, the engine begins no other call, reports those that it has begun, and raises the error.

        Raises:
            Refused: the engine refuses calls. Those that it has begun are reported before.
        """
        ...
