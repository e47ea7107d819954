"""How the tests start the server and ask it, and what `generate` says to the same."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from nb_lightning.checkpoints.pretrained import Pretrained
from nb_lightning.generation.decoder import Completion, generate
from nb_lightning.generation.sampling import Sampling
from nb_lightning.serve.text_stream import REASONING, TagSplitter
from tests.harness import ROOT, environment

CONTEXT = 100_000
DEFAULTS = {"temperature": 0.8, "top_p": 0.9}
END, END_OF_TURN, PAD = 256, 258, 259
ROWS = 24  # that run or wait
PLACE, THINK, ADD = "Where is Zürich?", "1+1?", "Add 1."
REPLIES = {
    PLACE: "In 瑞士, Switzerland 🏔.",
    THINK: "<think>\nHm, 1+1.\n</think>\n\nIt is 2.",
    ADD: 'Yes.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any]:
        """Status and JSON of one request; a POST if it has a body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def start(folder: Path, log: Path, *arguments: str) -> Running:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nb_lightning.serve", "--model", str(folder), "--port", str(port), *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=out, stderr=out, text=True, start_new_session=True
        )
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return Running(process, port, log)
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)


def stop(running: Running, by: signal.Signals = signal.SIGTERM, group: bool = False) -> None:
    """Every process is gone, in good order."""
    children = running.children()
    (os.killpg if group else os.kill)(running.process.pid, by)
    assert running.process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, [child.cmdline() for child in alive]
    assert "Traceback" not in running.log.read_text(), running.log.read_text()


def ask(server: Running, content: str = PLACE, **more: Any) -> Any:
    more.setdefault("max_tokens", 100)
    return server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], **more)


def prompt(loaded: Pretrained, content: str) -> list[int]:
    assert loaded.chat is not None
    text = loaded.chat.render([{"role": "user", "content": content}], add_generation_prompt=True)
    return loaded.tokenizer.encode([text])[0][:-1]


def expected(
    loaded: Pretrained, prompts: list[list[int]], seed: int = 0, tokens: int = 100, **how: Any
) -> list[Completion]:
    return generate(loaded.model, prompts, Sampling(tokens, stop_ids=loaded.stop_ids, **how), seed)


def text(loaded: Pretrained, completion: Completion, chat: bool = True) -> str:
    """What is shown of it; in chat without the reasoning, which is returned apart."""
    text = loaded.tokenizer.decode(completion.ids[: -1 if completion.finish_reason == "stop" else None])
    parts = TagSplitter([REASONING] if chat else []).add(text, final=True)
    return "".join(value for name, value in parts if name == "content")


def stream(server: Running, content: str = PLACE, **more: Any) -> tuple[list[str], str, Any]:
    """Pieces of content, why it ended, and usage."""
    pieces, reason, usage = [], "", None
    for chunk in ask(server, content, stream=True, **more):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    return pieces, reason, usage
