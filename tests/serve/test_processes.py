"""Clients that go, processes that are stopped or killed, steps that fail."""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
from starlette.exceptions import HTTPException

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.generation.decoder import Decoder, NewToken, generate
from nb_lightning.generation.sampling import Sampling
from nb_lightning.serve.engine import FAILED, DecodeLoop
from nb_lightning.serve.replies import Job
from nb_lightning.serve.routes import OpenAI, ServedModel, _events
from tests.serve.harness import CHAT, CONTEXT, ask, start, stop

pytestmark = pytest.mark.runs


def test_a_full_server_refuses_until_a_client_leaves(endless: Path, tmp_path: Path) -> None:
    """A full server says so. A client that goes makes room, for the next rows to run at once. Ctrl-C ends it all."""
    server = start(endless, tmp_path / "log", "--max-batch", "2", "--max-queue", "1")
    endless_rows = {"n": 3, "max_tokens": CONTEXT - 100}  # hours
    body = json.dumps({**CHAT, **endless_rows}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "

    def full() -> bool:
        try:
            return not ask(server, max_tokens=1)
        except openai.RateLimitError as error:
            assert error.type == "rate_limit_error" and "the queue is full" in str(error)
            return True

    streams = ask(server, **endless_rows, stream=True)
    next(iter(streams))
    waits = socket.create_connection(("127.0.0.1", server.port))
    for client in (streams, waits):
        if client is waits:
            waits.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        while not full():
            time.sleep(0.1)
        client.close()
        while full():
            time.sleep(0.1)
    next(iter(ask(server, **endless_rows, stream=True)))
    stop(server, signal.SIGINT, group=True)  # as a terminal sends it: to every process


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all of it", "decoder", "HTTP", "queue"])
def test_if_one_process_is_killed_all_end(folder: Path, tmp_path: Path, whom: str) -> None:
    """Whichever process is killed, none is left."""
    server = start(folder, tmp_path / "log")
    children = server.children()
    (decoder,) = (child for child in children if "spawn_main" in " ".join(child.cmdline()))
    queue, http = sorted((child for child in children if "nb_lightning.serve" in child.cmdline()), key=lambda c: c.pid)
    {"all of it": server.process, "decoder": decoder, "HTTP": http, "queue": queue}[whom].kill()
    code = server.process.wait(60)
    if whom != "all of it":
        assert code == 1 and "one of the server's processes died" in server.log.read_text()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, [child.cmdline() for child in alive]


def test_rows_of_a_failed_step_end_as_failed_and_later_ones_run(
    loaded: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows end as failed; those that come later run."""
    step, failures = Decoder.step, [RuntimeError("out of memory")]

    def fail_once(decoder: Decoder) -> Any:
        if failures and len(decoder._rows) == 2:
            raise failures.pop()
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", fail_once)
    sent: queue.Queue[list[NewToken]] = queue.Queue()
    transport = SimpleNamespace(send=lambda item, consumer_id: sent.put(item[1][0]))
    requests: queue.Queue[tuple] = queue.Queue()
    engine = SimpleNamespace(model=loaded.model, max_batch=2)
    arguments = (engine, "cpu", 0, requests, transport, {}, None)
    threading.Thread(target=DecodeLoop().run, args=arguments, daemon=True).start()
    requests.put((0, None, 0.0, ("add", [(key, [65], Sampling(1000), 0) for key in (1, 2)])))
    ends: dict[Any, str] = {}
    while len(ends) < 2:
        ends |= {token.key: token.finish_reason for token in sent.get(timeout=60) if token.finish_reason}
    assert ends == {1: FAILED, 2: FAILED}
    requests.put((0, None, 0.0, ("add", [(3, [65], Sampling(3), 0)])))
    ids = [token.id for _ in range(3) for token in sent.get(timeout=60)]
    assert ids == generate(loaded.model, [[65]], Sampling(3), [0])[0].ids


def test_a_failed_row_is_an_error_to_the_client(loaded: Pretrained) -> None:
    """Before anything was sent with a status of 500, in the middle of a stream with an error event."""
    served = ServedModel("tiny", loaded.tokenizer, None, (), 260, 100, {}, 8)

    async def run(tokens: list[NewToken]) -> list[str]:
        spec = OpenAI(served)
        told: list[Any] = []
        spec.request_queue = SimpleNamespace(put=lambda item: told.append(item[-1]))
        spec._listener = asyncio.create_task(asyncio.sleep(0))
        job = Job("text_completion", "tiny", [[65]], 1, Sampling(9), 0, spec.token_bytes)
        deltas = spec._deltas(job)
        first = asyncio.create_task(anext(deltas))
        while not spec._rows:
            await asyncio.sleep(0)
        spec._rows[0].put_nowait(tokens[0])
        await asyncio.wait([first])
        if len(tokens) > 1:
            spec._rows[0].put_nowait(tokens[1])
        out = [event async for event in _events(job, first.result(), deltas, usage=False)]
        assert not spec._rows and told[-1] == ("cancel", [0])
        return out

    good, failed = NewToken(0, 65, 0.0, "", []), NewToken(0, -1, 0.0, FAILED, [])
    with pytest.raises(HTTPException, match="the model failed"):
        asyncio.run(run([failed]))
    chunk, error = (json.loads(event.removeprefix("data: ")) for event in asyncio.run(run([good, failed])))
    assert chunk["choices"][0]["text"] and error["error"]["type"] == "server_error"
