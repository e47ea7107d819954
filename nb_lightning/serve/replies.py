"""Responses: a job's choices, complete or as deltas, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nb_lightning.generation.decoder import NewToken
from nb_lightning.generation.sampling import Sampling
from nb_lightning.serve.text_stream import END, TOOL_CALL, TagSplitter, TextStream, TokenBytes
from nb_lightning.text.tool_calls import parse_call

CHAT, TEXT = "chat.completion", "text_completion"
LEAST_LOGPROB = -9999.0  # nats; JSON has no infinity


@dataclass
class Delta:
    """What is new in a choice.

    Attributes:
        index: of the choice.
        fields: (field, value) of its message.
        tokens: (offset in characters, token) of the tokens that begin in it.
        finish_reason: "" while the choice goes on.
    """

    index: int
    fields: list[tuple[str, Any]] = field(default_factory=list)
    tokens: list[tuple[int, NewToken]] = field(default_factory=list)
    finish_reason: str = ""

    def extend(self, other: Delta) -> None:
        self.fields += other.fields
        self.tokens += other.tokens
        self.finish_reason = other.finish_reason


class Choice:
    """One completion while it is decoded."""

    def __init__(self, index: int, text: TextStream, splitter: TagSplitter) -> None:
        self.index, self.text = index, text
        self._splitter, self._tool_calls = splitter, 0

    def add(self, tokens: Sequence[NewToken]) -> Delta:
        delta = Delta(self.index)
        for token in tokens:
            text, begun = self.text.add(token)
            delta.tokens += begun
            for name, value in self._splitter.add(text, bool(self.text.finish_reason)):
                delta.fields.append(self._tool_call(value) if name == "tool_calls" else (name, value))
            if self.text.finish_reason:
                has_called = self._tool_calls and self.text.finish_reason == "stop"
                delta.finish_reason = "tool_calls" if has_called else self.text.finish_reason
                break
        return delta

    def _tool_call(self, text: str) -> tuple[str, Any]:
        """Parse a tool call; text that is not one stays content."""
        call = parse_call(text, strict=False)
        try:
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])} if call else None
        except RecursionError:  # writing needs a deeper stack than reading
            function = None
        if function is None:
            return "content", f"{TOOL_CALL}{text}{END[TOOL_CALL]}"
        index, self._tool_calls = self._tool_calls, self._tool_calls + 1
        return "tool_calls", {
            "index": index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": function,
        }


@dataclass
class Job:
    """A checked request. Choice i continues prompt i // n."""

    kind: str
    model: str
    prompts: list[list[int]]
    n: int
    sampling: Sampling
    seed: int
    token_bytes: TokenBytes
    logprobs: bool = False
    stops: Sequence[str] = ()
    tags: Sequence[str] = ()
    inside: str = ""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.kind == CHAT else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.choices = [
            Choice(i, TextStream(self.token_bytes, self.stops), TagSplitter(self.tags, self.inside))
            for i in range(len(self.prompts) * self.n)
        ]

    def body(self, deltas: Sequence[Delta], is_chunk: bool, **more: Any) -> dict[str, Any]:
        """Return the JSON of a response, or of a chunk of a stream."""
        choices = [self._choice(delta, is_chunk) for delta in deltas]
        kind = f"{CHAT}.chunk" if is_chunk and self.kind == CHAT else self.kind
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more
        }  # fmt: skip

    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        completion = sum(choice.text.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _choice(self, delta: Delta, is_chunk: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": delta.index, "finish_reason": delta.finish_reason or None, "logprobs": None}
        if self.kind == CHAT:
            choice["delta" if is_chunk else "message"] = _message(delta.fields, is_chunk)
            if self.logprobs:
                choice["logprobs"] = {"content": [self._chat_logprob(token) for _, token in delta.tokens]}
        else:
            choice["text"] = "".join(value for _, value in delta.fields)
            if self.logprobs:
                choice["logprobs"] = self._text_logprobs(delta.tokens)
        return choice

    def _chat_logprob(self, token: NewToken) -> dict[str, Any]:
        def entry(id: int, logprob: float) -> dict[str, Any]:
            return {"token": self._name(id), "logprob": _finite(logprob), "bytes": list(self.token_bytes(id))}

        return {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}

    def _text_logprobs(self, tokens: Sequence[tuple[int, NewToken]]) -> dict[str, Any]:
        """Return OpenAI's older format, in which the drawn token is among the most likely ones or after them."""
        return {
            "tokens": [self._name(token.id) for _, token in tokens],
            "token_logprobs": [_finite(token.logprob) for _, token in tokens],
            "top_logprobs": [
                {self._name(id): _finite(logprob) for id, logprob in [*token.top, (token.id, token.logprob)]}
                for _, token in tokens
            ]
            if self.sampling.top_logprobs
            else None,
            "text_offset": [offset for offset, _ in tokens],
        }

    def _name(self, id: int) -> str:
        """Return a token as a string; incomplete characters as OpenAI writes them: bytes:\\xe4."""
        data = self.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _message(fields: Sequence[tuple[str, Any]], is_chunk: bool) -> dict[str, Any]:
    """Return a message of the assistant, or for a chunk what is new in it."""
    message: dict[str, Any] = {}
    for name, value in fields:
        message[name] = message.get(name, [] if name == "tool_calls" else "") + (
            [value] if name == "tool_calls" else value
        )
    if not is_chunk:
        message = {"role": "assistant", "refusal": None, "content": None if "tool_calls" in message else "", **message}
    return message


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB
