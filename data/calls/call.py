"""What a model is asked, and what comes back: a call, a reply, or a failure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from nb_lightning.generation.sampling import Sampling

CUT = ("length", "content_filter")  # finishes of replies that are not whole


@dataclass(frozen=True)
class Call:
    """One question to a model. Calls with equal contents are one call, and paid once.

    Attributes:
        messages: as in OpenAI's API.
        sampling: how tokens are drawn.
        seed: of the draws, not negative; see `join_seeds`.
        number: tells calls with otherwise equal contents apart. Each has its own draws.
        tools: functions that the model may call, as in OpenAI's API; None without any.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: Sampling
    seed: int
    number: int = 0
    tools: Sequence[Mapping[str, Any]] | None = None

    def key(self, engine: Mapping[str, Any]) -> str:
        """Return the SHA-256 of all that the reply depends on, in hexadecimal.

        Args:
            engine: `Engine.about`.
        """
        content = [engine, self.messages, _changed_fields(self.sampling), self.seed, self.number]
        content += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """The raw reply to a call. What it says is read by a pure function of it, which can be mended without a new call.

    Attributes:
        message: the assistant's, as it came: role, content, and where there are any reasoning_content and tool_calls.
        finish: "stop", "length", "tool_calls", ...
        prompt_tokens, completion_tokens: 0 where the server does not say.
        attempts: the call's, this one included.
        seconds: of the last attempt; 0 for a model on this machine, which answers many calls at once.
        retries: kind of a failed attempt -> how many there were.
    """

    message: dict[str, Any]
    finish: str
    prompt_tokens: int
    completion_tokens: int
    attempts: int = 1
    seconds: float = 0.0
    retries: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_cut(self) -> bool:
        """Whether the model was stopped before it had finished. Such a reply is kept, and is no result."""
        return self.finish in CUT

    @property
    def tokens(self) -> int:
        """The tokens of prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Failure:
    """No reply came to a call.

    Attributes:
        reason: the kind of failure, so that equal ones can be counted.
        detail: what this one was.
        retries: as in `Reply`, the last attempt included.
    """

    reason: str
    detail: str = ""
    retries: Mapping[str, int] = field(default_factory=dict)


def join_seeds(*parts: int) -> int:
    """Join non-negative integers to one seed, which NumPy draws from as from the sequence of the parts.

    NumPy's `SeedSequence` reads an integer as 32-bit words, the lowest first, and a sequence as the words of its parts.
    """
    seed, shift = 0, 0
    for part in parts:
        seed |= part << shift
        shift += 32 * max(1, -(-part.bit_length() // 32))
    return seed


@lru_cache(64)
def _changed_fields(sampling: Sampling) -> dict[str, Any]:
    """Return the fields that differ from their defaults, so that a new field of `Sampling` changes no key."""
    values = {f.name: (getattr(sampling, f.name), f.default) for f in fields(sampling)}
    return {name: value for name, (value, default) in values.items() if value != default}
