"""The process that decodes: LitServe's inference worker with continuous batching.

The routes send ("add", [(key, prompt, sampling, seed), ...]) and ("cancel", [key, ...]); the tokens of each step go
back as one list.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import sys
import threading
from typing import Any

from litserve import LitAPI
from litserve.loops import LitLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, LoopResponseType

from nb_lightning.checkpoints.pretrained import load_pretrained
from nb_lightning.generation.decoder import Decoder, NewToken

STEPS = "steps"  # the one LitServe response that all tokens are part of
FAILED = "failed"  # finish_reason of a row that the worker could not go on with

logger = logging.getLogger("litserve.nb_lightning")


class DecodeLoop(LitLoop):
    """One token for every running row, again and again; rows join and leave between two steps."""

    def run(
        self,
        lit_api: Engine,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        threading.Thread(target=self._receive, args=(request_queue, inbox), daemon=True).start()
        decoder = Decoder(lit_api.model, lit_api.max_batch)
        keys: set[int] = set()
        while True:
            while not decoder.busy or not inbox.empty():
                what, rows = inbox.get()
                if what == "add":
                    for row in rows:
                        decoder.add(*row)
                        keys.add(row[0])
                else:
                    for key in rows:
                        decoder.cancel(key)
                    keys.difference_update(rows)
            try:
                tokens = decoder.step()
            except Exception:  # out of memory, say: these rows are lost, later ones may be smaller
                logger.exception("decoding failed; the running requests are answered with an error")
                tokens = [NewToken(key, -1, 0.0, FAILED, []) for key in keys]
                decoder = Decoder(lit_api.model, lit_api.max_batch)
            keys.difference_update(token.key for token in tokens if token.finish_reason)
            self.put_response(transport, 0, STEPS, tokens, LitAPIStatus.OK, LoopResponseType.STREAMING)

    @staticmethod
    def _receive(request_queue: Any, inbox: queue.SimpleQueue) -> None:
        """LitServe's queue lives in a process of its own: asking it in each step would cost a round trip."""
        try:
            while True:
                inbox.put(request_queue.get()[-1])
        except (EOFError, OSError):  # that process is gone, so is the server
            os._exit(1)


class Engine(LitAPI):
    """What LitServe's worker sets up: the model.

    Args:
        path, device, dtype: see `load_pretrained`.
        max_batch: rows that run at the same time.
    """

    def __init__(self, path: str, device: str, dtype: str, max_batch: int, spec: LitSpec) -> None:
        super().__init__(spec=spec, loop=DecodeLoop())
        self.path, self.torch_device, self.dtype, self.max_batch = path, device, dtype, max_batch

    def setup(self, device: str) -> None:
        be_a_child()
        self.model = load_pretrained(self.path, self.torch_device, self.dtype).model


def be_a_child() -> None:
    """What each process does first: leave Ctrl-C to the one that started it, and (on Linux) die when that dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
