"""A model behind an endpoint that speaks OpenAI's API, as an engine.

Threads ask one call each over a connection of their own. A call is asked again after errors that may pass: statuses
408, 409, 425, 429 and 5xx, time-outs, broken connections, and bodies that are no chat completion. Other statuses end
the run, because every call would get them.
"""

from __future__ import annotations

import http
import json
import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from email.utils import parsedate_to_datetime
from typing import Any

from data.calls.call import Call, Failure, Reply
from data.calls.connection import Answer, Connection, NoAnswer
from data.calls.engine import TOO_LONG, OnReply, Refused

CONCURRENCY = 8
TIMEOUT_S = 600.0  # of one attempt; a long thought takes minutes
ATTEMPTS = 6
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # between attempts; the wait doubles, and Retry-After is obeyed up to the maximum
RETRIED = (408, 409, 425, 429)  # and all from 500 on
# What OpenAI's API calls the statuses that end a run.
ERRORS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
}
LENGTH_CODE = "context_length_exceeded"  # the code of a 400 that is about this call alone
WORDS = 300  # characters of a server's words in a message
SEED_BITS = 31  # what servers take


class Endpoint:
    """A model behind an endpoint.

    Args:
        url: base address, such as http://localhost:8000/v1. The API key is in the environment: `OPENAI_API_KEY`.
        model: the endpoint's name for the model.
        concurrency: calls at a time.
        timeout: seconds of one attempt.
        attempts: at a call, before it counts as failed.
        max_wait: seconds between two attempts, at most.
    """

    def __init__(
        self, url: str, model: str, concurrency: int = CONCURRENCY, timeout: float = TIMEOUT_S,
        attempts: int = ATTEMPTS, max_wait: float = MAX_WAIT_S,
    ) -> None:  # fmt: skip
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.timeout, self.attempts, self.max_wait = timeout, attempts, max_wait

    def about(self) -> dict[str, Any]:
        return {"name": self.model, "url": self.url}

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        _Threads(self, calls, on_reply).run(min(self.concurrency, len(calls)))

    def ask(self, connection: Connection, call: Call, stop: threading.Event) -> Reply | Failure | None:
        """Ask until there is a reply or no attempt is left; None where `stop` is set before the next attempt.

        Raises:
            Refused: the endpoint refuses this and all other calls.
        """
        body, retries = self._body(call), Counter[str]()
        while True:
            start = time.perf_counter()
            try:
                answer = connection.post("/chat/completions", body)
                if answer.status == http.HTTPStatus.OK:
                    return _reply(answer.body, retries, time.perf_counter() - start)
                self._raise_if_final(answer, connection)
                error, wait = NoAnswer(f"HTTP {answer.status}", _words(answer.body)), asked_wait(answer)
            except _TooLong as too_long:
                return Failure(TOO_LONG, connection.redact(str(too_long)), retries)
            except NoAnswer as no_answer:
                error, wait = no_answer, None
            retries[error.kind] += 1
            if retries.total() == self.attempts:
                return Failure(error.kind, f"{self.url}: {connection.redact(str(error))}", retries)
            if wait is None:
                wait = FIRST_WAIT_S * 2 ** (retries.total() - 1)
            connection.close()  # it may be dead before the wait is over
            if stop.wait(min(wait, self.max_wait)):
                return None

    def _body(self, call: Call) -> dict[str, Any]:
        s = call.sampling
        body: dict[str, Any] = {
            "model": self.model, "messages": list(call.messages), "temperature": s.temperature, "top_p": s.top_p,
            "max_tokens": s.max_new_tokens, "seed": _fold(call.seed, call.number),
        }  # fmt: skip
        if call.tools:
            body["tools"] = list(call.tools)
        if s.top_k:  # not OpenAI's own, but of vLLM, llama.cpp and nb_lightning.serve
            body["top_k"] = s.top_k
        return body

    def _raise_if_final(self, answer: Answer, connection: Connection) -> None:
        """Raise what a status means that no repetition mends."""
        if answer.status in RETRIED or answer.status >= 500:
            return
        words = _words(answer.body)
        if answer.status == http.HTTPStatus.BAD_REQUEST and _error(answer.body).get("code") == LENGTH_CODE:
            raise _TooLong(words)
        name = ERRORS.get(answer.status, "")
        words = connection.redact(words or answer.headers.get("location", "") or "no reason given")
        raise Refused(f"{self.url}: {name}{name and ' '}({answer.status}): {words}")


class _TooLong(Exception):
    """The endpoint says that a call's prompt is too long."""


class _Threads:
    """Threads that ask the calls of one `answer`, each the next one that is left."""

    def __init__(self, endpoint: Endpoint, calls: Sequence[Call], on_reply: OnReply) -> None:
        self.endpoint, self.on_reply = endpoint, on_reply
        self._left = iter(enumerate(calls))
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._errors: list[Exception] = []

    def run(self, threads: int) -> None:
        """Ask all calls. After an error, or Ctrl-C, calls that are begun are finished, and then it is raised."""
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:  # a second one ends the process at once
            self._stop.set()
            for worker in workers:
                worker.join()
            raise
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        try:
            with closing(Connection(self.endpoint.url, self.endpoint.timeout)) as connection:
                while not self._stop.is_set():
                    with self._lock:
                        number, call = next(self._left, (-1, None))
                    if call is None:
                        return
                    result = self.endpoint.ask(connection, call, self._stop)
                    if result is not None:
                        self.on_reply(number, result)
        except Exception as error:
            self._errors.append(error)
            self._stop.set()


def _reply(body: bytes, retries: Counter[str], seconds: float) -> Reply:
    """Read a chat completion.

    Raises:
        NoAnswer: it is something else.
    """
    try:
        value = json.loads(body)
        choice, usage = value["choices"][0], value.get("usage") or {}
        message = {key: field for key, field in choice["message"].items() if field is not None}
        finish = choice["finish_reason"]
        if not isinstance(finish, str):
            raise TypeError(f"finish_reason is {finish!r}")
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        text = body[:WORDS].decode("utf-8", "replace")
        raise NoAnswer("no chat completion", f"{type(error).__name__} {error} in {text!r}") from None
    message = {"role": "assistant", "content": "", **message}
    return Reply(message, finish, tokens[0], tokens[1], retries.total() + 1, round(seconds, 3), dict(retries))


def _words(body: bytes) -> str:
    """Return what a server says about an error, in one line."""
    said = _error(body).get("message") or body[: 4 * WORDS].decode("utf-8", "replace")
    return " ".join(str(said).split())[:WORDS]


def _error(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = value.get("error", value) if isinstance(value, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def asked_wait(answer: Answer) -> float | None:
    """Return the seconds that a Retry-After header asks for; it has seconds or a date.

    None without one, and for no time or a past one: asked again at once, all attempts would be gone in a moment.
    """
    asked = answer.headers.get("retry-after", "").strip()
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds > 0 else None


def _fold(seed: int, number: int) -> int:
    """Return a seed that servers take. Short seeds stay as they are."""
    if number == 0 and seed < 1 << SEED_BITS:
        return seed
    return zlib.crc32(f"{seed} {number}".encode()) >> (32 - SEED_BITS)
