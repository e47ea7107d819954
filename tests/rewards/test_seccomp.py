"""The filter, run by a small interpreter of BPF: both architectures, on any machine."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from nb_lightning.rewards.sandbox.jail import seccomp
from nb_lightning.rewards.sandbox.jail.seccomp import ALLOW, ARCHITECTURES, ERRNO, KILL_PROCESS, NUMBERS

X86_HEADERS = [Path(f"/usr/include/{place}asm/unistd_64.h") for place in ("", "x86_64-linux-gnu/")]
ARM_HEADER = Path("/usr/include/asm-generic/unistd.h")
THREAD = 0x3D0F00  # the flags of pthread_create


def decide(filter_: bytes, machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the kernel would return for a system call."""
    arguments = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("iIQ6Q", number, ARCHITECTURES[machine] if arch is None else arch, 0, *arguments)
    accumulator, at = 0, 0
    while True:
        code, jump_true, jump_false, k = struct.unpack_from("HBBI", filter_, 8 * at)
        at += 1
        if code == 0x20:  # load a word
            [accumulator] = struct.unpack_from("I", data, k)
        elif code == 0x54:
            accumulator &= k
        elif code in (0x15, 0x35):
            at += jump_true if (accumulator == k if code == 0x15 else accumulator >= k) else jump_false
        else:
            assert code == 0x06
            return k


def call(name: str, machine: str, *arguments: int, files: bool = True) -> int:
    number = NUMBERS[name][list(ARCHITECTURES).index(machine)]
    assert number is not None
    return decide(seccomp.program(machine, files), machine, number, *arguments)


both = pytest.mark.parametrize("machine", ARCHITECTURES)


@both
def test_only_listed_calls_are_allowed(machine: str) -> None:
    column = list(ARCHITECTURES).index(machine)
    listed = {numbers[column]: name for name, numbers in NUMBERS.items() if numbers[column] is not None}
    filter_ = seccomp.program(machine)
    for number in (*range(600), 0x40000000, 0x40000000 | 57, 2**31 - 1):
        name = listed.get(number)
        verdict = decide(filter_, machine, number)
        if name is None:
            assert verdict == ERRNO | errno.EPERM, number
        elif name not in seccomp.CONDITIONS and name not in seccomp.REFUSED:
            assert verdict == ALLOW, name


@both
@pytest.mark.parametrize("other", [*ARCHITECTURES.values(), 0x40000003, 0x40000028])
def test_a_call_of_another_architecture_ends_the_process(machine: str, other: int) -> None:
    verdict = decide(seccomp.program(machine), machine, 0, arch=other)
    assert (verdict == KILL_PROCESS) == (other != ARCHITECTURES[machine])


@both
def test_files_open_for_reading_only(machine: str) -> None:
    for flags in (0, 0o2000000, 0o100000, 0o4000):  # O_CLOEXEC, O_LARGEFILE, O_NONBLOCK
        assert call("openat", machine, 0, 0, flags) == ALLOW
    for flags in (1, 2, 3, 0o100, 0o1000, 0o2001, 0o20200002):  # ..., O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE
        assert call("openat", machine, 0, 0, flags) == ERRNO | errno.EACCES
    assert call("openat", machine, 0, 0, 0, files=False) == ERRNO | errno.EACCES
    assert call("openat2", machine) == ERRNO | errno.ENOSYS


@both
def test_clone_makes_threads_only(machine: str) -> None:
    assert call("clone", machine, THREAD) == ALLOW
    assert call("clone", machine, THREAD | 1 << 40) == ALLOW  # the kernel reads 32 bits of it
    for flags in (0, 17, 0x4111, 0x10000000, THREAD | 0x10000000, THREAD | 0x00020000, THREAD | 0x40000000):
        assert call("clone", machine, flags) == ERRNO | errno.EPERM
    assert call("clone3", machine) == ERRNO | errno.ENOSYS


@both
def test_conditions_on_arguments_hold(machine: str) -> None:
    assert call("prlimit64", machine, 0, 7, 0) == ALLOW
    assert call("prlimit64", machine, 0, 7, 1) == call("prlimit64", machine, 0, 7, 1 << 32) == ERRNO | errno.EPERM
    assert call("prctl", machine, 15) == ALLOW
    assert call("prctl", machine, 4) == call("prctl", machine, 22) == ERRNO | errno.EPERM
    assert call("fcntl", machine, 0, 1) == call("fcntl", machine, 0, 1030) == ALLOW
    for command in (6, 8, 10, 1024, 1031, 1033):  # F_SETLK, F_SETOWN, F_SETSIG, F_SETLEASE, F_SETPIPE_SZ, F_ADD_SEALS
        assert call("fcntl", machine, 0, command) == ERRNO | errno.EPERM
    assert call("ioctl", machine) == ERRNO | errno.ENOTTY


@both
def test_dangerous_calls_are_never_listed(machine: str) -> None:
    never = (
        "fork vfork execve execveat kill tkill tgkill ptrace process_vm_readv process_vm_writev pidfd_open "
        "socket socketpair connect bind memfd_create io_uring_setup bpf perf_event_open userfaultfd keyctl add_key "
        "unshare setns mount chroot setuid setresuid setrlimit unlink "
        "rename mkdir symlink link chmod truncate ftruncate mknod seccomp "
        "landlock_create_ruleset personality splice vmsplice sendfile shmget msgget semget pwrite64 inotify_init1"
    ).split()
    assert not set(never) & set(NUMBERS)


@pytest.mark.skipif(not any(map(Path.exists, X86_HEADERS)), reason="no kernel headers here")
def test_the_numbers_of_x86_64_are_the_kernels() -> None:
    text = next(path for path in X86_HEADERS if path.exists()).read_text()
    kernel = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", text)}
    assert {name: kernel.get(name) for name in NUMBERS} == {name: numbers[0] for name, numbers in NUMBERS.items()}


@pytest.mark.skipif(not ARM_HEADER.exists(), reason="no kernel headers here")
def test_the_numbers_of_aarch64_are_the_kernels() -> None:
    """aarch64 uses the generic table, in which some names carry a 64 or a 3264."""
    text = ARM_HEADER.read_text()
    kernel = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)}
    kernel["newfstatat"] = kernel["fstatat"]
    assert {name: kernel.get(name) for name in NUMBERS} == {name: numbers[1] for name, numbers in NUMBERS.items()}
