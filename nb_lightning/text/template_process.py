"""The caller's side of the process that renders a chat template: start it, reuse it, kill it past its limits.

The process itself runs nb_lightning/text/template_worker.py.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from nb_lightning.text.messages import ChatError

WALL_S = 60.0  # seconds for one answer; it ends a process that is suspended and uses no CPU time
WORKER_BYTES = 2**30  # address space of the process
CHARACTERS = 2**24  # limit of one rendered text


class TemplateProcess:
    """A worker process that renders one template; safe to use from any thread of the process that made it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, setup: dict[str, Any], groups: list[Any]) -> list[list[str] | ChatError]:
        """Render groups of texts; `setup` and `groups` are described in template_worker.py.

        Many groups in one call cost one round trip instead of many.

        Returns:
            For each group its texts, or an error.
        """
        try:
            answers = self._ask_exclusively(setup, groups)
        except ChatError as error:  # one of the groups killed the process: render them one by one
            return [error] if len(groups) == 1 else [self.render(setup, [group])[0] for group in groups]
        return [
            answer["texts"] if "texts" in answer else ChatError("the template raised", detail=f": {answer['error']}")
            for answer in answers
        ]

    def _ask_exclusively(self, setup: dict[str, Any], groups: list[Any]) -> list[dict[str, Any]]:
        with self._lock:
            try:
                return self._ask(setup, groups)
            except BaseException:  # Ctrl-C too: the pending answer must not be read as the answer to the next call
                if self._process is not None:
                    _stop(self._process, os.getpid())
                    self._process = None
                raise

    def _ask(self, setup: dict[str, Any], groups: list[Any]) -> list[dict[str, Any]]:
        if self._process is None or self._process.poll() is not None:
            self._process = _start(self)
            frames = [{**setup, "bytes": WORKER_BYTES, "characters": CHARACTERS}, groups]
        else:
            frames = [groups]
        process = self._process
        deadline = time.monotonic() + WALL_S
        try:
            for frame in frames:
                _send(process, frame, deadline)
            return _receive(process, deadline)
        except TimeoutError:
            raise ChatError(f"the template's process did not answer for {WALL_S:g} s") from None
        except (OSError, EOFError):
            code = process.wait()
            if code == -signal.SIGPROF:
                raise ChatError(f"the template takes longer than {setup['cpu_s']:g} s; it was stopped") from None
            raise ChatError("the template's process died", detail=f" (exit code {code})") from None


def _start(owner: TemplateProcess) -> subprocess.Popen[bytes]:
    keep = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")  # no other variable: it may hold a secret
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        # -P: the script's folder must not come first on the path; its modules (tokenizer, ...) have common names.
        [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # a killed process must leave nothing in a buffer
        env={"PYTHONPATH": path, **{key: os.environ[key] for key in keep if key in os.environ}},
    )
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
    weakref.finalize(owner, _stop, process, os.getpid())
    return process


def _send(process: subprocess.Popen[bytes], value: Any, deadline: float) -> None:
    payload = json.dumps(value).encode()
    left = memoryview(struct.pack("<I", len(payload)) + payload)
    assert process.stdin is not None
    while left:
        _wait(process.stdin, select.POLLOUT, deadline)
        left = left[process.stdin.write(left) or 0 :]


def _receive(process: subprocess.Popen[bytes], deadline: float) -> Any:
    (size,) = struct.unpack("<I", _read(process, 4, deadline))
    return json.loads(_read(process, size, deadline))


def _read(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    assert process.stdout is not None
    payload = bytearray()
    while len(payload) < size:
        _wait(process.stdout, select.POLLIN, deadline)
        piece = process.stdout.read(size - len(payload))
        if piece == b"":
            raise EOFError
        payload += piece or b""
    return bytes(payload)


def _wait(pipe: Any, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not end its parent's worker
        process.kill()
        process.wait()
