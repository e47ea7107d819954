"""The system calls that a job may make: an allow-list, compiled to a seccomp filter (seccomp(2)).

A call that is not listed fails with EPERM, so that a program which only tries it can go on. There is no fork, exec,
socket, signal to any process, ptrace, memfd, io_uring, keyring, namespace or write to a file. Threads are allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*

# name: number on x86_64, on aarch64 (which has no call where the other number is None)
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getrlimit": (97, 163), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "exit": (60, 93), "exit_group": (231, 94),
    "open": (2, None), "openat": (257, 56), "clone": (56, 220), "fcntl": (72, 25), "prlimit64": (302, 261),
    "prctl": (157, 167), "clone3": (435, 435), "openat2": (437, 437), "ioctl": (16, 29),
}  # fmt: skip


@dataclass(frozen=True)
class If:
    """A condition: the call is allowed if argument `arg`, its low 32 bits masked with `mask`, is one of `values`.

    Otherwise it fails with `error`. With `null` it is allowed only if the whole argument is 0.
    """

    arg: int
    mask: int = 0xFFFFFFFF
    values: tuple[int, ...] = ()
    null: bool = False
    error: int = errno.EPERM


# Open for reading only: no O_WRONLY, O_RDWR, O_CREAT or O_TRUNC. (Landlock before ABI 3 does not restrict all of
# them; O_TMPFILE needs one of the first two.)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_THREAD, _NAMESPACES = 0x00010000, 0x7E020080
_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC

CONDITIONS = {
    "open": If(arg=1, mask=_WRITING, values=(0,), error=errno.EACCES),
    "openat": If(arg=2, mask=_WRITING, values=(0,), error=errno.EACCES),
    "clone": If(arg=0, mask=_THREAD | _NAMESPACES, values=(_THREAD,)),
    "fcntl": If(arg=1, values=_FCNTL),
    "prlimit64": If(arg=2, null=True),  # reads limits, sets none
    "prctl": If(arg=0, values=(15, 16)),  # PR_SET_NAME, PR_GET_NAME: names of threads
}
# The C library works without these: it falls back to clone, to openat, and to "not a terminal".
REFUSED = {"clone3": errno.ENOSYS, "openat2": errno.ENOSYS, "ioctl": errno.ENOTTY}
OPENING = ("open", "openat", "getdents64")

_prctl = ctypes.CDLL(None, use_errno=True).prctl

# struct sock_filter {u16 code; u8 jt, jf; u32 k}
_LOAD, _JUMP_IF, _JUMP_IF_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data


def program(machine: str, files: bool = True) -> bytes:
    """Compile the filter for `machine` (a key of `ARCHITECTURES`): an array of struct sock_filter.

    Args:
        files: whether files may be opened (for reading) at all; Landlock then decides which.
    """
    column = list(ARCHITECTURES).index(machine)
    bodies = {numbers[column]: _body(name, files) for name, numbers in NUMBERS.items() if numbers[column] is not None}
    code = [
        _op(_LOAD, _ARCH),
        _op(_JUMP_IF, ARCHITECTURES[machine], 1, 0),
        _op(_RETURN, KILL_PROCESS),
        _op(_LOAD, _NUMBER),
        *_search(sorted(bodies.items())),
    ]
    return b"".join(code)


def install(filter_: bytes) -> None:
    """Put this process under the filter, irrevocably. Needs no_new_privs.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    fprog = struct.pack("HxxxxxxP", len(filter_) // 8, ctypes.addressof(buffer))
    if _prctl(22, 2, fprog, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


def _search(bodies: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Find the call's number by bisection: the kernel runs this at every call, and for all numbers to install it."""
    if len(bodies) == 1:
        [(number, body)] = bodies
        return [_op(_JUMP_IF, number, 0, len(body)), *body, _op(_RETURN, ERRNO | errno.EPERM)]
    middle = len(bodies) // 2
    lower = _search(bodies[:middle])
    return [_op(_JUMP_IF_AT_LEAST, bodies[middle][0], len(lower), 0), *lower, *_search(bodies[middle:])]


def _body(name: str, files: bool) -> list[bytes]:
    if name in OPENING and not files:
        return [_op(_RETURN, ERRNO | errno.EACCES)]
    if name in REFUSED:
        return [_op(_RETURN, ERRNO | REFUSED[name])]
    if name in CONDITIONS:
        return _condition(CONDITIONS[name])
    return [_op(_RETURN, ALLOW)]


def _condition(rule: If) -> list[bytes]:
    low = _ARGS + 8 * rule.arg
    refuse = _op(_RETURN, ERRNO | rule.error)
    if rule.null:
        return [
            _op(_LOAD, low), _op(_JUMP_IF, 0, 0, 3), _op(_LOAD, low + 4), _op(_JUMP_IF, 0, 0, 1),
            _op(_RETURN, ALLOW), refuse,
        ]  # fmt: skip
    body = [_op(_LOAD, low), _op(_AND, rule.mask)]
    for i, value in enumerate(rule.values):
        body.append(_op(_JUMP_IF, value, len(rule.values) - i, 0))
    return [*body, refuse, _op(_RETURN, ALLOW)]


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, jump_true, jump_false, k)
