"""The zygote: a small process that forks a job whenever the trainer asks, watches its limits, and reaps it.

    python -s -S -P -B zygote.py DESCRIPTOR       the descriptor of a SOCK_SEQPACKET socket to the trainer

It never sees the content of a job: code, inputs and results pass between trainer and job through descriptors that come
with the order. So the memory that a job inherits holds nothing of an earlier job.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import random
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import canary  # noqa: E402
import lockdown  # noqa: E402

del sys.path[0]
TICK = 0.02  # seconds between two checks of a running job


def main(descriptor: int) -> None:
    control = socket.socket(fileno=descriptor)
    setup = json.loads(control.recv(1 << 20))
    signal.setitimer(signal.ITIMER_REAL, setup["start_seconds"])  # end a start that hangs, also without a trainer
    try:
        zygote = Zygote(control, setup)
    except Exception as error:  # for example a missing module
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    hello = zygote.hello()
    signal.setitimer(signal.ITIMER_REAL, 0)
    control.send(json.dumps(hello).encode())
    while zygote.serve():
        pass


class Zygote:
    """Forks jobs, one at a time.

    Args:
        control: the socket to the trainer.
        setup: "jail" (false: only limits, for trusted verifiers), "runner" (a module of this folder with `main`),
            "path" (sys.path, if the standard library is not enough), "preload" (modules to import once), "readable"
            (what jobs may read beside the standard library), "memory_bytes" (of the self-test), "start_seconds" (time
            limit of the start), and what the runner needs.
    """

    def __init__(self, control: socket.socket, setup: dict[str, Any]) -> None:
        self.control, self.setup = control, setup
        self.trainer, self.pid = os.getppid(), os.getpid()
        sys.path.insert(0, HERE)
        self.runner = importlib.import_module(setup["runner"])
        del sys.path[0]
        sys.path[:] = setup["path"] or sys.path
        for name in setup["preload"]:
            importlib.import_module(name)
        getattr(self.runner, "prepare", lambda setup: None)(setup)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory is short, the kernel ends a job first
        self.jail = None
        if setup["jail"]:
            self.jail = lockdown.prepare([*standard_library(), *setup["readable"]], platform.machine())
        else:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        gc.collect()
        gc.freeze()

    def hello(self) -> dict[str, Any]:
        """Describe the protections that work, for the trainer."""
        jail = self.jail
        if jail is None:
            return {}
        return {
            "landlock": lockdown.landlock.abi() if jail.ruleset is not None else 0,
            "seccomp": jail.filter is not None,
            "other_user": jail.uid is not None,
            "escapes": self._escapes(),
        }

    def serve(self) -> bool:
        """Run the next job. Return False if the trainer is gone or has closed the socket."""
        waiting = select.poll()
        waiting.register(self.control, select.POLLIN)
        while not waiting.poll(1000):
            if os.getppid() != self.trainer:  # a fork of the trainer may still hold the other end of the socket
                return False
        try:
            message, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 4)
        except ConnectionError:
            return False
        if not message:
            return False
        order = json.loads(message)
        if "stop" in order:  # it was for a job that has ended in the meantime
            return True
        started = time.monotonic()
        pid = self._fork(order, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        reason = self._watch(pid, order, started)
        if self.jail is None:  # end the verifier's own processes with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        end = {
            "exit": os.waitstatus_to_exitcode(status), "reason": reason, "wall": time.monotonic() - started,
            "cpu": usage.ru_utime + usage.ru_stime, "peak_kb": usage.ru_maxrss,
        }  # fmt: skip
        try:
            self.control.send(json.dumps(end).encode())
        except ConnectionError:
            return False
        return True

    def _fork(self, order: dict[str, Any], descriptors: list[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            self._enter(order, descriptors)
            code = self.runner.main()
        except BaseException:  # no job may ever return into the loop above
            pass
        finally:
            os._exit(code if type(code) is int else 70)

    def _enter(self, order: dict[str, Any], descriptors: list[int]) -> None:
        job, stdin, stdout, report = descriptors
        high = [os.dup2(descriptor, 20 + i) for i, descriptor in enumerate((stdin, stdout, report, job))]
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, place in zip([*high[:2], null, *high[2:]], range(5)):
            os.dup2(descriptor, place)
        random.seed(0)
        cpu = int(order["cpu"]) + 1
        if self.jail is not None:
            self.jail.enter(order["memory_bytes"], cpu, order["threads"])
        else:
            os.setsid()
            lockdown.limit_resources(lockdown.address_space() + order["memory_bytes"], cpu)
            lockdown.die_with(self.pid)
            os.closerange(5, 1024)

    def _watch(self, pid: int, order: dict[str, Any], started: float) -> str | None:
        """Wait for the job's end, and kill it at a limit; return the reason, None if it ended by itself."""
        handle = os.pidfd_open(pid)
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        waiting.register(self.control, select.POLLIN)
        reason = None
        try:
            while reason is None:
                ready = dict(waiting.poll(TICK * 1000))
                if handle in ready:
                    return None
                if ready:  # the trainer wants the job stopped, or is gone
                    self.control.recv(1 << 16)
                    reason = "stopped"
                elif time.monotonic() - started > order["wall"]:
                    reason = "wall"
                elif time.clock_gettime(~pid << 3 | 2) > order["cpu"]:  # the CPU clock of another process
                    reason = "cpu"
                elif threads_of(pid) > order["threads"]:
                    reason = "threads"
            os.kill(pid, signal.SIGKILL)
            return reason
        finally:
            os.close(handle)

    def _escapes(self) -> list[str]:
        """Run the canary as a job, and return what it found."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            memory = self.setup["memory_bytes"]
            try:
                os.dup2(theirs, 3)
                self.jail.enter(memory, 10, 32)
                signal.alarm(30)
                os.write(3, json.dumps(canary.escapes(memory)).encode())
            except BaseException as error:
                os.write(3, json.dumps([f"cannot be locked in ({error})"]).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        os.waitpid(pid, 0)
        report = os.read(ours, 1 << 16)
        os.close(ours)
        return json.loads(report) if report else ["ends at once"]


def standard_library() -> list[str]:
    """List the library's files and folders, without the packages installed beside it, and two harmless devices."""
    folder = os.path.dirname(os.__file__)
    hidden = ("site-packages", "dist-packages")
    return [os.path.join(folder, name) for name in os.listdir(folder) if name not in hidden] + [
        "/dev/null", "/dev/urandom",
    ]  # fmt: skip


def threads_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[17])


if __name__ == "__main__":
    main(int(sys.argv[1]))
