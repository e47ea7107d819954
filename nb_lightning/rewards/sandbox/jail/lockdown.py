"""Lock a fork of the zygote in as a job: limits, privileges, Landlock, descriptors, seccomp, in this order."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import landlock
import seccomp

FIRST_FREE = 5  # a job keeps the descriptors 0 stdin, 1 stdout, 2 /dev/null, 3 its report, 4 its task
DESCRIPTORS = 64
FIRST_UID = 1_500_000_000  # as root, the jobs of each zygote run as another user, where such a number is mapped
NOBODY = 65534
CAP_SETUID = 1 << 7
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
_LIBC = ctypes.CDLL(None, use_errno=True)
_prctl, _capset, _setfsuid = _LIBC.prctl, _LIBC.capset, _LIBC.setfsuid  # looked up once, not in each job


@dataclass(frozen=True)
class Jail:
    """What a zygote prepares once and every job enters."""

    ruleset: int | None  # of Landlock; None where the kernel has none, and then no file can be opened at all
    filter: bytes | None  # of seccomp; None where the kernel has none
    uid: int | None  # the user that a job becomes; None if this is not root or no other user is mapped
    keep_fsuid: bool  # read files as root even so, because no other user can reach the interpreter's library
    base_bytes: int  # address space that the zygote has mapped already
    zygote: int  # process number of the zygote

    def enter(self, memory_bytes: int, cpu_seconds: int, threads: int) -> None:
        """Lock this process in, irrevocably.

        Raises:
            OSError: locking in failed; the job must not run.
        """
        limit_resources(self.base_bytes + memory_bytes, cpu_seconds)
        if self.uid is not None:
            if self.uid != NOBODY:  # other processes of that user would count
                resource.setrlimit(resource.RLIMIT_NPROC, (threads + 1, threads + 1))
            _become(self.uid, self.keep_fsuid)
        _set_capabilities(0)
        die_with(self.zygote)  # after the change of user, which clears it
        if self.ruleset is not None:
            landlock.restrict(self.ruleset)
        os.closerange(FIRST_FREE, 16 * DESCRIPTORS)
        if self.filter is not None:
            seccomp.install(self.filter)


def prepare(readable: Sequence[str], machine: str) -> Jail:
    """Set the limits that all jobs inherit, and find out which protections this machine has.

    Args:
        readable: files and folders that jobs may read.
        machine: the architecture, as `uname` names it.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        resource.setrlimit(limit, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    try:
        ruleset = None
        if landlock.abi():  # its descriptor is moved above those that a job gets
            ruleset = fcntl.fcntl(landlock.ruleset(readable), fcntl.F_DUPFD_CLOEXEC, 30)
    except OSError:
        ruleset = None
    filter_ = None
    if machine in seccomp.ARCHITECTURES:
        filter_ = seccomp.program(machine, files=ruleset is not None)
        if not works(lambda: seccomp.install(filter_)):
            filter_ = None
    candidates = (FIRST_UID + os.getpid(), NOBODY) if os.geteuid() == 0 else ()
    uid = next((uid for uid in candidates if works(lambda uid=uid: _become(uid, True))), None)
    keep_fsuid = uid is not None and not all(map(_readable_by_all, (os.path.dirname(os.__file__), *readable)))
    return Jail(ruleset, filter_, uid, keep_fsuid, address_space(), os.getpid())


def die_with(parent: int) -> None:
    """Let this process end when `parent` does; raise if the parent is gone already."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the parent is gone")


def limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit this process' address space and CPU time (SIGXCPU at the limit, SIGKILL a second later)."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))


def address_space() -> int:
    """Return how many bytes of address space this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def works(attempt: Callable[[], object]) -> bool:
    """Return whether `attempt` raises no OSError in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def prctl(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _become(uid: int, keep_fsuid: bool) -> None:
    """Become another user and group, with no other groups. With `keep_fsuid`, keep opening files as the old user."""
    before = os.geteuid()
    if keep_fsuid:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if keep_fsuid:
        _set_capabilities(CAP_SETUID)
        _setfsuid(before)


def _set_capabilities(wanted: int) -> None:
    """Have only the wanted capabilities (of the first 32, of those permitted)."""
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    data = struct.pack("6I", wanted, wanted, 0, 0, 0, 0)
    if _capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _readable_by_all(path: str) -> bool:
    above = all(os.stat(folder).st_mode & 0o1 for folder in Path(path).parents)
    return above and bool(os.stat(path).st_mode & 0o4)
