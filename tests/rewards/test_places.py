"""Other machines than this one: no Landlock, no seccomp, an ordinary user, root in a container, bubblewrap.

A kernel without a feature is this one under a filter that answers as that one would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.runs

HEADER = """
import ctypes, errno, json, os, struct, sys
from nb_lightning.rewards.sandbox.jail import seccomp
libc = ctypes.CDLL(None, use_errno=True)

def without(*numbers):  # system calls that this kernel is not to have
    op = lambda code, k, t=0, f=0: struct.pack("HBBI", code, t, f, k)
    body = b"".join(op(0x15, number, 0, 1) + op(6, 0x50000 | errno.ENOSYS) for number in numbers)
    libc.prctl(38, 1, 0, 0, 0)
    seccomp.install(op(0x20, 0) + body + op(6, 0x7FFF0000))

def without_filters():  # prctl(PR_SET_SECCOMP) fails from now on
    op = lambda code, k, t=0, f=0: struct.pack("HBBI", code, t, f, k)
    number = seccomp.NUMBERS["prctl"][list(seccomp.ARCHITECTURES).index(os.uname().machine)]
    libc.prctl(38, 1, 0, 0, 0)
    seccomp.install(op(0x20, 0) + op(0x15, number, 0, 3) + op(0x20, 16) + op(0x15, 22, 0, 1)
                    + op(6, 0x50000 | errno.EINVAL) + op(6, 0x7FFF0000))

def as_user(inside):  # in a user namespace whose only user is `inside`: without privileges over anything outside
    outside = os.getuid()
    if libc.unshare(0x10000000): sys.exit(77)
    gid = os.getgid()
    for name, text in ("uid_map", f"{inside} {outside} 1"), ("setgroups", "deny"), ("gid_map", f"{inside} {gid} 1"):
        open(f"/proc/self/{name}", "w").write(text)
"""
BODY = """
from nb_lightning.rewards.code import SETUP
from nb_lightning.rewards.sandbox import Sandbox, SandboxError
try:
    sandbox = Sandbox(SETUP, workers=1)
except SandboxError as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
codes = {
    "honest": "import heapq, collections\\nprint(int(input()) + 1)",
    "lazy": "import colorsys\\nprint(42)",
    "read": "print(len(open('/etc/passwd').read()))",
    "stdlib": "import os\\nprint(len(open(os.__file__).read()) > 0)",
    "list": "import os\\nprint(os.listdir('/'))",
    "write": "open('/tmp/nb_place', 'w')",
    "environment": "print(open('/proc/self/environ').read())",
    "socket": "import socket\\nsocket.socket()",
    "fork": "import os\\nos.fork()",
    "kill": "import os\\nos.kill(os.getppid(), 9)",
    "thread": "import threading\\nthreading.Thread(target=print, args=(42,)).start()",
    "threads": "import threading, time\\nthreading.stack_size(65536)\\nfor _ in range(100):"
               " threading.Thread(target=time.sleep, args=(1,)).start()\\nprint(1)",
    "user": "import os\\nprint(os.getuid())",
}
results = {name: sandbox.run({"code": code}, b"41\\n").stdout.decode().strip() for name, code in codes.items()}
print(json.dumps({"hello": next(iter(sandbox._running)).hello, **results}))
"""
NOTHING = ("read", "list", "write", "environment", "socket", "fork", "kill", "threads")


def place(setting: str, **environment: str) -> dict[str, Any]:
    """What jobs can do after `setting`."""
    done = subprocess.run(
        [sys.executable, "-c", HEADER + setting + BODY], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("no user namespaces here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contained(found: dict[str, Any]) -> None:
    assert "refused" not in found, found
    assert found["hello"]["escapes"] == []
    assert found["honest"] == found["thread"] == "42"
    assert {name: found[name] for name in NOTHING} == dict.fromkeys(NOTHING, "")


def test_this_machine_contains_its_jobs() -> None:
    found = place("")
    contained(found)
    assert found["hello"]["other_user"] == (os.getuid() == 0)
    assert found["lazy"] == "42"


def test_without_landlock_no_file_opens() -> None:
    found = place("without(444, 445, 446)")
    contained(found)
    assert found["hello"]["landlock"] == 0
    assert found["stdlib"] == "" and found["lazy"] == ""  # the price: modules beyond those that are preloaded


def test_without_seccomp_it_is_refused() -> None:
    found = place("without_filters()")
    assert "NO SECCOMP" in found["refused"] and "forks" in found["refused"]


def test_without_seccomp_it_runs_if_unsafe_is_set() -> None:
    found = place("without_filters()", NB_UNSAFE_SANDBOX="1")
    assert "forks" in found["hello"]["escapes"]
    assert found["honest"] == "42" and found["read"] == ""  # Landlock is still there


def test_without_both_it_is_refused() -> None:
    assert "refused" in place("without(444, 445, 446); without_filters()")


def test_jobs_of_an_ordinary_user_are_contained() -> None:
    found = place("as_user(1000)")
    contained(found)
    assert not found["hello"]["other_user"] and found["user"] == "1000" and found["lazy"] == "42"


def test_jobs_of_root_in_a_container_without_other_users_are_contained() -> None:
    found = place("as_user(0)")
    contained(found)
    assert not found["hello"]["other_user"] and found["lazy"] == "42"


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap here")
@pytest.mark.parametrize("setting", ["", "as_user(1000)"], ids=["as it is", "an ordinary user"])
def test_jobs_inside_bubblewrap_are_contained(setting: str) -> None:
    contained(place(setting))


@pytest.mark.parametrize(
    "script, used",
    [("exit 1", False), ("sleep 100", False), ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', True)],
)
def test_a_bubblewrap_that_does_not_work_is_left_out(tmp_path: Any, script: str, used: bool) -> None:
    """One that fails or hangs; and one that does nothing but run the program, to show that it would be used."""
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\necho used >> {tmp_path}/log\n{script}\n")
    fake.chmod(0o755)
    found = place(
        "import nb_lightning.rewards.sandbox.worker as w; w.PROBE_SECONDS = 1", PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    contained(found)
    assert ((tmp_path / "log").read_text().count("used") > 1) == used
