"""What is sent back: a job's choices, whole or in pieces, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nb_lightning.generation.decoder import NewToken
from nb_lightning.generation.sampling import Sampling
from nb_lightning.serve.text_stream import END, TOOL_CALL, Parts, TextStream, TokenBytes

CHAT, TEXT = "chat.completion", "text_completion"
LEAST_LOGPROB = -9999.0  # JSON has neither infinity nor NaN


@dataclass
class Piece:
    """What is new of a choice: (field, value) of its message, the tokens that began in it, "" or why it ended."""

    index: int
    parts: list[tuple[str, Any]] = field(default_factory=list)
    tokens: list[tuple[int, NewToken]] = field(default_factory=list)
    finish_reason: str = ""

    def extend(self, other: Piece) -> None:
        self.parts += other.parts
        self.tokens += other.tokens
        self.finish_reason = other.finish_reason


class Choice:
    """One completion while it is written."""

    def __init__(self, index: int, text: TextStream, parts: Parts) -> None:
        self.index, self.text = index, text
        self._parts, self._calls = parts, 0

    def add(self, tokens: Sequence[NewToken]) -> Piece:
        piece = Piece(self.index)
        for token in tokens:
            text, begun = self.text.add(token)
            piece.tokens += begun
            for name, value in self._parts.add(text, bool(self.text.finish_reason)):
                piece.parts.append(self._call(value) if name == "tool_calls" else (name, value))
            if self.text.finish_reason:
                called = self._calls and self.text.finish_reason == "stop"
                piece.finish_reason = "tool_calls" if called else self.text.finish_reason
                break
        return piece

    def _call(self, text: str) -> tuple[str, Any]:
        """A tool call; text that is none stays content."""
        try:
            call = json.loads(text)
            function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))}
            if not isinstance(call["name"], str):
                raise TypeError("a tool's name is a string")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "content", f"{TOOL_CALL}{text}{END[TOOL_CALL]}"
        index, self._calls = self._calls, self._calls + 1
        return "tool_calls", {
            "index": index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": function,
        }


@dataclass
class Job:
    """A request that was found good. Choice i continues prompt i // n."""

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
            Choice(i, TextStream(self.token_bytes, self.stops), Parts(self.tags, self.inside))
            for i in range(len(self.prompts) * self.n)
        ]

    def body(self, pieces: Sequence[Piece], chunk: bool, **more: Any) -> dict[str, Any]:
        """The answer, or a chunk of it, with these choices."""
        choices = [self._choice(piece, chunk) for piece in pieces]
        kind = f"{CHAT}.chunk" if chunk and self.kind == CHAT else self.kind
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more
        }  # fmt: skip

    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        completion = sum(choice.text.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _choice(self, piece: Piece, chunk: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason or None, "logprobs": None}
        if self.kind == CHAT:
            choice["delta" if chunk else "message"] = _message(piece.parts, chunk)
            if self.logprobs:
                choice["logprobs"] = {"content": [self._chat_logprob(token) for _, token in piece.tokens]}
        else:
            choice["text"] = "".join(value for _, value in piece.parts)
            if self.logprobs:
                choice["logprobs"] = self._text_logprobs(piece.tokens)
        return choice

    def _chat_logprob(self, token: NewToken) -> dict[str, Any]:
        def entry(id: int, logprob: float) -> dict[str, Any]:
            return {"token": self._name(id), "logprob": _finite(logprob), "bytes": list(self.token_bytes(id))}

        return {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}

    def _text_logprobs(self, tokens: Sequence[tuple[int, NewToken]]) -> dict[str, Any]:
        """As OpenAI's: the token that was drawn is among the most likely ones, or after them."""
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
        """A token as a string; one that is no whole characters as OpenAI writes it: bytes:\\xe4."""
        data = self.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _message(parts: Sequence[tuple[str, Any]], chunk: bool) -> dict[str, Any]:
    """A message of the assistant, or what is new of it."""
    message: dict[str, Any] = {}
    for name, value in parts:
        message[name] = message.get(name, [] if name == "tool_calls" else "") + (
            [value] if name == "tool_calls" else value
        )
    if not chunk:
        message = {"role": "assistant", "refusal": None, "content": None if "tool_calls" in message else "", **message}
    return message


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB
