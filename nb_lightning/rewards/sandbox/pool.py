"""A pool of locked-down processes for model-written code, which never runs in this process.

    sandbox = Sandbox(Setup("run_code"))          start a zygote and run its self-test; raise if that fails
    outcome = sandbox.run(job, stdin, limits)     from any thread; never raises, whatever the job does

A zygote is a bare interpreter (jail/zygote.py). A job is a fork of a zygote, behind Landlock, a seccomp allow-list and
resource limits (jail/lockdown.py). If this process is root, a job runs as another user; where bubblewrap works, inside
bubblewrap.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nb_lightning.rewards.sandbox.worker import Limits, Outcome, Worker, bubblewrap

UNSAFE = "NB_UNSAFE_SANDBOX"
LIMITS = Limits()
log = logging.getLogger(__name__)


class SandboxError(RuntimeError):
    """This machine cannot confine the jobs, or no zygote starts."""


@dataclass(frozen=True)
class Setup:
    """The configuration of a sandbox's zygotes.

    Attributes:
        runner: the module of jail/ that runs the jobs.
        preload: modules that a zygote imports once.
        path: entries of sys.path beside the standard library.
        readable: files and folders that jobs may read beside the standard library.
        jail: False applies only time and memory limits, for trusted verifiers.
        memory_bytes: memory limit of the self-test.
        argument: passed to the runner.
    """

    runner: str
    preload: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    jail: bool = True
    memory_bytes: int = 512 << 20
    argument: str = ""


def with_packages(runner: str, packages: Sequence[str], preload: Sequence[str]) -> Setup:
    """Return a setup whose jobs may import and read installed packages (of the extra "rewards").

    Raises:
        ValueError: a package is not installed.
    """
    specs = {name: importlib.util.find_spec(name) for name in packages}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise ValueError(f"this verifier needs {', '.join(missing)}: pip install 'nb_lightning[rewards]'")
    readable = tuple(str(Path(spec.origin).parent) for spec in specs.values() if spec and spec.origin)
    path = tuple(str(Path(folder).resolve()) for folder in sys.path)
    return Setup(runner, preload=tuple(preload), path=path, readable=readable)


def failure(outcome: Outcome) -> tuple[str, str]:
    """Return the status and the reason for the score of a job that ended without a result."""
    if outcome.status == "lost":
        return "verifier_error", outcome.reason
    errors = [line["error"] for line in outcome.report if isinstance(line, dict) and line.keys() == {"error"}]
    if outcome.status == "crash" and errors:
        return error_status(str(errors[0])), readable(str(errors[0]))
    return "crash" if outcome.status == "ok" else outcome.status, outcome.reason or "ended early"


def error_status(error: str) -> str:
    """Return the status for an error that a job reported."""
    return "memory" if error.startswith("MemoryError") else "crash"


def readable(text: str) -> str:
    """Return the beginning of a text from the sandbox, safe to log."""
    return text[:300].encode("utf-8", "replace").decode()


class Sandbox:
    """A pool of zygotes, each of which runs one job at a time.

    Args:
        setup: the configuration of the zygotes.
        workers: the largest number of zygotes, which start when they are needed; by default this process' share of the
            CPUs.
        unsafe: continue if the self-test fails, with the protection that works. The environment variable
            NB_UNSAFE_SANDBOX=1 does the same.

    Raises:
        SandboxError: a zygote does not start, or its self-test finds that a job could escape.
    """

    def __init__(self, setup: Setup, workers: int | None = None, unsafe: bool = False) -> None:
        if sys.platform != "linux":
            raise SandboxError("model-written code and SymPy on model-written text run on Linux only")
        self.setup, self.workers = setup, workers or _fair_share()
        self.unsafe = unsafe or os.environ.get(UNSAFE) == "1"
        self._open()
        first = self._start()
        level = logging.WARNING if first.hello.get("escapes") else logging.INFO
        log.log(level, "sandbox %s: %s; %d workers", setup.runner, describe(first.hello), self.workers)
        self._idle.get()
        self._idle.put(first)
        _LIVE.add(self)

    def run(self, job: dict[str, Any], stdin: bytes = b"", limits: Limits = LIMITS) -> Outcome:
        """Run one job, as soon as a zygote is free."""
        idle = self._idle
        worker = idle.get()
        keep = False
        try:
            if worker is not None and not worker.is_alive():
                self._drop(worker)
                worker = None
            if worker is None:
                worker = self._start()
            outcome = worker.run(job, stdin, limits)
            keep = outcome.status != "lost"
            return outcome
        except (SandboxError, OSError) as error:  # for example out of memory, processes or descriptors
            return Outcome("lost", f"no zygote: {error}")
        finally:
            if worker is not None and not keep:
                self._drop(worker)
            idle.put(worker if keep else None)

    def map(self, jobs: Sequence[tuple[dict[str, Any], bytes, Limits]]) -> list[Outcome]:
        """Run jobs, as many at a time as there are zygotes; return their outcomes in order."""
        return list(self.threads.map(lambda job: self.run(*job), jobs))

    def run_items(self, job: dict[str, Any], items: Sequence[Any], limits: Limits) -> list[Any]:
        """Run many items in one job, which finds them as "items". The time limits hold for each item.

        An item that ends the job costs only its own result: each later item gets a job of its own.

        Returns:
            For each item the line that the job reported for it ({"item": i, ...}), or the `Outcome` of its job.
        """
        if not items:
            return []
        many = replace(
            limits, cpu_seconds=limits.cpu_seconds * len(items), wall_seconds=limits.wall_seconds * len(items)
        )
        job = {**job, "cpu": limits.cpu_seconds, "wall": limits.wall_seconds}
        outcome = self.run({**job, "items": items}, b"", many)
        lines = {line["item"]: line for line in outcome.report if isinstance(line, dict) and _is_index(line, items)}
        n_done = next((i for i in range(len(items)) if i not in lines), len(items))
        results: list[Any] = [lines[i] for i in range(n_done)]
        if n_done < len(items):
            alone = self.threads.map(lambda item: self.run_items(job, [item], limits)[0], items[n_done + 1 :])
            results += [outcome, *alone]
        return results

    def close(self) -> None:
        """End all zygotes and their jobs. A later `run` starts new zygotes."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in [*self._running]:
            self._drop(worker)
        self._open()

    def forget(self) -> None:
        """Let go of the zygotes without ending them, in a fork of this process: they are the parent's."""
        for worker in self._running:
            worker.forget()
        self._open()

    def _open(self) -> None:
        self._running: set[Worker] = set()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")

    def _start(self) -> Worker:
        worker = Worker(asdict(self.setup))
        self._running.add(worker)
        error, escapes = worker.hello.get("error"), worker.hello.get("escapes")
        if error or (escapes and not self.unsafe):
            self._drop(worker)
            raise SandboxError(error if error else _refusal(worker.hello))
        return worker

    def _drop(self, worker: Worker) -> None:
        self._running.discard(worker)
        worker.close()


def _fair_share() -> int:
    """Return the number of CPUs for this process, which shares them with the other torchrun ranks of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(32, max(1, len(os.sched_getaffinity(0)) // ranks))


def _is_index(line: dict[str, Any], items: Sequence[Any]) -> bool:
    return type(line.get("item")) is int and 0 <= line["item"] < len(items)


_shared: dict[Setup, Sandbox] = {}
_LIVE: weakref.WeakSet[Sandbox] = weakref.WeakSet()
_LOCK = threading.Lock()


def shared(setup: Setup) -> Sandbox:
    """Return this process' sandbox for a setup, which is started by the first call and closed at exit."""
    with _LOCK:
        if setup not in _shared:
            _shared[setup] = Sandbox(setup)
        return _shared[setup]


def describe(hello: dict[str, Any]) -> str:
    """Describe what protects this machine from the jobs, in words."""
    if not hello:
        return "no jail: time and memory limits only"
    protections = [f"Landlock {hello['landlock']}" if hello["landlock"] else "no Landlock: no file can be opened"]
    protections += ["seccomp" if hello["seccomp"] else "NO SECCOMP", "limits"]
    protections += ["another user"] * hello["other_user"] + ["bubblewrap"] * bool(bubblewrap())
    return " + ".join(protections) + (f"; UNSAFE, a job {', '.join(hello['escapes'])}" if hello["escapes"] else "")


def _refusal(hello: dict[str, Any]) -> str:
    return (
        f"this machine cannot hold model-written code ({describe(hello)}). It needs Linux 5.13 with seccomp (and "
        f"Landlock, to let code import modules), x86-64 or aarch64. To run it all the same, where nothing can be "
        f"lost: {UNSAFE}=1"
    )


@atexit.register
def _close_all() -> None:
    for sandbox in [*_LIVE]:
        sandbox.close()


def _forget_all() -> None:
    global _LOCK
    _LOCK = threading.Lock()
    for sandbox in [*_LIVE]:
        sandbox.forget()


os.register_at_fork(after_in_child=_forget_all)
