"""Runs the steps one after the other, and knows after a kill where it was.

    <folder>/state.json   of each step begun: command, state, seconds; written atomically
             <step>.log   the command and all it said, restarts below one another
             replaced/    what a step that began afresh found in its place
             lock         held by whoever runs, the running command included

A finished step is not run again while its command is the same; a stopped one goes on; one with another command begins
afresh, and all after it too.
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
from nb_lightning.recipe.child import ended, last_line
from nb_lightning.recipe.steps import Step

CLEARING, RUNNING, FINISHED = "clearing", "running", "finished"
SAVE_EVERY = 10.0  # seconds between two notes of the time that a step has taken
PATIENCE = 20.0  # seconds for a command to end whose recipe was killed


@dataclass
class Progress:
    """Where the recipe is; `doing` is the step's own last line."""

    step: Step
    number: int
    of: int
    earlier: float  # seconds that other steps took
    seconds: float  # that this step took, over all its restarts
    doing: str = ""


class Runner:
    """Args:
    folder: where state and logs are.
    tell: shows a line that stays.
    show: shows where the recipe is, in passing.
    """

    def __init__(
        self, folder: Path, tell: Callable[[str], object], show: Callable[[Progress], object] = lambda _: None
    ) -> None:
        self.folder, self.tell, self.show = folder, tell, show
        self.state_file = folder / "state.json"

    def run(self, steps: Sequence[Step], chosen: Sequence[Step], again: str | None = None) -> None:
        """Run the steps `chosen` of all `steps`; the step `again` and those after it afresh.

        Raises:
            RunStopped: a command failed.
            SystemExit: it was asked to stop; with 128 and the signal's number.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            self._lock(lock.fileno())
            for step in chosen:
                state = self._state()
                known = state.get(step.name, {})
                same = known.get("identity") == step.identity and step.name != again
                number = steps.index(step) + 1
                title = f"[{number}/{len(steps)}] {step.name}"
                if same and known["state"] == FINISHED and all(place.exists() for place in step.makes):
                    self.tell(f"{title}: finished before, in {clock(known['seconds'])}")
                    continue
                fresh = not same or known["state"] != RUNNING
                if fresh:
                    self._clear(step, steps[number:], state)
                    known = {"seconds": 0.0}
                words = step.command if fresh else [*step.command, *step.resume]
                self.tell(f"{title}: {shlex.join(words)}")
                earlier = sum(entry["seconds"] for name, entry in self._state().items() if name != step.name)
                progress = Progress(step, number, len(steps), earlier, known["seconds"])
                stopped = self._do(progress, words, lock.fileno())
                if stopped:
                    self.tell(f"stopped by {signal.Signals(stopped).name} in {step.name}; {to_go_on(again)}")
                    raise SystemExit(128 + stopped)

    def _lock(self, lock: int) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(f"another recipe, or a command of it, is running in {self.folder}") from None
                time.sleep(0.1)

    def _state(self) -> dict[str, dict[str, Any]]:
        return read_json(self.state_file, {})

    def _note(self, step: Step, state: str, seconds: float) -> None:
        entry = {"state": state, "command": step.command, "identity": step.identity, "seconds": round(seconds, 1)}
        write_json(self.state_file, {**self._state(), step.name: entry})

    def _clear(self, step: Step, later: Sequence[Step], state: dict[str, dict[str, Any]]) -> None:
        """Move what is in the place of the step's results, and what later steps made of them; forget these.

        Noted before it is begun: killed in between, the step begins afresh once more instead of going on with the old.
        """
        gone = {other.name for other in later} | {step.name}
        stale = [other for other in later if other.name in state]
        if stale:
            self.tell(f"to be run again after {step.name}: {', '.join(other.name for other in stale)}")
        write_json(self.state_file, {name: entry for name, entry in state.items() if name not in gone})
        self._note(step, CLEARING, 0.0)
        for place in [place for one in (step, *stale) for place in one.makes]:
            if place.exists():
                new = self._free(place.name)
                new.parent.mkdir(exist_ok=True)
                shutil.move(place, new)  # to another disk too; killed in between, it is done again
                self.tell(f"{place} was there already: moved to {new}")

    def _free(self, name: str) -> Path:
        number = 1
        while (self.folder / "replaced" / f"{name}.{number}").exists():
            number += 1
        return self.folder / "replaced" / f"{name}.{number}"

    def _do(self, progress: Progress, words: list[str], lock: int) -> int | None:
        """Returns the signal that asked to stop, also where the step had come to its end by then."""
        step, before, began = progress.step, progress.seconds, time.monotonic()
        log = self.folder / f"{step.name}.log"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(words)}    # {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            start = file.tell()
        self._note(step, RUNNING, before)
        saved = began

        def tick(line: str) -> None:
            nonlocal saved
            now = time.monotonic()
            progress.seconds, progress.doing = before + now - began, line
            if now - saved > SAVE_EVERY:
                self._note(step, RUNNING, progress.seconds)
                saved = now
            self.show(progress)

        code, stopped = child.run(words, log, lock, tick)
        seconds = before + time.monotonic() - began
        if code == 0:
            self._note(step, FINISHED, seconds)
            self.tell(f"[{progress.number}/{progress.of}] {step.name}: done in {clock(seconds)}")
            return stopped
        self._note(step, RUNNING, seconds)
        if not stopped:
            said = last_line(log, start) or "it said nothing"
            raise RunStopped(f"step {step.name} failed: {ended(code)}; the end of {log}: {said}")
        return stopped


def to_go_on(again: str | None) -> str:
    """What to do after a stop; --again a second time would begin its step afresh once more."""
    return f"run the same command again{', without --again,' if again else ''} to go on"


def clock(seconds: float) -> str:
    """3671 -> "1:01:11"; 71 -> "1:11"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
