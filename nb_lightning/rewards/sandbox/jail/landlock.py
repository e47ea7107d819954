"""Landlock: a job reads only the standard library, uses no TCP and signals no process outside (landlock(7))."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on all architectures
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# By ABI version: all rights to files, to TCP (bind, connect), and the scopes (abstract sockets, signals).
FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
NET = {4: 0b11}
SCOPED = {6: 0b11}


_syscall = ctypes.CDLL(None, use_errno=True).syscall


def abi() -> int:
    """Return the version of Landlock in this kernel; 0 if there is none or it is switched off."""
    return max(_syscall(CREATE_RULESET, None, 0, 1), 0)


def ruleset(readable: Iterable[str]) -> int:
    """Create a ruleset for `restrict` that allows only reading at or below `readable`; return its descriptor.

    Raises:
        OSError: the kernel refuses.
    """
    version = abi()
    attributes = struct.pack("QQQ", *(_newest(table, version) for table in (FILES, NET, SCOPED)))
    size = 8 if version < 4 else 16 if version < 6 else 24
    descriptor = _checked(_syscall(CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for path in readable:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        is_folder = stat.S_ISDIR(os.fstat(place).st_mode)
        rule = struct.pack("=Qi", READ_FILE | (READ_DIR if is_folder else 0), place)  # packed in the kernel's header
        _checked(_syscall(ADD_RULE, descriptor, 1, rule, 0), "landlock_add_rule")
        os.close(place)
    return descriptor


def restrict(descriptor: int) -> None:
    """Put this process under the ruleset, irrevocably. Needs no_new_privs."""
    _checked(_syscall(RESTRICT_SELF, descriptor, _QUIET), "landlock_restrict_self")


def _newest(table: dict[int, int], version: int) -> int:
    return max((rights for since, rights in table.items() if since <= version), default=0)


def _checked(result: int, name: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {errno.errorcode.get(code, code)}")
    return result


_QUIET = int(abi() >= 7)  # do not write the denials of a job to the audit log
