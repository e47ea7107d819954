"""No attack gets anything out of the sandbox, and none of them ends more than its own job."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import psutil
import pytest

from nb_lightning.rewards.code import SETUP
from nb_lightning.rewards.sandbox import pool as sandbox_module
from nb_lightning.rewards.sandbox.pool import Limits, Outcome, Sandbox
from tests.rewards.attacks import FILES, HARNESS, KERNEL, MEMORY, NETWORK, PREAMBLE, PROCESSES, TIME, Attack

pytestmark = pytest.mark.runs

LIMITS = Limits(cpu_seconds=5.0, wall_seconds=20.0, memory_mb=256)
TIGHT = Limits(cpu_seconds=1.5, wall_seconds=20.0, memory_mb=256)
SHORT = Limits(cpu_seconds=0.2, wall_seconds=2.0, memory_mb=256)


class Place:
    """What the attacks are after."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.victim = folder / "open", folder / "victim"
        self.folder.mkdir()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port = self.listener.getsockname()[1]
        self.datagrams.bind(("127.0.0.1", self.port))
        for path in (folder, self.folder):
            path.chmod(0o777)
        self.reset()
        self.words = {
            "VICTIM": self.victim, "FOLDER": self.folder, "PORT": self.port, "SOURCE": sandbox_module.__file__,
            "PACKAGE": numpy.__file__, "DISK": psutil.disk_partitions()[0].device,
        }  # fmt: skip

    def reset(self) -> None:
        for path in list(self.folder.iterdir()):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in (self.victim, self.folder / "spare", self.folder / "pick"):
            path.write_text("TREASURE")
            path.chmod(0o666)

    def harm(self) -> list[str]:
        """What is not as it was."""
        found = [path.name for path in self.folder.iterdir() if path.name not in ("spare", "pick")]
        for path in (self.victim, self.folder / "spare", self.folder / "pick"):
            if not path.exists() or path.read_text() != "TREASURE" or path.stat().st_mode & 0o777 != 0o666:
                found.append(path.name)
        for waiting in (self.listener, self.datagrams):
            waiting.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                waiting.accept() if waiting is self.listener else waiting.recv(10)
                found.append("a connection")
        return found

    def program(self, attack: Attack) -> str:
        code = attack.code
        for word, value in self.words.items():
            code = code.replace(word, str(value))
        return PREAMBLE + code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("attacked")
    for path in folder.parents:  # so that another user could get there, were it not for the sandbox
        if path.owner() == psutil.Process().username() and str(path).startswith("/tmp/"):
            path.chmod(0o755)
    made = Place(folder)
    yield made
    made.listener.close()
    made.datagrams.close()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(SETUP, workers=1)
    yield made
    made.close()


def attacked(sandbox: Sandbox, place: Place, attack: Attack, limits: Limits = LIMITS) -> Outcome:
    """Run it; nothing escaped, nothing is changed, nobody is left, and the same zygote does the next job."""
    place.reset()
    [zygote] = sandbox._running
    outcome = sandbox.run({"code": place.program(attack)}, b"input\n", limits)
    assert b"ESCAPED" not in outcome.stdout
    assert place.harm() == []
    assert sandbox.run({"code": "print(input())"}, b"fine", LIMITS).stdout == b"fine\n"
    assert [*sandbox._running] == [zygote]
    assert psutil.Process(zygote.pid).children() == []
    return outcome


@pytest.mark.parametrize("attack", FILES + PROCESSES + NETWORK + KERNEL, ids=lambda attack: attack.name)
def test_an_attack_is_refused(sandbox: Sandbox, place: Place, attack: Attack) -> None:
    outcome = attacked(sandbox, place, attack)
    assert outcome.status in ("ok", "crash"), outcome
    assert "NameError" not in str(outcome.report) and "SyntaxError" not in str(outcome.report)


@pytest.mark.parametrize("attack", MEMORY, ids=lambda attack: attack.name)
def test_memory_has_a_limit(sandbox: Sandbox, place: Place, attack: Attack) -> None:
    assert attacked(sandbox, place, attack, TIGHT).status in ("ok", "crash", "timeout")


@pytest.mark.parametrize("attack", TIME, ids=lambda attack: attack.name)
def test_time_has_a_limit(sandbox: Sandbox, place: Place, attack: Attack) -> None:
    assert attacked(sandbox, place, attack, SHORT).status == "timeout"


@pytest.mark.parametrize("attack", HARNESS, ids=lambda attack: attack.name)
def test_an_attack_on_the_harness_leaves_it_standing(sandbox: Sandbox, place: Place, attack: Attack) -> None:
    outcome = attacked(sandbox, place, attack)
    assert outcome.status in ("ok", "crash", "flood")
    assert len(outcome.stdout) <= LIMITS.output_bytes + 2**16


ALL = FILES + PROCESSES + NETWORK + KERNEL + MEMORY + TIME + HARNESS


def test_there_are_enough_attacks_and_each_has_a_name() -> None:
    assert len(ALL) >= 40 and len({attack.name for attack in ALL}) == len(ALL)


@pytest.mark.skipif(os.geteuid() != 0, reason="what root may do")
@pytest.mark.parametrize("attack", [attack for attack in ALL if attack.control], ids=lambda attack: attack.name)
def test_an_attack_succeeds_outside_the_sandbox(place: Place, attack: Attack) -> None:
    """The control: an attack that fails everywhere would show nothing."""
    place.reset()
    limits = [(resource.RLIMIT_CPU, 10), (resource.RLIMIT_AS, 4 << 30), (resource.RLIMIT_FSIZE, 1 << 24)]
    done = subprocess.run(
        [sys.executable, "-c", place.program(attack)], capture_output=True, timeout=60, input=b"input\n",
        preexec_fn=lambda: [resource.setrlimit(kind, (value, value)) for kind, value in limits],
    )  # fmt: skip
    place.harm()
    assert b"ESCAPED" in done.stdout, done.stderr.decode()


# Writes its own memory, page by page, into a pipe: a wrong address is an error there, not a crash.
SCAN = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
first, second = b"marker-of-", b"the-last-job"   # never side by side in this program
r, w = os.pipe()
pages, top, here = 0, libc.sbrk(0), id(object()) & ~4095
for end in (top, here + (16 << 20), here):
    for page in range(end - (16 << 20), end, 4096):
        if libc.write(w, page, 4096) == 4096:
            pages += 1
            data = os.read(r, 4096)
            at = data.find(first)
            if at >= 0 and data.startswith(second, at + len(first)): print("FOUND")
print("pages", pages)
"""


def test_nothing_of_the_last_job_is_in_the_next(sandbox: Sandbox) -> None:
    """Completions of one prompt follow each other: none may find another's code, input or output in its memory."""
    marker = "marker-of-the-last-job"
    found = sandbox.run({"code": f"{SCAN}\nplanted = {marker!r}"}, b"", LIMITS)
    assert b"FOUND" in found.stdout  # the search does find what is there
    for _ in range(3):
        sandbox.run({"code": f"x = [{marker!r} + str(i) for i in range(10000)]; print(x, input())"}, marker.encode())
    outcome = sandbox.run({"code": SCAN}, b"", LIMITS)
    assert outcome.stdout.startswith(b"pages") and int(outcome.stdout.split()[1]) > 1000, outcome


def test_attacks_from_many_threads_at_once(place: Place) -> None:
    several = Sandbox(SETUP, workers=2)
    chosen = [FILES[0], NETWORK[0], TIME[0], MEMORY[0], HARNESS[0]] * 2
    outcomes: list[Outcome] = []
    threads = [
        threading.Thread(
            target=lambda attack=attack: outcomes.append(several.run({"code": place.program(attack)}, b"", SHORT))
        )
        for attack in chosen
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    several.close()
    assert len(outcomes) == len(chosen) and not any(b"ESCAPED" in outcome.stdout for outcome in outcomes)
    assert {outcome.status for outcome in outcomes} == {"crash", "timeout", "flood"}
