"""How a command ended, in a line: its exit status in words, and the last line of its log."""

from __future__ import annotations

import signal
from pathlib import Path

HINT = "Set the environment variable HYDRA_FULL_ERROR"  # the last line of every error of Hydra


def describe_exit(code: int) -> str:
    """1 -> "exit status 1"; -15 (as `subprocess` has it) and 143 (as a shell has it) -> "killed by SIGTERM ..."."""
    number = -code if code < 0 else code - 128
    if number not in set(signal.Signals):
        return f"exit status {code}"
    cause = ", perhaps for want of memory" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{cause} (exit status {128 + number})"


def last_line(log: Path, start: int = 0) -> str:
    """Return the last informative line after byte `start` of a log, or "" if there is none.

    Left out are Hydra's hint and indented lines (a progress bar, say), which belong to a line before them.
    """
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", HINT))]
    return lines[-1].rstrip() if lines else ""
