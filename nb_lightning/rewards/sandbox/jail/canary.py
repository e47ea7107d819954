"""The self-test: a job that tries every escape that the jail has to stop."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)
REFUSALS = (errno.EPERM, errno.EACCES)


def escapes(memory_bytes: int) -> list[str]:
    """Run inside a job: list the forbidden things that it could do, and the needed things that it could not."""
    escaped = [name for name, attempt in _forbidden(memory_bytes).items() if not _refused(attempt)]
    return escaped + [name for name, attempt in _needed().items() if not _possible(attempt)]


def _forbidden(memory_bytes: int) -> dict[str, Callable[[], object]]:
    return {
        "reads a file": lambda: os.open(os.path.abspath(__file__), os.O_RDONLY),
        "reads /proc": lambda: os.open("/proc/self/environ", os.O_RDONLY),
        "lists a folder": lambda: os.listdir("/"),
        "writes a file": _write,
        "opens a socket": lambda: _call("socket", 1, 1, 0),
        "forks": _fork,
        "runs a program": lambda: os.execv("/nb_canary", ["nb_canary"]),
        "sends a signal": lambda: os.kill(os.getppid(), 0),
        "traces": lambda: _call(
            "ptrace", 0x4200, os.getpid(), 0, 0
        ),  # on itself: where ptrace is allowed, the error differs
        "makes a memory file": lambda: os.memfd_create("canary"),
        "raises a limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10)),
        "changes the user": lambda: os.setresuid(-1, -1, -1),
        "has more memory": lambda: mmap.mmap(-1, memory_bytes + (1 << 20)),
        "has inherited a descriptor": _inherited,
    }


def _needed() -> dict[str, Callable[[], object]]:
    return {"cannot start a thread": lambda: threading.Thread(target=int).start()}


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (MemoryError, ValueError):  # setrlimit turns EPERM into a ValueError
        return True
    except OSError as error:
        return error.errno in (*REFUSALS, errno.ENOMEM)
    return False


def _possible(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, RuntimeError):
        return False
    return True


def _call(name: str, *arguments: int) -> None:
    if getattr(_LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def _write() -> None:
    path = f"/tmp/nb_canary_{os.getpid()}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _inherited() -> None:
    for descriptor in range(5, 1024):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        return
    raise PermissionError(errno.EPERM, "none")
