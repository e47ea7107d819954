"""How a command that another one ran has ended, in one line."""

from __future__ import annotations

import signal
from pathlib import Path

HINT = "Set the environment variable HYDRA_FULL_ERROR"  # Hydra's last line, whatever was wrong


def ended(code: int) -> str:
    """1 -> "exit status 1"; -15 (as `subprocess` has it) and 143 (as a shell has it) -> "killed by SIGTERM ..."."""
    number = -code if code < 0 else code - 128
    if number not in set(signal.Signals):
        return f"exit status {code}"
    why = ", perhaps for want of memory" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{why} (exit status {128 + number})"


def last_line(log: Path, start: int = 0) -> str:
    """The last line after byte `start` that says something, "" if none does.

    Hydra's hint says nothing; what is indented, a progress bar say, belongs to a line before it.
    """
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", HINT))]
    return lines[-1].rstrip() if lines else ""
