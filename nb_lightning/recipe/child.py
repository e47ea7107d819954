"""A command on a terminal of its own: its lines in a log, its progress bar at hand, its signals passed on."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

WIDTH = 110  # columns of the terminal that the command sees
TICK = 0.5  # seconds between two looks at its progress
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """What a terminal shows of a command's output: whole lines go to `log`, the last one is `now`.

    A progress bar writes over its own line again and again; the log gets what was there in the end.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log, self._rest, self.now = log, "", ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, output: bytes) -> None:
        text = self._rest + self._decoder.decode(output)
        *lines, rest = text.replace("\r\n", "\n").split("\n")
        for line in lines:
            self.now = self._shown(line) or self.now
            self._log(f"{self._shown(line)}\n")
        self._rest = rest[rest.rstrip("\r").rfind("\r") + 1 :]
        self.now = self._shown(rest) or self.now

    def close(self) -> None:
        if self._rest:
            self.feed(b"\n")

    @staticmethod
    def _shown(line: str) -> str:
        """What the last carriage return left standing."""
        parts = [part.rstrip() for part in _ESCAPE.sub("", line).split("\r")]
        return next((part for part in reversed(parts) if part), "")


def run(command: Sequence[str], log: Path, lock: int, tick: Callable[[str], object]) -> tuple[int, int | None]:
    """Run `command` to its end; its output is added to `log`.

    SIGTERM and Ctrl-C are passed on, as often as they come, and the command ends as it does: train.py saves. Should
    this process be killed, the command's terminal is gone with it, and the kernel ends the command (SIGHUP).

    Args:
        lock: a file descriptor that the command holds as long as it runs.
        tick: called twice a second with the last line of the output.

    Returns:
        its exit status (128 + the number of a signal that ended it), and the signal that was passed on to it.
    """
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, WIDTH))
    stopped: int | None = None
    program = [sys.executable, *command[1:]] if command[0] == "python" else list(command)
    process = subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end,
        start_new_session=True,  # or Ctrl-C would reach it twice
        pass_fds=(lock,),
        preexec_fn=_own_terminal,
    )
    os.close(end)

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = number
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open(log, "a", encoding="utf-8") as file:
            screen = Screen(file.write)
            while True:
                code = process.poll()
                _read(terminal, screen, 0 if code is not None else TICK)
                file.flush()
                if code is not None:
                    screen.close()
                    return code if code >= 0 else 128 - code, stopped
                tick(screen.now)
    except BaseException:  # no room for the log, say: the command saves, and who waits for its output reads it
        process.send_signal(signal.SIGTERM)
        unheard = Screen(lambda _: None)
        while process.poll() is None:
            _read(terminal, unheard, TICK)
        raise
    finally:
        os.close(terminal)
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(terminal: int, screen: Screen, seconds: float) -> None:
    """What comes within `seconds`, and at least all that is there."""
    deadline = time.monotonic() + seconds
    while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # Linux says so when nobody holds the other end
            read = b""
        if not read:
            time.sleep(0.02)  # it ends now, as a rule
            return
        screen.feed(read)
        if seconds and time.monotonic() > deadline:
            return


def _own_terminal() -> None:
    """In the child: its output is the terminal that rules its session, and whose loss ends it.

    It hears signals that this process may have been started to ignore (nohup; SIGINT, in the background of a script).
    """
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


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
