"""Run the steps one after the other, and after a kill go on where it stopped.

    <folder>/state.json   each started step: command, state, seconds; written atomically
             <step>.log   the command and its output, restarts one below the other
             replaced/    results that were in the way of a step that started afresh
             lock         held by the runner and by the command that it runs

A finished step is not run again while its command is the same, and a stopped one is resumed. A step with another
command starts afresh, and so do all steps after it.
"""

from __future__ import annotations

import fcntl
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nb_lightning.errors import RunStopped
from nb_lightning.files import read_json, write_json
from nb_lightning.recipe import child
from nb_lightning.recipe.outcome import describe_exit, last_line
from nb_lightning.recipe.steps import Step

CLEARING, RUNNING, FINISHED = "clearing", "running", "finished"
SAVE_EVERY = 10.0  # seconds between two updates of a step's time in state.json
LOCK_TIMEOUT = 20.0  # seconds; a command whose recipe was killed may still be ending


@dataclass
class Progress:
    """Where the recipe is.

    Attributes:
        number, total: of the step, from 1, and of all steps.
        earlier_seconds: what the other steps took.
        seconds: what this step took, over all its restarts.
        line: the last line of its output.
    """

    step: Step
    number: int
    total: int
    earlier_seconds: float = 0.0
    seconds: float = 0.0
    line: str = ""

    @property
    def title(self) -> str:
        return f"[{self.number}/{self.total}] {self.step.name}"


class Runner:
    """Runs steps and keeps their state in a folder.

    Args:
        folder: where state and logs are.
        tell: prints a line.
        show: shows the progress; called twice a second while a step runs.
    """

    def __init__(
        self, folder: Path, tell: Callable[[str], object], show: Callable[[Progress], object] = lambda _: None
    ) -> None:
        self.folder, self.tell, self.show = folder, tell, show
        self.state_file = folder / "state.json"

    def run(self, steps: Sequence[Step], chosen: Sequence[Step], again: str | None = None) -> None:
        """Run the steps `chosen` out of all `steps`; the step `again` and those after it start afresh.

        Raises:
            RunStopped: a command failed.
            SystemExit: a signal asked to stop; with 128 and the signal's number.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            self._acquire(lock.fileno())
            for step in chosen:
                received = self._run_step(step, steps, step.name == again, lock.fileno())
                if received:
                    self.tell(f"stopped by {signal.Signals(received).name} in {step.name}; {how_to_go_on(again)}")
                    raise SystemExit(128 + received)

    def _acquire(self, lock: int) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"another recipe, or a command of it, is running in {self.folder}") from None
                time.sleep(0.1)

    def _run_step(self, step: Step, steps: Sequence[Step], is_again: bool, lock: int) -> int | None:
        """Skip, resume or start a step; return the signal that asked to stop."""
        entry = self._state().get(step.name, {})
        is_same = entry.get("identity") == step.identity and not is_again
        progress = Progress(step, steps.index(step) + 1, len(steps))
        if is_same and entry["state"] == FINISHED and all(path.exists() for path in step.makes):
            self.tell(f"{progress.title}: finished before, in {clock(entry['seconds'])}")
            return None
        if is_same and entry["state"] == RUNNING:
            command, progress.seconds = [*step.command, *step.resume], entry["seconds"]
        else:
            self._clear(step, steps[progress.number :])
            command = step.command
        others = (other["seconds"] for name, other in self._state().items() if name != step.name)
        progress.earlier_seconds = sum(others)
        self.tell(f"{progress.title}: {shlex.join(command)}")
        return self._execute(progress, command, lock)

    def _state(self) -> dict[str, dict[str, Any]]:
        return read_json(self.state_file, {})

    def _record(self, step: Step, state: str, seconds: float) -> None:
        entry = {"state": state, "command": step.command, "identity": step.identity, "seconds": round(seconds, 1)}
        write_json(self.state_file, {**self._state(), step.name: entry})

    def _clear(self, step: Step, later: Sequence[Step]) -> None:
        """Move the old results of the step and of later steps aside, and forget these steps.

        The state is written first: after a kill in between, the step starts afresh instead of resuming the old run.
        """
        state = self._state()
        forgotten = {other.name for other in later} | {step.name}
        outdated = [other for other in later if other.name in state]
        if outdated:
            self.tell(f"to be run again after {step.name}: {', '.join(other.name for other in outdated)}")
        write_json(self.state_file, {name: entry for name, entry in state.items() if name not in forgotten})
        self._record(step, CLEARING, 0.0)
        for path in [path for cleared in (step, *outdated) for path in cleared.makes]:
            if path.exists():
                destination = self._unused_name(path.name)
                destination.parent.mkdir(exist_ok=True)
                shutil.move(path, destination)  # to another disk too; after a kill in between it is moved again
                self.tell(f"{path} was there already: moved to {destination}")

    def _unused_name(self, name: str) -> Path:
        number = 1
        while (self.folder / "replaced" / f"{name}.{number}").exists():
            number += 1
        return self.folder / "replaced" / f"{name}.{number}"

    def _execute(self, progress: Progress, command: list[str], lock: int) -> int | None:
        """Run a step's command; return the signal that asked to stop, even if the command finished all the same.

        Raises:
            RunStopped: the command failed.
        """
        step, seconds_before, started = progress.step, progress.seconds, time.monotonic()
        log = self.folder / f"{step.name}.log"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}    # {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            log_start = file.tell()
        self._record(step, RUNNING, seconds_before)
        saved = started

        def tick(line: str) -> None:
            nonlocal saved
            now = time.monotonic()
            progress.seconds, progress.line = seconds_before + now - started, line
            if now - saved > SAVE_EVERY:
                self._record(step, RUNNING, progress.seconds)
                saved = now
            self.show(progress)

        code, received = child.run(command, log, lock, tick)
        seconds = seconds_before + time.monotonic() - started
        self._record(step, FINISHED if code == 0 else RUNNING, seconds)
        if code == 0:
            self.tell(f"{progress.title}: done in {clock(seconds)}")
        elif not received:
            reason = last_line(log, log_start) or "it said nothing"
            raise RunStopped(f"step {step.name} failed: {describe_exit(code)}; the end of {log}: {reason}")
        return received


def how_to_go_on(again: str | None) -> str:
    """Say what to do after a stop: --again a second time would start its step afresh once more."""
    return f"run the same command again{', without --again,' if again else ''} to go on"


def clock(seconds: float) -> str:
    """3671 -> "1:01:11"; 71 -> "1:11"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
