"""Serve a model with OpenAI's API: `python -m nb_lightning.serve --model PATH`. docs/serving.md."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

try:
    from litserve import LitServer
    from litserve.utils import WorkerSetupStatus
except ModuleNotFoundError:
    sys.exit("nb_lightning.serve needs LitServe: pip install 'nb_lightning[serve]'")

from nb_lightning.checkpoints.hf_config import GENERATION_CONFIG, read_generation_config
from nb_lightning.checkpoints.pretrained import find_origin
from nb_lightning.errors import note, one_line_errors, require_at_least
from nb_lightning.generation.sampling import PAPER_DECODING, Sampling
from nb_lightning.serve.engine import Engine, die_with_parent
from nb_lightning.serve.routes import OpenAI, ServedModel, add_error_handlers
from nb_lightning.text.chat_tokens import ChatTokenizer
from nb_lightning.text.variables import check_variables

MAX_BODY = 8 * 2**20  # bytes of a request's body
GRACE_S = 5  # seconds that a stopped server gives to responses on their way


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m nb_lightning.serve", description="An OpenAI-compatible server.")
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a run, a checkpoint, a Hugging Face folder or a .gguf file")
    add("--name", help="the model's name in requests; by default the last part of PATH")
    add("--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"))
    add("--port", type=int, default=8000, help="1024 to 65535")
    add("--device", default="auto", help="auto (the GPU where there is one), cpu, cuda, cuda:1 ...")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: bfloat16 on a GPU")
    add("--max-batch", type=int, default=32, help="completions that run at the same time")
    add("--max-queue", type=int, default=128, help="completions that wait; more are refused with status 429")
    add("--context", type=int, help="tokens of prompt and completion together; by default the model's")
    add("--template-kwargs", metavar="JSON", help="variables of the chat template, such as "
        "'{\"enable_thinking\": false}'; a request's chat_template_kwargs win")  # fmt: skip
    add("--reasoning-content", action="store_true", help="return <think>...</think> in a separate field")
    add("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    return parser.parse_args(argv)


def describe_model(args: argparse.Namespace) -> ServedModel:
    """Collect what the routes need to know about the model; its weights are not loaded.

    Raises:
        ValueError: there is no model to serve, or an argument is out of range.
    """
    require_at_least(args, max_batch=1, max_queue=0, context=2)
    origin = find_origin(args.model, verify=False)  # the worker verifies
    tokenizer = origin.tokenizer()
    context = args.context or origin.context
    if context is None:
        raise ValueError(f"{args.model} does not say how many tokens the model is made for; give --context")
    chat = ChatTokenizer.of(tokenizer) if tokenizer.chat_template else None
    if variables := check_variables(args.template_kwargs or {}, "--template-kwargs"):
        if chat is None:
            raise ValueError(f"--template-kwargs: {args.model} has no chat template")
        chat = chat.with_variables(variables)
        note(chat.template.describe_unread())
    return ServedModel(
        name=args.name or Path(args.model).resolve().name,
        tokenizer=tokenizer,
        chat=chat,
        stop_ids=origin.stop_ids(tokenizer),
        vocab_size=origin.shape.vocab_size,
        context=context,
        defaults=default_sampling(Path(args.model)),
        max_rows=args.max_batch + args.max_queue,
        reasoning=args.reasoning_content,
    )


def default_sampling(folder: Path) -> dict[str, float]:
    """Return the sampling of requests that do not set it: generation_config.json's, else the paper's.

    Raises:
        ValueError: generation_config.json has values that are not possible.
    """
    config = read_generation_config(folder)
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    configured = {name: config[name] for name in ("temperature", "top_p", "top_k") if config.get(name) is not None}
    try:
        Sampling(1, **configured)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / GENERATION_CONFIG}: {error}") from error
    return configured or PAPER_DECODING


class Server(LitServer):
    """LitServe's server, but all processes end whatever ends one of them.

    Attributes:
        pid: of the process that starts the others.
        stopping: a signal asked it to stop.
        died: one of its processes died.
    """

    pid: int
    stopping = False
    died = False

    def stop(self, *_: Any) -> None:
        """Handle SIGTERM and SIGINT: LitServe shuts down on a KeyboardInterrupt."""
        if os.getpid() == self.pid and not self.stopping:  # forked processes inherit the handler; LitServe ends them
            self.stopping = True
            raise KeyboardInterrupt

    def verify_worker_status(self) -> None:
        """Wait until the model is loaded; LitServe would wait for ever for a worker that was killed."""
        (worker,) = self.inference_workers
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            if not worker.is_alive():
                raise RuntimeError(f"the model could not be loaded (exit code {worker.exitcode}); the reason is above")
            time.sleep(0.05)

    def _start_worker_monitoring(self, *_: Any) -> None:
        """Stop when any process dies; LitServe watches only the worker, and its watch ends with an error."""
        sentinels = [process.sentinel for process in multiprocessing.active_children()]

        def watch() -> None:
            wait(sentinels)
            if not self.stopping:
                self.died = True
                os.kill(self.pid, signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ValueError: there is no model to serve, or an argument is out of range.
        RuntimeError: the model could not be loaded, or a process died.
    """
    engine = Engine(args.model, args.device, args.dtype, args.max_batch, OpenAI(describe_model(args)))
    cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    server = Server(engine, "cuda" if cuda else "cpu", devices=1, timeout=False, max_payload_size=MAX_BODY)
    server.uvicorn_graceful_timeout = GRACE_S
    server.pid = os.getpid()
    add_error_handlers(server.app)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, server.stop)
    os.register_at_fork(after_in_child=die_with_parent)
    try:
        server.run(args.host, args.port, num_api_servers=1, log_level=args.log_level, generate_client_file=False)
    except KeyboardInterrupt:  # while the model was loading
        pass
    except (EOFError, OSError):  # LitServe's queue is gone
        server.died = True
    finally:
        for process in multiprocessing.active_children():
            process.kill()
    if server.died:
        raise RuntimeError("one of the server's processes died, so all were stopped")


if __name__ == "__main__":
    with one_line_errors(RuntimeError, prefix="nb_lightning.serve"):
        serve(arguments())
