"""The life of zygotes: limits, deaths, forks, exits; nothing is left behind and nothing grows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nb_lightning.rewards.code import SETUP
from nb_lightning.rewards.sandbox import pool as module
from nb_lightning.rewards.sandbox import worker
from nb_lightning.rewards.sandbox.pool import Limits, Sandbox, SandboxError, Setup, describe
from tests.harness import ROOT

pytestmark = pytest.mark.runs

SHORT = Limits(cpu_seconds=0.1, wall_seconds=3.0, memory_mb=128, output_bytes=10_000)
HONEST = {"code": "print(int(input()) + 1)"}
ENDLESS = {"code": "while True: pass"}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(SETUP, workers=2)
    yield made
    made.close()


def zygotes(sandbox: Sandbox) -> list[psutil.Process]:
    return [psutil.Process(worker.pid) for worker in sandbox._running if psutil.pid_exists(worker.pid)]


def works(sandbox: Sandbox) -> bool:
    return sandbox.run(HONEST, b"41").stdout == b"42\n"


@pytest.mark.parametrize(
    "code, status, words",
    [
        ("print(1)", "ok", ""),
        ("raise ValueError('no')", "crash", "exit code 1"),
        ("import os; os._exit(7)", "crash", "exit code 7"),
        ("import ctypes; ctypes.string_at(0)", "crash", "killed by SIGSEGV"),
        ("while True: pass", "timeout", ""),
        ("import time; time.sleep(9)", "timeout", "wall: 0.0"),
        ("while True: print('x' * 1000)", "flood", "too much output"),
        ("print('x' * 10_001)", "flood", "too much output"),
        ("print('x' * 9_999)", "ok", ""),
        ("import os\nfor _ in range(99): os.write(3, b'1' * 999)", "flood", "too much output"),
    ],
)
def test_the_outcome_says_how_a_job_ended(sandbox: Sandbox, code: str, status: str, words: str) -> None:
    outcome = sandbox.run({"code": code}, b"", SHORT)
    assert outcome.status == status and outcome.reason.startswith(words), outcome
    assert len(outcome.stdout) <= 2 * SHORT.output_bytes + 2**16


def test_memory_is_limited(sandbox: Sandbox) -> None:
    for megabytes, status in ((90, "ok"), (150, "crash")):
        outcome = sandbox.run({"code": f"x = bytearray({megabytes} << 20)"}, b"", Limits(memory_mb=128))
        assert outcome.status == status
    assert outcome.report == [{"error": "MemoryError:  (line 1)"}]


def test_threads_are_limited(sandbox: Sandbox) -> None:
    """More than the limit is refused or ends the job; up to it, they run."""
    code = (
        "import threading, time\nthreading.stack_size(65536)\nfor _ in range({}):\n"
        "    threading.Thread(target=time.sleep, args=(0.1,)).start()\nprint(1)"
    )
    assert sandbox.run({"code": code.format(30)}).status == "ok"
    assert sandbox.run({"code": code.format(60)}).status == "crash"


def test_the_same_job_gives_the_same_result_in_every_zygote() -> None:
    code = "import random\nprint(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('a'), random.random())"
    outputs = set()
    for _ in range(2):
        made = Sandbox(SETUP, workers=1)
        outputs |= {made.run({"code": code}).stdout for _ in range(2)}
        made.close()
    assert len(outputs) == 1


def test_outcomes_are_in_order(sandbox: Sandbox) -> None:
    jobs = [(HONEST, str(i).encode(), Limits()) for i in range(40)]
    assert [outcome.stdout for outcome in sandbox.map(jobs)] == [f"{i + 1}\n".encode() for i in range(40)]


def test_a_zygote_killed_at_work_costs_its_job(sandbox: Sandbox) -> None:
    [victim, *_] = zygotes(sandbox)
    outcomes = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(sandbox.run(ENDLESS, b"", Limits(1.5, 20.0)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: victim.children())
    [job] = victim.children()
    victim.kill()
    for thread in threads:
        thread.join()
    assert sorted(outcome.status for outcome in outcomes) == ["lost", "timeout"]
    until(lambda: not alive(job))  # the job does not outlive its zygote
    assert works(sandbox) and works(sandbox)


def test_a_zygote_killed_while_idle_costs_nothing(sandbox: Sandbox) -> None:
    assert works(sandbox)
    idle = zygotes(sandbox)
    for zygote in idle:
        zygote.kill()
    until(lambda: not any(map(alive, idle)))
    assert all(outcome.status == "ok" for outcome in sandbox.map([(HONEST, b"1", Limits())] * 4))


def test_a_job_killed_from_outside_costs_itself(sandbox: Sandbox) -> None:
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(sandbox.run(ENDLESS)))
    thread.start()
    until(lambda: [job for zygote in zygotes(sandbox) for job in zygote.children()])
    [job] = [job for zygote in zygotes(sandbox) for job in zygote.children()]
    job.kill()
    thread.join()
    assert (outcomes[0].status, outcomes[0].reason) == ("crash", "killed by SIGKILL")
    assert works(sandbox)


def test_a_zygote_that_stands_still_is_replaced() -> None:
    made = Sandbox(SETUP, workers=1)
    [zygote] = zygotes(made)
    os.kill(zygote.pid, signal.SIGSTOP)
    assert made.run(HONEST, b"1", SHORT).status == "lost"
    assert not alive(zygote)
    assert works(made)
    made.close()


def test_close_ends_all_and_run_starts_anew() -> None:
    made = Sandbox(SETUP, workers=2)
    thread = threading.Thread(target=made.run, args=(ENDLESS,))
    thread.start()
    until(lambda: any(zygote.children() for zygote in zygotes(made)))
    processes = [process for zygote in zygotes(made) for process in (zygote, *zygote.children())]
    made.close()
    thread.join()
    until(lambda: not any(map(alive, processes)))
    assert works(made)
    made.close()


PROGRAM = """
import os, signal, sys, threading, time
from nb_lightning.rewards.code import SETUP
from nb_lightning.rewards.sandbox import Limits, shared
sandbox = shared(SETUP)
sandbox.map([({"code": "print(1)"}, b"", Limits())] * 4)
threading.Thread(target=sandbox.run, args=({"code": "while True: pass"}, b"", Limits(100, 100)), daemon=True).start()
time.sleep(0.3)
print(*(worker.pid for worker in sandbox._running), flush=True)
"""


@pytest.mark.parametrize(
    "ending", ["", "raise ValueError", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGTERM)", "os._exit(0)",
               "os.kill(os.getpid(), signal.SIGKILL)", "os.fork() or time.sleep(5)\nos._exit(0)"],
    ids=["end", "error", "exit", "terminated", "left", "killed", "left-with-a-fork"],
)  # fmt: skip
def test_no_process_outlives_the_trainer(ending: str) -> None:
    """However it ends; also when a fork of it (a loader's worker, say) lives on and holds its sockets open."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM + ending], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    family = [int(pid) for pid in process.stdout.readline().split()]
    assert len(family) == 2
    process.wait(60)
    process.stdout.close()
    until(lambda: not any(map(psutil.pid_exists, family)))


def test_a_fork_of_the_trainer_has_zygotes_of_its_own(sandbox: Sandbox) -> None:
    assert works(sandbox)
    before = zygotes(sandbox)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ours = works(sandbox) and not {zygote.pid for zygote in zygotes(sandbox)} & {
                zygote.pid for zygote in before
            }
            sandbox.close()
            code = 0 if ours else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert zygotes(sandbox) == before and works(sandbox)


def soak(runs: int) -> None:
    """Mixed runs; afterwards nobody has more memory, descriptors, threads or children than before."""
    sandbox = Sandbox(SETUP, workers=2)
    tight = Limits(cpu_seconds=0.05, wall_seconds=5.0, memory_mb=64, output_bytes=1000)
    mixture = [(HONEST, b"1", Limits())] * 12 + [
        ({"code": "1/0"}, b"", Limits()), ({"code": "import os; os._exit(3)"}, b"", Limits()),
        (ENDLESS, b"", tight), ({"code": "x = [0] * 10**9"}, b"", tight), ({"code": "while 1: print(1)"}, b"", tight),
        ({"code": "import threading; threading.Thread(target=print).start()"}, b"", Limits()),
        ({"code": "import os; os.write(3, b'[' * 99)"}, b"", Limits()),
        ({"code": "def f(x): return x", "entry": "f", "calls": [["list", "a"]], "cpu": 1, "wall": 4}, b"", Limits()),
    ]  # fmt: skip
    sandbox.map(mixture * 3)
    processes = [psutil.Process(), *zygotes(sandbox)]
    before = [measure(process) for process in processes]
    for _ in range(runs // len(mixture)):
        statuses = [outcome.status for outcome in sandbox.map(mixture)]
        assert statuses[:12] == ["ok"] * 12 and statuses[12:] == [
            "crash", "crash", "timeout", "crash", "flood", "ok", "ok", "ok",
        ]  # fmt: skip
    after = [measure(process) for process in processes]
    sandbox.close()
    for old, new in zip(before, after):
        assert new["descriptors"] <= old["descriptors"] and new["children"] == old["children"]
        assert new["threads"] <= old["threads"]
        assert new["megabytes"] < old["megabytes"] + 4


def measure(process: psutil.Process) -> dict[str, Any]:
    return {
        "descriptors": process.num_fds(), "children": len(process.children()), "threads": process.num_threads(),
        "megabytes": process.memory_info().rss / 2**20,
    }  # fmt: skip


def test_five_hundred_jobs_leave_nothing_behind() -> None:
    soak(500)


@pytest.mark.slow
def test_five_thousand_jobs_leave_nothing_behind() -> None:
    soak(5000)


class Escaped:
    """A zygote whose self-test found something."""

    hello = {"landlock": 0, "seccomp": False, "other_user": False, "escapes": ["reads a file", "forks"]}

    def __init__(self, setup: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_machine_that_cannot_hold_the_jobs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Worker", Escaped)
    with pytest.raises(SandboxError) as error:
        Sandbox(SETUP)
    for words in ("NO SECCOMP", "a job reads a file, forks", "NB_UNSAFE_SANDBOX=1"):
        assert words in str(error.value)
    Sandbox(SETUP, unsafe=True)
    monkeypatch.setenv("NB_UNSAFE_SANDBOX", "1")
    Sandbox(SETUP)


def test_a_zygote_that_does_not_start_says_why() -> None:
    with pytest.raises(SandboxError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        Sandbox(Setup("run_code", preload=("no_such_module",)))


def test_a_start_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nb_hangs.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(worker, "START_SECONDS", 0.5)
    with pytest.raises(SandboxError, match=r"no word from it|it ended"):
        Sandbox(Setup("run_code", preload=("nb_hangs",), path=(*sys.path, str(tmp_path))))


def test_a_start_that_hangs_does_not_outlive_the_trainer(tmp_path: Path) -> None:
    (tmp_path / "nb_hangs.py").write_text("import time\ntime.sleep(1000)\n")
    program = f"""
import sys
from nb_lightning.rewards.sandbox import Sandbox, Setup, worker
worker.START_SECONDS = 3
Sandbox(Setup("run_code", preload=("nb_hangs",), path=(*sys.path, {str(tmp_path)!r})))
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until(lambda: psutil.Process(trainer.pid).children())
    [zygote] = psutil.Process(trainer.pid).children()
    trainer.kill()
    trainer.wait()
    until(lambda: not alive(zygote))


def test_a_restart_that_fails_costs_jobs_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Sandbox(SETUP, workers=1)
    for zygote in zygotes(made):
        zygote.kill()
        until(lambda zygote=zygote: not alive(zygote))
    monkeypatch.setattr(module, "Worker", Escaped)
    outcome = made.run(HONEST, b"1")
    assert outcome.status == "lost" and "a job reads a file" in outcome.reason
    monkeypatch.undo()
    assert works(made)
    made.close()


def test_the_protections_are_described_in_words() -> None:
    assert describe({}) == "no jail: time and memory limits only"
    hello = {"landlock": 4, "seccomp": True, "other_user": True, "escapes": []}
    assert describe(hello).startswith("Landlock 4 + seccomp + limits + another user")
    assert "no file can be opened" in describe({**hello, "landlock": 0})


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
