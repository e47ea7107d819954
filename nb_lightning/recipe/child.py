"""Run a command on a pseudo-terminal: its lines go to a log, its progress bar to the caller, signals to the command.

Why a terminal and not a pipe:
    * Progress looks as it does for a user. On a pipe tqdm's bars with `disable=None` are off (data.pairs, evaluate),
      and Python hands over its output in blocks.
    * A killed recipe leaves nothing behind. The kernel hangs the terminal up and sends SIGHUP to the whole process
      group, the launcher and the train.py that it started. Linux's parent-death signal (prctl) reaches only the
      direct child, and a second process would go on writing into the run.
"""

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

COLUMNS = 110  # width of the terminal that the command sees
TICK = 0.5  # seconds between two reports of its progress
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """What a terminal shows of a command's output: finished lines go to `log`, `current_line` is the last one.

    A progress bar overwrites its line many times; the log gets only the final state.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log, self._unfinished, self.current_line = log, "", ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, output: bytes) -> None:
        text = self._unfinished + self._decoder.decode(output)
        *lines, rest = text.replace("\r\n", "\n").split("\n")
        for line in lines:
            self.current_line = self._visible(line) or self.current_line
            self._log(f"{self._visible(line)}\n")
        self._unfinished = rest[rest.rstrip("\r").rfind("\r") + 1 :]
        self.current_line = self._visible(rest) or self.current_line

    def close(self) -> None:
        if self._unfinished:
            self.feed(b"\n")

    @staticmethod
    def _visible(line: str) -> str:
        """Return what the last carriage return left standing, without escape sequences."""
        states = [state.rstrip() for state in _ESCAPE.sub("", line).split("\r")]
        return next((state for state in reversed(states) if state), "")


def run(command: Sequence[str], log: Path, lock: int, tick: Callable[[str], object]) -> tuple[int, int | None]:
    """Run `command` to its end and append its output to `log`.

    SIGTERM and Ctrl-C are passed on each time they come. The command ends as it does alone: train.py saves first.

    Args:
        command: the program and its arguments; "python" means this interpreter.
        lock: a file descriptor that the command inherits: a lock on it holds as long as the command runs.
        tick: called every `TICK` seconds with the last line of the output.

    Returns:
        The exit status (128 + the signal's number where a signal ended it), and the signal that was passed on.
    """
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, COLUMNS))
    passed_on: int | None = None
    program = [sys.executable, *command[1:]] if command[0] == "python" else list(command)
    process = subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,  # else Ctrl-C would reach it twice
        pass_fds=(lock,),
        preexec_fn=_take_terminal,
    )
    os.close(theirs)

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal passed_on
        passed_on = number
        process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open(log, "a", encoding="utf-8") as file:
            screen = Screen(file.write)
            while True:
                code = process.poll()
                _read(ours, screen, 0 if code is not None else TICK)
                file.flush()
                if code is not None:
                    screen.close()
                    return code if code >= 0 else 128 - code, passed_on
                tick(screen.current_line)
    except BaseException:  # a full disk, say. The command saves; its output must be read, or it would block
        process.send_signal(signal.SIGTERM)
        discarded = Screen(lambda _: None)
        while process.poll() is None:
            _read(ours, discarded, TICK)
        raise
    finally:
        os.close(ours)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _read(terminal: int, screen: Screen, seconds: float) -> None:
    """Feed the screen for `seconds`; with 0, with everything that is there already."""
    deadline = time.monotonic() + seconds
    while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            output = os.read(terminal, 65536)
        except OSError:  # Linux, when the other end is closed
            output = b""
        if not output:
            time.sleep(0.02)  # the command is about to end
            return
        screen.feed(output)
        if seconds and time.monotonic() > deadline:
            return


def _take_terminal() -> None:
    """In the child: make its output the terminal that controls its session, and stop ignoring signals.

    This process may have been started with signals ignored (nohup; SIGINT in a script's background job).
    """
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
