"""The trainer's side of one zygote: start it, give it jobs, read their output, notice its end."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "jail" / "zygote.py"
# A job's whole environment. The hash seed is fixed so that a program gives the same result in every zygote.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
START_SECONDS = 120.0  # time limit for a zygote's start: it imports its preloaded modules, perhaps on a busy machine
GRACE_SECONDS = 2.0  # a zygote that reports a job's end this long after its time limit is considered dead
PROBE_SECONDS = 30.0  # time limit for bubblewrap to show that it works
MESSAGE = 1 << 16
TIME_SIGNALS = (signal.SIGXCPU, signal.SIGPROF, signal.SIGALRM)


@dataclass(frozen=True)
class Limits:
    """The limits of one job. `output_bytes` holds for its standard output and for its report; more output ends it."""

    cpu_seconds: float = 10.0
    wall_seconds: float = 30.0
    memory_mb: int = 512
    output_bytes: int = 1 << 20
    threads: int = 32


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and what it wrote. None of its output may be trusted.

    Attributes:
        status: "ok" (it ended by itself with exit code 0), "timeout", "flood" (too much output), "crash" (any other end
            of the job) or "lost" (its zygote died).
        reason: the status in more words.
        stdout: its standard output.
        report: the values in the lines of JSON that it reported.
        cpu_seconds: CPU time.
        wall_seconds: wall-clock time.
    """

    status: str
    reason: str = ""
    stdout: bytes = b""
    report: list[Any] = field(default_factory=list)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


class Worker:
    """One zygote.

    Attributes:
        hello: its first message: {"landlock", "seccomp", "other_user", "escapes"}; or {"error"} if it could not start,
            and then only `close` may be called.
        pid: its process number.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._using, self._closing = threading.Lock(), threading.Lock()
        self._handle = -1  # a pidfd of the zygote
        command = [sys.executable, "-B", "-X", "utf8", str(PROGRAM), str(theirs.fileno())]
        if setup["jail"]:  # only the standard library, until `path` adds more; nothing of the environment
            command = [*bubblewrap(), command[0], "-s", "-S", "-P", *command[1:]]
        # In a session of its own, Ctrl-C does not reach it: the trainer ends it in order.
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT if setup["jail"] else None, cwd="/" if setup["jail"] else None,
            pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self.pid = self._process.pid
        self.hello = self._greet(setup)

    def _greet(self, setup: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.send(json.dumps({**setup, "start_seconds": START_SECONDS}).encode())
            self._socket.settimeout(START_SECONDS)
            message, ancillary, _, _ = self._socket.recvmsg(MESSAGE, socket.CMSG_SPACE(12))
            self._socket.settimeout(None)
        except OSError as error:
            return {"error": f"no word from it in {START_SECONDS:.0f} s ({error})"}
        if not message:  # it ended by itself, or by its own time limit for the start
            return {"error": f"it ended with exit code {self._process.wait()}"}
        # Inside bubblewrap the zygote is a grandchild, so its number comes from the kernel. Every job takes a process
        # number, so the zygote's may soon be reused; a pidfd stays with this process.
        self.pid = struct.unpack("3i", ancillary[0][2])[0]
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(self.pid)
        return json.loads(message)

    def is_alive(self) -> bool:
        """Return whether an idle zygote is alive. An idle zygote sends nothing, so anything to read is its end."""
        return not _poll(self._socket.fileno()).poll(0)

    def run(self, job: dict[str, Any], stdin: bytes, limits: Limits) -> Outcome:
        """Run one job."""
        with self._using:
            return self._run(job, stdin, limits)

    def _run(self, job: dict[str, Any], stdin: bytes, limits: Limits) -> Outcome:
        order = {
            "cpu": limits.cpu_seconds, "wall": limits.wall_seconds, "threads": limits.threads,
            "memory_bytes": limits.memory_mb << 20,
        }  # fmt: skip
        passed: list[int] = []
        outputs: dict[int, bytearray] = {}
        try:
            passed += [_memory_file(json.dumps(job).encode()), _memory_file(stdin)]
            for _ in range(2):  # standard output, report
                ours, theirs = os.pipe()
                os.set_blocking(ours, False)
                outputs[ours] = bytearray()
                passed.append(theirs)
            socket.send_fds(self._socket, [json.dumps(order).encode()], passed)
            while passed:
                os.close(passed.pop())
            end, flooded = self._read(outputs, limits)
        except ConnectionError:
            end, flooded = None, False
        finally:
            for descriptor in (*passed, *outputs):
                os.close(descriptor)
        stdout, report = map(bytes, outputs.values()) if outputs else (b"", b"")
        if end is None:
            return Outcome("lost", "the sandbox process died or hung")
        status, reason = _verdict(end, flooded)
        return Outcome(status, reason, stdout, _lines(report), end["cpu"], end["wall"])

    def _read(self, outputs: dict[int, bytearray], limits: Limits) -> tuple[dict[str, Any] | None, bool]:
        """Collect the outputs until the zygote reports the job's end.

        The zygote's message is the end, not the closing of the pipes: a fork of this process may hold them open.

        Returns:
            The message, None if there was none; and whether there was too much output.
        """
        waiting = _poll(*outputs, self._socket.fileno())
        deadline = time.monotonic() + limits.wall_seconds + GRACE_SECONDS
        end, flooded = None, False
        while end is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None, flooded
            for descriptor, _ in waiting.poll(left * 1000):
                if descriptor in outputs:
                    if not _drain(descriptor, outputs[descriptor], limits.output_bytes):
                        waiting.unregister(descriptor)
                        if not flooded and len(outputs[descriptor]) > limits.output_bytes:
                            flooded = True
                            self._socket.send(b'{"stop": 1}')
                elif message := self._socket.recv(MESSAGE):
                    end = json.loads(message)
                else:
                    return None, flooded
        for descriptor, data in outputs.items():
            _drain(descriptor, data, limits.output_bytes)
            flooded |= len(data) > limits.output_bytes
        return end, flooded

    def close(self) -> None:
        """End the zygote and with it its job. A thread in `run` notices that at once."""
        with self._closing:
            if self._handle >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._handle, signal.SIGKILL)
                os.close(self._handle)
                self._handle = -1
            self._process.kill()
            self._process.wait()
            with self._using:
                self._socket.close()

    def forget(self) -> None:
        """Let go of the zygote without ending it, in a fork of the process that started it."""
        self._socket.close()
        if self._handle >= 0:
            os.close(self._handle)
        self._process.returncode = 0  # not ours to wait for


def _poll(*descriptors: int) -> select.poll:
    waiting = select.poll()
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return waiting


def _drain(descriptor: int, data: bytearray, limit: int) -> bool:
    """Read the available data, in all at most slightly more than `limit`; return whether more may come."""
    try:
        while len(data) <= limit:
            read = os.read(descriptor, MESSAGE)
            if not read:
                return False
            data += read
    except BlockingIOError:
        return True
    return False


def _verdict(end: dict[str, Any], flooded: bool) -> tuple[str, str]:
    if flooded:
        return "flood", "too much output"
    if end["reason"] == "threads":
        return "crash", "too many threads"
    if end["reason"] in ("cpu", "wall") or -end["exit"] in TIME_SIGNALS:
        return "timeout", f"{end['reason'] or 'one call'}: {end['cpu']:.2f} s of CPU, {end['wall']:.2f} s in all"
    if end["exit"] < 0:
        return "crash", f"killed by {signal.Signals(-end['exit']).name}"
    return ("ok", "") if end["exit"] == 0 else ("crash", f"exit code {end['exit']}")


def _lines(report: bytes) -> list[Any]:
    """Parse lines of JSON, up to the first line that is not JSON."""
    values = []
    for line in report.splitlines():
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return values


def _memory_file(content: bytes) -> int:
    """Create a sealed file in memory with `content`, open for reading at its start; return the descriptor."""
    descriptor = os.memfd_create("nb", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@functools.cache
def bubblewrap() -> tuple[str, ...]:
    """Return the command that gives a zygote its own namespaces; () where bubblewrap is missing or fails."""
    program = shutil.which("bwrap")
    if program is None:
        return ()
    # Root needs no user namespace, and without one it can still change to another user.
    spaces = (
        ("--unshare-all",) if os.geteuid() else ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts")
    )
    command = (program, *spaces, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--")
    try:
        tried = subprocess.run(
            [*command, sys.executable, "-S", "-c", ""], env={}, capture_output=True, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()
