"""A stand-in for an endpoint: a real HTTP server that answers at once and can do everything wrong.

Run as a program it is a process of its own, for the tests that kill the asking one and for the benchmark.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from data.calls.call import Call, Failure, Reply
from data.calls.engine import OnReply
from nb_lightning.checkpoints.tokenizer_files import load_tokenizer
from nb_lightning.generation.sampling import Sampling
from nb_lightning.model.transformer import ModelShape, Transformer
from nb_lightning.text.chat_template import ChatTemplate
from tests.dpd_harness import save_model

Fault = str | int | tuple[int, dict[str, str]]  # see `StandIn.fault`
GREEDY = Sampling(8, temperature=0.0)


def make_call(text: str, seed: int = 0, number: int = 0, sampling: Sampling = GREEDY) -> Call:
    return Call([{"role": "user", "content": text}], sampling, seed, number)


def reply_text(request: dict[str, Any]) -> str:
    """What the stand-in says: a function of the request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]


def completion(text: str, finish: str = "stop", tokens: tuple[int, int] = (10, 4)) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, "refusal": None}}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class StandIn(ThreadingHTTPServer):
    """Answers chats.

    Attributes:
        requests: every request's body, in order.
        answered: seed -> how often it got a whole answer.
        fault: called with a request and its number; says what goes wrong: "" nothing; a status, with headers or
            without; "hang", "drop" (no byte is sent), "cut" (half of the body is), "no json", "no completion".
        answer: called with a request; returns the completion.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, fault: Callable[[dict[str, Any], int], Fault] = lambda request, number: "") -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[int] = Counter()
        self.fault = fault
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda request: completion(reply_text(request))
        self.refuse: dict[int, dict[str, str]] = {}  # seed -> the error of a 400
        self.hang_s = 2.0
        self.place, self.reached = -1, threading.Event()  # set with the request of this number
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def wait_until_counted(self, answers: int) -> None:
        """Wait until `answers` are counted: a client may have an answer before it is."""
        deadline = time.monotonic() + 30
        while self.answered.total() < answers and time.monotonic() < deadline:
            time.sleep(0.01)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients are killed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: StandIn  # type: ignore[assignment]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.headers.append({**self.headers, "path": self.path})
            number = len(self.server.requests) - 1
            if number + 1 == self.server.place:
                self.server.reached.set()
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            fault = self.server.fault(request, number)
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            if error := self.server.refuse.get(request["seed"]):
                self._send(400, json.dumps({"error": error}).encode(), {})
            elif isinstance(status, int):
                self._send(status, json.dumps({"error": {"message": f"status {status}"}}).encode(), headers)
            else:
                self._answer(request, status)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self, request: dict[str, Any], fault: str) -> None:
        if fault == "hang":
            time.sleep(self.server.hang_s)
        if fault in ("hang", "drop"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        body = json.dumps(self.server.answer(request)).encode()
        if fault == "no json":
            body = b"<html>busy</html>"
        if fault == "no completion":
            body = b'{"choices": []}'
        if fault == "cut":
            self._send(200, body, {}, cut=True)
            self.close_connection = True
            return
        self._send(200, body, {})
        if not fault:
            with self.server.lock:
                self.server.answered[request["seed"]] += 1

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def standing_in(*arguments: Any) -> Iterator[StandIn]:
    server = StandIn(*arguments)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def save_random_model(folder: Path) -> Path:
    """Write a Hugging Face folder of a small model that says something else to each prompt."""
    model = Transformer(ModelShape(260, 64, 2, 2, 1, 32, 128))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.copy_(random)
    save_model(model, folder)
    load_tokenizer("bytes").save(folder, ChatTemplate.chatml().source)
    return folder


class Echo:
    """An engine without a network: repeats the question; `failing` questions fail."""

    def __init__(self, failing: Sequence[str] = (), tokens: tuple[int, int] = (10, 4), url: str = "") -> None:
        self.failing, self.tokens, self.url = failing, tokens, url
        self.asked: list[str] = []

    def about(self) -> dict[str, Any]:
        return {"name": "echo", **({"url": self.url} if self.url else {})}

    def answer(self, calls: Sequence[Call], on_reply: OnReply) -> None:
        for i, call in enumerate(calls):
            text = call.messages[-1]["content"]
            self.asked.append(text)
            if text in self.failing:
                on_reply(i, Failure("no answer", text, {"time-out": 6}))
            else:
                on_reply(i, Reply({"role": "assistant", "content": text}, "stop", *self.tokens))
