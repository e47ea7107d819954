"""The process that decodes: LitServe's inference worker, with continuous batching.

The routes send ("add", [(key, prompt, sampling, seed), ...]) and ("cancel", [key, ...]). The tokens of each decoding
step go back as one list.
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

STEPS = "steps"  # id of the one LitServe response that all tokens belong to
FAILED = "failed"  # finish_reason of a row whose decoding raised an error

logger = logging.getLogger("litserve.nb_lightning")


class DecodeLoop(LitLoop):
    """Decodes one token for each running row, step after step; rows join and leave between steps."""

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
                action, rows = inbox.get()
                if action == "add":
                    for row in rows:
                        decoder.add(*row)
                        keys.add(row[0])
                else:
                    for key in rows:
                        decoder.cancel(key)
                    keys.difference_update(rows)
            try:
                tokens = decoder.step()
            except Exception:  # out of memory, say: these rows are lost, but later ones may be smaller
                logger.exception("decoding failed; the running requests are answered with an error")
                tokens = [NewToken(key, -1, 0.0, FAILED, []) for key in keys]
                decoder = Decoder(lit_api.model, lit_api.max_batch)
            keys.difference_update(token.key for token in tokens if token.finish_reason)
            status = LitAPIStatus.OK
            # LitServe annotates the status as the class whose constants, plain strings, it takes.
            self.put_response(transport, 0, STEPS, tokens, status, LoopResponseType.STREAMING)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def _receive(request_queue: Any, inbox: queue.SimpleQueue) -> None:
        """Move requests from LitServe's queue, which is in another process: a query at each step would be slow."""
        try:
            while True:
                inbox.put(request_queue.get()[-1])
        except (EOFError, OSError):  # that process has ended, and with it the server
            os._exit(1)


class Engine(LitAPI):
    """The model that LitServe's worker loads.

    Args:
        path, device, dtype: see `load_pretrained`.
        max_batch: rows that run at the same time.
    """

    def __init__(self, path: str, device: str, dtype: str, max_batch: int, spec: LitSpec) -> None:
        super().__init__(spec=spec, loop=DecodeLoop())
        self.path, self.torch_device, self.dtype, self.max_batch = path, device, dtype, max_batch

    def setup(self, device: str) -> None:
        die_with_parent()
        self.model = load_pretrained(self.path, self.torch_device, self.dtype).model


def die_with_parent() -> None:
    """Ignore Ctrl-C, which the starting process handles, and (on Linux) be killed when that process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
