"""Attacks on the sandbox, as programs: programs/*.txt. Each prints ESCAPED when it could do what it must not.

Bounded by themselves (a few forks, megabytes, seconds): a sandbox that fails must not take the machine with it.
VICTIM is a file with the word TREASURE, FOLDER one that anyone may write to, PORT a listener on loopback.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Raw system calls, without what Python puts before them.
PREAMBLE = """
import ctypes, os, sys, platform
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
def call(x86, arm, *args):
    return libc.syscall(x86 if X86 else arm, *args)
def escaped(ok=True):
    if ok: print("ESCAPED", flush=True)
"""
ONLY_INSIDE = " (only inside)"  # the others are run outside the sandbox too, where they must succeed


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    control: bool


def attacks(kind: str) -> list[Attack]:
    """From blocks that begin with a line "## name"."""
    text = "\n" + (Path(__file__).parent / "programs" / f"{kind}.txt").read_text()
    blocks = [block.partition("\n") for block in text.split("\n## ")[1:]]
    return [
        Attack(name.removesuffix(ONLY_INSIDE), code, kind in CONTROLLED and not name.endswith(ONLY_INSIDE))
        for name, _, code in blocks
    ]


CONTROLLED = ("files", "processes", "network", "kernel")
FILES, PROCESSES, NETWORK, KERNEL = map(attacks, CONTROLLED)
MEMORY = attacks("memory")  # these end by MemoryError, a limit or a crash; outside they would only be large
TIME = attacks("time")  # these must be ended by a limit of time
HARNESS = attacks("harness")  # against what watches and reads: the zygote lives on and the outcome is orderly
